"""Agents that were too late: what stands in their place, and when their votes no longer count.

A row without an agent's vote has an abstention, `deadline_missed`, in the state and the version of the last
vote of that agent that was decided on; `loading` before the first. The share of such rows mutes the agent
as any criterion of the safeguard does, by its limit `deadline_share`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from streams.codec import seal, unseal
from streams.messages import CANARY, Action, AgentState, Event, Reason
from worker.batches import STATE_CODE, STATES, Ballot, Fields, State, Vectors
from worker.qsc import Safeguard
from worker.quality import QualityLimits

PARTS = ("lateness", "deadlines")
_NEVER = 1 << 40
_ABSENT = b"absent"


@dataclass(frozen=True, slots=True)
class Known:
    """An agent as its last decided vote had it."""

    state: AgentState = AgentState.LOADING
    version: str | None = None
    weight: float | None = None


def only_deadlines(limits: QualityLimits) -> QualityLimits:
    """These limits with every criterion off but that of missed deadlines."""
    return QualityLimits(
        minimum=limits.minimum,
        action_share=1.0,
        hold_share=1.0,
        confidence_stddev=0.0,
        confidence_range=0.0,
        constant_run=_NEVER,
        non_finite_run=_NEVER,
        non_finite_share=1.0,
        error_share=1.0,
        deadline_share=limits.deadline_share,
        stale_share=1.0,
    )


class Lateness:
    """Who is `absent`, what is known of everybody, and the watch over missed deadlines. Part of the commit."""

    def __init__(self, agents: Sequence[str], quality: Mapping[str, QualityLimits] | None = None) -> None:
        self.agents = tuple(agents)
        self.absent: frozenset[str] = frozenset()
        given = quality or {}
        self.safeguard = Safeguard({a: only_deadlines(given.get(a, QualityLimits())) for a in agents})
        self._known = dict.fromkeys(agents, Known())

    def known(self, agent: str) -> Known:
        """The agent as its last decided vote had it."""
        return self._known[agent]

    def fill(
        self, vectors: Vectors, ballots: Sequence[Ballot], missing: Mapping[str, NDArray[np.bool_]]
    ) -> tuple[list[Ballot], list[Event]]:
        """The ballots as they are decided on, given the rows `[R]` on which agents are missing; and who was muted.

        A canary votes with its agent: where that one is missing, it is not there.
        """
        filled = []
        for ballot in ballots:
            agent = ballot.agent.removesuffix(CANARY)
            out = missing.get(agent)
            if agent != ballot.agent:
                filled.append(ballot if out is None else _without(ballot, out))
            else:
                filled.append(self._fill(ballot, np.zeros(len(ballot.action), np.bool_) if out is None else out))
        own, events = self.safeguard.watch(vectors, [b for b in filled if not b.agent.endswith(CANARY)])
        judged = {ballot.agent: ballot for ballot in own}
        return [judged.get(ballot.agent, ballot) for ballot in filled], events

    def _fill(self, ballot: Ballot, out: NDArray[np.bool_]) -> Ballot:
        if not len(out):
            return ballot
        known = self._known[ballot.agent]
        states, reasons = ballot.state.copy(), list(ballot.reason)
        versions = list(ballot.versions or (ballot.version,) * len(out))
        for row in range(len(out)):
            if out[row]:
                states[row], versions[row] = STATE_CODE[known.state], known.version
                reasons[row] = str(Reason.DEADLINE_MISSED)
            else:
                known = Known(STATES[int(states[row])], versions[row], ballot.weight)
        self._known[ballot.agent] = known
        if not out.any():
            return ballot
        return replace(
            ballot,
            action=np.where(out, Action.ABSTAIN, ballot.action).astype(np.int8),
            confidence=np.where(out, 0.0, ballot.confidence),
            answered=ballot.answered & ~out,
            state=states,
            reason=tuple(reasons),
            present=None,
            versions=tuple(versions),
        )

    def changes(self) -> dict[str, Fields]:
        """The state fields to store, by part."""
        known = [(a.encode(), seal([str(k.state), k.version, k.weight])) for a, k in self._known.items()]
        return {"lateness": [(_ABSENT, seal(sorted(self.absent))), *known], "deadlines": self.safeguard.changes()}

    def restore(self, state: State) -> None:
        """Take up what `changes` wrote. Raises `StateCorruptError`."""
        fields = state.get("lateness", {})
        for agent in self.agents:
            if agent.encode() in fields:
                name, version, weight = unseal(agent, fields[agent.encode()])
                self._known[agent] = Known(AgentState(name), version, weight)
        absent = unseal("absent", fields[_ABSENT]) if _ABSENT in fields else []
        self.absent = frozenset(absent) & frozenset(self.agents)
        self.safeguard.restore(state.get("deadlines", {}))


def _without(ballot: Ballot, out: NDArray[np.bool_]) -> Ballot:
    """The ballot of a canary without these rows."""
    present = np.ones(len(out), np.bool_) if ballot.present is None else ballot.present
    action = np.where(out, Action.ABSTAIN, ballot.action).astype(np.int8)
    return replace(ballot, action=action, answered=ballot.answered & ~out, present=present & ~out)
