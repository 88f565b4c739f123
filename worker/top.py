"""What `quartet top` shows: one frame made of `/readyz`, `/metrics` and the last entries of the streams.

Nothing is computed here that the worker does not say itself: the view and the dashboards cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group
from rich.table import Table
from rich.text import Text

from streams.messages import CANARY
from worker.quality import QualityLimits

WORST_FEATURES = 3
_STATE_STYLE = {"active": "green", "canary": "cyan", "shadow": "cyan", "muted": "yellow", "refused": "red"}
_ACTION_STYLE = {"BUY": "green", "SELL": "red", "HOLD": "dim", "ABSTAIN": "yellow"}


@dataclass(frozen=True, slots=True)
class AgentRow:
    """One agent as the worker reports it; None is what is not known yet. Ratios 0..1."""

    agent: str
    state: str
    reason: str
    detail: str
    version: str
    action: str | None
    confidence: float | None
    top_action_ratio: float | None
    hold_ratio: float | None
    confidence_stddev: float | None
    confidence_range: float | None
    hit_ratio: float | None
    brier_score: float | None
    scored_votes: int | None
    weight: float | None
    effective_weight: float | None
    degenerate: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything on the screen. `bars_per_s` needs two looks at the metrics."""

    ready: bool
    wanting: tuple[str, ...]
    counts: Mapping[str, int]
    agents: tuple[AgentRow, ...]
    bars: Mapping[str, int]
    bars_per_s: float | None
    lag: int | None
    last_bar_age_s: float | None
    signals: Mapping[str, int]
    last_signal: Mapping[str, Any] | None
    agreement: float | None
    hard_disagreement: float | None
    consensus_hit_ratio: float | None
    drift: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def headline(self) -> str:
        """`4 configured · 3 loaded · 2 eligible · 2 voting`."""
        return " · ".join(
            f"{self.counts.get(kind, 0)} {kind}" for kind in ("configured", "loaded", "eligible", "voting")
        )


class Samples:
    """The samples of the expositions of one worker's processes, by name and labels.

    Where several expose a series, one of them knows of it and the others are 0 or behind: the largest value counts.
    """

    def __init__(self, *expositions: str) -> None:
        self._all: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        for exposition in expositions:
            for family in text_string_to_metric_families(exposition):
                for sample in family.samples:
                    self._all.setdefault(sample.name, []).append((sample.labels, sample.value))

    def one(self, name: str, **labels: str) -> float | None:
        """The value of a series, None where it is not there."""
        found = (value for have, value in self._all.get(name, ()) if labels.items() <= have.items())
        return max(found, default=None)

    def by(self, name: str, *labels: str) -> dict[str, float]:
        """Values by the given labels, joined with a space."""
        values: dict[str, float] = {}
        for have, value in self._all.get(name, ()):
            key = " ".join(have[label] for label in labels)
            values[key] = max(value, values.get(key, value))
        return values


def frame(
    readiness: Mapping[str, Any],
    metrics: Samples,
    votes: Mapping[str, Mapping[str, Any]],
    last_signal: Mapping[str, Any] | None,
    now_s: float,
    bars_per_s: float | None = None,
) -> Frame:
    """One frame. `votes` are the last ones by agent, `now_s` is Unix time."""
    last_bar = metrics.one("quartet_last_bar_timestamp_seconds")
    lags = metrics.by("quartet_stream_lag", "stream")
    drift = sorted(metrics.by("quartet_feature_drift", "feature").items(), key=lambda pair: -pair[1])
    return Frame(
        ready=bool(readiness["ready"]),
        wanting=tuple(f"{name}: {c['detail']}" for name, c in readiness["conditions"].items() if not c["ok"]),
        counts=readiness.get("counts", {}),
        agents=tuple(_agent(name, facts, metrics, votes.get(name)) for name, facts in readiness["agents"].items()),
        bars=_counted(metrics.by("quartet_bars_total", "outcome")),
        bars_per_s=bars_per_s,
        lag=int(sum(lags.values())) if lags else None,
        last_bar_age_s=max(0.0, now_s - last_bar) if last_bar else None,
        signals=_counted(metrics.by("quartet_signals_total", "action", "status")),
        last_signal=last_signal,
        agreement=metrics.one("quartet_ensemble_agreement_ratio"),
        hard_disagreement=metrics.one("quartet_ensemble_hard_disagreement_ratio"),
        consensus_hit_ratio=metrics.one("quartet_agent_hit_ratio", agent="consensus"),
        drift=dict(drift[:WORST_FEATURES]),
    )


def _counted(values: Mapping[str, float]) -> dict[str, int]:
    return {name: int(value) for name, value in values.items() if value}


def _agent(agent: str, facts: Mapping[str, str], metrics: Samples, vote: Mapping[str, Any] | None) -> AgentRow:
    def ratio(name: str) -> float | None:
        return metrics.one(f"quartet_agent_{name}", agent=agent)

    scored = ratio("scored_votes")
    degenerate = metrics.by("quartet_agent_degenerate", "agent", "criterion")
    return AgentRow(
        agent=agent,
        state=facts["state"],
        reason=facts["reason"],
        detail=facts.get("detail", ""),
        version=facts.get("version", ""),
        action=vote["action"] if vote else None,
        confidence=vote["confidence"] if vote else None,
        top_action_ratio=ratio("top_action_ratio"),
        hold_ratio=ratio("hold_ratio"),
        confidence_stddev=ratio("confidence_stddev"),
        confidence_range=ratio("confidence_p10_p90_range"),
        hit_ratio=ratio("hit_ratio"),
        brier_score=ratio("brier_score"),
        scored_votes=None if scored is None else int(scored),
        weight=metrics.one("quartet_agent_weight", agent=agent, kind="configured"),
        effective_weight=metrics.one("quartet_agent_weight", agent=agent, kind="effective"),
        degenerate=tuple(
            name.partition(" ")[2] for name, hit in degenerate.items() if hit and name.partition(" ")[0] == agent
        ),
    )


# ---------------------------------------------------------------------- on the screen


def render(shown: Frame, limits: Mapping[str, QualityLimits]) -> Group:
    """The frame for a terminal; what is past its limit is marked, whether or not it mutes yet."""
    head = Text(shown.headline, style="bold")
    head.append("   READY" if shown.ready else "   NOT READY", style="bold green" if shown.ready else "bold red")
    parts: list[Any] = [head, *(Text(f"  {line}", style="red") for line in shown.wanting)]
    locked = (f"muted    {row.agent}: {row.detail}" for row in shown.agents if row.state == "muted" and row.detail)
    return Group(*parts, _agents(shown.agents, limits), *map(Text, locked), *map(Text, _lines(shown)))


def _agents(rows: Sequence[AgentRow], limits: Mapping[str, QualityLimits]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("agent", "state", "last vote", "BUY/SELL", "HOLD", "dev", "range", "hits", "weight", "version"):
        table.add_column(name, no_wrap=name != "state", overflow="fold")
    for row in rows:
        limit = limits.get(row.agent.removesuffix(CANARY), QualityLimits())
        state = f"{row.state} {row.reason}".strip()
        table.add_row(
            row.agent,
            Text(state, style=_STATE_STYLE.get(row.state, "")),
            _vote(row),
            _against(row.top_action_ratio, limit.action_share, above=True, percent=True),
            _against(row.hold_ratio, limit.hold_share, above=True, percent=True),
            _against(row.confidence_stddev, limit.confidence_stddev, above=False),
            _against(row.confidence_range, limit.confidence_range, above=False),
            _share(row.hit_ratio),
            _weight(row),
            row.version or "-",
        )
    return table


def _vote(row: AgentRow) -> Text:
    if row.action is None:
        return Text("-")
    confidence = "" if row.action == "ABSTAIN" else f" {row.confidence:.2f}"
    return Text(f"{row.action}{confidence}", style=_ACTION_STYLE[row.action])


def _against(value: float | None, limit: float, *, above: bool, percent: bool = False) -> Text:
    """A figure with its limit; red where it is on the wrong side."""
    if value is None:
        return Text("-")
    wrong = value > limit if above else value < limit
    sign = "<=" if above else ">="
    text = f"{value:.0%} {sign} {limit:.0%}" if percent else f"{value:.3f} {sign} {limit:.3g}"
    return Text(text, style="red" if wrong else "")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _weight(row: AgentRow) -> str:
    if row.weight is None or row.effective_weight is None:
        return "-"
    return f"{row.weight:.2f} -> {row.effective_weight:.2f}"


def _lines(shown: Frame) -> Iterable[str]:
    rate = "" if shown.bars_per_s is None else f" · {shown.bars_per_s:.1f} bars/s"
    age = "none yet" if shown.last_bar_age_s is None else f"{shown.last_bar_age_s:.0f} s ago"
    lag = "-" if shown.lag is None else str(shown.lag)
    yield f"bars     {_counts(shown.bars)}{rate} · lag {lag} · last bar {age}"
    yield f"signals  {_counts(shown.signals)}"
    yield (
        f"ensemble agreement {_share(shown.agreement)} · BUY against SELL {_share(shown.hard_disagreement)} · "
        f"hits of the signals {_share(shown.consensus_hit_ratio)}"
    )
    if shown.drift:
        worst = ", ".join(f"{feature} {distance:.1f}" for feature, distance in shown.drift.items())
        yield f"drift    {worst} fitted deviations away"
    last = shown.last_signal
    if last:
        yield f"last     {last['bar_id']} {last['action']} {last['confidence']:.2f} {last['status']}"


def _counts(values: Mapping[str, int]) -> str:
    return " · ".join(f"{count} {name}" for name, count in values.items()) or "none yet"


def together(bodies: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The readiness of several processes as one: ready where all are; the counts are those that know most.

    Of an agent that several know the states are the first one's, as the consensus sees it, and what that one leaves
    empty is its own process's.
    """
    first, *others = sorted(bodies, key=lambda body: -body.get("counts", {}).get("configured", 0))
    conditions = dict(first["conditions"])
    agents = {agent: dict(facts) for agent, facts in first["agents"].items()}
    for body in others:
        for name, condition in body["conditions"].items():
            if not condition["ok"] or name not in conditions:
                conditions[name] = condition
        for agent, facts in body["agents"].items():
            heard = agents.get(agent, {})
            if heard.get("state", "loading") == "loading":  # the consensus has not heard of it yet
                agents[agent] = dict(facts)
            else:
                agents[agent] = {**facts, **{n: text for n, text in heard.items() if text}, "reason": heard["reason"]}
    return {**first, "ready": all(body["ready"] for body in bodies), "conditions": conditions, "agents": agents}


def parse_readiness(text: str) -> Mapping[str, Any]:
    """The body of `/readyz`. Raises ValueError where it is none."""
    body = json.loads(text)
    if not isinstance(body, dict) or not {"ready", "conditions", "agents"} <= body.keys():
        raise ValueError("not the body of /readyz")
    return body
