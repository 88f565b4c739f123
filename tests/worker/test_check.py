"""`quartet check`: what it says of real streams and real artifacts, and that it leaves no trace."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from streams.keys import Keys
from streams.redis import RedisStore, connect
from tests.formats.samples import BARS, golden
from tests.helpers import LIMIT_S, environment, free_port, wait_for
from worker.cli.app import invoke
from worker.logs import make_logger
from worker.service import Options
from worker.serving import serve
from worker.settings import Settings
from worker.training.market import generate
from worker.training.train import train_agents

TREES = ("xgboost", "lightgbm")
FIRST_MS = 1_750_000_020_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real tree models, quickly trained."""
    folder = tmp_path_factory.mktemp("models")
    train_agents(generate(4, 700, 3, signal="planted").bars(), folder, agents=TREES, seed=1)
    return folder


class Desk:
    """A namespace, and `quartet check` run on it."""

    def __init__(self, url: str, namespace: str, models: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.client = redis.Redis.from_url(url)
        self.url, self.namespace, self.models, self.capfd = url, namespace, models, capfd
        self.key = f"{namespace}:bars"

    def publish(self, *fields: dict[str, object], key: str | None = None) -> None:
        """A minute between entries, by their IDs."""
        for number, entry in enumerate(fields):
            self.client.xadd(key or self.key, entry, id=f"{FIRST_MS + 60_000 * number}-0")

    def check(self, *arguments: str) -> tuple[int, str]:
        before = self.everything()
        flags = ["--redis", self.url, "--namespace", self.namespace, "--models", str(self.models)]
        code = invoke(["check", *flags, *arguments])
        assert self.everything() == before, "checking changed the server"
        return code, self.capfd.readouterr().out

    def work(self) -> None:
        """A worker, as `quartet run --until-idle` in this process, which has its imports behind it."""
        settings = Settings(
            redis=self.url, namespace=self.namespace, models=self.models, http_port=0, agents=TREES, quorum=2
        )
        serve(settings, Options(until_idle_s=0.1), make_logger("error"))

    def report(self, *arguments: str) -> dict:
        return json.loads(self.check("--json", *arguments)[1])

    def everything(self) -> dict[bytes, bytes | None]:
        return {key: self.client.dump(key) for key in sorted(self.client.scan_iter(f"{self.namespace}*"))}


@pytest.fixture
def desk(valkey, namespace, models, capfd, monkeypatch) -> Desk:
    monkeypatch.setenv("QUARTET_QUORUM", "2")
    return Desk(valkey, namespace, models, capfd)


def bar(k: int, **changes: object) -> dict[str, object]:
    price = 100 + k % 7
    prices = {"open": price, "high": price + 2, "low": price - 2, "close": price + 1, "volume": 5}
    return {"symbol": "A", "ts": FIRST_MS + 60_000 * k, **prices, **changes}


def test_enough_bars_and_models_are_ready(desk: Desk):
    desk.publish(*(bar(k) for k in range(120)))
    code, text = desk.check()
    assert code == 0
    assert text.splitlines()[-1] == "READY: 2 of 4 would vote"
    assert "native (120)" in text
    assert "nhits      would not vote: no_artifact" in text


def test_gaps_duplicates_rejects_and_growth_are_counted(desk: Desk):
    bars = [bar(k) for k in range(130) if k not in (50, 51, 90)]
    desk.publish(*bars, bars[-1], bar(200, high=1), bar(201, closed="false"), bar(130))
    stream = desk.report()["streams"][0]
    assert stream["outcomes"] == {"accepted": 128, "duplicate": 1, "rejected": 1, "unclosed": 1}
    assert stream["rejects"] == {"ohlc": 1}
    assert (stream["gaps"], stream["missing_bars"], stream["series"], stream["longest"]) == (2, 3, 1, 128)
    assert stream["last_bar"] == f"A|1m|{FIRST_MS + 60_000 * 130}"
    assert stream["last_bar_age_s"] == pytest.approx(time.time() - (FIRST_MS + 60_000 * 131) / 1000, abs=60)
    assert stream["entries_per_day"] == 1440
    assert stream["trimmed"] is False


def test_too_few_bars_say_how_many_are_needed(desk: Desk):
    desk.publish(*(bar(k) for k in range(40)))
    code, text = desk.check()
    assert code == 1
    assert text.splitlines()[-1].startswith("NOT READY: 0 of 4 would vote, the quorum is 2: a series needs 100 bars")


def test_a_stream_that_was_read_and_trimmed_counts_with_what_the_state_holds(desk: Desk):
    desk.publish(*(bar(k) for k in range(120)))
    desk.work()
    desk.client.xtrim(desk.key, maxlen=10, approximate=False)
    stream = desk.report()["streams"][0]
    assert (stream["longest"], stream["waiting"], stream["trimmed"]) == (120, 0, True)
    assert desk.check()[0] == 0


def test_updates_of_forming_bars_are_no_history(desk: Desk):
    """20 bars, each after 59 updates, are 20 bars, before a worker has read them and after."""
    updates = [bar(k, closed="false") for k in range(20) for _ in range(59)]
    closed = [bar(k) for k in range(20)]
    desk.publish(*(entry for k in range(20) for entry in (*updates[59 * k : 59 * k + 59], closed[k])))
    for worked in (False, True):
        if worked:
            desk.work()
        code, text = desk.check()
        assert code == 1
        assert "a series needs 100 bars" in text.splitlines()[-1]
        assert desk.report()["streams"][0]["longest"] == 20


def test_a_gap_after_which_a_series_warms_up_again_starts_the_count_anew(desk: Desk):
    desk.publish(*(bar(k) for k in range(150)), *(bar(k) for k in range(300, 340)))
    assert desk.report()["streams"][0]["longest"] == 40
    code, text = desk.check()
    assert code == 1
    assert "a series needs 100 bars" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ([], "NOT READY: nothing is in"),
        ([{"foo": "bar"}] * 3, "fits no format, found the fields foo; tried cryptofeed"),
        ([bar(k, closed="false") for k in range(3)], "set inputs.<key>.closed"),
        ([bar(k, **({"low": 999} if k % 10 == 0 else {})) for k in range(250)], "over 5 % of the last entries"),
    ],
    ids=["empty", "unknown", "never-closed", "sick"],
)
def test_what_stands_in_the_way_is_the_last_line(desk: Desk, entries, line):
    desk.publish(*entries)
    code, text = desk.check()
    assert code == 1
    assert line in text.splitlines()[-1]
    assert text.splitlines()[-1].startswith("NOT READY: ")


def test_a_folder_without_models_says_how_to_train(desk: Desk, tmp_path):
    desk.models = tmp_path
    desk.publish(*(bar(k) for k in range(120)))
    code, text = desk.check()
    assert code == 1
    assert f"quartet train --bars FILE --agent all --models {tmp_path}" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("sample", "formats", "outcomes"),
    [
        ("cryptofeed-2.4.1", {"cryptofeed": 2 * BARS}, {"accepted": BARS, "unclosed": BARS}),
        ("nautilus-1.221-json", {"nautilus": BARS + 1}, {"accepted": BARS, "rejected": 1}),
        (
            "nautilus-1.221-msgpack-one-stream",
            {"nautilus": BARS + 1, "nautilus, other messages": BARS},
            {"accepted": BARS, "rejected": 1, "unclosed": BARS},
        ),
        ("nautilus-1.221-binance", {"nautilus": BARS}, {"accepted": BARS}),
    ],
)
def test_the_format_of_each_producer_is_named(desk: Desk, sample, formats, outcomes):
    entries = [e for e in golden(sample) if "KRAKEN" not in e.key and "data.trades" not in e.key]
    for entry in entries:
        desk.client.xadd(f"{desk.namespace}-{entry.key}", dict(entry.fields), id=entry.id)
    report = desk.report("--bars", f"{desk.namespace}-*")
    assert [stream["formats"] for stream in report["streams"]] == [formats]
    assert [stream["outcomes"] for stream in report["streams"]] == [outcomes]


def test_binance_and_ccxt_are_named_too(desk: Desk, monkeypatch):
    rule = {f"{desk.namespace}-ccxt": {"symbol": "BTC/USDT", "interval": "1m"}}
    monkeypatch.setenv("QUARTET_INPUTS", json.dumps(rule))
    t = FIRST_MS
    kline = {"t": t, "T": t + 59_999, "s": "X", "i": "1m", "o": "1", "h": "2", "l": "1", "c": "2", "v": "1", "x": True}
    desk.publish({"data": json.dumps({"e": "kline", "s": "X", "k": kline})}, key=f"{desk.namespace}-binance")
    desk.publish(
        *({"data": json.dumps([t + 60_000 * k, 1, 2, 1, 2, 1])} for k in range(3)), key=f"{desk.namespace}-ccxt"
    )
    streams = desk.report("--bars", f"{desk.namespace}-binance,{desk.namespace}-ccxt")["streams"]
    assert [s["formats"] for s in streams] == [{"binance": 1}, {"ccxt": 3}]
    assert [s["outcomes"] for s in streams] == [{"accepted": 1}, {"unclosed": 1, "accepted": 2}]


def test_a_key_that_is_no_stream_is_told(desk: Desk):
    desk.client.zadd(f"{desk.namespace}-candles-A", {"x": 1})
    _, text = desk.check("--bars", f"{desk.namespace}-candles-*")
    assert f"{desk.namespace}-candles-A is a zset, not a stream" in text


def test_nobody_on_the_port_is_exit_code_3(capfd):
    assert invoke(["check", "--live", "--http-port", str(free_port())]) == 3
    assert "no worker answers" in capfd.readouterr().err


def test_a_worker_reads_a_pattern_takes_up_new_keys_and_passes_its_health_check(desk: Desk, tmp_path, capfd):
    """One life of `quartet run --bars PATTERN` and a second one after it, with `check --live` beside."""
    port = free_port()
    first, second, wrong = (f"{desk.namespace}-candles-{name}" for name in "ABC")
    store = RedisStore(connect(desk.url), Keys(desk.namespace))

    def consumed() -> dict[str, int]:
        return {key: at.consumed for key, at in store.load(()).position.inputs.items()}

    def run() -> subprocess.Popen:
        flags = ["--bars", f"{desk.namespace}-candles-*", "--redis", desk.url, "--namespace", desk.namespace,
                 "--models", str(desk.models), "--http-port", str(port)]  # fmt: skip
        env = environment({"QUARTET_QUORUM": "2", "QUARTET_AGENTS": ",".join(TREES)})
        with (tmp_path / "run.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "worker", "run", *flags], cwd=tmp_path, env=env, stdout=log, stderr=log
            )

    desk.client.zadd(wrong, {"x": 1})
    desk.publish(*(bar(k) for k in range(30)), key=first)
    worker = run()
    try:
        wait_for(lambda: worker.poll() is not None or consumed() == {first: 30})
        desk.publish(*(bar(k, symbol="B") for k in range(20)), key=second)
        wait_for(lambda: worker.poll() is not None or consumed() == {first: 30, second: 20})
        assert invoke(["check", "--live", "--http-port", str(port)]) == 0
        assert "healthy, not ready: " in capfd.readouterr().out
    finally:
        worker.send_signal(signal.SIGTERM)
    assert worker.wait(LIMIT_S) == 0, (tmp_path / "run.log").read_text()
    assert wrong in (tmp_path / "run.log").read_text()
    assert invoke(["check", "--live", "--http-port", str(port)]) == 3

    for key, symbol, k in ((first, "A", 30), (second, "B", 20)):
        desk.client.xadd(key, bar(k, symbol=symbol))
    worker = run()
    try:
        wait_for(lambda: worker.poll() is not None or consumed() == {first: 31, second: 21})
    finally:
        worker.send_signal(signal.SIGTERM)
    assert worker.wait(LIMIT_S) == 0, (tmp_path / "run.log").read_text()
    features = [json.loads(f[b"data"])["bar_id"] for _, f in desk.client.xrange(f"{desk.namespace}:features")]
    assert sorted(features) == sorted(set(features))
    assert len(features) == 31 + 21
