"""Artifacts on disk: a model, its scaler and its metadata, proved to load before they take their names.

The files are made in a hidden folder inside the models' own, loaded from there as the worker would,
and only then renamed, the model last: no reader ever sees a model without its scaler, half a file,
or one that does not load.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson

from agents import manifest
from agents.agent import Model
from agents.artifacts import LoadOptions, load_agent
from worker.errors import CheckFailed, UsageError

SUFFIXES: Mapping[str, str] = {"xgboost": ".ubj", "lightgbm": ".txt", "nhits": ".pth", "patchtst": ".pth"}


@dataclass(frozen=True)
class Artifact:
    """The bytes of a model and of its scaler, and its metadata."""

    agent: str
    model: bytes
    scaler: bytes
    metadata: Mapping[str, Any]


def prepare_folder(models: Path) -> Path:
    """Make the folder if it is not there. Raises `UsageError` where it cannot be one."""
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--models {models}: cannot be made a folder: {error.strerror}; name another") from error
    if not os.access(models, os.W_OK):
        raise UsageError(f"--models {models}: not writable by this user; name another folder or change its mode")
    return models


def free_stem(models: Path, agent: str, now: datetime, feature_set: str) -> str:
    """`<agent>_v<YYYYMMDD_HHMMSS>_<set>` of the first second from `now` on that no artifact has."""
    while True:
        stem = f"{agent}_v{now:%Y%m%d_%H%M%S}_{feature_set}"
        if not (models / (stem + SUFFIXES[agent])).exists():
            return stem
        now += timedelta(seconds=1)


def publish(models: Path, stem: str, artifact: Artifact) -> Model:
    """Write, load back, rename; the loaded model. Raises `CheckFailed` where it does not load."""
    contents = {
        f"{stem}_scaler.json": artifact.scaler,
        f"{stem}_meta.json": orjson.dumps(
            artifact.metadata, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
        ),
        f"{stem}{SUFFIXES[artifact.agent]}": artifact.model,
    }
    with tempfile.TemporaryDirectory(prefix=".training-", dir=models) as hidden:
        folder = Path(hidden)
        for name, data in contents.items():
            _write(folder / name, data)
        loaded = load_agent(folder, artifact.agent, LoadOptions())
        if loaded.model is None:
            refusal = loaded.refusal
            why = f"{refusal.reason}: {refusal.detail}" if refusal else "no reason given"
            raise CheckFailed(
                f"{artifact.agent}: trained, but the artifact does not load and was not kept: {' '.join(why.split())}"
            )
        if manifest.read(models) is not None:
            manifest.record_hashes(models, {name: manifest.sha256(data) for name, data in contents.items()})
        for name in contents:
            (folder / name).replace(models / name)
    _sync(models)
    return loaded.model


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


def _sync(folder: Path) -> None:
    """Make the renames themselves durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
