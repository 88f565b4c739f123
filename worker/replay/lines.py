"""The lines of a recording, told apart by their bytes; nothing is decoded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from streams.recording import Known, Recording, stream_of, unknown

_HEAD = 40
_LONGEST = _HEAD - len('{"stream":""')
"""The longest name of a stream that ends within the head of a line."""

_MOST_HEADS = 4096

Line = tuple[bytes, int, int]
"""The stream, empty where the bytes alone do not tell it, and where in the text the line begins and ends."""


def read_lines(recording: Recording, known: Known = unknown) -> Iterator[tuple[bytes, Iterator[Line]]]:
    """Each frame's text with its lines, but those whose note is `known`. Raises `RecordingError`."""
    streams: dict[bytes, bytes] = {}
    for text in recording.texts(known):
        yield text, lines_of(text, streams)


def lines_of(text: bytes, streams: dict[bytes, bytes]) -> Iterator[Line]:
    """The lines of a text. `streams` holds those of the heads that were met: lines have few beginnings."""
    if not text:
        return
    for head, begin, end in zip(*_heads(text), strict=True):
        stream = streams.get(head)
        if stream is None:
            stream = stream_of(text[begin:end])
            if 0 < len(stream) <= _LONGEST and head:
                if len(streams) >= _MOST_HEADS:
                    streams.clear()
                streams[head] = stream
        yield stream, begin, end


def _heads(text: bytes) -> tuple[list[bytes], list[int], list[int]]:
    """By line: its first bytes, none where it cannot be an entry's, its begin and its end."""
    codes = np.frombuffer(text if text.endswith(b"\n") else text + b"\n", np.uint8)
    ends = np.flatnonzero(codes == ord("\n"))
    begins = np.concatenate([[0], ends[:-1] + 1])
    last, before = (codes.take(ends - n, mode="clip") for n in (1, 2))
    entries = (ends - begins >= _HEAD) & (last == ord("}")) & ((before == ord("}")) | (before == ord("]")))
    heads = np.zeros(len(ends), f"S{_HEAD}")
    if entries.any():
        heads[entries] = sliding_window_view(codes, _HEAD)[begins[entries]].view(heads.dtype).ravel()
    return heads.tolist(), begins.tolist(), ends.tolist()
