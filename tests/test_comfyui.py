"""The ComfyUI nodes compute what Efface computes in a diffusers pipeline, on a stand-in for ComfyUI's interface.

ComfyUI itself is not a package of the index, so it was not run. The stand-in is `comfy_stub.py`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy_stub as comfy
import pytest
import torch
from torch import Tensor

import efface
from efface.testing import change, pipeline

FOLDER = Path(__file__).parents[1] / "integrations/comfyui"
SCALE, SIGMA, STEPS = 7.5, 5.0, 4
PROMPT, NEGATIVE = "a glass of wine", "a beer"
WINE = efface.Concept("wine", ("wine", "glass"))
WORDS = {"concepts": "", "phrases": "wine, glass"}
PIPE = pipeline("sd1")


def _nodes() -> ModuleType:
    comfy.install()
    spec = importlib.util.spec_from_file_location(
        "efface_comfyui", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


NODES = _nodes().NODE_CLASS_MAPPINGS
MODEL, CLIP = comfy.ModelPatcher(comfy.BaseModel(pipeline("sd1").unet)), comfy.CLIP(PIPE)


def node(name: str, model: Any = MODEL, **given: Any) -> Any:
    """The model that a node returns, with the node's own defaults."""
    made = NODES[name]()
    kinds = made.INPUT_TYPES()["required"]
    values = {name: kind[1]["default"] for name, kind in kinds.items() if len(kind) > 1 and "default" in kind[1]}
    values |= {"model": model} | ({"clip": CLIP} if "clip" in kinds else {}) | given
    (found,) = getattr(made, made.FUNCTION)(**values)
    return found


def text(words: str) -> Any:
    return [[CLIP.encode_from_tokens(words), {}]]


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1_000_000))


def predicted(model: Any, guide: Callable[..., Tensor] = comfy.sampling_function) -> Tensor:
    """The noise that a model predicts in one step."""
    found: list[Tensor] = []

    def first(base: Any, x: Tensor, sigma: Tensor, *others: Any) -> Tensor:
        made = guide(base, x, sigma, *others)
        found.append((x - made) / sigma.view(-1, 1, 1, 1))
        return made

    comfy.sample(model, noise(), text(PROMPT), text(NEGATIVE), SCALE, 1, first)
    return found[0]


def expected(*methods: Any) -> Tensor:
    """The same by the engine on the denoiser of a diffusers pipeline."""
    sigma = MODEL.get_model_object("model_sampling").sigmas[-1]
    x = noise() * sigma / (sigma**2 + 1).sqrt()
    states = torch.cat([CLIP.encode_from_tokens(words).expand(2, -1, -1) for words in (NEGATIVE, PROMPT)])
    handles = [method.apply(PIPE) for method in methods]
    try:
        with torch.no_grad(), efface.conditional_rows(PIPE, [False, False, True, True]):
            out = PIPE.unet(torch.cat([x] * 2), 999, encoder_hidden_states=states).sample
    finally:
        for handle in handles:
            handle.remove()
    negative, positive = out.chunk(2)
    return negative + SCALE * (positive - negative)


BASE = expected()


def test_without_nodes_the_stand_in_predicts_what_the_pipeline_predicts() -> None:
    assert change(predicted(MODEL), BASE) < 1e-5


def test_eiup_is_the_engines_also_on_a_negative_prompt() -> None:
    """The negative prompt names the concept, so its rows are edited too."""
    made, other = expected(efface.EIUP(WINE)), expected(efface.EIUP(WINE, normalization="gated"))
    assert change(made, BASE) > 0.01 and change(made, other) > 0.01
    assert change(predicted(node("EffaceEIUP", **WORDS)), made) < 1e-4


@pytest.mark.parametrize("method", ["sld.max", "crg"])
def test_guidance_is_the_engines(method: str) -> None:
    fields = {"threshold": -1.0} if method == "crg" else {}
    eraser = efface.api.build(method, [WINE], **fields)
    changed = MODEL.clone()
    sys.modules["efface_comfyui.guidance"].Guidance(changed, CLIP, eraser).patch(changed)
    assert change(expected(eraser), BASE) > 0.01
    assert change(predicted(changed), expected(eraser)) < 1e-4


def test_a_negative_prompt_has_its_formula() -> None:
    sigma = MODEL.get_model_object("model_sampling").sigmas[-1]
    x = noise() * sigma / (sigma**2 + 1).sqrt()
    e_n, e_u = (
        PIPE.unet(x, 999, encoder_hidden_states=CLIP.encode_from_tokens(words).expand(2, -1, -1)).sample
        for words in ("wine, glass", NEGATIVE)
    )
    formula = BASE - 3.0 * (e_n - e_u)
    made = predicted(node("EffaceGuidance", method="negative_prompt", strength=3.0, **WORDS))
    assert change(formula, BASE) > 0.01 and change(made, formula) < 1e-4


def test_both_nodes_together_are_both_methods() -> None:
    """The prediction for the concept is not edited by EIUP."""
    both = expected(efface.EIUP(WINE), efface.SLD.max(WINE))
    made = node("EffaceGuidance", node("EffaceEIUP", **WORDS), method="sld.max", **WORDS)
    assert change(both, expected(efface.SLD.max(WINE))) > 0.01
    assert change(predicted(made), both) < 1e-4


def drawn(model: Any, **given: Any) -> Tensor:
    call = {"positive": text(PROMPT), "negative": text(NEGATIVE), "cfg": SCALE, "steps": STEPS, **given}
    return comfy.sample(model, noise(), **call)


def test_pictures_change_and_each_starts_anew() -> None:
    model = node("EffaceGuidance", method="sld.max", **WORDS)
    assert torch.equal(drawn(model), drawn(model)) and change(drawn(model), drawn(MODEL)) > 0.01
    assert torch.equal(drawn(node("EffaceEIUP", strength=0.0, **WORDS)), drawn(MODEL))
    windows = [drawn(node("EffaceEIUP", start=start, end=end, **WORDS)) for start, end in ((0.0, 1.0), (0.0, 0.5))]
    assert min(change(one, other) for one, other in ((*windows,), (windows[1], drawn(MODEL)))) > 1e-3


def test_sld_waits_for_its_warm_up() -> None:
    """A fifth of the steps: all of the first of four, so only its middle, at one eighth, is before it."""
    found: list[float] = []
    eraser = efface.SLD(WINE, warmup=0.2, momentum_scale=0.0)
    watched = MODEL.clone()
    guidance = sys.modules["efface_comfyui.guidance"].Guidance(watched, CLIP, eraser)
    original = guidance._time
    guidance._time = lambda *given: found.append(float(original(*given))) or original(*given)
    guidance.patch(watched)
    drawn(watched)
    assert found == pytest.approx([0.125, 0.375, 0.625, 0.875])


@pytest.fixture
def loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(comfy.FOLDERS, "loras", tmp_path)
    return tmp_path


def test_a_delta_changes_all_of_its_layers_or_is_refused(loras: Path) -> None:
    delta = efface.UCE().fit(PIPE, [WINE])
    delta.export(loras / "wine.safetensors", layout="kohya")
    assert NODES["EffaceDelta"].INPUT_TYPES()["required"]["delta"] == (["wine.safetensors"],)
    with delta.apply(PIPE):
        edited = expected()
    assert change(edited, BASE) > 0.01
    assert change(predicted(node("EffaceDelta", delta="wine.safetensors")), edited) < 0.01 * change(edited, BASE)
    other = comfy.ModelPatcher(comfy.BaseModel(pipeline("sdxl").unet))
    with pytest.raises(ValueError, match="others of"):
        node("EffaceDelta", other, delta="wine.safetensors")
    delta.save(loras / "delta.safetensors")
    with pytest.raises(ValueError, match="got none. Export the delta"):
        node("EffaceDelta", delta="delta.safetensors")


def test_what_would_draw_without_efface_raises() -> None:
    """Another node in the same place, before or after, and guiders that leave the function out."""
    erased, guided = node("EffaceEIUP", **WORDS), node("EffaceGuidance", **WORDS)
    with pytest.raises(ValueError, match="no other node replaces"):
        node("EffaceEIUP", erased, **WORDS)
    with pytest.raises(ValueError, match="no other node replaces"):
        node("EffaceGuidance", guided, **WORDS)
    later = erased.clone()
    later.set_model_attn2_replace(lambda q, k, v, options: comfy.optimized_attention(q, k, v, 2), "middle", 0, 0)
    with pytest.raises(RuntimeError, match=r"1 of \d cross-attention layers ran without Efface"):
        drawn(later)

    def alone(base: Any, x: Tensor, sigma: Tensor, negative: Any, positive: Any, cfg: float, options: Any) -> Tensor:
        return comfy.calc_cond_batch(base, [positive, negative], x, sigma, options)[0]

    with pytest.raises(RuntimeError, match="A step was drawn without SLD"):
        drawn(guided, guide=alone)
    assert change(drawn(guided), drawn(MODEL)) > 1e-4  # a picture that failed leaves nothing behind
    with pytest.raises(ValueError, match="needs a negative conditioning"):
        drawn(guided, negative=None)
    assert bool(drawn(guided, cfg=1.0).isfinite().all())  # where ComfyUI leaves out the negative prompt


def test_a_wrapper_of_another_node_runs_too() -> None:
    model, called = MODEL.clone(), []

    def wrapper(apply_model: Any, given: dict[str, Any]) -> Tensor:
        called.append(given["cond_or_uncond"])
        return apply_model(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(wrapper)
    assert change(predicted(node("EffaceEIUP", model, **WORDS)), expected(efface.EIUP(WINE))) < 1e-4
    assert called == [[1, 0]]


def test_other_denoisers_and_long_phrases_are_refused() -> None:
    class Flux:
        model = type("Model", (), {"diffusion_model": torch.nn.Linear(1, 1)})()

        def clone(self) -> Flux:
            return self

        def get_model_object(self, name: str) -> None:
            return None

    with pytest.raises(ValueError, match="UNet with cross-attention"):
        node("EffaceEIUP", Flux(), **WORDS)
    with pytest.raises(ValueError, match="fits into the text encoder"):
        node("EffaceEIUP", concepts="", phrases="wine " * 20)
    with pytest.raises(ValueError, match="at least one concept"):
        node("EffaceEIUP", concepts="", phrases=" ,")
    node("EffaceEIUP", concepts="", phrases="a (red) cat")  # no weights


# ---- the workflow file

CORE: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({"ckpt_name": "STRING"}, ("MODEL", "CLIP", "VAE")),
    "CLIPTextEncode": ({"clip": "CLIP", "text": "STRING"}, ("CONDITIONING",)),
    "EmptyLatentImage": ({"width": "INT", "height": "INT", "batch_size": "INT"}, ("LATENT",)),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"}
        | {"seed": "INT", "steps": "INT", "cfg": "FLOAT", "sampler_name": "STRING", "scheduler": "STRING"}
        | {"denoise": "FLOAT"},
        ("LATENT",),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, ()),
}
VALUES: dict[str, type | tuple[type, ...]] = {"STRING": str, "INT": int, "FLOAT": (int, float)}


def described(name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    if name in CORE:
        return CORE[name]
    kinds = NODES[name].INPUT_TYPES()
    return {n: kind[0] for n, kind in kinds["required"].items()}, NODES[name].RETURN_TYPES


def test_the_workflow_fits_the_nodes_and_draws() -> None:
    workflow = json.loads((FOLDER / "workflow.json").read_text("utf-8"))
    assert {"EffaceEIUP", "EffaceGuidance", "KSampler", "SaveImage"} <= {n["class_type"] for n in workflow.values()}
    made: dict[str, tuple[Any, ...]] = {}
    for number, each in workflow.items():  # in an order in which they can run
        kinds, outputs = described(each["class_type"])
        assert each["inputs"].keys() == kinds.keys(), number
        given: dict[str, Any] = {}
        for name, value in each["inputs"].items():
            if isinstance(value, list):
                source, slot = value
                assert described(workflow[source]["class_type"])[1][slot] == kinds[name], (number, name)
                given[name] = made[source][slot]
            else:
                kind = kinds[name]
                assert value in kind if isinstance(kind, list) else isinstance(value, VALUES[kind]), (number, name)
                given[name] = value
        made[number] = _run(each["class_type"], given) if outputs else ()
    (latents,) = next(made[n] for n, each in workflow.items() if each["class_type"] == "KSampler")
    assert change(latents, drawn(MODEL, negative=text(""), positive=text("a night at the pub"))) > 1e-3


def _run(name: str, given: dict[str, Any]) -> tuple[Any, ...]:
    if name == "CheckpointLoaderSimple":
        return MODEL, CLIP, None
    if name == "CLIPTextEncode":
        return (text(given["text"]),)
    if name == "KSampler":
        conds = {kind: given[kind] for kind in ("positive", "negative")}
        return (drawn(given["model"], cfg=given["cfg"], **conds),)
    if name in NODES:
        given |= WORDS  # which the tiny tokenizer knows
        return tuple(getattr(NODES[name](), NODES[name].FUNCTION)(**given))
    return (None,)
