"""What a recording says was decided, by whom and when: read once, before anything is computed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from streams.messages import CANARY, Entry
from streams.recording import Lost, Recorded, Recording, decode
from streams.store import id_tuple

DECIDED_THEN = ("future", "poison")
"""Rejections that the entry alone does not explain: they are taken from the recording."""

VOTES = "votes:"
CONTROL = ":control"
SIGNALS = "signals"
_HEAD = b'{"stream":"'
_STALE = b'"status":"stale"'
_COUNTED = frozenset({"features"})
Progress = Callable[[int], None]
"""Given the number of bars done since the last call."""


@dataclass(frozen=True, slots=True)
class Step:
    """Something that changed the worker between two bars: the kind of its event, whom, and the evidence.

    It took effect behind `after`: each input's last ID before it, or one ID for all of them.
    """

    kind: str
    agent: str
    reason: str
    evidence: Mapping[str, Any]
    after: Mapping[str, tuple[int, int]] | tuple[int, int]

    def is_due(self, entry: Entry) -> bool:
        """Whether `entry` came after it."""
        after = self.after if isinstance(self.after, tuple) else self.after.get(entry.key, (0, 0))
        return id_tuple(entry.id) > after

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands among others."""
        return self.after if isinstance(self.after, tuple) else max(self.after.values(), default=(0, 0))


@dataclass
class Outline:
    """Counts of entries by stream, and every decision that bars and models alone do not explain.

    `left_out` are entries (key, ID) refused for a reason of that moment, `stale` the bars whose signal was,
    `hashes` the SHA-256 of each (agent, version) that was named, `versions` the first of each agent's votes.
    """

    counts: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    left_out: set[tuple[str, str]] = field(default_factory=set)
    stale: set[str] = field(default_factory=set)
    starts: list[Step] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    hashes: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    versions: dict[str, tuple[str | None, str]] = field(default_factory=dict)
    _current: dict[str, bytes] = field(default_factory=dict, repr=False)

    # ------------------------------------------------------------------ one entry

    def take(self, line: bytes) -> None:
        """Note one line. Most say nothing new and are not decoded: nine in ten are told by their bytes."""
        stream = _stream_of(line)
        if stream in _COUNTED or (stream and self._current.get(stream, b"?") in line):
            self.counts[stream] += 1
        elif stream != SIGNALS or _STALE in line:
            self._take(decode(line))
        else:
            self.counts[stream] += 1

    def _take(self, item: Recorded | Lost) -> None:
        stream = item.stream
        if isinstance(item, Lost):
            self.lost[stream] += item.entries
            return
        self.counts[stream] += 1
        if stream.startswith(VOTES):
            self._vote(item)
        elif stream == SIGNALS:
            signal = orjson.loads(item.fields[b"data"])
            if signal["status"] == "stale":
                self.stale.add(signal["bar_id"])
        elif stream == "rejected":
            if item.fields.get(b"reason", b"").decode() in DECIDED_THEN:
                self.left_out.add((item.fields[b"source_key"].decode(), item.fields[b"source_id"].decode()))
        elif stream == "events":
            self._event(orjson.loads(item.fields[b"data"]))

    def _vote(self, item: Recorded) -> None:
        """Follow the version of an agent's votes; a change is a step."""
        vote = orjson.loads(item.fields[b"data"])
        version, agent = vote["version"], item.stream.removeprefix(VOTES)
        self._current[item.stream] = b'"version":' + orjson.dumps(version)
        if agent not in self.versions:
            self.versions[agent] = version, vote["reason"] or ""
            return
        ms, seq = id_tuple(item.id)
        before = (ms, seq - 1) if seq else (ms - 1, 1 << 62)
        self.steps.append(Step("version", agent, vote["reason"] or "", {"version": version}, before))

    def _event(self, event: Mapping[str, Any]) -> None:
        evidence: Mapping[str, Any] = event["evidence"] or {}
        for agent, named in self._named(event, evidence):
            self.hashes[agent.removesuffix(CANARY), named["version"]] = named["sha256"], named.get("file", "")
        if event["kind"] == "gap" and event["reason"] == "lost" and "after" in evidence:
            evidence = {**evidence, "position": {evidence["key"]: evidence["after"]}}
        if "position" not in evidence:
            return
        inputs = {key: at for key, at in evidence["position"].items() if not key.endswith(CONTROL)}
        after = {key: id_tuple(entry_id) for key, entry_id in inputs.items()}
        step = Step(event["kind"], event["agent"], event["reason"], evidence, after)
        if step.kind == "started":
            self.starts.append(step)
        if self.starts[:1] != [step]:
            self.steps.append(step)

    @staticmethod
    def _named(event: Mapping[str, Any], evidence: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
        """The artifacts that an event names, by agent."""
        agents = evidence.get("agents") if event["kind"] == "started" else {event["agent"]: evidence}
        return [(agent, e) for agent, e in (agents or {}).items() if e and e.get("version") and e.get("sha256")]


def _stream_of(line: bytes) -> str:
    """The stream of a line as the recorder writes it, empty where it has to be decoded."""
    if not line.startswith(_HEAD):
        return ""
    end = line.find(b'"', len(_HEAD))
    return "" if b'"lost":' in line else line[len(_HEAD) : end].decode()


def read_outline(recording: Recording, progress: Progress = lambda _: None) -> Outline:
    """Read the whole recording once. Raises `RecordingError` where it is damaged."""
    outline = Outline()
    done = 0
    for block in recording.blocks():
        for line in block:
            outline.take(line)
        progress(outline.counts["bars"] - done)
        done = outline.counts["bars"]
    if not outline.starts and recording.header.get("started"):
        outline.starts.append(Step("started", "", "", recording.header["started"], {}))
    return outline


def steps_in_order(outline: Outline) -> list[Step]:
    """Steps as they took effect, the first start left out. A change of version that another explains does no harm."""
    return sorted(outline.steps, key=lambda step: (step.place, step.kind == "version"))
