"""The lease is kept by a thread of its own, is lost to another, and is given up where the loop stands still."""

from __future__ import annotations

import threading
import time

import structlog
from structlog.testing import LogCapture

from streams.keys import Keys
from streams.redis import RedisStore, connect
from streams.store import StoreUnavailableError
from tests.helpers import LIMIT_S, wait_for
from worker.lease import STALLED_S, LeaseKeeper


def keeper(store: RedisStore, url: str, heartbeat=time.monotonic) -> LeaseKeeper:
    return LeaseKeeper(store.with_client(connect(url)).renew, heartbeat, 0.02)


def left_ms(store: RedisStore) -> int:
    return store.client.pttl(store.keys.lease("chain"))


def test_a_lease_outlives_its_time_while_the_loop_turns(server, namespace):
    store = RedisStore(connect(server), Keys(namespace), lease_s=LIMIT_S)
    assert store.acquire()
    kept = keeper(store, server)
    kept.start()
    try:
        left = [LIMIT_S * 1000]
        for _ in range(3):
            wait_for(lambda: bool(left.append(left_ms(store))) or left[-1] < left[-2])
            wait_for(lambda: bool(left.append(left_ms(store))) or left[-1] > left[-2])  # it was renewed
        assert not RedisStore(connect(server), Keys(namespace)).acquire()
    finally:
        kept.stop()
    store.client.pexpire(store.keys.lease("chain"), 1)
    wait_for(lambda: RedisStore(connect(server), Keys(namespace)).acquire())


def test_a_lease_that_another_holds_is_lost(server, namespace):
    store = RedisStore(connect(server), Keys(namespace))
    assert store.acquire()
    store.client.delete(Keys(namespace).lease("chain"))
    assert RedisStore(connect(server), Keys(namespace)).acquire()
    kept = keeper(store, server)
    kept.start()
    assert kept.lost.wait(LIMIT_S)
    kept.stop()
    assert "another instance" in kept.why


def test_a_loop_that_stands_still_lets_the_lease_go():
    calls = []
    kept = LeaseKeeper(lambda: bool(calls.append(1)) or True, lambda: time.monotonic() - STALLED_S - 1, 0.001)
    kept.start()
    time.sleep(0.05)
    kept.stop()
    assert not calls


def test_an_outage_is_not_a_lost_lease():
    tried = threading.Event()

    def renew() -> bool:
        if tried.is_set():
            return True
        tried.set()
        raise StoreUnavailableError("away")

    kept = LeaseKeeper(renew, time.monotonic, 0.001)
    kept.start()
    assert tried.wait(LIMIT_S)
    kept.stop()
    assert not kept.lost.is_set()


def test_a_renewal_that_fails_unforeseen_is_logged_and_ends_the_worker_as_a_lost_lease():
    """Else the thread would be gone, and the loop would go on without a lease and without knowing it."""

    def renew() -> bool:
        raise RuntimeError("what nobody foresaw")

    seen = LogCapture()
    kept = LeaseKeeper(renew, time.monotonic, 0.001, structlog.wrap_logger(None, processors=[seen]))
    kept.start()
    assert kept.lost.wait(LIMIT_S)
    kept.stop()
    assert kept.why == "the lease cannot be renewed (RuntimeError: what nobody foresaw); a restart takes it again"
    assert [(line["log_level"], bool(line["exc_info"])) for line in seen.entries] == [("error", True)]
