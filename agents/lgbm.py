"""LightGBM: a regressor or a 3-class classifier, from `.txt` or a legacy pickle.

The library is handed text that was written here, from a file whose header and trees were checked:
arrays of one length, children within bounds and reached once, splits on features that exist. The
numbers are the file's own characters, so that nothing is rounded. Only what predicts is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightgbm
import numpy as np
from numpy.typing import NDArray

from agents import inert, unpickle
from agents.agent import Built, Refused
from streams.messages import Reason

MAX_WIDTH = 65_536
MAX_TREES = 100_000
_ESTIMATORS = ("lightgbm.sklearn.LGBMRegressor", "lightgbm.sklearn.LGBMClassifier")
_BOOSTER = "lightgbm.basic.Booster"
_REGRESSIONS = ("regression", "regression_l1", "huber", "fair", "poisson", "quantile", "mape", "gamma", "tweedie")
_CLASSIFIERS = ("multiclass", "multiclassova")
_INTEGER = re.compile(r"-?\d{1,10}\Z")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?\Z")
_OBJECTIVE = re.compile(r"[a-z_0-9]+(?: sqrt)?(?: num_class:3)?(?: [a-z_]+:-?[0-9.e+-]{1,24})*\Z")
_GENERATED = re.compile(r"Column_\d+\Z")


@dataclass(frozen=True, eq=False)
class Parsed:
    """Header and trees as `key=value` text, and what the pickle said beside them.

    `rounds` are the best iterations, 0 for all; `labels` the classes of a pickled classifier.
    """

    header: Mapping[str, str]
    trees: tuple[Mapping[str, str], ...]
    rounds: int = 0
    labels: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class _Shape:
    width: int
    outputs: int
    objective: str


def parse(data: bytes, suffix: str) -> Parsed:
    """Split the bytes of a `.txt` or `.pkl` file into header and trees; the library does not see them yet.

    Raises `Refused` with `unsafe_artifact` or `corrupt_artifact`, or `unknown_architecture` for a
    pickle of something else.
    """
    if suffix == ".txt":
        return _from_text(data)
    if suffix == ".pkl":
        return _from_pickle(unpickle.read(data))
    raise _corrupt(f"a LightGBM model is a .txt or .pkl file, not {suffix!r}")


def build(parsed: Parsed, metadata: Mapping[str, Any]) -> Built:  # noqa: ARG001  trees need no metadata
    """The booster as a network: raw scores `[B, 3]` of a classifier, predictions `[B, 1]` of a regressor.

    `parameters` is the number of nodes of all trees; `facts` are `trees`, `leaves` and `objective`.
    An early-stopped model predicts with its best iterations only. A row with a value that is not
    finite gives NaN. Raises `Refused` with `unknown_architecture` or `corrupt_artifact`.
    """
    shape = _recognise(parsed)
    trees = parsed.trees[: parsed.rounds * shape.outputs] if parsed.rounds else parsed.trees
    try:
        text = _canonical(parsed.header, trees, shape)
    except (KeyError, ValueError) as error:
        raise _corrupt(f"the model text is not one of LightGBM: {error}") from error
    leaves = sum(int(tree["num_leaves"]) for tree in trees)
    return Built(
        architecture="lightgbm-classifier" if shape.outputs == 3 else "lightgbm-regressor",
        width=shape.width,
        window=1,
        outputs=shape.outputs,
        parameters=2 * leaves - len(trees),
        network=_Network(_load(text, shape), shape),
        features=_names(parsed.header),
        facts={"trees": len(trees), "leaves": leaves, "objective": shape.objective},
    )


def describe(parsed: Parsed) -> dict[str, Any]:
    """What can be told of a text that may yet be refused: `features` and `input_shape`, where it says so."""
    try:
        names = _names(parsed.header)
        return {"features": names, "input_shape": (_integer(parsed.header["max_feature_idx"]) + 1,)}
    except (KeyError, ValueError):
        return {}


def to_txt(data: bytes, suffix: str) -> bytes:
    """A model file of any suffix as the bytes of a `.txt`, best iterations only. Raises `Refused`."""
    parsed = parse(data, suffix)
    shape = _recognise(parsed)
    build(parsed, {})
    trees = parsed.trees[: parsed.rounds * shape.outputs] if parsed.rounds else parsed.trees
    return _canonical(parsed.header, trees, shape).encode()


class _Network:
    """float32 `[B, C]` to float32 `[B, K]`; a row's bits do not depend on the other rows."""

    def __init__(self, booster: lightgbm.Booster, shape: _Shape) -> None:
        self.booster, self.shape = booster, shape

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        if x.ndim != 2 or x.shape[1] != self.shape.width:
            raise ValueError(f"expected rows of {self.shape.width} features, found an array of shape {x.shape}")
        if not len(x):
            return np.empty((0, self.shape.outputs), np.float32)
        raw = self.booster.predict(np.ascontiguousarray(x), raw_score=self.shape.outputs == 3, num_threads=1)
        outputs: NDArray[np.float32] = np.array(raw, dtype=np.float32).reshape(len(x), self.shape.outputs)
        # A tree sends NaN down its default branch; a missing feature must not become a vote.
        outputs[~np.isfinite(x).all(axis=1)] = np.nan
        return outputs


# Bytes to sections


def _from_pickle(found: Any) -> Parsed:
    labels = None
    if isinstance(found, inert.Record) and found.name in _ESTIMATORS:
        labels = found.state.get("_classes")
        found = found.state.get("_Booster")
        if found is None:
            raise _corrupt("the LightGBM estimator was never fitted: it holds no booster")
    if not isinstance(found, inert.Record) or found.name != _BOOSTER:
        raise _unknown(f"expected an LGBMRegressor, LGBMClassifier or Booster, found {inert.describe(found)}")
    text = found.state.get("_handle", found.state.get("handle"))
    if not isinstance(text, str):
        raise _corrupt("the LightGBM booster holds no model text")
    best = found.state.get("best_iteration", 0)
    parsed = _from_text(text.encode())
    return Parsed(
        parsed.header,
        parsed.trees,
        rounds=best if type(best) is int and best > 0 else 0,
        labels=None if labels is None else tuple(np.asarray(labels).ravel().tolist()),
    )


def _from_text(data: bytes) -> Parsed:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _corrupt(f"the model text is not UTF-8: {error}") from error
    body, end, _ = text.partition("\nend of trees")
    if not text.startswith("tree\n") or not end:
        raise _corrupt("the model text does not run from 'tree' to 'end of trees': not LightGBM's, or truncated")
    sections = re.split(r"\n(?=Tree=)", body)
    if not 2 <= len(sections) <= MAX_TREES + 1:
        raise _corrupt(f"{len(sections) - 1} trees: expected 1 to {MAX_TREES}")
    return Parsed(_pairs(sections[0]), tuple(_pairs(section) for section in sections[1:]))


def _pairs(section: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in section.split("\n"):
        key, _, value = line.rstrip("\r").partition("=")
        if key in found and key:
            raise _corrupt(f"the key {key[:40]!r} twice in one section")
        found[key] = value
    return found


# Sections to shape, checked


def _recognise(parsed: Parsed) -> _Shape:
    header = parsed.header
    try:
        classes, per_round = _integer(header["num_class"]), _integer(header["num_tree_per_iteration"])
        width = _integer(header["max_feature_idx"]) + 1
    except (KeyError, ValueError) as error:
        raise _corrupt(f"the model's header: {error}") from error
    objective = header.get("objective", "")[:80]
    kind = objective.split(" ")[0]
    if not _OBJECTIVE.match(objective) or objective.count("num_class:") > 1:
        raise _unknown(f"LightGBM objective {objective!r}: expected a regressor or a classifier of 3 classes")
    if kind in _CLASSIFIERS and classes == per_round == 3:
        _check_labels(parsed.labels)
    elif not (kind in _REGRESSIONS and classes == per_round == 1):
        raise _unknown(f"LightGBM objective {objective!r}: expected a regressor or a classifier of 3 classes")
    if not 0 < width <= MAX_WIDTH or len(header.get("feature_names", "").split()) != width:
        raise _corrupt(f"{len(header.get('feature_names', '').split())} feature names for {width} features")
    if len(parsed.trees) % per_round or parsed.rounds * per_round > len(parsed.trees):
        raise _corrupt(f"{len(parsed.trees)} trees for {per_round} outputs and {parsed.rounds} best iterations")
    return _Shape(width, per_round, objective)


def _check_labels(labels: tuple[Any, ...] | None) -> None:
    """Classes must stand for SELL, HOLD, BUY in this order: numbers do, sorted text never does."""
    if labels is not None and not all(isinstance(label, (int, float)) for label in labels):
        raise _unknown("LightGBM classes named by text, whose order is the alphabet's: train on 0, 1, 2")


_HEADER = ("version", "num_class", "num_tree_per_iteration", "label_index", "max_feature_idx", "objective")
_INTEGERS = ("split_feature", "decision_type", "left_child", "right_child")
# Counts and weights are not needed to predict, but the library reads them if they are there.
_OPTIONAL = ("leaf_weight", "leaf_count", "internal_value", "internal_weight", "internal_count", "split_gain")


def _canonical(header: Mapping[str, str], trees: tuple[Mapping[str, str], ...], shape: _Shape) -> str:
    """The model text that the library reads. Raises `KeyError` or `ValueError` on what is not a model."""
    lines = ["tree", *(f"{key}={_word(header[key])}" for key in _HEADER)]
    if "average_output" in header:
        lines.append("average_output")
    lines.append(f"feature_names={header['feature_names']}")
    infos = header["feature_infos"].split(" ")
    if len(infos) != shape.width:
        raise ValueError(f"feature_infos of {len(infos)} features")
    lines.append(f"feature_infos={header['feature_infos']}")
    bodies = [f"Tree={i}\n{_tree(tree, shape.width)}\n\n" for i, tree in enumerate(trees)]
    lines.append(f"tree_sizes={' '.join(str(len(body)) for body in bodies)}")
    return "\n".join(lines) + "\n\n" + "".join(bodies) + "end of trees\n"


def _tree(tree: Mapping[str, str], width: int) -> str:
    leaves = _integer(tree["num_leaves"])
    if _integer(tree.get("num_cat", "0")) or _integer(tree.get("is_linear", "0")):
        raise _unknown("LightGBM trees with categorical splits or linear leaves: expected plain numeric trees")
    inner = leaves - 1
    parts = {"num_leaves": str(leaves), "num_cat": "0"}
    for key in _INTEGERS if inner else ():
        parts[key] = tree[key]
    _check_splits(tree, inner, width)
    if inner:
        parts["threshold"] = _numbers(tree, "threshold", inner)
    parts["leaf_value"] = _numbers(tree, "leaf_value", leaves)
    for key in _OPTIONAL:
        n = leaves if key.startswith("leaf") else inner
        if n and _all_numbers(words := tree.get(key, "").strip(" ").split(" "), n):
            parts[key] = " ".join(words)
    parts |= {"is_linear": "0", "shrinkage": _numbers(tree, "shrinkage", 1)}
    return "\n".join(f"{key}={value}" for key, value in parts.items())


def _check_splits(tree: Mapping[str, str], inner: int, width: int) -> None:
    """Nodes 1.. and leaves (written ~i) are each the child of one node; features exist."""
    if inner < 0:
        raise ValueError(f"{inner + 1} leaves")
    if not inner:
        return
    columns = {key: _row(tree[key], inner) for key in _INTEGERS}
    children = np.concatenate([columns["left_child"], columns["right_child"]])
    expected = np.concatenate([np.arange(-inner - 1, 0), np.arange(1, inner)])
    if not np.array_equal(np.sort(children), expected):
        raise ValueError("a node or leaf that is not the child of exactly one node")
    features = columns["split_feature"]
    if features.min() < 0 or features.max() >= width:
        raise ValueError("a split on a feature that does not exist")
    # Bit 0 is a categorical split, bit 1 the default direction, bits 2 and 3 the kind of missing value.
    kinds = columns["decision_type"]
    if kinds.min() < 0 or kinds.max() >= 12 or (kinds & 1).any():
        raise ValueError("an unknown decision type")


def _row(text: str, n: int) -> NDArray[np.int64]:
    words = text.strip(" ").split(" ")
    if len(words) != n:
        raise ValueError(f"{len(words)} values where {n} are needed")
    return np.array([_integer(word) for word in words], dtype=np.int64)


def _numbers(tree: Mapping[str, str], key: str, n: int) -> str:
    words = tree[key].strip(" ").split(" ")
    if not _all_numbers(words, n):
        raise ValueError(f"{key} is not a row of {n} numbers")
    return " ".join(words)


def _all_numbers(words: list[str], n: int) -> bool:
    return len(words) == n and all(map(_NUMBER.match, words))


def _integer(word: str) -> int:
    if not _INTEGER.match(word):
        raise ValueError(f"{word[:40]!r} is not an integer")
    return int(word)


def _word(text: str) -> str:
    if len(text) > 80 or not text.isprintable():
        raise ValueError("a header value that is not a short text")
    return text


def _names(header: Mapping[str, str]) -> tuple[str, ...] | None:
    """The names inside, None where the library made them up."""
    names = header["feature_names"].split()
    return None if all(_GENERATED.match(name) for name in names) else tuple(names)


# Text to library


def _load(text: str, shape: _Shape) -> lightgbm.Booster:
    try:
        booster = lightgbm.Booster(model_str=text)
    except lightgbm.basic.LightGBMError as error:
        raise _corrupt(f"LightGBM does not read the model: {error}") from error
    if booster.num_feature() != shape.width:
        raise _corrupt(f"LightGBM read {booster.num_feature()} features, the text says {shape.width}")
    return booster


def _unknown(detail: str) -> Refused:
    return Refused(Reason.UNKNOWN_ARCHITECTURE, detail)


def _corrupt(detail: str) -> Refused:
    return Refused(Reason.CORRUPT_ARTIFACT, detail)
