"""The text-only and the oblique form of EIUP, and the pooled text, against their definitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import test_eiup_joint as joint
import test_families_2026 as later
import torch
from test_eiup import projected
from tiny import ALCOHOL, CAT, PROMPTS, change, latents, pipeline, untouched
from torch import Tensor

import efface
from efface import EIUP
from efface.erasers._joint_forms import oblique, pooled_texts

NEGATIVE = joint.NEGATIVE
SEED = 1_000_000


def least_squares(
    strength: float,
    out: Tensor,
    nothing: Tensor,
    neutral: Sequence[Tensor],
    erased: Sequence[Tensor],
    clamp: bool = True,
) -> Tensor:
    """The oblique form query by query, as one least squares with further equations for the ridge."""
    made = []
    for k in range(len(out)):
        added = torch.stack([text[k] - nothing[k] for text in (*neutral, *erased)], 1)
        ridge = torch.diag(0.05**0.5 * added.norm(dim=0))
        both = torch.cat([added, ridge]), torch.cat([out[k] - nothing[k], torch.zeros(len(ridge))])
        c = torch.linalg.lstsq(*both).solution[len(neutral) :]
        c = c.clamp(0, 1) if clamp else c
        mean = torch.stack([text[k] - nothing[k] for text in neutral]).mean(0)
        gone = [share * (text[k] - nothing[k] - mean) for share, text in zip(c, erased, strict=True)]
        made.append(out[k] - strength * torch.stack(gone).sum(0))
    return torch.stack(made)


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "form", "negative"),
    [
        ("sd3", "text", None),
        ("sd35", "text", NEGATIVE),
        ("flux", "text", NEGATIVE),
        ("cogview4", "text", None),
        ("sd35", "oblique", None),
        ("flux", "oblique", NEGATIVE),
    ],
)
def test_pictures_equal_the_definition(family: str, form: Any, negative: Any) -> None:
    """All layers, three steps; with a negative prompt, also its rows."""
    pipe, call = joint.double(family), {} if negative is None else {"negative_prompt": negative}
    plain = latents(pipe, PROMPTS, **call)
    with joint.eiup(normalization=form).apply(pipe):
        erased = latents(pipe, PROMPTS, **call)
    assert change(erased, plain) > 1e-2

    def row(out: Tensor, nothing: Tensor, neutral: Sequence[Tensor], phrases: Sequence[Tensor]) -> Tensor:
        return least_squares(1.5, out, nothing, neutral, phrases)

    other = {"alone": True} if form == "text" else {"row": row}
    close = max(joint.CLOSE[family], 1e-6 if form == "oblique" else 0)  # the package keeps clear of zero lengths
    assert change(erased, joint.written_out(pipe, negative=negative, **other)) < close
    with joint.eiup().apply(pipe):  # another form
        assert change(erased, latents(pipe, PROMPTS, **call)) > 1e-3


def test_large_pictures_equal_the_definition_too() -> None:
    """With more queries than columns of the prompt, the layer computed what is read of the prompt before."""
    pipe, size = joint.double("sd3"), {"height": 32, "width": 32, "num_inference_steps": 1}
    with joint.eiup(normalization="text").apply(pipe):
        erased = latents(pipe, PROMPTS, **size)
    assert change(erased, latents(pipe, PROMPTS, **size)) > 1e-3
    assert change(erased, joint.written_out(pipe, alone=True, **size)) < 1e-9


@pytest.mark.parametrize("family", ["chroma", "flux2", "qwenimage"])
def test_texts_alone_are_read_through_masks_and_at_positions(family: str) -> None:
    pipe = later.double(family)
    call = {} if family == "flux2" else later.negated(family, later.NEGATIVE)
    plain = latents(pipe, PROMPTS, **call)
    with later.eiup(normalization="text").apply(pipe):
        erased = latents(pipe, PROMPTS, **call)
    assert change(erased, plain) > 1e-3
    assert change(erased, later.written_out(family, 1.5, alone=True, **call)) < 1e-5


def test_shares_of_the_oblique_form_are_within_0_and_1() -> None:
    """A phrase that equals the empty text has none, and what the neutral texts explain is no phrase's."""
    random = torch.Generator().manual_seed(SEED)
    empty, out, *texts = torch.randn(6, 1, 5, 8, generator=random, dtype=torch.float64)
    would_be = torch.stack([empty, *texts])
    found = oblique(out, would_be, 2, 1.0)
    want = [
        least_squares(1.0, out[0], empty[0], [t[0] for t in texts[:2]], [t[0] for t in texts[2:]], k)
        for k in (True, False)
    ]
    assert change(out + found, want[0][None]) < 1e-9 < change(want[1], want[0])
    assert not oblique(out, torch.stack([empty, *texts[:2], empty]), 2, 1.0).any()
    explained = empty + 0.7 * (texts[0] - empty)
    assert oblique(explained, would_be, 2, 1.0).norm() < 0.25 * (explained - empty).norm()
    assert not oblique(empty, would_be, 2, 1.0).any()


def test_forms_are_refused_where_they_mean_nothing() -> None:
    pipe = untouched("sd1")
    with pytest.raises(ValueError, match='EIUP with `normalization="text"` needs joint attention layers'):
        EIUP([CAT], normalization="text").apply(pipe)
    with pytest.raises(ValueError, match="a family with a pooled text for `pooled`, got SD 1.x/2.x, which has none"):
        EIUP([CAT], pooled=1.0).apply(pipe)
    with pytest.raises(ValueError, match="`pooled` >= 0"):
        EIUP([CAT], pooled=-1.0)
    with EIUP([CAT], normalization="oblique").apply(pipe) as handle:
        assert handle.strength == 2.0
        erased = latents(pipe, "a red cat")
    assert change(erased, latents(pipe, "a red cat")) > 1e-2


# ---------------------------------------------------------------- the pooled text


def pooled_inputs(pipe: Any, *erasers: Any, **options: Any) -> list[Tensor]:
    """The pooled text that the denoiser reads in each call."""
    seen: list[Tensor] = []
    sdxl = hasattr(pipe, "unet")
    reader = pipe.unet.add_embedding if sdxl else pipe.transformer.time_text_embed.text_embedder
    width = pipe.text_encoder_2.config.projection_dim if sdxl else None  # the size of the picture follows
    watch = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, :width]))
    handles = [each.apply(pipe) for each in erasers]
    latents(pipe, ("a night", "beer"), **options)
    for handle in handles:
        handle.remove()
    watch.remove()
    return seen


@pytest.mark.long
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_the_pooled_text_is_projected_on_conditional_rows_within_the_window(family: str) -> None:
    """By the formula, one phrase after the other; rows without concepts stay."""
    pipe = pipeline(family)
    fields: dict[str, Any] = {"neutral": joint.NEUTRAL, "pooled": 0.75, "strength": 1e-6, "rows": [[], [ALCOHOL, CAT]]}
    base = pooled_inputs(pipe)
    found = pooled_inputs(pipe, EIUP(**fields))
    texts = pooled_texts(pipe, [(ALCOHOL, CAT)], joint.NEUTRAL, {})[ALCOHOL, CAT].double()
    conditional = slice(0, 2) if family == "flux" else slice(2, 4)  # FLUX has a call for each side
    before, after = base[0][conditional], found[0][conditional]
    want = before[1:].double()
    for phrase in texts[4:]:
        want = projected(0.75, want, texts[:1], phrase[None], [each[None] for each in texts[1:4]])
    assert change(after[1:], want) < 1e-5 and change(want, before[1:]) > 1e-3
    assert torch.equal(after[0], before[0])  # no concept
    assert torch.equal(*(each[1] if family == "flux" else each[0][:2] for each in (found, base)))
    for off in ({"window": (0.9, 1.0)}, {"pooled": 0.0}):
        assert torch.equal(pooled_inputs(pipe, EIUP(**{**fields, **off}))[0], base[0])


def test_what_is_left_out_of_records_is_the_default() -> None:
    assert "pooled" not in efface.core.config(EIUP(CAT)) and efface.core.config(EIUP(CAT, pooled=0.5))["pooled"] == 0.5
