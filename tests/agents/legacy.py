"""Legacy artifacts as users have them, made by the real libraries, and every container they come in."""

from __future__ import annotations

import functools
import io
import pickle
from typing import Any

import joblib
import lightgbm
import numpy as np
import pandas as pd
import xgboost
from sklearn.preprocessing import MinMaxScaler, RobustScaler, StandardScaler

from streams.contracts import V3

NAMES = list(V3.features)
ROWS = np.random.default_rng(20_240_601).normal(size=(400, len(NAMES)))
FRAME = pd.DataFrame(ROWS, columns=NAMES)
RETURNS = 0.01 * ROWS[:, 5] + 0.02 * ROWS[:, 6] * ROWS[:, 7]
CLASSES = np.digitize(RETURNS, (-0.01, 0.01))
ROWS32 = ROWS.astype(np.float32)

JOBLIB = {
    "joblib": 0,
    "zlib": 3,
    "gzip": ("gzip", 3),
    "bz2": ("bz2", 3),
    "lzma": ("lzma", 3),
    "xz": ("xz", 3),
}
CONTAINERS = (*JOBLIB, *(f"pickle{protocol}" for protocol in range(2, 6)))


def pack(value: Any, container: str) -> bytes:
    if container.startswith("pickle"):
        return pickle.dumps(value, int(container[-1]))
    buffer = io.BytesIO()
    joblib.dump(value, buffer, compress=JOBLIB[container])
    return buffer.getvalue()


@functools.cache
def scalers() -> dict[str, Any]:
    return {
        "standard": StandardScaler().fit(FRAME),
        "standard without names": StandardScaler().fit(ROWS),
        "standard without mean": StandardScaler(with_mean=False).fit(FRAME),
        "standard without std": StandardScaler(with_std=False).fit(FRAME),
        "standard with neither": StandardScaler(with_mean=False, with_std=False).fit(FRAME),
        "minmax": MinMaxScaler((-1, 1)).fit(FRAME),
        "minmax clipped": MinMaxScaler((-0.5, 0.5), clip=True).fit(FRAME[:50]),
        "robust": RobustScaler().fit(FRAME),
        "robust without centre": RobustScaler(with_centering=False).fit(FRAME),
    }


@functools.cache
def xgboosts() -> dict[str, Any]:
    few = {"n_estimators": 12, "max_depth": 4, "n_jobs": 1}
    stopped = xgboost.XGBRegressor(**{**few, "n_estimators": 60, "learning_rate": 0.9}, early_stopping_rounds=3)
    noise = np.random.default_rng(5).normal(size=400)
    return {
        "regressor": xgboost.XGBRegressor(**few).fit(FRAME, RETURNS),
        "regressor without names": xgboost.XGBRegressor(**few).fit(ROWS, RETURNS),
        "classifier": xgboost.XGBClassifier(**few).fit(FRAME, CLASSES),
        "stopped early": stopped.fit(FRAME, noise, eval_set=[(FRAME, -noise)], verbose=False),
        "forest": xgboost.XGBClassifier(**few, num_parallel_tree=2).fit(FRAME, CLASSES),
        "dart": xgboost.XGBRegressor(**few, booster="dart", rate_drop=0.5).fit(FRAME, RETURNS),
        "huber": xgboost.XGBRegressor(**few, objective="reg:pseudohubererror").fit(FRAME, RETURNS),
    }


@functools.cache
def lightgbms() -> dict[str, Any]:
    few = {"n_estimators": 12, "num_leaves": 7, "verbose": -1, "n_jobs": 1}
    noise = np.random.default_rng(5).normal(size=400)
    stopped = lightgbm.LGBMRegressor(**{**few, "n_estimators": 60, "learning_rate": 0.9})
    stop = [lightgbm.early_stopping(3, verbose=False)]
    return {
        "regressor": lightgbm.LGBMRegressor(**few).fit(FRAME, RETURNS),
        "regressor without names": lightgbm.LGBMRegressor(**few).fit(ROWS, RETURNS),
        "classifier": lightgbm.LGBMClassifier(**few).fit(FRAME, CLASSES - 1),
        "stopped early": stopped.fit(FRAME, noise, eval_X=FRAME[:200], eval_y=-noise[:200], callbacks=stop),
        "one against all": lightgbm.LGBMClassifier(**few, objective="multiclassova").fit(FRAME, CLASSES),
        "random forest": lightgbm.LGBMRegressor(**few, boosting_type="rf", bagging_freq=1, bagging_fraction=0.6).fit(
            FRAME, RETURNS
        ),
        "positive": lightgbm.LGBMRegressor(**few, objective="poisson").fit(FRAME, np.abs(RETURNS)),
    }
