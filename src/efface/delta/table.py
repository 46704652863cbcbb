"""The table of vectors of `Directions`: its checks, sums, and the draw of one vector per picture."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from .._weights import denoiser_of
from ..core import Concept
from ..families import family
from .base import Base, check_values, model_name, own_values

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SIGNS = 256  # the signs of so many numbers of a picture's noise decide its draw
DIRECT_CALL = (
    "`shares` and `extractor` need a pipeline call, because a direct denoiser call has neither prompt nor initial "
    "noise. Name the concepts of each row in `rows`."
)


def check_vectors(vectors: Mapping[str, Tensor], concepts: Sequence[Concept]) -> None:
    """Raises ValueError unless each module has one finite vector per concept."""
    if not vectors:
        raise ValueError("Expected the vectors of at least one module, got none. Fit them with LatentDirections.")
    if len(set(concepts)) < len(concepts):
        raise ValueError("Expected different concepts, got one twice. Add the vectors of equal concepts.")
    for name, rows in vectors.items():
        if len(rows) != len(concepts) or rows.ndim < 2:
            raise ValueError(
                f"Expected one vector per concept ({len(concepts)}) at {name!r}, got the shape {list(rows.shape)}. "
                "Give a tensor with one row per concept."
            )
        if not bool(rows.isfinite().all()):
            raise ValueError(f"The vectors of {name!r} are not finite. Fit them again with a lower `lr`.")


def check_not_zero(vectors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raises ValueError if the vector of a concept is zero in all modules."""
    for k, name in enumerate(names):
        if not any(bool(rows[k].any()) for rows in vectors.values()):
            raise ValueError(
                f"The vector of {checks.shown(name)} is zero, so it would change nothing. Leave it out with `only`, or "
                "fit it again."
            )


def check_not_compiled(pipe: DiffusionPipeline) -> None:
    """Raises ValueError if the denoiser is compiled, which does not allow to read noise."""
    called = getattr(pipe, family(pipe).denoiser)
    if called is not denoiser_of(pipe) or getattr(called, "_compiled_call_impl", None):
        raise ValueError(
            "`shares` are drawn from the initial noise, which a compiled denoiser does not allow to read. Use a "
            "pipeline that is not compiled, or name the concepts of each prompt in `rows`."
        )


def weights_of(pipe: DiffusionPipeline, modules: Collection[str]) -> dict[str, Tensor]:
    """The parameters of modules, such as "unet.mid_block", by canonical name.

    Raises:
        ValueError: the pipeline's denoiser lacks a module.
    """
    facts, denoiser = family(pipe), denoiser_of(pipe)
    found: dict[str, Tensor] = {}
    for name in modules:
        part, _, path = name.partition(".")
        inside = {f"{part}.{n}": p for n, p in denoiser.named_parameters() if path and n.startswith(f"{path}.")}
        if part != facts.denoiser or not inside:
            raise ValueError(
                f"Expected a module {name!r} with weights, but this {type(pipe).__name__} has none in its "
                f"{facts.denoiser}. Use a pipeline of the model of the fit."
            )
        found |= {n.replace(".base_layer.", "."): p for n, p in inside.items() if ".lora_" not in n}
    return found


def unidentified(base: Base, modules: Collection[str]) -> str:
    """The module without a hash in `base`; "" if all have one."""
    known = set(itertools.chain(*base.values()))
    lost = [name for name in modules if not any(each.startswith(f"{name}.") for each in known)]
    return f"the weights of {lost[0]!r}" if lost else ""


def check_model(pipe: DiffusionPipeline, modules: Collection[str], base: Base, model: str) -> None:
    """Raises ValueError unless `base` describes the modules of the pipeline."""
    if what := unidentified(base, modules):
        raise ValueError(
            f"The vectors do not identify their base model, because `base` has no hash of {what}. Make them with an "
            "editor's `fit`, or with `fitted`."
        )
    weights = weights_of(pipe, modules)
    within = tuple(f"{name}." for name in modules)
    asked = [name for hashes in base.values() for name in hashes if name.startswith(within)]
    if missing := [name for name in asked if name not in weights]:
        raise ValueError(
            f"The vectors were fitted on {model!r}, but this pipeline, {model_name(pipe)!r}, has no weight "
            f"{missing[0]!r}. Load their base model, or fit them again."
        )
    check_values(pipe, own_values(pipe, weights), base, model)


def check_shape(module: str, vector: Sequence[int], out: Sequence[int]) -> None:
    """Raises ValueError unless a vector of this shape can be added to an output of that shape."""
    if len(vector) != len(out) or any(mine not in (1, other) for mine, other in zip(vector, out, strict=True)):
        raise ValueError(
            f"The vectors of {module!r} have the shape {list(vector)}, but its output in this call has {list(out)}. "
            "Draw pictures of the size of the fit, or fit with `spatial=False`."
        )


def warn_if_large(change: Tensor, out: Tensor) -> None:
    """Warns of vectors that are larger than the output to which they are added."""
    ratio = float(change.detach().norm() / out.detach().float().norm().clamp_min(1e-30))
    if ratio > 1:
        warnings.warn(
            f"The vectors are {ratio:.1f} times as large as the output that they change, which ruins pictures. Lower "
            "the strength.",
            stacklevel=2,
        )


def summed(vectors: Tensor, which: Sequence[tuple[int, ...]]) -> Tensor:
    """The sum of some of the vectors [K, ...] for each row [B, ...]. Equal rows have equal sums, bit by bit."""
    sums = {some: vectors[list(some)].sum(0) for some in dict.fromkeys(which)}
    return torch.stack([sums[some] for some in which])


def added(
    sides: Sequence[tuple[float, Sequence[Concept], Mapping[str, Tensor]]],
) -> tuple[tuple[Concept, ...], dict[str, Tensor]]:
    """The concepts of all sides (strength, concepts, vectors), and the sum of each concept's vectors."""
    concepts = tuple(dict.fromkeys(concept for _, some, _ in sides for concept in some))
    vectors = {name: torch.zeros(len(concepts), *v.shape[1:]) for name, v in sides[0][2].items()}
    for strength, some, theirs in sides:
        for name, v in theirs.items():
            vectors[name][[concepts.index(concept) for concept in some]] += strength * v
    return concepts, vectors


def shares_of(shares: Any, names: Sequence[str]) -> tuple[float, ...]:
    """The shares in the order of the concepts' names; equal ones for None.

    Raises:
        ValueError: there is not one share >= 0 per concept, or they do not sum to 1.
    """
    if shares is None:
        return (1 / len(names),) * len(names)
    cure = "Give one share per concept, such as (0.5, 0.5)."
    if isinstance(shares, Mapping) and shares.keys() == set(names):
        shares = [shares[name] for name in names]
    if isinstance(shares, str) or not isinstance(shares, Sequence) or len(shares) != len(names):
        raise ValueError(checks.refusal(f"one share for each of {', '.join(names)}", shares, cure))
    found = tuple(checks.number(f"shares[{k}]", share, 0) for k, share in enumerate(shares))
    if not math.isclose(sum(found), 1, abs_tol=1e-6):
        raise ValueError(f"Expected `shares` that sum to 1, got a sum of {sum(found):g}. {cure}")
    return found


def drawn(noise: Tensor, shares: Sequence[float], names: Sequence[str]) -> list[int]:
    """A number per picture, k with the probability `shares[k]`, from the signs of its noise [B, ...].

    Neither a scheduler that scales the noise nor another dtype changes the signs.
    """
    signs = (noise.detach().flatten(1)[:, :SIGNS] > 0).cpu()
    ends = [*itertools.accumulate(shares)][:-1]
    digests = [hashlib.sha256(json.dumps([row, *names]).encode()).digest() for row in signs.int().tolist()]
    return [bisect_right(ends, int.from_bytes(found[:8], "big") / 2**64) for found in digests]
