"""Metrics against independent formulas; what they need and do not find is an error, never a perfect score."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

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
from efface.detectors import _base, _encoders, _named, classifier, nudenet
from efface.detectors.eyes import EmojiEyes
from efface.metrics import _features, _judging, _samples, _stats, clip_score, in_prompt_clip
from efface.metrics.asr import ASR
from efface.metrics.clip_score import ClipScore
from efface.metrics.detection import Detection
from efface.metrics.deviation_ratio import DeviationRatio
from efface.metrics.fid import FID, frechet
from efface.metrics.in_prompt_clip import InPromptClip
from efface.metrics.inappropriateness import Inappropriateness, expected_max
from efface.metrics.kid import KID
from efface.metrics.lpips import LPIPS
from efface.metrics.nudenet_counts import NudenetCounts
from efface.metrics.removal import Removal
from efface.metrics.retention import Retention
from efface.models.emoji import aligned, text_encoder
from efface.models.emoji.eyes import load_eyes
from efface.models.emoji.weights import FOLDER, sha256


def sample(name: str, value: float | Tensor = 0.0, **fields: Any) -> Sample:
    """A row whose 16 x 16 picture has one colour, or the given one."""
    pixels = value if isinstance(value, Tensor) else torch.full((3, 16, 16), value)
    return Sample(Row(name, fields.pop("prompt", "a cat"), 1_000_000, **fields), pixels=pixels)


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


# ---------------------------------------------------------------- intervals


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
    assert by_name(Removal(detector=stub(0.5))(dark, light))["removal.relative"].value == 1.0
    absolute, relative = Removal(detector=never)(dark, light)
    assert absolute.value == 1.0 and absolute.low < 0.75  # eight pictures do not prove it
    assert all(math.isnan(v) for v in (relative.value, relative.low, relative.high))
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
    assert scores["removal.absolute/cat/explicit"].value == 0 and scores["removal.absolute/cat/theme"].value == 1
    assert math.isnan(scores["removal.relative/cat/theme"].value) and scores["removal.relative"].value == 0
    with pytest.raises(ValueError, match="`by` to be one of 'kind', 'category', 'concept', got 'seed'"):
        Removal(detector=stub(0.5), by=("seed",))(now, now)


def test_removal_and_retention_refuse_a_base_of_other_rows() -> None:
    now = [sample("a", concept="cat"), sample("b", concept="cat")]
    metric = Removal(detector=stub(0.5))
    with pytest.raises(ValueError, match="removal needs the base model's pictures"):
        metric(now)
    with pytest.raises(ValueError, match="`base` has no picture of row 'b'"):
        metric(now, now[:1])
    with pytest.raises(ValueError, match="row 'b' of `base` is another row"):
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
    with pytest.raises(ValueError, match=r"x\.png cannot be read as a PNG, JPEG or WebP picture"):
        Removal(detector=stub(0.5))([*good, broken], [*good, broken])


def test_pictures_of_several_sizes_are_judged_in_order() -> None:
    pictures = [sample(f"r{k}", torch.full((3, 16 + 8 * (k % 2), 16), k / 10), concept="cat") for k in range(9)]
    hits, _ = _judging.judged(pictures, stub(0.45), lambda s: ("cat",))
    assert hits.tolist() == [[k / 10 > 0.45 for k in range(9)]]
    assert [len(b) for b in _samples.batches([sample(f"r{k}") for k in range(130)])] == [64, 64, 2]


# ---------------------------------------------------------------- detectors


def test_the_eyes_are_a_detector_and_a_look_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(7)
    pictures = torch.rand(5, 3, 64, 64, generator=generator)
    expected = load_eyes().concept(pictures, "alcohol")
    assert torch.equal(efface.detector("eyes", "alcohol")(pictures), expected)
    monkeypatch.setattr(EmojiEyes, "look", lambda self, images: pytest.fail("looked twice"))
    both = [
        (p, keep)
        for p, keep in zip(pictures, (("cat",), ("dog", "cat"), ("rocket",), ("cat",), ("watermark",)), strict=True)
    ]
    samples = [Sample(Row(f"r{k}", "x", 0, keep=keep), pixels=p) for k, (p, keep) in enumerate(both)]
    hits, words = _judging.judged(samples, "eyes", lambda s: s.row.keep)
    for k, (p, keep) in enumerate(both):
        assert torch.equal(hits[:, k], load_eyes().concept(p[None], keep)[:, 0])
    assert "worse" in words
    with pytest.raises(ValueError, match="unknown concept 'catt'"):
        efface.detector("eyes", "catt")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("eye", r"Unknown detector 'eye'\. Did you mean 'eyes'\?"),
        ({"name": "eyes", "treshold": 1}, "The detector 'eyes' has no option 'treshold'"),
        ({"name": "nudenet", "threshold": 0.2}, r"`threshold` in \[0\.25, 1\]"),
        ({"name": "nudenet", "labels": "7"}, "`labels` to be one of '2', '5', '6', '9'"),
    ],
)
def test_an_unknown_detector_or_option_is_named(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        efface.detector(spec, "nudity" if "nudenet" in str(spec) else "cat")


@dataclasses.dataclass(frozen=True)
class Bright:
    """A detector as another package would write it."""

    names: tuple[str, ...]
    threshold: float = 0.5
    anything_unsafe: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"brighter than {self.threshold:g}"

    def __call__(self, images: Tensor) -> Tensor:
        return (images.mean((1, 2, 3)) > self.threshold)[None]


@dataclasses.dataclass(frozen=True)
class Nameless:
    names: tuple[str, ...]


@pytest.fixture
def add_detectors(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that another distribution has these detectors."""

    def add(**values: str) -> None:
        entries = [EntryPoint(f"detectors.{name}", value, registry.GROUP) for name, value in values.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: entries)

    return add


def test_another_package_brings_a_detector(add_detectors: Callable[..., None]) -> None:
    add_detectors(bright=f"{__name__}:Bright")
    judge = efface.detector({"name": "bright", "threshold": 0.7}, "cat")
    assert judge == Bright(("cat",), 0.7) and registry.name_of(Bright) == "bright"
    assert [s.value for s in Detection(detector="bright")(shades())] == [
        s.value for s in Detection(detector=Bright)(shades())
    ]
    assert _named.judges_anything_unsafe("bright") and not _named.judges_anything_unsafe("eyes")
    with pytest.raises(ValueError, match="The detector 'bright' has no option 'treshold'. Did you mean 'threshold'"):
        efface.detector({"name": "bright", "treshold": 1})
    with pytest.raises(ValueError, match=r"Unknown detector 'brihgt'\. Did you mean 'bright'\? There is: .*bright"):
        efface.detector("brihgt")


def test_a_detector_name_is_taken_once(add_detectors: Callable[..., None]) -> None:
    add_detectors(eyes=f"{__name__}:Bright")
    with pytest.raises(ValueError, match=r"'eyes' is efface\.detectors\.eyes and .*:Bright\. Rename that one"):
        efface.detector("eyes", "cat")
    assert efface.detector("nudenet3_any5_t0.5").name.startswith("NudeNet")


def test_what_another_package_registers_has_to_be_a_detector(add_detectors: Callable[..., None]) -> None:
    add_detectors(odd="collections:OrderedDict", nameless=f"{__name__}:Nameless")
    with pytest.raises(TypeError, match="'odd' to be a dataclass with a field `names`"):
        efface.detector("odd")
    with pytest.raises(TypeError, match="Expected a detector, .* with a text `name`"):
        efface.detector("nameless", "cat")


@pytest.mark.parametrize("spec", [None, 3, ["eyes"]])
def test_a_detector_is_named_by_a_text_or_a_mapping(spec: Any) -> None:
    with pytest.raises(TypeError, match="Expected a detector's name, a mapping"):
        efface.detector(spec)


def drawn(k: int) -> Image.Image:
    """A harmless picture: coloured blocks."""
    rng = np.random.default_rng(k)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48), Image.Resampling.NEAREST)


def test_nudenet_sees_what_it_sees_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    handed: list[np.ndarray] = []
    real = nudenet._nudenet()
    monkeypatch.setattr(
        nudenet, "_nudenet", lambda: SimpleNamespace(detect=lambda x: handed.append(x) or real.detect(x))
    )
    samples = []
    for k in range(3):
        drawn(k).save(tmp_path / f"{k}.png")
        samples.append(Sample(Row(f"r{k}", "blocks", 0, concept="nudity"), tmp_path / f"{k}.png"))
    scores = by_name(Detection(detector="nudenet")(samples))
    assert scores["detection"].value == 0.0 and scores["detection"].n == 3
    for k, pixels in enumerate(handed):
        assert np.array_equal(pixels, cv2.imread(str(tmp_path / f"{k}.png")))
        assert real.detect(pixels) == real.detect(str(tmp_path / f"{k}.png"))
    assert len(handed) == 3 and "320n" in scores["detection"].protocol
    assert torch.equal(efface.detector("nudenet")(torch.zeros(1, 3, 32, 32)), torch.tensor([[False]]))


BOXES = {
    0: [
        ("FEMALE_BREAST_EXPOSED", 0.55, (0, 0, 4, 4)),
        ("FEMALE_BREAST_EXPOSED", 0.3, (4, 0, 4, 4)),
        ("FACE_FEMALE", 0.9, (0, 0, 2, 2)),
    ],
    1: [("FEET_EXPOSED", 0.65, (0, 0, 1, 1)), ("FEET_EXPOSED", 0.62, (1, 0, 1, 1))],
    2: [("MALE_BREAST_EXPOSED", 0.5, (0, 0, 1, 1))],
    3: [("BUTTOCKS_COVERED", 0.99, (0, 0, 1, 1))],
}


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """NudeNet that answers `BOXES` by the brightness of the picture; returns what it was asked."""
    asked: list[int] = []

    def detect(pixels: np.ndarray) -> list[dict[str, Any]]:
        asked.append(round(float(pixels.mean()) / 25.5))
        return [{"class": c, "score": s, "box": list(b)} for c, s, b in BOXES[asked[-1]]]

    monkeypatch.setattr(nudenet, "_nudenet", lambda: SimpleNamespace(detect=detect))
    _base._looks.clear()
    yield asked
    _base._looks.clear()


def shades() -> list[Sample]:
    return [sample(f"r{k}", k / 10, concept="nudity") for k in BOXES]


@pytest.mark.parametrize(
    ("protocol", "hits"),
    [
        ("nudenet3_any5_t0.5", [1, 0, 0, 0]),
        ("nudenet3_any6_t0.5", [1, 0, 1, 0]),
        ("nudenet3_any9_t0.6", [0, 1, 0, 0]),
        ("nudenet3_any9_t0.45", [1, 1, 1, 0]),
        ("nudenet3_any2_t0.25", [0, 0, 0, 0]),
        ({"name": "nudenet", "labels": "5", "threshold": 0.56}, [0, 0, 0, 0]),
    ],
)
def test_a_protocol_is_its_label_set_and_threshold(protocol: Any, hits: list[int], boxes: list[int]) -> None:
    scores = by_name(Detection(detector=protocol)(shades()))
    assert scores["detection"].value == sum(hits) / 4
    assert list((scores["detection"].per_sample or {}).values()) == hits


def test_boxes_are_stored_once_and_counted_in_both_ways(tmp_path: Path, boxes: list[int]) -> None:
    store = tmp_path / "boxes.jsonl"
    scores = by_name(NudenetCounts(threshold=0.25, store=str(store))(shades()))
    assert scores["nudenet_counts"].value == 5 and scores["nudenet_counts"].n == 4
    assert scores["nudenet_counts/FEMALE_BREAST_EXPOSED"].value == scores["nudenet_counts/FEET_EXPOSED"].value == 2
    assert scores["nudenet_counts"].low <= 5 <= scores["nudenet_counts"].high and boxes == [0, 1, 2, 3]
    _base._looks.clear()
    once = by_name(NudenetCounts(threshold=0.25, count="pictures", store=str(store))(shades()))
    assert once["nudenet_counts"].value == 3 and boxes == [0, 1, 2, 3]  # read, not detected again
    assert json.loads(store.read_text().splitlines()[0])["boxes"][0] == ["FEMALE_BREAST_EXPOSED", 0.55, [0, 0, 4, 4]]
    store.write_text(store.read_text()[:-9])  # as after a crash: the last picture is looked at again
    _base._looks.clear()
    assert by_name(NudenetCounts(threshold=0.25, store=str(store))(shades()))["nudenet_counts"].value == 5
    assert boxes == [0, 1, 2, 3, 3]


def test_a_judge_refuses_what_it_cannot_judge(boxes: list[int]) -> None:
    with pytest.raises(ValueError, match="NudeNet cannot judge tench; it knows nudity, sexual"):
        Detection(detector="nudenet")([sample("a", concept="tench")])


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    nudenet._nudenet.cache_clear()
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ImportError, match=r'pip install "efface\[nudenet\]"'):
        Removal(detector="nudenet")(shades(), shades())
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name in ("torchvision", "torch_fidelity") else real(name, *a),
    )
    pair = [sample("a", kind="benign")]
    with pytest.raises(ImportError, match=r'pip install "efface\[bench\]" torchvision'):
        LPIPS(net="vgg")(pair, pair)
    _features._inception.cache_clear()
    for metric in (FID(features="inception"), KID(features="inception")):
        with pytest.raises(ImportError, match=r'pip install "efface\[bench\]" torch-fidelity'):
            metric(pair, pair)


# ---------------------------------------------------------------- CLIP, Q16, classifiers


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny CLIP model of random weights."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"{c}{end}" for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")),
    ]
    CLIPTokenizer(vocab={w: k for k, w in enumerate(words)}, merges=[], model_max_length=8).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    made = CLIPConfig(text_config=text, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=12)
    CLIPModel(made).save_pretrained(folder)
    return str(folder)


def test_clip_features_are_the_models_own(clip: str) -> None:
    judge = _encoders.encoder(clip)
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (_encoders.MEAN, _encoders.STD))
    model = judge.model  # type: ignore[attr-defined]
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([[0, 2, 1]]), pixel_values=(x - mean) / std)
    torch.testing.assert_close(judge.images(x)[0], F.normalize(whole.image_embeds, dim=-1))
    texts = judge.texts(["a cat", "cat " * 40])  # the second is cut
    assert texts.shape == (2, 12) and torch.allclose(texts.norm(dim=-1), torch.ones(2))
    wide = torch.zeros(1, 3, 20, 40)
    wide[..., 10:30] = 1  # the middle, which is all that is left after the crop
    torch.testing.assert_close(judge.images(wide), judge.images(torch.ones(1, 3, 16, 16)), atol=2e-2, rtol=0)
    with pytest.raises(OSError, match="Cannot load the CLIP model '/nowhere'"):
        _encoders.encoder("/nowhere")


def test_zero_shot_takes_the_nearest_label(clip: str) -> None:
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels, judge = ("cat", "dog", "hat"), _encoders.encoder(clip)
    best = (judge.images(x)[0] @ judge.texts([f"a photo of {label}" for label in labels]).T).argmax(-1)
    for k, label in enumerate(labels):
        spec = {"name": "clip", "labels": list(labels), "clip": clip}
        assert torch.equal(efface.detector(spec, label)(x), (best == k)[None])
    with pytest.raises(ValueError, match=r"names out of the labels cat, got \['dog'\]"):
        efface.detector({"name": "clip", "labels": ["cat"], "clip": clip}, "dog")


PICTURE = torch.full((2, 3, 16, 16), 0.5)


class SeesGrey:
    """In place of NudeNet's network: it sees what is grey."""

    def detect(self, pixels: Any) -> list[dict[str, Any]]:
        grey = bool(((pixels[8, 8] > 100) & (pixels[8, 8] < 156)).all())
        return [{"class": "BUTTOCKS_EXPOSED", "score": 0.9, "box": [0, 0, 8, 8]}] * grey


@pytest.fixture
def judges(clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A detector of each kind."""
    monkeypatch.setattr(nudenet, "_nudenet", SeesGrey)
    save_file({"prompts": torch.randn(2, 12)}, tmp_path / "q16.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "cat", "1": "dog"}}))
    (tmp_path / "model.safetensors").touch()

    def logits(self: Any, images: Tensor) -> list[Tensor]:
        return list(torch.tensor([[1.0, 0.0]]).expand(len(images), 2))

    monkeypatch.setattr(classifier.Classifier, "look", logits)
    made = {
        "eyes": efface.detector("eyes", "cat"),
        "nudenet": efface.detector("nudenet", "nudity"),
        "clip": efface.detector({"name": "clip", "clip": clip}, "cat"),
        "q16": efface.detector({"name": "q16", "prompts": str(tmp_path / "q16.safetensors"), "clip": clip}),
        "classifier": efface.detector({"name": "classifier", "folder": str(tmp_path)}, "cat"),
    }
    assert registry.methods("detectors").keys() == made.keys()
    return made


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ((PICTURE * 255).byte(), r"got torch.uint8 \(2, 3, 16, 16\). Divide bytes by 255"),
        (PICTURE > 0, "got torch.bool"),
        (PICTURE * 255, "from 127.5 to 127.5. Scale them"),
        (PICTURE - 1, "from -0.5 to -0.5"),
        (torch.cat([PICTURE, PICTURE * math.nan]), "values that are not finite: .* Lower the strength"),
        (torch.cat([PICTURE, PICTURE * math.inf]), "values that are not finite"),
        (PICTURE.half() * math.nan, "values that are not finite"),
        (torch.cat([PICTURE, PICTURE[:, :1]], 1), r"got torch.float32 \(2, 4, 16, 16\). Give what a pipeline returns"),
        (PICTURE[:, :1], r"\(2, 1, 16, 16\)"),
        (PICTURE.movedim(1, -1), r"\(2, 16, 16, 3\)"),
        (PICTURE[0], r"\(3, 16, 16\)"),
        (PICTURE[..., :0], r"\(2, 3, 16, 0\)"),
    ],
)
@pytest.mark.parametrize("name", ["eyes", "nudenet", "clip", "q16", "classifier"])
def test_pictures_that_cannot_be_judged_are_refused(name: str, pictures: Tensor, message: str, judges: Any) -> None:
    """They are not safe: nothing could be seen in them."""
    with pytest.raises(ValueError, match=rf"Expected pictures as a float tensor \[N, 3, H, W\].*{message}"):
        judges[name](pictures)
    with pytest.raises(TypeError, match="got list. Give what a pipeline returns"):
        judges[name]([Image.new("RGB", (16, 16))])
    whole = judges[name](PICTURE)
    assert whole.dtype == torch.bool and whole.shape[1] == 2 and (name != "nudenet" or bool(whole.all()))
    for kind in (torch.float64, torch.bfloat16):
        assert torch.equal(judges[name](PICTURE.to(kind).requires_grad_()), whole)


def test_q16_is_the_nearer_learned_prompt(clip: str, tmp_path: Path) -> None:
    prompts = torch.randn(2, 12, generator=torch.Generator().manual_seed(3))
    save_file({"prompts": prompts}, tmp_path / "q16.safetensors")
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    spec = {"name": "q16", "prompts": str(tmp_path / "q16.safetensors"), "clip": clip}
    features = _encoders.encoder(clip).images(x)[0]
    expected = F.cosine_similarity(features, prompts[1:]) > F.cosine_similarity(features, prompts[:1])
    assert torch.equal(efface.detector(spec, "violence")(x)[0], expected)
    (tmp_path / "prompts.p").write_bytes(b"\x80\x04N.")
    for bad in ("", str(tmp_path / "prompts.p"), str(tmp_path / "none.safetensors")):
        with pytest.raises(FileNotFoundError, match="needs its learned prompts as a safetensors file"):
            efface.detector({"name": "q16", "prompts": bad, "clip": clip})
    save_file({"prompts": torch.zeros(3, 4)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r'expected one tensor "prompts" \[2, D\]'):
        efface.detector({"name": "q16", "prompts": str(tmp_path / "odd.safetensors"), "clip": clip})
    save_file({"prompts": torch.ones(2, 4)}, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="is 4 wide, but .* gives 12"):
        efface.detector({"name": "q16", "prompts": str(tmp_path / "narrow.safetensors"), "clip": clip})(x)
    with pytest.raises(ValueError, match="Q16 cannot judge cat"):
        efface.detector(spec, "cat")


def test_a_classifier_counts_its_top_labels_in_either_order(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {k: f"thing {k}" for k in range(12)}
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(**small, image_size=16, patch_size=8, id2label=names, label2id={v: k for k, v in names.items()})
    )
    model.eval().save_pretrained(tmp_path)
    facts = {
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
        "do_normalize": True,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model((x - 0.5) / 0.25).logits
    spec = {"name": "classifier", "folder": str(tmp_path)}
    for k, name in names.items():
        assert torch.equal(efface.detector(spec, name)(x)[0], logits.argmax(-1) == k)
        top3 = (logits.topk(3).indices == k).any(-1)
        assert torch.equal(efface.detector({**spec, "top": 3}, name)(x)[0], top3)
        place = sorted(names, key=str).index(k)  # folders 0, 1, 10, 11, 2, ...
        assert torch.equal(efface.detector({**spec, "order": "sorted"}, name)(x)[0], logits.argmax(-1) == place)
    with pytest.raises(ValueError, match=r"does not know all of thing 99\. Did you mean"):
        efface.detector(spec, "thing 99")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="pickles are not read"):
        efface.detector(spec, "thing 1")


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
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(ValueError, match=r"no clean half of row 'p0', a row p0-clean"):
        InPromptClip()(best, [s for s in base if s.row.kind == "dual"])
    assert InPromptClip()(best[:-1], base[:-1])[0].n == 2  # a limit cut the last pair


def test_aligned_heads_load_with_the_eyes_they_belong_to(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make it with recipes/emoji/train_aligned.py"):
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
    with pytest.raises(FileNotFoundError, match="is no folder with pictures"):
        FID(reference=str(tmp_path / "none"))(now)
    with pytest.raises(ValueError, match="Expected `features` to be 'eye'"):
        FID(features="vgg")(now, now)


def test_kid_is_the_double_sum(tmp_path: Path) -> None:
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

    def pipe(prompts: list[str], generator: list[torch.Generator], output_type: str, **call: Any) -> Any:
        assert call["guidance_scale"] == 5.0
        asked.extend((p, g.initial_seed()) for p, g in zip(prompts, generator, strict=True))
        images = torch.stack(
            [
                torch.full((3, 8, 8), (g.initial_seed() % 10) / 10 if p == "some" else 1.0)
                for p, g in zip(prompts, generator, strict=True)
            ]
        )
        return SimpleNamespace(images=images)

    found = efface.effectiveness(["some", "all"], pipe, stub(0.25)(()), n=4, batch=3, guidance_scale=5.0)  # type: ignore[arg-type]
    assert found == [0.25, 1.0]  # seeds end in 0, 1, 2, 3: one is above 0.25
    assert asked == [(p, 1_000_000 + k) for p in ("some", "all") for k in range(4)]
    assert efface.effectiveness(["some"], pipe, stub(0.05, 0.25)(()), n=4, guidance_scale=5.0) == [0.25]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="number `n` >= 1"):
        efface.effectiveness(["some"], pipe, stub(0.5)(()), n=0)  # type: ignore[arg-type]
