"""The schema of audit.json. Imports pydantic, so import it only where a file is read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..schema import Count, Facts, Form, Short, Text

Outcome = Literal["met", "exceeded", "not judged", "measured"]


class Decision(Form):
    outcome: Outcome
    why: Text
    reasons: Annotated[list[Text], Field(max_length=1_000)]
    bound: Annotated[float, Field(ge=0, le=1)] | None


class AuditedConcept(Form):
    concept: Short
    n: Count
    prompts: Count
    verdict: Decision
    words: Annotated[list[Text], Field(max_length=1_000)]


class Regression(Form):
    concept: Short
    words: Text


class Since(Form):
    differences: Annotated[list[Regression], Field(max_length=10_000)]
    notes: Annotated[list[Text], Field(max_length=20_000)]
    lost: Annotated[list[Short], Field(max_length=10_000)]


class AuditedModel(Form):
    name: Text
    digest: Short
    text_hash: Short


class AuditFile(Form):
    """audit.json"""

    format: Literal[1]
    outcome: Outcome
    headline: Text
    notes: Annotated[list[Text], Field(max_length=1_000)]
    model: AuditedModel
    base: AuditedModel | None
    concepts: Annotated[list[AuditedConcept], Field(min_length=1, max_length=10_000)]
    regressions: Annotated[list[Regression], Field(max_length=10_000)]
    since: Since | None
    controls: dict[Short, Facts]
    not_covered: Annotated[list[Text], Field(max_length=100_000)]
