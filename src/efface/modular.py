"""Erasers in diffusers' modular pipelines, which guide by a replaceable part, the guider."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from torch import LongTensor, Tensor, nn

from . import checks
from .families import family
from .hooks.loops import Loop

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Guider"]


class Fields(NamedTuple):
    """The names by which a modular pipeline passes texts to its guider."""

    text: str
    pooled: str


FIELDS = {"SDXL": Fields("prompt_embeds", "text_embeds"), "SD 3/3.5": Fields("encoder_hidden_states", "text_embeds")}
BOTH = ["pred_cond", "pred_uncond"]


class Guider(BaseGuidance):
    """A guider for a modular pipeline of diffusers that draws with the erasers of an ordinary pipeline.

    The two pipelines share their parts. Erasers are applied to the ordinary one, before or after. Each call of the
    modular pipeline then passes them: the guider gives them the encoded prompts before the first step, and says in each
    step which denoiser call has the conditional rows. `guider` combines the predictions:

        e = guider(e_p + change, e_u)         change: what methods such as SLD add to the prompt's prediction

    Without a `Guider`, or with another denoiser than the ordinary pipeline's, a call of the modular pipeline raises an
    error while erasers are on. Methods that read the prompt's words (SAFREE, Semantic Surgery, `NegativePrompt` without
    a strength) raise one too, because a modular pipeline gives the guider embeddings.

    Source: the interface of `diffusers.guiders`, which diffusers calls experimental.

    Differs: modular pipelines call the denoiser separately for the prompt and for the negative prompt. Methods that
    guide predict e_u once more, in the call of e_p, so a step with them costs 2 times a base step, and not 1.5. SD
    3's modular pipeline has guidance only with a `negative_prompt`, for example "". Outside of the guider's `start`
    and `stop` the guidance scale counts as 1. `NegativePrompt` with a strength needs a `ClassifierFreeGuidance`,
    whose scale it divides by. `rows` of a method are those of the batch: one prompt with `num_images_per_prompt=2`
    has two. The concept is encoded with the default settings of `encode_prompt`, without `clip_skip`.

    Args:
        pipe: an SDXL or SD 3 pipeline, from whose parts the modular pipeline is made.
        guider: combines the predictions for the prompt and the negative prompt. Default: `ClassifierFreeGuidance()`.

    Shapes: predictions [B, C, h, w].

    Raises:
        TypeError: Efface does not know the modular pipelines of this family, or `guider` is not a guider.
        ValueError: `guider` makes further predictions, as perturbed attention guidance does. In a call: what the
            methods raise in a call with `prompt_embeds`.
        RuntimeError: in a call, the modular pipeline has another denoiser, or its prompts change between two steps.

    Example:
        >>> import efface, efface.testing
        >>> from diffusers.guiders import ClassifierFreeGuidance
        >>> from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
        >>> pipe = efface.testing.pipeline("sdxl")
        >>> modular = StableDiffusionXLAutoBlocks().init_pipeline()
        >>> modular.update_components(**{n: p for n, p in pipe.components.items() if n in modular.component_names})
        >>> modular.update_components(guider=efface.Guider(pipe, ClassifierFreeGuidance(guidance_scale=5.0)))
        >>> with efface.erase(pipe, efface.Concept("beer")) as handle:
        ...     images = modular(prompt="a night", num_inference_steps=2, height=16, width=16, output="images")
        >>> handle.record["rows"]
        {'0': 2}
    """

    _input_predictions = BOTH

    def __init__(self, pipe: DiffusionPipeline, guider: BaseGuidance | None = None) -> None:
        super().__init__()
        guider = ClassifierFreeGuidance() if guider is None else guider
        if not isinstance(guider, BaseGuidance):
            cure = "Give one of `diffusers.guiders`, such as `ClassifierFreeGuidance(guidance_scale=5.0)`."
            raise TypeError(checks.refusal("a guider of diffusers", guider, cure))
        if type(guider)._input_predictions != BOTH or _touches_models(type(guider)):
            raise ValueError(
                "Expected a guider that predicts for the prompt and for the negative prompt, got "
                f"{type(guider).__name__}, which makes other predictions. Use `ClassifierFreeGuidance`."
            )
        name = family(pipe).name
        if name not in FIELDS:
            raise TypeError(
                f"Expected a pipeline whose modular form Efface knows ({', '.join(FIELDS)}), got a "
                f"{type(pipe).__name__} ({name}). Draw with the ordinary pipeline."
            )
        self.fields, self.guider, self.loop = FIELDS[name], guider, Loop(pipe)
        self._given: tuple[Any, ...] = ()
        self._made: dict[str, Tensor | None] = {}
        self.register_to_config()  # modular pipelines read a config

    # ---- what the modular pipeline calls, in this order

    def set_state(self, step: int, num_inference_steps: int, timestep: LongTensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self.guider.set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: Any) -> list[Any]:
        """The denoiser's inputs of this step, with the texts as the erasers changed them."""
        pairs = {name: data[name] if isinstance(data[name], tuple) else (data[name], None) for name in self.fields}
        (text, negative), (pooled, negative_pooled) = pairs.values()
        given = (text, negative, pooled, negative_pooled)
        if self._step == 0:
            parts = ("text", "negative", "pooled", "negative_pooled")
            self._given, self._made = given, self.loop.begin(dict(zip(parts, given, strict=True)))
        elif len(given) != len(self._given) or any(a is not b for a, b in zip(given, self._given, strict=True)):
            raise RuntimeError(
                "Expected the prompts of the first step in each step, got others, for which the erasers are not "
                "prepared. Draw each prompt in a separate call."
            )
        self.loop.step(self._step, self._num_inference_steps, self._scale())
        made = self._made
        changed = {
            self.fields.text: (made["text"], made["negative"]),
            self.fields.pooled: (made["pooled"], made["negative_pooled"]),
        }
        asked = {name: pair if isinstance(data[name], tuple) else pair[0] for name, pair in changed.items()}
        return list(self.guider.prepare_inputs(data | asked))

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        self.guider.prepare_models(denoiser)
        self.loop.enter(denoiser)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self.loop.leave()
        self.guider.cleanup_models(denoiser)

    def __call__(self, data: list[Any]) -> Any:
        return self.guider(data)

    # ---- facts on the guidance

    @property
    def guidance_scale(self) -> float:
        return float(self.guider.guidance_scale)

    @property
    def is_conditional(self) -> bool:
        return bool(self.guider.is_conditional)

    @property
    def num_conditions(self) -> int:
        return int(self.guider.num_conditions)

    def enable(self) -> None:
        self.guider.enable()

    def disable(self) -> None:
        self.guider.disable()

    def _scale(self) -> float:
        """s of e_u + s (e_p - e_u) in this step; NaN if the predictions are combined in another way."""
        if self.num_conditions == 1:
            return 1.0
        if type(self.guider) is not ClassifierFreeGuidance:
            return math.nan
        return self.guidance_scale + float(self.guider.use_original_formulation)


def _touches_models(kind: type) -> bool:
    """Whether a guider changes the denoiser for some of its predictions."""
    return any(getattr(kind, name) is not getattr(BaseGuidance, name) for name in ("prepare_models", "cleanup_models"))
