"""Fitting a network to return paths: windows in, the cumulative returns of the next bars out.

The path is learnt in units of each step's own deviation, so that the twelve steps weigh the same;
afterwards these units are folded into the output layer, and the network answers in returns.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agents.nhits import NHiTS
from agents.patchtst import PatchTST
from streams.messages import HORIZON
from worker.training.dataset import WINDOW

EPOCHS = 6
"""Most passes."""
PATIENCE = 2
"""Passes without a better validation error of the last step before training stops."""
BATCH = 256
WEIGHT_DECAY = 1e-2
HEADS, PATCH, STRIDE = 4, 16, 8
"""Of PatchTST; patch and stride in bars."""
POSITION_STD = 0.5
"""First deviation of the position rows: about that of an embedded patch, so that from the start the last
patch can be told from the first. With the usual 0.02 six passes reached half of the R2 on the synthetic market."""

OnStep = Callable[[int, int], None]
"""Called with steps done and the most that there will be."""


@dataclass(frozen=True)
class Network:
    """A module to train, `[B, L, C]` to `[B, H]`; `output` is its last layer, linear.

    `metadata` are what its tensors do not tell a loader.
    """

    module: nn.Module
    output: nn.Linear
    learning_rate: float
    metadata: Mapping[str, int]


@dataclass(frozen=True)
class PathData:
    """Scaled features of all rows `[N, C]`, their `paths` `[N, H]`, and the rows where windows end."""

    features: NDArray[np.float32]
    paths: NDArray[np.float64]
    training: NDArray[np.int64]
    validation: NDArray[np.int64]


def make_network(agent: str, features: int, seed: int) -> Network:
    """A small `nhits` or `patchtst` of the shapes that the loader knows, with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _make_nhits(features) if agent == "nhits" else _make_patchtst(features)


def fit_network(network: Network, data: PathData, seed: int, on_step: OnStep) -> None:
    """Train the module in place; afterwards it is in evaluation mode, as of its best pass, and answers in returns.

    The caller sees to one torch thread, so that the sums are the same on every run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _fit(network, data, on_step)
    _answer_in_returns(network.output, *_units(data))
    network.module.eval()


def state_bytes(module: nn.Module) -> bytes:
    """The bytes of a `.pth` file: the state dict alone."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.getvalue()


def _make_nhits(features: int) -> Network:
    module = NHiTS(WINDOW, features, hidden=(48, 48), blocks=3, outputs=HORIZON, dropout=0.3)
    return Network(module, module.output_layer, 1e-3, {"window": WINDOW})


def _make_patchtst(features: int) -> Network:
    module = PatchTST(
        features,
        d_model=32,
        heads=HEADS,
        layers=1,
        feed_forward=64,
        outputs=HORIZON,
        patch=PATCH,
        stride=STRIDE,
        dropout=0.1,
    )
    nn.init.normal_(module.pos_encoding, std=POSITION_STD)
    told = {"window": WINDOW, "n_heads": HEADS, "patch": PATCH, "stride": STRIDE}
    return Network(module, module.output_proj, 2e-3, told)


def _fit(network: Network, data: PathData, on_step: OnStep) -> None:
    module = network.module
    mean, deviation = _units(data)
    features = torch.from_numpy(data.features)
    targets = torch.from_numpy(((data.paths - mean) / deviation).astype(np.float32))
    optimiser = torch.optim.AdamW(module.parameters(), lr=network.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
    back = torch.arange(1 - WINDOW, 1)
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
