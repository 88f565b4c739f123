"""What became of a sabotaged run, told by its streams: who was refused, swapped in and muted, when and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from streams.keys import Keys
from worker.demo.follow import entries
from worker.demo.sabotage import COLLAPSING, REFUSED

KINDS = ("agent_refused", "reload", "reload_refused", "agent_muted", "agent_readmitted", "agent_locked")


@dataclass(frozen=True)
class Turn:
    """A change of one agent, as its event says; `bars` were taken in before it took effect."""

    kind: str
    agent: str
    bars: int
    bar_id: str
    reason: str
    detail: str
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def when(self) -> str:
        if self.bar_id:
            return f"on bar {self.bars:,} ({self.bar_id})"
        return f"after bar {self.bars:,}" if self.bars else "at the start"

    @property
    def in_words(self) -> str:
        """One line: who, when, what, why."""
        if self.kind == "agent_refused":
            return f"{self.agent} {self.when}: {self.reason}"
        if self.kind == "reload":
            before = self.evidence.get("replaces", {}).get("version", "nothing")
            return f"{self.agent} {self.when}: {self.evidence['version']} replaces {before}"
        if self.kind == "agent_muted" and "votes" in self.evidence:
            share = self.evidence.get(self.reason)
            figure = f" at {share:.2f}" if isinstance(share, float) else ""
            return f"{self.agent} {self.when}: {self.reason}{figure} over its last {self.evidence['votes']:,} votes"
        return f"{self.agent} {self.when}: {self.detail or self.reason}"


@dataclass(frozen=True)
class Story:
    """The turns of a run in order, and its signals by status before and from the first mute on."""

    sabotaged: Sequence[str]
    turns: Sequence[Turn]
    before: Mapping[str, int]
    after: Mapping[str, int]

    def first(self, kind: str, agent: str) -> Turn | None:
        return next((turn for turn in self.turns if (turn.kind, turn.agent) == (kind, agent)), None)

    @property
    def missing(self) -> list[str]:
        """What the sabotage should have brought about and has not; none if the guards did their work."""
        expected = (("agent_refused", REFUSED), ("reload", COLLAPSING), ("agent_muted", COLLAPSING))
        return [f"no {kind} of {agent} on the events stream" for kind, agent in expected if not self.first(kind, agent)]

    def as_json(self) -> dict[str, Any]:
        return {
            "sabotaged": list(self.sabotaged),
            "turns": [
                {
                    "kind": turn.kind,
                    "agent": turn.agent,
                    "bars": turn.bars,
                    "bar_id": turn.bar_id,
                    "reason": turn.reason,
                    "detail": turn.detail,
                }
                for turn in self.turns
            ],
            "signals_before_the_mute": dict(self.before),
            "signals_from_the_mute_on": dict(self.after),
        }


def tell(client: redis.Redis, keys: Keys, sabotaged: Sequence[str]) -> Story:
    """Read the events and the signals of a run, and where each event stands among the bars."""
    turns = [_turn(client, keys, event) for event in entries(client, keys.events) if event["kind"] in KINDS]
    muted = next((turn.bar_id for turn in turns if turn.kind == "agent_muted"), "")
    before, after = Counter[str](), Counter[str]()
    counted = before
    for signal in entries(client, keys.signals):
        if signal["bar_id"] == muted:
            counted = after
        counted[signal["status"]] += 1
    return Story(sabotaged, turns, before, after)


def _turn(client: redis.Redis, keys: Keys, event: Mapping[str, Any]) -> Turn:
    evidence, bar = event["evidence"], event["bar_id"]
    if bar:
        place = next((n for n, found in enumerate(_bar_ids(client, keys), 1) if found == bar), 0)
    else:
        last = evidence.get("position", {}).get(keys.bars)
        place = _count_to(client, keys.bars, last) if last else 0
    return Turn(event["kind"], event["agent"], place, bar, event["reason"], event["detail"], evidence)


def _bar_ids(client: redis.Redis, keys: Keys) -> Iterator[str]:
    """Of every accepted bar, in order."""
    return (vector["bar_id"] for vector in entries(client, keys.features))


def _count_to(client: redis.Redis, key: str, last: str) -> int:
    """Entries up to and with the ID `last`."""
    found: Any = client.xrange(key, "-", last)
    return len(found)
