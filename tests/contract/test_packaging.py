"""What is installed: every module and every data file, and every version is pinned."""

from __future__ import annotations

import re
import subprocess
import tomllib
from fnmatch import fnmatch

import pytest

from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
DATA = PROJECT["tool"]["setuptools"]["package-data"]


def files() -> list[str]:
    """Files of the packages that are not ignored, by path from the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git work tree, so what belongs to it is not known")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "streams", "agents", "worker"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sorted(name for name in set(listed.stdout.splitlines()) if (ROOT / name).exists())


def test_every_folder_of_modules_is_a_package_that_is_installed() -> None:
    folders = {name.rpartition("/")[0].replace("/", ".") for name in files() if name.endswith(".py")}
    assert folders == set(PACKAGES)


def test_every_other_file_of_a_package_is_installed_as_data() -> None:
    def covered(name: str) -> bool:
        folder, _, file = name.rpartition("/")
        package = folder.replace("/", ".")
        return package in PACKAGES and any(fnmatch(file, pattern) for pattern in DATA.get(package, []))

    others = [name for name in files() if not name.endswith(".py")]
    assert "streams/commit.lua" in others
    assert [name for name in others if not covered(name)] == []


def test_every_requirement_is_pinned_exactly() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.!]*", pin) for pin in pins), "plain, exact versions"
    pinned = {re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() for pin in pins}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(one for some in extras.values() for one in some)]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", one)[0]).lower() for one in wanted}
    assert names - {"quartet-worker"} <= pinned


def test_torch_is_pinned_by_its_plain_number() -> None:
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()
