"""The columnar batches that pass between the stages; one row a bar, in the order of the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from streams.messages import AgentState, Bar
from worker.intake import Accepted

STATES = tuple(AgentState)
"""The codes of agent states in arrays are the places in this tuple."""

STATE_CODE = {state: code for code, state in enumerate(STATES)}

State = Mapping[str, Mapping[bytes, bytes]]
"""Stored state: part to its fields."""

Fields = list[tuple[bytes, bytes]]
"""What to store of one part."""


@dataclass(frozen=True)
class Vectors:
    """Feature vectors of N accepted bars. `values` `[N, F]` in the order of `names`, NaN where undefined.

    `ready` maps a feature set to bool `[N]`; `index` `[R]` are the rows that are voted on. `leaves` maps
    a feature set that nothing reads any more to the last row, of the N, on which something did.
    """

    accepted: Accepted
    names: tuple[str, ...]
    values: NDArray[np.float64]
    ready: Mapping[str, NDArray[np.bool_]]
    index: NDArray[np.int64]
    leaves: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def bars(self) -> list[Bar]:
        """The bars that are voted on, `R` of them."""
        return [self.accepted.bars[i] for i in self.index.tolist()]

    @property
    def voted_ids(self) -> list[str]:
        """The IDs of the votes and signals, those of their vectors."""
        return [self.accepted.ids[i] for i in self.index.tolist()]

    def columns(self, names: Sequence[str]) -> NDArray[np.float64]:
        """The values `[N, C]` under these names; NaN where nothing computes them."""
        known = {name: place for place, name in enumerate(self.names)}
        if all(name in known for name in names):
            return self.values[:, [known[name] for name in names]]
        columns = np.full((len(self.values), len(names)), np.nan)
        for place, name in enumerate(names):
            if name in known:
                columns[:, place] = self.values[:, known[name]]
        return columns

    def ready_of(self, feature_set: str) -> NDArray[np.bool_]:
        """Which rows `[N]` have this set; none where nothing computes it."""
        return self.ready.get(feature_set, np.zeros(len(self.values), np.bool_))


@dataclass(frozen=True)
class Ballot:
    """One agent's votes on the R ready rows of a batch.

    `action` codes of `Action`, `confidence` in 0..1, `outputs` `[R, K]` raw (None without a model; a
    row of an abstention without outputs has `answered` False), `state` codes into `STATES`. `present`
    bool `[R]`, None for all: a canary that was rolled back has no vote after that row. `features` are those
    that the model read; none named where there is no model. `versions` `[R]`, None where all are `version`.
    """

    agent: str
    version: str | None
    weight: float
    action: NDArray[np.int8]
    confidence: NDArray[np.float64]
    outputs: NDArray[np.float64] | None
    answered: NDArray[np.bool_]
    state: NDArray[np.int8]
    reason: tuple[str | None, ...]
    present: NDArray[np.bool_] | None = None
    features: tuple[str, ...] = ()
    versions: tuple[str | None, ...] | None = None

    @property
    def rows(self) -> list[int]:
        """The rows, of the R, that carry a vote."""
        return list(range(len(self.action))) if self.present is None else np.flatnonzero(self.present).tolist()


@dataclass(frozen=True)
class Signals:
    """The decisions on R rows; `effective` `[R, A]` are the weights that counted, by ballot."""

    action: NDArray[np.int8]
    confidence: NDArray[np.float64]
    agreement: NDArray[np.float64]
    loaded: NDArray[np.int64]
    eligible: NDArray[np.int64]
    voting: NDArray[np.int64]
    agreeing: NDArray[np.int64]
    status: tuple[str, ...]
    effective: NDArray[np.float64]
    configured: int
    quorum: int
