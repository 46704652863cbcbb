"""Makes metrics by name, and checks the metrics that a record names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .. import checks, registry
from ..records import Metric
from .folder import RUN
from .record import Run

WORDS = frozenset(
    {"", "alex", "boxes", "clip:emoji", "config", "emoji", "eye", "inception", "pictures", "sorted", "squeeze", "vgg"}
)
"""Texts in metric fields that name a part of Efface or a choice."""
LABELS = frozenset({"by", "classes", "counts", "kinds", "labels", "names", "other", "texts"})
"""Fields of native metrics and detectors that hold labels, which are never opened as files."""


def metric_config(metric: Metric) -> dict[str, Any]:
    """A metric's name and fields. Values that JSON cannot hold, such as a user's detector, are stored by `repr`."""
    fields: dict[str, Any] = dataclasses.asdict(metric) if dataclasses.is_dataclass(metric) else {}
    return {"method": registry.name_of(type(metric)), **json.loads(json.dumps(fields, default=repr))}


def make_metrics(configs: Sequence[Mapping[str, Any]]) -> tuple[Metric, ...]:
    """Makes the metrics with these names and fields."""
    return tuple(make_metric(entry["method"], **{k: v for k, v in entry.items() if k != "method"}) for entry in configs)


def make_metric(name: str, **fields: Any) -> Metric:
    """Makes a metric by name, with its fields."""
    cls = registry.resolve(name, "metrics")
    checks.fields(name, cls, fields)
    metric: Metric = cls(**fields)
    return metric


def recorded(run: Run, given: Collection[str] = ()) -> list[dict[str, Any]]:
    """The metrics that a run's record names, as `make_metrics` takes them.

    A record may come from an untrusted source. It may choose parts of Efface, and set numbers and labels. Only the user
    may name files, folders and hub models.

    Args:
        run: the run.
        given: the fields that the user sets, as METRIC.FIELD or FIELD.

    Raises:
        ValueError: the record names a file, a folder or a hub model in another field.
    """
    configs = [dict(config) for config in run.record["metrics"]]
    for config in configs:
        name = config["method"]
        field, place = foreign(config, {g.removeprefix(f"{name}.") for g in given})
        if field:
            raise ValueError(
                f"{run.folder / RUN} sets `{name}.{field}` to {checks.shown(place)}, which may be a file or a hub "
                f"model. If you trust it, run `efface score {run.folder} --set "
                f"{name}.{field}=VALUE`."
            )
    return configs


def foreign(config: Mapping[str, Any], given: Collection[str] = ()) -> tuple[str, str]:
    """A field of a recorded metric that names a file, a folder or a hub model, and its value; "" if there is none."""
    cls = registry.resolve(config["method"], "metrics")
    native = cls.__module__.startswith("efface.")
    usual = {f.name: f.default for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    for field in config.keys() - {"method", *given}:
        value, default = config[field], usual.get(field, dataclasses.MISSING)
        if default is not dataclasses.MISSING and json.loads(json.dumps(default, default=repr)) == value:
            continue
        if place := _place(value, native and field in LABELS):
            return field, place
    return "", ""


def _place(value: Any, label: bool) -> str:
    """A text in a field's value that is neither a label nor a name in Efface; "" if there is none."""
    if isinstance(value, str):
        return "" if label or value in WORDS or _detector(value) else value
    if isinstance(value, Mapping):
        return next(filter(None, (_place(v, k in LABELS) for k, v in value.items())), "")
    return next(filter(None, (_place(v, label) for v in value)), "") if isinstance(value, list) else ""


def _detector(name: str) -> bool:
    from ..detectors._protocols import about

    return name in about()
