"""Docstrings, pages and messages are written to be read once: no phrase that has to be decoded, no endless sentence."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 40
"""Words in a sentence; most have under 25."""
PHRASES = (
    r"that (is|are) no\b",
    r"\b(is|are) told\b",
    r"\baimed at (is|are|was|were)\b",
    r"\bof (its|their) own\b.*\bof (its|their) own\b",
    r"\bno third kind\b",
    r"\bat once\b",
    r"\bwhat .{3,40} has more than\b",
    r"\bbeside (it|them|him|that)\b",
    r"\bthat want any\b",
    r"\bgoe?s? before (it|them)\b",
    r"\bsays so\b",
    r"\bor nothing beside\b",
    r"\bplain (model|pictures?|pipeline|prediction|run|steps?)\b",
    r"\bbut got\b",
    r"\banew\b",
    r"\bnobody has\b",
    r"\bas (it|they) (is|are|was|were)\b",
    r"(?<!there )\b(is|are|was|were) no (file|text|JSON|tensor|safetensors|sequence|editor|eraser|success)\b",
    r"\b(may be|must|should) survive\b",
    r"\b(stands?|comes?|goes) (behind|beside)\b",
    r"\b(takes?|took|taken|comes?|came) off\b",
    r"\bputs? (on|back)\b",
    r"\bnothing of the concept\b",
    r"\b(is|are) (no longer )?on already\b",
    r"\b(much|many) (of the concept )?is left\b",
    r"\bwhat (it|they) (do|does|did|draws?|puts? out)\b",
)
EYES = re.compile(r"\beyes?\b", re.IGNORECASE)
"""The word of the packages of the embedded models; everywhere else it is a detector."""
DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def pages() -> list[Path]:
    rooms = ("docs", "recipes", "src", "experiments", "examples", "integrations")
    places = (ROOT, *(ROOT / room for room in rooms))
    found = {page for k, place in enumerate(places) for page in (place.rglob if k else place.glob)("*.md")}
    found -= set((ROOT / "experiments" / "earlier").glob("*.md"))  # records of earlier versions
    return sorted(page for page in found if page.name != "CHANGELOG.md")


def sources() -> list[Path]:
    return sorted(
        file
        for room in ("src", "experiments", "recipes", "website", "integrations")
        for file in (ROOT / room).rglob("*.py")
    )


def paragraphs_of_page(text: str) -> Iterator[str]:
    """The prose of a page: no code, tables, generated blocks or pictures."""
    text = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.) )", text):
        if not block.startswith(("|", "    ", "![", "#")):
            yield block


def paragraphs_of_source(text: str) -> Iterator[str]:
    """Docstrings without their examples, and the texts of errors and warnings."""
    docstrings, raised = written(text)
    for doc in docstrings:
        prose = re.sub(r"^ *\S+ {3,}.*$", "", re.split(r"\n\s*(?:Example|Shapes):", doc)[0], flags=re.MULTILINE)
        yield from re.split(r"\n\s*\n|\n(?=\s*(?:[\w`, ]+:|[-*]|\d+\.) )", prose)
    yield from raised


def messages(text: str) -> list[str]:
    """The texts of errors that are written where they are raised, with "…" for what is filled in."""
    return written(text)[1]


@functools.cache
def written(text: str) -> tuple[list[str], list[str]]:
    """The docstrings of a source, and the texts of its errors."""
    docstrings, raised = list[str](), list[str]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCSTRINGS) and (doc := ast.get_docstring(node)):
            docstrings.append(doc)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    raised.append(argument.value)
                elif isinstance(argument, ast.JoinedStr):
                    parts = [str(each.value) if isinstance(each, ast.Constant) else "…" for each in argument.values]
                    raised.append("".join(parts))
    return docstrings, raised


def faults(paragraph: str) -> Iterator[str]:
    flat = " ".join(re.sub(r"\]\([^)]*\)", "]", paragraph).split())
    words = re.sub(r"`[^`]*`", "`…`", flat)
    for phrase in PHRASES:
        if found := re.search(phrase, words, re.IGNORECASE):
            yield f"phrase: {words[max(0, found.start() - 40) : found.end() + 40]}"
    for sentence in re.split(r"(?<=[.!?;:])\s+(?=[A-Z`\[*(…])", flat):
        if (n := len(sentence.split())) > LONGEST and "|" not in sentence and " = " not in sentence:
            yield f"{n} words: {sentence[:100]}"


def found(files: Iterable[Path], of: Callable[[str], Iterable[str]]) -> list[str]:
    """What is found in the texts of these files, with the names of the files."""
    return [f"{file.relative_to(ROOT)}: {each}" for file in files for each in of(file.read_text("utf-8"))]


def test_pages_read_once() -> None:
    assert len(pages()) > 50
    assert found(pages(), lambda text: (f for each in paragraphs_of_page(text) for f in faults(each))) == []


def test_docstrings_and_messages_read_once() -> None:
    assert len(sources()) > 400
    assert found(sources(), lambda text: (f for each in paragraphs_of_source(text) for f in faults(each))) == []


SPOKEN = r"\b(give|use|name|load|call|write|make|put|leave|take|wait|install|run|fit|choose|move|delete|convert)\b"


def unclear(message: str) -> bool:
    flat = " ".join(message.split())
    return len(flat) >= 420 or bool(re.search(rf"[^.…]: {SPOKEN}", flat))


def test_errors_name_the_cause_in_one_sentence_and_the_cure_in_the_next() -> None:
    assert found(sources(), lambda text: filter(unclear, messages(text))) == []
    assert unclear("No file: give one.") and not unclear("There is no file. Give one.")


def eyes(text: str) -> list[str]:
    names = r"`[^`]*`|\"[^\"]*\"|'[^']*'|\w*_eyes?\w*|eyes?:"
    return EYES.findall(re.sub(names, "", "\n".join(paragraphs_of_source(text))))


def test_a_detector_is_called_a_detector() -> None:
    assert found((file for file in sources() if "emoji" not in str(file)), eyes) == []
    assert eyes('"""The eye judges, not `eyes`."""') == ["eye"]


@pytest.mark.parametrize(
    "text",
    ["A dtype that is none, of which it is told.", "The plain model draws.", f"It says {'very ' * LONGEST}much."],
)
def test_the_lint_finds_such_phrases(text: str) -> None:
    assert list(faults(text))
