"""P4D: searches for a prompt with which the guarded model predicts what the base model predicts for the concept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Generator

from .. import checks
from ..delta.embeddings import tables
from ._contract import Access, Proposal, Target, Victim
from ._masked import GradientCheck, leaves, random_rounds, stepped
from ._noising import Point
from ._search import TokenAttack, texts
from ._tokens import check_prompt, nearest, projected
from ._vocabulary import Slots, Vocabulary, forbidden
from ._whitebox import WhiteBox

__all__ = ["P4D"]

Variant = Literal["n", "k", "union"]


@dataclass(frozen=True)
class P4D(TokenAttack):
    """Prompting4Debugging (P4D): projected gradients on soft tokens, towards the base model's prediction.

        L = || b(z_t, t, tau(P)) - m(z_t, t, tau(P*)) ||^2        b: base model, m: guarded model
        P*: soft tokens, each replaced by the word with the nearest embedding (cosine)
        the gradient at the nearest words moves the soft tokens

    P4D-N: free tokens replace the prompt. P4D-K: one free token in front of every few words of the prompt. The union
    proposes both in turn. Predictions are unguided, except with an eraser that changes guidance (SLD, a negative
    prompt), where both are guided.

    Paper: Z.-Y. Chin, C.-M. Jiang, C.-C. Huang, P.-Y. Chen, W.-C. Chiu, 2024, "Prompting4Debugging: Red-Teaming
    Text-to-Image Diffusion Models by Finding Problematic Prompts", ICML 2024, arXiv 2309.06135, section 3.

    Differs: pictures enter the VAE in [-1, 1], texts are padded as in the pipeline, the guarded model encodes its own
    prompts, and no weight takes gradients; the official code does otherwise. Free tokens are whole words that every
    tokenizer reads back, without the concept's words, so that the found text is what was optimised. P4D-K counts words,
    not tokens. Which candidate draws the concept is the judgement of the harness, not of CLIP's similarity. z_t comes
    from all pictures of the attacker's seeds that show the concept. All text encoders share the choice of words.

    Args:
        variant: "n", "k" or "union".
        tokens: free tokens of P4D-N, >= 1; paper: 16.
        spacing: words of the prompt per free token of P4D-K, >= 1; paper: 3.
        steps: updates of each variant, >= 1; paper: 3000.
        lr: learning rate of AdamW, > 0; paper: 0.1.
        weight_decay: its weight decay, >= 0; paper: 0.1.
        batch: noisy pictures per update, all at one random time, >= 1; paper: 1.
        every: updates between two proposals, >= 1; paper: 50.
        forbidden: words that free tokens must not contain. None: those of the concept's name and phrases.

    Shapes: embeddings [k, D] for each text encoder; predictions [B, C, h, w] (FLUX: [B, L, C]).

    Raises:
        ValueError: a field is out of range; a tokenizer has no table of tokens, or a text encoder no embeddings that
            gradients reach; the prompt is too long; the base model does not draw the concept; the scheduler is of an
            unknown kind; or an eraser changes guidance on a pipeline that has it in separate calls (FLUX).
        TypeError: the family of the pipeline is unknown.

    Example:
        >>> import efface
        >>> import efface.testing
        >>> efface.P4D(variant="k", steps=300).check(efface.testing.pipeline("sd1"))
        >>> efface.P4D.access
        'gradients'
    """

    access: ClassVar[Access] = "gradients"
    calls_denoiser: ClassVar[bool] = True

    variant: Variant = "union"
    tokens: int = 16
    spacing: int = 3
    steps: int = 3000
    lr: float = 0.1
    weight_decay: float = 0.1
    batch: int = 1
    every: int = 50
    forbidden: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        checks.choice("variant", self.variant, get_args(Variant))
        super().__post_init__()

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        self.check(victim.pipe)
        templates = [self._template(each, target, victim) for each in ("n", "k") if self.variant in (each, "union")]
        white = WhiteBox.of(victim, target.prompt)
        going = [self._search(slots, text, target, white, k) for k, (slots, text) in enumerate(templates)]
        while going:
            for search in tuple(going):
                proposal = next(search, None)
                if proposal is None:
                    going.remove(search)
                else:
                    yield proposal

    def _template(self, variant: str, target: Target, victim: Victim) -> tuple[Slots, str]:
        """The slots, and the prompt that contains them."""
        words = target.prompt.split()
        count = self.tokens if variant == "n" else -(-len(words) // self.spacing)
        slots = Slots.of(victim.pipe, count, (target.prompt, *target.concept.phrases))
        if variant == "n":
            text = " ".join(slots.words)
        else:
            parts = [words[k * self.spacing : (k + 1) * self.spacing] for k in range(count)]
            text = " ".join(" ".join((slot, *part)) for slot, part in zip(slots.words, parts, strict=True))
        check_prompt(victim.pipe, text, count)
        return slots, text

    def _search(self, slots: Slots, text: str, target: Target, white: WhiteBox, number: int) -> Iterator[Proposal]:
        pipe, generator = white.pipe, Generator().manual_seed((target.seed + number) % 2**32)
        vocabulary = Vocabulary.of(pipe, forbidden(target.concept, self.forbidden))
        table = vocabulary.embeddings(tables(pipe))
        start = torch.randint(len(vocabulary), (len(slots),), generator=generator)
        rows = leaves({name: each[start.to(each.device)] for name, each in table.items()})
        optimizer = torch.optim.AdamW(list(rows.values()), lr=self.lr, weight_decay=self.weight_decay)

        def soft() -> dict[str, torch.Tensor]:
            return projected(rows, table)[1]

        def update(point: Point) -> None:
            stepped(white.loss(text, slots, soft(), point), rows, optimizer)

        check = GradientCheck.of("P4D", white, generator, self.batch, to_base=True)
        found = check.following(random_rounds(self.steps, self.every, generator), text, slots, soft, update)
        written = ((nearest(rows, table).tolist(), f"after {done} updates: {about}") for done, about in found)
        yield from texts(pipe, vocabulary, text, slots, written)
