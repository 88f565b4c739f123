"""`quartet run --stage consensus`: feature vectors and every agent's votes in, signals out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streams.codec import encode_reject
from streams.keys import CONSENSUS
from streams.messages import CANARY, AgentState, Entry, Event, Reason, Reject
from streams.store import Commit, RewoundError, Snapshot, id_tuple
from worker import control
from worker.batches import STATES, Ballot, Fields, Vectors
from worker.builds import placed, started
from worker.control import BadOrderError, Order
from worker.decoding import SeriesBook, Vote, ballot_of, checked_vote, read_vectors
from worker.encoding import encoded_events, signals_output
from worker.pipeline import Result
from worker.processes.base import WAIT_S
from worker.processes.joining import ConsensusStore, JoinsVotes, Read
from worker.reload import Steered
from worker.settings import Settings
from worker.stages import consensus, lateness
from worker.stages.consensus import ConsensusStage
from worker.stages.join import Joined, Patience
from worker.stages.lateness import Lateness

PARTS = ("series", *consensus.PARTS, *lateness.PARTS)
THRESHOLDS_EVERY_S = 2.0
LONGEST_LOOK_S = 2 * WAIT_S
"""What counts at most of the time between two looks at the votes: this process or its machine may have stood still."""


class ConsensusProcess(JoinsVotes):
    """Joins vectors and votes and decides. `thresholds` asks the agents' processes for those of their models."""

    def __init__(
        self,
        settings: Settings,
        store: ConsensusStore,
        make: Callable[[], ConsensusStage],
        thresholds: Callable[[], Mapping[str, float]],
        clock: Callable[[], float] = time.monotonic,
        **given: Any,
    ) -> None:
        super().__init__(settings, store, **given)
        self._make = make
        self._ask = thresholds
        self._clock = clock
        self.stage = make()
        self.lateness = Lateness(settings.agents, settings.quality)
        self.book = SeriesBook()
        self.patience = Patience(settings.deadline_s, LONGEST_LOOK_S)
        self._thresholds: Mapping[str, float] = {}
        self._asked_at: float | None = None
        self._facts: dict[str, dict[str, str]] = {}
        self._decoded = {}

    @property
    def outputs(self) -> Mapping[str, str]:
        return {"signals": self.keys.signals}

    # ------------------------------------------------------------------ a batch

    def _step(self) -> None:
        orders = self._orders()
        read = self._read()
        # The mark comes before the first look into an entry: what kills may do so while it is decoded.
        poison = self._approach(read.vectors) if read.vectors else frozenset()
        joined = Joined(1) if poison else self._join(read)
        if self._cautious and read.vectors and not joined.taken:
            self._reaching(self.store.unmark)
        taken = read.vectors[: joined.taken]
        upto = taken[-1].id if taken else self._decided
        heard = [entry for found in read.votes.values() for entry in found if id_tuple(entry.id) <= id_tuple(upto)]
        if taken or heard or orders:
            self._idle_since = None
            self._process(read, joined, heard, orders, poison)
        elif joined.waiting or read.vectors:
            self._idle_since = None
            keys = [self.keys.votes(agent) for agent in joined.waiting]
            self._wait(keys, max(0.001, min(WAIT_S, self.patience.left_s())))
        else:
            self._idle_since = self._idle_since or time.monotonic()
            votes = [self.keys.votes(agent) for agent in self.settings.agents]
            self._wait([self.keys.features, *votes, self.keys.control], WAIT_S)

    def _process(
        self, read: Read, joined: Joined, heard: Sequence[Entry], orders: Steered, poison: frozenset[tuple[str, str]]
    ) -> None:
        taken = read.vectors[: joined.taken]
        known = [] if poison else taken
        vectors = read_vectors(known, self.book, messages=[self._decode(entry) for entry in known])
        if poison:
            self.book.rewarm_all()  # nobody may look into it for the series that it is of
        with self.sensors.stopwatch("consensus"):
            result, events = self._decide(vectors, read, joined)
        decided = {entry.id for entry in taken}
        late = [entry for entry in heard if entry.id not in decided]
        rejects = [*orders.rejects, *(_left_out(entry) for entry in taken if (entry.key, entry.id) in poison)]
        with self.sensors.stopwatch("pack"):
            last = taken[-1].id if taken else self.position.last_output_id
            told = [placed(event, self.position) for event in orders.events]
            commit = Commit(
                self.position.advanced([*taken, *heard, *orders.entries], last),
                outputs=[signals_output(self.keys, result)],
                appends={
                    self.keys.rejected: [encode_reject(reject) for reject in rejects],
                    self.keys.events: encoded_events([*told, *events]),
                },
                state=self._changes(),
            )
        self._commit(commit)
        for entry in (*taken, *heard):
            self._decoded.pop((entry.key, entry.id), None)
        self._cautious = max(0, self._cautious - len(taken))
        self._tell(result, late, rejects, [*told, *events])

    def _decide(self, vectors: Vectors, read: Read, joined: Joined) -> tuple[Result, list[Event]]:
        ballots, missing = self._ballots(vectors, read, joined)
        ballots, events = self.lateness.fill(vectors, ballots, missing)
        signals, concerns = self.stage.process(vectors, ballots, self._known_thresholds())
        rows = {bar.bar_id: row for row, bar in enumerate(vectors.bars)}
        events = sorted([*events, *concerns], key=lambda event: rows[event.bar_id])
        return Result(vectors.accepted, vectors, ballots, signals, {}, events), events

    def _ballots(
        self, vectors: Vectors, read: Read, joined: Joined
    ) -> tuple[list[Ballot], dict[str, NDArray[np.bool_]]]:
        """The ballots on the voted rows, and on which of these each agent is missing."""
        ids, bars = vectors.voted_ids, vectors.bars
        ballots = []
        for name, found in read.votes.items():
            by_id = {entry.id: entry for entry in found}
            votes: list[Vote | None] = [
                checked_vote(by_id[entry_id], self._decode(by_id[entry_id]), bar.bar_id) if entry_id in by_id else None
                for entry_id, bar in zip(ids, bars, strict=True)
            ]
            if any(votes) or not name.endswith(CANARY):
                ballots.append(ballot_of(name, votes, self._weight(name, votes)))
        missing = {
            agent: np.array([place in places for place in vectors.index.tolist()], np.bool_)
            for agent, places in joined.missing.items()
        }
        return ballots, missing

    def _weight(self, name: str, votes: Sequence[Vote | None]) -> float:
        """Of the votes; before and between them what it last was, or is set to."""
        said = next((vote["weight"] for vote in votes if vote), None)
        if said is None:
            said = self.lateness.known(name).weight
        return float(self.settings.weights[name] if said is None else said)

    def _known_thresholds(self) -> Mapping[str, float]:
        """Asked for every couple of seconds: they decide how votes are scored, and no signal."""
        now = time.monotonic()
        if self._asked_at is None or now - self._asked_at >= THRESHOLDS_EVERY_S:
            self._asked_at = now
            self._thresholds = self._reaching(self._ask)
        return self._thresholds

    def _changes(self) -> dict[str, Fields]:
        return {"series": self.book.changes(), **self.stage.changes(), **self.lateness.changes()}

    # ------------------------------------------------------------------ orders

    def _orders(self) -> Steered:
        """What no agent's process does with orders: refuse what is none, and forgive missed deadlines."""
        entries = self._read_orders()
        events, rejects = [], []
        for entry in entries:
            try:
                order = control.parse(entry, self.settings.agents)
            except BadOrderError as error:
                rejects.append(Reject(entry, control.REASON, str(error), control.STAGE))
                continue
            if order.order == "unmute" and (event := self._forgive(order)) is not None:
                events.append(event)
        return Steered(entries, events, rejects)

    def _forgive(self, order: Order) -> Event | None:
        """Missed deadlines mute no longer; the order itself is answered by the agent's process."""
        safeguard = self.lateness.safeguard
        _, why = safeguard.status(order.agent, AgentState.ACTIVE)
        if why is None:
            return None
        safeguard.unmute(order.agent)
        detail = f"it was muted for {why}; its window of deadlines starts anew"
        evidence = {"by": order.by, "was": why, "stage": CONSENSUS}
        return Event(
            "agent_readmitted", agent=order.agent, reason=str(Reason.OPERATOR), detail=detail, evidence=evidence
        )

    # ------------------------------------------------------------------ recovering

    def _recover(self, rewound: RewoundError | None) -> None:
        snapshot: Snapshot = self._reaching(lambda: self.store.load(PARTS))
        self.stage = self._make()
        self.lateness = Lateness(self.settings.agents, self.settings.quality)
        self.book = SeriesBook()
        self.patience.forget()
        self._decoded.clear()
        self.position = snapshot.position
        anew = self.options.rebuild
        self.options.rebuild = False
        if not anew:
            self.book.restore(snapshot.state["series"])
            self.stage.restore(snapshot.state)
            self.lateness.restore(snapshot.state)
        what = "the windows of agreement, of scores and of missed deadlines start empty" if anew else ""
        self._begin(
            [started(self.settings, (), self.position, stage=CONSENSUS)],
            self._recovery(rewound, what),
            state={},
            drops=PARTS if anew else (),
        )

    # ------------------------------------------------------------------ telling

    def _tell(self, result: Result, late: Sequence[Entry], rejects: Sequence[Reject], events: Sequence[Event]) -> None:
        self.sensors.decided(result, self._now_ms())
        self.sensors.missed(result.ballots)
        self.sensors.rejected(rejects)
        for key, n in Counter(entry.key for entry in late).items():
            self.sensors.late(key.removeprefix(self.keys.votes("")).removesuffix(CANARY), n)
        withheld = result.accepted.withheld
        if len(withheld):
            self.status.batch(result, healthy=not withheld[-1])
        self._note_agents(result.ballots)
        self.sensors.standing(self.status)
        self._tell_events(events)

    def _note_agents(self, ballots: Sequence[Ballot]) -> None:
        """Every agent as the last signal has it: for `/readyz`, and where deadlines muted it for the metrics."""
        before = dict(self._facts)
        if ballots and len(ballots[0].action):
            there = [b for b in ballots if b.present is None or b.present[-1]]
            self._facts = {
                b.agent: {
                    "state": str(STATES[int(b.state[-1])]),
                    "reason": b.reason[-1] or "",
                    "version": (b.versions[-1] if b.versions else b.version) or "",
                    "detail": self._detail(b.agent),
                }
                for b in there
            }
        if self._facts != before:
            self.status.heard(self._facts)
            muted = {a for a in self.settings.agents if self.lateness.safeguard.status(a, AgentState.ACTIVE)[1]}
            self.sensors.muted_here(muted, self.settings.agents)

    def _detail(self, agent: str) -> str:
        if agent not in self.lateness.absent:
            return ""
        return (
            f"no commit within {self.settings.deadline_s:g} s while a vector waited for it: see whether "
            f"`quartet run --stage agent:{agent}` runs, or still catches up"
        )

    def _tell_levels(self) -> None:
        agents = [agent for agent in self._facts if self.lateness.known(agent.removesuffix(CANARY)).version]
        self.sensors.looked_back(self.stage, agents)


def _left_out(entry: Entry) -> Reject:
    return Reject(entry, "poison", "this vector ended the worker three times; it has no signal", CONSENSUS)
