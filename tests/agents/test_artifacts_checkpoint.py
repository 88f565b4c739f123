"""No byte of a checkpoint is executed, and none claims more than it holds."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import checkpoint, nhits, patchtst
from agents.agent import Refused
from streams.messages import Reason
from tests.agents import builders

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


def refusal(data: bytes):
    with pytest.raises(Refused) as caught:
        checkpoint.read(data)
    return caught.value.refusal


@pytest.fixture(scope="module")
def small():
    return builders.nhits_state(64 * 8, (16, 16), 2, 12)


@pytest.fixture(scope="module")
def good(small):
    return builders.saved(small)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda s: {"model_state_dict": s, "epoch": 1}])
def test_both_containers_of_torch_and_both_kinds_of_checkpoint_are_read(small, options, wrap):
    read = checkpoint.read(builders.saved(wrap(small), **options))
    assert {key: value.tolist() for key, value in read.state.items()} == {k: v.tolist() for k, v in small.items()}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: {"x": h}, lambda h: {"model_state_dict": {}, "config": h}])
def test_a_file_that_names_code_is_refused_and_runs_nothing(tmp_path, options, wrap):
    trace = tmp_path / "ran"
    found = refusal(builders.saved(wrap(builders.Hostile(trace)), **options))
    assert found.reason is Reason.UNSAFE_ARTIFACT
    assert "mkdir" in found.detail
    assert not trace.exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_that_names_code_is_refused_and_runs_nothing(tmp_path, protocol):
    trace = tmp_path / "ran"
    assert refusal(pickle.dumps(builders.Hostile(trace), protocol)).reason is Reason.UNSAFE_ARTIFACT
    assert not trace.exists()


def test_a_whole_saved_module_is_refused_with_the_remedy():
    found = refusal(builders.saved(nhits.NHiTS(4, 8, (8, 8), 1, 3)))
    assert found.reason is Reason.UNSAFE_ARTIFACT
    assert "state_dict()" in found.detail


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_archive_is_refused_as_code():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    assert refusal(buffer.getvalue()).reason is Reason.UNSAFE_ARTIFACT


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), "text", 3])
def test_something_else_than_a_dict_is_refused(value):
    assert refusal(builders.saved(value)).reason is Reason.CORRUPT_ARTIFACT


NO_CHECKPOINTS = [
    b"",
    b"PK",
    b"PK\x03\x04 and nothing more",
    b"\x80\x02",
    b"{}",
    b"\x00" * 1000,
    pickle.dumps({"a": 1}),
    b"corrupt",
    b"cut",
]


@pytest.mark.parametrize("data", NO_CHECKPOINTS, ids=range(len(NO_CHECKPOINTS)))
def test_bytes_that_are_no_checkpoint_are_refused(data):
    assert refusal(data).reason is Reason.CORRUPT_ARTIFACT


def test_a_checkpoint_cut_anywhere_is_refused(good):
    for cut in range(0, len(good), 997):
        assert refusal(good[:cut]).reason is Reason.CORRUPT_ARTIFACT, cut
    assert refusal(good[:-1]).reason is Reason.CORRUPT_ARTIFACT


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_checkpoint_with_bytes_changed_is_read_or_refused_never_anything_else(good, data):
    changed = bytearray(good)
    for place in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=4)):
        changed[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(Refused):  # whatever else is raised fails
        built = nhits.build(nhits.parse(bytes(changed), ".pth"), {})
        assert built.network(np.zeros((2, built.window, built.width), np.float32)).shape == (2, built.outputs)


def test_a_packed_archive_that_unpacks_to_more_than_its_size_is_refused():
    plain = builders.saved({"blocks.0.0.weight": torch.zeros(1000, 1000)})
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(plain)) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert len(packed.getvalue()) < 100_000
    found = refusal(packed.getvalue())
    assert found.reason is Reason.CORRUPT_ARTIFACT
    assert "unpacks to" in found.detail


@pytest.mark.parametrize("inside", [True, False])
def test_a_tensor_that_repeats_one_number_for_ever_is_refused(inside):
    state = {"blocks.0.0.weight": torch.zeros(1).expand(100_000, 1_000)}
    found = refusal(builders.saved({"model_state_dict": state} if inside else state))
    assert found.reason is Reason.CORRUPT_ARTIFACT
    assert "claims" in found.detail


def test_a_state_dict_under_another_name_is_refused_with_its_keys(small):
    with pytest.raises(Refused) as caught:
        nhits.build(checkpoint.read(builders.saved({"state_dict": small, "epoch": 3})), {})
    assert caught.value.refusal.reason is Reason.UNKNOWN_ARCHITECTURE
    assert "state_dict" in caught.value.refusal.detail


def test_sparse_tensors_are_refused():
    state = builders.token_state(8, 16, 16, 1) | {"input_proj.weight": torch.zeros(16, 8).to_sparse()}
    with pytest.raises(Refused) as caught:
        patchtst.build(patchtst.parse(builders.saved(state), ".pth"), {})
    assert caught.value.refusal.reason is Reason.STATE_DICT_MISMATCH


def test_tensors_that_are_views_into_one_storage_give_the_same_bits(small):
    """A slice of a larger storage is copied, so that its alignment cannot change a sum."""
    flat = torch.cat([torch.zeros(1), *(value.flatten() for value in small.values())])
    views, start = {}, 1
    for key, value in small.items():
        views[key] = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()
    x = np.random.default_rng(0).standard_normal((8, 64, 8)).astype(np.float32)

    def outputs(state):
        return nhits.build(nhits.parse(builders.saved(state), ".pth"), {}).network(x).tobytes()

    assert outputs(views) == outputs(small)
