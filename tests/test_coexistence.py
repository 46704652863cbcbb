"""What people do to a pipeline that has erasers on: each acts as if nothing had been done, or refuses and says why.

`python tests/test_coexistence.py` prints the table of docs/coexistence.md.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import (
    FasterCacheConfig,
    PyramidAttentionBroadcastConfig,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    apply_faster_cache,
    apply_pyramid_attention_broadcast,
)
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_taylorseer_cache,
)
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from tiny import ALCOHOL, CAT, PROMPT, add_lora, batch, change, denoiser_of, drawn, latents, pipeline
from torch import Tensor

import efface
from efface import EIUP, GIE, SAFREE, SLD, Delta, NegativePrompt

METHODS: dict[str, Any] = {
    "EIUP": EIUP([ALCOHOL]),
    "EIUP separate": EIUP([ALCOHOL], normalization="separate"),
    "EIUP gated": EIUP([ALCOHOL], normalization="gated"),
    "GIE": GIE([ALCOHOL]),
    "SLD": SLD([ALCOHOL], warmup=0.0),
    "SAFREE": SAFREE([ALCOHOL]),
    "NegativePrompt": NegativePrompt([ALCOHOL]),
    "NegativePrompt, strength": NegativePrompt([ALCOHOL], strength=6.0),
    "a delta": None,  # fitted for each model
}
ATTENTION = ("EIUP", "EIUP separate", "EIUP gated", "GIE")
PREDICTION = ("SLD", "NegativePrompt, strength")
WORDS = ("SAFREE", "NegativePrompt")
PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
EFFECT = 1e-2

Apply = Callable[[], None]


@dataclass(frozen=True)
class Cell:
    """Something that people do.

    Args:
        what: in words, for the table.
        do: does it to a new pipeline, calls `apply()` at some point, and returns what is drawn in the end.
        want: what the same must give, for the eraser; by default what an undisturbed pipeline draws.
        family: of the tiny pipeline.
        tolerance: relative difference that is allowed; 0 is "to the bit".
        refuses: the methods that refuse, by what they say.
        restored: what has to be drawn after the handle was removed; None: nothing to compare with.
        methods: those that it can be tried with.
        stays: the methods that act, but cannot be taken off as long as this lasts, by what `remove()` says.
    """

    what: str
    do: Callable[[Any, Apply], Tensor]
    want: Callable[[str, Any], Tensor] = drawn
    family: str = "sd1"
    tolerance: float = 0.0
    refuses: dict[tuple[str, ...], str] = field(default_factory=dict)
    restored: Callable[[str], Tensor] | None = drawn
    methods: tuple[str, ...] = tuple(METHODS)
    stays: dict[tuple[str, ...], str] = field(default_factory=dict)

    def says(self, method: str) -> str | None:
        return _why(self.refuses, method)


def _why(said: dict[tuple[str, ...], str], method: str) -> str | None:
    return next((why for methods, why in said.items() if method in methods), None)


def before(disturb: Callable[[Any], Any], times: int = 2) -> Callable[[Any, Apply], Tensor]:
    def do(pipe: Any, apply: Apply) -> Tensor:
        disturb(pipe)
        apply()
        return [latents(pipe) for _ in range(times)][-1]

    return do


def after(disturb: Callable[[Any], Any], times: int = 2) -> Callable[[Any, Apply], Tensor]:
    """Also after a first call."""

    def do(pipe: Any, apply: Apply) -> Tensor:
        apply()
        latents(pipe)
        disturb(pipe)
        return [latents(pipe) for _ in range(times)][-1]

    return do


def during(disturb: Callable[[Any], Any]) -> Callable[[Any, Apply], Tensor]:
    def do(pipe: Any, apply: Apply) -> Tensor:
        def once(pipe: Any, step: int, *_: Any) -> dict[str, Tensor]:
            if step == 0:
                disturb(pipe)
            return {}

        apply()
        return latents(pipe, callback_on_step_end=once)

    return do


# ---------------------------------------------------------------- offload, casting, processors


def group(kind: str) -> Callable[[Any], None]:
    def on(pipe: Any) -> None:
        cpu, blocks = torch.device("cpu"), {"num_blocks_per_group": 1} if kind == "block_level" else {}
        folder = tempfile.mkdtemp()  # on the disk: what is not loaded is really not there
        denoiser_of(pipe).enable_group_offload(cpu, cpu, kind, offload_to_disk_path=folder, **blocks)

    return on


def sequential(pipe: Any) -> None:
    """The denoiser's part of it; accelerate's for text encoders fails on a CPU with this torch, without erasers too."""
    accelerate.cpu_offload(denoiser_of(pipe), torch.device("cpu"))


def casting(pipe: Any) -> None:
    denoiser_of(pipe).enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def cast(family: str, eraser: Any) -> Tensor:
    """Erasers before the casting."""
    pipe = pipeline(family)
    casting(pipe)
    with eraser.apply(pipe):
        return latents(pipe)


def cast_plain(family: str) -> Tensor:
    pipe = pipeline(family)
    casting(pipe)
    return latents(pipe)


class OwnKernel:
    """Attention as usual, by weights instead of modules, as fused kernels do it."""

    def __init__(self, *direct: str) -> None:
        self.direct = direct

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None,
        temb: Any = None,
    ) -> Tensor:  # fmt: skip
        def project(name: str, x: Tensor) -> Tensor:
            layer = attn.to_out[0] if name == "to_out" else getattr(attn, name)
            return F.linear(x, layer.weight, layer.bias) if name in self.direct else layer(x)

        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = project("to_q", hidden_states), project("to_k", text), project("to_v", text)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return project("to_out", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Elsewhere(OwnKernel):
    """Something that is not attention to the text, so that it is not known what an eraser would have to edit."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs).sin()


def processor(made: Any) -> Callable[[Any], None]:
    return lambda pipe: pipe.unet.set_attn_processor(made)


# ---------------------------------------------------------------- caches


def clock(pipe: Any) -> Callable[[], int]:
    return lambda: 500


def broadcast(pipe: Any) -> None:
    config = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=2)
    config.current_timestep_callback = clock(pipe)
    apply_pyramid_attention_broadcast(denoiser_of(pipe), config)


def faster(pipe: Any) -> None:
    config = FasterCacheConfig(current_timestep_callback=clock(pipe), tensor_format="BCHW")
    config.attention_weight_callback = lambda _: 0.5
    apply_faster_cache(denoiser_of(pipe), config)


CACHES: dict[str, Callable[[Any], None]] = {
    "PyramidAttentionBroadcast": broadcast,
    "FasterCache": faster,
    "FirstBlockCache": lambda pipe: apply_first_block_cache(denoiser_of(pipe), FirstBlockCacheConfig(0.1)),
    "MagCache": lambda pipe: apply_mag_cache(
        denoiser_of(pipe), MagCacheConfig(num_inference_steps=tiny.STEPS, mag_ratios=torch.ones(tiny.STEPS))
    ),
    "TaylorSeer": lambda pipe: apply_taylorseer_cache(denoiser_of(pipe), TaylorSeerCacheConfig()),
}


# ---------------------------------------------------------------- copies, parts, weights


def deep_copy(pipe: Any, apply: Apply) -> Tensor:
    apply()
    twin = copy.deepcopy(pipe)
    torch.nn.init.zeros_(denoiser_of(pipe).conv_out.weight)  # the copy has modules of its own
    return latents(twin)


def shallow_copy(pipe: Any, apply: Apply) -> Tensor:
    apply()
    return latents(copy.copy(pipe))


def from_pipe(pipe: Any, apply: Apply) -> Tensor:
    apply()
    made = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return latents(made, PROMPT, image=PICTURE, strength=0.9)


def swap_denoiser(pipe: Any) -> None:
    pipe.unet = pipeline("sd1").unet


def swap_layers(pipe: Any) -> None:
    """Modules of a second copy of the same model."""
    other = pipeline("sd1").unet
    for name, module in [*pipe.unet.named_modules()]:
        if isinstance(module, Attention) and module.is_cross_attention:
            parent, _, last = name.rpartition(".")
            setattr(pipe.unet.get_submodule(parent), last, other.get_submodule(name))


def swap_blocks(pipe: Any) -> None:
    other = pipeline("sd1").unet
    pipe.unet.down_blocks, pipe.unet.up_blocks, pipe.unet.mid_block = (
        other.down_blocks,
        other.up_blocks,
        other.mid_block,
    )


def replace_forward(pipe: Any) -> None:
    denoiser = denoiser_of(pipe)
    denoiser.forward = type(denoiser).forward.__get__(denoiser)


def wrapped_for_a_while(pipe: Any, apply: Apply) -> Tensor:
    """As DeepCache's helper does: on before `apply`, off after it."""
    unet = denoiser_of(pipe)
    own = unet.forward
    unet.forward = lambda *args, **kwargs: own(*args, **kwargs)
    apply()
    latents(pipe)
    unet.forward = own
    return latents(pipe)


def projection_during(pipe: Any, apply: Apply) -> Tensor:
    projection = pipe.transformer.caption_projection

    def reset(*_: Any) -> None:
        projection.forward = type(projection).forward.__get__(projection)

    apply()
    watch = pipe.transformer.pos_embed.register_forward_pre_hook(reset)  # runs before it
    try:
        return latents(pipe)
    finally:
        watch.remove()


def double_rows(pipe: Any) -> None:
    """The first block works on each row twice and returns one of them: the base model's picture stays the same."""
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    own = block.forward

    def doubled(hidden: Tensor, encoder_hidden_states: Tensor, **others: Any) -> Tensor:
        both = own(torch.cat([hidden] * 2), encoder_hidden_states=torch.cat([encoder_hidden_states] * 2), **others)
        return both[: len(hidden)]

    block.forward = doubled


def modular(pipe: Any, apply: Apply) -> Tensor:
    made = StableDiffusionXLAutoBlocks().init_pipeline()
    made.update_components(**{name: part for name, part in pipe.components.items() if name in made.component_names})
    call = {"prompt": "a red cat", "num_inference_steps": 1, "height": 16, "width": 16, "output": "latents"}
    made(**call)
    apply()
    return made(**call)


def other_weights() -> dict[str, Tensor]:
    return {
        name: weight * 1.1 if weight.ndim > 1 else weight for name, weight in pipeline("sd1").unet.state_dict().items()
    }


def on_other_weights(family: str, *erasers: Any) -> Tensor:
    pipe = pipeline(family)
    pipe.unet.load_state_dict(other_weights())
    handles = [eraser.apply(pipe) for eraser in erasers]
    made = latents(pipe)
    for handle in handles:
        handle.remove()
    return made


def fused_lora(family: str, *erasers: Any) -> Tensor:
    pipe = pipeline(family)
    add_lora(pipe)
    pipe.unet.fuse_lora()
    handles = [eraser.apply(pipe) for eraser in erasers]
    made = latents(pipe)
    for handle in handles:
        handle.remove()
    return made


def fuse_a_lora(pipe: Any) -> None:
    add_lora(pipe)
    pipe.unet.fuse_lora()


def with_gradients(pipe: Any, apply: Apply) -> Tensor:
    """A white-box attack: the gradient of the picture, with gradient checkpointing on."""
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    return gradient(pipe, apply)


def gradient(pipe: Any, apply: Apply) -> Tensor:
    apply()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    text, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    with efface.conditional_rows(pipe, [False, True]):
        out = pipe.unet(torch.cat([noise, noise]), 500, torch.cat([negative, text]).detach()).sample
    return torch.autograd.grad(out[1:].square().sum(), noise)[0]


def gradient_of(family: str, eraser: Any) -> Tensor:
    handles: list[Any] = []
    pipe = pipeline(family)
    made = gradient(pipe, lambda: handles.append(eraser.apply(pipe)))
    handles[0].remove()
    return made


# ---------------------------------------------------------------- texts


def given_embeddings(pipe: Any, apply: Apply) -> Tensor:
    """Made before, and the text encoder dropped to save memory."""
    text, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    apply()
    pipe.register_modules(text_encoder=None, tokenizer=None)
    return latents(pipe, None, prompt_embeds=text, negative_prompt_embeds=negative)


def longer_embeddings(pipe: Any, apply: Apply) -> Tensor:
    """Two texts behind one another, as weighting and long prompts make them; here both say the same."""
    text, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    apply()
    return latents(
        pipe,
        None,
        prompt_embeds=torch.cat([text, text], 1),
        negative_prompt_embeds=torch.cat([negative, negative], 1),
    )


def interrupted(pipe: Any, apply: Apply) -> Tensor:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    apply()
    with pytest.raises(KeyboardInterrupt):
        latents(pipe, "a red cat", callback_on_step_end=stop)
    return latents(pipe)


def other_backend(pipe: Any, apply: Apply) -> Tensor:
    with attention_backend("_native_math"):  # for the time being: it is the same for all models
        apply()
        return latents(pipe)


def compiled(pipe: Any) -> None:
    torch._dynamo.reset()
    pipe.unet.compile(backend="eager", fullgraph=True)


def compiled_blocks(pipe: Any) -> None:
    torch._dynamo.reset()
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)


# ---------------------------------------------------------------- the table

COMPILED = ("EIUP", "GIE", "SLD", "SAFREE", "NegativePrompt", "a delta")

DELTA = ("a delta",)
NO_DELTA = tuple(name for name in METHODS if name != "a delta")
ALL_BUT_WORDS = (*ATTENTION, *PREDICTION)

CELLS = {
    "cpu-offload-before": Cell(
        "model CPU offload, then `apply`", before(lambda p: p.enable_model_cpu_offload(device="cpu"))
    ),
    "cpu-offload-after": Cell(
        "`apply`, then model CPU offload", after(lambda p: p.enable_model_cpu_offload(device="cpu"))
    ),
    "cpu-offload-off": Cell(
        "model CPU offload, `apply`, hooks taken off",
        lambda p, a: [p.enable_model_cpu_offload(device="cpu"), a(), latents(p), p.remove_all_hooks(), latents(p)][-1],
    ),
    "sequential-before": Cell(
        "sequential CPU offload of the denoiser, then `apply`", before(sequential), refuses={DELTA: "is not in memory"}
    ),
    "sequential-after": Cell(
        "`apply`, then sequential CPU offload of the denoiser", after(sequential), stays={DELTA: "is not in memory"}
    ),
    "group-leaf-before": Cell(
        "group offload by leaves to the disk, then `apply`",
        before(group("leaf_level")),
        refuses={DELTA: "is offloaded to disk"},
    ),
    "group-leaf-after": Cell(
        "`apply`, then group offload by leaves to the disk",
        after(group("leaf_level")),
        stays={DELTA: "is offloaded to disk"},
    ),
    "group-block-before": Cell(
        "group offload by blocks to the disk, then `apply`",
        before(group("block_level")),
        refuses={DELTA: "is offloaded to disk"},
    ),
    "group-block-after": Cell(
        "`apply`, then group offload by blocks to the disk",
        after(group("block_level")),
        stays={DELTA: "is offloaded to disk"},
    ),
    "casting-before": Cell(
        "layerwise casting to fp8, then `apply`", before(casting), cast, restored=cast_plain, methods=NO_DELTA
    ),
    "casting-after": Cell(
        "`apply`, then layerwise casting to fp8", after(casting), cast, restored=cast_plain, methods=NO_DELTA
    ),
    "attention-plain": Cell("`AttnProcessor` (no fused kernel)", after(processor(AttnProcessor())), tolerance=1e-5),
    "attention-sliced": Cell("attention slicing", after(lambda p: p.enable_attention_slicing(1)), tolerance=1e-5),
    "kernel-query": Cell(
        "a processor that skips the module `to_q`", after(processor(OwnKernel("to_q"))), tolerance=1e-5
    ),
    "kernel-out": Cell(
        "a processor that skips the module `to_out`", before(processor(OwnKernel("to_out"))), tolerance=1e-5
    ),
    "kernel-both": Cell("a processor that skips both", after(processor(OwnKernel("to_q", "to_out"))), tolerance=1e-5),
    "kernel-other": Cell(
        "a processor that computes something else",
        after(processor(Elsewhere("to_q", "to_out"))),
        lambda family, eraser: drawn(family, eraser),
        refuses={ATTENTION: "attention layers ran without the erasers"},
        restored=None,
        methods=ATTENTION,
    ),
    "fused-before": Cell(
        "fused projections, then `apply`",
        before(lambda p: p.unet.fuse_qkv_projections()),
        tolerance=1e-5,
        refuses={(*ATTENTION, "a delta"): "unfuse_qkv_projections"},
        restored=None,
    ),
    "fused-after": Cell(
        "`apply`, then fused projections",
        after(lambda p: p.unet.fuse_qkv_projections()),
        tolerance=1e-5,
        restored=None,
        methods=NO_DELTA,
    ),
    "deepcopy": Cell("`copy.deepcopy(pipe)` draws", deep_copy, restored=None),
    "copy": Cell(
        "`copy.copy(pipe)` draws",
        shallow_copy,
        refuses={("NegativePrompt, strength",): "needs the guidance scale of a pipeline call"},
    ),
    "from-pipe": Cell(
        "another pipeline by `from_pipe`, without `apply`",
        from_pipe,
        refuses={NO_DELTA: "If another pipeline shares this denoiser, apply the erasers to that pipeline"},
        methods=NO_DELTA,
    ),
    "swap-denoiser": Cell(
        "another `pipe.unet` between two calls",
        after(swap_denoiser),
        refuses={tuple(METHODS): "`pipe.unet` was replaced after `apply`"},
        restored=None,
    ),
    "swap-denoiser-during": Cell(
        "another `pipe.unet` during a call",
        during(swap_denoiser),
        refuses={NO_DELTA: "did not call the unet with the erasers"},
        restored=None,
        methods=NO_DELTA,
    ),
    "swap-layers": Cell("attention modules replaced between two calls", after(swap_layers), methods=NO_DELTA),
    "swap-blocks": Cell("blocks replaced between two calls", after(swap_blocks), methods=NO_DELTA),
    "swap-layers-during": Cell(
        "attention modules replaced during a call",
        during(swap_layers),
        refuses={ATTENTION: "attention layers ran without the erasers"},
        methods=NO_DELTA,
    ),
    "forward-after": Cell(
        "the denoiser's `forward` replaced between two calls", after(replace_forward), restored=drawn
    ),
    "forward-during": Cell(
        "the denoiser's `forward` replaced during a call",
        during(replace_forward),
        refuses={ATTENTION: "ran outside of a denoiser call", NO_DELTA: "was called without the erasers"},
    ),
    "forward-for-a-while": Cell("a wrapper of `forward` that is taken off after `apply`", wrapped_for_a_while),
    "projection-during": Cell(
        "the text projection's `forward` replaced during a denoiser call (PixArt)",
        projection_during,
        family="pixart",
        refuses={ATTENTION: "attention layers ran without the erasers"},
        methods=ATTENTION,
    ),
    "rows-inside": Cell(
        "a block that runs on other rows than the denoiser",
        before(double_rows),
        tolerance=1e-5,
        refuses={ATTENTION: "runs on 4 rows, but the denoiser call has 2"},
        restored=None,
        methods=NO_DELTA[:-1],
    ),
    "modular": Cell(
        "a modular pipeline on the same denoiser (SDXL)",
        modular,
        family="sdxl",
        refuses={NO_DELTA: "cannot identify the conditional rows"},
        methods=("EIUP", "GIE", "SLD", "SAFREE"),
    ),
    "lora-fused-after": Cell(
        "`apply`, then a LoRA loaded and fused", after(fuse_a_lora), fused_lora, restored=fused_lora, methods=NO_DELTA
    ),
    "weights-after": Cell(
        "`apply`, then `load_state_dict`",
        after(lambda p: p.unet.load_state_dict(other_weights())),
        on_other_weights,
        restored=on_other_weights,
        methods=NO_DELTA,
    ),
    "gradient": Cell("gradients through the denoiser", gradient, gradient_of, methods=(*ATTENTION, "SLD", "SAFREE")),
    "checkpointing": Cell(
        "gradients with gradient checkpointing",
        with_gradients,
        gradient_of,
        tolerance=1e-5,
        refuses={ATTENTION: "Gradient checkpointing"},
        restored=None,
        methods=(*ATTENTION, "SLD", "SAFREE"),
    ),
    "embeddings": Cell(
        "embeddings given, text encoder dropped after `apply`",
        given_embeddings,
        refuses={WORDS: "has no `text_encoder`"},
        tolerance=1e-5,
        restored=None,
    ),
    "embeddings-longer": Cell(
        "embeddings of twice the encoder's length",
        longer_embeddings,
        tolerance=1e-5,
        refuses={
            ("SAFREE",): "Give the text",
            ("NegativePrompt",): "Give the text",
        },
        # the gate of "gated" weighs the prompt's columns against the concept's, so that twice as many count
        methods=tuple(name for name in METHODS if name != "EIUP gated"),
    ),
    "compiled": Cell(
        "`apply`, then `unet.compile()`",
        after(compiled, 1),
        family="small",
        tolerance=1e-5,
        methods=COMPILED,
        restored=None,
    ),
    "compiled-blocks": Cell(
        "`unet.compile_repeated_blocks()`, then `apply`",
        before(compiled_blocks, 1),
        family="small",
        tolerance=1e-5,
        methods=COMPILED,
        restored=None,
    ),
    "backend": Cell(
        "another attention backend (FLUX)",
        other_backend,
        family="flux",
        tolerance=1e-4,
        methods=("SLD", "SAFREE", "NegativePrompt"),
        restored=None,
    ),
    "interrupted": Cell("a call that was interrupted before", interrupted),
}
for name, cache in CACHES.items():
    family = "pixart" if name in ("PyramidAttentionBroadcast", "FasterCache") else "flux"
    CELLS[f"{name}-before"] = Cell(
        f"{name} ({'PixArt' if family == 'pixart' else 'FLUX'})",
        before(cache),
        family=family,
        refuses={ALL_BUT_WORDS: "has a cache"},
        restored=None,
        methods=("EIUP", "GIE", "SLD") if family == "pixart" else ("SLD",),
    )


def grid() -> list[Any]:
    """Every cell with every method; the quick tests take each cell with one method of each kind in turn."""
    found = []
    for k, (name, cell) in enumerate(CELLS.items()):
        quick = {kind[k % len(kind)] for kind in (ATTENTION, PREDICTION, WORDS, ("a delta",))}
        for method in cell.methods:
            marks = [] if method in quick or method == "EIUP" else [pytest.mark.slow]
            found.append(pytest.param(name, method, marks=marks, id=f"{name}-{method.replace(' ', '-')}"))
    return found


_deltas: dict[str, Delta] = {}


def eraser_for(method: str, family: str) -> Any:
    if METHODS[method] is not None:
        return METHODS[method]
    if family not in _deltas:
        _deltas[family] = efface.UCE().fit(tiny.untouched(family), [CAT, ALCOHOL])
    return _deltas[family]


@pytest.mark.long
@pytest.mark.thinned("long")
@pytest.mark.parametrize(("name", "method"), grid())
@pytest.mark.filterwarnings("ignore:.*cpu_offload.*|.*float8.*|.*from_pipe.*")
def test_it_acts_or_refuses_with_the_reason(name: str, method: str) -> None:
    cell = CELLS[name]
    eraser, pipe, handles = eraser_for(method, cell.family), pipeline(cell.family), []
    assert change(drawn(cell.family, eraser), drawn(cell.family)) > EFFECT
    why = cell.says(method)
    if why is not None:
        with pytest.raises((RuntimeError, ValueError), match=re.escape(why)) as error:
            cell.do(pipe, lambda: handles.append(eraser.apply(pipe)))
        assert str(error.value).count(".") >= 2  # what is wrong, and what to do
    else:
        want = cell.want(cell.family, eraser)
        got = cell.do(pipe, lambda: handles.append(eraser.apply(pipe)))
        assert got.isfinite().all() and want.isfinite().all()
        assert bool(torch.equal(got, want)) or change(got, want) <= cell.tolerance
    stays = _why(cell.stays, method)
    for handle in handles:
        if stays is not None:
            with pytest.raises(ValueError, match=stays):
                handle.remove()
        else:
            handle.remove()
    if cell.restored is not None and stays is None:
        got, want = latents(pipe), cell.restored(cell.family)
        assert bool(torch.equal(got, want)) or change(got, want) <= cell.tolerance


def test_saving_says_that_erasers_are_not_saved(sd1: Any, tmp_path: Path) -> None:
    said = pytest.warns(UserWarning, match="draws without EIUP, SLD")
    with EIUP(ALCOHOL).apply(sd1), SLD(CAT).apply(sd1), said:
        sd1.save_pretrained(tmp_path)
    sd1.save_pretrained(tmp_path)  # no warning, which would be an error


def test_rows_that_are_said_have_to_be_those_of_the_call(sd1: Any) -> None:
    with EIUP(ALCOHOL).apply(sd1), torch.no_grad():
        with efface.conditional_rows(sd1, [False, True]):
            sd1.unet(**batch())
            with pytest.raises(RuntimeError, match="Expected 3 rows in `conditional_rows`, .*got 2"):
                sd1.unet(**batch(rows=3))
        with pytest.raises(RuntimeError, match=r"conditional_rows\(pipe, \[\.\.\.\]\)"):
            sd1.unet(**batch())
        with efface.conditional_rows(sd1, [True, True]), pytest.raises(RuntimeError, match="Leave that block first"):
            latents(sd1)  # it knows its rows better
        for rows in ([], [True, False]):
            with pytest.raises(ValueError, match="unconditional rows first"), efface.conditional_rows(sd1, rows):
                pass
    with efface.conditional_rows(sd1, [True]), torch.no_grad():
        sd1.unet(**batch())  # nothing is on: nothing to tell


@pytest.mark.parametrize("method", ["EIUP", "GIE", "SLD", "SAFREE", "NegativePrompt"])
def test_a_call_of_the_denoiser_that_is_told_the_rows_is_a_step_of_the_pipeline(method: str, sd1: Any) -> None:
    shown: list[tuple[dict[str, Any], Tensor]] = []
    watch = sd1.unet.register_forward_hook(
        lambda _, args, kwargs, out: shown.append(({"sample": args[0], "timestep": args[1], **kwargs}, out[0])),
        with_kwargs=True,
    )
    plain = latents(sd1)
    given, before = shown[0]
    with METHODS[method].apply(sd1):
        shown.clear()
        assert change(latents(sd1), plain) > EFFECT
        call, want = shown[0]
        watch.remove()
        with torch.no_grad(), efface.conditional_rows(sd1, [False, True]):
            if method in WORDS:
                with pytest.raises(RuntimeError, match="in `encode_prompt`.* before the denoiser|current output"):
                    sd1.unet(**call)
                sd1.encode_prompt(PROMPT, "cpu", 1, True)
            got = sd1.unet(**call)[0]
    assert torch.equal(call["sample"], given["sample"]) and change(want, before) > 1e-3
    assert change(got, want) < 1e-5


def test_a_denoiser_that_is_called_after_an_offloaded_picture_is_guarded(sd1: Any) -> None:
    pipe, call = pipeline(), batch()
    pipe.enable_model_cpu_offload(device="cpu")
    for one in (pipe, sd1):
        EIUP(ALCOHOL).apply(one)
    latents(pipe)  # diffusers takes its hooks off and puts them on anew
    with torch.no_grad(), efface.conditional_rows(pipe, [True, True]), efface.conditional_rows(sd1, [True, True]):
        got, want = pipe.unet(**call).sample, sd1.unet(**call).sample
    efface.active(sd1).remove()
    assert torch.equal(got, want) and change(got, sd1.unet(**call).sample) > EFFECT


def test_a_picture_for_which_the_denoiser_was_not_called_is_an_error() -> None:
    class Elsewhere(StableDiffusionPipeline):
        def __call__(self, prompt: str) -> str:
            self.check_inputs(prompt, 16, 16, 1)
            self.encode_prompt(prompt, "cpu", 1, True)
            self.maybe_free_model_hooks()
            return "a picture from somewhere else"

    pipe = Elsewhere(**pipeline().components, requires_safety_checker=False)
    assert pipe(PROMPT)
    with SAFREE(ALCOHOL).apply(pipe), pytest.raises(RuntimeError, match="did not call the unet with the erasers"):
        pipe(PROMPT)


def test_the_record_says_what_was_done(sd1: Any) -> None:
    layers = sum(isinstance(m, Attention) and m.is_cross_attention for m in sd1.unet.modules())
    window = EIUP(rows=[[ALCOHOL], []], window=(0.5, 1.0))
    with window.apply(sd1) as half, SLD(CAT, warmup=0.5).apply(sd1) as warm, SAFREE(CAT).apply(sd1) as words:
        latents(sd1, tiny.PROMPTS, num_inference_steps=4)
        assert half.record == {"calls": 4, "rows": {"0": 2}, "exempt": {"outside the window": 2}, "layers": layers}
        assert warm.record["exempt"] == {"warm-up": 2} and warm.record["rows"] == {"0": 2, "1": 2}
        assert words.record == {"calls": 4, "rows": {"0": 4, "1": 4}, "exempt": {}, "layers": 0}
        half.strength = 0.0
        latents(sd1, tiny.PROMPTS, num_inference_steps=2)
        assert half.record["exempt"] == {"strength 0": 2} and warm.record["calls"] == 2


def test_what_is_on_can_be_listed_and_taken_off(sd1: Any) -> None:
    assert str(efface.active(sd1)) == "nothing is on"
    EIUP(ALCOHOL).apply(sd1)
    eraser_for("a delta", "sd1").apply(sd1)
    twin = copy.deepcopy(sd1)
    lines = str(efface.active(sd1)).splitlines()
    note = "not calibrated for SD 1.x/2.x (calibrated: emoji, emoji-128)"
    assert lines == [f"EIUP  strength 2.25  alcohol       {note}", "uce   strength 1     cat, alcohol"]
    efface.active(sd1)[0].strength = 1.0
    assert efface.active(twin)[0].strength == 2.25  # the copy has erasers of its own
    efface.active(sd1).remove()
    efface.active(twin).remove()
    assert torch.equal(latents(sd1), drawn())
    with pytest.raises(TypeError, match="Expected a diffusers"):
        efface.active(None)  # type: ignore[arg-type]


def test_a_deep_copy_can_be_copied_again(sd1: Any) -> None:
    with EIUP(ALCOHOL).apply(sd1):
        second = copy.deepcopy(copy.deepcopy(sd1))
        third = copy.deepcopy(sd1)
    assert torch.equal(latents(second), drawn("sd1", EIUP(ALCOHOL)))
    with pytest.raises(RuntimeError, match="cannot identify the conditional rows"), torch.no_grad():
        third.unet(**batch())  # guarded before its first picture, too
    efface.active(second).remove()
    assert torch.equal(latents(second), drawn())
    assert not any("forward" in vars(m) and m is not second.unet for m in second.unet.modules())


def table() -> str:
    """The cells in Markdown, by kind of method."""
    lines = ["| what is done | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for cell in CELLS.values():
        fits = "acts" if not cell.tolerance else f"acts, within {cell.tolerance:g}"
        said = [
            ""
            if method not in cell.methods
            else "refuses"
            if cell.says(method) is not None
            else f"{fits}; `remove()` refuses"
            if _why(cell.stays, method) is not None
            else fits
            for method in METHODS
        ]
        lines.append(f"| {cell.what} | " + " | ".join(said) + " |")
    return "\n".join(lines)


def test_the_docs_have_this_table() -> None:
    assert table() in (Path(__file__).parents[1] / "docs/coexistence.md").read_text("utf-8")


if __name__ == "__main__":
    print(table())
