"""What a recording says was decided, by whom and when: read once, before anything is computed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from streams.messages import CANARY, Entry
from streams.recording import Lost, Note, Recorded, Recording, RecordingError, decode, key_of
from streams.store import id_tuple
from worker.replay.lines import Line, lines_of, read_lines
from worker.roster import Artifact

DECIDED_THEN = ("future", "poison")
"""Rejections that the entry alone does not explain: they are taken from the recording."""

RULES = 1
"""By which rules a note says that nothing is new: to be raised where an outline begins to look for more."""

VOTES = "votes:"
CONTROL = ":control"
_BARS = b"bars"
_STATUS = b'"status":'
_STALE = b'"stale"'
FEATURES = ":features"
_MISSED = b'"deadline_missed"'
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
    def stage(self) -> str:
        """The stage that started; empty where one process ran them all."""
        return str(self.evidence.get("stage", ""))

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands among others."""
        return self.after if isinstance(self.after, tuple) else max(self.after.values(), default=(0, 0))


@dataclass
class Outline:
    """How many bars there are, of which keys, and every decision that bars and models alone do not explain.

    `inputs` are the keys as lines have them, with what JSON escapes in them.
    `lost` counts by stream what was trimmed before it was recorded, `gaps` are by key the IDs behind which the worker
    went on without entries, and without how many.
    `left_out` are entries (key, ID) refused for a reason of that moment, `stale` the bars whose signal was, `missed`
    the bars that were decided without agents, and which, `artifacts` the last of each (agent, version) that was named
    by its bytes, `versions` the first of each agent's votes.
    """

    bars: int = 0
    inputs: set[bytes] = field(default_factory=set)
    lost: Counter[str] = field(default_factory=Counter)
    gaps: dict[str, list[tuple[tuple[int, int], int]]] = field(default_factory=dict)
    left_out: set[tuple[str, str]] = field(default_factory=set)
    stale: set[str] = field(default_factory=set)
    missed: dict[str, frozenset[str]] = field(default_factory=dict)
    starts: list[Step] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    artifacts: dict[tuple[str, str], Artifact] = field(default_factory=dict)
    versions: dict[str, tuple[str | None, str]] = field(default_factory=dict)
    _ordinary: dict[bytes, bytes] = field(default_factory=dict, repr=False)
    """What an entry of a stream contains where it says nothing new."""

    @property
    def keys(self) -> list[str]:
        """The inputs by their names."""
        return sorted(orjson.loads(b'"%b"' % key) for key in self.inputs)

    # ------------------------------------------------------------------ entries

    def take_note(self, note: Note) -> bool:
        """Take a frame by its note alone, where that tells all: bars, and votes by the versions of before."""
        if note["rules"] != RULES or not note["quiet"]:
            return False
        if any(self._ordinary.get(_votes_of(a)) != _naming(v) for a, v in note["versions"].items()):
            return False
        self.bars += note["bars"]
        self.inputs |= {_escaped(key) for key in note["inputs"]}
        return True

    def take(self, text: bytes, lines: Iterable[Line]) -> None:
        """Note some lines. Most say nothing new and are not decoded: nine in ten are told by their bytes."""
        ordinary = self._ordinary
        for stream, begin, end in lines:
            if stream in ordinary:
                if text.find(ordinary[stream], begin, end) < 0:
                    self.note(decode(text[begin:end]))
            elif stream == _BARS:
                self.bars += 1
                self.inputs.add(key_of(text[begin:end]))
            elif stream not in _NEWS or _NEWS[stream](text, begin, end):
                self.note(decode(text[begin:end]))

    def note(self, item: Recorded | Lost) -> None:
        """Note one entry, or a loss. Raises `RecordingError` for what no worker wrote; strangers append as well."""
        try:
            self._note(item)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise RecordingError(f"{item.key} {item.id}: no worker wrote this entry ({error!r})") from error

    def _note(self, item: Recorded | Lost) -> None:
        stream = item.stream
        if isinstance(item, Lost):
            self.lost[stream] += item.entries
            return
        if stream == "bars":
            self.bars += 1
            self.inputs.add(_escaped(item.key))
        elif stream.startswith(VOTES):
            self._vote(item)
        elif stream == "features":
            self.stale.add(orjson.loads(item.fields[b"data"])["bar_id"])
        elif stream == "signals":
            signal = orjson.loads(item.fields[b"data"])
            if signal["status"] == "stale":
                self.stale.add(signal["bar_id"])
            late = {name for name, vote in signal["votes"].items() if _is_missing(vote)}
            if late:
                self.missed[signal["bar_id"]] = frozenset(late)
        elif stream == "rejected":
            if item.fields.get(b"reason", b"").decode() in DECIDED_THEN:
                self.left_out.add((item.fields[b"source_key"].decode(), item.fields[b"source_id"].decode()))
        elif stream == "events":
            self._event(orjson.loads(item.fields[b"data"]))

    def _vote(self, item: Recorded) -> None:
        """Follow the version of an agent's votes; a change is a step."""
        vote = orjson.loads(item.fields[b"data"])
        version, agent = vote["version"], item.stream.removeprefix(VOTES)
        said = self._ordinary.get(_votes_of(agent))
        self._ordinary[_votes_of(agent)] = _naming(version)
        if agent not in self.versions:
            self.versions[agent] = version, vote["reason"] or ""
        if said in (None, _naming(version)):
            return
        ms, seq = id_tuple(item.id)
        before = (ms, seq - 1) if seq else (ms - 1, 1 << 62)
        self.steps.append(Step("version", agent, vote["reason"] or "", {"version": version}, before))

    def _event(self, event: Mapping[str, Any]) -> None:
        evidence: Mapping[str, Any] = event["evidence"] or {}
        if event["kind"] == "started":
            agents = {agent: self._completed(agent, named or {}) for agent, named in evidence["agents"].items()}
            evidence = {**evidence, "agents": agents}
        for agent, named in self._named(event, evidence):
            self.artifacts[agent.removesuffix(CANARY), named["version"]] = artifact_of(named)
        if event["kind"] == "gap" and event["reason"] == "lost" and "after" in evidence:
            evidence = {**evidence, "position": {evidence["key"]: evidence["after"]}}
            self.gaps.setdefault(evidence["key"], []).append((id_tuple(evidence["after"]), evidence["lost"]))
        if "position" not in evidence:
            return
        inputs = {key: at for key, at in evidence["position"].items() if not key.endswith(CONTROL)}
        after: dict[str, tuple[int, int]] | tuple[int, int] = {k: id_tuple(v) for k, v in inputs.items()}
        # A stage that reads vectors tells its place by their IDs, which are those of the bars where one key is read.
        read = [key for key in inputs if key.endswith(FEATURES)]
        if read or str(evidence.get("stage", FEATURES[1:])) != FEATURES[1:]:
            after = id_tuple(inputs[read[0]]) if read else (0, 0)
        step = Step(event["kind"], event["agent"], event["reason"], evidence, after)
        if step.kind == "started":
            is_first = all(step.stage != other.stage for other in self.starts)
            self.starts.append(step)
            if is_first and (step.stage or len(self.starts) == 1):
                return
        self.steps.append(step)

    @property
    def split(self) -> bool:
        """Whether the stages ran as processes of their own."""
        return any(start.stage for start in self.starts)

    @property
    def first_start(self) -> Step | None:
        """The first start; of stages the first one of each, together."""
        if not self.split:
            return self.starts[0] if self.starts else None
        evidence: dict[str, Any] = {}
        for start in reversed(self.starts):  # the first of each stage comes last, and stands
            agents = {**evidence.get("agents", {}), **start.evidence["agents"]}
            evidence = {**evidence, **start.evidence, "agents": agents}
        return Step("started", "", "", evidence, {})

    def _completed(self, agent: str, named: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a start names, with what the events before it say of the same file: early starts named no digest."""
        known = self.artifacts.get((agent, named.get("version", "")))
        return {"digest": known.digest, **named} if known and known.sha256 == named.get("sha256") else named

    def artifact(self, agent: str, version: str) -> Artifact:
        """What was last named by this version, as far as it was."""
        return self.artifacts.get((agent, version), Artifact("", version, ""))

    @staticmethod
    def _named(event: Mapping[str, Any], evidence: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
        """The artifacts that an event names, by agent."""
        agents = evidence.get("agents") if event["kind"] == "started" else {event["agent"]: evidence}
        return [(agent, e) for agent, e in (agents or {}).items() if e and e.get("version") and e.get("sha256")]


def artifact_of(named: Mapping[str, Any]) -> Artifact:
    """The artifact that the evidence of an event names; one of a version alone has no hash."""
    return Artifact(named.get("file", ""), named["version"], named.get("sha256", ""), named.get("digest", ""))


def note_of(text: bytes) -> Note | None:
    """What to note of a frame's lines, so that an outline need not read it where it says nothing new.

    None where the lines are not ours: anybody can append to a stream, and a recorder records it.
    """
    found = Outline()
    try:
        found.take(text, lines_of(text, {}))
        keys = found.keys
    except Exception:  # noqa: BLE001 - whoever reads the frame meets it and tells
        return None
    return {
        "rules": RULES,
        "bars": found.bars,
        "inputs": keys,
        "versions": {agent: version for agent, (version, _) in found.versions.items()},
        "quiet": replace(found, bars=0, inputs=set(), versions={}, _ordinary={}) == Outline(),
    }


def _escaped(key: str) -> bytes:
    """As a line has it."""
    return orjson.dumps(key)[1:-1]


def _votes_of(agent: str) -> bytes:
    return f"{VOTES}{agent}".encode()


def _naming(version: str | None) -> bytes:
    """What a vote contains that was given by this version."""
    return b'"version":' + orjson.dumps(version)


def _is_flagged(text: bytes, begin: int, end: int) -> bool:
    """Whether the line of a vector says that its bar was stale; its flags stand at its end."""
    return text.endswith(b"]}}", begin, end) and text.find(_STALE, text.rfind(b"[", begin, end), end) > 0


def _is_incomplete(text: bytes, begin: int, end: int) -> bool:
    """Whether the line of a signal may be that of a stale bar, or of one without some agent's vote.

    The status stands before the votes.
    """
    status = text.find(_STATUS, begin, end) + len(_STATUS)
    return text.startswith(_STALE, status) or text.find(_MISSED, begin, end) > 0


_NEWS = {b"features": _is_flagged, b"signals": _is_incomplete}
"""Of streams whose lines mostly say nothing new, which do."""


def _is_missing(vote: Mapping[str, Any]) -> bool:
    """Whether a signal was decided without this vote; one that is muted for that has an action."""
    return bool(vote["action"] == "ABSTAIN" and vote["reason"] == "deadline_missed")


def read_outline(recording: Recording) -> Outline:
    """Read the recording once, but for what its notes tell. Raises `RecordingError` where what it reads is damaged."""
    outline = Outline()
    for text, lines in read_lines(recording, outline.take_note):
        outline.take(text, lines)
    if not outline.starts and recording.header.get("started"):
        outline.starts.append(Step("started", "", "", recording.header["started"], {}))
    return outline


def steps_in_order(outline: Outline) -> list[Step]:
    """Steps as they took effect, the first start left out. A change of version that another explains does no harm."""
    return sorted(outline.steps, key=lambda step: (step.place, step.kind == "version"))
