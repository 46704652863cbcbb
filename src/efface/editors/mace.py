"""MACE: takes the concept out of other words, learns a rank-1 change per concept against attention, and fuses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator

from .. import checks
from .._weights import digest, learning
from ..core import Concept, Concepts, as_concepts, config
from ..delta import Change, Delta, Factors, dense
from ..delta.factors import added
from ..families import family
from ._closed_form import Texts, anchors_of, changes, kept_texts, step
from ._denoiser import Points, Precision, Weights
from ._directions import Task, latents
from ._fusion import Attending, divided, fused
from ._outputs import SUBJECTS
from ._settings import FamilyDefaults, Training
from ._training import run, telling

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["MACE"]


@dataclass(frozen=True)
class MACE(FamilyDefaults):
    """Edits keys and values in three parts, so that many concepts can be erased in one model.

    W [O, D] is the keys' or values' weight of a cross-attention layer. F, G [N, D] are the tokens other than the
    concept's in texts that name it, and the same tokens with the anchor in its place; E_i [M, D] the tokens of concept
    i in its texts, and P those of the texts to preserve:

        1. W0 = argmin  |(W' F^T - W G^T)|^2 + b |(W' - W) P^T|^2 + lam |W' - W|^2        (other words lose the concept)
        2. D_i = B_i A_i of rank 1, `steps` updates on  |attention to the tokens of concept i|^2,  under W0 + D_i
        3. W* = argmin  sum_i |(W* - W0 - D_i) E_i^T|^2 + b |(W* - W0) P^T|^2 + lam |W* - W0|^2
              = W0 + sum_i D_i E_i^T E_i (sum_i E_i^T E_i + b P^T P + lam I)^-1

    The change W* - W has at most N + K ranks for K concepts, so it exports as a LoRA.

    Paper: S. Lu, Z. Wang, L. Li, Y. Liu, A. W.-K. Kong, 2024, "MACE: Mass Concept Erasure in Diffusion Models", CVPR,
    arXiv 2403.06135. There are no equation numbers, because the source was a description; the authors' code has a
    non-commercial licence and was not used.

    Differs: part 2 counts the attention of the whole picture; the paper counts it inside a mask from an external
    segmentation model. The pictures are the model's own. The description leaves open which tokens E_i holds; here the
    concept's own. If phrase and anchor differ in length, words after them move to other places, and F and G leave them
    out. `lr`, `lam`, the preserved texts and those around the concept are Efface's. Above 1,000 concepts the code lets
    only five of each chunk enter part 1; here all do.

    Limits: less attention to the concept's tokens is less of the concept only if those tokens carry it; a text encoder
    that is not causal, as that of `emoji`, spreads it. This implementation has not been measured on a large model.

    Args:
        templates: texts with {} for the concept, from which F, G and E come. None: the family's default.
        preserve: texts to preserve, in addition to each concept's `keep`. Paper: a cache of captions.
        preserve_scale: b >= 0.
        lam: > 0, on the scale of a token's squared norm. None: the family's default.
        steps: updates per concept, >= 0; paper: 50. 0 leaves parts 2 and 3 out.
        lr: learning rate of AdamW. None: the family's default.
        batch: pictures per update.
        pictures: pictures per concept, >= 1.
        times: (from, to), the noise that is trained, as times of the scheduler's 1,000; paper: 200 to 400.
        sampler_steps: steps of each picture. None: the family's default.
        guidance: guidance scale of the pictures, >= 1.
        precision: "auto", "float32" or "bfloat16".

    Shapes: W [O, D]; tokens [N, D]; attention [B, heads, Q, n] for the n tokens of a concept.

    Raises:
        ValueError: a field is out of range, there is no concept, or a phrase equals its anchor or a preserved text. On
            `fit`: a text is over the encoder's limit, the projections are fused or quantised, or the pipeline has
            run-time erasers or a LoRA.
        TypeError: the family of the pipeline is unknown.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> fit = efface.MACE(steps=1, pictures=1, batch=1, sampler_steps=2)
        >>> delta = fit.fit(pipe, efface.Concept("cat", anchor="a dog"))
        >>> with delta.apply(pipe):
        ...     image = pipe("a cat", num_inference_steps=2).images[0]
        >>> delta.method
        'mace'
    """

    needs: ClassVar[tuple[str, ...]] = ("text_weights", "training")
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"templates": ("{}", "a dog and {}", "a tree and {}"), "lam": 5.0, "lr": 1e-3, "sampler_steps": 20},
        "": {"templates": ("a photo of {}", "{} in a room"), "lam": 0.5, "lr": 1e-3, "sampler_steps": 25},
    }

    templates: tuple[str, ...] | None = None
    preserve: tuple[str, ...] = ("", *SUBJECTS)
    preserve_scale: float = 1.0
    lam: float | None = None
    steps: int = 50
    lr: float | None = None
    batch: int = 4
    pictures: int = 8
    times: tuple[int, int] = (200, 400)
    sampler_steps: int | None = None
    guidance: float = 7.5
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        checks.each(self, checks.texts, "preserve", "templates")
        if self.templates is not None and (not self.templates or any(t.count("{}") != 1 for t in self.templates)):
            cure = 'Write for example ("a photo of {}",).'
            raise ValueError(checks.refusal("`templates` with one {} each", self.templates, cure))
        checks.each(self, checks.number, "lam", "lr", least=0, above=True)
        checks.each(self, checks.number, "preserve_scale", least=0)
        checks.each(self, checks.number, "guidance", least=1)
        checks.each(self, checks.whole, "steps", least=0)
        checks.each(self, checks.whole, "batch", "pictures", "sampler_steps")
        start, end = self.times
        object.__setattr__(self, "times", (checks.whole("times[0]", start, 0), checks.whole("times[1]", end, start)))

    @learning()
    def fit(
        self, pipe: DiffusionPipeline, concepts: Concepts, *, seed: int = 0, checkpoint: str | Path | None = None
    ) -> Delta:
        """Returns the delta that erases `concepts`. Leaves `pipe` unchanged.

        Args:
            pipe: the pipeline. Its deltas are part of the model.
            concepts: their phrases lose the attention of the picture; other words read as with their anchors.
            seed: seed of all random numbers.
            checkpoint: a folder with which the same call continues after an interruption.
        """
        method, found = self.resolved(pipe), as_concepts(concepts)
        anchors = anchors_of(found)
        kept = kept_texts(self.preserve, found, anchors)
        pairs = [(t, phrase, to) for phrase, to in anchors.items() for t in method.templates or ()]
        texts = Texts(pipe, [*(t.format(each) for t, *two in pairs for each in two), *anchors, *kept])
        parts = {pair[:2]: divided(pipe, texts, *pair) for pair in pairs}
        concept, anchor = (torch.cat([each[side] for each in parts.values()]) for side in (1, 2))
        gram = self.preserve_scale * texts.gram(kept)
        net = Attending(pipe, list(anchors), 1, self.precision)
        refined = changes(net.base, *step(concept, anchor, gram, 1.0, method.lam or 1.0))
        made: dict[str, Change] = dict(refined)
        if self.steps:
            net.start = {name: w + dense(refined[name]).to(w) for name, w in net.base.items()}
            learned = [method._learned(net, pipe, c, seed + k, checkpoint) for k, c in enumerate(found)]
            own = [torch.cat([part[0] for (_, phrase), part in parts.items() if phrase in c.phrases]) for c in found]
            grams = [rows.T @ rows for rows in own]
            shares = fused([(d, g) for (d, _), g in zip(learned, grams, strict=True)], gram, method.lam or 1.0)
            made = {name: added(refined[name], shares[name]) for name in refined}
            masses = {c.name: info for c, (_, info) in zip(found, learned, strict=True)}
        info: dict[str, Any] = {"other tokens": len(concept), "preserved texts": len(kept)}
        info |= {"attention, first and last": masses} if self.steps else {}
        return Delta.fitted(method, pipe, made, found, seed=seed, info=info)

    def _learned(
        self, net: Attending, pipe: DiffusionPipeline, concept: Concept, seed: int, checkpoint: str | Path | None
    ) -> tuple[dict[str, Factors], list[float | None]]:
        """The rank-1 changes D of one concept, and the loss in the first and the last tenth of the updates."""
        task = Task(concept, concept.phrases, ("",), concept.phrases)
        call = {**family(pipe).guided(self.guidance), "num_inference_steps": self.sampler_steps}
        folder = None if checkpoint is None else Path(checkpoint) / str(seed)
        options: dict[str, Any] = {"shape": net.shape, "batch": self.batch, "seed": seed, "call": call}
        options |= {"cache": folder and folder / "latents.safetensors"}
        with telling("drawing the model's pictures") as tell:
            drawn = latents(pipe, [task], self.pictures, tell=tell, **options)[0].to(net.device, net.dtype)
        rows = torch.tensor([net.texts[task.row(k)[0]] for k in range(self.pictures)])
        low, high = self.times

        def draw(_: Weights, __: int, rng: Generator) -> Points:
            k = torch.randint(self.pictures, (self.batch,), generator=rng)
            t = torch.randint(low, high + 1, (self.batch,), generator=rng).to(net.device)
            return net.noised(drawn[k], t, torch.randn(drawn[k].shape, generator=rng).to(drawn), rows[k].to(net.device))

        net.random = Generator().manual_seed(seed)
        state = run(
            net,
            Training(steps=self.steps, lr=self.lr, batch=self.batch, reuse=1),
            draw,
            lambda weights, points, _: net.attended(points, weights),
            seed=seed,
            name="MACE",
            identity={**config(self), "phrases": list(concept.phrases), "start": digest(net.start)},
            checkpoint=folder and folder / "fit.safetensors",
        )
        learned = state.shipped
        return {n: Factors(learned[f"{n}:B"], learned[f"{n}:A"]) for n in net.base}, state.info()["loss"]
