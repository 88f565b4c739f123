"""What goes out: the rows of a batch as messages, and a batch as one commit, the same for every store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streams.codec import encode_event, encode_reject, to_json
from streams.contracts import FEATURE_SETS, V3, union
from streams.keys import Keys
from streams.messages import Action, Bar, Event, Reject
from streams.store import Commit, Output, Position
from worker.batches import STATES, Ballot, Vectors
from worker.pipeline import Result


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


def feature_messages(vectors: Vectors) -> list[dict[str, Any]]:
    """One feature vector for each accepted bar, as on the stream."""
    contracts = {name: FEATURE_SETS[name].contract for name in vectors.ready}
    ready = vectors.ready[V3.name].tolist()
    messages = [
        {
            **_bar_fields(bar),
            "ready": ready[row],
            "contract": V3.contract,
            "contracts": contracts,
            "values": dict(zip(vectors.names, values, strict=True)),
        }
        for row, (bar, values) in enumerate(zip(vectors.accepted.bars, vectors.values.tolist(), strict=True))
    ]
    return (
        [_without_left(vectors, row, message) for row, message in enumerate(messages)] if vectors.leaves else messages
    )


def _without_left(vectors: Vectors, row: int, message: dict[str, Any]) -> dict[str, Any]:
    """The message without the feature sets that nothing reads on this row any more."""
    kept = [name for name in vectors.ready if row <= vectors.leaves.get(name, row)]
    names = union([FEATURE_SETS[name] for name in kept])
    return {
        **message,
        "contracts": {name: message["contracts"][name] for name in kept},
        "values": {name: message["values"][name] for name in names},
    }


def vote_messages(bars: Sequence[Bar], ballot: Ballot) -> list[dict[str, Any]]:
    """One vote of one agent for each row of its ballot, an abstention included; `bars` are those of all rows."""
    outputs = [None] * len(bars) if ballot.outputs is None else ballot.outputs.tolist()
    rows = zip(
        *(bars, ballot.action.tolist(), ballot.confidence.tolist(), outputs),
        *(ballot.answered.tolist(), ballot.state.tolist(), ballot.reason),
        strict=True,
    )
    messages = [
        {
            **_bar_fields(bar),
            "agent": ballot.agent,
            "version": ballot.version,
            "action": Action(action).name,
            "confidence": confidence,
            "outputs": raw if answered else None,
            "weight": ballot.weight,
            "state": STATES[state],
            "reason": reason,
        }
        for bar, action, confidence, raw, answered, state, reason in rows
    ]
    return messages if ballot.present is None else [messages[row] for row in ballot.rows]


def signal_messages(result: Result) -> list[dict[str, Any]]:
    """Exactly one signal for each ready vector."""
    s = result.signals
    columns = (s.action, s.confidence, s.agreement, s.loaded, s.eligible, s.voting, s.agreeing)
    rows = zip(result.voted_bars, _signal_votes(result), s.status, *(c.tolist() for c in columns), strict=True)
    return [
        {
            **_bar_fields(bar),
            "action": Action(action).name,
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
        for bar, votes, status, action, confidence, agreement, loaded, eligible, voting, agreeing in rows
    ]


def _signal_votes(result: Result) -> list[dict[str, Any]]:
    """Agent to its vote, for each ready vector."""
    votes: list[dict[str, Any]] = [{} for _ in result.vectors.index]
    for place, ballot in enumerate(result.ballots):
        columns = zip(
            *(votes, ballot.action.tolist(), ballot.confidence.tolist()),
            *(result.signals.effective[:, place].tolist(), ballot.state.tolist(), ballot.reason),
            strict=True,
        )
        present = [True] * len(votes) if ballot.present is None else ballot.present.tolist()
        for there, (row, action, confidence, effective, state, reason) in zip(present, columns, strict=True):
            if not there:
                continue
            row[ballot.agent] = {
                "action": Action(action).name,
                "confidence": confidence,
                "weight": ballot.weight,
                "effective_weight": effective,
                "state": STATES[state],
                "reason": reason,
                "version": ballot.version,
            }
    return votes


def _bar_fields(bar: Bar) -> dict[str, Any]:
    return {"symbol": bar.symbol, "ts": bar.ts, "interval": bar.interval, "bar_id": bar.bar_id}
