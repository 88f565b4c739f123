"""Scalers against scikit-learn's own transform, bit for bit."""

from __future__ import annotations

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents import scalers
from agents.agent import Refused
from streams.messages import Reason
from tests.agents import legacy


@pytest.mark.parametrize("container", legacy.CONTAINERS)
@pytest.mark.parametrize("name", legacy.scalers())
def test_a_pickled_scaler_transforms_to_the_same_bits(name, container):
    theirs = legacy.scalers()[name]
    ours = scalers.parse(legacy.pack(theirs, container), ".pkl")
    named = hasattr(theirs, "feature_names_in_")
    assert ours.features == (tuple(legacy.NAMES) if named else None)
    assert ours.width == len(legacy.NAMES)
    expected = theirs.transform(legacy.FRAME if named else legacy.ROWS)
    assert ours.scaler.transform(legacy.ROWS).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("name", legacy.scalers())
def test_json_keeps_every_bit(name):
    ours = scalers.parse(legacy.pack(legacy.scalers()[name], "joblib"), ".pkl")
    again = scalers.parse(scalers.to_json(ours), ".json")
    assert (again.kind, again.features, again.width, again.clip) == (ours.kind, ours.features, ours.width, ours.clip)
    assert again.scaler.transform(legacy.ROWS).tobytes() == ours.scaler.transform(legacy.ROWS).tobytes()


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(finite, finite.filter(bool)), min_size=1, max_size=8))
def test_any_finite_numbers_survive_json(columns):
    mean, scale = zip(*columns, strict=True)
    again = scalers.parse(scalers.to_json(scalers.standard(mean, scale, None)), ".json")
    assert again.mean is not None
    assert again.scale is not None
    assert again.mean.tobytes() == np.array(mean).tobytes()
    assert again.scale.tobytes() == np.array(scale).tobytes()


def test_a_window_is_scaled_row_by_row_and_the_input_is_left_alone():
    ours = scalers.parse(legacy.pack(legacy.scalers()["standard"], "joblib"), ".pkl").scaler
    before = legacy.ROWS.copy()
    windows = legacy.ROWS[:384].reshape(6, 64, -1)
    assert ours.transform(windows).tobytes() == ours.transform(legacy.ROWS[:384]).tobytes()
    assert ours.transform(legacy.ROWS[7:8]).tobytes() == ours.transform(legacy.ROWS)[7:8].tobytes()
    assert np.array_equal(before, legacy.ROWS)


def test_missing_values_stay_missing_and_a_wrong_width_is_an_error():
    scaler = scalers.standard([1.0, 2.0], [1.0, 2.0], ["a", "b"]).scaler
    assert np.array_equal(scaler.transform(np.array([[np.nan, 4.0]])), [[np.nan, 1.0]], equal_nan=True)
    with pytest.raises(ValueError, match="2 columns, the rows 3"):
        scaler.transform(np.zeros((1, 3)))


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"mean": [1.0]}, "widths differ"),
        ({"features": ["a"]}, "widths differ"),
        ({"width": 3}, "widths differ"),
        ({"width": 2.0}, "width is not an integer"),
        ({"mean": None, "scale": None, "features": None, "width": None}, "widths differ"),
        ({"scale": [1.0, 0.0]}, "zero in column 1"),
        ({"scale": [1.0, -0.0]}, "zero in column 1"),
        ({"scale": [1.0, "2"]}, "not a number"),
        ({"scale": [1.0, None]}, "not a number"),
        ({"scale": [1.0, True]}, "not a number"),
        ({"scale": [[1.0, 2.0]]}, "not a number"),
        ({"scale": "12"}, "not a list"),
        ({"features": ["a", "a"]}, "twice"),
        ({"features": ["a", 1]}, "not a list of text"),
        ({"kind": "quantile"}, "is unknown"),
        ({"kind": None}, "is unknown"),
        ({"kind": "minmax", "mean": None}, "both columns"),
        ({"clip": [1, 0]}, "rising"),
        ({"format": "other/1"}, "is unknown"),
    ],
)
def test_bad_content_is_corrupt_and_says_what(change, detail):
    good = orjson.loads(scalers.to_json(scalers.standard([1.0, 2.0], [1.0, 2.0], ["a", "b"])))
    with pytest.raises(Refused) as refused:
        scalers.parse(orjson.dumps({**good, **change}), ".json")
    assert refused.value.refusal.reason is Reason.CORRUPT_ARTIFACT
    assert detail in refused.value.refusal.detail


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b'{"mean":[NaN],"scale":[1]}', b'{"mean":[1e999],"scale":[1]}', b"\xff"]
)
def test_text_that_is_no_scaler_is_corrupt(data):
    with pytest.raises(Refused) as refused:
        scalers.parse(data, ".json")
    assert refused.value.refusal.reason is Reason.CORRUPT_ARTIFACT


@pytest.mark.parametrize(("attribute", "value"), [("scale_", np.nan), ("scale_", 0.0), ("mean_", np.inf)])
def test_a_pickled_scaler_with_a_broken_column_is_corrupt(attribute, value):
    from sklearn.preprocessing import StandardScaler

    broken = StandardScaler().fit(legacy.ROWS)
    getattr(broken, attribute)[3] = value
    with pytest.raises(Refused) as refused:
        scalers.parse(legacy.pack(broken, "zlib"), ".pkl")
    assert refused.value.refusal.reason is Reason.CORRUPT_ARTIFACT
    assert "column 3" in refused.value.refusal.detail


def test_an_unfitted_scaler_and_a_model_in_its_place_are_corrupt():
    from sklearn.preprocessing import StandardScaler

    for value, detail in (
        (StandardScaler(), "never fitted"),
        (legacy.xgboosts()["regressor"], "found xgboost.sklearn.XGBRegressor"),
        ({"mean": 1}, "found dict"),
    ):
        with pytest.raises(Refused) as refused:
            scalers.parse(legacy.pack(value, "pickle4"), ".pkl")
        assert refused.value.refusal.reason is Reason.CORRUPT_ARTIFACT
        assert detail in refused.value.refusal.detail
