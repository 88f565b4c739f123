"""Every check of a load, its reason, and the order of the checks: the first that fails is the reason."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from agents import nhits, probe, scalers
from agents.agent import Model, Refused
from agents.artifacts import LoadOptions, load
from agents.heads import ReturnHead
from agents.sidecars import DEFAULT_RESIDUAL_STD, DEFAULT_THRESHOLD
from streams.contracts import V2, V3, V6
from streams.messages import Reason
from tests.agents import builders
from tests.agents.builders import Parts

PLAIN = LoadOptions()


def refusal(parts: Parts, models, options=PLAIN):
    with pytest.raises(Refused) as caught:
        load(parts.write(models), options)
    found = caught.value.refusal
    assert len(found.detail) > 20
    return found


def golden(parts: Parts, n=3):
    """Golden vectors of unchanged parts, by numpy: scaled, then block by block."""
    import json

    inputs = np.random.default_rng(2).normal(1.0, 2.0, (n, 4, 8))
    told = json.loads(parts.scaler)
    scaled = (inputs - np.array(told["mean"])) / np.array(told["scale"])
    w = {key: value.double().numpy() for key, value in parts.state.items()}
    joined = []
    for block in range(2):
        h = scaled.reshape(n, -1)
        for place in (0, 3, 6):
            h = h @ w[f"blocks.{block}.{place}.weight"].T + w[f"blocks.{block}.{place}.bias"]
            h = h if place == 6 else np.maximum(h, 0)
        joined.append(h)
    outputs = np.hstack(joined) @ w["output_layer.weight"].T + w["output_layer.bias"]
    return {"inputs": inputs.tolist(), "outputs": outputs.tolist()}


def cut_model(parts):
    parts.model_bytes = builders.saved(parts.state)[:-100]


def hostile_scaler(parts):
    parts.scaler, parts.scaler_ending = builders.dumped(builders.Hostile("/nonexistent/trace")), "_scaler.pkl"


def foreign_key(parts):
    parts.state["embedding.weight"] = torch.zeros(2)


def foreign_name(parts):
    parts.metadata["features"] = ["close", "high", "low", "volume", "volatility", "rsi", "macd", "moonphase"]


def narrow_scaler(parts):
    parts.scaler = builders.json_scaler(7)


def other_contract(parts):
    parts.metadata["contract"] = V3.contract


def other_golden(parts):
    vectors = golden(Parts())
    vectors["outputs"][0][0] += 0.01
    parts.metadata["golden"] = vectors


def nan_weight(parts):
    parts.state["output_layer.weight"][0, 0] = float("nan")


IN_ORDER = [
    (cut_model, Reason.CORRUPT_ARTIFACT),
    (hostile_scaler, Reason.UNSAFE_ARTIFACT),
    (foreign_key, Reason.UNKNOWN_ARCHITECTURE),
    (foreign_name, Reason.FEATURE_MISMATCH),
    (narrow_scaler, Reason.SCALER_MISMATCH),
    (other_contract, Reason.CONTRACT_MISMATCH),
    (other_golden, Reason.GOLDEN_MISMATCH),
    (nan_weight, Reason.NON_FINITE_OUTPUT),
]


def test_the_unchanged_parts_load(tmp_path):
    parts = Parts()
    parts.metadata["golden"] = golden(parts)
    model = load(parts.write(tmp_path), PLAIN)
    assert (model.feature_set, model.features, model.contract) == ("v2", V2.features, V2.contract)
    assert (model.version, model.window, model.outputs, model.input_shape) == ("v20260101_120000", 4, 12, (4, 8))
    assert model.parameters == sum(value.numel() for value in parts.state.values())


@pytest.mark.parametrize(("fault", "reason"), IN_ORDER)
def test_each_fault_alone_has_its_reason(tmp_path, fault, reason):
    parts = Parts()
    fault(parts)
    assert refusal(parts, tmp_path).reason is reason


PAIRS = [
    (first, second)
    for first, second in itertools.combinations(IN_ORDER, 2)
    if (first[0], second[0]) != (hostile_scaler, narrow_scaler)  # one scaler cannot be both
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_of_two_faults_the_earlier_check_gives_the_reason(tmp_path, first, second):
    parts = Parts()
    second[0](parts)
    first[0](parts)
    assert refusal(parts, tmp_path).reason is first[1]


def test_an_artifact_without_a_scaler_is_refused_unless_that_is_allowed_for_its_agent(tmp_path):
    parts = Parts(scaler=None)
    found = refusal(parts, tmp_path)
    assert found.reason is Reason.SCALER_MISSING
    assert "nhits_v20260101_120000_scaler" in found.detail
    assert refusal(parts, tmp_path, LoadOptions(allow_unscaled=frozenset({"xgboost"}))).reason is Reason.SCALER_MISSING
    model = load(parts.write(tmp_path), LoadOptions(allow_unscaled=frozenset({"nhits"})))
    assert model.scaler is None
    assert "allow_unscaled" in model.detail


@pytest.mark.parametrize(
    ("scaler", "served"),
    [
        (builders.json_scaler(8, V2.features), True),
        (builders.json_scaler(8, V2.features[::-1]), False),
        (builders.json_scaler(8), False),
        (builders.json_scaler(23, V3.features), False),
    ],
)
def test_the_generic_scaler_serves_only_where_it_names_the_same_features(tmp_path, scaler, served):
    (tmp_path / "nhits_scaler.json").write_bytes(scaler)
    if not served:
        assert refusal(Parts(scaler=None), tmp_path).reason is Reason.SCALER_MISSING
        return
    model = load(Parts(scaler=None).write(tmp_path), PLAIN)
    assert model.scaler is not None
    assert "nhits_scaler.json" in model.detail


def test_the_scaler_of_its_own_comes_before_the_generic_one(tmp_path):
    (tmp_path / "nhits_scaler.pkl").write_bytes(builders.dumped(builders.legacy_scaler(V2.features)))
    model = load(Parts().write(tmp_path), PLAIN)
    assert model.scaler.mean.tolist() == scalers.parse(Parts().scaler, ".json").mean.tolist()
    assert "generic" not in model.detail


def test_a_legacy_pickled_scaler_gives_its_names_and_its_numbers(tmp_path):
    fitted = builders.legacy_scaler(V2.features[::-1])
    parts = Parts(scaler=builders.dumped(fitted), scaler_ending="_scaler.pkl", metadata={"window": 4})
    model = load(parts.write(tmp_path), PLAIN)
    assert model.features == V2.features[::-1]
    rows = np.random.default_rng(1).normal(size=(5, 8))
    assert model.scaler.transform(rows).tobytes() == ((rows - fitted.mean_) / fitted.scale_).tobytes()


@pytest.mark.parametrize(
    ("scaler", "metadata", "reason"),
    [
        (builders.json_scaler(8, V2.features[::-1]), {"features": list(V2.features)}, Reason.SCALER_MISMATCH),
        (builders.json_scaler(23, V3.features), {}, Reason.SCALER_MISMATCH),
        (builders.json_scaler(8, list("abcdefgh")), {}, Reason.FEATURE_MISMATCH),
        (builders.json_scaler(8), {"features": list(V2.features[:7])}, Reason.FEATURE_MISMATCH),
        (builders.json_scaler(8), {"features": [*V2.features[:7], "close"]}, Reason.FEATURE_MISMATCH),
        (builders.json_scaler(8), {"features": list(V3.features[:8])}, Reason.FEATURE_MISMATCH),
        (builders.json_scaler(8), {"features": list(V2.features), "feature_names": ["x"]}, Reason.FEATURE_MISMATCH),
        (builders.json_scaler(8), {"features": [1, 2, 3, 4, 5, 6, 7, 8]}, Reason.FEATURE_MISMATCH),
        (builders.json_scaler(8), {"features": list(V2.features), "feature_set": "v3"}, Reason.FEATURE_MISMATCH),
        (builders.json_scaler(8), {"features": list(V2.features), "feature_set": "v9"}, Reason.FEATURE_MISMATCH),
        (builders.json_scaler(8), {"contract": "0" * 64}, Reason.CONTRACT_MISMATCH),
        (builders.json_scaler(8), {"contract": 5}, Reason.CONTRACT_MISMATCH),
        (builders.json_scaler(8), {"threshold": -0.1}, Reason.CORRUPT_ARTIFACT),
        (builders.json_scaler(8), {"threshold": "high"}, Reason.CORRUPT_ARTIFACT),
        (builders.json_scaler(8), {"residual_std": 0}, Reason.CORRUPT_ARTIFACT),
        (builders.json_scaler(8), {"residual_std": True}, Reason.CORRUPT_ARTIFACT),
        (b"not json", {}, Reason.CORRUPT_ARTIFACT),
    ],
)
def test_what_model_scaler_and_metadata_say_must_agree(tmp_path, scaler, metadata, reason):
    assert refusal(Parts(scaler=scaler, metadata={"window": 4, **metadata}), tmp_path).reason is reason


def test_names_in_the_checkpoint_that_differ_from_the_metadata_are_a_feature_mismatch(tmp_path):
    parts = Parts(metadata={"window": 4, "features": list(V2.features)}, scaler=builders.json_scaler(8))
    parts.model_bytes = builders.saved({"model_state_dict": parts.state, "features": list(V2.features[::-1])})
    assert refusal(parts, tmp_path).reason is Reason.FEATURE_MISMATCH


def test_metadata_inside_the_checkpoint_are_checked_as_those_beside_it(tmp_path):
    parts = Parts(metadata=None)
    inside = {"model_state_dict": parts.state, "window": 4, "contract": V3.contract}
    assert refusal(replace(parts, model_bytes=builders.saved(inside)), tmp_path).reason is Reason.CONTRACT_MISMATCH
    inside["contract"] = V2.contract
    assert load(replace(parts, model_bytes=builders.saved(inside)).write(tmp_path), PLAIN).contract == V2.contract
    inside["threshold"] = float("nan")
    assert refusal(replace(parts, model_bytes=builders.saved(inside)), tmp_path).reason is Reason.CORRUPT_ARTIFACT


@pytest.mark.parametrize(("feature_set", "width"), [(V2, 8), (V3, 23), (V6, 49)])
def test_without_names_a_width_of_8_23_or_49_tells_the_set_and_the_detail_says_so(tmp_path, feature_set, width):
    state = builders.nhits_state(64 * width, (8, 8), 2, 3)
    model = load(Parts(state, None, builders.json_scaler(width)).write(tmp_path), PLAIN)
    assert (model.feature_set, model.features, model.contract) == (feature_set.name, feature_set.features, "names-only")
    assert f"by the width {width}" in model.detail
    assert "names-only" in model.detail


@pytest.mark.parametrize("width", [7, 22, 24, 48])
def test_without_names_any_other_width_is_a_feature_mismatch(tmp_path, width):
    state = builders.nhits_state(64 * width, (8, 8), 2, 3)
    assert refusal(Parts(state, None, builders.json_scaler(width)), tmp_path).reason is Reason.FEATURE_MISMATCH


@pytest.mark.parametrize("outputs", [2, 4, 11, 13])
def test_other_numbers_of_outputs_are_an_unknown_architecture(tmp_path, outputs):
    found = refusal(Parts(builders.nhits_state(32, (8, 8), 2, outputs)), tmp_path)
    assert found.reason is Reason.UNKNOWN_ARCHITECTURE
    assert str(outputs) in found.detail


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", "", '{"a": NaN}'])
def test_metadata_that_are_no_json_object_are_refused(tmp_path, content):
    candidate = Parts(metadata=None).write(tmp_path)
    candidate.beside("_metadata.json").write_text(content)
    with pytest.raises(Refused) as caught:
        load(candidate, PLAIN)
    assert caught.value.refusal.reason is Reason.CORRUPT_ARTIFACT


def test_metadata_that_cannot_be_read_come_before_the_architecture(tmp_path):
    parts = Parts(metadata={"window": 4, "threshold": "high"})
    foreign_key(parts)
    assert refusal(parts, tmp_path).reason is Reason.CORRUPT_ARTIFACT


@pytest.mark.parametrize("ending", ["_meta.json", "_metadata.json"])
def test_both_names_of_the_metadata_are_read(tmp_path, ending):
    assert load(Parts(metadata_ending=ending).write(tmp_path), PLAIN).contract == V2.contract


@pytest.mark.parametrize("ending", [".pth", "_scaler.json", "_meta.json"])
def test_symbolic_links_are_refused_for_every_file_of_an_artifact(tmp_path, ending):
    candidate = Parts().write(tmp_path)
    file = candidate.beside(ending)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused) as caught:
        load(candidate, PLAIN)
    assert caught.value.refusal.reason is Reason.UNSAFE_ARTIFACT


def test_a_model_above_the_limit_is_refused(tmp_path):
    size = len(builders.saved(Parts().state))
    assert load(Parts().write(tmp_path), LoadOptions(max_bytes=size)).outputs == 12
    assert refusal(Parts(), tmp_path, LoadOptions(max_bytes=size - 1)).reason is Reason.UNSAFE_ARTIFACT


def test_what_is_hashed_is_what_is_parsed_even_if_the_file_is_swapped_meanwhile(tmp_path, monkeypatch):
    """The real parser runs after the file was replaced; the model is still the one that was read and hashed."""
    import hashlib

    candidate = Parts().write(tmp_path)
    first = candidate.file.read_bytes()
    expected = load(candidate, PLAIN)
    real = nhits.parse

    def swap(data, suffix):
        candidate.file.write_bytes(builders.saved(builders.nhits_state(32, (16, 16), 2, 12, seed=99)))
        return real(data, suffix)

    monkeypatch.setattr(nhits, "parse", swap)
    model = load(candidate, PLAIN)
    x = np.random.default_rng(0).normal(size=(3, 4, 8))
    assert model.sha256 == hashlib.sha256(first).hexdigest()
    assert model.predict(x).tobytes() == expected.predict(x).tobytes()


def test_golden_vectors_are_compared_after_scaling(tmp_path):
    parts = Parts()
    parts.metadata["golden"] = golden(parts)
    load(parts.write(tmp_path), PLAIN)
    parts.scaler = builders.json_scaler(8, V2.features, seed=77)
    assert refusal(parts, tmp_path).reason is Reason.GOLDEN_MISMATCH


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize(("share", "passes"), [(0.5, True), (3.0, False)])
def test_golden_vectors_differ_by_no_more_than_float32_does(tmp_path, share, passes, scale):
    """A part of the largest output, so that returns of 1e-4 are held as tightly as logits of 1."""
    parts = Parts()
    for key in ("output_layer.weight", "output_layer.bias", "output_proj.weight", "output_proj.bias"):
        if key in parts.state:
            parts.state[key] = parts.state[key] * scale
    vectors = golden(parts)
    largest = float(np.abs(vectors["outputs"]).max())
    small = int(np.argmin(np.abs(vectors["outputs"][1])))
    vectors["outputs"][1][small] += share * 1e-4 * largest
    parts.metadata["golden"] = vectors
    if passes:
        load(parts.write(tmp_path), PLAIN)
    else:
        assert refusal(parts, tmp_path).reason is Reason.GOLDEN_MISMATCH


@pytest.mark.parametrize(
    "vectors",
    [
        {},
        [],
        "text",
        {"inputs": [], "outputs": []},
        {"inputs": [[0.0] * 8], "outputs": [[0.0] * 12]},
        {"inputs": [[[0.0] * 8] * 4], "outputs": [[0.0] * 11]},
        {"inputs": [[[0.0] * 8] * 4], "outputs": [["a"] * 12]},
        {"inputs": [[[0.0] * 8] * 4], "outputs": [[None] * 12]},
        {"inputs": [[[1e308] * 8] * 4], "outputs": [[0.0] * 12]},
    ],
)
def test_golden_vectors_that_cannot_be_compared_are_a_mismatch(tmp_path, vectors):
    parts = Parts()
    parts.metadata["golden"] = vectors
    assert refusal(parts, tmp_path).reason is Reason.GOLDEN_MISMATCH


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_even_where_they_never_reach_an_output(tmp_path, value):
    state = builders.patchtst_state(8, 16, 16, 1, 3)
    state["pos_encoding"][99] = value  # a window of 64 bars uses the first 7 rows
    found = refusal(Parts(state, None, builders.json_scaler(8), prefix="patchtst"), tmp_path)
    assert found.reason is Reason.NON_FINITE_OUTPUT
    assert "pos_encoding" in found.detail


def test_outputs_that_overflow_are_refused(tmp_path):
    parts = Parts()
    for key in parts.state:
        parts.state[key] *= 1e30
    assert refusal(parts, tmp_path).reason is Reason.NON_FINITE_OUTPUT


@pytest.mark.parametrize(("scale", "passes"), [(0.0, False), (1e-11, False), (1e-6, True)])
def test_outputs_within_1e_9_are_constant(tmp_path, scale, passes):
    """Different from column to column, the same from row to row."""
    parts = Parts()
    parts.state["output_layer.weight"] *= scale
    parts.state["output_layer.bias"] *= 0.0 if passes else 1.0
    if passes:
        load(parts.write(tmp_path), PLAIN)
    else:
        assert refusal(parts, tmp_path).reason is Reason.CONSTANT_OUTPUT


def with_network(tmp_path, network) -> Model:
    return replace(load(Parts().write(tmp_path), PLAIN), network=network)


def test_a_network_whose_larger_batches_differ_is_computed_in_blocks_of_8_rows(tmp_path):
    plain = load(Parts().write(tmp_path), PLAIN).network

    def unsteady(x):
        return plain(x) + np.float32(1e-6 if len(x) > 8 else 0.0)

    model = probe.check_probe(with_network(tmp_path, unsteady), ())
    rows = np.random.default_rng(3).standard_normal((21, 4, 8)).astype(np.float32)
    assert model.network(rows).tobytes() == plain(rows).tobytes()
    assert model.network(rows[:0]).shape == (0, 12)
    assert "blocks of 8" in model.detail


def test_a_network_whose_rows_see_each_other_is_refused(tmp_path):
    plain = load(Parts().write(tmp_path), PLAIN).network

    def attending(x):
        return plain(x) + x.sum(dtype=np.float32)

    with pytest.raises(Refused) as caught:
        probe.check_probe(with_network(tmp_path, attending), ())
    assert caught.value.refusal.reason is Reason.UNKNOWN_ARCHITECTURE


def test_threshold_and_deviation_come_from_the_metadata_then_the_settings_then_the_defaults(tmp_path):
    options = LoadOptions(threshold={"nhits": 0.3}, residual_std={"nhits": 0.4})
    parts = Parts()
    assert load(parts.write(tmp_path), PLAIN).head == ReturnHead(DEFAULT_THRESHOLD, DEFAULT_RESIDUAL_STD)
    model = load(parts.write(tmp_path), options)
    assert model.head == ReturnHead(0.3, 0.4)
    assert "threshold 0.3 and residual_std 0.4 from settings" in model.detail
    parts.metadata |= {"threshold": 0.0, "residual_std": 0.2}
    assert load(parts.write(tmp_path), options).head == ReturnHead(0.0, 0.2)


def test_a_library_that_fails_on_a_file_is_a_refusal_and_not_the_end_of_the_worker(tmp_path, monkeypatch):
    def fail(data, suffix):
        raise RecursionError("too deep")

    candidate = Parts().write(tmp_path)
    monkeypatch.setattr(nhits, "parse", fail)
    with pytest.raises(Refused) as caught:
        load(candidate, PLAIN)
    assert caught.value.refusal.reason is Reason.CORRUPT_ARTIFACT
    assert "too deep" in caught.value.refusal.detail
