"""XGBoost: a regressor or a 3-class classifier, from `.ubj`, `.json` or a legacy pickle.

The library is handed a file only after its document was decoded here and every tree was found to be
a tree: children within bounds, reached once, splits on features that exist. What reaches the library
is that same document, written again where it was JSON, so that two parsers cannot disagree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import xgboost
from numpy.typing import NDArray

from agents import ubjson, unpickle
from agents.agent import Built, Refused
from streams.messages import Reason

MAX_WIDTH = 65_536
_ESTIMATORS = ("xgboost.sklearn.XGBRegressor", "xgboost.sklearn.XGBClassifier")
_BOOSTER = "xgboost.core.Booster"
_CLASSIFIERS = ("multi:softprob", "multi:softmax")
_NOT_RETURNS = ("reg:logistic",)


@dataclass(frozen=True, eq=False)
class Parsed:
    """A model document, decoded, and the bytes of it for the library (UBJ, or JSON written again)."""

    document: Mapping[str, Any]
    data: bytes


@dataclass(frozen=True)
class _Shape:
    width: int
    outputs: int
    rounds: int
    objective: str


def parse(data: bytes, suffix: str) -> Parsed:
    """Decode the bytes of a `.ubj`, `.json` or `.pkl` file; the library does not see them yet.

    Raises `Refused` with `unsafe_artifact` or `corrupt_artifact`, or `unknown_architecture` for a
    pickle of something else.
    """
    if suffix == ".pkl":
        return _from_handle(_handle(unpickle.read(data)))
    if suffix == ".ubj":
        return Parsed(_ubj(data)[0], data)
    if suffix == ".json":
        document = _json(data)
        return Parsed(document, orjson.dumps(document))
    raise _corrupt(f"an XGBoost model is a .ubj, .json or .pkl file, not {suffix!r}")


def build(parsed: Parsed, metadata: Mapping[str, Any]) -> Built:  # noqa: ARG001  trees need no metadata
    """The booster as a network: margins `[B, 3]` of a classifier, predictions `[B, 1]` of a regressor.

    `parameters` is the number of nodes of all trees; `facts` are `trees`, `leaves` and `objective`.
    An early-stopped model predicts with its best iterations only. A row with a value that is not
    finite gives NaN. Raises `Refused` with `unknown_architecture` or `corrupt_artifact`.
    """
    try:
        learner = parsed.document["learner"]
        shape = _recognise(learner)
        trees = _trees(learner)
        leaves = _check_forest(_model(learner), trees, shape)
        names = _names(learner, shape.width)
        best = _best_rounds(learner, shape.rounds)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _corrupt(f"the model document is not one of XGBoost: {type(error).__name__} {error}") from error
    return Built(
        architecture="xgboost-classifier" if shape.outputs == 3 else "xgboost-regressor",
        width=shape.width,
        window=1,
        outputs=shape.outputs,
        parameters=sum(len(tree["left_children"]) for tree in trees),
        network=_Network(_load(parsed.data, shape), shape, best),
        features=names,
        facts={"trees": len(trees), "leaves": leaves, "objective": shape.objective},
    )


def describe(parsed: Parsed) -> dict[str, Any]:
    """What can be told of a document that may yet be refused: `features` and `input_shape`, where it says so."""
    try:
        learner = parsed.document["learner"]
        width = int(learner["learner_model_param"]["num_feature"])
        return {"features": _names(learner, width), "input_shape": (width,)}
    except (Refused, KeyError, TypeError, ValueError, AttributeError):
        return {}


def to_ubj(data: bytes, suffix: str) -> bytes:
    """A model file of any suffix as the bytes of a `.ubj`. Raises `Refused`, and if it is unknown or damaged."""
    parsed = parse(data, suffix)
    build(parsed, {})
    if suffix != ".json":
        return parsed.data
    return bytes(_booster(parsed.data).save_raw("ubj"))


class _Network:
    """float32 `[B, C]` to float32 `[B, K]`; a row's bits do not depend on the other rows."""

    def __init__(self, booster: xgboost.Booster, shape: _Shape, rounds: int) -> None:
        self.booster, self.shape, self.rounds = booster, shape, rounds
        self.kind = "margin" if shape.outputs == 3 else "value"

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        if x.ndim != 2 or x.shape[1] != self.shape.width:
            raise ValueError(f"expected rows of {self.shape.width} features, found an array of shape {x.shape}")
        if not len(x):
            return np.empty((0, self.shape.outputs), np.float32)
        raw = self.booster.inplace_predict(
            x, iteration_range=(0, self.rounds), predict_type=self.kind, validate_features=False
        )
        outputs: NDArray[np.float32] = np.array(raw, dtype=np.float32).reshape(len(x), self.shape.outputs)
        # A tree sends NaN down its default branch; a missing feature must not become a vote.
        outputs[~np.isfinite(x).all(axis=1)] = np.nan
        return outputs


# Bytes to document


def _handle(found: Any) -> bytes:
    """The serialized state inside a pickled estimator or booster."""
    if isinstance(found, unpickle.Record) and found.name in _ESTIMATORS:
        found = found.state.get("_Booster")
        if found is None:
            raise _corrupt("the XGBoost estimator was never fitted: it holds no booster")
    if not isinstance(found, unpickle.Record) or found.name != _BOOSTER:
        raise _unknown(f"expected an XGBRegressor, XGBClassifier or Booster, found {unpickle.describe(found)}")
    handle = found.state.get("handle")
    if not isinstance(handle, (bytes, bytearray)):
        raise _corrupt("the XGBoost booster holds no serialized model")
    return bytes(handle)


def _from_handle(handle: bytes) -> Parsed:
    """The `Model` of the serialized state; its `Config` only matters to training."""
    if handle.startswith(b"CONFIG-offset:"):
        raise _corrupt("the pickle is of an XGBoost before 1.7: load it there and save it as .json")
    document, spans = _ubj(handle)
    if "Model" not in document:
        raise _corrupt("the booster's serialized state holds no model")
    start, end = spans["Model"]
    return Parsed(document["Model"], handle[start:end])


def _ubj(data: bytes) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    try:
        return ubjson.decode(data)
    except (ValueError, KeyError) as error:
        raise _corrupt(f"not a UBJ model: {error}") from error


def _json(data: bytes) -> dict[str, Any]:
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


# Document to shape, checked


def _recognise(learner: Mapping[str, Any]) -> _Shape:
    booster = learner["gradient_booster"]["name"]
    if booster not in ("gbtree", "dart"):
        raise _unknown(f"XGBoost booster {str(booster)[:40]!r}: expected gbtree or dart")
    parameters = learner["learner_model_param"]
    width, classes = int(parameters["num_feature"]), int(parameters["num_class"])
    targets = int(parameters.get("num_target", "1"))
    objective = str(learner["objective"]["name"])[:40]
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"{width} features")
    model = _model(learner)
    if classes == 3 and targets == 1 and objective in _CLASSIFIERS:
        outputs = 3
    elif classes in (0, 1) and targets == 1 and objective.startswith("reg:") and objective not in _NOT_RETURNS:
        outputs = 1
    else:
        raise _unknown(
            f"XGBoost objective {objective} with {classes} classes and {targets} targets: "
            "expected a regressor of one target or a classifier of 3 classes"
        )
    return _Shape(width, outputs, len(model["trees"]), objective)


def _model(learner: Mapping[str, Any]) -> Mapping[str, Any]:
    booster = learner["gradient_booster"]
    model: Mapping[str, Any] = (booster["gbtree"] if booster["name"] == "dart" else booster)["model"]
    return model


def _trees(learner: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    trees = _model(learner)["trees"]
    if not isinstance(trees, list) or not trees:
        raise ValueError("no trees")
    return trees


def _check_forest(model: Mapping[str, Any], trees: Sequence[Mapping[str, Any]], shape: _Shape) -> int:
    """Check how the trees hang together, then each of them; the number of leaves."""
    info, parameters = _integers(model["tree_info"]), model["gbtree_model_param"]
    if len(info) != len(trees) or int(parameters["num_trees"]) != len(trees):
        raise ValueError(f"{len(trees)} trees, {len(info)} of them assigned to outputs")
    if info.min() < 0 or info.max() >= shape.outputs:
        raise ValueError("a tree of an output that does not exist")
    return sum(_check_tree(tree, shape.width) for tree in trees)


_PER_NODE = ("right_children", "parents", "split_indices", "split_conditions", "default_left", "base_weights")


def _check_tree(tree: Mapping[str, Any], width: int) -> int:
    left, right = _integers(tree["left_children"]), _integers(tree["right_children"])
    n = len(left)
    lengths = {name: len(tree[name]) for name in (*_PER_NODE, "loss_changes", "sum_hessian")}
    parameters = tree["tree_param"]
    if not n or set(lengths.values()) != {n} or int(parameters["num_nodes"]) != n:
        raise ValueError(f"a tree of {n} nodes whose arrays differ: {lengths}")
    if int(parameters.get("size_leaf_vector", "1")) not in (0, 1):
        raise _unknown("XGBoost trees with vector leaves: expected one tree for each output")
    if _integers(tree.get("split_type", [])).any() or len(tree.get("categories", ())):
        raise _unknown("XGBoost trees with categorical splits: the features are numbers")
    inner = left != -1
    if ((right != -1) != inner).any():
        raise ValueError("a node with one child")
    children = np.concatenate([left[inner], right[inner]])
    _check_links(children, n)
    features = _integers(tree["split_indices"])[inner]
    if len(features) and (features.min() < 0 or features.max() >= width):
        raise ValueError("a split on a feature that does not exist")
    return n - int(inner.sum())


def _check_links(children: NDArray[np.int64], n: int) -> None:
    """Each node but the root is the child of at most one: then whatever the root reaches is a tree."""
    if len(children) and (children.min() < 1 or children.max() >= n or len(np.unique(children)) != len(children)):
        raise ValueError("a node whose children are not nodes of their own")


def _integers(values: Any) -> NDArray[np.int64]:
    if isinstance(values, list) and not all(type(v) is int for v in values):
        raise ValueError("an array of integers that holds something else")
    array = np.asarray(values)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise ValueError("an array of integers that holds something else")
    return array.astype(np.int64)


def _names(learner: Mapping[str, Any], width: int) -> tuple[str, ...] | None:
    names = learner.get("feature_names", [])
    kinds = learner.get("feature_types", [])
    if "c" in kinds:
        raise _unknown("XGBoost with categorical features: the features are numbers")
    if len(names) == 0:
        return None
    if len(names) != width or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{len(names)} feature names for {width} features")
    return tuple(names)


def _best_rounds(learner: Mapping[str, Any], trees: int) -> int:
    """How many rounds predict: 0 is all; an early-stopped model says where it was best."""
    best = learner.get("attributes", {}).get("best_iteration")
    if best is None:
        return 0
    if not 0 <= int(best) < trees:
        raise ValueError(f"best iteration {int(best)} of {trees} trees")
    return int(best) + 1


# Document to library


def _load(data: bytes, shape: _Shape) -> xgboost.Booster:
    booster = _booster(data)
    if booster.num_features() != shape.width:
        raise _corrupt(f"XGBoost read {booster.num_features()} features, the document says {shape.width}")
    booster.set_param({"nthread": 1})
    return booster


def _booster(data: bytes) -> xgboost.Booster:
    booster = xgboost.Booster()
    try:
        booster.load_model(bytearray(data))
    except xgboost.core.XGBoostError as error:
        raise _corrupt(f"XGBoost does not read the model: {str(error).strip().splitlines()[-1]}") from error
    return booster


def _unknown(detail: str) -> Refused:
    return Refused(Reason.UNKNOWN_ARCHITECTURE, detail)


def _corrupt(detail: str) -> Refused:
    return Refused(Reason.CORRUPT_ARTIFACT, detail)
