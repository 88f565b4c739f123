"""Training end to end: what the written artifacts hold, that they load, repeat, and look at the training part alone."""

import hashlib
import json
import re
from datetime import UTC, datetime

import numpy as np
import pytest

from agents import scalers
from agents.agent import Refused
from agents.artifacts import LoadOptions, discover, load, load_agent
from streams.contracts import V3
from streams.messages import AGENTS, Action
from worker.errors import CheckFailed, UsageError
from worker.features.bank import FeatureBank
from worker.quality import QualityLimits
from worker.training.bars import Bars
from worker.training.dataset import make_samples, split
from worker.training.figures import Figures, measure, muting_warning, r_squared, safeguard_warnings
from worker.training.market import generate
from worker.training.train import ensure_models, fit_scaler, train_agents
from worker.training.writing import Artifact, free_stem, publish

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SUFFIX = {"xgboost": ".ubj", "lightgbm": ".txt", "nhits": ".pth", "patchtst": ".pth"}


@pytest.fixture(scope="module")
def small(train_on):
    return train_on("cycle", 4, 700)


def _load(run, agent):
    loaded = load_agent(run.models, agent, LoadOptions())
    assert loaded.model is not None, loaded.refusal
    return loaded.model


def _meta(file):
    return json.loads(file.with_name(file.stem + "_meta.json").read_text())


@pytest.mark.parametrize("agent", AGENTS)
def test_every_artifact_loads_with_its_contract_scaler_and_golden_vectors(small, agent):
    model = _load(small, agent)
    assert model.contract == V3.contract
    assert model.features == V3.features
    assert model.scaler is not None
    assert model.window == (64 if agent in ("nhits", "patchtst") else 1)
    assert model.outputs == (12 if agent in ("nhits", "patchtst") else 1)
    assert model.file == small.trained[agent].file


def test_files_are_named_as_the_contract_names_them_and_nothing_else_is_left(small):
    stems = {t.agent: t.file.stem for t in small.trained.values()}
    for agent, stem in stems.items():
        assert re.fullmatch(rf"{agent}_v\d{{8}}_\d{{6}}_v3", stem)
    endings = [
        ending for a in AGENTS for ending in (stems[a] + SUFFIX[a], stems[a] + "_scaler.json", stems[a] + "_meta.json")
    ]
    assert {f.name for f in small.models.iterdir()} == set(endings)


@pytest.mark.parametrize("agent", AGENTS)
def test_metadata_tell_how_the_artifact_came_to_be(small, agent):
    meta = _meta(small.trained[agent].file)
    assert (meta["contract"], meta["feature_set"], meta["features"]) == (V3.contract, "v3", list(V3.features))
    assert meta["horizon"] == 12
    assert meta["threshold"] > 0
    assert meta["residual_std"] > 0
    assert meta["data"]["first_ts"] == small.bars.ts.min()
    assert meta["data"]["last_ts"] == small.bars.ts.max()
    assert meta["data"]["validation_from_ts"] < meta["data"]["test_from_ts"]
    assert meta["seed"] == 1
    assert meta["libraries"]["numpy"] == np.__version__
    assert meta["validation"]["acted"] > 0
    assert set(meta["validation"]["actions"]) == {"SELL", "HOLD", "BUY"}


@pytest.mark.parametrize("agent", AGENTS)
def test_a_golden_vector_that_was_tampered_with_is_found_out(small, agent, tmp_path):
    file = small.trained[agent].file
    meta = _meta(file)
    meta["golden"]["outputs"][0][-1] += 1e-3
    for source in (file, file.with_name(file.stem + "_scaler.json")):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / f"{file.stem}_meta.json").write_text(json.dumps(meta))
    with pytest.raises(Refused, match="golden_mismatch"):
        load(discover(tmp_path, agent)[0], LoadOptions())


@pytest.mark.parametrize("agent", AGENTS)
def test_the_loaded_model_holds_on_40_to_50_percent_of_the_training_rows(small, agent):
    """Independent of what training counted: the loaded model votes on raw features."""
    model, at = _load(small, agent), small.parts(agent).training
    actions, _ = model.head.decide(model.predict(small.inputs(agent, at)))
    assert 0.40 <= np.mean(actions == Action.HOLD) <= 0.50
    assert np.mean(actions == Action.HOLD) == pytest.approx(small.trained[agent].training_hold)


@pytest.mark.parametrize("agent", AGENTS)
def test_reported_figures_are_those_of_the_loaded_model(small, agent):
    """R2, hit rate and residual deviation written out a second time, from the loaded model's outputs."""
    model, at, trained = _load(small, agent), small.parts(agent).validation, small.trained[agent]
    outputs = model.predict(small.inputs(agent, at))[:, -1]
    truth = small.samples.paths[at, -1]
    acted = np.abs(outputs) > trained.threshold
    r2 = 1 - np.var(truth - outputs) / np.var(truth) - np.mean(truth - outputs) ** 2 / np.var(truth)
    assert trained.validation.r2 == pytest.approx(r2)
    assert trained.validation.acted == acted.sum()
    assert trained.validation.hit_rate == pytest.approx(np.mean((outputs * truth > 0)[acted]))
    assert trained.residual_std == pytest.approx(np.sqrt(np.mean((truth - outputs) ** 2)))


def test_the_scaler_is_the_mean_and_deviation_of_the_training_part_alone(small):
    """Features once more from the bank, symbol by symbol; the part cut by the times in the metadata."""
    meta = _meta(small.trained["xgboost"].file)
    rows = []
    for i in range(len(small.market.symbols)):
        values, ready = FeatureBank((V3,)).update(np.zeros(700, np.int64), small.market.ohlcv[:, i])
        decided_before = small.market.ts + 12 * 60_000 < meta["data"]["validation_from_ts"]
        rows.append(values[ready[:, 0] & decided_before])
    training = np.concatenate(rows)
    assert len(training) == meta["data"]["training_rows"]
    for trained in small.trained.values():
        file = trained.file.with_name(trained.file.stem + "_scaler.json")
        scaler = scalers.parse(file.read_bytes(), ".json")
        np.testing.assert_allclose(scaler.mean, training.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(scaler.scale, training.std(axis=0), rtol=1e-12)


def test_bars_from_validation_on_change_nothing_that_training_sees(small):
    """Other bars after the cut: the same scaler, bit for bit, and the same scaled rows and labels to learn from."""
    parts = split(small.samples, windowed=False)
    later = small.bars.ts >= parts.cuts[0]
    ohlcv = small.bars.ohlcv.copy()
    ohlcv[later] *= 3
    other = make_samples(Bars(small.bars.symbol, small.bars.ts, small.bars.interval, ohlcv))
    other_parts = split(other, windowed=False)
    np.testing.assert_array_equal(parts.training, other_parts.training)
    one, two = fit_scaler(small.samples, parts.training), fit_scaler(other, other_parts.training)
    assert scalers.to_json(one.scaler) == scalers.to_json(two.scaler)
    np.testing.assert_array_equal(one.z[parts.training], two.z[parts.training])
    np.testing.assert_array_equal(small.samples.paths[parts.training], other.paths[parts.training])


def test_the_same_seed_gives_the_same_predictions_and_what_is_there_is_not_trained_again(small, tmp_path):
    """One folder all at once, one in two goes and with the rows shuffled: bit-equal outputs of all four."""
    order = np.random.default_rng(0).permutation(len(small.bars))
    first = train_agents(small.bars.take(order), tmp_path, agents=["patchtst", "xgboost"], seed=1, now=NOW)
    assert [t.agent for t in first] == ["xgboost", "patchtst"]
    before = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in tmp_path.iterdir()}
    told = []
    second = ensure_models(tmp_path, small.bars, seed=1, progress=lambda *step: told.append(step))
    assert [t.agent for t in second] == ["lightgbm", "nhits"]
    assert {agent for agent, _, _ in told} == {"lightgbm", "nhits"}
    assert all(0 < done <= total for _, done, total in told)
    assert before.items() <= {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in tmp_path.iterdir()}.items()
    assert ensure_models(tmp_path, small.bars, seed=1) == []
    for agent in AGENTS:
        inputs = small.inputs(agent, small.parts(agent).test)
        again = load_agent(tmp_path, agent, LoadOptions()).model
        assert again is not None
        assert again.predict(inputs).tobytes() == _load(small, agent).predict(inputs).tobytes(), agent


def test_another_seed_gives_another_network(small, tmp_path):
    train_agents(small.bars, tmp_path, agents=["nhits"], seed=2, now=NOW)
    inputs = small.inputs("nhits", small.parts("nhits").test)
    other = load_agent(tmp_path, "nhits", LoadOptions()).model
    assert other is not None
    assert not np.array_equal(other.predict(inputs), _load(small, "nhits").predict(inputs))


def test_gaps_in_the_bars_are_trained_around(small, tmp_path):
    keep = (small.bars.ts != small.market.ts[-60]) | (small.bars.symbol == "SYN02")
    (trained,) = train_agents(small.bars.take(keep), tmp_path, agents=["lightgbm"], now=NOW)
    # Three symbols lose the row itself and the 12 whose labels would reach over it.
    assert trained.test.rows == small.trained["lightgbm"].test.rows - 3 * 13


def test_an_unknown_agent_is_named_with_those_that_exist(small, tmp_path):
    with pytest.raises(UsageError, match="unknown agent catboost; the agents are xgboost, lightgbm, nhits, patchtst"):
        train_agents(small.bars, tmp_path, agents=["catboost"])


def test_a_models_folder_that_is_a_file_is_refused_before_anything_is_trained(small, tmp_path):
    (tmp_path / "models").write_text("")
    with pytest.raises(UsageError, match=r"--models .*models: cannot be made a folder"):
        train_agents(small.bars, tmp_path / "models")


def test_a_second_training_in_the_same_second_takes_the_next_one(tmp_path):
    (tmp_path / "nhits_v20260102_030405_v3.pth").write_bytes(b"")
    assert free_stem(tmp_path, "nhits", NOW, "v3") == "nhits_v20260102_030406_v3"
    assert free_stem(tmp_path, "xgboost", NOW, "v3") == "xgboost_v20260102_030405_v3"


def test_an_artifact_that_does_not_load_is_not_kept(small, tmp_path):
    good = small.trained["xgboost"].file
    scaler = good.with_name(good.stem + "_scaler.json").read_bytes()
    meta = _meta(good) | {"contract": "0" * 64}
    with pytest.raises(CheckFailed, match=r"xgboost: trained, but the artifact does not load .* contract_mismatch"):
        publish(tmp_path, "xgboost_v20260102_030405_v3", Artifact("xgboost", good.read_bytes(), scaler, meta))
    assert list(tmp_path.iterdir()) == []


def test_r2_is_1_for_the_truth_0_for_the_mean_and_below_for_worse():
    truth = np.array([0.01, -0.02, 0.03, 0.0])
    assert r_squared(truth, truth) == 1
    assert r_squared(truth, np.full(4, truth.mean())) == pytest.approx(0)
    assert r_squared(truth, -truth) < 0


def test_figures_of_a_hand_made_part():
    """Four votes by hand: BUY before a rise, BUY before a fall, SELL before a fall, HOLD."""
    outputs = np.array([[0.02], [0.02], [-0.02], [0.001]])
    seen = measure(outputs, np.array([0.01, -0.01, -0.03, 0.5]), threshold=0.01, residual_std=0.02)
    assert (seen.acted, seen.rows) == (3, 4)
    assert seen.hit_rate == pytest.approx(2 / 3)
    assert seen.actions == {"SELL": 0.25, "HOLD": 0.25, "BUY": 0.5}


def test_no_vote_at_all_has_no_hit_rate_and_json_says_null():
    seen = measure(np.zeros((3, 1)), np.array([0.1, -0.1, 0.2]), threshold=0.01, residual_std=0.02)
    assert np.isnan(seen.hit_rate)
    assert seen.as_json()["hit_rate"] is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"actions": {"SELL": 0.1, "HOLD": 0.19, "BUY": 0.71}}, "71% of the votes are BUY"),
        ({"actions": {"SELL": 0.07, "HOLD": 0.86, "BUY": 0.07}}, "86% of the votes are HOLD"),
        ({"confidence_std": 0.049}, "confidence deviates by 0.049 only"),
        ({"confidence_range": 0.119}, "confidence ranges over 0.119 only"),
    ],
)
def test_votes_that_would_be_muted_are_warned_of_and_votes_at_the_limit_are_not(change, text):
    limit = {"actions": {"SELL": 0.0, "HOLD": 0.3, "BUY": 0.7}, "confidence_std": 0.05, "confidence_range": 0.12}
    fields = {"rows": 10, "r2": 0.1, "hit_rate": 0.5, "acted": 7}
    assert safeguard_warnings(Figures(**fields, **limit)) == []
    (warning,) = safeguard_warnings(Figures(**fields, **(limit | change)))
    assert text in warning


def test_a_degenerate_stretch_is_warned_of_though_the_whole_is_healthy():
    """300 votes of every kind, 400 BUY, 600 of every kind, in another order in memory."""
    rng = np.random.default_rng(4)
    forecast = rng.permuted(np.tile([-0.02, 0.001, 0.02], 300)) + rng.uniform(-0.0005, 0.0005, 900)
    forecast = np.concatenate([forecast[:300], 0.02 + 0.01 * rng.random(400), forecast[300:]])
    ts, mixed = np.arange(len(forecast)), rng.permutation(len(forecast))
    levels = (0.01, 0.02)
    assert safeguard_warnings(measure(forecast[:, None], rng.normal(size=len(forecast)), *levels)) == []
    (warning,) = muting_warning("nhits", forecast[mixed][:, None], ts[mixed], levels)
    first = next(
        i + 1 for i in range(200, len(forecast)) if np.mean(forecast[max(0, i + 1 - 500) : i + 1] > 0.01) > 0.7
    )
    assert warning == f"vote {first} of {len(forecast)} in the order of time shows action_collapse over the last 500"
    assert muting_warning("nhits", forecast[:, None], ts, levels, QualityLimits(action_share=0.95)) == []


def test_a_column_that_is_constant_in_training_keeps_its_unit():
    market = generate(3, 700, seed=2)
    ohlcv = market.ohlcv.copy()
    ohlcv[..., 4] = 0.1
    bars = market.bars()
    samples = make_samples(Bars(bars.symbol, bars.ts, bars.interval, ohlcv.reshape(-1, 5)))
    scaled = fit_scaler(samples, split(samples, windowed=False).training)
    assert scaled.scaler.scale is not None
    assert scaled.scaler.scale[V3.features.index("volume")] == 1
    assert scaled.scaler.scale[V3.features.index("volume_ratio")] == 1
