"""GeomErasing: learns where a concept is that no prompt names, as location words for the negative prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from torch import Tensor

from .. import checks
from .._weights import digest, learning
from ..core import Concept, Concepts, config
from ..delta import Delta, Tokens
from ..delta.embeddings import tables
from ..delta.tokens import learning_words
from ._denoiser import Precision, Train
from ._examples import detected, given, read
from ._geometry import Encoding, Grid, start
from ._located import Data, Located, drawing, picture_size, weighted
from ._redrawing import Redrawn, redraw
from ._settings import FamilyDefaults, Training, phrases
from ._training import run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["GeomErasing"]

Setting = Literal["model", "data"]
Form = Literal["name", "all"]


@dataclass(frozen=True)
class GeomErasing(FamilyDefaults):
    """Binds a concept that prompts never mention, such as a watermark, to words for its places in the picture.

        v, theta = argmin E [ w (.) || e - e_theta(z_t, t, c(y')) ||^2 ],    y' = y, name <l_mn> ... for covered bins

    The negative prompt "name <l_00> <l_10> ..." then removes the concept. The setting "model" cleans a model: it learns
    only the words v. The setting "data" trains on pictures with the concept, without learning it: words and weights.

    Paper: Z. Liu, K. Chen, Y. Zhang, J. Han, L. Hong, H. Xu, Z. Li, D.-Y. Yeung, J. Kwok, 2024, "Implicit Concept
    Removal of Diffusion Models", ECCV 2024, arXiv 2310.05873. Its text was available in notes only, so there are no
    equation numbers.

    Differs: the authors published no code, and the grid, a, learning rates, steps and the composition of the negative
    prompt are not known: all defaults here are ours. `encoding="corners"` names two bins per box. The negative prompt
    has only the words that occurred in the training. Weights have mean 1 over the latent positions of each picture.

    Args:
        data: a folder of pictures with metadata.jsonl: one line {"file_name", "text", "boxes"} per picture. `boxes` are
            [left, top, right, bottom] in pixels, [] without the concept. "" if `fit` gets `examples`.
        setting: "model" trains the words only, "data" also the denoiser's weights.
        encoding: "bins" names every bin that a box covers (the paper), "corners" the first and the last.
        grid: bins in each direction, >= 1. None: the family's default, as for `steps`, `lr` and `lr_weights`.
        ratio: a > 0, the weight outside of the boxes relative to that inside. 1 is the plain loss.
        threshold: boxes of a detector with a lower score are left out, in [0, 1].
        dropout: share of training texts that are empty, in [0, 1), for the unconditional prediction.
        flip: whether each picture also trains mirrored, with its boxes.
        negative: what the result's concept writes into a negative prompt: "all" the name and all learned words, "name"
            the name alone. `two_pass` writes the words where a detector finds the concept.
        steps: updates, >= 1.
        lr: learning rate of AdamW for the words, > 0.
        lr_weights: the same for the weights, > 0.
        batch: pictures per update, >= 1.
        weight_decay: of the weights, >= 0; the words have none.
        clip: largest norm of the gradient; 0 means no clipping.
        train: which weights train, as for ESD: "full" everything.
        precision: "auto", "float32" or "bfloat16" (autocast; words stay float32).

    Shapes: pictures [3, S, S], latents z_t [B, C, h, w], weights w [B, 1, h, w], words v [grid * grid, D].

    Raises:
        ValueError: a field is out of range; there is not one concept; a box lies outside of its picture; the concept is
            in no picture; a picture or metadata.jsonl cannot be read; a caption with its location words, or the
            negative prompt, does not fit the text encoder; a tokenizer already knows a location word; the pipeline's
            denoiser cannot be trained, or has run-time erasers.
        FileNotFoundError: the folder or its metadata.jsonl is missing.
        TypeError: the family of the pipeline is unknown, or examples are not tuples.
        RuntimeError: the loss is not finite.

    Example:
        >>> import efface, torch
        >>> pipe = efface.load("emoji")
        >>> pictures = [(torch.rand(3, 64, 64), "a cat", [(2, 2, 35, 15)]), (torch.rand(3, 64, 64), "a dog", [])]
        >>> tokens = efface.GeomErasing(steps=2, batch=2).fit(pipe, "watermark", examples=pictures)
        >>> with efface.stack(pipe, tokens, efface.NegativePrompt(tokens.concepts)):
        ...     image = pipe("a cat", num_inference_steps=2).images[0]
        >>> list(tokens.concepts[0].phrases)
        ['watermark <watermark:0,0> <watermark:1,0> <watermark:2,0>']
    """

    needs: ClassVar[tuple[str, ...]] = ("training", "learned_words")
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"grid": 4, "steps": 300, "lr": 1e-2, "lr_weights": 1e-4},
        "": {"grid": 8, "steps": 3000, "lr": 1e-3, "lr_weights": 1e-5},
    }

    data: str = ""
    setting: Setting = "model"
    encoding: Encoding = "bins"
    grid: int | None = None
    ratio: float = 2.0
    threshold: float = 0.5
    dropout: float = 0.1
    flip: bool = False
    negative: Form = "all"
    steps: int | None = None
    lr: float | None = None
    lr_weights: float | None = None
    batch: int = 8
    weight_decay: float = 1e-2
    clip: float = 1.0
    train: Train = "full"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        checks.text("data", self.data, empty=True)
        named = {"setting": Setting, "encoding": Encoding, "negative": Form, "train": Train, "precision": Precision}
        for name, known in named.items():
            checks.choice(name, getattr(self, name), get_args(known))
        checks.choice("flip", self.flip, (True, False))
        checks.each(self, checks.whole, "grid", "steps", "batch")
        checks.each(self, checks.number, "lr", "lr_weights", "ratio", least=0, above=True)
        checks.each(self, checks.share, "threshold")
        checks.each(self, checks.number, "dropout", least=0, most=1, below=True)
        checks.each(self, checks.number, "weight_decay", "clip", least=0)

    @classmethod
    def data_removal(cls, data: str = "", **fields: Any) -> Self:
        """Trains on the pictures of a folder without learning the concept in them."""
        return cls(data=data, setting="data", **fields)

    @learning()
    def fit(
        self,
        pipe: DiffusionPipeline,
        concepts: Concepts,
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        detector: Callable[[Tensor], Any] | None = None,
        examples: Iterable[Any] | None = None,
    ) -> Tokens:
        """Returns the location words, with changed weights in the setting "data". Leaves `pipe` unchanged.

        Args:
            pipe: the pipeline. Its deltas are part of the model.
            concepts: one concept. Its first phrase is the name in captions and negative prompts.
            seed: seed of all random numbers.
            checkpoint: a safetensors file with which the same call continues after an interruption.
            detector: finds the concept in pictures [1, 3, H, W]. It is a function that returns a list of boxes per
                picture, or has a method `boxes` that does; a fifth number of a box is its score. For an
                `efface.Detector` without boxes, the box is the whole picture. It replaces the boxes of the data.
            examples: tuples (picture, text, boxes) in place of `data`. A picture is a PIL image or [3, H, W] in [0, 1].
        """
        method = self.resolved(pipe)
        found, _ = phrases(pipe, concepts)
        if len(found) != 1:
            cure = "Fit each concept alone, and apply the results together."
            raise ValueError(f"Expected one concept, because boxes belong to one, got {len(found)}. {cure}")
        if bool(self.data) == (examples is not None):
            raise ValueError("Expected pictures from either `data`, a folder, or `examples`. Give one of the two.")
        pictures = read(Path(self.data)) if examples is None else given(examples)
        pictures = detected(pictures, detector, self.threshold)
        grid = Grid(found[0].phrases[0], method.grid or 1, self.encoding)
        begin = {name: start(grid.bins, table) for name, table in tables(pipe).items()}
        with learning_words(pipe, grid.words, begin) as words:
            return method._trained(pipe, found[0], pictures, grid, words.embeddings, seed, checkpoint)

    def _trained(
        self,
        pipe: DiffusionPipeline,
        concept: Concept,
        pictures: Sequence[Any],
        grid: Grid,
        words: Mapping[str, Any],
        seed: int,
        checkpoint: str | Path | None,
    ) -> Tokens:
        size = picture_size(pipe)
        data = Data(pipe, pictures, grid, size=size, ratio=self.ratio, flip=self.flip)
        trains, lr = self.setting == "data", self.lr or 0.0
        net = Located(pipe, data.texts, words, trains_weights=trains, train=self.train, precision=self.precision, lr=lr)
        settings = Training(
            steps=self.steps,
            lr=self.lr_weights,
            batch=self.batch,
            reuse=1,
            clip=self.clip,
            weight_decay=self.weight_decay,
        )
        state = run(
            net,
            settings,
            drawing(net, data, self.batch, self.dropout),
            lambda student, points, _: weighted(net, student, points),
            seed=seed,
            name="GeomErasing",
            identity={**config(self), "texts": data.texts, "pictures": digest({"latents": data.latents})},
            checkpoint=checkpoint,
        )
        negative = " ".join([grid.name, *(data.used if self.negative == "all" else ())])
        result = (Concept(concept.name, (negative,), concept.anchor, concept.keep),)
        info = {**state.info(), "name": grid.name, "size": list(size), "used": data.used}
        info |= {"pictures": len(data.texts), "with the concept": data.dirty}
        delta = Delta.fitted(self, pipe, net.change(state.student), result, seed=seed) if trains else None
        return Tokens.fitted(self, pipe, words, grid.words, result, seed=seed, info=info, delta=delta)

    @staticmethod
    def two_pass(
        pipe: DiffusionPipeline,
        tokens: Tokens,
        prompts: Sequence[str],
        detector: Callable[[Tensor], Any],
        *,
        seeds: Sequence[int],
        **call: Any,
    ) -> Redrawn:
        """Draws pictures, and draws those again in which the detector finds the concept, with its places negated.

        A picture that is drawn again has the same seed, and the negative prompt "name <l_mn> ..." of its own boxes,
        before the call's own.

        Args:
            pipe: the pipeline, with `tokens` applied.
            tokens: the result of `fit`.
            prompts: N prompts.
            detector: as for `fit`.
            seeds: N seeds.
            call: further arguments of the pipeline, such as `num_inference_steps`.

        Raises:
            ValueError: the tokens are not applied, or of another editor; guidance is off; the numbers of prompts and
                seeds differ, or the sizes of the pictures and of the fit; or a negative prompt is too long.
        """
        return redraw(pipe, tokens, prompts, detector, seeds, call)
