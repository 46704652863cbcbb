"""The eyes: shapes, thresholds, damaged files, and that nothing is seen where nothing is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from efface.models.emoji.concepts import truth, vocabulary
from efface.models.emoji.eyes import FEMALE, ICONS, INDEX, MALE, STYLES, ConceptEyes, Eye, Eyes, Seen, load_eyes
from efface.models.emoji.weights import FOLDER, check, sha256

trained = pytest.mark.skipif(
    not (FOLDER / "eyes.json").exists(), reason="the eyes are not trained yet: see recipes/emoji/train_eyes.py"
)


def thresholds(value: float = 0.5) -> dict[str, torch.Tensor]:
    return {
        "icons": torch.full((2, len(ICONS)), value),
        "styles": torch.full((2, len(STYLES)), value),
        "watermark": torch.full((2,), value),
    }


@pytest.fixture
def eyes() -> Eyes:
    torch.manual_seed(0)
    return Eyes([Eye(16), Eye(32)], thresholds())


def seen(n: int = 1, **icons: float) -> Seen:
    """Pictures in which both eyes see the named icons (underscores for hyphens) with these probabilities."""
    scores = torch.zeros(2, n, len(ICONS))
    for name, value in icons.items():
        scores[..., INDEX[name.replace("_", "-")]] = value
    styles = torch.full((2, n, len(STYLES)), 0.1)
    styles[..., STYLES.index("neon sign")] = 0.6
    return Seen(scores, styles, torch.full((2, n), 0.2))


def save(folder: Path, **changes: object) -> Path:
    """A folder as `--freeze` writes it, with two small eyes."""
    tensors = {f"{k}.{n}": t.half() for k in range(2) for n, t in Eye(16).state_dict().items() if t.is_floating_point()}
    save_file(tensors, folder / "eyes.safetensors")
    card = {
        "sha256": sha256(folder / "eyes.safetensors"),
        "icons": ICONS,
        "styles": STYLES,
        "widths": [16, 16],
        "thresholds": {name: table.tolist() for name, table in thresholds().items()},
    }
    (folder / "eyes.json").write_text(json.dumps(card | changes))
    return folder


def test_order_follows_the_vocabulary() -> None:
    assert len(ICONS) == len(set(ICONS)) == 149
    assert ICONS[:137] == tuple(vocabulary()["captions"])
    assert [ICONS[k] for k in MALE] == [p["male"] for p in vocabulary()["professions"].values()]
    assert [ICONS[k] for k in FEMALE] == [p["female"] for p in vocabulary()["professions"].values()]


def test_every_answer_has_one_row_per_eye(eyes: Eyes) -> None:
    images = torch.rand(5, 3, 64, 64)
    look = eyes.see(images)
    assert look.icons.shape == (2, 5, 149) and look.styles.shape == (2, 5, 5) and look.watermark.shape == (2, 5)
    assert ((look.icons >= 0) & (look.icons <= 1)).all() and torch.allclose(look.styles.sum(-1), torch.ones(2, 5))
    assert eyes.icons(images).shape == (2, 5, 149) and eyes.icons(images).dtype == torch.bool
    assert eyes.styles(images).shape == eyes.gender(images).shape == (2, 5)
    assert eyes.watermark(images).shape == eyes.concept(images, "alcohol").shape == (2, 5)
    assert not torch.equal(look.icons[0], look.icons[1])
    assert eyes.see(look) is look


def test_batching_does_not_change_the_answer(eyes: Eyes) -> None:
    images = torch.rand(260, 3, 32, 32)
    assert torch.allclose(eyes.see(images).icons[:, 256:], eyes.see(images[256:]).icons, atol=1e-5)
    assert eyes.icons(images[:0]).shape == (2, 0, 149)


def test_thresholds_are_per_eye_and_concept() -> None:
    table = thresholds()
    table["icons"][1, INDEX["skull"]] = 0.9
    table["styles"][1] = 0.7
    eyes = Eyes([Eye(16), Eye(16)], table)
    look = seen(skull=0.8, rose=0.5)
    assert eyes.icons(look)[:, 0, INDEX["skull"]].tolist() == [True, False]
    assert eyes.icons(look)[:, 0, INDEX["rose"]].tolist() == [True, True]  # at the threshold counts
    assert eyes.styles(look)[:, 0].tolist() == [STYLES.index("neon sign")] * 2
    assert eyes.style_is(look, "neon sign")[:, 0].tolist() == [True, False]
    assert not eyes.watermark(look).any()


def test_concept_is_any_of_its_names(eyes: Eyes) -> None:
    look = seen(beer_mug=0.9)
    for there in ("beer-mug", "alcohol", ["skull", "beer-mug"], ("death", "neon sign")):
        assert eyes.concept(look, there).all()
    for absent in ("skull", "weapon", ["skull", "watermark"], "blueprint"):
        assert not eyes.concept(look, absent).any()


def test_every_icon_group_and_style_is_a_concept(eyes: Eyes) -> None:
    look = seen()
    for name in (*ICONS, *vocabulary()["groups"], *STYLES, "watermark", "doctor"):
        assert eyes.concept(look, name).shape == (2, 1)
    assert all(truth(icon) == (icon,) for icon in ICONS)


def test_gender_is_that_of_the_surest_person(eyes: Eyes) -> None:
    assert eyes.gender(seen(man_cook=0.9)).tolist() == [[0], [0]]
    assert eyes.gender(seen(man_cook=0.6, woman_cook=0.8)).tolist() == [[1], [1]]
    assert eyes.gender(seen(man_cook=0.4, rose=0.9)).tolist() == [[-1], [-1]]


def test_what_is_kept_is_all_but_the_concept() -> None:
    class Told:
        """Each picture's number says, by eye, which icons are there."""

        vocabulary = Eyes.vocabulary
        there = (
            (("cat-face", "rocket", "pizza"), ("cat-face", "rocket")),
            (("rocket",), ("rocket",)),
            (("cat-face", "pizza"), ("pizza",)),
            (("cat-face",), ("rocket",)),
            ((), ()),
        )

        def icons(self, images: Tensor) -> Tensor:
            seen = torch.zeros(2, len(images), len(ICONS), dtype=torch.bool)
            for k, number in enumerate(images.flatten().tolist()):
                for eye, icons in enumerate(self.there[int(number)]):
                    seen[eye, k, [INDEX[icon] for icon in icons]] = True
            return seen

    cat = ConceptEyes("cat", Told())  # type: ignore[arg-type]
    plain, erased = torch.tensor([0, 0, 0, 3, 0]), torch.tensor([1, 2, 4, 1, 3])
    assert cat.kept(erased, plain).tolist() == [[1, 1, 0, -1, 0], [1, 0, 0, 1, 1]]
    assert cat.faithful(erased, plain).tolist() == [0.5, 0.0, 0.0, 1.0, 0.0]
    assert ConceptEyes("neon sign", Told()).kept(erased[4:], plain[4:]).tolist() == [[1], [1]]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown concept 'nudity'"):
        ConceptEyes("nudity", Told())  # type: ignore[arg-type]


def test_bad_input_is_refused(eyes: Eyes) -> None:
    for images in (torch.rand(3, 64, 64), torch.rand(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"Expected float images"):
            eyes.see(images)
    for bad in (2.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            eyes.see(torch.full((1, 3, 64, 64), bad))
    with pytest.raises(ValueError, match=r"beer"):
        eyes.concept(seen(), "beer-mugg")
    with pytest.raises(ValueError, match=r"at least one"):
        eyes.concept(seen(), [])
    with pytest.raises(ValueError, match=r"Expected a style of"):
        eyes.style_is(seen(), "cubism")
    with pytest.raises(ValueError, match=r"multiple of 16"):
        Eye(20)
    with pytest.raises(ValueError, match=r"two eyes"):
        Eyes([Eye(16)], thresholds())
    with pytest.raises(ValueError, match=r"thresholds of icons"):
        Eyes([Eye(16), Eye(16)], thresholds() | {"icons": torch.zeros(2, 3)})


def test_eyes_survive_the_disk(tmp_path: Path) -> None:
    eyes = load_eyes(save(tmp_path))
    assert eyes.icons(torch.rand(1, 3, 64, 64)).shape == (2, 1, 149)
    assert eyes.facts["widths"] == [16, 16]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"eyes\.json is missing\. Reinstall efface"):
        load_eyes(tmp_path)
    save(tmp_path)
    (tmp_path / "eyes.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"eyes\.safetensors is missing\. Reinstall efface"):
        load_eyes(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = save(tmp_path) / "eyes.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"eyes\.safetensors is damaged.*recipes/emoji"):
        load_eyes(tmp_path)
    (tmp_path / "eyes.json").write_text("{")
    with pytest.raises(ValueError, match=r"eyes\.json is damaged"):
        load_eyes(tmp_path)
    with pytest.raises(ValueError, match=r"eyes\.json is damaged"):
        load_eyes(save(tmp_path, widths=None))
    with pytest.raises(ValueError, match=r"another vocabulary"):
        load_eyes(save(tmp_path, icons=ICONS[::-1]))
    with pytest.raises(ValueError, match=r"eye of width 48"):
        load_eyes(save(tmp_path, widths=[16, 48]))


def test_check_returns_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(path) == digest and check(path, digest) == path


@trained
def test_card_follows_the_vocabulary() -> None:
    card = json.loads((FOLDER / "eyes.json").read_text())
    assert tuple(card["icons"]) == ICONS and tuple(card["styles"]) == STYLES
    assert min(min(row) for row in card["thresholds"]["icons"]) >= 0.3


@trained
def test_nothing_is_seen_in_nothing() -> None:
    g = torch.Generator().manual_seed(3)
    colours = torch.rand(100, 3, 1, 1, generator=g).expand(-1, -1, 64, 64)
    greys = torch.linspace(0, 1, 100)[:, None, None, None].expand(-1, 3, 64, 64)
    noise = (torch.rand(100, 1, 1, 1, generator=g) + 0.3 * torch.randn(100, 3, 64, 64, generator=g)).clamp(0, 1)
    eyes = load_eyes()
    for images in (colours, greys, noise):
        named = eyes.icons(images).any(-1).float().mean(1)
        assert (named <= 0.01).all()
        assert (eyes.watermark(images).float().mean(1) <= 0.01).all()
