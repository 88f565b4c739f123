"""Dashboard 2: one row for each agent, against the limits of the safeguard."""

from __future__ import annotations

from dashboards.board import Board, Row
from dashboards.panels import BLUE, GREEN, RED, YELLOW, Query, chart, figure, listing, states
from streams.messages import HORIZON
from worker.quality import WINDOW, QualityLimits

STATES = "Agent states"
MUTED = "QuartetAgentMuted"
SCORES = "Scores"
LIMITS = QualityLimits()
MINE = 'agent="$agent"'


def _line_one() -> list[tuple[int, int, object]]:
    return [
        (10, 6, states("State", "Where $agent is; only active and canary votes have weight.", MINE, see=STATES)),
        (
            8,
            6,
            listing(
                "Version",
                "The artifact that serves. Nothing is shown for a refused agent: none serves.",
                Query(f"max by (agent, version, contract, sha256) (quartet_agent_info{{{MINE}}})", "{{version}}", True),
                {"version": "Version", "contract": "Contract", "sha256": "SHA-256", "agent": "Agent"},
                see=STATES,
            ),
        ),
        (
            6,
            6,
            figure(
                "Held against it",
                "1 for each criterion of the safeguard that finds the output degenerate.",
                [
                    Query(
                        f"max by (criterion) (quartet_agent_degenerate{{{MINE}}}) == 1"
                        f" or sum(quartet_agent_degenerate{{{MINE}}}) == 0",
                        "{{criterion}}",
                    )
                ],
                unit="none",
                steps=((None, GREEN), (1, RED)),
                see=MUTED,
            ),
        ),
    ]


def _line_two() -> list[tuple[int, int, object]]:
    return [
        (
            8,
            7,
            chart(
                "Votes by action",
                "Votes a second, abstentions included.",
                [Query(f"sum by (action) (rate(quartet_agent_votes_total{{{MINE}}}[$__rate_interval]))", "{{action}}")],
                unit="cps",
                stacked=True,
                see=STATES,
            ),
        ),
        (
            8,
            7,
            chart(
                "Most frequent action",
                f"Share among the last {WINDOW} votes; over {LIMITS.action_share:.0%} is action_collapse. "
                f"For HOLD the limit is {LIMITS.hold_share:.0%} (dead_zone).",
                [
                    Query(f"max by (agent) (quartet_agent_top_action_ratio{{{MINE}}})", "any action"),
                    Query(f"max by (agent) (quartet_agent_hold_ratio{{{MINE}}})", "HOLD"),
                ],
                unit="percentunit",
                steps=((None, GREEN), (LIMITS.action_share, YELLOW), (LIMITS.hold_share, RED)),
                top=1,
                see=MUTED,
            ),
        ),
        (
            8,
            7,
            chart(
                "Inference time",
                "Time of one batch in the model.",
                [
                    Query(
                        "histogram_quantile(0.5, sum by (le) "
                        f"(rate(quartet_agent_inference_seconds_bucket{{{MINE}}}[$__rate_interval])))",
                        "p50",
                    ),
                    Query(
                        "histogram_quantile(0.99, sum by (le) "
                        f"(rate(quartet_agent_inference_seconds_bucket{{{MINE}}}[$__rate_interval])))",
                        "p99",
                    ),
                ],
                unit="s",
                steps=((None, GREEN), (0.5, YELLOW), (2, RED)),
                see="QuartetLagGrowing",
            ),
        ),
    ]


def _line_three() -> list[tuple[int, int, object]]:
    return [
        (
            8,
            7,
            chart(
                "Deviation of the confidence",
                f"Among the last {WINDOW} votes; under {LIMITS.confidence_stddev:g} is flat_confidence.",
                [Query(f"max by (agent) (quartet_agent_confidence_stddev{{{MINE}}})", "deviation")],
                unit="percentunit",
                steps=((None, RED), (LIMITS.confidence_stddev, GREEN)),
                see=MUTED,
            ),
        ),
        (
            8,
            7,
            chart(
                "Range of the confidence",
                f"From the 10th to the 90th percentile; under {LIMITS.confidence_range:g} is narrow_range.",
                [Query(f"max by (agent) (quartet_agent_confidence_p10_p90_range{{{MINE}}})", "p10 to p90")],
                unit="percentunit",
                steps=((None, RED), (LIMITS.confidence_range, GREEN)),
                see=MUTED,
            ),
        ),
        (
            8,
            7,
            chart(
                "Abstentions",
                "Abstentions a second by reason.",
                [
                    Query(
                        f"sum by (reason) (rate(quartet_agent_abstentions_total{{{MINE}}}[$__rate_interval])) > 0"
                        f" or sum(rate(quartet_agent_abstentions_total{{{MINE}}}[$__rate_interval])) == 0",
                        "{{reason}}",
                    )
                ],
                unit="cps",
                stacked=True,
                see=STATES,
            ),
        ),
    ]


def _line_four() -> list[tuple[int, int, object]]:
    return [
        (
            8,
            7,
            chart(
                "Hit ratio",
                f"Share of BUY and SELL votes that the market moved with, {HORIZON} bars later, of the last "
                f"{WINDOW} scored bars. 0.5 is a coin; fewer than {LIMITS.minimum} votes say nothing.",
                [Query(f"max by (agent) (quartet_agent_hit_ratio{{{MINE}}})", "hit ratio")],
                unit="percentunit",
                steps=((None, RED), (0.45, YELLOW), (0.5, GREEN)),
                top=1,
                see=SCORES,
            ),
        ),
        (
            8,
            7,
            chart(
                "Brier score",
                "Mean squared distance of the confidence from what came true: 0 is best, 0.25 is what 0.5 always gets.",
                [Query(f"max by (agent) (quartet_agent_brier_score{{{MINE}}})", "Brier score")],
                unit="none",
                steps=((None, GREEN), (0.25, YELLOW), (0.35, RED)),
                see=SCORES,
            ),
        ),
        (
            8,
            7,
            chart(
                "Scored votes",
                f"BUY and SELL votes among the last {WINDOW} scored bars: how much the two to the left rest on.",
                [Query(f"max by (agent) (quartet_agent_scored_votes{{{MINE}}})", "votes")],
                unit="short",
                steps=((None, YELLOW), (LIMITS.minimum, GREEN)),
                see=SCORES,
            ),
        ),
    ]


def _overview() -> list[tuple[int, int, object]]:
    return [
        (8, 7, states("All agents", "The state of each agent that is chosen above.", 'agent=~"$agent"', see=STATES)),
        (
            8,
            7,
            chart(
                "Hit ratio, the ensemble's too",
                f"Share of BUY and SELL that the market moved with, {HORIZON} bars later; `consensus` is the signal's. "
                "An ensemble that is not above its agents is worth nothing.",
                [Query('max by (agent) (quartet_agent_hit_ratio{agent=~"$agent|consensus"})', "{{agent}}")],
                unit="percentunit",
                steps=((None, RED), (0.45, YELLOW), (0.5, GREEN)),
                top=1,
                see=SCORES,
            ),
        ),
        (
            8,
            7,
            chart(
                "Weight",
                "Configured weight of each agent; the effective one is on the first dashboard.",
                [Query('max by (agent) (quartet_agent_weight{agent=~"$agent",kind="configured"})', "{{agent}}")],
                unit="percentunit",
                steps=((None, BLUE),),
                see="Reading the signal",
            ),
        ),
    ]


def board() -> Board:
    return Board(
        "quartet-agents",
        "Agents",
        "One row for each agent: state, votes, confidence against the limits, hit ratio, inference time, version",
        [
            Row("", [_overview()]),
            Row("$agent", [_line_one(), _line_two(), _line_three(), _line_four()], repeat="agent"),
        ],
        with_agent=True,
    )
