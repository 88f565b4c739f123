"""Which keys are read: those named, and those that match a pattern, looked up again while running."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from streams.keys import Keys

REFRESH_S = 3.0
"""A new key is read from this long after it appeared, at most. The look-up walks the whole key space."""

_GLOB = frozenset("*?[")

Find = Callable[[str], Mapping[str, str]]
"""Gives the keys that match a glob, each with its type as the server names it."""


def is_pattern(name: str) -> bool:
    """Whether `name` stands for several keys, as `candles-BINANCE-*` does."""
    return bool(_GLOB & set(name))


@dataclass(frozen=True, slots=True)
class Change:
    """What a look-up found: streams that are read from now on, and matching keys that are none."""

    new: tuple[str, ...]
    skipped: Mapping[str, str]


class Inputs:
    """The input keys of one worker. Keys of our own namespace are read only where they are named."""

    def __init__(self, names: Sequence[str], namespace: str) -> None:
        self.named = tuple(dict.fromkeys(name for name in names if not is_pattern(name)))
        self.patterns = tuple(name for name in names if is_pattern(name))
        self.keys = self.named
        self._own = Keys(namespace)
        self._skipped: set[str] = set()

    @property
    def several(self) -> bool:
        """Whether more than one key is read, now or later."""
        return bool(self.patterns) or len(self.named) > 1

    def label(self, key: str) -> str:
        """What a metric calls `key`: itself where it is named, else its pattern, so that labels stay few.

        A key of our own namespace is called by what follows it: `bars`.
        """
        name = key if key in self.named else next((p for p in self.patterns if fnmatchcase(key, p)), key)
        return name.removeprefix(f"{self._own.namespace}:")

    def refresh(self, find: Find) -> Change:
        """Look the patterns up; a key that was read once stays, also while it is gone."""
        found = {key: kind for pattern in self.patterns for key, kind in find(pattern).items()}
        streams = sorted(key for key, kind in found.items() if kind == "stream" and self._is_input(key))
        new = tuple(key for key in streams if key not in self.keys)
        self.keys = (*self.keys, *new)
        others = {k: kind for k, kind in found.items() if kind != "stream" and k not in self._skipped}
        self._skipped |= others.keys()
        return Change(new, others)

    def _is_input(self, key: str) -> bool:
        return key == self._own.bars or not key.startswith(f"{self._own.namespace}:")
