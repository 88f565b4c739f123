"""XGBoost: a regressor or a 3-class classifier, from `.ubj`, `.json` or a legacy pickle.

The library never reads a file: it is handed a document that was decoded, checked and written again
by `agents.xgb_document`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xgboost
from numpy.typing import NDArray

from agents import inert, ubjson, unpickle, xgb_document
from agents.agent import SAVE_AGAIN, Built, Refused
from agents.xgb_document import Shape
from streams.messages import Reason

_ESTIMATORS = ("xgboost.sklearn.XGBRegressor", "xgboost.sklearn.XGBClassifier")
_BOOSTER = "xgboost.core.Booster"
MAX_JSON_VALUES = 8_000_000
"""Commas and opening brackets of a `.json` model: about 100 bytes each at the worst."""

_BROKEN = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True, eq=False)
class Parsed:
    """A model document, decoded and not yet checked."""

    document: Mapping[str, Any]


def parse(data: bytes, suffix: str) -> Parsed:
    """Decode the bytes of a `.ubj`, `.json` or `.pkl` file; the library does not see them.

    Raises `Refused` with `unsafe_artifact` or `corrupt_artifact`, or `unknown_architecture` for a
    pickle of something else.
    """
    if suffix == ".pkl":
        return Parsed(_model_of_state(_ubj(_handle(unpickle.read(data)))))
    if suffix == ".ubj":
        return Parsed(_ubj(data))
    if suffix == ".json":
        return Parsed(_json(data))
    raise _corrupt(f"an XGBoost model is a .ubj, .json or .pkl file, not {suffix!r}")


def build(parsed: Parsed, metadata: Mapping[str, Any]) -> Built:  # noqa: ARG001  trees need no metadata
    """The booster as a network: margins `[B, 3]` of a classifier, predictions `[B, 1]` of a regressor.

    `parameters` is the number of nodes of all trees; `facts` are `trees`, `leaves` and `objective`.
    An early-stopped model predicts with its best iterations only. A row with a value that is not
    finite gives NaN. Raises `Refused` with `unknown_architecture` or `corrupt_artifact`.
    """
    shape, data = _checked(parsed)
    learner = parsed.document["learner"]
    trees = xgb_document.trees(learner)
    return Built(
        architecture="xgboost-classifier" if shape.outputs == 3 else "xgboost-regressor",
        width=shape.width,
        window=1,
        outputs=shape.outputs,
        parameters=sum(len(tree) for tree in trees),
        network=_Network(_load(data, shape), shape, xgb_document.best_rounds(learner, shape)),
        features=xgb_document.names(learner, shape.width),
        facts={
            "trees": len(trees),
            "leaves": sum(int((tree == -1).sum()) for tree in trees),
            "objective": shape.objective,
        },
    )


def describe(parsed: Parsed) -> dict[str, Any]:
    """What can be told of a document that may yet be refused: `features` and `input_shape`, where it says so."""
    try:
        learner = parsed.document["learner"]
        width = int(learner["learner_model_param"]["num_feature"])
        return {"features": xgb_document.names(learner, width), "input_shape": (width,)}
    except _BROKEN:
        return {}


def to_ubj(data: bytes, suffix: str) -> bytes:
    """A model file of any suffix as the bytes of a `.ubj`. Raises `Refused` as `parse` and `build` do."""
    return _checked(parse(data, suffix))[1]


class _Network:
    """float32 `[B, C]` to float32 `[B, K]`; a row's bits do not depend on the other rows."""

    def __init__(self, booster: xgboost.Booster, shape: Shape, rounds: int) -> None:
        self.booster, self.shape, self.rounds = booster, shape, rounds
        self.kind = "margin" if shape.outputs == 3 else "value"

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        if x.ndim != 2 or x.shape[1] != self.shape.width:
            raise ValueError(f"expected rows of {self.shape.width} features, found an array of shape {x.shape}")
        if not len(x):
            return np.empty((0, self.shape.outputs), np.float32)
        raw = self.booster.inplace_predict(
            np.ascontiguousarray(x),
            iteration_range=(0, self.rounds),
            predict_type=self.kind,
            validate_features=False,
        )
        outputs: NDArray[np.float32] = np.array(raw, dtype=np.float32).reshape(len(x), self.shape.outputs)
        # A tree sends NaN down its default branch; a missing feature must not become a vote.
        outputs[~np.isfinite(x).all(axis=1)] = np.nan
        return outputs


def _checked(parsed: Parsed) -> tuple[Shape, bytes]:
    """What the document is, and the bytes of it that the library may read."""
    try:
        shape = xgb_document.recognise(parsed.document["learner"])
        return shape, xgb_document.canonical(parsed.document, shape)
    except _BROKEN as error:
        raise _corrupt(f"the model document is not one of XGBoost: {type(error).__name__} {error}") from error


def _load(data: bytes, shape: Shape) -> xgboost.Booster:
    booster = xgboost.Booster()
    try:
        booster.load_model(bytearray(data))
        booster.set_param({"nthread": 1})
    except xgboost.core.XGBoostError as error:
        raise _corrupt(f"XGBoost does not read the model: {str(error).strip().splitlines()[0][:200]}") from error
    if booster.num_features() != shape.width:
        raise _corrupt(f"XGBoost read {booster.num_features()} features, the document says {shape.width}")
    return booster


def _handle(found: Any) -> bytes:
    """The serialized state inside a pickled estimator or booster."""
    if isinstance(found, inert.Record) and found.name in _ESTIMATORS:
        found = found.state.get("_Booster")
        if found is None:
            raise _corrupt("the XGBoost estimator was never fitted: it holds no booster")
    if not isinstance(found, inert.Record) or found.name != _BOOSTER:
        raise _unknown(f"expected an XGBRegressor, XGBClassifier or Booster, found {inert.describe(found)}")
    handle = found.state.get("handle")
    if not isinstance(handle, (bytes, bytearray)):
        raise _corrupt("the XGBoost booster holds no serialized model")
    if handle.startswith(b"CONFIG-offset:"):
        raise _corrupt("the pickle is of an old XGBoost, in its binary format: load it there and save it as .json")
    return bytes(handle)


def _model_of_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `Model` of a serialized state; its `Config` only matters to training."""
    model = state.get("Model")
    if not isinstance(model, dict):
        raise _corrupt("the booster's serialized state holds no model")
    return model


def _ubj(data: bytes) -> Mapping[str, Any]:
    try:
        document: Mapping[str, Any] = ubjson.decode(data)
    except (ValueError, KeyError) as error:
        raise _corrupt(f"not a UBJ model: {error}") from error
    return document


def _json(data: bytes) -> Mapping[str, Any]:
    # Python's values cost up to 30 times their text: they are counted before they are made.
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise _corrupt(f"more than {MAX_JSON_VALUES} values: export the model as .ubj, which holds larger ones")
    try:
        document = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"not a JSON model: {error}") from error
    if not isinstance(document, dict):
        raise _corrupt("the model document is not an object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice in one object")
    return found


def _unknown(detail: str) -> Refused:
    return Refused(Reason.UNKNOWN_ARCHITECTURE, detail)


def _corrupt(detail: str) -> Refused:
    return Refused(Reason.CORRUPT_ARTIFACT, f"{detail}; {SAVE_AGAIN}")
