"""For your own tests: quartet in memory, without a server, with a settable clock, in one call.

Put `pytest_plugins = ["worker.testing"]` into your `conftest.py` and take the fixture `quartet`, or
make a `Quartet` yourself. `docs/testing-your-strategy.md` has the example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest

from agents.artifacts import load_agent
from streams.keys import Keys
from streams.memory import MemoryStore, MemoryStreams
from streams.messages import Bar
from streams.redis import with_baseline
from streams.validation import interval_ms
from worker.assembly import load_options, pipeline_factory, use_one_thread_a_model
from worker.encoding import commit_of
from worker.errors import UsageError
from worker.pipeline import Pipeline
from worker.replay.publish import read_entries
from worker.settings import Settings
from worker.voting import Seat

BarLike = Bar | Mapping[str, Any]


@dataclass
class Quartet:
    """The whole chain over streams in memory. Settings are those of `quartet run`, by keyword.

    `streams` is what a strategy reads in production, entry by entry; `signals`, `votes` and `features`
    are the same as plain values. Adding bars is cheap, `run` computes what was added since.
    """

    settings: Settings
    streams: MemoryStreams = field(default_factory=MemoryStreams)

    def __post_init__(self) -> None:
        self.keys = Keys(self.settings.namespace)
        self._store = MemoryStore(self.streams)
        self._pipeline: Pipeline | None = None

    def add(self, bars: Iterable[BarLike] | Path | str) -> Quartet:
        """Publish bars: messages, mappings with the fields of a bar, or a file (recording, csv, parquet).

        Each arrives at the close of its bar: that is the clock. Raises what reading the file raises.
        """
        key = self.settings.input_keys[0]
        if isinstance(bars, Path | str):
            for timed in read_entries(Path(bars)):
                self._put(key, timed.closes_ms, {_bytes(k): _bytes(v) for k, v in timed.fields.items()})
            return self
        for bar in bars:
            plain = _plain(bar)
            closes_ms = int(plain["ts"]) + interval_ms(str(plain.get("interval", "1m")))
            self._put(key, closes_ms, {name.encode(): str(value).encode() for name, value in plain.items()})
        return self

    def _put(self, key: str, closes_ms: int | None, fields: Mapping[bytes, bytes]) -> None:
        self.streams.now_ms = max(self.streams.now_ms, closes_ms or 0)
        self.streams.add(key, fields)

    def run(self, bars: Iterable[BarLike] | Path | str = ()) -> Quartet:
        """Add `bars`, then compute everything that waits. Raises `UsageError` where no model can vote."""
        self.add(bars)
        pipeline = self._pipeline = self._pipeline or self._make()
        keys = self.settings.input_keys
        while True:
            batch = self._store.read(self._store.position, keys, self.settings.batch_size)
            if not batch.entries:
                return self
            result = pipeline.process(batch.entries, self.streams.now_ms)
            position = with_baseline(self._store.position, batch.facts)
            position = position.advanced(batch.entries, pipeline.intake.ids.last)
            self._store.commit(commit_of(self.keys, result, position))

    def restart(self) -> Quartet:
        """Begin anew over the committed state, as a worker does that was stopped or killed."""
        fresh = self._make()
        fresh.restore(self._store.state)
        fresh.intake.ids.last = self._store.position.last_output_id
        self.close()
        self._pipeline = fresh
        return self

    def _make(self) -> Pipeline:
        use_one_thread_a_model()
        options = load_options(self.settings)
        loadings = [load_agent(self.settings.models, agent, options) for agent in self.settings.agents]
        if all(loading.model is None for loading in loadings):
            why = "; ".join(f"{x.agent}: {x.refusal.reason}" for x in loadings if x.refusal)
            raise UsageError(f"no agent can vote with what is in {self.settings.models} ({why}); train models there")
        weights = self.settings.weights
        return pipeline_factory(self.settings)([Seat(x.agent, weights[x.agent], x.model, x.refusal) for x in loadings])

    def close(self) -> None:
        """End the threads of the models."""
        if self._pipeline is not None:
            self._pipeline.voting.close()

    # ------------------------------------------------------------------ what came out

    @property
    def signals(self) -> list[dict[str, Any]]:
        """Every signal, as on the stream."""
        return self._messages(self.keys.signals)

    @property
    def features(self) -> list[dict[str, Any]]:
        return self._messages(self.keys.features)

    @property
    def events(self) -> list[dict[str, Any]]:
        return self._messages(self.keys.events)

    def votes(self, agent: str) -> list[dict[str, Any]]:
        return self._messages(self.keys.votes(agent))

    @property
    def actions(self) -> list[str]:
        """The action of every signal."""
        return [signal["action"] for signal in self.signals]

    @property
    def rejected(self) -> list[dict[str, str]]:
        """What was refused, with its reason."""
        return [
            {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
            for _, fields in self.streams.after(self.keys.rejected, "0-0")
        ]

    def _messages(self, key: str) -> list[dict[str, Any]]:
        return [orjson.loads(fields[b"data"]) for _, fields in self.streams.after(key, "0-0")]


def _plain(bar: BarLike) -> Mapping[str, Any]:
    if isinstance(bar, Bar):
        return {
            name: getattr(bar, name) for name in ("symbol", "ts", "interval", "open", "high", "low", "close", "volume")
        }
    return bar


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


@contextlib.contextmanager
def in_memory(models: Path | str, **settings: Any) -> Iterator[Quartet]:
    """A `Quartet` over the artifacts in `models`; further settings by keyword, as `quorum=2`."""
    made = Quartet(Settings(models=Path(models), **settings))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def quartet() -> Iterator[Any]:
    """Call it with the folder of models, and settings by keyword: it gives a `Quartet`, closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda models, **settings: stack.enter_context(in_memory(models, **settings))


__all__: Sequence[str] = ("Quartet", "in_memory", "quartet")
