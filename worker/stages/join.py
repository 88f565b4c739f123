"""Which vectors can be decided: the votes of every agent on them are there, or are not waited for.

Pure functions of what one atomic read gave. The vectors are decided in the order of their stream; a vote
belongs to the vector of the same ID, and each agent votes in the order of the vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from streams.messages import CANARY
from streams.store import Committed, id_tuple

Id = tuple[int, int]


@dataclass(frozen=True)
class Heard:
    """The IDs that were read of one agent's votes, ascending. `more` says that others may follow unread."""

    ids: Sequence[str]
    more: bool = False
    known: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", frozenset(self.ids))

    def is_past(self, entry_id: str) -> bool:
        """Whether a vote on a later vector is there: one on this vector can come no more."""
        return bool(self.ids) and id_tuple(self.ids[-1]) > id_tuple(entry_id)


@dataclass(frozen=True)
class Joined:
    """The first `taken` vectors can be decided; `missing` are the places among them that an agent has no vote on.

    `waiting` are the agents whose vote the next vector lacks; empty where there is no next one or it has to be
    read further.
    """

    taken: int
    missing: Mapping[str, frozenset[int]] = field(default_factory=dict)
    waiting: frozenset[str] = frozenset()


def join(vectors: Sequence[tuple[str, bool]], heard: Mapping[str, Heard], absent: frozenset[str]) -> Joined:
    """How far vectors, as (ID, ready), can be decided. `heard` by agent and canary; nobody waits for the `absent`.

    A vector that is not ready has no votes. A canary votes in the commit of its agent, so where the agent's vote
    is there, its own is too, if it has one.
    """
    agents = [agent for agent in heard if not agent.endswith(CANARY)]
    missing: dict[str, set[int]] = {agent: set() for agent in agents}
    taken, waiting = 0, frozenset[str]()
    for place, (entry_id, ready) in enumerate(vectors):
        if ready:
            without = [agent for agent in agents if entry_id not in heard[agent].known]
            waiting = frozenset(a for a in without if a not in absent and not heard[a].is_past(entry_id))
            if waiting or any(_is_unread(heard.get(agent + CANARY), entry_id) for agent in agents):
                break
            for agent in without:
                missing[agent].add(place)
        taken = place + 1
    return Joined(taken, {agent: frozenset(places) for agent, places in missing.items() if places}, waiting)


def _is_unread(canary: Heard | None, entry_id: str) -> bool:
    """Whether the canary's vote on a vector may lie behind what was read."""
    return canary is not None and canary.more and id_tuple(canary.ids[-1]) < id_tuple(entry_id)


class Patience:
    """Who is overdue: an agent that committed nothing for `deadline_s` while a vector waited for it.

    Only time that was watched counts: of what passes between two looks no more than `longest_s`, so that a machine
    that was paused has made nobody late.
    """

    def __init__(self, deadline_s: float, longest_s: float) -> None:
        self.deadline_s = deadline_s
        self.longest_s = longest_s
        self._looked_s: float | None = None
        self._waited: dict[str, tuple[float, Committed | None]] = {}

    def overdue(self, now_s: float, waiting: frozenset[str], committed: Mapping[str, Committed]) -> frozenset[str]:
        """Those of `waiting` that are late at `now_s`. `committed` says how far each agent is: any change is life."""
        passed_s = 0.0 if self._looked_s is None else min(now_s - self._looked_s, self.longest_s)
        self._looked_s = now_s
        before, self._waited = self._waited, {}
        for agent in waiting:
            waited_s, known = before.get(agent, (0.0, None))
            now = committed.get(agent)
            alive = agent not in before or known != now
            self._waited[agent] = (0.0 if alive else waited_s + passed_s, now)
        return frozenset(agent for agent, (waited_s, _) in self._waited.items() if waited_s >= self.deadline_s)

    def forget(self) -> None:
        """Begin to wait anew: nothing was seen for a while."""
        self._looked_s, self._waited = None, {}

    def left_s(self) -> float:
        """Seconds from the last look until the first of those waited for is late; else the whole deadline."""
        return self.deadline_s - max((waited_s for waited_s, _ in self._waited.values()), default=0.0)
