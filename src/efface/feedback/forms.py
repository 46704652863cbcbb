"""The schemas of files of judgements. Loads pydantic, so it is imported only where a file is read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from ..schema import Facts, Form, Sha, Text

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Kind = Literal["label", "binary", "ranking"]


class JudgementLine(Form):
    """A line of a file of judgements."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    run: Sha
    model: Annotated[str, StringConstraints(max_length=1_000)]
    row: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
    picture: Sha
    concept: Name
    annotator: Name
    pass_: Annotated[int, Field(alias="pass", ge=1, le=1_000)]
    outcome: Annotated[str, StringConstraints(max_length=16)]
    time: Annotated[str, StringConstraints(min_length=1, max_length=40)]
    details: Facts


Stratum = Literal["positive", "near", "negative"]


class SizeFacts(Form):
    of: Annotated[int, Field(ge=0)]
    drawn: Annotated[int, Field(ge=0)]


class SampleFacts(Form):
    """The pictures of a run that were drawn for labelling: row id to SHA-256 and stratum."""

    asked: dict[Stratum, Annotated[int, Field(ge=1)]]
    detector: Text
    explicit: bool
    model: Annotated[str, StringConstraints(max_length=1_000)]
    strata: dict[Stratum, SizeFacts]
    rows: dict[Name, Annotated[list[str], Field(min_length=2, max_length=2)]]

    @model_validator(mode="after")
    def _known(self) -> SampleFacts:
        if not {stratum for _, stratum in self.rows.values()} <= set(self.strata):
            raise ValueError("a row is in an unknown stratum")
        return self


class SheetItem(Form):
    run: Sha
    row: Name
    picture: Sha
    model: Annotated[str, StringConstraints(max_length=1_000)] = ""
    set: Annotated[str, StringConstraints(max_length=200)] = ""


class SheetsFile(Form):
    """sheets.json, which says what picture each number is."""

    format: Literal[1]
    kind: Kind = "label"
    concept: Name
    annotator: Name
    pass_: Annotated[int, Field(alias="pass", ge=1, le=1_000)]
    sheets: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list, max_length=100_000)
    items: Annotated[list[SheetItem], Field(min_length=1, max_length=100_000)]

    @model_validator(mode="after")
    def _whole(self) -> SheetsFile:
        if self.sheets and sum(self.sheets) != len(self.items):
            raise ValueError("the sheets hold another number of pictures than are listed")
        return self


class HeldOut(Form):
    interval: Annotated[list[float], Field(min_length=2, max_length=2)]


class RewardFacts(Form):
    binary: HeldOut | None
    ranking: HeldOut | None
    notes: Annotated[list[Text], Field(max_length=100)]


class RewardHeader(Form):
    """The header of a reward model."""

    format: Literal[1]
    concept: Name
    encoder: Text
    folds: Annotated[dict[Sha, Annotated[int, Field(ge=0, lt=1_000)]], Field(max_length=1_000_000)]
    facts: RewardFacts


class StratumFacts(Form):
    name: Name
    size: Annotated[int, Field(ge=0)]
    hits: Annotated[int, Field(ge=0)]
    n: Annotated[int, Field(ge=0)]
    rate: float
    interval: Annotated[list[float], Field(min_length=2, max_length=2)]


class RateFacts(Form):
    rate: float
    hits: Annotated[int, Field(ge=0)]
    n: Annotated[int, Field(ge=0)]
    interval: Annotated[list[float], Field(min_length=2, max_length=2)]


class Outcomes(Form):
    there: float
    other: float
    nothing: float


class PromptFacts(Form):
    prompts: Annotated[int, Field(ge=1)]
    hits: Annotated[int, Field(ge=0)]
    upper: float


class CorrectedFacts(Form):
    n: Annotated[int, Field(ge=1)]
    raw: RateFacts
    rate: float
    interval: Annotated[list[float], Field(min_length=2, max_length=2)]
    upper: float
    strata: Annotated[list[StratumFacts], Field(min_length=1, max_length=3)]
    outcomes: Outcomes
    new_prompts: PromptFacts | None


class AgreementFacts(Form):
    annotators: Annotated[list[Name], Field(min_length=1, max_length=1_000)]
    pictures: Annotated[int, Field(ge=1)]
    differ: Annotated[int, Field(ge=0)]
    alpha: float | None
    interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None


class DifferenceFacts(Form):
    value: float
    interval: Annotated[list[float], Field(min_length=2, max_length=2)]


class ConceptLabels(Form):
    """The corrected rates of one concept."""

    concept: Name
    detector: Text
    agreement: AgreementFacts
    run: CorrectedFacts
    base: CorrectedFacts | None
    difference: DifferenceFacts | None


class CardLabels(Form):
    """The entry `labels` of card.json."""

    labels: Annotated[list[ConceptLabels], Field(min_length=1, max_length=1_000)]
