"""A checkpoint's bytes, judged before torch sees them: which names they hold and how much memory they ask for.

The pickle inside is read by the inert reader of `agents.unpickle`, with the few names that tensors and
plain values need. torch's own list for `weights_only=True` is longer: `bytearray`, `torch.Tensor` and
others on it allocate whatever size a file names.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agents import inert
from agents.inert import BROKEN, MAX_OPCODES, Budget, UnsafeError
from agents.rebuilds import rebuilt
from agents.unpickle import Reader

MAX_DIMENSIONS = 8
TENSOR_STEPS = 20
"""What a tensor costs of the 500,000 steps: 25,000 tensors at most."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_DTYPES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1
}  # fmt: skip
_STORAGES = {f"{module}.{name}Storage": size for module in ("torch", "torch.cuda") for name, size in _DTYPES.items()}
_ORDERED = "collections.OrderedDict"
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_SIZE, _DEVICE = "torch.Size", "torch.device"
_CONSTANTS = {f"torch.{name}" for name in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()}
_NUMPY = {"numpy.dtype", "numpy._core.multiarray.scalar", "_codecs.encode"}
NAMES = frozenset({_ORDERED, _TENSOR, _PARAMETER, _SIZE, _DEVICE, *_STORAGES, *_CONSTANTS, *_NUMPY})
"""Every name that a checkpoint may hold."""


class DamagedError(ValueError):
    """Raised on bytes that are no checkpoint, or one that claims more than it holds; the text says what and why."""


@dataclass(frozen=True)
class _Storage:
    key: str
    nbytes: int


@dataclass(frozen=True)
class _Tensor:
    """Stands in for a tensor over a storage."""


_A_TENSOR = _Tensor()


def checked(data: bytes) -> bytes:
    """A checkpoint that torch may read: of the archive kind written anew from what was judged, else `data` itself.

    Raises `UnsafeError` on any name or call beyond tensors and plain values, `DamagedError` where the
    bytes are no checkpoint or its storages are not as large as it claims.
    """
    if data.startswith(b"PK"):
        return _archive(data)
    _judge_legacy(data)
    return data


class _TensorReader(Reader):
    """The inert reader, with the names and the storages of checkpoints."""

    def __init__(self, stream: io.BytesIO, budget: Budget) -> None:
        super().__init__(stream, budget)
        self.storages: dict[str, int] = {}
        self.handlers = {**self.handlers, "BINPERSID": lambda reader, _: reader.push(self.storage(reader.pop()))}

    def lookup(self, module: str, name: str) -> inert.Name:
        return inert.permitted(module, name, NAMES)

    def storage(self, identity: Any) -> _Storage:
        """`("storage", type, key, location, length)`, with a None after it in the older kind."""
        if type(identity) is not tuple or not identity or identity[0] != "storage":
            raise UnsafeError(f"a persistent id of {inert.describe(identity)}, which is no storage")
        _, kind, key, location, length = identity[:5]
        item = _STORAGES.get(kind.full) if isinstance(kind, inert.Name) else None
        plain = type(key) is str and type(location) is str and type(length) is int
        if item is None or not plain or length < 0 or identity[5:] not in ((), (None,)):
            raise DamagedError("describes a storage that torch.save does not write")
        found = _Storage(key, length * item)
        if self.storages.setdefault(key, found.nbytes) != found.nbytes:
            raise DamagedError(f"describes the storage {key[:40]!r} twice, in two sizes")
        return found

    def call(self, full: str, arguments: tuple[Any, ...]) -> Any:
        if full == _TENSOR:
            return self._tensor(arguments)
        if full == _PARAMETER:
            return self._parameter(arguments)
        if full == _SIZE:
            (size,) = arguments
            return _whole_numbers(size)
        if full == _DEVICE:
            return _device(arguments)
        if full == _ORDERED and not arguments:
            return {}
        if full in _NUMPY:
            return rebuilt(full, arguments, self.budget)
        raise UnsafeError(f"a call of {full}")

    def build(self, argument: Any) -> None:
        """The state of an OrderedDict, which is kept nowhere: `_metadata` of a state dict."""
        if type(self.stack[-2]) is not dict:
            return super().build(argument)
        state = self.pop()
        if type(state) is not dict or set(state) - {"_metadata"}:
            raise UnsafeError("a state for OrderedDict other than _metadata")
        return None

    def _tensor(self, arguments: tuple[Any, ...]) -> _Tensor:
        self.budget.step(TENSOR_STEPS)
        storage, offset, size, stride, *_ = arguments
        sizes = _whole_numbers(size), _whole_numbers(stride)
        if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0 or len(arguments) != 6:
            raise DamagedError("describes a tensor that torch.save does not write")
        if len(sizes[0]) != len(sizes[1]) or len(sizes[0]) > MAX_DIMENSIONS:
            raise DamagedError(f"describes a tensor of {len(sizes[0])} dimensions, at most {MAX_DIMENSIONS} are read")
        return _A_TENSOR

    def _parameter(self, arguments: tuple[Any, ...]) -> _Tensor:
        self.budget.step(TENSOR_STEPS)
        tensor, requires_grad, hooks = arguments
        if not isinstance(tensor, _Tensor) or type(requires_grad) is not bool or hooks != {}:
            raise DamagedError("describes a parameter that torch.save does not write")
        return tensor


def _whole_numbers(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or not all(type(n) is int and 0 <= n < 2**62 for n in value):
        raise DamagedError("describes a shape that is not of whole numbers")
    return value


def _device(arguments: tuple[Any, ...]) -> str:
    if not 1 <= len(arguments) <= 2 or not all(type(part) in (str, int) for part in arguments):
        raise DamagedError("describes a device that torch.save does not write")
    return ":".join(map(str, arguments))


def _judged(stream: io.BytesIO, budget: Budget, room: int) -> tuple[Any, dict[str, int]]:
    """One pickle of a stream: its value, tensors left out, and the bytes that each storage claims."""
    reader = _TensorReader(stream, budget)
    try:
        value = reader.run()
    except DamagedError:
        raise
    except BROKEN as error:
        raise DamagedError(f"holds no readable pickle: {error} at byte {stream.tell()}") from error
    claimed = sum(reader.storages.values())
    if claimed > room:
        raise DamagedError(f"claims tensors of {claimed} bytes, more than the {room} bytes that it has")
    return value, reader.storages


def _judge_legacy(data: bytes) -> None:
    """The older kind: pickles of a magic number, a version, the machine, the value and the keys, then the storages."""
    stream, budget = io.BytesIO(data), Budget(MAX_OPCODES, 2 * len(data))
    magic, _ = _judged(stream, budget, len(data))
    if magic != _LEGACY_MAGIC:
        raise DamagedError("is a pickle of plain values, and none that torch.save wrote")
    version, _ = _judged(stream, budget, len(data))
    _judged(stream, budget, len(data))
    _, storages = _judged(stream, budget, len(data))
    keys, _ = _judged(stream, budget, len(data))
    if version != _LEGACY_PROTOCOL or type(keys) is not list or not all(type(key) is str for key in keys):
        raise DamagedError("does not list its storages as torch.save does")
    if sorted(keys) != sorted(storages):
        raise DamagedError("lists other storages than its tensors have")


def _archive(data: bytes) -> bytes:
    """The newer kind, a zip archive, with only the records that were judged."""
    records = _records(data)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DamagedError("is an archive without the data.pkl that torch.save writes")
    folder = pickles[0].removesuffix("data.pkl")
    stream = io.BytesIO(records[pickles[0]])
    _, storages = _judged(stream, Budget(MAX_OPCODES, 2 * len(data)), len(data))
    kept = ["data.pkl", "version", "byteorder", *(f"data/{key}" for key in storages)]
    for key, claimed in storages.items():
        found = len(records.get(f"{folder}data/{key}", b""))
        if found != claimed:
            raise DamagedError(f"claims {claimed} bytes for the storage {key[:40]!r} and holds {found}")
    return _written({name: records[folder + name] for name in kept if folder + name in records})


def _records(data: bytes) -> dict[str, bytes]:
    """The records of the archive by name."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _judge_entries(archive.infolist(), len(data))
            return {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except DamagedError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise DamagedError(f"is an archive that is damaged ({type(error).__name__})") from error


def _judge_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """`torch.save` stores its records as they are; a packed one can hold far more than its size."""
    if any(re.search(r"(^|/)(code/|constants\.pkl$)", entry.filename) for entry in entries):
        raise UnsafeError("a compiled module")
    claimed = sum(entry.file_size for entry in entries)
    if claimed > size:
        raise DamagedError(f"of {size} bytes unpacks to {claimed}; save it with torch.save, unpacked")
    # What a packed record unpacks to is known only afterwards; its header may lie.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise DamagedError("is a packed archive; save it with torch.save, unpacked")


def _written(records: Mapping[str, bytes]) -> bytes:
    """An archive of these records. What torch reads is what was judged, however the given one was arranged."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, record in records.items():
            archive.writestr(f"archive/{name}", record)
    return buffer.getvalue()
