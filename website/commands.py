"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from typer.main import get_command

from efface.cli import app
from efface.cli.errors import CODES
from experiments.docs import table


def page() -> str:
    group: Any = get_command(app)
    return "\n\n".join(
        [
            "# Command line",
            f"{group.help} Every command takes `--help`.",
            CODES,
            *(part for name in group.commands for part in _command(f"efface {name}", group.commands[name])),
        ]
    )


def _command(name: str, command: Any) -> Iterator[str]:
    yield f"## `{name}`"
    yield _prose(command.help or "")
    for sub, each in getattr(command, "commands", {}).items():
        yield from (part.replace("## ", "### ", 1) for part in _command(f"{name} {sub}", each))
    if not hasattr(command, "commands"):
        yield f"```text\n{name}{''.join(f' {word}' for word in _usage(command))}\n```"
        if rows := [[_names(option), _meaning(option)] for option in command.params if not option.hidden]:
            yield table(["option", "meaning"], rows)


def _prose(text: str) -> str:
    return text.replace("\b", "").split("\f")[0].strip()


def _usage(command: Any) -> Iterator[str]:
    for each in command.params:
        if each.param_type_name == "argument":
            name = f"{each.name.upper()}{'...' if each.nargs == -1 else ''}"
            yield name if each.required else f"[{name}]"
    yield "[OPTIONS]"


def _names(option: Any) -> str:
    if option.param_type_name == "argument":
        return f"`{option.name.upper()}`"
    return ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _meaning(option: Any) -> str:
    text = " ".join((option.help or "").split()).replace("|", "\\|").replace("<", "&lt;")
    kind = option.type_descriptor.annotation
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    facts = []
    if choices:
        facts.append("One of " + ", ".join(f"`{each}`" for each in choices) + ".")
    if option.required:
        facts.append("Required.")
    elif _plain(option.default) and "Default" not in text:
        facts.append(f"Default: `{option.default}`.")
    return " ".join([text, *facts]).strip()


def _plain(value: Any) -> bool:
    return value not in (None, "", (), []) and not callable(value) and not isinstance(value, bool)
