"""Legacy artifacts into formats that cannot carry code, each conversion proved equal.

Trees leave their pickles as `.ubj` and `.txt`, scalers as `_scaler.json`; checkpoints are state dicts
already and keep their bytes under `.pth`. An artifact is loaded where it was and where it will be,
and its outputs on seeded rows must be the same bits, or it is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agents import lgbm, manifest, scalers, xgb
from agents.agent import Model, Refused
from agents.artifacts import Candidate, LoadOptions, discover, load, misnamed
from agents.discovery import read_once
from streams.messages import AGENTS, Reason

PROBE_ROWS = 64
PROBE_SEED = 20_240_601


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of one artifact. `state` is `imported`, `unchanged` (was there) or `refused`."""

    agent: str
    file: str
    state: str
    written: tuple[str, ...] = ()
    reason: str = ""
    detail: str = ""


def import_models(source: Path, out: Path, options: LoadOptions) -> list[Imported]:
    """Convert every artifact of `source` into `out`, which is made if absent, and list it in the manifest.

    A file of another content under the same name is never overwritten: that artifact is refused.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for agent in AGENTS:
        results += [_import(candidate, out, options) for candidate in discover(source, agent)]
        results += [_misnamed(agent, file) for file in misnamed(source, agent)]
    return results


def _import(candidate: Candidate, out: Path, options: LoadOptions) -> Imported:
    done = Imported(candidate.agent, candidate.file.name, "imported")
    try:
        before = load(candidate, options)
        files = _converted(candidate, before, options)
        _prove(candidate, before, files, options)
        new = [name for name, data in files.items() if not _is_there(out / name, data, options)]
    except Refused as refused:
        return replace(done, state="refused", reason=str(refused.refusal.reason), detail=refused.refusal.detail)
    for name in new:
        with (out / name).open("xb") as opened:
            opened.write(files[name])
    manifest.record(out, files)
    return replace(done, state="imported" if new else "unchanged", written=tuple(files))


def _converted(candidate: Candidate, model: Model, options: LoadOptions) -> dict[str, bytes]:
    """Name to bytes, sidecars first: the model's file appears when all else is in place."""
    data = read_once(candidate.file, options.max_bytes)
    if manifest.sha256(data) != model.sha256:
        raise Refused(Reason.CORRUPT_ARTIFACT, f"{candidate.file} changed while it was read; import it again")
    files = {}
    for ending in ("_meta.json", "_metadata.json"):
        if candidate.beside(ending).exists():
            files[candidate.beside(ending).name] = read_once(candidate.beside(ending), options.max_bytes)
            break
    if isinstance(model.scaler, scalers.ColumnScaler):
        files[f"{candidate.file.stem}_scaler.json"] = scalers.to_json(scalers.named(model.scaler, model.features))
    suffix, converted = _safe_format(candidate, data)
    return {**files, candidate.file.stem + suffix: converted}


def _safe_format(candidate: Candidate, data: bytes) -> tuple[str, bytes]:
    if candidate.suffix != ".pkl":
        return candidate.suffix, data
    if candidate.agent == "xgboost":
        return ".ubj", xgb.to_ubj(data, ".pkl")
    if candidate.agent == "lightgbm":
        return ".txt", lgbm.to_txt(data, ".pkl")
    return ".pth", data


def _prove(candidate: Candidate, before: Model, files: Mapping[str, bytes], options: LoadOptions) -> None:
    """Load the converted files from a folder of their own and compare what they compute, bit for bit."""
    with tempfile.TemporaryDirectory(prefix="quartet-import-") as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        after = load(replace(candidate, file=Path(folder) / list(files)[-1]), options)
        rows = _probe_rows(before)
        same = before.predict(rows).tobytes() == after.predict(rows).tobytes()
    if not same or (before.features, before.contract) != (after.features, after.contract):
        raise Refused(
            Reason.CORRUPT_ARTIFACT,
            f"the conversion of {candidate.file.name} does not compute the same; keep the file as it is and report it",
        )


def _probe_rows(model: Model) -> NDArray[np.float64]:
    """Raw rows `[64, C]` or `[64, L, C]`, spread as the scaler's columns are where there is one."""
    rows = np.random.default_rng(PROBE_SEED).standard_normal((PROBE_ROWS, *model.input_shape))
    scaler = model.scaler
    if not isinstance(scaler, scalers.ColumnScaler) or scaler.kind == "minmax":
        return rows
    spread = rows if scaler.scale is None else rows * scaler.scale
    return spread if scaler.mean is None else spread + scaler.mean


def _is_there(file: Path, data: bytes, options: LoadOptions) -> bool:
    if not file.exists() and not file.is_symlink():
        return False
    if read_once(file, options.max_bytes) != data:
        raise Refused(
            Reason.CORRUPT_ARTIFACT, f"{file} exists with another content and is not overwritten; move it away first"
        )
    return True


def _misnamed(agent: str, file: Path) -> Imported:
    detail = "the name is not that of an artifact: <prefix>_v<YYYYMMDD_HHMMSS>[_v<generation>].<suffix>; rename it"
    return Imported(agent, file.name, "refused", reason=str(Reason.NO_ARTIFACT), detail=detail)
