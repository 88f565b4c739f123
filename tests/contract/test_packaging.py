"""What is installed: every module and every data file, and every version is pinned."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
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


def test_what_pip_installs_from_a_wheel_works_by_itself(tmp_path) -> None:
    """Into an empty environment that borrows only the libraries of this one, away from the source tree."""
    source = tmp_path / "source"
    for name in [*files(), "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(source)]
    subprocess.run([*build, "--wheel-dir", str(tmp_path)], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("quartet_worker-*.whl")
    home = tmp_path / "empty"
    venv.create(home, with_pip=False)
    libraries = sysconfig.get_path("purelib")
    site = next((home / "lib").glob("python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True)
    check = (
        "import sys; from importlib.resources import files; import streams, agents.xgb, worker.pipeline, worker.page;"
        "assert streams.__file__.startswith(sys.prefix), streams.__file__;"
        "assert files('streams').joinpath('commit.lua').is_file();"
        "assert files('worker.page').joinpath('static', 'page.js').is_file();"
        "from worker.cli.app import invoke; sys.exit(invoke(['--version']))"
    )
    # The libraries come after the wheel; an editable install of the source tree is not among plain paths.
    done = subprocess.run(
        [home / "bin" / "python", "-c", f"import sys; sys.path.append({libraries!r}); {check}"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("quartet ")
