"""On noise no agent knows anything, on a planted signal every agent does, on the demo's market enough.

Labels of neighbouring rows share 11 of 12 bars, so n votes are worth about n/12 independent ones: the
binomial deviation of a rate is taken as sqrt(0.25 / (n/12)). Four of them are allowed; a true coin passes
all eight checks but once in two thousand markets, and the market is seeded.
"""

import numpy as np
import pytest

from streams.messages import AGENTS, HORIZON


def _chance(votes):
    return 4 * np.sqrt(0.25 / (votes / HORIZON))


@pytest.fixture(scope="module")
def noise(train_on):
    return train_on("noise", 12, 900)


@pytest.fixture(scope="module")
def planted(train_on):
    return train_on("planted", 12, 900)


@pytest.fixture(scope="module")
def demo(train_on):
    return train_on("cycle", 20, 1_500)


@pytest.mark.parametrize("agent", AGENTS)
def test_on_noise_the_hit_rate_is_what_chance_allows(noise, agent):
    for seen in (noise.trained[agent].validation, noise.trained[agent].test):
        assert seen.acted > 300
        assert abs(seen.hit_rate - 0.5) < _chance(seen.acted)


@pytest.mark.parametrize("agent", AGENTS)
def test_on_noise_nothing_is_explained(noise, agent):
    assert noise.trained[agent].validation.r2 < 0.05
    assert noise.trained[agent].test.r2 < 0.05


@pytest.mark.parametrize("agent", AGENTS)
def test_a_planted_signal_is_found_far_beyond_chance(planted, agent):
    for seen in (planted.trained[agent].validation, planted.trained[agent].test):
        assert seen.hit_rate - 0.5 > _chance(seen.acted)


@pytest.mark.parametrize("agent", AGENTS)
def test_on_the_demos_market_15_percent_is_explained_out_of_sample(demo, agent):
    assert demo.trained[agent].test.r2 >= 0.15
    assert demo.trained[agent].warnings == []


@pytest.mark.parametrize("agent", AGENTS)
def test_no_agent_explains_more_than_one_who_sees_the_market_from_within(demo, agent):
    """More than the oracle on the same rows would mean that the future leaks into the features."""
    at = demo.parts(agent).test
    expected = np.expm1(demo.market.expected_return(HORIZON)).T.reshape(-1)[at]
    truth = demo.samples.paths[at, -1]
    oracle = 1 - np.sum((truth - expected) ** 2) / np.sum((truth - truth.mean()) ** 2)
    assert demo.trained[agent].test.r2 < oracle
