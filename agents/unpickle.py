"""The inert reader of pickled scalers and tree models: no byte of a file can name code to execute.

It is an interpreter of the pickle opcodes of its own; neither `pickle` nor `joblib` is imported. A
name in the file is looked up in `agents.inert.NAMES` and becomes an inert token, never an import. A call of a
token is one of the few rebuilds of `agents.rebuilds`, over plain values; an instance becomes a `Record` of its
state. Whatever is not on the list is refused. joblib's compressed containers are opened with bounded
decompression, and the raw arrays it writes between opcodes are read in place.

Bounded: bytes before and after decompression, opcodes, entries of a mapping, dimensions, and the
declared size of each array, which is checked against the bytes that are there.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from agents import containers
from agents.agent import Refused
from agents.inert import (
    BROKEN,
    MAX_ENTRIES,
    MAX_OPCODES,
    NAMES,
    RECORDS,
    Budget,
    Name,
    Record,
    UnsafeError,
    describe,
    permitted,
)
from agents.rebuilds import (
    Array,
    Dtype,
    array_of,
    array_of_state,
    as_dtype,
    finished,
    n_bytes,
    rebuilt,
    set_dtype,
    shape_of,
)
from streams.messages import Reason

_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_WRAPPER = "joblib.numpy_pickle.NumpyArrayWrapper"


class _Mark:
    """Where the arguments of an opcode begin on the stack."""


_MARK = _Mark()


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
                return finished(self.pop())
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
        target.extend(finished(item) for item in items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise ValueError(f"items for {describe(target)}, which is not a mapping")
        # Before they are put in: keys that collide cost the square of their number.
        if len(target) + len(items) // 2 > MAX_ENTRIES:
            raise ValueError(f"a mapping of more than {MAX_ENTRIES} entries")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = finished(value)

    def reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name):
            raise UnsafeError(f"a call of {describe(function)}, which is not a permitted name")
        if type(arguments) is not tuple:
            raise ValueError("arguments that are not a tuple")
        self.push(self.call(function.full, arguments))

    def new_object(self, _: Any) -> None:
        arguments, cls = self.pop(), self.pop()
        if not isinstance(cls, Name) or cls.full not in RECORDS:
            raise UnsafeError(f"an instance of {cls.full if isinstance(cls, Name) else describe(cls)}")
        if arguments != ():
            raise UnsafeError(f"constructor arguments for {cls.full}")
        self.push(Record(cls.full))

    def build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Dtype):
            set_dtype(target, state)
        elif isinstance(target, Array):
            target.value = array_of_state(state, self.budget)
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
        dtype, shape = as_dtype(state["dtype"]), shape_of(state["shape"])
        if dtype.kind == "O":
            value = Reader(self.stream, self.budget, nested=True).run()
            if not isinstance(value, tuple):
                raise ValueError("an object array that does not hold text")
            return value
        if state.get("numpy_array_alignment_bytes") is not None:
            self.stream.read(self.stream.read(1)[0])
        return array_of(self.stream.read(n_bytes(dtype, shape)), dtype, shape, state["order"], self.budget)


def _constant(value: Any) -> Callable[[Reader, Any], None]:
    return lambda reader, _: reader.push(value)


def _tuple(n: int) -> Callable[[Reader, Any], None]:
    def handler(reader: Reader, _: Any) -> None:
        reader.push(tuple(finished(reader.pop()) for _ in range(n))[::-1])

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
    "TUPLE": lambda r, _: r.push(tuple(finished(item) for item in r.pop_to_mark())),
    "LIST": lambda r, _: r.push([finished(item) for item in r.pop_to_mark()]),
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


def _key(key: Any) -> Hashable:
    """Only scalars: a nest of tuples can take for ever to hash."""
    if isinstance(key, np.generic):
        key = key.item()
    if type(key) not in (str, bytes, int, float, bool, type(None)):
        raise ValueError(f"a mapping's key is {describe(key)}")
    hashable: Hashable = key
    return hashable


def _corrupt(detail: str) -> Refused:
    return Refused(Reason.CORRUPT_ARTIFACT, detail)
