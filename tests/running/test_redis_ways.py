"""The worker under the minimal ACL, over TLS and over a Unix socket, each with a real redis-server."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from streams.keys import Keys
from tests.chaos.scene import Fields, Stage, until
from tests.helpers import LIMIT_S, free_port, quartet
from tests.running.conftest import ACL_FILE, PASSWORDS, Server, acl_with_passwords, served
from tests.stages.scene import run_split
from worker.cli.app import invoke
from worker.http import Answer, Readiness
from worker.page import Page

SIGNALS = 4 * 31
"""60 bars of 4 symbols, a vector being ready from the 30th bar on."""


def entries(client: redis.Redis, bars: Sequence[Fields]) -> None:
    for fields in bars:
        client.xadd("quartet:bars", dict(fields))


# ------------------------------------------------------------------ ACL


@pytest.fixture
def guarded(redis_server: Callable[..., Server], tmp_path: Path) -> Callable[[str], str]:
    """A server under the ACL file; gives the URL of a user."""
    port = free_port()
    redis_server("--port", str(port), "--aclfile", str(acl_with_passwords(tmp_path)))
    return lambda user: f"redis://{user}:{PASSWORDS[user]}@127.0.0.1:{port}/0"


def test_the_worker_runs_end_to_end_with_the_minimal_rights(
    guarded: Callable[[str], str], stage: Callable[..., Stage], bars: Sequence[Fields]
) -> None:
    """First run, a death in mid-work, recovery entry by entry: all of it, and no right that is not used."""
    made = stage(guarded("worker"))
    with redis.Redis.from_url(guarded("feed")) as feed, redis.Redis.from_url(guarded("reader")) as reader:
        life = made.start()
        entries(feed, bars[:180])
        until(lambda: reader.xlen("quartet:signals") > 0, life)
        assert life.kill() == -9
        entries(feed, [*bars[180:], {b"symbol": b"BAD", b"ts": b"1750000000000", b"close": b"nan"}])
        served(made.start("--until-idle", "0.1"))
        assert reader.xlen("quartet:signals") == SIGNALS
        assert reader.xlen("quartet:rejected") == 1
        assert json.loads(reader.xrevrange("quartet:signals", count=1)[0][1][b"data"])["voting"] == 2
        the_page_is_served(made, feed, bars[-1])
        used = {name.removeprefix("cmdstat_") for name in reader.info("commandstats")}
    granted = {right[1:] for right in rights("worker") if right.startswith("+")}
    assert granted - used == set()


def test_stages_as_processes_run_end_to_end_with_the_same_rights(
    guarded: Callable[[str], str], stage: Callable[..., Stage], bars: Sequence[Fields], tmp_path: Path
) -> None:
    made, log = stage(guarded("worker")), tmp_path / "split.log"
    with redis.Redis.from_url(guarded("feed")) as feed, redis.Redis.from_url(guarded("reader")) as reader:
        entries(feed, bars)
        with run_split(made, log, "--until-idle", "1") as program:
            assert program.wait(LIMIT_S) == 0, log.read_text()
        assert reader.xlen("quartet:signals") == SIGNALS


def the_page_is_served(stage: Stage, feed: redis.Redis, bar: Fields) -> None:
    """A worker answers each address of its page, and a browser is told of a new bar."""
    life = stage.start()
    started = '"event":"metrics and health'
    until(lambda: started in life.text.replace('": ', '":'), life)
    lines = [json.loads(line) for line in life.text.splitlines() if line.startswith("{")]
    url = urlsplit(next(line["url"] for line in lines if line["event"].startswith("metrics and health")))
    series = "symbol=SYN01&interval=1m"
    with closing(HTTPConnection(url.netloc, timeout=LIMIT_S)) as watching:
        watching.request("GET", f"/api/live?{series}")
        live = watching.getresponse()
        assert told(live, "reload") == {}
        assert asked(url.netloc, "/api/overview")["signal"]["voting"] == 2
        assert asked(url.netloc, "/api/symbols")["total"] == 4
        assert len(asked(url.netloc, f"/api/series?{series}")["rows"]["ts"]) == 60
        after = int(bar[b"ts"]) + 60_000
        entries(feed, [{**bar, b"symbol": b"SYN01", b"ts": b"%d" % after}])
        assert told(live, "rows")["ts"] == [after]
        live.close()
    assert life.terminate() == 0


def asked(address: str, path: str) -> Any:
    with closing(HTTPConnection(address, timeout=LIMIT_S)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = json.load(answer)
        assert answer.status == 200, body
        return body


def told(live: HTTPResponse, name: str) -> Any:
    """What the next event of this name says; a stream that says it cannot read is a failure."""
    event = ""
    while line := live.readline().decode():
        key, _, value = line.rstrip("\n").partition(": ")
        event = value if key == "event" else event
        if key == "data":
            assert event != "away", value
            if event == name:
                return json.loads(value)
    pytest.fail("the stream ended")


def test_a_page_that_may_not_read_says_so_and_not_that_the_server_is_away(guarded: Callable[[str], str]) -> None:
    with redis.Redis.from_url(guarded("feed")) as client:
        page = Page(client, Keys("quartet"), lambda: Readiness({}), quorum=3, warmup_bars=100)
        answer = page.answer("/api/overview")
        page.close()
    assert isinstance(answer, Answer)
    assert answer.status == 503
    error = json.loads(answer.body)["error"]
    assert "does not let the page read" in error
    assert "users.acl" in error
    assert "away" not in error


def test_readers_and_operators_can_do_their_work_with_their_rights(
    guarded: Callable[[str], str],
    stage: Callable[..., Stage],
    bars: Sequence[Fields],
    models: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = stage(guarded("worker"))
    with redis.Redis.from_url(guarded("feed")) as feed:
        entries(feed, bars)
    served(made.start("--until-idle", "0.1"))
    life = made.start()

    def run(user: str, *arguments: str) -> str:
        code = invoke([*arguments, "--redis", guarded(user), "--models", str(models)])
        out, error = capfd.readouterr()
        assert code in (0, 1), f"{arguments}: {error}"  # 1: a check that did not pass
        assert "permission" not in error + out
        return out

    assert "2 configured, 2 loaded" in run("reader", "explain", "--last")
    assert "INSUFFICIENT" in run("reader", "gate", "lightgbm")
    assert "xgboost" in run("reader", "check")
    with redis.Redis.from_url(guarded("reader")) as reader:
        orders = reader.xlen("quartet:control")
        run("operator", "models", "mute", "lightgbm", "--wait", str(LIMIT_S))
        assert reader.xlen("quartet:control") == orders + 1
    assert life.terminate() == 0


def rights(user: str) -> list[str]:
    """What the file grants a user."""
    return next(line.split() for line in ACL_FILE.read_text().splitlines() if line.startswith(f"user {user} "))


OUTSIDE = [
    ("worker", ("XADD", "quartet:bars", "*", "a", "b")),
    ("worker", ("DEL", "quartet:bars")),
    ("worker", ("GET", "another:key")),
    ("worker", ("KEYS", "*")),
    ("worker", ("FLUSHALL",)),
    ("worker", ("CONFIG", "GET", "*")),
    ("worker", ("EVAL", "return redis.call('XADD', 'other', '*', 'a', 'b')", "0")),
    ("feed", ("XADD", "quartet:signals", "*", "a", "b")),
    ("feed", ("XRANGE", "quartet:signals", "-", "+")),
    ("feed", ("DEL", "quartet:bars")),
    ("reader", ("XADD", "quartet:control", "*", "a", "b")),
    ("reader", ("DEL", "quartet:signals")),
    ("operator", ("XADD", "quartet:signals", "*", "a", "b")),
    ("operator", ("XADD", "quartet:bars", "*", "a", "b")),
    ("operator", ("EVAL", "return 1", "0")),
    ("operator", ("ACL", "LIST")),
]


def test_what_lies_outside_of_a_users_rights_is_refused(guarded: Callable[[str], str]) -> None:
    for user, command in OUTSIDE:
        with redis.Redis.from_url(guarded(user)) as client, pytest.raises(redis.RedisError) as raised:
            client.execute_command(*command)
        refused = ("permission" in str(raised.value)) or ("can't access" in str(raised.value))
        assert refused, f"{user}: {' '.join(command)}: {raised.value}"


def test_nobody_can_log_in_with_the_file_as_it_is_shipped(redis_server: Callable[..., Server], tmp_path: Path) -> None:
    port, copy = free_port(), tmp_path / "users.acl"
    copy.write_bytes(ACL_FILE.read_bytes())
    redis_server("--port", str(port), "--aclfile", str(copy))
    for login in ("", *(f"{user}:{word}@" for user in PASSWORDS for word in ("", user, "password"))):
        client = redis.Redis.from_url(f"redis://{login}127.0.0.1:{port}/0")
        with client, pytest.raises(redis.RedisError, match=r"(?i)authenticat|username|NOAUTH"):
            client.xlen("quartet:signals")


def test_a_wrong_password_is_one_line_and_exit_code_3(
    guarded: Callable[[str], str], models: Path, tmp_path: Path
) -> None:
    url = guarded("worker").replace(PASSWORDS["worker"], "wrong")
    done = quartet("run", "--redis", url, "--models", models, "--http-port", "0", cwd=tmp_path)
    assert done.returncode == 3
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: Redis at redis://")
    assert "refused the login" in last
    assert "wrong@" not in done.stderr


# ------------------------------------------------------------------ TLS


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """An authority, and a server's certificate of 127.0.0.1 with its key: made for this test, valid for a day."""
    now = dt.datetime.now(dt.UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("authority", "server")}
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    made = {}
    for name, key in keys.items():
        subject = issuer if name == "authority" else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "authority", path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(keys["authority"].public_key()), critical=False
            )
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
        )
        if name == "authority":
            usage = dict.fromkeys(
                "digital_signature content_commitment key_encipherment data_encipherment key_agreement"
                " encipher_only decipher_only".split(), False
            )  # fmt: skip
            builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        made[name] = builder.sign(keys["authority"], hashes.SHA256())
    files = folder / "authority.pem", folder / "server.pem", folder / "server.key"
    files[0].write_bytes(made["authority"].public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(made["server"].public_bytes(serialization.Encoding.PEM))
    files[2].write_bytes(
        keys["server"].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return files


@pytest.fixture
def tls(redis_server: Callable[..., Server], tmp_path: Path) -> tuple[str, Path]:
    """A server that speaks TLS only: its URL without parameters, and the authority's certificate."""
    authority, certificate, key = certificates(tmp_path)
    port = free_port()
    redis_server(
        *("--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(authority)),
    )
    return f"rediss://127.0.0.1:{port}/0", authority


def test_the_worker_runs_end_to_end_over_tls(
    tls: tuple[str, Path], stage: Callable[..., Stage], bars: Sequence[Fields]
) -> None:
    url = f"{tls[0]}?ssl_ca_certs={tls[1]}"
    with redis.Redis.from_url(url) as client:
        entries(client, bars)
        served(stage(url).start("--until-idle", "0.1"))
        assert client.xlen("quartet:signals") == SIGNALS


def test_a_certificate_that_nobody_vouches_for_is_refused(tls: tuple[str, Path], models: Path, tmp_path: Path) -> None:
    done = quartet("run", "--redis", tls[0], "--models", models, "--http-port", "0", cwd=tmp_path)
    assert done.returncode == 3
    assert "certificate verify failed" in done.stderr.splitlines()[-1].lower()


# ------------------------------------------------------------------ a Unix socket


def test_the_worker_runs_end_to_end_over_a_unix_socket(
    redis_server: Callable[..., Server], tmp_path: Path, stage: Callable[..., Stage], bars: Sequence[Fields]
) -> None:
    socket = tmp_path / "redis.sock"
    redis_server("--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "600")
    with redis.Redis.from_url(f"unix://{socket}") as client:
        entries(client, bars)
        served(stage(f"unix://{socket}").start("--until-idle", "0.1"))
        assert client.xlen("quartet:signals") == SIGNALS
