"""What real publishers wrote becomes the bars they were given, and every entry has one outcome."""

from __future__ import annotations

import pytest

from streams.formats import FormatReader, InputRule, recognise
from streams.validation import Limits
from tests.formats.samples import BARS, FIRST_OPEN_MS, NOW_MS, expected_ohlcv, golden
from worker.intake import Accepted, Intake

NAUTILUS = ("nautilus-1.221-json", "nautilus-1.221-msgpack-one-stream", "nautilus-1.221-iso-one-stream")


def accept(entries, *rules: InputRule) -> Accepted:
    return Intake(Limits(), reader=FormatReader(rules)).accept(entries, NOW_MS)


def check_bars(accepted: Accepted, symbol: str) -> None:
    assert [bar.ts for bar in accepted.bars] == [FIRST_OPEN_MS + 60_000 * k for k in range(BARS)]
    assert [bar.ohlcv for bar in accepted.bars] == [expected_ohlcv(k) for k in range(BARS)]
    assert {(bar.symbol, bar.interval) for bar in accepted.bars} == {(symbol, "1m")}


def of(exchange: str):
    return [e for e in golden("cryptofeed-2.4.1") if f"-{exchange}-" in e.key]


def test_cryptofeeds_binance_candles_are_used_only_once_they_are_closed():
    accepted = accept(of("BINANCE"))
    check_bars(accepted, "BTC-USDT")
    assert dict(accepted.outcomes) == {"accepted": BARS, "unclosed": BARS}


def test_cryptofeeds_stop_is_the_end_less_1_ms_and_does_not_move_the_open_time():
    assert of("BINANCE")[0].fields[b"stop"] == b"1700000099.999"
    assert recognise(of("BINANCE")[0])[1][0]["ts"] == FIRST_OPEN_MS


def test_candles_of_an_adapter_that_never_says_closed_are_not_used_unless_it_is_trusted():
    assert dict(accept(of("KRAKEN")).outcomes) == {"unclosed": BARS}
    trusted = accept(of("KRAKEN"), InputRule("candles-KRAKEN-*", closed="always"))
    assert dict(trusted.outcomes) == {"accepted": BARS}
    assert trusted.bars[0].ts == FIRST_OPEN_MS
    assert [bar.open for bar in trusted.bars] == [float(f"{expected_ohlcv(k)[0]}e-9") for k in range(BARS)]


def test_candles_of_such_an_adapter_can_be_closed_by_the_next_one():
    accepted = accept(of("KRAKEN"), InputRule("candles-KRAKEN-*", closed="next"))
    assert dict(accepted.outcomes) == {"accepted": BARS - 1, "unclosed": 1}
    assert accepted.bars[-1].ts == FIRST_OPEN_MS + 60_000 * (BARS - 2)


def test_small_prices_come_in_exponent_notation():
    assert b"e-05" in of("KRAKEN")[0].fields[b"open"]


@pytest.mark.parametrize("name", NAUTILUS)
def test_nautilus_bars_are_named_by_their_open_time_in_every_encoding(name):
    check_bars(accept(golden(name)), "BTCUSDT-PERP.BINANCE")


@pytest.mark.parametrize("name", NAUTILUS)
def test_a_nautilus_revision_repeats_the_close_time_and_is_rejected_as_one(name):
    accepted = accept(golden(name))
    assert [reject.reason for reject in accepted.rejects] == ["revision"]
    assert accepted.rejects[0].entry.fields[b"topic"].startswith(b"data.bars.")


@pytest.mark.parametrize("name", NAUTILUS)
def test_other_messages_of_nautilus_are_counted_and_do_not_harm_the_feed(name):
    entries = golden(name)
    intake = Intake(Limits())
    accepted = intake.accept(entries, NOW_MS)
    trades = sum(e.fields[b"topic"].startswith(b"data.trades") for e in entries)
    assert trades == BARS
    assert dict(accepted.outcomes) == {"accepted": BARS, "unclosed": trades, "rejected": 1}
    assert sum(accepted.outcomes.values()) == len(entries)
    assert intake.health.reject_ratio == 1 / (BARS + 1)


def test_msgpack_payloads_are_not_utf_8_and_are_read_all_the_same():
    payload = golden("nautilus-1.221-msgpack-one-stream")[1].fields[b"payload"]
    with pytest.raises(UnicodeDecodeError):
        payload.decode()


def test_bars_of_nautilus_binance_adapter_close_1_ms_early_with_float_error_and_keep_their_open_time():
    entries = golden("nautilus-1.221-binance")
    assert b"1700000159999000064" in entries[1].fields[b"payload"]
    check_bars(accept(entries), "BTCUSDT-PERP.BINANCE")


@pytest.mark.parametrize(
    ("name", "format_"),
    [("cryptofeed-2.4.1", "cryptofeed"), *((name, "nautilus") for name in (*NAUTILUS, "nautilus-1.221-binance"))],
)
def test_each_sample_is_recognised_by_itself(name, format_):
    assert {recognise(entry)[0] for entry in golden(name)} == {format_}


@pytest.mark.parametrize("name", ["cryptofeed-2.4.1", *NAUTILUS, "nautilus-1.221-binance"])
def test_a_rule_for_another_key_changes_nothing_in_any_sample(name):
    entries = golden(name)
    plain, other = accept(entries), accept(entries, InputRule("another-*", closed="next", prefix="X:"))
    assert (plain.outcomes, plain.bars, plain.rejects) == (other.outcomes, other.bars, other.rejects)
