"""librdkafka's mock cluster as a program: real TCP, real protocol, one broker, memory only.

`python mock.py` prints `host:port` and obeys the lines that it reads: `topic NAME PARTITIONS`, `down`, `up`;
each is answered by a line. It ends when its input ends, so it never outlives the test run.
What it cannot show: it keeps about 5 MB in each partition, has no compaction and no read-committed view.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
from pathlib import Path
from typing import Any

import confluent_kafka

BROKER = 1
PRODUCER = 0


def library() -> Any:
    """The librdkafka that confluent-kafka brings along, with the types of the calls made here."""
    folder = Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs"
    [path] = folder.glob("librdkafka-*.so*")
    rd = ctypes.CDLL(str(path))
    rd.rd_kafka_conf_new.restype = ctypes.c_void_p
    rd.rd_kafka_conf_set.argtypes = [ctypes.c_void_p, *[ctypes.c_char_p] * 3, ctypes.c_size_t]
    rd.rd_kafka_new.restype = ctypes.c_void_p
    rd.rd_kafka_new.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
    rd.rd_kafka_mock_cluster_new.restype = ctypes.c_void_p
    rd.rd_kafka_mock_cluster_new.argtypes = [ctypes.c_void_p, ctypes.c_int]
    rd.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    rd.rd_kafka_mock_cluster_bootstraps.argtypes = [ctypes.c_void_p]
    rd.rd_kafka_mock_topic_create.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
    for name in ("rd_kafka_mock_broker_set_down", "rd_kafka_mock_broker_set_up"):
        getattr(rd, name).argtypes = [ctypes.c_void_p, ctypes.c_int32]
    return rd


def main() -> None:
    rd = library()
    error = ctypes.create_string_buffer(512)
    conf = rd.rd_kafka_conf_new()
    rd.rd_kafka_conf_set(conf, b"log_level", b"0", error, len(error))
    handle = rd.rd_kafka_new(PRODUCER, conf, error, len(error))
    assert handle, error.value
    cluster = rd.rd_kafka_mock_cluster_new(handle, 1)
    print(rd.rd_kafka_mock_cluster_bootstraps(cluster).decode(), flush=True)
    while (line := _next_line()) is not None:
        print(_obey(rd, cluster, line.split()), flush=True)
    os._exit(0)  # nothing in memory is worth an orderly end


def _next_line() -> str | None:
    """The next order; None once the parent is gone or has closed the pipe."""
    parent = os.getppid()
    while not select.select([sys.stdin], [], [], 1.0)[0]:
        if os.getppid() != parent:
            return None
    return sys.stdin.readline() or None


def _obey(rd: Any, cluster: Any, words: list[str]) -> str:
    match words:
        case ["topic", name, partitions]:
            code = rd.rd_kafka_mock_topic_create(cluster, name.encode(), int(partitions), 1)
        case ["down"]:
            code = rd.rd_kafka_mock_broker_set_down(cluster, BROKER)
        case ["up"]:
            code = rd.rd_kafka_mock_broker_set_up(cluster, BROKER)
        case _:
            return f"unknown {words}"
    return "ok" if code == 0 else f"error {code}"


if __name__ == "__main__":
    main()
