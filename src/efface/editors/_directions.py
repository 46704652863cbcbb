"""What a fit of directions needs: the model's own pictures as latents, and a denoiser that adds vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from .. import files
from .._weights import digest
from ..core import Concept
from ..families import family
from ._denoiser import Denoiser, Points, Precision, Weights, mse
from ._training import unobserved

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..families import Family

CURE = "Move it away, or run the command that started it."
LEVELS = 8  # noise levels at which a held-out picture is judged


@dataclass(frozen=True)
class Task:
    """The pictures of one concept.

    Args:
        concept: the concept.
        prompts, negatives: what draws picture n: entry n, counted in a circle.
        neutral: the texts y- with which its latents are trained, in the same order.
    """

    concept: Concept
    prompts: Sequence[str]
    negatives: Sequence[str]
    neutral: Sequence[str]

    @classmethod
    def of(cls, concept: Concept, neutral: Sequence[str], anti: bool) -> Task:
        """The task of a concept, from pictures with it, or, for `anti`, from neutral pictures without it.

        Raises:
            ValueError: a phrase is also a neutral text, so that its pictures would teach nothing.
        """
        if same := set(concept.phrases) & set(neutral):
            raise ValueError(
                f"Expected neutral texts without the concept {concept.name!r}, got its phrase {min(same)!r}. Give the "
                "concept an `anchor`, or `neutral` texts, that leave the concept out."
            )
        if anti:
            return cls(concept, tuple(neutral), concept.phrases, tuple(neutral))
        return cls(concept, concept.phrases, ("",), tuple(neutral))

    def row(self, n: int) -> tuple[str, str, str]:
        """Prompt, negative prompt and neutral text of picture n."""
        prompts, negatives, neutral = self.prompts, self.negatives, self.neutral
        return prompts[n % len(prompts)], negatives[n % len(negatives)], neutral[n % len(neutral)]


# ---------------------------------------------------------------- pictures


def latents(
    pipe: DiffusionPipeline,
    tasks: Sequence[Task],
    pictures: int,
    *,
    shape: Sequence[int],
    batch: int,
    seed: int,
    call: Mapping[str, Any],
    cache: Path | None,
    tell: Callable[[int, int], None],
) -> Tensor:
    """The latents [K, pictures, C, h, w] that the pipeline draws for each task.

    Args:
        shape: of one picture's latents.
        batch: pictures per pipeline call.
        seed: of the initial noise.
        call: further arguments of the pipeline.
        cache: a safetensors file with which the same call continues after an interruption.
        tell: called with the pictures so far and their number.
    """
    rows = [task.row(n) for task in tasks for n in range(pictures)]
    denoiser = dict(getattr(pipe, family(pipe).denoiser).named_parameters())
    asked = {"rows": rows, "seed": seed, "batch": batch, "call": dict(call)}
    asked |= {"scheduler": [type(pipe.scheduler).__name__, dict(pipe.scheduler.config)]}
    made = torch.zeros(0, *shape)
    identity: dict[str, Any] = {}
    if cache is not None:
        identity = json.loads(json.dumps({**asked, "base": digest(denoiser)}, default=str))
        made = cached(cache, identity, len(rows), made)
    shadow, rng, facts = unobserved(pipe), Generator().manual_seed(seed), family(pipe)
    for k in range(0, len(rows), batch):
        some = rows[k : k + batch]
        noise = torch.randn(len(some), *shape, generator=rng)
        if k < len(made):
            continue
        prompts, negatives = [row[0] for row in some], [row[1] for row in some]
        given = {**call, "negative_prompt": negatives} if any(negatives) or "negative_prompt" in call else call
        with torch.no_grad():
            out = shadow(
                prompts,
                latents=as_called(facts, noise.to(pipe._execution_device, next(iter(denoiser.values())).dtype)),
                generator=Generator().manual_seed(seed + k),
                output_type="latent",
                **given,
            )
        made = torch.cat([made, facts.training_output(out.images, noise).float().cpu()])
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            header = {"fit": json.dumps(identity, sort_keys=True), "done": json.dumps(len(made) == len(rows))}
            files.write_tensors(cache, {"latents": made}, header)
        tell(len(made), len(rows))
    if not made.isfinite().all():
        raise ValueError("Some of the pictures are NaN. Lower `guidance`, or load the model in float32.")
    return made.unflatten(0, (len(tasks), pictures))


def as_called(facts: Family, x: Tensor) -> Tensor:
    """Latents [N, C, h, w] in the form in which the denoiser receives them."""
    args, kwargs = facts.training_call(x, torch.zeros((), device=x.device), {})
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def cached(cache: Path, identity: Mapping[str, Any], rows: int, empty: Tensor) -> Tensor:
    """The latents in the cache; `empty` if there is no cache."""
    if not files.there(cache):
        return empty
    from .. import schema

    away = "Move it away to start the fit again."
    said, tensors = files.read_tensors(cache, away)
    header = {name: files.json_of(said.get(name, "null"), f"`{name}` in {cache}", away) for name in ("fit", "done")}
    schema.check(header, schema.Checkpoint, cache, away)
    files.check_same(header["fit"], identity, f"{cache} has the latents of another fit", CURE)
    found = tensors.get("latents", empty)
    if found.shape[1:] != empty.shape[1:] or not 0 < len(found) <= rows or not found.isfinite().all():
        raise ValueError(f"{cache} has damaged latents, of the shape {list(found.shape)}. {away}")
    return found


# ---------------------------------------------------------------- the denoiser


class Steered(Denoiser):
    """A denoiser that adds a vector to the outputs of modules.

    The number k R + r as a row of the condition stands for vector k with text r of R.

    Args:
        pipe, texts, sampler_steps, precision: as for `Denoiser`.
        modules: names in the denoiser.
        concepts: number of vectors.
        spatial: whether vectors have one number per position, not one per channel.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        texts: Sequence[str],
        modules: Sequence[str],
        concepts: int,
        *,
        spatial: bool,
        precision: Precision,
    ) -> None:
        super().__init__(pipe, texts or ["a"], "x", 1, precision)  # which cannot be none
        self.texts = {"": 0} | {text: k + 1 for k, text in enumerate(texts)}
        self.modules, self.concepts = modules, concepts
        found: dict[str, tuple[int, ...]] = {}
        with torch.no_grad(), self._hooked(lambda name, out: found.update({name: tuple(out.shape[1:])}) or out):
            x = torch.zeros(1, *self.shape, device=self.device, dtype=self.dtype)
            super().__call__(x, torch.zeros(1, device=self.device).long(), torch.zeros(1, device=self.device).long())
        if missing := [name for name in modules if name not in found]:
            raise ValueError(
                f"Expected `at` to name modules that the {self.prefix[:-1]} runs, got {missing[0]!r}. Use a model with "
                'this module, or name others, such as "mid_block".'
            )
        wide = {name: shape if spatial else pooled(shape) for name, shape in found.items()}
        self.shapes = {f"{self.prefix}{name}": (concepts, *wide[name]) for name in modules}

    def student(self) -> dict[str, Tensor]:
        """Zero vectors that require gradients, in float32, by module."""
        zeros = {name: torch.zeros(shape, device=self.device) for name, shape in self.shapes.items()}
        return {name: v.requires_grad_() for name, v in zeros.items()}

    def numbers(self, concept: Tensor, text: Tensor) -> Tensor:
        """The rows of the condition for these vectors and texts."""
        return concept * len(self.texts) + text

    def __call__(self, x: Tensor, t: Tensor, prompt: Tensor, weights: Weights | None = None) -> Tensor:
        """The prediction [N, C, h, w], with the vectors `weights` added, which alone receive gradients."""
        which, text = prompt // len(self.texts), prompt % len(self.texts)
        if weights is None:
            return super().__call__(x, t, text)
        with self._hooked(lambda name, out: out + weights[f"{self.prefix}{name}"][which].to(out.dtype)):
            return super().__call__(x, t, text)

    @contextmanager
    def _hooked(self, act: Callable[[str, Tensor], Any]) -> Iterator[None]:
        """Replaces the outputs of the modules by `act(name, output)`; of text and picture, only the picture's."""
        named = dict(self.module.named_modules())
        hooks, picture = [], self.condition.facts.picture_output

        def changed(name: str, _: Any, __: Any, out: Any) -> Any:
            if isinstance(out, Tensor):
                return act(name, out)
            return (*out[:picture], act(name, out[picture]), *out[picture + 1 :])

        try:
            hooks += [
                named[name].register_forward_hook(partial(changed, name)) for name in self.modules if name in named
            ]
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def noised(self, x: Tensor, t: Tensor, noise: Tensor, rows: Tensor) -> Points:
        """Points at the times t, with the denoiser's target; of flow matching, the velocity from picture to noise."""
        if "flow_training" not in self.condition.facts.offers:
            return super().noised(x, t, noise, rows)
        share = (t.to(x) / self.scheduler.config.num_train_timesteps).reshape(-1, *(1 for _ in x.shape[1:]))
        return Points(torch.lerp(x, noise, share), t, rows, noise - x)

    @torch.no_grad()
    def held_out(self, vectors: Weights, pictures: Tensor, rows: Tensor, seed: int) -> list[float]:
        """The mean loss on pictures [n, C, h, w], without and with the vectors, at fixed noise and times."""
        rng = Generator().manual_seed(seed)
        total = [0.0, 0.0]
        for level in range(LEVELS):
            t = int((level + 0.5) / LEVELS * self.scheduler.config.num_train_timesteps)
            noise = torch.randn(pictures.shape, generator=rng).to(pictures)
            for x, e, r in zip(pictures.split(8), noise.split(8), rows.split(8), strict=True):
                points = self.noised(x, torch.full((len(x),), t, device=x.device), e, r)
                for k, weights in enumerate((None, vectors)):
                    loss = mse(self(points.x, points.t, points.prompt, weights), points.target)
                    total[k] += float(loss) * len(x) / (LEVELS * len(pictures))
        return total


def pooled(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one number per channel: channels are the first dimension of a map, and the last one of tokens."""
    return (1, shape[-1]) if len(shape) == 2 else (shape[0], *(1 for _ in shape[1:]))


def loss(net: Steered, vectors: Weights, points: Points) -> Tensor:
    """The mean squared error of the prediction with the vectors."""
    return mse(net(points.x, points.t, points.prompt, vectors), points.target)
