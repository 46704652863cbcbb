"""`Directions`: learned vectors that a pipeline's denoiser adds to outputs of its modules, as an eraser in one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import BoundArguments
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..core import Concept, Concepts, ConceptsField
from ..fields import Converted
from ..hooks import DenoiserCall, Memory
from . import file, table
from .artefact import Vectors, listed
from .base import common_base

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False, repr=False)
class Directions(Vectors):
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

    _kind: ClassVar[str] = file.DIRECTIONS
    _apart: ClassVar[tuple[str, ...]] = ("vectors", "rows", "extractor")
    touches_uncond: ClassVar[bool] = False

    concepts: ConceptsField = Converted(())  # again: mypy would take it for what the constructor takes
    shares: Converted[Sequence[float] | None, tuple[float, ...] | None] = Converted(None)
    extractor: Callable[[str], Concepts] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        table.check_vectors(self.vectors, self.concepts)
        if sum(each is not None for each in (self.rows, self.shares, self.extractor)) > 1:
            raise ValueError("Expected one of `rows`, `shares` and `extractor`, got several. Leave out all but one.")
        if self.extractor is not None and not callable(self.extractor):
            raise TypeError(checks.refusal("`extractor` to be a function of a prompt", self.extractor, "Give one."))
        if self.shares is not None:
            object.__setattr__(self, "shares", table.shares_of(self.shares, self.names))

    def __repr__(self) -> str:
        """One line: method, concepts, strength, shapes and modules, base model."""
        where = ", ".join(f"{list(v.shape[1:])} at {name}" for name, v in self.vectors.items())
        return self._line(self.method, listed(self.names), f"strength {self.strength:g}", where)

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

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raises ValueError if a vector is zero, the denoiser lacks a module, or is compiled and `shares` are drawn."""
        super().check(pipe)
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

    def config(self) -> dict[str, Any]:
        extractor = None if self.extractor is None else getattr(self.extractor, "__qualname__", repr(self.extractor))
        shapes = {name: list(v.shape[1:]) for name, v in self.vectors.items()}
        return super().config() | {"extractor": extractor, "modules": shapes}
