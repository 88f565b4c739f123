"""`/healthz` and `/readyz` of a worker that owns several partitions: as the worst of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from streams.messages import AgentState
from worker.http import Condition, Readiness
from worker.kafka.levels import WORST_FIRST
from worker.status import Status

_OUTAGE = "redis"
"""What `Status` calls the place where streams are kept."""


class Health:
    """What the partitions' statuses amount to. Written by the loop, read by any thread."""

    def __init__(self, agents: Sequence[str]) -> None:
        self._agents = tuple(agents)
        self._statuses: dict[int, Status] = {}
        self.heartbeat = time.monotonic()
        self.group = Condition(ok=False, detail="not a member of the group yet")

    def beat(self) -> None:
        """The event loop turns."""
        self.heartbeat = time.monotonic()

    def own(self, statuses: Mapping[int, Status]) -> None:
        """The partitions that this worker owns from now on."""
        self._statuses = dict(statuses)

    def last_beat(self) -> float:
        """When the loop, or the thread that is furthest behind, last turned (`time.monotonic()`)."""
        return min([self.heartbeat, *(status.heartbeat for status in self._statuses.values())])

    def readiness(self) -> Readiness:
        """Ready only where every partition to which bars come is, and there is one."""
        statuses = self._statuses
        told = {p: s for p, s in statuses.items() if s.last_arrival is not None} or statuses
        each = {partition: status.readiness() for partition, status in sorted(told.items())}
        if not each:
            agents = {agent: {"state": str(AgentState.LOADING), "reason": ""} for agent in self._agents}
            return Readiness({"kafka": self.group, "owner": self._owner()}, agents)
        names = [name for name in next(iter(each.values())).conditions if name not in (_OUTAGE, "owner")]
        conditions = {"kafka": self._kafka(), "owner": self._owner()}
        conditions |= {name: _both({p: r.conditions[name] for p, r in each.items()}) for name in names}
        counts = {kind: min(r.counts[kind] for r in each.values()) for kind in next(iter(each.values())).counts}
        return Readiness(conditions, _agents([r.agents for r in each.values()]), counts)

    def _kafka(self) -> Condition:
        servers = {partition: status.server for partition, status in self._statuses.items()}
        return self.group if not self.group.ok else _both(servers)

    def _owner(self) -> Condition:
        if not self._statuses:
            return Condition(ok=False, detail="no partition is assigned to this worker")
        shown = ", ".join(map(str, sorted(self._statuses)))
        return Condition(ok=True, detail=f"partitions {shown}")


def _both(conditions: Mapping[int, Condition]) -> Condition:
    """Met where it is met in every partition; else the first in which it is not."""
    for partition, condition in sorted(conditions.items()):
        if not condition.ok:
            return Condition(ok=False, detail=f"partition {partition}: {condition.detail}")
    return next(iter(conditions.values()))


def _agents(each: Iterable[Mapping[str, Mapping[str, str]]]) -> dict[str, Mapping[str, str]]:
    """Every agent with the facts of the partition where it is worst."""
    found: dict[str, Mapping[str, str]] = {}
    for agents in each:
        for agent, facts in agents.items():
            if agent not in found or _rank(facts) < _rank(found[agent]):
                found[agent] = facts
    return found


def _rank(facts: Mapping[str, str]) -> int:
    return WORST_FIRST.index(AgentState(facts["state"]))
