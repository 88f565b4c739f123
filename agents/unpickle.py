"""The inert reader of pickled scalers and tree models: no byte of a file can name code to execute.

It is an interpreter of the pickle opcodes of its own; neither `pickle` nor `joblib` is imported. A
name in the file is looked up in `NAMES` and becomes an inert token, never an import. A call of a
token is one of the few rebuilds below, over plain values; an instance becomes a `Record` of its
state. Whatever is not on the list is refused. joblib's compressed containers are opened with bounded
decompression, and the raw arrays it writes between opcodes are read in place.

Bounded: bytes before and after decompression, opcodes, entries of a mapping, dimensions, and the
declared size of each array, which is checked against the bytes that are there.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable, Container, Hashable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents import containers
from agents.agent import Refused
from streams.messages import Reason

MAX_OPCODES = 500_000
MAX_ENTRIES = 1024
"""Entries of one mapping: keys of a file's choice could otherwise all collide."""
MAX_DIMENSIONS = 4
MAX_TEXT_ITEM = 4096

_RECORDS = {
    # The scalers of the contract.
    "sklearn.preprocessing._data.StandardScaler",
    "sklearn.preprocessing._data.MinMaxScaler",
    "sklearn.preprocessing._data.RobustScaler",
    # What an LGBMClassifier keeps of its class labels.
    "sklearn.preprocessing._label.LabelEncoder",
    "xgboost.sklearn.XGBRegressor",
    "xgboost.sklearn.XGBClassifier",
    "xgboost.core.Booster",
    # An estimator remembers the callbacks that it was made with.
    "xgboost.callback.EarlyStopping",
    "lightgbm.sklearn.LGBMRegressor",
    "lightgbm.sklearn.LGBMClassifier",
    "lightgbm.basic.Booster",
    "joblib.numpy_pickle.NumpyArrayWrapper",
}
_MAPPINGS = {"collections.OrderedDict", "collections.defaultdict"}
_REBUILDS = {
    "numpy.dtype",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    # How pickle protocol 5 writes arrays.
    "numpy._core.numeric._frombuffer",
    "builtins.bytearray",
    # How pickle protocol 2 writes bytes, and no bytes.
    "_codecs.encode",
    "builtins.bytes",
}
NAMES = frozenset(_RECORDS | _MAPPINGS | _REBUILDS | {"numpy.ndarray"})
"""Every name that a file may hold. Each maps to a token or to a rebuild of this module."""

_ALIASES = {"numpy.core.": "numpy._core.", "__builtin__.": "builtins."}
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_WRAPPER = "joblib.numpy_pickle.NumpyArrayWrapper"
_DTYPE = re.compile(r"[<>|=]?(?:([biuf])([1248])|([US])(\d{1,5})|(O)8?)\Z")


@dataclass(eq=False, repr=False)
class Record:
    """What is left of an instance: the full name of its class and its state, plain values."""

    name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Name:
    """A permitted name. Inert: nothing of what it names is ever imported here."""

    full: str


@dataclass(eq=False, repr=False)
class _Dtype:
    """A data type, its byte order filled in by the state that follows."""

    kind: str
    size: int
    order: str = "<"

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(f"{self.order}{self.kind}{self.size}")


@dataclass(eq=False, repr=False)
class _Array:
    """An array that is filled by the state that follows."""

    value: NDArray[Any] | tuple[str, ...] | None = None


@dataclass
class Budget:
    """What a file may still make the reader do: `steps` opcodes or entries, `size` bytes copied."""

    steps: int
    size: int

    def step(self, n: int = 1) -> None:
        self.steps -= n
        if self.steps < 0:
            raise ValueError(f"more than {MAX_OPCODES} opcodes and entries")

    def copy(self, n: int) -> None:
        self.size -= n
        if self.size < 0:
            raise ValueError("the same bytes copied again and again")


class UnsafeError(Exception):
    """Raised on what could name or make code run; the text says what it was."""


class _Mark:
    """Where the arguments of an opcode begin on the stack."""


_MARK = _Mark()

BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError)
"""What the readers raise on a stream that does not hold together."""


def read(data: bytes, limit: int = containers.MAX_BYTES) -> Any:
    """Plain values and `Record`s of a pickle or joblib file; arrays are numpy's, text arrays tuples.

    Raises `Refused`: `unsafe_artifact` names what the file wanted to name or call,
    `corrupt_artifact` says where it became unreadable. `limit` is in bytes, before and after
    decompression.
    """
    plain = containers.unpack(data, limit)
    stream = io.BytesIO(plain)
    try:
        return Reader(stream, Budget(MAX_OPCODES, 2 * limit)).run()
    except UnsafeError as error:
        raise Refused(
            Reason.UNSAFE_ARTIFACT,
            f"the pickle holds {error}: nothing was executed; "
            "export the model as .ubj, .txt or .pth and the scaler as .json",
        ) from error
    except BROKEN as error:
        raise _corrupt(f"not a readable pickle at byte {stream.tell()}: {error}") from error


def describe(value: Any) -> str:
    """A short name of what was found, for messages. Never prints the value: it may be huge."""
    return value.name if isinstance(value, Record) else type(value).__name__


class Reader:
    """One pickle stream: a stack, a memo and a handler for each opcode that real files use."""

    def __init__(self, stream: io.BytesIO, budget: Budget, *, nested: bool = False) -> None:
        self.stream, self.budget, self.nested = stream, budget, nested
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.handlers = HANDLERS

    def run(self) -> Any:
        while True:
            opcode = _OPCODES.get(self.stream.read(1))
            if opcode is None:
                raise ValueError("unknown opcode or end of file")
            self.budget.step()
            argument = None if opcode.arg is None else opcode.arg.reader(self.stream)
            if opcode.name == "STOP":
                return _finished(self.pop())
            handler = self.handlers.get(opcode.name)
            if handler is None:
                raise UnsafeError(f"the pickle opcode {opcode.name}, which no model file needs")
            handler(self, argument)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def pop_to_mark(self) -> list[Any]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise ValueError("no mark on the stack")

    def top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise ValueError("a mark where a value should be")
        return self.stack[-1]

    # Opcodes that need more than a line

    def get(self, key: int) -> None:
        self.push(self.memo[key])

    def global_(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push(self.lookup(module, name))

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnsafeError("a name that is not text")
        self.push(self.lookup(module, name))

    def lookup(self, module: str, name: str) -> Name:
        """The token of a permitted name."""
        return permitted(module, name, NAMES)

    def call(self, full: str, arguments: tuple[Any, ...]) -> Any:
        """What a call of a permitted name gives."""
        return rebuilt(full, arguments, self.budget)

    def extend_list(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise ValueError(f"items for {describe(target)}, which is not a list")
        target.extend(_finished(item) for item in items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise ValueError(f"items for {describe(target)}, which is not a mapping")
        # Before they are put in: keys that collide cost the square of their number.
        if len(target) + len(items) // 2 > MAX_ENTRIES:
            raise ValueError(f"a mapping of more than {MAX_ENTRIES} entries")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = _finished(value)

    def reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name):
            raise UnsafeError(f"a call of {describe(function)}, which is not a permitted name")
        if type(arguments) is not tuple:
            raise ValueError("arguments that are not a tuple")
        self.push(self.call(function.full, arguments))

    def new_object(self, _: Any) -> None:
        arguments, cls = self.pop(), self.pop()
        if not isinstance(cls, Name) or cls.full not in _RECORDS:
            raise UnsafeError(f"an instance of {cls.full if isinstance(cls, Name) else describe(cls)}")
        if arguments != ():
            raise UnsafeError(f"constructor arguments for {cls.full}")
        self.push(Record(cls.full))

    def build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, _Dtype):
            _set_dtype(target, state)
        elif isinstance(target, _Array):
            target.value = _array_of_state(state, self.budget)
        elif isinstance(target, Record):
            if type(state) is not dict or not all(type(key) is str for key in state):
                raise ValueError(f"the state of {target.name} is not a mapping of names")
            self.budget.step(len(state))
            target.state.update(state)
            if target.name == _WRAPPER:
                self.stack[-1] = self.wrapped_array(target.state)
        else:
            raise UnsafeError(f"a state for {describe(target)}")

    def wrapped_array(self, state: dict[str, Any]) -> Any:
        """The array whose raw bytes, or whose own pickle stream, joblib wrote at this place."""
        if self.nested or state["subclass"] != Name("numpy.ndarray"):
            raise UnsafeError("an array inside an array, or of a class other than numpy.ndarray")
        dtype, shape = _as_dtype(state["dtype"]), _shape(state["shape"])
        if dtype.kind == "O":
            value = Reader(self.stream, self.budget, nested=True).run()
            if not isinstance(value, tuple):
                raise ValueError("an object array that does not hold text")
            return value
        if state.get("numpy_array_alignment_bytes") is not None:
            self.stream.read(self.stream.read(1)[0])
        return _array(self.stream.read(_n_bytes(dtype, shape)), dtype, shape, state["order"], self.budget)


def _constant(value: Any) -> Callable[[Reader, Any], None]:
    return lambda reader, _: reader.push(value)


def _tuple(n: int) -> Callable[[Reader, Any], None]:
    def handler(reader: Reader, _: Any) -> None:
        reader.push(tuple(_finished(reader.pop()) for _ in range(n))[::-1])

    return handler


def _memoize(reader: Reader, key: int | None) -> None:
    place = len(reader.memo) if key is None else key
    if not 0 <= place < MAX_OPCODES:
        raise ValueError("a place in the memo that no pickler gives")
    reader.memo[place] = reader.top()


def _nothing(_reader: Reader, _argument: Any) -> None:
    pass


HANDLERS: dict[str, Callable[[Reader, Any], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "MARK": _constant(_MARK),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_LIST": lambda r, _: r.push([]),
    "EMPTY_DICT": lambda r, _: r.push({}),
    "TUPLE": lambda r, _: r.push(tuple(_finished(item) for item in r.pop_to_mark())),
    "LIST": lambda r, _: r.push([_finished(item) for item in r.pop_to_mark()]),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "APPEND": lambda r, _: r.extend_list([r.pop()]),
    "APPENDS": lambda r, _: r.extend_list(r.pop_to_mark()),
    "SETITEM": lambda r, _: r.set_items([r.pop(), r.pop()][::-1]),
    "SETITEMS": lambda r, _: r.set_items(r.pop_to_mark()),
    "POP": lambda r, _: r.stack.pop() and None,
    "DUP": lambda r, _: r.push(r.top()),
    "MEMOIZE": _memoize,
    "PUT": _memoize,
    "BINPUT": _memoize,
    "LONG_BINPUT": _memoize,
    "GET": Reader.get,
    "BINGET": Reader.get,
    "LONG_BINGET": Reader.get,
    "GLOBAL": Reader.global_,
    "STACK_GLOBAL": Reader.stack_global,
    "REDUCE": Reader.reduce,
    "NEWOBJ": Reader.new_object,
    "BUILD": lambda r, argument: r.build(argument),
}
HANDLERS |= dict.fromkeys(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split(),
    Reader.push,
)


def permitted(module: str, name: str, names: Container[str]) -> Name:
    full = f"{module}.{name}"
    for old, new in _ALIASES.items():
        if full.startswith(old):
            full = new + full[len(old) :]
    if full not in names or "." in name:
        raise UnsafeError(f"the name {name[:80]!r} of module {module[:80]!r}")
    return Name(full)


def _key(key: Any) -> Hashable:
    """Only scalars: a nest of tuples can take for ever to hash."""
    if isinstance(key, np.generic):
        key = key.item()
    if type(key) not in (str, bytes, int, float, bool, type(None)):
        raise ValueError(f"a mapping's key is {describe(key)}")
    hashable: Hashable = key
    return hashable


def _finished(value: Any) -> Any:
    """A value as the reader hands it out: a filled array in place of its shell."""
    return value.value if isinstance(value, _Array) and value.value is not None else value


def rebuilt(full: str, arguments: tuple[Any, ...], budget: Budget) -> Any:
    """The few rebuilds. Each takes plain values and gives a plain value."""
    if full in _RECORDS:
        if arguments:
            raise UnsafeError(f"constructor arguments for {full}")
        return Record(full)
    if full in _MAPPINGS:
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
        return _Array()
    if full == "numpy._core.numeric._frombuffer":
        data, dtype, shape, order = arguments
        return _array(data, _as_dtype(dtype), _shape(shape), order, budget)
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


def _dtype(code: Any) -> _Dtype:
    match = _DTYPE.match(code) if type(code) is str else None
    if match is None:
        raise ValueError("an array of a data type other than numbers, booleans and text")
    kind, size = match[1] or match[3] or match[5], int(match[2] or match[4] or 8)
    if size > MAX_TEXT_ITEM or (kind == "f" and size == 1):
        raise ValueError(f"an array of items {kind}{size}")
    return _Dtype(kind, size)


def _set_dtype(dtype: _Dtype, state: Any) -> None:
    """`(version, byte order, subarray, names, fields, size, alignment, flags[, metadata])`."""
    if type(state) is not tuple or not 5 <= len(state) <= 9 or state[1] not in ("<", ">", "|", "="):
        raise ValueError("the state of a data type")
    if any(part is not None for part in state[2:5]) or len(state) == 9:
        raise ValueError("a structured data type")
    dtype.order = state[1]


def _as_dtype(value: Any) -> _Dtype:
    if not isinstance(value, _Dtype):
        raise TypeError(f"{describe(value)} where a data type should be")
    return value


def _scalar(dtype: Any, data: Any, budget: Budget) -> Any:
    dtype = _as_dtype(dtype)
    if dtype.kind == "O":
        raise ValueError("a scalar of objects")
    return _array(data, dtype, (), "C", budget).item()


def _shape(shape: Any) -> tuple[int, ...]:
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS:
        raise ValueError("the shape of an array")
    if any(type(n) is not int or not 0 <= n < 2**40 for n in shape):
        raise ValueError("the shape of an array")
    return shape


def _n_bytes(dtype: _Dtype, shape: tuple[int, ...]) -> int:
    return prod(shape) * dtype.numpy().itemsize


def _array(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any, budget: Budget) -> NDArray[Any]:
    """An array over its own copy of exactly as many bytes as its shape needs."""
    if type(data) not in (bytes, bytearray) or dtype.kind == "O" or order not in ("C", "F"):
        raise ValueError("the data of an array")
    if len(data) != _n_bytes(dtype, shape):
        raise ValueError(f"an array of {_n_bytes(dtype, shape)} bytes with {len(data)} bytes of data")
    budget.copy(len(data))
    flat = np.frombuffer(data, dtype=dtype.numpy())
    native = flat.astype(flat.dtype.newbyteorder("="))
    return native.reshape(shape, order=order)


def _array_of_state(state: Any, budget: Budget) -> NDArray[Any] | tuple[str, ...]:
    """`(version, shape, dtype, is Fortran, data)` of an array; text held as objects is a tuple."""
    _, shape, dtype, fortran, data = state
    shape, dtype = _shape(shape), _as_dtype(dtype)
    if dtype.kind != "O":
        return _array(data, dtype, shape, "F" if fortran else "C", budget)
    if type(data) is list:
        budget.step(len(data))
    if type(data) is not list or shape != (len(data),) or not all(type(item) is str for item in data):
        raise ValueError("an object array that is not one row of text")
    return tuple(data)


def _corrupt(detail: str) -> Refused:
    return Refused(Reason.CORRUPT_ARTIFACT, detail)
