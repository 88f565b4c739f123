"""What a trained model was worth on rows that it did not learn from, and what the safeguards would say.

None of these figures is a promise of profit: they know no costs, no fills and no other market.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.agent import Outputs
from agents.heads import head_for
from streams.messages import Action

ACTION_LIMIT = 0.70
"""Share of one action, BUY or SELL, above which the votes count as collapsed."""
HOLD_LIMIT = 0.85
"""Share of HOLD above which the threshold counts as a dead zone."""
CONFIDENCE_STD_LIMIT = 0.05
CONFIDENCE_RANGE_LIMIT = 0.12
"""Least distance between the 10th and the 90th percentile of confidence."""


@dataclass(frozen=True)
class Figures:
    """Of one part: `r2` of the return over the horizon, `hit_rate` of the `acted` BUY and SELL votes.

    A hit is a BUY before a rise or a SELL before a fall; 0 acted gives a rate of NaN. `actions` are
    the shares of SELL, HOLD and BUY; `confidence_range` lies between percentiles 10 and 90.
    """

    rows: int
    r2: float
    hit_rate: float
    acted: int
    actions: dict[str, float]
    confidence_std: float
    confidence_range: float

    def as_json(self) -> dict[str, Any]:
        """Plain values; NaN, which JSON has not, as None."""
        return {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in asdict(self).items()}


def r_squared(truth: NDArray[np.float64], forecast: NDArray[np.float64]) -> float:
    """1 - sum (y - r)^2 / sum (y - mean y)^2; below 0 where the part's own mean forecasts better."""
    return float(1 - np.sum((truth - forecast) ** 2) / np.sum((truth - truth.mean()) ** 2))


def measure(outputs: Outputs, truth: NDArray[np.float64], threshold: float, residual_std: float) -> Figures:
    """The figures of raw `outputs` `[B, K]` against the returns `truth` `[B]` that followed."""
    actions, confidence = head_for(outputs.shape[1], threshold, residual_std).decide(outputs)
    acted = actions != Action.HOLD
    hits = np.where(actions == Action.BUY, truth > 0, truth < 0)[acted]
    low, high = np.percentile(confidence, (10, 90))
    return Figures(
        rows=len(truth),
        r2=r_squared(truth, outputs[:, -1]),
        hit_rate=float(hits.mean()) if len(hits) else float("nan"),
        acted=len(hits),
        actions={a.name: float(np.mean(actions == a)) for a in (Action.SELL, Action.HOLD, Action.BUY)},
        confidence_std=float(confidence.std()),
        confidence_range=float(high - low),
    )


def safeguard_warnings(figures: Figures) -> list[str]:
    """One clause for each criterion by which the running worker would mute votes like these."""
    action = max(("BUY", "SELL"), key=figures.actions.__getitem__)
    share, hold = figures.actions[action], figures.actions["HOLD"]
    found = [
        (share > ACTION_LIMIT, f"{share:.0%} of the votes are {action} (limit {ACTION_LIMIT:.0%})"),
        (hold > HOLD_LIMIT, f"{hold:.0%} of the votes are HOLD (limit {HOLD_LIMIT:.0%})"),
        (
            figures.confidence_std < CONFIDENCE_STD_LIMIT,
            f"confidence deviates by {figures.confidence_std:.3f} only (limit {CONFIDENCE_STD_LIMIT})",
        ),
        (
            figures.confidence_range < CONFIDENCE_RANGE_LIMIT,
            f"confidence ranges over {figures.confidence_range:.3f} only (limit {CONFIDENCE_RANGE_LIMIT})",
        ),
    ]
    return [text for hit, text in found if hit]
