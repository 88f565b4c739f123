"""Files as the field has them: state dicts by key and shape, legacy pickled scalers and trees, metadata.

The tensors are made by hand, never from the program's own modules, so that a renamed key turns a test red.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from sklearn.preprocessing import StandardScaler

from agents import discovery, scalers
from streams.contracts import V2

# As the worker does at its start.
torch.set_num_threads(1)

STEM = "v20260101_120000"


class Seeded:
    """Random tensors, about as large as trained ones: a matrix is scaled by its inputs."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        values = self._rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else 10.0)
        return torch.from_numpy(values.astype(np.float32))

    def linear(self, state: dict[str, torch.Tensor], name: str, inputs: int, outputs: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = self(outputs, inputs), self(outputs)

    def norm(self, state: dict[str, torch.Tensor], name: str, size: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1.0 + self(size), self(size)


def nhits_state(inputs=64 * 49, hidden=(512, 512), blocks=3, outputs=12, joined=None, seed=1):
    """`blocks.N.0/3/6` and `output_layer`."""
    draw, state, joined = Seeded(seed), {}, joined or outputs
    for n in range(blocks):
        sizes = (inputs, *hidden, joined)
        for place, (a, b) in enumerate(pairwise(sizes)):
            draw.linear(state, f"blocks.{n}.{3 * place}", a, b)
    draw.linear(state, "output_layer", joined * blocks, outputs)
    return state


def hidden_nhits_state(inputs=64 * 49, hidden=(512, 256), blocks=3, outputs=12, seed=2):
    """`blocks.N.0/2` and `output_layer` of hidden x blocks."""
    draw, state = Seeded(seed), {}
    for n in range(blocks):
        draw.linear(state, f"blocks.{n}.0", inputs, hidden[0])
        draw.linear(state, f"blocks.{n}.2", hidden[0], hidden[1])
    draw.linear(state, "output_layer", hidden[1] * blocks, outputs)
    return state


def encoder_state(draw, state, name, layers, d_model, feed_forward):
    for n in range(layers):
        prefix = f"{name}.layers.{n}"
        state[f"{prefix}.self_attn.in_proj_weight"] = 2.0 * draw(3 * d_model, d_model)
        state[f"{prefix}.self_attn.in_proj_bias"] = draw(3 * d_model)
        draw.linear(state, f"{prefix}.self_attn.out_proj", d_model, d_model)
        draw.linear(state, f"{prefix}.linear1", d_model, feed_forward)
        draw.linear(state, f"{prefix}.linear2", feed_forward, d_model)
        draw.norm(state, f"{prefix}.norm1", d_model)
        draw.norm(state, f"{prefix}.norm2", d_model)


def patchtst_state(
    features=49, d_model=128, feed_forward=512, layers=3, outputs=12, patch=16, rows=100, leading=False, seed=3
):
    """`patch_embedding`, `pos_encoding`, `transformer`, `output_proj`."""
    draw, state = Seeded(seed), {}
    state["pos_encoding"] = 5.0 * (draw(1, rows, d_model) if leading else draw(rows, d_model))
    draw.linear(state, "patch_embedding", patch * features, d_model)
    encoder_state(draw, state, "transformer", layers, d_model, feed_forward)
    draw.linear(state, "output_proj", d_model, outputs)
    return state


def token_state(features=23, d_model=128, feed_forward=256, layers=2, outputs=3, seed=4):
    """`input_proj`, `encoder`, `head.0/1`."""
    draw, state = Seeded(seed), {}
    draw.linear(state, "input_proj", features, d_model)
    encoder_state(draw, state, "encoder", layers, d_model, feed_forward)
    draw.norm(state, "head.0", d_model)
    draw.linear(state, "head.1", d_model, outputs)
    return state


def saved(value: Any, **options: Any) -> bytes:
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def json_scaler(width: int, names: Any = None, seed: int = 5) -> bytes:
    rng = np.random.default_rng(seed)
    return scalers.to_json(scalers.standard(rng.normal(size=width), rng.uniform(0.5, 2.0, width), names))


def legacy_scaler(names: Any, seed: int = 6) -> StandardScaler:
    """A scaler as scikit-learn fits it to a DataFrame: the names are inside."""
    import pandas as pd

    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(3.0, 2.0, size=(50, len(names))), columns=list(names))
    return StandardScaler().fit(frame)


def dumped(value: Any) -> bytes:
    buffer = io.BytesIO()
    joblib.dump(value, buffer)
    return buffer.getvalue()


class Hostile:
    """Unpickled by an ordinary reader, this makes a file appear."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._trace),)


@dataclass
class Parts:
    """One artifact before it is written: a small N-HiTS of 4 bars x 8 features (v2) that loads, unless changed."""

    state: dict[str, Any] = field(default_factory=lambda: nhits_state(4 * 8, (16, 16), 2, 12))
    metadata: dict[str, Any] | None = field(default_factory=lambda: {"window": 4, "contract": V2.contract})
    scaler: bytes | None = field(default_factory=lambda: json_scaler(8, V2.features))
    model_bytes: bytes | None = None
    prefix: str = "nhits"
    stem: str = STEM
    suffix: str = ".pth"
    scaler_ending: str = "_scaler.json"
    metadata_ending: str = "_meta.json"

    def write(self, models: Path) -> discovery.Candidate:
        """Write the files; the candidate of them."""
        stem = f"{self.prefix}_{self.stem}"
        data = saved(self.state) if self.model_bytes is None else self.model_bytes
        (models / f"{stem}{self.suffix}").write_bytes(data)
        if self.scaler is not None:
            (models / f"{stem}{self.scaler_ending}").write_bytes(self.scaler)
        if self.metadata is not None:
            (models / f"{stem}{self.metadata_ending}").write_text(json.dumps(self.metadata))
        agent = next(agent for agent, prefixes in discovery.PREFIXES.items() if self.prefix in prefixes)
        return next(c for c in discovery.discover(models, agent) if c.file.name == f"{stem}{self.suffix}")
