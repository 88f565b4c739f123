"""Messages of the streams become the batches that wrote them, bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from streams.codec import to_json
from streams.contracts import FEATURE_SETS, V3
from streams.formats import FormatReader
from streams.messages import Entry
from streams.store import StoreMisuseError
from streams.validation import Limits
from tests.worker.small import LAST_TS, batches, falling, market, seat
from worker.batches import Vectors
from worker.decoding import SeriesBook, ballot_of, read_vectors, read_vote
from worker.encoding import feature_messages, signal_messages, vote_messages
from worker.pipeline import Pipeline
from worker.stages.features import FeatureStage

V6 = FEATURE_SETS["v6"]
LIMITS = Limits(max_gap_bars=3, max_bar_age_intervals=20)


def entries_of(vectors: Vectors) -> list[Entry]:
    """As the streams hold them."""
    data = [to_json(message) for message in feature_messages(vectors)]
    return [Entry("t:features", i, {b"data": d}) for i, d in zip(vectors.accepted.ids, data, strict=True)]


def gappy(symbols: int, bars: int) -> list[Entry]:
    """A market with a long gap in each symbol, and some entries that are refused."""
    kept = [e for n, e in enumerate(market(symbols, bars)) if not 120 * symbols <= n < 126 * symbols]
    broken = [Entry(e.key, e.id, {**e.fields, b"high": b"-1"}) if n % 11 == 0 else e for n, e in enumerate(kept)]
    return [*kept[:600], *broken[600:]]


def test_vectors_come_back_as_they_were() -> None:
    """Restarts, stale and withheld bars, and a second set that warms up later: nothing is lost on the way."""
    warmup = {"v3": 60, "v6": 90}
    stage = FeatureStage(LIMITS, always=("v6",), fixed=True, warmup_bars=warmup, reader=FormatReader())
    book, seen = SeriesBook(), set()
    for some in batches(gappy(4, 260), 97):
        made = stage.process(some, LAST_TS)
        entries = entries_of(made)
        seen |= {flag for e in entries for flag in json.loads(e.fields[b"data"]).get("flags", ())}
        read = read_vectors(entries, book, (V3, V6))
        assert read.names == made.names
        assert np.array_equal(read.values, np.where(np.isfinite(made.values), made.values, np.nan), equal_nan=True)
        for name in ("ids", "arrived_ms", "bars"):
            assert getattr(read.accepted, name) == getattr(made.accepted, name)
        for name in ("rows", "ohlcv", "restart", "stale", "withheld"):
            assert np.array_equal(getattr(read.accepted, name), getattr(made.accepted, name)), name
        assert np.array_equal(read.index, made.index)
        assert {name: column.tolist() for name, column in read.ready.items()} == {
            name: column.tolist() for name, column in made.ready.items()
        }
    assert seen == {"restart", "stale", "withheld", "warming:v6"}


def test_a_vector_without_flags_has_no_such_key() -> None:
    stage = FeatureStage(warmup_bars={"v3": 60}, reader=FormatReader())
    vectors = stage.process(market(1, 70), LAST_TS)
    assert not any("flags" in message for message in feature_messages(vectors))


def test_ballots_come_back_as_they_were() -> None:
    """From the votes the same signals: the ballots behind them are the same."""
    pipeline = Pipeline([seat("xgboost"), seat("lightgbm", falling)], quorum=1, warmup_bars={"v3": 60})
    result = pipeline.process(market(2, 70), LAST_TS)
    pipeline.voting.close()
    votes = [[json.loads(to_json(m)) for m in vote_messages(result.voted_bars, b)] for b in result.ballots]
    read = [ballot_of(b.agent, v, b.weight) for b, v in zip(result.ballots, votes, strict=True)]
    again = Pipeline([seat("xgboost"), seat("lightgbm", falling)], quorum=1, warmup_bars={"v3": 60})
    signals, _ = again.consensus.process(result.vectors, read, {})
    again.voting.close()
    from dataclasses import replace

    assert list(map(to_json, signal_messages(replace(result, decided_on=read, signals=signals)))) == list(
        map(to_json, signal_messages(result))
    )


@pytest.mark.parametrize("data", [b"{}", b"no json", b"[]", b'{"values":[],"contracts":{}}'])
def test_what_is_no_vector_stops_the_stage(data: bytes) -> None:
    with pytest.raises(StoreMisuseError, match=r"t:features 1-0: .*use another --namespace"):
        read_vectors([Entry("t:features", "1-0", {b"data": data})], SeriesBook())
    with pytest.raises(StoreMisuseError, match="it is no vote"):
        read_vote(Entry("t:votes:nhits", "1-0", {b"data": data}))


def test_vectors_of_other_formulas_stop_the_stage() -> None:
    stage = FeatureStage(warmup_bars={"v3": 60}, reader=FormatReader())
    (entry, *_) = entries_of(stage.process(market(1, 2), LAST_TS))
    other = entry.fields[b"data"].replace(V3.contract.encode(), b"0" * 64)
    with pytest.raises(StoreMisuseError, match=r"has the contract 000000000000, .* run the same build for every stage"):
        read_vectors([Entry(entry.key, entry.id, {b"data": other})], SeriesBook())


def test_a_book_is_restored_with_its_numbers_and_its_warmth() -> None:
    book = SeriesBook()
    assert [book.row(symbol, "1m") for symbol in ("B", "A", "B")] == [0, 1, 0]
    book.note(1, frozenset({"v3"}))
    book.rewarm_all()
    fields = dict(book.changes())
    again = SeriesBook()
    again.restore(fields)
    assert [again.row(symbol, "1m") for symbol in ("A", "B", "C")] == [1, 0, 2]
    assert again.is_warm("v3")
    assert not again.is_warm("v6")
    assert [again.restarts(row) for row in (0, 0, 1, 2)] == [True, False, True, False]
