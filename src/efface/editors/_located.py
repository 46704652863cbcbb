"""What a fit with location words trains: their embeddings, and in data removal the denoiser's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Generator, Tensor, nn

from .._condition import learned_condition
from .._latents import latents_of
from .._text import fits
from .._weights import part
from ..families import family
from ._denoiser import Denoiser, Points, Precision, Weights
from ._examples import Example, fitted
from ._geometry import Grid

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ENCODED = 16  # pictures that the VAE takes together


def picture_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """Width and height of the pictures that the model was trained on."""
    side = cast("Any", part(pipe, family(pipe).denoiser)).config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    scale = cast("Any", pipe).vae_scale_factor
    return width * scale, height * scale


def check_fits(pipe: DiffusionPipeline, texts: Sequence[str], grid: Grid) -> None:
    """Raises ValueError unless each text fits the encoder, whose end, the location words, would be cut off first."""
    for text in texts:
        if not fits(pipe, text):
            cures = ["`encoding` 'corners'"] if grid.encoding == "bins" else []
            cures += ["a smaller `grid`", "shorter captions", "fewer boxes per picture"]
            raise ValueError(
                f"Expected captions with location words that fit the text encoder, got {len(text.split())} words in "
                f"{text[:60]!r}, which would be cut. Use {', '.join(cures[:-1])} or {cures[-1]}."
            )


class Data:
    """The pictures as latents, with their texts and weights.

    Args:
        pipe: the pipeline with the location words.
        examples: pictures with boxes.
        grid: the bins.
        size: width and height of the model's pictures.
        ratio: the weight outside of the boxes, relative to that inside.
        flip: whether each picture also comes mirrored.

    Attributes:
        latents [N, C, h, w], weights [N, h, w]; texts, one per picture; used, the words in them.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        examples: Sequence[Example],
        grid: Grid,
        *,
        size: tuple[int, int],
        ratio: float,
        flip: bool,
    ) -> None:
        views = [fitted(each, size, flip=way) for each in examples for way in ((False, True) if flip else (False,))]
        located = [grid.text(view.boxes or (), size) for view in views]
        self.texts = [", ".join(filter(None, pair)) for pair in zip((v.text for v in views), located, strict=True)]
        found = {word for view in views for word in grid.named(view.boxes or (), size)}
        self.used = [word for word in grid.words if word in found]
        self.dirty = sum(bool(view.boxes) for view in views)
        check_fits(pipe, [*self.texts, " ".join([grid.name, *self.used])], grid)
        parts = [views[k : k + ENCODED] for k in range(0, len(views), ENCODED)]
        self.latents = torch.cat([latents_of(pipe, torch.cat([v.pixels for v in part])).cpu() for part in parts])
        shape = (self.latents.shape[2], self.latents.shape[3])
        self.weights = torch.stack([grid.weights(view.boxes or (), size, shape, ratio) for view in views])


class Located(Denoiser):
    """A denoiser whose texts are encoded for each batch, so that gradients reach location words.

    Args:
        pipe, train, precision: as for `Denoiser`.
        texts: the texts; row k of a point's `prompt` is texts[k - 1], and 0 the empty text.
        words: the words' embeddings, by tokenizer.
        trains_weights: whether the denoiser's weights also train, with the settings of the fit.
        lr: the learning rate of the words.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        texts: Sequence[str],
        words: Mapping[str, nn.Parameter],
        *,
        trains_weights: bool,
        train: str,
        precision: Precision,
        lr: float,
    ) -> None:
        super().__init__(pipe, ["a"], train, 1, precision)
        self.texts, self.words, self.trains_weights, self.lr = ["", *texts], words, trains_weights, lr

    def student(self) -> dict[str, Tensor]:
        """The words' embeddings themselves, and copies of the trained weights."""
        return {**self.words, **(super().student() if self.trains_weights else {})}

    def groups(self, student: Weights) -> list[dict[str, Any]]:
        words = {"params": [student[name] for name in self.words], "lr": self.lr, "weight_decay": 0.0}
        weights = [student[name] for name in student if name not in self.words]
        return [words, *([{"params": weights}] if weights else [])]

    def __call__(self, x: Tensor, t: Tensor, prompt: Tensor, weights: Weights | None = None) -> Tensor:
        """The prediction [N, C, h, w], with gradients for the words, and for the weights if they train."""
        rows = prompt.tolist()
        texts = list(dict.fromkeys(self.texts[k] for k in rows))
        self.condition = learned_condition(self.pipe, texts)
        which = torch.tensor([texts.index(self.texts[k]) for k in rows], device=x.device)
        own = {name: w for name, w in (weights or {}).items() if name in self.base}
        return super().__call__(x, t, which, own or None)

    def change(self, weights: Weights) -> dict[str, Tensor]:
        return super().change({name: w for name, w in weights.items() if name in self.base})


def drawing(net: Located, data: Data, batch: int, dropout: float) -> Callable[[Weights, int, Generator], Points]:
    """Draws noisy pictures; `own` holds the target [B, C, h, w] and, as a further channel, the weights."""
    times = net.scheduler.config.num_train_timesteps

    def draw(_: Weights, __: int, rng: Generator) -> Points:
        k = torch.randint(len(data.texts), (batch,), generator=rng)
        t = torch.randint(times, (batch,), generator=rng)
        dropped = torch.rand(batch, generator=rng) < dropout
        x = data.latents[k].to(net.device, net.dtype)
        noise = torch.randn(x.shape, generator=rng).to(x)
        points = net.noised(x, t.to(net.device), noise, torch.where(dropped, 0, k + 1))
        if points.own is None:
            raise RuntimeError("The points have no target. Make them with `noised`.")
        weights = data.weights[k].to(points.own)[:, None]
        return replace(points, own=torch.cat([points.own, weights], 1))

    return draw


def weighted(net: Located, student: Weights, points: Points) -> Tensor:
    """The mean of w (prediction - target)^2."""
    if points.own is None:
        raise RuntimeError("The points have no target. Make them with `drawing`.")
    target, weight = points.own[:, :-1], points.own[:, -1:]
    return (weight * (net(points.x, points.t, points.prompt, student) - target).square()).mean()
