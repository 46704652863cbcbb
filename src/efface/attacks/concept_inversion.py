"""CCE: finds a word's embedding that draws the erased concept (concept inversion)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Generator, Tensor

from .. import checks
from ..delta.embeddings import mean_row, substituted
from ._contract import Access, Proposal, Target, Victim
from ._masked import GradientCheck, leaves, random_rounds, stepped
from ._noising import Point
from ._search import TokenAttack
from ._tokens import check_prompt
from ._vocabulary import Slots
from ._whitebox import WhiteBox

__all__ = ["ConceptInversion"]

TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}", "a drawing of one {}", "the {}", "a close view of a {}")


@dataclass(frozen=True)
class ConceptInversion(TokenAttack):
    """Circumventing Concept Erasure (CCE): learns the input embedding of a new word on pictures of the concept.

        v* = argmin_v E_{t, e} || y(z_0, e, t) - m(z_t, t, tau(template with v)) ||^2
        with an eraser that changes guidance (SLD, a negative prompt):
        v* = argmin_v E_{t, e} || b_u + g (b_c - b_u) - (m_u + g (m_v - m_u)) ||^2

    m is the guarded model, b the base model, c the target's prompt, u the unconditional text, g the guidance scale, and
    y what the denoiser learns to predict (noise, v, the picture, or a velocity). The weights stay unchanged. The result
    is not text: it needs access to the embeddings.

    Paper: M. Pham, K. O. Marshall, N. Cohen, G. Mittal, C. Hegde, 2024, "Circumventing Concept Erasure Methods For
    Text-to-Image Generative Models", ICLR 2024, arXiv 2308.01508, section 4.

    Differs: written from the description, in float32, for all families whose text encoders have an embedding table; all
    encoders get a row of their own width. The pictures are those that the base model draws with the attacker's seeds
    and the detector of the search flags, not 25 collected ones. The word is a hook on the embeddings in place of a rare
    word, so no row of the vocabulary changes. `lr` is the paper's effective rate: 5e-3, times a batch of 4, times 4
    accumulated batches. Here a step has one batch.

    The real control is the same inversion on a model that was never trained on the concept, because an inversion can
    also teach what a model never knew. The project has no such model yet. `control` uses random embeddings of equal
    norm, which only shows that not any embedding draws the concept.

    Args:
        tokens: the number of new words, >= 1; paper: 1.
        steps: updates, >= 1; paper: 5000 (SLD: 1000).
        lr: learning rate of AdamW, > 0; paper: 0.08.
        weight_decay: its weight decay, >= 0; paper: 0.01.
        batch: noisy pictures per update, all at one random time, >= 1; paper: 16 (SLD: 1).
        every: updates between two proposals, >= 1.
        initial: the word whose mean embedding is the start; paper: for example "art".
        templates: texts with "{}" for the word; the first one draws.
        momentum_steps: earlier denoiser calls per update, from pure noise on, for erasers that carry a state from step
            to step (SLD's momentum); paper: 35 of a window of 90. Each costs as much as the call that counts.

    Shapes: embeddings [k, D] for each text encoder; latents [B, C, h, w] (FLUX: [B, L, C]).

    Raises:
        ValueError: a field is out of range; a tokenizer has no table of tokens, or a text encoder no embeddings that
            gradients reach; the prompt is too long; the base model does not draw the concept; the scheduler is of an
            unknown kind; or an eraser changes guidance on a pipeline that has it in separate calls (FLUX).
        TypeError: the family of the pipeline is unknown.

    Example:
        >>> import efface
        >>> import efface.testing
        >>> attack = efface.ConceptInversion(steps=100, tokens=2)
        >>> attack.access
        'embeddings'
        >>> attack.check(efface.testing.pipeline("sd1"))
    """

    access: ClassVar[Access] = "embeddings"
    calls_denoiser: ClassVar[bool] = True
    _least: ClassVar[Mapping[str, int]] = {"momentum_steps": 0}

    tokens: int = 1
    steps: int = 5000
    lr: float = 0.08
    weight_decay: float = 0.01
    batch: int = 4
    every: int = 100
    initial: str = "object"
    templates: tuple[str, ...] = TEMPLATES
    momentum_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.text("initial", self.initial)
        object.__setattr__(self, "templates", checks.texts("templates", self.templates))
        if not self.templates or any(each.split().count("{}") != 1 for each in self.templates):
            cure = 'Write for example ("a photo of a {}",).'
            raise ValueError(checks.refusal('`templates` with one separate "{}" each', self.templates, cure))

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        pipe, generator = victim.pipe, Generator().manual_seed(target.seed)
        self.check(pipe)
        slots = Slots.of(pipe, self.tokens, (target.prompt, *target.concept.phrases, *self.templates))
        texts = [template.format(" ".join(slots.words)) for template in self.templates]
        for text in texts:
            check_prompt(pipe, text, self.tokens)
        white, rows = WhiteBox.of(victim, target.prompt), leaves(mean_row(pipe, self.initial, self.tokens))
        optimizer = torch.optim.AdamW(list(rows.values()), lr=self.lr, weight_decay=self.weight_decay)

        def update(point: Point) -> None:
            which = int(torch.randint(len(texts), (1,), generator=generator))
            stepped(white.loss(texts[which], slots, rows, point), rows, optimizer)

        earlier = self.momentum_steps if white.guided else 0
        check = GradientCheck.of("ConceptInversion", white, generator, self.batch, earlier=earlier)
        rounds = random_rounds(self.steps, self.every, generator)
        for done, about in check.following(rounds, texts[0], slots, lambda: rows, update):
            still = {name: each.detach().clone() for name, each in rows.items()}
            yield _proposal(texts[0], slots, still, f"after {done} updates: {about}")

    def control(self, proposal: Proposal, target: Target, victim: Victim, rng: Random) -> Proposal:
        """The same prompt with random embeddings of equal norm."""
        generator, rows = Generator().manual_seed(rng.randrange(2**32)), {}
        slots = Slots.of(victim.pipe, self.tokens, (target.prompt, *target.concept.phrases, *self.templates))
        for name, each in proposal.tensors.items():
            drawn = torch.randn(each.shape, generator=generator).to(each)
            rows[name] = drawn * (each.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))
        return dataclasses.replace(_proposal(proposal.prompt, slots, rows, ""), about="random embeddings of equal norm")


def _proposal(text: str, slots: Slots, rows: dict[str, Tensor], about: str) -> Proposal:
    return Proposal(text, about=about, inside=lambda pipe: substituted(pipe, slots.ids, rows), tensors=rows)
