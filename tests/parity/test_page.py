"""docs/features.md says of every feature what the code does."""

import re
from pathlib import Path

import numpy as np
import pytest

from streams.contracts import DEFINITIONS, FEATURE_SETS
from tests.parity.markets import random_walk
from worker.features.bank import FeatureBank

PAGE = (Path(__file__).parents[2] / "docs" / "features.md").read_text(encoding="utf-8")
SETS = tuple(FEATURE_SETS.values())


def section(feature_set):
    found = re.search(rf"^## {feature_set.name}: (.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
    assert found, feature_set.name
    return found.group(1)


def table(feature_set):
    """Rows of number, name, formula, first bar, neutral value."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+?) \| (\d+) \| ([\d.]*) *\|$", section(feature_set), re.MULTILINE)
    assert rows
    return rows


@pytest.mark.parametrize("feature_set", SETS, ids=lambda s: s.name)
def test_the_page_lists_every_name_in_order_with_the_sets_hash_and_warm_up(feature_set):
    assert tuple(name for _, name, *_ in table(feature_set)) == feature_set.features
    assert [int(number) for number, *_ in table(feature_set)] == list(range(1, len(feature_set) + 1))
    text = section(feature_set)
    assert text.startswith(f"{len(feature_set)} features, ready from bar {feature_set.warmup_bars}\n")
    assert f"`{feature_set.contract[:16]}...`" in text


@pytest.mark.parametrize("feature_set", SETS, ids=lambda s: s.name)
def test_the_page_gives_each_neutral_value_and_first_bar(feature_set):
    bank = FeatureBank((feature_set,))
    values, _ = bank.update(np.zeros(60, np.int64), random_walk(1, 60))
    first = dict(zip(bank.names, (~np.isnan(values)).argmax(axis=0) + 1, strict=True))
    for _, name, _, bar, neutral in table(feature_set):
        assert int(bar) == first[name], name
        assert (float(neutral) if neutral else None) == DEFINITIONS[name].neutral, name


def test_a_name_has_the_same_formula_in_every_table():
    rows = [row for feature_set in SETS for row in table(feature_set)]
    formulas = {(name, formula) for _, name, formula, _, _ in rows}
    assert len(formulas) == len({name for name, _ in formulas})
