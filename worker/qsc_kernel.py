"""The compiled part of the safeguard: one agent's window, counted and judged attempt by attempt.

Everything is exact: shares are integer counts, quantiles are read from the confidences kept in order,
the deviation takes two passes over them. No cost depends on anything but the window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker.features.kernel import compiled

CRITERIA = 9
"""Figures and limits of an agent stand in the order of `worker.quality.CRITERIA`."""
FIGURES = CRITERIA + 1
"""After them the share of attempts that gave no finite output: a second figure and limit of that criterion."""
NON_FINITE, NON_FINITE_SHARE = 5, CRITERIA
KINDS = 7
"""What an attempt came to: SELL, HOLD, BUY, then one of the failures behind an abstention."""
OUTPUTS = 12
CHUNK = 25
"""Attempts that are stored in one blob: few blobs after a large batch, small ones after a single bar."""
READMISSIONS = 3
CONSTANT = 1e-9
DAY_MS = 86_400_000

# Places in the integers of an agent's state.
HELD = 0
COUNTS = 1
NON_FINITE_RUN = COUNTS + KINDS
CONSTANT_RUN = NON_FINITE_RUN + 1
FINGERPRINT = CONSTANT_RUN + 1
STATUS = FINGERPRINT + 1
REASON = STATUS + 1
FRESH = REASON + 1
LOCKED = FRESH + 1
READMITTED = LOCKED + 1
INTEGERS = READMITTED + READMISSIONS

CLEAR, MUTED, OPERATOR = 0, 1, 2
"""Values of `STATUS`: not muted, muted by a criterion, muted by an operator."""
MUTE, READMIT, LOCK = 1, 2, 3
"""Transitions: muted now, re-admitted now, would be re-admitted but only an operator may now."""


@compiled
def _insert(ordered: NDArray[np.float64], n: int, value: float) -> None:
    """Insert into the first `n`, which ascend."""
    place = n
    while place > 0 and ordered[place - 1] > value:
        ordered[place] = ordered[place - 1]
        place -= 1
    ordered[place] = value


@compiled
def _remove(ordered: NDArray[np.float64], n: int, value: float) -> None:
    """Remove one `value` from the first `n`, which ascend."""
    for i in range(np.searchsorted(ordered[:n], value), n - 1):
        ordered[i] = ordered[i + 1]


@compiled
def _quantile(ordered: NDArray[np.float64], n: int, q: float) -> float:
    """Linear between the two nearest of the first `n`, as numpy's default."""
    at = q * (n - 1)
    low = int(at)
    high = min(low + 1, n - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (at - low))


@compiled
def _deviation(values: NDArray[np.float64], n: int) -> float:
    """Standard deviation of the first `n`, with n - 1 in the denominator; 0 of a single one."""
    mean = 0.0
    for i in range(n):
        mean += values[i]
    mean /= n
    total = 0.0
    for i in range(n):
        total += (values[i] - mean) ** 2
    return float(np.sqrt(total / (n - 1))) if n > 1 else 0.0


@compiled
def votes_in(ints: NDArray[np.int64]) -> int:
    return int(ints[COUNTS] + ints[COUNTS + 1] + ints[COUNTS + 2])


@compiled
def measure(ints: NDArray[np.int64], ordered: NDArray[np.float64], figures: NDArray[np.float64]) -> None:
    """The figure of each criterion, and the share of non-finite outputs `[10]`; NaN where there is nothing to take."""
    votes, held = votes_in(ints), ints[HELD]
    figures[:] = np.nan
    if votes > 0:
        figures[0] = max(ints[COUNTS], ints[COUNTS + 2]) / votes
        figures[1] = ints[COUNTS + 1] / votes
        figures[2] = _deviation(ordered, votes)
        figures[3] = _quantile(ordered, votes, 0.9) - _quantile(ordered, votes, 0.1)
        figures[4] = ints[CONSTANT_RUN]
    if held > 0:
        figures[5] = ints[NON_FINITE_RUN]
        for failure in range(3):
            figures[6 + failure] = ints[COUNTS + 4 + failure] / held
        figures[NON_FINITE_SHARE] = ints[COUNTS + 3] / held


@compiled
def violations(ints: NDArray[np.int64], figures: NDArray[np.float64], limits: NDArray[np.float64], minimum: int) -> int:
    """Which criteria are violated, as bits in their order."""
    found = 0
    if votes_in(ints) >= minimum:
        if figures[0] > limits[0]:
            found |= 1 << 0
        if figures[1] > limits[1]:
            found |= 1 << 1
        if figures[2] < limits[2]:
            found |= 1 << 2
        if figures[3] < limits[3]:
            found |= 1 << 3
        if figures[4] >= limits[4]:
            found |= 1 << 4
    if figures[5] >= limits[5]:
        found |= 1 << 5
    if ints[HELD] >= minimum:
        for place in range(6, CRITERIA):
            if figures[place] > limits[place]:
                found |= 1 << place
        if figures[NON_FINITE_SHARE] > limits[NON_FINITE_SHARE]:
            found |= 1 << NON_FINITE
    return found


@compiled
def clear(ints: NDArray[np.int64]) -> None:
    """Start with an empty window; what was decided stays."""
    ints[: CONSTANT_RUN + 1] = 0
    ints[FRESH] = 0


@compiled
def _count_constant(
    ints: NDArray[np.int64], first: NDArray[np.float64], outputs: NDArray[np.float64], changed: bool
) -> None:
    """How many votes in a row, each on other inputs than the one before, had the outputs of their first."""
    same = ints[CONSTANT_RUN] > 0
    for k in range(outputs.size):
        if abs(outputs[k] - first[k]) > CONSTANT:
            same = False
    if not same:
        ints[CONSTANT_RUN] = 1
        first[: outputs.size] = outputs
    elif changed:
        ints[CONSTANT_RUN] += 1


@compiled
def _drop_oldest(ints: NDArray[np.int64], ordered: NDArray[np.float64], kind: int, confidence: float) -> None:
    if kind < 3:
        _remove(ordered, votes_in(ints), confidence)
    ints[COUNTS + kind] -= 1
    ints[HELD] -= 1


@compiled
def watch(
    kinds: NDArray[np.int64],
    confidence: NDArray[np.float64],
    outputs: NDArray[np.float64],
    fingerprints: NDArray[np.int64],
    ts: NDArray[np.int64],
    limits: NDArray[np.float64],
    minimum: int,
    window: int,
    attempts: NDArray[np.int64],
    ring_kinds: NDArray[np.int8],
    ring_confidence: NDArray[np.float64],
    ordered: NDArray[np.float64],
    ints: NDArray[np.int64],
    first: NDArray[np.float64],
    verdicts: NDArray[np.int64],
    figures: NDArray[np.float64],
) -> None:
    """One agent's attempts in order; a kind of -1 is no attempt.

    The rings are `[chunks, CHUNK]`; they and the rest of the state, from `attempts` to `first`, are
    changed. `verdicts` `[N, 5]` are filled with status, reason, transition, violations and votes in the
    window, `figures` `[N, 10]` where there was an attempt.
    """
    size = ring_kinds.size
    for i in range(kinds.size):
        transition = found = 0
        if kinds[i] >= 0:
            chunk, place = divmod(attempts[0] % size, CHUNK)
            if ints[HELD] == window:
                oldest, at = divmod((attempts[0] - window) % size, CHUNK)
                _drop_oldest(ints, ordered, ring_kinds[oldest, at], ring_confidence[oldest, at])
            if place == 0:
                ring_kinds[chunk] = 0
                ring_confidence[chunk] = 0.0
            ring_kinds[chunk, place] = kinds[i]
            ring_confidence[chunk, place] = confidence[i]
            attempts[0] += 1
            if kinds[i] < 3:
                _insert(ordered, votes_in(ints), confidence[i])
                _count_constant(ints, first, outputs[i], fingerprints[i] != ints[FINGERPRINT])
            ints[COUNTS + kinds[i]] += 1
            ints[HELD] += 1
            ints[NON_FINITE_RUN] = ints[NON_FINITE_RUN] + 1 if kinds[i] == 3 else 0
            ints[FINGERPRINT] = fingerprints[i]
            measure(ints, ordered, figures[i])
            found = violations(ints, figures[i], limits, minimum)
            # Runs leave no trace in the window: each starts the fresh window over.
            in_run = found & (1 << 4) != 0 or ints[NON_FINITE_RUN] >= limits[NON_FINITE]
            ints[FRESH] = 0 if in_run else ints[FRESH] + 1
            transition = _decide(ints, found, ts[i], minimum, window)
        verdicts[i, 0] = ints[STATUS]
        verdicts[i, 1] = ints[REASON]
        verdicts[i, 2] = transition
        verdicts[i, 3] = found
        verdicts[i, 4] = votes_in(ints)


@compiled
def _decide(ints: NDArray[np.int64], found: int, ts: int, minimum: int, window: int) -> int:
    """Mute, re-admit or leave things as they are. Under the minimum of votes nothing shows that it mended."""
    if ints[STATUS] == CLEAR and found:
        ints[STATUS] = MUTED
        ints[FRESH] = 0
        reason = 0
        while not found & (1 << reason):
            reason += 1
        ints[REASON] = reason
        return MUTE
    fresh = ints[FRESH] >= window and votes_in(ints) >= minimum
    if ints[STATUS] == MUTED and fresh and not found and not ints[LOCKED]:
        return _readmit(ints, ts)
    return 0


@compiled
def _readmit(ints: NDArray[np.int64], ts: int) -> int:
    """Re-admit, unless that happened three times within the last day of the bars' clock."""
    oldest = READMITTED
    for place in range(READMITTED, INTEGERS):
        if ints[place] < ints[oldest]:
            oldest = place
    if ints[oldest] != 0 and ts - ints[oldest] < DAY_MS:
        ints[LOCKED] = 1
        return LOCK
    ints[oldest] = ts
    ints[STATUS] = CLEAR
    return READMIT
