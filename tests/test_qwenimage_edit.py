"""Qwen-Image-Edit: phrases are encoded with the call's pictures, whose latents count as the picture's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import QwenImageEditInpaintPipeline, QwenImageTransformer2DModel
from families_literal import Beside, QwenImage
from joint_literal import conditional, unconditional
from PIL import Image
from tiny import ALCOHOL, CAT, PROMPT, PROMPTS, change, latents, pipeline, untouched
from tiny.qwenimage_edit import picture, small
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import efface
from efface import EIUP, NAG, SAFREE, SLD, Concept, NegativePrompt
from efface._text import Encoded, encode, own_tokens
from efface.hooks import joint, prompts

GREEN = picture((20, 160, 60))
BLUE = picture((30, 40, 190))
NEUTRAL = (("a dog", "the moon"), ("a big cat",))
BOTH = ("qwenimage_edit", "qwenimage_edit_plus")
each = pytest.mark.parametrize("family", BOTH)


def eiup(**fields: Any) -> EIUP:
    return EIUP((ALCOHOL, CAT), **{"neutral": NEUTRAL, "strength": 2.0, **fields})


def plus() -> Any:
    """As published last: reference pictures are modulated as at time 0."""
    pipe = pipeline("qwenimage_edit_plus")
    net = pipe.transformer
    net.zero_cond_t = True
    for block in net.transformer_blocks:
        block.zero_cond_t = True
    return pipe


# ---------------------------------------------------------------- the definition


@torch.no_grad()
def test_pictures_equal_the_definition_with_two_references() -> None:
    """Every text stands beside both references; queries of result and references change."""
    pipe, strength, moved = plus().to(torch.float64), 2.0, list[Tensor]()
    call = {"image": [GREEN, BLUE], "negative_prompt": ["a dog"], "num_inference_steps": 2}

    def read(text: str) -> Tensor:
        return pipe.encode_prompt([text], [GREEN, BLUE], "cpu")[0][0]

    def text(group: tuple[str, ...]) -> Beside:
        states = [read(one) for one in group]
        n = max(map(len, states))
        mean = torch.stack([torch.stack([s[k] for s in states if k < len(s)]).mean(0) for k in range(n)])
        return Beside(mean, torch.ones(n), torch.arange(n), torch.ones(n))

    prompt, row = read(PROMPT), conditional(strength, moved)

    def edits(states: Tensor) -> list[Any]:
        own = states.shape[1:] == prompt.shape and torch.equal(states[0], prompt)
        return [row if own else unconditional(strength)]

    phrases = [(phrase,) for phrase in (*ALCOHOL.phrases, *CAT.phrases)]
    texts = [text(group) for group in (("",), *NEUTRAL, *phrases)]
    plain = latents(pipe, **call)
    with eiup().apply(pipe):
        erased = latents(pipe, **call)
    pipe.transformer.forward = QwenImage(pipe.transformer, texts, len(NEUTRAL), edits)
    made = latents(pipe, **call)
    assert change(erased, plain) > 1e-2 and change(made, erased) < 1e-6
    columns = {len(sizes) for sizes in moved}
    assert columns == {4 * 4 + 2 * 8 * 8} and float((torch.cat(moved) > 0).double().mean()) > 0.2


# ---------------------------------------------------------------- texts


@each
def test_a_phrase_is_encoded_as_the_pipeline_encodes_it_with_the_pictures(family: str) -> None:
    """One by one, in a batch of other lengths; and its own tokens are found behind the pictures'."""
    pipe, pictures = untouched(family), [GREEN] if family == "qwenimage_edit" else [GREEN, BLUE]
    texts = ["a dog", "a big red cat"]
    made = encode(pipe, texts, image=pictures)
    for k, text in enumerate(texts):
        want, _ = pipe.encode_prompt([text], pictures, "cpu")
        assert made.mask is not None and torch.equal(made.text[k][made.mask[k]], want[0])
        other, _ = pipe.encode_prompt([text], [BLUE] * len(pictures), "cpu")
        assert change(other, want) > 1e-3
    columns = own_tokens(pipe, "a dog", "tokenizer", image=pictures)
    another, _ = pipe.encode_prompt(["a red dog"], pictures, "cpu")
    differing = (another[0, : made.text.shape[1] - 2] != made.text[0, :-2]).any(-1).nonzero()
    assert int(differing[0]) == columns.start + 1 and made.own[0] == slice(columns.start, columns.stop)


@pytest.mark.long
@each
def test_what_an_eraser_does_depends_on_the_picture_of_each_call(family: str) -> None:
    """The second call encodes the phrases again: it draws as a pipeline that never saw the first picture."""
    once = {"num_inference_steps": 1}
    guides = SLD([CAT], warmup=0.0, threshold=10.0)
    for eraser in (eiup(), SAFREE([ALCOHOL], validation=None) if family == "qwenimage_edit" else guides):
        pipe, other = pipeline(family), pipeline(family)
        with eraser.apply(pipe), eraser.apply(other):
            latents(pipe, image=[GREEN], **once)
            again = latents(pipe, image=[BLUE], **once)
            assert torch.equal(again, latents(other, image=[BLUE], **once))
        assert change(again, latents(pipe, image=[BLUE], **once)) > 1e-3


def test_methods_act_on_the_later_version_and_leave_no_trace() -> None:
    pipe = plus()
    plain = latents(pipe, num_inference_steps=2)
    for eraser in (eiup(), NAG([CAT]), NegativePrompt([CAT]), SLD([CAT], warmup=0.0, threshold=10.0)):
        with eraser.apply(pipe):
            assert change(latents(pipe, num_inference_steps=2), plain) > 1e-3
        assert torch.equal(latents(pipe, num_inference_steps=2), plain)
    with eiup(strength=0.0).apply(pipe):
        assert torch.equal(latents(pipe, num_inference_steps=2), plain)


def test_several_images_of_one_prompt_and_embeddings_act() -> None:
    pipe = pipeline("qwenimage_edit")
    states, _ = pipe.encode_prompt([PROMPT], [GREEN], "cpu", num_images_per_prompt=1)
    call = {"image": [GREEN], "num_inference_steps": 1}
    with eiup().apply(pipe):
        one = latents(pipe, **call)
        two = latents(pipe, num_images_per_prompt=2, **{**call, "image": GREEN})
        assert change(two[:1], one) < 1e-5
        assert change(latents(pipe, None, prompt_embeds=states, **call), one) < 1e-5


def test_inpainting_acts() -> None:
    parts = untouched("qwenimage_edit")
    pipe = small(QwenImageEditInpaintPipeline)(**parts.components)
    pipe.prompt_template_encode_start_idx = parts.prompt_template_encode_start_idx
    pipe.set_progress_bar_config(disable=True)
    options = {"mask_image": Image.new("L", (32, 32), 255), "height": 32, "width": 32, "num_inference_steps": 2}

    def draw() -> Tensor:
        seed = torch.Generator().manual_seed(1_000_000)
        return pipe(prompt=PROMPT, image=GREEN, generator=seed, output_type="latent", strength=1.0, **options).images

    plain = draw()
    with eiup().apply(pipe):
        assert change(draw(), plain) > 1e-3
    assert torch.equal(draw(), plain)


# ---------------------------------------------------------------- refusals


def test_pictures_that_differ_among_prompts_are_refused() -> None:
    pipe = pipeline("qwenimage_edit")
    plain = latents(pipe, PROMPTS, image=[GREEN, BLUE], num_inference_steps=1)
    for eraser in (eiup(), SLD([CAT])):
        with eraser.apply(pipe):
            with pytest.raises(
                ValueError, match="one picture for all prompts .*got 2 pictures. Call the pipeline once per"
            ):
                latents(pipe, PROMPTS, image=[GREEN, BLUE], num_inference_steps=1)
            latents(pipe, PROMPTS, image=[GREEN, GREEN.copy()], num_inference_steps=1)
    assert torch.equal(latents(pipe, PROMPTS, image=[GREEN, BLUE], num_inference_steps=1), plain)


def test_pictures_that_the_tokens_cannot_be_counted_of_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("qwenimage_edit")
    with pytest.raises(TypeError, match="Expected `image` to be PIL images, got .*Convert the pictures"):
        encode(pipe, ["a dog"], image=torch.zeros(1, 3, 32, 32))
    monkeypatch.setattr(pipe.processor.image_processor, "get_number_of_image_patches", lambda height, width: 40)
    with pytest.raises(ValueError, match=r"Expected \d+ tokens for a text with the call's pictures, got \d+. Give the"):
        encode(pipe, ["a dog"], image=[Image.new("RGB", (32, 32))])


# ---------------------------------------------------------------- cost

SEVEN = ("beer", "wine", "a pub", "a glass", "wine glass", "a big beer", "red wine")


@pytest.mark.parametrize(
    ("columns", "phrases", "most"), [(1360, 1, 1.61), (1360, 7, 2.75), (215, 1, 1.12), (215, 7, 1.33)]
)
def test_a_conditional_call_costs_what_the_page_says(
    columns: int, phrases: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of the published width, counted and not computed: each text has the tokens of the picture too."""
    pipe = pipeline("qwenimage_edit")
    with torch.device("meta"):
        wide = {"num_layers": 1, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 24}
        pipe.transformer = QwenImageTransformer2DModel(in_channels=16, out_channels=4, **wide)
        call = {"hidden_states": torch.empty(1, 8192, 16), "timestep": torch.empty(1)}
        call["encoder_hidden_states"] = torch.empty(1, columns, 24)

    def made(pipe: Any, texts: list[str], **settings: Any) -> Encoded:
        states = torch.empty(len(texts), columns, 24, device="meta")
        return Encoded(states, None, (slice(0, 1),) * len(texts), torch.zeros(states.shape[:2]))

    def kernel(inputs: Any, scale: float) -> Any:
        return F.scaled_dot_product_attention(*inputs, scale=scale), inputs.query[..., 0]

    monkeypatch.setattr(prompts, "encode", made)
    monkeypatch.setattr(joint, "attention", kernel)
    monkeypatch.setattr(joint, "large", lambda share: False)

    def count() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), efface.conditional_rows(pipe, [True]):
            pipe.transformer(**call, img_shapes=[[(1, 64, 64), (1, 64, 64)]])
        return counter.get_total_flops()

    base = count()
    with EIUP(Concept("several", SEVEN[:phrases])).apply(pipe):
        ratio = count() / base
    print(f"{columns} columns, {phrases} phrases: {ratio:.3f}")
    assert most - 0.06 < ratio < most
