"""The feature stage: entries of the input become accepted bars, and these become feature vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray

from streams.codec import StateCorruptError
from streams.contracts import FEATURE_SETS, V3, FeatureSet
from streams.formats import FormatReader
from streams.messages import Entry
from streams.validation import Limits
from worker.batches import Fields, State, Vectors
from worker.features.bank import FeatureBank
from worker.intake import Intake
from worker.voting import Stopwatch

PARTS = ("series", "features")


class FeatureStage:
    """Intake and indicators. `always` are the feature sets that are computed whether or not an agent reads them.

    `fixed` computes these and no others, whatever the agents read.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        always: Sequence[str] = (),
        fixed: bool = False,
        warmup_bars: Mapping[str, int] | None = None,
        reader: FormatReader | None = None,
        several_keys: bool = False,
    ) -> None:
        self.intake = Intake(limits or Limits(), reader=reader, several_keys=several_keys)
        self._always = (V3, *(FEATURE_SETS[name] for name in always))
        self._fixed = fixed
        self._bank = FeatureBank(self._in_use(()), warmup_bars)

    @property
    def sets(self) -> tuple[FeatureSet, ...]:
        """The feature sets that are computed."""
        return self._bank.sets

    def read_by(self, sets: Iterable[FeatureSet]) -> None:
        """The sets that the agents read from now on; what they no longer read is computed no more."""
        self._bank.set_sets(self._in_use(sets))

    def _in_use(self, sets: Iterable[FeatureSet]) -> tuple[FeatureSet, ...]:
        return tuple(dict.fromkeys(self._always if self._fixed else (*self._always, *sets)))

    def is_warm(self, name: str) -> bool:
        """Whether a feature set is ready for any series."""
        return any(s.name == name for s in self.sets) and self._bank.is_warm(name)

    def process(
        self,
        entries: Sequence[Entry],
        now_ms: int,
        *,
        poison: frozenset[tuple[str, str]] = frozenset(),
        stopwatch: Stopwatch = nullcontext,
    ) -> Vectors:
        """One batch of input entries. `now_ms` judges lateness and bars from the future, never values."""
        with stopwatch("intake"):
            accepted = self.intake.accept(entries, now_ms, poison)
        with stopwatch("features"):
            values, ready = self._bank.update(accepted.rows, accepted.ohlcv, accepted.restart)
            by_set = {s.name: ready[:, place] for place, s in enumerate(self.sets)}
            return Vectors(accepted, self._bank.names, values, by_set, np.flatnonzero(by_set[V3.name]))

    def changes(self, rows: NDArray[np.int64]) -> dict[str, Fields]:
        """The state fields to store, by part, after a batch of these series."""
        return {"series": self.intake.changes(), "features": self._bank.changes(rows)}

    def restore(self, state: State) -> None:
        """Take up committed state. Raises `StateCorruptError` where its parts know of different series."""
        check_series(state, ("features",))
        self.intake.restore(state.get("series", {}))
        self._bank.restore(state.get("features", {}))


def check_series(state: State, equal: Sequence[str], within: Sequence[str] = ()) -> None:
    """Raise `StateCorruptError` where a part knows of a series that the part `series` does not.

    Those of `equal` hold every series; those `within` may have begun later.
    """
    series = {name for name in state.get("series", {}) if name.isdigit()}
    for part in (*equal, *within):
        held = {name for name in state.get(part, {}) if b":" not in name}
        if held - series or (part in equal and held != series):
            alone = b", ".join(sorted(held ^ series)[:3]).decode()
            problem = f"it holds {len(held)} series, the part 'series' {len(series)}; only one of them has {alone}"
            raise StateCorruptError(part, problem)
