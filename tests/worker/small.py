"""Small parts for tests of the stages: models that are plain functions, seats, and a market as stream entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agents.agent import Model
from agents.heads import ReturnHead
from streams.contracts import FEATURE_SETS
from streams.messages import Entry
from worker.demo.publisher import fields_of
from worker.demo.scene import rounds
from worker.voting import Seat

LAST_TS = 1_760_000_040_000
Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def rising(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the last bar's first feature says, as a small return that differs from row to row."""
    last = x if x.ndim == 2 else x[:, -1]
    return (0.01 + np.abs(np.sin(last[:, :1])) / 100).astype(np.float32)


def falling(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return -rising(x)


def model(
    agent: str, network: Network = rising, *, feature_set: str = "v3", window: int = 1, sha256: str = "", width: int = 0
) -> Model:
    """A model of the whole feature set, or of its first `width` names."""
    features = FEATURE_SETS[feature_set].features
    return Model(
        agent=agent,
        version=f"v20260101_000000_{feature_set}",
        file=Path(f"{agent}_v20260101_000000_{feature_set}.ubj"),
        sha256=sha256 or f"{agent}{network.__name__}".encode().hex().ljust(64, "0")[:64],
        feature_set=feature_set,
        features=features[: width or len(features)],
        contract=FEATURE_SETS[feature_set].contract,
        window=window,
        parameters=1,
        outputs=1,
        network=network,
        head=ReturnHead(threshold=0.001, residual_std=0.02),
    )


def seat(agent: str, network: Network = rising, *, weight: float = 0.25, **given: object) -> Seat:
    return Seat(agent, weight, model(agent, network, **given))  # type: ignore[arg-type]


def market(symbols: int, bars: int, key: str = "t:bars") -> list[Entry]:
    """Bars of the demonstration's market, minute by minute, as they lie on a stream."""
    minutes = islice(rounds(0, symbols, bars, LAST_TS), bars)
    flat = [bar for minute in minutes for bar in minute]
    return [
        Entry(key, f"{bar.ts + 60_000}-{n}", {k.encode(): v.encode() for k, v in fields_of(bar).items()})
        for n, bar in enumerate(flat)
    ]


def batches(entries: Sequence[Entry], size: int) -> list[Sequence[Entry]]:
    return [entries[i : i + size] for i in range(0, len(entries), size)]
