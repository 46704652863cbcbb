"""EIUP: attends to an erasure prompt, and removes the features that it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from .. import checks
from .._text import check_phrases
from ..core import Concept, Concepts, ConceptsField, Handle, RowsField
from ..families import family
from ..fields import Converted
from ..hooks import CrossAttention, Encoding, ErasurePrompts, Memory, Method, computed
from . import _anchors
from ._joint_forms import oblique, pooled_projected, pooled_texts, text_only
from ._keys import outputs, remembered
from ._terms import cleared, gated, projected, separate, swapped

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["EIUP"]

Normalization = Literal["projected", "swap", "text", "oblique", "separate", "gated"]
STRENGTHS = {"projected": 2.25, "swap": 2.25, "text": 2.25, "oblique": 2.0, "separate": 1.0, "gated": 1.0}
CALIBRATED = {"emoji": 2.25, "emoji-128": 1.0}  # projected and swap, from results/eiup_sweep, results/run_time_sweep
PROJECTED = ("projected", "swap", "text", "oblique")
NEEDS = {"text": ("joint_text",), "separate": ("cross_text",), "gated": ("cross_text",)}
THINGS = ("dog", "tree", "car", "cup", "house", "star", "book", "hat", "flower", "fish", "shoe", "chair")


@dataclass(frozen=True)
class EIUP(Method):
    """Erases concepts during drawing, without training or changes of weights.

    In each cross-attention layer, with `A(q, X)` the softmax of the image queries against the keys of text X, P the
    text that the row reads, E the erasure prompt (the concept's phrases), N the empty text, w = -strength:

        separate (E1):   O = A(q, P) V_P + sum_{k in C} w A(q, E)_k V_E,k  C: E's own tokens
        gated (E1g):     O = A(q, P) V_P + g softmax_C(q K_E) w V_E,C      g = sigmoid(LSE_C(q K_E) - LSE(q K_P))
        projected:       t = A(q, T) V_T - A(q, N) V_N          what a neutral text T adds, for each T
                         d = A(q, E) V_E - A(q, N) V_N          what the concept adds, less its component along the t
                         a = max(0, <O - A(q, N) V_N, d> / <d, d>)          how much of it the row's text adds
                         O = O - strength a d                               per query, over heads and channels
        swap:            c = |what `projected` removes at strength 1| / |O - A(q, N) V_N|           per query
                         g = min(1, strength) clamp(5 (c - threshold), 0, 1)
                         O = O' + g (A(q, R) V_R - O')          O': the projected output, R: the phrase's anchor

    In joint attention (SD 3, FLUX, CogView4), these two forms take other outputs, with I the picture's columns:

        A(q, X) V_X becomes A(q, [X, I]) V_[X, I], for X = P, N, T, E, R, where q are the picture's queries

    The denoiser carries N, T, E and R beside the prompt. Each attends to itself and to the picture, and passes the
    blocks as the prompt does. Prompt and picture do not attend to them, and only the picture's O changes.

    Two more forms are for joint attention (`oblique` works elsewhere too), with m the prompt's share in the softmax of
    a query and head, and p, N, T, E read from the text's own columns alone, without the picture's:

        text:            O = O + m (p' - p)                     p': p in the projected form
        oblique:         c = least squares of the t and d_E in O - A(q, N) V_N, within [0, 1], d_E = A(q, E) V_E -
                         A(q, N) V_N, with a ridge of 0.05;  O = O - strength sum_E c_E (d_E - mean t)

    All four edit unconditional rows with a negative prompt differently, and without R. P_d projects onto the span of
    the d of all phrases: O = O - min(strength, 1) P_d (O - A(q, N) V_N).

    Paper: D. Chen, Z. Li, M. Fan, C. Chen, W. Zhou, Y. Li, 2024, "EIUP: A Training-Free Approach to Erase Non-Compliant
    Concepts Conditioned on Implicit Unsafe Prompts", arXiv 2408.01014 v1. Only the abstract of v1 was available, so
    there are no equation numbers. `separate` is the best-supported reconstruction. It follows the public code of the
    paper's second version (GIE, ICLR 2025), which takes a softmax over the erasure prompt alone, weights the concept's
    columns, and adds the result to the prompt's output. A figure of that version shows negative weights. The weights
    and the window of v1 are unknown; `EIUP.reconstruction()` uses the window of that code.

    Differs: `projected`, the default, is Efface's and not in the paper. With text encoders that have no start token to
    absorb attention, E1 pushes every prompt away from the concept. The projection changes only outputs that point
    towards it. N is the text of the pipeline's unconditional rows without a negative prompt (SDXL base: zeros), or the
    encoded "" without guidance. The user's negative prompt never affects the edit of the conditional rows. T are mean
    states of neutral texts. Removing what all things share would damage other pictures. A text that equals N is not
    edited. `swap` is also Efface's: where most of what the prompt adds is the concept, the layer puts out what an
    anchor would, so the picture shows the anchor instead of a blot. With anchors of several phrases, a query reads the
    one of the phrases of which it has most. `gated` is also Efface's. All columns of the prompt stay, whereas GIE's
    code drops one padding column per concept token; so zero strength equals the base model bitwise. There is one
    trajectory, not two. Outside the window there is no edit. Joint attention is not in the paper. There, each encoder's
    padding of N, T and E becomes one column, its mean, which counts in the softmax as often as the padding has columns.

    Negative prompts: guidance pushes away from the unconditional rows. If these contained the concept, guidance would
    damage pictures of other things. If they contained less of it than the empty text, guidance would push towards the
    concept. The projected and swap forms therefore leave in them as much of the concept as the empty text has. They
    treat the further rows of `NegativePrompt` with a strength in the same way. With an empty negative prompt they edit
    no unconditional row, at no cost. A negative prompt that names the anchor works against the swap. `separate` and
    `gated` never edit unconditional rows. With them, a negative prompt that names the concept increases the removal.

    The pooled text embeddings of SDXL, SD 3 and FLUX bypass attention and are edited only with `pooled`. On PixArt,
    whose T5 has no start token, text is projected and its padding masked as in the pipeline.

    Args:
        concepts: the concepts to erase: names of shipped concepts, `Concept` objects, or a sequence of them. Projected
            and swap: at most 256 phrases in a row; each phrase is an erasure prompt with its direction, and directions
            are removed one after the other (joined phrases would dilute each other). Separate and gated: phrases are
            packed into as few prompts as fit the encoder.
        strength: >= 0. Projected and swap: the removed share of the concept's component; 1 removes all of it. Values
            above 1 push the other way. Guidance amplifies that, so large values damage pictures. Separate and gated:
            the weight -w of each concept token; with CLIP, values above 1 are usual. Guidance amplifies the edit: a
            strength for guidance 7.5 is weak without guidance. 0 is the base model. None: for projected and swap 1 on
            `emoji-128`, which `results/run_time_sweep.json` chose, and 2.25 elsewhere, the smallest that meets the
            targets of the projected one on `emoji` in `results/eiup_sweep.json`. For "text" 2.25, for "oblique" 2, for
            the others 1. Not calibrated for other models, nor for other forms.
        window: (start, end), the part of the trajectory with the edit, as fractions: 0 is pure noise, 1 the picture.
        normalization: "projected", "swap", "text", "oblique", "separate" or "gated". "text" needs joint attention, the
            last two cross-attention. "text" and "oblique" are not calibrated on any model.
        neutral: groups of neutral texts, which name ordinary things. The mean of each group is a T. Projected and swap
            only; () means none.
        anchors: swap only: texts for concepts without an own `Concept.anchor`. Each phrase takes the one that is
            nearest in the text encoder and means none of the phrases (cosine <= 0.65). (): the shipped anchor of the
            concept, else "a red apple", "a stack of books" or "a wrapped gift".
        threshold: swap only: from 0 to 1, the share c from which on the anchor is read; from 0.2 above, it is read
            alone. Default: 0.65, chosen on `emoji`. Lower values replace more, also of other things in the picture.
        pooled: >= 0: the strength of the projected form on the pooled text of conditional rows, within `window` (SDXL,
            SD 3/3.5, FLUX.1). 0 does not change it. Not calibrated.
        rows: one list of concepts per prompt of the batch, instead of `concepts` for all.

    Shapes: queries and outputs [B, Q, C], text [N, L, D]; Q counts the picture's columns. Only the projected and swap
    forms edit unconditional rows, and only if they have a negative prompt; this doubles the cost of the edit.

    Raises:
        ValueError: a concept or `normalization` is unknown, `strength` is negative, `window` is outside [0, 1], a group
            of neutral texts is empty, there is no concept, an anchor is erased in the same row, or a row has over 256
            phrases. On `apply`: the pipeline lacks the attention layers that the form needs, or has fused
            cross-attention projections, or a phrase or anchor has no tokens or is over the encoder's limit. In a call:
            the numbers of `rows` and prompts differ.
        TypeError: the family of the pipeline is unknown, or `rows` or `concepts` are not lists of concepts.
        RuntimeError: in a call, the attention of a joint layer cannot be seen, as with other attention backends than
            diffusers' "native".

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.EIUP(["alcohol"]).apply(pipe):
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    needs: ClassVar[tuple[str, ...]] = computed(
        lambda self: NEEDS.get(self.normalization, ("cross_text|joint_text",)), ("cross_text|joint_text",)
    )
    forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f'`normalization="{form}"`': {"normalization": form} for form in NEEDS
    }
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = computed(lambda self: self._defaults)
    edits_attention: ClassVar[bool] = True
    added: ClassVar[tuple[str, ...]] = ("anchors", "threshold", "pooled")
    touches_uncond: ClassVar[bool] = computed(lambda self: self.normalization in PROJECTED)
    packs: ClassVar[bool] = computed(lambda self: self.normalization not in PROJECTED)
    uses_anchors: ClassVar[bool] = computed(lambda self: self.normalization == "swap")
    references: ClassVar[tuple[tuple[str, ...], ...]] = computed(
        lambda self: (("",), *self.neutral, *self._anchored) if self.normalization in PROJECTED else Method.references
    )

    concepts: ConceptsField = Converted(())
    strength: float | None = None
    window: tuple[float, float] = (0.0, 1.0)
    normalization: Normalization = "projected"
    neutral: tuple[tuple[str, ...], ...] = (tuple(f"a {thing}" for thing in THINGS),)
    anchors: tuple[str, ...] = ()
    threshold: float = 0.65
    pooled: float = 0.0
    rows: RowsField = Converted(None)

    def __post_init__(self) -> None:
        checks.choice("normalization", self.normalization, get_args(Normalization))
        super().__post_init__()
        groups = self.neutral if isinstance(self.neutral, (tuple, list)) else ("",)
        if not all(isinstance(g, (tuple, list)) and g and all(isinstance(t, str) for t in g) for g in groups):
            cure = "Write for example (('a dog', 'a tree'),)."
            raise ValueError(checks.refusal("`neutral` to be groups of texts", self.neutral, cure))
        object.__setattr__(self, "neutral", tuple(tuple(group) for group in groups))
        object.__setattr__(self, "anchors", checks.texts("anchors", self.anchors))
        object.__setattr__(self, "threshold", checks.share("threshold", self.threshold))
        object.__setattr__(self, "pooled", checks.number("pooled", self.pooled, 0))
        if self.normalization in PROJECTED:
            for concepts in self._sets:
                _anchors.check_size(concepts)
        if self.normalization == "swap":
            _anchors.candidates(self._sets, self.anchors)  # refuses those that cannot be

    @classmethod
    def reconstruction(cls, concepts: Concepts, strength: float = 1.0) -> EIUP:
        """E1, the form that the paper's abstract suggests, in the published window (the first 80 %)."""
        return cls(concepts, strength=strength, window=(0.0, 0.8), normalization="separate")

    @property
    def _defaults(self) -> dict[str, dict[str, float]]:
        """The strength by model."""
        known = CALIBRATED if self.normalization in ("projected", "swap") else {}
        return {"": {"strength": STRENGTHS[self.normalization]}} | {name: {"strength": s} for name, s in known.items()}

    @property
    def _strength(self) -> float:
        if self.strength is None:
            raise ValueError(
                "Expected `strength` of EIUP to be a number, got None, which a pipeline's model decides. Apply EIUP to "
                "a pipeline, or give `strength`."
            )
        return self.strength

    @property
    def _sets(self) -> list[tuple[Concept, ...]]:
        """The concepts that are erased together: of each row."""
        return [self.concepts] if self.rows is None else list(dict.fromkeys(self.rows))

    @property
    def _anchored(self) -> tuple[tuple[str, ...], ...]:
        """All anchors that phrases may get, as neutral texts."""
        if self.normalization != "swap":
            return ()
        return tuple((anchor,) for anchor in _anchors.all_of(_anchors.candidates(self._sets, self.anchors)))

    def check(self, pipe: DiffusionPipeline) -> None:
        super().check(pipe)
        check_phrases(pipe, [anchor for (anchor,) in self._anchored])
        if self.pooled and not (facts := family(pipe)).pooled:
            raise ValueError(
                f"Expected a family with a pooled text for `pooled`, got {facts.name}, which has none. Leave `pooled` "
                "out."
            )

    def apply(self, pipe: DiffusionPipeline) -> Handle:
        with ExitStack() as applied:
            handle = applied.enter_context(super().apply(pipe))
            if self.normalization == "swap":
                _anchors.warn(pipe, self._sets, self.anchors)
            applied.pop_all()
        return handle

    def prepared(
        self, pipe: DiffusionPipeline, erasure_prompts: Sequence[str], call: Encoding | None, memory: Memory
    ) -> Memory | None:
        settings, kept = call.settings if call else {}, remembered(pipe, memory)
        if self.normalization == "swap":
            kept["anchor_of"] = _anchors.chosen(pipe, self._sets, self.anchors, settings)
        if self.pooled:
            kept["pooled"] = pooled_texts(pipe, self._sets, self.neutral, settings)
        return kept

    def reread(self, text: Tensor, pooled: Tensor | None, time: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        if not self.pooled or pooled is None:
            return text, pooled
        rows = [self.concepts] if self.rows is None else self.rows
        parts = pooled.chunk(len(rows))
        found = [
            pooled_projected(part, memory["pooled"][some], len(self.neutral), self.pooled) if some else part
            for part, some in zip(parts, rows, strict=True)
        ]
        return text, torch.lerp(pooled, torch.cat(found), torch.as_tensor(self.weight(time)).to(pooled))

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        if self.normalization == "text":
            added = text_only(out, cross, prompts.text, len(self.neutral), self._strength)
        elif self.normalization in PROJECTED:
            parts = [self._change(out[:, part], texts, cross, prompts) for part, texts in outputs(cross, prompts.text)]
            added = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        else:
            added = (separate if self.normalization == "separate" else gated)(cross, prompts, self._strength)
        return (out + added).to(out.dtype)

    def _change(self, out: Tensor, would_be: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        """What `projected`, `swap` and `oblique` add to the outputs of some queries."""
        given = out, would_be, len(self.neutral), len(prompts.text), self._strength
        if cross.unconditional:
            return cleared(*given)
        if self.normalization == "oblique":
            return oblique(out, would_be, len(self.neutral), self._strength)
        if self.normalization == "swap":
            return swapped(*given, self.threshold, cross.memory["anchor_of"][prompts.which])
        return projected(*given)
