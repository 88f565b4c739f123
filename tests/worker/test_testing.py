"""What users' own tests stand on: the documented example runs, and memory gives what a server gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streams.keys import Keys
from streams.redis import connect
from tests.chaos.scene import feed, market
from tests.helpers import ROOT
from worker.errors import UsageError
from worker.logs import make_logger
from worker.service import Options
from worker.serving import serve
from worker.settings import Settings
from worker.testing import Quartet, in_memory

pytest_plugins = ["pytester"]
Make = Callable[..., Quartet]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real tree models."""
    from worker.training.market import generate
    from worker.training.train import train_agents

    folder = tmp_path_factory.mktemp("models")
    bars = generate(4, 900, 3, signal="planted").bars()
    train_agents(bars, folder, agents=("xgboost", "lightgbm"), seed=1)
    return folder


def as_mapping(fields: dict[bytes, bytes]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in fields.items()}


def write_csv(path: Path, bars: list[dict[bytes, bytes]]) -> None:
    rows = [as_mapping(bar) for bar in bars]
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def test_the_documented_example_runs_word_for_word(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, models: Path
) -> None:
    """The expected orders come from the same chain made without the fixture."""
    document = (ROOT / "docs" / "testing-your-strategy.md").read_text()
    conftest, test = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert len(test.strip().splitlines()) == 5
    bars = market(2, 100)
    with in_memory(models, quorum=2, warmup_bars={"v3": 30}) as run:
        signals = run.run(map(as_mapping, bars)).signals
    orders = [(s["bar_id"], s["action"]) for s in signals if s["status"] == "ok"]
    assert len(orders) > 5
    pytester.makeconftest(conftest)
    pytester.makepyfile(f"EXPECTED_ORDERS = {orders!r}\n{test}")
    write_csv(pytester.path / "bars.csv", bars)
    (pytester.path / "models").symlink_to(models)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-q")
    done.assert_outcomes(passed=1)


def test_memory_gives_what_a_server_gives(models: Path, valkey: str, namespace: str, tmp_path: Path) -> None:
    """Payload for payload, on every output stream."""
    bars = market(2, 120)
    values: dict[str, Any] = {"models": models, "quorum": 2, "warmup_bars": {"v3": 30}}
    own = {"redis": valkey, "namespace": namespace, "http_port": 0, "state_dir": tmp_path, "lease_s": 0.5}
    feed(valkey, f"{namespace}:bars", bars)
    serve(Settings(**values, **own), Options(until_idle_s=0.1), make_logger("error"))
    made = Quartet(Settings(**values)).run(map(as_mapping, bars))
    keys, mine = Keys(namespace), made.keys
    with connect(valkey) as client:
        for theirs, ours in ((keys.features, mine.features), (keys.signals, mine.signals), *(
            (keys.votes(agent), mine.votes(agent)) for agent in ("xgboost", "lightgbm", "nhits", "patchtst")
        )):  # fmt: skip
            found = [fields[b"data"] for _, fields in client.xrange(theirs)]
            assert found
            assert [fields[b"data"] for _, fields in made.streams.after(ours, "0-0")] == found
    made.close()


def test_what_is_refused_is_told_with_its_reason(models: Path) -> None:
    with in_memory(models, warmup_bars={"v3": 30}) as run:
        run.run([{**as_mapping(market(1, 1)[0]), "high": "-1"}])
        assert [entry["reason"] for entry in run.rejected] == ["price_sign"]
        assert run.actions == []


def test_a_restart_in_the_middle_changes_nothing(models: Path) -> None:
    bars = [as_mapping(bar) for bar in market(2, 120)]
    with in_memory(models, warmup_bars={"v3": 30}) as whole, in_memory(models, warmup_bars={"v3": 30}) as broken:
        whole.run(bars)
        broken.run(bars[:101]).restart().run(bars[101:])
        assert broken.signals == whole.signals
        assert broken.features == whole.features
        assert len(whole.signals) == 2 * 91


def test_a_folder_without_models_says_so(tmp_path: Path) -> None:
    with in_memory(tmp_path) as run, pytest.raises(UsageError, match="no agent can vote"):
        run.run([])
