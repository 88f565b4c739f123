"""What a vote costs each agent: microseconds a row at several batch sizes, one thread.

    python -m benchmarks.agents [--json] [--seconds 0.5]

`demo` are the four models of the demonstration; `full` are models of the sizes met in production with
random weights: N-HiTS of 5,625,312 parameters and PatchTST of 709,644, 64 bars x 49 features, and 300
trees each of LightGBM and XGBoost over 49 features. Each is built by the loader that serves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import lightgbm
import numpy as np
import torch
import xgboost

from agents import lgbm, nhits, patchtst, xgb
from agents.agent import Built
from agents.artifacts import LoadOptions, load_agent
from benchmarks.machine import demo_models, line, microseconds
from streams.messages import AGENTS
from worker.training.networks import state_bytes

BATCHES = (1, 64, 256)
WINDOW, WIDTH, TREES = 64, 49, 300


def demo() -> Iterator[tuple[str, Built]]:
    """The networks of the demonstration's models, without scaler and head."""
    folder = demo_models()
    for agent in AGENTS:
        model = load_agent(folder, agent, LoadOptions()).model
        assert model is not None
        yield (
            agent,
            Built("", len(model.features), model.window, model.outputs, model.parameters, model.network),
        )


def full() -> Iterator[tuple[str, Built]]:
    """Models of full size with seeded weights."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4_000, WIDTH)), rng.standard_normal(4_000)
    booster = xgboost.train(
        {"max_depth": 6, "eta": 0.05, "nthread": 1, "seed": 0}, xgboost.DMatrix(x, y), num_boost_round=TREES
    )
    yield "xgboost", xgb.build(xgb.parse(bytes(booster.save_raw("ubj")), ".ubj"), {})
    trees = lightgbm.train(
        {"num_leaves": 31, "num_threads": 1, "verbose": -1, "seed": 0}, lightgbm.Dataset(x, y), num_boost_round=TREES
    )
    yield "lightgbm", lgbm.build(lgbm.parse(trees.model_to_string().encode(), ".txt"), {})
    told = {"window": WINDOW, "num_features": WIDTH}
    deep = nhits.NHiTS(WINDOW, WIDTH, (512, 512), blocks=3, outputs=12, dropout=0.1)
    yield "nhits", nhits.build(nhits.parse(state_bytes(deep), ".pth"), told)
    attention = patchtst.PatchTST(
        WIDTH, d_model=128, heads=4, layers=3, feed_forward=512, outputs=12, patch=16, stride=8, dropout=0.1
    )
    yield "patchtst", patchtst.build(patchtst.parse(state_bytes(attention), ".pth"), {**told, "n_heads": 4})


def cost(built: Built, batch: int, seconds: float) -> float:
    """Microseconds a row."""
    shape = (batch, built.width) if built.window == 1 else (batch, built.window, built.width)
    rows = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return microseconds(lambda: built.network(rows), seconds) / batch


def measure(seconds: float) -> list[dict[str, object]]:
    return [
        {
            "size": size,
            "agent": agent,
            "parameters": built.parameters,
            **{str(batch): cost(built, batch, seconds) for batch in BATCHES},
        }
        for size, models in (("demo", demo()), ("full", full()))
        for agent, built in models
    ]


def show(rows: list[dict]) -> None:
    print(
        f"{'models':<8}{'agent':<10}{'parameters':>12}"
        + "".join(f"{f'batch {b}':>12}" for b in BATCHES)
        + "   us a row"
    )
    for row in rows:
        costs = "".join(f"{row[str(b)]:>12.1f}" for b in BATCHES)
        print(f"{row['size']:<8}{row['agent']:<10}{row['parameters']:>12,}{costs}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each number")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(given.seconds)
    if given.json:
        print(json.dumps({"machine": line(), "agents": rows}))
    else:
        show(rows)


if __name__ == "__main__":
    main()
