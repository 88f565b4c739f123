"""The protocol of a model stage: rows in, outputs and votes out, no I/O and no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streams.messages import Reason

Outputs = NDArray[np.float64]
"""Raw outputs of a model before softmax or thresholds, `[B, K]`, K of 1, 3 or 12."""


SAVE_AGAIN = "copy the file again, or save it again where it was trained"
"""How every refusal of damaged bytes ends."""


class Scaler(Protocol):
    """Maps raw features to what the model was trained on, column by column."""

    def transform(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """`[..., C]` to `[..., C]`, row by row."""
        ...


class Head(Protocol):
    """Turns raw outputs into an action and a confidence."""

    def decide(self, outputs: Outputs) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
        """Actions `[B]` (codes of `streams.messages.Action`) and confidences `[B]` in 0..1."""
        ...


@dataclass(frozen=True)
class Model:
    """A loaded, matched and probed model. Immutable: a reload makes another one.

    `features` are the columns it reads, in its own order, all of `feature_set`; `window` is the
    number of ready vectors it needs, 1 for the tree models. A row's outputs are bit-equal whatever
    other rows share its batch. `sha256` is the model file's; `digest` covers its scaler and metadata too:
    two artifacts of one digest vote alike.
    """

    agent: str
    version: str
    file: Path
    sha256: str
    feature_set: str
    features: tuple[str, ...]
    contract: str
    window: int
    parameters: int
    outputs: int
    network: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    head: Head
    scaler: Scaler | None = None
    detail: str = ""
    architecture: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one row: `(C,)` or `(L, C)`."""
        width = len(self.features)
        return (width,) if self.window == 1 else (self.window, width)

    def predict(self, x: NDArray[np.float64]) -> Outputs:
        """Raw outputs `[B, K]` of raw features `[B, C]`, or `[B, L, C]` where `window` > 1.

        Scaled in float64, computed in float32. Not finite in, not finite out: the caller abstains.
        """
        scaled = x if self.scaler is None else self.scaler.transform(x)
        with np.errstate(over="ignore"):  # past float32 is infinite, which the caller abstains on
            narrow = np.ascontiguousarray(scaled, dtype=np.float32)
        return self.network(narrow).astype(np.float64)


@dataclass(frozen=True)
class Built:
    """A network read from a file, before it is matched to features, scaler and contract.

    `features` are the names found inside the model file, None where it has none; `window` is 1 for
    the tree models. `network` maps float32 `[B, C]` or `[B, L, C]` to float32 `[B, K]`.
    """

    architecture: str
    width: int
    window: int
    outputs: int
    parameters: int
    network: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    features: tuple[str, ...] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Family(Protocol):
    """A model family, one module each: `agents.xgb`, `agents.lgbm`, `agents.nhits`, `agents.patchtst`."""

    def parse(self, data: bytes, suffix: str) -> Any:
        """Read the bytes without executing anything; `suffix` is of `.pkl .pth .ubj .json .txt`.

        Raises `Refused` with `unsafe_artifact` or `corrupt_artifact`.
        """
        ...

    def build(self, parsed: Any, metadata: Mapping[str, Any]) -> Built:
        """Recognise the architecture from keys and shapes and make the network.

        Raises `Refused` with `unknown_architecture` or `state_dict_mismatch`.
        """
        ...


@dataclass(frozen=True)
class Refusal:
    """Why an artifact may not vote: a reason of the contract, what to do about it, and which file it was, if any."""

    reason: Reason
    detail: str
    file: str = ""


class Refused(Exception):
    """Raised by a check of an artifact; carries the `Refusal`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.refusal = Refusal(reason, detail)
