"""`Tokens`: new words with learned input embeddings, as an artefact in one file; and the training of such words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import Concepts, ConceptsField, Handle, as_concepts
from ..fields import Converted
from . import file, words
from .applied import check_written
from .artefact import Artefact, listed
from .base import check_after, check_values, lacks, origin
from .delta import Delta
from .embeddings import Rows, only_rows_learn, tables

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False, repr=False)
class Tokens(Artefact):
    """New words of a model, with one learned input embedding per word and text encoder.

        E'(i) = E(i) for the n known tokens i <= n,   E'(n + j) = v_j for the new word j

    While the words are applied, prompts, negative prompts and the phrases of concepts may contain them. The text
    encoder's table E stays unchanged bit for bit: the rows v_j are put in by hooks, and the tokenizer is a copy.

    Paper: R. Gal, Y. Alaluf, Y. Atzmon, O. Patashnik, A. H. Bermano, G. Chechik, D. Cohen-Or, 2022, "An Image is Worth
    One Word", ICLR 2023, arXiv 2208.01618, section 4 (textual inversion).

    Differs: any number of words and encoders in one file, which names its base model. The encoder never sees an id that
    its table lacks, so CLIP finds its end token, and with it the pooled state, with any config.

    Args:
        embeddings: tokenizer, such as "tokenizer_2", to the rows v of its text encoder, in the order of `words`.
        words: k different words in angle brackets, such as "<watermark>": lower-case letters, digits and -.,:_*.
        concepts: what the words were learned for.
        method, fields, seed, info: the editor, its fields, its seed, and further facts, as JSON types.
        model, base, versions: the base model, the fingerprints of its tables E by tokenizer, and software.
        after: the deltas of weights that were applied during the fit, hash to strength. They are required.
        delta: changes of weights that belong to the words. They are applied with them.

    Shapes: each tensor of `embeddings` [k, D] in float32, with the D of its text encoder.

    Raises:
        ValueError: a word has another form or occurs twice, or embeddings have another number of rows or are not
            finite. On `apply`: the base model differs; a text encoder has no embeddings here (T5 of SD 3 and FLUX, if
            the words were fitted without it), or is compiled; a tokenizer knows a word already; or the encoder is
            shared with another pipeline that has new words. On `remove`: an applied eraser reads one of the words.
        RuntimeError: other code changed the tokenizer while the words were applied.
        TypeError: the family of the pipeline is unknown.

    Example:
        >>> import efface, torch
        >>> pipe = efface.load("emoji")
        >>> cat = efface.Tokens.fitted(None, pipe, {"tokenizer": torch.randn(1, 384)}, ("<pet>",), "cat")
        >>> with cat.apply(pipe):
        ...     image = pipe("a <pet>", negative_prompt="a dog", num_inference_steps=2).images[0]
        >>> cat
        Tokens(<pet>, base model 'emoji')
    """

    _kind: ClassVar[str] = file.TOKENS
    _apart: ClassVar[tuple[str, ...]] = ("embeddings", "delta")
    off: ClassVar[Mapping[str, Any] | None] = None
    touches_uncond: ClassVar[bool] = True

    embeddings: Mapping[str, Tensor]
    words: Converted[Sequence[str], tuple[str, ...]] = Converted(())
    concepts: ConceptsField = Converted(())
    _: KW_ONLY
    method: str = "tokens"
    delta: Delta | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", words.check_words(self.words))
        object.__setattr__(self, "concepts", as_concepts(self.concepts))
        if not self.embeddings:
            raise ValueError("Expected the embeddings of at least one text encoder, got none. Fit them with an editor.")
        for name, rows in self.embeddings.items():
            if rows.ndim != 2 or len(rows) != len(self.words):
                raise ValueError(
                    f"Expected {len(self.words)} rows for {name!r}, one per word, got the shape {list(rows.shape)}. "
                    "Give a tensor [words, width]."
                )
            if not bool(rows.isfinite().all()):
                raise ValueError(f"The embeddings of {name!r} are not finite. Fit them again with a lower `lr`.")

    @classmethod
    def fitted(
        cls,
        editor: Any,
        pipe: DiffusionPipeline,
        embeddings: Mapping[str, Tensor],
        words: Sequence[str],
        concepts: Concepts,
        *,
        seed: int = 0,
        info: Mapping[str, Any] | None = None,
        delta: Delta | None = None,
    ) -> Tokens:
        """Makes the tokens that an editor returns, for the model of `pipe`.

        Args:
            editor: the editor, a dataclass; None for words that were made by hand.
            pipe, concepts, seed, info: as for `Delta.fitted`.
            embeddings, words, delta: as in `Tokens`.

        Raises:
            ValueError: as `Tokens`, or an encoder of the pipeline has no input embeddings in memory.
        """
        known = tables(pipe)
        own = {name: known[name] for name in embeddings if name in known}
        made = origin(editor, pipe, own, seed=seed, info=info)
        made["method"] = made["method"] or "tokens"
        return cls(
            {name: rows.detach().to("cpu", torch.float32).contiguous() for name, rows in embeddings.items()},
            words,
            as_concepts(concepts),
            delta=delta,
            **made,
        )

    def __repr__(self) -> str:
        """One line: method, words, base model."""
        method = "" if self.method == "tokens" else self.method
        return self._line(method, listed(self.words), "" if self.delta is None else "with changed weights")

    # ---- on a pipeline

    def apply(self, pipe: DiffusionPipeline) -> Handle:
        """Makes the words readable immediately. The handle removes them, and is also a context manager."""
        check_written(pipe)
        self.check(pipe)
        changed = None if self.delta is None else self.delta.apply(pipe)
        try:
            words.put(pipe, self)
        except BaseException:
            if changed is not None:
                changed.remove()
            raise
        return words.handle(pipe, self)

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raises ValueError unless the words fit the pipeline's model. See `Tokens`."""
        words.check_new(pipe, self.words, self.embeddings)
        if what := lacks(self.base, self.embeddings):
            raise ValueError(
                f"The words do not identify their base model, because `base` has no hash of {what}. Make them with an "
                "editor, or with `Tokens.fitted`."
            )
        check_values(
            pipe, {name: each for name, each in tables(pipe).items() if name in self.embeddings}, self.base, self.model
        )
        check_after(pipe, self.after)

    # ---- files

    def _told(self) -> Sequence[Any]:
        return self.words, self.delta.hash if self.delta else ""

    def _header(self) -> dict[str, Any]:
        inner = {} if self.delta is None else {"delta": self.delta._header() | {"format": file.FORMAT}}
        return super()._header() | inner

    def save(self, path: str | Path) -> None:
        weights = {} if self.delta is None else self.delta.weights
        file.save(path, {**self.embeddings, **weights}, self._header())

    @classmethod
    def _read(cls, tensors: Mapping[str, Any], **header: Any) -> Tokens:
        facts, inner = dict(header), header.get("delta")
        if inner is not None:
            kept = {name: value for name, value in inner.items() if name != "format"}
            weights = {name: change for name, change in tensors.items() if "." in name}
            facts["delta"] = Delta(weights, **kept | {"concepts": header["concepts"]})
        rows = {name: rows for name, rows in tensors.items() if "." not in name}
        return cls(rows, facts.pop("words"), **facts)


@dataclass(frozen=True, eq=False)
class Learned:
    """Words during their training: `embeddings` are the parameters, and all that gradients reach.

    Shapes: each of `embeddings` [k, D].
    """

    words: tuple[str, ...]
    embeddings: Mapping[str, nn.Parameter]


@contextmanager
def learning_words(pipe: DiffusionPipeline, new: Sequence[str], start: Rows) -> Iterator[Learned]:
    """Inside the block the pipeline reads new words, whose embeddings are parameters in float32.

    All weights of the pipeline are frozen, so gradients reach only these parameters. Encode texts with
    `_text.encode(..., differentiable=True)`.

    Args:
        pipe: the pipeline, unchanged after the block, also after an exception.
        new: the words.
        start: the first embeddings [k, D] by tokenizer, such as from `embeddings.mean_row`.

    Raises:
        ValueError: as `Tokens` on `apply`.
        RuntimeError: an embedding of a known word changed.
    """
    with only_rows_learn(pipe, start) as rows:
        learned = Learned(words.check_words(new), rows)
        words.put(pipe, learned)
        try:
            yield learned
        finally:
            for held in words.vocabularies(pipe).values():
                held.take(pipe, learned)
