"""`Steering`: edits of the outputs of cross-attention layers, learned by an editor, as an eraser in one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from torch import Tensor

from .. import checks
from .._weights import digest
from ..core import Concept, Concepts, ConceptsField, Handle, RowsField, as_concepts
from ..fields import Converted, computed
from ..hooks import DenoiserCall, Memory, Method
from . import file, gates, table
from .applied import check_written
from .base import Base, base_hash, check_after, origin, own_values

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FACTS = ("method", "fields", "seed", "model", "versions", "info", "strength", "window", "base", "after")
FORM = ("form", "times", "positive", "length")


@dataclass(frozen=True, eq=False, repr=False)
class Steering(Method):
    """Changes the output of cross-attention layers on the conditional rows, token by token, as an editor learned it.

    x [D] is a token of a layer's output, after `to_out`. Each module has tensors for K concepts, of one form:

        direction:  x <- x - strength sum_k g(<p_k, x - m_k>) q_k        g(s) = max(s, 0) if `positive`, else s
        surrogate:  x <- x + strength k(x) (x' - x)                      a gate k and a surrogate x', see `GLoCE`
        adapter:    x <- x + strength sum_k U_k GELU(D_k x + b_k) + c_k

    Source: the result of `efface.CASteer`, `efface.MidSteer`, `efface.GLoCE` and `efface.Receler`, which have the
    papers.

    Args:
        vectors: "module:part", such as "unet.mid_block.attentions.0.transformer_blocks.0.attn2:read", to its tensor.
        concepts: the K concepts of the tensors.
        strength: >= 0, the factor of the change, in the unit of the form; 0 is the base model. The editor sets the
            first value.
        window: (start, end), the part of the steps with the edit, as fractions.
        rows: one list of concepts per prompt of the batch, instead of all concepts for each.
        form: see above.
        times: for directions: the times, in the denoiser's unit, of the T vectors per concept. A step uses the nearest.
        positive: for directions: whether only positive shares are taken out.
        length: for directions: whether each token keeps its length.
        method, fields, seed, info: the editor, its fields, its seed, and further facts, as JSON types.
        model, base, versions: the base model, the fingerprints of the modules' weights, and software, as in `Delta`.
        after: the deltas of weights that were applied during the fit, hash to strength. They are required.

    Shapes: x [B, Q, D]. `read`, `taken`, `middle` [K, T, D]; other parts have K entries first, see `delta/gates.py`.

    Raises:
        ValueError: a field is out of range, a part is missing or not finite, or `rows` names a concept without tensors.
            On `apply`: the base model differs, the pipeline lacks a module, or a delta of `after` is missing.
        RuntimeError: a module did not run in a denoiser call.
        TypeError: the family of the pipeline is unknown.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> steering = efface.CASteer(subjects=("a dog",), sampler_steps=2).fit(pipe, efface.Concept("cat"))
        >>> with steering.apply(pipe) as handle:
        ...     handle.strength = 1.0
        ...     image = pipe("a cat", num_inference_steps=2).images[0]
        >>> handle.record["rows"]
        {'0': 2}
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    needs: ClassVar[tuple[str, ...]] = ("cross_text",)
    counts_steps: ClassVar[bool] = True
    steers: ClassVar[tuple[str, ...]] = computed(lambda self: tuple(n.partition(".")[2] for n in self.modules))

    vectors: Mapping[str, Tensor]
    concepts: ConceptsField = Converted(())
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    rows: RowsField = Converted(None)
    form: gates.Form = "direction"
    times: Converted[Sequence[float], tuple[float, ...]] = Converted(())
    positive: bool = False
    length: bool = False
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
        checks.choice("form", self.form, get_args(gates.Form))
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
        gates.check_parts(self.vectors, self.form, self.concepts, self.times)
        for concept in (concept for row in self.rows or () for concept in row):
            if concept not in self.concepts:
                known = ", ".join(each.name for each in self.concepts)
                raise ValueError(f"{checks.shown(concept.name)} has no tensors here. Known: {known}.")

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the edited modules."""
        return gates.modules_of(self.vectors)

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
    ) -> Steering:
        """Makes the steering that an editor returns, for the model of `pipe` with the applied deltas.

        Args:
            editor, pipe, concepts, seed, info: as for `Delta.fitted`.
            vectors: as in `Steering`.
            use: the fields `form`, `strength`, `window`, `times`, `positive` and `length`.

        Raises:
            ValueError: the pipeline lacks a module, or the tensors are not as in `Steering`.
        """
        return cls(
            {name: v.detach().to("cpu", torch.float32).contiguous() for name, v in vectors.items()},
            as_concepts(concepts),
            **origin(editor, pipe, _own(pipe, gates.modules_of(vectors)), seed=seed, info=info),
            **use,
        )

    def __repr__(self) -> str:
        """One line: method, concepts, strength, form, number of modules, base model."""
        names = ", ".join(c.name for c in self.concepts[:3])
        names += f" and {len(self.concepts) - 3} more" if len(self.concepts) > 3 else ""
        shown = (self.method, names, f"strength {self.strength:g}", f"{self.form} at {len(self.modules)} modules")
        return f"Steering({', '.join(shown)}, base model {self.model or 'unknown'!r})"

    # ---- on a pipeline

    def apply(self, pipe: DiffusionPipeline) -> Handle:
        check_written(pipe)
        table.check_model(pipe, dict.fromkeys(self.modules), self.base, self.model)
        check_after(pipe, self.after)
        return super().apply(pipe)

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raises ValueError if the denoiser lacks a module, or the edit changes nothing for a concept."""
        super().check(pipe)
        table.weights_of(pipe, dict.fromkeys(self.modules))
        part = {"direction": ":taken", "surrogate": ":gate", "adapter": ":up"}[self.form]
        for k, concept in enumerate(self.concepts):
            if not any(bool(each[k].any()) for name, each in self.vectors.items() if name.endswith(part)):
                raise ValueError(
                    f"The edit for {checks.shown(concept.name)} is zero in all modules, so it would change nothing. "
                    "Fit it again, with texts that draw the concept."
                )

    def around(self, call: DenoiserCall, forward: Callable[[], Any]) -> Any:
        if self.times:
            call.memory["timestep"] = call.timestep
        return forward()

    def steer(self, out: Tensor, module: str, row_concepts: Sequence[tuple[Concept, ...]], memory: Memory) -> Tensor:
        x = out.to(torch.promote_types(out.dtype, torch.float32))
        parts, acts = self._parts(module, x, memory), [[c in row for c in self.concepts] for row in row_concepts]
        on = torch.tensor(acts, device=x.device)
        if self.form == "direction":
            changed = gates.without_direction(x, parts, on, self.strength, self.positive, self.length)
        else:
            changed = {"surrogate": gates.blended, "adapter": gates.adapted}[self.form](x, parts, on, self.strength)
        return torch.where(on.any(1)[:, None, None], changed.to(out.dtype), out)

    def _parts(self, module: str, x: Tensor, memory: Memory) -> dict[str, Tensor]:
        """The tensors of a module on the device of x, for this time."""
        start = next(name for name in self.modules if name.partition(".")[2] == module) + ":"
        parts = memory.get(key := f"{module} on {x.device} {x.dtype}")
        if parts is None:
            parts = {name.removeprefix(start): v.to(x) for name, v in self.vectors.items() if name.startswith(start)}
            if not torch.compiler.is_compiling():
                memory[key] = parts
        if self.form != "direction":
            return dict(parts)
        return gates.nearest(parts, torch.tensor(self.times, device=x.device), memory.get("timestep", 0.0))

    # ---- files

    @property
    def base_hash(self) -> str:
        """One hash over the modules' own weights, at the precision of the fit."""
        return base_hash(self.base)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names, shapes and values of the tensors (not the strength), the form, the base, and `after`."""
        form = [list(v) if isinstance(v := getattr(self, name), tuple) else v for name in FORM]
        told = [self.base_hash, sorted(self.after.items()), [c.name for c in self.concepts], form]
        return hashlib.sha256(f"{json.dumps(told)}{digest(self.vectors)}".encode()).hexdigest()

    def _header(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in (*FACTS, *FORM)}
        found = facts | {"kind": file.STEERING, "concepts": [asdict(c) for c in self.concepts]}
        as_json: dict[str, Any] = json.loads(json.dumps(found))
        return as_json

    def config(self) -> dict[str, Any]:
        """The facts for records: everything except the tensors, and their hash."""
        rows = None if self.rows is None else [[concept.name for concept in row] for row in self.rows]
        more = {"rows": rows, "modules": list(self.modules), "base": self.base_hash, "hash": self.hash}
        return self._header() | more

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: the tensors, and everything else as JSON in the header.

        Raises:
            ValueError: `rows` is set, which a file does not hold.
            OSError: the file cannot be written. An older file stays.
        """
        if self.rows is not None:
            raise ValueError("A file does not hold `rows`. Save the steering without them.")
        file.save(path, self.vectors, self._header())

    @classmethod
    def load(cls, path: str | Path) -> Steering:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is incomplete, damaged, of a newer version, holds no steering, or does not identify its
                base model.
        """
        return file.load(path, {file.STEERING: cls})


def _own(pipe: DiffusionPipeline, modules: Sequence[str]) -> dict[str, Tensor]:
    return own_values(pipe, table.weights_of(pipe, dict.fromkeys(modules)))
