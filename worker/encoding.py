"""What goes out: the rows of a batch as messages, and a batch as one commit, the same for every store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streams.codec import encode_event, encode_reject, to_json
from streams.contracts import FEATURE_SETS, V3, union
from streams.keys import Keys
from streams.messages import Action, Bar, Event, Reject
from streams.store import Commit, Output, Position
from worker.batches import STATES, Ballot, Vectors
from worker.pipeline import Result

_ACTIONS = tuple(action.name for action in Action)
"""By code; looking an enum up costs more than all else of a row."""

_STATES = tuple(map(str, STATES))


def commit_of(
    keys: Keys,
    result: Result,
    position: Position,
    further_events: Sequence[Event] = (),
    further_rejects: Sequence[Reject] = (),
) -> Commit:
    """Outputs, rejects, events, state and position of one batch; `further` ones come first."""
    ids = result.voted_ids
    outputs = [
        Output(keys.features, result.accepted.ids, [to_json(m) for m in feature_messages(result.vectors)]),
        *(
            Output(
                keys.votes(ballot.agent),
                [ids[row] for row in ballot.rows],
                [to_json(m) for m in vote_messages(result.voted_bars, ballot)],
            )
            for ballot in result.ballots
        ),
        Output(keys.signals, ids, [to_json(m) for m in signal_messages(result)]),
    ]
    return Commit(
        position=position,
        outputs=outputs,
        appends={
            keys.rejected: [encode_reject(reject) for reject in [*further_rejects, *result.rejects]],
            keys.events: encoded_events([*further_events, *result.events]),
        },
        state=result.state,
        drops=result.drops,
    )


def encoded_events(events: Sequence[Event]) -> list[list[bytes]]:
    """Events as flat fields."""
    return [[b"data", encode_event(event)] for event in events]


def feature_messages(vectors: Vectors) -> Iterator[dict[str, Any]]:
    """One feature vector for each accepted bar, as on the stream; one at a time, for they are large."""
    contracts = {name: FEATURE_SETS[name].contract for name in vectors.ready}
    names, ready = vectors.names, vectors.ready[V3.name].tolist()
    for row, bar in enumerate(vectors.accepted.bars):
        message = {
            "symbol": bar.symbol,
            "ts": bar.ts,
            "interval": bar.interval,
            "bar_id": bar.bar_id,
            "ready": ready[row],
            "contract": V3.contract,
            "contracts": contracts,
            "values": dict(zip(names, vectors.values[row].tolist(), strict=True)),
        }
        yield _without_left(vectors, row, message) if vectors.leaves else message


def _without_left(vectors: Vectors, row: int, message: dict[str, Any]) -> dict[str, Any]:
    """The message without the feature sets that nothing reads on this row any more."""
    kept = [name for name in vectors.ready if row <= vectors.leaves.get(name, row)]
    names = union([FEATURE_SETS[name] for name in kept])
    return {
        **message,
        "contracts": {name: message["contracts"][name] for name in kept},
        "values": {name: message["values"][name] for name in names},
    }


def vote_messages(bars: Sequence[Bar], ballot: Ballot) -> Iterator[dict[str, Any]]:
    """One vote of one agent for each row of its ballot, an abstention included; `bars` are those of all rows."""
    agent, version, weight = ballot.agent, ballot.version, ballot.weight
    outputs = [None] * len(bars) if ballot.outputs is None else ballot.outputs.tolist()
    rows = zip(
        *(bars, ballot.action.tolist(), ballot.confidence.tolist(), outputs),
        *(ballot.answered.tolist(), ballot.state.tolist(), ballot.reason, _present(ballot)),
        strict=True,
    )
    for bar, action, confidence, raw, answered, state, reason, present in rows:
        if present:
            yield {
                "symbol": bar.symbol,
                "ts": bar.ts,
                "interval": bar.interval,
                "bar_id": bar.bar_id,
                "agent": agent,
                "version": version,
                "action": _ACTIONS[action],
                "confidence": confidence,
                "outputs": raw if answered else None,
                "weight": weight,
                "state": _STATES[state],
                "reason": reason,
            }


def _present(ballot: Ballot) -> list[bool]:
    return [True] * len(ballot.action) if ballot.present is None else ballot.present.tolist()


def signal_messages(result: Result) -> Iterator[dict[str, Any]]:
    """Exactly one signal for each ready vector."""
    s = result.signals
    columns = (s.action, s.confidence, s.agreement, s.loaded, s.eligible, s.voting, s.agreeing)
    rows = zip(result.voted_bars, _signal_votes(result), s.status, *(c.tolist() for c in columns), strict=True)
    for bar, votes, status, action, confidence, agreement, loaded, eligible, voting, agreeing in rows:
        yield {
            "symbol": bar.symbol,
            "ts": bar.ts,
            "interval": bar.interval,
            "bar_id": bar.bar_id,
            "action": _ACTIONS[action],
            "confidence": confidence,
            "agreement": agreement,
            "configured": s.configured,
            "loaded": loaded,
            "eligible": eligible,
            "voting": voting,
            "agreeing": agreeing,
            "quorum": s.quorum,
            "status": status,
            "votes": votes,
        }


def _signal_votes(result: Result) -> Iterator[dict[str, Any]]:
    """Agent to its vote, for each ready vector."""
    agents = [ballot.agent for ballot in result.ballots]
    columns = [
        _told(ballot, weights) for ballot, weights in zip(result.ballots, result.signals.effective.T, strict=True)
    ]
    for row in zip(*columns, strict=True):
        yield {agent: vote for agent, vote in zip(agents, row, strict=True) if vote is not None}


def _told(ballot: Ballot, effective: NDArray[np.float64]) -> Iterator[dict[str, Any] | None]:
    """What a signal tells of one agent's vote, row by row; None where it has none."""
    version, weight = ballot.version, ballot.weight
    rows = zip(
        *(ballot.action.tolist(), ballot.confidence.tolist(), effective.tolist()),
        *(ballot.state.tolist(), ballot.reason, _present(ballot)),
        strict=True,
    )
    for action, confidence, effective_weight, state, reason, present in rows:
        told = {
            "action": _ACTIONS[action],
            "confidence": confidence,
            "weight": weight,
            "effective_weight": effective_weight,
            "state": _STATES[state],
            "reason": reason,
            "version": version,
        }
        yield told if present else None
