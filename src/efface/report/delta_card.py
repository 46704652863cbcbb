"""The page that goes with a published delta: what it erases, for which model, how to apply it, what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..runs import Run

SHOWN = ("outcomes.", "removal.absolute", "detection.", "retention", "inappropriateness")
HEAD = """\
---
library_name: efface
tags: [efface, concept-erasure, text-to-image, diffusers]
# Add the licence of the base model, and base_model: its id on the hub.
---
"""
LIMITS = """\
- It lowers a rate. It guarantees nothing for a single picture, and nothing for prompts that were not measured.
- Whoever has the weights can take it off, or teach the concept again with a few pictures.
- It fits its base model only; Efface refuses others.
- It is no proof of compliance with any rule or law."""


def delta_card(config: Mapping[str, Any], file: str, run: Run | None = None) -> str:
    """The page as Markdown, with the header that model hubs read.

    Args:
        config: `delta.config()`.
        file: the name of the delta's file.
        run: a scored run of the base model with this delta, and with no other eraser.

    Raises:
        ValueError: the run was drawn with another delta or eraser, or is not scored.
    """
    return "\n\n".join([HEAD.rstrip("\n"), *_parts(config, file, run)]) + "\n"


def _parts(config: Mapping[str, Any], file: str, run: Run | None) -> Iterator[str]:
    names = ", ".join(concept["name"] for concept in config["concepts"])
    model = config["model"] or "a model without a name"
    yield f"# {_flat(names)}: a delta for {_flat(model)}"
    yield (
        f"An edit by {_code(config['method'])}, made with Efface. It belongs to {_code(model)}, base hash "
        f"`{config['base'][:16]}`."
    )
    lines = [
        f"- {_code(each['name'])}: {', '.join(map(_code, each['phrases']))}"
        + (f"; mapped to {_code(each['anchor'])}" if each.get("anchor") else "")
        for each in config["concepts"]
    ]
    yield "\n".join(["It is aimed at these texts:", "", *lines])
    yield "## Use it"
    yield (
        f'```python\nimport efface\n\npipe = efface.load("THE-BASE-MODEL")\n'
        f"with efface.stack(pipe, efface.api.load_delta({json.dumps(file)})):\n"
        '    image = pipe("a prompt").images[0]\n```'
    )
    yield "## How it was made"
    facts = {
        "method": config["method"],
        "fields": config["fields"],
        "seed": config["seed"],
        "versions": config["versions"],
    }
    yield "```json\n" + json.dumps(facts, indent=1).replace("```", "'''") + "\n```"
    yield "## What was measured"
    yield from _measured(config, run)
    yield "## Limits"
    yield LIMITS


def _measured(config: Mapping[str, Any], run: Run | None) -> Iterator[str]:
    if run is None:
        yield "Nothing is attached. `efface bench` with this delta draws a run, and `efface delta card --run` adds it."
        return
    card = run.card()
    hashes = [each.get("hash") for each in card["erasers"]]
    if hashes != [config["hash"]]:
        raise ValueError(
            f"Expected a run of this delta alone, but {run.folder} has other erasers. Draw one with `efface bench "
            "--delta`."
        )
    rows = [score for score in card["scores"] if score["metric"].startswith(SHOWN)]
    yield "\n".join(["| score | this delta | base model | n |", "|---|---|---|---|", *map(_row, rows)])
    suite = card["suite"]
    yield (
        f"Suite `{suite['name']}`, {card['rows']['n']} rows, 95 % intervals. Command: {_code(card['command'])}. "
        "A detector judged the pictures; how often it errs is not in this table."
    )
    if missing := [f"- {_code(each['concept'])}: {each['why']}" for each in card.get("coverage", ()) if each["why"]]:
        yield "\n".join(["Not judged:", "", *missing])


def _row(score: Mapping[str, Any]) -> str:
    return f"| {_code(score['metric'])} | {_number(score)} | {_number(score['base'])} | {score['n']} |"


def _number(score: Mapping[str, Any] | None) -> str:
    if not score or score["value"] is None:
        return "not defined"
    ends: Sequence[float | None] = (score["low"], score["high"])
    interval = "" if None in ends else f" [{score['low']:.3f}, {score['high']:.3f}]"
    return f"{score['value']:.3f}{interval}"


def _flat(text: str) -> str:
    """A text in one line, without characters that mean something in Markdown."""
    return " ".join("".join(" " if c in "`*_[]<>|#\\" else c for c in text).split())


def _code(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").replace("|", "/").split()) + "`"
