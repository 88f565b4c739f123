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
    outputs = [
        features_output(keys, result.vectors),
        *votes_outputs(keys, result.vectors, result.ballots),
        signals_output(keys, result),
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


def features_output(keys: Keys, vectors: Vectors) -> Output:
    """One vector for each accepted bar."""
    return Output(keys.features, vectors.accepted.ids, [to_json(m) for m in feature_messages(vectors)])


def votes_outputs(keys: Keys, vectors: Vectors, ballots: Sequence[Ballot]) -> list[Output]:
    """Each agent's votes, under the IDs of their vectors."""
    ids, bars = vectors.voted_ids, vectors.bars
    return [
        Output(keys.votes(b.agent), [ids[row] for row in b.rows], [to_json(m) for m in vote_messages(bars, b)])
        for b in ballots
    ]


def signals_output(keys: Keys, result: Result) -> Output:
    """The signals, under the IDs of their vectors."""
    return Output(keys.signals, result.voted_ids, [to_json(m) for m in signal_messages(result)])


def encoded_events(events: Sequence[Event]) -> list[list[bytes]]:
    """Events as flat fields."""
    return [[b"data", encode_event(event)] for event in events]


RESTART, STALE, WITHHELD, WARMING = "restart", "stale", "withheld", "warming:"
"""What `flags` of a vector can say: its series starts anew with it, its bar came too late, the feed was unhealthy
then, and after the last one which set, other than v3, is not ready yet."""


def feature_messages(vectors: Vectors) -> Iterator[dict[str, Any]]:
    """One feature vector for each accepted bar, as on the stream; one at a time, for they are large."""
    flags = _flags(vectors)
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
        if row in flags:
            message["flags"] = flags[row]
        yield _without_left(vectors, row, message) if vectors.leaves else message


def _flags(vectors: Vectors) -> dict[int, list[str]]:
    """Row to its flags, for the few rows that have any."""
    accepted = vectors.accepted
    columns = {RESTART: accepted.restart, STALE: accepted.stale, WITHHELD: accepted.withheld}
    columns |= {WARMING + name: ~ready for name, ready in vectors.ready.items() if name != V3.name}
    flags: dict[int, list[str]] = {}
    for name, column in columns.items():
        for row in np.flatnonzero(column).tolist():
            flags.setdefault(row, []).append(name)
    return flags


def _without_left(vectors: Vectors, row: int, message: dict[str, Any]) -> dict[str, Any]:
    """The message without the feature sets that nothing reads on this row any more."""
    kept = [name for name in vectors.ready if row <= vectors.leaves.get(name, row)]
    names = union([FEATURE_SETS[name] for name in kept])
    left = {
        **message,
        "contracts": {name: message["contracts"][name] for name in kept},
        "values": {name: message["values"][name] for name in names},
    }
    if "flags" in message:
        gone = {WARMING + name for name in vectors.ready if name not in kept}
        left["flags"] = [flag for flag in message["flags"] if flag not in gone]
        if not left["flags"]:
            del left["flags"]
    return left


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
    agents = [ballot.agent for ballot in result.counted]
    columns = [
        _told(ballot, weights) for ballot, weights in zip(result.counted, result.signals.effective.T, strict=True)
    ]
    for row in zip(*columns, strict=True):
        yield {agent: vote for agent, vote in zip(agents, row, strict=True) if vote is not None}


def _told(ballot: Ballot, effective: NDArray[np.float64]) -> Iterator[dict[str, Any] | None]:
    """What a signal tells of one agent's vote, row by row; None where it has none."""
    weight = ballot.weight
    rows = zip(
        *(ballot.action.tolist(), ballot.confidence.tolist(), effective.tolist()),
        *(ballot.state.tolist(), ballot.reason, ballot.versions or [ballot.version] * len(ballot.action)),
        _present(ballot),
        strict=True,
    )
    for action, confidence, effective_weight, state, reason, version, present in rows:
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
