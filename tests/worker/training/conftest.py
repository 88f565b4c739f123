"""Trained once a module of tests and shared: markets, folders of artifacts, what training returned."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from worker.training.bars import Bars
from worker.training.dataset import Parts, Samples, make_samples, split
from worker.training.market import Market, generate
from worker.training.train import SEQUENCE, Trained, train_agents

torch.set_num_threads(1)  # as the program does: bits of a row then do not depend on its batch


@dataclass(frozen=True)
class Run:
    market: Market
    bars: Bars
    models: Path
    trained: dict[str, Trained]
    samples: Samples

    def parts(self, agent: str) -> Parts:
        return split(self.samples, windowed=agent in SEQUENCE)

    def inputs(self, agent: str, at: np.ndarray) -> np.ndarray:
        return self.samples.windows(at) if agent in SEQUENCE else self.samples.rows(at)


@pytest.fixture(scope="session")
def train_on(tmp_path_factory) -> Callable[..., Run]:
    made: dict[tuple, Run] = {}

    def train_on(signal: str, symbols: int, bars: int, seed: int = 0) -> Run:
        key = (signal, symbols, bars, seed)
        if key not in made:
            market = generate(symbols, bars, seed, signal=signal)
            models = tmp_path_factory.mktemp(signal)
            trained = train_agents(market.bars(), models, seed=1)
            made[key] = Run(market, market.bars(), models, {t.agent: t for t in trained}, make_samples(market.bars()))
        return made[key]

    return train_on
