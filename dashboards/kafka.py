"""Dashboard 5: the engine on Kafka and the bridge to it. Without them it is empty, and says so."""

from __future__ import annotations

from dashboards.board import Board, Row
from dashboards.panels import BLUE, GREEN, RED, YELLOW, Query, chart, figure

LAG = "QuartetLagGrowing"
REBALANCING = "QuartetRebalancing"
REJECTS = "QuartetRejects"

OF_WORKERS = "quartet_stream_lag and on (instance) quartet_kafka_rebalances_total"
"""Each worker tells of its own partitions, so theirs are added; other lags are of one reader."""
OF_BRIDGE = "quartet_stream_lag and on (instance) quartet_bridge_records_total"


def board() -> Board:
    top = [
        (
            6,
            4,
            figure(
                "Workers",
                "Workers that answer and share the partitions. Empty where nothing runs on Kafka.",
                [Query("count(quartet_kafka_rebalances_total)", "workers")],
                unit="none",
                steps=((None, BLUE),),
                see="QuartetWorkerDown",
            ),
        ),
        (
            6,
            4,
            figure(
                "Lag of all partitions",
                "What waits in the topic of bars. Records behind those in hand count as one entry each.",
                [Query(f"sum({OF_WORKERS})", "entries")],
                unit="short",
                steps=((None, GREEN), (1_000, YELLOW), (10_000, RED)),
                see=LAG,
            ),
        ),
        (
            6,
            4,
            figure(
                "Rebalances",
                "Of the worker that saw most of them lately. Each one stops every worker for a moment.",
                [Query("max(increase(quartet_kafka_rebalances_total[$__rate_interval]))", "rebalances")],
                unit="none",
                steps=((None, GREEN), (1, YELLOW), (5, RED)),
                see=REBALANCING,
            ),
        ),
        (
            6,
            4,
            figure(
                "Lag of the bridge",
                "Entries on Redis that are not on Kafka yet.",
                [Query(f"sum(max by (stream) ({OF_BRIDGE}))", "entries")],
                unit="short",
                steps=((None, GREEN), (1_000, YELLOW), (10_000, RED)),
                see=LAG,
            ),
        ),
    ]
    workers = [
        (
            12,
            8,
            chart(
                "Lag by topic",
                "Added over the workers, each of which knows its own partitions.",
                [Query(f"sum by (stream) ({OF_WORKERS})", "{{stream}}")],
                unit="short",
                steps=((None, GREEN), (10_000, RED)),
                see=LAG,
            ),
        ),
        (
            12,
            8,
            chart(
                "Rebalances by worker",
                "A worker that joins, leaves, dies or is too slow for the group makes all of them count one.",
                [
                    Query(
                        "sum by (instance) (increase(quartet_kafka_rebalances_total[$__rate_interval]))", "{{instance}}"
                    )
                ],
                unit="none",
                see=REBALANCING,
            ),
        ),
    ]
    bridge = [
        (
            12,
            8,
            chart(
                "Bridge: bars by outcome",
                "Carried, refused as unreadable, left out as forming, or gone before they were read.",
                [Query("sum by (outcome) (rate(quartet_bridge_bars_total[$__rate_interval]))", "{{outcome}}")],
                unit="cps",
                stacked=True,
                see=REJECTS,
            ),
        ),
        (
            12,
            8,
            chart(
                "Bridge: records a second",
                "A record holds up to 256 bars of one partition; near one bar a record while the feed is quiet.",
                [Query("sum(rate(quartet_bridge_records_total[$__rate_interval]))", "records")],
                unit="cps",
                see=LAG,
            ),
        ),
    ]
    return Board(
        "quartet-kafka",
        "Kafka",
        "Workers, lag by topic, rebalances, the bridge",
        [Row("", [top, workers, bridge])],
    )
