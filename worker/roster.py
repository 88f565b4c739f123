"""What serves, as part of the commit: each agent's artifact, the one before it, and the trial beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.agent import Model
from agents.discovery import candidate_of, ranks_above
from streams.codec import StateCorruptError, seal, unseal
from streams.messages import AGENTS, AgentState


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model file: where it was found, the version in its name, its hash, and the digest that decides.

    The digest is over the model, its scaler and its metadata; state written before there was one has none.
    """

    file: str
    version: str
    sha256: str
    digest: str = ""

    @classmethod
    def of(cls, model: Model) -> Artifact:
        return cls(str(model.file), model.version, model.sha256, model.digest)

    def is_same(self, other: Artifact | None) -> bool:
        """Whether both are one, wherever they lie, with the same scaler and metadata."""
        return other is not None and self.is_file(other) and self.is_beside(other)

    def is_file(self, other: Artifact) -> bool:
        """Whether the version and the model file are one, whatever lies beside it."""
        return (self.version, self.sha256) == (other.version, other.sha256)

    def is_beside(self, other: Artifact) -> bool:
        """Whether model, scaler and metadata are the same bytes, as far as both digests are known."""
        return not self.digest or not other.digest or self.digest == other.digest

    def change(self, before: Artifact | None) -> str:
        """In words, how this one differs from what served before."""
        if self.is_same(before):
            return "the same artifact, read again"
        if before is not None and self.is_file(before):
            return f"{self.version} serves with another scaler or other metadata than before"
        if before is not None and self._is_older(before):
            gone = f"older than {before.version}, which served: that file is not in {Path(self.file).parent} any more"
            return f"{self.version} serves, {gone}"
        return f"{self.version} serves"

    def _is_older(self, before: Artifact) -> bool:
        """Whether this one would not be selected where the one before it is at hand."""
        files = Path(self.file), Path(before.file)
        pairs = [(candidate_of(files[0], agent), candidate_of(files[1], agent)) for agent in AGENTS]
        return any(now and then and ranks_above(then, now) for now, then in pairs)

    def evidence(self) -> dict[str, str]:
        told = {"version": self.version, "sha256": self.sha256, "file": self.file}
        return {**told, "digest": self.digest} if self.digest else told


@dataclass(frozen=True, slots=True)
class Trial:
    """A version beside the running one. `kind` is `canary` or `shadow`.

    `since` is the bar time of its first vote, None before it; `passed` once its period is over;
    `active` once any series had its full window.
    """

    kind: AgentState
    artifact: Artifact
    since: int | None = None
    passed: bool = False
    active: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """One agent. `pinned`: no newer file of the folder replaces it until an operator reloads the agent."""

    artifact: Artifact | None = None
    active: bool = False
    pinned: bool = False
    before: Artifact | None = None
    trial: Trial | None = None

    def pack(self) -> bytes:
        trial = self.trial
        kept = trial and [str(trial.kind), _plain(trial.artifact), trial.since, trial.passed, trial.active]
        return seal([_plain(self.artifact), self.active, self.pinned, _plain(self.before), kept])

    @classmethod
    def unpack(cls, name: str, data: bytes) -> Record:
        """Raises `StateCorruptError` where the bytes are not what `pack` wrote."""
        try:
            artifact, active, pinned, before, kept = unseal(name, data)
            trial = kept and Trial(AgentState(kept[0]), Artifact(*kept[1]), *kept[2:])
            return cls(artifact and Artifact(*artifact), active, pinned, before and Artifact(*before), trial)
        except (TypeError, ValueError) as error:
            raise StateCorruptError(name, f"its layout is not this program's ({error})") from error


def _plain(artifact: Artifact | None) -> list[Any] | None:
    return None if artifact is None else [artifact.file, artifact.version, artifact.sha256, artifact.digest]


def records_of(fields: Mapping[bytes, bytes]) -> dict[str, Record]:
    """Each agent's record in the part `agents` of stored state. Raises `StateCorruptError`."""
    return {name.decode(): Record.unpack(name.decode(), data) for name, data in fields.items()}
