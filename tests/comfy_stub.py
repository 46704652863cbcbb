"""A stand-in for the parts of ComfyUI that `integrations/comfyui` calls, around a tiny UNet of diffusers.

It has ComfyUI's names, signatures and orders of calls (as of version 0.3), and none of its code: batches of conditions
with the last one first, `transformer_options` handed down to each block, patches that replace cross-attention, a
guidance function that returns x - picture, a wrapper of the denoiser's calls, and patches of weights by name.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT_LENGTH = 16
FOLDERS: dict[str, Path] = {}  # where `folder_paths` finds files, by kind


# ---- the UNet, whose blocks read `transformer_options`


class _Processor:
    """ComfyUI's order of calls in the cross-attention of a transformer block."""

    def __init__(self, diffusion_model: UNetModel, block: tuple[str, int], index: int) -> None:
        self.model, self.block, self.index = diffusion_model, block, index

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        options = self.model.transformer_options
        extra = {name: value for name, value in options.items() if not name.startswith("patches")}
        extra |= {"block": self.block, "block_index": self.index}
        extra |= {"n_heads": attn.heads, "dim_head": attn.to_q.out_features // attn.heads}
        replaced = options.get("patches_replace", {}).get("attn2", {})
        act = replaced.get((*self.block, self.index), replaced.get(self.block))
        query, key, value = (
            project(x)
            for project, x in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        out = optimized_attention(query, key, value, attn.heads) if act is None else act(query, key, value, extra)
        return attn.to_out[1](attn.to_out[0](out))


class UNetModel(nn.Module):
    """A UNet of diffusers with the blocks of ComfyUI's."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.transformer_options: dict[str, Any] = {}
        down = [each for block in unet.down_blocks for each in getattr(block, "attentions", ())]
        up = [each for block in unet.up_blocks for each in getattr(block, "attentions", ())]
        self.input_blocks = [[nn.Identity()], *([nn.Identity(), each] for each in down)]
        self.middle_block = [nn.Identity(), *unet.mid_block.attentions]
        self.output_blocks = [[nn.Identity(), each] for each in up]
        rows = {"input": self.input_blocks, "middle": [self.middle_block], "output": self.output_blocks}
        for name, blocks in rows.items():
            for number, block in enumerate(blocks):
                for index, each in enumerate(getattr(block[-1], "transformer_blocks", ())):
                    each.attn2.set_processor(_Processor(self, (name, number), index))

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        self.transformer_options = transformer_options
        return self.unet(x, timestep, encoder_hidden_states=context, return_dict=False)[0]


def optimized_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class ModelSampling:
    """Noise levels of Stable Diffusion: x = picture + sigma noise."""

    def __init__(self) -> None:
        kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
        self.sigmas = ((1 - kept) / kept).sqrt()

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def timestep(self, sigma: Tensor) -> Tensor:
        return (self.sigmas.log()[:, None] - sigma.flatten().log()).abs().argmin(0).view(sigma.shape)


class BaseModel(nn.Module):
    """Predicts the picture from x."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.diffusion_model, self.model_sampling = UNetModel(unet), ModelSampling()
        self.model_config = SimpleNamespace(unet_config={})

    def apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **others: Any,
    ) -> Tensor:
        sigma = t.view(-1, 1, 1, 1)
        given = x / (sigma**2 + 1).sqrt()
        times = self.model_sampling.timestep(t)
        assert c_crossattn is not None
        return x - sigma * self.diffusion_model(given, times, c_crossattn, transformer_options or {})

    def extra_conds(self, **given: Any) -> dict[str, Any]:
        return {"c_crossattn": given["cross_attn"]}


# ---- a model with its patches


class ModelPatcher:
    def __init__(self, model: BaseModel) -> None:
        self.model, self.patches = model, {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        made = ModelPatcher(self.model)
        made.patches = {name: [*some] for name, some in self.patches.items()}
        made.model_options = _copied(self.model_options)
        return made

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def set_model_attn2_replace(
        self, patch: Any, block_name: str, number: int, transformer_index: int | None = None
    ) -> None:
        options = self.model_options["transformer_options"]
        block = (block_name, number) if transformer_index is None else (block_name, number, transformer_index)
        options.setdefault("patches_replace", {}).setdefault("attn2", {})[block] = patch

    def set_model_sampler_cfg_function(
        self, sampler_cfg_function: Any, disable_cfg1_optimization: bool = False
    ) -> None:
        self.model_options["sampler_cfg_function"] = sampler_cfg_function
        if disable_cfg1_optimization:
            self.model_options["disable_cfg1_optimization"] = True

    def set_model_unet_function_wrapper(self, unet_wrapper_function: Any) -> None:
        self.model_options["model_function_wrapper"] = unet_wrapper_function

    def add_patches(
        self, patches: dict[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[str]:
        there = self.model.state_dict()
        found = [name for name in patches if name in there]
        for name in found:
            self.patches.setdefault(name, []).append((strength_patch, patches[name], strength_model))
        return found

    @contextmanager
    def patched(self) -> Iterator[None]:
        """With the patches in the weights, as while a picture is drawn."""
        weights = dict(self.model.named_parameters())
        before = {name: weights[name].data.clone() for name in self.patches}
        for name, some in self.patches.items():
            for strength, (_, (up, down, alpha, _)), _ in some:
                weights[name].data += strength * alpha / down.shape[0] * (up.float() @ down.float())
        try:
            yield
        finally:
            for name, value in before.items():
                weights[name].data = value


def _copied(options: dict[str, Any]) -> dict[str, Any]:
    copied = {name: _copied(value) if isinstance(value, dict) else value for name, value in options.items()}
    return {name: [*value] if isinstance(value, list) else value for name, value in copied.items()}


class CLIP:
    """Text encoders of a pipeline. Parentheses are weights here, unless a backslash is before them."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def tokenize(self, text: str) -> str:
        assert "(" not in text.replace("\\(", ""), "a weight"
        return text.replace("\\(", "(").replace("\\)", ")")

    def encode_from_tokens(self, tokens: str, return_pooled: bool = False) -> Any:
        with torch.no_grad():
            states = self.pipe.encode_prompt(tokens, "cpu", 1, False)[0]
        ids = self.pipe.tokenizer(tokens).input_ids
        if len(ids) > TEXT_LENGTH:  # another window
            states = torch.cat([states] * 2, 1)
        return (states, states[:, -1]) if return_pooled else states


# ---- drawing


def convert_cond(cond: list[Any]) -> list[dict[str, Any]]:
    return [{**options, "cross_attn": states, "model_conds": {}} for states, options in cond]


def encode_model_conds(model_function: Any, conds: Any, noise: Tensor, device: Any, prompt_type: str) -> Any:
    return [
        each | {"model_conds": model_function(**each, noise=noise, device=device, prompt_type=prompt_type)}
        for each in conds
    ]


def calc_cond_batch(model: BaseModel, conds: list[Any], x_in: Tensor, timestep: Tensor, model_options: Any) -> Any:
    """The pictures that the model predicts, in one batch with the last condition first."""
    order = [k for k, cond in enumerate(conds) if cond is not None][::-1]
    texts = [conds[k][0]["model_conds"]["c_crossattn"].expand(len(x_in), -1, -1) for k in order]
    x, sigmas = torch.cat([x_in] * len(order)), torch.cat([timestep] * len(order))
    options = {**model_options.get("transformer_options", {}), "cond_or_uncond": order, "sigmas": timestep}
    c = {"c_crossattn": torch.cat(texts), "transformer_options": options}
    if (wrapper := model_options.get("model_function_wrapper")) is not None:
        given = {"input": x, "timestep": sigmas, "c": c, "cond_or_uncond": order}
        out = wrapper(model.apply_model, given)
    else:
        out = model.apply_model(x, sigmas, **c)
    found = dict(zip(order, out.chunk(len(order)), strict=True))
    return [found.get(k, torch.zeros_like(x_in)) for k in range(len(conds))]


def sampling_function(
    model: BaseModel, x: Tensor, timestep: Tensor, uncond: Any, cond: Any, cond_scale: float, model_options: Any
) -> Tensor:
    """The guided picture."""
    if cond_scale == 1.0 and not model_options.get("disable_cfg1_optimization", False):
        uncond = None
    positive, negative = calc_cond_batch(model, [cond, uncond], x, timestep, model_options)
    if "sampler_cfg_function" not in model_options:
        return negative + (positive - negative) * cond_scale
    given = {"cond": x - positive, "uncond": x - negative, "cond_scale": cond_scale, "timestep": timestep, "input": x}
    given |= {"sigma": timestep, "cond_denoised": positive, "uncond_denoised": negative, "model": model}
    given |= {"model_options": model_options, "input_cond": cond, "input_uncond": uncond}
    return x - model_options["sampler_cfg_function"](given)


def sample(
    model: ModelPatcher, noise: Tensor, positive: Any, negative: Any, cfg: float, steps: int, guide: Any = None
) -> Tensor:
    """Euler's method from pure noise."""
    base, every = model.model, model.get_model_object("model_sampling").sigmas
    sigmas = torch.cat([every[torch.linspace(999, 0, steps).long()], torch.zeros(1)])
    options = _copied(model.model_options)
    options["transformer_options"]["sample_sigmas"] = sigmas
    x = noise * sigmas[0]
    conds = [None if cond is None else convert_cond(cond) for cond in (positive, negative)]
    positive, negative = (
        None if each is None else encode_model_conds(base.extra_conds, each, x, x.device, kind)
        for each, kind in zip(conds, ("positive", "negative"), strict=True)
    )
    with torch.no_grad(), model.patched():
        for now, then in itertools.pairwise(sigmas):
            sigma = now.expand(len(x))
            made = (guide or sampling_function)(base, x, sigma, negative, positive, cfg, options)
            x = x + (then - now) * (x - made) / now
    return x


# ---- files of weights


def load_torch_file(ckpt: str, safe_load: bool = False) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(ckpt)


def model_lora_keys_unet(model: BaseModel, key_map: dict[str, str]) -> dict[str, str]:
    names = [name.removesuffix(".weight") for name in model.state_dict() if name.endswith(".weight")]
    prefix = "diffusion_model.unet."
    found = {f"lora_unet_{name.removeprefix(prefix).replace('.', '_')}": f"{name}.weight" for name in names}
    return key_map | found


def load_lora(lora: dict[str, Tensor], to_load: dict[str, str]) -> dict[str, Any]:
    return {
        weight: (
            "lora",
            (lora[f"{name}.lora_up.weight"], lora[f"{name}.lora_down.weight"], lora[f"{name}.alpha"], None),
        )
        for name, weight in to_load.items()
        if f"{name}.lora_up.weight" in lora
    }


def install() -> None:
    """Makes the modules importable, as inside ComfyUI."""
    parts = {
        "comfy": {},
        "comfy.samplers": {"calc_cond_batch": calc_cond_batch, "encode_model_conds": encode_model_conds},
        "comfy.sampler_helpers": {"convert_cond": convert_cond},
        "comfy.lora": {"model_lora_keys_unet": model_lora_keys_unet, "load_lora": load_lora},
        "comfy.utils": {"load_torch_file": load_torch_file},
        "comfy.ldm": {},
        "comfy.ldm.modules": {},
        "comfy.ldm.modules.attention": {"optimized_attention": optimized_attention},
        "folder_paths": {
            "get_filename_list": lambda kind: sorted(path.name for path in FOLDERS[kind].iterdir()),
            "get_full_path_or_raise": lambda kind, name: str(FOLDERS[kind] / name),
        },
    }
    for name, names in parts.items():
        module = ModuleType(name)
        vars(module).update(names)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
