"""Files of bars: both formats give the same columns, and what is wrong is named by file, line and column."""

import numpy as np
import pandas as pd
import pytest

from worker.training.bars import BarFileError, read_bars
from worker.training.market import generate

HEADER = "symbol,ts,interval,open,high,low,close,volume\n"
GOOD = "BTC,1700000040000,1m,10,12,9,11,5\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="bars.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="module")
def frame():
    bars = generate(3, 40, seed=5).bars()
    columns = dict(zip("open high low close volume".split(), bars.ohlcv.T, strict=True))
    return pd.DataFrame({"symbol": bars.symbol, "ts": bars.ts, "interval": bars.interval, **columns})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_what_pandas_wrote_is_read_back_in_order_of_symbol_and_time(frame, tmp_path, suffix):
    path = tmp_path / f"bars.{suffix}"
    shuffled = frame.sample(frac=1, random_state=1)
    shuffled.to_csv(path, index=False) if suffix == "csv" else shuffled.to_parquet(path, index=False)
    bars = read_bars(path).bars
    expected = frame.sort_values(["symbol", "ts"])
    assert list(bars.symbol) == list(expected.symbol)
    np.testing.assert_array_equal(bars.ts, expected.ts)
    np.testing.assert_array_equal(bars.ohlcv, expected[["open", "high", "low", "close", "volume"]])


def test_a_file_without_interval_holds_minutes(frame, tmp_path):
    path = tmp_path / "bars.csv"
    frame.drop(columns="interval").to_csv(path, index=False)
    assert set(read_bars(path).bars.interval) == {"1m"}


def test_exact_repetitions_are_dropped_and_counted(write):
    file = read_bars(write(HEADER + GOOD + GOOD))
    assert (len(file.bars), file.repeated) == (1, 1)


def test_two_different_bars_of_one_time_are_refused_with_both_lines(write):
    with pytest.raises(BarFileError, match=r"line 2 and line 4: two different bars BTC\|1m\|1700000040000"):
        read_bars(write(HEADER + GOOD + GOOD.replace("BTC", "ETH") + GOOD.replace(",11,", ",10.5,")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("BTC,x,1m,10,12,9,11,5", r"bars.csv: line 3: type: ts is 'x', an integer of milliseconds was expected"),
        ("BTC,1700000100000,1m,10,,9,11,5", "line 3: missing_field: high is missing or empty"),
        ("BTC,1700000100000,1m,10,12,9,11,nan", "line 3: not_finite"),
        ("BTC,1700000100000,1m,10,1e999,9,11,5", "line 3: not_finite"),
        ("BTC,1700000100000,1m,10,12,-9,11,5", "line 3: price_sign"),
        ("BTC,1700000100000,1m,10,12,9,11,-5", "line 3: volume_sign"),
        ("BTC,1700000100000,1m,10,2e12,9,11,5", "line 3: magnitude"),
        ("BTC,1700000100000,1m,10,12,9,11,1e-310", "line 3: magnitude"),
        ("BTC,1700000100000,1m,10,12,9,13,5", "line 3: ohlc"),
        ("BTC,1700000100000,1m,10,9,12,11,5", "line 3: ohlc"),
        ("BTC,1700000100,1m,10,12,9,11,5", "line 3: unit"),
        ("BTC,1700000100000000,1m,10,12,9,11,5", "line 3: unit"),
        ("BTC,1700000100000000000,1m,10,12,9,11,5", "line 3: unit"),
        ("BTC,1700000100001,1m,10,12,9,11,5", "line 3: grid"),
        ("BTC,1700000100000,1x,10,12,9,11,5", "line 3: interval: '1x' is not a number with s, m, h or d"),
        ("B C,1700000100000,1m,10,12,9,11,5", "line 3: symbol: 'B C' is not 1 to 64 characters"),
        ("BTC,1700000100000,1m,10,12,9,11", "line 3: 7 fields where the header has 8"),
    ],
)
def test_a_bad_row_is_named_with_what_was_expected(write, row, message):
    with pytest.raises(BarFileError, match=message):
        read_bars(write(HEADER + GOOD + row + "\n"))


def test_zero_volume_passes(write):
    assert read_bars(write(HEADER + GOOD.replace(",5\n", ",0\n"))).bars.ohlcv[0, 4] == 0


def test_a_missing_column_is_named(write):
    with pytest.raises(BarFileError, match="line 1: no column volume; expected symbol ts"):
        read_bars(write("symbol,ts,open,high,low,close\nBTC,1,1,1,1,1\n"))


@pytest.mark.parametrize("name", ["bars.csv", "bars.parquet"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(BarFileError, match=f"{name}: no such file"):
        read_bars(tmp_path / name)


def test_another_suffix_is_refused(write):
    with pytest.raises(BarFileError, match=r"expected a .csv or .parquet file"):
        read_bars(write("{}", "bars.json"))


def test_a_file_with_only_a_header_has_no_bars(write):
    with pytest.raises(BarFileError, match="no bars"):
        read_bars(write(HEADER))


def test_an_empty_file_names_the_columns_it_needs(write):
    with pytest.raises(BarFileError, match="expected symbol ts interval open"):
        read_bars(write(""))


def test_bytes_that_are_no_parquet_are_refused(write):
    with pytest.raises(BarFileError, match="not a parquet file"):
        read_bars(write("hello", "bars.parquet"))


def test_parquet_timestamps_are_refused_because_their_unit_and_zone_are_a_guess(frame, tmp_path):
    path = tmp_path / "bars.parquet"
    frame.assign(ts=pd.to_datetime(frame.ts, unit="ms")).to_parquet(path, index=False)
    with pytest.raises(BarFileError, match="column ts: a timestamp; expected integers"):
        read_bars(path)


def test_without_pyarrow_the_extra_is_named(write, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BarFileError, match=r"pip install 'quartet-worker\[parquet\]'"):
        read_bars(write("x", "bars.parquet"))


def test_an_unclosed_bar_is_left_out_and_counted(write):
    header, row = HEADER.replace("volume", "volume,closed"), GOOD.strip()
    later = row.replace("040000", "100000")
    file = read_bars(write(f"{header}{row},true\n{later},false\n"))
    assert (len(file.bars), file.unclosed) == (1, 1)
