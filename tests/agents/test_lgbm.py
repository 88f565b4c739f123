"""LightGBM models against the library's own predictions, and texts that are not what they say."""

from __future__ import annotations

import threading

import lightgbm
import numpy as np
import pytest

from agents import lgbm
from agents.agent import Refused
from streams.messages import Reason
from tests.agents import legacy
from tests.agents.legacy import CLASSES, CONTAINERS, FRAME, NAMES, RETURNS, ROWS32


def build(data, suffix):
    return lgbm.build(lgbm.parse(data, suffix), {})


def text_of(name, **options):
    return legacy.lightgbms()[name].booster_.model_to_string(**options).encode()


def theirs(name):
    model = legacy.lightgbms()[name]
    rows = ROWS32 if "without" in name else FRAME.astype(np.float32)
    outputs = model.predict(rows, raw_score=hasattr(model, "classes_"))
    return outputs.astype(np.float32)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", legacy.lightgbms())
def test_a_pickled_estimator_and_its_booster_predict_the_same_bits(name, container):
    model = legacy.lightgbms()[name]
    for value in (model, model.booster_):
        built = build(legacy.pack(value, container), ".pkl")
        assert built.network(ROWS32).tobytes() == theirs(name).tobytes()
        assert built.features == (None if "without" in name else tuple(NAMES))
        assert built.network(ROWS32).shape == (len(ROWS32), built.outputs)


@pytest.mark.parametrize("name", legacy.lightgbms())
def test_text_and_the_conversion_of_a_pickle_predict_the_same_bits(name):
    pickled = legacy.pack(legacy.lightgbms()[name], "joblib")
    for built in (build(text_of(name), ".txt"), build(lgbm.to_txt(pickled, ".pkl"), ".txt")):
        assert built.network(ROWS32).tobytes() == theirs(name).tobytes()


@pytest.mark.parametrize("name", legacy.lightgbms())
def test_before_it_is_narrowed_an_output_has_the_librarys_float64_bits(name):
    model = legacy.lightgbms()[name]
    ours = build(legacy.pack(model, "joblib"), ".pkl").network.booster.predict(ROWS32, raw_score=True)
    assert ours.tobytes() == model.booster_.predict(ROWS32, raw_score=True).tobytes()


@pytest.mark.parametrize("name", legacy.lightgbms())
def test_the_counts_are_those_of_the_library(name):
    booster = lightgbm.Booster(model_str=text_of(name).decode())
    table = booster.trees_to_dataframe()
    built = build(text_of(name), ".txt")
    assert built.parameters == len(table)
    assert built.facts["leaves"] == table.left_child.isna().sum()
    assert built.facts["trees"] == booster.num_trees()
    assert (built.width, built.window) == (booster.num_feature(), 1)


def test_an_early_stopped_booster_that_kept_all_its_trees_stops_where_it_was_best():
    noise = np.random.default_rng(5).normal(size=400)
    train = lightgbm.Dataset(FRAME, noise)
    booster = lightgbm.train(
        {"learning_rate": 0.9, "verbose": -1, "num_threads": 1, "objective": "regression"},
        train,
        num_boost_round=60,
        valid_sets=[lightgbm.Dataset(FRAME, -noise, reference=train)],
        callbacks=[lightgbm.early_stopping(3, verbose=False)],
        keep_training_booster=True,
    )
    assert booster.best_iteration < booster.num_trees(), "the fixture did not stop early"
    built = build(legacy.pack(booster, "joblib"), ".pkl")
    expected = booster.predict(ROWS32).astype(np.float32)
    everything = booster.predict(ROWS32, num_iteration=-1).astype(np.float32)
    assert built.network(ROWS32).tobytes() == expected.tobytes() != everything.tobytes()
    assert built.facts["trees"] == booster.best_iteration


@pytest.mark.parametrize("name", ["regressor", "classifier", "random forest"])
def test_a_row_has_the_same_bits_in_every_batch(name):
    network = build(text_of(name), ".txt").network
    whole = network(ROWS32)
    for size in (*range(1, 65), 256):
        assert network(ROWS32[9 : 9 + size]).tobytes() == whole[9 : 9 + size].tobytes()
    assert network(ROWS32[:0]).shape == (0, whole.shape[1])


def test_values_that_are_not_finite_give_nan_in_their_row_only():
    network = build(text_of("classifier"), ".txt").network
    rows = ROWS32[:4].copy()
    rows[1, 3], rows[2, 0] = np.nan, -np.inf
    outputs = network(rows)
    assert np.isnan(outputs[1:3]).all()
    assert outputs[[0, 3]].tobytes() == network(ROWS32[[0, 3]]).tobytes()


def test_a_wrong_width_is_an_error_and_any_memory_order_is_taken():
    network = build(text_of("regressor"), ".txt").network
    for rows in (ROWS32[:, :22], ROWS32[0], ROWS32[None]):
        with pytest.raises(ValueError, match="rows of 23 features"):
            network(rows)
    assert network(np.asfortranarray(ROWS32)).tobytes() == network(ROWS32).tobytes()


def test_threads_share_a_network():
    network = build(text_of("classifier"), ".txt").network
    whole, found = network(ROWS32), []
    threads = [threading.Thread(target=lambda: found.append(network(ROWS32))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outputs.tobytes() for outputs in found] == [whole.tobytes()] * 8


def test_other_models_are_unknown_architectures():
    few = {"n_estimators": 2, "verbose": -1, "n_jobs": 1}
    words = np.array(["buy", "hold", "sell"])[CLASSES]
    categories = FRAME.assign(open=np.arange(400) % 7)
    for model in (
        lightgbm.LGBMClassifier(**few).fit(FRAME, CLASSES > 0),
        lightgbm.LGBMClassifier(**few).fit(FRAME, np.arange(400) % 4),
        lightgbm.LGBMClassifier(**few).fit(FRAME, words),
        lightgbm.LGBMRegressor(**few, objective="cross_entropy").fit(FRAME, CLASSES / 2),
        lightgbm.LGBMRegressor(**few, linear_tree=True).fit(FRAME, RETURNS),
        lightgbm.LGBMRegressor(**few).fit(categories, (np.arange(400) % 7) ** 2, categorical_feature=["open"]),
    ):
        with pytest.raises(Refused) as refused:
            build(legacy.pack(model, "joblib"), ".pkl")
        assert refused.value.refusal.reason is Reason.UNKNOWN_ARCHITECTURE, model


def test_a_pickle_of_something_else_or_of_nothing_fitted_is_refused():
    for value, reason in (
        (legacy.scalers()["standard"], Reason.UNKNOWN_ARCHITECTURE),
        (legacy.xgboosts()["regressor"], Reason.UNKNOWN_ARCHITECTURE),
        ([1], Reason.UNKNOWN_ARCHITECTURE),
        (lightgbm.LGBMRegressor(), Reason.CORRUPT_ARTIFACT),
    ):
        with pytest.raises(Refused) as refused:
            build(legacy.pack(value, "joblib"), ".pkl")
        assert refused.value.refusal.reason is reason


def line(key, change):
    """Change the words of the first line of that key."""

    def damage(text):
        lines = text.split("\n")
        at = next(i for i, found in enumerate(lines) if found.startswith(key + "="))
        words = lines[at].partition("=")[2].split(" ")
        change(words)
        lines[at] = f"{key}={' '.join(words)}"
        return "\n".join(lines)

    return damage


DAMAGE = {
    "a child out of bounds": line("left_child", lambda words: words.__setitem__(0, "999")),
    "a leaf out of bounds": line("right_child", lambda words: words.__setitem__(0, "-999")),
    "a cycle": line("left_child", lambda words: words.__setitem__(1, "0")),
    "a feature that does not exist": line("split_feature", lambda words: words.__setitem__(0, "23")),
    "a feature below zero": line("split_feature", lambda words: words.__setitem__(0, "-1")),
    "a short array": line("threshold", lambda words: words.pop()),
    "a threshold of text": line("threshold", lambda words: words.__setitem__(0, "nan")),
    "a categorical split": line("decision_type", lambda words: words.__setitem__(0, "3")),
    "a leaf that is not finite": line("leaf_value", lambda words: words.__setitem__(0, "inf")),
    "another number of leaves": line("num_leaves", lambda words: words.__setitem__(0, "2000000000")),
    "no leaves": line("num_leaves", lambda words: words.__setitem__(0, "0")),
    "more features than can be": line("max_feature_idx", lambda words: words.__setitem__(0, "999999999")),
    "names of another width": line("feature_names", lambda words: words.pop()),
    "no end": lambda text: text[: text.index("end of trees")],
    "no tree": lambda text: text[: text.index("Tree=0")] + "end of trees\n",
    "a tree less than a round has": lambda text: text[: text.index("\nTree=35")] + "\nend of trees\n",
    "a key twice": lambda text: text.replace("num_cat=0", "num_cat=0\nnum_cat=0", 1),
    "no threshold": lambda text: text.replace("threshold=", "thresh=", 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_text_that_does_not_hang_together_is_corrupt_and_never_reaches_the_library(damage, monkeypatch):
    damaged = DAMAGE[damage](text_of("classifier").decode())
    assert damaged != text_of("classifier").decode()

    def reached(*_):
        pytest.fail("the library was handed the text")

    monkeypatch.setattr(lgbm, "_load", reached)
    with pytest.raises(Refused) as refused:
        build(damaged.encode(), ".txt")
    assert refused.value.refusal.reason is Reason.CORRUPT_ARTIFACT


def test_a_file_cut_at_any_place_before_its_end_mark_is_corrupt():
    data = text_of("classifier")
    end = data.index(b"end of trees")
    for cut in range(0, end, end // 97):
        with pytest.raises(Refused) as refused:
            build(data[:cut], ".txt")
        assert refused.value.refusal.reason is Reason.CORRUPT_ARTIFACT
