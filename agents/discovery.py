"""Which files of a folder are artifacts, which of them is newest by its name, and how a file is read: once.

`<prefix>_v<YYYYMMDD_HHMMSS>[_v<generation>].<pkl|pth|ubj|json|txt>`; the time of a file never counts.
"""

from __future__ import annotations

import errno
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
_LOOKS_LIKE_ONE = (*SUFFIXES, "pt", "ckpt", "bin", "model", "joblib", "pickle", "onnx", "safetensors")
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


def candidate_of(file: Path, agent: str) -> Candidate | None:
    """The file as an artifact of `agent`; None where its name is not one."""
    return _candidate(file.parent, agent, file.name)


def ranks_above(one: Candidate, other: Candidate) -> bool:
    """Whether `one` would be selected before `other`."""
    return _rank(one) > _rank(other)


def misnamed(models: Path, agent: str) -> list[Path]:
    """Files with a prefix and a suffix as models have them that do not fit the pattern; none is ever loaded."""
    prefixed = re.compile(
        rf"(?:{'|'.join(PREFIXES[agent])})(?![a-z0-9]).*\.(?:{'|'.join(_LOOKS_LIKE_ONE)})", re.IGNORECASE | re.DOTALL
    )
    return [
        models / name
        for name in _names(models)
        if prefixed.fullmatch(name) and not _SIDECAR.fullmatch(name) and _candidate(models, agent, name) is None
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
        if error.errno == errno.ELOOP:
            raise _unsafe(f"{file} is a symbolic link; put the file itself into the folder") from error
        raise _unreadable(file, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _unsafe(f"{file} is no regular file; put the artifact itself into the folder")
        # One byte over the limit is asked for, so that a file that grows meanwhile is seen.
        data = b"" if status.st_size > max_bytes else _drain(descriptor, max_bytes + 1)
    except OSError as error:
        raise _unreadable(file, error) from error
    finally:
        os.close(descriptor)
    if (size := max(status.st_size, len(data))) > max_bytes:
        raise _unsafe(f"{file} has {size} bytes, at most {max_bytes} are read; raise the limit or remove the file")
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


def _unsafe(detail: str) -> Refused:
    return Refused(Reason.UNSAFE_ARTIFACT, detail)


def _unreadable(file: Path, error: OSError) -> Refused:
    return Refused(
        Reason.CORRUPT_ARTIFACT, f"{file} cannot be read: {error.strerror}; mend its permissions or copy it again"
    )


def _drain(descriptor: int, most: int) -> bytes:
    parts: list[bytes] = []
    left = most
    while left and (part := os.read(descriptor, min(left, 1 << 24))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
