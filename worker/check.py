"""`quartet check`: what would happen, said from reading alone. Nothing is consumed, written or owned.

The end of each input goes through the worker's own intake, so that what is said here of formats, gaps
and rejects is what would happen.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import redis

from streams.formats import FormatReader, recognise
from streams.inputs import Inputs
from streams.keys import CHAIN, FEATURES, Keys
from streams.messages import Entry
from streams.redis import RedisStore, find_keys
from streams.store import Position
from streams.validation import BadBarError, interval_ms
from worker.intake import Accepted, Intake
from worker.settings import Settings

TAIL = 10_000
"""Entries read from the end of each input."""

SHOWN = 5
DAY_MS = 86_400_000
_SET_BY_WIDTH = {8: "v2", 49: "v6"}


@dataclass(frozen=True)
class StreamReport:
    """One input key. Counts are of the entries that were read from its end."""

    key: str
    length: int = 0
    read: int = 0
    formats: Mapping[str, int] = field(default_factory=dict)
    outcomes: Mapping[str, int] = field(default_factory=dict)
    rejects: Mapping[str, int] = field(default_factory=dict)
    example: str = ""
    series: int = 0
    longest: int = 0
    """Bars of the longest series since its last warm-up began, so far as the entries read tell."""
    last_bar: str = ""
    last_bar_age_s: float | None = None
    gaps: int = 0
    missing_bars: int = 0
    healthy: bool = True
    entries_per_day: int | None = None
    bytes_per_day: int | None = None
    trimmed: bool = False
    waiting: int | None = None
    """Entries that the committed position has not reached; None where nothing was committed."""


@dataclass(frozen=True)
class AgentReport:
    """One configured agent: its selected artifact, and whether it would vote on what is there."""

    agent: str
    would_vote: bool
    why: str
    file: str = ""
    bars_needed: int = 0


@dataclass(frozen=True)
class Report:
    """The whole answer; `line` is the last one, and `notes` what does not stand in the way."""

    ready: bool
    line: str
    would_vote: int
    configured: int
    quorum: int
    streams: Sequence[StreamReport]
    agents: Sequence[AgentReport]
    notes: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def examine_streams(
    client: redis.Redis, settings: Settings, reader: FormatReader, now_ms: int
) -> tuple[list[StreamReport], list[str]]:
    """Every input as the worker would find it, and the keys that a pattern matches in vain."""
    inputs = Inputs(settings.input_keys, settings.namespace)
    skipped = inputs.refresh(lambda pattern: find_keys(client, pattern)).skipped
    keys = Keys(settings.namespace)
    store = RedisStore(client, keys, FEATURES if client.exists(keys.owner(FEATURES)) else CHAIN)
    position = store.load(()).position
    reports = [examine_stream(store, key, position, settings, reader, now_ms) for key in inputs.keys]
    notes = [f"{key} is a {kind}, not a stream: it would not be read" for key, kind in skipped.items()]
    return reports, [*notes[:SHOWN], *([f"and {len(notes) - SHOWN} more such keys"] if len(notes) > SHOWN else [])]


def examine_stream(
    store: RedisStore, key: str, position: Position, settings: Settings, reader: FormatReader, now_ms: int
) -> StreamReport:
    """The end of one input, through an intake of its own."""
    from worker.assembly import limits_of  # noqa: PLC0415  it imports what makes a worker

    if not store.client.exists(key):
        return StreamReport(key)
    facts = store.read(Position(), [key], 1).facts[key]
    tail = [Entry(key, entry_id, fields) for entry_id, fields in reversed(store.tail(key, "+", TAIL))]
    intake = Intake(limits_of(settings), reader=reader)
    accepted = intake.accept(tail, now_ms)
    per_day = _per_day(tail)
    size = store.client.memory_usage(key, samples=20) or 0
    known = position.inputs.get(key)
    reached = max(facts.length, known.consumed if known else 0)  # the state holds what was read, also if trimmed since
    bars = _bars(accepted, reached / max(1, len(tail)), now_ms)
    return StreamReport(
        key,
        length=facts.length,
        read=len(tail),
        formats=_formats(tail),
        outcomes=dict(accepted.outcomes),
        rejects=dict(Counter(reject.reason for reject in accepted.rejects)),
        example=accepted.rejects[-1].detail if accepted.rejects else "",
        **bars,
        healthy=intake.health.healthy,
        entries_per_day=per_day,
        bytes_per_day=None if per_day is None else round(per_day * size / max(1, facts.length)),
        trimmed=facts.added > facts.length,
        waiting=None if known is None else max(0, facts.added - known.consumed),
    )


def _formats(entries: Sequence[Entry]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for entry in entries:
        try:
            name, raws = recognise(entry)
        except BadBarError:
            continue  # counted among the rejects, with its reason
        found[name if raws else f"{name}, other messages"] += 1
    return dict(found.most_common())


def _bars(accepted: Accepted, share: float, now_ms: int) -> dict[str, Any]:
    """What the accepted bars say; `share` is how many times the tail all that counts is."""
    if not accepted.bars:
        return {}
    last = accepted.bars[-1]
    gaps = [event.evidence["missing"] for event in accepted.events if event.kind == "gap"]
    lengths = _lengths(accepted, share)
    return {
        "series": len(lengths),
        "longest": max(lengths.values()),
        "last_bar": last.bar_id,
        "last_bar_age_s": round((now_ms - last.ts - interval_ms(last.interval)) / 1000, 1),
        "gaps": len(gaps),
        "missing_bars": sum(gaps),
    }


def _lengths(accepted: Accepted, share: float) -> dict[tuple[str, str], int]:
    """Bars of each series since its last warm-up began: counted where the tail has that, else scaled by `share`."""
    counts: Counter[tuple[str, str]] = Counter()
    restarted = set()
    for bar, restart in zip(accepted.bars, accepted.restart, strict=True):
        series = (bar.symbol, bar.interval)
        if restart:
            restarted.add(series)
            counts[series] = 0
        counts[series] += 1
    return {series: n if series in restarted else round(n * share) for series, n in counts.items()}


def _per_day(entries: Sequence[Entry]) -> int | None:
    """Entries a day, from the times in their IDs; None where these tell nothing."""
    if len(entries) < 2:
        return None
    first, last = (int(entry.id.partition("-")[0]) for entry in (entries[0], entries[-1]))
    return round((len(entries) - 1) * DAY_MS / (last - first)) if last - first >= 1000 else None


def examine_agents(settings: Settings, bars: int) -> list[AgentReport]:
    """Load and probe what is in the models folder; `bars` is how many the longest series has."""
    from agents.artifacts import inspect  # noqa: PLC0415
    from worker.assembly import load_options, use_one_thread_a_model  # noqa: PLC0415

    use_one_thread_a_model()
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in inspect(settings.models, load_options(settings)):
        rows[row["agent"]].append(row)
    return [_agent(name, rows[name], settings, bars) for name in settings.agents]


def _agent(name: str, rows: Sequence[Mapping[str, Any]], settings: Settings, bars: int) -> AgentReport:
    selected = next((row for row in rows if row["selected"]), None)
    if selected is None:
        return AgentReport(name, would_vote=False, why=f"no_artifact in {settings.models}")
    file = str(selected["file"])
    if selected["state"] == "refused":
        return AgentReport(name, would_vote=False, why=f"{selected['reason']}: {selected['detail']}", file=file)
    needed = _bars_needed(selected["input_shape"], settings)
    if bars < needed:
        return AgentReport(name, False, f"insufficient_history: {bars} of {needed} bars", file, needed)
    return AgentReport(name, True, str(selected["detail"]), file, needed)


def _bars_needed(shape: Sequence[int], settings: Settings) -> int:
    """The warm-up of the feature set, and for a sequence model the rest of its window."""
    width = shape[-1] if shape else 0
    return settings.warmup_bars[_SET_BY_WIDTH.get(width, "v3")] + (shape[0] - 1 if len(shape) == 2 else 0)


def judge(
    settings: Settings, streams: Sequence[StreamReport], agents: Sequence[AgentReport], notes: Sequence[str]
) -> Report:
    """READY, or the one line that mends what stands first in the way."""
    voting = sum(agent.would_vote for agent in agents)
    problem = _problem_of_feed(settings, streams) or _problem_of_agents(settings, agents, voting)
    counts = f"{voting} of {len(agents)} would vote"
    line = f"NOT READY: {problem}" if problem else f"READY: {counts}"
    more = [*notes, *(note for stream in streams for note in _notes(stream))]
    return Report(problem is None, line, voting, len(agents), settings.quorum, streams, agents, more)


def _problem_of_feed(settings: Settings, streams: Sequence[StreamReport]) -> str | None:
    names = ", ".join(settings.input_keys)
    if not any(stream.length for stream in streams):
        return f"nothing is in {names}: start `quartet feed`, or name the key of your bars with --bars"
    if not any(stream.outcomes.get("accepted") for stream in streams):
        rejected = next((stream for stream in streams if stream.rejects), None)
        if rejected is not None:
            return f"no entry of {rejected.key} is a bar: {rejected.example}"
        return (
            f"no entry of {names} is a closed bar: if its producer never says closed, set inputs.<key>.closed "
            "to next or always (docs/feeds.md)"
        )
    sick = next((stream for stream in streams if not stream.healthy), None)
    if sick is not None:
        worst = max(sick.rejects, key=lambda reason: sick.rejects[reason])
        return f"over 5 % of the last entries of {sick.key} are rejected, mostly {worst}: {sick.example}"
    return None


def _problem_of_agents(settings: Settings, agents: Sequence[AgentReport], voting: int) -> str | None:
    if voting >= settings.quorum:
        return None
    counts = f"{voting} of {len(agents)} would vote, the quorum is {settings.quorum}"
    able = sum(agent.bars_needed > 0 for agent in agents)
    if able >= settings.quorum:
        needed = sorted(agent.bars_needed for agent in agents if agent.bars_needed)[settings.quorum - 1]
        return f"{counts}: a series needs {needed} bars; wait for them, or let `quartet feed` fetch history"
    if able == 0 and all(agent.why.startswith("no_artifact") for agent in agents):
        return f"{counts}: train models with `quartet train --bars FILE --agent all --models {settings.models}`"
    first = next(agent for agent in agents if not agent.bars_needed)
    return f"{counts}: {first.agent}: {first.why}; see `quartet models list --models {settings.models}`"


def _notes(stream: StreamReport) -> list[str]:
    """What a person should know of a stream that works."""
    notes = []
    if stream.last_bar_age_s is not None:
        step_s = interval_ms(stream.last_bar.split("|")[1]) / 1000
        if stream.last_bar_age_s > 3 * step_s:
            notes.append(
                f"{stream.key}: the last bar ended {stream.last_bar_age_s:.0f} s ago; /readyz wants a fresh one"
            )
    if stream.bytes_per_day and not stream.trimmed:
        grows = f"{stream.bytes_per_day / 2**20:.1f} MiB a day"
        notes.append(f"{stream.key}: nothing trims it and it grows {grows}: publish with MAXLEN, or feed with --maxlen")
    return notes
