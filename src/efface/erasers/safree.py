"""SAFREE: projects the prompt tokens that lead to the concept away from the concept's subspace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import BoundArguments
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from .._masking import encode_masked
from .._text import Encoded, encode, encoding_settings, own_tokens, places, read, readers
from ..core import Concept, Concepts, ConceptsField, RowsField
from ..families import family
from ..fields import Converted
from ..hooks import Memory, Method

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["SAFREE"]

Form = Literal["encoders", "pooled"]
STEPS, LONGEST = 50, 10  # in the paper's runs the filter acts in up to 11 of 50 steps


@dataclass(frozen=True)
class SAFREE(Method):
    """Finds the prompt tokens that bring it near the concept, and removes the concept's component from them.

    Let pool(X) be one vector for a text, P_C the projector on the span of pool(phrase) over the concept's phrases, p_i
    the prompt's state at token i, q_i = pool(prompt with token i masked) for its n tokens, P_I the projector on their
    span:

        d_i = |(I - P_C) q_i|;  i is a trigger where d_i >= (1 + alpha) mean_{j != i} d_j
        p_i = p_i + strength ((I - P_C) P_I p_i - p_i)                  for triggers; no other state is changed
        beta = 1 - mean_j cos(p_j, (I - P_C) P_I p_j)                   over the prompt's, start and end tokens
        t' = round(10 sigmoid(2 k (10 beta - t0)))                      the self-validating filter: t' of 50 steps

    Paper: J. Yoon, S. Yu, V. Patil, H. Yao, M. Bansal, 2024, "SAFREE: Training-Free and Adaptive Guard for Safe
    Text-to-Image and Video Generation", ICLR 2025, arXiv 2410.12761. There are no equation numbers, because the source
    was a description of the method and of the order of operations in the authors' code.

    Differs: by default the filter is off, and all steps edit the triggers; `SAFREE.paper()` has the filter. The paper
    chose k and t0 for the text encoder of SD 1.4; on `emoji` they do not remove the concept. Latent re-attention, the
    paper's third part, is omitted (it never runs in the authors' released script). The published runs also use the
    phrases as negative prompt: stack `NegativePrompt` for that. Steps are fractions of the call's steps. With t' > 0
    the filter acts until (t' + 1) / 50, which corresponds to the paper's steps 0 to t'. With t' = 0 it does not edit
    the prompt, whereas the authors' code edits the first step. Schedulers that call the denoiser twice per step (PNDM,
    Heun, DPM2) do not shorten it. A prompt of one token is a trigger if d_1 >= (1 + alpha) |(I - P_C) pool(prompt)|; in
    the authors' code it always is. pool is the state at CLIP's end token, as the denoiser sees it. For encoders that
    are not causal (`emoji`; T5 in PixArt, SD 3 and FLUX) it is the mean over tokens. The tokenizer's mask token masks a
    token, or "!" if there is none (CLIP, T5), as in the authors' code. SDXL, SD 3: each encoder has separate triggers,
    spans, states and columns, and beta is the mean of all. The encoder's share of the pooled text comes from the prompt
    with masked triggers (SDXL: only the second encoder's). `SAFREE.official_sdxl()` follows the authors' SDXL code. It
    edits only the second encoder's columns, in all steps, by subspaces of projected pooled texts, although the states
    are not projected. The pooled text and the first encoder's columns stay. FLUX reads only the pooled text of CLIP, so
    its triggers come from pooled texts; beta is T5's. SD 3 and FLUX read the padding after a text, CogView4 the padding
    before it; neither is edited. CogView4 has no end token; the last token replaces it. ControlNet reads the unedited
    prompt. Projectors come from an SVD.

    Limits: SAFREE reads words, so it misses prompts that only imply the concept. Some token is always above the mean,
    so harmless prompts also have triggers. The filter exists to leave them unchanged.

    Args:
        concepts: the concepts to erase: names of shipped concepts, `Concept` objects, or a sequence of them. Each
            phrase is one direction of the subspace.
        strength: >= 0, the share of the way to the projected state; 1 is the paper's. 0 is the base model.
        alpha: > -1, the relative margin above the mean that makes a trigger; the paper has 0.01.
        validation: (k, t0) of the filter, or None for no filter; the paper has (2.5, 5.333) for nudity.
        rows: one list of concepts per prompt of the batch, instead of `concepts` for all. If set on the handle, `rows`
            act from the next pipeline call on, `strength` from the next denoiser call on.
        form: "encoders" edits every encoder's columns, by subspaces of its states. "pooled" is the authors' form for
            SDXL, for pipelines with an encoder whose pooled text is as wide as its states.

    Shapes: states [B, L, D]. It costs one pass of the text encoder per token and phrase, and nothing per step. It acts
    in pipeline calls (or after `encode_prompt`), not in direct denoiser calls.

    Raises:
        ValueError: a concept is unknown, a field is out of range, or there is no concept. On `apply`: the text encoder
            belongs to another model; a phrase has no tokens, is over the encoder's limit, or has characters that a
            tokenizer does not know; or form "pooled" has no fitting encoder. During a call: the numbers of `rows` and
            prompts differ, or the call has `prompt_embeds` or a different `prompt_2` or `prompt_3`.
        TypeError: the family of the pipeline is unknown, or `rows` or `concepts` are not lists of concepts.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.SAFREE("alcohol").apply(pipe):
        ...     image = pipe("a glass of wine", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"SD 1.x/2.x": {}}  # the paper's settings
    touches_uncond: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = True

    concepts: ConceptsField = Converted(())
    strength: float = 1.0
    alpha: float = 0.01
    validation: tuple[float, float] | None = None
    rows: RowsField = Converted(None)
    form: Form = "encoders"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("alpha", self.alpha, -1, above=True)
        if self.validation is not None:
            pair = isinstance(self.validation, (tuple, list)) and len(self.validation) == 2
            if not pair:
                cure = "Give the paper's (2.5, 5.333), or None for no filter."
                raise ValueError(checks.refusal("`validation` to be two numbers (k > 0, t0)", self.validation, cure))
            k, t0 = self.validation
            checks.number("validation[0]", k, 0, above=True)
            object.__setattr__(self, "validation", (float(k), checks.number("validation[1]", t0)))
        checks.choice("form", self.form, get_args(Form))

    @classmethod
    def paper(cls, concepts: Concepts, **fields: Any) -> SAFREE:
        """Uses the paper's filter for nudity, which acts in at most the first 11 of 50 steps."""
        return cls(concepts, **{"validation": (2.5, 5.333), **fields})

    @classmethod
    def artist(cls, concepts: Concepts, **fields: Any) -> SAFREE:
        """Uses the paper's filter for artists, which is sharper and edits fewer prompts."""
        return cls(concepts, **{"validation": (3.5, 5.5), **fields})

    @classmethod
    def official_sdxl(cls, concepts: Concepts, **fields: Any) -> SAFREE:
        """Follows the authors' code for SDXL, which uses pooled texts and no filter."""
        return cls(concepts, **{"form": "pooled", "validation": None, **fields})

    def check(self, pipe: DiffusionPipeline) -> None:
        super().check(pipe)
        if self.form == "pooled" and _pooling(pipe, encode(pipe, [""], constant=True)) is None:
            raise ValueError(
                "SAFREE's form 'pooled' needs a text encoder whose pooled text is as wide as its states, such as "
                f"SDXL's second, but this {type(pipe).__name__} has none. Use form 'encoders'."
            )

    def until(self, beta: float) -> float:
        """The fraction of the steps with the edit."""
        if self.validation is None:
            return math.inf
        k, t0 = self.validation
        steps = round(LONGEST / (1 + math.exp(min(2 * k * (t0 - 10 * beta), 700))))
        return (steps + 1) / STEPS if steps else 0.0

    def rewrite(
        self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], call: BoundArguments, memory: Memory
    ) -> tuple[Any, ...]:
        prompt, facts = call.arguments["prompt"], family(pipe)
        if prompt is None or call.arguments.get("prompt_embeds") is not None:
            raise ValueError(
                "SAFREE reads the prompt's words, but the call gives `prompt_embeds`. Give the text instead."
            )
        for name in ("prompt_2", "prompt_3"):
            if call.arguments.get(name) not in (None, prompt):
                raise ValueError(f"SAFREE reads one prompt, but the call gives a different `{name}`. Leave it out.")
        settings = encoding_settings(call)
        prompts, images = [prompt] if isinstance(prompt, str) else prompt, call.arguments["num_images_per_prompt"]
        states, pooled = encoded[0], encoded[facts.returns.index("pooled")] if facts.pooled else None
        edits, pools, ends = [], [], []
        for k, text in enumerate(prompts):
            concepts, at = self.concepts if self.rows is None else self.rows[k], slice(k * images, (k + 1) * images)
            tokens = {name: own_tokens(pipe, text, name, **settings) for name in readers(pipe)}
            edit, whole, end = (
                torch.zeros_like(states[at]),
                None if pooled is None else torch.zeros_like(pooled[at]),
                0.0,
            )
            if concepts and all(tokens.values()):
                added, other, beta = self._filter(pipe, text, concepts, tokens, prompts, settings)
                edit, end = added.to(states).expand_as(edit), self.until(beta)
                if other is not None and pooled is not None:
                    whole = other - pooled[at]
            edits.append(edit)
            pools.append(whole)
            ends += [end] * images
        memory["text"] = torch.cat(edits)
        memory["until"] = torch.tensor(ends, dtype=torch.float32, device=states.device)
        if pooled is not None:
            memory["pooled"] = torch.cat([each for each in pools if each is not None])
        return encoded

    def _filter(
        self,
        pipe: DiffusionPipeline,
        text: str,
        concepts: Sequence[Concept],
        tokens: dict[str, range],
        prompts: list[str],
        settings: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None, float]:
        """The change of the states [L, D] of one prompt, its pooled text without the triggers, and beta.

        `tokens`: tokenizer name to the columns of the prompt's tokens in that encoder. `prompts`: the prompts of the
        call.
        """
        facts, texts = family(pipe), [p for concept in concepts for p in concept.phrases]
        phrases = encode(pipe, texts, constant=True, **settings)
        if self.form == "pooled" and (name := _pooling(pipe, phrases, **settings)):
            tokens = {name: tokens[name]}
        masked, whole = encode_masked(
            pipe, text, {n: [(), *((i,) for i in own)] for n, own in tokens.items()}, prompts, **settings
        )
        edit, betas, found = torch.zeros_like(masked[0]), [], {}
        length, width = edit.shape
        spots, others = (places(pipe, x.shape[1], **settings) for x in (masked, phrases.text))
        for name, own in tokens.items():
            count, causal = 1 + len(own), name not in facts.bidirectional
            if name in spots:
                (columns, features), reading = spots[name], read(pipe, text, name, **settings)
                start = columns.start + facts.shift(name, reading, columns.stop - columns.start)
                mine = masked[:count, start : columns.stop, features]
                theirs = phrases.text[(slice(None), *others[name])]
                readings = [read(pipe, phrase, name, **settings) for phrase in texts]
                ends = [r.last + 1 + facts.shift(name, r, theirs.shape[1]) for r in readings]
                vectors = pool(mine, torch.full_like(mine[:, 0, 0], reading.last + 1), causal)
                concept = pool(theirs, torch.tensor(ends, device=masked.device), causal)
                if self.form == "pooled" and whole is not None and phrases.pooled is not None:
                    vectors, concept = whole[:count], phrases.pooled
                part, beta, triggers = project(mine[0], vectors, concept, own, self.alpha)
                around = (features.start, width - features.stop, start, length - columns.stop)
                edit = edit + F.pad(part.to(edit), around)
                betas.append(beta)
            elif whole is not None and phrases.pooled is not None:  # FLUX reads only this encoder's pooled text
                triggers = triggered(whole[:count], phrases.pooled, self.alpha)
            found[name] = [[i for i, trigger in zip(own, triggers.tolist(), strict=True) if trigger]]
        edits_pooled = facts.pooled and self.form == "encoders"
        other = encode_masked(pipe, text, found, prompts, **settings)[1] if edits_pooled else None
        return edit, other, sum(betas) / len(betas)

    def reread(self, text: Tensor, pooled: Tensor | None, time: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        if not memory or len(memory["text"]) != len(text):  # the denoiser was called directly
            raise RuntimeError(
                f"SAFREE reads the prompts in `encode_prompt`, but read {len(memory.get('text', ()))} of the "
                f"{len(text)} in this denoiser call. Call the pipeline, or `pipe.encode_prompt` with these "
                "prompts before the denoiser."
            )
        share = self.strength * (time.flatten() < memory["until"])[:, None].to(text)
        if pooled is not None:
            pooled = pooled + share * memory["pooled"]
        return text + share[..., None] * memory["text"], pooled


def _pooling(pipe: DiffusionPipeline, encoded: Encoded, **settings: Any) -> str | None:
    """The tokenizer of the last encoder whose pooled text is as wide as its states, and whose states are in the
    text."""
    if encoded.pooled is None:
        return None
    spots = places(pipe, encoded.text.shape[1], **settings)
    wide = [n for n, (_, features) in spots.items() if features.stop - features.start == encoded.pooled.shape[-1]]
    return wide[-1] if wide else None


def project(
    states: Tensor, masked: Tensor, concept: Tensor, tokens: range, alpha: float
) -> tuple[Tensor, float, Tensor]:
    """The change of a prompt's `states` [L, D], beta, and which of its n tokens are triggers [n].

    `masked` [1 + n, D]: the pooled prompt, then the prompt with each of its `tokens` masked in turn (columns; the end
    token follows them). `concept` [K, D]: the pooled phrases.
    """
    triggers, wide = triggered(masked, concept, alpha), torch.promote_types(states.dtype, torch.float32)
    states = states.to(wide)
    near = onto(states, masked[1:].to(wide))
    projected = near - onto(near, concept.to(wide))
    active, own = slice(0, tokens.stop + 1), slice(tokens.start, tokens.stop)
    beta = 1 - float(torch.cosine_similarity(states[active], projected[active], dim=-1).mean().detach())
    edit = torch.where(triggers[:, None], projected[own] - states[own], 0)
    return F.pad(edit, (0, 0, own.start, len(states) - own.stop)), beta, triggers


def triggered(masked: Tensor, concept: Tensor, alpha: float) -> Tensor:
    """Which of the n tokens are triggers [n]; arguments as in `project`."""
    wide = torch.promote_types(masked.dtype, torch.float32)
    masked, concept = masked.detach(), concept.detach()
    masked, toxic = masked.to(wide), basis(concept.to(wide))
    whole, *_ = distances = (masked - masked @ toxic @ toxic.T).norm(dim=-1)
    d = distances[1:]
    others = (d.sum() - d) / (len(d) - 1) if len(d) > 1 else whole
    return d >= (1 + alpha) * others


def basis(vectors: Tensor) -> Tensor:
    """An orthonormal basis [D, r] of the span of vectors [K, D]."""
    _, sizes, directions = torch.linalg.svd(vectors, full_matrices=False)
    return directions[sizes > 1e-6 * sizes[0]].T


def onto(states: Tensor, vectors: Tensor) -> Tensor:
    """States [L, D] projected onto the span of vectors [K, D].

    Gradients are those of the projector V+ V, if the rank of V is constant. An SVD's gradients would divide by
    differences of singular values, which vanish for similar vectors.
    """
    u, sizes, directions = torch.linalg.svd(vectors.detach(), full_matrices=False)
    kept = sizes > 1e-6 * sizes[0]
    span = directions[kept].T
    near = states @ span @ span.T
    if not (torch.is_grad_enabled() and vectors.requires_grad):
        return near
    back = (directions[kept].T / sizes[kept]) @ u[:, kept].T  # V+, [D, K]
    change = vectors - vectors.detach()  # zero, with a gradient
    far = states - near
    return near + far @ change.T @ back.T + (states @ back @ change) - (states @ back @ change) @ span @ span.T


def pool(states: Tensor, lengths: Tensor, causal: bool) -> Tensor:
    """One vector per text, [N, L, D] to [N, D]: the state at the end token of a causal encoder, otherwise the tokens'
    mean."""
    place = torch.arange(states.shape[1], device=states.device)
    weights = place == lengths[:, None] - 1 if causal else (place < lengths[:, None]) / lengths[:, None]
    return (weights.to(states)[..., None] * states).sum(1)
