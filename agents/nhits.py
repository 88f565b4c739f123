"""N-HiTS as the field trains it: parallel perceptrons over the flattened window, joined by one layer.

After Challu et al., "N-HiTS: Neural Hierarchical Interpolation for Time Series Forecasting" (2022),
without its pooling and interpolation: every block reads the whole window.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from agents import checkpoint
from agents.agent import Built
from agents.checkpoint import Checkpoint, describe

__all__ = ["HiddenNHiTS", "NHiTS", "build", "describe", "parse"]

WINDOW = 64
"""Bars a row where neither tensors nor metadata tell."""

_KEY = re.compile(r"blocks\.(\d{1,4})\.(\d{1,4})\.(?:weight|bias)|output_layer\.(?:weight|bias)")
_EXPECTED = "blocks.N.0/3/6 or blocks.N.0/2 and output_layer"
_WINDOW_KEYS = ("window", "seq_len", "sequence_length", "lookback", "input_size")


class NHiTS(nn.Module):
    """Blocks of Linear, ReLU, Dropout, ..., Linear; their outputs side by side, then `output_layer`.

    Keys `blocks.N.0/3/6` and `output_layer`. Reads `[B, L, C]` (L of `window`, C of `features`), flattened
    bar by bar, and gives `[B, K]`. `block_outputs` is K unless set. 64 x 49, hidden (512, 512), 3 blocks
    and 12 outputs have 5,625,312 parameters.
    """

    def __init__(
        self,
        window: int,
        features: int,
        hidden: Sequence[int] = (512, 512),
        blocks: int = 3,
        outputs: int = 12,
        dropout: float = 0.1,
        block_outputs: int | None = None,
    ) -> None:
        super().__init__()
        joined = outputs if block_outputs is None else block_outputs
        sizes = (window * features, *hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(*_layers(sizes, dropout), nn.Linear(sizes[-1], joined)) for _ in range(blocks)
        )
        self.output_layer = nn.Linear(joined * blocks, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, C]` to `[B, K]`."""
        flat = x.flatten(1)  # [B, L * C]
        result: Tensor = self.output_layer(torch.cat([block(flat) for block in self.blocks], dim=1))
        return result


class HiddenNHiTS(nn.Module):
    """Blocks of Linear, ReLU, Linear, ReLU; their hidden layers side by side, then `output_layer`.

    Keys `blocks.N.0/2` and `output_layer`. Shapes as of `NHiTS`.
    """

    def __init__(self, window: int, features: int, hidden: tuple[int, int], blocks: int, outputs: int) -> None:
        super().__init__()
        first, second = hidden
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(window * features, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU())
            for _ in range(blocks)
        )
        self.output_layer = nn.Linear(second * blocks, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, C]` to `[B, K]`."""
        flat = x.flatten(1)  # [B, L * C]
        result: Tensor = self.output_layer(torch.cat([block(flat) for block in self.blocks], dim=1))
        return result


def parse(data: bytes, suffix: str) -> Checkpoint:  # noqa: ARG001 - a checkpoint is known by its bytes
    """Read a checkpoint. Raises `Refused` with `unsafe_artifact` or `corrupt_artifact`."""
    return checkpoint.read(data)


def build(parsed: Checkpoint, metadata: Mapping[str, Any]) -> Built:
    """Recognise one of the two shapes. Raises `Refused` with `unknown_architecture` or `state_dict_mismatch`."""
    state = checkpoint.tensors(parsed, _KEY, _EXPECTED)
    found = [(int(m[1]), int(m[2])) for m in map(_KEY.fullmatch, state) if m and m[1]]
    places = sorted({place for _, place in found})
    if len(places) < 2 or (places != [0, 2] and places != list(range(0, 3 * len(places), 3))):
        raise checkpoint.unknown(state, _EXPECTED)
    blocks = checkpoint.count((block for block, _ in found), "blocks")
    maps = (metadata, parsed.metadata)
    sizes = [checkpoint.shape(state, f"blocks.0.{place}.weight", 2) for place in places]
    outputs = checkpoint.shape(state, "output_layer.weight", 2)[0]
    product = sizes[0][1]
    window, width = checkpoint.split(
        product,
        checkpoint.setting(checkpoint.unflattened(maps, "input_size", product), _WINDOW_KEYS),
        checkpoint.declared_width(maps, product),
        WINDOW,
        "the first layer",
    )
    out = [size[0] for size in sizes]

    def make() -> nn.Module:
        if places == [0, 2]:
            return HiddenNHiTS(window, width, (out[0], out[1]), blocks, outputs)
        return NHiTS(window, width, out[:-1], blocks, outputs, dropout=0.0, block_outputs=out[-1])

    module = checkpoint.fill(make, state)
    return Built(
        architecture="nhits" if places != [0, 2] else "nhits-hidden",
        width=width,
        window=window,
        outputs=outputs,
        parameters=sum(tensor.numel() for tensor in state.values()),
        network=checkpoint.Network(module, outputs),
        features=checkpoint.names(parsed.metadata),
        facts=checkpoint.facts(parsed, state, blocks=blocks, hidden=out),
    )


def _layers(sizes: Sequence[int], dropout: float) -> list[nn.Module]:
    """Linear, ReLU, Dropout for each step from one size to the next."""
    return [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout))]
