"""XGBoost and LightGBM regressors of the return over the horizon, with early stopping.

Small steps, shallow trees and large leaves: returns are mostly noise, and raw prices among the
features name the symbol, so a tree that is free to will learn the past of each symbol by heart.
One thread each: the sums, and so the files' predictions, are then the same on every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightgbm
import numpy as np
import xgboost
from numpy.typing import NDArray

ROUNDS = 300
"""Most boosting rounds."""
LEAST_ROUNDS = 20
"""Kept even where validation stops earlier, so that the outputs of a model never are a constant."""
PATIENCE = 25
"""Rounds without a better validation error before boosting stops."""
LEAF_SHARE = 100
"""A leaf holds at least one in so many training rows."""

OnStep = Callable[[int, int], None]
"""Called with steps done and the most that there will be."""


@dataclass(frozen=True)
class TreeData:
    """Scaled features `[N, C]` and the returns `[N]` to learn, of the training and validation parts."""

    features: Sequence[str]
    x: NDArray[np.float32]
    y: NDArray[np.float64]
    x_validation: NDArray[np.float32]
    y_validation: NDArray[np.float64]

    @property
    def least_leaf(self) -> int:
        return max(20, len(self.y) // LEAF_SHARE)


def fit_xgboost(data: TreeData, seed: int, on_step: OnStep) -> bytes:
    """The bytes of a `.ubj` file."""
    parameters = {
        "objective": "reg:squarederror",
        "eta": 0.06,
        "max_depth": 4,
        "min_child_weight": data.least_leaf,
        "subsample": 0.7,
        "colsample_bytree": 0.6,
        "lambda": 5.0,
        "tree_method": "hist",
        "max_bin": 128,
        "nthread": 1,
        "seed": seed,
        "verbosity": 0,
        "base_score": float(data.y.mean()),
    }
    names = list(data.features)
    training = xgboost.DMatrix(data.x, data.y, feature_names=names, nthread=1)
    validation = xgboost.DMatrix(data.x_validation, data.y_validation, feature_names=names, nthread=1)
    booster = xgboost.Booster(parameters, [training])
    errors: list[float] = []
    for step in range(ROUNDS):
        booster.update(training, step)
        forecast = booster.predict(validation)
        errors.append(float(np.mean((data.y_validation - forecast) ** 2)))
        on_step(step + 1, ROUNDS)
        if _is_over(errors):
            break
    return bytes(booster[: _best(errors)].save_raw("ubj"))


def fit_lightgbm(data: TreeData, seed: int, on_step: OnStep) -> bytes:
    """The bytes of a `.txt` file."""
    parameters = {
        "objective": "regression",
        "learning_rate": 0.06,
        "num_leaves": 15,
        "min_data_in_leaf": data.least_leaf,
        "min_sum_hessian_in_leaf": 0.0,
        "bagging_fraction": 0.7,
        "bagging_freq": 1,
        "feature_fraction": 0.6,
        "lambda_l2": 5.0,
        "max_bin": 127,
        "num_threads": 1,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "verbosity": -1,
    }
    training = lightgbm.Dataset(data.x, data.y, feature_name=list(data.features), params=parameters)
    validation = lightgbm.Dataset(data.x_validation, data.y_validation, reference=training, params=parameters)
    booster = lightgbm.Booster(parameters, training)
    booster.add_valid(validation, "validation")
    errors: list[float] = []
    for step in range(ROUNDS):
        booster.update()
        errors.append(float(booster.eval_valid()[0][2]))
        on_step(step + 1, ROUNDS)
        if _is_over(errors):
            break
    return str(booster.model_to_string(num_iteration=_best(errors))).encode()


def _best(errors: Sequence[float]) -> int:
    """Rounds to keep: up to the least error, but at least `LEAST_ROUNDS`."""
    return max(int(np.argmin(errors)) + 1, min(LEAST_ROUNDS, len(errors)))


def _is_over(errors: Sequence[float]) -> bool:
    return len(errors) - _best(errors) >= PATIENCE
