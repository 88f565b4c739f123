"""The artifacts of a recording's votes, found in a folder by version and hash; those that are not there are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from agents.agent import Refusal
from agents.artifacts import Loading, LoadOptions, discover, load_exact, load_file
from streams.messages import Reason

Named = tuple[str, str]
"""An agent and a version."""


class Shelf:
    """Loads each artifact once. `hashes` are the SHA-256 and file of those that the recording names by hash."""

    def __init__(self, models: Path, options: LoadOptions, hashes: Mapping[Named, tuple[str, str]]) -> None:
        self.missing: dict[Named, str] = {}
        self._models = models
        self._options = options
        self._hashes = hashes
        self._held: dict[Named, Loading] = {}

    def find(self, agent: str, version: str) -> Loading:
        """The artifact of that version; without a model where it is not at hand or is refused, which is noted."""
        named = agent, version
        if named not in self._held:
            loading = self._load(agent, version)
            self._held[named] = loading
            if loading.model is None:
                self.missing[named] = loading.refusal.detail if loading.refusal else "refused"
        return self._held[named]

    def _load(self, agent: str, version: str) -> Loading:
        sha256, file = self._hashes.get((agent, version), ("", ""))
        if sha256:
            loading = load_exact(self._models, agent, file or "-", sha256, self._options)
            if loading.model is not None or loading.candidate is not None:
                return self._as(loading, version)
        else:
            for candidate in discover(self._models, agent):
                if candidate.version == version:
                    return load_file(candidate.file, agent, self._options)
        what = f"version {version} of {agent}" + (f" with sha256 {sha256[:12]}" if sha256 else "")
        detail = f"{what} is not in {self._models}: put it there, or name another folder with --models"
        return Loading(agent, refusal=Refusal(Reason.NO_ARTIFACT, detail))

    @staticmethod
    def _as(loading: Loading, version: str) -> Loading:
        """The same bytes may lie there under another name: the votes carry the version of then."""
        if loading.model is None or loading.model.version == version:
            return loading
        return replace(loading, model=replace(loading.model, version=version))
