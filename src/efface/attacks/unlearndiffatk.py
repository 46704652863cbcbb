"""UnlearnDiffAtk: searches for words in front of the prompt with which the guarded model denoises the concept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..delta.embeddings import Rows, tables
from ._contract import Access, Proposal, Target, Victim
from ._masked import GradientCheck
from ._noising import Point
from ._search import TokenAttack, texts
from ._tokens import check_prompt, sampled, simplex
from ._vocabulary import Slots, Vocabulary, forbidden
from ._whitebox import WhiteBox

__all__ = ["UnlearnDiffAtk"]


@dataclass(frozen=True)
class UnlearnDiffAtk(TokenAttack):
    """UnlearnDiffAtk: the guarded model as its own classifier of the concept, on relaxed one-hot words.

        min_delta E_e || y(z_0, e, t) - m(z_t, t, tau(delta + P)) ||^2    m: guarded model, z_0: the concept
        delta_i ~ Categorical(u_i), u_i on the simplex
        u <- simplex(Adam(u, gradient with respect to the one-hot delta, cut to [-1, 1]))

    y is what the denoiser learns to predict (noise, v, the picture, or a velocity). With an eraser that changes
    guidance (SLD, a negative prompt), an unguided prediction does not contain the eraser. Then the guided prediction is
    compared with the base model's for P.

    Paper: Y. Zhang, J. Jia, X. Chen, A. Chen, Y. Zhang, J. Liu, K. Ding, S. Liu, 2024, "To Generate or Not?
    Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images ... For Now", ECCV 2024, arXiv
    2310.11868, section 4.

    Differs: free words are whole words that every tokenizer reads back, so the found text is what was optimised. None
    contains a word of the concept. z_0 are the base model's pictures with the attacker's seeds that show the concept. A
    prompt that is too long is refused, not skipped. All text encoders share the choice of words. Whether a
    text succeeds is the judgement of the harness.

    Args:
        tokens: free words in front of the prompt, >= 1; paper: 5 (nudity, violence) or 3 (style, object).
        times: times of the trajectory, in ascending order of noise, >= 1; paper: 50.
        iterations: updates at each time, >= 1; paper: 40.
        lr: learning rate of Adam, > 0; paper: 0.01.
        weight_decay: its L2 penalty, >= 0; paper: 0.1.
        batch: noisy pictures per update, >= 1; paper: 1.
        forbidden: words that free words must not contain. None: those of the concept's name and phrases.

    Shapes: u [k, V]; predictions [B, C, h, w] (FLUX: [B, L, C]).

    Raises:
        ValueError: a field is out of range; a tokenizer has no table of tokens, or a text encoder no embeddings that
            gradients reach; the prompt is too long; the base model does not draw the concept; the scheduler is of an
            unknown kind; or an eraser changes guidance on a pipeline that has it in separate calls (FLUX).
        TypeError: the family of the pipeline is unknown.

    Example:
        >>> import efface
        >>> import efface.testing
        >>> efface.UnlearnDiffAtk(tokens=3, times=10, iterations=30).check(efface.testing.pipeline("sd1"))
        >>> efface.UnlearnDiffAtk.access
        'gradients'
    """

    access: ClassVar[Access] = "gradients"
    calls_denoiser: ClassVar[bool] = True

    tokens: int = 5
    times: int = 50
    iterations: int = 40
    lr: float = 0.01
    weight_decay: float = 0.1
    batch: int = 1
    forbidden: tuple[str, ...] | None = None

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        pipe, generator = victim.pipe, Generator().manual_seed(target.seed)
        self.check(pipe)
        slots = Slots.of(pipe, self.tokens, (target.prompt, *target.concept.phrases))
        text = f"{' '.join(slots.words)} {target.prompt}"
        check_prompt(pipe, text, self.tokens)
        vocabulary = Vocabulary.of(pipe, forbidden(target.concept, self.forbidden))
        white, table = WhiteBox.of(victim, target.prompt), vocabulary.embeddings(tables(pipe))
        device = next(iter(table.values())).device
        shares = torch.full((len(slots), len(vocabulary)), 1 / len(vocabulary), device=device)
        optimizer = torch.optim.Adam([shares], lr=self.lr, weight_decay=self.weight_decay)

        def best() -> list[int]:
            chosen: list[int] = shares.argmax(-1).tolist()
            return chosen

        def update(point: Point) -> None:
            drawn = sampled(shares, generator).requires_grad_()
            moved(shares, optimizer, drawn, white.loss(text, slots, embedded(drawn, table), point))

        def now() -> dict[str, Tensor]:
            return {name: each[best()] for name, each in table.items()}

        def first() -> dict[str, Tensor]:
            return embedded(sampled(shares, generator), table)

        check = GradientCheck.of("UnlearnDiffAtk", white, generator, self.batch)
        rounds = ([(k + 0.5) / self.times] * self.iterations for k in range(self.times))
        after = enumerate(check.following(rounds, text, slots, now, update, first), 1)
        found = ((best(), f"after {k} of {self.times} times: {about}") for k, (_, about) in after)
        yield from texts(pipe, vocabulary, text, slots, found)


def embedded(shares: Tensor, table: Rows) -> dict[str, Tensor]:
    """The input embeddings [k, D] of words with these shares [k, V]."""
    return {name: shares @ each for name, each in table.items()}


def moved(shares: Tensor, optimizer: torch.optim.Optimizer, drawn: Tensor, loss: Tensor) -> None:
    """One update of u [k, V], from the loss of the words drawn."""
    shares.grad = clipped(torch.autograd.grad(loss, drawn)[0])
    optimizer.step()
    shares.copy_(simplex(shares))


def clipped(gradient: Tensor) -> Tensor:
    """The straight-through gradient of the shares: that of the drawn words, cut to [-1, 1]."""
    return gradient.clamp(-1, 1)
