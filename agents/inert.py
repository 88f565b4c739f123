"""What a pickle may hold once it is read inertly: permitted names, records of instances, and how much of it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

MAX_OPCODES = 500_000
MAX_ENTRIES = 1024
"""Entries of one mapping: keys of a file's choice could otherwise all collide."""

RECORDS = {
    # The scalers of the contract.
    "sklearn.preprocessing._data.StandardScaler",
    "sklearn.preprocessing._data.MinMaxScaler",
    "sklearn.preprocessing._data.RobustScaler",
    # What an LGBMClassifier keeps of its class labels.
    "sklearn.preprocessing._label.LabelEncoder",
    "xgboost.sklearn.XGBRegressor",
    "xgboost.sklearn.XGBClassifier",
    "xgboost.core.Booster",
    # An estimator remembers the callbacks that it was made with.
    "xgboost.callback.EarlyStopping",
    "lightgbm.sklearn.LGBMRegressor",
    "lightgbm.sklearn.LGBMClassifier",
    "lightgbm.basic.Booster",
    "joblib.numpy_pickle.NumpyArrayWrapper",
}
MAPPINGS = {"collections.OrderedDict", "collections.defaultdict"}
_REBUILDS = {
    "numpy.dtype",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    # How pickle protocol 5 writes arrays.
    "numpy._core.numeric._frombuffer",
    "builtins.bytearray",
    # How pickle protocol 2 writes bytes, and no bytes.
    "_codecs.encode",
    "builtins.bytes",
}
NAMES = frozenset(RECORDS | MAPPINGS | _REBUILDS | {"numpy.ndarray"})
"""Every name that a file may hold. Each maps to a token or to a rebuild of `agents.rebuilds`."""

_ALIASES = {"numpy.core.": "numpy._core.", "__builtin__.": "builtins."}


@dataclass(eq=False, repr=False)
class Record:
    """What is left of an instance: the full name of its class and its state, plain values."""

    name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Name:
    """A permitted name. Inert: nothing of what it names is ever imported here."""

    full: str


@dataclass
class Budget:
    """What a file may still make the reader do: `steps` opcodes or entries, `size` bytes copied."""

    steps: int
    size: int

    def step(self, n: int = 1) -> None:
        self.steps -= n
        if self.steps < 0:
            raise ValueError(f"more than {MAX_OPCODES} opcodes and entries")

    def copy(self, n: int) -> None:
        self.size -= n
        if self.size < 0:
            raise ValueError("the same bytes copied again and again")


class UnsafeError(Exception):
    """Raised on what could name or make code run; the text says what it was."""


BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError)
"""What the readers raise on a stream that does not hold together."""


def describe(value: Any) -> str:
    """A short name of what was found, for messages. Never prints the value: it may be huge."""
    return value.name if isinstance(value, Record) else type(value).__name__


def permitted(module: str, name: str, names: Container[str]) -> Name:
    full = f"{module}.{name}"
    for old, new in _ALIASES.items():
        if full.startswith(old):
            full = new + full[len(old) :]
    if full not in names or "." in name:
        raise UnsafeError(f"the name {name[:80]!r} of module {module[:80]!r}")
    return Name(full)
