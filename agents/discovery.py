"""Which files of a folder are artifacts, which of them is newest by its name, and how a file is read: once.

`<prefix>_v<YYYYMMDD_HHMMSS>[_v<generation>].<pkl|pth|ubj|json|txt>`; the time of a file never counts.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from agents.agent import Refused
from streams.messages import Reason

PREFIXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "xgboost": ("xgboost", "xgb"),
        "lightgbm": ("lightgbm", "lgbm"),
        "nhits": ("nhits",),
        "patchtst": ("patchtst",),
    }
)

SUFFIXES = ("ubj", "json", "txt", "pth", "pkl")
"""In order of preference where two files differ in nothing else: plain formats before pickles."""

PATTERN = "<prefix>_v<YYYYMMDD_HHMMSS>[_v<generation>].<pkl|pth|ubj|json|txt>"

_ARTIFACT = re.compile(
    r"(?P<prefix>[a-z]+)_(?P<version>v(?P<time>[0-9]{8}_[0-9]{6})(?:_v(?P<generation>[0-9]{1,6}))?)"
    rf"\.(?P<suffix>{'|'.join(SUFFIXES)})"
)
_SIDECAR = re.compile(r".*_(?:scaler|meta|metadata)\.[^.]+", re.DOTALL)


@dataclass(frozen=True)
class Candidate:
    """An artifact by its name. `time` is text, `YYYYMMDD_HHMMSS`; `generation` is 0 where none is given."""

    agent: str
    file: Path
    version: str
    time: str
    generation: int

    @property
    def suffix(self) -> str:
        """The format: `.pkl`, `.pth`, `.ubj`, `.json` or `.txt`."""
        return self.file.suffix

    def beside(self, ending: str) -> Path:
        """The file of the same stem with another ending, as `_scaler.pkl`."""
        return self.file.with_name(self.file.stem + ending)


def discover(models: Path, agent: str) -> list[Candidate]:
    """Every artifact of `agent` in `models`, best first: highest generation, then newest by name."""
    found = (candidate for name in _names(models) if (candidate := _candidate(models, agent, name)))
    return sorted(found, key=_rank, reverse=True)


def misnamed(models: Path, agent: str) -> list[Path]:
    """Files that carry a prefix and a suffix of an artifact but do not fit the pattern; none is ever loaded."""
    starts = tuple(prefix for prefix in PREFIXES[agent])
    return [
        models / name
        for name in _names(models)
        if re.match(rf"(?:{'|'.join(starts)})(?![a-z0-9])", name, re.IGNORECASE)
        and name.lower().endswith(tuple(f".{suffix}" for suffix in SUFFIXES))
        and not _SIDECAR.fullmatch(name)
        and _candidate(models, agent, name) is None
    ]


def read_once(file: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file of at most `max_bytes`, from one opening.

    Raises `Refused`: `unsafe_artifact` for a symbolic link, anything that is no regular file and a file
    over the limit, `corrupt_artifact` where it cannot be read.
    """
    try:
        # Not blocking: opening a pipe would wait for its writer before it could be refused.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if file.is_symlink():
            raise Refused(
                Reason.UNSAFE_ARTIFACT, f"{file} is a symbolic link; put the file itself into the folder"
            ) from error
        raise Refused(
            Reason.CORRUPT_ARTIFACT, f"{file} cannot be opened: {error.strerror}; mend its permissions"
        ) from error
    with open(descriptor, "rb", buffering=0) as opened:  # noqa: PTH123 - a descriptor, not a path
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Refused(Reason.UNSAFE_ARTIFACT, f"{file} is no regular file; put the artifact itself into the folder")
        if status.st_size > max_bytes:
            raise _oversize(file, status.st_size, max_bytes)
        try:
            data = _drain(descriptor, max_bytes + 1)
        except OSError as error:
            raise Refused(Reason.CORRUPT_ARTIFACT, f"{file} cannot be read: {error.strerror}; copy it again") from error
    if len(data) > max_bytes:
        raise _oversize(file, len(data), max_bytes)
    return data


def _names(models: Path) -> list[str]:
    try:
        return sorted(os.listdir(models))  # noqa: PTH208 - names, not paths
    except (FileNotFoundError, NotADirectoryError):
        return []


def _candidate(models: Path, agent: str, name: str) -> Candidate | None:
    match = _ARTIFACT.fullmatch(name)
    if match is None or match["prefix"] not in PREFIXES[agent] or not _is_time(match["time"]):
        return None
    return Candidate(agent, models / name, match["version"], match["time"], int(match["generation"] or 0))


def _is_time(text: str) -> bool:
    try:
        datetime.strptime(text, "%Y%m%d_%H%M%S")  # noqa: DTZ007 - compared as text, never as an instant
    except ValueError:
        return False
    return True


def _rank(candidate: Candidate) -> tuple[int, str, int, str]:
    return candidate.generation, candidate.time, -SUFFIXES.index(candidate.suffix[1:]), candidate.file.name


def _oversize(file: Path, size: int, most: int) -> Refused:
    return Refused(
        Reason.UNSAFE_ARTIFACT,
        f"{file} has {size} bytes or more, at most {most} are read; raise the limit or remove it",
    )


def _drain(descriptor: int, most: int) -> bytes:
    parts: list[bytes] = []
    left = most
    while left and (part := os.read(descriptor, min(left, 1 << 24))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
