"""No byte of a checkpoint is executed, and none claims more than it holds."""

from __future__ import annotations

import codecs
import contextlib
import io
import pickle
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import checkpoint, nhits
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


class Call:
    """Pickled, this is a call of a permitted kind of function with arguments of the file's choice."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def archive_of(value) -> bytes:
    """A small checkpoint whose data.pkl is the pickle of `value`."""
    plain, made = io.BytesIO(builders.saved({"a": torch.zeros(2)})), io.BytesIO()
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(made, "w") as target:
        for entry in source.infolist():
            data = pickle.dumps(value, 2) if entry.filename.endswith("/data.pkl") else source.read(entry)
            target.writestr(entry.filename, data)
    return made.getvalue()


def legacy_of(value) -> bytes:
    """The older kind: magic number, version and machine as torch writes them, then the pickle of `value`."""
    old = builders.saved({}, _use_new_zipfile_serialization=False)
    stream = io.BytesIO(old)
    for _ in range(3):
        pickle.load(stream)
    return old[: stream.tell()] + pickle.dumps(value, 2) + pickle.dumps([], 2)


def legacy_bomb(size: int) -> bytes:
    """An older checkpoint whose one tensor of 2 numbers lies in a storage said to hold `size`."""
    old = builders.saved({"a": torch.zeros(2)}, _use_new_zipfile_serialization=False)
    claim = b"X\x03\x00\x00\x00cpu"
    assert old.count(claim) == 1
    at = old.index(b"K\x02N", old.index(claim))
    return old[:at] + b"J" + size.to_bytes(4, "little") + old[at + 2 :]


BOMBS = {
    "bytearray": (bytearray, 700_000_000),
    "Tensor": (torch.Tensor, 13_000, 13_000),
    "UntypedStorage": (torch.UntypedStorage, 700_000_000),
    "set": (set, (1, 2)),
    "Counter": (Counter, {"a": 1}),
    "complex": (complex, 1.0, 2.0),
}


@pytest.mark.parametrize("kind", [archive_of, legacy_of])
@pytest.mark.parametrize("name", BOMBS)
def test_a_name_that_tensors_do_not_need_is_refused_and_named(kind, name):
    """torch's own list for `weights_only` allows all of these."""
    found = refusal(kind({"a": Call(*BOMBS[name])}))
    assert found.reason is Reason.UNSAFE_ARTIFACT
    assert name in found.detail


def test_text_of_another_encoding_is_refused():
    """`encode` in hex doubles what it is given, and could be called again and again."""
    assert refusal(archive_of({"a": Call(codecs.encode, b"ab", "hex")})).reason is Reason.UNSAFE_ARTIFACT


@pytest.mark.parametrize("kind", [archive_of, legacy_of])
def test_what_training_loops_keep_beside_the_tensors_is_read(kind):
    kept = {"loss": np.float64(0.5), "n": np.int64(3), "device": torch.device("cpu"), "size": torch.Size([1, 2])}
    kept |= {"dtype": torch.float32, "window": 4}
    found = checkpoint.read(kind({"model_state_dict": OrderedDict(), **kept}))
    assert (found.metadata["loss"], found.metadata["n"], found.metadata["window"]) == (0.5, 3, 4)


MEMORY = """
import resource, sys
from agents import checkpoint
from agents.agent import Refused
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    checkpoint.read(sys.stdin.buffer.read())
except Refused as refused:
    print(refused.refusal.reason, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def nest(depth: int) -> tuple:
    """Shared at every level: a few bytes of pickle, 2 ** depth items to whoever prints it."""
    value: tuple = ("x",)
    for _ in range(depth):
        value = (value, value)
    return value


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (archive_of({"a": Call(bytearray, 700_000_000)}), "unsafe_artifact"),
        (legacy_of({"a": Call(bytearray, 700_000_000)}), "unsafe_artifact"),
        (legacy_bomb(200_000_000), "corrupt_artifact"),
    ],
    ids=["bytearray", "bytearray in the older kind", "storage of the older kind"],
)
def test_a_small_file_cannot_ask_for_much_memory(data, reason):
    """Each asks for 700 MB and more; reading it may cost 64 MiB. In a process of its own, as the peak never falls."""
    assert len(data) < 2000
    run = [sys.executable, "-W", "ignore", "-c", MEMORY]
    done = subprocess.run(run, input=data, capture_output=True, cwd=Path(__file__).parents[2], check=True)
    found, grown = done.stdout.split()
    assert found.decode() == reason
    assert int(grown) < 64 * 1024


def test_nested_values_beside_the_tensors_are_not_kept():
    assert "window" not in checkpoint.read(archive_of({"model_state_dict": {}, "window": nest(60)})).metadata


def test_a_storage_larger_or_smaller_than_its_record_is_refused(good):
    """What torch reads is what was judged: each record of the archive has exactly the bytes that are claimed."""
    at = good.index(b"K\x10t", good.index(b"storage"))
    found = refusal(repacked(good, at, b"K\x11t"))
    assert found.reason is Reason.CORRUPT_ARTIFACT
    assert "claims 68 bytes" in found.detail


def repacked(good: bytes, at: int, other: bytes) -> bytes:
    """The archive with bytes of data.pkl changed, its checksums right again."""
    made = io.BytesIO()
    old = good[at : at + len(other)]
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(made, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("/data.pkl"):
                data = data.replace(old, other, 1)
            target.writestr(entry.filename, data)
    return made.getvalue()


@pytest.mark.parametrize("data", [b"not a model", b"PK\x03\x04 and nothing more", b"\x80\x02]q\x00.", b""])
def test_no_refusal_passes_on_what_torch_advises(data):
    """torch advises to switch its safety off; an operator is told to copy or save the file again."""
    found = refusal(data)
    assert "weights_only" not in found.detail
    assert repr(data[:8]) in found.detail
    assert found.detail.endswith("copy the file again, or save it again with torch.save(model.state_dict(), path)")


def test_a_file_that_torch_alone_refuses_is_told_without_its_text(monkeypatch):
    def advises(*_, **__):
        raise RuntimeError("Re-running torch.load with weights_only set to False will likely succeed")

    monkeypatch.setattr(torch, "load", advises)
    found = refusal(builders.saved({"a": torch.zeros(2)}))
    assert "weights_only" not in found.detail
    assert "RuntimeError" in found.detail


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
    found = refusal(builders.saved(state))
    assert found.reason is Reason.UNSAFE_ARTIFACT
    assert "_rebuild_sparse_tensor" in found.detail


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
