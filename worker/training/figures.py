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
from worker.qsc import Safeguard, criteria_of
from worker.quality import QualityLimits


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
        confidence_std=float(confidence.std(ddof=1)) if len(confidence) > 1 else 0.0,
        confidence_range=float(high - low),
    )


def safeguard_warnings(figures: Figures, limits: QualityLimits | None = None) -> list[str]:
    """One clause for each criterion by which the running worker would mute votes like these."""
    limits = limits or QualityLimits()
    action = max(("BUY", "SELL"), key=figures.actions.__getitem__)
    share, hold = figures.actions[action], figures.actions["HOLD"]
    spread, reach = figures.confidence_std, figures.confidence_range
    found = [
        (share > limits.action_share, f"{share:.0%} of the votes are {action} (limit {limits.action_share:.0%})"),
        (hold > limits.hold_share, f"{hold:.0%} of the votes are HOLD (limit {limits.hold_share:.0%})"),
        (
            spread < limits.confidence_stddev,
            f"confidence deviates by {spread:.3f} only (limit {limits.confidence_stddev})",
        ),
        (
            reach < limits.confidence_range,
            f"confidence ranges over {reach:.3f} only (limit {limits.confidence_range})",
        ),
    ]
    return [text for hit, text in found if hit]


def muting_warning(
    agent: str,
    outputs: Outputs,
    ts: NDArray[np.int64],
    levels: tuple[float, float],
    limits: QualityLimits | None = None,
) -> list[str]:
    """Where the running safeguard would mute raw `outputs` `[B, K]` of bars at `ts` `[B]`, given in the order of time.

    `levels` are threshold and residual deviation. One clause, or none; a stretch of 500 votes may be
    degenerate where the whole is not.
    """
    order = np.argsort(ts, kind="stable")
    actions, confidence = head_for(outputs.shape[1], *levels).decide(outputs[order])
    voted = np.where(actions == Action.ABSTAIN, -1, actions).astype(np.int64)
    seen = Safeguard({agent: limits or QualityLimits()}).observe(
        agent, voted, confidence, outputs[order], np.arange(len(ts)), ts[order]
    )
    muting = np.flatnonzero(seen.found)
    if not len(muting):
        return []
    reasons = ", ".join(criteria_of(int(seen.found[muting[0]])))
    return [f"vote {muting[0] + 1} of {len(ts)} in the order of time shows {reasons} over the last 500"]
