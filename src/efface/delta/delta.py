"""`Delta`, the result of an editor: an eraser that supports addition and scaling and is stored in one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import checks
from ..core import Concepts, ConceptsField, Handle, as_concepts
from ..fields import Converted
from . import file, words
from .applied import AppliedDelta, check_written, entries, forget
from .artefact import Artefact, listed
from .base import check_after, check_base, common_base, kind, origin, own_values, strengths
from .factors import Change, Factors, added, dense, each, scaled, tensors, truncate
from .lora import Layout, export

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False, repr=False)
class Delta(Artefact):
    """The result of an editor: changes of weights, their base model, and their origin.

    A delta is an eraser: `apply` adds the changes to the pipeline's weights, and returns a handle that removes them.
    While it is applied, LoRAs may be fused and unfused, and the model cast, moved, compiled and deep-copied. Any other
    change of the weights or modules raises an error in pipeline calls and on use of the handle.

    Args:
        weights: canonical parameter name, such as "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            to its change: `Factors` if these are smaller, otherwise a tensor of its shape.
        method: the editor's name.
        fields: the editor's fields, as JSON types.
        concepts: the erased concepts.
        seed: the seed of the fit.
        model: the name of the base model.
        base: precision to parameter name to SHA-256 of the model's own value, at the precision of the fit and all
            narrower ones. So a delta fitted in float32 matches the same model in float16.
        after: the deltas that were applied during the fit, hash to strength. The delta requires them.
        versions: software versions.
        info: further facts from the editor as JSON types: errors, norms, losses.
        strength: >= 0, the factor on all changes; 0 is the base model.

    Raises:
        ValueError: the changes are empty or not finite, or `strength` is negative. On `apply`: `base` is missing, the
            base model differs (the error names both), weights are quantised, fused or offloaded, a delta of `after` is
            missing, or the delta is already applied.
        RuntimeError: other code changed edited weights or replaced their module. Handles, `apply` and pipeline calls
            raise it, and change nothing (see `check_written`).

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> delta = efface.UCE().fit(pipe, ["alcohol"])
        >>> delta
        Delta(uce, alcohol, strength 1, 14 tensors (dense), base model 'emoji')
        >>> with delta.apply(pipe) as handle:
        ...     handle.strength = 0.5
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    _kind: ClassVar[str] = file.WEIGHTS
    _apart: ClassVar[tuple[str, ...]] = ("weights",)
    off: ClassVar[Mapping[str, Any] | None] = {"strength": 0.0}
    touches_uncond: ClassVar[bool] = True

    weights: Mapping[str, Change]
    _: KW_ONLY
    method: str
    concepts: ConceptsField = Converted(())
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", as_concepts(self.concepts))
        object.__setattr__(self, "strength", checks.number("strength", self.strength, 0))
        if not self.weights:
            raise ValueError("Expected at least one changed weight, got none. Fit a delta with an editor.")
        for name, change in self.weights.items():
            if not all(bool(t.isfinite().all()) for t in tensors(change)):
                raise ValueError(
                    f"The change of {name!r} has values that are not finite. Fit it again with gentler settings."
                )

    @classmethod
    def fitted(
        cls,
        editor: Any,
        pipe: DiffusionPipeline,
        weights: Mapping[str, Change],
        concepts: Concepts,
        *,
        seed: int = 0,
        info: Mapping[str, Any] | None = None,
    ) -> Delta:
        """Makes the delta that an editor returns.

        Args:
            editor: the editor, a dataclass.
            pipe: the pipeline of the fit, with the deltas that were applied during the fit.
            weights: the changes from the current weights of `pipe`.
            concepts: the erased concepts.
            seed: the seed of the fit.
            info: further facts from the editor, as JSON types.

        Raises:
            ValueError: the changes do not match the pipeline's weights, or are not finite.
        """
        named = words.named(pipe, as_concepts(concepts)) | kind(pipe)
        return cls(
            {name: each(change, lambda x: x.detach().cpu().contiguous()) for name, change in weights.items()},
            concepts=concepts,
            **origin(editor, pipe, own_values(pipe, weights), seed=seed, info={**(info or {}), **named}),
        )

    def __repr__(self) -> str:
        """One line: method, concepts, strength, number and rank of the changed tensors, base model."""
        concepts = listed([concept.name for concept in self.concepts]) or "no concepts"
        ranks = [change.rank for change in self.weights.values() if isinstance(change, Factors)]
        kinds = ([f"rank <= {max(ranks)}"] if ranks else []) + (["dense"] if len(ranks) < len(self.weights) else [])
        size = f"{len(self.weights)} tensors ({' or '.join(kinds)})"
        return self._line(self.method, concepts, f"strength {self.strength:g}", size)

    # ---- on a pipeline

    def apply(self, pipe: DiffusionPipeline) -> Handle:
        """Applies the delta immediately. The handle removes it again, and is also a context manager.

        Raises:
            ValueError: as `check`, or the delta is already applied, alone or in a sum.
            RuntimeError: other code changed weights that applied deltas edit (see `check_written`).
        """
        check_written(pipe)
        self.check(pipe)
        if any(self._has(delta) for delta in active(pipe)):
            raise ValueError(
                f"The delta {self.hash[:16]} is already applied, alone or in a sum, and its change would count twice. "
                "Set the `strength` of its handle, or remove it first."
            )
        return AppliedDelta(self, pipe).put()

    def _has(self, other: Delta) -> bool:
        """Whether the two deltas are equal, or one is a sum that contains the other."""
        return self.hash in strengths(other.config()) or other.hash in strengths(self.config())

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raises unless the delta matches the pipeline's model, and the deltas of `after` are applied.

        Raises:
            ValueError: `base` is missing, the base model differs, weights cannot be edited, or a delta of `after` is
                missing.
        """
        check_base(pipe, self.weights, self.base, self.model)
        check_after(pipe, self.after)

    def merge(self, pipe: DiffusionPipeline) -> None:
        """Adds the changes to the pipeline's weights permanently. `pipe.save_pretrained` then writes an ordinary model.

        Raises:
            ValueError: deltas are applied, or as `apply`.
        """
        if active(pipe):
            raise ValueError(
                "The pipeline has an applied delta. Remove its handle before merging, or merge the sum of several "
                "deltas."
            )
        self.apply(pipe)
        forget(pipe)

    # ---- arithmetic on the changes

    def __mul__(self, by: float) -> Delta:
        if isinstance(by, bool) or not isinstance(by, (int, float)):
            return NotImplemented
        info = dict(self.info)
        if "sum of" in info:
            info["sum of"] = [{**part, "strength": by * part["strength"]} for part in info["sum of"]]
        return replace(self, weights={name: scaled(change, by) for name, change in self.weights.items()}, info=info)

    __rmul__ = __mul__

    def __neg__(self) -> Delta:
        return self * -1.0

    def __add__(self, other: Delta) -> Delta:
        """The sum of both changes, at their current strengths, as one delta of strength 1.

        Raises:
            ValueError: the base models differ, one is unknown, or one delta contains the other. Write `2 * delta` to
                double a delta.
        """
        if not isinstance(other, Delta):
            return NotImplemented
        if self._has(other):
            raise ValueError(
                f"Both sides contain the delta {other.hash[:16]}, and its change would count twice. Scale it instead, "
                "as in `2 * delta`."
            )
        if not (self.base and other.base):
            raise ValueError(
                "One of the deltas does not identify its base model (`base` is empty). Make it with `Delta.fitted`."
            )
        base, differ = common_base(self.base, other.base)
        if differ:
            raise ValueError(
                f"The deltas were fitted on different models, {self.model!r} ({self.base_hash[:16]}) and "
                f"{other.model!r} ({other.base_hash[:16]}), which differ in {differ[0]!r}. Fit them on one model."
            )
        weights: dict[str, Change] = {}
        for delta in (self, other):
            for name, change in delta.weights.items():
                more = change if delta.strength == 1 else scaled(change, delta.strength)
                weights[name] = added(weights[name], more) if name in weights else more
        within = strengths(self.config()) | strengths(other.config())
        return Delta(
            weights,
            method=" + ".join(dict.fromkeys([self.method, other.method])),
            concepts=tuple(dict.fromkeys([*self.concepts, *other.concepts])),
            model=self.model,
            base=base,
            after={h: s for h, s in {**self.after, **other.after}.items() if within.get(h) != s},
            versions=self.versions,
            info={"sum of": [self.config(), other.config()]},
        )

    def __sub__(self, other: Delta) -> Delta:
        return self + -other if isinstance(other, Delta) else NotImplemented

    def truncated(self, rank: int) -> Delta:
        """Limits every change to this rank. `info["truncated"]` has the relative errors. Vectors stay dense.

        Raises:
            ValueError: `rank` is below 1.
        """
        made = {n: truncate(c, rank) if len(c.shape) in (2, 4) else (c, 0.0) for n, c in self.weights.items()}
        sizes = {name: float(dense(change).norm()) for name, change in self.weights.items()}
        lost = sum((sizes[name] * error) ** 2 for name, (_, error) in made.items())
        whole = sum(size**2 for size in sizes.values())
        note = {
            "rank": rank,
            "relative error": (lost / whole) ** 0.5 if whole else 0.0,
            "largest": max(error for _, error in made.values()),
        }
        weights = {name: change for name, (change, _) in made.items()}
        return replace(self, weights=weights, info={**self.info, "truncated": note})

    # ---- files

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names, shapes and values of the changes (not the strength), the base, and `after`."""
        digest = hashlib.sha256(json.dumps([self.base_hash, sorted(self.after.items())]).encode())
        for name, change in sorted(self.weights.items()):
            for tensor in tensors(change):
                digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def export(
        self, path: str | Path, layout: Layout = "diffusers", rank: int | None = None, dtype: torch.dtype | None = None
    ) -> float:
        """Writes a LoRA for other tools, at the current strength, and returns its relative error.

        Args:
            path: the safetensors file.
            layout: "diffusers", for `pipe.load_lora_weights` (PEFT), or "kohya", for A1111 and ComfyUI. Diffusers also
                reads kohya's names, except for SD 3/3.5. For SD 3/3.5 and FLUX.1, these are the names of the published
                checkpoint, with one change for queries, keys and values together.
            rank: the largest rank of a change. None loses nothing, but gives large files for dense changes.
            dtype: dtype of the file. None: float32 for diffusers, float16 for kohya.

        Raises:
            ValueError: the delta has changes that a LoRA cannot hold (biases, norms, parts other than the denoiser), or
                that have no name in the layout, or requires other deltas; `layout` is unknown, or `rank` is below 1.
            OSError: the file cannot be written.
        """
        if self.after:
            raise ValueError("This delta requires others. Export the sum of all: (earlier + this).export(...).")
        return export(path, self.weights, self.strength, layout, rank, dtype, self.method, _denoiser(self.info))


def _denoiser(info: Mapping[str, Any]) -> str:
    """The class of the transformer that a delta, or each part of a sum, was fitted on; "" if it is unknown."""
    parts = {_denoiser(each["info"]) for each in info.get("sum of", ())} or {str(info.get("denoiser", ""))}
    return parts.pop() if len(parts) == 1 else ""


def active(pipe: DiffusionPipeline) -> list[Delta]:
    """The applied deltas, in the order of application."""
    return [entry.delta for entry in entries(pipe) if isinstance(entry.delta, Delta)]
