"""AdaVD: projects the values that the prompt's tokens offer to attention away from the concept's value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..core import Concepts, ConceptsField, RowsField
from ..fields import Converted
from ..hooks import CrossAttention, ErasurePrompts, Method

__all__ = ["AdaVD"]

Tokens = Literal["last", "own"]


@dataclass(frozen=True)
class AdaVD(Method):
    """Adaptive Value Decomposer: keeps the part of each prompt token's value that is orthogonal to the concept's value.

    In each cross-attention layer, v [C] is the value of a prompt token, heads side by side, and c_k [C] the value of
    the last own token of the concept's k-th phrase. A = C^T (C C^T)^+ holds the dual vectors of the rows c_k of C:

        v' = v - strength sum_k f_k <A_k, v> c_k                        for all tokens but the start token
        f_k = 1                                                         without `shift`
        f_k = 2 sigmoid(slope (cos(v, c_k) - threshold))                with `shift` = (slope, threshold)

    For one phrase this is v - f (<v, c> / <c, c>) c. Without `shift` and with strength = 1, v' is orthogonal to every
    c_k, whatever their order.

    Paper: Y. Wang, O. Li, T. Mu, Y. Hao, K. Liu, X. Wang, X. He, 2025, "Precise, Fast, and Low-cost Concept Erasure in
    Value Space: Orthogonal Complement Matters", CVPR, arXiv 2412.06143. There are no equation numbers, because the
    source was a description of the authors' code.

    Differs: only conditional rows are edited. The authors' code compares and projects the unconditional and the
    conditional value together, so its published `shift`, (100, 0.93), belongs to another cosine and is not a preset.
    For several phrases the code orthogonalises one after the other, and from the third on its vectors are not
    orthogonal; here the phrases have no order. Texts without a start token (PixArt) have all tokens edited. All columns
    after the start are edited, padding too, as in the code. `tokens="own"` is Efface's, for text encoders that are not
    causal, in which no token holds the whole phrase. `strength` is Efface's; 1 is the paper's form. The values
    of the prompt do not depend on the step, but this implementation computes them in each step.

    Limits: AdaVD acts on the prompt's own tokens, so it misses prompts that only imply the concept in the picture's
    features. SDXL's pooled text is not edited. With many phrases the span grows and takes more from every token. This
    implementation has not been measured on a large model.

    Args:
        concepts: the concepts to erase: names of shipped concepts, `Concept` objects, or a sequence of them. Each
            phrase is one direction.
        strength: >= 0, the share of the projection; 1 is the paper's. 0 is the base model bitwise.
        shift: (slope, threshold) with slope > 0 and threshold in [-1, 1], which leaves tokens alone whose value has a
            lower cosine with the concept's, and takes up to twice the projection from others. None: f = 1.
        tokens: the tokens of a phrase whose values are the directions c_k. "last": its last own token, as in the paper.
            "own": each of its own tokens. None: "own" on `emoji` and `emoji-128`, "last"
            elsewhere.
        window: (start, end), the part of the trajectory in which it acts: 0 is pure noise, 1 the picture.
        rows: one list of concepts per prompt of the batch, instead of `concepts` for all.

    Shapes: values [B, L, C], C [K, C] for K directions. The denoiser gets no further rows; each layer computes
    attention once more.

    Raises:
        ValueError: a concept is unknown, a field is out of range, or there is no concept. On `apply`: the pipeline has
            no cross-attention, its projections are fused, or a phrase has no tokens or is over the encoder's limit. In
            a call: the numbers of `rows` and prompts differ.
        TypeError: the family of the pipeline is unknown, or `rows` or `concepts` are not lists of concepts.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.AdaVD("alcohol").apply(pipe):
        ...     image = pipe("a glass of wine", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    needs: ClassVar[tuple[str, ...]] = ("cross_text",)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"tokens": "own"},
        "emoji-128": {"tokens": "own"},  # with strength 1, as results/run_time_sweep.json chose
        "SD 1.x/2.x": {"tokens": "last"},  # the paper's
        "": {"tokens": "last"},
    }
    edits_attention: ClassVar[bool] = True
    packs: ClassVar[bool] = False
    references: ClassVar[tuple[tuple[str, ...], ...]] = ()

    concepts: ConceptsField = Converted(())
    strength: float = 1.0
    shift: tuple[float, float] | None = None
    tokens: Tokens | None = None
    window: tuple[float, float] = (0.0, 1.0)
    rows: RowsField = Converted(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("tokens", self.tokens, (*get_args(Tokens), None))
        if self.shift is None:
            return
        if not (isinstance(self.shift, Sequence) and len(self.shift) == 2):
            cure = "Give for example (100, 0.9), or None for the whole projection."
            raise ValueError(checks.refusal("`shift` to be two numbers (slope > 0, threshold)", self.shift, cure))
        slope = checks.number("shift[0]", self.shift[0], 0, above=True)
        object.__setattr__(self, "shift", (slope, checks.number("shift[1]", self.shift[1], -1, 1)))

    @classmethod
    def adaptive(cls, concepts: Concepts, **fields: Any) -> AdaVD:
        """Uses the paper's slope. The threshold 0.9 is Efface's and is not tuned."""
        return cls(concepts, **{"shift": (100.0, 0.9), **fields})

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        text = cross.prompt
        if text is None:
            raise RuntimeError("AdaVD edits the values of the prompt, but the layer has no prompt. Call the pipeline.")
        key, value = cross.keys_values(text.states)
        values, concept = (x.transpose(1, 2).flatten(2) for x in (value, cross.keys_values(prompts.text.states)[1]))
        starts = [columns.start if self.tokens == "own" else columns.stop - 1 for columns in prompts.token_columns]
        rows = [x[i : c.stop] for x, i, c in zip(concept, starts, prompts.token_columns, strict=True)]
        wide = torch.promote_types(values.dtype, torch.float32)
        first = min(columns.start for columns in prompts.token_columns)  # columns before it start every text
        taken = self.strength * component(values[:, first:].to(wide), torch.cat(rows).to(wide), self.shift)
        taken = F.pad(taken, (0, 0, first, 0)).to(value.dtype).unflatten(-1, (value.shape[1], -1)).transpose(1, 2)
        return out - cross.attend(key, taken, text.mask)


def component(values: Tensor, concept: Tensor, shift: tuple[float, float] | None) -> Tensor:
    """The part of values [..., C] along the rows of `concept` [K, C], each weighted by its f. See the class."""
    share = values @ torch.linalg.pinv(concept, rtol=1e-4)  # [..., K]; nearly equal phrases are one direction
    if shift is not None:
        slope, threshold = shift
        cosine = F.normalize(values, dim=-1) @ F.normalize(concept, dim=-1).T
        share = 2 * torch.sigmoid(slope * (cosine - threshold)) * share
    return share @ concept
