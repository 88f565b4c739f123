"""The server dies, loses its latest writes, goes away, or was never there."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import urllib.error
import urllib.request

import pytest
import redis

from streams.keys import Keys
from streams.redis import RedisStore, connect
from streams.validation import Limits
from tests.chaos.proxy import proxy
from tests.chaos.scene import TREES, assert_same, market, until
from tests.chaos.servers import Server
from tests.helpers import LIMIT_S, free_port, wait_for
from worker.features.bank import FeatureBank
from worker.intake import Intake
from worker.pipeline import PARTS
from worker.top import Samples

ENTRIES = market(4, 250)
CUTS = 60


@pytest.fixture(scope="module")
def calm(workers, models, tmp_path_factory):
    """An uninterrupted run over `ENTRIES`: its outputs, and the files of its stopped server."""
    from tests.chaos.scene import Stage

    folder = tmp_path_factory.mktemp("calm")
    with Server("redis", folder / "server", fsync="always") as server:
        stage = Stage(workers, server.url, "q", models, folder, TREES, {"QUARTET_BATCH_SIZE": "16"})
        stage.feed(ENTRIES)
        stage.finish()
        outputs = stage.outputs()
    return outputs, server


@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_fifteen_deaths_of_the_server_change_nothing(stage, calm, tmp_path, kind, needs):
    """The worker lives on. What the server lost of its last second is emitted again under the same IDs."""
    if kind == "redis":
        needs("redis-server")
    rng = random.Random(31)
    with Server(kind, tmp_path / "server") as server:
        # Bar by bar: a worker that is let run while this process waits for its turn must not be through soon.
        chain = stage(server.url, TREES, QUARTET_BATCH_SIZE="1")
        chain.feed(ENTRIES)
        life = chain.start("--until-idle", "1")
        in_work = 0
        for _ in range(15):
            before = chain.progress()
            until(lambda before=before: chain.progress() > before or life_is_over(chain), life)
            time.sleep(rng.random() * 0.02)
            in_work += chain.progress() < len(ENTRIES)
            server.kill()
            server.start()
        assert life.wait() == 0, life.text
        assert in_work > 10, "deaths of an idle server prove nothing"
        assert "nothing is lost, trying again" in life.text
        assert_same(chain.outputs(), calm[0])


def life_is_over(chain) -> bool:
    return chain.progress() == len(ENTRIES)


def test_an_append_only_file_cut_anywhere_holds_whole_batches(calm, tmp_path):
    """The state, the position and every output are those of one and the same moment of the calm run."""
    outputs, server = calm
    rng = random.Random(32)
    size = server.append_only_file().stat().st_size
    moments = set()
    for number in range(CUTS):
        copy = Server("redis", tmp_path / str(number))
        shutil.copytree(server.directory, copy.directory)
        with copy.append_only_file().open("r+b") as file:
            file.truncate(rng.randrange(size // 4, size))
        with copy:
            moments.add(_moment(copy.url, outputs))
        shutil.rmtree(copy.directory)
    assert len(moments) > CUTS / 3, "the cuts fell into few batches"


def _moment(url: str, outputs) -> int:
    """Check everything that is there against the position, which is returned as a count of bars."""
    store = RedisStore(connect(url), Keys("q"))
    snapshot = store.load(PARTS)
    done = snapshot.position.inputs[store.keys.bars].consumed if snapshot.position.inputs else 0
    for stream, entries in outputs.items():
        found = [(entry_id, fields[b"data"]) for entry_id, fields in store.client.xrange("q" + stream)]
        last = f"{snapshot.position.last_output_id}".encode()
        assert found == [entry for entry in entries if _order(entry[0]) <= _order(last)], stream
    intake, bank = Intake(Limits()), FeatureBank()
    intake.restore(snapshot.state["series"])
    bank.restore(snapshot.state["features"])
    assert sum(int(row["count"]) for row in bank._store.state) == done
    return done


def _order(entry_id: bytes) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split(b"-")))


def test_a_server_that_lost_writes_and_input_is_resumed_from_and_fed_again(stage, calm, tmp_path):
    """A running worker meets an older copy of its server: it steps back, says so, and ends with the same bytes."""
    old = tmp_path / "old"
    with Server("redis", tmp_path / "server", fsync="always") as server:
        chain = stage(server.url, TREES)
        chain.feed(ENTRIES[:500])
        life = chain.start()
        until(lambda: chain.progress() == 500, life)
        shutil.copytree(server.directory, old)
        chain.feed(ENTRIES[500:800], 500)
        until(lambda: chain.progress() == 800, life)
        server.kill()
        shutil.rmtree(server.directory)
        old.rename(server.directory)
        server.start()
        until(lambda: '"rewind"' in life.text, life)
        chain.feed(ENTRIES[500:], 500)
        until(lambda: chain.progress() == len(ENTRIES), life)
        assert life.terminate() == 0, life.text
        assert_same(chain.outputs(), calm[0])
        with redis.Redis.from_url(server.url) as client:
            kinds = [json.loads(fields[b"data"]) for _, fields in client.xrange(chain.keys.events)]
        assert [event["reason"] for event in kinds if event["kind"] == "recovery"] == ["rewind"]


def test_a_server_that_is_away_makes_the_worker_unready_and_loses_nothing(stage, calm, tmp_path):
    with Server("valkey", tmp_path / "server") as server, proxy(server.url) as between:
        chain = stage(between.url, TREES)
        chain.feed(ENTRIES[:500])
        life = chain.start()
        url = address(life)
        until(lambda: unmet(url) == FROM_LONG_AGO, life)
        between.go_away()
        until(lambda: unmet(url) == FROM_LONG_AGO | {"redis"}, life)
        time.sleep(5)
        assert life.alive(), "it waits"
        between.come_back()
        chain.feed(ENTRIES[500:], 500)
        until(lambda: chain.progress() == len(ENTRIES), life)
        until(lambda: unmet(url) == FROM_LONG_AGO, life)
        assert life.terminate() == 0
        assert_same(chain.outputs(), calm[0])


FROM_LONG_AGO = {"fresh_bar"}
"""What is always unmet here: by their IDs these bars arrived in 2025."""


def address(life) -> str:
    """Where a worker serves its metrics and health."""
    until(lambda: "metrics and health" in life.text, life)
    return json.loads(next(line for line in life.text.splitlines() if "metrics and health" in line))["url"]


def unmet(url: str) -> set[str]:
    """The conditions that keep a worker from being ready."""
    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.urlopen(f"{url}/readyz", timeout=LIMIT_S)
    assert answer.value.code == 503
    return {name for name, condition in json.load(answer.value)["conditions"].items() if not condition["ok"]}


def commits(url: str, result: str) -> float:
    """How often the worker's commits came to `result`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=LIMIT_S) as answer:
        return Samples(answer.read().decode()).one("quartet_commits_total", result=result) or 0.0


def test_commits_whose_replies_are_lost_are_counted_and_change_nothing(stage, calm, tmp_path):
    with Server("valkey", tmp_path / "server") as server, proxy(server.url) as between:
        chain = stage(between.url, TREES, QUARTET_BATCH_SIZE="4")
        life = chain.start()
        url = address(life)
        chain.url = server.url  # the worker alone is behind the proxy
        chain.feed(ENTRIES)
        for between.only in [b"EVALSHA"] * 6 + [b""] * 6:  # the replies to commits, then to whatever is asked
            before, between.fault = chain.progress(), "cut"
            until(lambda: between.fault is None or life_is_over(chain), life)
            until(lambda before=before: chain.progress() > before or life_is_over(chain), life)
        between.fault = None
        until(lambda: life_is_over(chain), life)
        assert commits(url, "lost_reply") >= 2
        assert commits(url, "unavailable") >= commits(url, "lost_reply"), "each was first an answer that never came"
        assert life.terminate() == 0, life.text
        assert_same(chain.outputs(), calm[0])


def test_a_worker_told_to_stop_gives_up_on_a_server_that_is_gone_but_not_at_one_lost_reply(stage, tmp_path):
    with Server("valkey", tmp_path / "server") as server, proxy(server.url) as between:
        chain = stage(between.url, TREES)
        chain.feed(ENTRIES[:300])
        for fate, code in (("cut", 0), ("gone", 3)):
            life = chain.start()
            until(lambda life=life: "ensemble ready" in life.text, life)
            if fate == "cut":
                between.fault = "cut"
            else:
                between.go_away()
            assert life.terminate() == code, life.text
        assert "error: Redis is not reachable" in life.text


def test_a_server_that_is_not_there_at_the_start_is_one_line_and_exit_code_3(stage):
    life = stage(f"redis://127.0.0.1:{free_port()}/0", TREES).start()
    assert life.wait() == 3
    assert life.text.startswith("error: ")
    assert life.text.count("\n") == 1


def test_a_server_out_of_memory_is_waited_for(stage, calm, tmp_path):
    with Server("redis", tmp_path / "server") as server:
        chain = stage(server.url, TREES)
        chain.feed(ENTRIES[:500])
        life = chain.start()
        until(lambda: chain.progress() == 500, life)
        os.kill(life.pid, signal.SIGSTOP)
        with redis.Redis.from_url(server.url) as client:
            chain.feed(ENTRIES[500:], 500)
            client.config_set("maxmemory", 1)
            os.kill(life.pid, signal.SIGCONT)
            until(lambda: "maxmemory" in life.text, life)
            assert chain.progress() == 500
            url = address(life)
            wait_for(lambda: commits(url, "out_of_memory") > 0)
            assert commits(url, "error") == commits(url, "read_only") == commits(url, "fenced") == 0
            client.config_set("maxmemory", 0)
        wait_for(lambda: chain.progress() == len(ENTRIES))
        assert life.terminate() == 0
        assert_same(chain.outputs(), calm[0])
