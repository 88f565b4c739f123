"""Reading vectors and every agent's votes at one moment, and how far the vectors can be decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from streams.keys import agent_stage
from streams.messages import CANARY, Entry, Reason
from streams.store import FIRST_ID, Committed, JoiningStore
from worker.batches import Fields
from worker.decoding import SeriesBook, read_message, read_vote
from worker.processes.base import MarkingStore, Process
from worker.stages.join import Heard, Joined, Patience, join
from worker.stages.lateness import Lateness


class ConsensusStore(MarkingStore, JoiningStore, Protocol):
    """What this process needs of a store."""

    def unmark(self) -> None:
        """Take the mark back: the entry it is about was not processed after all."""
        ...


@dataclass
class Read:
    """One atomic read: the vectors in order, every agent's and canary's votes, and how far each agent is."""

    vectors: list[Entry]
    votes: dict[str, list[Entry]]
    heard: Mapping[str, Heard]
    committed: Mapping[str, Committed]


class JoinsVotes(Process):
    """A process whose input are vectors and the votes on them. `patience` says who is overdue, by `clock`."""

    store: ConsensusStore
    lateness: Lateness
    book: SeriesBook
    patience: Patience
    _clock: Callable[[], float]
    _decoded: dict[tuple[str, str], Mapping[str, Any]]
    """What entries say that were read and not consumed yet: while a vote is waited for they are read again."""

    # ------------------------------------------------------------------ reading

    def _voters(self) -> dict[str, str]:
        """Every agent and every canary that there may be, in the order of ballots, and the keys of their votes."""
        agents = self.settings.agents
        return {name: self.keys.votes(name) for name in (*agents, *(agent + CANARY for agent in agents))}

    def _read(self) -> Read:
        most, voters = self._most, self._voters()
        keys = [self.keys.features, *voters.values()]
        stages = {agent: agent_stage(agent) for agent in self.settings.agents}
        batch = self._take(lambda: self.store.read_each(self.position, keys, most, [*stages.values()]))
        by_key: dict[str, list[Entry]] = {key: [] for key in keys}
        for entry in batch.entries:
            by_key[entry.key].append(entry)
        votes = {name: by_key[key] for name, key in voters.items()}
        heard = {
            name: Heard([entry.id for entry in found], more=len(found) >= most)
            for name, found in votes.items()
            if found or not name.endswith(CANARY)
        }
        committed = {agent: batch.committed.get(stage, Committed()) for agent, stage in stages.items()}
        return Read(by_key[self.keys.features], votes, heard, committed)

    def _start_anew(self, key: str) -> Mapping[str, Fields]:
        """Lost vectors start every series anew; lost votes are missing on their vectors alone."""
        if key == self.keys.features:
            self.book.rewarm_all()
        return {"series": self.book.changes()}

    @property
    def _decided(self) -> str:
        """The ID of the last vector that was decided."""
        known = self.position.inputs.get(self.keys.features)
        return known.id if known else FIRST_ID

    def _join(self, read: Read) -> Joined:
        """How far the vectors can be decided; an agent that is overdue is absent from here until it is back."""
        self.lateness.absent -= {agent for agent in self.lateness.absent if self._is_back(agent, read)}
        vectors = [(entry.id, bool(self._decode(entry)["ready"])) for entry in read.vectors]
        joined = join(vectors, read.heard, self.lateness.absent)
        silent = frozenset(agent for agent in joined.waiting if not read.heard[agent].more)
        overdue = self.patience.overdue(self._clock(), silent, read.committed)
        if overdue:
            self.lateness.absent |= overdue
            for agent in sorted(overdue):
                self.log.warning("agent is absent", agent=agent, reason=str(Reason.DEADLINE_MISSED))
            joined = join(vectors, read.heard, self.lateness.absent)
        return self._of_one_weight(read, joined)

    def _is_back(self, agent: str, read: Read) -> bool:
        """Whether an absent agent votes again, at most a batch behind what was decided: nobody waits for a catch-up."""
        at, decided = (p.inputs.get(self.keys.features) for p in (read.committed[agent].position, self.position))
        if not read.heard[agent].ids or at is None or decided is None:
            return False
        return decided.consumed - at.consumed <= self.settings.batch_size

    def _reconnected(self) -> None:
        self.patience.forget()

    def _decode(self, entry: Entry) -> Mapping[str, Any]:
        known = self._decoded.get((entry.key, entry.id))
        if known is None:
            known = read_message(entry) if entry.key == self.keys.features else read_vote(entry)
            self._decoded[entry.key, entry.id] = known
        return known

    def _of_one_weight(self, read: Read, joined: Joined) -> Joined:
        """Cut before the first vector on which an agent's weight is another than before: its stage began anew."""
        ids = {entry.id: place for place, entry in enumerate(read.vectors[: joined.taken])}
        first: dict[str, float] = {}
        end = joined.taken
        for agent, found in read.votes.items():
            for entry in found:
                if entry.id in ids:
                    weight = self._decode(entry)["weight"]
                    if first.setdefault(agent, weight) != weight:
                        end = min(end, ids[entry.id])
        return joined if end == joined.taken else replace(joined, taken=end)
