"""What users call: `load`, `erase`, `stack`, and the shipped concepts."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import checks, registry
from .core import (
    Concept,
    Concepts,
    Detector,
    Eraser,
    Handle,
    Handles,
    check_eraser,
    concept,
    shipped_concepts,
)

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from .core import Pipeline
    from .delta import Delta

__all__ = [
    "active",
    "build",
    "concept",
    "concepts",
    "conditional_rows",
    "draw",
    "editor",
    "effectiveness",
    "erase",
    "load",
    "load_delta",
    "model_hash",
    "stack",
]


def concepts() -> dict[str, Concept]:
    """The shipped concepts by name, as a copy.

    Example:
        >>> import efface
        >>> "nudity" in efface.concepts()
        True
    """
    return dict(shipped_concepts())


def load(model: str | Path, dtype: torch.dtype | None = None, device: str | None = None) -> Pipeline:
    """A diffusers text-to-image pipeline, ready for erasers.

    Args:
        model: "emoji", "emoji-128" or "emoji-flux" for an embedded model; else a folder written by `save_pretrained`,
            or a hub id.
        dtype: of the weights; None: float32 for an embedded model, as stored for others.
        device: such as "cuda"; None leaves the pipeline on the CPU.

    Raises:
        ImportError: the emoji model's text encoder is not installed.
        FileNotFoundError, ValueError: a weight file is missing, damaged, a pickle, or another version; no such folder.
        OSError: a hub id that cannot be reached.
        TypeError: a model that is no name or path, or a dtype that is none.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> pipe.unet.config.cross_attention_dim
        384
    """
    if not isinstance(model, (str, Path)):
        raise TypeError(f'Expected the model to be "emoji", a folder or a hub id, but got {model!r}.')
    if dtype is not None:
        import torch

        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"Expected `dtype` to be one of torch's, such as torch.float16, but got {dtype!r}.")
    pipe: Any
    if str(model) == "emoji":
        from .models import emoji

        pipe = emoji.load(dtype=dtype, device=device or "cpu")
        return cast("Pipeline", pipe)
    if str(model) in ("emoji-128", "emoji-flux"):
        from .models import emoji128

        pipe = emoji128.load(str(model), dtype=dtype, device=device or "cpu")
        return cast("Pipeline", pipe)
    path = Path(model)
    index = path / "model_index.json"
    if "/" not in str(model) and not path.exists():
        hint = registry.near(str(model), ["emoji", "emoji-128", "emoji-flux"])
        raise FileNotFoundError(
            f'There is no folder {str(model)!r}. {hint}{" " if hint else ""}Give "emoji", a folder that '
            "`save_pretrained` wrote, or a hub id such as owner/name."
        )
    if path.exists() and not index.is_file():
        raise FileNotFoundError(f"{path} is not a saved pipeline: it has no model_index.json. Give its top folder.")
    written = index.read_text("utf-8") if index.is_file() else ""
    if written and '"_class_name"' not in written:
        raise ValueError(f"{index} names no pipeline class: it is not what `save_pretrained` writes. Save it again.")
    ours = [name for name in ("emoji.vae", "emoji128.vae", "emoji128.text") if f"efface.models.{name}" in written]
    for name in ours:
        importlib.import_module(f"efface.models.{name}")  # diffusers finds our classes only if they are imported
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(model), use_safetensors=True, **({} if dtype is None else {"dtype": dtype})
        )
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        if not path.exists():
            raise
        files = ", ".join(map(str, damaged(path))) or "one that it needs is missing"
        raise ValueError(
            f"The pipeline in {path} cannot be loaded ({error}). Damaged files: {files}. Only safetensors are read, "
            "never pickles. Save the pipeline again, or download it again."
        ) from error
    if "emoji128.vae" in ours and "emoji128.text" in ours:
        from .models.emoji128 import with_defaults

        with_defaults(pipe)
    return cast("Pipeline", pipe if device is None else pipe.to(device))


def damaged(folder: Path) -> list[Path]:
    """The files of a saved pipeline that are no safetensors or no JSON, though they are named so."""
    from safetensors import SafetensorError, safe_open

    found = []
    for file in sorted(folder.rglob("*")):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix == ".json":
                json.loads(file.read_text("utf-8"))
        except (SafetensorError, ValueError):
            found.append(file)
    return found


def build(method: str, concepts: Concepts, /, **fields: Any) -> Any:
    """The eraser `method`, or a preset of it ("sld.strong"), for `concepts`, configured by `fields`.

    Raises:
        ValueError: unknown method, preset or field (the message has near matches), or a field out of range.
        TypeError: a method that is no text.
    """
    name, preset = registry.split(method)
    cls = _checked(name, "erasers", fields)
    if not preset:
        return cls(concepts, **fields)
    known = registry.presets(cls)
    if preset not in known:
        hint, there = registry.near(preset, known), ", ".join(known) or "none"
        raise ValueError(
            f"{name} has no preset {checks.shown(preset)}. {hint}{' ' if hint else ''}Its presets: {there}."
        )
    return known[preset](concepts, **fields)


def editor(method: str, /, **fields: Any) -> Any:
    """The editor `method`, configured by `fields`; its `fit(pipe, concepts)` gives a delta.

    Raises:
        ValueError: unknown method or field (the message has near matches), or a field out of range.
    """
    return _checked(method, "editors", fields)(**fields)


def _checked(method: str, room: str, fields: dict[str, Any]) -> type:
    cls = registry.resolve(method, room)
    if "concepts" in fields:
        raise ValueError(
            f"The concepts of {method} are not set like its fields. Name them by --concept or --phrase, in Python by "
            "the argument for concepts."
        )
    checks.fields(method, cls, fields, hidden=("concepts",))
    return cls


def cut_off(pipe: DiffusionPipeline, prompt: str) -> str:
    """The end of a prompt that the pipeline's text encoders do not read; "" if they read all of it."""
    from ._text import cut_off

    return cut_off(pipe, prompt)


def load_delta(path: str | Path) -> Delta:
    """The delta in a file, as `Delta.save` and `efface fit` write it; see `Delta.load`."""
    from .delta import Delta

    return Delta.load(path)


def erase(pipe: DiffusionPipeline, concepts: Concepts, method: str = "eiup", **fields: Any) -> Handle:
    """Erases concepts from what a pipeline draws, at once, by any run-time method.

    Args:
        pipe: a diffusers text-to-image pipeline.
        concepts: names of shipped concepts, `Concept` objects, or a sequence of them.
        method: an eraser's name, as `efface list methods` shows them; a preset goes behind a dot: "sld.strong".
        fields: the method's own fields, such as `strength`.

    Returns:
        A handle: a context manager with `remove()`, settable `strength` and `rows`.

    Raises:
        ValueError: unknown concept, method or field, or a field out of range.
        TypeError: a pipeline of an unknown family, or a method that is no text.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.erase(pipe, "alcohol", method="eiup"):
        ...     images = pipe("a night at the pub", num_inference_steps=2).images
        >>> len(images)
        1
    """
    eraser: Eraser = build(method, concepts, **fields)
    return eraser.apply(pipe)


def active(pipe: DiffusionPipeline) -> Handles:
    """What is on a pipeline: run-time erasers in their order, then deltas. Printed, it is a table.

    Args:
        pipe: a diffusers text-to-image pipeline; a deep copy of a guarded one has erasers of its own.

    Returns:
        The handles as one: `active(pipe).remove()` takes all of them off, `active(pipe)[0].strength = 1.0` changes one.

    Raises:
        TypeError: a pipeline of an unknown family.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.EIUP("alcohol").apply(pipe):
        ...     print(efface.active(pipe))
        EIUP  strength 2.25  alcohol
    """
    from . import delta
    from .hooks.sites import handles

    return Handles([*handles(pipe), *delta.handles(pipe)])


@contextlib.contextmanager
def conditional_rows(pipe: DiffusionPipeline, rows: Sequence[bool]) -> Iterator[None]:
    """Says which rows are conditional in denoiser calls that are made without the pipeline, as by attacks.

    With erasers on, such a call has to be told: in a call of the pipeline, `encode_prompt` says which rows of the batch
    read the prompt, and a guess would leave pictures unguarded.

    Args:
        pipe: the pipeline whose denoiser is called.
        rows: for each row of the denoiser call whether it reads the prompt (True) or the unconditional text (False);
            as in diffusers, unconditional rows come first.

    Raises:
        ValueError: no rows, or an unconditional row behind a conditional one.
        RuntimeError: in the denoiser call: another number of rows.

    Example:
        >>> import efface, torch
        >>> pipe = efface.load("emoji")
        >>> text, empty = pipe.encode_prompt("a night at the pub", "cpu", 1, True)
        >>> latents = torch.randn(2, 8, 8, 8)
        >>> with efface.EIUP("alcohol").apply(pipe), efface.conditional_rows(pipe, [False, True]), torch.no_grad():
        ...     prediction = pipe.unet(latents, 500, torch.cat([empty, text])).sample
        >>> prediction.shape
        torch.Size([2, 8, 8, 8])
    """
    from .hooks.sites import rows_given

    given = [bool(row) for row in rows]
    if not given or given != sorted(given):
        raise ValueError(
            f"Expected `rows` to be truth values, False for unconditional rows and then True for conditional ones, but "
            f"got {given}. Put the unconditional rows first, as diffusers does."
        )
    with rows_given(pipe, given):
        yield


def stack(pipe: DiffusionPipeline, *erasers: Eraser) -> Handles:
    """Applies several erasers, in order; all or none.

    Args:
        pipe: a diffusers text-to-image pipeline.
        erasers: such as `efface.EIUP("alcohol")`, and deltas.

    Returns:
        Their handles as one: a context manager with `remove()`; each handle can come off on its own.

    Raises:
        ValueError: one that does not fit the pipeline; those before it are taken off again.
        TypeError: something that is no eraser, or a pipeline of an unknown family.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.stack(pipe, efface.EIUP("alcohol"), efface.EIUP("weapon")) as handles:
        ...     len(handles)
        2
    """
    for eraser in erasers:
        check_eraser(eraser)
    handles: list[Handle] = []
    try:
        for eraser in erasers:
            handles.append(eraser.apply(pipe))
    except BaseException:
        Handles(handles).remove()
        raise
    return Handles(handles)


def draw(
    pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], batch: int = 32, **call: Any
) -> torch.Tensor:
    """Pictures float [N, 3, H, W] in [0, 1], one per prompt, each from its own seed.

    Args:
        pipe: the pipeline.
        prompts: N prompts.
        seeds: N seeds; a picture depends on its own seed only, whatever it is batched with (up to float rounding).
        batch: pictures per pipeline call.
        call: further arguments of the pipeline, such as `guidance_scale`; one `negative_prompt` is for all prompts.

    Raises:
        ValueError: not as many seeds as prompts, or pictures that became NaN, as by too much strength or guidance.
    """
    import torch

    if len(prompts) != len(seeds):
        raise ValueError(
            f"Expected one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds. Give as many."
        )
    pictures, call = [], {"num_inference_steps": 25, "guidance_scale": 7.5, **call}
    negative = call.pop("negative_prompt", None)
    for k in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(s) for s in seeds[k : k + batch]]
        if negative is not None:  # pipelines want as many as prompts
            every = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
            call["negative_prompt"] = every[k : k + batch]
        out = cast("Pipeline", pipe)(list(prompts[k : k + batch]), generator=generators, output_type="pt", **call)
        pictures.append(out.images.float().cpu())
        broken = [s for s, x in zip(seeds[k : k + batch], pictures[-1], strict=False) if not x.isfinite().all()]
        if broken:
            raise ValueError(
                f"{len(broken)} of {len(pictures[-1])} pictures became NaN (seed {broken[0]}): the numbers left the "
                "range of the model. Lower the strength or the guidance scale, or load the model in float32."
            )
    return torch.cat(pictures)


def effectiveness(
    prompts: Sequence[str],
    model: DiffusionPipeline | str | Path,
    detector: Detector,
    n: int = 5,
    seed: int = 1_000_000,
    batch: int = 32,
    **call: Any,
) -> list[float]:
    """The share of each prompt's pictures in which a detector sees the concept, without any erasure.

    A prompt that hardly draws the concept says nothing about an eraser, and one that was chosen on another model may be
    such a prompt. Six-CD keeps prompts with at least 4 of 5.

    Args:
        prompts: what to draw.
        model: a pipeline, or what `load` takes.
        detector: pictures to bool [J, N], such as `efface.detector("eyes", "alcohol")`; all judges must see the
            concept.
        n: pictures of each prompt, with seeds `seed` ... `seed + n - 1`.
        seed: the first seed.
        batch: pictures per pipeline call.
        call: further arguments of the pipeline, such as `guidance_scale`.

    Raises:
        ValueError: n < 1, or seeds that reach 2**32.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> efface.effectiveness(["a cat"], pipe, efface.detector("eyes", "cat"), n=1, num_inference_steps=1)
        [0.0]
    """
    checks.seed("seed", seed, checks.whole("n", n))
    pipe = load(model) if isinstance(model, (str, Path)) else model
    texts = [p for p in prompts for _ in range(n)]
    hits: list[bool] = []
    for k in range(0, len(texts), batch):
        some = texts[k : k + batch]
        seeds = [seed + (k + j) % n for j in range(len(some))]
        hits += detector(draw(pipe, some, seeds, batch, **call)).all(0).tolist()
    return [sum(hits[k : k + n]) / n for k in range(0, len(hits), n)]


def model_hash(pipe: DiffusionPipeline) -> str:
    """sha256 over the denoiser's text-facing weights: sorted names, shapes, dtypes and bytes.

    Two models with the same hash read text alike; records name the base model by it. Deltas that are on do not count.
    """
    from ._weights import text_hash
    from .delta import unedited

    return text_hash(pipe, unedited(pipe))
