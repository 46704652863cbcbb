"""`Steering`: edits of the outputs of cross-attention layers, learned by an editor, as an eraser in one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from torch import Tensor

from .. import checks
from ..core import Concept, ConceptsField
from ..fields import Converted
from ..hooks import DenoiserCall, Memory
from . import file, gates
from .artefact import Vectors, listed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FORM = ("form", "times", "positive", "length")


@dataclass(frozen=True, eq=False, repr=False)
class Steering(Vectors):
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

    _kind: ClassVar[str] = file.STEERING
    needs: ClassVar[tuple[str, ...]] = ("cross_text",)
    counts_steps: ClassVar[bool] = True

    concepts: ConceptsField = Converted(())  # again: mypy would take it for what the constructor takes
    form: gates.Form = "direction"
    times: Converted[Sequence[float], tuple[float, ...]] = Converted(())
    positive: bool = False
    length: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("form", self.form, get_args(gates.Form))
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
        gates.check_parts(self.vectors, self.form, self.concepts, self.times)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the edited modules."""
        return gates.modules_of(self.vectors)

    def __repr__(self) -> str:
        """One line: method, concepts, strength, form, number of modules, base model."""
        where = f"{self.form} at {len(self.modules)} modules"
        return self._line(self.method, listed(self.names), f"strength {self.strength:g}", where)

    # ---- on a pipeline

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raises ValueError if the denoiser lacks a module, or the edit changes nothing for a concept."""
        super().check(pipe)
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

    def _told(self) -> Sequence[Any]:
        form = [list(v) if isinstance(v := getattr(self, name), tuple) else v for name in FORM]
        return (*super()._told(), form)
