"""What `quartet demo --sabotage` breaks: one artifact that must be refused, one model that collapses in mid-run.

Everything happens to copies in a folder of the demonstration's own, and in ways that are seen in
practice: metadata that name other indicators than the network was trained on, and a retraining
whose labels lost their sign.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson

from agents.discovery import Candidate, discover
from streams.contracts import V3
from streams.messages import AGENTS
from worker.demo.children import child
from worker.demo.scene import Scene
from worker.errors import CheckFailed, UsageError
from worker.quality import QualityLimits

REFUSED, COLLAPSING = "patchtst", "xgboost"
FOREIGN = {"rsi_14": "rsi_21", "ema_50": "ema_100", "volatility_20": "volatility_60"}
"""Windows that no feature set here has."""
GENERATION = 3
_STAGE = ".retrained"
_SIDECARS = ("_meta.json", "_metadata.json", "_scaler.json", "_scaler.pkl")
_METADATA = _SIDECARS[:2]


@dataclass(frozen=True)
class Sabotage:
    """What was prepared: the folder that the worker serves, and the files that do the harm."""

    folder: Path
    refused: str
    collapsing: str

    @property
    def in_words(self) -> list[str]:
        """What is wrong with each file."""
        names = ", ".join(FOREIGN.values())
        return [
            f"{REFUSED}: {self.refused} is newest, and its metadata name {names}: other windows than any here",
            f"{COLLAPSING}: {self.collapsing} learnt the size of each return without its sign, and comes in mid-run",
        ]

    def drop(self) -> None:
        """Put the retrained model where the running worker looks for new ones, the model file last."""
        for file in sorted((self.folder / _STAGE).iterdir(), key=lambda one: one.name == self.collapsing):
            file.replace(self.folder / file.name)


def check(scene: Scene) -> None:
    """Raises `UsageError` where too few bars come after the swap for the safeguard to judge."""
    minimum, after = QualityLimits().minimum, scene.symbols * (scene.bars - scene.half)
    if after < minimum + scene.symbols:
        needed = 2 * -(-(minimum + scene.symbols) // scene.symbols)
        raise UsageError(
            f"--sabotage with {scene.symbols} symbols and {scene.bars} bars: {after} votes follow the swap in mid-run, "
            f"and the safeguard judges from {minimum} on; give at least --bars {needed}"
        )


def prepare(scene: Scene) -> Sabotage:
    """Copy the newest artifact of each agent, break one copy, and train the one that comes later."""
    shutil.rmtree(scene.served, ignore_errors=True)
    (scene.served / _STAGE).mkdir(parents=True)
    for agent in AGENTS:
        best = _best(scene.models, agent)
        for file in (best.file, *_sidecars(best)):
            shutil.copyfile(file, scene.served / file.name)
    return Sabotage(scene.served, _break(scene.served), _retrain(scene))


def _best(models: Path, agent: str) -> Candidate:
    found = discover(models, agent)
    if not found:
        raise CheckFailed(f"{agent} has no artifact in {models} that could be copied: run `quartet demo` once without")
    return found[0]


def _sidecars(candidate: Candidate) -> list[Path]:
    return [file for ending in _SIDECARS if (file := candidate.beside(ending)).exists()]


def _break(folder: Path) -> str:
    """A newer copy whose metadata name indicators that no feature set here has; its file name."""
    good = _best(folder, REFUSED)
    stem = newer_stem(good)
    for file in (good.file, *_sidecars(good)):
        shutil.copyfile(file, folder / (stem + file.name.removeprefix(good.file.stem)))
    sidecar = next((stem + ending for ending in _METADATA if (folder / (stem + ending)).exists()), stem + _METADATA[0])
    metadata = _read(folder / sidecar)
    metadata |= {"feature_set": V3.name, "features": [FOREIGN.get(name, name) for name in V3.features]}
    metadata.pop("feature_names", None)
    (folder / sidecar).write_bytes(orjson.dumps(metadata))
    return stem + good.suffix


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(file.read_bytes()) if file.exists() else {}
    return found


def newer_stem(candidate: Candidate) -> str:
    """The stem of an artifact that is selected before `candidate`, and by its name was made just now."""
    made = datetime.strptime(candidate.time, "%Y%m%d_%H%M%S").replace(tzinfo=UTC) + timedelta(seconds=1)
    stamp = max(made, datetime.now(UTC))
    return f"{candidate.agent}_v{stamp:%Y%m%d_%H%M%S}_v{max(GENERATION, candidate.generation)}"


def _retrain(scene: Scene) -> str:
    """Train the model that will collapse, in a process of its own; its file name."""
    stem = newer_stem(_best(scene.served, COLLAPSING))
    arguments = ["worker.demo.retrain", str(scene.served / _STAGE), stem, str(scene.seed)]
    with child("retraining", arguments, scene.directory / "retraining.log") as trainer:
        trainer.process.wait()
        trainer.check(may_end=True)
    return _best(scene.served / _STAGE, COLLAPSING).file.name
