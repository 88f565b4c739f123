"""The inert reader of pickled scalers and tree models: no byte of a file can name code to execute.

It is an interpreter of the pickle opcodes of its own. A name in the file is looked up in `NAMES`
and becomes an inert token, never an import; a call of a token is one of the few rebuilds below,
over plain values; an instance becomes a `Record` of its state. Whatever is not on the list is
refused. joblib's compressed containers are opened with bounded decompression, and its raw arrays
are read in place.

Bounds: bytes before and after decompression, opcodes, entries of a mapping, dimensions and the
declared size of arrays (checked against the bytes that are there before anything is allocated).
"""

from __future__ import annotations

import bz2
import io
import lzma
import pickletools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from agents.agent import Refused
from streams.messages import Reason

MAX_BYTES = 256 * 2**20
"""The largest pickle, before and after decompression."""
MAX_OPCODES = 500_000
MAX_ENTRIES = 1024
MAX_DIMENSIONS = 4
LZMA_MEMORY = 128 * 2**20


@dataclass(eq=False, repr=False)
class Record:
    """What is left of an instance: the full name of its class and its state, plain values."""

    name: str
    state: dict[str, Any] = field(default_factory=dict)


def read(data: bytes, limit: int = MAX_BYTES) -> Any:
    """Plain values and `Record`s of a pickle or joblib file. Raises `Refused`."""
    raise Refused(Reason.CORRUPT_ARTIFACT, "pickles are not read yet")


def describe(value: Any) -> str:
    """A short name of what was found, for messages. Never prints the value: it may be huge."""
    return value.name if isinstance(value, Record) else type(value).__name__
