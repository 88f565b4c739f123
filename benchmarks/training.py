"""How long training takes and what it finds: `python -m benchmarks.training [--symbols N] [--bars N] [--seeds N]`.

The synthetic market of the demonstration, all four agents, one market a seed, and once more on pure
noise. CPU seconds are comparable on a shared machine, wall seconds are not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from worker.training.market import Signal, generate
from worker.training.train import train_agents


def measure(signal: Signal, symbols: int, bars: int, seed: int) -> float:
    """Train on one market, print a line for each agent, give the CPU seconds of all."""
    history = generate(symbols, bars, seed, signal=signal).bars()
    started = time.process_time()
    with tempfile.TemporaryDirectory() as models:
        trained = train_agents(history, Path(models), seed=0)
    for one in trained:
        seen, held = one.validation, one.test
        print(
            f"{signal:8} {seed:4} {one.agent:9} {one.cpu_seconds:8.1f} {one.seconds:8.1f}"
            f" {seen.r2:8.3f} {held.r2:8.3f} {seen.hit_rate:7.1%} {held.hit_rate:7.1%} {held.acted:6}"
            f" {one.training_hold:6.1%} {seen.actions['HOLD']:6.1%} {seen.confidence_std:6.2f} {len(one.warnings):5}"
        )
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--symbols", type=int, default=20)
    parser.add_argument("--bars", type=int, default=1_500)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    # The compiled features are built or read before the clock runs.
    with tempfile.TemporaryDirectory() as models:
        train_agents(generate(4, 700).bars(), Path(models), agents=["lightgbm"])
    print(
        f"{'market':8} {'seed':>4} {'agent':9} {'CPU s':>8} {'wall s':>8} {'R2':>8} {'R2 test':>8} {'hits':>7}"
        f" {'h. test':>7} {'votes':>6} {'HOLD t':>6} {'HOLD v':>6} {'c. sd':>6} {'warn':>5}"
    )
    markets: list[tuple[Signal, int]] = [("cycle", seed) for seed in range(chosen.seeds)] + [("noise", 0)]
    totals = [measure(signal, chosen.symbols, chosen.bars, seed) for signal, seed in markets]
    print(f"CPU seconds for all four, features included: {' '.join(f'{t:.1f}' for t in totals)}")


if __name__ == "__main__":
    main()
