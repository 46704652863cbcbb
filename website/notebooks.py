"""Notebooks: plain JSON files, whose code is run here in one process, and whose outputs are checked.

    python -m website notebooks            run each notebook, and write the outputs into it
    python -m website notebooks --check    run each, and compare what it prints

A notebook is run without Jupyter: cells in order, what a cell prints and the value of its last line. A picture becomes
a PNG.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL.Image import Image

from . import links
from .links import ROOT

FOLDER = ROOT / "examples/notebooks"
COUNT = re.compile(r"(\d+) of (\d+), 95 % interval \d+ to \d+ %")


def files() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def executed(notebook: Mapping[str, Any], names: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The outputs of each code cell.

    Args:
        notebook: the content of the file.
        names: the variables that the cells share.
    """
    return [_outputs("".join(cell["source"]), names) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _outputs(code: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    tree, value = ast.parse(code), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    made: list[dict[str, Any]] = []
    if text := printed.getvalue():
        made.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        made.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": _data(value)})
    return made


def _data(value: Any) -> dict[str, Any]:
    if isinstance(value, Image):
        buffer = io.BytesIO()
        value.quantize(128).save(buffer, "PNG", optimize=True)
        return {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": ["<a picture>"]}
    return {"text/plain": repr(value).splitlines(keepends=True)}


def write(path: Path) -> None:
    """Runs a notebook, and writes its outputs."""
    notebook = json.loads(path.read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for k, (cell, outputs) in enumerate(zip(cells, executed(notebook, {}), strict=True), 1):
        cell["execution_count"], cell["outputs"] = k, outputs
        for each in outputs:
            if "execution_count" in each:
                each["execution_count"] = k
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


def differences(path: Path) -> list[str]:
    """What a notebook prints now and did not print when its outputs were written.

    Pictures only have to be there. A count of pictures may differ by one, because other processors round otherwise, and
    a detector may then decide otherwise near its threshold.
    """
    notebook = json.loads(path.read_text("utf-8"))
    stored = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    lines = []
    for k, (then, now) in enumerate(zip(stored, executed(notebook, {}), strict=True), 1):
        before, after = list(map(_shown, then)), list(map(_shown, now))
        if len(before) != len(after) or not all(map(_alike, before, after)):
            lines.append(f"{path.name}, code cell {k}: stored {before}, now {after}")
    return lines


def _alike(before: str, after: str) -> bool:
    """Whether two texts are equal but for counts that differ by at most one, and their intervals."""
    counts = [[int(found[1]) for found in COUNT.finditer(text)] for text in (before, after)]
    same = COUNT.sub(r"\2", before) == COUNT.sub(r"\2", after)
    return same and all(abs(a - b) <= 1 for a, b in zip(*counts, strict=True))


def _shown(output: Mapping[str, Any]) -> str:
    return "".join(output.get("text") or output["data"]["text/plain"])


def page(path: Path) -> str:
    """A notebook as a page."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", [])})
            if "image/png" in data:
                parts.append(f'<img alt="What this cell draws" src="data:image/png;base64,{data["image/png"]}">')
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    name = path.relative_to(ROOT).as_posix()
    parts.append(f"This page is the notebook `{name}`, with the outputs that `make docs` compares.")
    return links.rewritten("\n\n".join(parts), name, links.in_site(name))
