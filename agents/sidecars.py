"""What lies beside a model: its scaler and its metadata, and the settings that stand in for what they lack."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson

from agents import matching, scalers
from agents.agent import Refused, Scaler
from agents.discovery import Candidate
from agents.manifest import read_verified, sha256
from streams.messages import Reason

DEFAULT_THRESHOLD = 0.001
"""Least expected return that is acted on, a fraction of the price, where nothing else is set."""

DEFAULT_RESIDUAL_STD = 0.002
"""Deviation of the true from the expected return, a fraction of the price, where nothing else is set."""

DEFAULT_MAX_BYTES = 512 * 2**20
SIDECAR_MAX_BYTES = 16 * 2**20

_GENERIC_SCALERS = MappingProxyType(
    {
        "xgboost": ("xgboost_scaler.json", "xgboost_scaler.pkl", "xgb_scaler.json", "xgb_scaler.pkl"),
        "lightgbm": ("lightgbm_scaler.json", "lightgbm_scaler.pkl", "lgbm_scaler.json", "lgbm_scaler.pkl"),
        "nhits": ("nhits_scaler.json", "nhits_scaler.pkl"),
        "patchtst": ("patchtst_scaler.json", "patchtst_scaler.pkl"),
    }
)


@dataclass(frozen=True)
class LoadOptions:
    """Settings of loading, by agent where they are mappings.

    `allow_unscaled`: agents whose artifacts may come without a scaler. `threshold` and `residual_std`:
    fractions of the price for regressors whose metadata have none (0.001 and 0.002 unless set).
    `max_bytes`: the largest model file that is read.
    """

    allow_unscaled: frozenset[str] = frozenset()
    threshold: Mapping[str, float] = field(default_factory=dict)
    residual_std: Mapping[str, float] = field(default_factory=dict)
    max_bytes: int = DEFAULT_MAX_BYTES


@dataclass(frozen=True)
class FoundScaler:
    """A scaler that was read: beside the model and `own`, or the generic one of its agent."""

    file: Path
    own: bool
    content: scalers.ScalerFile
    sha256: str


def read_scaler(candidate: Candidate) -> FoundScaler | None:
    """`<stem>_scaler.json` or `.pkl`, else the agent's generic scaler, as `xgboost_scaler.pkl`, else None.

    Raises `Refused` with `unsafe_artifact` or `corrupt_artifact`.
    """
    own = [candidate.beside(f"_scaler{suffix}") for suffix in (".json", ".pkl")]
    generic = [candidate.file.with_name(name) for name in _GENERIC_SCALERS[candidate.agent]]
    file = next(filter(_exists, (*own, *generic)), None)
    if file is None:
        return None
    data = read_verified(file, SIDECAR_MAX_BYTES)
    try:
        with broken_is(Reason.CORRUPT_ARTIFACT, "reading it"):
            return FoundScaler(file, file in own, scalers.parse(data, file.suffix), sha256(data))
    except Refused as refused:
        raise Refused(refused.refusal.reason, f"{file.name}: {refused.refusal.detail}") from refused


def read_metadata(candidate: Candidate) -> dict[str, Any]:
    """The JSON object of `<stem>_meta.json` or `<stem>_metadata.json`, empty where there is none.

    Raises `Refused` with `corrupt_artifact`, or `unsafe_artifact` as of `read_once`.
    """
    return found_metadata(candidate)[0]


def found_metadata(candidate: Candidate) -> tuple[dict[str, Any], str]:
    """As `read_metadata`, with the SHA-256 of the file, empty where there is none."""
    file = next(filter(_exists, map(candidate.beside, ("_meta.json", "_metadata.json"))), None)
    if file is None:
        return {}, ""
    data = read_verified(file, SIDECAR_MAX_BYTES)
    try:
        metadata = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Refused(Reason.CORRUPT_ARTIFACT, f"{file.name} is not JSON: {error}; write it again") from error
    if not isinstance(metadata, dict):
        found = type(metadata).__name__
        raise Refused(
            Reason.CORRUPT_ARTIFACT, f"expected a JSON object in {file.name}, found a {found}; write it again"
        )
    check_levels(metadata)
    return metadata, sha256(data)


def fitting_scaler(
    candidate: Candidate, found: FoundScaler | None, match: matching.Match, options: LoadOptions
) -> tuple[Scaler | None, str]:
    """The scaler to use, and what a person should know of it.

    The model's own must fit its features; a generic one serves only where it names exactly these.
    Raises `Refused` with `scaler_mismatch` or `scaler_missing`.
    """
    if found is not None and found.own:
        matching.check_scaler(found.content.width, found.content.features, match)
        return found.content.scaler, ""
    if found is not None and matching.named(found.content.features) == match.features:
        return (
            found.content.scaler,
            f"no scaler of its own: the generic {found.file.name} names the same features and serves",
        )
    if candidate.agent in options.allow_unscaled:
        return None, f"unscaled: no scaler, which allow_unscaled permits for {candidate.agent}"
    other = "" if found is None else f" (the generic {found.file.name} does not name the model's features)"
    raise Refused(
        Reason.SCALER_MISSING,
        f"expected {candidate.file.stem}_scaler.json or _scaler.pkl beside the model, found none{other}; put it there, "
        f"or set allow_unscaled for {candidate.agent} if it was trained on raw features",
    )


@dataclass(frozen=True)
class Levels:
    """What turns an expected return into a vote, and where it comes from."""

    threshold: float
    residual_std: float
    note: str


def levels(metadata: Mapping[str, Any], agent: str, options: LoadOptions) -> Levels:
    """Of the metadata, else of the settings, else the defaults."""
    settings = {
        "threshold": options.threshold.get(agent, DEFAULT_THRESHOLD),
        "residual_std": options.residual_std.get(agent, DEFAULT_RESIDUAL_STD),
    }
    absent = {key: value for key, value in settings.items() if metadata.get(key) is None}
    found = {**{key: float(metadata[key]) for key in settings if key not in absent}, **absent}
    note = " and ".join(f"{key} {value:g}" for key, value in absent.items())
    return Levels(found["threshold"], found["residual_std"], f"{note} from settings" if note else "")


def check_levels(metadata: Mapping[str, Any]) -> None:
    """Raises `Refused` with `corrupt_artifact` unless `threshold` is >= 0 and `residual_std` > 0, where given."""
    for key, above in (("threshold", False), ("residual_std", True)):
        value = metadata.get(key)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (above and value == 0):
            least = "above 0" if above else "of 0 or more"
            raise Refused(
                Reason.CORRUPT_ARTIFACT,
                f"expected a finite number {least} for {key} in the metadata, found {str(value)[:80]!r}; mend it",
            )


@contextmanager
def broken_is(reason: Reason, doing: str) -> Iterator[None]:
    """Whatever else a foreign file makes a library raise is a refusal of that file, not the end of the worker."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise Refused(
            reason, f"{doing} failed ({type(error).__name__}: {text}); copy the file or train again"
        ) from error


def _exists(file: Path) -> bool:
    return file.exists() or file.is_symlink()
