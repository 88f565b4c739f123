"""Scalers: read from JSON or a legacy pickle, applied column by column in float64.

scikit-learn is not needed: the stored numbers are applied in the order of operations of
scikit-learn's own `transform`, so the result is the same bits.

    StandardScaler, RobustScaler    (x - mean) / scale
    MinMaxScaler                    x * scale + mean, then clipped to its range if it says so
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

from agents import inert, unpickle
from agents.agent import SAVE_AGAIN, Refused, Scaler
from streams.messages import Reason

FORMAT = "quartet-scaler/1"
KINDS = ("standard", "minmax", "robust")
MAX_WIDTH = 65_536

Column = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ColumnScaler:
    """One of the three formulas over columns `[C]`; an absent column leaves its step out."""

    kind: str
    width: int
    mean: Column | None
    scale: Column | None
    clip: tuple[float, float] | None = None

    def transform(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """`[..., C]` to `[..., C]`, elementwise: a row's bits do not depend on other rows."""
        if x.shape[-1] != self.width:
            raise ValueError(f"the scaler has {self.width} columns, the rows {x.shape[-1]}")
        y = np.array(x, dtype=np.float64)
        # Beyond float64 is inf, and the caller abstains; no warning is needed for that.
        with np.errstate(over="ignore", invalid="ignore"):
            return self._applied(y)

    def _applied(self, y: Column) -> Column:
        if self.kind == "minmax" and self.mean is not None and self.scale is not None:
            y *= self.scale
            y += self.mean
            return y if self.clip is None else np.clip(y, *self.clip, out=y)
        if self.mean is not None:
            y -= self.mean
        if self.scale is not None:
            y /= self.scale
        return y


@dataclass(frozen=True, eq=False)
class ScalerFile:
    """A scaler as it was found in a file.

    `kind` is of `KINDS`; `features` are the names inside, None where it has none; `width` is C.
    `mean` and `scale`, `[C]` or None, are the columns of the module's formulas (`center_` of a
    RobustScaler and `min_` of a MinMaxScaler stand in `mean`).
    """

    kind: str
    features: tuple[str, ...] | None
    width: int
    scaler: Scaler
    mean: Column | None
    scale: Column | None
    clip: tuple[float, float] | None = None


def standard(mean: ArrayLike | None, scale: ArrayLike | None, features: Sequence[str] | None) -> ScalerFile:
    """A standard scaler of what training measured. Raises `Refused` as a file with these numbers would."""
    return make("standard", mean=mean, scale=scale, features=features)


def named(scaler: ColumnScaler, features: Sequence[str]) -> ScalerFile:
    """A scaler that was matched to these features, as a file that names them."""
    return make(scaler.kind, mean=scaler.mean, scale=scaler.scale, features=features, clip=scaler.clip)


def make(
    kind: str,
    *,
    mean: ArrayLike | None,
    scale: ArrayLike | None,
    features: Sequence[str] | None = None,
    width: int | None = None,
    clip: Sequence[float] | None = None,
) -> ScalerFile:
    """Check the numbers and make the scaler; `width` is needed only where nothing else gives it.

    Raises `Refused` with `corrupt_artifact` on widths that differ, a zero or non-finite scale, NaN.
    """
    if kind not in KINDS:
        raise _corrupt(f"scaler kind {str(kind)[:40]!r} is unknown: expected one of {', '.join(KINDS)}")
    names = None if features is None else _names(features)
    columns = {"mean": _column("mean", mean), "scale": _column("scale", scale)}
    if kind == "minmax" and (mean is None or scale is None):
        raise _corrupt("a minmax scaler needs both columns, min and scale")
    widths = {name: len(column) for name, column in columns.items() if column is not None}
    if names is not None:
        widths["features"] = len(names)
    if width is not None:
        widths["width"] = width
    if len(set(widths.values())) != 1 or not 0 < next(iter(widths.values())) <= MAX_WIDTH:
        raise _corrupt(f"the scaler's widths differ or are out of 1..{MAX_WIDTH}: {widths}")
    if columns["scale"] is not None and not columns["scale"].all():
        raise _corrupt(f"the scaler's scale is zero in column {int(np.argmin(columns['scale'] != 0))}")
    limits = None if clip is None else _limits(clip)
    n = next(iter(widths.values()))
    scaler = ColumnScaler(kind, n, columns["mean"], columns["scale"], limits)
    return ScalerFile(kind, names, n, scaler, columns["mean"], columns["scale"], limits)


def parse(data: bytes, suffix: str) -> ScalerFile:
    """Read a scaler from the bytes of a `.json` or `.pkl` file without executing any of them.

    Raises `Refused` with `unsafe_artifact` or `corrupt_artifact`.
    """
    if suffix == ".json":
        return _from_json(data)
    if suffix == ".pkl":
        return _from_record(unpickle.read(data))
    raise _corrupt(f"a scaler is a .json or .pkl file, not {suffix!r}")


def to_json(scaler_file: ScalerFile) -> bytes:
    """The bytes of a `_scaler.json`; `parse` gives the same numbers back, bit for bit."""
    document = {
        "format": FORMAT,
        "kind": scaler_file.kind,
        "width": scaler_file.width,
        "features": scaler_file.features,
        "mean": scaler_file.mean,
        "scale": scaler_file.scale,
        "clip": scaler_file.clip,
    }
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def _from_json(data: bytes) -> ScalerFile:
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _corrupt(f"the scaler is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise _corrupt("the scaler is not a JSON object")
    found = document.get("format", FORMAT)
    if found != FORMAT:
        raise _corrupt(f"scaler format {str(found)[:40]!r} is unknown: expected {FORMAT!r}")
    width = document.get("width")
    if width is not None and type(width) is not int:
        raise _corrupt("the scaler's width is not an integer")
    return make(
        document.get("kind", "standard"),
        mean=document.get("mean"),
        scale=document.get("scale"),
        features=document.get("features", document.get("feature_names")),
        width=width,
        clip=document.get("clip"),
    )


_CLASSES = {
    "sklearn.preprocessing._data.StandardScaler": ("standard", "mean_", "with_mean", "with_std"),
    "sklearn.preprocessing._data.MinMaxScaler": ("minmax", "min_", "", ""),
    "sklearn.preprocessing._data.RobustScaler": ("robust", "center_", "with_centering", "with_scaling"),
}


def _from_record(found: Any) -> ScalerFile:
    if not isinstance(found, inert.Record) or found.name not in _CLASSES:
        raise _corrupt(f"expected a StandardScaler, MinMaxScaler or RobustScaler, found {inert.describe(found)}")
    kind, mean_key, use_mean, use_scale = _CLASSES[found.name]
    state = found.state
    if "n_features_in_" not in state and "scale_" not in state:
        raise _corrupt("the scaler was never fitted: it has no n_features_in_ and no scale_")
    mean, scale = state.get(mean_key), state.get("scale_")
    width = state.get("n_features_in_")
    return make(
        kind,
        # An unused column may still be stored: with_mean=False keeps `mean_`.
        mean=mean if state.get(use_mean, True) else None,
        scale=scale if state.get(use_scale, True) else None,
        features=state.get("feature_names_in_"),
        width=width if type(width) is int else None,
        clip=state.get("feature_range", (0, 1)) if state.get("clip") else None,
    )


def _column(name: str, values: Any) -> Column | None:
    """A finite float64 column `[C]`, own memory, not writable."""
    if values is None:
        return None
    if isinstance(values, list) and not all(type(v) in (int, float) for v in values):
        raise _corrupt(f"the scaler's {name} holds something that is not a number")
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise _corrupt(f"the scaler's {name} is not a list of numbers")
    try:
        column = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise _corrupt(f"the scaler's {name} is not a list of numbers: {error}") from error
    if column.ndim != 1:
        raise _corrupt(f"the scaler's {name} has shape {column.shape}, not one row of columns")
    if not np.isfinite(column).all():
        raise _corrupt(f"the scaler's {name} is not finite in column {int(np.argmin(np.isfinite(column)))}")
    column.flags.writeable = False
    return column


def _names(features: Any) -> tuple[str, ...]:
    if not isinstance(features, (list, tuple)) or not all(isinstance(name, str) for name in features):
        raise _corrupt("the scaler's feature names are not a list of text")
    if len(set(features)) != len(features):
        raise _corrupt("the scaler names a feature twice")
    return tuple(features)


def _limits(clip: Any) -> tuple[float, float]:
    column = _column("clip", list(clip) if isinstance(clip, (list, tuple)) else clip)
    if column is None or len(column) != 2 or column[0] >= column[1]:
        raise _corrupt("the scaler's clip is not a range of two rising numbers")
    return float(column[0]), float(column[1])


def _corrupt(detail: str) -> Refused:
    return Refused(Reason.CORRUPT_ARTIFACT, f"{detail}; {SAVE_AGAIN}")
