"""Feature drift against numbers worked out by hand, and against pandas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from agents.agent import Model, Scaler
from agents.heads import ReturnHead
from agents.scalers import ColumnScaler
from worker.drift import NARROWEST, DriftWatch

NAMES = ("close", "rsi_14", "volume_ratio")


def model(scaler: Scaler | None, features: tuple[str, ...] = NAMES[:2], agent: str = "xgboost") -> Model:
    return Model(
        *(agent, "1", Path("x"), "0" * 64, "v3", features, "c", 1, 1, 1),
        *(lambda x: x[:, :1], ReturnHead(0.001, 0.01), scaler),
    )


def fitted(mean: tuple[float, ...], scale: tuple[float, ...]) -> ColumnScaler:
    return ColumnScaler("standard", len(mean), np.array(mean), np.array(scale))


def alternating(n: int, low: float, high: float) -> np.ndarray:
    return np.where(np.arange(n) % 2, low, high)


def rows(n: int) -> np.ndarray:
    """close of mean 110 and deviation 10, rsi_14 of mean 50 and deviation 5, volume_ratio constant 1."""
    return np.stack([alternating(n, 100, 120), alternating(n, 45, 55), np.ones(n)], axis=1)


def test_a_feature_where_it_was_fitted_is_at_distance_0_and_one_a_deviation_away_at_1() -> None:
    watch = DriftWatch()
    watch.push(NAMES, rows(400))
    close, rsi = watch.against([model(fitted((100.0, 50.0), (10.0, 5.0)))])
    assert (close.feature, rsi.feature) == ("close", "rsi_14")
    assert (close.distance, close.mean_shift, close.deviation_ratio) == pytest.approx((1.0, 1.0, 1.0))
    assert (rsi.distance, rsi.mean_shift, rsi.deviation_ratio) == pytest.approx((0.0, 0.0, 1.0), abs=1e-12)


def test_a_spread_e_times_as_wide_or_as_narrow_is_at_distance_1() -> None:
    watch = DriftWatch()
    watch.push(NAMES, rows(400))
    found = watch.against([model(fitted((110.0, 50.0), (10.0 * np.e, 5.0 / np.e)))])
    assert [drift.distance for drift in found] == pytest.approx([1.0, 1.0])


def test_a_feature_that_stands_still_is_far_away_but_not_infinitely() -> None:
    watch = DriftWatch()
    watch.push(NAMES, rows(400))
    (drift,) = watch.against([model(fitted((1.0,), (2.0,)), NAMES[2:])])
    assert drift.distance == pytest.approx(-np.log(NARROWEST))


def test_of_several_scalers_the_farthest_counts_and_the_worst_feature_comes_first() -> None:
    watch = DriftWatch()
    watch.push(NAMES, rows(400))
    near, far = fitted((110.0, 50.0), (10.0, 5.0)), fitted((110.0, 20.0), (10.0, 5.0))
    found = watch.against([model(near), model(far, agent="lightgbm")])
    assert [(drift.feature, round(drift.distance, 9)) for drift in found] == [("rsi_14", 6.0), ("close", 0.0)]


def test_it_looks_at_the_last_2000_vectors_however_they_came() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(3, 2, (5_000, 3))
    whole, parts = DriftWatch(), DriftWatch()
    whole.push(NAMES, values)
    for part in np.array_split(values, 37):
        parts.push(NAMES, part)
    tail = pd.DataFrame(values[-2_000:], columns=NAMES)
    scaler = fitted((1.0, 2.0), (4.0, 0.5))
    for watch in (whole, parts):
        found = {drift.feature: drift for drift in watch.against([model(scaler)])}
        assert found["close"].mean_shift == pytest.approx((tail["close"].mean() - 1) / 4)
        assert found["rsi_14"].deviation_ratio == pytest.approx(tail["rsi_14"].std(ddof=0) / 0.5)


def test_there_is_no_verdict_under_200_vectors_nor_without_a_middle_and_a_spread() -> None:
    watch = DriftWatch()
    scaler = fitted((100.0, 50.0), (10.0, 5.0))
    watch.push(NAMES, rows(199))
    assert watch.against([model(scaler)]) == []
    watch.push(NAMES, rows(1))
    assert len(watch.against([model(scaler)])) == 2
    assert watch.against([model(None), model(replace(scaler, kind="minmax"))]) == []


def test_vectors_with_an_undefined_feature_are_left_out_for_the_models_that_read_it() -> None:
    values = rows(500)
    values[:301, 0] = np.nan
    watch = DriftWatch()
    watch.push(NAMES, values)
    assert watch.against([model(fitted((100.0, 50.0), (10.0, 5.0)))]) == []
    assert len(watch.against([model(fitted((50.0,), (5.0,)), ("rsi_14",))])) == 1


def test_other_features_start_it_anew() -> None:
    watch = DriftWatch()
    watch.push(NAMES, rows(400))
    watch.push(NAMES[:2], rows(10)[:, :2])
    assert watch.against([model(fitted((100.0, 50.0), (10.0, 5.0)))]) == []
