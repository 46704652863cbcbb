"""GeomErasing: boxes as words, weights of the loss, what a fit changes, and what a negative prompt then does."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given as drawn_from
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image
from test_training import assert_as_found, everything
from tiny import latents
from torch import Generator, Tensor
from typer.testing import CliRunner

import efface
from efface import Concept, GeomErasing, NegativePrompt, Tokens
from efface._text import encode
from efface.cli import app
from efface.delta.embeddings import tables
from efface.delta.tokens import learning_words
from efface.editors import _training, geom_erasing
from efface.editors._denoiser import mse
from efface.editors._examples import boxes_of, detected, fitted, given, read
from efface.editors._geometry import Grid, check_box, cropped, flipped, sincos, start
from efface.editors._located import Data, Located, drawing, weighted
from efface.testing.drawing import differences, snapshot

SIZE = (64, 64)
CAT = Concept("cat")
FOUR = Grid("cat", 4, "bins")
QUICK: dict[str, Any] = {"grid": 2, "steps": 6, "batch": 4, "lr": 0.05, "lr_weights": 1e-3}


def pictures(places: Sequence[Any] = ((0, 0), None, (8, 8)), side: int = 16) -> list[tuple[Tensor, str, list[Any]]]:
    """Noise with a white square of half the side, whose place varies."""
    rng, made = Generator().manual_seed(1), []
    for k, at in enumerate(places):
        picture = 0.5 * torch.rand(3, side, side, generator=rng)
        if at is not None:
            picture[:, at[1] : at[1] + side // 2, at[0] : at[0] + side // 2] = 1.0
        boxes = [] if at is None else [(at[0], at[1], at[0] + side // 2, at[1] + side // 2)]
        made.append((picture, ("a dog", "a pub")[k % 2], boxes))
    return made


@functools.cache
def learned(setting: Any = "model", family: str = "sd1") -> Tokens:
    return GeomErasing(setting=setting, **QUICK).fit(tiny.untouched(family), CAT, examples=pictures())


# ---------------------------------------------------------------- boxes to bins


@pytest.mark.parametrize(
    ("box", "bins"),
    [
        ((0, 0, 1, 1), [(0, 0)]),
        ((15, 0, 16, 15), [(0, 0), (1, 0)]),  # an edge at 16 is the first pixel of the next bin
        ((0, 0, 64, 64), [(m, n) for n in range(4) for m in range(4)]),
        ((48, 48, 64, 64), [(3, 3)]),  # the picture's border belongs to the last bin
        ((2, 49, 35, 62), [(0, 3), (1, 3), (2, 3)]),
        ((63.5, 0.5, 64, 17), [(3, 0), (3, 1)]),
    ],
)
def test_a_box_covers_bins(box: Any, bins: list[Any]) -> None:
    assert FOUR.covered([box], SIZE) == bins
    assert FOUR.text([box], SIZE) == "cat " + " ".join(f"<cat:{m},{n}>" for m, n in bins)
    corners = Grid("cat", 4, "corners").named([box], SIZE)
    assert corners == [f"<cat:{m},{n}>" for m, n in (bins[0], bins[-1])]


def test_columns_come_first_in_a_picture_that_is_not_square() -> None:
    assert FOUR.covered([(90, 0, 100, 10)], (100, 40)) == [(3, 0), (3, 1)]
    assert FOUR.words[:5] == ("<cat:0,0>", "<cat:1,0>", "<cat:2,0>", "<cat:3,0>", "<cat:0,1>")
    assert Grid("Stock photo!", 1, "bins").words == ("<stock-photo:0,0>",)


@drawn_from(st.lists(st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 64)] * 2), min_size=1, max_size=4))
@settings(deadline=None)
def test_flips_and_crops_move_bins_with_the_picture(corners: list[Any]) -> None:
    boxes = [(x + 0.25, y, min(64, x + w) - 0.25, min(64, y + h)) for x, y, w, h in corners]  # no edge between bins
    mirror = flipped(boxes, 64)
    assert flipped(mirror, 64) == boxes and all(check_box(box, SIZE, "it") == box for box in mirror)
    assert {(3 - m, n) for m, n in FOUR.covered(boxes, SIZE)} == set(FOUR.covered(mirror, SIZE))
    assert cropped(boxes, (0, 0, 64, 64)) == boxes
    for box in cropped(boxes, (16, 16, 48, 48), 2.0):
        assert check_box(box, SIZE, "it") == box


def test_a_crop_removes_a_box_outside_of_it() -> None:
    assert cropped([(0, 0, 16, 16), (10, 10, 20, 64)], (16, 16, 48, 48), 2.0) == [(0, 0, 8, 64)]
    wide = torch.zeros(3, 32, 96)
    wide[:, :, 32:48] = 1.0  # the left half of the middle
    one = given([(wide, "a", [(32, 0, 48, 32), (0, 0, 32, 32)])])[0]
    plain, mirrored = fitted(one, SIZE), fitted(one, SIZE, flip=True)
    assert plain.size == SIZE and plain.boxes == ((0, 0, 32, 64),) and mirrored.boxes == ((32, 0, 64, 64),)
    for view, (left, right) in ((plain, (1, 0)), (mirrored, (0, 1))):  # the pixels moved with the box
        assert abs(float(view.pixels[..., :24].mean()) - left) < 0.02
        assert abs(float(view.pixels[..., 40:].mean()) - right) < 0.02


# ---------------------------------------------------------------- weights


@drawn_from(
    st.lists(st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 64)] * 2), max_size=3),
    st.floats(0.1, 10),
    st.sampled_from([4, 8, 12]),
)
@settings(deadline=None)
def test_weights_have_mean_one_and_the_ratio(corners: list[Any], ratio: float, side: int) -> None:
    boxes = [(x, y, min(64, x + w), min(64, y + h)) for x, y, w, h in corners]
    weights, bins = FOUR.weights(boxes, SIZE, (side, side), ratio), FOUR.covered(boxes, SIZE)
    assert abs(float(weights.mean()) - 1) < 1e-5
    inside = torch.zeros(4, 4, dtype=torch.bool)
    for m, n in bins:
        inside[n, m] = True
    inside = inside.repeat_interleave(side // 4, 0).repeat_interleave(side // 4, 1)
    if 0 < len(bins) < 16:
        assert torch.allclose(weights[~inside], ratio * weights[inside][0]) and len(weights[inside].unique()) == 1
        expected = 16 / (len(bins) + ratio * (16 - len(bins)))  # per bin; boxes that overlap count once
        assert abs(float(weights[inside][0]) - expected) < 1e-4
    else:
        assert torch.equal(weights, torch.ones(side, side))
    assert torch.equal(FOUR.weights([*boxes, *boxes], SIZE, (side, side), ratio), weights)


def test_ratio_one_is_the_plain_loss(pipe: Any) -> None:
    """And ratio 8 is another."""
    losses = {}
    for ratio in (1.0, 8.0):
        grid = Grid("cat", 2, "bins")
        with learning_words(pipe, grid.words, {"tokenizer": start(2, tables(pipe)["tokenizer"])}) as words:
            data = Data(pipe, given(pictures()), grid, size=(16, 16), ratio=ratio, flip=False)
            net = located(pipe, data, words.embeddings)
            points = drawing(net, data, 8, 0.0)({}, 0, Generator().manual_seed(2))
            assert points.own is not None
            plain = mse(net(points.x, points.t, points.prompt), points.own[:, :-1])
            losses[ratio] = float(weighted(net, {}, points).detach()), float(plain.detach())
    assert abs(losses[1.0][0] - losses[1.0][1]) < 1e-6 * losses[1.0][1]
    assert abs(losses[8.0][0] - losses[8.0][1]) > 1e-3 * losses[8.0][1]


def located(pipe: Any, data: Data, words: Any, trains: bool = False) -> Located:
    return Located(pipe, data.texts, words, trains_weights=trains, train="full", precision="auto", lr=0.1)


def test_no_boxes_leave_texts_and_weights_plain(pipe: Any) -> None:
    grid = Grid("cat", 2, "bins")
    with learning_words(pipe, grid.words, {"tokenizer": start(2, tables(pipe)["tokenizer"])}):
        data = Data(pipe, given(pictures([None, None])), grid, size=(16, 16), ratio=3.0, flip=True)
    assert data.texts == ["a dog", "a dog", "a pub", "a pub"] and data.used == [] and data.dirty == 0
    assert torch.equal(data.weights, torch.ones(4, 8, 8))


def test_starts_differ_and_are_as_long_as_the_median_word() -> None:
    table = torch.randn(50, 32, generator=Generator().manual_seed(0)) * 3
    rows = start(4, table)
    assert torch.allclose(rows.norm(dim=1), table.norm(dim=1).median().expand(16), rtol=1e-4)
    assert len(torch.unique(rows, dim=0)) == 16 and sincos(4, 33).shape == (16, 33)


# ---------------------------------------------------------------- fits


@pytest.fixture
def pipe() -> Any:
    return tiny.pipeline("sd1")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_model_removal_learns_the_used_words_and_changes_nothing_else(family: str) -> None:
    pipe = tiny.pipeline(family)
    latents(pipe, num_inference_steps=1)
    before, state = everything(pipe), snapshot(pipe)
    tokens = GeomErasing(**QUICK).fit(pipe, CAT, examples=pictures())
    assert_as_found(pipe, before)
    assert [name for name in differences(snapshot(pipe), state) if "_installed" not in name] == []
    assert tokens.delta is None and tokens.words == Grid("cat", 2, "bins").words
    assert tokens.info["used"] == ["<cat:0,0>", "<cat:1,0>", "<cat:0,1>", "<cat:1,1>"]  # an edge at 8 is in both
    again = GeomErasing(**QUICK).fit(pipe, CAT, examples=pictures())
    assert again.hash == tokens.hash


def test_words_that_no_box_names_stay_at_their_start() -> None:
    one = [(0, 0, 7.9, 7.9)]
    examples = [(picture, text, one if boxes else []) for picture, text, boxes in pictures()]
    pipe = tiny.pipeline("sd1")
    tokens = GeomErasing(**QUICK).fit(pipe, CAT, examples=examples)
    begin = start(2, tables(pipe)["tokenizer"])
    moved = (tokens.embeddings["tokenizer"] - begin).norm(dim=1)
    assert tokens.info["used"] == ["<cat:0,0>"] and float(moved[0]) > 0.01 and torch.equal(moved[1:], torch.zeros(3))
    assert tokens.concepts[0].phrases == ("cat <cat:0,0>",)


def test_data_removal_also_learns_weights_that_come_off(pipe: Any) -> None:
    tokens, plain, before = learned("data"), latents(pipe), snapshot(pipe)
    assert tokens.delta is not None and len(tokens.delta.weights) == len(list(pipe.unet.parameters()))
    with tokens.apply(pipe):
        assert tiny.change(latents(pipe), plain) > 0.001
    assert differences(snapshot(pipe), before) == [] and torch.equal(latents(pipe), plain)


@pytest.mark.long
def test_the_command_line_fits_a_folder(tmp_path: Path) -> None:
    folder, out = tmp_path / "data", str(tmp_path / "mark.safetensors")
    folder.mkdir()
    lines = []
    for k, (picture, text, boxes) in enumerate(pictures([(0, 0), None], 64)):
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "text": text, "boxes": boxes}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    run = CliRunner().invoke
    fit = ["fit", "geom_erasing", "--concept", "watermark", "--out", out, "--set", f"data={folder}"]
    done = run(app, [*fit, "--set", "steps=2", "--set", "batch=2"])
    assert done.exit_code == 0, done.output
    assert "words" in done.output and "watermark" in done.output
    assert efface.api.load_delta(out).concepts[0].phrases[0].startswith("watermark <watermark:0,0>")
    empty = run(app, [*fit[:-1], f"data={tmp_path}", "--overwrite"])
    assert empty.exit_code == 2 and "metadata.jsonl" in empty.output


def test_a_fit_goes_on_where_it_stopped(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit of one that did not stop; a checkpoint of other pictures is refused."""
    monkeypatch.setattr(_training, "EVERY", 2)
    editor, file, loss = GeomErasing(setting="data", **QUICK), tmp_path / "fit.safetensors", geom_erasing.weighted
    whole, calls = editor.fit(pipe, CAT, examples=pictures()), []

    def stopping(*rest: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*rest)

    monkeypatch.setattr(geom_erasing, "weighted", stopping)
    with pytest.raises(KeyboardInterrupt):
        editor.fit(pipe, CAT, examples=pictures(), checkpoint=file)
    assert file.exists()
    assert editor.fit(pipe, CAT, examples=pictures(), checkpoint=file).hash == whole.hash
    assert len(calls) == 4 + 4  # of six updates, two were stored
    with pytest.raises(ValueError, match="is the checkpoint of another fit"):
        editor.fit(pipe, CAT, examples=pictures([(8, 0), None, (0, 8)]), checkpoint=file)


# ---------------------------------------------------------------- negative prompts


def test_name_and_words_are_three_different_negative_prompts(pipe: Any) -> None:
    tokens = learned()
    name = Concept("cat")
    with tokens.apply(pipe):
        plain, negative = latents(pipe), latents(pipe, negative_prompt=tokens.concepts[0].phrases[0])
        with NegativePrompt(tokens.concepts).apply(pipe):
            every = latents(pipe)
            assert torch.equal(every, negative)  # what the eraser adds is the text
            with pytest.raises(ValueError, match="NegativePrompt needs guidance"):
                latents(pipe, guidance_scale=1.0)
        with NegativePrompt(name).apply(pipe):
            named = latents(pipe)
    assert min(tiny.change(a, b) for a, b in ((every, plain), (named, plain), (every, named))) > 0.001
    short = GeomErasing(negative="name", **QUICK).fit(pipe, CAT, examples=pictures())
    assert short.concepts[0].phrases == ("cat",)


def corner(images: Tensor) -> list[list[Any]]:
    """Finds the concept in every other picture."""
    return [[] if k % 2 else [(0, 0, 7, 7)] for k in range(len(images))]


def test_two_passes_redraw_what_the_detector_finds(pipe: Any) -> None:
    tokens, prompts, call = learned(), ["a dog", "a pub", "a cat"], {"num_inference_steps": 2}
    with pytest.raises(ValueError, match=r"to be applied to the pipeline, got one without\. Call `tokens.apply"):
        GeomErasing.two_pass(pipe, tokens, prompts, corner, seeds=[1, 2, 3], **call)
    with tokens.apply(pipe):
        made = GeomErasing.two_pass(pipe, tokens, prompts, corner, seeds=[1, 2, 3], negative_prompt="big", **call)
        wanted = pipe(
            ["a dog", "a cat"],
            negative_prompt=["cat <cat:0,0>, big"] * 2,
            generator=[Generator().manual_seed(k) for k in (1, 3)],
            output_type="pt",
            **call,
        ).images
        assert torch.equal(made.images[[0, 2]], wanted) and torch.equal(made.images[1], made.first[1])
        assert not torch.equal(made.images[0], made.first[0]) and [len(b) for b in made.boxes] == [1, 0, 1]
        for more, message in (
            ({"guidance_scale": 1.0}, "Expected guidance, which negative prompts need"),
            ({"height": 32, "width": 32}, "Expected pictures of 16 x 16 pixels"),
        ):
            with pytest.raises(ValueError, match=message):
                GeomErasing.two_pass(pipe, tokens, prompts, corner, seeds=[1, 2, 3], **call, **more)
        with pytest.raises(ValueError, match="one seed per prompt"):
            GeomErasing.two_pass(pipe, tokens, prompts, corner, seeds=[1], **call)
    other = Tokens.fitted(None, pipe, tokens.embeddings, tokens.words, CAT)
    with other.apply(pipe), pytest.raises(ValueError, match="Expected tokens of GeomErasing"):
        GeomErasing.two_pass(pipe, other, prompts, corner, seeds=[1, 2, 3], **call)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("box", [(-1, 0, 4, 4), (0, 0, 17, 4), (4, 4, 4, 8), (0, 0, 4), (0, 0, float("nan"), 4)])
def test_a_box_outside_of_the_picture_is_refused(box: Any, pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"inside the 16 x 16 pixels of example 0, got \("):
        GeomErasing(**QUICK).fit(pipe, CAT, examples=[(torch.rand(3, 16, 16), "a dog", [box])])
    with pytest.raises(ValueError, match="or the detector that gives it"):
        boxes_of(lambda images: [[box]], torch.rand(1, 3, 16, 16), 0.5)


def test_a_detector_that_never_fires_is_refused(pipe: Any) -> None:
    never = [(picture, text, []) for picture, text, _ in pictures()]
    with pytest.raises(ValueError, match="the boxes found it in none of 3"):
        GeomErasing(**QUICK).fit(pipe, CAT, examples=never)
    for detector in (lambda x: [[]] * len(x), lambda x: torch.zeros(1, len(x)).bool(), lambda x: [[(0, 0, 4, 4, 0.1)]]):
        with pytest.raises(ValueError, match="the detector found it in none of 3"):
            GeomErasing(**QUICK).fit(pipe, CAT, examples=pictures(), detector=detector)
    unseen = [(picture, text, None) for picture, text, _ in pictures()]
    with pytest.raises(ValueError, match="Expected boxes for every picture, got none for example 0"):
        GeomErasing(**QUICK).fit(pipe, CAT, examples=unseen)


def test_detectors_give_boxes_or_the_whole_picture() -> None:
    class Boxes:
        def boxes(self, images: Tensor) -> list[Any]:
            return [[(0, 0, 4, 4, 0.9), (0, 0, 2, 2, 0.3)]] * len(images)

    images = torch.rand(2, 3, 8, 16)
    assert boxes_of(Boxes(), images, 0.5) == [((0, 0, 4, 4),)] * 2
    judges = torch.tensor([[True, True], [True, False]])
    assert boxes_of(lambda x: judges, images, 0.5) == [((0, 0, 16, 8),), ()]  # both judges see it
    for bad in (torch.zeros(2), torch.zeros(1, 3).bool(), [[]], "no"):
        with pytest.raises(ValueError, match="detector"):
            boxes_of(lambda x, bad=bad: bad, images, 0.5)
    assert detected(given([(images[0], "a", None)]), Boxes(), 0.5)[0].boxes == ((0, 0, 4, 4),)


@pytest.mark.parametrize("caption", ["a dog", "a big red dog at the pub and a cat at night"])
def test_a_text_over_the_limit_is_an_error_before_training(caption: str, pipe: Any) -> None:
    examples = [(picture, caption, boxes) for picture, _, boxes in pictures()]
    whole = [(picture, text, [(0, 0, 16, 16)] if boxes else []) for picture, text, boxes in examples]
    before = everything(pipe)
    with pytest.raises(ValueError, match=r"fit the text encoder, got .* would be cut\. Use `encoding` 'corners'"):
        GeomErasing(**{**QUICK, "grid": 4}).fit(pipe, CAT, examples=whole)
    assert_as_found(pipe, before)
    corners = GeomErasing(encoding="corners", **{**QUICK, "grid": 4})
    if caption == "a dog":
        assert corners.fit(pipe, CAT, examples=whole).info["used"] == ["<cat:0,0>", "<cat:3,3>"]
    else:
        with pytest.raises(ValueError, match=r"would be cut\. Use a smaller `grid`"):
            corners.fit(pipe, CAT, examples=whole)


def test_words_that_are_known_are_refused(pipe: Any) -> None:
    with learned().apply(pipe), pytest.raises(ValueError, match="'<cat:0,0>' is already on this pipeline"):
        GeomErasing(**QUICK).fit(pipe, CAT, examples=pictures())
    with learned().apply(pipe):  # another concept has other words
        other = GeomErasing(**QUICK).fit(pipe, Concept("dog"), examples=pictures())
        with other.apply(pipe):
            assert len(efface.active(pipe)) == 2


def test_tokens_of_another_model_are_refused(pipe: Any) -> None:
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[7] *= 1.5
    with pytest.raises(ValueError, match=r"fitted on .* but this pipeline is"):
        learned().apply(pipe)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"setting": "both"}, "`setting` to be one of 'model', 'data'"),
        ({"encoding": "boxes"}, "`encoding` to be one of"),
        ({"negative": "two_pass"}, "`negative` to be one of 'name', 'all'"),
        ({"grid": 0}, "a whole number `grid` >= 1"),
        ({"ratio": 0}, "`ratio` > 0"),
        ({"dropout": 1.0}, r"`dropout` in \[0, 1\)"),
        ({"threshold": 2}, r"`threshold` in \[0, 1\]"),
        ({"lr": 0}, "`lr` > 0"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeomErasing(**fields)


def test_pictures_come_from_one_place_for_one_concept(pipe: Any) -> None:
    for editor, more in ((GeomErasing(**QUICK), {}), (GeomErasing(data="x", **QUICK), {"examples": pictures()})):
        with pytest.raises(ValueError, match="from either `data`, a folder, or `examples`"):
            editor.fit(pipe, CAT, **more)
    with pytest.raises(ValueError, match="Expected one concept, because boxes belong to one, got 2"):
        GeomErasing(**QUICK).fit(pipe, [CAT, Concept("dog")], examples=pictures())
    with pytest.raises(ValueError, match="at least one example"):
        GeomErasing(**QUICK).fit(pipe, CAT, examples=[])
    with pytest.raises(TypeError, match=r"examples \(picture, text, boxes\)"):
        GeomErasing(**QUICK).fit(pipe, CAT, examples=[torch.rand(3, 16, 16)])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "Expected pictures in .*, got none"),
        (['{"file_name": "a.png", "text": "a cat", "boxes": [[0, 0, 99, 4]]}'], "inside the 16 x 16 pixels of a.png"),
        (['{"file_name": "a.png", "text": "a"}'] * 2, "once in .*, got 'a.png' twice"),
        (['{"file_name": "../a.png", "text": "a"}'], "Expected the name of a file in"),
        (['{"file_name": "broken.png", "text": "a"}'], "not a PNG, JPEG or WebP"),
        (['{"file_name": "missing.png", "text": "a"}'], r"line 1 names a picture .* is not there"),
        (['{"file_name": "a.png"}'], "has no `text`"),
        (["a cat"], "metadata.jsonl, line 1"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected a folder of pictures with metadata\.jsonl"):
        read(tmp_path)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_family_that_does_not_train_is_refused() -> None:
    with pytest.raises(ValueError, match="GeomErasing"):
        GeomErasing(**QUICK).fit(tiny.pipeline("flux"), CAT, examples=pictures())


def test_gradients_of_the_loss_reach_words_through_encoder_and_denoiser(pipe: Any) -> None:
    """Equal to finite differences, so that nothing on the way is detached."""
    grid = Grid("cat", 2, "bins")
    double = pipe.to(torch.float64)
    with learning_words(double, grid.words, {"tokenizer": start(2, tables(pipe)["tokenizer"])}) as words:
        (row,) = words.embeddings.values()
        data = Data(double, given(pictures()), grid, size=(16, 16), ratio=2.0, flip=False)
        net = located(double, data, words.embeddings)
        points = drawing(net, data, 4, 0.0)({}, 0, Generator().manual_seed(3))
        weighted(net, {}, points).backward()
        assert row.grad is not None
        way, size = row.grad / row.grad.norm(), 0.05
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                row += sign * size * way
                values.append(float(weighted(net, {}, points)))
                row -= sign * size * way
        slope = (values[0] - values[1]) / (2 * size)
    assert abs(slope - float(row.grad.norm())) < 0.02 * float(row.grad.norm())
    assert encode(pipe, ["a cat"]).text.requires_grad is False
