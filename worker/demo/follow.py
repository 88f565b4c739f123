"""Looking at a running worker from outside, as any operator could: its streams, `/metrics`, `/readyz`."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import redis
from prometheus_client.parser import text_string_to_metric_families

from streams.keys import Keys
from streams.messages import AGENTS, Action, Reason, Status
from worker.errors import Unavailable

HTTP_TIMEOUT_S = 10.0
_PAGE = 1_000
COUNTS = ("configured", "loaded", "voting")


@dataclass(frozen=True)
class AgentView:
    """One agent: what it is now, its votes so far by action, and its abstentions by reason."""

    agent: str
    state: str
    reason: str = ""
    detail: str = ""
    version: str = ""
    votes: Mapping[str, int] = field(default_factory=dict)
    abstentions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """How things stand. `bars` are the worker's outcomes, `signals` count by action and status.

    `last` holds the newest signal of each symbol, newest first; `lengths` the entries of each stream.
    """

    agents: Sequence[AgentView] = ()
    bars: Mapping[str, int] = field(default_factory=dict)
    signals: Mapping[tuple[str, str], int] = field(default_factory=dict)
    last: Sequence[Mapping[str, Any]] = ()
    lengths: Mapping[str, int] = field(default_factory=dict)
    scrape: str = ""

    @property
    def consumed(self) -> int:
        return sum(self.bars.values())

    @property
    def counts(self) -> dict[str, str]:
        """Configured, loaded and voting agents in the newest signals; `2 to 4` where the symbols differ."""
        return {kind: _spread([signal[kind] for signal in self.last]) for kind in COUNTS}

    @property
    def headline(self) -> str:
        """`4 configured, 4 loaded, 4 voting`, as the newest signals say it."""
        return ", ".join(f"{n} {kind}" for kind, n in self.counts.items()) if self.last else "no signal yet"


def _spread(numbers: Sequence[int]) -> str:
    low, high = min(numbers, default=0), max(numbers, default=0)
    return str(low) if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class Observer:
    """Reads one worker's streams over `client` and its HTTP server at `url`."""

    client: redis.Redis
    keys: Keys
    url: str
    symbols: int

    def look(self) -> View:
        """The state of things now, cheap enough to ask several times a second."""
        scrape, ready = self._get("/metrics").decode(), orjson.loads(self._get("/readyz"))
        samples = samples_of(scrape)
        return View(
            agents=[_agent(name, facts, samples) for name, facts in ready["agents"].items()],
            bars={labels["outcome"]: int(n) for labels, n in samples.get("quartet_bars_total", ())},
            signals={(x["action"], x["status"]): int(n) for x, n in samples.get("quartet_signals_total", ())},
            last=self._last_signals(),
            lengths={name: self._length(key) for name, key in _streams(self.keys).items()},
            scrape=scrape,
        )

    def first_bar_ms(self) -> int:
        """When the first bar was published, by the server's clock."""
        reply: Any = self.client.xrange(self.keys.bars, count=1)
        return int(reply[0][0].partition(b"-")[0])

    def _length(self, key: str) -> int:
        return int(self.client.xlen(key))

    def _last_signals(self) -> list[dict[str, Any]]:
        reply: Any = self.client.xrevrange(self.keys.signals, count=2 * self.symbols)
        newest: dict[str, dict[str, Any]] = {}
        for _, fields in reply:
            signal = orjson.loads(fields[b"data"])
            newest.setdefault(signal["symbol"], signal)
        return list(newest.values())

    def _get(self, path: str) -> bytes:
        try:
            with urllib.request.urlopen(self.url + path, timeout=HTTP_TIMEOUT_S) as answer:  # noqa: S310  loopback
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            if error.code == 503:  # not ready yet, and the body says why
                return error.read()
            raise
        except OSError as error:
            raise Unavailable(f"the worker does not answer at {self.url}{path}: {error}") from None


def _agent(name: str, facts: Mapping[str, str], samples: Mapping[str, Any]) -> AgentView:
    def counted(metric: str, label: str) -> dict[str, int]:
        found = samples.get(f"quartet_agent_{metric}_total", ())
        return {labels[label]: int(n) for labels, n in found if labels["agent"] == name}

    return AgentView(
        name,
        facts["state"],
        facts.get("reason", ""),
        facts.get("detail", ""),
        facts.get("version", ""),
        counted("votes", "action"),
        {reason: n for reason, n in counted("abstentions", "reason").items() if n},
    )


def _streams(keys: Keys) -> dict[str, str]:
    """Every stream that is counted, by a short name."""
    return {
        "bars": keys.bars,
        "features": keys.features,
        **{f"votes:{agent}": keys.votes(agent) for agent in AGENTS},
        "signals": keys.signals,
        "rejected": keys.rejected,
    }


def samples_of(scrape: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Sample name to its labels and values, of a text exposition."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(scrape):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def entries(client: redis.Redis, key: str) -> Iterator[dict[str, Any]]:
    """Every message of an output stream, decoded, in order."""
    start = "-"
    while True:
        page: Any = client.xrange(key, start, "+", count=_PAGE)
        for _, fields in page:
            yield orjson.loads(fields[b"data"])
        if len(page) < _PAGE:
            return
        start = "(" + page[-1][0].decode()


@dataclass(frozen=True)
class Tally:
    """What lies on the streams, counted entry by entry."""

    bars: int
    features: int
    rejected: int
    signals: Mapping[tuple[str, str], int]
    votes: Mapping[str, Mapping[str, int]]
    abstentions: Mapping[str, Mapping[str, int]]

    def differences(self, view: View) -> list[str]:
        """Where the worker's metrics say something else than the streams hold; none if they agree."""
        pairs = [
            ("bars", self.bars, view.consumed),
            ("accepted bars", self.features, view.bars.get("accepted", 0)),
            ("rejected entries", self.rejected, view.bars.get("rejected", 0)),
            *((f"signals {a} {s}", self.signals.get((a, s), 0), view.signals.get((a, s), 0)) for a, s in _kinds()),
            *(
                (f"votes of {x.agent} {a.name}", self.votes[x.agent].get(a.name, 0), x.votes.get(a.name, 0))
                for x in view.agents
                for a in Action
            ),
            *(
                (f"abstentions of {x.agent} {r}", self.abstentions[x.agent].get(r, 0), x.abstentions.get(r, 0))
                for x in view.agents
                for r in Reason
            ),
        ]
        return [f"{what}: {held} on the streams, {said} in the metrics" for what, held, said in pairs if held != said]


def _kinds() -> list[tuple[str, str]]:
    return [(action.name, str(status)) for action in Action for status in Status]


def tally(client: redis.Redis, keys: Keys) -> Tally:
    """Count every entry of every stream."""
    votes: dict[str, Counter[str]] = {}
    abstentions: dict[str, Counter[str]] = {}
    for agent in AGENTS:
        cast = [(vote["action"], vote["reason"]) for vote in entries(client, keys.votes(agent))]
        votes[agent] = Counter(action for action, _ in cast)
        abstentions[agent] = Counter(reason for action, reason in cast if action == Action.ABSTAIN.name)
    return Tally(
        bars=int(client.xlen(keys.bars)),
        features=sum(1 for _ in entries(client, keys.features)),
        rejected=int(client.xlen(keys.rejected)),
        signals=Counter((s["action"], s["status"]) for s in entries(client, keys.signals)),
        votes=votes,
        abstentions=abstentions,
    )


def wait_until(condition: Callable[[], bool], limit_s: float, what: str, pause_s: float = 0.05) -> None:
    """Return once `condition` holds. Raises `Unavailable` after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise Unavailable(f"{what} within {limit_s:.0f} s")
        time.sleep(pause_s)
