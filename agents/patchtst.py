"""PatchTST as the field trains it: patches of bars, or one bar, as tokens of a transformer encoder.

After Nie et al., "A Time Series is Worth 64 Words" (2023), with the channels of a patch read
together. The channel-independent shape of the paper (a patch of 16 inputs) is another architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agents import checkpoint
from agents.agent import Built
from agents.checkpoint import Checkpoint, describe

__all__ = ["PatchTST", "TokenPatchTST", "build", "describe", "parse"]

HEADS, WINDOW, PATCH, STRIDE = 4, 64, 16, 8
"""Where neither tensors nor metadata tell; window, patch and stride in bars."""

_LAYER = (
    r"layers\.(\d{1,4})\.(?:self_attn\.(?:in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
    r"|(?:linear1|linear2|norm1|norm2)\.(?:weight|bias))"
)
_PATCHES = re.compile(rf"pos_encoding|(?:patch_embedding|output_proj)\.(?:weight|bias)|transformer\.{_LAYER}")
_TOKEN = re.compile(rf"(?:input_proj|head\.[01])\.(?:weight|bias)|encoder\.{_LAYER}")
_EXPECTED = (
    "patch_embedding (of 16 bars x features), pos_encoding, transformer.layers.N and output_proj, "
    "or input_proj, encoder.layers.N and head.0/1"
)


class PatchTST(nn.Module):
    """Patches -> `patch_embedding` + first rows of `pos_encoding` -> `transformer` -> mean -> `output_proj`.

    Post-norm, ReLU, batch first. Reads `[B, L, C]` and gives `[B, K]`; a patch is `patch` bars flattened
    bar by bar, every `stride` bars. 49 features, d_model 128, feed_forward 512, 3 layers and 12 outputs
    have 709,644 parameters.
    """

    def __init__(
        self,
        features: int,
        d_model: int = 128,
        heads: int = HEADS,
        layers: int = 3,
        feed_forward: int = 512,
        outputs: int = 12,
        patch: int = PATCH,
        stride: int = STRIDE,
        positions: int = 100,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.patch, self.stride = patch, stride
        self.patch_embedding = nn.Linear(patch * features, d_model)
        self.pos_encoding = nn.Parameter(torch.randn(positions, d_model) * 0.02)
        self.transformer = _encoder(d_model, heads, layers, feed_forward, "relu", dropout)
        self.output_proj = nn.Linear(d_model, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, C]` to `[B, K]`."""
        patches = x.unfold(1, self.patch, self.stride).transpose(2, 3).flatten(2)  # [B, P, patch * C]
        tokens = self.patch_embedding(patches) + self.pos_encoding[: patches.shape[1]]  # [B, P, D]
        result: Tensor = self.output_proj(self.transformer(tokens).mean(dim=1))
        return result


class TokenPatchTST(nn.Module):
    """The v3 shape: `input_proj` -> one token -> `encoder` (post-norm, gelu) -> mean -> `head`.

    Reads `[B, C]` and gives `[B, K]`. Rows never attend to each other: each is a sequence of one
    token, whatever the batch. 23 features, 2 layers and 3 outputs have 268,675 parameters.
    """

    def __init__(
        self,
        features: int,
        d_model: int = 128,
        heads: int = HEADS,
        layers: int = 2,
        feed_forward: int = 256,
        outputs: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.input_proj = nn.Linear(features, d_model)
        self.encoder = _encoder(d_model, heads, layers, feed_forward, "gelu", dropout)
        self.head = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C]` to `[B, K]`."""
        token = self.input_proj(x).unsqueeze(1)  # [B, 1, D]
        result: Tensor = self.head(self.encoder(token).mean(dim=1))
        return result


def parse(data: bytes, suffix: str) -> Checkpoint:  # noqa: ARG001 - a checkpoint is known by its bytes
    """Read a checkpoint. Raises `Refused` with `unsafe_artifact` or `corrupt_artifact`."""
    return checkpoint.read(data)


def build(parsed: Checkpoint, metadata: Mapping[str, Any]) -> Built:
    """Recognise one of the shapes. Raises `Refused` with `unknown_architecture` or `state_dict_mismatch`."""
    maps = (metadata, parsed.metadata)
    if "input_proj.weight" in parsed.state:
        return _build_token(parsed)
    return _build_patches(parsed, maps)


def _build_patches(parsed: Checkpoint, maps: Sequence[Mapping[str, Any]]) -> Built:
    state = checkpoint.tensors(parsed, _PATCHES, _EXPECTED)
    d_model, product = checkpoint.shape(state, "patch_embedding.weight", 2)
    patch = checkpoint.setting(maps, ("patch", "patch_len", "patch_size", "patch_length"))
    if product in (PATCH, patch):
        raise checkpoint.unknown([f"patch_embedding.weight of {product} inputs", *state], _EXPECTED)
    patch, width = checkpoint.split(product, patch, checkpoint.declared_width(maps, product), PATCH, "patch_embedding")
    window = checkpoint.setting(maps, ("window", "seq_len", "sequence_length", "lookback")) or WINDOW
    stride = checkpoint.setting(maps, ("stride", "patch_stride")) or STRIDE
    heads = checkpoint.setting(maps, ("n_heads", "num_heads", "nhead", "heads")) or HEADS
    if "pos_encoding" in state and state["pos_encoding"].ndim == 3 and state["pos_encoding"].shape[0] == 1:
        state["pos_encoding"] = state["pos_encoding"][0]
    positions = checkpoint.shape(state, "pos_encoding", 2)[0]
    _check_patches(window, patch, stride, positions)
    if d_model % heads:
        raise checkpoint.mismatch(
            f"{heads} heads do not divide d_model {d_model}; state the true n_heads in the metadata"
        )
    layers, feed_forward = _layers(state, "transformer")
    outputs = checkpoint.shape(state, "output_proj.weight", 2)[0]
    module = checkpoint.fill(
        lambda: PatchTST(width, d_model, heads, layers, feed_forward, outputs, patch, stride, positions, 0.0), state
    )
    return Built(
        architecture="patchtst",
        width=width,
        window=window,
        outputs=outputs,
        parameters=sum(tensor.numel() for tensor in state.values()),
        network=checkpoint.Network(module, outputs),
        features=checkpoint.names(parsed.metadata),
        facts=checkpoint.facts(parsed, state, layers=layers, heads=heads, d_model=d_model, patch=patch, stride=stride),
    )


def _build_token(parsed: Checkpoint) -> Built:
    state = checkpoint.tensors(parsed, _TOKEN, _EXPECTED)
    d_model, width = checkpoint.shape(state, "input_proj.weight", 2)
    layers, feed_forward = _layers(state, "encoder")
    outputs = checkpoint.shape(state, "head.1.weight", 2)[0]
    # One token attends to itself alone, so the number of heads changes nothing.
    module = checkpoint.fill(lambda: TokenPatchTST(width, d_model, 1, layers, feed_forward, outputs, 0.0), state)
    return Built(
        architecture="patchtst-token",
        width=width,
        window=1,
        outputs=outputs,
        parameters=sum(tensor.numel() for tensor in state.values()),
        network=checkpoint.Network(module, outputs),
        features=checkpoint.names(parsed.metadata),
        facts=checkpoint.facts(parsed, state, layers=layers, d_model=d_model),
    )


def _encoder(
    d_model: int, heads: int, layers: int, feed_forward: int, activation: str, dropout: float
) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        d_model, heads, feed_forward, dropout, activation, batch_first=True, norm_first=False
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def _layers(state: Mapping[str, Tensor], encoder: str) -> tuple[int, int]:
    """How many layers the encoder has, and the size of their feed-forward."""
    prefix = f"{encoder}.layers."
    layers = checkpoint.count((int(key.split(".")[2]) for key in state if key.startswith(prefix)), f"{encoder} layers")
    return layers, checkpoint.shape(state, f"{prefix}0.linear1.weight", 2)[0]


def _check_patches(window: int, patch: int, stride: int, positions: int) -> None:
    patches = (window - patch) // stride + 1
    if window < patch or patches > positions:
        raise checkpoint.mismatch(
            f"a window of {window} bars gives {max(patches, 0)} patches of {patch}, but pos_encoding has {positions} "
            "rows; state the true `window`, `patch` and `stride` in the metadata"
        )
