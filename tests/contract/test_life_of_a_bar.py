"""The page that walks a reader through the code names only what is there."""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "life-of-a-bar.md").read_text(encoding="utf-8")
FILES = sorted(set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|lua))`", PAGE)))
NAMED = sorted(set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)::([\w.]+)`", PAGE)))


def names_of(file: str) -> set[str]:
    """Every class and function of a module, methods as `Class.method`."""
    found = set[str]()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_the_page_names_a_function_for_every_step() -> None:
    assert len(NAMED) >= 10
    assert {file.partition("/")[0] for file, _ in NAMED} == {"streams", "agents", "worker"}


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_function_that_is_named_is_there(file: str, name: str) -> None:
    assert name in names_of(file)


@pytest.mark.parametrize("file", FILES)
def test_the_file_that_is_named_is_there(file: str) -> None:
    assert (ROOT / file).is_file()


def test_the_loop_turns_by_the_name_that_is_given() -> None:
    assert "`worker/service.py::Worker._step`" in PAGE
    assert "Worker._step" in names_of("worker/service.py")
