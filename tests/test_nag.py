"""NAG against its formula: in algebra, and as an attention processor that shares no code with the package."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import test_pixart
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ALCOHOL, CAT, PROMPT, PROMPTS, change, denoiser_of, drawn, latents, pipeline
from torch import Tensor

from efface import NAG, Concept
from efface.erasers.nag import guided

pytestmark = pytest.mark.thinned("long")

TEXTS = {"alcohol": "beer wine glass", "cat": "cat"}
FAMILIES = ("sd1", "sdxl", "bert", "pixart")
every_family = pytest.mark.parametrize("family", FAMILIES)
double = functools.cache(lambda family: pipeline(family).to(torch.float64))


# ---------------------------------------------------------------- the formula


def formula(positive: Tensor, negatives: Sequence[Tensor], s: float, tau: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Z as the paper writes it, and r: [Q, C] and [Q]. With one negative text G is s Z+ - (s - 1) Z-."""
    moved = positive + sum((s - 1) * positive - (s - 1) * negative for negative in negatives)
    ratio = moved.abs().sum(-1) / positive.abs().sum(-1)
    factor = torch.tensor([min(r, tau) / r for r in ratio.tolist()], dtype=ratio.dtype)
    return alpha * moved * factor[:, None] + (1 - alpha) * positive, ratio


def outputs(seed: int, texts: int, scale: float) -> tuple[Tensor, Tensor]:
    """Z+ [6, 5], whose last token is 0, and the Z- of some texts, whose tokens are of very different sizes."""
    random = torch.Generator().manual_seed(seed)
    positive, negative = (torch.randn(*n, 6, 5, generator=random, dtype=torch.float64) for n in ((), (texts,)))
    positive[-1] = 0
    return scale * positive, scale * negative * torch.logspace(-3, 3, 6)[:, None]


fields = {
    "strength": st.floats(0, 30),
    "tau": st.floats(1, 10),
    "alpha": st.floats(0, 1),
    "texts": st.integers(1, 3),
    "seed": st.integers(0, 2**31),
    "scale": st.sampled_from([1e-20, 1.0, 1e20]),
}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(**fields)
def test_no_token_grows_beyond_the_bound(
    strength: float, tau: float, alpha: float, texts: int, seed: int, scale: float
) -> None:
    positive, negative = outputs(seed, texts, scale)
    out = guided(positive, negative, strength, tau, alpha)
    most = (1 + alpha * (tau - 1)) * positive.abs().sum(-1)
    assert bool((out.abs().sum(-1) <= most * (1 + 1e-12)).all())
    assert torch.equal(out[-1], positive[-1])  # r is undefined there


@settings(max_examples=100, deadline=None, derandomize=True)
@given(**fields)
def test_it_is_the_formula(strength: float, tau: float, alpha: float, texts: int, seed: int, scale: float) -> None:
    positive, negative = (x[..., :-1, :] for x in outputs(seed, texts, scale))
    want, _ = formula(positive, list(negative), strength + 1, tau, alpha)
    torch.testing.assert_close(guided(positive, negative, strength, tau, alpha), want, rtol=1e-9, atol=1e-12 * scale)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(**fields)
def test_identities_hold_to_the_bit(
    strength: float, tau: float, alpha: float, texts: int, seed: int, scale: float
) -> None:
    positive, negative = outputs(seed, texts, scale)
    assert torch.equal(guided(positive, negative, 0.0, tau, alpha), positive)
    assert torch.equal(guided(positive, negative, strength, tau, 0.0), positive)
    assert torch.equal(guided(positive, positive.expand_as(negative), strength, tau, alpha), positive)


def test_the_bound_is_reached() -> None:
    positive, negative = torch.tensor([[1.0, 1.0]]), torch.tensor([[[-1.0, -1.0]]])
    torch.testing.assert_close(guided(positive, negative, 8.0, 2.5, 0.5), 1.75 * positive)


def test_a_token_that_g_cancels_keeps_a_finite_gradient() -> None:
    positive = torch.tensor([[1.0, -2.0], [0.0, 0.0]], requires_grad=True)
    negative = torch.stack([2 * positive.detach()])  # G = 0 at strength 1
    out = guided(positive, negative, 1.0, 2.5, 0.5)
    assert torch.equal(out, positive / 2)
    out.square().sum().backward()
    assert positive.grad is not None and bool(positive.grad.isfinite().all())


def test_half_precision_does_not_overflow_in_the_norms() -> None:
    """A sum over the 1,280 channels of a large UNet leaves float16."""
    positive = torch.full((1, 3, 1280), 90.0, dtype=torch.float16)
    assert float(positive.abs().sum(-1, keepdim=True).amax()) == math.inf
    cross: Any = SimpleNamespace(would_be=lambda text: -positive[None])
    out = NAG([CAT], strength=2.0).edit(positive, cross, SimpleNamespace(text=None))  # type: ignore[arg-type]
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, 1.75 * positive)


# ---------------------------------------------------------------- pictures


def attend(attn: Attention, hidden: Tensor, text: Tensor) -> Tensor:
    """[Q, C] for image tokens [Q, C] that read a text [L, D]."""
    query, key, value = (
        x.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for x in (attn.to_q(hidden), attn.to_k(text), attn.to_v(text))
    )
    return F.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)


class Reference:
    """An attention processor with the formula written out, row by row.

    Args:
        pipe: the pipeline.
        prompts: of the conditional rows, which stand behind as many unconditional ones.
        erased: the negative texts of each conditional row.
        s, tau, alpha: as in the paper.

    Attributes:
        ratios: every r that was seen.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        erased: Sequence[Sequence[str]],
        s: float,
        tau: float = 2.5,
        alpha: float = 0.5,
    ) -> None:
        self.s, self.tau, self.alpha, self.ratios = s, tau, alpha, list[Tensor]()
        masked = hasattr(pipe, "transformer")
        self.erased = [[self.embed(pipe, text, masked) for text in texts] for texts in erased]
        rows = (*("",) * len(prompts), *prompts) if masked else ()
        self.texts = [test_pixart.embed(pipe, text) for text in rows]  # none: those that the layer is given

    @staticmethod
    def embed(pipe: Any, text: str, masked: bool) -> Tensor:
        """[L, D]; where text is masked, without the padding."""
        if masked:
            return test_pixart.embed(pipe, text)
        options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        return pipe.encode_prompt(text, **options)[0][0].detach()

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> Any:
        first, rows = len(hidden_states) - len(self.erased), []
        for k, hidden in enumerate(hidden_states):
            text = self.texts[k] if self.texts else encoder_hidden_states[k]
            out = attend(attn, hidden, text)
            if k >= first and self.erased[k - first]:
                negatives = [attend(attn, hidden, text) for text in self.erased[k - first]]
                out, ratio = formula(out, negatives, self.s, self.tau, self.alpha)
                self.ratios.append(ratio)
            rows.append(out)
        return attn.to_out[1](attn.to_out[0](torch.stack(rows))) / attn.rescale_output_factor

    @contextlib.contextmanager
    def on(self, pipe: Any) -> Iterator[Reference]:
        layers = {m: m.processor for name, m in denoiser_of(pipe).named_modules() if name.endswith("attn2")}
        assert layers
        for layer in layers:
            layer.processor = self
        try:
            yield self
        finally:
            for layer, old in layers.items():
                layer.processor = old

    def share_above(self) -> float:
        """The share of tokens whose r is above tau."""
        return float((torch.cat(self.ratios) > self.tau).double().mean())


@every_family
@pytest.mark.parametrize(("s", "tau", "alpha"), [(5.0, 2.5, 0.5), (2.0, 1.25, 0.8)])
def test_pictures_equal_the_formula(family: str, s: float, tau: float, alpha: float) -> None:
    pipe = double(family)
    with NAG([ALCOHOL], strength=s - 1, tau=tau, alpha=alpha).apply(pipe):
        got = latents(pipe, PROMPTS)
    with Reference(pipe, PROMPTS, [[TEXTS["alcohol"]]] * 2, s, tau, alpha).on(pipe) as reference:
        want = latents(pipe, PROMPTS)
    assert got.dtype == want.dtype == torch.float64
    assert change(got, want) < 1e-9
    assert change(got, latents(pipe, PROMPTS)) > 1e-2
    assert 0.02 < reference.share_above() < 0.98  # both sides of tau


@every_family
def test_several_concepts_push_together_under_one_cap(family: str) -> None:
    pipe = double(family)
    with NAG([ALCOHOL, CAT], strength=2.0).apply(pipe):
        got = latents(pipe, PROMPTS)
    with NAG([CAT, ALCOHOL], strength=2.0).apply(pipe):
        assert change(latents(pipe, PROMPTS), got) < 1e-9
    with Reference(pipe, PROMPTS, [list(TEXTS.values())] * 2, 3.0).on(pipe) as reference:
        assert change(got, latents(pipe, PROMPTS)) < 1e-9
    assert 0.02 < reference.share_above() < 0.98
    for name in ALCOHOL, CAT:  # each of them counts
        with NAG([name], strength=2.0).apply(pipe):
            assert change(latents(pipe, PROMPTS), got) > 1e-2


def test_phrases_that_need_two_texts_push_as_two_concepts() -> None:
    pipe = double("sd1")
    first, second = " ".join(["cat"] * 14), "dog moon"
    with NAG([Concept("both", (first, *second.split()))], strength=1.0).apply(pipe):
        got = latents(pipe, PROMPTS)
    with Reference(pipe, PROMPTS, [[first, second]] * 2, 2.0).on(pipe):
        assert change(got, latents(pipe, PROMPTS)) < 1e-9


@every_family
def test_two_rows_with_concepts_of_their_own_are_two_single_calls(family: str) -> None:
    pipe, rows = double(family), [[ALCOHOL], [CAT, ALCOHOL]]
    with NAG(rows=rows).apply(pipe):
        together = latents(pipe, PROMPTS)
    for k, (prompt, concepts) in enumerate(zip(PROMPTS, rows, strict=True)):
        with NAG(concepts).apply(pipe):
            alone = latents(pipe, prompt, seed=k)
        assert change(together[k : k + 1], alone) < 1e-9
        assert change(alone, latents(pipe, prompt, seed=k)) > 1e-2


@every_family
def test_without_guidance_it_is_the_formula_too(family: str) -> None:
    pipe = double(family)
    with NAG([ALCOHOL]).apply(pipe):
        got = latents(pipe, PROMPTS, guidance_scale=1.0)
    reference = Reference(pipe, PROMPTS, [[TEXTS["alcohol"]]] * 2, 5.0)
    reference.texts = reference.texts[2:]
    with reference.on(pipe):
        assert change(got, latents(pipe, PROMPTS, guidance_scale=1.0)) < 1e-9


@every_family
@pytest.mark.parametrize("fields", [{"strength": 0.0}, {"alpha": 0.0}])
def test_off_is_the_base_model_to_the_bit(family: str, fields: dict[str, Any]) -> None:
    eraser = NAG([ALCOHOL], **fields)
    assert eraser.is_off()
    assert torch.equal(drawn(family, eraser, prompt=PROMPTS), drawn(family, prompt=PROMPTS))


@every_family
def test_a_prompt_that_is_the_concepts_text_is_drawn_as_without_nag(family: str) -> None:
    pipe = double(family)
    with NAG([ALCOHOL]).apply(pipe):
        got, longer = (latents(pipe, f"{TEXTS['alcohol']}{more}") for more in ("", " of the moon"))
    assert change(got, latents(pipe, TEXTS["alcohol"])) < 1e-9
    assert change(longer, latents(pipe, f"{TEXTS['alcohol']} of the moon")) > 1e-2


def test_it_acts_inside_its_window_only() -> None:
    early, late = (drawn("sd1", NAG([ALCOHOL], window=window)) for window in ((0.0, 0.5), (0.5, 1.0)))
    assert change(early, drawn()) > 1e-2 and change(late, drawn()) > 1e-2
    assert change(early, late) > 1e-2 and change(early, drawn("sd1", NAG([ALCOHOL]))) > 1e-2


# ---------------------------------------------------------------- a user's negative prompt


def first_rows(pipe: Any, negative: str) -> tuple[Tensor, Tensor]:
    """What the denoiser predicts in the first step, for the unconditional row and for the conditional one."""
    seen: list[Tensor] = []
    watch = denoiser_of(pipe).register_forward_hook(lambda module, args, out: seen.append(out[0]))
    try:
        latents(pipe, negative_prompt=negative, num_inference_steps=1)
    finally:
        watch.remove()
    unconditional, conditional = seen[0]
    return unconditional, conditional


@every_family
@pytest.mark.parametrize("negative", ["", "beer wine glass", "a red beer", PROMPT])
def test_a_negative_prompt_neither_changes_nor_is_changed(family: str, negative: str) -> None:
    """Also one that names the concept: the unconditional row stays, to the bit, and so does what NAG adds."""
    pipe = double(family)
    plain, without = first_rows(pipe, negative), first_rows(pipe, "")
    with NAG([ALCOHOL]).apply(pipe):
        erased, alone = first_rows(pipe, negative), first_rows(pipe, "")
    assert torch.equal(erased[0], plain[0])
    assert negative == "" or change(plain[0], without[0]) > 1e-3
    assert change(erased[1], plain[1]) > 1e-2
    assert change(erased[1], alone[1]) < 1e-12


@every_family
def test_a_negative_prompt_that_names_the_concept_pushes_away_once_more(family: str) -> None:
    negative = {"negative_prompt": "beer wine glass"}
    both = drawn(family, NAG([ALCOHOL]), **negative)
    assert change(both, drawn(family, **negative)) > 1e-2
    assert change(both, drawn(family, NAG([ALCOHOL]))) > 1e-2


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("tau", [0.5, -1, math.inf, math.nan, True, "2"])
def test_tau_is_a_finite_number_from_1_on(tau: Any) -> None:
    with pytest.raises(ValueError, match=r"^Expected `tau` >= 1, got .*\. Give 1 or more"):
        NAG([CAT], tau=tau)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan, False, None])
def test_alpha_is_a_share(alpha: Any) -> None:
    with pytest.raises(ValueError, match=r"^Expected `alpha` in \[0, 1\], got .*\. Give a share"):
        NAG([CAT], alpha=alpha)
