"""One signal, explained: every vote with its weights, who was left out and what to do, and all of it recomputed.

Consensus is recomputed from the recorded votes always; a model's outputs from the recorded features
where its artifact is at hand; features from the bars where every bar of the series is still there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from streams.codec import to_json
from streams.contracts import FEATURE_SETS
from streams.formats import FormatReader
from streams.keys import Keys
from streams.messages import AGENTS, CANARY, Action, AgentState, Bar, Entry
from streams.recording import Recorded, Recording, RecordingError
from streams.store import id_tuple
from streams.validation import LATEST_TS_MS
from worker import consensus
from worker.assembly import limits_of, load_options, rules_of
from worker.batches import STATE_CODE, Ballot
from worker.errors import CheckFailed, UsageError
from worker.features.bank import FeatureBank
from worker.intake import Intake
from worker.replay.outline import VOTES, Outline, read_outline
from worker.replay.shelf import Shelf
from worker.settings import Settings

Message = Mapping[str, Any]
PAGE = 1_000
FEATURES = "features"

REMEDIES: Mapping[str, str] = {
    "no_artifact": "it has no model: `quartet train` makes one, `quartet models list` shows what was found",
    "feature_mismatch": "its features are not those of any set: `quartet models list` names them",
    "contract_mismatch": "it was trained on other formulas: train it again",
    "scaler_missing": "its scaler is not beside it: put it there, or train again",
    "scaler_mismatch": "its scaler is for other features: put the one it was trained with beside it",
    "unknown_architecture": "its architecture is not known: `quartet models list` names the keys",
    "state_dict_mismatch": "its tensors contradict its metadata: export it again",
    "unsafe_artifact": "its file may run code or is no plain file: export it to a plain format",
    "corrupt_artifact": "its file cannot be read: copy it again",
    "golden_mismatch": "it does not give the outputs it gave when it was made: train it again",
    "non_finite_output": "its features or outputs were not finite on this bar",
    "constant_output": "it says the same whatever comes in: train it again",
    "action_collapse": "it says one action too often; it votes again once a full window is clean",
    "dead_zone": "it says HOLD too often: look at its threshold; it votes again once a full window is clean",
    "flat_confidence": "its confidence hardly varies; it votes again once a full window is clean",
    "narrow_range": "its confidence has too narrow a range; it votes again once a full window is clean",
    "error_rate": "its prediction failed: the worker's log says why",
    "deadline_missed": "it was too slow, or its process is down: look at that stage",
    "stale": "its votes came too late too often",
    "insufficient_history": "its window is not full yet for this symbol: wait for more bars",
    "operator": "an operator muted it: `quartet models unmute` lets it vote again",
}

MEANINGS: Mapping[str, str] = {
    "ok": "a BUY or SELL to act on",
    "hold": "the winner is HOLD",
    "no_agreement": "no action had enough agents behind it, or two were equal",
    "below_quorum": "fewer agents voted than the quorum asks for",
    "stale": "the bar was too old on arrival",
    "withheld": "too many entries of the feed were refused: look at quartet:rejected",
}


class Place(Protocol):
    """Where a signal, its votes and its features lie: a server, or a recording."""

    def backwards(self, stream: str, last: str = "") -> Iterator[tuple[str, Message]]:
        """The messages of a stream with their IDs, the newest first, from the ID `last` on."""
        ...

    def of_entry(self, streams: Sequence[str], entry_id: str) -> dict[str, Message]:
        """What these streams hold under one ID."""
        ...

    def bars(self) -> tuple[Iterator[Entry], str]:
        """Every entry of the inputs in order, and why that is not all of them, empty where it is."""
        ...

    def outline(self) -> Outline:
        """What was decided then: starts with their settings, what was left out, the hashes of the models."""
        ...


@dataclass
class ServerPlace:
    """The streams on a server."""

    client: Any
    keys: Keys
    inputs: Sequence[str]

    def backwards(self, stream: str, last: str = "") -> Iterator[tuple[str, Message]]:
        key, upto = f"{self.keys.namespace}:{stream}", last or "+"
        while rows := self.client.xrevrange(key, max=upto, count=PAGE):
            for entry_id, fields in rows:
                yield entry_id.decode(), orjson.loads(fields[b"data"])
            upto = f"({rows[-1][0].decode()}"

    def of_entry(self, streams: Sequence[str], entry_id: str) -> dict[str, Message]:
        found = {s: self.client.xrange(f"{self.keys.namespace}:{s}", entry_id, entry_id) for s in streams}
        return {stream: orjson.loads(rows[0][1][b"data"]) for stream, rows in found.items() if rows}

    def bars(self) -> tuple[Iterator[Entry], str]:
        trimmed = 0
        for key in self.inputs:
            if self.client.exists(key):
                info = self.client.xinfo_stream(key)
                trimmed += info["entries-added"] - info["length"]
        if len(self.inputs) != 1:
            return iter(()), "several keys are read"
        why = f"{trimmed} entries of the input are gone from the server" if trimmed else ""
        return self._forwards(self.inputs[0]), why

    def outline(self) -> Outline:
        outline = Outline()
        for stream in ("events", "rejected"):
            entries = self._forwards(f"{self.keys.namespace}:{stream}")
            for entry in entries:
                outline.note(Recorded(stream, entry.key, entry.id, entry.fields))
        return outline

    def _forwards(self, key: str) -> Iterator[Entry]:
        first = "-"
        while rows := self.client.xrange(key, min=first, count=PAGE):
            for entry_id, fields in rows:
                yield Entry(key, entry_id.decode(), fields)
            first = f"({rows[-1][0].decode()}"


@dataclass
class RecordedPlace:
    """The streams of a recording. Read as a whole for each question."""

    path: Path

    def backwards(self, stream: str, last: str = "") -> Iterator[tuple[str, Message]]:
        found = [i for i in Recording(self.path) if isinstance(i, Recorded) and i.stream == stream]
        upto = id_tuple(last) if last else id_tuple(found[-1].id) if found else (0, 0)
        return ((item.id, orjson.loads(item.fields[b"data"])) for item in reversed(found) if id_tuple(item.id) <= upto)

    def of_entry(self, streams: Sequence[str], entry_id: str) -> dict[str, Message]:
        items = (i for i in Recording(self.path) if isinstance(i, Recorded) and i.id == entry_id)
        return {item.stream: orjson.loads(item.fields[b"data"]) for item in items if item.stream in streams}

    def bars(self) -> tuple[Iterator[Entry], str]:
        header = Recording(self.path).header
        before = sum(header["positions"].get(key, (0, 0))[1] for key in header["inputs"])
        why = f"the recording begins {before} bars after the start of its input" if before else ""
        items = (i for i in Recording(self.path) if isinstance(i, Recorded) and i.stream == "bars")
        return (Entry(item.key, item.id, item.fields) for item in items), why

    def outline(self) -> Outline:
        return read_outline(Recording(self.path))


@dataclass(frozen=True)
class Check:
    """One recomputation: of what, whether it is the same (None where it could not be made), and how or why not."""

    what: str
    same: bool | None
    detail: str

    def as_json(self) -> dict[str, Any]:
        return {"what": self.what, "same": self.same, "detail": self.detail}


@dataclass
class Explanation:
    """A signal with everything behind it."""

    id: str
    signal: Message
    votes: dict[str, Message]
    features: Message | None
    checks: list[Check] = field(default_factory=list)

    @property
    def left_out(self) -> dict[str, str]:
        """Each agent whose vote had no weight, and why, in words."""
        return {
            agent: why_left_out(vote) for agent, vote in self.signal["votes"].items() if not vote["effective_weight"]
        }

    @property
    def same(self) -> bool:
        return all(check.same is not False for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "signal": dict(self.signal),
            "outputs": {agent: vote["outputs"] for agent, vote in self.votes.items()},
            "left_out": self.left_out,
            "recomputed": [check.as_json() for check in self.checks],
            "same": self.same,
        }


def why_left_out(vote: Message) -> str:
    """State, reason and what to do, for one vote of a signal."""
    state, reason = vote["state"], vote["reason"]
    if reason:
        return f"{state}, {reason}: {REMEDIES.get(reason, 'see the events of this agent')}"
    if state == AgentState.SHADOW:
        return "shadow: it is watched and has no weight until it is promoted or its probation is over"
    if vote["action"] == Action.ABSTAIN.name:
        return f"{state}: it abstained"
    return f"{state}: its configured weight is 0"


# ------------------------------------------------------------------ finding


def find_signal(place: Place, bar_id: str | None) -> tuple[str, Message]:
    """The signal of a bar, or the last one. Raises `CheckFailed` where there is none."""
    for entry_id, signal in place.backwards("signals"):
        if bar_id is None or signal["bar_id"] == bar_id:
            return entry_id, signal
    if bar_id is None:
        raise CheckFailed("there is no signal yet: signals come once a symbol has its warm-up behind it")
    if bar_id.count("|") != 2:
        raise UsageError(f"{bar_id}: expected a bar as <symbol>|<interval>|<ts>, such as BTCUSDT|1m|1750000020000")
    raise CheckFailed(
        f"no signal of bar {bar_id}: it is in warm-up, was refused (see quartet:rejected), or is no longer kept"
    )


def explain(place: Place, settings: Settings, bar_id: str | None) -> Explanation:
    """Find a signal and recompute what can be recomputed. Raises `CheckFailed` or `UsageError`."""
    try:
        entry_id, signal = find_signal(place, bar_id)
        streams = [FEATURES, *(VOTES + agent for agent in signal["votes"])]
        entries = place.of_entry(streams, entry_id)
        votes = {agent: entries[VOTES + agent] for agent in signal["votes"] if VOTES + agent in entries}
        found = Explanation(entry_id, signal, votes, entries.get(FEATURES))
        outline = place.outline()
        settings = settings_of_then(outline, entry_id, settings)
        found.checks.append(check_consensus(found, settings.canary_share))
        found.checks += check_models(place, found, settings, outline)
        found.checks.append(check_features(place, found, settings, outline))
    except RecordingError as error:
        raise UsageError(str(error)) from error
    return found


def settings_of_then(outline: Outline, entry_id: str, settings: Settings) -> Settings:
    """The settings of the start before `entry_id`, with the models of here; those of here where no start is known."""
    starts = [step for step in outline.starts if step.place < id_tuple(entry_id)] or outline.starts[:1]
    if not starts:
        return settings
    then = {name: x for name, x in starts[-1].evidence["settings"].items() if name in Settings.model_fields}
    here = {name: getattr(settings, name) for name in ("models", "state_dir", "namespace")}
    return Settings(**{**then, **here})


# ------------------------------------------------------------------ recomputing


def check_consensus(found: Explanation, canary_share: float) -> Check:
    """Decide again from the votes. That the feed was unhealthy or the bar too old is taken as it was."""
    signal = found.signal
    ballots = [_ballot(agent, vote) for agent, vote in signal["votes"].items()]
    flags = {name: np.array([signal["status"] == name]) for name in ("withheld", "stale")}
    again = consensus.decide(
        ballots, configured=signal["configured"], quorum=signal["quorum"], canary_share=canary_share, **flags
    )
    values = {
        "action": Action(int(again.action[0])).name,
        "confidence": float(again.confidence[0]),
        "agreement": float(again.agreement[0]),
        "voting": int(again.voting[0]),
        "agreeing": int(again.agreeing[0]),
        "status": again.status[0],
        **{
            f"{agent}.effective_weight": float(again.effective[0, place]) for place, agent in enumerate(signal["votes"])
        },
    }
    recorded = {
        **{name: signal[name] for name in ("action", "confidence", "agreement", "voting", "agreeing", "status")},
        **{f"{agent}.effective_weight": vote["effective_weight"] for agent, vote in signal["votes"].items()},
    }
    wrong = [
        f"{name} recorded {recorded[name]!r}, recomputed {x!r}" for name, x in values.items() if recorded[name] != x
    ]
    return Check("consensus", not wrong, "; ".join(wrong) or "decided again from the recorded votes")


def _ballot(agent: str, vote: Message) -> Ballot:
    return Ballot(
        agent=agent,
        version=vote["version"],
        weight=vote["weight"],
        action=np.array([Action[vote["action"]]], np.int8),
        confidence=np.array([vote["confidence"]], np.float64),
        outputs=None,
        answered=np.array([True]),
        state=np.array([STATE_CODE[AgentState(vote["state"])]], np.int8),
        reason=(vote["reason"],),
    )


def check_models(place: Place, found: Explanation, settings: Settings, outline: Outline) -> list[Check]:
    """Each model's outputs, action and confidence again, from the recorded features."""
    shelf = Shelf(settings.models, load_options(settings))
    history: dict[int, list[Message]] = {}
    checks = []
    for agent, vote in found.votes.items():
        if vote["version"] is None or vote["outputs"] is None:
            continue
        named = agent.removesuffix(CANARY), vote["version"]
        model = shelf.find(named[0], outline.artifact(*named)).model
        if model is None:
            why = shelf.missing[named]
            checks.append(Check(agent, None, f"not recomputed: {why}"))
            continue
        if model.window not in history:
            history[model.window] = _history(place, found, model.window, model.feature_set)
        rows = history[model.window]
        if len(rows) < model.window:
            checks.append(Check(agent, None, f"not recomputed: {len(rows)} of {model.window} vectors are still kept"))
            continue
        x = np.array([[[row["values"][name] for name in model.features] for row in rows]], np.float64)
        outputs = model.predict(x[:, 0] if model.window == 1 else x)
        action, confidence = model.head.decide(outputs)
        again = {"outputs": outputs[0].tolist(), "action": Action(int(action[0])).name, "confidence": confidence[0]}
        wrong = [f"{n} recorded {vote[n]}, recomputed {v}" for n, v in again.items() if not _equal(vote[n], v)]
        checks.append(Check(agent, not wrong, "; ".join(wrong) or f"{model.file.name} on the recorded features"))
    return checks


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, str):
        return bool(one == other)
    return bool(np.allclose(one, other, rtol=1e-5, atol=1e-5))


def _history(place: Place, found: Explanation, window: int, feature_set: str) -> list[Message]:
    """The last `window` ready vectors of the signal's series up to its bar, in order."""
    mine = (
        message
        for _, message in place.backwards(FEATURES, found.id)
        if (message["symbol"], message["interval"]) == (found.signal["symbol"], found.signal["interval"])
    )
    rows = list(islice((m for m in mine if m["ready"] and feature_set in m["contracts"]), window))
    return rows[::-1]


def check_features(place: Place, found: Explanation, settings: Settings, outline: Outline) -> Check:
    """The features again, from every bar of the series."""
    if found.features is None:
        return Check("features", None, "not recomputed: the feature vector is no longer kept")
    entries, why = place.bars()
    if why:
        return Check("features", None, f"not recomputed: {why}, and features remember every bar")
    names = [name for name in found.features["contracts"] if name in FEATURE_SETS]
    bank = FeatureBank([FEATURE_SETS[name] for name in names], settings.warmup_bars)
    intake = Intake(limits_of(settings), reader=FormatReader(rules_of(settings)))
    left_out = frozenset(outline.left_out)
    bars = 0
    while some := list(islice(entries, PAGE)):
        accepted = intake.accept(some, LATEST_TS_MS, left_out)
        values, _ = bank.update(accepted.rows, accepted.ohlcv, accepted.restart)
        bars += sum(_same_series(bar, found.signal) for bar in accepted.bars)
        for row, bar in enumerate(accepted.bars):
            if bar.bar_id == found.signal["bar_id"]:
                return _compared(dict(zip(bank.names, values[row].tolist(), strict=True)), found.features, bars)
    return Check(
        "features",
        None,
        "not recomputed: the bar is not among the accepted bars of the inputs that are read; see --bars",
    )


def _same_series(bar: Bar, signal: Message) -> bool:
    return (bar.symbol, bar.interval) == (signal["symbol"], signal["interval"])


def _compared(values: Mapping[str, float], recorded: Message, bars: int) -> Check:
    again = orjson.loads(to_json(values))
    then: Mapping[str, Any] = recorded["values"]
    wrong = [
        f"{name} recorded {then.get(name)!r}, recomputed {value!r}"
        for name, value in again.items()
        if then.get(name) != value
    ]
    return Check("features", not wrong, "; ".join(wrong) or f"computed again from {bars} bars of the series")


def agents_in_order(votes: Mapping[str, Message]) -> list[str]:
    """The agents of a signal as they are always shown, each followed by its canary."""

    def place(agent: str) -> tuple[int, bool]:
        return AGENTS.index(agent.removesuffix(CANARY)), agent.endswith(CANARY)

    return sorted(votes, key=place)
