"""The manifest of a models folder: which files belong there, and the SHA-256 of each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from agents.agent import Refused
from agents.discovery import read_once
from streams.messages import Reason

NAME = "manifest.json"
FORMAT = "quartet-manifest/1"
MAX_BYTES = 16 * 2**20
FILE_MAX_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """A file that is not as the manifest says. `problem` is `missing`, `changed` or `unlisted`."""

    file: str
    problem: str
    detail: str


def read(models: Path) -> Mapping[str, str] | None:
    """File name to SHA-256 (hex), None where the folder has no manifest. Raises `Refused`."""
    file = models / NAME
    if not os.path.lexists(file):
        return None
    try:
        document = orjson.loads(read_once(file, MAX_BYTES))
        files = document["files"] if document["format"] == FORMAT else None
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise _corrupt(file, str(error)) from error
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise _corrupt(file, f"expected the format {FORMAT!r} and a mapping of files to SHA-256")
    return files


def read_verified(file: Path, max_bytes: int) -> bytes:
    """The bytes of `file` from one opening, as the manifest of its folder lists them, where there is one.

    Raises `Refused` as `read_once` does; `unsafe_artifact` where the manifest does not list the file,
    `corrupt_artifact` where it lists another hash. Nothing of such a file is parsed.
    """
    data = read_once(file, max_bytes)
    listed = read(file.parent)
    if listed is None:
        return data
    if file.name not in listed:
        raise Refused(
            Reason.UNSAFE_ARTIFACT,
            f"{file.name} is not listed in {file.parent / NAME}: add it with `quartet models import`, or remove the "
            "manifest to serve files that nobody vouched for",
        )
    if sha256(data) != listed[file.name]:
        raise Refused(
            Reason.CORRUPT_ARTIFACT,
            f"{file.name} has SHA-256 {sha256(data)}, {file.parent / NAME} lists {listed[file.name]}; copy it again",
        )
    return data


def record(models: Path, names: Iterable[str]) -> None:
    """Add the files of these names, as they are now, to the manifest of the folder; others stay as listed."""
    record_hashes(models, {name: sha256(read_once(models / name, FILE_MAX_BYTES)) for name in names})


def record_hashes(models: Path, hashes: Mapping[str, str]) -> None:
    """Add files by their SHA-256 (hex); before they appear, so that nobody meets them unlisted."""
    listed = {**(read(models) or {}), **hashes}
    document = {"format": FORMAT, "files": dict(sorted(listed.items()))}
    staged = models / f".{NAME}.{os.getpid()}"
    staged.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    staged.replace(models / NAME)


def verify(models: Path) -> list[Finding]:
    """Every file of the folder against its manifest: nothing found means that all is as listed.

    Hidden files and folders are left out. Raises `Refused` with `no_artifact` where there is no
    manifest, `corrupt_artifact` where it cannot be read.
    """
    listed = read(models)
    if listed is None:
        raise Refused(
            Reason.NO_ARTIFACT,
            f"{models} has no {NAME}: make a folder that has one with `quartet models import {models} --models OUT`",
        )
    present = {entry.name for entry in models.iterdir() if not entry.name.startswith(".") and not _is_folder(entry)}
    found = [Finding(name, "unlisted", "not in the manifest") for name in present - set(listed) - {NAME}]
    found += [Finding(name, "missing", "listed, and not there") for name in set(listed) - present]
    for name in set(listed) & present:
        detail = _difference(models / name, listed[name])
        found += [Finding(name, "changed", detail)] if detail else []
    return sorted(found, key=lambda finding: finding.file)


def sha256(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def _difference(file: Path, expected: str) -> str:
    try:
        found = sha256(read_once(file, FILE_MAX_BYTES))
    except Refused as refused:
        return refused.refusal.detail
    return "" if found == expected else f"SHA-256 is {found}, the manifest says {expected}"


def _is_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.is_symlink()


def _corrupt(file: Path, detail: str) -> Refused:
    return Refused(Reason.CORRUPT_ARTIFACT, f"{file} cannot be read as a manifest: {detail}")
