"""The method. Other files hold its weights, its second trajectory and its official values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from torch import Tensor

from ... import checks
from ..._weights import layer_names, text_hash
from ...core import Concepts, ConceptsField, Handle, RowsField, as_concepts
from ...delta import unedited
from ...families import check
from ...fields import Converted
from ...hooks import CrossAttention, DenoiserCall, Encoding, ErasurePrompts, Memory, Method, SelfAttention, computed
from .._keys import keys_values, remembered
from .adapter import Adapter
from .measure import measured
from .official import afterwards, joined, swapped
from .trajectory import Trajectory, check_trajectory

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .fit import Detectors, Prompts

Values = Literal["paper", "official"]
COPIED, QUERIES = 0.4, 256  # as in the code: copies self-attention maps in the first 40 % of steps, up to 16 x 16


@dataclass(frozen=True)
class GIE(Method):
    """Inserts the concept's re-weighted attention maps as growth inhibitors, in addition to the prompt's maps.

    In each cross-attention layer, with `A(q, X)` the softmax of the image queries against the keys of text X, P the
    user's prompt, E the erasure prompt and C its own tokens:

        O = A(q, P) V_P + sum_{k in C} w_k A(q, E)_k V_E,k          w_k <= 0

    The weights are `w_k = -strength`, or, with an adapter, `w_k = -strength max(0, adapter(f_k))`. `f_k` holds one
    feature per layer: the mean of `A(q, E)_k` over heads and queries in a denoiser call without an edit, before the
    first step.

    Paper: D. Chen, Z. Li, M. Fan, C. Chen, W. Zhou et al., 2025, "Growth Inhibitors for Suppressing Inappropriate Image
    Concepts in Diffusion Models", ICLR 2025, arXiv 2408.01014 v2. Its equations were not available, so there are no
    equation numbers. The formula is its algorithm. The window and the adapter's sizes come from its public code.

    Differs: `values="paper"` in one trajectory is the algorithm of the paper. The public code differs from it.
    `values="official"` takes the prompt's values from prompt and concept encoded together. The end token becomes the
    concept's first word in context, and one padding column is dropped per concept token. `trajectories=2` draws the
    base model's picture in a second trajectory, with a second denoiser call per step. The prompt's maps come from
    there, and in the first 40 % of the steps also its self-attention up to 256 queries. With both (`GIE.official`) the
    concept's tokens stay in the prompt after the window, as in the code; otherwise the prompt is unedited after the
    window. The second trajectory uses the scheduler's default step: with `eta`, or a scheduler that draws noise, it is
    another picture. The published adapter's weights and training are not available: `GIE.fit` trains one with a
    detector as judge instead of a language model. It standardises its inputs, and its weights are never positive.
    Features are measured without injection, not with weight 1. If no start token absorbs attention (emoji, PixArt), the
    features are the same softmax, with sum 1 over the text's tokens; a gated softmax was not tried. The terms of
    several erasure prompts add up. SDXL's pooled text embedding does not pass cross-attention and is not edited.

    Args:
        concepts: the concepts to erase: names of shipped concepts, `Concept` objects, or a sequence of them. The
            phrases of a concept are packed into as few erasure prompts as fit the encoder.
        strength: >= 0; the weight -w of each concept token, or, with an adapter, the factor of its prediction. 0 is the
            base model with the paper's values. The paper's fixed weight is unknown.
        window: (start, end), the part of the trajectory with the edit, as fractions; `GIE.paper` has (0, 0.8). With two
            trajectories it counts denoiser calls as in the code: of N steps, those from `int(start (N + 1))` to below
            `int(end (N + 1))`.
        values: "paper" or "official". "official" needs a causal text encoder, and the prompt and the erasure prompt
            encoded together.
        trajectories: 1, or 2 for the code's form, which needs pipeline calls and a denoiser that is not compiled.
        adapter: a file that `GIE.fit` wrote for this model, or "emoji" for the shipped adapter of that model. None for
            a fixed weight.
        rows: one list of concepts per prompt of the batch, instead of `concepts` for all.

    Shapes: queries and outputs [B, Q, C] on conditional rows, text [1, L, D], features [B, tokens, layers], weights
    [B, tokens]. Unconditional rows are never edited.

    Raises:
        ValueError: a concept or `values` is unknown, `strength` is negative, `window` is outside [0, 1], `trajectories`
            is not 1 or 2, or there is no concept. On `apply`: the pipeline has no cross-attention, fused projections or
            another model's text encoder; a phrase has no tokens or is over the encoder's limit; the adapter belongs to
            another model or other layers; official values meet a bidirectional text encoder; two trajectories meet
            inpainting, or PixArt, which does not expose its guidance scale; an adapter or two trajectories meet a
            compiled denoiser. In a call: the numbers of `rows` and prompts differ; official values lack the prompt's
            text or room for both texts; two trajectories meet `guidance_rescale` or a direct denoiser call.
        TypeError: the family of the pipeline is unknown, or `rows` or `concepts` are not lists of concepts.
        FileNotFoundError: the adapter does not exist.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.GIE(["alcohol"], strength=0.5).apply(pipe):
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0, "values": "paper"}
    forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        '`values="official"`': {"values": "official"},
        "`trajectories=2`": {"trajectories": 2},
    }
    touches_uncond: ClassVar[bool] = False
    edits_attention: ClassVar[bool] = True
    edits_self_attention: ClassVar[bool] = computed(lambda self: self.trajectories == 2)
    calls_denoiser: ClassVar[bool] = computed(lambda self: self.measures or self.trajectories == 2)

    concepts: ConceptsField = Converted(())
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    values: Values = "paper"
    trajectories: int = 1
    adapter: Converted[str | Path | None, str | None] = Converted(None)
    rows: RowsField = Converted(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("values", self.values, get_args(Values))
        checks.choice("trajectories", self.trajectories, (1, 2))
        if self.adapter is not None:
            checks.path("adapter", self.adapter)
            object.__setattr__(self, "adapter", str(self.adapter))
            Adapter.load(self.adapter)

    @classmethod
    def paper(cls, concepts: Concepts, strength: float = 1.0, **fields: Any) -> GIE:
        """The paper's form in the published window, the first 80 % of the trajectory."""
        return cls(concepts, strength, window=(0.0, 0.8), **fields)

    @classmethod
    def official(cls, concepts: Concepts, strength: float = 1.0, **fields: Any) -> GIE:
        """The form of the public code: its values, two trajectories and window."""
        return cls(concepts, strength, window=(0.0, 0.8), values="official", trajectories=2, **fields)

    @classmethod
    def fit(
        cls,
        pipe: DiffusionPipeline,
        concepts: Concepts,
        prompts: Prompts,
        *,
        detector: Detectors,
        out: str | Path,
        **how: Any,
    ) -> GIE:
        """Trains an adapter on this pipeline, without labels, and returns GIE with it.

        Draws a ladder of fixed strengths for each prompt and tuning seed. A picture's loss is the detector's score plus
        `fidelity` times its loss of the base model's content. The adapter learns to predict a prompt's best strength
        from the features of its tokens. A held-out fifth of the prompts stops the training.

        Args:
            pipe: the pipeline. The adapter fits only its model.
            concepts: the concepts to erase, one at a time.
            prompts: at least 5 texts, some that draw the concept and some that the erasure should not change; or a
                mapping from concept names to texts.
            detector: an `efface.Detector` of the concept; or a mapping from concept names to detectors.
            out: the adapter's file. `<out>.ladder.json` stores the judgements batch by batch, so the same call
                continues after a kill, and a call with more `strengths` draws only these.
            how: the settings below, and further arguments of the pipeline, such as `num_inference_steps`.

        The settings are:

        - `strengths` (0.5 to 8): the ladder; 0, the base model's picture, is always part of it. The adapter's facts
        hold the mean loss of each.
        - `seeds`: the seeds of each prompt's pictures, all below 10,000.
        - `faithful` (`efface.pictures.likeness`): maps pictures and the base model's [N, 3, H, W] to [N] in [0, 1]; or
        a mapping from concept names to such functions.
        - `fidelity` (0.5): the cost of losing all content of the base model's picture, relative to the cost 1 of
        showing the concept.
        - `held_out` (0.2): the share of prompts that stops the training.
        - `batch` (16): pictures per pipeline call.
        - `patience` (200 epochs), `most_epochs` (5,000), `seed` (0): settings of the training.
        - `progress`: called with the task and the number of pictures since the last call.

        Returns:
            GIE with the adapter, for all concepts.

        Raises:
            ValueError: there are too few prompts, a setting is out of range, the seeds are not tuning seeds, or a
                concept lacks prompts, detector or `faithful`; `out` is a folder; the stored judgements are damaged or
                have other settings; run-time erasers are applied; the detector sees the concept in no picture of the
                base model.
            TypeError: `prompts` is not a sequence of texts, or a detector has no name.

        Example:
            >>> import tempfile
            >>> import efface
            >>> pipe, prompts = efface.load("emoji"), ["a cat", "a cat and a dog", "a dog", "a rocket", "a house"]
            >>> gie = efface.GIE.fit(pipe, "cat", prompts, detector=efface.detector("eyes", "cat"), seeds=[7],
            ...     out=tempfile.mkdtemp() + "/cat.safetensors", strengths=[1], most_epochs=5, num_inference_steps=8)
            >>> with gie.apply(pipe):
            ...     image = pipe("a cat", num_inference_steps=2).images[0]
        """
        from .fit import fit_adapter

        adapter = fit_adapter(cls, pipe, as_concepts(concepts), prompts, detector, Path(out), **how)
        return cls(concepts, adapter=adapter)

    def _needs(self) -> tuple[str, ...]:
        """Official values read the prompt's tokens in a longer text, so a prefix has to keep its states."""
        two = self.trajectories == 2
        more = {"causal_text": self.values == "official", "guidance_scale": two, "softmax_self": two}
        return ("cross_text", *(need for need, needed in more.items() if needed))

    needs: ClassVar[tuple[str, ...]] = computed(_needs, ("cross_text",))

    @property
    def measures(self) -> bool:
        """Whether the weights come from the first denoiser call."""
        return self.adapter is not None

    def weight(self, time: Tensor | float) -> Tensor | float:
        return 1.0 if self.trajectories == 2 else super().weight(time)  # which counts denoiser calls itself

    def apply(self, pipe: DiffusionPipeline) -> Handle:
        check(self, pipe)
        if self.trajectories == 2:
            check_trajectory(pipe)
        if self.adapter is not None:
            Adapter.load(self.adapter).check(text_hash(pipe, unedited(pipe)), layer_names(pipe))
        return super().apply(pipe)

    def prepared(
        self, pipe: DiffusionPipeline, erasure_prompts: Sequence[str], call: Encoding | None, memory: Memory
    ) -> Memory:
        key = (tuple(erasure_prompts), self.rows)
        if memory.get("measured of") != key:
            memory.pop("weights", None)
        memory["measured of"] = key
        if self.values == "official" and call is not None and call.prompts is not None:
            memory["joined"] = joined(pipe, call.prompts, erasure_prompts, **call.settings)
        return remembered(pipe, memory)

    def around(self, call: DenoiserCall, forward: Callable[[], Any]) -> Any:
        if call.pipe is None:  # the prompts are unknown, so each call counts as a first one
            for name in ("joined", "weights"):
                call.memory.pop(name, None)
        if self.measures and call.erasure_prompts() and len(call.prompt) and "weights" not in call.memory:
            call.memory["weights"] = measured(call, self.weigh)
        if self.trajectories == 2:
            plain = Trajectory.of(call)
            plain.step(call)
            start, end = (int(share * (plain.steps + 1)) for share in self.window)
            call.memory["inside"] = start <= plain.number < end
        return forward()

    def weigh(self, features: Tensor, layers: tuple[str, ...]) -> Tensor:
        """The weights [B, tokens] of an erasure prompt's own tokens, from the attention to them, [B, tokens, layers].

        `layers` are the names of the cross-attention layers in execution order.
        """
        adapter = Adapter.load(str(self.adapter))
        adapter.check(adapter.model, layers, ordered=True)
        return -adapter(features).clamp_min(0)

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        official, base = self.values == "official", cross
        if self.trajectories == 2:
            plain: Trajectory = cross.memory["trajectory"]
            if not cross.memory["inside"]:
                return out + afterwards(cross, prompts) if official else out
            base, shift = plain.cross(cross, prompts)
            out = out + shift
        key, value = keys_values(cross, [prompts.text], [prompts.text.states])
        if not self.measures:  # the same in all rows
            out = out + cross.attend_texts(key, prompts.weights(self.strength) * value, prompts.text.mask).sum(0)
        else:
            for n, columns in enumerate(prompts.token_columns):
                of_rows = cross.memory["weights"][prompts.which[n]]
                weights = value.new_zeros(len(out), 1, value.shape[2], 1)
                weights[:, 0, columns, 0] = (self.strength * prompts.on_rows(of_rows)).to(value)
                mask = None if prompts.text.mask is None else prompts.text.mask[n : n + 1]
                key_n = key[n : n + 1].expand(len(out), -1, -1, -1)
                out = out + cross.attend(key_n, weights * value[n : n + 1], mask)
        return out + swapped(base, prompts) if official else out

    def edit_self(self, out: Tensor, layer: SelfAttention, prompts: ErasurePrompts) -> Tensor:
        plain: Trajectory = layer.memory["trajectory"]
        if plain.number >= int(COPIED * plain.steps) or layer.query.shape[1] > QUERIES or layer.value is None:
            return out
        query, key = plain.maps(layer.name, prompts)
        return layer.attend(query, key, layer.value)
