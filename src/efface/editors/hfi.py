"""HFI: learns a word from pictures that people judged, to erase what no word describes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from torch import Tensor

from .. import checks, files, registry
from .._latents import latents_of
from .._text import check_phrases
from .._weights import learning
from ..core import Concept, Concepts, as_concepts, check_pictures, config
from ..delta import Delta
from ..delta.embeddings import mean_row
from ..delta.tokens import Tokens
from ..fields import Converted
from ._denoiser import Precision
from ._inversion import invert
from ._judged import Judged, best, judged
from ._settings import FamilyDefaults

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["HFI"]

TOGETHER = 16  # pictures that the VAE encodes together


@dataclass(frozen=True)
class HFI(FamilyDefaults):
    """Human Feedback Inversion: people judge pictures, and a new word learns what they mean.

        v* = argmin_v E_{x, e, t} r(x) || y(z_0, e, t) - e_theta(z_t, t, tau(template with v)) ||^2
        r(x) >= 0 with mean 1: how much of the concept x shows, from a reward model of people's judgements

    x are the pictures with the highest rewards, z_0 their latents, and y what the denoiser learns to predict (noise, v
    or the picture). Only the input embedding of the word is trained. The result makes the word readable: then erase it
    by name, with any method, as in `efface.SLD(efface.Concept("party drinks", ["<party-drinks>"]))`.

    Paper: S. Kim, S. Jung, B. Kim, M. Choi, J. Shin, J. Lee, 2024, "Safeguard Text-to-Image Diffusion Models with Human
    Feedback Inversion", ECCV 2024, arXiv 2407.21032. There are no equation numbers, because the text of the paper was
    not available.

    Differs: the authors published neither their code nor the judgements, so no figure of theirs can be compared. The
    inversion is written from a description, with the settings of textual inversion. K (`top`) and the architecture of
    the reward model are ours. Each reward comes from a network that did not see the picture's judgements; a reward
    model that does no better than chance on held-out pictures is refused. Batches are drawn from the pictures with a
    reward above 0, and rewards have mean 1 over these pictures, not within each batch.

    Args:
        pictures: the folder with the judged pictures; a run folder works too. Others in it compete for `top` as well.
        feedback: the store of judgements, or a reward model that `efface feedback reward` made.
        encoder: the frozen encoder of pictures for the reward: "emoji", or the folder or hub id of a CLIP model. None:
            the family's default, as for `steps`, `lr` and `batch`.
        word: the new word, in angle brackets. "": made from the concept's name.
        vectors: number of input embeddings, >= 1; more than 1 makes as many words, "<word-1> <word-2>".
        initial: the text whose mean embedding is the start. "": the concept's first phrase.
        top: K, the number of pictures with the highest rewards that train, >= 1.
        steps: updates, >= 0.
        lr: learning rate of AdamW, constant, without weight decay.
        batch: pictures per update.
        templates: texts with "{}" for the word, in turn at random.
        precision: "auto", "float32" or "bfloat16" (autocast; the embedding stays float32).
        removal: an editor, such as "esd" or "sdd", that erases the word afterwards with its default settings. The
            result then also changes weights. "": learns the word only.

    Shapes: embeddings [vectors, D] for each text encoder; latents [B, C, h, w].

    Raises:
        ValueError: a field is out of range; there is no feedback on the concept, or it does not tell pictures apart;
            the reward model is not better than chance, or of another encoder or concept; the pictures are not of the
            size that the model draws; the pipeline has run-time erasers; or the checkpoint belongs to another fit.
        FileNotFoundError: the store or the pictures do not exist.
        TypeError: the family of the pipeline is unknown.
        RuntimeError: the loss is not finite.

    Example:
        >>> import efface, torch
        >>> pipe = efface.load("emoji")
        >>> pictures, rewards = torch.rand(4, 3, 64, 64), torch.tensor([0.9, 0.8, 0.1, 0.0])
        >>> fit = efface.HFI(steps=2, batch=1)
        >>> drinks = fit.invert(pipe, pictures, rewards, efface.Concept("party drinks"))
        >>> drinks.words
        ('<party-drinks>',)
        >>> with drinks.apply(pipe), efface.SLD(efface.Concept("party drinks", ["<party-drinks>"])).apply(pipe):
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[Mapping[str, Any] | None] = None
    needs: ClassVar[tuple[str, ...]] = ("training", "learned_words")
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"encoder": "emoji", "steps": 200, "lr": 5e-3, "batch": 8},
        "": {"encoder": "openai/clip-vit-large-patch14", "steps": 3000, "lr": 5e-4, "batch": 4},
    }

    pictures: str = ""
    feedback: str = "labels.db"
    encoder: str | None = None
    word: str = ""
    vectors: int = 1
    initial: str = ""
    top: int = 100
    steps: int | None = None
    lr: float | None = None
    batch: int | None = None
    templates: Converted[str | Sequence[str], tuple[str, ...]] = Converted(("{}", "a photo of {}"))
    precision: Precision = "auto"
    removal: str = ""

    def __post_init__(self) -> None:
        for name in ("pictures", "feedback"):
            object.__setattr__(self, name, str(getattr(self, name)))
        for name in ("pictures", "feedback", "word", "initial", "removal"):
            checks.text(name, getattr(self, name), empty=True)
        checks.each(self, checks.whole, "steps", least=0)
        checks.each(self, checks.whole, "vectors", "top", "batch")
        checks.each(self, checks.number, "lr", least=0, above=True)
        checks.choice("precision", self.precision, get_args(Precision))
        given = self.templates
        object.__setattr__(self, "templates", checks.texts("templates", [given] if isinstance(given, str) else given))
        if not self.templates or any(each.split().count("{}") != 1 or each.count("{") != 1 for each in self.templates):
            cure = 'Write for example ("a photo of {}",).'
            raise ValueError(checks.refusal('`templates` with one separate "{}" each', self.templates, cure))
        if self.removal:
            cls: Any = registry.resolve(registry.split(self.removal)[0], "editors")
            if cls.fit.__annotations__.get("return", "Delta") not in ("Delta", Delta):
                cure = "Give for example 'esd'."
                raise ValueError(checks.refusal("`removal` to be an editor of weights", self.removal, cure))

    def words(self, concept: Concept) -> tuple[str, ...]:
        """The new words for a concept."""
        named = self.word.strip("<>") or re.sub("[^a-z0-9]+", "-", concept.name.lower()).strip("-") or "concept"
        if self.vectors == 1:
            return (f"<{named}>",)
        return tuple(f"<{named}-{k}>" for k in range(1, self.vectors + 1))

    @learning()
    def fit(
        self, pipe: DiffusionPipeline, concepts: Concepts, *, seed: int = 0, checkpoint: str | Path | None = None
    ) -> Tokens:
        """Returns the word that people's judgements of one concept describe. Leaves `pipe` unchanged.

        Args:
            pipe: the pipeline. Its deltas are part of the model.
            concepts: one concept, by the name under which it was judged.
            seed: seed of all random numbers.
            checkpoint: a safetensors file with which the same call continues after an interruption.
        """
        method, concept = self.resolved(pipe), _only(concepts)
        found = judged(self.pictures, self.feedback, method.encoder or "", concept, self.top, seed)
        return method._inverted(pipe, found, concept, seed, checkpoint)

    @learning()
    def invert(
        self,
        pipe: DiffusionPipeline,
        pictures: Tensor,
        rewards: Tensor,
        concepts: Concepts,
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
    ) -> Tokens:
        """As `fit`, for given rewards. Equal rewards make plain textual inversion.

        Args:
            pipe, concepts, seed, checkpoint: as in `fit`.
            pictures: [N, 3, H, W] in [0, 1].
            rewards: [N], at least 0.
        """
        method, concept = self.resolved(pipe), _only(concepts)
        if rewards.ndim != 1 or len(rewards) != len(pictures):
            got = f"{list(rewards.shape)} for {len(pictures)} pictures"
            raise ValueError(f"Expected one reward per picture, got {got}. Give a tensor [N].")
        chosen = best(rewards, self.top)
        found = Judged(check_pictures(pictures)[chosen], rewards[chosen], {})
        return method._inverted(pipe, found, concept, seed, checkpoint)

    def _inverted(
        self, pipe: DiffusionPipeline, found: Judged, concept: Concept, seed: int, checkpoint: str | Path | None
    ) -> Tokens:
        """The word of pictures with rewards, and the removal stage if there is one."""
        rewards = found.rewards
        words, initial = self.words(concept), self.initial or concept.phrases[0]
        check_phrases(pipe, [initial])
        if len(rewards) > 1 and 0 < float(rewards.max()) == float(rewards.min()):
            checks.warn(
                f"All {len(rewards)} pictures have the same reward, so the judgements weigh none of them. This is "
                "plain textual inversion."
            )
        latents = torch.cat(
            [latents_of(pipe, some.to(pipe._execution_device)) for some in found.pictures.split(TOGETHER)]
        )
        made = invert(
            pipe,
            latents.float(),
            rewards.to(latents.device, torch.float32),
            words,
            mean_row(pipe, initial, self.vectors),
            templates=self.templates,
            steps=self.steps or 0,
            lr=self.lr or 0.0,
            batch=self.batch or 1,
            precision=self.precision,
            seed=seed,
            identity={**config(self), "concept": concept.name, "pictures of": _hash(latents, rewards)},
            checkpoint=checkpoint,
        )
        named = Concept(concept.name, (" ".join(words),), concept.anchor, concept.keep)
        tokens = Tokens.fitted(self, pipe, made.rows, words, named, seed=seed, info={**made.info, **found.facts})
        if not self.removal:
            return tokens
        name, preset = registry.split(self.removal)
        cls = registry.resolve(name, "editors")
        editor = registry.presets(cls)[preset]() if preset else cls()
        with tokens.apply(pipe):
            return replace(tokens, delta=editor.fit(pipe, named, seed=seed))


def _only(concepts: Concepts) -> Concept:
    found = as_concepts(concepts)
    if len(found) != 1:
        what = "at least one concept" if not found else "one concept"
        raise ValueError(f"Expected {what}, got {len(found)}. Learn one word per concept, and apply them together.")
    return found[0]


def _hash(*tensors: Tensor) -> str:
    return files.sha256(b"".join(each.detach().cpu().float().contiguous().numpy().tobytes() for each in tensors))
