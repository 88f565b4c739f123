"""Fitting a network to return paths: windows in, the cumulative returns of the next bars out.

The path is learnt in units of each step's own deviation, so that the twelve steps weigh the same;
afterwards these units are folded into the output layer, and the network answers in returns.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

EPOCHS = 14
"""Most passes."""
PATIENCE = 4
"""Passes without a better validation error of the last step before training stops."""
BATCH = 256
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-2

OnStep = Callable[[int, int], None]
"""Called with steps done and the most that there will be."""


@dataclass(frozen=True)
class PathData:
    """Scaled features of all rows `[N, C]`, their `paths` `[N, H]`, and the rows where windows of `window` end."""

    features: NDArray[np.float32]
    paths: NDArray[np.float64]
    window: int
    training: NDArray[np.int64]
    validation: NDArray[np.int64]


def fit_network(module: nn.Module, output: nn.Linear, data: PathData, seed: int, on_step: OnStep) -> None:
    """Train `module` in place (`[B, L, C]` to `[B, H]`); `output` is its last layer, linear.

    Afterwards it is in evaluation mode, has the weights of its best pass, and answers in returns.
    The caller sees to one torch thread, so that the sums are the same on every run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _fit(module, data, on_step)
    _answer_in_returns(output, *_units(data))
    module.eval()


def state_bytes(module: nn.Module) -> bytes:
    """The bytes of a `.pth` file: the state dict alone."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.getvalue()


def _fit(module: nn.Module, data: PathData, on_step: OnStep) -> None:
    mean, deviation = _units(data)
    features = torch.from_numpy(data.features)
    targets = torch.from_numpy(((data.paths - mean) / deviation).astype(np.float32))
    optimiser = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
    back = torch.arange(1 - data.window, 1)
    training, validation = torch.from_numpy(data.training), torch.from_numpy(data.validation)
    best, best_state, waited = float("inf"), copy.deepcopy(module.state_dict()), 0
    for epoch in range(EPOCHS):
        module.train()
        for rows in torch.split(training[torch.randperm(len(training))], BATCH):
            optimiser.zero_grad()
            loss = nn.functional.mse_loss(module(features[rows[:, None] + back]), targets[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
        schedule.step()
        error = _error(module, features, targets, validation, back)
        on_step(epoch + 1, EPOCHS)
        waited = 0 if error < best else waited + 1
        if waited == 0:
            best, best_state = error, copy.deepcopy(module.state_dict())
        if waited == PATIENCE:
            break
    module.load_state_dict(best_state)


def _error(module: nn.Module, features: Any, targets: Any, rows: Any, back: Any) -> float:
    """Mean squared error of the last step, in units of its deviation: what a vote is judged by."""
    module.eval()
    with torch.inference_mode():
        parts = [
            ((module(features[at[:, None] + back])[:, -1] - targets[at, -1]) ** 2).sum()
            for at in torch.split(rows, 1024)
        ]
    return float(sum(parts)) / len(rows)


def _units(data: PathData) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation of each step of the path over the training rows, `[H]`."""
    paths = data.paths[data.training]
    return paths.mean(axis=0), np.maximum(paths.std(axis=0), 1e-12)


def _answer_in_returns(output: nn.Linear, mean: NDArray[np.float64], deviation: NDArray[np.float64]) -> None:
    with torch.no_grad():
        output.weight.mul_(torch.from_numpy(deviation).float()[:, None])
        output.bias.mul_(torch.from_numpy(deviation).float()).add_(torch.from_numpy(mean).float())
