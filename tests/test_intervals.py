"""Intervals hold the truth as often as they say: shown by simulation, at the numbers of prompts and seeds in use."""

import itertools

import numpy as np
import pytest
from scipy.stats import beta

from efface.intervals import clopper_pearson, clustered, difference, holm, wilson
from efface.judged import Corrected, Stratum, corrected_difference, krippendorff

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


@pytest.mark.thinned("long")
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


# ---------------------------------------------------------------- rates corrected by labels

N, LABELLED, LOOKS = 512, 150, 400
TRUTHS = [(0.0, 0.0, 0.0), (0.03, 0.7, 0.02), (0.1, 0.9, 0.05), (0.5, 0.98, 0.1), (0.9, 1.0, 0.3)]
"""Share called positive, precision there, share of misses in the rest."""


def prompts_of(truth: tuple[float, float, float], seed: int = 1_000_000) -> np.ndarray:
    """The share that the detector calls positive, for each of 32 prompts, which differ."""
    called = truth[0]
    return np.random.default_rng(seed).beta(called * 4, (1 - called) * 4, 32) if called else np.zeros(32)


def looked_at(
    random: np.random.Generator, truth: tuple[float, float, float], of: np.ndarray, most: int = N, near: bool = False
) -> Corrected:
    """A run of 16 seeds of each prompt, and labels of a sample of at most `most` positives."""
    _, precision, miss = truth
    positive = random.random((32, N // 32)) < of[:, None]
    close = random.random(positive.shape) < (0.1 if near else 0.0)
    there = random.random(positive.shape) < np.where(positive, precision, np.where(close, min(4 * miss, 1.0), miss))
    strata = []
    for name, group, labels in (
        ("positive", there[positive], most),
        ("near", there[~positive & close], 50),
        ("negative", there[~positive & ~close], LABELLED),
    ):
        if near or name != "near":
            chosen = random.permutation(group)[:labels]
            strata.append(Stratum(name, len(group), len(chosen), int(chosen.sum())))
    return Corrected(tuple(strata))


def expected(truth: tuple[float, float, float], called: float, near: bool = False) -> float:
    _, precision, miss = truth
    rest = 0.1 * min(4 * miss, 1.0) + 0.9 * miss if near else miss
    return called * precision + (1 - called) * rest


@pytest.mark.thinned("long")
@pytest.mark.parametrize("most", [N, 40])
@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("truth", TRUTHS, ids=str)
def test_a_corrected_rate_holds_the_truth_for_new_seeds_of_its_prompts(
    truth: tuple[float, float, float], near: bool, most: int
) -> None:
    random, of = np.random.default_rng(1_000_000), prompts_of(truth)
    rate = expected(truth, of.mean(), near)
    found = [looked_at(random, truth, of, most, near) for _ in range(LOOKS)]
    rates = np.array([each.rate for each in found])
    assert abs(rates.mean() - rate) <= 4 * rates.std() / LOOKS**0.5
    ends = np.array([each.interval for each in found])
    assert ((ends[:, 0] <= rate + 1e-12) & (rate <= ends[:, 1])).mean() >= 0.95
    assert (np.array([each.upper() for each in found]) >= rate - 1e-12).mean() >= 0.95


def test_a_detector_alone_does_not_hold_it() -> None:
    """Wilson's interval of the detector's answers, on the same data."""
    truth = (0.1, 0.9, 0.05)
    random, of = np.random.default_rng(1_000_000), prompts_of(truth)
    raw = [looked_at(random, truth, of).raw.interval for _ in range(LOOKS)]
    assert np.mean([low <= expected(truth, of.mean()) <= high for low, high in raw]) < 0.5


def test_it_is_no_claim_about_new_prompts() -> None:
    """Each look with other prompts: the interval of these prompts misses the mean of all prompts too often."""
    random, truth = np.random.default_rng(1_000_000), (0.9, 1.0, 0.3)
    held = 0
    for k in range(LOOKS):
        low, high = looked_at(random, truth, prompts_of(truth, 1_000_000 + k)).interval
        held += low <= expected(truth, 0.9) <= high
    assert held < 0.9 * LOOKS


def test_a_corrected_bound_is_what_the_recipe_says() -> None:
    none = Corrected((Stratum("positive", 0, 0, 0), Stratum("negative", 512, 150, 0)))
    by_hand = beta.ppf(0.975, 1, 512) + beta.ppf(0.975, 1, 150)
    assert none.upper(0.05) == pytest.approx(by_hand) and 0.0305 < by_hand < 0.0315
    some = Corrected((Stratum("positive", 90, 40, 30), Stratum("negative", 422, 150, 3)))
    a = 0.05 / 3
    p1, p0, share = beta.ppf(1 - a, 31, 10), beta.ppf(1 - a, 4, 147), beta.ppf(1 - a, 91, 422)
    assert some.upper(0.05) == pytest.approx(p0 + share * (p1 - p0))
    assert some.rate == pytest.approx((90 * 30 / 40 + 422 * 3 / 150) / 512)
    for labelled, below in ((84, False), (85, True)):  # the fewest labels that can support 5 %, of 512 pictures
        strata = Stratum("positive", 0, 0, 0), Stratum("negative", 512, labelled, 0)
        assert (Corrected(strata).upper(0.05) <= 0.05) is below


def test_a_corrected_difference_holds_the_effect_and_does_not_invent_one() -> None:
    random = np.random.default_rng(1_000_001)
    before, after = (0.85, 0.98, 0.2), (0.05, 0.6, 0.03)
    of, to = prompts_of(before), prompts_of(after)
    effect, held, claimed, invented = expected(before, of.mean()) - expected(after, to.mean()), 0, 0, 0
    for _ in range(LOOKS):
        base, same, run = looked_at(random, before, of), looked_at(random, before, of), looked_at(random, after, to)
        value, (low, high) = corrected_difference(base, run)
        assert low <= value <= high
        held += low <= effect <= high
        claimed += low > 0.5
        low, high = corrected_difference(base, same)[1]
        invented += not low <= 0 <= high
    assert held >= 0.95 * LOOKS and claimed >= 0.9 * LOOKS and invented <= 0.05 * LOOKS


def test_strata_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="got none for 9 pictures in 'negative'"):
        Stratum("negative", 9, 0, 0)
    with pytest.raises(ValueError, match=r"`labelled` in \[0, 3\], got 4"):
        Stratum("near", 3, 4, 0)
    with pytest.raises(ValueError, match=r"`there` in \[0, 2\], got 3"):
        Stratum("near", 3, 2, 3)
    with pytest.raises(ValueError, match="Expected strata with at least one picture"):
        Corrected((Stratum("positive", 0, 0, 0),))
    with pytest.raises(ValueError, match="Expected runs of the same rows, got 3 and 4"):
        corrected_difference(*(Corrected((Stratum("positive", n, n, 0),)) for n in (3, 4)))


def test_an_empty_stratum_has_no_share_and_changes_no_rate() -> None:
    with_it = Corrected((Stratum("positive", 0, 0, 0), Stratum("near", 0, 0, 0), Stratum("negative", 40, 20, 1)))
    assert with_it.rate == 0.05 and with_it.raw.hits == 0
    assert with_it.upper() >= Corrected((Stratum("negative", 40, 20, 1),)).upper()
    complete = Corrected((Stratum("positive", 5, 5, 5), Stratum("negative", 0, 0, 0)))
    assert complete.interval == clopper_pearson(5, 5, 0.025)


@pytest.mark.parametrize("level", [0.05, 0.025, 0.05 / 3])
def test_clopper_pearson_is_the_quantile_of_beta(level: float) -> None:
    for n in (1, 2, 33, 150, 1306):
        for hits in sorted({0, 1, n // 3, n - 1, n}):
            low, high = clopper_pearson(hits, n, level)
            assert low == pytest.approx(beta.ppf(level, hits, n - hits + 1) if hits else 0, abs=1e-9)
            assert high == pytest.approx(beta.ppf(1 - level, hits + 1, n - hits) if hits < n else 1, abs=1e-9)
    assert clopper_pearson(0, 0, level) == (0.0, 1.0)
    for wrong in ((3, 2, level), (-1, 2, level), (1, 2, 0.0), (1, 2, 0.7)):
        with pytest.raises(ValueError, match="Expected"):
            clopper_pearson(*wrong)


# ---------------------------------------------------------------- agreement

PUBLISHED = [  # the examples of nominal data in Krippendorff 2011, with their alpha; "." is a gap
    (["0100000010", "1110010000"], 0.095),
    (["aabbdcccedda", "babbbccceddd"], 0.692),
    (["123321412...", "1233224125.3", ".3332342251.", "12332441251."], 0.743),
]


@pytest.mark.parametrize(("coders", "alpha"), PUBLISHED, ids=["binary", "nominal", "four observers with gaps"])
def test_alpha_is_that_of_the_published_examples(coders: list[str], alpha: float) -> None:
    units = [[each for each in unit if each != "."] for unit in zip(*coders, strict=True)]
    found = krippendorff(units)
    assert round(found.alpha, 3) == alpha and found.interval[0] < alpha < found.interval[1]


def test_alpha_holds_its_truth_and_knows_chance_and_perfection() -> None:
    random, held = np.random.default_rng(1_000_000), 0
    for _ in range(RUNS):  # two people who name the truth, one of two equal outcomes, in 90 %: alpha is 0.8 ** 2
        truth = random.random(120) < 0.5
        pairs = np.where(random.random((2, 120)) < 0.9, truth, ~truth)
        low, high = krippendorff(pairs.T.tolist(), DRAWS).interval
        held += low <= 0.64 <= high
    assert held >= LEAST * RUNS
    chance = krippendorff((random.random((4000, 2)) < 0.3).tolist(), DRAWS)
    assert abs(chance.alpha) < 0.06 and chance.interval[0] < 0 < chance.interval[1]
    perfect = krippendorff([("a", "a"), ("b", "b")] * 30)
    assert perfect.alpha == 1 and 0.85 < perfect.interval[0] < 1 and perfect.differ == 0


@pytest.mark.parametrize("units", [[], [("a",), ("b",)], [("a", "a"), ("a", "a")]])
def test_alpha_is_not_defined_without_two_looks_or_two_outcomes(units: list[tuple[str, ...]]) -> None:
    found = krippendorff(units)
    assert np.isnan(found.alpha) and np.isnan(found.interval).all()


def test_a_difference_in_every_picture_is_not_sure() -> None:
    prompts = [k // 2 for k in range(16)]
    found, other = difference([1] * 16, [0] * 16, prompts), difference([0] * 16, [1] * 16, prompts)
    assert found.value == 1 and found.interval == (wilson(8, 8)[0], 1.0)
    assert other.value == -1 and other.interval == (-1.0, -wilson(8, 8)[0])
