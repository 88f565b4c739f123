"""XGBoost: a regressor or a 3-class classifier, from `.ubj`, `.json` or a legacy pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xgboost
from numpy.typing import NDArray

from agents import unpickle
from agents.agent import Built, Refused
from streams.messages import Reason


@dataclass(frozen=True, eq=False)
class Parsed:
    """A booster and the names found beside it."""

    booster: xgboost.Booster
    features: tuple[str, ...] | None


def parse(data: bytes, suffix: str) -> Parsed:
    """Read the bytes of a `.ubj`, `.json` or `.pkl` file. Raises `Refused`."""
    if suffix not in (".ubj", ".json"):
        raise Refused(Reason.CORRUPT_ARTIFACT, f"an XGBoost model is a .ubj, .json or .pkl file, not {suffix!r}")
    booster = xgboost.Booster()
    try:
        booster.load_model(bytearray(data))
    except xgboost.core.XGBoostError as error:
        raise Refused(Reason.CORRUPT_ARTIFACT, str(error).splitlines()[0]) from error
    return Parsed(booster, tuple(booster.feature_names) if booster.feature_names else None)


def build(parsed: Parsed, metadata: Mapping[str, Any]) -> Built:
    """The booster as a network. `parameters` counts the trees' nodes. Raises `Refused`."""
    import json

    booster = parsed.booster
    learner = json.loads(booster.save_raw("json"))["learner"]
    classes = int(learner["learner_model_param"]["num_class"])
    trees = learner["gradient_booster"]["model"]["trees"]
    outputs = classes or 1
    if outputs not in (1, 3):
        raise Refused(Reason.UNKNOWN_ARCHITECTURE, f"XGBoost with {outputs} classes: expected a regressor or 3 classes")
    booster.set_param({"nthread": 1})
    width = booster.num_features()
    best = booster.attr("best_iteration")
    rounds = (0, int(best) + 1) if best is not None else (0, 0)
    kind = "margin" if outputs == 3 else "value"

    def network(x: NDArray[np.float32]) -> NDArray[np.float32]:
        if x.ndim != 2 or x.shape[1] != width:
            raise ValueError(f"expected rows of {width} features, got shape {x.shape}")
        y = booster.inplace_predict(x, iteration_range=rounds, predict_type=kind, validate_features=False)
        y = np.array(y, dtype=np.float32).reshape(len(x), outputs)
        y[~np.isfinite(x).all(axis=1)] = np.nan
        return y

    return Built(
        architecture="xgboost-classifier" if outputs == 3 else "xgboost-regressor",
        width=width,
        window=1,
        outputs=outputs,
        parameters=sum(len(tree["left_children"]) for tree in trees),
        network=network,
        features=parsed.features,
        facts={
            "trees": len(trees),
            "leaves": sum(tree["left_children"].count(-1) for tree in trees),
            "objective": learner["objective"]["name"],
        },
    )
