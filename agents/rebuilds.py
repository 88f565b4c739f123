"""The few rebuilds that a pickle may call, over plain values: data types, arrays, scalars and bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.inert import MAPPINGS, RECORDS, Budget, Name, Record, UnsafeError, describe

MAX_DIMENSIONS = 4
MAX_TEXT_ITEM = 4096
_DTYPE = re.compile(r"[<>|=]?(?:([biuf])([1248])|([US])(\d{1,5})|(O)8?)\Z")


@dataclass(eq=False, repr=False)
class Dtype:
    """A data type, its byte order filled in by the state that follows."""

    kind: str
    size: int
    order: str = "<"

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(f"{self.order}{self.kind}{self.size}")


@dataclass(eq=False, repr=False)
class Array:
    """An array that is filled by the state that follows."""

    value: NDArray[Any] | tuple[str, ...] | None = None


def finished(value: Any) -> Any:
    """A value as the reader hands it out: a filled array in place of its shell."""
    return value.value if isinstance(value, Array) and value.value is not None else value


def rebuilt(full: str, arguments: tuple[Any, ...], budget: Budget) -> Any:
    """The few rebuilds. Each takes plain values and gives a plain value."""
    if full in RECORDS:
        if arguments:
            raise UnsafeError(f"constructor arguments for {full}")
        return Record(full)
    if full in MAPPINGS:
        if arguments and arguments != (Name("collections.OrderedDict"),):
            raise UnsafeError(f"constructor arguments for {full}")
        return {}
    if full == "numpy.dtype":
        return _dtype(arguments[0])
    if full == "numpy._core.multiarray.scalar":
        dtype, data = arguments
        return _scalar(dtype, data, budget)
    if full == "numpy._core.multiarray._reconstruct":
        if arguments[0] != Name("numpy.ndarray"):
            raise UnsafeError("an array of a class other than numpy.ndarray")
        return Array()
    if full == "numpy._core.numeric._frombuffer":
        data, dtype, shape, order = arguments
        return array_of(data, as_dtype(dtype), shape_of(shape), order, budget)
    if full in ("builtins.bytearray", "builtins.bytes", "_codecs.encode"):
        return _bytes(arguments, budget)
    raise UnsafeError(f"a call of {full}")


def _bytes(arguments: tuple[Any, ...], budget: Budget) -> bytes:
    """`bytearray()`, of bytes, or of text in latin-1: the ways in which pickle writes bytes."""
    match arguments:
        case ():
            return b""
        case (bytes() as data,):
            return data
        case (bytearray() | str() as data, *encoding) if encoding in ([], ["latin-1"], ["latin1"]):
            budget.copy(len(data))
            return data.encode("latin-1") if isinstance(data, str) else bytes(data)
    raise UnsafeError("bytes of something else than bytes or text in latin-1")


def _dtype(code: Any) -> Dtype:
    match = _DTYPE.match(code) if type(code) is str else None
    if match is None:
        raise ValueError("an array of a data type other than numbers, booleans and text")
    kind, size = match[1] or match[3] or match[5], int(match[2] or match[4] or 8)
    if size > MAX_TEXT_ITEM or (kind == "f" and size == 1):
        raise ValueError(f"an array of items {kind}{size}")
    return Dtype(kind, size)


def set_dtype(dtype: Dtype, state: Any) -> None:
    """`(version, byte order, subarray, names, fields, size, alignment, flags[, metadata])`."""
    if type(state) is not tuple or not 5 <= len(state) <= 9 or state[1] not in ("<", ">", "|", "="):
        raise ValueError("the state of a data type")
    if any(part is not None for part in state[2:5]) or len(state) == 9:
        raise ValueError("a structured data type")
    dtype.order = state[1]


def as_dtype(value: Any) -> Dtype:
    if not isinstance(value, Dtype):
        raise TypeError(f"{describe(value)} where a data type should be")
    return value


def _scalar(dtype: Any, data: Any, budget: Budget) -> Any:
    dtype = as_dtype(dtype)
    if dtype.kind == "O":
        raise ValueError("a scalar of objects")
    return array_of(data, dtype, (), "C", budget).item()


def shape_of(shape: Any) -> tuple[int, ...]:
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS:
        raise ValueError("the shape of an array")
    if any(type(n) is not int or not 0 <= n < 2**40 for n in shape):
        raise ValueError("the shape of an array")
    return shape


def n_bytes(dtype: Dtype, shape: tuple[int, ...]) -> int:
    return prod(shape) * dtype.numpy().itemsize


def array_of(data: Any, dtype: Dtype, shape: tuple[int, ...], order: Any, budget: Budget) -> NDArray[Any]:
    """An array over its own copy of exactly as many bytes as its shape needs."""
    if type(data) not in (bytes, bytearray) or dtype.kind == "O" or order not in ("C", "F"):
        raise ValueError("the data of an array")
    if len(data) != n_bytes(dtype, shape):
        raise ValueError(f"an array of {n_bytes(dtype, shape)} bytes with {len(data)} bytes of data")
    budget.copy(len(data))
    flat = np.frombuffer(data, dtype=dtype.numpy())
    native = flat.astype(flat.dtype.newbyteorder("="))
    return native.reshape(shape, order=order)


def array_of_state(state: Any, budget: Budget) -> NDArray[Any] | tuple[str, ...]:
    """`(version, shape, dtype, is Fortran, data)` of an array; text held as objects is a tuple."""
    _, shape, dtype, fortran, data = state
    shape, dtype = shape_of(shape), as_dtype(dtype)
    if dtype.kind != "O":
        return array_of(data, dtype, shape, "F" if fortran else "C", budget)
    if type(data) is list:
        budget.step(len(data))
    if type(data) is not list or shape != (len(data),) or not all(type(item) is str for item in data):
        raise ValueError("an object array that is not one row of text")
    return tuple(data)
