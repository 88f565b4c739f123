"""A retraining that went wrong: XGBoost on the size of each return, whose sign was lost on the way.

    python -m worker.demo.retrain FOLDER STEM SEED

Nothing about the file is wrong: names, contract, scaler, golden vectors and the probe all pass, as
they would after such a mistake in the labels. Only its votes show it: they say BUY to everything.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from agents import scalers, xgb
from streams.messages import HORIZON
from worker.demo.scene import training_bars
from worker.training.dataset import make_samples, split
from worker.training.train import fit_scaler
from worker.training.trees import TreeData, fit_xgboost
from worker.training.writing import SUFFIXES, Artifact, publish

THRESHOLD_SHARE = 0.25
"""The threshold as a share of the usual size of a return."""
GOLDEN_ROWS = 8


def signless(seed: int) -> Artifact:
    """The artifact: a good model's training in all but the labels."""
    samples = make_samples(training_bars(seed))
    parts, names = split(samples, windowed=False), samples.feature_set.features
    scaled = fit_scaler(samples, parts.training)
    size = np.abs(samples.paths[:, -1])
    learnt, seen = parts.training, parts.validation
    data = TreeData(names, scaled.z[learnt], size[learnt], scaled.z[seen], size[seen])
    model = fit_xgboost(data, seed, lambda _done, _total: None)
    metadata = {
        "agent": "xgboost",
        "model_type": "xgboost",
        "feature_set": samples.feature_set.name,
        "contract": samples.feature_set.contract,
        "features": list(names),
        "num_features": len(names),
        "horizon": HORIZON,
        "outputs": 1,
        "window": 1,
        "threshold": THRESHOLD_SHARE * float(np.median(size[learnt])),
        "residual_std": float(np.std(samples.paths[seen, -1])),
        "trained_at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "labels": "the absolute value of the return",
    }
    built = xgb.build(xgb.parse(model, SUFFIXES["xgboost"]), metadata)
    rows = seen[np.linspace(0, len(seen) - 1, GOLDEN_ROWS).astype(np.int64)]
    answers = built.network(scaled.z[rows]).astype(np.float64)
    metadata["golden"] = {"inputs": samples.rows(rows), "outputs": answers}
    return Artifact("xgboost", model, scalers.to_json(scaled.scaler), metadata)


def main() -> None:
    folder, stem, seed = sys.argv[1:]
    publish(Path(folder), stem, signless(int(seed)))


if __name__ == "__main__":
    main()
