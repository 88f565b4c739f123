"""The notes of a recording spare reading most of it for the outline, which stays the same as with every line read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from streams.recording import Item, Lost, NoteOf, Recorded, Recording, RecordingError, Writer
from tests.replay.scene import Scene, rewrite
from worker.replay.outline import RULES, Outline, note_of, read_outline
from worker.replay.publish import contents_of

HEADER = {"id": "x", "part": 1, "namespace": "q", "inputs": ["q:bars"], "positions": {}}
FRAMES, NEWS, BARS = 8, 5, 4
"""So many frames of so many bars each, and the one that says something new."""


def entry(stream: str, number: int, **data: Any) -> Recorded:
    return Recorded(stream, f"q:{stream}", f"{number}-0", {b"data": json.dumps(data, separators=(",", ":")).encode()})


def bar(number: int, key: str = "q:bars") -> Recorded:
    return Recorded("bars", key, f"{number}-0", {b"symbol": b"A", b"ts": b"%d" % number})


def frame_of(number: int) -> list[Item]:
    """What a worker of two agents writes of a few bars; one of them is refused, and so has no version."""
    items: list[Item] = []
    for at in range(number * BARS, (number + 1) * BARS):
        items += [
            bar(at),
            entry("features", at, bar_id=f"A|1m|{at}", values={"x": at}),
            entry("votes:xgboost", at, bar_id=f"A|1m|{at}", version="v1", reason=None),
            entry("votes:nhits", at, bar_id=f"A|1m|{at}", version=None, reason="no_artifact"),
            entry("signals", at, bar_id=f"A|1m|{at}", status="ok", votes={"xgboost": {"action": "BUY"}}),
        ]
    return items


def unnoted(_: bytes) -> None:
    return None


def write(path: Path, frames: Sequence[Sequence[Item]], note: NoteOf = note_of) -> Path:
    with Writer(path, note) as writer:
        writer.header(HEADER)
        for items in frames:
            for item in items:
                writer.add(item)
            writer.flush()
    return path


def read_of(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Outline, int]:
    """The outline, and how many frames were read for it."""
    read: list[bytes] = []
    texts = Recording.texts

    def counted(self: Recording, *known: Any) -> Iterator[bytes]:
        for text in texts(self, *known):
            read.append(text)
            yield text

    with monkeypatch.context() as patch:
        patch.setattr(Recording, "texts", counted)
        outline = read_outline(Recording(file))
    return outline, len([text for text in read if text])


def rejected(reason: str) -> Recorded:
    fields = {b"reason": reason.encode(), b"source_key": b"q:bars", b"source_id": b"1-0"}
    return Recorded("rejected", "q:rejected", "21-0", fields)


def event(kind: str, **evidence: Any) -> Recorded:
    return entry("events", 21, kind=kind, agent="xgboost", reason="operator", evidence=evidence)


POSITION = {"q:bars": "20-0", "q:control": "1-0"}
ANOTHER = {"version": "v2", "sha256": "b" * 64, "file": "model.ubj"}
NOTHING_NEW = {
    "a key that was found later": [bar(21, 'q:"\u00e9'), bar(22, "q:other")],
    "a rejection that the entry explains": [rejected("ohlc")],
    "an event of no place": [event("feed_unhealthy", reject_ratio=0.1)],
    "a vote with a field of its own": [
        Recorded(
            "votes:xgboost",
            "q:votes:xgboost",
            "21-0",
            {b"data": b'{"bar_id":"A|1m|21","version":"v1","reason":null}', b"trace": b"abc"},
        )
    ],
    "an order": [Recorded("control", "q:control", "21-0", {b"op": b"mute"})],
}
SOMETHING_NEW = {
    "another version": [entry("votes:xgboost", 21, bar_id="A|1m|21", version="v2", reason=None)],
    "the first vote of an agent": [entry("votes:patchtst", 21, bar_id="A|1m|21", version="v1", reason=None)],
    "a canary's vote": [entry("votes:xgboost_canary", 21, bar_id="A|1m|21", version="v2", reason=None)],
    "a stale vector": [entry("features", 21, bar_id="A|1m|21", values={}, flags=["stale"])],
    "a stale signal": [entry("signals", 21, bar_id="A|1m|21", status="stale", votes={})],
    "a missed deadline": [
        entry("signals", 21, bar_id="A|1m|21", status="ok",
              votes={"nhits": {"action": "ABSTAIN", "reason": "deadline_missed"}})
    ],
    "a rejection by the clock": [rejected("future")],
    "a start": [event("started", agents={"xgboost": ANOTHER}, position=POSITION)],
    "an order that took effect": [event("agent_muted", position=POSITION)],
    "a promotion": [event("promoted", position=POSITION, **ANOTHER)],
    "an artifact that was named": [event("reload", **ANOTHER)],
    "an accepted gap": [
        entry("events", 21, kind="gap", agent="", reason="lost", evidence={"key": "q:bars", "after": "20-0", "lost": 3})
    ],
    "a loss": [Lost("votes:xgboost", "q:votes:xgboost", "20-0", 2)],
    "a loss of bars": [Lost("bars", "q:bars", "20-0", 2)],
}  # fmt: skip


@pytest.mark.parametrize("items", (NOTHING_NEW | SOMETHING_NEW).values(), ids=(NOTHING_NEW | SOMETHING_NEW).keys())
def test_an_outline_by_notes_is_that_of_every_line(
    items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [[*frame_of(number), *(items if number == NEWS else ())] for number in range(FRAMES)]
    told, read = read_of(write(tmp_path / "noted.jsonl.zst", frames), monkeypatch)
    every, all_of_it = read_of(write(tmp_path / "plain.jsonl.zst", frames, unnoted), monkeypatch)
    assert told == every
    assert told.bars == FRAMES * BARS + sum(i.stream == "bars" and isinstance(i, Recorded) for i in items)
    assert all_of_it == FRAMES
    # The first frame says who votes; after another version's votes those of the first are news again.
    assert read == 1 + (items in SOMETHING_NEW.values()) + (items is SOMETHING_NEW["another version"])


@pytest.mark.parametrize("rules", [RULES + 1, 0])
def test_a_note_by_other_rules_is_not_believed(rules: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "other.jsonl.zst", [frame_of(0), frame_of(1)], lambda _: {"rules": rules})
    outline, read = read_of(file, monkeypatch)
    assert (outline.bars, read) == (2 * BARS, 2)
    assert contents_of(file) == (2 * BARS, ["q:bars"])


STRANGE = [
    entry("votes:xgboost", 21, foo=1),
    entry("events", 21, kind="started", evidence={}, agent="", reason=""),
    entry("events", 21, kind="started", evidence=[1], agent="", reason=""),
    Recorded("events", "q:events", "21-0", {b"x": b"1"}),
    Recorded("signals", "q:signals", "21-0", {b"data": b'{"status":"stale"}'}),
    Recorded("rejected", "q:rejected", "21-0", {b"reason": b"future"}),
]


@pytest.mark.parametrize("item", STRANGE, ids=str)
@pytest.mark.parametrize("note", [note_of, unnoted])
def test_what_no_worker_wrote_is_named_and_its_recording_can_be_published(
    item: Recorded, note: NoteOf, tmp_path: Path
) -> None:
    file = write(tmp_path / "x.jsonl.zst", [frame_of(0), [*frame_of(1), item]], note)
    assert contents_of(file) == (2 * BARS, ["q:bars"])
    with pytest.raises(RecordingError, match=rf"{item.key} 21-0: no worker wrote this entry"):
        read_outline(Recording(file))


def test_keys_are_told_by_their_names(tmp_path: Path) -> None:
    frames = [frame_of(0), [*frame_of(1), bar(21, 'q:"\u00e9')]]
    assert read_outline(Recording(write(tmp_path / "x.jsonl.zst", frames))).keys == ['q:"\u00e9', "q:bars"]


@pytest.mark.parametrize(
    "fields", [{b"data": b"[]"}, {b"data": b"no JSON"}, {}, {b"\xff": b"\xff"}, {b"data": b'{"kind":1}'}], ids=str
)
@pytest.mark.parametrize("stream", ["events", "signals", "votes:xgboost", "features", "rejected", "bars"])
def test_what_strangers_append_is_recorded_all_the_same(
    stream: str, fields: dict[bytes, bytes], tmp_path: Path
) -> None:
    items = [bar(1), Recorded(stream, f"q:{stream}", "2-0", fields)]
    assert list(Recording(write(tmp_path / "x.jsonl.zst", [items]))) == items


def test_a_workers_day_has_the_outline_of_its_every_line(day: tuple[Scene, Path], tmp_path: Path) -> None:
    _, file = day
    plain = rewrite(file, tmp_path / "plain.jsonl.zst", lambda item: [item])
    assert read_outline(Recording(file)) == read_outline(Recording(plain))
    assert plain.stat().st_size < file.stat().st_size
