"""One set of metrics for many partitions: counts add up, and a gauge shows the worst of the partitions.

A partition to which no bar has come yet says nothing of the agents, unless none of them has had one.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from streams.messages import CANARY, AgentState
from worker.metrics import ENSEMBLE, Metrics

WORST_FIRST = (
    AgentState.REFUSED,
    AgentState.LOADING,
    AgentState.MUTED,
    AgentState.SHADOW,
    AgentState.WARMING_UP,
    AgentState.CANARY,
    AgentState.ACTIVE,
)

Setter = str
"""The name of the method of `Metrics` that sets a gauge."""


def worst(states: Iterable[AgentState]) -> AgentState:
    """The state of an agent that has one in each partition."""
    return min(states, key=WORST_FIRST.index)


def _least(values: Sequence[Any]) -> Any:
    return min((value for value in values if value is not None), default=None)


def _most(values: Sequence[Any]) -> Any:
    return max((value for value in values if value is not None), default=None)


def _union(values: Sequence[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*values)


_FOLDS: Mapping[Setter, tuple[Callable[[Sequence[Any]], Any], ...]] = {
    "agent_state": (worst,),
    "effective_weight": (_least,),
    "quality": (_most, _most, _least, _least),
    "degenerate": (_union,),
    "scores": (_least, _least, _least, _most),
    "ensemble": (_least,) * len(ENSEMBLE),
    "agreement": (_least, _most),
    "last_bar": (_most,),
    "lag": (sum,),
    "length": (sum,),
}
"""How each value of a gauge is made of those of the partitions."""

_OF_ALL = ("last_bar", "lag", "length")
"""Gauges for which a partition without a bar counts too."""


class Levels:
    """The gauges of every partition, folded into `metrics` whenever one of them changes."""

    def __init__(self, metrics: Metrics, agents: Sequence[str]) -> None:
        self.metrics = metrics
        self._agents = tuple(agents)
        self._lock = threading.RLock()
        self._values: dict[tuple[Setter, Hashable], dict[int, tuple[Any, ...]]] = defaultdict(dict)
        self._drifts: dict[int, Mapping[str, float]] = {}
        self._canaries: dict[str, set[int]] = defaultdict(set)
        self._met: set[int] = set()

    def of(self, partition: int) -> Metrics:
        """The metrics that one partition's worker is given."""
        return _PartitionMetrics(self, partition)

    def set(self, partition: int, setter: Setter, key: Hashable, *values: Any) -> None:
        with self._lock:
            self._values[setter, key][partition] = values
            if setter == "last_bar" and partition not in self._met:
                self._met.add(partition)
                self._fold_all()
            else:
                self._fold(setter, key)

    def drift(self, partition: int, distances: Mapping[str, float]) -> None:
        with self._lock:
            self._drifts[partition] = distances
            self._fold_drift()

    def _fold_drift(self) -> None:
        names = {name for distances in self._drifts.values() for name in distances}
        self.metrics.drift({n: max(d[n] for d in self._drifts.values() if n in d) for n in names})

    def add_canary(self, partition: int, agent: str) -> None:
        with self._lock:
            if not self._canaries[agent]:
                self.metrics.add_agent(agent)
            self._canaries[agent].add(partition)

    def remove_canary(self, partition: int, agent: str) -> None:
        with self._lock:
            self._canaries[agent].discard(partition)
            for (setter, key), values in self._values.items():
                if key == agent:
                    values.pop(partition, None)
                    self._fold(setter, key)
            if not self._canaries[agent]:
                self.metrics.remove_agent(agent)

    def forget(self, partition: int) -> None:
        """The partition is another worker's now."""
        with self._lock:
            self._met.discard(partition)
            self._drifts.pop(partition, None)
            for values in self._values.values():
                values.pop(partition, None)
            for agent in [agent for agent, held in self._canaries.items() if held == {partition}]:
                self.metrics.remove_agent(agent)
            for held in self._canaries.values():
                held.discard(partition)
            self._fold_all()
            self._fold_drift()

    def _fold_all(self) -> None:
        for setter, key in list(self._values):
            self._fold(setter, key)

    def _fold(self, setter: Setter, key: Hashable) -> None:
        values = self._values[setter, key]
        if setter not in _OF_ALL and self._met & values.keys():
            values = {partition: value for partition, value in values.items() if partition in self._met}
        if not values:
            self._unset(setter, key)
            return
        columns = zip(*values.values(), strict=True)
        self._apply(setter, key, [fold(c) for fold, c in zip(_FOLDS[setter], columns, strict=True)])

    def _unset(self, setter: Setter, key: Hashable) -> None:
        """What no partition tells any more: nothing is loaded, nothing votes, nothing lags here."""
        if setter == "agent_state" and not str(key).endswith(CANARY):
            self.metrics.agent_state(str(key), AgentState.LOADING)
        elif setter == "ensemble":
            self.metrics.ensemble({kind: len(self._agents) * (kind == "configured") for kind in ENSEMBLE})
        elif setter in ("lag", "length"):
            self._apply(setter, key, [0])

    def _apply(self, setter: Setter, key: Hashable, folded: Sequence[Any]) -> None:
        metrics = self.metrics
        if setter == "quality":
            top_action, hold, stddev, p10_p90 = folded
            metrics.quality(str(key), top_action=top_action, hold=hold, stddev=stddev, p10_p90=p10_p90)
        elif setter == "ensemble":
            metrics.ensemble(dict(zip(ENSEMBLE, folded, strict=True)))
        elif key is None:
            getattr(metrics, setter)(*folded)
        else:
            getattr(metrics, setter)(key, *folded)


class _PartitionMetrics(Metrics):
    """The shared metrics as one partition sees them: what counts or times is shared, a gauge goes to `Levels`."""

    def __init__(self, levels: Levels, partition: int) -> None:  # the base class would declare everything again
        self.__dict__.update(levels.metrics.__dict__)
        self._levels, self._partition = levels, partition

    def _report(self, setter: Setter, key: Hashable, *values: Any) -> None:
        self._levels.set(self._partition, setter, key, *values)

    def add_agent(self, agent: str) -> None:
        self._levels.add_canary(self._partition, agent)

    def remove_agent(self, agent: str) -> None:
        self._levels.remove_canary(self._partition, agent)

    def agent_state(self, agent: str, state: AgentState) -> None:
        self._report("agent_state", agent, state)

    def agent_info(self, agent: str, version: str, contract: str, sha256: str) -> None:
        self._levels.metrics.agent_info(agent, version, contract, sha256)

    def configured_weight(self, agent: str, weight: float) -> None:
        self._levels.metrics.configured_weight(agent, weight)

    def effective_weight(self, agent: str, weight: float) -> None:
        self._report("effective_weight", agent, weight)

    def quality(self, agent: str, *, top_action: float, hold: float, stddev: float, p10_p90: float) -> None:
        self._report("quality", agent, top_action, hold, stddev, p10_p90)

    def degenerate(self, agent: str, found: Iterable[str]) -> None:
        self._report("degenerate", agent, frozenset(found))

    def scores(
        self, agent: str, scored: int, hit_ratio: float | None, signed_return: float | None, brier: float | None
    ) -> None:
        self._report("scores", agent, scored, hit_ratio, signed_return, brier)

    def drift(self, distances: Mapping[str, float]) -> None:
        self._levels.drift(self._partition, distances)

    def ensemble(self, counts: Mapping[str, int]) -> None:
        self._report("ensemble", None, *(counts[kind] for kind in ENSEMBLE))

    def agreement(self, agreement: float, hard_disagreement: float) -> None:
        self._report("agreement", None, agreement, hard_disagreement)

    def last_bar(self, unix_s: float) -> None:
        self._report("last_bar", None, unix_s)

    def lag(self, stream: str, entries: int) -> None:
        self._report("lag", stream, entries)

    def length(self, stream: str, entries: int) -> None:
        self._report("length", stream, entries)
