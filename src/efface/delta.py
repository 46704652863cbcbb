"""`Delta`: what an editor learned, as one file; itself an eraser.

The weights of a model are always its own, kept as exact copies, plus the sum of the deltas that are on. They are made
anew on each change, so deltas come off in any order, and the last one leaves the model as it was, to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import __version__
from ._text import SITES
from ._watch import Seal, Watch, differing, moved, near, sampled
from ._weights import Elsewhere, adapters, denoiser_of, fused, fused_change, part, stored, weight
from .core import Concept, Concepts, Handle, as_concepts, check_strength, config
from .families import family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HEADER, FORMAT = "efface", 1
PRECISIONS = ("float64", "float32", "float16", "bfloat16")
Layout = Literal["diffusers", "kohya"]


# ---------------------------------------------------------------- one changed tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """A change of low rank: dW = B A, with `B` [out, r] and `A` [r, in], or [r, in, h, w] for a convolution."""

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim not in (2, 4) or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(
                f"Expected factors B [out, r] and A [r, in] or [r, in, h, w], but got {list(self.B.shape)} and "
                f"{list(self.A.shape)}."
            )

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.B.shape[0], *self.A.shape[1:]])

    def dense(self) -> Tensor:
        return (self.B @ self.A.flatten(1)).reshape(self.shape)


Change: TypeAlias = "Factors | Tensor"


def dense(change: Change) -> Tensor:
    return change.dense() if isinstance(change, Factors) else change


def truncate(change: Change, rank: int | None = None, tolerance: float = 0.0) -> tuple[Factors, float]:
    """The nearest change of lower rank, by singular values of the [out, in] matrix, and its relative error.

    Args:
        change: a matrix, a convolution, or factors (whose [out, in] matrix is then never made).
        rank: at most this.
        tolerance: else the least rank whose relative error (Frobenius norm) is at most this.
    """
    if len(change.shape) not in (2, 4):
        raise ValueError(f"Only matrices and convolutions have a rank, but got a tensor {list(change.shape)}.")
    if isinstance(change, Factors):
        (left, b), (right, a) = (torch.linalg.qr(x.double()) for x in (change.B, change.A.flatten(1).T))
        u, s, v = torch.linalg.svd(b @ a.T, full_matrices=False)
        u, v, dtype = left @ u, v @ right.T, change.B.dtype
    else:
        u, s, v = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
        dtype = change.dtype
    rest = (s * s).flip(0).cumsum(0).flip(0).sqrt()  # rest[k]: what is lost at rank k
    if rank is None:
        rank = max(1, int((rest > tolerance * rest[0]).sum()))
    error = float(rest[rank] / rest[0]) if rank < len(s) and rest[0] > 0 else 0.0
    root = s[:rank].sqrt()
    a = (root[:, None] * v[:rank]).reshape(-1, *change.shape[1:])
    return Factors((u[:, :rank] * root).to(dtype), a.to(dtype)), error


def _tensors(change: Change) -> tuple[Tensor, ...]:
    return (change.B, change.A) if isinstance(change, Factors) else (change,)


def _scaled(change: Change, by: float) -> Change:
    return Factors(change.B * by, change.A) if isinstance(change, Factors) else change * by


def _sum(a: Change, b: Change) -> Change:
    if isinstance(a, Factors) and isinstance(b, Factors):
        if torch.equal(a.A, b.A):
            return Factors(a.B + b.B, a.A)
        return Factors(torch.cat([a.B, b.B], 1), torch.cat([a.A, b.A]))
    return dense(a) + dense(b)


# ---------------------------------------------------------------- the deltas that are on


@dataclass
class _On:
    delta: Delta


@dataclass
class _Edited:
    """A part of a pipeline whose weights are changed just now: its own values, exactly, and the deltas, in order.

    Args:
        name: of the part.
        own: by path inside the part, the values without any delta.
        fused: by path, the LoRAs that were fused into those values.
        seals: by path, what was written.
        loaded: paths that `load_state_dict` has written to since.
        on: the deltas.
    """

    name: str
    own: dict[str, Tensor] = field(default_factory=dict)
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seals: dict[str, Seal] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)
    on: list[_On] = field(default_factory=list)

    def plain(self, module: nn.Module, path: str) -> Tensor:
        """The module's own value: with the LoRAs that are fused into it now, without any delta."""
        own, (layer, now), then = self.own[path], fused(module, path), self.fused[path]
        if now == then:
            return own
        value = own.clone()
        for names, sign in ((now, 1), (then, -1)):
            for name in names:
                change = fused_change(layer, [name], path) if name not in (then if sign > 0 else now) else None
                if change is not None:
                    value.add_(change.to(value), alpha=sign)
        return value

    def forget(self, path: str) -> None:
        for kept in (self.own, self.fused, self.seals):
            kept.pop(path, None)
        self.loaded.discard(path)


_EDITED: weakref.WeakKeyDictionary[nn.Module, _Edited] = weakref.WeakKeyDictionary()


def _write(module: nn.Module, paths: Iterable[str]) -> None:
    """Own values + sum of the deltas, at these paths of a part; own values exactly where none acts."""
    edited = _EDITED[module]
    for path in paths:
        deltas = [entry.delta for entry in edited.on if f"{edited.name}.{path}" in entry.delta.weights]
        if path in edited.loaded:  # the loaded value stays
            if not deltas:
                edited.forget(path)
            continue
        target = stored(module, path)
        if path not in edited.own:
            edited.own[path], edited.fused[path] = target.detach().clone(), fused(module, path)[1]
        value = own = edited.plain(module, path)
        for delta in deltas:
            if delta.strength:
                change = _on_device(delta.weights[f"{edited.name}.{path}"], own.device)
                precise = value.to(torch.promote_types(value.dtype, torch.float32))
                value = precise + delta.strength * dense(change).to(precise.dtype)
        with torch.inference_mode(target.is_inference()), torch.no_grad():  # where the model was loaded in that mode
            target.copy_(value)
        edited.seals[path] = Seal.of(target, fused(module, path)[1])
        if not deltas:
            edited.forget(path)


def _strange(module: nn.Module) -> list[str]:
    """The paths whose tensors do not hold what was written to them.

    A LoRA that was fused or unfused meanwhile is no stranger: what it added is known.
    """
    edited, pairs = _EDITED[module], {}
    strange: list[str] = []
    for path, seal in edited.seals.items():
        try:
            pairs[path] = seal, stored(module, path)
        except Elsewhere:
            continue  # it cannot be seen
        except ValueError:
            strange.append(path)
    differ, cast = differing(pairs)
    for path in cast:
        edited.seals[path] = Seal.of(pairs[path][1], pairs[path][0].fused)
    for path in differ:
        (seal, tensor), (layer, now) = pairs[path], fused(module, path)
        change: Tensor | None = None
        more, less = ([n for n in a if n not in b] for a, b in ((now, seal.fused), (seal.fused, now)))
        for names, sign in ((more, 1.0), (less, -1.0)):
            part = fused_change(layer, names, path)
            if part is not None:
                change = sign * sampled(part) if change is None else change + sign * sampled(part)
        if near(seal, tensor, change):
            edited.seals[path] = Seal.of(tensor, now)
        else:
            edited.seals[path] = replace(seal, other=moved(seal, tensor))
            strange.append(path)
    return strange


def _check(module: nn.Module) -> None:
    """RuntimeError if something else has written to the tensors that deltas edit."""
    edited = _EDITED.get(module)
    if edited is None:
        return
    if edited.loaded:
        raise RuntimeError(
            f"`load_state_dict` has replaced {len(edited.loaded)} of the weights that a delta edits, such as "
            f"{f'{edited.name}.{min(edited.loaded)}'!r}, so the delta is no longer in them. Call `handle.remove()`, "
            "which keeps the loaded weights, and apply the delta again."
        )
    if strange := _strange(module):
        raise RuntimeError(_changed(edited, strange))


def _changed(edited: _Edited, strange: Sequence[str]) -> str:
    return (
        f"Something else has changed {len(strange)} of the weights that a delta edits, such as "
        f"{f'{edited.name}.{min(strange)}'!r}: a LoRA that was unloaded while fused, a replaced layer, a quantisation, "
        "or an assignment to the weight. Undo that change, or call `efface.delta.forget(pipe)`, which keeps the "
        "weights as they are now and takes the deltas off the list."
    )


def check_written(pipe: DiffusionPipeline) -> None:
    """Raises if the weights under the deltas that are on are not those that the deltas wrote.

    It compares at most 4096 elements of each edited tensor, bit for bit. These are no errors: LoRAs (PEFT) that are
    fused or unfused, moves between devices, and casts.

    Raises:
        RuntimeError: `load_state_dict` or something else has written to such a tensor; it is named, with the cure.
    """
    for module in _parts(pipe).values():
        _check(module)


def forget(pipe: DiffusionPipeline) -> None:
    """Takes all deltas off the list and leaves the weights as they are now, which become the model's own.

    For weights that something else has changed, where nothing can be put back. The handles do nothing any more.
    """
    for module in _parts(pipe).values():
        _release(module)


def handles(pipe: DiffusionPipeline) -> list[Handle]:
    """A handle for each delta that is on, in the order in which they were applied.

    For a copy made by `copy.deepcopy`, which has the deltas of the original and no handles, and for lost handles.
    """
    entries = {id(entry): entry for m in _parts(pipe).values() if m in _EDITED for entry in _EDITED[m].on}
    return [_handle(entry, _parts(pipe))[0] for entry in entries.values()]


def _release(module: nn.Module) -> None:
    if _EDITED.pop(module, None) is not None:
        Watch.take_off(module)


def _after_load(module: nn.Module) -> None:
    if module in _EDITED:
        edited = _EDITED[module]
        edited.loaded.clear()
        edited.loaded.update(_strange(module))


def _copied(module: nn.Module, copy: nn.Module, memo: dict[int, Any]) -> None:
    """The copy of a module has the same deltas on, and own values of its own."""
    if module not in _EDITED:
        return
    edited = _EDITED[module]
    on = [memo.setdefault(id(entry), _On(entry.delta)) for entry in edited.on]  # one for all parts
    own = {path: value.clone() for path, value in edited.own.items()}
    _EDITED[copy] = _Edited(edited.name, own, dict(edited.fused), dict(edited.seals), set(edited.loaded), on)


def _handle(entry: _On, parts: Mapping[str, nn.Module]) -> tuple[Handle, Callable[[], None]]:
    """What changes a delta that is on and takes it off; and what takes it off without a check."""
    paths: dict[str, list[str]] = {}
    for name in entry.delta.weights:
        prefix, _, path = name.partition(".")
        paths.setdefault(prefix, []).append(path)
    refs = {name: weakref.ref(parts[name]) for name in paths}  # a pipeline can be freed with deltas on

    def alive() -> list[tuple[str, nn.Module]]:
        found = [(name, module) for name, ref in refs.items() if (module := ref()) is not None]
        return [(name, m) for name, m in found if m in _EDITED and any(e is entry for e in _EDITED[m].on)]

    def write() -> None:
        for name, module in alive():
            _write(module, paths[name])

    def writable() -> None:
        """An error comes before anything is changed."""
        for name, module in alive():
            for path in paths[name]:
                stored(module, path)

    def take_off() -> None:
        found = alive()
        before = [(module, _EDITED[module].on) for _, module in found]
        for module, on in before:
            _EDITED[module].on = [e for e in on if e is not entry]

        def back() -> None:
            for module, on in before:
                _EDITED[module].on = on
            write()

        def rewrite() -> None:
            for name, module in found:
                _write(module, paths[name])

        _or_undo(rewrite, back)
        for _, module in found:
            if not _EDITED[module].on:
                _release(module)

    def remove() -> None:
        writable()
        for _, module in alive():
            if not _EDITED[module].loaded:
                _check(module)
            elif strange := [p for p in _strange(module) if p not in _EDITED[module].loaded]:
                raise RuntimeError(_changed(_EDITED[module], strange))
        take_off()

    def swap(changed: Delta) -> None:
        if not alive() and any(ref() is not None for ref in refs.values()):
            raise ValueError("This delta is no longer on: apply it again to change it.")
        writable()
        for _, module in alive():
            _check(module)
        before, entry.delta = entry.delta, changed

        def back() -> None:
            entry.delta = before
            write()

        _or_undo(write, back)

    return Handle(entry.delta, swap, remove), take_off


def _on_device(change: Change, device: torch.device) -> Change:
    return Factors(*(t.to(device) for t in _tensors(change))) if isinstance(change, Factors) else change.to(device)


def _parts(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {n: part(pipe, n) for n, m in pipe.components.items() if isinstance(m, nn.Module)}


def present(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What shapes a pipeline's pictures beside its weights, as JSON types: scheduler, deltas, erasers and LoRAs on."""
    site = SITES.get(denoiser_of(pipe))
    schedule = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    found = {
        "scheduler": {"class": type(pipe.scheduler).__name__, **schedule},
        "deltas": [[delta.hash, delta.strength] for delta in active(pipe)],
        "erasers": [config(applied.method) for applied in site.applied] if site else [],
        "adapters": adapters(pipe),
    }
    return json.loads(json.dumps(found, default=str))


def active(pipe: DiffusionPipeline) -> list[Delta]:
    """The deltas that are on, in the order in which they were applied."""
    entries = [entry for m in _parts(pipe).values() if m in _EDITED for entry in _EDITED[m].on]
    return list({id(entry): entry.delta for entry in entries}.values())


def unedited(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """The model's own values of what deltas have changed just now, by canonical name."""
    edited = [(n, m, _EDITED[m]) for n, m in _parts(pipe).items() if m in _EDITED]
    return {f"{n}.{path}": changed.plain(m, path) for n, m, changed in edited for path in changed.own}


# ---------------------------------------------------------------- which model


def _fingerprints(values: Mapping[str, Tensor], precision: str) -> dict[str, str]:
    """sha256 of the shape and bytes of each tensor, rounded to a precision."""
    found = {}
    for name, value in values.items():
        rounded = value.detach().to("cpu", getattr(torch, precision)).contiguous()
        digest = hashlib.sha256(str(list(value.shape)).encode())
        digest.update(rounded.flatten().view(torch.uint8).numpy())
        found[name] = digest.hexdigest()
    return found


def _combined(fingerprints: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{n} {h}\n" for n, h in sorted(fingerprints.items())).encode()).hexdigest()


def _precision(values: Iterable[Tensor], narrowest: bool = False) -> str:
    places = [PRECISIONS.index(str(v.dtype).removeprefix("torch.")) for v in values]
    return PRECISIONS[max(places) if narrowest else min(places)]


def _model(pipe: DiffusionPipeline) -> str:
    """What to call the model: a hub id, the name of its folder (not where it lies), or its family."""
    name = pipe.name_or_path
    return (Path(name).name if name and Path(name).exists() else name) or family(pipe).name


# ---------------------------------------------------------------- the artefact


@dataclass(frozen=True, eq=False)
class Delta:
    """What an editor learned: changes of weights, the model they belong to, and how they came about.

    It is an eraser: `apply` adds the changes to the pipeline's weights and returns a handle that takes them off. While
    it is on, LoRAs may be fused and unfused, and the model cast, moved and deep-copied. Other changes of the weights
    are errors: in the pipeline's calls (unless the model was compiled after `apply`) and on any use of the handle.

    Args:
        weights: canonical parameter name, such as "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            to its change: `Factors` where it is of low rank (and they are smaller), else a tensor of its shape.
        method: the editor's name.
        fields: the editor's fields, as JSON types.
        concepts: what it erases.
        seed: the seed of the fit.
        model: what the base model is called.
        base: precision to parameter name to sha256 of the model's own value (no delta on), at the precision of the fit
            and all narrower ones: a delta fitted in float32 fits the same model loaded in float16.
        after: deltas that were on during the fit, hash to strength: it is of use on top of them only.
        versions: of the software.
        info: what else the editor has to say, as JSON types: errors, norms, losses.
        strength: >= 0, how much of the changes is added; 0 is the plain pipeline.

    Raises:
        ValueError: changes that are empty or not finite, or a negative strength; on `apply`: another base model (the
            error names both), weights that are quantised, fused or offloaded, or a missing delta of `after`.
        RuntimeError: while a delta is on, from its handle, from `apply` and in the pipeline's calls: something else has
            changed weights that the delta edits. Nothing is touched (see `check_written`).

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> delta = efface.UCE().fit(pipe, ["alcohol"])
        >>> with delta.apply(pipe) as handle:
        ...     handle.strength = 0.5
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[Mapping[str, Any] | None] = {"strength": 0.0}
    touches_uncond: ClassVar[bool] = True

    weights: Mapping[str, Change]
    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    concepts: Concepts = ()
    seed: int = 0
    model: str = ""
    base: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", as_concepts(self.concepts))
        object.__setattr__(self, "strength", check_strength(self.strength))
        if not self.weights:
            raise ValueError("A delta needs at least one changed weight, but got none.")
        for name, change in self.weights.items():
            if not all(bool(t.isfinite().all()) for t in _tensors(change)):
                raise ValueError(
                    f"The change of {name!r} has values that are not finite, and would make the model draw noise: "
                    "fit it again with gentler settings."
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
        """The delta that an editor hands back: `weights` are the changes from what `pipe` has now."""
        own = _own(pipe, weights)
        known = PRECISIONS[PRECISIONS.index(_precision(own.values())) :]
        fields = config(editor)
        return cls(
            {name: _detached(change) for name, change in weights.items()},
            method=fields.pop("method"),
            fields=fields,
            concepts=concepts,
            seed=seed,
            model=_model(pipe),
            base={precision: _fingerprints(own, precision) for precision in known},
            after={delta.hash: delta.strength for delta in active(pipe) if delta.strength},
            versions={"efface": __version__} | {p: version(p) for p in ("torch", "diffusers", "transformers")},
            info=info or {},
        )

    # ---- on a pipeline

    def apply(self, pipe: DiffusionPipeline) -> Handle:
        """Takes effect at once; returns the handle that takes it off again (also a context manager)."""
        check_written(pipe)
        self.check(pipe)
        entry = _On(self)
        names = list(dict.fromkeys(name.partition(".")[0] for name in self.weights))
        parts = {name: part(pipe, name) for name in names}
        for name, module in parts.items():
            if module not in _EDITED:
                _EDITED[module] = _Edited(name)
                Watch(module, _check, _after_load, _copied).put(getattr(pipe, name))
            _EDITED[module].on.append(entry)
        handle, take_off = _handle(entry, parts)

        def write() -> None:
            for name, module in parts.items():
                _write(module, [n.partition(".")[2] for n in self.weights if n.startswith(f"{name}.")])

        _or_undo(write, take_off)
        return handle

    def check(self, pipe: DiffusionPipeline) -> None:
        """ValueError unless the delta belongs to this pipeline's model, and what it was fitted on top of is on."""
        try:
            own = _own(pipe, self.weights)
        except ValueError as error:
            raise ValueError(
                f"The delta was fitted on {self.model!r} (base hash {self.base_hash[:16]}) and does not fit this "
                f"pipeline, {_model(pipe)!r}: {error}"
            ) from error
        if self.base:
            narrow = _precision(own.values(), narrowest=True)
            precision = narrow if narrow in self.base else next(iter(self.base))
            want, got = self.base[precision], _fingerprints(own, precision)
            differ = [name for name in got if want.get(name) != got[name]]
            if differ:
                raise ValueError(
                    f"The delta was fitted on {self.model!r} (base hash {_combined(want)[:16]}), but this pipeline is "
                    f"{_model(pipe)!r} ({_combined(got)[:16]}): {len(differ)} of {len(want)} weights differ, the first "
                    f"is {differ[0]!r}. Load the model it was fitted on, or fit it again."
                )
        on = {delta.hash: delta.strength for delta in active(pipe)}
        for earlier, strength in self.after.items():
            if on.get(earlier) != strength:
                state = f"on at {on[earlier]:g}" if earlier in on else "not on"
                raise ValueError(
                    f"The delta was fitted on top of the delta {earlier[:16]} at strength {strength:g}, which is "
                    f"{state}: apply that first, as in efface.stack(pipe, earlier, this)."
                )

    def merge(self, pipe: DiffusionPipeline) -> None:
        """Adds the changes to the pipeline's weights for good; `pipe.save_pretrained` then writes a plain model.

        Raises:
            ValueError: deltas are on (they would be saved too, or lost); otherwise as `apply`.
        """
        if active(pipe):
            raise ValueError("A delta is on: remove its handle before merging; to merge several, merge their sum.")
        self.apply(pipe)
        for module in {part(pipe, name.partition(".")[0]) for name in self.weights}:
            _release(module)

    def config(self) -> dict[str, Any]:
        """What a record stores: all but the numbers, with their hash."""
        header = self._header()
        del header["base"], header["format"]
        return {**header, "base": self.base_hash, "hash": self.hash, "strength": self.strength}

    # ---- arithmetic on the changes

    def __mul__(self, by: float) -> Delta:
        if isinstance(by, bool) or not isinstance(by, (int, float)):
            return NotImplemented
        return replace(self, weights={name: _scaled(change, by) for name, change in self.weights.items()})

    __rmul__ = __mul__

    def __neg__(self) -> Delta:
        return self * -1.0

    def __add__(self, other: Delta) -> Delta:
        """Both changes at once, at their present strengths, as one delta of strength 1."""
        if not isinstance(other, Delta):
            return NotImplemented
        if bool(self.base) != bool(other.base):
            raise ValueError(
                "One of the deltas does not know which model it belongs to (`base` is empty), and neither would their "
                "sum: make it with `Delta.fitted`."
            )
        bases = {p: dict(self.base[p]) for p in self.base if p in other.base}
        for precision, base in bases.items():
            differ = [name for name, h in other.base[precision].items() if base.get(name, h) != h]
            if differ:
                raise ValueError(
                    f"The deltas were fitted on different models, {self.model!r} ({self.base_hash[:16]}) and "
                    f"{other.model!r} ({other.base_hash[:16]}): {differ[0]!r} differs. Fit them on one model."
                )
            base.update(other.base[precision])
        weights: dict[str, Change] = {}
        for delta in (self, other):
            for name, change in delta.weights.items():
                scaled = change if delta.strength == 1 else _scaled(change, delta.strength)
                weights[name] = _sum(weights[name], scaled) if name in weights else scaled
        within = {self.hash: self.strength, other.hash: other.strength}
        after = {h: s for h, s in {**self.after, **other.after}.items() if within.get(h) != s}
        concepts = tuple(dict.fromkeys([*as_concepts(self.concepts), *as_concepts(other.concepts)]))
        return Delta(
            weights,
            method=" + ".join(dict.fromkeys([self.method, other.method])),
            concepts=concepts,
            model=self.model,
            base=bases,
            after=after,
            versions=self.versions,
            info={"sum of": [self.config(), other.config()]},
        )

    def __sub__(self, other: Delta) -> Delta:
        return self + -other if isinstance(other, Delta) else NotImplemented

    def truncated(self, rank: int) -> Delta:
        """Every change at most of this rank; `info["truncated"]` has the relative errors. Vectors stay as they are.

        Raises:
            ValueError: a rank below 1.
        """
        if rank < 1:
            raise ValueError(f"Expected a rank of at least 1, but got {rank}.")
        made = {
            name: (change, 0.0) if isinstance(change, Factors) and change.rank <= rank else truncate(change, rank)
            for name, change in self.weights.items()
            if len(change.shape) in (2, 4)
        }
        lost = sum(float(dense(self.weights[n]).norm()) ** 2 * error**2 for n, (_, error) in made.items())
        whole = sum(float(dense(change).norm()) ** 2 for change in self.weights.values())
        note = {
            "rank": rank,
            "relative error": (lost / whole) ** 0.5 if whole else 0.0,
            "largest": max((error for _, error in made.values()), default=0.0),
        }
        weights = {n: made[n][0] if n in made else change for n, change in self.weights.items()}
        return replace(self, weights=weights, info={**self.info, "truncated": note})

    # ---- files

    @property
    def base_hash(self) -> str:
        """One hash over the model's own values of what is changed, at the precision of the fit."""
        return _combined(next(iter(self.base.values()))) if self.base else ""

    @cached_property
    def hash(self) -> str:
        """sha256 over names, shapes and values of the changes (not the strength), the base, and `after`."""
        digest = hashlib.sha256(json.dumps([self.base_hash, sorted(self.after.items())]).encode())
        for name, change in sorted(self.weights.items()):
            for tensor in _tensors(change):
                digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _header(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "weights"}
        concepts = [dataclasses.asdict(c) for c in as_concepts(self.concepts)]
        return json.loads(json.dumps({**plain, "concepts": concepts, "format": FORMAT}))

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: the factors or tensors, and everything else as JSON in its header.

        The file appears whole or not at all: an older one stays if the disk is full.
        """
        tensors: dict[str, Tensor] = {}
        for name, change in self.weights.items():
            if isinstance(change, Factors):
                tensors[f"{name}:B"], tensors[f"{name}:A"] = change.B, change.A
            else:
                tensors[name] = change
        _save(tensors, Path(path), {HEADER: json.dumps(self._header())})

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Reads a file that `save` has written.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is cut short, damaged, of a newer version, something else than a delta, or does not say which
                model it belongs to.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no delta {path}: make one with `efface fit`.")
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get(HEADER, "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged, cut short, or no safetensors file ({error}): make it anew."
            ) from error
        if not isinstance(header, dict):
            raise ValueError(
                f"{path} is a safetensors file, but not a delta of Efface: its header has no {HEADER!r} entry. A LoRA "
                "is loaded with pipe.load_lora_weights."
            )
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {header.get('format')}, but this version reads {FORMAT}: update Efface."
            )
        try:
            header["concepts"] = tuple(Concept(**c) for c in header["concepts"])
            names = dict.fromkeys(key.removesuffix(":B").removesuffix(":A") for key in tensors)
            weights = {n: tensors[n] if n in tensors else Factors(tensors[f"{n}:B"], tensors[f"{n}:A"]) for n in names}
            found = cls(weights, **{name: value for name, value in header.items() if name != "format"})
            unknown = [name for hashes in found.base.values() for name in weights.keys() - hashes.keys()]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a whole delta ({error}): make it anew.") from error
        if not found.base or unknown:
            what = f"the value of {min(unknown)!r} in it" if unknown else "its weights"
            raise ValueError(
                f"{path} does not say which model it belongs to: its header has no hash of {what}, and it would change "
                "any model. Make it anew with `efface fit`."
            )
        return found

    def export(
        self, path: str | Path, layout: Layout = "diffusers", rank: int | None = None, dtype: torch.dtype | None = None
    ) -> float:
        """Writes a LoRA for other tools, at the present strength, and returns its relative error.

        Args:
            path: the safetensors file.
            layout: "diffusers", for `pipe.load_lora_weights` (PEFT), or "kohya", for A1111 and ComfyUI (diffusers reads
                it too).
            rank: at most this; None: whatever loses nothing, which is large where a change is not of low rank.
            dtype: of the file; None: float32 for diffusers, float16 for kohya.

        Raises:
            ValueError: what a LoRA cannot hold: biases and norms, parts other than the UNet; a delta that needs others
                under it.
        """
        if layout not in ("diffusers", "kohya"):
            raise ValueError(f"Expected `layout` to be 'diffusers' or 'kohya', but got {layout!r}.")
        if self.after:
            raise ValueError("This delta needs others under it: export the sum of all, (earlier + this).export(...).")
        wrong = [n for n, c in self.weights.items() if not (n.startswith("unet.") and len(c.shape) in (2, 4))]
        if wrong:
            raise ValueError(
                f"A LoRA cannot hold {len(wrong)} of the {len(self.weights)} changes, such as {wrong[0]!r}: it has "
                "matrices and convolutions of the UNet only. Merge the delta and save the whole model."
            )
        delta = self if rank is None else self.truncated(rank)
        factors = {n: c if isinstance(c, Factors) else truncate(c)[0] for n, c in delta.weights.items()}
        dtype = dtype or (torch.float32 if layout == "diffusers" else torch.float16)
        tensors: dict[str, Tensor] = {}
        lost = whole = 0.0
        for name, change in factors.items():
            module = name.removesuffix(".weight")
            b, a = (t.to(dtype) for t in _balanced(change, self.strength))
            if layout == "kohya":
                key = f"lora_{module.replace('.', '_')}"
                up, down = f"{key}.lora_up.weight", f"{key}.lora_down.weight"
                tensors[f"{key}.alpha"] = torch.tensor(float(b.shape[1]), dtype=dtype)
            else:
                up, down = f"{module}.lora_B.weight", f"{module}.lora_A.weight"
            tensors[up], tensors[down] = b if a.ndim == 2 else b[:, :, None, None], a
            exact = self.strength * dense(self.weights[name]).double()
            lost += float((Factors(b.double(), a.double()).dense() - exact).norm()) ** 2
            whole += float(exact.norm()) ** 2
        _save(tensors, Path(path), {"format": "pt", "software": f"efface {__version__}", "method": self.method})
        return (lost / whole) ** 0.5 if whole else 0.0


def _own(pipe: DiffusionPipeline, weights: Mapping[str, Change]) -> dict[str, Tensor]:
    """The model's own values (no delta on) of what `weights` changes; ValueError if a shape is another."""
    overlaid, own = unedited(pipe), {}
    for name, change in weights.items():
        prefix, _, path = name.partition(".")
        own[name] = overlaid.get(name, weight(part(pipe, prefix), path))
        if own[name].shape != change.shape:
            raise ValueError(
                f"{name!r} is changed as {list(change.shape)}, but it is {list(own[name].shape)}. Another architecture "
                "needs a fit of its own."
            )
    return own


def _or_undo(do: Callable[[], None], undo: Callable[[], None]) -> None:
    try:
        do()
    except BaseException:
        undo()
        raise


def _detached(change: Change) -> Change:
    if isinstance(change, Factors):
        return Factors(*(t.detach().cpu().contiguous() for t in _tensors(change)))
    return change.detach().cpu().contiguous()


def _balanced(change: Factors, strength: float) -> tuple[Tensor, Tensor]:
    """B and A with columns and rows of like size, so that they fit into half precision."""
    b, a = change.B.double() * strength, change.A.double()
    left, right = b.norm(dim=0), a.flatten(1).norm(dim=1)
    by = torch.where((left > 0) & (right > 0), (right / left.clamp_min(1e-300)).sqrt(), torch.ones_like(left))
    return b * by, (a.flatten(1) / by[:, None]).reshape(a.shape)


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"Cannot write {path} ({error}); what was there before is still there.") from error
    finally:
        partial.unlink(missing_ok=True)
