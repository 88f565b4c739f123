"""What an artifact says of its features, and whether model, scaler, metadata and feature set agree."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents.agent import Built, Refused
from streams.contracts import FEATURE_SETS, SET_OF_WIDTH, FeatureSet
from streams.messages import Reason

NAMES_ONLY = "names-only"
"""The contract of an artifact without a contract hash: nothing vouches for its formulas."""

_PLACEHOLDER = re.compile(r"(?:f|x|column_?|feature_?)\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Match:
    """The columns a model reads, the set they are of, and what a person should know of how they were found."""

    feature_set: FeatureSet
    features: tuple[str, ...]
    note: str = ""


def match_features(
    built: Built, own_scaler: Sequence[str] | None, metadata: Mapping[str, Any], *, whole: bool
) -> Match:
    """The feature set of a model, from the names in it, in its scaler or in its metadata, else its width.

    Names may be in any order, each once; `whole` demands every name of the set. Raises `Refused` with
    `feature_mismatch`.
    """
    model, meta, scaler = named(built.features), declared(metadata), named(own_scaler)
    if model and meta and model != meta:
        raise _mismatch(
            f"expected one list of names, found two: {_difference('the model', model, 'the metadata', meta)}; "
            "keep the one it was trained with"
        )
    names, source = next(
        ((n, s) for n, s in ((model, "the model"), (meta, "the metadata"), (scaler, "the scaler")) if n), (None, "")
    )
    if names is None:
        return _by_width(built.width)
    if len(names) != built.width:
        raise _mismatch(
            f"expected {built.width} names, one for each input, found {len(names)} in {source}: {_shown(names)}"
        )
    return Match(_set_of(names, source, metadata, whole=whole), names, f"feature names from {source}")


def check_scaler(width: int, names: Sequence[str] | None, match: Match) -> None:
    """Raises `Refused` with `scaler_mismatch` unless the scaler is of the same columns in the same order."""
    found = named(names)
    if width != len(match.features):
        raise _scaler(f"expected a scaler of {len(match.features)} features, found one of {width}")
    if found and found != match.features:
        raise _scaler(
            f"expected a scaler of the model's columns: {_difference('the model', match.features, 'the scaler', found)}"
        )


def check_contract(metadata: Mapping[str, Any], feature_set: FeatureSet) -> tuple[str, str]:
    """The contract hash, or `names-only` where the artifact has none, and what to say of it.

    Raises `Refused` with `contract_mismatch`.
    """
    found = contract_hash(metadata)
    if found is None:
        return NAMES_ONLY, "names-only: no contract hash in the metadata vouches for the formulas of its training"
    if found != feature_set.contract:
        raise Refused(
            Reason.CONTRACT_MISMATCH,
            f"expected the contract {feature_set.contract} of {feature_set.name}, found {str(found)[:80]}: the "
            "formulas have changed since training; train again with `quartet train`",
        )
    return feature_set.contract, ""


def contract_hash(metadata: Mapping[str, Any]) -> Any:
    """What the metadata give as the contract, None where they give none."""
    found = metadata.get("contract")
    return None if found in (None, "", NAMES_ONLY) else found


def declared(metadata: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The feature names of the metadata, from `features` or `feature_names`; a mere number is no list.

    Raises `Refused` with `feature_mismatch` where the two differ or hold anything but text.
    """
    lists = [metadata[key] for key in ("features", "feature_names") if isinstance(metadata.get(key), list | tuple)]
    if not lists:
        return None
    if any(not isinstance(name, str) for names in lists for name in names) or any(names != lists[0] for names in lists):
        raise _mismatch("expected `features` and `feature_names` of the metadata to be one list of names; mend them")
    return named(lists[0])


def named(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names, or None where there are none or only a library's numbers for unnamed columns."""
    if not names or all(_PLACEHOLDER.fullmatch(name) for name in names):
        return None
    return tuple(names)


def _by_width(width: int) -> Match:
    feature_set = SET_OF_WIDTH.get(width)
    if feature_set is None:
        widths = ", ".join(f"{w} ({s.name})" for w, s in sorted(SET_OF_WIDTH.items()))
        raise _mismatch(
            f"neither model, scaler nor metadata name the {width} features, and only the widths {widths} can be told "
            "without names; write the ordered names into `features` of the metadata"
        )
    return Match(
        feature_set, feature_set.features, f"no feature names: matched to {feature_set.name} by the width {width}"
    )


def _set_of(names: tuple[str, ...], source: str, metadata: Mapping[str, Any], *, whole: bool) -> FeatureSet:
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise _mismatch(f"the names in {source} repeat: {_shown(twice)}")
    fitting = [s for s in _allowed(metadata) if set(names) <= set(s.features) and not (whole and len(names) != len(s))]
    if not fitting:
        raise _mismatch(f"expected {_wanted(metadata, whole=whole)}, found in {source}: {_strange(names)}")
    wanted = contract_hash(metadata)
    return next((s for s in fitting if s.contract == wanted), fitting[0])


def _allowed(metadata: Mapping[str, Any]) -> list[FeatureSet]:
    """Every set in order of preference, or the one that the metadata name."""
    name = metadata.get("feature_set")
    if name is None:
        return list(FEATURE_SETS.values())
    if not isinstance(name, str) or name not in FEATURE_SETS:
        raise _mismatch(
            f"expected a feature_set of {', '.join(FEATURE_SETS)} in the metadata, found {str(name)[:80]!r}"
        )
    return [FEATURE_SETS[name]]


def _wanted(metadata: Mapping[str, Any], *, whole: bool) -> str:
    sets = " or ".join(s.name for s in _allowed(metadata))
    return f"{'every name' if whole else 'names'} of one feature set ({sets})"


def _strange(names: tuple[str, ...]) -> str:
    nearest = max(FEATURE_SETS.values(), key=lambda s: len(set(names) & set(s.features)))
    foreign = [name for name in names if name not in nearest.features]
    if foreign:
        return f"{_shown(foreign)}, unknown to {nearest.name}; train again with `quartet train`"
    return f"{len(names)} of the {len(nearest)} names of {nearest.name}; train again on all of them"


def _shown(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(name[:40] for name in names[:6]) + rest


def _difference(one: str, ours: Sequence[str], other: str, theirs: Sequence[str]) -> str:
    """Where two lists of names part, in words."""
    if len(ours) != len(theirs):
        return f"{one} names {len(ours)} features, {other} {len(theirs)} ({_shown(theirs)})"
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return f"{one} has {ours[place][:40]} in place {place + 1} of {len(ours)}, {other} has {theirs[place][:40]}"


def _mismatch(detail: str) -> Refused:
    return Refused(Reason.FEATURE_MISMATCH, detail)


def _scaler(detail: str) -> Refused:
    return Refused(Reason.SCALER_MISMATCH, f"{detail}; put the scaler of this very training beside the model")
