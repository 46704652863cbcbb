"""The options that verbs share."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from .. import checks, registry
from .._hub import allowing
from .output import quiet

if TYPE_CHECKING:
    from ..core import Concept, Pipeline
    from ..records import Metric

ConceptNames = Annotated[list[str] | None, typer.Option("--concept", help="A shipped concept; may be repeated.")]
Phrases = Annotated[list[str] | None, typer.Option("--phrase", help="Any other text to erase; may be repeated.")]
ModelName = Annotated[
    str, typer.Option("--model", help='"emoji", a folder, a single-file .safetensors checkpoint, or a hub id.')
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="The method, see `efface list methods`. Default: eiup, or no method if --delta is given. Write a preset "
        "after a dot: sld.strong.",
    ),
]
DeltaFiles = Annotated[list[Path] | None, typer.Option("--delta", help="A file made by `efface fit`; may be repeated.")]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="Classifier-free guidance scale; 1 means none. Default: the suite's scale if there is a suite, otherwise "
        "the model's.",
    ),
]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A field of the method, NAME=VALUE.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace earlier results in --out.")]
Format = Annotated[
    Literal["csv", "md", "latex"] | None, typer.Option("--format", help="Print the table in this format.")
]
Labels = Annotated[
    str | None,
    typer.Option("--labels", help="A store made by `efface judge label`: adds rates that are corrected by its labels."),
]
AllowHub = Annotated[bool, typer.Option("--allow-hub", help="Allow downloads from the Hugging Face hub.")]

LOADING: dict[str, Any] = {
    "device": Annotated[str | None, typer.Option(help="The device, such as cuda. Default: the CPU.")],
    "dtype": Annotated[str | None, typer.Option(help="dtype of the weights in memory: fp16, bf16 or fp32.")],
    "variant": Annotated[str | None, typer.Option(help="The variant of the model's files, such as fp16.")],
    "offload": Annotated[
        str | None, typer.Option(help="What stays on the CPU until it is used: model, group or sequential.")
    ],
    "config": Annotated[
        Path | None, typer.Option(help="For a single-file checkpoint: a saved model of the same kind.")
    ],
    "allow_hub": AllowHub,
}
"""The options of `efface.load`."""


def loads(verb: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of `efface.load` to a verb, which receives them as the mapping `loading`."""

    @functools.wraps(verb)
    def allowed(**given: Any) -> None:
        with allowing(given["loading"]["allow_hub"]):  # also for the models that judge
            verb(**given)

    return shared("loading", LOADING, {**dict.fromkeys(LOADING), "allow_hub": False})(allowed)


def shared(
    name: str, options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds options to a verb, which receives them as a mapping of this name."""

    def adding(verb: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def wrapped(**given: Any) -> None:
            mine = {option: given.pop(option) for option in options}
            verb(**given, **{name: mine})

        signature, types = inspect.signature(verb), get_type_hints(verb, include_extras=True) | dict(options)
        own = [each for each in signature.parameters.values() if each.name != name]
        more = [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=defaults[option]) for option in options
        ]
        typed = [each.replace(annotation=types.get(each.name, each.annotation)) for each in (*own, *more)]
        wrapped.__signature__ = signature.replace(parameters=typed)  # type: ignore[attr-defined]
        wrapped.__annotations__ = types
        return wrapped

    return adding


def load(model: str, loading: Mapping[str, Any]) -> Pipeline:
    """Loads the pipeline, without its progress bars."""
    from .. import api

    quiet()
    pipe = api.load(model, **loading)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parse_fields(settings: list[str] | None, option: str = "--set") -> dict[str, Any]:
    """Parses `name=value` pairs. A value that is not JSON is a text.

    Raises:
        ValueError: the text is not a pair, a name occurs twice, or a value is nested too deeply.
    """
    fields: dict[str, Any] = {}
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ValueError(
                checks.refusal(f"{option} NAME=VALUE", setting, f"Write for example {option} strength=1.5.")
            )
        if name in fields:
            raise ValueError(f"Expected {option} {name} once, got it twice. Leave one out.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
        except (RecursionError, ValueError) as error:  # a whole number of thousands of digits is a ValueError
            raise ValueError(
                checks.refusal(f"a flat value for {option} {name}", value, "Give a shorter one.")
            ) from error
    return fields


def targets_of(concept: list[str] | None, phrase: list[str] | None) -> list[Concept]:
    from ..core import Concept
    from ..core import concept as shipped

    return [shipped(name) for name in concept or []] + [Concept(text) for text in phrase or []]


NOTHING = "There is nothing to erase. Give --concept NAME or --phrase TEXT."


def find_erasers(
    concept: list[str] | None,
    phrase: list[str] | None,
    method: str | None,
    delta: list[Path] | None,
    settings: list[str] | None,
    texts: str = "",
) -> tuple[list[Concept], list[Any]]:
    """The concepts and the erasers: deltas, then the method, by default for the deltas' concepts.

    Raises ValueError if there are only learned words that neither a method nor `texts`, the prompts, would read.
    """
    targets, fields = targets_of(concept, phrase), parse_fields(settings)
    name = (None if delta else "eiup") if method is None else method
    if not targets and name is not None and not delta:
        raise ValueError(NOTHING)
    if fields and name is None:
        raise ValueError("--set sets fields of a --method, but only deltas were given. Name the method too.")
    if name is not None:
        registry.resolve(registry.split(name)[0], "erasers")
    from .. import api

    erasers = load_deltas(delta)
    targets = targets or list(dict.fromkeys(c for each in erasers for c in each.concepts))
    if not targets and name is not None:
        raise ValueError(NOTHING)
    words = [word for each in erasers for word in getattr(each, "words", ())]
    changing = [each for each in erasers if not hasattr(each, "words") or each.delta is not None]
    if words and name is None and not changing and not any(word in texts.lower() for word in words):
        raise ValueError(
            f"Expected a method that reads {words[0]!r}, got none, so nothing would be erased. Give --method, such as "
            "--method eiup."
        )
    return targets, erasers + ([api.build(name, targets, **fields)] if name is not None else [])


def load_deltas(files: Sequence[Path] | None) -> list[Any]:
    """Loads the deltas in these files. Raises ValueError if two are equal, because their change would count twice."""
    from .. import api

    found: dict[str, Path] = {}
    deltas = []
    for path in files or ():
        deltas.append(api.load_delta(path))
        if (first := found.setdefault(deltas[-1].hash, path)) is not path:
            twice = f"{path} is given twice" if first == path else f"{path} is the same delta as {first}"
            raise ValueError(f"{twice}, and its change would count twice. Give each delta once.")
    return deltas


def check_guidance(erasers: list[Any], guidance: float | None, pipe: Pipeline | None = None) -> None:
    """Raises ValueError if an eraser needs guidance, but --guidance or the pipeline's default disables it."""
    if guidance is not None:
        checks.number("--guidance", guidance)
        why, cure = f"--guidance is {guidance:g}" if guidance <= 1 else "", "a value"
    else:
        from ..families import family

        why = "this model draws without it by default" if pipe and family(pipe).guidance_condition else ""
        cure = "--guidance"
    for eraser in erasers:
        if why and getattr(eraser, "wants_guidance", False):
            raise ValueError(
                f"{type(eraser).__name__} needs guidance, but {why}. Give {cure} above 1, or --method eiup."
            )


def judges(configs: Sequence[Mapping[str, Any]], settings: list[str] | None, option: str) -> tuple[Metric, ...]:
    """Makes metrics with the given fields, and further metrics that the settings name. A single METRIC may be
    omitted."""
    from .. import runs

    changed = [dict(config) for config in configs]
    for key, value in parse_fields(settings, option).items():
        name, _, field = key.rpartition(".")
        meant = [config for config in changed if name in ("", config["method"])]
        if not meant and name in registry.methods("metrics"):
            meant = [{"method": name}]
            changed += meant
        if len(meant) != 1:
            known = ", ".join(config["method"] for config in changed)
            hint = registry.near(name, registry.methods("metrics"))
            raise ValueError(
                checks.refusal(f"METRIC.NAME=VALUE with one of the metrics {known}", key, hint or "Name the metric.")
            )
        meant[0][field] = value
    return runs.make_metrics(changed)


def known(truth: Callable[[str], object], name: str) -> bool:
    try:
        truth(name)
    except ValueError:
        return False
    return True
