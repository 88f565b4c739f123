"""The recorder: what it writes reads back byte for byte, survives its own death, and is read by other tools."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from streams.inputs import Inputs
from streams.keys import Keys
from streams.recording import (
    Frames,
    Lost,
    Recorded,
    Recording,
    RecordingError,
    Writer,
    decode,
    drop_cut,
    encode,
    part_path,
    read_header,
    read_tail,
)
from streams.redis import connect
from tests.chaos.scene import feed, market
from tests.helpers import LIMIT_S, environment, quartet, wait_for
from worker.cli.check import _get
from worker.errors import CheckFailed, Unavailable, UsageError
from worker.record import Plan, Recorder
from worker.replay.parquet import write_parquet
from worker.training.bars import read_bars

Fields = dict[bytes, bytes]


def plan(out: Path, namespace: str, **given: object) -> Plan:
    keys = Keys(namespace)
    return Plan(out, keys, Inputs((keys.bars,), namespace), **{"until_idle_s": 0.2, **given})  # type: ignore[arg-type]


def record(url: str, out: Path, namespace: str, **given: object) -> list[str]:
    said: list[str] = []
    Recorder(connect(url), plan(out, namespace, **given), said.append).run()
    return said


def bars_in(file: Path) -> list[tuple[str, Fields]]:
    return [(i.id, dict(i.fields)) for i in Recording(file) if isinstance(i, Recorded) and i.stream == "bars"]


def bars_on(url: str, namespace: str) -> list[tuple[str, Fields]]:
    with connect(url) as client:
        return [(entry_id.decode(), fields) for entry_id, fields in client.xrange(f"{namespace}:bars")]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
payloads = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=40).map(str.encode),
    st.dictionaries(st.text(max_size=6), json_values, max_size=5).map(lambda x: json.dumps(x).encode()),
    st.dictionaries(st.text(max_size=6), json_values, max_size=5).map(
        lambda x: json.dumps(x, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    ),
)


@given(
    st.dictionaries(st.binary(min_size=1, max_size=8), payloads, min_size=1, max_size=4)
    | payloads.map(lambda x: {b"data": x})
)
def test_every_entry_reads_back_byte_for_byte(fields: Fields) -> None:
    item = Recorded("bars", 'a:key with "quotes" and ,"data":', "12-3", fields)
    line = encode(item)
    assert b"\n" not in line
    json.loads(line)
    assert decode(line) == item


@pytest.mark.parametrize(
    "data", [b"[" * 300 + b"]" * 300, b'{"a":1e400}', b'{"a":1,"a":2}', b'{"a":' + b"9" * 40 + b"}", b"{} "]
)
def test_odd_json_reads_back_byte_for_byte(data: bytes) -> None:
    item = Recorded("bars", "k", "1-0", {b"data": data})
    assert decode(encode(item)) == item


def test_a_recording_holds_every_entry_of_the_server(server: str, namespace: str, tmp_path: Path) -> None:
    entries = [*market(2, 40), {b"\xff": b"\x00\xfe", b"b": b"2"}, {b"data": b'{ "odd" : 1.50 }'}]
    feed(server, f"{namespace}:bars", entries)
    file = tmp_path / "new" / "day.jsonl.zst"
    record(server, file, namespace)
    assert bars_in(file) == bars_on(server, namespace)
    header = read_header(file)
    assert (header["namespace"], header["part"], header["from"]) == (namespace, 1, "start")
    assert set(header["contracts"]) >= {"v2", "v3"}
    assert header["build"]["numpy"]


def test_other_tools_read_it(valkey: str, namespace: str, tmp_path: Path, needs: Callable[[str], str]) -> None:
    feed(valkey, f"{namespace}:bars", market(1, 30))
    file = tmp_path / "day.jsonl.zst"
    record(valkey, file, namespace)
    command = f"{needs('zstdcat')} {file} | {needs('jq')} -r 'select(.stream == \"bars\") | .id'"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=True, timeout=LIMIT_S
    )
    assert done.stdout.split() == [entry_id for entry_id, _ in bars_on(valkey, namespace)]


def test_a_continued_recording_has_no_gap_and_nothing_twice(valkey: str, namespace: str, tmp_path: Path) -> None:
    bars = market(1, 90)
    file = tmp_path / "day.jsonl.zst"
    for first in (0, 30, 60):
        feed(valkey, f"{namespace}:bars", bars[first : first + 30], first)
        record(valkey, file, namespace)
    assert bars_in(file) == bars_on(valkey, namespace)


def test_an_unfinished_frame_is_reported_and_read_again_on_continuation(
    valkey: str, namespace: str, tmp_path: Path
) -> None:
    feed(valkey, f"{namespace}:bars", market(1, 60))
    file = tmp_path / "day.jsonl.zst"
    record(valkey, file, namespace)
    file.write_bytes(file.read_bytes()[:-7])
    recording = Recording(file)
    assert sum(1 for _ in recording) == 0  # the only frame of entries is the cut one
    assert recording.cut > 0
    said = record(valkey, file, namespace)
    assert any("unfinished frame" in line for line in said)
    assert bars_in(file) == bars_on(valkey, namespace)


NOTED = [[Recorded("bars", "k", f"{2 * frame + n}-0", {b"x": b"1"}) for n in range(2)] for frame in range(3)]
"""Three frames of two entries."""


def noted(path: Path) -> list[int]:
    """A recording of three frames with a note each: where each frame, its note included, begins, and the end."""
    with Writer(path, lambda text: {"lines": text.count(b"\n")}) as writer:
        writer.header({"id": "x", "part": 1, "positions": {}})
        places = [writer.size]
        for items in NOTED:
            for item in items:
                writer.add(item)
            writer.flush()
            places.append(writer.size)
    return places


def test_frames_whose_notes_tell_enough_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.zst"
    noted(file)
    notes: list[Any] = []
    texts = Recording(file).texts(lambda note: notes.append(note) or len(notes) == 2)
    assert [[decode(line) for line in text.splitlines()] for text in texts if text] == [NOTED[0], NOTED[2]]
    assert [note["lines"] for note in notes] == [2, 2, 2]


def test_a_recording_cut_anywhere_ends_with_its_last_whole_frame_and_goes_on_there(tmp_path: Path) -> None:
    """A killed recorder leaves any part of what it appended: of a note, or a whole one without its frame."""
    file = tmp_path / "x.zst"
    *_, begin, end = noted(file)
    whole = file.read_bytes()
    for cut in range(begin, end):
        file.write_bytes(whole[:cut])
        for known in (False, True):
            recording = Recording(file)
            texts = [text for text in recording.texts(lambda _, known=known: known) if text]
            assert (len(texts), recording.cut) == (0 if known else 2, cut - begin)
        tail = read_tail(file)
        assert (tail.cut, tail.positions) == (cut - begin, {"k": ("3-0", 4)})
        drop_cut(tail)
        assert file.read_bytes() == whole[:begin]


def test_a_note_is_believed_of_its_own_frame_alone_and_unless_it_is_damaged(tmp_path: Path) -> None:
    file, other = tmp_path / "x.zst", tmp_path / "other.zst"
    first, second, _, _ = noted(file)
    data = file.read_bytes()
    begin = first + 8 + int.from_bytes(data[first + 4 : first + 8], "little")
    damaged = [data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :] for at in range(first + 12, begin)]
    parted = data[:begin] + data[second:]  # the first note, then the second with its frame
    for changed, kept in (*((one, NOTED[:1]) for one in damaged), (parted, NOTED[1:2])):
        other.write_bytes(changed)
        texts = [text for text in Recording(other).texts(lambda _: True) if text]
        assert [[decode(line) for line in text.splitlines()] for text in texts] == kept


def test_no_bit_that_flips_hides_an_entry_behind_it(tmp_path: Path) -> None:
    file, other = tmp_path / "x.zst", tmp_path / "other.zst"
    first, second, _, _ = noted(file)
    data = file.read_bytes()
    whole = read = 0
    for bit in range(8 * first, 8 * second):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        other.write_bytes(flipped)
        for known in (False, True):
            recording = Recording(other)
            try:
                texts = [text for text in recording.texts(lambda _, known=known: known) if text]
            except RecordingError:
                continue
            read += 1
            whole += recording.cut == 0 and (known or len(texts) == 3)
    assert read == whole > 0


def test_a_note_that_is_too_long_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "x.zst"
    with Writer(file, lambda _: {"inputs": ["x" * 100_000]}) as writer:
        writer.header({"id": "x", "part": 1, "positions": {}})
        writer.add(NOTED[0][0])
    assert list(Recording(file)) == NOTED[0][:1]
    assert file.stat().st_size < 1_000


def test_a_damaged_frame_in_the_middle_is_named_by_its_place(valkey: str, namespace: str, tmp_path: Path) -> None:
    file = tmp_path / "day.jsonl.zst"
    for first in (0, 30):
        feed(valkey, f"{namespace}:bars", market(1, 60)[first : first + 30], first)
        record(valkey, file, namespace)
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(RecordingError, match=r"damaged in the frame at byte \d+ of \d+"):
        list(Recording(file))


def test_parts_by_size_are_read_as_one(valkey: str, namespace: str, tmp_path: Path) -> None:
    file = tmp_path / "day.jsonl.zst"
    bars = market(1, 200)
    for first in range(0, 200, 50):
        feed(valkey, f"{namespace}:bars", bars[first : first + 50], first)
        # Each run ends above the limit and the next begins a part, as a long run does once a second.
        recorder = Recorder(connect(valkey), plan(file, namespace, rotate_bytes=2_000), print)
        recorder._turn()
        recorder._writer.flush()
        recorder._rotate()
        recorder.run()
    assert part_path(file, 2).name == "day.0002.jsonl.zst"
    assert part_path(file, 2).exists()
    assert read_header(part_path(file, 2))["positions"][f"{namespace}:bars"][1] > 0
    assert bars_in(file) == bars_on(valkey, namespace)
    later = [entry for entry, _ in bars_in(part_path(file, 2))]
    assert later == [entry for entry, _ in bars_on(valkey, namespace)][-len(later) :]


@pytest.mark.parametrize("kept", [0, 20])
def test_a_part_that_was_never_begun_is_read_over_and_continued(
    valkey: str, namespace: str, tmp_path: Path, kept: int
) -> None:
    """A recorder that was killed as it began a part left no whole frame there."""
    file = tmp_path / "day.jsonl.zst"
    bars = market(1, 90)
    feed(valkey, f"{namespace}:bars", bars[:60])
    record(valkey, file, namespace)
    part = part_path(file, 2)
    part.write_bytes(file.read_bytes()[:kept])
    assert len(bars_in(file)) == 60
    feed(valkey, f"{namespace}:bars", bars[60:], first=60)
    recorder = Recorder(connect(valkey), plan(file, namespace, rotate_bytes=1), lambda _: None)
    recorder._rotate()
    recorder.plan.rotate_bytes = None
    assert recorder.run().path == part
    assert read_header(part)["part"] == 2
    assert bars_in(file) == bars_on(valkey, namespace)
    assert sorted(tmp_path.iterdir()) == [part, file]


def test_a_part_without_a_frame_before_another_part_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "day.jsonl.zst"
    for number in (1, 3):
        Writer.begin(part_path(file, number), {"id": "x", "part": number, "positions": {}}).close()
    part_path(file, 2).touch()
    with pytest.raises(RecordingError, match=r"day\.0002.*cut in its first frame"):
        list(Recording(file))


def test_a_part_of_another_recording_is_refused(valkey: str, namespace: str, tmp_path: Path) -> None:
    feed(valkey, f"{namespace}:bars", market(1, 5))
    file, other = tmp_path / "day.jsonl.zst", tmp_path / "other.jsonl.zst"
    record(valkey, file, namespace)
    record(valkey, other, namespace)
    other.rename(part_path(file, 2))
    with pytest.raises(RecordingError, match="no continuation"):
        list(Recording(file))
    file.unlink()
    with pytest.raises(UsageError, match="another recording"):
        record(valkey, file, namespace)


def test_trimmed_entries_are_counted_exactly(valkey: str, namespace: str, tmp_path: Path) -> None:
    key, bars = f"{namespace}:bars", market(1, 100)
    file = tmp_path / "day.jsonl.zst"
    feed(valkey, key, bars[:40])
    record(valkey, file, namespace)
    feed(valkey, key, bars[40:], first=40)
    with connect(valkey) as client:
        client.xtrim(key, maxlen=25, approximate=False)
    said = record(valkey, file, namespace)
    assert [item.entries for item in Recording(file) if isinstance(item, Lost)] == [35]
    assert any("35 entries after" in line for line in said)
    assert len(bars_in(file)) == 65
    assert read_tail(file).positions[key][1] == 100


def test_what_is_trimmed_between_two_looks_at_the_patterns_is_counted_exactly(
    valkey: str, namespace: str, tmp_path: Path
) -> None:
    """100 entries are read, 4900 follow of which the server keeps 1000: 3900 were never there to be read."""
    key, entry = f"{namespace}:bars", {b"x": b"1"}
    recorder = Recorder(connect(valkey), plan(tmp_path / "day.jsonl.zst", namespace), lambda _: None)
    feed(valkey, key, [entry] * 100)
    assert recorder._turn() == 100
    feed(valkey, key, [entry] * 4900, first=100)
    with connect(valkey) as client:
        client.xtrim(key, maxlen=1000, approximate=False)
    done = recorder.run()
    assert (done.lost, done.entries["bars"]) == (3900, 1100)


def test_entries_of_several_keys_are_in_the_order_of_their_ids_however_long_each_is(
    valkey: str, namespace: str, tmp_path: Path
) -> None:
    """One key holds 1300 entries, more than two reads of it, the other 90 among them."""
    keys = {f"{namespace}x:{name}": step for name, step in (("a", 1), ("b", 15))}
    expected = []
    for key, step in keys.items():
        for number in range(0, 1300, step):
            feed(valkey, key, [{b"n": b"%d" % number}], first=2 * number + (step > 1))
            expected.append((2 * number + (step > 1), key))
    file = tmp_path / "day.jsonl.zst"
    own = plan(file, namespace)
    own.inputs = Inputs(tuple(keys), namespace)
    Recorder(connect(valkey), own, lambda _: None).run()
    assert [i.key for i in Recording(file) if i.stream == "bars"] == [key for _, key in sorted(expected)]


def test_the_outputs_of_one_bar_are_never_parted_by_the_end_of_a_frame(tmp_path: Path) -> None:
    file = tmp_path / "x.zst"
    with Writer(file) as writer:
        writer.header({"id": "x", "part": 1, "positions": {}})
        for number in range(5):
            for stream in ("features", "signals"):
                writer.add(Recorded(stream, stream, f"{number}-0", {b"x": b"x" * 700_000}))
    frames = [[decode(line).id for line in lines.splitlines()] for lines in list(Frames(file).texts())[1:]]
    assert len(frames) > 1
    assert [entry_id for frame in frames for entry_id in frame] == [f"{n}-0" for n in range(5) for _ in range(2)]
    assert not any(set(one) & set(other) for one, other in pairwise(frames))


def test_a_stream_that_was_made_anew_stops_the_recorder(valkey: str, namespace: str, tmp_path: Path) -> None:
    key = f"{namespace}:bars"
    file = tmp_path / "day.jsonl.zst"
    feed(valkey, key, market(1, 40))
    record(valkey, file, namespace)
    with connect(valkey) as client:
        client.delete(key)
    feed(valkey, key, market(1, 10))
    with pytest.raises(CheckFailed, match="made anew"):
        record(valkey, file, namespace)


def test_a_full_disk_ends_the_recorder_with_one_line_and_what_was_written_stays(
    valkey: str, namespace: str, tmp_path: Path
) -> None:
    file = tmp_path / "day.jsonl.zst"
    feed(valkey, f"{namespace}:bars", market(1, 40))
    recorder = Recorder(connect(valkey), plan(file, namespace), lambda _: None)
    recorder._turn()
    feed(valkey, f"{namespace}:bars", market(1, 80)[40:], first=40)
    recorder._writer._file.close()
    recorder._writer._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115 - the writer closes it
    with pytest.raises(CheckFailed, match=r"day.jsonl.zst: No space left on device; .* go on with the same command"):
        recorder.run()
    record(valkey, file, namespace)
    assert bars_in(file) == bars_on(valkey, namespace)


def test_a_directory_for_parquet_that_cannot_be_made_or_a_missing_recording_is_one_line(
    valkey: str, namespace: str, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    file, folder = tmp_path / "day.jsonl.zst", tmp_path / "columns"
    with pytest.raises(UsageError, match="no such file"):
        write_parquet(file, folder)
    assert not folder.exists()
    record(valkey, file, namespace)
    folder.write_text("keep me")
    with pytest.raises(UsageError, match=r"--to-parquet .*columns: File exists; give a directory"):
        write_parquet(file, folder)
    assert folder.read_text() == "keep me"


def test_a_directory_is_no_file_to_replay(tmp_path: Path) -> None:
    done = quartet("replay", tmp_path, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is a directory; give one file" in done.stderr


def test_a_recording_is_known_by_its_bytes_and_not_by_its_suffix(valkey: str, namespace: str, tmp_path: Path) -> None:
    feed(valkey, f"{namespace}:bars", market(1, 40))
    record(valkey, tmp_path / "day.rec", namespace)
    assert len(read_bars(tmp_path / "day.rec").bars) == 40


def test_a_port_that_speaks_no_http_is_no_worker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"-ERR unknown command\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(Unavailable, match="no worker answers on"):
            _get(f"http://127.0.0.1:{server.getsockname()[1]}/healthz")
        thread.join()


def test_two_recorders_never_share_a_file(valkey: str, namespace: str, tmp_path: Path) -> None:
    file = tmp_path / "day.jsonl.zst"
    first = Recorder(connect(valkey), plan(file, namespace), print)
    with pytest.raises(UsageError, match="another recorder"):
        Recorder(connect(valkey), plan(file, namespace), print)
    first.run()


def test_what_is_no_recording_is_never_written_to(valkey: str, namespace: str, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("keep me")
    with pytest.raises(UsageError, match="no recording"):
        record(valkey, file, namespace)
    assert file.read_text() == "keep me"
    other = tmp_path / "day.jsonl.zst"
    record(valkey, other, namespace)
    with pytest.raises(UsageError, match="records namespace"):
        record(valkey, other, namespace + "other")


def test_kill_9_loses_at_most_the_last_second(valkey: str, namespace: str, tmp_path: Path) -> None:
    """Every entry that was on the server when the recorder's next frame came is in the file after its death."""
    file, key = tmp_path / "day.jsonl.zst", f"{namespace}:bars"
    bars = market(1, 400)
    flags = ["--redis", valkey, "--namespace", namespace, "--state-dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "worker", "record", "--out", str(file), *flags],
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: file.exists() and file.stat().st_size > 0)
        feed(valkey, key, bars[:200])
        wait_for(lambda: bool(bars_in(file)))
        held = [entry_id for entry_id, _ in bars_in(file)]
        feed(valkey, key, bars[200:], first=200)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(LIMIT_S)
        assert process.stderr is not None
        process.stderr.close()
    ids = [entry_id for entry_id, _ in bars_on(valkey, namespace)]
    after = [entry_id for entry_id, _ in bars_in(file)]
    assert held
    assert after == ids[: len(after)]
    assert len(after) >= len(held)
    record(valkey, file, namespace)
    assert bars_in(file) == bars_on(valkey, namespace)


def test_sigterm_ends_the_recorder_quietly_with_everything_on_disk(valkey: str, namespace: str, tmp_path: Path) -> None:
    file = tmp_path / "day.jsonl.zst"
    flags = ["--redis", valkey, "--namespace", namespace, "--state-dir", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "worker", "record", "--out", str(file), "--json", *flags],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        wait_for(lambda: file.exists() and file.stat().st_size > 0)
        feed(valkey, f"{namespace}:bars", market(1, 50))
        wait_for(lambda: len(bars_in(file)) == 50)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, json.loads(out)["entries"]) == (0, {"bars": 50})
    assert "Traceback" not in err


def test_without_a_server_the_line_says_so(tmp_path: Path) -> None:
    done = quartet("record", "--out", "x.jsonl.zst", cwd=tmp_path)
    assert done.returncode == 3
    assert "no embedded server runs" in done.stderr


def test_the_writer_ends_a_frame_at_a_mebibyte(tmp_path: Path) -> None:
    file = tmp_path / "x.zst"
    with Writer(file) as writer:
        writer.header({"id": "x", "part": 1, "positions": {}})
        for number in range(3):
            writer.add(Recorded("bars", "k", f"{number}-0", {b"x": bytes(900_000)}))
        assert (
            len(zstandard.ZstdDecompressor().stream_reader(file.read_bytes(), read_across_frames=True).read()) > 1 << 20
        )
