"""Where each alert begins and ends: its windows, its `for`, its limits. A change of any of them fails a test here.

The times leave one sample of 15 s for what differs between versions of Prometheus at the ends of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Series = Mapping[str, str]
"""A series to its values, in promtool's notation: `a+bxn` is a, a+b, ... over n steps; a step is 15 s."""

STEP = "15s"
BELOW = 'quartet_signals_total{action="HOLD",status="below_quorum"}'
OK = 'quartet_signals_total{action="BUY",status="ok"}'
ACCEPTED, REJECTED = 'quartet_bars_total{outcome="accepted"}', 'quartet_bars_total{outcome="rejected"}'
READS = 'quartet_stage_seconds_count{stage="read"}'
UP = 'up{job="quartet",instance="a"}'
PERCENT, VALUE, HUMAN = "{{ $value | humanizePercentage }}", "{{ $value }}", "{{ $value | humanize }}"


@dataclass(frozen=True)
class Edge:
    """`series` on which `alert` is `silent` at one time and `fires` at another; "" where only one is looked at."""

    alert: str
    name: str
    series: Series
    silent: str = ""
    fires: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    fills: Mapping[str, str] = field(default_factory=dict)


def bars(*counts: int) -> str:
    """A counter after each bar of a minute, from the start on: four samples a bar."""
    return " ".join(f"{count}x3" for count in counts)


def _state(state: str) -> Series:
    """An agent that comes into the state after 2 min 30 s."""
    return {f'quartet_agent_state{{agent="nhits",state="{state}"}}': "0x9 1x60"}


def _share(below: int, ok: int) -> Series:
    return {BELOW: f"0+{below}x60", OK: f"0+{ok}x60"}


_NHITS = {"agent": "nhits"}
_MANY = {OK: "0+10x160"}
"""200 signals after 5 minutes."""

EDGES = (
    Edge(
        "QuartetBelowQuorum",
        "with the third bar",
        {OK: bars(1, 2, 3, 4, 5, 6, 6, 6, 6, 6), BELOW: bars(0, 0, 0, 0, 0, 0, 1, 2, 3, 4)},
        silent="7m30s",
        fires="8m",
        fills={PERCENT: "100%"},
    ),
    Edge(
        "QuartetBelowQuorum",
        "with the third bar after a silence",
        {OK: bars(*[6] * 10), BELOW: bars(0, 0, 0, 0, 0, 0, 1, 2, 3, 4)},
        silent="7m30s",
        fires="8m",
        fills={PERCENT: "100%"},
    ),
    Edge("QuartetBelowQuorum", "not at 89 %", _share(89, 11), silent="10m"),
    Edge("QuartetBelowQuorum", "at 91 %", _share(91, 9), fires="10m", fills={PERCENT: "91%"}),
    Edge(
        "QuartetNoFreshBar",
        "3 minutes after a start without any",
        {"quartet_last_bar_timestamp_seconds": "0x40"},
        silent="2m30s",
        fires="3m",
    ),
    Edge(
        "QuartetNoSignals",
        "5 minutes after the last",
        {OK: bars(1, 2, 3, 4, 5, 6, *[6] * 8), ACCEPTED: bars(*range(1, 15))},
        silent="9m30s",
        fires="10m",
    ),
    Edge("QuartetWorkerDown", "a minute after the last answer", {UP: "1x10 0x40"}, silent="3m15s", fires="3m45s"),
    Edge("QuartetWorkerStalled", "45 s after the last read", {READS: "0+20x20 400x40"}, silent="5m15s", fires="5m45s"),
    Edge("QuartetAgentMuted", "after 5 minutes", _state("muted"), silent="7m15s", fires="7m45s", labels=_NHITS),
    Edge("QuartetAgentRefused", "after 5 minutes", _state("refused"), silent="7m15s", fires="7m45s", labels=_NHITS),
    Edge("QuartetRejects", "not at 5 %", {ACCEPTED: "0+95x60", REJECTED: "0+5x60"}, silent="10m"),
    Edge(
        "QuartetRejects",
        "at 5.1 %",
        {ACCEPTED: "0+949x60", REJECTED: "0+51x60"},
        fires="10m",
        fills={PERCENT: "5.1%"},
    ),
    Edge("QuartetRejects", "not of 195 entries", {ACCEPTED: "0x4 100x60", REJECTED: "0x4 95x60"}, silent="10m"),
    Edge(
        "QuartetRejects",
        "of 205 entries",
        {ACCEPTED: "0x4 105x60", REJECTED: "0x4 100x60"},
        fires="10m",
        fills={PERCENT: "48.78%"},
    ),
    Edge(
        "QuartetRejects",
        "a minute after the good entries have left the window of 15 minutes",
        {ACCEPTED: "0 100000+9x80", REJECTED: "0x1 0+1x79"},
        silent="15m45s",
        fires="16m15s",
        fills={PERCENT: "10%"},
    ),
    Edge(
        "QuartetRejects",
        "and of a slow feed when they have left that of 4 hours",
        {ACCEPTED: "0 100000x3 " + " ".join(f"{100_000 + n}x7" for n in range(1, 125)), REJECTED: bars(*range(250))},
        silent="4h45s",
        fires="4h1m15s",
        fills={PERCENT: "66.67%"},
    ),
    Edge(
        "QuartetLagGrowing",
        "past 200 for 5 minutes and for 5 minutes more",
        {'quartet_stream_lag{stream="bars"}': "100+1x160"},
        silent="34m45s",
        fires="35m15s",
        labels={"stream": "bars"},
        fills={VALUE: "221"},
    ),
    Edge("QuartetLagGrowing", "not where it stays", {'quartet_stream_lag{stream="bars"}': "9000x80"}, silent="20m"),
    Edge(
        "QuartetRebalancing",
        "past 10 within 30 minutes, for 5 minutes",
        {"quartet_kafka_rebalances_total": "0x40 11x160"},
        silent="14m30s",
        fires="15m30s",
        fills={HUMAN: "11"},
    ),
    Edge("QuartetRebalancing", "not at 10", {"quartet_kafka_rebalances_total": "0x40 10x160"}, silent="20m"),
    Edge("QuartetStreamLength", "not at 2e6", {'quartet_stream_length{stream="bars"}': "2000000x80"}, silent="20m"),
    Edge(
        "QuartetStreamLength",
        "past 2e6 for 15 minutes",
        {'quartet_stream_length{stream="bars"}': "2000001x80"},
        silent="14m45s",
        fires="15m",
        labels={"stream": "bars"},
        fills={HUMAN: "2M"},
    ),
    Edge(
        "QuartetInputLost",
        "at once, of one entry",
        {'quartet_bars_total{outcome="lost"}': "0x10 1x10"},
        silent="2m30s",
        fires="2m45s",
        fills={HUMAN: "1"},
    ),
    Edge(
        "QuartetPoison",
        "for an hour, and 5 minutes more as every alert",
        {'quartet_rejected_total{stage="intake",reason="poison"}': "0x10 1x280"},
        fires="1h7m",
        silent="1h8m15s",
    ),
    Edge(
        "QuartetCanaryRolledBack",
        "for an hour, and 5 minutes more as every alert",
        {'quartet_agent_rollbacks_total{agent="nhits",by="safeguard"}': "0x10 1x280"},
        fires="1h7m",
        silent="1h8m15s",
        labels=_NHITS,
    ),
    Edge(
        "QuartetAgentsDisagree", "not at 20 %", {"quartet_ensemble_hard_disagreement_ratio": "0.2x160", **_MANY}, "21m"
    ),
    Edge(
        "QuartetAgentsDisagree",
        "past 20 % for 15 minutes",
        {"quartet_ensemble_hard_disagreement_ratio": "0.201x160", **_MANY},
        silent="19m30s",
        fires="20m15s",
        fills={PERCENT: "20.1%"},
    ),
    Edge("QuartetAgreementLow", "not at 55 %", {"quartet_ensemble_agreement_ratio": "0.55x160", **_MANY}, "21m"),
    Edge(
        "QuartetAgreementLow",
        "below 55 % for 15 minutes",
        {"quartet_ensemble_agreement_ratio": "0.549x160", **_MANY},
        silent="19m30s",
        fires="20m15s",
        fills={PERCENT: "54.9%"},
    ),
    Edge("QuartetAgreementHigh", "not at 80 %", {"quartet_ensemble_agreement_ratio": "0.8x160", **_MANY}, "21m"),
    Edge(
        "QuartetAgreementHigh",
        "past 80 % for 15 minutes",
        {"quartet_ensemble_agreement_ratio": "0.801x160", **_MANY},
        silent="19m30s",
        fires="20m15s",
        fills={PERCENT: "80.1%"},
    ),
)
