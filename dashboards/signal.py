"""Dashboard 1, the one to open at 3 a.m.: whether the signal can be trusted now, and where it stops if not."""

from __future__ import annotations

from dashboards.board import Board, Row
from dashboards.panels import BLUE, GREEN, PLAIN, RED, YELLOW, Query, chart, figure, share, states
from worker.quality import EnsembleLimits

READING = "Reading the signal"
AGREEMENT = "QuartetAgentsDisagree"
LIMITS = EnsembleLimits()

SIGNALS = "sum(rate(quartet_signals_total[$__rate_interval]))"
AGE = "time() - max(quartet_last_bar_timestamp_seconds > 0)"


def _by_status(status: str) -> str:
    return f'sum(rate(quartet_signals_total{{status="{status}"}}[$__rate_interval]))'


def _count(kind: str, text: str) -> tuple[int, int, object]:
    panel = figure(
        kind.capitalize(),
        text,
        [Query(f'max(quartet_ensemble_agents{{kind="{kind}"}})', kind)],
        unit="none",
        steps=((None, RED), (1, YELLOW), (3, GREEN)),
        see=READING,
    )
    return 3, 4, panel


def board() -> Board:
    top = [
        _count("configured", "Agents in the settings. The counts to the right can only be smaller."),
        _count("loaded", "Agents whose artifact was matched and probed, muted and shadow ones included."),
        _count("eligible", "Agents in state active: those that may vote."),
        _count(
            "voting",
            "Agents that said BUY, SELL or HOLD, on the series where most did. Green from 3, the quorum unless set.",
        ),
        (
            3,
            4,
            figure(
                "Quorum",
                "Agents that must say the same for a BUY or SELL. With fewer voting than this, every signal is a HOLD.",
                [Query("max(quartet_ensemble_quorum)", "quorum")],
                unit="none",
                steps=((None, BLUE),),
                see=READING,
            ),
        ),
        (
            3,
            4,
            figure(
                "Without a quorum",
                "Share of signals that are HOLD below_quorum: too few agents voted. Anything above 0 costs signals.",
                [Query(share(_by_status("below_quorum"), SIGNALS), "below quorum")],
                unit="percentunit",
                steps=((None, GREEN), (0.001, YELLOW), (0.5, RED)),
                see="QuartetBelowQuorum",
            ),
        ),
        (
            3,
            4,
            figure(
                "Age of the last bar",
                "Time since a bar of the shortest interval arrived; no colour: an interval may be a minute or a day.",
                [Query(AGE, "age")],
                unit="s",
                steps=((None, BLUE),),
                see="QuartetNoFreshBar",
            ),
        ),
        (
            3,
            4,
            figure(
                "Age in intervals",
                "The same in intervals of the bars, the variable above. Over 3 is stale.",
                [Query(f"({AGE}) / $interval", "intervals")],
                unit="none",
                steps=((None, GREEN), (2, YELLOW), (3, RED)),
                see="QuartetNoFreshBar",
            ),
        ),
    ]
    decisions = [
        (
            12,
            8,
            chart(
                "Signals by action",
                "What the ensemble says. BUY and SELL are only counted where they may be acted on.",
                [Query("sum by (action) (rate(quartet_signals_total[$__rate_interval]))", "{{action}}")],
                unit="cps",
                stacked=True,
                see=READING,
            ),
        ),
        (
            12,
            8,
            chart(
                "Signals by status",
                "Why a signal is what it is. Only ok is to be acted on; withheld and stale point at the feed.",
                [Query("sum by (status) (rate(quartet_signals_total[$__rate_interval]))", "{{status}}")],
                unit="cps",
                stacked=True,
                see=READING,
            ),
        ),
    ]
    agreement = [
        (
            12,
            8,
            chart(
                "Agreement",
                "Agreeing among the voting agents, mean of the last 500 signals with at least two. "
                f"Its place is from {LIMITS.agreement_low:.0%} to {LIMITS.agreement_high:.0%}.",
                [Query("max(quartet_ensemble_agreement_ratio)", "agreement")],
                unit="percentunit",
                steps=((None, RED), (LIMITS.agreement_low, GREEN), (LIMITS.agreement_high, YELLOW)),
                top=1,
                see="QuartetAgreementLow",
            ),
        ),
        (
            12,
            8,
            chart(
                "Hard disagreement",
                "Share of the last 500 signals with both a BUY and a SELL among the votes. "
                f"Over {LIMITS.hard_disagreement:.0%} is a ticket.",
                [Query("max(quartet_ensemble_hard_disagreement_ratio)", "BUY against SELL")],
                unit="percentunit",
                steps=((None, GREEN), (LIMITS.hard_disagreement, RED)),
                top=1,
                see=AGREEMENT,
            ),
        ),
    ]
    funnel = [
        (
            12,
            8,
            chart(
                "Configured to voting",
                "Where agents are lost: the gap between two lines is the answer.",
                [Query("max by (kind) (quartet_ensemble_agents)", "{{kind}}")],
                unit="none",
                see=READING,
            ),
        ),
        (
            12,
            8,
            states(
                "State of each agent",
                "Only active and canary votes have weight.",
                'agent=~".+"',
                see="Agent states",
            ),
        ),
    ]
    weights = [
        (
            12,
            8,
            chart(
                "Effective weight",
                "Weight of each agent in the last signal; the weights of those that voted sum to 1.",
                [Query('max by (agent) (quartet_agent_weight{kind="effective"})', "{{agent}}")],
                unit="percentunit",
                steps=PLAIN,
                stacked=True,
                see=READING,
            ),
        ),
        (
            12,
            8,
            chart(
                "Abstentions by reason",
                "Why an agent said nothing. A refused agent abstains on every bar, with the reason of its refusal.",
                [
                    Query(
                        "sum by (agent, reason) (rate(quartet_agent_abstentions_total[$__rate_interval])) > 0",
                        "{{agent}} {{reason}}",
                    )
                ],
                unit="cps",
                stacked=True,
                see="Agent states",
            ),
        ),
    ]
    return Board(
        "quartet-signal",
        "Can I trust the signal now",
        "From configured to voting, agreement, quorum and the age of the last bar",
        [Row("", [top, funnel, decisions, agreement, weights])],
        with_interval=True,
    )
