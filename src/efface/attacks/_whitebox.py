"""The guarded denoiser as a differentiable function of soft tokens, for every family.

One real pipeline call is recorded. Its arguments, such as sizes and positions, are used again with other latents, times
and texts, so nothing of a pipeline's code is repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .. import checks
from .._latents import latents_of, scaling
from .._text import SITES
from .._weights import denoiser_of
from ..delta.embeddings import Rows, substituted
from ..families import family
from ._contract import Victim
from ._noising import Noising, Point, noisy_points
from ._recording import expanded, recorded
from ._texts import Parts, check_calls, encoded_parts
from ._vocabulary import Slots


@dataclass(frozen=True, eq=False)
class WhiteBox:
    """The guarded model's predictions, with gradients with respect to soft tokens.

    Args:
        victim: the guarded model.
        prompt: a prompt with which the base model draws the concept.
        arguments: arguments of a denoiser call, with one row.
        latents: latents [M, ...] of the base model's pictures of the concept.
        guided: whether an eraser changes guidance (SLD, a negative prompt), so that predictions are guided ones.
        paired: whether the pipeline's calls have unconditional rows. Erasers may read their text.
        scale: the guidance scale.
    """

    victim: Victim
    prompt: str
    arguments: dict[str, Any]
    latents: Tensor
    guided: bool
    paired: bool
    scale: float

    @classmethod
    def of(cls, victim: Victim, prompt: str) -> WhiteBox:
        """Draws the base model's pictures with the attacker's seeds, and records a denoiser call.

        Raises:
            ValueError: the base model does not draw the concept, or the pipeline cannot be attacked by gradients.
        """
        pipe, facts = victim.pipe, family(victim.pipe)
        check_white(pipe)
        with recorded(denoiser_of(pipe), facts) as arguments:
            images = victim.draw_original(prompt)
        shown = images[victim.found(images)]
        if not len(shown):
            raise ValueError(
                f"The base model draws the concept in none of {len(images)} pictures for {checks.shown(prompt)}, so "
                "there is nothing to attack. Use a prompt with which it does."
            )
        with victim.guarded():
            site = SITES.get(denoiser_of(pipe))
            methods = [] if site is None else [applied.method for applied in site.applied]
            guided = any((method.guides or method.negates) and not method.is_off() for method in methods)
        if guided and facts.guidance_in_two_calls:
            raise ValueError(
                f"Expected guidance in one batch, got a pipeline of {facts.name}, whose unconditional predictions come "
                "from separate calls. Attacks by gradients cannot go through an eraser that changes guidance there; "
                "use an attack that needs no gradients."
            )
        scale = getattr(pipe, facts.scale, math.nan) if facts.tells_scale(pipe) else victim.guidance
        if guided and not (scale is not None and math.isfinite(scale)):
            raise ValueError(
                f"Expected a guidance scale for the guided predictions of {facts.name}, got {scale!r}. Give `guidance`."
            )
        paired = bool(getattr(pipe, "do_classifier_free_guidance", True))
        return cls(victim, prompt, arguments, latents_of(pipe, shown), guided, paired, float(scale or 1.0))

    @property
    def pipe(self) -> Any:
        return self.victim.pipe

    # ---- predictions

    def encode(self, text: str, rows: int) -> Parts:
        """A text, encoded through the applied erasers as in a pipeline call, in equal rows.

        The erasers recognise the conditional rows of the next denoiser calls by this encoding.
        """
        facts = family(self.pipe)
        if facts.tells_scale(self.pipe):
            setattr(self.pipe, f"_{facts.scale}", self.scale)  # a call with other guidance may have come between
        return encoded_parts(self.pipe, [text] * rows, self.paired)

    def predict(self, parts: Parts, latents: Tensor, time: float | Tensor) -> Tensor:
        """The conditional prediction, or with `guided` u + s (c - u), in float32.

        Args:
            parts: the encoded text of each row.
            latents: noisy latents [B, ...].
            time: in training steps; one, or one per row (only without erasers).
        """
        facts, n, guided = family(self.pipe), len(latents), self.guided
        rows, kept = (2 * n if guided else n), dict(self.arguments)

        def both(name: str) -> Tensor:
            negative = {"text": "negative"}.get(name, f"negative_{name}")
            return torch.cat([parts[negative], parts[name]]) if guided else parts[name]

        sample, shared = next(iter(kept)), facts.shared_arguments
        kept = {name: each if name in shared else expanded(each, rows) for name, each in kept.items()}
        when = kept[facts.time_argument]
        kept[sample] = latents.to(kept[sample].dtype).repeat(2 if guided else 1, *[1] * (latents.ndim - 1))
        times = torch.as_tensor(time, dtype=torch.float64).expand(n).repeat(2 if guided else 1)
        if facts.unit_time:
            times = times / self.pipe.scheduler.config.num_train_timesteps
        kept[facts.time_argument] = times.to(when.device, when.dtype)
        if facts.masked:
            kept = facts.with_mask(kept, both("mask"))
        kept[facts.text_argument] = both("text")
        if "pooled" in parts:
            kept = facts.with_pooled(kept, both("pooled"))
        out = denoiser_of(self.pipe)(**kept)
        made = (out[0] if isinstance(out, tuple) else out.sample).float()
        if latents.ndim == 4:
            made = made[:, : latents.shape[1]]  # PixArt predicts variances as well
        return made[:n] + self.scale * (made[n:] - made[:n]) if guided else made

    def loss(self, text: str, slots: Slots, rows: Rows, point: Point) -> Tensor:
        """The mean squared difference between prediction and goal, inside of `victim.guarded()`.

        Raises:
            ValueError: with gradients on, none reaches `rows`.
        """
        with substituted(self.pipe, slots.ids, rows):
            parts = self.encode(text, len(point.noisy))
        for time, noisy in point.earlier:
            self.predict(parts, noisy, time)
        out = self.predict(parts, point.noisy, point.time)
        loss = nn.functional.mse_loss(out, point.goal)
        if torch.is_grad_enabled() and any(each.requires_grad for each in rows.values()) and not loss.requires_grad:
            raise ValueError(
                "Expected a prediction with gradients with respect to the input embeddings, got one without. A text "
                "encoder or an eraser cuts them off; use an attack that needs no gradients."
            )
        return loss

    # ---- points

    def points(
        self,
        noises: Sequence[float],
        batch: int,
        generator: Generator,
        *,
        to_base: bool = False,
        earlier: int = 0,
        rows: int = 32,
    ) -> list[Point]:
        """Noisy pictures of the concept at shares of the trajectory, outside of `victim.guarded()`.

        The goal is what the denoiser learns to predict. With `to_base`, and always for guided predictions, it is the
        base model's prediction for the prompt.

        Args:
            noises: shares of the trajectory in (0, 1); 1 is pure noise.
            batch: rows of each point.
            generator: source of pictures and noise.
            to_base: see above.
            earlier: number of earlier denoiser calls, at equal distances from pure noise.
            rows: rows of a call of the base model, which takes points of different times together.
        """
        made = noisy_points(Noising.of(self.pipe), self.latents, noises, batch, generator, earlier)
        if not (to_base or self.guided):
            return made
        goals, size = [], max(1, rows // (2 * batch)) if self.guided else max(1, rows // batch)
        with self.victim.original(), torch.no_grad():
            for k in range(0, len(made), size):
                some = made[k : k + size]
                noisy = torch.cat([point.noisy for point in some])
                times = torch.tensor([point.time for point in some]).repeat_interleave(batch)
                parts = self.encode(self.prompt, len(noisy))
                goals += self.predict(parts, noisy, times).split(batch)
        return [Point(p.time, p.noisy, goal, p.earlier) for p, goal in zip(made, goals, strict=True)]


def check_white(pipe: Any) -> None:
    """Raises ValueError if the denoiser of this pipeline cannot be called with other texts, latents and times."""
    check_calls(pipe)
    Noising.of(pipe)
    scaling(pipe)
