"""The artifacts of a recording's votes, found in a folder by their bytes; those that are not there are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from agents.agent import Refusal
from agents.artifacts import Loading, LoadOptions, discover, load_exact, load_file
from streams.messages import Reason
from worker.roster import Artifact


class Shelf:
    """Loads each artifact once. `missing` says why of each (agent, version) that is not at hand."""

    def __init__(self, models: Path, options: LoadOptions) -> None:
        self.missing: dict[tuple[str, str], str] = {}
        self._models = models
        self._options = options
        self._held: dict[tuple[str, Artifact], Loading] = {}

    def find(self, agent: str, wanted: Artifact) -> Loading:
        """The artifact of these bytes, as far as the recording names them, or of this version alone.

        It comes without a model where it is not at hand or is refused, which is noted.
        """
        if (agent, wanted) not in self._held:
            loading = self._load(agent, wanted)
            self._held[agent, wanted] = loading
            if loading.model is None:
                self.missing[agent, wanted.version] = loading.refusal.detail if loading.refusal else "refused"
        return self._held[agent, wanted]

    def _load(self, agent: str, wanted: Artifact) -> Loading:
        if wanted.sha256:
            loading = load_exact(
                self._models, agent, wanted.file or "-", wanted.sha256, self._options, digest=wanted.digest
            )
            if loading.model is not None or loading.candidate is not None:
                return self._as(loading, wanted.version)
        else:
            for candidate in discover(self._models, agent):
                if candidate.version == wanted.version:
                    return load_file(candidate.file, agent, self._options)
        what = f"version {wanted.version} of {agent}"
        what += f" with sha256 {wanted.sha256[:12]}" if wanted.sha256 else ""
        detail = f"{what} is not in {self._models}: put it there, or name another folder with --models"
        return Loading(agent, refusal=Refusal(Reason.NO_ARTIFACT, detail))

    @staticmethod
    def _as(loading: Loading, version: str) -> Loading:
        """The same bytes may lie there under another name: the votes carry the version of then."""
        if loading.model is None or loading.model.version == version:
            return loading
        return replace(loading, model=replace(loading.model, version=version))
