"""From files to a model that may vote: find, read once, hash, match, check, probe.

The checks run in one order and the first failure is the reason: readable and safe (model file, then
scaler, then metadata), architecture, features, scaler, contract, golden vectors, probe.
`docs/artifacts.md` is the same for readers, with the schema of the metadata.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import orjson

from agents import matching, probe, scalers
from agents.agent import Built, Family, Model, Refusal, Refused
from agents.discovery import PATTERN, Candidate, discover, misnamed, read_once
from agents.heads import CLASSES, head_for
from streams.messages import AGENTS, Reason

__all__ = ["Candidate", "LoadOptions", "Loading", "discover", "inspect", "load", "load_agent", "misnamed"]

DEFAULT_THRESHOLD = 0.001
"""Least expected return that is acted on, a fraction of the price, where nothing else is set."""

DEFAULT_RESIDUAL_STD = 0.002
"""Deviation of the true from the expected return, a fraction of the price, where nothing else is set."""

DEFAULT_MAX_BYTES = 512 * 2**20
SIDECAR_MAX_BYTES = 16 * 2**20

_FAMILIES = MappingProxyType(
    {"xgboost": "agents.xgb", "lightgbm": "agents.lgbm", "nhits": "agents.nhits", "patchtst": "agents.patchtst"}
)
_SEQUENCE = frozenset({"nhits", "patchtst"})
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
class Loading:
    """How it went. `model` is None exactly where `refusal` is set.

    `candidate` is the artifact that serves, or that was refused; `passed_over` the newer one that was
    refused while the one in use serves on, and `note` says so. `facts` hold what could be told of the
    artifact, refused or not: `sha256 features parameters input_shape outputs` and more.
    """

    agent: str
    model: Model | None = None
    refusal: Refusal | None = None
    candidate: Candidate | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    passed_over: tuple[Candidate, Refusal] | None = None


def load(candidate: Candidate, options: LoadOptions) -> Model:
    """Load, match and probe one artifact. Raises `Refused` with the first check that fails."""
    return _load(candidate, options, {})


def load_agent(models: Path, agent: str, options: LoadOptions, in_use: str | None = None) -> Loading:
    """Load the artifact that is selected for `agent`: the first of `discover`.

    Where that is refused nothing older takes its place, except the artifact whose SHA-256 is `in_use`,
    which the running state names.
    """
    candidates = discover(models, agent)
    note = _misnamed_note(misnamed(models, agent))
    if not candidates:
        detail = f"no artifact of {agent} in {models}: expected {PATTERN}; put one there or run `quartet train`"
        return Loading(agent, refusal=Refusal(Reason.NO_ARTIFACT, "; ".join(filter(None, (detail, note)))), note=note)
    newest = replace(_examine(candidates[0], options), note=note)
    if newest.refusal is None or in_use is None:
        return newest
    return _keep_in_use(candidates[1:], options, in_use, newest)


def inspect(models: Path, options: LoadOptions) -> list[dict[str, Any]]:
    """The rows of `quartet models list --json`: every artifact found, loaded and probed, best first."""
    rows = []
    for agent in AGENTS:
        for place, candidate in enumerate(discover(models, agent)):
            rows.append(_row(_examine(candidate, options), selected=place == 0))
        rows += [_misnamed_row(agent, file) for file in misnamed(models, agent)]
    return rows


def _load(candidate: Candidate, options: LoadOptions, facts: dict[str, Any]) -> Model:
    agent = candidate.agent
    family = cast("Family", import_module(_FAMILIES[agent]))

    data = read_once(candidate.file, options.max_bytes)
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    with _broken_is(Reason.CORRUPT_ARTIFACT, "reading the file"):
        parsed = family.parse(data, candidate.suffix)
    facts.update(_described(family, parsed))
    scaler, own = _read_scaler(candidate)
    metadata = _read_metadata(candidate)

    with _broken_is(Reason.UNKNOWN_ARCHITECTURE, "recognising the architecture"):
        built = family.build(parsed, metadata)
    metadata = {**built.facts.get("metadata", {}), **metadata}
    facts.update(_facts_of(built))
    probe.check_outputs(built.outputs)
    threshold, residual_std, origin = _levels(metadata, agent, options)

    own_names = scaler.features if scaler is not None and own and scaler.width == built.width else None
    match = matching.match_features(built, own_names, metadata, whole=agent in _SEQUENCE)
    facts.update(features=match.features, feature_set=match.feature_set.name)

    notes = list(match.notes)
    scaler = _fitting_scaler(candidate, scaler, own, match, options, notes)
    contract = facts["contract"] = matching.check_contract(metadata, match.feature_set)
    if contract == matching.NAMES_ONLY:
        notes.append("names-only: no contract hash in the metadata, so the formulas of training are not vouched for")
    if built.outputs != CLASSES and origin:
        notes.append(origin)

    model = Model(
        agent=agent,
        version=candidate.version,
        file=candidate.file,
        sha256=facts["sha256"],
        feature_set=match.feature_set.name,
        features=match.features,
        contract=contract,
        window=built.window,
        parameters=built.parameters,
        outputs=built.outputs,
        network=built.network,
        head=head_for(built.outputs, threshold, residual_std),
        scaler=None if scaler is None else scaler.scaler,
        detail="; ".join(notes),
        architecture=built.architecture,
        facts={**facts, "threshold": threshold, "residual_std": residual_std},
    )
    with _broken_is(Reason.UNKNOWN_ARCHITECTURE, "computing probe rows"):
        probe.check_golden(model, metadata)
        return probe.check_probe(model, built.facts.get("non_finite_weights", []))


def _examine(candidate: Candidate, options: LoadOptions) -> Loading:
    facts: dict[str, Any] = {}
    try:
        model = _load(candidate, options, facts)
    except Refused as refused:
        return Loading(candidate.agent, None, refused.refusal, candidate, facts)
    return Loading(candidate.agent, model, None, candidate, facts)


def _keep_in_use(older: list[Candidate], options: LoadOptions, in_use: str, newest: Loading) -> Loading:
    """The artifact of that hash, if it is at hand and still passes; else the newest, refused."""
    assert newest.candidate is not None and newest.refusal is not None
    for candidate in older:
        serving = _examine(candidate, options) if _sha256(candidate, options) == in_use else None
        if serving is None or serving.model is None or serving.model.sha256 != in_use:
            continue
        note = (
            f"{candidate.file.name} serves on, because the newer {newest.candidate.file.name} was refused: "
            f"{newest.refusal.reason}: {newest.refusal.detail}"
        )
        model = replace(serving.model, detail="; ".join(filter(None, (serving.model.detail, note))))
        return replace(
            serving,
            model=model,
            note="; ".join(filter(None, (note, newest.note))),
            passed_over=(newest.candidate, newest.refusal),
        )
    return newest


def _sha256(candidate: Candidate, options: LoadOptions) -> str | None:
    try:
        return hashlib.sha256(read_once(candidate.file, options.max_bytes)).hexdigest()
    except Refused:
        return None  # an unreadable file is not the one in use


def _read_scaler(candidate: Candidate) -> tuple[scalers.ScalerFile | None, bool]:
    """The scaler beside the model and True, else the agent's generic one and False, else None."""
    own = [candidate.beside(f"_scaler{suffix}") for suffix in (".json", ".pkl")]
    generic = [candidate.file.with_name(name) for name in _GENERIC_SCALERS[candidate.agent]]
    for file in (*own, *generic):
        if _exists(file):
            data = read_once(file, SIDECAR_MAX_BYTES)
            with _broken_is(Reason.CORRUPT_ARTIFACT, f"reading {file.name}"), _naming(file):
                return scalers.parse(data, file.suffix), file in own
    return None, False


def _read_metadata(candidate: Candidate) -> dict[str, Any]:
    file = next((f for f in map(candidate.beside, ("_meta.json", "_metadata.json")) if _exists(f)), None)
    if file is None:
        return {}
    try:
        metadata = orjson.loads(read_once(file, SIDECAR_MAX_BYTES))
    except orjson.JSONDecodeError as error:
        raise Refused(Reason.CORRUPT_ARTIFACT, f"{file} is not JSON: {error}; write it again") from error
    if not isinstance(metadata, dict):
        raise Refused(Reason.CORRUPT_ARTIFACT, f"expected a JSON object in {file}, found a {type(metadata).__name__}")
    for key in ("threshold", "residual_std"):
        _level(metadata, key)
    return metadata


def _fitting_scaler(
    candidate: Candidate,
    scaler: scalers.ScalerFile | None,
    own: bool,
    match: matching.Match,
    options: LoadOptions,
    notes: list[str],
) -> scalers.ScalerFile | None:
    """The scaler to use. A generic one serves only where it names exactly the model's features."""
    if scaler is not None and own:
        matching.check_scaler(scaler.width, scaler.features, match)
        return scaler
    if scaler is not None and matching.named(scaler.features) == match.features:
        notes.append(f"no scaler of its own: the generic scaler of {candidate.agent} has the same features and is used")
        return scaler
    if candidate.agent in options.allow_unscaled:
        notes.append("unscaled: no scaler, allowed by allow_unscaled")
        return None
    other = "; the generic scaler does not name its features" if scaler is not None else ""
    raise Refused(
        Reason.SCALER_MISSING,
        f"expected {candidate.file.stem}_scaler.json or _scaler.pkl beside the model, found none{other}; put it there, or set "
        f"allow_unscaled for {candidate.agent} if it was trained on raw features",
    )


def _levels(metadata: Mapping[str, Any], agent: str, options: LoadOptions) -> tuple[float, float, str]:
    """Threshold, residual deviation, and where they come from."""
    threshold, deviation = _level(metadata, "threshold"), _level(metadata, "residual_std")
    absent = [name for name, value in (("threshold", threshold), ("residual_std", deviation)) if value is None]
    if threshold is None:
        threshold = options.threshold.get(agent, DEFAULT_THRESHOLD)
    if deviation is None:
        deviation = options.residual_std.get(agent, DEFAULT_RESIDUAL_STD)
    return threshold, deviation, f"{' and '.join(absent)} from settings, the metadata have none" if absent else ""


def _level(metadata: Mapping[str, Any], key: str) -> float | None:
    """A threshold (0 or more) or a deviation (more than 0) of the metadata, None where absent."""
    value = metadata.get(key)
    if value is None:
        return None
    number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value) and value >= 0
    if not number or (key == "residual_std" and value == 0):
        least = "above 0" if key == "residual_std" else "of 0 or more"
        raise Refused(
            Reason.CORRUPT_ARTIFACT, f"expected a finite number {least} for {key} in the metadata, found {value!r}"
        )
    return float(value)


def _exists(file: Path) -> bool:
    return file.exists() or file.is_symlink()


@contextmanager
def _broken_is(reason: Reason, doing: str) -> Iterator[None]:
    """Whatever else a foreign file makes a library raise is a refusal of that file, not the end of the worker."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise Refused(
            reason, f"{doing} failed ({type(error).__name__}: {text}); copy the file again or train again"
        ) from error


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except Refused as refused:
        raise Refused(refused.refusal.reason, f"{file.name}: {refused.refusal.detail}") from refused


def _described(family: Family, parsed: Any) -> dict[str, Any]:
    describe = getattr(family, "describe", None)
    return {} if describe is None else {k: v for k, v in describe(parsed).items() if v is not None}


def _facts_of(built: Built) -> dict[str, Any]:
    shape = (built.width,) if built.window == 1 else (built.window, built.width)
    found = {
        "architecture": built.architecture,
        "width": built.width,
        "window": built.window,
        "input_shape": shape,
        "outputs": built.outputs,
        "parameters": built.parameters,
    }
    return found if built.features is None else {**found, "features": built.features}


def _row(loading: Loading, *, selected: bool) -> dict[str, Any]:
    candidate, facts, refusal, model = loading.candidate, loading.facts, loading.refusal, loading.model
    assert candidate is not None
    return {
        "agent": loading.agent,
        "file": str(candidate.file),
        "version": candidate.version,
        "contract": facts.get("contract", ""),
        "state": "active" if model is not None else "refused",
        "reason": "" if refusal is None else str(refusal.reason),
        "detail": (refusal.detail if refusal is not None else "") if model is None else model.detail,
        "features": list(facts.get("features", ())),
        "parameters": int(facts.get("parameters", 0)),
        "input_shape": list(facts.get("input_shape", ())),
        "outputs": int(facts.get("outputs", 0)),
        "sha256": facts.get("sha256", ""),
        "selected": selected,
    }


def _misnamed_row(agent: str, file: Path) -> dict[str, Any]:
    refusal = Refusal(Reason.NO_ARTIFACT, _misnamed_note([file]))
    row = _row(Loading(agent, None, refusal, Candidate(agent, file, "", "", 0)), selected=False)
    return row


def _misnamed_note(files: list[Path]) -> str:
    if not files:
        return ""
    return f"never loaded, because the name is not {PATTERN}: {', '.join(f.name for f in files[:8])}; rename to that pattern"
