"""Outputs become a vote: an action and a confidence in 0..1.

Every row is computed by itself with the scalar functions of `math`: vectorised exponentials may give
other bits at the end of an array than in its middle, and a vote must not depend on its neighbours.
A row that is not finite is an abstention with confidence 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.agent import Head, Outputs
from streams.messages import Action

CLASSES = 3
"""Outputs of a classifier: logits of SELL, HOLD, BUY in this order."""

Vote = tuple[Action, float]


@dataclass(frozen=True)
class ClassHead:
    """Three logits: the largest is chosen (the first of equals), its softmax is the confidence."""

    def decide(self, outputs: Outputs) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
        """`[B, 3]` to actions `[B]` and confidences `[B]`."""
        return _columns([_classify(row) for row in outputs.tolist()])


@dataclass(frozen=True)
class ReturnHead:
    """An expected return, or a path of them judged by its last step r.

    BUY above `threshold`, SELL below its negative, else HOLD. z = 2 Phi(|r|/s) - 1 = erf(|r|/(s sqrt 2))
    with s of `residual_std`; the confidence is z for BUY and SELL, 1 - z for HOLD. Both are fractions of
    the price (0.001 is 0.1 %).
    """

    threshold: float
    residual_std: float

    def decide(self, outputs: Outputs) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
        """`[B, 1]` or `[B, 12]` to actions `[B]` and confidences `[B]`."""
        return _columns([self._judge(row) for row in outputs.tolist()])

    def _judge(self, path: Sequence[float]) -> Vote:
        r = path[-1]
        if not all(map(math.isfinite, path)):
            return Action.ABSTAIN, 0.0
        z = math.erf(abs(r) / (self.residual_std * math.sqrt(2.0)))
        if r > self.threshold:
            return Action.BUY, z
        return (Action.SELL, z) if r < -self.threshold else (Action.HOLD, 1.0 - z)


def head_for(outputs: int, threshold: float, residual_std: float) -> Head:
    """The head for a model of so many outputs: 3 are classes, 1 and 12 are returns."""
    return ClassHead() if outputs == CLASSES else ReturnHead(threshold, residual_std)


def _classify(logits: Sequence[float]) -> Vote:
    if not all(map(math.isfinite, logits)):
        return Action.ABSTAIN, 0.0
    top = max(logits)
    return Action(logits.index(top)), 1.0 / math.fsum(math.exp(value - top) for value in logits)


def _columns(votes: Sequence[Vote]) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    actions = np.array([action for action, _ in votes], dtype=np.int8)
    return actions, np.array([confidence for _, confidence in votes], dtype=np.float64)
