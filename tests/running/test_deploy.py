"""The image, the compose file and the systemd unit: whatever can be judged without a Docker daemon."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.chaos.scene import Fields, Stage, until
from tests.helpers import LIMIT_S, ROOT
from worker.settings import Settings

COMPOSE_FILE = ROOT / "docker-compose.yml"
UNIT = ROOT / "deploy" / "systemd" / "quartet.service"
COMPOSE = YAML(typ="safe").load(COMPOSE_FILE)
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile without comments, continued lines joined."""
    text = "\n".join(line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


# ------------------------------------------------------------------ compose


def test_the_compose_file_fits_the_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE_FILE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ports_are_on_loopback_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) >= 4
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_images_are_pinned_and_every_long_running_service_has_a_health_check_and_limits() -> None:
    for name, service in SERVICES.items():
        if name in OURS:
            assert service["image"] == "quartet:local"
            assert service["user"] == "10001:10001"
            assert service["read_only"] is True
        else:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-\w+)?", service["image"]), name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert "test" in service["healthcheck"] or service["healthcheck"] == {"disable": True}, name
    for name in ("redis", "worker", "prometheus", "grafana", "kafka", "bridge", "kafka-worker"):
        assert "test" in SERVICES[name]["healthcheck"], name


def test_redis_keeps_everything() -> None:
    command = " ".join(SERVICES["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_profiles_are_demo_feed_and_kafka_and_the_rest_starts_by_itself() -> None:
    profiles = {name: service.get("profiles", []) for name, service in SERVICES.items()}
    assert {profile for some in profiles.values() for profile in some} == {"demo", "feed", "kafka"}
    assert {name for name, some in profiles.items() if not some} == {"redis", "worker", "prometheus", "grafana"}


def test_what_a_service_waits_for_exists_and_has_a_health_check() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in SERVICES, f"{name} waits for {other}"
            if how["condition"] == "service_healthy":
                assert "test" in SERVICES[other]["healthcheck"], f"{name} waits for {other}"
            # A service of a profile that is not chosen must not be started through the back door.
            if set(SERVICES[other].get("profiles", [])) - set(service.get("profiles", [])):
                assert how["required"] is False


def test_everything_of_the_profile_kafka_speaks_to_the_broker_of_the_inside() -> None:
    advertised = SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    (inside,) = re.findall(r"INSIDE://([^,]+)", advertised)
    assert SERVICES["bridge"]["command"] == ["bridge", "--to", f"kafka://{inside}"]
    assert SERVICES["kafka-worker"]["environment"]["QUARTET_BROKER"] == f"kafka://{inside}"
    (made,) = SERVICES["kafka-topics"]["command"]
    assert f"--bootstrap-server {inside} " in made
    assert "for topic in bars rejected;" in made, "what the bridge asks for; workers make the rest"


def test_every_mounted_file_is_in_the_repository_and_every_volume_is_declared() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume


def test_every_variable_of_ours_is_a_setting() -> None:
    known = {f"QUARTET_{name.upper()}" for name in Settings.model_fields}
    for name in OURS:
        used = {key for key in SERVICES[name].get("environment", {}) if key.startswith("QUARTET_")}
        assert used <= known, name
    assert {key for key, value in env_of_dockerfile().items() if key.startswith("QUARTET_")} <= known


def test_stale_bars_are_judged_in_compose_and_unit() -> None:
    assert SERVICES["worker"]["environment"]["QUARTET_MAX_BAR_AGE_INTERVALS"] == "${QUARTET_MAX_BAR_AGE_INTERVALS-3}"
    assert "QUARTET_MAX_BAR_AGE_INTERVALS=3" in UNIT.read_text()


def test_commands_in_the_compose_file_are_commands_of_the_program() -> None:
    from worker.cli.app import _COMMANDS

    names = {name for name, *_ in _COMMANDS}
    for name in OURS:
        service = SERVICES[name]
        if "entrypoint" in service:
            python, minus_m, module = service["entrypoint"]
            assert (python, minus_m) == ("python", "-m")
            assert (ROOT / (module.replace(".", "/") + ".py")).exists()
        else:
            assert service["command"][0] in names


def test_every_setting_is_in_the_page_on_operations() -> None:
    text = (ROOT / "docs" / "operations.md").read_text().partition("## Settings")[2].partition("\n## ")[0]
    assert set(Settings.model_fields) - set(re.findall(r"`([a-z_]+)`", text)) == set()


def test_the_pages_name_commands_users_and_files_that_exist() -> None:
    from worker.cli.app import _COMMANDS

    text = "".join((ROOT / "docs" / name).read_text() for name in ("operations.md", "runbook.md"))
    assert set(re.findall(r"quartet ([a-z]+)\b(?=[ `\n])", text)) - {name for name, *_ in _COMMANDS} == set()
    for path in re.findall(r"\b((?:deploy|dashboards)/[\w./-]+\w)", text):
        assert (ROOT / path).exists(), path
    users = {line.split()[1] for line in (ROOT / "deploy" / "redis" / "users.acl").read_text().splitlines()}
    rights = text.partition("## Redis ACL")[2].partition("\n## ")[0]
    assert users - {"default"} == set(re.findall(r"^\| `(\w+)` \| (?:read|append|what)", rights, re.MULTILINE))


# ------------------------------------------------------------------ image


def env_of_dockerfile() -> dict[str, str]:
    last = [rest for word, rest in instructions() if word == "ENV"][-1]
    return dict(pair.split("=", 1) for pair in last.split())


def test_the_image_runs_as_a_number_that_is_not_root() -> None:
    users = [rest for word, rest in instructions() if word == "USER"]
    assert [re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user) is not None for user in users] == [True]
    words = [word for word, _ in instructions()]
    assert words.index("USER") < words.index("ENTRYPOINT")


def test_the_base_is_pinned_and_named_once() -> None:
    arguments = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", arguments["PYTHON"])
    assert {rest.split()[0] for word, rest in instructions() if word == "FROM"} == {"${PYTHON}"}


def test_health_is_asked_of_the_program_and_its_state_is_writable() -> None:
    checks = [rest for word, rest in instructions() if word == "HEALTHCHECK"]
    assert len(checks) == 1
    assert checks[0].endswith('CMD ["quartet", "check", "--live"]')
    env = env_of_dockerfile()
    assert f'["{env["QUARTET_STATE_DIR"]}"]' in [rest for word, rest in instructions() if word == "VOLUME"]
    assert any(f"install -d -o 10001 -g 10001 -m 0750 {env['QUARTET_STATE_DIR']}" in r for _, r in instructions())


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        source
        for word, rest in instructions()
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]
    assert sorted(copied) == sorted(kept)
    assert [source for source in copied if not (ROOT / source).exists()] == []


# ------------------------------------------------------------------ systemd


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that is there: `verify` looks whether it can be executed."""
    text = UNIT.read_text()
    path = tmp_path / "quartet.service"
    path.write_text(text.replace("/opt/quartet/bin/quartet", "/bin/true"))
    return path


def test_systemd_accepts_the_unit(unit: Path, needs: Callable[[str], str]) -> None:
    done = subprocess.run([needs("systemd-analyze"), "verify", unit], capture_output=True, text=True, check=False)
    about_it = [line for line in (done.stdout + done.stderr).splitlines() if "quartet" in line]
    assert about_it == []


def test_systemd_finds_the_unit_hardened(unit: Path, needs: Callable[[str], str]) -> None:
    """1.3 of 10 when this was written; an ordinary service has 9.6."""
    command = [needs("systemd-analyze"), "security", "--offline=yes", "--threshold=15", unit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_unit_is_what_it_says() -> None:
    text = UNIT.read_text()
    lines = {
        line.split("=", 1)[0]: line.split("=", 1)[1] for line in text.splitlines() if "=" in line and line[0] != "#"
    }
    assert lines["Type"] == "notify"
    assert lines["DynamicUser"] == "yes"
    assert lines["ProtectSystem"] == "strict"
    assert lines["NoNewPrivileges"] == "yes"
    assert lines["StateDirectory"] == "quartet"
    assert lines["IPAddressDeny"] == "any"
    assert lines["WatchdogSec"] == "90s"
    assert "Documentation" not in lines, "no file that nothing installs"


def test_the_unit_reads_the_settings_that_the_documents_install_for_a_user_who_is_not_root(
    tmp_path: Path, unit: Path, needs: Callable[[str], str]
) -> None:
    steps = (ROOT / "docs" / "operations.md").read_text().partition("## With systemd")[2].partition("\n## ")[0]
    (config,) = re.findall(r"QUARTET_CONFIG=(\S+)", UNIT.read_text())
    assert re.search(rf"install -m 0644 \S+ {re.escape(config)}\n", steps)
    assert re.search(rf"install -d -m 0755 .*{Path(config).parent}\b", steps), "a folder that others may enter"
    (models,) = re.findall(r"QUARTET_MODELS=(\S+)", UNIT.read_text())
    assert re.search(rf"install -d .*{models}\n", steps)
    assert steps.index(models) < steps.index("systemctl daemon-reload")
    (drop_in,) = re.findall(r"<<'END'\n(.*?)END\n", steps, re.DOTALL)
    folder = tmp_path / "quartet.service.d"
    folder.mkdir()
    (folder / "redis.conf").write_text(f"{drop_in}SupplementaryGroups=root\n")
    done = subprocess.run([needs("systemd-analyze"), "verify", unit], capture_output=True, text=True, check=False)
    assert [line for line in (done.stdout + done.stderr).splitlines() if "quartet" in line] == []


# ------------------------------------------------------------------ the worker and its service manager


def test_the_worker_reports_to_its_service_manager(
    valkey: str, stage: Callable[..., Stage], bars: Sequence[Fields], tmp_path: Path
) -> None:
    """Ready only once the namespace is its own, the watchdog fed while it serves, and a word at the end."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as of_standby,
    ):
        for end, name in ((manager, "first"), (of_standby, "second")):
            end.bind(str(tmp_path / name))
            end.settimeout(LIMIT_S)
        made = stage(valkey)
        made.namespace = tmp_path.name
        made.feed(bars)
        life = made.start(NOTIFY_SOCKET=str(tmp_path / "first"))
        said = _until(manager, "READY=1")
        assert not any("WATCHDOG=1" in message for message in said[:-1])
        assert f"STATUS=serving {tmp_path.name}" in said[-1]
        assert "WATCHDOG=1" in _until(manager, "WATCHDOG=1")[-1]

        standby = made.start(NOTIFY_SOCKET=str(tmp_path / "second"))
        waiting = _until(of_standby, "STATUS=standing by")
        assert not any("READY=1" in message for message in waiting)
        assert "EXTEND_TIMEOUT_USEC" in _until(of_standby, "EXTEND_TIMEOUT_USEC")[-1]

        assert life.terminate() == 0
        assert "STOPPING=1" in _until(manager, "STOPPING=1")[-1]
        assert "READY=1" in _until(of_standby, "READY=1")[-1]
        until(lambda: made.progress() == len(bars), standby)
        assert standby.terminate() == 0


def _until(manager: socket.socket, word: str) -> list[str]:
    """Messages up to the one that has `word`."""
    said = []
    while not said or word not in said[-1]:
        said.append(manager.recv(4096).decode())
    return said
