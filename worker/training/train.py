"""Training from bars to artifacts: `train_agents` for a file's bars, `ensure_models` for what is missing.

What is measured is what will serve: every figure comes from the bytes of the written model, parsed
and computed by the same family module that the worker loads.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from agents import lgbm, nhits, patchtst, scalers, xgb
from agents.agent import Built, Family, Outputs
from agents.artifacts import discover
from streams.messages import AGENTS, HORIZON
from worker.errors import UsageError
from worker.quality import QualityLimits
from worker.training import networks, trees
from worker.training.bars import Bars
from worker.training.dataset import WINDOW, Parts, Samples, make_samples, split
from worker.training.figures import Figures, measure, muting_warning, safeguard_warnings
from worker.training.writing import SUFFIXES, Artifact, free_stem, prepare_folder, publish

HOLD_SHARE = 0.45
"""Of the training rows whose expected return lies within the threshold: these are HOLD."""
GOLDEN_ROWS = {1: 8, WINDOW: 3}
"""Golden vectors by window; a window holds 64 times as many numbers."""
CHUNK = 1_024
SEQUENCE = ("nhits", "patchtst")

_FAMILIES: Mapping[str, Family] = {"xgboost": xgb, "lightgbm": lgbm, "nhits": nhits, "patchtst": patchtst}
_LIBRARIES = {"xgboost": "xgboost", "lightgbm": "lightgbm", "nhits": "torch", "patchtst": "torch"}


class Progress(Protocol):
    """Told how far the training of one agent is."""

    def __call__(self, agent: str, done: int, total: int) -> None: ...


def silent(agent: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Trained:
    """One written artifact. `threshold` and `residual_std` are fractions of the price; `seconds` of wall clock."""

    agent: str
    file: Path
    threshold: float
    residual_std: float
    training_hold: float
    validation: Figures
    test: Figures
    seconds: float
    cpu_seconds: float

    warnings: list[str] = field(default_factory=list)
    """Why the running worker would mute votes like those on validation."""


@dataclass(frozen=True)
class Scaled:
    """Samples with the scaler of their training part, and `z` `[N, C]`, what models are given."""

    samples: Samples
    scaler: scalers.ScalerFile
    z: NDArray[np.float32]


def train_agents(
    bars: Bars,
    models: Path,
    *,
    agents: Sequence[str] = AGENTS,
    seed: int = 0,
    progress: Progress = silent,
    warmup_bars: int | None = None,
    max_gap_bars: int = 100,
    now: datetime | None = None,
    quality: Mapping[str, QualityLimits] | None = None,
) -> list[Trained]:
    """Train `agents` on `bars` and write their artifacts into `models`, each loaded back.

    `now` stamps the names (the clock's UTC unless given); `quality` are the limits that warnings go by.
    Raises `UsageError` for an unknown agent, too little data or an unusable folder, `CheckFailed` where
    an artifact does not load.
    """
    chosen = choose(agents)
    folder = prepare_folder(models)
    samples = make_samples(bars, warmup_bars=warmup_bars, max_gap_bars=max_gap_bars)
    parts = {agent: split(samples, windowed=agent in SEQUENCE) for agent in chosen}
    scaled = fit_scaler(samples, split(samples, windowed=False).training)
    stamp = now or datetime.now(UTC)
    with one_torch_thread():
        return [
            _train_one(agent, scaled, parts[agent], folder, stamp, seed, progress, (quality or {}).get(agent))
            for agent in chosen
        ]


def ensure_models(models: Path, bars: Bars, seed: int = 0, progress: Progress = silent) -> list[Trained]:
    """Train every agent that has no artifact in `models`; what is there, refused or not, stays as it is."""
    missing = [agent for agent in AGENTS if not discover(models, agent)]
    return train_agents(bars, models, agents=missing, seed=seed, progress=progress) if missing else []


def choose(agents: Sequence[str]) -> tuple[str, ...]:
    """Known agents in their order; `all` stands for every one. Raises `UsageError`."""
    unknown = [name for name in agents if name not in (*AGENTS, "all")]
    if unknown or not agents:
        raise UsageError(f"unknown agent {', '.join(unknown) or '(none)'}; the agents are {', '.join(AGENTS)}, or all")
    return tuple(name for name in AGENTS if name in agents or "all" in agents)


def fit_scaler(samples: Samples, training: NDArray[np.int64]) -> Scaled:
    """Standard scaling by the training rows alone; a column that is constant there keeps scale 1."""
    rows = samples.features[training]
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    # A column of one value still deviates by a rounding error of its mean.
    flat = deviation <= 1e-12 * np.maximum(np.abs(mean), 1e-12)
    scaler = scalers.standard(mean, np.where(flat, 1.0, deviation), samples.feature_set.features)
    return Scaled(samples, scaler, scaler.scaler.transform(samples.features).astype(np.float32))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """One thread inside: sums, and so the files' predictions, are the same on every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_one(
    agent: str,
    scaled: Scaled,
    parts: Parts,
    folder: Path,
    stamp: datetime,
    seed: int,
    progress: Progress,
    limits: QualityLimits | None,
) -> Trained:
    started, cpu_started = time.perf_counter(), time.process_time()
    samples = scaled.samples

    def on_step(done: int, total: int) -> None:
        progress(agent, done, total)

    model, shape = _fit(agent, scaled, parts, seed, on_step)
    metadata = {**_identity(agent, samples), **shape}
    family = _FAMILIES[agent]
    built = family.build(family.parse(model, SUFFIXES[agent]), metadata)
    forecast, truth = _forecasts(built, scaled, parts), samples.paths[:, -1]
    threshold = float(np.quantile(np.abs(forecast["training"][:, -1]), HOLD_SHARE))
    residual_std = _deviation(truth[parts.validation] - forecast["validation"][:, -1])
    training, validation, test = (
        measure(forecast[name], truth[getattr(parts, name)], threshold, residual_std)
        for name in ("training", "validation", "test")
    )
    metadata |= {
        "threshold": threshold,
        "residual_std": residual_std,
        "hold_share_training": training.actions["HOLD"],
        "validation": validation.as_json(),
        "test": test.as_json(),
        "data": _data_range(samples, parts),
        "golden": _golden(built, scaled, parts),
        "seed": seed,
        "trained_at": f"{stamp:%Y-%m-%dT%H:%M:%SZ}",
        "libraries": _versions(agent),
    }
    stem = free_stem(folder, agent, stamp, samples.feature_set.name)
    loaded = publish(folder, stem, Artifact(agent, model, scalers.to_json(scaled.scaler), metadata))
    return Trained(
        agent=agent,
        file=folder / loaded.file.name,
        threshold=threshold,
        residual_std=residual_std,
        training_hold=training.actions["HOLD"],
        validation=validation,
        test=test,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        warnings=[
            *safeguard_warnings(validation, limits),
            *muting_warning(
                *(agent, forecast["validation"], samples.ts[parts.validation], (threshold, residual_std), limits)
            ),
        ],
    )


def _fit(
    agent: str, scaled: Scaled, parts: Parts, seed: int, on_step: Callable[[int, int], None]
) -> tuple[bytes, Mapping[str, Any]]:
    """The bytes of the model, and the metadata that its shape needs."""
    samples, z = scaled.samples, scaled.z
    if agent in SEQUENCE:
        paths = networks.PathData(z, samples.paths, parts.training, parts.validation)
        network = networks.make_network(agent, len(samples.feature_set), seed)
        networks.fit_network(network, paths, seed, on_step)
        return networks.state_bytes(network.module), network.metadata
    returns = samples.paths[:, -1]
    data = trees.TreeData(
        samples.feature_set.features,
        z[parts.training],
        returns[parts.training],
        z[parts.validation],
        returns[parts.validation],
    )
    fit = trees.fit_xgboost if agent == "xgboost" else trees.fit_lightgbm
    return fit(data, seed, on_step), {"window": 1}


def _inputs(scaled: Scaled, at: NDArray[np.int64], window: int) -> NDArray[np.float32]:
    """`[B, C]`, or `[B, L, C]` where `window` > 1."""
    return scaled.z[at] if window == 1 else scaled.z[at[:, None] + np.arange(1 - window, 1)]


def _forecasts(built: Built, scaled: Scaled, parts: Parts) -> dict[str, Outputs]:
    """Raw outputs `[B, K]` of each part."""
    found = {}
    for name in ("training", "validation", "test"):
        at = getattr(parts, name)
        chunks = (at[i : i + CHUNK] for i in range(0, len(at), CHUNK))
        outputs = [built.network(_inputs(scaled, rows, built.window)) for rows in chunks]
        found[name] = np.concatenate(outputs).astype(np.float64)
    return found


def _deviation(residual: NDArray[np.float64]) -> float:
    """Root mean square, so that a bias counts as error too."""
    return float(np.sqrt(np.mean(residual**2)))


def _golden(built: Built, scaled: Scaled, parts: Parts) -> dict[str, Any]:
    """Raw feature rows spread over validation, and what the model answers to them."""
    places = np.linspace(0, len(parts.validation) - 1, GOLDEN_ROWS[built.window]).astype(np.int64)
    at = parts.validation[places]
    samples = scaled.samples
    return {
        "inputs": samples.rows(at) if built.window == 1 else samples.windows(at),
        "outputs": built.network(_inputs(scaled, at, built.window)).astype(np.float64),
    }


def _identity(agent: str, samples: Samples) -> dict[str, Any]:
    feature_set = samples.feature_set
    return {
        "agent": agent,
        "model_type": agent,
        "feature_set": feature_set.name,
        "contract": feature_set.contract,
        "features": list(feature_set.features),
        "num_features": len(feature_set),
        "horizon": HORIZON,
        "outputs": HORIZON if agent in SEQUENCE else 1,
    }


def _data_range(samples: Samples, parts: Parts) -> dict[str, Any]:
    """Times are open times in ms, UTC; validation and test begin at the cuts."""
    return {
        "bars": len(samples.ts),
        "series": int(samples.series[-1]) + 1,
        "first_ts": int(samples.ts.min()),
        "last_ts": int(samples.ts.max()),
        "validation_from_ts": parts.cuts[0],
        "test_from_ts": parts.cuts[1],
        "training_rows": len(parts.training),
        "validation_rows": len(parts.validation),
        "test_rows": len(parts.test),
    }


def _versions(agent: str) -> dict[str, str]:
    library = _LIBRARIES[agent]
    return {
        "python": platform.python_version(),
        "numpy": version("numpy"),
        library: str(import_module(library).__version__),
    }
