"""The last stage: the votes on a bar become one signal. Whatever is not `ok` is a HOLD.

A pure function of the ballots, row by row: the definitions of the counts, the weights and the order
of the statuses are those of the contract.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streams.messages import CANARY, Action, AgentState, Status
from worker.batches import STATE_CODE, Ballot, Signals

TIE = 1e-12
CANARY_SHARE = 0.10
"""The share of the weight that a canary takes unless set, the others sharing the rest in proportion."""

_UNLOADED = (STATE_CODE[AgentState.LOADING], STATE_CODE[AgentState.REFUSED])
_ACTIVE = STATE_CODE[AgentState.ACTIVE]
_CANARY = STATE_CODE[AgentState.CANARY]
_STATUSES = tuple(
    str(s) for s in (Status.WITHHELD, Status.STALE, Status.BELOW_QUORUM, Status.NO_AGREEMENT, Status.HOLD, Status.OK)
)
_OK = len(_STATUSES) - 1
_SPEAKS = _STATUSES.index(Status.NO_AGREEMENT)
"""From this status on a signal has a confidence."""
_ACTIONS = (Action.SELL, Action.HOLD, Action.BUY)


def decide(
    ballots: Sequence[Ballot],
    *,
    configured: int,
    quorum: int,
    withheld: NDArray[np.bool_],
    stale: NDArray[np.bool_],
    canary_share: float = CANARY_SHARE,
) -> Signals:
    """One signal for each of R rows, from the ballots of all agents in their fixed order.

    `configured` is the number of agents in the settings; canaries and shadows come as further
    ballots, which abstain on rows without a vote of theirs; a canary weighs `canary_share`.
    `withheld` and `stale` `[R]` say on which rows the feed or the bar forbids a signal.
    """
    action = np.stack([b.action for b in ballots], axis=1)
    confidence = np.stack([b.confidence for b in ballots], axis=1)
    state = np.stack([b.state for b in ballots], axis=1)
    named = action != Action.ABSTAIN
    counts = np.array([not b.agent.endswith(CANARY) for b in ballots])
    voting = named & (state == _ACTIVE)
    canary = named & (state == _CANARY)
    effective = effective_weights(np.array([b.weight for b in ballots]), voting, canary, canary_share)

    winner, tied = _winner(action, effective)
    agrees = (action == winner[:, None]) & (voting | canary) & ~tied[:, None]
    agreeing = (agrees & voting).sum(axis=1)
    n_voting = voting.sum(axis=1)
    agreement = np.divide(agreeing, n_voting, out=np.zeros(len(winner)), where=n_voting > 0)
    status = _status(winner, tied, agreeing, n_voting, quorum, withheld, stale)
    return Signals(
        action=np.where(status == _OK, winner, Action.HOLD).astype(np.int8),
        confidence=np.where(status < _SPEAKS, 0.0, _mean_confidence(confidence, effective, agrees)),
        agreement=agreement,
        loaded=(~np.isin(state, _UNLOADED) & counts).sum(axis=1),
        eligible=(state == _ACTIVE).sum(axis=1),
        voting=n_voting,
        agreeing=agreeing,
        status=tuple([_STATUSES[code] for code in status.tolist()]),
        effective=effective,
        configured=configured,
        quorum=quorum,
    )


def effective_weights(
    weights: NDArray[np.float64],
    voting: NDArray[np.bool_],
    canary: NDArray[np.bool_],
    canary_share: float = CANARY_SHARE,
) -> NDArray[np.float64]:
    """The configured weights renormalised over the voting `[R, A]`; a canary's share comes first."""
    base = np.where(voting, weights, 0.0)
    total = _sum_columns(base)
    share = np.divide(base, total[:, None], out=np.zeros_like(base), where=total[:, None] > 0)
    canaries = canary.sum(axis=1)
    taken = np.where(total > 0, canary_share * canaries, 0.0)
    return np.where(canary, canary_share, share * (1.0 - taken)[:, None])


def _mean_confidence(
    confidence: NDArray[np.float64], effective: NDArray[np.float64], agrees: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Sum of w c over the agreeing by the sum of w over the voting `[R]`; never over 1, 0 without weight."""
    total = _sum_columns(effective)
    agreed = _sum_columns(np.where(agrees, effective * confidence, 0.0))
    return np.divide(agreed, total, out=np.zeros(len(total)), where=total > 0)


def _winner(action: NDArray[np.int8], effective: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The action of the largest effective weight, and whether another is within 1e-12 of it."""
    weight = np.stack([_sum_columns(np.where(action == a, effective, 0.0)) for a in _ACTIONS], axis=1)
    ranked = np.sort(weight, axis=1)
    return weight.argmax(axis=1), ranked[:, -1] - ranked[:, -2] <= TIE


def _sum_columns(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The row sums `[R]`, added column by column so that a row's bits depend on that row alone."""
    total = np.zeros(len(values))
    for column in values.T:
        total = total + column
    return total


def _status(
    winner: NDArray[np.int64],
    tied: NDArray[np.bool_],
    agreeing: NDArray[np.int64],
    voting: NDArray[np.int64],
    quorum: int,
    withheld: NDArray[np.bool_],
    stale: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """The first that applies of `_STATUSES`, by its place."""
    is_hold = winner == Action.HOLD
    conditions = [
        withheld,
        stale,
        voting < quorum,
        tied | (~is_hold & (agreeing < quorum)),
        is_hold,
    ]
    return np.select(conditions, list(range(_OK)), default=_OK)
