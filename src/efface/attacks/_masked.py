"""Checks for masked gradients: whether they equal finite differences, and whether following them lowers the loss.

A defence whose gradients are wrong or flat makes gradient attacks fail without being robust.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from .. import checks
from ..delta.embeddings import Rows, frozen
from ._noising import Point
from ._vocabulary import Slots
from ._whitebox import WhiteBox

AGREE = 0.2  # a larger relative difference counts as masked; erasers with masks in the picture have edges
STEPS = (1e-3, 1e-2)  # of the finite differences, relative to the norm of the embeddings
HELD = (0.25, 0.5, 0.75)  # shares of the trajectory of the points that measure the loss
ENOUGH = 4  # measurements, before which a loss that did not fall means nothing


@dataclass(eq=False)
class GradientCheck:
    """What a search learns about its gradients.

    Args:
        who: the attack, in messages.
        white: the guarded model.
        held: fixed points, which the search does not use.
        error: the relative difference between slope and finite differences; NaN before the comparison.
        losses: the mean loss on the fixed points, after each measurement.
        more: makes points for updates, from shares of the trajectory.
    """

    who: str
    white: WhiteBox
    held: list[Point]
    error: float = math.nan
    losses: list[float] = field(default_factory=list)
    more: Callable[[Sequence[float]], list[Point]] = lambda noises: []

    @classmethod
    def of(cls, who: str, white: WhiteBox, generator: Generator, batch: int, **points: Any) -> GradientCheck:
        def more(noises: Sequence[float]) -> list[Point]:
            return white.points(noises, batch, generator, **points)

        return cls(who, white, more(HELD), more=more)

    def following(
        self,
        rounds: Iterable[Sequence[float]],
        text: str,
        slots: Slots,
        now: Callable[[], Rows],
        update: Callable[[Point], None],
        start: Callable[[], Rows] | None = None,
    ) -> Iterator[tuple[int, str]]:
        """Runs a search, and yields after each round the number of updates and the result in words.

        Args:
            rounds: shares of the trajectory, one for each update of a round.
            text, slots: the prompt, with the slots of soft tokens.
            now, start: their rows, after a round and at first.
            update: one update on some noisy pictures, inside the guard and with gradients.
        """

        def fixed(rows: Rows) -> Rows:
            return {name: each.detach() for name, each in rows.items()}

        done = 0
        for noises in rounds:
            points = self.more(noises)
            with self.white.victim.guarded(), frozen(self.white.pipe), torch.enable_grad():
                if not self.losses:
                    self.begin(text, slots, fixed((start or now)()))
                for point in points:
                    update(point)
                self.measure(text, slots, fixed(now()))
            done += len(noises)
            yield done, self.about
        self.end()

    def begin(self, text: str, slots: Slots, rows: Rows) -> None:
        """Compares the gradient with finite differences along it, and measures the loss, inside the guard."""
        self.error = finite_difference_error(self.white, text, slots, rows, self.held[1])
        if self.error > AGREE:
            checks.warn(f"{self.who}: {self._disagree}. {_ADVICE}")
        self.measure(text, slots, rows)

    @torch.no_grad()
    def measure(self, text: str, slots: Slots, rows: Rows) -> float:
        """The mean loss on the fixed points, inside the guard."""
        losses = [float(self.white.loss(text, slots, rows, point)) for point in self.held]
        self.losses.append(sum(losses) / len(losses))
        return self.losses[-1]

    def end(self) -> None:
        """Warns after the search if the loss did not fall."""
        if not self.fell:
            checks.warn(f"{self.who}: {self._flat}. {_ADVICE}")

    @property
    def fell(self) -> bool:
        return len(self.losses) < ENOUGH or min(self.losses[1:]) < self.losses[0]

    @property
    def about(self) -> str:
        """The result in words, for the record of a proposal."""
        words = f"loss {self.losses[0]:.4g} to {self.losses[-1]:.4g}, finite differences within {self.error:.1%}"
        masked = [text for text, bad in ((self._disagree, self.error > AGREE), (self._flat, not self.fell)) if bad]
        return "; ".join([words, *(f"possibly masked gradients: {text}" for text in masked)])

    @property
    def _disagree(self) -> str:
        return f"gradients differ from finite differences by {self.error:.0%} (expected at most {AGREE:.0%})"

    @property
    def _flat(self) -> str:
        return f"the loss did not fall in {len(self.losses)} measurements"


_ADVICE = "A failure of this attack is no evidence of robustness; also use attacks without gradients."


def finite_difference_error(white: WhiteBox, text: str, slots: Slots, rows: Rows, point: Point) -> float:
    """The relative difference between |g| and the slope of the loss along g, the smaller one of two step sizes.

    Infinite if the gradient is zero or not finite.
    """
    with frozen(white.pipe), torch.enable_grad():
        at = leaves(rows)
        loss = white.loss(text, slots, at, point)
        found = dict(zip(at, torch.autograd.grad(loss, list(at.values()), allow_unused=True), strict=True))
    rows = {name: each.detach() for name, each in at.items()}
    gradient = {name: torch.zeros_like(rows[name]) if g is None else g for name, g in found.items()}
    norm, size = _norm(gradient), _norm(rows)
    if not (math.isfinite(norm) and norm > 0):
        return math.inf
    errors = []
    with torch.no_grad():
        for step in STEPS:
            by = step * size / norm
            ends = [{n: rows[n] + sign * by * gradient[n] for n in rows} for sign in (1, -1)]
            up, down = (float(white.loss(text, slots, each, point)) for each in ends)
            errors.append(abs((up - down) / (2 * step * size) - norm) / norm)
    return min(errors)


def _norm(rows: Rows) -> float:
    return math.sqrt(sum(float(each.double().square().sum()) for each in rows.values()))


def leaves(rows: Rows) -> dict[str, Tensor]:
    """Copies that an optimiser can change."""
    return {name: each.detach().clone().requires_grad_() for name, each in rows.items()}


def random_rounds(steps: int, every: int, generator: Generator) -> Iterator[list[float]]:
    """Random shares of the trajectory for so many updates, in rounds of `every`."""
    for done in range(0, steps, every):
        yield torch.rand(min(every, steps - done), generator=generator).tolist()


def stepped(loss: Tensor, rows: Rows, optimizer: torch.optim.Optimizer) -> None:
    """One step of an optimiser on the rows of soft tokens."""
    for row, slope in zip(rows.values(), torch.autograd.grad(loss, list(rows.values())), strict=True):
        row.grad = slope
    optimizer.step()
