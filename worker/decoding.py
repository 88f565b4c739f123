"""What stages read of one another: messages of the streams as columnar batches again, bit for bit.

The inverse of `worker.encoding`: JSON numbers keep every bit of a double, null is not finite, and what a
vector's values do not say of its bar is in its `flags`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from streams.codec import StateCorruptError, seal, unseal
from streams.contracts import V3, FeatureSet, union
from streams.messages import Action, AgentState, Bar, Entry
from streams.store import StoreMisuseError, id_tuple
from worker.batches import STATE_CODE, Ballot, Fields, Vectors
from worker.encoding import RESTART, STALE, WARMING, WITHHELD
from worker.intake import Accepted

OHLCV = ("open", "high", "low", "close", "volume")


class SeriesBook:
    """Numbers the series of a stage that reads vectors, from 0 as they come, and knows what is ready for them."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], int] = {}
        self._ready: list[frozenset[str]] = []
        self._changed: set[int] = set()
        self._rewarm: set[int] = set()
        self._computed: frozenset[str] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, symbol: str, interval: str) -> int:
        """The number of a series."""
        row = self._rows.setdefault((symbol, interval), len(self._rows))
        if row == len(self._ready):
            self._ready.append(frozenset())
            self._changed.add(row)
        return row

    def note(self, row: int, ready: frozenset[str]) -> None:
        """The sets that were ready on the last vector of a series."""
        if self._ready[row] != ready:
            self._ready[row] = ready
            self._changed.add(row)

    def computed(self, sets: frozenset[str]) -> None:
        """The sets that the last vector has, ready or not."""
        self._computed = sets

    def lacks(self, name: str) -> bool:
        """Whether the last vector that was read has not this set at all."""
        return self._computed is not None and name not in self._computed

    def is_warm(self, name: str) -> bool:
        """Whether a feature set was ready on the last vector of any series."""
        return any(name in ready for ready in self._ready)

    def read_by(self, sets: Iterable[FeatureSet]) -> None:
        """Another process computes the vectors: what is read changes nothing there."""

    def rewarm_all(self) -> None:
        """After a loss of vectors: every series starts anew with its next one."""
        self._rewarm.update(range(len(self._rows)))
        self._changed.update(self._rewarm)

    def restarts(self, row: int) -> bool:
        """Whether a series starts anew with the vector at hand; says so once."""
        if row not in self._rewarm:
            return False
        self._rewarm.discard(row)
        self._changed.add(row)
        return True

    def changes(self) -> Fields:
        """The state fields to store for everything since the last call."""
        names = {row: name for name, row in self._rows.items()} if self._changed else {}
        fields = [
            (b"%d" % row, seal([*names[row], sorted(self._ready[row]), row in self._rewarm]))
            for row in sorted(self._changed)
        ]
        self._changed.clear()
        return fields

    def restore(self, fields: Mapping[bytes, bytes]) -> None:
        """Take up what `changes` wrote. Raises `StateCorruptError`."""
        rows = sorted((int(name), unseal(name.decode(), data)) for name, data in fields.items())
        self.__init__()  # type: ignore[misc]
        for place, (row, (symbol, interval, ready, rewarm)) in enumerate(rows):
            if row != place:
                raise StateCorruptError(str(place), f"missing, though series {row} is there")
            self._rows[symbol, interval] = row
            self._ready.append(frozenset(ready))
            if rewarm:
                self._rewarm.add(row)


# ---------------------------------------------------------------------- vectors


def read_vectors(
    entries: Sequence[Entry],
    book: SeriesBook,
    sets: Sequence[FeatureSet] = (V3,),
    left_out: frozenset[tuple[str, str]] = frozenset(),
    messages: Sequence[Mapping[str, Any]] | None = None,
) -> Vectors:
    """Entries of the features stream as vectors of `sets`, v3 among them.

    `messages` are what they say, where that was decoded already. One that is `left_out` starts its series anew
    without being ready: no model sees it. Raises `StoreMisuseError` where an entry is not what the feature stage of
    this build writes.
    """
    messages = [read_message(entry) for entry in entries] if messages is None else messages
    names = union(sets)
    bars = [_bar(entry, message) for entry, message in zip(entries, messages, strict=True)]
    flags = [frozenset(message.get("flags", ())) for message in messages]
    rows = [book.row(bar.symbol, bar.interval) for bar in bars]
    poisoned = [(entry.key, entry.id) in left_out for entry in entries]
    again = [book.restarts(row) or out for row, out in zip(rows, poisoned, strict=True)]
    seen = list(zip(entries, messages, poisoned, strict=True))
    ready = {s.name: np.array([not out and _is_ready(e, m, s) for e, m, out in seen], np.bool_) for s in sets}
    for place, row in enumerate(rows):
        book.note(row, frozenset(name for name, column in ready.items() if column[place]))
    if messages:
        book.computed(frozenset(messages[-1]["contracts"]))
    accepted = Accepted(
        ids=[entry.id for entry in entries],
        arrived_ms=[id_tuple(entry.id)[0] for entry in entries],
        bars=bars,
        rows=np.array(rows, np.int64),
        ohlcv=np.array([bar.ohlcv for bar in bars], np.float64).reshape(-1, 5),
        restart=np.array([RESTART in f or a for f, a in zip(flags, again, strict=True)], np.bool_),
        stale=np.array([STALE in f for f in flags], np.bool_),
        withheld=np.array([WITHHELD in f for f in flags], np.bool_),
    )
    values = np.array([[m["values"].get(name) for name in names] for m in messages], np.float64)
    # A poisoned vector is voted on all the same: every ready vector has its vote, here an abstention.
    voted = np.array([bool(message["ready"]) for message in messages], np.bool_)
    return Vectors(accepted, names, values.reshape(-1, len(names)), ready, np.flatnonzero(voted))


def read_message(entry: Entry) -> Mapping[str, Any]:
    """A feature vector. Raises `StoreMisuseError` where it is none."""
    try:
        message = orjson.loads(entry.fields[b"data"])
        if isinstance(message["values"], dict) and isinstance(message["contracts"], dict):
            return message  # type: ignore[no-any-return]
    except (KeyError, TypeError, orjson.JSONDecodeError):
        pass
    raise _misuse(entry, "it is no feature vector")


def _bar(entry: Entry, message: Mapping[str, Any]) -> Bar:
    values = message["values"]
    try:
        prices = [float(values[name]) for name in OHLCV]
        return Bar(message["symbol"], message["ts"], message["interval"], *prices)
    except (KeyError, TypeError) as error:
        raise _misuse(entry, f"it lacks {error}") from error


def _is_ready(entry: Entry, message: Mapping[str, Any], feature_set: FeatureSet) -> bool:
    """Whether a vector has the whole set. Raises `StoreMisuseError` where it was computed by other formulas."""
    contract = message["contracts"].get(feature_set.name)
    if contract is None:
        return False
    if contract != feature_set.contract:
        raise _misuse(
            entry,
            f"its {feature_set.name} has the contract {contract[:12]}, that of this build is "
            f"{feature_set.contract[:12]}: run the same build for every stage",
        )
    if feature_set is V3:
        return bool(message["ready"])
    return WARMING + feature_set.name not in message.get("flags", ())


def _misuse(entry: Entry, problem: str) -> StoreMisuseError:
    return StoreMisuseError(
        f"{entry.key} {entry.id}: {problem}. Only the stages of this program may write there: stop what else does, and "
        "use another --namespace"
    )


# ---------------------------------------------------------------------- votes

Vote = Mapping[str, Any]

VOTE_NAMES = ("bar_id", "action", "confidence", "outputs", "weight", "state", "reason", "version")

NO_VOTE: Vote = {
    "action": "ABSTAIN",
    "confidence": 0.0,
    "outputs": None,
    "state": str(AgentState.REFUSED),
    "reason": None,
    "version": None,
}
"""What stands on a row for which there is no vote; the ballot's `present` is False there."""


def read_vote(entry: Entry) -> Vote:
    """A vote. Raises `StoreMisuseError` where it is none."""
    try:
        vote = orjson.loads(entry.fields[b"data"])
        if all(name in vote for name in VOTE_NAMES):
            return vote  # type: ignore[no-any-return]
    except (KeyError, TypeError, orjson.JSONDecodeError):
        pass
    raise _misuse(entry, "it is no vote")


def checked_vote(entry: Entry, vote: Vote, bar_id: str) -> Vote:
    """A vote on the vector of the same ID. Raises `StoreMisuseError` where it is about another bar."""
    if vote["bar_id"] != bar_id:
        raise _misuse(entry, f"it is about {vote['bar_id']}, the vector of this ID about {bar_id}")
    return vote


def ballot_of(agent: str, votes: Sequence[Vote | None], weight: float) -> Ballot:
    """The ballot over R rows that gave these votes; None is a row without one."""
    given = [vote or NO_VOTE for vote in votes]
    versions = tuple(vote["version"] for vote in given)
    version = next((vote["version"] for vote in votes if vote), None)
    return Ballot(
        agent=agent,
        version=version,
        weight=weight,
        action=np.array([Action[vote["action"]] for vote in given], np.int8).reshape(-1),
        confidence=np.array([vote["confidence"] for vote in given], np.float64).reshape(-1),
        outputs=_outputs(votes),
        answered=np.array([vote["outputs"] is not None for vote in given], np.bool_).reshape(-1),
        state=np.array([STATE_CODE[AgentState(vote["state"])] for vote in given], np.int8).reshape(-1),
        reason=tuple(vote["reason"] for vote in given),
        present=None if all(votes) else np.array([vote is not None for vote in votes], np.bool_),
        versions=None if all(v == version for v in versions) else versions,
    )


def _outputs(votes: Sequence[Vote | None]) -> NDArray[np.float64] | None:
    widths = {len(vote["outputs"]) for vote in votes if vote and vote["outputs"] is not None}
    if not widths:
        return None
    outputs = np.full((len(votes), max(widths)), np.nan)
    for row, vote in enumerate(votes):
        if vote and vote["outputs"] is not None:
            outputs[row, : len(vote["outputs"])] = vote["outputs"]
    return outputs
