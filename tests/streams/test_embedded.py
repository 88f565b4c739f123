"""The embedded server: started once, found again, kept while it is used, and never torn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from streams import embedded
from tests.helpers import LIMIT_S, ROOT, answers, wait_for

STARTER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    import redis
    from streams import embedded
    server = embedded.start(Path(sys.argv[1]))
    redis.Redis.from_url(server.url).incr("starts")
    print(server.address.pid, flush=True)
    time.sleep(600)
    """
)


def starter(state_dir: Path) -> tuple[subprocess.Popen[str], int]:
    """Another process that starts the server and goes on using it; and the server's process id."""
    child = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(state_dir)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    return child, int(child.stdout.readline())


def end(child: subprocess.Popen[str], how: signal.Signals) -> None:
    child.send_signal(how)
    child.wait(LIMIT_S)
    assert child.stdout is not None
    child.stdout.close()


def test_it_keeps_its_data_in_an_append_only_file_and_never_evicts(tmp_path: Path) -> None:
    with embedded.start(tmp_path) as server, redis.Redis.from_url(server.url, decode_responses=True) as client:
        found = client.config_get("appendonly", "appendfsync", "maxmemory-policy", "save", "bind", "dir")
    assert found == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "save": "",
        "bind": "127.0.0.1",
        "dir": str(tmp_path / "valkey"),
    }


def test_it_serves_on_a_unix_socket_and_on_loopback_tcp(tmp_path: Path) -> None:
    with embedded.start(tmp_path) as server:
        assert server.url.startswith("unix://")
        assert server.tcp_url.startswith("redis://127.0.0.1:")
        with redis.Redis.from_url(server.url) as one, redis.Redis.from_url(server.tcp_url) as other:
            one.set("a", "1")
            assert other.get("a") == b"1"


@pytest.mark.parametrize("name", ["with space", "with%20percent", "with?mark", "umläut"])
def test_an_unusual_folder_name_makes_a_url_that_works(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with embedded.start(tmp_path / name) as server:
        assert answers(server.url)


def test_a_path_too_long_for_a_unix_socket_falls_back_to_tcp(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    with embedded.start(deep) as server:
        assert server.url == server.tcp_url
        assert embedded.find(deep) == server.url
        assert answers(server.url)


def test_a_clean_end_keeps_every_write_and_removes_the_server(tmp_path: Path) -> None:
    with embedded.start(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        for number in range(1000):
            client.rpush("list", number)
    assert embedded.find(tmp_path) is None
    with pytest.raises(ProcessLookupError):
        os.kill(server.address.pid, 0)
    with embedded.start(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.lrange("list", 0, -1) == [str(number).encode() for number in range(1000)]


def test_find_is_none_without_a_server_and_makes_nothing(tmp_path: Path) -> None:
    assert embedded.find(tmp_path / "absent") is None
    assert not (tmp_path / "absent").exists()


def test_a_second_start_uses_the_server_that_runs(tmp_path: Path) -> None:
    with embedded.start(tmp_path) as first, embedded.start(tmp_path) as second:
        assert (first.started, second.started) == (True, False)
        assert second.address == first.address


def test_the_last_user_stops_it_whoever_started_it(tmp_path: Path) -> None:
    first, second = embedded.start(tmp_path), embedded.start(tmp_path)
    assert first.close() is False
    assert answers(second.url)
    assert second.close() is True
    assert second.close() is False
    assert embedded.find(tmp_path) is None


def test_a_start_does_not_take_the_server_from_another_process(tmp_path: Path) -> None:
    child, pid = starter(tmp_path)
    try:
        with embedded.start(tmp_path) as server:
            assert (server.started, server.address.pid) == (False, pid)
        assert answers(server.url), "the other process still uses it"
    finally:
        end(child, signal.SIGKILL)
        with embedded.start(tmp_path):
            pass


def test_a_killed_starter_leaves_a_server_that_the_next_start_adopts_and_stops(tmp_path: Path) -> None:
    child, pid = starter(tmp_path)
    end(child, signal.SIGKILL)
    server = embedded.start(tmp_path)
    with redis.Redis.from_url(server.url) as client:
        assert client.get("starts") == b"1"
    assert (server.started, server.address.pid) == (False, pid)
    assert server.close() is True
    assert embedded.find(tmp_path) is None


def test_ctrl_c_on_the_starter_does_not_reach_the_server(tmp_path: Path) -> None:
    child, pid = starter(tmp_path)
    try:
        assert os.getsid(pid) == pid != os.getsid(child.pid)
    finally:
        end(child, signal.SIGKILL)
        embedded.start(tmp_path).close()


def test_a_killed_server_comes_back_with_what_it_had_synced(tmp_path: Path) -> None:
    server = embedded.start(tmp_path)
    with redis.Redis.from_url(server.url) as client:
        client.set("a", "1")
        client.execute_command("WAITAOF", 1, 0, 0)
    os.kill(server.address.pid, signal.SIGKILL)
    wait_for(lambda: embedded.find(tmp_path) is None)
    with embedded.start(tmp_path) as again:
        assert again.started
        assert again.address.pid != server.address.pid
        with redis.Redis.from_url(again.url) as client:
            assert client.get("a") == b"1"
        assert server.close() is False, "the second server has a user"
        assert answers(again.url)


def test_a_stale_address_that_now_belongs_to_another_server_is_not_ours(tmp_path: Path) -> None:
    with embedded.start(tmp_path / "other") as other:
        (tmp_path / "mine" / "valkey").mkdir(parents=True)
        theirs = (tmp_path / "other" / "valkey" / "server.json").read_bytes()
        (tmp_path / "mine" / "valkey" / "server.json").write_bytes(theirs)
        (tmp_path / "mine" / "valkey" / "server.lock").touch()
        assert embedded.find(tmp_path / "mine") is None
        with embedded.start(tmp_path / "mine") as mine:
            assert mine.address.pid != other.address.pid


def test_starts_at_the_same_moment_make_one_server(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        servers = list(pool.map(lambda _: embedded.start(tmp_path), range(8)))
    try:
        assert len({server.address.pid for server in servers}) == 1
        assert [server.started for server in servers].count(True) == 1
    finally:
        stopped = [server.close() for server in servers]
    assert stopped == [False] * 7 + [True]


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with embedded.start(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        client.set("a", "1")
    (manifest,) = (tmp_path / "valkey" / "appendonlydir").glob("*.manifest")
    manifest.write_text("nonsense\n")
    with pytest.raises(embedded.EmbeddedError, match=r"valkey\.log"):
        embedded.start(tmp_path)
    assert embedded.find(tmp_path) is None
