"""PatchTST: the shapes of the field, against attention written out in plain numpy."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from agents import patchtst
from agents.agent import Refused
from streams.messages import Reason
from tests.agents import builders

erf = np.vectorize(math.erf)


def build(state, metadata=None):
    return patchtst.build(patchtst.parse(builders.saved(state), ".pth"), metadata or {})


def refusal(state, metadata=None):
    with pytest.raises(Refused) as caught:
        build(state, metadata)
    return caught.value.refusal


def rows(n, *shape, seed=0):
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(w, name, tokens, heads):
    """Scaled dot products of one sequence `[P, D]`, head by head, token by token."""
    d = tokens.shape[1]
    q, k, v = np.split(tokens @ w[f"{name}.in_proj_weight"].T + w[f"{name}.in_proj_bias"], 3, axis=1)
    out = np.zeros_like(tokens)
    for h in range(heads):
        part = slice(h * d // heads, (h + 1) * d // heads)
        for i in range(len(tokens)):
            weights = np.exp(k[:, part] @ q[i, part] / math.sqrt(d // heads))
            out[i, part] = weights @ v[:, part] / weights.sum()
    return linear(w, f"{name}.out_proj", out)


def encode(w, name, tokens, heads, activation):
    for n in range(len({key.split(".")[2] for key in w if key.startswith(f"{name}.layers")})):
        layer = f"{name}.layers.{n}"
        tokens = norm(w, f"{layer}.norm1", tokens + attention(w, f"{layer}.self_attn", tokens, heads))
        fed = linear(w, f"{layer}.linear2", activation(linear(w, f"{layer}.linear1", tokens)))
        tokens = norm(w, f"{layer}.norm2", tokens + fed)
    return tokens


def double(state):
    return {key: value.double().numpy() for key, value in state.items()}


def forward(state, x, heads=4, patch=16, stride=8):
    """One row after the other, one patch after the other."""
    w, out = double(state), []
    positions = w["pos_encoding"].reshape(-1, w["pos_encoding"].shape[-1])
    for row in x.astype(np.float64):
        starts = range(0, len(row) - patch + 1, stride)
        tokens = np.array([linear(w, "patch_embedding", row[s : s + patch].ravel()) for s in starts])
        tokens = encode(w, "transformer", tokens + positions[: len(tokens)], heads, lambda h: np.maximum(h, 0.0))
        out.append(linear(w, "output_proj", tokens.mean(0)))
    return np.array(out)


def forward_token(state, x):
    w = double(state)

    def gelu(h):
        return h * 0.5 * (1.0 + erf(h / math.sqrt(2.0)))

    encoded = [encode(w, "encoder", linear(w, "input_proj", row)[None], 4, gelu)[0] for row in x.astype(np.float64)]
    return linear(w, "head.1", norm(w, "head.0", np.array(encoded)))


@pytest.fixture(scope="module")
def full():
    """49 features, 3 layers, 4 heads, 12 outputs."""
    return builders.patchtst_state()


@pytest.fixture(scope="module")
def token():
    """v3: 23 features, one token, 2 layers, 3 classes."""
    return builders.token_state()


def test_the_full_shape_is_recognised_from_its_tensors_alone(full):
    built = build(full)
    assert (built.window, built.width, built.outputs) == (64, 49, 12)
    assert built.parameters == 709_644  # the figure of the field


def test_the_full_shape_computes_what_plain_numpy_computes(full):
    x = rows(5, 64, 49)
    np.testing.assert_allclose(build(full).network(x), forward(full, x), rtol=0, atol=2e-5)


def test_the_v2_shape_is_the_same_over_8_features():
    state, x = builders.patchtst_state(features=8), rows(5, 64, 8)
    built = build(state)
    assert (built.window, built.width, built.outputs) == (64, 8, 12)
    np.testing.assert_allclose(built.network(x), forward(state, x), rtol=0, atol=2e-5)


def test_the_v3_shape_is_recognised_and_computes_what_plain_numpy_computes(token):
    x = rows(9, 23)
    built = build(token)
    assert (built.window, built.width, built.outputs) == (1, 23, 3)
    assert built.parameters == 268_675  # the figure of the field
    np.testing.assert_allclose(built.network(x), forward_token(token, x), rtol=0, atol=2e-5)


def test_the_v3_shape_without_batch_first_lets_rows_attend_to_each_other_and_ours_does_not(token):
    """Fed as it was trained, (n, 1, d) without batch_first, a row's output moves with its neighbours."""
    layer = nn.TransformerEncoderLayer(128, 4, 256, 0.0, "gelu", batch_first=False)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in token.items() if k.startswith("encoder.")})
    encoder.eval()
    x = rows(8, 23)
    tokens = (torch.from_numpy(x) @ token["input_proj.weight"].T + token["input_proj.bias"]).unsqueeze(1)
    with torch.no_grad():
        assert (encoder(tokens)[0] - encoder(tokens[:1])[0]).abs().max() > 0.01
    network = build(token).network
    changed = x.copy()
    changed[1:] = rows(7, 23, seed=9)
    assert network(changed)[0].tobytes() == network(x)[0].tobytes() == network(x[:1])[0].tobytes()


def test_a_leading_axis_of_pos_encoding_changes_nothing():
    x = rows(3, 64, 8)
    plain, leading = builders.patchtst_state(8), builders.patchtst_state(8, leading=True)
    np.testing.assert_array_equal(plain["pos_encoding"], leading["pos_encoding"][0])
    assert build(plain).network(x).tobytes() == build(leading).network(x).tobytes()
    assert build(plain).parameters == build(leading).parameters


def test_a_checkpoint_with_its_state_dict_inside_gives_the_same_bits(token):
    x = rows(5, 23)
    assert build({"model_state_dict": token, "n_heads": 4}).network(x).tobytes() == build(token).network(x).tobytes()


@pytest.mark.parametrize(
    ("metadata", "features", "shape", "options"),
    [
        ({"n_heads": 8}, 8, (64, 8), {"heads": 8}),
        ({"num_heads": 1}, 8, (64, 8), {"heads": 1}),
        ({"window": 32}, 8, (32, 8), {}),
        ({"stride": 4}, 8, (64, 8), {"stride": 4}),
        ({"patch": 8}, 8, (64, 16), {"patch": 8}),
        ({"num_features": 16}, 8, (64, 16), {"patch": 8}),
        ({"hidden_dim": 999, "n_layers": 9}, 8, (64, 8), {}),
    ],
)
def test_metadata_decide_what_the_tensors_cannot(metadata, features, shape, options):
    state, x = builders.patchtst_state(features, 32, 64, 2, 3), rows(3, *shape)
    built = build(state, metadata)
    assert (built.window, built.width) == shape
    np.testing.assert_allclose(built.network(x), forward(state, x, **options), rtol=0, atol=2e-5)


def test_metadata_inside_the_checkpoint_count_as_well():
    state = builders.patchtst_state(8, 32, 64, 2, 3)
    built = build({"model_state_dict": state, "config": {"n_heads": 8, "window": 32}})
    assert (built.window, built.facts["heads"]) == (32, 8)


@pytest.mark.parametrize(
    "metadata",
    [
        {"n_heads": 5},
        {"n_heads": "four"},
        {"n_heads": 4, "heads": 8},
        {"window": 15},
        {"window": 2000},
        {"num_features": 23},
        {"patch": 16, "num_features": 23},
        {"patch": 17},
        {"stride": -1},
    ],
)
def test_metadata_that_contradict_the_tensors_are_refused(metadata):
    state = builders.patchtst_state(8, 32, 64, 1, 3)
    assert refusal(state, metadata).reason is Reason.STATE_DICT_MISMATCH


def test_the_v3_shape_is_decided_by_its_tensors_whatever_the_metadata_say(token):
    built = build(token, {"num_features": 49, "window": 64, "n_heads": 5, "hidden_dim": 64, "n_layers": 3})
    assert (built.window, built.width, built.outputs) == (1, 23, 3)


@pytest.mark.parametrize("metadata", [{}, {"num_features": 49}, {"num_features": 8, "patch": 2}])
def test_a_patch_embedding_of_16_inputs_is_another_architecture(metadata):
    found = refusal(builders.patchtst_state(features=1, d_model=32, feed_forward=64, layers=1), metadata)
    assert found.reason is Reason.UNKNOWN_ARCHITECTURE
    assert "patch_embedding.weight of 16 inputs" in found.detail


@pytest.mark.parametrize("key", ["embedding.weight", "transformer.norm.weight", "encoder.norm.weight", "head.2.weight"])
@pytest.mark.parametrize("make", [dict, builders.patchtst_state, builders.token_state])
def test_unknown_keys_are_refused_and_named(key, make):
    found = refusal(make() | {key: torch.zeros(3)})
    assert found.reason is Reason.UNKNOWN_ARCHITECTURE
    assert key in found.detail


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (builders.patchtst_state, "transformer.layers.1.norm2.bias", None),
        (builders.patchtst_state, "pos_encoding", None),
        (builders.patchtst_state, "pos_encoding", torch.zeros(100, 64)),
        (builders.patchtst_state, "pos_encoding", torch.zeros(2, 100, 128)),
        (builders.patchtst_state, "pos_encoding", torch.zeros(6, 128)),
        (builders.patchtst_state, "output_proj.weight", None),
        (builders.patchtst_state, "transformer.layers.2.linear1.weight", torch.zeros(256, 128)),
        (builders.token_state, "head.0.weight", torch.zeros(64)),
        (builders.token_state, "head.1.bias", None),
        (builders.token_state, "encoder.layers.0.self_attn.in_proj_weight", torch.zeros(128, 128)),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_and_named(make, key, value):
    state = make()
    state.pop(key)
    found = refusal(state if value is None else state | {key: value})
    assert found.reason is Reason.STATE_DICT_MISMATCH
    assert key in found.detail


def test_layers_numbered_with_a_gap_are_refused():
    state = {k: v for k, v in builders.patchtst_state(8, 32, 64, 3, 3).items() if ".layers.1." not in k}
    assert refusal(state).reason is Reason.STATE_DICT_MISMATCH


def test_no_layers_at_all_are_refused():
    state = {k: v for k, v in builders.patchtst_state(8, 32, 64, 1, 3).items() if ".layers." not in k}
    assert refusal(state).reason is Reason.STATE_DICT_MISMATCH


def test_the_modules_that_training_uses_have_exactly_the_keys_of_the_field(full, token):
    module = patchtst.PatchTST(features=49, d_model=128, heads=4, layers=3, feed_forward=512, outputs=12)
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in full.items()}
    single = patchtst.TokenPatchTST(features=23)
    assert {k: v.shape for k, v in single.state_dict().items()} == {k: v.shape for k, v in token.items()}


def test_a_trained_module_is_served_with_its_dropout_off():
    torch.manual_seed(3)
    module, x = patchtst.PatchTST(8, 32, 4, 2, 64, 12, dropout=0.5), rows(6, 64, 8)
    served = build(module.state_dict()).network(x)
    with torch.no_grad():
        assert not np.allclose(module.train()(torch.from_numpy(x)).numpy(), served, atol=1e-3)
        np.testing.assert_allclose(module.eval()(torch.from_numpy(x)).numpy(), served, rtol=0, atol=1e-6)


def test_a_row_of_the_full_shape_has_the_same_bits_in_every_batch_up_to_256(full):
    network, x = build(full).network, rows(256, 64, 49)
    together = network(x)
    for n in range(1, 257):
        assert network(x[256 - n :]).tobytes() == together[256 - n :].tobytes(), n


def test_a_row_of_the_v3_shape_has_the_same_bits_in_every_batch_up_to_256(token):
    network, x = build(token).network, rows(256, 23)
    together = network(x)
    for n in range(1, 257):
        assert network(x[:n]).tobytes() == together[:n].tobytes(), n
        assert network(x[256 - n :]).tobytes() == together[256 - n :].tobytes(), n


def test_threads_side_by_side_get_the_same_bits(full):
    network, x = build(full).network, rows(64, 64, 49)
    expected = network(x).tobytes()
    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected for found in pool.map(lambda _: network(x).tobytes(), range(12)))
