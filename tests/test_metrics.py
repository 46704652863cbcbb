"""Metrics against independent formulas; what they need and do not find is an error, never a perfect score."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import efface
from efface import Row, Sample, Score, registry
from efface.core import config
from efface.metrics import _features, _judging, _samples, _stats, clip_score, in_prompt_clip
from efface.metrics.asr import ASR
from efface.metrics.clip_score import ClipScore
from efface.metrics.detection import Detection
from efface.metrics.deviation_ratio import DeviationRatio
from efface.metrics.fid import FID, frechet
from efface.metrics.in_prompt_clip import InPromptClip
from efface.metrics.inappropriateness import Inappropriateness, expected_max
from efface.metrics.kid import KID, Pairs
from efface.metrics.lpips import LPIPS
from efface.metrics.removal import Removal
from efface.metrics.retention import Retention
from efface.models.emoji import aligned, text_encoder
from efface.models.emoji.eyes import load_eyes
from efface.models.emoji.weights import FOLDER, sha256


def sample(name: str, value: float | Tensor = 0.0, **fields: Any) -> Sample:
    """A row whose 16 x 16 picture has one colour, or the given one."""
    pixels = value if isinstance(value, Tensor) else torch.full((3, 16, 16), value)
    return Sample(Row(name, fields.pop("prompt", "a cat"), 1_000_000, **fields), pixels=pixels)


def drawn(k: int) -> Image.Image:
    """A harmless picture: coloured blocks."""
    rng = np.random.default_rng(k)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48), Image.Resampling.NEAREST)


def by_name(scores: Sequence[Score]) -> dict[str, Score]:
    assert len({s.metric for s in scores}) == len(scores)
    return {s.metric: s for s in scores}


def stub(*thresholds: float) -> Callable[[tuple[str, ...]], Any]:
    """Judges that see the thing in pictures brighter than their thresholds."""

    class Bright:
        name = "brightness"

        def __call__(self, images: Tensor) -> Tensor:
            return torch.stack([images.mean((1, 2, 3)) > t for t in thresholds])

    return lambda names: Bright()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formulas are tried on fewer prompts than a score needs."""
    monkeypatch.setattr(_stats, "LEAST", 2)


# ---------------------------------------------------------------- intervals


def test_a_mean_needs_as_many_prompts_as_its_interval_needs() -> None:
    """An interval of 95 % covers the truth in at least 90 % of the cases, and with fewer prompts it does not."""
    rng, found = np.random.default_rng(1_000_000), {}
    for n in (_stats.LEAST, _stats.LEAST // 2):
        values = rng.normal(size=(4_000, n))
        means = values @ _stats.weights(n, 400).T / n
        low, high = np.percentile(means, (2.5, 97.5), axis=1)
        found[n] = float(((low <= 0) & (high >= 0)).mean())
    enough, half = found.values()
    assert enough > 0.885 > 0.87 > half, found  # 0.904 and 0.846 by the t distribution, less the noise of 400 draws


def test_scores_of_few_prompts_are_not_given(numbers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stats, "LEAST", 10)
    rows = [sample(f"r{k}", k / 20, kind="benign", prompt=str(k / 20), cluster=f"c{k}") for k in range(_stats.LEAST)]
    dual = [dataclasses.replace(s, row=dataclasses.replace(s.row, kind="dual")) for s in rows]
    clean = [dataclasses.replace(s, row=dataclasses.replace(s.row, kind="clean", id=f"{s.row.id}-clean")) for s in dual]
    for metric, group, base in (
        (ClipScore(), rows, rows),
        (KID(features="eye"), rows, rows),
        (InPromptClip(), dual, [*dual, *clean]),
    ):
        (score,) = metric(group[1:], base)  # type: ignore[operator]
        assert math.isnan(score.value) and math.isnan(score.low) and score.n == _stats.LEAST - 1
        assert score.protocol.endswith("; not given: 9 prompts, fewer than 10") and not score.per_sample
        whole = metric(group, base)  # type: ignore[operator]
        assert whole[0].metric == score.metric and not math.isnan(whole[0].value)
    twice = [*rows[1:], sample("again", 0.5, kind="benign", prompt="0.5", cluster="c1")]  # of a prompt that is there
    assert math.isnan(ClipScore()(twice, twice)[0].value)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), min_size=6, max_size=30))
@settings(max_examples=15, deadline=None)
def test_the_vectorised_bootstrap_is_the_plain_one(data: list[tuple[int, int]]) -> None:
    values, cluster = np.array([v for v, _ in data], float), np.unique([c for _, c in data], return_inverse=True)[1]
    n = cluster.max() + 1
    low, high = _stats.mean_interval(values, cluster)
    if n < 2:
        assert math.isnan(low) and math.isnan(high)
        return
    draws = np.random.default_rng(_stats.SEED).integers(n, size=(_stats.DRAWS, n))
    means = [np.concatenate([values[cluster == c] for c in draw]).mean() for draw in draws]
    if 0 < values.mean() < 1:
        np.testing.assert_allclose((low, high), np.percentile(means, (2.5, 97.5)))


def test_rows_of_one_cluster_count_once() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random(40) < 0.5).astype(float)
    alone = _stats.mean_interval(targets, np.arange(40))
    together = _stats.mean_interval(np.repeat(targets, 25), np.repeat(np.arange(40), 25))
    pretended = _stats.mean_interval(np.repeat(targets, 25), np.arange(1000))
    np.testing.assert_allclose(alone, together)
    assert together[1] - together[0] > 4 * (pretended[1] - pretended[0])
    # a binomial share: +- 1.96 sqrt(p (1 - p) / n)
    p = targets.mean()
    assert together[1] - together[0] == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 40), rel=0.15)


def test_none_of_many_is_not_sure() -> None:
    for n in (2, 16, 300):
        low, high = _stats.mean_interval(np.zeros(n), np.arange(n))
        z = 1.959964
        assert low == 0 and high == pytest.approx(z * z / (n + z * z))
        assert _stats.mean_interval(np.ones(n), np.arange(n)) == (pytest.approx(1 - high), 1.0)


def test_clusters_are_by_name_and_rows_without_one_are_their_own() -> None:
    rows = [Row("a", "x", 0, cluster="c"), Row("c", "x", 0), Row("b", "x", 0, cluster="c"), Row("d", "x", 0)]
    assert _stats.clusters(rows).tolist() == [0, 1, 0, 2]


# ---------------------------------------------------------------- detection, removal, retention


def test_removal_is_absolute_and_relative_by_the_worse_judge() -> None:
    base = [sample(f"r{k}", v, concept="cat") for k, v in enumerate([0.9, 0.9, 0.9, 0.5, 0.0])]
    now = [sample(f"r{k}", v, concept="cat") for k, v in enumerate([0.9, 0.5, 0.1, 0.1, 0.1])]
    scores = by_name(Removal(detector=stub(0.4, 0.8))(now, base[::-1]))  # the order of `base` does not matter
    # first judge: 4 of 5 before, 2 of 5 after; second: 3 of 5 before, 1 of 5 after
    assert scores["removal.absolute"].value == pytest.approx(1 - 2 / 5)
    assert scores["removal.relative"].value == pytest.approx(min(1 - 2 / 4, 1 - 1 / 3))
    assert scores["removal.absolute"].per_sample == {"r0": 0, "r1": 0, "r2": 1, "r3": 1, "r4": 1}
    assert scores["removal.absolute"].n == 5 and scores["removal.absolute"].protocol == "brightness"
    for score in scores.values():
        assert score.low <= score.value <= score.high


def test_always_and_never() -> None:
    dark, light = ([sample(f"r{k}", v, concept="cat") for k in range(8)] for v in (0.0, 1.0))
    always, never = stub(-1.0), stub(2.0)
    assert {s.value for s in Removal(detector=always)(dark, light)} == {0.0}
    absolute = Removal(detector=stub(0.5))(dark, light)[0]
    assert absolute.value == 1.0 and absolute.low < 0.75  # eight pictures do not prove it
    assert by_name(Removal(detector=stub(0.5))(dark, light))["removal.relative"].value == 1.0
    absolute, relative = Removal(detector=never)(dark, light)
    assert all(math.isnan(v) for s in (absolute, relative) for v in (s.value, s.low, s.high))
    assert Removal(detector=stub(0.5))(light, light)[1].value == 0.0
    # a judge that saw nothing before says nothing; the other one decides
    assert Removal(detector=stub(0.5, 2.0))(dark, light)[1].value == 1.0


def test_scores_are_split_by_fields_of_rows() -> None:
    now = [
        sample(f"{kind}{k}", 0.0 if kind == "theme" else 1.0, concept="cat", kind=kind)
        for kind in ("explicit", "theme")
        for k in range(3)
    ]
    scores = by_name(
        Removal(detector=stub(0.5))([*now, sample("benign", kind="benign")], [*now, sample("benign", kind="benign")])
    )
    assert scores["removal.absolute"].value == 0.5 and scores["removal.absolute"].n == 6
    assert scores["removal.absolute/cat/explicit"].value == 0 and scores["removal.relative"].value == 0
    theme = [scores[f"removal.{which}/cat/theme"] for which in ("absolute", "relative")]
    assert all(math.isnan(score.value) for score in theme)  # the base model never shows it there
    with pytest.raises(ValueError, match="`by` to be one of 'kind', 'category', 'concept', got 'seed'"):
        Removal(detector=stub(0.5), by=("seed",))(now, now)


def test_removal_and_retention_refuse_a_base_of_other_rows() -> None:
    now = [sample("a", concept="cat"), sample("b", concept="cat")]
    metric = Removal(detector=stub(0.5))
    with pytest.raises(ValueError, match="removal needs the base model's pictures"):
        metric(now)
    with pytest.raises(ValueError, match="needs the base model's picture of row 'b'"):
        metric(now, now[:1])
    with pytest.raises(ValueError, match="another row with id 'b' in `base`"):
        metric(now, [now[0], sample("b", concept="dog")])


def test_detection_counts_pictures_and_blank_ones() -> None:
    noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = [sample("a", 0.9, concept="cat"), sample("b", noise, concept="cat"), sample("c", 0.1), sample("d", noise)]
    scores = by_name(Detection(detector=stub(0.4, 0.8))(found))
    assert scores["detection"].value == 1.0 and scores["detection"].n == 2  # the first judge sees it in both
    assert scores["detection.blank"].value == 0.5 and scores["detection.blank"].n == 4
    assert set(scores) == {"detection", "detection.blank"}


def test_retention_asks_for_any_of_the_things_to_keep() -> None:
    asked: list[tuple[str, ...]] = []

    def spy(names: tuple[str, ...]) -> Any:
        asked.append(names)
        return stub(0.5)(names)

    rows = [("a", 1.0, ("dog",)), ("b", 0.0, ("dog", "cat")), ("c", 1.0, ("dog",)), ("d", 0.0, ())]
    now = [sample(name, v, keep=keep) for name, v, keep in rows]
    base = [sample(name, 1.0, keep=keep) for name, _, keep in rows]
    scores = by_name(Retention(detector=spy)(now, base))
    assert set(asked) == {("dog",), ("dog", "cat")}
    assert scores["retention"].value == pytest.approx(2 / 3) and scores["retention"].n == 3
    assert scores["retention.relative"].value == pytest.approx(2 / 3)
    assert by_name(Retention(detector=stub(0.5))(base, now))["retention.relative"].value == pytest.approx(3 / 2)
    assert set(by_name(Retention(detector=stub(0.5))(now))) == {"retention"}


def test_a_detector_that_fails_is_not_safe(tmp_path: Path) -> None:
    class Broken:
        name = "broken"

        def __call__(self, images: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    good = [sample(f"r{k}", concept="cat") for k in range(3)]
    with pytest.raises(RuntimeError, match="out of memory"):
        Removal(detector=lambda names: Broken())(good, good)
    for answer in (torch.zeros(1, 3), torch.zeros(3, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)):

        class Odd:
            name = "odd"

            def __call__(self, images: Tensor, answer: Tensor = answer) -> Tensor:
                return answer

        with pytest.raises(ValueError, match=r"'odd' to answer bool \[judges, 3\]"):
            Detection(detector=lambda names: Odd())(good)
    for pixels in (torch.full((3, 16, 16), math.nan), torch.full((3, 16, 16), 1.5), torch.zeros(16, 16)):
        with pytest.raises(ValueError, match="picture of row 'bad'"):
            Detection(detector=stub(0.5))([*good, sample("bad", pixels, concept="cat")])
    (tmp_path / "x.png").write_bytes(b"no picture")
    broken = Sample(Row("bad", "a cat", 0, concept="cat"), tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png is not a PNG, JPEG or WebP picture"):
        Removal(detector=stub(0.5))([*good, broken], [*good, broken])


def test_pictures_of_several_sizes_are_judged_in_order() -> None:
    pictures = [sample(f"r{k}", torch.full((3, 16 + 8 * (k % 2), 16), k / 10), concept="cat") for k in range(9)]
    hits, _ = _judging.judged(pictures, stub(0.45), lambda s: ("cat",))
    assert hits.tolist() == [[k / 10 > 0.45 for k in range(9)]]
    assert [len(b) for b in _samples.batches([sample(f"r{k}") for k in range(130)])] == [64, 64, 2]


# ---------------------------------------------------------------- fit of pictures and texts


class Numbers:
    """An encoder of two judges for pictures of one colour: an angle each; texts are numbers."""

    name = "numbers"

    def images(self, images: Tensor) -> Tensor:
        v = images.mean((1, 2, 3))
        return torch.stack([torch.stack([a.cos(), a.sin()], -1) for a in (v, v + 0.1)])

    def texts(self, texts: Sequence[str]) -> Tensor:
        v = torch.tensor([float(t) for t in texts])
        return torch.stack([v.cos(), v.sin()], -1)


@pytest.fixture
def numbers(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (clip_score, in_prompt_clip):
        monkeypatch.setattr(module, "encoder", lambda name: Numbers())


def test_clip_score_is_the_mean_cosine_above_its_floor(numbers: None) -> None:
    now = [
        sample(f"r{k}", v, kind="benign", prompt=p)
        for k, (v, p) in enumerate([(0.1, "0.2"), (0.5, "0.9"), (0.9, "0.9")])
    ]
    base = [sample(s.row.id, float(s.row.prompt), kind="benign", prompt=s.row.prompt) for s in now]
    scores = by_name(ClipScore()([*now, sample("other", kind="dual")], base))
    a, b = (np.mean([math.cos(s.pixels.mean() + d - float(s.row.prompt)) for s in now]) for d in (0, 0.1))  # type: ignore[union-attr]
    assert scores["clip_score"].value == pytest.approx(min(a, b)) and scores["clip_score"].n == 3
    assert scores["clip_score.base"].value == pytest.approx(math.cos(0.1))  # the second judge is off by 0.1
    wrong = [(0.1, 0.9), (0.1, 0.9), (0.5, 0.2), (0.9, 0.2)]  # of rows with another prompt
    floors = [np.mean([math.cos(v + d - p) for v, p in wrong]) for d in (0, 0.1)]
    assert scores["clip_score.floor"].value == pytest.approx(max(floors))


def pairs(*values: tuple[float, float, float]) -> tuple[list[Sample], list[Sample]]:
    """Samples of pairs (erased dual, plain dual, plain clean); the clean prompt fits the clean picture."""
    now, base = [], []
    for k, (erased, plain, clean) in enumerate(values):
        for value, side in ((erased, now), (plain, base)):
            side.append(sample(f"p{k}", value, kind="dual", concept="cat", prompt="3.0"))
            side.append(sample(f"p{k}-clean", clean, kind="clean", prompt=str(clean)))
    return now, base


def test_in_prompt_clip_holds_the_erased_picture_against_the_clean_text(numbers: None) -> None:
    now, base = pairs((0.3, 0.8, 0.1), (0.6, 0.9, 0.2), (0.5, 0.7, 0.4))
    scores = by_name(InPromptClip()(now, base))
    fits = {d: [math.cos(v + d - c) for v, c in ((0.3, 0.1), (0.6, 0.2), (0.5, 0.4))] for d in (0.0, 0.1)}
    assert scores["in_prompt_clip"].value == pytest.approx(min(map(np.mean, fits.values())))
    assert scores["in_prompt_clip.ceiling"].value == pytest.approx(math.cos(0.1))
    plain = [(0.8, 0.1), (0.9, 0.2), (0.7, 0.4)]
    assert scores["in_prompt_clip.base"].value == pytest.approx(np.mean([math.cos(v + 0.1 - c) for v, c in plain]))
    assert scores["in_prompt_clip.base"].value < scores["in_prompt_clip"].value < scores["in_prompt_clip.ceiling"].value
    assert scores["in_prompt_clip"].n == 3


def test_in_prompt_clip_knows_the_same_from_the_best(numbers: None) -> None:
    now, base = pairs(*((v, v, c) for v, c in ((0.8, 0.1), (0.9, 0.2), (0.7, 0.4))))
    scores = by_name(InPromptClip()(now, base))
    assert scores["in_prompt_clip"].value == scores["in_prompt_clip.base"].value
    best, base = pairs(*((c, 0.9, c) for c in (0.1, 0.2, 0.4)))
    scores = by_name(InPromptClip()(best, base))
    assert scores["in_prompt_clip"].value == pytest.approx(scores["in_prompt_clip.ceiling"].value)
    assert scores["in_prompt_clip.normalised"].value == pytest.approx(1)
    swapped = [dataclasses.replace(s, pixels=o.pixels) for s, o in zip(base, best, strict=True)]
    worse = by_name(
        InPromptClip()(swapped, [dataclasses.replace(s, pixels=o.pixels) for s, o in zip(best, base, strict=True)])
    )
    assert worse["in_prompt_clip"].value == pytest.approx(scores["in_prompt_clip"].value)
    with pytest.raises(ValueError, match=r"clean half of row 'p0', got no row p0-clean"):
        InPromptClip()(best, [s for s in base if s.row.kind == "dual"])
    assert InPromptClip()(best[:-1], base[:-1])[0].n == 2  # a limit cut the last pair


def test_aligned_heads_load_with_the_eyes_they_belong_to(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Make it with recipes/emoji/train_aligned.py"):
        aligned.load_aligned(tmp_path)
    eyes = load_eyes()
    torch.manual_seed(0)
    heads = [aligned.Head(eye.width, 8) for eye in eyes.eyes]
    tensors = {f"{k}.{n}": t.half() for k, head in enumerate(heads) for n, t in head.state_dict().items()}
    save_file(tensors, tmp_path / "aligned.safetensors")
    facts = {
        "sha256": sha256(tmp_path / "aligned.safetensors"),
        "eyes_sha256": sha256(FOLDER / "eyes.safetensors"),
        "hidden": 8,
    }
    (tmp_path / "aligned.json").write_text(json.dumps(facts))
    judge = aligned.load_aligned(tmp_path)
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    z = judge.images(x)
    assert z.shape == (2, 4, 384) and torch.allclose(z.norm(dim=-1), torch.ones(2, 4), atol=1e-5)
    expected = heads[1].half().float()(aligned.features(eyes.eyes[1], x))
    torch.testing.assert_close(z[1], expected, atol=2e-5, rtol=1e-4)
    texts = judge.texts(["a cat", "a night at the pub with friends", "a cat"])
    torch.testing.assert_close(texts[0], judge.texts(["a cat"])[0], atol=1e-5, rtol=1e-4)  # padding does not count
    assert float(texts[0] @ texts[1]) < 0.5 < float(judge.texts(["a kitten"])[0] @ texts[0])
    for change, message in [
        ({"eyes_sha256": "0" * 64}, "belongs to other eyes"),
        ({"sha256": "0" * 64}, "is damaged"),
        ({"hidden": 9}, "holds no head"),
        ({"hidden": None}, "is damaged"),
    ]:
        (tmp_path / "aligned.json").write_text(json.dumps(facts | change))
        with pytest.raises(ValueError, match=message):
            aligned.load_aligned(tmp_path)


def test_sentence_vectors_are_masked_means() -> None:
    tokenizer, encoder = text_encoder()
    ids = tokenizer("a night at the pub", return_tensors="pt")
    with torch.no_grad():
        hidden = encoder(**ids)[0][0]
    found = aligned.sentences(["a night at the pub", "x"], tokenizer, encoder)[0]
    torch.testing.assert_close(found, F.normalize(hidden.mean(0), dim=-1), atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- distances


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)) @ np.diag(np.arange(1, d + 1) / d) + shift


def reference_frechet(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.linalg import sqrtm

    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real))


def carrying(x: np.ndarray, name: str = "r", **fields: Any) -> list[Sample]:
    """Samples whose features are their index into `x`: the picture's mean tells it."""
    return [sample(f"{name}{k}", k / 1000, kind="benign", **fields) for k in range(len(x))]


def reading(*tables: np.ndarray) -> Callable[[Tensor], Tensor]:
    def extract(images: Tensor) -> Tensor:
        index = (images.mean((1, 2, 3)) * 1000).round().long()
        return torch.stack([torch.from_numpy(t)[index] for t in tables])

    return extract


@given(st.integers(2, 6), st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_frechet_is_the_textbook_formula(d: int, seed: int) -> None:
    x, y = features(4 * d, d, seed), features(3 * d, d, seed + 1, 0.3)
    assert frechet(x, y) == pytest.approx(reference_frechet(x, y), rel=1e-6)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9) and frechet(x, y) == pytest.approx(frechet(y, x))
    w = np.random.default_rng(seed).integers(1, 4, len(x)).astype(float)
    assert frechet(x, y, w) == pytest.approx(frechet(np.repeat(x, w.astype(int), 0), y))


def test_fid_of_pictures(tmp_path: Path) -> None:
    both = np.concatenate([features(30, 4, 0), features(30, 4, 1, 0.5)])
    now = carrying(both[:30])
    base = [dataclasses.replace(s, pixels=torch.full((3, 16, 16), (k + 30) / 1000)) for k, s in enumerate(now)]
    (score,) = FID(features=reading(both, both * 0.5))(now, base)
    assert score.metric == "fid_features" and score.n == 30
    assert score.value == pytest.approx(reference_frechet(both[:30], both[30:]), rel=1e-6)  # the worse judge
    assert score.low < score.value < score.high
    (same,) = FID(features=reading(both))(now, now)
    assert same.value == pytest.approx(0, abs=1e-9)
    (few,) = FID(features=reading(both))(now[:4], base[:4])
    assert math.isnan(few.value) and "not defined: 4 pictures for 4 features, take kid" in few.protocol


@pytest.mark.parametrize("reference", ["", "coco"])
def test_the_interval_of_fid_holds_its_value_and_its_mean(monkeypatch: pytest.MonkeyPatch, reference: str) -> None:
    """Of many draws with 60 clusters of two pictures; the pictures of one cluster are alike."""
    rng, which = np.random.default_rng(1), np.repeat(np.arange(60), 2)
    group = [dataclasses.replace(s.row, cluster=f"c{k}") for k, s in zip(which, carrying(np.empty(120)), strict=True)]
    now = [Sample(row, pixels=torch.zeros(3, 16, 16)) for row in group]

    def one() -> tuple[np.ndarray, np.ndarray]:
        scene = rng.normal(size=(60, 6))[which] if not reference else 0.0  # which both pictures show
        x, y = (scene + 0.7 * rng.normal(size=(60, 6))[which] + 0.5 * rng.normal(size=(120, 6)) for _ in range(2))
        return x + np.array([0.8, 0, 0, 0, 0, 0]), y

    drawn_ = [one() for _ in range(60)]
    values = [frechet(x, y) for x, y in drawn_]
    found = [FID(reference=reference)._interval(x, y, v, now) for (x, y), v in zip(drawn_, values, strict=True)]
    assert all(low < value < high for value, (low, high) in zip(values, found, strict=True))
    covered = np.mean([low <= np.mean(values) <= high for low, high in found])
    assert covered >= 0.85
    width = np.mean([high - low for low, high in found]) / (2 * 1.96 * np.std(values))
    assert 0.7 < width < 1.6  # neither too narrow nor useless


def test_distances_are_named_by_what_they_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        ("eye", ""): "_eye",
        ("inception", ""): "_base",
        ("inception", "coco"): "_coco",
        ("eye", "coco"): "_eye_coco",
    }
    for (which, reference), name in names.items():
        assert _features.named("fid", which, reference) == f"fid{name}"
    # Inception, with a stub in its place: bytes go in, 2,048 features come out
    seen: list[Tensor] = []

    def net(x: Tensor) -> Tensor:
        seen.append(x)
        return x.float().mean((2, 3)).repeat(1, 2)

    monkeypatch.setattr(_features, "_inception", lambda: net)
    for k in range(12):
        drawn(k).save(tmp_path / f"{k:02d}.png")
    now = [Sample(Row(f"r{k}", "x", 0, kind="benign"), tmp_path / f"{k:02d}.png") for k in range(12)]
    scores = KID(features="inception", reference=str(tmp_path))(now) + KID(features="inception")(now, now)
    assert [s.metric for s in scores] == ["kid_coco", "kid_base"] and seen[0].dtype == torch.uint8
    assert scores[1].value == 0 and "Inception" in scores[0].protocol
    with pytest.raises(FileNotFoundError, match="is not a folder with pictures"):
        FID(reference=str(tmp_path / "none"))(now)
    with pytest.raises(ValueError, match="Expected `features` to be 'eye'"):
        FID(features="vgg")(now, now)


def test_a_resample_of_clusters_looks_no_more_alike_than_the_pictures() -> None:
    rng = np.random.default_rng(0)
    which = np.repeat(np.arange(12), 6)
    x = rng.normal(size=(12, 8))[which] + 0.1 * rng.normal(size=(72, 8))  # pictures of one cluster are alike
    pairs = Pairs(x @ x.T, which)
    w = np.array([2, 0, 1, 3] * 3, np.float64)
    copies = [(c, k) for c in range(12) for k in range(int(w[c]))]
    rows = [(copy, i) for copy in copies for i in np.flatnonzero(which == copy[0])]
    kept = [
        pairs.kernel[i, j] for a, i in rows for b, j in rows if (a == b and i != j) or (a != b and which[i] != which[j])
    ]
    assert pairs.mean(w) == pytest.approx(float(np.mean(kept)))
    plain = pairs.mean(np.ones(12))
    assert plain == pytest.approx((pairs.kernel.sum() - np.trace(pairs.kernel)) / (72 * 71))
    drawn = np.array([pairs.mean(w) for w in _stats.weights(12, 400)])
    assert abs(drawn.mean() - plain) < 0.3 * drawn.std()  # with pairs of copies it is 0.87


def test_kid_is_the_double_sum(few: None, tmp_path: Path) -> None:
    both = np.concatenate([features(9, 4, 0), features(9, 4, 1, 0.5)])
    x, y = both[:9], both[9:]
    now = carrying(x)
    base = [dataclasses.replace(s, pixels=torch.full((3, 16, 16), (k + 9) / 1000)) for k, s in enumerate(now)]

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    other = [(i, j) for i in range(9) for j in range(9) if i != j]
    within = np.mean([k(x[i], x[j]) for i, j in other]) + np.mean([k(y[i], y[j]) for i, j in other])
    twins = within - 2 * np.mean([k(x[i], y[j]) for i, j in other])
    (score,) = KID(features=reading(both))(now, base)
    assert score.value == pytest.approx(1000 * twins) and score.low < score.high
    assert KID(features=reading(both))(now, now)[0].value == 0
    # against a folder of other pictures: the published estimator, here torchmetrics'
    from torchmetrics.image.kid import poly_mmd

    for j in range(9):
        Image.new("RGB", (16, 16), (round(255 * j / 20),) * 3).save(tmp_path / f"{j}.png")

    def table(images: Tensor) -> Tensor:
        index = (images.mean((1, 2, 3)) * 20).round().long()
        own = (images.mean((1, 2, 3)) * 1000).round().long()
        is_file = ((images.mean((1, 2, 3)) * 255).round() / 255 - images.mean((1, 2, 3))).abs() < 1e-6
        return torch.from_numpy(np.where(is_file[:, None], y[index.clamp(max=8)], x[own.clamp(max=8)]))[None]

    now = [dataclasses.replace(s, pixels=torch.full((3, 16, 16), (i + 0.3) / 1000)) for i, s in enumerate(now)]
    (score,) = KID(features=table, reference=str(tmp_path))(now)
    assert score.value == pytest.approx(1000 * float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y))), rel=1e-6)
    assert score.metric == "kid_features_coco"
    assert math.isnan(KID(features=reading(both))(now[:1], base[:1])[0].value)


def test_the_eyes_tell_other_pictures_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(12, 3, 4, 4, generator=generator), 64, mode="bilinear")
    rough = (smooth + 0.3 * torch.randn(12, 3, 64, 64, generator=generator)).clamp(0, 1)
    rows = [Row(f"r{k}", "x", 0, kind="benign") for k in range(12)]
    now, base = ([Sample(r, pixels=p) for r, p in zip(rows, x, strict=True)] for x in (rough, smooth))
    (far,), (same,) = KID()(now, base), KID()(base, base)
    assert far.metric == "kid_eye" and abs(same.value) < 1e-9 < far.low
    assert math.isnan(FID()(now, base)[0].value)


def test_the_encoder_of_emoji_judges_no_pictures_of_other_models() -> None:
    rows = [Row(f"r{k}", "a cat", 0, kind="benign") for k in range(12)]
    with pytest.raises(ValueError, match=r"pictures of 64 x 64 pixels.*got \(128, 128\). Name a CLIP model"):
        ClipScore()([Sample(row, pixels=torch.rand(3, 128, 128)) for row in rows])


def test_lpips_compares_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    from efface.metrics import lpips

    seen: list[tuple[int, ...]] = []

    def net(x: Tensor, y: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        assert x.min() >= -1 and x.max() <= 1
        return (x - y).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(lpips, "_net", lambda name: net)
    now = [sample(f"r{k}", v, kind="benign") for k, v in enumerate([0.2, 0.5, 1.0])]
    base = [sample(f"r{k}", v, kind="benign") for k, v in enumerate([0.2, 0.75, 0.0])]
    (score,) = LPIPS()(now, base[::-1])
    assert score.value == pytest.approx((0 + 0.5 + 2) / 3) and seen == [(3, 3, 16, 16)]
    LPIPS(size=8)(now, base)
    assert seen[-1] == (3, 3, 8, 8)
    with pytest.raises(ValueError, match="pictures of one size"):
        LPIPS()(now[:1], [sample("r0", torch.zeros(3, 8, 8), kind="benign")])
    with pytest.raises(ValueError, match="`net` to be one of 'alex', 'vgg', 'squeeze'"):
        LPIPS(net="resnet")


# ---------------------------------------------------------------- fairness, attacks, I2P


def test_deviation_ratio_of_known_counts() -> None:
    def of(values: str, classes: tuple[str, ...]) -> dict[str, Score]:
        def judge(names: tuple[str, ...]) -> Any:
            level = classes.index(names[0]) / 10
            return type(
                "J", (), {"name": "j", "__call__": lambda s, x: ((x.mean((1, 2, 3)) - level).abs() < 0.01)[None]}
            )()

        rows = [sample(f"r{k}", int(v) / 10, kind="fairness", category="doctor") for k, v in enumerate(values)]
        return by_name(DeviationRatio(detector=judge, classes=classes)(rows))

    two, three = ("male", "female"), ("a", "b", "c")
    assert of("0101", two)["deviation_ratio"].value == 0
    assert of("0000", two)["deviation_ratio"].value == 1
    assert of("0001", two)["deviation_ratio"].value == pytest.approx(0.5)
    assert of("000112", three)["deviation_ratio"].value == pytest.approx((3 / 6 - 1 / 3) / (2 / 3))
    scores = of("00019", two)  # one picture shows nobody
    assert scores["deviation_ratio"].value == pytest.approx(0.5) and scores["deviation_ratio"].n == 4
    assert scores["deviation_ratio.undecided"].value == 0.2
    assert scores["deviation_ratio"].low <= 0.5 <= scores["deviation_ratio"].high
    nobody = of("999", two)
    assert math.isnan(nobody["deviation_ratio"].value) and nobody["deviation_ratio.undecided"].value == 1
    with pytest.raises(ValueError, match="at least two `classes`"):
        DeviationRatio(classes=("male",), detector="nudenet")


def test_deviation_ratio_is_per_profession_and_by_the_eyes() -> None:
    grey = [
        sample(f"{c}{k}", torch.full((3, 64, 64), 0.5), kind="fairness", category=c)
        for c in ("cook", "farmer")
        for k in range(2)
    ]
    scores = by_name(DeviationRatio()(grey))
    assert set(scores) == {"deviation_ratio.undecided", "deviation_ratio/cook", "deviation_ratio/farmer"}
    assert scores["deviation_ratio.undecided"].value == 1 and math.isnan(scores["deviation_ratio/cook"].value)


def test_attack_success_counts_prompts() -> None:
    plain = [("a", 1.0), ("b", 0.0), ("c", 0.0), ("d", 0.0)]
    rows = [sample(name, v, concept="cat", kind="natural", cluster=name) for name, v in plain]
    tries = [("b", 0.0), ("b", 1.0), ("c", 0.0), ("c", 0.0)]
    rows += [sample(f"{n}-{k}", v, concept="cat", kind="attack", cluster=n) for k, (n, v) in enumerate(tries)]
    scores = by_name(ASR(detector=stub(0.5))(rows))
    assert scores["asr.pre"].value == 1 / 4 and scores["asr.pre"].n == 4
    assert scores["asr"].value == 2 / 4 and scores["asr"].per_sample == {"a": 1, "b": 1, "c": 0, "d": 0}
    assert "2 pictures a prompt" in scores["asr"].protocol
    assert set(by_name(ASR(detector=stub(0.5))(rows[:4]))) == {"asr.pre"}
    assert by_name(ASR(detector=stub(0.5))(rows[4:]))["asr"].value == 1 / 2
    assert set(by_name(ASR(detector=stub(0.5))(rows[4:]))) == {"asr"}
    assert ASR(detector=stub(0.5, -1.0))(rows)[1].value == 1  # the judge that sees it everywhere is the worse one


@given(st.lists(st.integers(0, 10), min_size=1, max_size=40), st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_the_expected_maximum_is_what_drawing_gives(counts: list[int], prompts: int) -> None:
    shares = np.array(counts) / 10
    mean, sd = (float(v[0]) for v in expected_max(shares[None], prompts))
    draws = np.random.default_rng(0).choice(shares, (20_000, prompts)).max(1)
    assert mean == pytest.approx(draws.mean(), abs=4 * draws.std() / math.sqrt(20_000) + 1e-3)
    assert sd == pytest.approx(draws.std(), abs=0.02)


def test_inappropriateness_takes_either_detector() -> None:
    shown = [(0.9, "a"), (0.1, "a"), (0.5, "b"), (0.5, "b"), (0.9, "c"), (0.9, "c")]
    rows = [sample(f"r{k}", v, concept="violence", cluster=c) for k, (v, c) in enumerate(shown)]

    class Dark:
        name = "darkness"

        def __call__(self, images: Tensor) -> Tensor:
            return (images.mean((1, 2, 3)) < 0.2)[None]

    one = by_name(Inappropriateness(detectors=(stub(0.7),), prompts=2)(rows))
    assert one["inappropriateness"].value == pytest.approx(3 / 6)
    # shares 0.5, 0, 1: of nine pairs the maximum is 0 once, 0.5 three times, 1 five times
    assert (
        one["inappropriateness.max"].value == pytest.approx((3 * 0.5 + 5) / 9) and one["inappropriateness.max"].n == 3
    )
    both = by_name(Inappropriateness(detectors=(stub(0.7), lambda names: Dark()), prompts=2)(rows))
    assert both["inappropriateness"].value == pytest.approx(4 / 6)
    assert "brightness or darkness" in both["inappropriateness"].protocol
    two = by_name(Inappropriateness(detectors=(stub(0.7, 0.4),), prompts=2)(rows))
    assert two["inappropriateness"].value == pytest.approx(5 / 6)  # the worse judge
    none = by_name(Inappropriateness(detectors=(stub(1.0),), prompts=2)(rows))["inappropriateness.max"]
    assert none.value == 0 and math.isnan(none.low) and math.isnan(none.high)  # none of three is not a sure none
    with pytest.raises(ValueError, match="at least one of `detectors`"):
        Inappropriateness(detectors=())


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", registry.methods("metrics"))
def test_a_metric_is_its_configuration_and_measures_nothing_of_nothing(name: str) -> None:
    cls = registry.resolve(name, "metrics")
    metric = cls()
    stored = json.loads(json.dumps(config(metric)))
    assert stored.pop("method") == name == cls.name
    assert config(cls(**stored)) == config(metric)
    assert cls.unit and cls.higher_is_better in (True, False, None)
    assert metric([], []) == []


def test_effectiveness_is_the_share_of_each_prompts_pictures() -> None:
    asked: list[tuple[str, int]] = []

    def pipe(prompt: list[str], generator: list[torch.Generator], output_type: str, **call: Any) -> Any:
        assert call["guidance_scale"] == 5.0
        asked.extend((p, g.initial_seed()) for p, g in zip(prompt, generator, strict=True))
        images = torch.stack(
            [
                torch.full((3, 8, 8), (g.initial_seed() % 10) / 10 if p == "some" else 1.0)
                for p, g in zip(prompt, generator, strict=True)
            ]
        )
        return SimpleNamespace(images=images)

    found = efface.effectiveness(["some", "all"], pipe, stub(0.25)(()), n=4, batch=3, guidance_scale=5.0)  # type: ignore[arg-type]
    assert found == [0.25, 1.0]  # seeds end in 0, 1, 2, 3: one is above 0.25
    assert asked == [(p, 1_000_000 + k) for p in ("some", "all") for k in range(4)]
    assert efface.effectiveness(["some"], pipe, stub(0.05, 0.25)(()), n=4, guidance_scale=5.0) == [0.25]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="number `n` >= 1"):
        efface.effectiveness(["some"], pipe, stub(0.5)(()), n=0)  # type: ignore[arg-type]
