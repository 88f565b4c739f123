"""The inert reader: what it refuses, that nothing runs, and that benign values come out whole."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import pickle
import pickletools
import struct
import subprocess
import sys
import zlib
from collections import OrderedDict, defaultdict
from pathlib import Path

import joblib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents import lgbm, scalers, unpickle, xgb
from agents.agent import Refused
from streams.messages import Reason
from tests.agents import legacy

ROOT = Path(__file__).parents[2]


@pytest.fixture
def canary(tmp_path):
    """A file that exists as soon as any payload of a test has run."""
    file = tmp_path / "canary"
    yield file
    assert not file.exists(), "the payload ran"


class Payload:
    """Pickles to a call of `os.system`, as a hostile file does."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.canary}",)


def refusal(data, limit=2**24):
    with pytest.raises(Refused) as refused:
        unpickle.read(data, limit)
    return refused.value.refusal


def unsafe(data):
    found = refusal(data)
    assert found.reason is Reason.UNSAFE_ARTIFACT, found
    return found.detail


def corrupt(data):
    found = refusal(data)
    assert found.reason is Reason.CORRUPT_ARTIFACT, found
    return found.detail


def command(canary):
    return f"touch {canary}".encode()


def text(value):
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value


# Payloads


@pytest.mark.parametrize("container", legacy.CONTAINERS)
def test_a_payload_is_refused_by_name_in_every_container(container, canary):
    detail = unsafe(legacy.pack(Payload(canary), container))
    assert "'system'" in detail
    assert "'posix'" in detail


@pytest.mark.parametrize("container", legacy.CONTAINERS)
@pytest.mark.parametrize("place", ["in an object array", "in an attribute", "in a list", "as a key", "twice nested"])
def test_a_payload_inside_permitted_values_is_refused(place, container, canary):
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(legacy.FRAME)
    payload = Payload(canary)
    if place == "in an object array":
        scaler.feature_names_in_ = np.array([payload, "close"], dtype=object)
    elif place == "twice nested":
        inner = np.empty(1, dtype=object)
        inner[0] = np.array([payload], dtype=object)
        scaler.feature_names_in_ = inner
    elif place == "in a list":
        scaler.extra = [payload]
    elif place == "as a key":
        scaler.extra = {payload: 1}
    else:
        scaler.mean_ = payload
    assert "'system'" in unsafe(legacy.pack(scaler, container))


@pytest.mark.parametrize("protocol", [0, 1])
def test_protocols_that_no_model_file_uses_are_refused_too(protocol, canary):
    refusal(pickle.dumps(Payload(canary), protocol))


def hostile_streams(canary):
    cmd = command(canary)
    call = text(cmd) + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
    yield "reduce", b"cposix\nsystem\n" + call
    yield "python 2 name", b"\x80\x02c__builtin__\neval\n" + call
    yield "stack_global", b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + call
    yield "dotted global", b"\x80\x04\x8c\x08builtins\x8c\x13bytearray.__class__\x93" + call
    yield "dotted module", b"cnumpy.dtype\n__class__\n" + call
    yield "name through a permitted module", b"cnumpy\nf2py\n" + call
    yield "numpy's own eval", b"cnumpy.testing._private.utils\nrunstring\n" + call
    yield "joblib's own reducer", b"cjoblib.numpy_pickle\nload\n" + call
    yield "getattr", b"cbuiltins\ngetattr\n(cnumpy\ndtype\n" + text(b"__subclasses__") + b"tR."
    yield "inst", b"(" + text(cmd) + b"iposix\nsystem\n."
    yield "obj", b"(cposix\nsystem\n" + text(cmd) + b"o."
    yield "inst of a permitted class", b"(" + text(cmd) + b"isklearn.preprocessing._data\nStandardScaler\n."
    yield "newobj", b"\x80\x02cposix\nsystem\n" + text(cmd) + b"\x85\x81."
    yield "newobj_ex", b"\x80\x04cnumpy\ndtype\n)}\x92."
    yield "newobj of a function", b"\x80\x02cbuiltins\nbytearray\n)\x81."
    yield (
        "arguments for a permitted class",
        b"\x80\x02csklearn.preprocessing._data\nStandardScaler\n" + text(cmd) + b"\x85\x81.",
    )
    yield "a call of a permitted class", b"\x80\x02cxgboost.core\nBooster\n" + text(cmd) + b"\x85R."
    yield "a call of what a call gave", b"\x80\x02ccollections\nOrderedDict\n)R)R."
    yield "a call of text", text(cmd) + b")R."
    yield "a state for a permitted function", b"\x80\x02cbuiltins\nbytearray\n}b."
    yield "a state for a permitted class", b"\x80\x02cxgboost.core\nBooster\n}" + text(b"__setstate__") + b"Nsb."
    yield "a state for a mapping", b"\x80\x02}}b."
    yield "a factory that is called", b"\x80\x02ccollections\ndefaultdict\ncbuiltins\nbytearray\n\x85R."
    yield (
        "an array of another class",
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n(cxgboost.core\nBooster\nK\x00\x85C\x01btR.",
    )
    yield "a persistent id", b"P" + cmd + b"\n."
    yield "a binary persistent id", text(cmd) + b"Q."
    yield "an extension code", b"\x80\x02\x82\x01."
    yield "a wide extension code", b"\x80\x02\x84\x01\x00\x00\x00."
    yield "a buffer from outside", b"\x80\x05\x97."
    yield "bytes of a name", b"\x80\x02c_codecs\nencode\ncnumpy\nndarray\n" + text(b"latin1") + b"\x86R."
    yield "another codec", b"\x80\x02c_codecs\nencode\n" + text(cmd) + text(b"rot13") + b"\x86R."


@pytest.mark.parametrize("name", [name for name, _ in hostile_streams("x")])
def test_every_way_to_name_or_call_is_refused(name, canary):
    unsafe(dict(hostile_streams(canary))[name])


def test_an_extension_code_that_this_process_knows_is_refused(canary):
    import copyreg

    copyreg.add_extension("posix", "system", 240)
    try:
        data = pickle.dumps(Payload(canary), 2)
        assert any(opcode.name == "EXT1" for opcode, _, _ in pickletools.genops(data))
        unsafe(data)
    finally:
        copyreg.remove_extension("posix", "system", 240)


def test_special_methods_in_a_state_are_plain_keys(canary):
    data = b"\x80\x02cxgboost.core\nBooster\n)\x81}" + text(b"__reduce__") + text(command(canary)) + b"sb."
    assert unpickle.read(data).state == {"__reduce__": f"touch {canary}"}


def test_a_permitted_name_is_never_imported():
    code = (
        "import sys; from agents import unpickle\n"
        "unpickle.read(sys.stdin.buffer.read())\n"
        "import json; names = {'pickle', 'joblib', 'sklearn', 'xgboost', 'lightgbm'}\n"
        "print(json.dumps(sorted(names & set(sys.modules))))"
    )
    data = legacy.pack(legacy.lightgbms()["classifier"], "joblib")
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True, cwd=ROOT)
    # numpy itself imports pickle; nothing that the file names is there.
    assert set(json.loads(done.stdout)) <= {"pickle"}


# Bombs


@functools.cache
def bombs():
    return dict(make_bombs())


def make_bombs():
    big = 2**40
    yield "zlib", zlib.compress(b"\0" * 2**25, 9)
    yield "gzip", gzip.compress(b"\0" * 2**25)
    yield "bz2", bz2.compress(b"\0" * 2**25)
    yield "lzma", lzma.compress(b"\0" * 2**25, lzma.FORMAT_ALONE, preset=0)
    yield "xz", lzma.compress(b"\0" * 2**25, preset=0)
    yield "a container in a container", zlib.compress(zlib.compress(b"\0" * 2**25))
    yield "a long text", b"\x80\x04\x8d" + struct.pack("<Q", big) + b"a."
    yield "long bytes", b"\x80\x04\x8e" + struct.pack("<Q", big) + b"a."
    yield "a long bytearray", b"\x80\x05\x96" + struct.pack("<Q", big) + b"a."
    yield "a length beyond any", b"\x80\x04\x8e" + b"\xff" * 8 + b"a."
    yield "a long integer", b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"a."
    yield "a negative length", b"\x80\x02\x8b" + struct.pack("<i", -1) + b"a."
    yield "digits", b"I" + b"9" * 100_000 + b"\n."
    yield "a long frame", b"\x80\x04\x95" + struct.pack("<Q", big) + b"(."
    yield "opcodes", b"\x80\x02" + b"N0" * 1_000_000 + b"N."
    yield "marks", b"\x80\x02" + b"(" * 2_000_000 + b"."
    yield "memo", b"\x80\x04N" + b"\x94" * 2_000_000 + b"."
    yield "a wide array", array_of(f"({big},)", b"")
    yield "a negative shape", array_of("(-1,)", b"")
    yield "a shape that overflows", array_of(f"({2**33}, {2**33})", b"")
    yield "many dimensions", array_of("(1, 1, 1, 1, 1)", b"\0" * 8)
    yield "an item of a billion letters", array_of("(1,)", b"", dtype="U99999")
    yield "a structured type", array_of("(1,)", b"\0" * 8, dtype="f8,f8")
    yield "keys", keys_of_one_hash()
    yield "a nest of tuples as a key", b"\x80\x02}K\x01" + b"2\x86" * 60 + b"Ns."
    yield "bytes copied again and again", copies()
    yield "a state given again and again", states()


def array_of(shape, data, dtype="f8"):
    dims = (
        b"("
        + b"".join(b"\x8a\x09" + int(n).to_bytes(9, "little", signed=True) for n in shape.strip("()").split(",") if n)
        + b"t"
    )
    return (
        b"\x80\x05cnumpy._core.numeric\n_frombuffer\n(B"
        + struct.pack("<I", len(data))
        + data
        + b"cnumpy\ndtype\n"
        + text(dtype.encode())
        + b"\x85R"
        + dims
        + text(b"C")
        + b"tR."
    )


def keys_of_one_hash():
    step = sys.hash_info.modulus
    keys = b"".join(b"\x8a\x0a" + (i * step).to_bytes(10, "little") + b"N" for i in range(60_000))
    return b"\x80\x02}(" + keys + b"u."


def copies():
    data = b"\x80\x02c_codecs\nencode\nq\x00" + text(b"a" * 2**20) + b"q\x01" + text(b"latin1") + b"\x86q\x02R"
    return data + b"0h\x00h\x02R" * 100_000 + b"."


def states():
    state = b"}(" + b"".join(text(str(i).encode()) + b"N" for i in range(1000)) + b"uq\x01"
    return b"\x80\x02" + state + b"cxgboost.core\nBooster\nq\x02" + b"h\x02)\x81h\x01b" * 50_000 + b"."


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused(name):
    corrupt(bombs()[name])


def test_bombs_are_refused_within_a_bound_on_memory(tmp_path):
    """All bombs in one process that may map 256 MiB more than it has after its imports."""
    for i, (_, data) in enumerate(bombs().items()):
        (tmp_path / f"{i:02d}").write_bytes(data)
    code = (
        "import resource, sys, pathlib; from agents import unpickle; from agents.agent import Refused\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)\n"
        "n = 0\n"
        "for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try: unpickle.read(file.read_bytes(), 2**24)\n"
        "    except Refused: n += 1\n"
        "print(n)"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.split() == [str(len(bombs()))], done.stderr


def test_depth_costs_no_stack(canary):
    unpickle.read(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    deep = b"\x80\x02N" + b"\x85" * 100_000 + b"0N."
    assert unpickle.read(deep) is None
    itself = unpickle.read(b"\x80\x02]q\x00h\x00a.")
    assert itself[0] is itself


def test_a_file_over_the_limit_is_refused_before_it_is_read():
    assert refusal(b"\x80\x02N." + b" " * 100, limit=100).reason is Reason.CORRUPT_ARTIFACT


# Damage


@pytest.mark.parametrize("container", legacy.CONTAINERS)
def test_a_file_cut_at_any_place_is_refused(container):
    data = legacy.pack(legacy.scalers()["standard"], container)
    for end in range(0, len(data), max(1, len(data) // 61)):
        refusal(data[:end])


@pytest.mark.parametrize("prefix", [b"\x04\x22\x4d\x18", b"ZF0x1234"])
def test_a_container_that_is_not_read_says_how_to_write_it_again(prefix):
    assert "joblib.dump" in corrupt(prefix + b"data")


def test_bytes_after_a_container_are_refused():
    assert "after its end" in corrupt(legacy.pack(legacy.scalers()["standard"], "zlib") + b"more")


def benign(name):
    makers = {
        "scaler": (lambda: legacy.scalers()["standard"], scalers),
        "xgboost": (lambda: legacy.xgboosts()["regressor"], xgb),
        "lightgbm": (lambda: legacy.lightgbms()["regressor"], lgbm),
    }
    return makers[name]


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "delete", "insert", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data, changes):
    """The data with bytes set, deleted, inserted, or cut off at places given as fractions of its length."""
    changed = bytearray(data)
    for kind, place, new in changes:
        at = int(place * len(changed))
        if kind == "cut":
            del changed[at:]
        elif kind == "insert":
            changed[at:at] = new
        elif kind == "delete":
            del changed[at : at + len(new)]
        else:
            changed[at : at + len(new)] = new[: len(changed) - at]
    return bytes(changed)


@pytest.mark.parametrize("container", ["joblib", "zlib", "pickle2", "pickle5"])
@pytest.mark.parametrize("name", ["scaler", "xgboost", "lightgbm"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=CHANGES)
def test_a_mutated_file_loads_or_is_refused_and_nothing_else(name, container, changes):
    make, family = benign(name)
    data = mutated(legacy.pack(make(), container), changes)
    try:
        parsed = family.parse(data, ".pkl")
        if name == "scaler":
            assert parsed.scaler.transform(np.zeros((3, parsed.width))).shape == (3, parsed.width)
        else:
            built = family.build(parsed, {})
            assert built.network(np.zeros((3, built.width), np.float32)).shape == (3, built.outputs)
    except Refused as refused:
        assert refused.refusal.reason in (  # noqa: PT017 - either outcome is right, another is not
            Reason.UNSAFE_ARTIFACT,
            Reason.CORRUPT_ARTIFACT,
            Reason.UNKNOWN_ARCHITECTURE,
        )


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_load_or_are_refused_and_nothing_else(data):
    try:
        unpickle.read(data, 2**16)
    except Refused as refused:
        assert refused.refusal.reason in (Reason.UNSAFE_ARTIFACT, Reason.CORRUPT_ARTIFACT)  # noqa: PT017


OPCODES = st.lists(
    st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes]).flatmap(
        lambda code: st.binary(max_size=5).map(lambda argument: code + argument)
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(OPCODES)
def test_any_opcodes_load_or_are_refused_and_nothing_else(opcodes):
    try:
        unpickle.read(b"\x80\x04" + b"".join(opcodes) + b".", 2**16)
    except Refused as refused:
        assert refused.refusal.reason in (Reason.UNSAFE_ARTIFACT, Reason.CORRUPT_ARTIFACT)  # noqa: PT017


# Benign values


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(PLAIN, st.integers(2, 5))
def test_plain_values_come_out_as_pickle_would_give_them(value, protocol):
    assert unpickle.read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("container", legacy.CONTAINERS)
@pytest.mark.parametrize("dtype", ["f8", ">f8", "f4", "f2", "i8", ">i4", "u1", "?", "U5"])
def test_arrays_come_out_whole(dtype, container):
    for shape in ((), (6,), (2, 3), (0, 3)):
        array = np.arange(max(1, int(np.prod(shape)))).astype(dtype)[: int(np.prod(shape))].reshape(shape)
        for given_array in (array, np.asfortranarray(array)):
            found = unpickle.read(legacy.pack([given_array], container))[0]
            assert found.shape == given_array.shape
            assert found.dtype == array.dtype.newbyteorder("=")
            assert np.array_equal(found, given_array)


def test_scalars_and_mappings_come_out_plain():
    value = {
        "n": np.float64(1.5),
        "i": np.int64(3),
        "d": defaultdict(OrderedDict, a=OrderedDict(b=1)),
        np.int64(2): "x",
    }
    found = unpickle.read(pickle.dumps(value))
    assert found == {"n": 1.5, "i": 3, "d": {"a": {"b": 1}}, 2: "x"}
    assert [type(v) for v in found.values()] == [float, int, dict, str]


def test_names_in_an_object_array_come_out_as_text():
    buffer = io.BytesIO()
    joblib.dump({"names": np.array(["open", "high"], dtype=object)}, buffer)
    assert unpickle.read(buffer.getvalue()) == {"names": ("open", "high")}
