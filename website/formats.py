"""The reference of Efface's files, from the schemas that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from efface import schema
from efface.auditing.forms import AuditFile
from efface.delta.forms import SteeringHeader
from efface.feedback.forms import JudgementLine
from efface.redteam.forms import AttackFile
from experiments.docs import table


class Format(NamedTuple):
    """A file: its name, where it is found, and its schema."""

    name: str
    about: str
    form: type[BaseModel]


FORMATS = (
    Format("run.json", "In a run folder: all that decides its pictures, and who drew them.", schema.RunFile),
    Format("samples.jsonl", "In a run folder: a line for each picture.", schema.SampleLine),
    Format("scores.json", "In a run folder: the scores of all metrics, with those of the base run.", schema.ScoresFile),
    Format("card.json", "In a run folder: the result for others, with its command.", schema.CardFile),
    Format(
        "Delta header",
        "In a delta, a safetensors file: the entry `efface` of its metadata, as JSON. The tensors are the factors of "
        "the edit, by module.",
        schema.DeltaHeader,
    ),
    Format("Header of latent directions", "The same for vectors on outputs of modules.", schema.DirectionsHeader),
    Format("Header of steering", "The same for edits of outputs of modules.", SteeringHeader),
    Format("Adapter header", "In an adapter of GIE, a safetensors file.", schema.AdapterHeader),
    Format("setting.json", "In the folder of a calibration: what the judgements belong to.", schema.Setting),
    Format("Judgements of a calibration", "In the folder of a calibration: 1 yes, 0 no, -1 open.", schema.Judgements),
    Format("audit.json", "In the folder of an audit.", AuditFile),
    Format("attack.json", "In the folder of an attack.", AttackFile),
    Format("judgements.jsonl", "People's judgements, a line each: `efface judge export`.", JudgementLine),
)


def page() -> str:
    return "\n\n".join(
        [
            "# File formats",
            "Every file has a schema, and Efface checks a file when it reads it. Types are strict, numbers finite, and "
            "lengths bounded. Entries that the schema does not know are kept and have no effect, except where "
            "the table says that there are none. Pictures are PNG, tensors safetensors; Efface reads no pickle.",
            *(part for each in FORMATS for part in _format(each)),
        ]
    )


def _format(each: Format) -> Iterator[str]:
    found = each.form.model_json_schema(by_alias=True)
    yield f"## {each.name}"
    yield each.about
    yield from _table(found, found.get("$defs", {}))
    for name, part in found.get("$defs", {}).items():
        if part.get("type") == "object":
            yield f"`{name}`:"
            yield from _table(part, found["$defs"])


def _table(part: Mapping[str, Any], parts: Mapping[str, Any]) -> Iterator[str]:
    needed = part.get("required", [])
    rows = [
        [f"`{name}`", _type(entry, parts), "yes" if name in needed else f"no, `{_value(entry.get('default'))}`"]
        for name, entry in part.get("properties", {}).items()
    ]
    yield table(["entry", "value", "required"], rows) if rows else "It has no fixed entries."
    if part.get("additionalProperties") is False:
        yield "There are no other entries."


def _value(value: Any) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value)) if value != "" else '""'


def _type(entry: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """A type in words."""
    if "$ref" in entry:
        name = entry["$ref"].rpartition("/")[2]
        return f"`{name}`" if parts[name].get("type") == "object" else _type(parts[name], parts)
    if "anyOf" in entry:
        return " or ".join(dict.fromkeys(_type(each, parts) for each in entry["anyOf"]))
    if values := entry.get("enum", [entry["const"]] if "const" in entry else []):
        return " or ".join(f"`{each}`" for each in values)
    if entry.get("type") == "array":
        return _list(entry, parts)
    if entry.get("type") == "object":
        values = entry.get("additionalProperties")
        return f"mapping of texts to {_type(values, parts)}" if isinstance(values, dict) and values else "mapping"
    return {"string": _text, "integer": _number, "number": _number}.get(str(entry.get("type")), _other)(entry)


def _list(entry: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    each = " and ".join(_type(part, parts) for part in entry.get("prefixItems", ()))
    each = each or (_type(entry["items"], parts) if entry.get("items") else "any value")
    most = f", at most {entry['maxItems']:,} entries" if "maxItems" in entry else ""
    return f"list of ({each}){most}" if "," in each else f"list of {each}{most}"


def _text(entry: Mapping[str, Any]) -> str:
    if "pattern" in entry:
        return f"text like `{entry['pattern']}`".replace("|", "\\|")
    return f"text, at most {entry['maxLength']:,} characters" if "maxLength" in entry else "text"


def _number(entry: Mapping[str, Any]) -> str:
    word = "integer" if entry["type"] == "integer" else "number"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "&lt;=", "exclusiveMaximum": "&lt;"}
    bounds = [f"{sign} {entry[key]:,}" for key, sign in signs.items() if key in entry]
    return f"{word} {' and '.join(bounds)}".strip()


def _other(entry: Mapping[str, Any]) -> str:
    return {"boolean": "true or false", "null": "null"}.get(str(entry.get("type")), "any value")
