"""Trains what is missing, in a process of its own: seconds of imports that a later run does without.

    python -m worker.demo.trainer MODELS SEED

Each line on stdout is `agent done total`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def report(agent: str, done: int, total: int) -> None:
    print(agent, done, total, flush=True)


def main() -> None:
    from worker.demo.scene import training_bars  # noqa: PLC0415  the first line on stdout comes sooner
    from worker.training.train import ensure_models  # noqa: PLC0415

    models, seed = Path(sys.argv[1]), int(sys.argv[2])
    ensure_models(models, training_bars(seed), seed, report)


if __name__ == "__main__":
    main()
