"""N-HiTS: both shapes of the field, against a forward pass in plain numpy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import nhits
from agents.agent import Refused
from streams.messages import Reason
from tests.agents import builders


def build(state, metadata=None):
    return nhits.build(nhits.parse(builders.saved(state), ".pth"), metadata or {})


def refusal(state, metadata=None):
    with pytest.raises(Refused) as caught:
        build(state, metadata)
    return caught.value.refusal


def forward(state, x, last_relu):
    """Every block over the flattened window in float64; ReLU after its last layer only in the hidden shape."""
    w = {key: value.double().numpy() for key, value in state.items()}
    blocks = sorted({key.split(".")[1] for key in w if key.startswith("blocks")}, key=int)
    joined = []
    for block in blocks:
        places = sorted({int(key.split(".")[2]) for key in w if key.startswith(f"blocks.{block}.")})
        h = x.reshape(len(x), -1).astype(np.float64)
        for place in places:
            h = h @ w[f"blocks.{block}.{place}.weight"].T + w[f"blocks.{block}.{place}.bias"]
            h = np.where((h > 0) | (place == places[-1] and not last_relu), h, 0.0)
        joined.append(h)
    return np.hstack(joined) @ w["output_layer.weight"].T + w["output_layer.bias"]


def rows(n, *shape, seed=0):
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


@pytest.fixture(scope="module")
def full():
    """64 bars x 49 features, 512-512, 3 blocks, 12 outputs."""
    return builders.nhits_state()


def test_the_full_shape_is_recognised_from_its_tensors_alone(full):
    built = build(full)
    assert (built.window, built.width, built.outputs) == (64, 49, 12)
    assert built.parameters == 5_625_312  # the figure of the field


def test_the_full_shape_computes_what_plain_numpy_computes(full):
    x = rows(9, 64, 49)
    np.testing.assert_allclose(build(full).network(x), forward(full, x, last_relu=False), rtol=0, atol=1e-5)


def test_the_hidden_shape_computes_what_plain_numpy_computes():
    state, x = builders.hidden_nhits_state(), rows(9, 64, 49)
    built = build(state)
    assert (built.window, built.width, built.outputs) == (64, 49, 12)
    assert built.parameters == 3 * (3136 * 512 + 512 + 512 * 256 + 256) + (256 * 3 + 1) * 12
    np.testing.assert_allclose(built.network(x), forward(state, x, last_relu=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("hidden", [(16,), (16, 24), (16, 24, 8)])
@pytest.mark.parametrize(("joined", "outputs"), [(12, 12), (5, 3), (1, 1)])
def test_any_depth_and_any_width_of_the_joint_are_inferred(hidden, joined, outputs):
    state, x = builders.nhits_state(64 * 8, hidden, 2, outputs, joined), rows(3, 64, 8)
    np.testing.assert_allclose(build(state).network(x), forward(state, x, last_relu=False), rtol=0, atol=1e-5)


def test_a_checkpoint_with_its_state_dict_inside_gives_the_same_bits():
    state, x = builders.nhits_state(64 * 8, (16, 16), 2, 12), rows(5, 64, 8)
    inside = {"model_state_dict": state, "epoch": 3, "config": {"num_features": 8}, "features": list("abcdefgh")}
    built = build(inside)
    assert built.network(x).tobytes() == build(state).network(x).tobytes()
    assert built.features == tuple("abcdefgh")


def test_doubles_are_computed_in_float32():
    state, x = builders.nhits_state(64 * 8, (16, 16), 2, 12), rows(5, 64, 8)
    doubles = {key: value.double() for key, value in state.items()}
    assert build(doubles).network(x).tobytes() == build(state).network(x).tobytes()


@pytest.mark.parametrize(
    ("metadata", "window", "width"),
    [
        ({}, 64, 8),
        ({"window": 32}, 32, 16),
        ({"num_features": 16}, 32, 16),
        ({"input_dim": 16}, 32, 16),
        ({"input_dim": 512}, 64, 8),
        ({"features": [f"n{i}" for i in range(16)]}, 32, 16),
        ({"window": 16, "num_features": 32}, 16, 32),
        ({"features": ["one", "two", "three"]}, 64, 8),
        ({"hidden_dim": 99, "n_layers": 7, "model_type": "other"}, 64, 8),
    ],
)
def test_metadata_decide_only_what_the_tensors_cannot(metadata, window, width):
    built = build(builders.nhits_state(512, (16, 16), 2, 12), metadata)
    assert (built.window, built.width) == (window, width)


@pytest.mark.parametrize(
    "metadata",
    [
        {"window": 63},
        {"num_features": 23},
        {"window": 64, "num_features": 23},
        {"window": 32, "num_features": 8},
        {"window": "64"},
        {"window": True},
        {"window": 0},
        {"window": 64, "seq_len": 32},
    ],
)
def test_metadata_that_contradict_the_tensors_are_refused(metadata):
    assert refusal(builders.nhits_state(512, (16, 16), 2, 12), metadata).reason is Reason.STATE_DICT_MISMATCH


def test_inputs_that_are_no_whole_number_of_bars_are_refused():
    found = refusal(builders.nhits_state(64 * 8 + 1, (16, 16), 2, 12))
    assert found.reason is Reason.STATE_DICT_MISMATCH
    assert "513" in found.detail
    assert "num_features" in found.detail


@pytest.mark.parametrize(
    "key",
    ["blocks.0.linear1.weight", "stacks.0.blocks.0.weight", "embedding.weight", "module.output_layer.bias", "extra"],
)
@pytest.mark.parametrize("alone", [True, False])
def test_unknown_keys_are_refused_and_named(key, alone):
    state = {} if alone else builders.nhits_state(64, (8, 8), 1, 3)
    found = refusal(state | {key: torch.zeros(3)})
    assert found.reason is Reason.UNKNOWN_ARCHITECTURE
    assert key in found.detail


@pytest.mark.parametrize("places", [[0], [0, 1], [0, 2, 4], [0, 3, 5], [1, 4, 7], []])
def test_other_numbers_of_layers_are_another_architecture(places):
    state = {"output_layer.weight": torch.zeros(3, 8), "output_layer.bias": torch.zeros(3)}
    for place in places:
        state |= {f"blocks.0.{place}.weight": torch.zeros(8, 8), f"blocks.0.{place}.bias": torch.zeros(8)}
    assert refusal(state).reason is Reason.UNKNOWN_ARCHITECTURE


def broken(change):
    state = builders.nhits_state(512, (16, 16), 3, 12)
    change(state)
    return refusal(state)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("blocks.1.3.bias"), "blocks.1.3.bias"),
        (lambda s: s.pop("output_layer.weight"), "output_layer.weight"),
        (lambda s: s.update({"blocks.2.0.weight": torch.zeros(16, 511)}), "blocks.2.0.weight"),
        (lambda s: s.update({"blocks.0.3.weight": torch.zeros(16, 15)}), "blocks.0.3.weight"),
        (lambda s: s.update({"output_layer.weight": torch.zeros(12, 35)}), "output_layer.weight"),
        (lambda s: s.update({"output_layer.weight": torch.zeros(12)}), "output_layer.weight"),
        (lambda s: s.update({"blocks.0.0.weight": torch.zeros(16, 0)}), "blocks.0.0.weight"),
        (lambda s: s.update({"blocks.0.0.weight": torch.zeros(16, 512, dtype=torch.int64)}), "blocks.0.0.weight"),
        (lambda s: s.update({"blocks.0.0.weight": "text"}), "blocks.0.0.weight"),
        (lambda s: [s.pop(key) for key in list(s) if key.startswith("blocks.1.")], "numbered"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_and_named(change, named):
    found = broken(change)
    assert found.reason is Reason.STATE_DICT_MISMATCH
    assert named in found.detail


def test_the_module_that_training_uses_has_exactly_the_keys_of_the_field(full):
    module = nhits.NHiTS(window=64, features=49, hidden=(512, 512), blocks=3, outputs=12, dropout=0.1)
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in full.items()}


def test_a_trained_module_is_served_with_its_dropout_off():
    torch.manual_seed(3)
    module, x = nhits.NHiTS(64, 8, (16, 16), 2, 12, dropout=0.5), rows(6, 64, 8)
    served = build(module.state_dict()).network(x)
    with torch.no_grad():
        assert not np.allclose(module.train()(torch.from_numpy(x)).numpy(), served, atol=1e-3)
        np.testing.assert_allclose(module.eval()(torch.from_numpy(x)).numpy(), served, rtol=0, atol=1e-6)


def test_a_row_has_the_same_bits_in_every_batch_up_to_256(full):
    network, x = build(full).network, rows(256, 64, 49)
    together = network(x)
    for n in range(1, 257):
        assert network(x[256 - n :]).tobytes() == together[256 - n :].tobytes(), n


def test_the_hidden_shape_has_the_same_bits_alone_and_together():
    network, x = build(builders.hidden_nhits_state()).network, rows(256, 64, 49)
    together = network(x)
    for n in (1, 2, 7, 8, 9, 63, 64, 65, 200):
        assert network(x[:n]).tobytes() == together[:n].tobytes(), n


def test_more_rows_than_the_largest_batch_have_the_same_bits():
    network, x = build(builders.nhits_state(512, (16, 16), 2, 12)).network, rows(700, 64, 8)
    assert network(x).tobytes() == b"".join(network(x[n : n + 1]).tobytes() for n in range(700))


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(20)), st.integers(1, 20))
def test_a_row_has_the_same_bits_at_any_place_among_any_others(order, n):
    network, x = build(builders.nhits_state(512, (16, 16), 2, 12)).network, rows(20, 64, 8)
    chosen = list(order)[:n]
    assert network(x[chosen]).tobytes() == network(x)[chosen].tobytes()


def test_threads_side_by_side_get_the_same_bits(full):
    network, x = build(full).network, rows(64, 64, 49)
    expected = network(x).tobytes()
    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected for found in pool.map(lambda _: network(x).tobytes(), range(12)))


def test_a_row_that_is_not_finite_spoils_no_other_and_is_not_changed():
    network, x = build(builders.nhits_state(512, (16, 16), 2, 12)).network, rows(8, 64, 8)
    spoilt = x.copy()
    spoilt[3, 2, 1] = np.nan
    before = spoilt.copy()
    found = network(spoilt)
    assert np.isnan(found[3]).all()
    assert np.delete(found, 3, 0).tobytes() == np.delete(network(x), 3, 0).tobytes()
    np.testing.assert_array_equal(spoilt, before)


def test_no_rows_give_no_outputs_and_read_only_rows_are_read():
    network, x = build(builders.nhits_state(512, (16, 16), 2, 12)).network, rows(3, 64, 8)
    assert network(x[:0]).shape == (0, 12)
    x.flags.writeable = False
    assert network(x).shape == (3, 12)


def test_loading_draws_no_random_numbers(full):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    build(full)
    assert torch.rand(1) == expected
