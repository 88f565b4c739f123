"""What decides the last bit of a result: the build it was computed with, and the settings that matter."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from agents.artifacts import Loading
from streams.contracts import FEATURE_SETS
from streams.messages import Event
from streams.store import Position
from worker.settings import Settings

_LIBRARIES = ("quartet-worker", "numpy", "numba", "torch", "xgboost", "xgboost-cpu", "lightgbm")
_WITHOUT_EFFECT = (
    *("redis", "namespace", "models", "state_dir", "http_host", "http_port", "log_level"),
    *("batch_size", "lease_s", "retain", "watch_s"),
)
"""Settings that change neither a value nor a decision; every other one does, or may."""


def build(*, models: bool = True) -> dict[str, str]:
    """Versions and processor: two equal builds compute the same bits.

    Without `models` what only they depend on is left out: it takes seconds and much memory to import.
    """
    import llvmlite.binding as llvm  # noqa: PLC0415  comes with numba

    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["cpu"] = llvm.get_host_cpu_name()
    if models:
        import torch  # noqa: PLC0415

        found["torch_cpu"] = torch.backends.cpu.get_cpu_capability()
    return found


def deciding(settings: Settings) -> dict[str, Any]:
    """The settings that change values or decisions, as plain values; `bars` are the keys that are read."""
    kept = {name: value for name, value in settings.describe().items() if name not in _WITHOUT_EFFECT}
    return kept | {"bars": list(settings.input_keys)}


def started(settings: Settings, loadings: Sequence[Loading], position: Position, **stage: Any) -> Event:
    """The event of a start: everything that a replay needs besides the bars, and where it took effect.

    `stage` is what a process says of itself that runs one stage only: its name, and which feature sets it computes.
    """
    program = build(models=bool(loadings))
    evidence = {
        "settings": deciding(settings),
        "build": program,
        "contracts": {name: s.contract for name, s in FEATURE_SETS.items()},
        "agents": {
            x.agent: {"version": x.model.version, "sha256": x.model.sha256, "digest": x.model.digest}
            if x.model
            else {"refused": str(x.refusal.reason) if x.refusal else ""}
            for x in loadings
        },
        **stage,
    }
    detail = f"quartet {program.get('quartet-worker', 'not installed')}"
    return placed(Event("started", detail=detail, evidence=evidence), position)


def placed(event: Event, position: Position) -> Event:
    """The event with where it took effect: behind these entries, and before the next."""
    place = {key: at.id for key, at in position.inputs.items()}
    return replace(event, evidence={**event.evidence, "position": place})
