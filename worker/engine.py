"""From a batch to its commit, the same for every store: encode what the pipeline gave, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from streams.codec import encode_event, encode_reject, to_json
from streams.keys import Keys
from streams.messages import Event, Reject
from streams.store import Commit, Output, Position
from worker.pipeline import Result, feature_messages, signal_messages, vote_messages


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
