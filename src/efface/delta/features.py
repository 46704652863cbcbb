"""`Directions`: learned vectors that a pipeline's denoiser adds to outputs of its modules, as an eraser in one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from inspect import BoundArguments
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from .._weights import digest
from ..core import Concept, Concepts, ConceptsField, Handle, RowsField, as_concepts
from ..fields import Converted, computed
from ..hooks import DenoiserCall, Memory, Method
from . import file, table
from .applied import check_written
from .base import Base, base_hash, check_after, common_base, origin, own_values

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FACTS = ("method", "fields", "seed", "model", "versions", "info", "strength", "window", "shares", "base", "after")


@dataclass(frozen=True, eq=False, repr=False)
class Directions(Method):
    """Adds one learned vector per concept to the output h of named modules, on the conditional rows.

        h <- h + strength sum_k w_k c_k            w_k: 1 if concept k acts on the row, 0 otherwise

    All concepts act on every row by default. `fair` draws one per picture, `rows` names those of each prompt, and
    `enhancing` asks a function of the prompt.

    Paper: H. Li, C. Shen, P. Torr, V. Tresp, J. Gu, 2024, "Self-Discovering Interpretable Diffusion Latent Directions
    for Responsible Text-to-Image Generation", CVPR 2024, arXiv 2311.17216. Its equations were not available, so there
    are no equation numbers: the formula is that of the abstract and of the authors' code.

    Differs: the authors add vectors to the mid block of Stable Diffusion 1.4 only, and for one picture per call. Here
    any batch works, guided or not. Other modules than a UNet's mid block, such as "transformer.transformer_blocks.4",
    are an extension of Efface, which the paper did not test. The paper's function from prompts to concepts was not
    published, so `enhancing` takes yours.

    Args:
        vectors: module, such as "unet.mid_block", to its vectors c: one per concept, in their order.
        concepts: the K concepts of the vectors. For safety vectors (`anti`), the concepts to avoid.
        strength: >= 0, the factor on all vectors; 1 is the paper's, 0 the base model.
        window: (start, end), the part of the trajectory with the edit: 0 is pure noise, 1 the picture. Paper: (0, 1).
        rows: one list of concepts per prompt of the batch, instead of all concepts for each.
        shares: K shares >= 0 that sum to 1: each picture gets one concept, drawn from its initial noise. See `fair`.
        extractor: maps a prompt to the concepts that act on it. See `enhancing`.
        method, fields, seed, info: the editor, its fields, its seed, and further facts, as JSON types.
        model, base, versions: the base model, the fingerprints of the modules' weights, and software, as in `Delta`.
        after: the deltas of weights that were applied during the fit, hash to strength. They are required.

    Shapes: vectors [K, C, h, w], [K, C, 1, 1] for any picture size, or [K, Q, C] and [K, 1, C] for modules that return
    tokens. h [B, C, h, w] or [B, Q, C]: the conditional rows; text tokens of joint attention stay unchanged.

    Raises:
        ValueError: a field is out of range; a vector has another number of concepts, or is not finite; or more than one
            of `rows`, `shares` and `extractor` is given. On `apply`: a vector is zero, the base model differs, a module
            or a delta of `after` is missing. In a call: the pictures have another size than those of the fit; or
            `shares` or `extractor` meet a direct denoiser call, and `extractor` embeddings.
        RuntimeError: a module did not run in a denoiser call.
        TypeError: the family of the pipeline is unknown, or `extractor` is not callable.

    Example:
        >>> import efface
        >>> pipe, dog = efface.load("emoji"), efface.Concept("dog", ["a dog"], anchor="a cat")
        >>> fit = efface.LatentDirections(pictures=2, steps=2, batch=2, sampler_steps=2)
        >>> directions = fit.fit(pipe, [dog])
        >>> with directions.apply(pipe) as handle:
        ...     handle.strength = 0.5
        ...     image = pipe("a cat", num_inference_steps=2).images[0]
        >>> handle.record["rows"]
        {'0': 2}
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    touches_uncond: ClassVar[bool] = False
    steers: ClassVar[tuple[str, ...]] = computed(lambda self: tuple(n.partition(".")[2] for n in self.vectors))

    vectors: Mapping[str, Tensor]
    concepts: ConceptsField = Converted(())
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    rows: RowsField = Converted(None)
    shares: Converted[Sequence[float] | None, tuple[float, ...] | None] = Converted(None)
    extractor: Callable[[str], Concepts] | None = None
    method: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    model: str = ""
    base: Base = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        table.check_vectors(self.vectors, self.concepts)
        self._known([concept for row in self.rows or () for concept in row])
        if sum(each is not None for each in (self.rows, self.shares, self.extractor)) > 1:
            raise ValueError("Expected one of `rows`, `shares` and `extractor`, got several. Leave out all but one.")
        if self.extractor is not None and not callable(self.extractor):
            raise TypeError(checks.refusal("`extractor` to be a function of a prompt", self.extractor, "Give one."))
        if self.shares is not None:
            object.__setattr__(self, "shares", table.shares_of(self.shares, self.names))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the concepts."""
        return tuple(concept.name for concept in self.concepts)

    def _known(self, concepts: Concepts) -> tuple[Concept, ...]:
        """These concepts. Raises ValueError if one has no vector."""
        found = as_concepts(concepts, self.concepts)
        if unknown := [concept.name for concept in found if concept not in self.concepts]:
            raise ValueError(f"{checks.shown(unknown[0])} has no vector. Known: {', '.join(self.names)}.")
        return found

    @classmethod
    def fitted(
        cls,
        editor: Any,
        pipe: DiffusionPipeline,
        vectors: Mapping[str, Tensor],
        concepts: Concepts,
        *,
        seed: int = 0,
        info: Mapping[str, Any] | None = None,
        **use: Any,
    ) -> Directions:
        """Makes the directions that an editor returns, for the model of `pipe` with the applied deltas.

        Args:
            editor, pipe, concepts, seed, info: as for `Delta.fitted`.
            vectors: as in `Directions`.
            use: the fields `strength`, `window` and `shares`.

        Raises:
            ValueError: the pipeline lacks a module, or the vectors are not as in `Directions`.
        """
        return cls(
            {name: v.detach().to("cpu", torch.float32).contiguous() for name, v in vectors.items()},
            as_concepts(concepts),
            **origin(editor, pipe, own_values(pipe, table.weights_of(pipe, vectors)), seed=seed, info=info),
            **use,
        )

    def __repr__(self) -> str:
        """One line: method, concepts, strength, shapes and modules, base model."""
        names = ", ".join(self.names[:3]) + (f" and {len(self.names) - 3} more" if len(self.names) > 3 else "")
        where = ", ".join(f"{list(v.shape[1:])} at {name}" for name, v in self.vectors.items())
        shown = (self.method, names, f"strength {self.strength:g}", where)
        return f"Directions({', '.join(shown)}, base model {self.model or 'unknown'!r})"

    # ---- how the vectors are used

    def fair(self, shares: Mapping[str, float] | Sequence[float] | None = None) -> Directions:
        """Each picture gets one concept, drawn from its initial noise: equal seeds draw the same concept.

        The draw does not depend on the prompt, the batch or the device, and differs between sets of concepts.

        Args:
            shares: a share per concept, in order or by name; they sum to 1. None: equal shares.
        """
        return replace(self, shares=table.shares_of(shares, self.names))

    def enhancing(self, extractor: Callable[[str], Concepts]) -> Directions:
        """Each prompt gets the concepts that `extractor` returns for it: names, `Concept` objects, or none."""
        return replace(self, extractor=extractor)

    def only(self, concepts: Concepts) -> Directions:
        """The directions of some of the concepts, without `rows` and `shares`."""
        some = self._known(concepts)
        which = [self.concepts.index(concept) for concept in some]
        chosen = {name: v[which] for name, v in self.vectors.items()}
        return replace(self, vectors=chosen, concepts=some, rows=None, shares=None)

    # ---- on a pipeline

    def apply(self, pipe: DiffusionPipeline) -> Handle:
        check_written(pipe)
        table.check_model(pipe, self.vectors, self.base, self.model)
        check_after(pipe, self.after)
        return super().apply(pipe)

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raises ValueError if a vector is zero, the denoiser lacks a module, or is compiled and `shares` are drawn."""
        super().check(pipe)
        table.weights_of(pipe, self.vectors)
        table.check_not_zero(self.vectors, self.names)
        if self.shares is not None:
            table.check_not_compiled(pipe)

    def rewrite(
        self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], call: BoundArguments, memory: Memory
    ) -> tuple[Any, ...]:
        if self.extractor is not None:
            prompts = call.arguments["prompt"]
            if prompts is None:
                raise ValueError("The extractor reads prompts, but this call has embeddings. Give prompts, or `rows`.")
            prompts, n = [prompts] if isinstance(prompts, str) else prompts, call.arguments["num_images_per_prompt"]
            memory["concepts"] = [row for prompt in prompts for row in [self._known(self.extractor(prompt))] * n]
        return encoded

    def around(self, call: DenoiserCall, forward: Callable[[], Any]) -> Any:
        per_picture = self.shares is not None or self.extractor is not None
        if per_picture and call.pipe is None:
            raise ValueError(table.DIRECT_CALL)
        if self.shares is not None and len(call.prompt) and "concepts" not in call.memory:
            noise = call.sample[call.first : call.first + len(call.prompt)]
            call.memory["concepts"] = [(self.concepts[k],) for k in table.drawn(noise, self.shares, self.names)]
        return forward()

    def steered_concepts(
        self, row_concepts: Sequence[tuple[Concept, ...]], memory: Memory
    ) -> Sequence[tuple[Concept, ...]]:
        found: Sequence[tuple[Concept, ...]] = memory.get("concepts", row_concepts)
        return found

    def steer(self, out: Tensor, module: str, row_concepts: Sequence[tuple[Concept, ...]], memory: Memory) -> Tensor:
        name = next(name for name in self.vectors if name.partition(".")[2] == module)
        vectors, key = self.vectors[name], f"{name} on {out.device}"
        if torch.compiler.is_compiling():  # what it reads of the memory would be compiled anew in each call
            vectors = vectors.to(out.device, torch.float32)
        else:
            vectors = memory.setdefault(key, memory.get(key, vectors).to(out.device, torch.float32))
        table.check_shape(name, vectors.shape[1:], out.shape[1:])
        which = [tuple(k for k, concept in enumerate(self.concepts) if concept in row) for row in row_concepts]
        change = self.strength * table.summed(vectors, which)
        if "measured" not in memory and not torch.compiler.is_compiling():
            memory["measured"] = True
            table.warn_if_large(change.expand(out.shape), out)
        return out + change.to(out.dtype)

    # ---- arithmetic

    def __mul__(self, by: float) -> Directions:
        if isinstance(by, bool) or not isinstance(by, (int, float)):
            return NotImplemented
        return replace(self, vectors={name: by * v for name, v in self.vectors.items()})

    __rmul__ = __mul__

    def __neg__(self) -> Directions:
        return self * -1.0

    def __add__(self, other: Directions) -> Directions:
        """The directions of the concepts of both, at their current strengths. Vectors of equal concepts are added.

        Raises:
            ValueError: base models, modules, shapes, windows or required deltas differ; or a side has `rows`, `shares`
                or an `extractor`, which belong to its own concepts.
        """
        if not isinstance(other, Directions):
            return NotImplemented
        if any(each is not None for side in (self, other) for each in (side.rows, side.shares, side.extractor)):
            raise ValueError("Expected directions without `rows`, `shares` and `extractor`. Set them on the sum.")
        base, differ = common_base(self.base, other.base)
        shapes = [{name: v.shape[1:] for name, v in side.vectors.items()} for side in (self, other)]
        if differ or shapes[0] != shapes[1] or (self.window, self.after) != (other.window, other.after):
            raise ValueError(
                f"The directions of {', '.join(self.names)} and {', '.join(other.names)} differ in base model, "
                "modules, shapes, window or required deltas. Apply both with `efface.stack`."
            )
        concepts, vectors = table.added([(side.strength, side.concepts, side.vectors) for side in (self, other)])
        facts: dict[str, Any] = {"info": {"sum of": [self.config(), other.config()]}, "base": base, "seed": 0}
        facts["method"] = " + ".join(dict.fromkeys([self.method, other.method]))
        return replace(self, vectors=vectors, concepts=concepts, strength=1.0, fields={}, **facts)

    def __sub__(self, other: Directions) -> Directions:
        return self + -other if isinstance(other, Directions) else NotImplemented

    # ---- files

    @property
    def base_hash(self) -> str:
        """One hash over the modules' own weights, at the precision of the fit."""
        return base_hash(self.base)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names, shapes and values of the vectors (not the strength), the base, and `after`."""
        told = json.dumps([self.base_hash, sorted(self.after.items()), self.names])
        return hashlib.sha256(f"{told}{digest(self.vectors)}".encode()).hexdigest()

    def _header(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in FACTS}
        found = facts | {"kind": file.DIRECTIONS, "concepts": [asdict(c) for c in self.concepts]}
        as_json: dict[str, Any] = json.loads(json.dumps(found))
        return as_json

    def config(self) -> dict[str, Any]:
        """The facts for records: everything except the tensors, and their hash."""
        rows = None if self.rows is None else [[concept.name for concept in row] for row in self.rows]
        extractor = None if self.extractor is None else getattr(self.extractor, "__qualname__", repr(self.extractor))
        shapes = {name: list(v.shape[1:]) for name, v in self.vectors.items()}
        more = {"rows": rows, "extractor": extractor, "modules": shapes, "base": self.base_hash, "hash": self.hash}
        return self._header() | more

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: the vectors, and everything else as JSON in the header.

        Raises:
            ValueError: `rows` or `extractor` is set, which a file does not hold.
            OSError: the file cannot be written. An older file stays.
        """
        if self.rows is not None or self.extractor is not None:
            raise ValueError("A file does not hold `rows` or `extractor`. Save the directions without them.")
        file.save(path, self.vectors, self._header())

    @classmethod
    def load(cls, path: str | Path) -> Directions:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is incomplete, damaged, of a newer version, holds no directions, or does not identify
                its base model.
        """
        return file.load(path, {file.DIRECTIONS: cls})
