"""The columnar batches that pass between the stages; one row a bar, in the order of the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streams.messages import AgentState
from worker.intake import Accepted

STATES = tuple(AgentState)
"""The codes of agent states in arrays are the places in this tuple."""

STATE_CODE = {state: code for code, state in enumerate(STATES)}


@dataclass(frozen=True)
class Vectors:
    """Feature vectors of N accepted bars. `values` `[N, F]` in the order of `names`, NaN where undefined.

    `ready` maps a feature set to bool `[N]`; `index` `[R]` are the rows that are voted on.
    """

    accepted: Accepted
    names: tuple[str, ...]
    values: NDArray[np.float64]
    ready: Mapping[str, NDArray[np.bool_]]
    index: NDArray[np.int64]


@dataclass(frozen=True)
class Ballot:
    """One agent's votes on the R ready rows of a batch.

    `action` codes of `Action`, `confidence` in 0..1, `outputs` `[R, K]` raw (None without a model; a
    row of an abstention without outputs has `answered` False), `state` codes into `STATES`.
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
