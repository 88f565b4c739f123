"""What travels: bars, feature vectors, votes, signals, rejects and events. All immutable.

Inside the process a batch is columnar; these types are the rows of it at the edges. Times are
integers in milliseconds since the epoch, UTC; `ts` is always the bar's OPEN time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any


class Action(IntEnum):
    """What a vote or a signal says. The codes of the first three are the order of 3-class logits."""

    SELL = 0
    HOLD = 1
    BUY = 2
    ABSTAIN = 3


class Status(StrEnum):
    """Why a signal is what it is, in order of precedence: the first that applies."""

    WITHHELD = "withheld"
    STALE = "stale"
    BELOW_QUORUM = "below_quorum"
    NO_AGREEMENT = "no_agreement"
    HOLD = "hold"
    OK = "ok"


class AgentState(StrEnum):
    """Where an agent is. Only `active` and `canary` votes have weight."""

    LOADING = "loading"
    WARMING_UP = "warming_up"
    ACTIVE = "active"
    CANARY = "canary"
    SHADOW = "shadow"
    MUTED = "muted"
    REFUSED = "refused"


class Reason(StrEnum):
    """Why an agent is refused, muted or abstains."""

    NO_ARTIFACT = "no_artifact"
    FEATURE_MISMATCH = "feature_mismatch"
    CONTRACT_MISMATCH = "contract_mismatch"
    SCALER_MISSING = "scaler_missing"
    SCALER_MISMATCH = "scaler_mismatch"
    UNKNOWN_ARCHITECTURE = "unknown_architecture"
    STATE_DICT_MISMATCH = "state_dict_mismatch"
    UNSAFE_ARTIFACT = "unsafe_artifact"
    CORRUPT_ARTIFACT = "corrupt_artifact"
    GOLDEN_MISMATCH = "golden_mismatch"
    NON_FINITE_OUTPUT = "non_finite_output"
    CONSTANT_OUTPUT = "constant_output"
    ACTION_COLLAPSE = "action_collapse"
    DEAD_ZONE = "dead_zone"
    FLAT_CONFIDENCE = "flat_confidence"
    NARROW_RANGE = "narrow_range"
    ERROR_RATE = "error_rate"
    DEADLINE_MISSED = "deadline_missed"
    STALE = "stale"
    INSUFFICIENT_HISTORY = "insufficient_history"
    OPERATOR = "operator"


AGENTS = ("xgboost", "lightgbm", "nhits", "patchtst")
"""Every agent this program knows, in the order in which they are shown and summed."""


CANARY = "_canary"
"""What an agent's name ends with while it is a version beside the running one."""

HORIZON = 12
"""Bars ahead that the models expect the return of, and after which a vote is scored."""


def bar_id(symbol: str, interval: str, ts: int) -> str:
    """The same on Redis, on Kafka and in replay; readers remove duplicates by it."""
    return f"{symbol}|{interval}|{ts}"


@dataclass(frozen=True, slots=True)
class Bar:
    """One closed bar. `ts` is its open time in ms; prices are > 0, volume >= 0."""

    symbol: str
    ts: int
    interval: str
    open: float
    high: float
    low: float
    close: float
    volume: float
    bar_id: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bar_id", bar_id(self.symbol, self.interval, self.ts))

    @property
    def ohlcv(self) -> tuple[float, float, float, float, float]:
        return self.open, self.high, self.low, self.close, self.volume


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as it was read from an input stream. `fields` hold the bytes as they came.

    `arrived_ms` is when the entry arrived where its ID does not say so.
    """

    key: str
    id: str
    fields: Mapping[bytes, bytes]
    arrived_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """An entry that was refused: `reason` from a closed set, `detail` for a person."""

    entry: Entry
    reason: str
    detail: str
    stage: str


@dataclass(frozen=True, slots=True)
class Event:
    """Something an operator wants to know. Absent parts are empty, never left out."""

    kind: str
    ts: int = 0
    bar_id: str = ""
    agent: str = ""
    symbol: str = ""
    interval: str = ""
    reason: str = ""
    detail: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
