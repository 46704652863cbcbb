"""Inverts pictures into new words: trains their input embeddings so that the denoiser predicts the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from .. import checks
from .._condition import learned_condition
from ..delta.embeddings import Rows
from ..delta.tokens import Learned, learning_words
from ._denoiser import Denoiser, Points, Precision, Weights
from ._settings import Training
from ._training import run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def normalised(rewards: Tensor) -> Tensor:
    """Rewards [N] divided by their mean.

    A negative reward would increase the loss without bound, so it is refused.

    Raises:
        ValueError: a reward is negative or not finite, or none is positive.

    Example:
        >>> import torch
        >>> normalised(torch.tensor([0.0, 1.0, 3.0])).tolist()
        [0.0, 0.75, 2.25]
    """
    if rewards.ndim != 1 or not rewards.is_floating_point() or not bool(rewards.isfinite().all()):
        cure = "Give one number per picture."
        raise ValueError(checks.refusal("`rewards` to be finite floats [N]", tuple(rewards.shape), cure))
    if not len(rewards) or float(rewards.min()) < 0 or not float(rewards.max()) > 0:
        cure = "Give rewards of at least 0, and pictures with a reward above 0."
        got = [] if not len(rewards) else [float(rewards.min()), float(rewards.max())]
        raise ValueError(checks.refusal("`rewards` >= 0 with at least one above 0", got, cure))
    return rewards / rewards.mean()


class Worded(Denoiser):
    """A denoiser that reads texts with words in training. Prompt n T + k stands for picture n with text k of T.

    Args:
        pipe: the pipeline.
        learned: the words in training.
        texts: texts with these words.
        latents: the pictures [N, C, h, w].
        rewards: the weight of each picture, [N].
        precision: as in `Denoiser`.

    Raises:
        ValueError: the latents have another size than those that the denoiser draws.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        learned: Learned,
        texts: Sequence[str],
        latents: Tensor,
        rewards: Tensor,
        precision: Precision,
    ) -> None:
        super().__init__(pipe, texts, "x", 1, precision)
        self.learned, self.texts = learned, list(texts)
        if tuple(latents.shape[1:]) != tuple(self.shape):
            raise ValueError(
                f"Expected pictures whose latents have the shape {list(self.shape)}, got {list(latents.shape[1:])}. "
                "Use pictures of the size that the model draws."
            )
        self.latents, self.rewards = latents.to(self.device, self.dtype), rewards.to(self.device, self.dtype)

    def student(self) -> dict[str, Tensor]:
        """The embeddings of the words, by tokenizer."""
        return dict(self.learned.embeddings)

    def __call__(self, x: Tensor, t: Tensor, prompt: Tensor, weights: Weights | None = None) -> Tensor:
        """The prediction [N, C, h, w], from which gradients reach the embeddings of the words."""
        self.condition = learned_condition(self.pipe, self.texts)
        return super().__call__(x, t, prompt % len(self.texts), {})

    def draw(self, batch: int, rng: Generator) -> Points:
        """Noisy pictures at random times, with random texts."""
        n, k = (torch.randint(most, (batch,), generator=rng) for most in (len(self.latents), len(self.texts)))
        t = torch.randint(self.scheduler.config.num_train_timesteps, (batch,), generator=rng).to(self.device)
        x = self.latents[n.to(self.device)]
        return self.noised(x, t, torch.randn(x.shape, generator=rng).to(x), (n * len(self.texts) + k).to(self.device))

    def loss(self, points: Points) -> Tensor:
        """The mean over pictures of reward times squared error."""
        error = (self(points.x, points.t, points.prompt) - points.target).square().flatten(1).mean(1)
        return (self.rewards[points.prompt // len(self.texts)] * error).mean()


@dataclass(frozen=True)
class Inverted:
    """Learned rows by tokenizer, and facts on the fit."""

    rows: Rows
    info: Mapping[str, Any]


def invert(
    pipe: DiffusionPipeline,
    latents: Tensor,
    rewards: Tensor,
    words: Sequence[str],
    start: Rows,
    *,
    templates: Sequence[str],
    steps: int,
    lr: float,
    batch: int,
    precision: Precision = "auto",
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
) -> Inverted:
    """Trains the embeddings of new words on pictures, weighted by their rewards.

    Pictures of reward 0 are left out, and the other rewards have the mean 1. So equal rewards are plain textual
    inversion, to the bit.

    Args:
        pipe: the pipeline, which stays unchanged.
        latents: the pictures [N, C, h, w].
        rewards: [N], at least 0.
        words: the new words, which are used together.
        start: their first embeddings.
        templates: texts with "{}" for the words.
        steps, lr, batch, precision: of the training.
        seed: of pictures, texts, times and noise.
        identity: facts that a checkpoint must match.
        checkpoint: a file with which the same call continues.
    """
    kept = rewards > 0
    weights = normalised(rewards)[kept]
    settings = Training(steps=steps, lr=lr, batch=batch, reuse=1)
    texts = [template.format(" ".join(words)) for template in templates]
    with learning_words(pipe, words, start) as learned:
        net = Worded(pipe, learned, texts, latents[kept], normalised(weights), precision)
        state = run(
            net,
            settings,
            lambda _, __, rng: net.draw(batch, rng),
            lambda _, points, __: net.loss(points),
            seed=seed,
            name="HFI",
            identity=identity or {},
            checkpoint=checkpoint,
        )
        rows = {name: each.detach().clone() for name, each in state.shipped.items()}
    return Inverted(rows, {**state.info(), "pictures": int(kept.sum())})
