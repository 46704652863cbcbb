"""Intervals hold the truth as often as they say: shown by simulation, at the numbers of prompts and seeds in use."""

import itertools

import numpy as np
import pytest

from efface.intervals import clustered, difference, holm, wilson

RUNS, DRAWS = 150, 400
DESIGNS = [(6, 21), (8, 16), (12, 11), (24, 5), (48, 11)]  # prompts, seeds of each
RATES = [0.02, 0.1, 0.5, 0.95]
LEAST = 0.91  # of 150 runs; 95 % is hit less often than this once in 100 designs


def pictures(
    random: np.random.Generator, prompts: int, seeds: int, rate: float, alike: float
) -> tuple[np.ndarray, list[int]]:
    """Outcomes whose prompts differ in rate; `alike` is their correlation within a prompt."""
    odds = (1 / alike - 1) if alike else 0
    of = random.beta(rate * odds, (1 - rate) * odds, prompts) if alike else np.full(prompts, rate)
    found = (random.random((prompts, seeds)) < of[:, None]).astype(int)
    return found.ravel(), np.repeat(np.arange(prompts), seeds).tolist()


@pytest.mark.parametrize("alike", [0.0, 0.3])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_a_clustered_interval_holds_the_rate(design: tuple[int, int], rate: float, alike: float) -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(RUNS):
        low, high = clustered(*pictures(random, *design, rate, alike), DRAWS)
        held += low <= rate <= high
    assert held >= LEAST * RUNS


@pytest.mark.parametrize("rate", RATES[1:])
@pytest.mark.parametrize("design", DESIGNS[:3], ids=str)
def test_an_interval_that_takes_pictures_for_unrelated_does_not(design: tuple[int, int], rate: float) -> None:
    """Wilson's over pictures, on the same data: it claims 95 % and holds at most 80."""
    random, held = np.random.default_rng(0), 0
    for _ in range(RUNS):
        values, _prompts = pictures(random, *design, rate, 0.3)
        low, high = wilson(int(values.sum()), len(values))
        held += low <= rate <= high
    assert held <= 0.8 * RUNS


@pytest.mark.parametrize("n", [32, 128, 512])
@pytest.mark.parametrize("rate", [0.03, 0.3, 0.7])
def test_wilson_holds_the_rate_of_unrelated_pictures(rate: float, n: int) -> None:
    hits = np.random.default_rng(0).binomial(n, rate, 4000)
    ends = np.array([wilson(k, n) for k in range(n + 1)])[hits]
    assert ((ends[:, 0] <= rate) & (rate <= ends[:, 1])).mean() >= 0.92


@pytest.mark.parametrize("effect", [0.0, 0.15])
@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_a_difference_holds_the_effect_and_rarely_claims_one_that_is_not_there(
    design: tuple[int, int], effect: float
) -> None:
    random, held, claimed = np.random.default_rng(0), 0, 0
    prompts, seeds = design
    for _ in range(RUNS):
        shift = random.normal(effect, 0.1, prompts)  # prompts differ in what the method does to them
        at = random.random((prompts, seeds))
        a, b = (at < 0.5 + shift[:, None]).astype(int), (at < 0.5).astype(int)
        found = difference(a.ravel(), b.ravel(), np.repeat(np.arange(prompts), seeds).tolist(), DRAWS)
        held += found.interval[0] <= effect <= found.interval[1]
        claimed += found.p < 0.05
    assert held >= LEAST * RUNS
    assert claimed <= 0.09 * RUNS if effect == 0 else claimed >= 0.3 * RUNS


def test_pairing_is_narrower_than_two_intervals() -> None:
    random = np.random.default_rng(0)
    a, prompts = pictures(random, 12, 11, 0.6, 0.3)
    found = difference(a, a, prompts)
    bound = wilson(0, 12)[1]
    assert (found.value, found.p, found.interval) == (0.0, 1.0, (-bound, bound))
    b = np.where(random.random(len(a)) < 0.05, 1 - a, a)
    one, (low, high) = difference(a, b, prompts).interval, clustered(a, prompts)
    assert one[1] - one[0] < 0.6 * (high - low)


def test_holm_is_its_definition_and_errs_once_in_twenty_families() -> None:
    for p in itertools.product((0.001, 0.02, 0.04, 0.3), repeat=3):
        order = sorted(p)
        want = {x: max(min(1.0, (3 - k) * y) for k, y in enumerate(order) if y <= x) for x in p}
        assert holm(p) == [want[x] for x in p]
    random = np.random.default_rng(0).random((4000, 10))
    wrong = np.mean([min(holm(list(p))) < 0.05 for p in random])
    assert 0.03 < wrong < 0.065
    assert np.mean((random < 0.05).any(1)) > 0.35  # without it
    assert holm([]) == []


@pytest.mark.parametrize("hits", [0, 1])
def test_where_all_pictures_agree_only_prompts_count(hits: int) -> None:
    low, high = clustered([hits] * 60, [k // 10 for k in range(60)])
    assert (low, high) == wilson(6 * hits, 6)
    assert clustered([hits] * 9, ["one prompt"] * 9) == (0.0, 1.0)


def test_the_same_data_make_the_same_interval_in_any_order_of_names() -> None:
    values, prompts = pictures(np.random.default_rng(3), 8, 4, 0.4, 0.2)
    assert clustered(values, prompts) == clustered(values, [f"prompt {k}" for k in prompts])


def test_what_is_no_outcome_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a cluster per value, got 1 for 2"):
        clustered([0, 1], ["a"])
    with pytest.raises(ValueError, match="Expected outcomes 0 or 1"):
        clustered([0, 2], ["a", "b"])
    with pytest.raises(ValueError, match="Expected as many values in `a` as in `b`, got 1 and 2"):
        difference([0], [0, 1], ["a", "b"])
    with pytest.raises(ValueError, match=r"`p`.*1\.5"):
        holm([0.5, 1.5])
