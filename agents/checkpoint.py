"""PyTorch checkpoints: bytes to tensors without running anything, and a module to a network of independent rows.

Shared by `agents.nhits` and `agents.patchtst`. `agents.tensor_pickle` judges the bytes first;
`torch.load` is called with `weights_only=True` and nothing else, and what it will not read is refused,
never read another way.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agents import tensor_pickle
from agents.agent import Refused
from agents.inert import UnsafeError
from agents.tensor_pickle import DamagedError
from streams.messages import Reason

ROW_BLOCK = 8
"""Batches are padded to a multiple of this many rows: below it a matrix product takes other paths."""

MAX_ROWS = 256
"""Larger batches are cut here, so that no row is ever computed at a size that was not tested."""

_NESTED = ("metadata", "config", "model_config", "hyperparameters")
AGAIN = "copy the file again, or save it again with torch.save(model.state_dict(), path)"

_NUMBERS = frozenset(("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"))


class _NumberType:
    """Stands in for `numpy.dtype` inside a checkpoint; the text is all that is kept of it."""

    def __init__(self, text: str, *_: object) -> None:
        self.text = text

    def __setstate__(self, _: object) -> None:
        """Byte order and the like: numbers are little-endian wherever checkpoints come from."""


def _number(kind: object, data: object) -> float | int | bool:
    """Stands in for numpy's scalar constructor: one number from its bytes, nothing else."""
    if not isinstance(kind, _NumberType) or kind.text not in _NUMBERS or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy scalar that is no plain number")
    value = np.frombuffer(data, dtype="<" + kind.text)
    if len(value) != 1:
        raise pickle.UnpicklingError("a numpy scalar of another size")
    number: float | int | bool = value[0].item()
    return number


# Training loops often save a loss as a numpy number beside the tensors. These names get inert stand-ins.
torch.serialization.add_safe_globals(
    [
        (_number, "numpy._core.multiarray.scalar"),
        (_number, "numpy.core.multiarray.scalar"),
        (_NumberType, "numpy.dtype"),
    ]
)


@dataclass(frozen=True)
class Checkpoint:
    """A state dict as it was saved, and the plain values that lay beside it in the file."""

    state: Mapping[str, Any]
    metadata: Mapping[str, Any]


def read(data: bytes) -> Checkpoint:
    """A state dict, or the `model_state_dict` of a dict, from the bytes of a checkpoint.

    Raises `Refused`: `unsafe_artifact` where the file names code, `corrupt_artifact` where it
    cannot be read or claims more than it holds.
    """
    try:
        judged = tensor_pickle.checked(data)
    except UnsafeError as error:
        raise _unsafe(str(error)) from error
    except DamagedError as error:
        raise _no_checkpoint(data, str(error)) from error
    try:
        loaded = torch.load(io.BytesIO(judged), map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own text advises to load without `weights_only`: it goes nowhere.
        raise _no_checkpoint(data, f"torch does not read it ({type(error).__name__})") from error
    if not isinstance(loaded, Mapping):
        raise _corrupt(f"holds a {type(loaded).__name__}, expected a state dict or a dict with model_state_dict")
    inner = loaded.get("model_state_dict")
    checkpoint = Checkpoint(inner, _beside(loaded)) if isinstance(inner, Mapping) else Checkpoint(loaded, {})
    _refuse_oversold(checkpoint.state, len(data))
    return checkpoint


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What can be told of any checkpoint, recognised or not."""
    sizes = [value.numel() for value in checkpoint.state.values() if isinstance(value, Tensor)]
    return {"parameters": sum(sizes), "features": names(checkpoint.metadata) or ()}


def names(metadata: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The feature names that a checkpoint carries beside its tensors, if any."""
    for key in ("features", "feature_names"):
        value = metadata.get(key)
        if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
            return tuple(value)
    return None


def tensors(checkpoint: Checkpoint, known: re.Pattern[str], expected: str) -> dict[str, Tensor]:
    """The state dict with every key known and every value a dense float tensor, in float32."""
    state = checkpoint.state
    strange = [str(key) for key in state if not isinstance(key, str) or not known.fullmatch(key)]
    if strange or not state:
        raise unknown(strange, expected)
    wrong = [key for key, value in state.items() if not _dense_floats(value)]
    if wrong:
        raise mismatch(f"expected dense floating-point tensors, found others at {listed(wrong)}")
    return {key: value.detach().to(torch.float32, copy=True).contiguous() for key, value in state.items()}


def shape(state: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    """The shape of the tensor at `key`, which must have that many dimensions, none of size 0."""
    if key not in state:
        raise mismatch(f"expected a tensor at {key}, found none among {listed(state)}")
    found = tuple(state[key].shape)
    if len(found) != dimensions or 0 in found:
        raise mismatch(f"expected {dimensions} dimensions at {key}, found the shape {list(found)}")
    return found


def count(indices: Iterable[int], what: str) -> int:
    """How many blocks or layers there are; their numbers must run from 0 without a gap."""
    found = sorted(set(indices))
    if found != list(range(len(found))):
        raise mismatch(f"expected {what} numbered from 0 without a gap, found {found[:12]}")
    return len(found)


def fill(make: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> nn.Module:
    """The module with these tensors as its weights: every key present, every shape the same.

    It is made on the meta device, so that no random number is drawn and no memory is filled twice.
    """
    with torch.device("meta"):
        module = make()
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    differing = [
        f"{key} {list(found[key]) if key in found else 'missing'} (expected {list(expected.get(key, ()))})"
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]
    if differing:
        raise mismatch(f"the tensors do not fit together: {listed(differing)}")
    module.load_state_dict(dict(state), strict=True, assign=True)
    return module.eval().requires_grad_(requires_grad=False)


def setting(maps: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int | None:
    """A positive whole number that only metadata can tell, by any of its names."""
    values = {str(m[key]): m[key] for m in maps for key in keys if m.get(key) is not None}
    if not values:
        return None
    value = next(iter(values.values()))
    if len(values) > 1:
        raise mismatch(f"the metadata disagree about {keys[0]}: {listed(values)}; leave the true one")
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise mismatch(f"expected a positive whole number for {keys[0]} in the metadata, found {value!r}")
    return value


def split(product: int, length: int | None, width: int | None, default: int, what: str) -> tuple[int, int]:
    """Bars and features of a layer that reads `bars x features` inputs; the tensors tell the product only."""
    if length is None:
        length = default if width is None else max(product // width, 1)
    if width is None:
        width = max(product // length, 1)
    if length * width != product:
        raise mismatch(
            f"{what} reads {product} values, which is not {length} bars x {width} features; "
            "state the true `window`, `patch` and `num_features` in the metadata"
        )
    return length, width


def unflattened(maps: Sequence[Mapping[str, Any]], key: str, product: int) -> list[dict[str, Any]]:
    """The metadata without `key` where it tells the flattened input, bars x features."""
    return [{k: v for k, v in m.items() if not (k == key and v == product)} for m in maps]


def declared_width(maps: Sequence[Mapping[str, Any]], product: int) -> int | None:
    """The number of features that the metadata tell, where they tell it.

    `input_dim` is in use for the flattened input too. A list of names that cannot be right is left
    to the feature check, which names it.
    """
    width = setting(unflattened(maps, "input_dim", product), ("num_features", "input_dim"))
    if width is None:
        listed_names = next(filter(None, map(names, maps)), None)
        width = len(listed_names) if listed_names and product % len(listed_names) == 0 else None
    return width


def facts(checkpoint: Checkpoint, state: Mapping[str, Tensor], **more: Any) -> dict[str, Any]:
    """What a family tells of a recognised checkpoint beyond its dimensions."""
    broken = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
    return {**more, "metadata": dict(checkpoint.metadata), "non_finite_weights": broken}


class Network:
    """A module as a function of independent rows: float32 `[B, ...]` to float32 `[B, K]`.

    A row's bits do not depend on its neighbours: rows are copied to an aligned buffer padded to a
    multiple of 8, at most 256 at a time. That holds with one torch thread, which the process sets
    at its start with `torch.set_num_threads(1)`. Calls share nothing and may run side by side.
    """

    def __init__(self, module: nn.Module, outputs: int) -> None:
        self._module = module
        self._outputs = outputs

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs `[B, K]` of the rows `x`."""
        out = np.empty((len(x), self._outputs), dtype=np.float32)
        for start in range(0, len(x), MAX_ROWS):
            out[start : start + MAX_ROWS] = self._batch(x[start : start + MAX_ROWS])
        return out

    def _batch(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = -len(x) // ROW_BLOCK * -ROW_BLOCK
        with torch.inference_mode():
            padded = torch.zeros((rows, *x.shape[1:]), dtype=torch.float32)
            padded.numpy()[: len(x)] = x
            result: NDArray[np.float32] = self._module(padded).numpy()[: len(x)]
        return result


def unknown(keys: Iterable[str], expected: str) -> Refused:
    """An architecture that this program does not know."""
    return Refused(
        Reason.UNKNOWN_ARCHITECTURE,
        f"expected {expected}; found the keys {listed(keys) or '(none)'}; train this agent again with `quartet train`",
    )


def mismatch(detail: str) -> Refused:
    """Tensors, or tensors and metadata, that contradict one another."""
    return Refused(Reason.STATE_DICT_MISMATCH, detail)


def listed(items: Iterable[str], most: int = 8) -> str:
    """The first few of `items`, and how many more there are."""
    every = list(items)
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(item[:120] for item in every[:most]) + rest


def _beside(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    """The metadata of a checkpoint: its plain values, one level of known sub-dicts unfolded."""
    flat: dict[str, Any] = {}
    for key in _NESTED:
        if isinstance(loaded.get(key), Mapping):
            flat.update(loaded[key])
    flat.update(loaded)
    return {key: value for key, value in flat.items() if isinstance(key, str) and _plain(value)}


def _plain(value: object) -> bool:
    """A scalar, or one row of scalars: a few bytes can nest lists that take for ever to print."""
    scalar = (str, int, float, bool, type(None))
    if isinstance(value, list | tuple):
        return all(isinstance(item, scalar) for item in value)
    return isinstance(value, str | int | float)


def _dense_floats(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _refuse_oversold(state: Mapping[str, Any], size: int) -> None:
    """A few bytes can describe a tensor of any size; nothing may claim more than the file holds."""
    dense = [v for v in state.values() if isinstance(v, Tensor) and v.layout == torch.strided]
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in dense}
    claimed = max(sum(storages.values()), sum(v.numel() * v.element_size() for v in dense) // 2)
    if claimed > size:
        raise _corrupt(f"of {size} bytes claims tensors of {claimed} bytes")


def _no_checkpoint(data: bytes, why: str) -> Refused:
    return _corrupt(f"is not one that torch.save wrote, or is damaged: {why} (it begins with {data[:8]!r})")


def _unsafe(found: str) -> Refused:
    return Refused(
        Reason.UNSAFE_ARTIFACT,
        f"expected tensors and plain values only, found what names code: {found}; save it again with "
        "torch.save(model.state_dict(), path)",
    )


def _corrupt(detail: str) -> Refused:
    return Refused(Reason.CORRUPT_ARTIFACT, f"the checkpoint {detail}; {AGAIN}")
