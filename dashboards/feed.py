"""Dashboard 4: what comes in: its quality, its gaps, and how far it has drifted from what the models learned."""

from __future__ import annotations

from dashboards.board import Board, Row
from dashboards.panels import BLUE, GREEN, RED, YELLOW, Query, chart, figure, share

REJECTS = "QuartetRejects"
FRESH = "QuartetNoFreshBar"
ALL = "sum(rate(quartet_bars_total[$__rate_interval]))"
CLOSED = 'sum(rate(quartet_bars_total{outcome!="unclosed"}[$__rate_interval]))'


def _share_of(outcome: str) -> str:
    """Of all entries; the rejected of those that are no forming bars, as the alert counts them."""
    of = CLOSED if outcome == "rejected" else ALL
    return share(f'sum(rate(quartet_bars_total{{outcome="{outcome}"}}[$__rate_interval]))', of)


def _figure_of(outcome: str, title: str, text: str, red: float) -> tuple[int, int, object]:
    steps = ((None, GREEN), (red / 5, YELLOW), (red, RED))
    panel = figure(title, text, [Query(_share_of(outcome), outcome)], unit="percentunit", steps=steps, see=REJECTS)
    return 4, 4, panel


def board() -> Board:
    top = [
        _figure_of(
            "rejected",
            "Rejected",
            "Share of entries, forming bars aside, that were refused. Over 5 % signals are withheld.",
            0.05,
        ),
        _figure_of("duplicate", "Duplicates", "Share of entries that repeat the bar before, dropped.", 0.5),
        _figure_of("unclosed", "Unclosed", "Share of entries that are forming bars: skipped, never used.", 1.0),
        (
            4,
            4,
            figure(
                "Lost",
                "Entries gone before they were read, since the start. Anything but 0 is a defect of retention.",
                [Query('sum(quartet_bars_total{outcome="lost"})', "lost")],
                unit="short",
                steps=((None, GREEN), (1, RED)),
                see="QuartetInputLost",
            ),
        ),
        (
            4,
            4,
            figure(
                "Age of the last bar",
                "Time since a bar arrived.",
                [Query("time() - max(quartet_last_bar_timestamp_seconds > 0)", "age")],
                unit="s",
                steps=((None, BLUE),),
                see=FRESH,
            ),
        ),
        (
            4,
            4,
            figure(
                "Age in intervals",
                "The same in intervals of the bars, the variable above.",
                [Query("(time() - max(quartet_last_bar_timestamp_seconds > 0)) / $interval", "intervals")],
                unit="none",
                steps=((None, GREEN), (2, YELLOW), (3, RED)),
                see=FRESH,
            ),
        ),
    ]
    quality = [
        (
            12,
            8,
            chart(
                "Rejected share",
                "Share of entries, forming bars aside, that were refused; the limit is 5 % of the last 500.",
                [Query(_share_of("rejected"), "rejected")],
                unit="percentunit",
                steps=((None, GREEN), (0.05, RED)),
                see=REJECTS,
            ),
        ),
        (
            12,
            8,
            chart(
                "Rejects by reason",
                "What is wrong with the refused entries; the stream of rejects holds them as they came.",
                [
                    Query(
                        "sum by (reason) (rate(quartet_rejected_total[$__rate_interval])) > 0"
                        " or sum(rate(quartet_rejected_total[$__rate_interval])) == 0",
                        "{{reason}}",
                    )
                ],
                unit="cps",
                stacked=True,
                see=REJECTS,
            ),
        ),
        (
            12,
            8,
            chart(
                "Flags",
                "Accepted bars that were flagged: gap, late, jump, frozen, stale.",
                [Query("sum by (flag) (rate(quartet_bar_flags_total[$__rate_interval]))", "{{flag}}")],
                unit="cps",
                stacked=True,
                see="Flags",
            ),
        ),
        (
            12,
            8,
            chart(
                "Flagged share",
                "Share of accepted bars with each flag.",
                [
                    Query(
                        "sum by (flag) (rate(quartet_bar_flags_total[$__rate_interval]))"
                        " / on () group_left () "
                        '(sum(rate(quartet_bars_total{outcome="accepted"}[$__rate_interval])) > 0)'
                        " or sum by (flag) (quartet_bar_flags_total) * 0",
                        "{{flag}}",
                    )
                ],
                unit="percentunit",
                steps=((None, GREEN), (0.05, YELLOW), (0.2, RED)),
                see="Flags",
            ),
        ),
    ]
    outcomes = [
        (
            24,
            8,
            chart(
                "Entries by outcome",
                "What became of each entry: exclusive, and their sum is what came in.",
                [Query("sum by (outcome) (rate(quartet_bars_total[$__rate_interval]))", "{{outcome}}")],
                unit="cps",
                steps=((None, BLUE),),
                stacked=True,
                see=REJECTS,
            ),
        )
    ]
    drift = [
        (
            24,
            9,
            chart(
                "Feature drift",
                "Distance of the recent features from those that the scalers were fitted on, in fitted deviations: "
                "1 is a mean one deviation away, or a spread e times as wide or as narrow.",
                [Query("max by (feature) (quartet_feature_drift)", "{{feature}}")],
                unit="none",
                steps=((None, GREEN), (1, YELLOW), (3, RED)),
                see="Feature drift",
            ),
        )
    ]
    return Board(
        "quartet-feed",
        "Feed and drift",
        "Rejects, duplicates, gaps and flags, the age of bars, and the drift of the features",
        [Row("", [top, quality[:2], quality[2:], outcomes, drift])],
        with_interval=True,
    )
