"""Loads pipelines from names, folders and files.

Model files are not trusted. Weights must be safetensors. A folder cannot cause an import of other packages or a
download, and code that comes with a model never runs.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from . import checks, files, registry

if TYPE_CHECKING:
    import torch

    from .core import Pipeline

EMBEDDED = {"emoji": "64 x 64 pixels", "emoji-128": "128 x 128 pixels", "emoji-flux": "128 x 128 pixels, FLUX-shaped"}
"""The embedded models, and the size of their pictures."""
Offload = Literal["model", "sequential", "group"]
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
LIBRARIES = ("diffusers", "transformers")
"""The packages that model_index.json may name, in addition to diffusers' pipeline modules and the embedded models."""
KINDS = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}
"""diffusers' name for the kind of a single-file checkpoint, and its pipeline class."""
ONLY_SAFETENSORS = "Efface reads only safetensors, never pickles"


def load(
    model: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    *,
    variant: str | None = None,
    offload: Offload | None = None,
    config: str | Path | None = None,
    allow_hub: bool = False,
) -> Pipeline:
    """Loads a diffusers text-to-image pipeline.

    Args:
        model: "emoji", "emoji-128" or "emoji-flux" for an embedded model; otherwise a folder that `save_pretrained`
            wrote, a single-file .safetensors checkpoint, or a hub id such as "owner/name".
        dtype: dtype of the weights in memory: "fp16", "bf16", "fp32" or a `torch.dtype`. None: float32.
        device: such as "cuda". None: the CPU, or this machine's accelerator if `offload` is given.
        variant: the variant of the folder's files, such as "fp16" for `*.fp16.safetensors`.
        offload: what stays on the CPU until it is used: whole parts ("model"), groups of layers ("group") or single
            layers ("sequential": least memory, slowest).
        config: for a single-file checkpoint: a folder that `save_pretrained` wrote for a model of the same kind. Efface
            uses its tokenizers, scheduler and configurations, never its weights.
        allow_hub: allows downloads from the Hugging Face hub. Otherwise Efface looks for a hub id in the local cache
            only.

    Raises:
        ImportError: the package with an embedded model's text encoder is not installed.
        FileNotFoundError: the folder or file does not exist, or the hub id is not in the cache.
        ValueError: weights are damaged, missing, pickles or of another version; model_index.json names classes of other
            packages; the folder lacks the variant; this machine lacks the device.
        OSError: the hub cannot be reached.
        TypeError: `model` is neither a name nor a path, or `dtype` is not a dtype.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> pipe.unet.config.cross_attention_dim
        384
    """
    if not isinstance(model, (str, Path)):
        raise TypeError(f'Expected the model to be "emoji", a folder or a hub id, got {model!r}. Give one of these.')
    kind, target = _dtype(dtype), _device(device, offload)
    path = Path(model)
    files.refuse_pickle(path)
    if str(model) in EMBEDDED:
        for name, given in (("variant", variant), ("config", config)):
            if given is not None:
                raise ValueError(
                    f"Expected no `{name}` for the embedded model {str(model)!r}, got {str(given)!r}. Leave it out."
                )
        pipe = _embedded(str(model), kind)
    elif path.suffix == ".safetensors":
        pipe = _single_file(path, kind, config, allow_hub)
    else:
        if config is not None:
            raise ValueError(
                f"Expected `config` only for a single-file checkpoint, got it for {str(model)!r}. Leave it out."
            )
        pipe = _saved(model, kind, variant, allow_hub)
    return cast("Pipeline", _placed(pipe, target, offload))


def _dtype(dtype: object) -> torch.dtype | None:
    if dtype is None:
        return None
    import torch

    found = getattr(torch, DTYPES.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise TypeError(
            f"Expected `dtype` to be one of {', '.join(DTYPES)} or a `torch.dtype`, got {checks.shown(dtype)}. Give "
            "one of "
            "these."
        )
    return found


def _device(device: object, offload: object) -> torch.device | None:
    """The device of the pipeline; None for the CPU without offloading."""
    if offload is not None and offload not in get_args(Offload):
        raise ValueError(
            f"Expected `offload` to be one of {', '.join(get_args(Offload))}, got {checks.shown(offload)}. Leave it "
            "out to "
            "keep all parts on the device."
        )
    if device is None and offload is None:
        return None
    import torch

    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        if there is None:
            raise ValueError(
                f"Expected an accelerator for `offload`={offload!r}, got a machine without one. Leave `offload` out."
            )
        return there
    try:
        found = torch.device(cast("str", device))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'Expected `device` to be a device such as "cpu" or "cuda:0", got {checks.shown(device)}. Name one.'
        ) from error
    names = [str(there), "cpu"] if there else ["cpu"]
    count = torch.accelerator.device_count() if there else 0
    if found.type not in ("cpu", "meta") and (there is None or found.type != there.type or (found.index or 0) >= count):
        raise ValueError(f"Expected a device of this machine, got {str(found)!r}. Choose from: {', '.join(names)}.")
    return found


def _placed(pipe: Any, device: torch.device | None, offload: Offload | None) -> Any:
    if device is None:
        return pipe
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level")
    elif device.type != "cpu":  # diffusers prints a warning at `pipe.to("cpu")` with float16 weights, though they work
        return pipe.to(device)
    return pipe


def _embedded(model: str, dtype: torch.dtype | None) -> Any:
    if model == "emoji":
        from .models import emoji

        return emoji.load(dtype=dtype)
    from .models import emoji128

    return emoji128.load(model, dtype=dtype)


def _saved(model: str | Path, dtype: torch.dtype | None, variant: str | None, allow_hub: bool) -> Any:
    """Loads the pipeline from a folder or a hub id."""
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    path = Path(model)
    ours: list[str] = []
    if path.exists():
        if path.is_dir() and not (path / "model_index.json").exists():
            raise FileNotFoundError(
                f"{path} has no model_index.json, so it is not a saved pipeline. Give the top folder of one."
            )
        if not path.is_dir():
            raise ValueError(
                f"{path} is neither a folder nor a .safetensors file, and {ONLY_SAFETENSORS}. Give a folder that "
                "`save_pretrained` wrote, or a single-file .safetensors checkpoint."
            )
        if odd := [each for each in path.rglob("*") if not (each.is_file() or each.is_dir())]:
            raise ValueError(
                f"Expected only files and folders in {path}, got {odd[0]}, which is a broken link or a special file. "
                "Remove it, or download the pipeline again."
            )
        ours = _check_index(path / "model_index.json")
    elif not _is_hub_id(str(model)):
        hint = registry.near(str(model), EMBEDDED)
        raise FileNotFoundError(
            f'There is no folder {str(model)!r}. {hint}{" " if hint else ""}Give "emoji", a folder that '
            "`save_pretrained` wrote, or a hub id such as owner/name."
        )
    more: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        pipe: Any = DiffusionPipeline.from_pretrained(
            str(model), use_safetensors=True, variant=variant, local_files_only=not allow_hub, **more
        )
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        if path.exists():
            raise ValueError(_cannot_load(path, variant, error)) from error
        if allow_hub:
            raise
        raise FileNotFoundError(
            f"There is no folder {str(model)!r}, and no such model in the local cache of the Hugging Face hub. Give "
            "allow_hub=True (--allow-hub) to download it."
        ) from error
    if "emoji128.vae" in ours and "emoji128.text" in ours:
        from .models.emoji128 import with_defaults

        with_defaults(pipe)
    return pipe


def _is_hub_id(model: str) -> bool:
    owner, _, name = model.partition("/")
    return bool(owner.strip(".~") and name) and not {"/", "\\"} & set(name)


def _check_index(file: Path) -> list[str]:
    """Imports the embedded models' modules that a model_index.json names, so that diffusers finds them.

    Raises:
        ValueError: `save_pretrained` did not write the file, or it names classes of other packages, which diffusers
            would import.
    """
    import diffusers
    from diffusers import pipelines

    index = files.read_json(file, "Save the pipeline again, or download it again.")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{file} names no pipeline class. Save the pipeline again with `save_pretrained`.")
    kind = getattr(diffusers, index["_class_name"], None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"Expected a pipeline of diffusers in {file}, got {checks.shown(index['_class_name'])}. Save the pipeline "
            "again, or update diffusers."
        )
    ours = []
    for part, named in index.items():
        if part.startswith("_") or not (isinstance(named, list) and len(named) == 2 and isinstance(named[0], str)):
            continue
        library = named[0]
        if library.startswith("efface.models."):
            ours.append(library.removeprefix("efface.models."))
        elif library not in LIBRARIES and not hasattr(pipelines, library):
            raise ValueError(
                f"{file} takes {part!r} from the package {library[:80]!r}, which Efface does not import for a file. "
                f"Build this pipeline in Python, or save it with parts of {' or '.join(LIBRARIES)}."
            )
    known = ("emoji.vae", "emoji128.vae", "emoji128.text")
    if strange := [name for name in ours if name not in known]:
        raise ValueError(
            f"{file} names efface.models.{strange[0]}, which this version of Efface lacks. Update Efface, or use one "
            f"of: {', '.join(f'efface.models.{name}' for name in known)}."
        )
    for name in ours:
        importlib.import_module(f"efface.models.{name}")
    return ours


def _cannot_load(folder: Path, variant: str | None, error: Exception) -> str:
    """The error for a folder that cannot be loaded: it names the available variants or the damaged files."""
    weights = [file for file in folder.rglob("*.safetensors") if file.parent != folder]
    found = {file.name.split(".")[-2] for file in weights if file.name.count(".") > 1 and "-of-" not in file.name}
    variants = sorted(name for name in found if not name.isdigit() and "-of-" not in name)
    plain = [file for file in weights if file.name.count(".") == 1]
    if variants and (variant not in (None, *variants) or (variant is None and not plain)):
        which = f"no variant {variant!r}" if variant else "no weights without a variant"
        return f"{folder} has {which}. Give one of its variants: {', '.join(map(repr, variants))}."
    if variant is not None and not variants:
        return f"{folder} has no variant {variant!r}, only weights without a variant. Leave `variant` out."
    broken = ", ".join(map(str, damaged(folder))) or "a required file is missing"
    return (
        f"The pipeline in {folder} cannot be loaded ({error}). Damaged files: {broken}. {ONLY_SAFETENSORS}. Save the "
        "pipeline again, or download it again."
    )


def damaged(folder: Path) -> list[Path]:
    """The files of a saved pipeline whose content is not the safetensors or JSON that their names promise."""
    from safetensors import SafetensorError, safe_open

    found = []
    for file in sorted(filter(Path.is_file, folder.rglob("*"))):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix == ".json":
                files.read_json(file, "")
        except (SafetensorError, OSError, ValueError):
            found.append(file)
    return found


def _single_file(file: Path, dtype: torch.dtype | None, config: str | Path | None, allow_hub: bool) -> Any:
    """Loads a pipeline whose weights are all in one file. Takes tokenizers and configurations from `config` or the
    hub."""
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import SingleFileComponentError, infer_diffusers_model_type
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}. Give the path of a single-file checkpoint.")
    if config is None and not allow_hub:
        raise ValueError(
            f"{file} holds only weights, without tokenizers and configurations. Give config=FOLDER "
            "(--config) with a saved model of this kind, or allow_hub=True (--allow-hub) to download them."
        )
    try:
        if config is not None:
            index = Path(config) / "model_index.json"
            if not index.is_file():
                raise FileNotFoundError(
                    f"{config} has no model_index.json, so it is not a saved pipeline. Give a folder that "
                    "`save_pretrained` wrote for a model of the same kind."
                )
            _check_index(index)
            named = files.read_json(index, "")["_class_name"]
        else:
            with safe_open(file, "pt") as held:  # shapes without values
                shapes = {k: torch.empty(held.get_slice(k).get_shape(), device="meta") for k in held.keys()}  # noqa: SIM118
            named = KINDS.get(infer_diffusers_model_type(shapes), "")
        cls = getattr(diffusers, named, None)
        if not (isinstance(cls, type) and hasattr(cls, "from_single_file")):
            raise ValueError(
                f"{file} is a single-file checkpoint of a kind that Efface does not read ({named or 'unknown'}). Give "
                "a folder that `save_pretrained` wrote."
            )
        more: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        where = None if config is None else str(config)
        return cast("Any", cls).from_single_file(str(file), config=where, local_files_only=not allow_hub, **more)
    except (SafetensorError, SingleFileComponentError, KeyError, RuntimeError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        reason = str(error).strip().partition("\n")[0][:300]
        raise ValueError(
            f"{file} cannot be loaded ({reason}). Give a complete checkpoint, and as `config` a saved model of the "
            "same kind and size."
        ) from error
