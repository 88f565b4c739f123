"""`quartet replay FILE --verify`: the pipeline over a recording, compared with what was recorded."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streams.messages import Bar
from streams.recording import Recording
from worker.builds import build
from worker.encoding import feature_messages, signal_messages, vote_messages
from worker.errors import CheckFailed
from worker.pipeline import Result
from worker.replay.chain import Chain, check_beginning
from worker.replay.compare import Comparison, Difference, Place
from worker.replay.outline import VOTES, Outline, Progress, read_outline
from worker.replay.source import Source
from worker.settings import Settings

TOLERANCE = 1e-5
"""Relative or absolute, where the recording comes from another build."""

TURN_S = 1e-4
"""After how long Python code gives way to another thread that waits; 5 ms unless set."""

LATEST = 65_536
"""How many vectors ahead one of another key is looked for that was taken later than its entry's ID says."""

FEATURES, SIGNALS = "features", "signals"


@dataclass
class Verdict:
    """What a verification came to. `missing` are the models that were not at hand: (agent, version) to why.

    `loading_s` and `models_s` are seconds, among `seconds`, that the models took to load and to compute.
    """

    bars: int
    comparison: Comparison
    missing: Mapping[tuple[str, str], str]
    notes: list[str]
    leftover: Mapping[str, int]
    seconds: float
    loading_s: float
    models_s: float
    other_build: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether everything that could be compared is equal."""
        return not self.comparison.differences and not self.leftover

    @property
    def empty(self) -> bool:
        """Whether no recorded output was compared at all."""
        return not self.comparison.compared.total()

    @property
    def ok(self) -> bool:
        """Whether everything was compared, and is equal."""
        return self.same and not self.missing and not self.empty

    def as_json(self) -> dict[str, Any]:
        found = self.comparison
        return {
            "verified": self.ok,
            "bars": self.bars,
            "compared": dict(found.compared),
            "differing": {stream: n for stream, n in found.differing.items() if n},
            "differences": found.differences,
            "first": found.first.as_json() if found.first else None,
            "first_of": {stream: one.as_json() for stream, one in found.firsts.items()},
            "missing_models": [
                {"agent": agent, "version": version, "detail": why} for (agent, version), why in self.missing.items()
            ],
            "not_recorded_yet": {stream: n for stream, n in found.unrecorded.items() if n},
            "only_recorded": dict(self.leftover),
            "tolerance": found.tolerance,
            "other_build": self.other_build,
            "notes": self.notes,
            "seconds": round(self.seconds, 3),
            "loading_seconds": round(self.loading_s, 3),
            "models_seconds": round(self.models_s, 3),
        }


@dataclass
class Clock:
    """Seconds in which any model computed, several at once counted once."""

    models_s: float = 0.0
    _computing: int = 0
    _since: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if not stage.startswith("agent:"):
            yield
            return
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, models: int) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._computing:
                self.models_s += now - self._since
            self._computing += models
            self._since = now


def verify(
    path: Path,
    settings: Settings,
    *,
    batch_size: int | None = None,
    restart_every: int | None = None,
    progress: Progress = lambda _: None,
    total: Progress = lambda _: None,
) -> Verdict:
    """Compute a recording again and compare. The result depends on neither batches nor restarts.

    Raises `RecordingError` where the file is damaged and `CheckFailed` where it does not hold every bar, or not in the
    order in which the worker took them.
    """
    began = time.perf_counter()
    recording = Recording(path)
    outline = read_outline(recording)
    check_beginning(recording.header, outline)
    total(outline.bars)
    clock = Clock()
    others = _other_build(outline)
    comparison = Comparison(TOLERANCE if others else 0.0)
    source = Source(recording)
    loading = time.perf_counter()
    chain = Chain(settings, outline, source, restart_every)
    loading_s = time.perf_counter() - loading
    try:
        with short_turns():
            bars = _run(chain, comparison, clock, batch_size or settings.batch_size, progress)
        if not outline.split:  # one commit holds a bar's entries of every stream
            comparison.finish()
        leftover = source.left()
    finally:
        chain.close()
    notes = list(chain.notes)
    if recording.cut:
        notes.append(f"the recording ends in an unfinished frame of {recording.cut} bytes, which is left out")
    return Verdict(
        bars=bars,
        comparison=comparison,
        missing=chain.shelf.missing,
        notes=notes,
        leftover=leftover,
        seconds=time.perf_counter() - began,
        loading_s=loading_s,
        models_s=clock.models_s,
        other_build=others,
    )


@contextmanager
def short_turns() -> Iterator[None]:
    """Threads give way to each other soon: a model waits for its turn between any two of its operations."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _run(chain: Chain, comparison: Comparison, clock: Clock, batch_size: int, progress: Progress) -> int:
    for result, recorded in chain.run(batch_size, clock):
        if len(chain.outline.inputs) > 1 and not comparison.differences:
            check_order(result.accepted.bars, chain.source)
        comparison.take(compare_batch(comparison, chain.source, result, recorded), len(result.accepted))
        progress(sum(result.accepted.outcomes.values()))
    return comparison.bars


def compare_batch(
    comparison: Comparison, source: Source, result: Result, recorded: frozenset[str]
) -> list[tuple[Place, Difference]]:
    """The differences of one batch. Votes that were taken over are not compared with themselves."""
    voted: Sequence[int] = result.vectors.index.tolist()
    everyone = range(len(result.accepted))
    open_ended = bool(recorded)
    found = comparison.compare(FEATURES, 0, everyone, feature_messages(result.vectors), source, open_ended=open_ended)
    for rank, ballot in enumerate(result.ballots, start=1):
        if ballot.agent not in recorded:
            rows = [voted[row] for row in ballot.rows]
            messages = vote_messages(result.voted_bars, ballot)
            found += comparison.compare(VOTES + ballot.agent, rank, rows, messages, source, open_ended=False)
    last = len(result.ballots) + 1
    return found + comparison.compare(SIGNALS, last, voted, signal_messages(result), source, open_ended=False)


def check_order(bars: Sequence[Bar], source: Source) -> None:
    """Raise `CheckFailed` where the worker took the bars of several keys in another order than by their IDs.

    Its order shows in the vectors that come next. A vector that is absent or too many is another matter.
    """
    computed = [bar.bar_id for bar in bars]
    recorded = source.bar_ids(FEATURES, len(computed))
    pairs = enumerate(zip(computed, recorded, strict=False))
    place, (here, there) = next(((n, pair) for n, pair in pairs if pair[0] != pair[1]), (0, ("", "")))
    if here == there or there in computed[:place] or here not in source.bar_ids(FEATURES, LATEST):
        return
    raise CheckFailed(
        f"the worker took {there} before {here}, though its entry has the later ID: an entry that came late, or a key "
        "that was found late, behind what other keys had brought. What order it took the entries of several keys in is "
        "not recorded: this recording can be replayed, but not verified"
    )


def _other_build(outline: Outline) -> list[str]:
    """What differs between the build that recorded and this one; nothing where they compute the same bits."""
    now = build()
    builds = [(step.evidence.get("build") or {}, bool(step.stage)) for step in outline.starts]
    if not builds:
        return ["the build that recorded is not known"]
    # A stage without models does not say what only they depend on.
    return sorted(
        {
            f"{name} {then.get(name, 'absent')}, here {now.get(name, 'absent')}"
            for then, of_stage in builds
            for name in (then if of_stage else {**then, **now})
            if then.get(name) != now.get(name)
        }
    )
