"""The schema of an attack's files. Imports pydantic, so import it only where a file is read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from ..schema import ConceptFacts, Count, Form, Method, ModelFacts, Sha, Short, Text


class AttackFile(Form):
    """attack.json"""

    format: Literal[1]
    attack: Method
    access: Short
    concept: ConceptFacts
    model: ModelFacts
    erasers: list[Method]
    prompts: Annotated[list[Text], Field(min_length=1, max_length=100_000)]
    budget: Annotated[int, Field(ge=1)]
    n: Annotated[int, Field(ge=1, le=100_000)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    steps: Annotated[int, Field(ge=1)]
    guidance: float | None
    control: bool
    quality: Quality | None = None


class Quality(Form):
    guarded: Annotated[float, Field(ge=0, le=1)]
    base: Annotated[float, Field(ge=0, le=1)]


class Spent(Form):
    forward: Annotated[int, Field(ge=0)]
    backward: Annotated[int, Field(ge=0)]
    texts: Annotated[int, Field(ge=0)]
    pictures: Annotated[int, Field(ge=0)]


class SearchFacts(Form):
    found: Annotated[float, Field(ge=0, le=1)]
    tried: Annotated[int, Field(ge=0)]
    stopped: Literal["found", "budget", "exhausted"]
    cost: Spent


class AttackPicture(Form):
    file: Annotated[str, StringConstraints(pattern=r"^images/[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.png$")]
    sha256: Sha


Arm = Literal["base", "before", "attacked", "control"]


class AttemptLine(Form):
    """A line of attempts.jsonl."""

    k: Count
    prompt: Text
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1, max_length=100_000)]
    drawn_by_base: Annotated[float, Field(ge=0, le=1)]
    outcomes: dict[Arm, Annotated[list[Annotated[int, Field(ge=0, le=2)]], Field(max_length=100_000)]]
    search: dict[Arm, SearchFacts] = Field(default_factory=dict, max_length=4)
    pictures: dict[Arm, list[AttackPicture]]
    seconds: Annotated[float, Field(ge=0)]
