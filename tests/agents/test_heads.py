"""Outputs to votes, against the textbook formulas of numpy and the standard library."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.heads import ClassHead, ReturnHead, head_for
from streams.messages import Action

finite = st.floats(-50, 50)


@given(st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=20))
def test_three_logits_are_sell_hold_buy_with_the_softmax_of_the_chosen(logits):
    outputs = np.array(logits)
    actions, confidences = ClassHead().decide(outputs)
    softmax = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(actions, outputs.argmax(axis=1))
    np.testing.assert_allclose(confidences, softmax.max(axis=1), rtol=1e-12)
    assert (actions.dtype, confidences.dtype) == (np.int8, np.float64)


@pytest.mark.parametrize(
    ("logits", "action"), [((2, 1, 0), Action.SELL), ((0, 2, 1), Action.HOLD), ((0, 1, 2), Action.BUY)]
)
def test_the_order_of_the_logits(logits, action):
    assert ClassHead().decide(np.array([logits], dtype=float))[0].tolist() == [action]


def test_huge_logits_do_not_overflow():
    actions, confidences = ClassHead().decide(np.array([[1e300, -1e300, 0.0], [-800.0, -801.0, -900.0]]))
    assert actions.tolist() == [Action.SELL, Action.SELL]
    np.testing.assert_allclose(confidences, [1.0, 1 / (1 + math.exp(-1))], rtol=1e-12)


@given(st.floats(-0.05, 0.05), st.floats(0, 0.02), st.floats(1e-4, 0.05))
def test_a_return_is_judged_against_the_threshold_with_the_normal_confidence(r, threshold, deviation):
    (action,), (confidence,) = ReturnHead(threshold, deviation).decide(np.array([[r]]))
    z = 2 * NormalDist().cdf(abs(r) / deviation) - 1
    expected = Action.BUY if r > threshold else Action.SELL if r < -threshold else Action.HOLD
    assert action == expected
    assert confidence == pytest.approx(1 - z if expected is Action.HOLD else z, abs=1e-12)


def test_the_threshold_itself_is_a_hold():
    head = ReturnHead(0.001, 0.002)
    assert head.decide(np.array([[0.001], [-0.001], [0.0]]))[0].tolist() == [Action.HOLD] * 3
    assert head.decide(np.array([[np.nextafter(0.001, 1)], [np.nextafter(-0.001, -1)]]))[0].tolist() == [2, 0]


def test_a_path_is_judged_by_its_last_step():
    path = np.zeros((1, 12))
    path[0, :11] = 0.5
    path[0, 11] = -0.01
    assert ReturnHead(0.001, 0.002).decide(path)[0].tolist() == [Action.SELL]


def test_a_row_that_is_not_finite_abstains_and_spoils_no_other():
    actions, confidences = ClassHead().decide(np.array([[0, 1, 2], [np.nan, 1, 2], [np.inf, 0, 0]], dtype=float))
    assert actions.tolist() == [Action.BUY, Action.ABSTAIN, Action.ABSTAIN]
    assert confidences[1:].tolist() == [0.0, 0.0]
    path = np.full((2, 12), 0.01)
    path[0, 3] = np.nan
    assert ReturnHead(0.001, 0.002).decide(path)[0].tolist() == [Action.ABSTAIN, Action.BUY]


@pytest.mark.parametrize("k", [1, 3, 12])
def test_a_vote_has_the_same_bits_alone_and_at_every_place_among_others(k):
    outputs = np.random.default_rng(0).normal(0, 0.01 if k != 3 else 3.0, (257, k))
    head = head_for(k, 0.001, 0.002)
    together = head.decide(outputs)
    for n in range(257):
        action, confidence = head.decide(outputs[n : n + 1])
        assert (action.tobytes(), confidence.tobytes()) == (together[0][n].tobytes(), together[1][n].tobytes())


def test_the_number_of_outputs_chooses_the_head():
    assert head_for(3, 0.1, 0.2) == ClassHead()
    assert head_for(1, 0.1, 0.2) == head_for(12, 0.1, 0.2) == ReturnHead(0.1, 0.2)


def test_no_rows_give_no_votes():
    assert [len(column) for column in ClassHead().decide(np.empty((0, 3)))] == [0, 0]
