"""Recordings: every entry of a namespace's streams as JSON Lines in zstd frames, `zstdcat FILE | jq`.

A file is a sequence of zstd frames, each whole lines. A frame is compressed in memory and appended by one
write, so that a killed recorder leaves whole frames and at most one cut one at the end. The first line of a
file is its header; each other line is one entry:

    {"stream": "signals", "key": "quartet:signals", "id": "1-0", "data": {...}}

`stream` is the key without its namespace, `bars` for every input. `data` stands for one field `data` whose
JSON encodes again to the same bytes; `raw` beside it holds the text where it does not. Flat entries have
`fields`, and what is not UTF-8 is `base64`, a list of pairs. So every entry reads back byte for byte.

Before a frame may stand a note of what it holds, in a skippable frame, which every reader of zstd passes over: its
length once more, then the note, sealed, with the checksum of the frame that it speaks of. It can spare reading it.
"""

from __future__ import annotations

import base64
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import orjson
import zstandard

from streams.codec import StateCorruptError, seal, unseal

FORMAT = 1
MIB = 1 << 20
FRAME_BYTES = MIB
_CHUNK = 1 << 16
_FIRST_CHUNK = 1 << 12
_NOTE = (0x184D2A5A).to_bytes(4, "little")
"""One of the sixteen beginnings of a skippable frame; the length of its content follows, in four bytes."""
_NOTE_BYTES = 1 << 16
_CHECKSUM = 4
"""Bytes of the checksum of its content at the end of a frame."""
_SUFFIXES = (".jsonl.zst", ".zst", "")
_DATA = b',"data":'
_STREAM = b'{"stream":"'
_KEY = b'","key":"'
_ID = b'","id":"'
_RAW = b'"raw":'
_ENTRY_ENDS = (b"}}", b"]}")


class RecordingError(Exception):
    """A file that is no recording, is damaged, or cannot be continued: names the file and the remedy."""


class Recorded(NamedTuple):
    """One entry of a recording. `fields` hold the bytes as they came."""

    stream: str
    key: str
    id: str
    fields: Mapping[bytes, bytes]


class Lost(NamedTuple):
    """A note of the recorder: `entries` of `key` after `id` were trimmed before it read them."""

    stream: str
    key: str
    id: str
    entries: int


Item = Recorded | Lost
Note = Mapping[str, Any]
"""What a frame holds, in a few plain values."""
NoteOf = Callable[[bytes], Note | None]
Known = Callable[[Note], bool]
"""Whether a frame need not be read, by its note."""


def encode(item: Item) -> bytes:
    """One line, without its end."""
    head: dict[str, Any] = {"stream": item.stream, "key": item.key, "id": item.id}
    if isinstance(item, Lost):
        return orjson.dumps({**head, "lost": item.entries})
    data = item.fields.get(b"data")
    value = _object(data) if data is not None and len(item.fields) == 1 else None
    if data is None or value is None:
        return orjson.dumps(head | _plain(item.fields))
    if _again(value) == data:
        return orjson.dumps({**head, "data": orjson.Fragment(data)})
    return orjson.dumps({**head, "raw": data.decode(), "data": value})


def _object(data: bytes) -> Any:
    """The JSON object in `data`, None where it holds none that can be written again."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) and _again(value) is not None else None


def _again(value: Any) -> bytes | None:
    try:
        return orjson.dumps(value)
    except TypeError:  # too deep to be written
        return None


def _plain(fields: Mapping[bytes, bytes]) -> dict[str, Any]:
    try:
        return {"fields": {name.decode(): value.decode() for name, value in fields.items()}}
    except UnicodeDecodeError:
        return {"base64": [[base64.b64encode(x).decode() for x in pair] for pair in fields.items()]}


def decode(line: bytes) -> Item:
    """The entry of one line. Raises `RecordingError` where it is none."""
    head, found, tail = line.partition(_DATA)
    try:
        if not found or not line.endswith(b"}") or b',"fields":' in head:
            return _decode(orjson.loads(line))
        value = orjson.loads(head + b"}")
        data = value["raw"].encode() if "raw" in value else tail[:-1]
        return Recorded(value["stream"], value["key"], value["id"], {b"data": data})
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise RecordingError(f"no entry of a recording: {line[:80]!r} ({error})") from error


def stream_of(line: bytes) -> bytes:
    """The stream of an entry's line as `encode` writes it, empty for any other line; nothing is decoded."""
    end = line.find(b'"', len(_STREAM))
    is_entry = line.startswith(_STREAM) and end > 0 and line.endswith(_ENTRY_ENDS)
    return line[len(_STREAM) : end] if is_entry else b""


def key_of(line: bytes) -> bytes:
    """The key of an entry's line as `encode` writes it, with what JSON escapes in it."""
    at = line.find(_KEY) + len(_KEY)
    return line[at : line.find(_ID, at)]


def holds(line: bytes, data: bytes) -> bool:
    """Whether a line is that of an entry whose one field `data` has exactly these bytes, a JSON object."""
    at = line.find(_DATA)
    begin = at + len(_DATA)
    return line.startswith(data, begin) and len(line) == begin + len(data) + 1 and line.find(_RAW, 0, at) < 0


def _decode(value: Mapping[str, Any]) -> Item:
    place = value["stream"], value["key"], value["id"]
    if "lost" in value:
        return Lost(*place, value["lost"])
    if "base64" in value:
        pairs = ([base64.b64decode(x) for x in pair] for pair in value["base64"])
        return Recorded(*place, dict(pairs))
    if "fields" in value:
        return Recorded(*place, {name.encode(): text.encode() for name, text in value["fields"].items()})
    return Recorded(*place, {b"data": value["raw"].encode() if "raw" in value else orjson.dumps(value["data"])})


def part_path(path: Path, part: int) -> Path:
    """The file of a part, counted from 1: `day.jsonl.zst`, then `day.0002.jsonl.zst`."""
    if part == 1:
        return path
    suffix = next(s for s in _SUFFIXES if path.name.endswith(s))
    return path.with_name(f"{path.name.removesuffix(suffix) if suffix else path.name}.{part:04d}{suffix}")


# ------------------------------------------------------------------ writing


def lock(path: Path) -> BinaryIO:
    """Keep other recorders away from the recording at `path` until the result is closed. Raises `RecordingError`."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RecordingError(f"{path}: another recorder writes to it; give another --out") from None
    return file


def _nothing(_: bytes) -> Note | None:
    return None


class Writer:
    """Appends to one file. `note_of` gives the note to write before a frame of these lines, if any."""

    def __init__(self, path: Path, note_of: NoteOf = _nothing, *, level: int = 3) -> None:
        self.path = path
        self._note_of = note_of
        self._file = path.open("ab", buffering=0)
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
        self._lines: list[bytes] = []
        self._pending = 0
        self._last_id = ""

    @classmethod
    def begin(cls, path: Path, header: Mapping[str, Any], note_of: NoteOf = _nothing) -> Self:
        """A new file that is there with its header or not at all, whenever this process is killed."""
        unfinished = path.with_name(f"{path.name}.new")
        unfinished.unlink(missing_ok=True)
        writer = cls(unfinished, note_of)
        writer.header(header)
        writer.path = unfinished.replace(path)
        return writer

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return os.fstat(self._file.fileno()).st_size

    def header(self, header: Mapping[str, Any]) -> None:
        """The first line of a file, on disk at once."""
        self._append(self._compressor.compress(orjson.dumps({"recording": FORMAT, **header}) + b"\n"))

    def add(self, item: Item) -> None:
        """Append one entry. Neighbours of one ID, the outputs of one bar, share a frame: all survive, or none."""
        if self._pending >= FRAME_BYTES and item.id != self._last_id:
            self.flush()
        self._last_id = item.id
        self._put(encode(item))

    def _put(self, line: bytes) -> None:
        self._lines += (line, b"\n")
        self._pending += len(line) + 1

    def flush(self) -> None:
        """End the frame: everything added so far survives the death of this process."""
        if self._lines:
            text = b"".join(self._lines)
            self._lines.clear()
            self._pending = 0
            frame = self._compressor.compress(text)
            self._append(_noted(frame, self._note_of(text)))

    def _append(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _noted(frame: bytes, note: Note | None) -> bytes:
    """A frame behind its note."""
    if note is None:
        return frame
    sealed = seal({**note, "bytes": len(frame), "checksum": frame[-_CHECKSUM:]})
    length = (4 + len(sealed)).to_bytes(4, "little")
    return _NOTE + length + length + sealed + frame if len(sealed) < _NOTE_BYTES else frame


# ------------------------------------------------------------------ reading


def unknown(_: Note) -> bool:
    """`Known` of who reads every frame."""
    return False


@dataclass
class Frames:
    """The frames of one file. After the last one, `whole` is where it ended and `cut` the bytes behind it."""

    path: Path
    whole: int = 0
    cut: int = 0

    def texts(self, known: Known = unknown) -> Iterator[bytes]:
        """Each frame's lines; frames whose note is `known` are left out unread.

        Raises `RecordingError` where a frame is damaged.
        """
        size = self.path.stat().st_size
        decompressor = zstandard.ZstdDecompressor()
        with self.path.open("rb", buffering=_CHUNK) as file:
            while self.whole < size:
                note, begin = self._read_note(file)
                if note is not None and known(note):
                    self.whole = begin + note["bytes"]
                    continue
                file.seek(begin)
                frame = decompressor.decompressobj()
                try:
                    lines = [frame.decompress(chunk) for chunk in _chunks(file, frame)]
                except zstandard.ZstdError as error:
                    raise self._damaged(begin, error) from error
                if not frame.eof:
                    break
                self.whole = file.tell() - len(frame.unused_data)
                yield b"".join(lines)
        self.cut = size - self.whole

    def _read_note(self, file: BinaryIO) -> tuple[Note | None, int]:
        """The note that comes next, None where there is none of the frame behind it, and where that frame begins.

        A length that is damaged would hide all that follows, so it is not believed alone.
        """
        file.seek(self.whole)
        head = file.read(12)
        if not head.startswith(_NOTE) or len(head) < 12:
            return None, self.whole
        if head[4:8] != head[8:]:
            raise self._damaged(self.whole, "its note says two lengths")
        length = int.from_bytes(head[4:8], "little")
        begin = self.whole + 8 + length
        try:
            note = unseal("note", file.read(length - 4))
        except StateCorruptError:
            return None, begin
        file.seek(begin + note["bytes"] - _CHECKSUM)
        return (note if file.read(_CHECKSUM) == note["checksum"] else None), begin

    def _damaged(self, at: int, problem: object) -> RecordingError:
        size = self.path.stat().st_size
        return RecordingError(f"{self.path}: damaged in the frame at byte {at} of {size}: {problem}")


def _chunks(file: BinaryIO, frame: Any) -> Iterator[bytes]:
    """Bytes until the end of the frame, or of the file; most frames of a quiet feed are small."""
    size = _FIRST_CHUNK
    while not frame.eof and (chunk := file.read(size)):
        yield chunk
        size = _CHUNK


@dataclass
class Recording:
    """A recording to read: the file at `path` and the parts that follow it.

    `header` is that of the first file. `cut` are the bytes of an unfinished frame at the end, known
    once everything was read.
    """

    path: Path
    header: Mapping[str, Any] = field(init=False)
    cut: int = 0

    def __post_init__(self) -> None:
        self.header = read_header(self.path)

    def parts(self) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        """The files in order, each with its header. Raises `RecordingError` where one is of another recording."""
        path, header, first = self.path, self.header, self.header["part"]
        base = self.path if first == 1 else _base(self.path, first)
        while True:
            yield path, header
            path = part_path(base, header["part"] + 1)
            if not path.exists() or self._is_unbegun(path, part_path(base, header["part"] + 2)):
                return
            following = read_header(path)
            if (following["id"], following["part"]) != (header["id"], header["part"] + 1):
                raise RecordingError(f"{path}: no continuation of {self.path}; move it elsewhere, or rename it")
            header = following

    @staticmethod
    def _is_unbegun(path: Path, following: Path) -> bool:
        """Whether the last part has no whole frame: a recorder was killed before it wrote an entry there."""
        return not following.exists() and next(Frames(path).texts(), None) is None

    def texts(self, known: Known = unknown) -> Iterator[bytes]:
        """Whole lines, a frame at a time, headers left out, and frames whose note is `known`."""
        cut = 0
        for path, _ in self.parts():
            if cut:
                raise RecordingError(f"{path}: the part before it is cut; it was not finished by the recorder")
            frames = Frames(path)
            first = True
            for text in frames.texts(known):
                yield text.partition(b"\n")[2] if first else text
                first = False
            cut = self.cut = frames.cut

    def __iter__(self) -> Iterator[Item]:
        """Every entry, in the order of the file."""
        for text in self.texts():
            yield from map(decode, text.splitlines())


def _base(path: Path, part: int) -> Path:
    return path.with_name(path.name.replace(f".{part:04d}", "", 1))


def is_recording(path: Path) -> bool:
    """Whether the file begins as a recording does."""
    try:
        read_header(path)
    except (RecordingError, OSError):
        return False
    return True


def read_header(path: Path) -> Mapping[str, Any]:
    """The first line. Raises `RecordingError`."""
    if not path.is_file():
        raise RecordingError(f"{path}: no such file; `quartet record --out {path}` makes one")
    try:
        first = next(Frames(path).texts(), b"").split(b"\n", 1)[0]
        header: Mapping[str, Any] = orjson.loads(first)
        found = header["recording"]
    except (RecordingError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise RecordingError(f"{path}: no recording, or one cut in its first frame ({error})") from error
    if found != FORMAT:
        raise RecordingError(f"{path}: a recording of format {found}; this program reads format {FORMAT}")
    return header


@dataclass
class Tail:
    """Where a recording ends: its last file, that file's header, and each key's last ID and count of entries."""

    path: Path
    header: Mapping[str, Any]
    positions: dict[str, tuple[str, int]]
    cut: int


def read_tail(path: Path) -> Tail:
    """Read the last part of the recording at `path`, to continue it behind its last whole frame."""
    last, header = list(Recording(path).parts())[-1]
    positions = {key: (at[0], at[1]) for key, at in header["positions"].items()}
    frames = Frames(last)
    for number, lines in enumerate(frames.texts()):
        for line in lines.splitlines()[number == 0 :]:
            item = decode(line)
            before = positions.get(item.key, ("0-0", 0))
            at = before[0] if isinstance(item, Lost) else item.id
            positions[item.key] = at, before[1] + (item.entries if isinstance(item, Lost) else 1)
    return Tail(last, header, positions, frames.cut)


def drop_cut(tail: Tail) -> None:
    """Remove the unfinished frame that a killed recorder left."""
    if tail.cut:
        os.truncate(tail.path, tail.path.stat().st_size - tail.cut)
