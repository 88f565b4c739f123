"""Feature drift: how far what the models are fed has moved from what their scalers were fitted on.

For each feature the mean m and the deviation s of the last 2,000 ready vectors, exact, against the
scaler's m0 and s0:

    distance = sqrt(((m - m0) / s0)^2 + ln(s / s0)^2)

which is in fitted deviations: 1 is a mean one deviation away, or a spread e times as wide or as narrow.
It is a metric for a person, not part of the commit: after a restart it starts anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.agent import Model
from agents.scalers import ColumnScaler

WINDOW = 2_000
MINIMUM = 200
NARROWEST = 1e-3
"""Ratio of deviations below which a feature is as good as constant: the distance stays finite."""

_LOCATION_AND_SCALE = ("standard", "robust")
"""Kinds of scalers that tell a middle and a spread; min-max ones do not."""


@dataclass(frozen=True, slots=True)
class FeatureDrift:
    """One feature: `mean_shift` in fitted deviations, `deviation_ratio` live over fitted, and their `distance`."""

    feature: str
    distance: float
    mean_shift: float
    deviation_ratio: float


class DriftWatch:
    """The last ready vectors, whatever their symbol: scalers are fitted over all symbols too."""

    def __init__(self, *, window: int = WINDOW, minimum: int = MINIMUM) -> None:
        self._minimum = minimum
        self._names: tuple[str, ...] = ()
        self._ring = np.zeros((window, 0))
        self._count = 0

    def push(self, names: Sequence[str], rows: NDArray[np.float64]) -> None:
        """Take ready vectors `[R, F]` with columns `names`; other names than before start anew."""
        if tuple(names) != self._names:
            self._names = tuple(names)
            self._ring = np.full((len(self._ring), len(self._names)), np.nan)
            self._count = 0
        kept = rows[-len(self._ring) :]
        first = self._count + len(rows) - len(kept)
        self._ring[np.arange(first, first + len(kept)) % len(self._ring)] = kept
        self._count += len(rows)

    def against(self, models: Iterable[Model]) -> list[FeatureDrift]:
        """The features that the scalers of `models` know, worst first; of several scalers the farthest counts.

        Empty under 200 vectors.
        """
        if self._count < self._minimum:
            return []
        live = self._ring[: min(self._count, len(self._ring))]
        found: dict[str, FeatureDrift] = {}
        for model in models:
            for drift in self._one(model, live):
                known = found.get(drift.feature)
                if known is None or drift.distance > known.distance:
                    found[drift.feature] = drift
        return sorted(found.values(), key=lambda drift: (-drift.distance, drift.feature))

    def _one(self, model: Model, live: NDArray[np.float64]) -> list[FeatureDrift]:
        scaler = model.scaler
        if not isinstance(scaler, ColumnScaler) or scaler.kind not in _LOCATION_AND_SCALE:
            return []
        if scaler.mean is None or scaler.scale is None or not set(model.features) <= set(self._names):
            return []
        columns = live[:, [self._names.index(name) for name in model.features]]
        columns = columns[np.isfinite(columns).all(axis=1)]
        if len(columns) < self._minimum:
            return []
        shift = (columns.mean(axis=0) - scaler.mean) / scaler.scale
        ratio = columns.std(axis=0) / scaler.scale
        distance = np.hypot(shift, np.log(np.maximum(ratio, NARROWEST)))
        rows = zip(model.features, distance.tolist(), shift.tolist(), ratio.tolist(), strict=True)
        return [FeatureDrift(*row) for row in rows]
