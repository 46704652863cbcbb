"""FLUX.2: a decoder with a chat template, all columns of which have positions in joint attention.

FLUX.2 dev is guidance-distilled and reads Mistral. FLUX.2 klein reads Qwen 3; its base model has guidance in a second
call, whose text is "", and its distilled model has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._parts import Reading, between, tokenizer_of
from .flux import FluxLike

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

LAYERS = 3  # of the decoder, whose states stand side by side


@dataclass(frozen=True)
class _Flux2(FluxLike):
    denoiser_class: str = "Flux2Transformer2DModel"
    encoders: tuple[str, ...] = ("Mistral3",)
    offers: frozenset[str] = frozenset({"joint_text", "padded_text", "causal_text", "text_inputs"})
    returns: tuple[str, ...] = ("text", "ids")
    resizable: tuple[str, ...] = ("tokenizer",)
    settings: tuple[str, ...] = ("max_sequence_length", "text_encoder_out_layers")
    positions: bool = True
    text_inputs: tuple[str, ...] = ("context_embedder",)

    def guided(self, guidance: float) -> dict[str, Any]:
        """No arguments: dev takes its guidance scale as an input of the denoiser."""
        return {}

    def protocol(self, call: Mapping[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in call.items() if name != "guidance"}
        return rest | (self.guided(call["guidance"]) if "guidance" in call else {})

    def state_width(self, encoder: Any) -> int:
        return LAYERS * int(encoder.config.get_text_config().hidden_size)

    def read(self, pipe: DiffusionPipeline, tokenizer: str, text: str, settings: Mapping[str, Any]) -> Reading:
        ids, empty = (self.templated(pipe, each) for each in (text, ""))
        left = tokenizer_of(pipe, tokenizer).padding_side == "left"
        return Reading(ids, between(ids, empty), padded_before=left)

    def tells_scale(self, pipe: DiffusionPipeline) -> bool:
        return "guidance" in self.offers and super().tells_scale(pipe)

    def templated(self, pipe: Any, text: str) -> list[int]:
        """The tokens of a text in the pipeline's chat template."""
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}]}
            for role, content in (("system", pipe.system_message), ("user", text))
        ]
        return list(pipe.tokenizer.apply_chat_template([messages], tokenize=True, return_dict=True)["input_ids"][0])

    def for_length(self, arguments: dict[str, Any], length: int) -> dict[str, Any]:
        """Adds the positions of the text, which count its columns."""
        return self._placed(arguments, arguments["txt_ids"].new_zeros(0), length)

    def with_positions(self, arguments: dict[str, Any], positions: Tensor, length: int) -> dict[str, Any]:
        return self._placed(arguments, positions.float(), length - len(positions))

    def _placed(self, arguments: dict[str, Any], positions: Tensor, length: int) -> dict[str, Any]:
        from torch import arange, cat

        ids = arguments["txt_ids"]
        counted = cat([positions, arange(length, device=ids.device).to(positions)])
        others = ids.new_zeros(len(counted), ids.shape[-1] - 1).to(counted)
        return {**arguments, "txt_ids": cat([others, counted[:, None]], -1)}


class _Klein(_Flux2):
    @property
    def guidance_condition(self) -> str:
        return ""

    def guided(self, guidance: float) -> dict[str, Any]:
        return {self.scale: guidance}

    def offered(self, pipe: DiffusionPipeline) -> frozenset[str]:
        found = super().offered(pipe)
        return found - {"guidance", "guidance_scale"} if pipe.config["is_distilled"] else found

    def templated(self, pipe: Any, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return list(pipe.tokenizer(pipe.tokenizer.apply_chat_template(messages, **options)).input_ids)


FLUX2 = _Flux2("FLUX.2")
FLUX2_KLEIN = _Klein("FLUX.2 klein", encoders=("Qwen3",), offers=FLUX2.offers | {"guidance", "guidance_scale"})
