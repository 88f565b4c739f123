"""XGBoost models against the library's own predictions, and documents that are not what they say."""

from __future__ import annotations

import copy
import json
import threading

import numpy as np
import pytest
import xgboost

from agents import scalers, ubjson, xgb
from agents.agent import Refused
from streams.messages import Reason
from tests.agents import legacy
from tests.agents.legacy import CLASSES, CONTAINERS, FRAME, NAMES, RETURNS, ROWS32


def build(data, suffix):
    return xgb.build(xgb.parse(data, suffix), {})


def theirs(name):
    model = legacy.xgboosts()[name]
    rows = ROWS32 if "without" in name else FRAME.astype(np.float32)
    return model.predict(rows, output_margin=True) if hasattr(model, "n_classes_") else model.predict(rows)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", legacy.xgboosts())
def test_a_pickled_estimator_and_its_booster_predict_the_same_bits(name, container):
    model = legacy.xgboosts()[name]
    for value in (model, model.get_booster()):
        built = build(legacy.pack(value, container), ".pkl")
        assert built.network(ROWS32).tobytes() == theirs(name).tobytes()
        assert built.features == (None if "without" in name else tuple(NAMES))
        assert built.network(ROWS32).shape == (len(ROWS32), built.outputs)


@pytest.mark.parametrize("suffix", [".ubj", ".json"])
@pytest.mark.parametrize("name", legacy.xgboosts())
def test_plain_formats_and_their_conversion_predict_the_same_bits(name, suffix):
    data = bytes(legacy.xgboosts()[name].get_booster().save_raw(suffix[1:]))
    for built in (build(data, suffix), build(xgb.to_ubj(data, suffix), ".ubj")):
        assert built.network(ROWS32).tobytes() == theirs(name).tobytes()


@pytest.mark.parametrize("name", legacy.xgboosts())
def test_the_counts_are_those_of_the_library(name):
    booster = legacy.xgboosts()[name].get_booster()
    table = booster.trees_to_dataframe()
    built = build(bytes(booster.save_raw("ubj")), ".ubj")
    assert built.parameters == len(table)
    assert built.facts["leaves"] == (table.Feature == "Leaf").sum()
    assert built.facts["trees"] == table.Tree.nunique()
    assert (built.width, built.window) == (booster.num_features(), 1)


def test_an_early_stopped_model_stops_where_it_was_best():
    model = legacy.xgboosts()["stopped early"]
    assert model.best_iteration + 1 < model.get_booster().num_boosted_rounds(), "the fixture did not stop early"
    built = build(bytes(model.get_booster().save_raw("ubj")), ".ubj")
    everything = model.get_booster().inplace_predict(ROWS32, validate_features=False)
    assert built.network(ROWS32).tobytes() == theirs("stopped early").tobytes() != everything.tobytes()


@pytest.mark.parametrize("name", ["regressor", "classifier", "dart"])
def test_a_row_has_the_same_bits_in_every_batch(name):
    network = build(bytes(legacy.xgboosts()[name].get_booster().save_raw("ubj")), ".ubj").network
    whole = network(ROWS32)
    for size in (*range(1, 65), 256):
        assert network(ROWS32[9 : 9 + size]).tobytes() == whole[9 : 9 + size].tobytes()
    assert network(ROWS32[:0]).shape == (0, whole.shape[1])


def test_values_that_are_not_finite_give_nan_in_their_row_only():
    network = build(bytes(legacy.xgboosts()["classifier"].get_booster().save_raw("ubj")), ".ubj").network
    rows = ROWS32[:4].copy()
    rows[1, 3], rows[2, 0] = np.nan, np.inf
    outputs = network(rows)
    assert np.isnan(outputs[1:3]).all()
    assert outputs[[0, 3]].tobytes() == network(ROWS32[[0, 3]]).tobytes()


def test_a_wrong_width_is_an_error():
    network = build(bytes(legacy.xgboosts()["regressor"].get_booster().save_raw("ubj")), ".ubj").network
    for rows in (ROWS32[:, :22], ROWS32[0], ROWS32[None]):
        with pytest.raises(ValueError, match="rows of 23 features"):
            network(rows)


def test_threads_share_a_network():
    network = build(bytes(legacy.xgboosts()["classifier"].get_booster().save_raw("ubj")), ".ubj").network
    whole, found = network(ROWS32), []
    threads = [threading.Thread(target=lambda: found.append(network(ROWS32))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outputs.tobytes() for outputs in found] == [whole.tobytes()] * 8


def other_models():
    few = {"n_estimators": 2, "n_jobs": 1}
    return {
        "binary": xgboost.XGBClassifier(**few).fit(FRAME, CLASSES > 0),
        "four classes": xgboost.XGBClassifier(**few).fit(FRAME, np.arange(400) % 4),
        "logistic": xgboost.XGBRegressor(**few, objective="reg:logistic").fit(FRAME, CLASSES > 0),
        "two targets": xgboost.XGBRegressor(**few).fit(FRAME, np.c_[RETURNS, RETURNS]),
        "three targets": xgboost.XGBRegressor(**few).fit(FRAME, np.c_[RETURNS, RETURNS, RETURNS]),
        "linear": xgboost.XGBRegressor(**few, booster="gblinear").fit(FRAME, RETURNS),
        "two quantiles": xgboost.XGBRegressor(**few, objective="reg:quantileerror", quantile_alpha=[0.1, 0.9]).fit(
            FRAME, RETURNS
        ),
        "categorical": xgboost.XGBRegressor(**few, enable_categorical=True, max_cat_to_onehot=2).fit(
            FRAME.assign(open=np.arange(400) % 7).astype({"open": "category"}), (np.arange(400) % 7) ** 2
        ),
    }


def test_other_models_are_unknown_architectures():
    for name, model in other_models().items():
        with pytest.raises(Refused) as refused:
            build(bytes(model.get_booster().save_raw("ubj")), ".ubj")
        assert refused.value.refusal.reason is Reason.UNKNOWN_ARCHITECTURE, name


def test_a_pickle_of_something_else_or_of_nothing_fitted_is_refused():
    for value, reason in (
        (legacy.scalers()["standard"], Reason.UNKNOWN_ARCHITECTURE),
        (legacy.lightgbms()["regressor"], Reason.UNKNOWN_ARCHITECTURE),
        ({"model": 1}, Reason.UNKNOWN_ARCHITECTURE),
        (xgboost.XGBRegressor(), Reason.CORRUPT_ARTIFACT),
    ):
        with pytest.raises(Refused) as refused:
            build(legacy.pack(value, "joblib"), ".pkl")
        assert refused.value.refusal.reason is reason


def tree_of(document):
    return document["learner"]["gradient_booster"]["model"]["trees"][0]


DAMAGE = {
    "a child out of bounds": lambda d: tree_of(d)["left_children"].__setitem__(0, 999),
    "a cycle": lambda d: tree_of(d)["left_children"].__setitem__(1, 0),
    "one node, two parents": lambda d: tree_of(d)["left_children"].__setitem__(0, tree_of(d)["right_children"][0]),
    "a feature that does not exist": lambda d: tree_of(d)["split_indices"].__setitem__(0, 23),
    "a short array": lambda d: tree_of(d)["split_conditions"].pop(),
    "no array": lambda d: tree_of(d).pop("default_left"),
    "an array of text": lambda d: tree_of(d).__setitem__("left_children", "1"),
    "a leaf that is not finite": lambda d: tree_of(d)["split_conditions"].__setitem__(0, float("nan")),
    "fewer trees than it says": lambda d: d["learner"]["gradient_booster"]["model"]["trees"].pop(),
    "another number of nodes": lambda d: tree_of(d)["tree_param"].__setitem__("num_nodes", "9999999"),
    "more features than can be": lambda d: d["learner"]["learner_model_param"].__setitem__("num_feature", "999999999"),
    "no features": lambda d: d["learner"]["learner_model_param"].__setitem__("num_feature", "0"),
    "fewer features than are used": lambda d: d["learner"]["learner_model_param"].__setitem__("num_feature", "5"),
    "names of another width": lambda d: d["learner"]["feature_names"].pop(),
    "a best round that does not exist": lambda d: d["learner"]["attributes"].__setitem__("best_iteration", "12"),
    "a base score of text": lambda d: d["learner"]["learner_model_param"].__setitem__("base_score", "x"),
    "no learner": lambda d: d.pop("learner"),
    "no version": lambda d: d.pop("version"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_document_that_does_not_hang_together_is_corrupt_and_never_reaches_the_library(damage, monkeypatch):
    document = json.loads(legacy.xgboosts()["regressor"].get_booster().save_raw("json"))
    damaged = copy.deepcopy(document)
    DAMAGE[damage](damaged)

    def reached(*_):
        pytest.fail("the library was handed the document")

    monkeypatch.setattr(xgb, "_load", reached)
    with pytest.raises(Refused) as refused:
        build(json.dumps(damaged).encode(), ".json")
    assert refused.value.refusal.reason is Reason.CORRUPT_ARTIFACT


@pytest.mark.parametrize("suffix", [".ubj", ".json"])
def test_a_file_cut_at_any_place_is_corrupt(suffix):
    data = bytes(legacy.xgboosts()["regressor"].get_booster().save_raw(suffix[1:]))
    for end in range(0, len(data), len(data) // 97):
        with pytest.raises(Refused) as refused:
            build(data[:end], suffix)
        assert refused.value.refusal.reason is Reason.CORRUPT_ARTIFACT


def test_a_key_given_twice_is_corrupt():
    with pytest.raises(Refused, match="twice"):
        xgb.parse(b'{"learner": 1, "learner": 2}', ".json")
    key = b"L" + (1).to_bytes(8, "big") + b"a"
    with pytest.raises(Refused, match="twice"):
        xgb.parse(b"{" + (key + b"Z") * 2 + b"}", ".ubj")


def test_ubj_is_read_as_the_librarys_own_json_says():
    booster = legacy.xgboosts()["regressor"].get_booster()
    read, told = ubjson.decode(bytes(booster.save_raw("ubj"))), json.loads(booster.save_raw("json"))
    ours, other = tree_of(read), tree_of(told)
    for key in ("left_children", "parents", "split_indices", "default_left"):
        assert ours[key].tolist() == other[key]
    for key in ("split_conditions", "base_weights", "sum_hessian"):
        assert np.array_equal(ours[key], np.array(other[key], np.float32))


@pytest.mark.parametrize(
    "data",
    [
        b"{" * 5000,
        b"{" + b"L" + (2**62).to_bytes(8, "big"),
        b"{U\x01a[$L#L" + (2**61).to_bytes(8, "big") + b"}",
        b"{U\x01a[#L" + (2**61).to_bytes(8, "big") + b"}",
        b"{U\x01a[$Z#U\x05}",
        b"{U\x01a" + b"[" * 5000,
        b"{i\xff",
    ],
)
def test_lengths_and_depths_that_cannot_be_are_corrupt_without_being_allocated(data):
    with pytest.raises(Refused) as refused:
        xgb.parse(data, ".ubj")
    assert refused.value.refusal.reason is Reason.CORRUPT_ARTIFACT


def test_a_json_of_too_many_values_is_refused_before_they_are_made(monkeypatch):
    """Each costs many times its text; the library's reader never sees them."""
    monkeypatch.setattr(xgb.json, "loads", lambda *_, **__: pytest.fail("the values were made"))
    with pytest.raises(Refused) as refused:
        xgb.parse(b'{"learner":[' + b"[]," * 5_000_000 + b"0]}", ".json")
    assert refused.value.refusal.reason is Reason.CORRUPT_ARTIFACT
    assert "export the model as .ubj" in refused.value.refusal.detail


def test_a_damaged_model_and_a_damaged_scaler_are_refused_with_what_to_do():
    for parse, suffix in ((xgb.parse, ".ubj"), (xgb.parse, ".json"), (scalers.parse, ".json"), (scalers.parse, ".pkl")):
        with pytest.raises(Refused) as refused:
            parse(b"\x78damaged", suffix)
        assert refused.value.refusal.detail.endswith("copy the file again, or save it again where it was trained")
