"""The document of an XGBoost model: checked part by part, and written again from what was checked.

The library crashes on documents whose arrays differ in length or type, or whose nodes point out of
bounds. So it never reads a file: it reads what `canonical` writes, which holds the known keys and
types of version 3 of the schema and nothing else.

Functions here raise `KeyError`, `TypeError`, `ValueError`, `AttributeError`, `IndexError` or
`OverflowError` on a document that is not one of XGBoost, and `Refused` on one that is not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents import ubjson
from agents.agent import Refused
from streams.messages import Reason

MAX_WIDTH = 65_536
_CLASSIFIERS = ("multi:softprob", "multi:softmax")
_REGRESSIONS = (
    "reg:squarederror",
    "reg:squaredlogerror",
    "reg:pseudohubererror",
    "reg:absoluteerror",
    "reg:quantileerror",
    "reg:tweedie",
    "reg:gamma",
)
_NUMBERS = re.compile(r"\[?[0-9.eE+-]{1,24}(?:,[0-9.eE+-]{1,24}){0,2}\]?\Z")
_ROOT = 2**31 - 1


@dataclass(frozen=True)
class Shape:
    """`width` features, `outputs` of 1 or 3, `rounds` of boosting, and the objective by name."""

    width: int
    outputs: int
    rounds: int
    objective: str


def recognise(learner: Mapping[str, Any]) -> Shape:
    """What kind of model this is. Raises `Refused` with `unknown_architecture` for any but the two known."""
    booster = learner["gradient_booster"]["name"]
    if booster not in ("gbtree", "dart"):
        raise _unknown(f"XGBoost booster {str(booster)[:40]!r}: expected gbtree or dart")
    parameters = learner["learner_model_param"]
    width, classes = _integer(parameters["num_feature"]), _integer(parameters["num_class"])
    targets = _integer(parameters.get("num_target", "1"))
    objective = str(learner["objective"]["name"])[:40]
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"{width} features")
    if classes == 3 and targets == 1 and objective in _CLASSIFIERS:
        outputs = 3
    elif classes in (0, 1) and targets == 1 and objective in _REGRESSIONS:
        outputs = 1
    else:
        raise _unknown(
            f"XGBoost objective {objective} with {classes} classes and {targets} targets: "
            "expected a regressor of one target or a classifier of 3 classes"
        )
    model = _model(learner)
    each_round = outputs * _integer(model["gbtree_model_param"].get("num_parallel_tree", "1"))
    n = len(model["trees"])
    if each_round < 1 or n % each_round or not n:
        raise ValueError(f"{n} trees where each round has {each_round}")
    return Shape(width, outputs, n // each_round, objective)


def trees(learner: Mapping[str, Any]) -> list[NDArray[np.int64]]:
    """The left children of each tree's nodes, -1 at leaves: all that is needed to count them."""
    return [_integers(tree["left_children"]) for tree in _model(learner)["trees"]]


def names(learner: Mapping[str, Any], width: int) -> tuple[str, ...] | None:
    """The features' names, None where the model has none."""
    found = learner.get("feature_names", [])
    if len(found) == 0:
        return None
    if len(found) != width or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{len(found)} feature names for {width} features")
    return tuple(found)


def best_rounds(learner: Mapping[str, Any], shape: Shape) -> int:
    """How many rounds predict: 0 is all; an early-stopped model says where it was best."""
    best = learner.get("attributes", {}).get("best_iteration")
    if best is None:
        return 0
    if not 0 <= _integer(best) < shape.rounds:
        raise ValueError(f"best iteration {_integer(best)} of {shape.rounds} rounds")
    return _integer(best) + 1


def canonical(document: Mapping[str, Any], shape: Shape) -> bytes:
    """The document as UBJ, of known keys and types only, each checked."""
    learner = document["learner"]
    booster = learner["gradient_booster"]
    inner: dict[str, Any] = {"model": _forest(_model(learner), shape), "name": "gbtree"}
    if booster["name"] == "dart":
        inner = {
            "gbtree": inner,
            "name": "dart",
            "weight_drop": _weights(booster["weight_drop"], len(_model(learner)["trees"])),
        }
    best = best_rounds(learner, shape)
    parameters = learner["learner_model_param"]
    return ubjson.encode(
        {
            "learner": {
                "attributes": {"best_iteration": str(best - 1)} if best else {},
                "feature_names": list(names(learner, shape.width) or ()),
                "feature_types": _types(learner, shape),
                "gradient_booster": inner,
                "learner_model_param": {
                    "base_score": _base_score(parameters["base_score"], shape),
                    "boost_from_average": str(_integer(parameters.get("boost_from_average", "1"))),
                    "num_class": "3" if shape.outputs == 3 else "0",
                    "num_feature": str(shape.width),
                    "num_target": "1",
                },
                "objective": _objective(learner["objective"], shape),
            },
            "version": _version(document["version"]),
        }
    )


def _model(learner: Mapping[str, Any]) -> Mapping[str, Any]:
    booster = learner["gradient_booster"]
    model: Mapping[str, Any] = (booster["gbtree"] if booster["name"] == "dart" else booster)["model"]
    return model


def _types(learner: Mapping[str, Any], shape: Shape) -> list[str]:
    types = list(learner.get("feature_types", ()))
    if "c" in types:
        raise _unknown("XGBoost with categorical features: the features are numbers")
    if len(types) not in (0, shape.width) or not set(types) <= {"float", "int", "i", "q"}:
        raise ValueError("unknown feature types")
    return types


def _base_score(text: Any, shape: Shape) -> str:
    values = text.strip("[]").split(",")
    if not _NUMBERS.match(text) or len(values) not in (1, shape.outputs):
        raise ValueError("a base score that is not a number for each output")
    if not np.isfinite([float(value) for value in values]).all():
        raise ValueError("a base score that is not finite")
    return str(text)


def _objective(objective: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """The name and its one group of numeric parameters."""
    found: dict[str, Any] = {"name": shape.objective}
    for group, parameters in objective.items():
        if group == "name":
            continue
        if not all(_NUMBERS.match(value) for value in parameters.values()) or len(parameters) > 8:
            raise ValueError("an objective's parameters are not numbers")
        found[group] = dict(parameters)
    if shape.outputs == 3:
        found["softmax_multiclass_param"] = {"num_class": "3"}
    if len(found) > 2 or len(str(found.get("quantile_loss_param")).split(",")) > 1:
        raise ValueError("an objective with more parameters than one group, or more than one quantile")
    return found


def _version(version: Any) -> list[int]:
    numbers = _integers(version)
    if len(numbers) != 3 or numbers.min() < 0 or numbers.max() > 99 or numbers[0] < 1:
        raise ValueError("a version that is not three small numbers")
    return [int(n) for n in numbers]


def _weights(values: Any, n_trees: int) -> list[float]:
    weights = _floats(values)
    if len(weights) != n_trees or not np.isfinite(weights).all():
        raise ValueError("dart's weights are not one number a tree")
    return [float(weight) for weight in weights]


def _forest(model: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    parameters, found = model["gbtree_model_param"], model["trees"]
    info = _integers(model["tree_info"])
    n, parallel = len(found), _integer(parameters.get("num_parallel_tree", "1"))
    if len(info) != n or _integer(parameters["num_trees"]) != n:
        raise ValueError(f"{n} trees, {len(info)} of them assigned to outputs")
    # Within a round the trees of output 0 come first, then those of output 1, and so on.
    if not np.array_equal(info, np.arange(n) // parallel % shape.outputs):
        raise ValueError("trees assigned to outputs in an unknown order")
    forest: dict[str, Any] = {
        "gbtree_model_param": {"num_parallel_tree": str(parallel), "num_trees": str(n)},
        "iteration_indptr": [i * shape.outputs * parallel for i in range(shape.rounds + 1)],
        "tree_info": info.tolist(),
        "trees": [_tree(tree, i, shape.width) for i, tree in enumerate(found)],
    }
    if "cats" in model:
        if len(model["cats"]["enc"]):
            raise _unknown("XGBoost with categories: the features are numbers")
        empty = np.empty(0, np.int32)
        forest["cats"] = {"enc": [], "feature_segments": empty, "sorted_idx": empty}
    return forest


def _tree(tree: Mapping[str, Any], number: int, width: int) -> dict[str, Any]:
    parameters = tree["tree_param"]
    if _integer(parameters.get("size_leaf_vector", "1")) not in (0, 1):
        raise _unknown("XGBoost trees with vector leaves: expected one tree for each output")
    if _integers(tree.get("split_type", [])).any() or len(tree.get("categories", ())):
        raise _unknown("XGBoost trees with categorical splits: the features are numbers")
    links = {name: _integers(tree[name]) for name in ("left_children", "right_children", "parents", "split_indices")}
    numbers = {
        name: _floats(tree[name]) for name in ("base_weights", "loss_changes", "split_conditions", "sum_hessian")
    }
    default = _integers(tree["default_left"])
    n = len(links["left_children"])
    lengths = {len(c) for c in links.values()} | {len(c) for c in numbers.values()} | {len(default)}
    if not n or lengths != {n}:
        raise ValueError(f"tree {number} has arrays of different lengths")
    if _integer(parameters["num_nodes"]) != n or not 0 <= _integer(parameters.get("num_deleted", "0")) < n:
        raise ValueError(f"tree {number} has {n} nodes and says otherwise")
    _check_links(links, n, width)
    if not np.isfinite(numbers["split_conditions"]).all() or default.min() < 0 or default.max() > 1:
        raise ValueError(f"tree {number} has a threshold or leaf that is not finite")
    none, none_wide, zeros = np.empty(0, np.int32), np.empty(0, np.int64), np.zeros(n, np.uint8)
    return {
        **{name: column.astype(np.int32) for name, column in links.items()},
        **numbers,
        "default_left": default.astype(np.uint8),
        "split_type": zeros,
        "categories": none,
        "categories_nodes": none,
        "categories_segments": none_wide,
        "categories_sizes": none_wide,
        "id": number,
        "tree_param": {
            "num_deleted": str(_integer(parameters.get("num_deleted", "0"))),
            "num_feature": str(width),
            "num_nodes": str(n),
            "size_leaf_vector": "1",
        },
    }


def _check_links(links: Mapping[str, NDArray[np.int64]], n: int, width: int) -> None:
    """Each node but the root is the child of at most one, its parent: what the root reaches is a tree."""
    left, right, parents = links["left_children"], links["right_children"], links["parents"]
    if any(column.min() < -(2**31) or column.max() >= 2**31 for column in links.values()):
        raise ValueError("a link out of range")
    inner = np.flatnonzero(left != -1)
    if not np.array_equal(inner, np.flatnonzero(right != -1)):
        raise ValueError("a node with one child")
    children = np.concatenate([left[inner], right[inner]])
    if len(children) and (children.min() < 1 or children.max() >= n or len(np.unique(children)) != len(children)):
        raise ValueError("a node whose children are not nodes of their own")
    if parents[0] not in (_ROOT, -1) or (parents[children] != np.tile(inner, 2)).any():
        raise ValueError("a node whose parent is another")
    features = links["split_indices"][inner]
    if len(features) and (features.min() < 0 or features.max() >= width):
        raise ValueError("a split on a feature that does not exist")


def _integer(value: Any) -> int:
    """The integer of a parameter, which the document holds as text."""
    if not isinstance(value, str) or not re.fullmatch(r"-?[0-9]{1,10}", value):
        raise ValueError("a parameter that is not an integer")
    return int(value)


def _integers(values: Any) -> NDArray[np.int64]:
    if isinstance(values, list) and not all(type(v) is int for v in values):
        raise ValueError("an array of integers that holds something else")
    array = np.asarray(values)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise ValueError("an array of integers that holds something else")
    return array.astype(np.int64)


def _floats(values: Sequence[Any] | NDArray[Any]) -> NDArray[np.float32]:
    if isinstance(values, list) and not all(type(v) in (int, float) for v in values):
        raise ValueError("an array of numbers that holds something else")
    array = np.asarray(values)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iuf"):
        raise ValueError("an array of numbers that holds something else")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _unknown(detail: str) -> Refused:
    return Refused(Reason.UNKNOWN_ARCHITECTURE, detail)
