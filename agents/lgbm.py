"""LightGBM: a regressor or a 3-class classifier, from `.txt` or a legacy pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightgbm
import numpy as np
from numpy.typing import NDArray

from agents import unpickle
from agents.agent import Built, Refused
from streams.messages import Reason


@dataclass(frozen=True, eq=False)
class Parsed:
    """A booster and the names found beside it."""

    booster: lightgbm.Booster
    features: tuple[str, ...] | None


def parse(data: bytes, suffix: str) -> Parsed:
    """Read the bytes of a `.txt` or `.pkl` file. Raises `Refused`."""
    if suffix != ".txt":
        raise Refused(Reason.CORRUPT_ARTIFACT, f"a LightGBM model is a .txt or .pkl file, not {suffix!r}")
    try:
        booster = lightgbm.Booster(model_str=data.decode())
    except (lightgbm.basic.LightGBMError, UnicodeDecodeError) as error:
        raise Refused(Reason.CORRUPT_ARTIFACT, str(error)) from error
    names = booster.feature_name()
    return Parsed(booster, None if all(n == f"Column_{i}" for i, n in enumerate(names)) else tuple(names))


def build(parsed: Parsed, metadata: Mapping[str, Any]) -> Built:
    """The booster as a network. `parameters` counts the trees' nodes. Raises `Refused`."""
    booster = parsed.booster
    width, outputs = booster.num_feature(), booster.num_model_per_iteration()
    objective = booster.dump_model(num_iteration=1).get("objective", "")
    if outputs not in (1, 3) or objective.startswith("binary"):
        raise Refused(Reason.UNKNOWN_ARCHITECTURE, f"LightGBM {objective!r}: expected a regressor or 3 classes")

    def network(x: NDArray[np.float32]) -> NDArray[np.float32]:
        if x.ndim != 2 or x.shape[1] != width:
            raise ValueError(f"expected rows of {width} features, got shape {x.shape}")
        y = booster.predict(np.ascontiguousarray(x), raw_score=outputs == 3, num_threads=1)
        y = np.array(y, dtype=np.float32).reshape(len(x), outputs)
        y[~np.isfinite(x).all(axis=1)] = np.nan
        return y

    model = booster.model_to_string(num_iteration=-1)
    leaves = [int(line[11:]) for line in model.splitlines() if line.startswith("num_leaves=")]
    return Built(
        architecture="lightgbm-classifier" if outputs == 3 else "lightgbm-regressor",
        width=width,
        window=1,
        outputs=outputs,
        parameters=sum(2 * n - 1 for n in leaves),
        network=network,
        features=parsed.features,
        facts={"trees": len(leaves), "leaves": sum(leaves), "objective": objective},
    )
