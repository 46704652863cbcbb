"""UCE: changes the projections that read the text, in closed form, so that a concept reads as its anchor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from .. import checks
from .._weights import keys_values, learning, text_inputs
from ..core import Concept, Concepts, as_concepts, config
from ..delta import Change, Delta
from ..families import check, family
from ..fields import computed
from ._closed_form import (
    Texts,
    Tokens,
    anchors_of,
    changes,
    condition,
    kept_texts,
    layered,
    residual,
    step,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["UCE"]

Mode = Literal["erase", "moderate", "debias"]
Shift = Literal["token", "layer"]
Weights = Literal["layers", "input"]


@dataclass(frozen=True)
class UCE:
    """Changes the keys and values of every cross-attention layer so that a concept's tokens read as its anchor's.

    With W [C, D] one of the projections, c, g, p [D] tokens of the concept, its anchor, and texts to preserve:

        W* = argmin  a sum ||W* c - W g||^2 + b sum ||W* p - W p||^2 + lam ||W* - W||^2  =  W T
        T  = I + a (G - C)^T C K^-1         K = a C^T C + b P^T P + lam I         C, G [N, D], P [M, D]

    T is the same for all layers: one Cholesky factorisation in float64 for the model, and for each layer the exact
    factors B = a W (G - C)^T, A = C K^-1, of rank <= N. The edited model reads c as the base model reads T c.

    Debiasing keeps the concept and shifts it towards attributes a_j, each by s_j. In the code of 2025 ("token") c reads
    as c + sum s_j a_j. In the paper's code of 2023 ("layer") the unit of a shift is the size of the concept in each
    layer:

        W* c = W c + sum_j s_j (||W C^T|| / ||W A_j^T||) W a_j         C, A_j [N, D]: all tokens of the phrase

    In joint attention, one layer reads the encoded text, before all blocks. What later layers read of it depends on the
    time and on the picture, so a closed form has no meaning there. `weights="input"` edits that first layer:

        W* c + bias = W T c + bias         W: the linear layer of the text before all blocks (`context_embedder`)
        W* p + bias = W T_p p + bias       W: that of the pooled text p (SD 3, FLUX.1), with a T_p of the pooled vectors

    So the edited model reads each text as the base model reads T c and T_p p, in all layers.

    Paper: R. Gandikota, H. Orgad, Y. Belinkov, J. Materzynska, D. Bau, 2024, "Unified Concept Editing in Diffusion
    Models", WACV, arXiv 2308.14761. There are no equation numbers, because the formulas follow a summary and the public
    code.

    Differs: `lam`, which makes K invertible, is not in the paper's objective but always in the code. The shared T, in
    float64 by Cholesky, is Efface's; the code solves each layer with an explicit inverse in float32. The code's
    `tensor` target is omitted. `tokens="all"` is Efface's, for text encoders that are not causal. The empty text is
    preserved, as in the code of 2023; its 1,734 artists are not, unless you give them. SDXL's pooled text is not
    edited, so part of the concept remains. The authors' code of 2025 for FLUX edits the same two layers as
    `weights="input"`, but adds the bias twice; the edit here leaves it alone. It was measured on no model. Debiasing
    needs your function for measuring the shares; the script of 2023 has CLIP, five templates per profession, and a list
    of professions to preserve. A loaded LoRA stays unchanged: only the base weights are edited.

    Args:
        mode: "erase" maps concepts onto their `anchor`. "moderate" maps them onto the empty text, for any anchor.
            "debias" shifts them towards `attributes`, see `balance`.
        tokens: the edited tokens of a text. "last": its last own token (the code of 2025). "tail": from there to the
            end of the padding (the paper's code of 2023). "all": every position. None: "tail" for causal text encoders,
            "all" for others. Preserved texts use the last token for "last", otherwise all positions.
        preserve: texts to preserve, in addition to each concept's `keep`.
        attributes: for debias: pairs (text, shift). The concept shifts towards these texts; `balance` finds the shifts.
        shift: for debias: the unit of a shift, "token" or "layer", see above.
        erase_scale: a > 0; 1 in the paper.
        preserve_scale: b >= 0; None: max(0.1, 1 / number of preserved texts), as in the code of 2023.
        lam: > 0, on the scale of a token's squared norm; 0.5 in the code.
        weights: "layers": keys and values of cross-attention. "input": the linear layers that read the encoded text and
            the pooled text before all others, on SD 3/3.5, FLUX.1, FLUX.2 and Chroma; not for "debias".

    Shapes: W [C, D]; tokens [N, D], one row per edited position of each phrase.

    Raises:
        ValueError: an option is out of range, there is no concept, or a phrase equals its anchor or a preserved text.
            On `fit`: a phrase is over the encoder's limit, or the projections are fused or quantised.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> delta = efface.UCE().fit(pipe, efface.Concept("cat", anchor="dog"))
        >>> with delta.apply(pipe):
        ...     image = pipe("a cat", num_inference_steps=2).images[0]
        >>> delta.method
        'uce'
    """

    needs: ClassVar[tuple[str, ...]] = computed(
        lambda self: ("text_weights",) if self.weights == "layers" else ("text_inputs",), ("text_weights",)
    )
    forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {'`weights="input"`': {"weights": "input"}}
    added: ClassVar[tuple[str, ...]] = ("weights",)

    mode: Mode = "erase"
    tokens: Tokens | None = None
    preserve: tuple[str, ...] = ("",)
    attributes: tuple[tuple[str, float], ...] = ()
    shift: Shift = "token"
    erase_scale: float = 1.0
    preserve_scale: float | None = None
    lam: float = 0.5
    weights: Weights = "layers"

    def __post_init__(self) -> None:
        for name, known in (("mode", Mode), ("shift", Shift), ("weights", Weights)):
            checks.choice(name, getattr(self, name), get_args(known))
        checks.each(self, checks.choice, "tokens", choices=get_args(Tokens))
        checks.each(self, checks.texts, "preserve")
        pairs = self.attributes.items() if isinstance(self.attributes, Mapping) else self.attributes
        object.__setattr__(self, "attributes", tuple((str(text), float(shift)) for text, shift in pairs))
        checks.each(self, checks.number, "erase_scale", "lam", least=0, above=True)
        checks.each(self, checks.number, "preserve_scale", least=0)
        if (self.mode == "debias") != bool(self.attributes):
            raise ValueError(
                f"Expected `attributes` with mode 'debias' and with no other, got mode {self.mode!r} and "
                f"{checks.shown(self.attributes)}. Give for example (('a woman', 0.2), ('a man', -0.2))."
            )
        if self.weights == "input" and self.mode == "debias":
            cure = "Debias a model with cross-attention."
            raise ValueError(checks.refusal("mode 'erase' or 'moderate' with `weights=\"input\"`", self.mode, cure))

    @classmethod
    def code_2025(cls) -> UCE:
        """The settings of the published code of 2025: only the last token, and nothing preserved unless given."""
        return cls(tokens="last", preserve=(), preserve_scale=1.0)

    @classmethod
    def debias_2023(cls, attributes: Sequence[str]) -> UCE:
        """The settings of the paper's debiasing code of 2023. `balance` then finds the shifts.

        Args:
            attributes: texts such as "male" and "female", whose shares `balance` equalises.
        """
        pairs = tuple((text, 0.0) for text in checks.texts("attributes", attributes))
        return cls(mode="debias", shift="layer", tokens="tail", attributes=pairs, preserve_scale=0.1)

    @learning()
    def fit(self, pipe: DiffusionPipeline, concepts: Concepts, *, seed: int = 0) -> Delta:
        """Returns the delta that edits `concepts`. Only reads `pipe`. Nothing is random; `seed` goes into the
        record."""
        wanted = as_concepts(concepts)
        if self.shift == "layer" and self.attributes:
            phrases, gram, info = self._prepared(pipe, wanted)
            shifts = [shift for _, shift in self.attributes]
            made = layered(keys_values(pipe), phrases, shifts, gram, self.erase_scale, self.lam)
        else:
            left, right, info = self.transform(pipe, wanted)
            made = changes(self._read(pipe), left, right)
        if self.weights == "input":
            pooled, info["pooled residual"] = self._pooled(pipe, wanted)
            made |= pooled
        return Delta.fitted(self, pipe, made, wanted, seed=seed, info=info)

    def transform(self, pipe: DiffusionPipeline, concepts: Sequence[Concept]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """T - I as factors [D, N] and [N, D] in float64, and facts about them."""
        phrases, gram, info = self._prepared(pipe, concepts)
        concept = torch.cat([rows for rows, _ in phrases])
        if self.attributes:
            shifts = [shift for _, shift in self.attributes]
            towards = (sum(s * toward for s, toward in zip(shifts, some, strict=True)) for _, some in phrases)
            anchor = concept + torch.cat([torch.as_tensor(toward) for toward in towards])
        else:
            anchor = torch.cat([toward for _, (toward,) in phrases])
        left, right, rest = self._solved(concept, anchor, gram)
        return left, right, info | {"residual": rest}

    def _solved(self, concept: Tensor, anchor: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, float]:
        """T - I as factors, and what is left of the difference between concept and anchor."""
        left, right = step(concept, anchor, gram, self.erase_scale, self.lam)
        rest = residual(left, right, concept, anchor)
        if rest > 0.5:
            alone = residual(*step(concept, anchor, 0 * gram, self.erase_scale, self.lam), concept, anchor)
            cure = "fewer preserved texts or a smaller `preserve_scale`" if alone < rest / 2 else "a smaller `lam`"
            checks.warn(
                f"The edit is {1 - rest:.0%} complete, and would be {1 - alone:.0%} complete if nothing were "
                f"preserved. Give {cure}."
            )
        return left, right, rest

    def _pooled(self, pipe: DiffusionPipeline, concepts: Sequence[Concept]) -> tuple[dict[str, Change], float | None]:
        """The changes of the layer that reads the pooled text, and the residual there; none without such a layer."""
        if not (read := text_inputs(pipe, pooled=True)):
            return {}, None
        anchors, kept, texts = self._texts(pipe, concepts)
        held = texts.pooled(kept) if kept else texts.pooled(anchors)[:0]
        gram = self._scale(kept) * held.T @ held
        left, right, rest = self._solved(texts.pooled(anchors), texts.pooled(anchors.values()), gram)
        return changes(read, left, right), rest

    def _read(self, pipe: DiffusionPipeline) -> dict[str, Tensor]:
        """The edited weights, which read the encoded text."""
        return keys_values(pipe) if self.weights == "layers" else text_inputs(pipe)

    def _scale(self, kept: Sequence[str]) -> float:
        return max(0.1, 1 / max(len(kept), 1)) if self.preserve_scale is None else self.preserve_scale

    def _texts(
        self, pipe: DiffusionPipeline, concepts: Sequence[Concept]
    ) -> tuple[dict[str, str], tuple[str, ...], Texts]:
        """Phrases to their anchors, the preserved texts, and all of these encoded."""
        anchors = anchors_of(concepts, "" if self.mode == "moderate" else None)
        kept = kept_texts(self.preserve, concepts, anchors)
        found = [*anchors, *anchors.values(), *kept, *(text for text, _ in self.attributes)]
        return anchors, kept, Texts(pipe, found, self._read(pipe))

    def _prepared(
        self, pipe: DiffusionPipeline, concepts: Sequence[Concept]
    ) -> tuple[list[tuple[Tensor, list[Tensor]]], Tensor, dict[str, Any]]:
        """Each phrase's rows with those of its target, b P^T P [D, D], and facts."""
        check(self, pipe)
        facts = family(pipe)
        tokens = self.tokens or ("tail" if facts.causal else "all")
        if tokens != "all" and len(facts.texts) > 1:
            raise ValueError(
                checks.refusal(
                    f"tokens 'all' on {facts.name}, whose text has the columns of {len(facts.texts)} encoders",
                    tokens,
                    "Leave `tokens` out.",
                )
            )
        anchors, kept, texts = self._texts(pipe, concepts)
        aims = [text for text, _ in self.attributes]
        phrases = [texts.aligned(phrase, aims or (anchor,), tokens) for phrase, anchor in anchors.items()]
        concept = torch.cat([rows for rows, _ in phrases])
        gram = self._scale(kept) * texts.gram(kept, last=tokens == "last")
        info = {"tokens": tokens, "edited rows": len(concept), "preserved texts": len(kept)}
        return phrases, gram, info | {"condition": condition(concept, gram, self.erase_scale, self.lam)}

    def balance(
        self,
        pipe: DiffusionPipeline,
        concept: Concepts,
        measure: Callable[[DiffusionPipeline], Sequence[float]],
        *,
        wanted: Sequence[float] | None = None,
        rounds: int = 30,
        tolerance: float = 0.05,
        step: float | None = None,
        seed: int = 0,
    ) -> Delta:
        """Debiases in rounds: draws and measures with the edit, shifts by the missing shares, and edits again.

        With `shift="token"` a round adds to the shifts and edits the original weights, as in the code of 2025. With
        "layer" it edits the weights of the round before, as in that of 2023. `info` has the shares of every round.

        Args:
            pipe: the pipeline, which stays unchanged.
            concept: one concept. Other concepts need different shifts.
            measure: returns the share of each attribute in the current pictures of `pipe`, in the order of
                `attributes`.
            wanted: the target shares. None: equal shares.
            rounds: the largest number of rounds (30 in both codes).
            tolerance: the distance of every share from its target that ends the rounds (0.05 in both codes).
            step: the factor from missing share to shift. None: 1 for "token", 0.1 for "layer", as in the codes.
            seed: for the record.

        Raises:
            ValueError: the mode is not "debias", the numbers of shares and attributes differ, or as `fit`.
        """
        if self.mode != "debias":
            raise ValueError(f"Expected mode 'debias' to balance, got {self.mode!r}. Give it, with `attributes`.")
        texts, compounds = [text for text, _ in self.attributes], self.shift == "layer"
        aim = [1 / len(texts)] * len(texts) if wanted is None else list(wanted)
        by = step if step is not None else 0.1 if compounds else 1.0

        def edit(shifts: Sequence[float]) -> Delta:
            return replace(self, attributes=tuple(zip(texts, shifts, strict=True))).fit(pipe, concept, seed=seed)

        shifts, history = [shift for _, shift in self.attributes], []
        delta = more = edit(shifts)
        for k in range(max(rounds, 1)):
            with delta.apply(pipe):
                history.append([float(share) for share in measure(pipe)])
                if not len(history[-1]) == len(aim) == len(texts):
                    raise ValueError(
                        f"Expected a share for each of {len(texts)} attributes, got {len(history[-1])} measured and "
                        f"{len(aim)} wanted. Give one for each, in the order of `attributes`."
                    )
                gaps = [want - share for want, share in zip(aim, history[-1], strict=True)]
                if max(map(abs, gaps)) < tolerance or k == rounds - 1:
                    break
                shifts = [shift + by * gap for shift, gap in zip(shifts, gaps, strict=True)]
                if compounds:
                    more = edit([by * gap for gap in gaps])
            delta = delta + more if compounds else edit(shifts)
        editor = replace(self, attributes=tuple(zip(texts, shifts, strict=True)))
        fields = {name: value for name, value in config(editor).items() if name != "method"}
        info = {**more.info, "shares": history}
        return replace(delta, method=more.method, fields=fields, seed=seed, info=info)
