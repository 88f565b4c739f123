"""The alert rules. Symptoms page; everything else is a ticket. A verdict on quality needs 200 events.

Each rule stands beside a section of the runbook that has its name. Windows follow the interval of the
bars, so another interval means other rules: `python -m dashboards --interval 5m --out DIR`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dashboards.runbook import dashboard_link
from streams.messages import CANARY
from worker.quality import EnsembleLimits

PAGE, TICKET = "page", "ticket"
LEAST_EVENTS = 200
LIMITS = EnsembleLimits()
GRAFANA = "http://127.0.0.1:3000"
WARMING_UP = (
    f'(max(quartet_agent_state{{state="warming_up",agent!~".+{CANARY}"}}) == 1'
    f' unless max(quartet_agent_state{{state=~"refused|muted",agent!~".+{CANARY}"}}) == 1)'
)
"""Warm-up is the whole reason only where no agent is refused or muted; a canary is no reason at all."""
VERDICT_WINDOWS = ("15m", "4h")
"""A fast feed is judged within minutes, a slow one once it has had its 200 events."""


@dataclass(frozen=True)
class Alert:
    """One rule. `description` may use Prometheus' templates; `hold` is its `for`, `keep` its `keep_firing_for`."""

    name: str
    severity: str
    expr: str
    hold: str
    summary: str
    description: str
    keep: str = "5m"

    def as_rule(self, grafana: str) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.hold,
            "keep_firing_for": self.keep,
            "labels": {"severity": self.severity},
            "annotations": self.annotations(grafana),
        }

    def annotations(self, grafana: str = GRAFANA) -> dict[str, str]:
        return {
            "summary": self.summary,
            "description": self.description,
            "runbook_url": grafana.rstrip("/") + dashboard_link(self.name),
        }


def pages(interval_s: int = 60) -> list[Alert]:
    """What wakes somebody: the signal is not there, or not to be trusted."""

    def bars(n: int) -> str:
        return f"{n * interval_s}s"

    def increase(metric: str, n: int) -> str:
        return f"sum(increase({metric}[{bars(n)}]))"

    last = "quartet_last_bar_timestamp_seconds"
    none = 'quartet_signals_total{status="below_quorum"}'
    below = increase(none, 3)
    # Without this one such signal after a silence would do. Shorter than a minute no window holds two samples.
    since = f"sum(increase({none}[{max(interval_s, 60)}s] offset {bars(2)})) > 0"
    return [
        Alert(
            "QuartetBelowQuorum",
            PAGE,
            f"{below} / ({increase('quartet_signals_total', 3)} > 0) > 0.9 and {since} unless {WARMING_UP}",
            "0s",
            "Every signal is HOLD: too few agents vote",
            "{{ $value | humanizePercentage }} of the signals of the last 3 bars are below_quorum. "
            "Look which agents are refused or muted, and why.",
        ),
        Alert(
            "QuartetNoFreshBar",
            PAGE,
            f"time() - max({last} > 0) > {3 * interval_s}"
            f" or (max(max_over_time({last}[{bars(3)}])) == 0 and max({last} offset {bars(3)}) == 0)",
            "0s",
            "No fresh bar for 3 intervals",
            f"No bar arrived for over {3 * interval_s} s; signals no longer follow the market. Look at the feed first.",
        ),
        Alert(
            "QuartetNoSignals",
            PAGE,
            f"{increase('''quartet_bars_total{outcome='accepted'}''', 3)} > 0"
            f" and ({increase('quartet_signals_total', 3)} or vector(0)) == 0 unless {WARMING_UP}",
            bars(2),
            "Bars flow but no signal comes",
            "Bars are accepted and not one signal was made of them for about 5 intervals, outside of warm-up.",
        ),
        Alert(
            "QuartetWorkerDown",
            PAGE,
            'absent(up{job="quartet"} == 1)',
            "1m",
            "No worker answers",
            "Prometheus reaches no worker of the job quartet: none runs, or its port is closed to it.",
        ),
        Alert(
            "QuartetWorkerStalled",
            PAGE,
            'sum(rate(quartet_stage_seconds_count{stage="read"}[30s])) == 0',
            "15s",
            "The worker runs but does not read",
            "No worker finished a read for half a minute: the Redis server is away, or the loop is stuck.",
        ),
    ]


def _verdict(value: str, bound: str, events: str) -> str:
    """`value` past `bound` in any window that had enough events; `%` stands for the window."""
    windows = (f"({value} {bound} and {events} >= {LEAST_EVENTS})".replace("%", w) for w in VERDICT_WINDOWS)
    return " or ".join(windows)


def tickets() -> list[Alert]:
    """What somebody looks at by day."""
    rejected = 'sum(increase(quartet_bars_total{outcome="rejected"}[%]))'
    # Forming bars are other messages: a feed that sends many would hide what it gets wrong.
    entries = 'sum(increase(quartet_bars_total{outcome!="unclosed"}[%]))'
    signals = "sum(increase(quartet_signals_total[%]))"
    return [
        Alert(
            "QuartetAgentMuted",
            TICKET,
            'max by (agent) (quartet_agent_state{state="muted"}) == 1',
            "5m",
            "Agent {{ $labels.agent }} is muted",
            "The safeguard or an operator took the vote of {{ $labels.agent }} away; the others go on.",
        ),
        Alert(
            "QuartetAgentRefused",
            TICKET,
            'max by (agent) (quartet_agent_state{state="refused"}) == 1',
            "5m",
            "Agent {{ $labels.agent }} is refused",
            "No artifact of {{ $labels.agent }} passed its checks; it has no vote until one does.",
        ),
        Alert(
            "QuartetAgentLate",
            TICKET,
            'sum by (agent) (increase(quartet_agent_abstentions_total{reason="deadline_missed"}[5m])) > 0',
            "1m",
            "Signals are decided without {{ $labels.agent }}",
            "The process of {{ $labels.agent }} committed nothing for 2 s, unless set otherwise, while vectors "
            "waited: it is down or too slow.",
        ),
        Alert(
            "QuartetRejects",
            TICKET,
            _verdict(f"{rejected} / {entries}", "> 0.05", entries),
            "1m",
            "Over 5 % of the entries are rejected",
            "{{ $value | humanizePercentage }} of what the feed sends is refused. Over 5 % of the last 500 entries "
            "every signal is withheld.",
        ),
        Alert(
            "QuartetLagGrowing",
            TICKET,
            f"max by (stream) (min_over_time(quartet_stream_lag[5m]) > {LEAST_EVENTS}"
            " and deriv(quartet_stream_lag[5m]) > 0)",
            "5m",
            "The lag of {{ $labels.stream }} grows",
            "At least {{ $value }} entries of {{ $labels.stream }} wait all the time, and they get more: the worker "
            "is slower than the feed.",
        ),
        Alert(
            "QuartetRebalancing",
            TICKET,
            "max(increase(quartet_kafka_rebalances_total[30m])) > 10",
            "5m",
            "The workers on Kafka rebalance all the time",
            "A worker saw {{ $value | humanize }} rebalances within 30 minutes; nothing is computed during one.",
        ),
        Alert(
            "QuartetStreamLength",
            TICKET,
            "max by (stream) (quartet_stream_length) > 2e6",
            "15m",
            "Stream {{ $labels.stream }} has over 2,000,000 entries",
            "{{ $labels.stream }} holds {{ $value | humanize }} entries; nothing trims it, and memory ends.",
        ),
        Alert(
            "QuartetInputLost",
            TICKET,
            'sum(quartet_bars_total{outcome="lost"}) > 0',
            "0s",
            "Entries were gone before they were read",
            "{{ $value | humanize }} entries of the input were trimmed or deleted before the worker read them. "
            "The next restart clears this.",
        ),
        Alert(
            "QuartetPoison",
            TICKET,
            'sum(increase(quartet_rejected_total{reason="poison"}[1h])) > 0',
            "0s",
            "An entry ended the worker three times and was left out",
            "The entry lies in the stream of rejects with the reason poison; it shows a defect.",
        ),
        Alert(
            "QuartetCanaryRolledBack",
            TICKET,
            'sum by (agent) (increase(quartet_agent_rollbacks_total{by="safeguard"}[1h])) > 0',
            "0s",
            "The canary of {{ $labels.agent }} was rolled back",
            "The new version of {{ $labels.agent }} violated a criterion of the safeguard; the former serves on.",
        ),
        Alert(
            "QuartetAgentsDisagree",
            TICKET,
            _verdict("max(quartet_ensemble_hard_disagreement_ratio)", f"> {LIMITS.hard_disagreement:g}", signals),
            "15m",
            f"BUY against SELL in over {LIMITS.hard_disagreement:.0%} of the signals",
            "{{ $value | humanizePercentage }} of the last 500 signals have both a BUY and a SELL among their votes.",
        ),
        Alert(
            "QuartetAgreementLow",
            TICKET,
            _verdict("max(quartet_ensemble_agreement_ratio)", f"< {LIMITS.agreement_low:g}", signals),
            "15m",
            "The agents agree too rarely",
            "On average {{ $value | humanizePercentage }} of the voting agents are with the winner: they may see "
            "different inputs, or one of them noise.",
        ),
        Alert(
            "QuartetAgreementHigh",
            TICKET,
            _verdict("max(quartet_ensemble_agreement_ratio)", f"> {LIMITS.agreement_high:g}", signals),
            "15m",
            "The agents agree too often",
            "On average {{ $value | humanizePercentage }} of the voting agents are with the winner: several that say "
            "the same are no more than one.",
        ),
    ]


def rules(interval_s: int = 60, grafana: str = GRAFANA) -> dict[str, Any]:
    """The rule file."""

    def group(name: str, alerts: Sequence[Alert]) -> dict[str, Any]:
        return {"name": name, "interval": "15s", "rules": [alert.as_rule(grafana) for alert in alerts]}

    return {"groups": [group("quartet pages", pages(interval_s)), group("quartet tickets", tickets())]}
