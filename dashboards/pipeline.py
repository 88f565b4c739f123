"""Dashboard 3: rate, errors and durations of the stages, and what the streams and commits use up."""

from __future__ import annotations

from dashboards.board import Board, Row
from dashboards.panels import BLUE, GREEN, RED, YELLOW, Query, chart, figure, quantiles

STALLED = "QuartetWorkerStalled"
LAG = "QuartetLagGrowing"
LENGTH = "QuartetStreamLength"
REJECTS = "QuartetRejects"
LATE = "QuartetAgentLate"


def _rate(metric: str, by: str) -> list[Query]:
    return [Query(f"sum by ({by}) (rate({metric}[$__rate_interval]))", f"{{{{{by}}}}}")]


def board() -> Board:
    top = [
        (
            4,
            4,
            figure(
                "Bars a second",
                "Entries read from the input, whatever became of them.",
                [Query("sum(rate(quartet_bars_total[$__rate_interval]))", "bars")],
                unit="cps",
                steps=((None, BLUE),),
                see="QuartetNoFreshBar",
            ),
        ),
        (
            4,
            4,
            figure(
                "Signals a second",
                "One for each ready vector; none while bars flow is a page, warm-up aside.",
                [Query("sum(rate(quartet_signals_total[$__rate_interval]))", "signals")],
                unit="cps",
                steps=((None, BLUE),),
                see="QuartetNoSignals",
            ),
        ),
        (
            4,
            4,
            figure(
                "Lag",
                "Entries that wait in the input. It should return to 0 between two closes of the bars.",
                [Query("sum(max by (stream) (quartet_stream_lag))", "entries")],
                unit="short",
                steps=((None, GREEN), (1_000, YELLOW), (10_000, RED)),
                see=LAG,
            ),
        ),
        (
            4,
            4,
            figure(
                "Bar to signal, p99",
                "From a bar's entry into the stream to its committed signal.",
                [Query(quantiles("quartet_bar_to_signal_seconds")[2].expr, "p99")],
                unit="s",
                steps=((None, GREEN), (1, YELLOW), (5, RED)),
                see=LAG,
            ),
        ),
        (
            4,
            4,
            figure(
                "Commits that failed",
                "Tries to commit that did not succeed at once; each is tried again, none is lost.",
                [Query('sum(rate(quartet_commits_total{result!="ok"}[$__rate_interval]))', "failed")],
                unit="cps",
                steps=((None, GREEN), (0.01, YELLOW), (1, RED)),
                see=STALLED,
            ),
        ),
        (
            4,
            4,
            figure(
                "Recoveries",
                "Times a process took up a position: 1 after a restart; more means that the server went back.",
                [Query("max(quartet_recoveries_total)", "recoveries")],
                unit="none",
                steps=((None, GREEN), (2, YELLOW), (5, RED)),
                see="QuartetWorkerDown",
            ),
        ),
    ]
    flow = [
        (
            12,
            8,
            chart(
                "Entries by outcome",
                "Each entry has one outcome; the sum is what came in.",
                _rate("quartet_bars_total", "outcome"),
                unit="cps",
                stacked=True,
                see=REJECTS,
            ),
        ),
        (
            12,
            8,
            chart(
                "Lag by input",
                "Entries that follow the committed position, by input key.",
                [Query("max by (stream) (quartet_stream_lag)", "{{stream}}")],
                unit="short",
                steps=((None, GREEN), (10_000, RED)),
                see=LAG,
            ),
        ),
    ]
    times = [
        (
            12,
            8,
            chart(
                "Bar to signal",
                "From a bar's entry into the stream to its committed signal.",
                quantiles("quartet_bar_to_signal_seconds"),
                unit="s",
                steps=((None, GREEN), (1, YELLOW), (5, RED)),
                see=LAG,
            ),
        ),
        (
            12,
            8,
            chart(
                "Stage times, p99",
                "Time of one batch in each stage.",
                [quantiles("quartet_stage_seconds", "stage")[2]],
                unit="s",
                steps=((None, GREEN), (1, YELLOW), (5, RED)),
                see=LAG,
            ),
        ),
        (
            12,
            8,
            chart(
                "Time spent by stage",
                "Seconds of work in a second: near 1 in sum the worker is saturated.",
                _rate("quartet_stage_seconds_sum", "stage"),
                unit="percentunit",
                steps=((None, GREEN), (0.8, YELLOW), (0.95, RED)),
                stacked=True,
                see=LAG,
            ),
        ),
        (
            12,
            8,
            chart(
                "Batches by stage",
                "Batches a second; reads go on while the input is silent, and stop where the server is away.",
                _rate("quartet_stage_seconds_count", "stage"),
                unit="cps",
                see=STALLED,
            ),
        ),
    ]
    commits = [
        (
            8,
            8,
            chart(
                "Rejects by reason",
                "Entries refused into the stream of rejects.",
                [
                    Query(
                        "sum by (stage, reason) (rate(quartet_rejected_total[$__rate_interval])) > 0"
                        " or sum(rate(quartet_rejected_total[$__rate_interval])) == 0",
                        "{{stage}} {{reason}}",
                    )
                ],
                unit="cps",
                stacked=True,
                see=REJECTS,
            ),
        ),
        (
            8,
            8,
            chart(
                "Stream lengths",
                "Entries in each stream. Outputs are cut at the setting retain, 1,000,000 unless set; "
                "inputs by whoever writes them.",
                [Query("max by (stream) (quartet_stream_length)", "{{stream}}")],
                unit="short",
                steps=((None, GREEN), (1_500_000, YELLOW), (5_000_000, RED)),
                see=LENGTH,
            ),
        ),
        (
            8,
            8,
            chart(
                "Commits by result",
                "Tries to commit a second, by what became of them; lost_reply was found applied by a later try.",
                _rate("quartet_commits_total", "result"),
                unit="cps",
                see=STALLED,
            ),
        ),
    ]
    stages = [
        (
            12,
            8,
            chart(
                "Missed deadlines",
                "Vectors a second that were decided without an agent that runs as a process of its own.",
                [
                    Query(
                        "sum by (agent) "
                        '(rate(quartet_agent_abstentions_total{reason="deadline_missed"}[$__rate_interval]))',
                        "{{agent}}",
                    )
                ],
                unit="cps",
                stacked=True,
                see=LATE,
            ),
        ),
        (
            12,
            8,
            chart(
                "Late votes",
                "Votes a second that came after their vector was decided: the agent is back, or too slow.",
                [Query("sum by (agent) (rate(quartet_agent_late_votes_total[$__rate_interval]))", "{{agent}}")],
                unit="cps",
                stacked=True,
                see=LATE,
            ),
        ),
    ]
    return Board(
        "quartet-pipeline",
        "Pipeline",
        "Rate, lag, stage times, bar to signal, rejects, stream lengths, commits, recoveries",
        [Row("", [top, flow, times[:2], times[2:], commits, stages])],
    )
