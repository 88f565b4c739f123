"""What a stage is put together of: the feature sets at the moment it takes over, and its lease."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import xgboost

from agents.artifacts import load_file
from streams.contracts import V6
from streams.keys import Keys, agent_stage
from streams.messages import AgentState
from streams.redis import RedisStore, connect
from tests.chaos.scene import TREES
from tests.helpers import LIMIT_S
from worker.assembly import load_options
from worker.logs import make_logger
from worker.roster import Artifact, Record, Trial
from worker.service import Options
from worker.serving import _feature_process, _Given, lease_s
from worker.settings import Settings


@pytest.fixture
def given(models, valkey, namespace, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    settings = Settings(agents=TREES, quorum=2, models=folder, namespace=namespace, allow_unscaled=["xgboost"])
    store = RedisStore(connect(valkey, timeout_s=LIMIT_S), Keys(namespace), "features")
    return _Given(settings, Options(), make_logger("error"), store)


def wide(folder: Path) -> Path:
    """An xgboost over the 49 features of v6."""
    rng = np.random.default_rng(1)
    data = xgboost.DMatrix(rng.standard_normal((200, 49)), rng.standard_normal(200), feature_names=list(V6.features))
    file = folder / "xgboost_v20990101_000000_v6.ubj"
    xgboost.train({"max_depth": 2, "verbosity": 0}, data, 4).save_model(file)
    return file


@pytest.mark.parametrize("on_trial", [False, True])
def test_a_standby_computes_the_sets_that_are_read_when_it_takes_over(given, tmp_path, on_trial):
    """Between its start and that moment a model over another set came: to serve, or from elsewhere as a canary."""
    process = _feature_process(given)
    file = wide(tmp_path if on_trial else given.settings.models)
    loading = load_file(file, "xgboost", load_options(given.settings))
    artifact = Artifact.of(loading.model)
    record = Record(trial=Trial(AgentState.CANARY, artifact)) if on_trial else Record(artifact)
    agent = RedisStore(given.store.client, given.store.keys, agent_stage("xgboost"))
    given.store.client.hset(agent.state_key("agents"), "xgboost", record.pack())
    assert process._own()
    process._start()
    assert {feature_set.name for feature_set in process.stage.sets} == {"v3", "v6"}


@pytest.mark.parametrize(
    ("stage", "lease", "deadline", "expected"),
    [("agent:nhits", 2.0, 2.0, 1.0), ("agent:nhits", 2.0, 600.0, 2.0), ("consensus", 2.0, 2.0, 2.0)],
)
def test_a_killed_agent_is_replaced_before_it_is_late(stage, lease, deadline, expected):
    assert lease_s(Settings(lease_s=lease, deadline_s=deadline), stage) == expected
