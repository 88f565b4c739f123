"""From files to a model that may vote: find, read once, hash, match, check, probe.

The checks run in one order and the first failure is the reason: readable and safe (model file, then
scaler, then metadata), architecture, features, scaler, contract, golden vectors, probe.
`docs/artifacts.md` is the same for readers, with the schema of the metadata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from agents import matching, probe, sidecars
from agents.agent import Built, Family, Head, Model, Refusal, Refused, Scaler
from agents.discovery import PATTERN, Candidate, candidate_of, discover, misnamed, ranks_above, read_once
from agents.heads import CLASSES, head_for
from agents.manifest import read_verified
from agents.sidecars import LoadOptions
from streams.messages import AGENTS, AgentState, Reason

__all__ = [
    "Candidate",
    "LoadOptions",
    "Loading",
    "discover",
    "inspect",
    "judge_newer",
    "load",
    "load_agent",
    "load_exact",
    "load_file",
    "misnamed",
]

_FAMILIES = MappingProxyType(
    {"xgboost": "agents.xgb", "lightgbm": "agents.lgbm", "nhits": "agents.nhits", "patchtst": "agents.patchtst"}
)
_DIMENSIONS = frozenset(("blocks", "hidden", "layers", "heads", "d_model", "patch", "stride", "trees", "leaves"))
_SEQUENCE = frozenset({"nhits", "patchtst"})


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


def load_agent(models: Path, agent: str, options: LoadOptions) -> Loading:
    """Load the artifact that is selected for `agent`: the first of `discover`. Nothing older takes its place."""
    candidates = discover(models, agent)
    note = _misnamed_note(misnamed(models, agent))
    if not candidates:
        detail = f"no artifact of {agent} in {models}: expected {PATTERN}; put one there or run `quartet train`"
        return Loading(agent, refusal=Refusal(Reason.NO_ARTIFACT, "; ".join(filter(None, (detail, note)))), note=note)
    return replace(_examine(candidates[0], options), note=note)


def judge_newer(serving: Loading, models: Path, options: LoadOptions) -> Loading:
    """`serving`, and where the artifact that the folder selects ranks above it and is refused, that refusal too."""
    newest = next(iter(discover(models, serving.agent)), None)
    if serving.candidate is None or newest is None or not ranks_above(newest, serving.candidate):
        return serving
    refusal = _examine(newest, options).refusal
    if refusal is None:
        return serving
    note = (
        f"{serving.candidate.file.name} serves on, because the newer {newest.file.name} was refused: "
        f"{refusal.reason}: {refusal.detail}"
    )
    return replace(serving, note="; ".join(filter(None, (note, serving.note))), passed_over=(newest, refusal))


def load_file(file: Path, agent: str, options: LoadOptions) -> Loading:
    """Load this very file for `agent`, whether it would be selected or not."""
    candidate = candidate_of(file, agent)
    if candidate is None:
        detail = f"{file.name} is not the name of an artifact of {agent}: expected {PATTERN}; rename it"
        return Loading(agent, refusal=Refusal(Reason.NO_ARTIFACT, detail))
    if not file.exists():
        detail = f"{file} is not there: put it where the worker can read it"
        return Loading(agent, refusal=Refusal(Reason.NO_ARTIFACT, detail, file.name), candidate=candidate)
    return _examine(candidate, options)


def load_exact(models: Path, agent: str, file: str, sha256: str, options: LoadOptions, *, digest: str = "") -> Loading:
    """Load the artifact of that hash and no other: from `models`, whatever its name is there, or from `file`.

    With a `digest` also with no other scaler and metadata than those.
    """
    named = [candidate_of(place, agent) for place in (models / Path(file).name, Path(file))]
    found = [c for c in dict.fromkeys((*named, *discover(models, agent))) if c and _sha256(c, options) == sha256]
    for candidate in found:
        loading = _examine(candidate, options)
        if loading.facts.get("sha256") == sha256 and digest in ("", loading.facts.get("digest")):
            return loading
    if found and digest:
        name = found[0].file.name
        detail = f"the scaler or the metadata beside {name} are not those of then: put them back"
        return Loading(agent, refusal=Refusal(Reason.NO_ARTIFACT, detail, name), candidate=found[0])
    detail = (
        f"the artifact in use, {Path(file).name} with sha256 {sha256[:12]}, is neither in {models} nor at {file}: "
        f"put it back, or serve the newest with `quartet models reload {agent}`"
    )
    return Loading(agent, refusal=Refusal(Reason.NO_ARTIFACT, detail))


def inspect(models: Path, options: LoadOptions) -> list[dict[str, Any]]:
    """The rows of `quartet models list --json`: every artifact found, loaded and probed, best first.

    As for all loading, the process has set one torch thread; with more it is many times slower.
    """
    rows: list[dict[str, Any]] = []
    for agent in AGENTS:
        found = discover(models, agent)
        rows += [_row(_examine(c, options), c, selected=c is found[0]) for c in found]
        rows += [_misnamed_row(agent, file) for file in misnamed(models, agent)]
    return rows


def _load(candidate: Candidate, options: LoadOptions, facts: dict[str, Any]) -> Model:
    """The checks in their order; `facts` fill up on the way, so that a refusal tells them too."""
    family = cast("Family", import_module(_FAMILIES[candidate.agent]))

    # Readable and safe.
    parsed = _read_model(family, candidate, options, facts)
    found = sidecars.read_scaler(candidate)
    metadata, metadata_sha256 = sidecars.found_metadata(candidate)
    facts["digest"] = _digest(facts["sha256"], "" if found is None else found.sha256, metadata_sha256)

    # Architecture.
    built = _recognise(family, parsed, metadata)
    facts.update(_facts_of(built))
    probe.check_outputs(built.outputs)
    metadata = {**built.facts.get("metadata", {}), **{k: v for k, v in metadata.items() if v is not None}}
    sidecars.check_levels(metadata)

    # Features.
    own = found.content if found is not None and found.own and found.content.width == built.width else None
    names = None if own is None else own.features
    try:
        match = matching.match_features(built, names, metadata, whole=candidate.agent in _SEQUENCE)
    except Refused as refused:
        if found is None or names is not None or not found.own or found.content.width == built.width:
            raise
        beside = f"{found.file.name} beside it is of {found.content.width} features: {refused.refusal.detail}"
        raise Refused(refused.refusal.reason, beside) from refused
    facts.update(features=match.features, feature_set=match.feature_set.name)

    # Scaler, contract.
    scaler, scaler_note = sidecars.fitting_scaler(candidate, found, match, options)
    facts["scaler"] = "none" if scaler is None or found is None else found.file.name
    facts["contract"], contract_note = matching.check_contract(metadata, match.feature_set)

    # Golden vectors, probe.
    levels = sidecars.levels(metadata, candidate.agent, options)
    facts.update(threshold=levels.threshold, residual_std=levels.residual_std, metadata=_kept(metadata))
    level_note = "" if built.outputs == CLASSES else levels.note
    detail = "; ".join(filter(None, (match.note, scaler_note, contract_note, level_note)))
    head = head_for(built.outputs, levels.threshold, levels.residual_std)
    model = _model(candidate, built, match, scaler, head, detail, facts)
    with sidecars.broken_is(Reason.UNKNOWN_ARCHITECTURE, "computing rows with it"):
        probe.check_golden(model, metadata)
        return probe.check_probe(model, built.facts.get("non_finite_weights", ()))


def _read_model(family: Family, candidate: Candidate, options: LoadOptions, facts: dict[str, Any]) -> Any:
    data = read_verified(candidate.file, options.max_bytes)
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    with sidecars.broken_is(Reason.CORRUPT_ARTIFACT, "reading the file"):
        parsed = family.parse(data, candidate.suffix)
        describe = getattr(family, "describe", None)
        facts.update({} if describe is None else describe(parsed))
    return parsed


def _recognise(family: Family, parsed: Any, metadata: Mapping[str, Any]) -> Built:
    with sidecars.broken_is(Reason.UNKNOWN_ARCHITECTURE, "recognising its architecture"):
        return family.build(parsed, metadata)


def _model(
    candidate: Candidate,
    built: Built,
    match: matching.Match,
    scaler: Scaler | None,
    head: Head,
    detail: str,
    facts: Mapping[str, Any],
) -> Model:
    return Model(
        agent=candidate.agent,
        version=candidate.version,
        file=candidate.file,
        sha256=facts["sha256"],
        feature_set=match.feature_set.name,
        features=match.features,
        contract=facts["contract"],
        window=built.window,
        parameters=built.parameters,
        outputs=built.outputs,
        network=built.network,
        head=head,
        scaler=scaler,
        detail=detail,
        architecture=built.architecture,
        facts=dict(facts),
        digest=facts["digest"],
    )


def _digest(*parts: str) -> str:
    """One hash over those of model, scaler and metadata; whichever is absent is empty."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _examine(candidate: Candidate, options: LoadOptions) -> Loading:
    facts: dict[str, Any] = {}
    try:
        model = _load(candidate, options, facts)
    except Refused as refused:
        refusal = replace(refused.refusal, file=candidate.file.name)
        return Loading(candidate.agent, None, refusal, candidate, facts)
    return Loading(candidate.agent, model, None, candidate, facts)


def _sha256(candidate: Candidate, options: LoadOptions) -> str | None:
    try:
        return hashlib.sha256(read_once(candidate.file, options.max_bytes)).hexdigest()
    except Refused:
        return None  # an unreadable file is not the one in use


def _kept(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata without their bulk."""
    return {key: value for key, value in metadata.items() if key not in ("golden", "features", "feature_names")}


def _facts_of(built: Built) -> dict[str, Any]:
    shape = (built.width,) if built.window == 1 else (built.window, built.width)
    found = {
        "architecture": built.architecture,
        "width": built.width,
        "window": built.window,
        "input_shape": shape,
        "outputs": built.outputs,
        "parameters": built.parameters,
        "dimensions": {name: value for name, value in built.facts.items() if name in _DIMENSIONS},
    }
    return found if built.features is None else {**found, "features": built.features}


def _row(loading: Loading, candidate: Candidate, *, selected: bool) -> dict[str, Any]:
    facts, refusal, model = loading.facts, loading.refusal, loading.model
    return {
        "agent": loading.agent,
        "file": str(candidate.file),
        "version": candidate.version,
        "contract": facts.get("contract", ""),
        "state": str(AgentState.REFUSED if model is None else AgentState.ACTIVE),
        "reason": "" if refusal is None else str(refusal.reason),
        "detail": model.detail if model is not None else (refusal.detail if refusal is not None else ""),
        "features": list(facts.get("features") or ()),
        "parameters": facts.get("parameters", 0),
        "input_shape": list(facts.get("input_shape", ())),
        "outputs": facts.get("outputs", 0),
        "sha256": facts.get("sha256", ""),
        "selected": selected,
    }


def _misnamed_row(agent: str, file: Path) -> dict[str, Any]:
    loading = Loading(agent, refusal=Refusal(Reason.NO_ARTIFACT, _misnamed_note([file])))
    return _row(loading, Candidate(agent, file, "", "", 0), selected=False)


def _misnamed_note(files: Sequence[Path]) -> str:
    shown = ", ".join(file.name for file in files[:8])
    return f"never loaded, because the name is not {PATTERN}: {shown}; rename it" if files else ""
