"""What a model computes, checked before it may vote: its golden vectors, then rows of noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.agent import Model, Outputs, Refused
from streams.messages import Reason

ROWS = 64
SEED = 20260101
CONSTANT_WITHIN = 1e-9
GOLDEN_WITHIN = 1e-4
"""Of the largest expected output. The math libraries of two machines sum thousands of float32 products
in other orders and differ by up to about 1e-6 of that; a wrong scaler, order of columns, activation or
number of heads moves outputs by a large part of it."""

OUTPUT_COUNTS = (1, 3, 12)
BLOCK = 8

Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Blocks:
    """A network computed 8 rows at a time, the last block padded: the way out where larger batches differ."""

    network: Network

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs `[B, K]` of the rows `x`."""
        padded = np.concatenate([x, np.zeros((-len(x) % BLOCK, *x.shape[1:]), dtype=np.float32)])
        parts = [self.network(padded[start : start + BLOCK]) for start in range(0, len(padded), BLOCK)]
        return np.concatenate(parts)[: len(x)] if parts else self.network(x)


def check_outputs(outputs: int) -> None:
    """Raises `Refused` unless the number of outputs is one that a head understands."""
    if outputs not in OUTPUT_COUNTS:
        raise Refused(
            Reason.UNKNOWN_ARCHITECTURE,
            f"expected 1, 3 or 12 outputs (a return, three classes, a path of returns), found {outputs}; train again",
        )


def check_golden(model: Model, metadata: Mapping[str, Any]) -> None:
    """Compare with the vectors that training wrote, if any. Raises `Refused` with `golden_mismatch`."""
    golden = metadata.get("golden")
    if golden is None:
        return
    inputs, expected = _golden_arrays(golden, model)
    with np.errstate(all="ignore"):  # what is not finite is a difference, not a warning
        difference = np.abs(model.predict(inputs) - expected)
        within = difference <= GOLDEN_WITHIN * np.abs(expected).max()
    if not within.all():
        raise _golden(
            f"expected the outputs of training within {GOLDEN_WITHIN} of the largest, {np.abs(expected).max():.3g}, "
            f"found a difference of {difference.max():.3g}: "
            "model, scaler and metadata are not of one training"
        )


def check_probe(model: Model, non_finite_weights: Sequence[str]) -> Model:
    """Compute 64 seeded standard-normal rows in scaled space; the model, its rows proved independent.

    Raises `Refused` with `non_finite_output` or `constant_output`, or with `unknown_architecture` where
    a row's outputs depend on the rows beside it.
    """
    rows = np.random.default_rng(SEED).standard_normal((ROWS, *model.input_shape)).astype(np.float32)
    together = model.network(rows)
    if non_finite_weights or not np.isfinite(together).all():
        found = (
            f"weights that are not finite ({', '.join(non_finite_weights[:4])})" if non_finite_weights else "NaN or inf"
        )
        raise Refused(
            Reason.NON_FINITE_OUTPUT, f"expected finite outputs on {ROWS} probe rows, found {found}; train again"
        )
    if np.ptp(together.astype(np.float64), axis=0).max() <= CONSTANT_WITHIN:
        raise Refused(
            Reason.CONSTANT_OUTPUT,
            f"expected outputs that depend on the input, found the same on all {ROWS} probe rows within "
            f"{CONSTANT_WITHIN}; check its scaler or train again",
        )
    return _independent(model, rows)


def _independent(model: Model, rows: NDArray[np.float32]) -> Model:
    if _same_alone(model.network, rows):
        return model
    blocks = Blocks(model.network)
    if _same_alone(blocks, rows):
        note = f"computed in blocks of {BLOCK} rows, because this machine's math library lets larger batches differ"
        return replace(model, network=blocks, detail="; ".join(filter(None, (model.detail, note))))
    raise Refused(
        Reason.UNKNOWN_ARCHITECTURE,
        "expected a row's outputs to be the same alone and among others, found them to differ even in fixed blocks; "
        "set one thread for the math library, or train again",
    )


def _same_alone(network: Network, rows: NDArray[np.float32]) -> bool:
    """Whether each row gives the same bits alone, among 64 and among 256, at another place in each."""
    alone = np.concatenate([network(row[np.newaxis]) for row in rows])
    many = network(np.concatenate([rows[::-1]] * 4))
    return _bits(network(rows)) == _bits(alone) and _bits(many) == _bits(np.concatenate([alone[::-1]] * 4))


def _bits(outputs: NDArray[np.float32]) -> bytes:
    return outputs.tobytes()


def _golden_arrays(golden: Any, model: Model) -> tuple[NDArray[np.float64], Outputs]:
    shape = f"inputs {['n', *model.input_shape]} and outputs ['n', {model.outputs}]"
    try:
        inputs = np.asarray(golden["inputs"], dtype=np.float64)
        outputs = np.asarray(golden["outputs"], dtype=np.float64)
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise _golden(f"expected golden vectors with {shape}, found something else ({error})") from error
    n = len(inputs) if inputs.ndim else 0
    if n == 0 or inputs.shape != (n, *model.input_shape) or outputs.shape != (n, model.outputs):
        raise _golden(f"expected golden vectors with {shape}, found {list(inputs.shape)} and {list(outputs.shape)}")
    return inputs, outputs


def _golden(detail: str) -> Refused:
    return Refused(Reason.GOLDEN_MISMATCH, f"{detail}; import or train again, all files from one training")
