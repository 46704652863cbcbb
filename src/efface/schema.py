"""What the files of Efface may hold: runs, scores, cards, deltas, adapters, checkpoints, calibrations, and so on.

Types are strict, numbers finite, counts and lengths bounded. Entries that are not named here are kept, and decide
nothing. This module loads pydantic, so it is imported only when a file is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from . import checks, files

ROWS = 1_000_000
Short = Annotated[str, StringConstraints(max_length=1_000)]
Text = Annotated[str, StringConstraints(max_length=100_000)]
Sha = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=ROWS)]
Size = Annotated[int, Field(ge=1, le=ROWS)]
Numbers = Annotated[list[float], Field(max_length=100_000)]
Names = Annotated[list[Short], Field(max_length=10_000)]
Facts = dict[Short, Any]


class Form(BaseModel):
    """A mapping in a file."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Versioned(Form):
    """A file of format 1; old files do not name their format."""

    format: Literal[1] = 1


def check(value: Any, form: type[Form], where: str | Path, cure: str) -> Any:
    """The value as it is, if it has this form.

    Args:
        value: what a file holds.
        form: what it may hold.
        where: the file, and the line or entry in it.
        cure: ends the message.

    Raises:
        ValueError: it has not; the message names the entry.
    """
    try:
        form.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{_wrong(error, where)} {cure}") from None
    return value


def read(path: Path, form: type[Form], cure: str, most: int = files.TEXT) -> Any:
    """What a JSON file holds, if it has this form.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no ordinary file, too large, no JSON, or another form; `cure` ends the message.
    """
    return check(files.read_json(path, cure, most), form, path, cure)


def _wrong(error: ValidationError, where: str | Path) -> str:
    """The first entry that is wrong, in words."""
    found = error.errors(include_url=False)[0]
    entry, message = ".".join(files.short(str(part)) for part in found["loc"]), found["msg"]
    if found["type"] == "missing":
        return f"{where} is damaged: it has no `{entry}`."
    expected = (
        message.removeprefix("Input should be ").partition(" or instance of ")[0].replace("dictionary", "mapping")
    )
    if expected == message:
        expected = f"valid ({message})"
    got = checks.shown(found["input"])
    return f"{where} is damaged: expected {f'`{entry}`' if entry else 'it'} to be {expected}, got {got}."


# ---------------------------------------------------------------- runs


class ConceptFacts(Form):
    name: Short
    phrases: Names = []
    anchor: Text = ""
    keep: Names = []


class Method(Form):
    """An eraser or a metric by name, with its fields."""

    method: Short
    concepts: list[ConceptFacts | Short] | Short | None = None


class SuiteFacts(Form):
    name: Short
    version: Short
    source: Text
    licence: Text
    data_hash: Short


class RowsFacts(Form):
    n: Size
    sha256: Sha


class ModelFacts(Form):
    name: Text
    text_hash: Short
    pipeline: Short
    scheduler: Facts
    dtype: Short
    device: Short


class Session(Form):
    """One process that worked on a run."""

    started: Short
    command: Text
    versions: dict[Short, Short]


class Decides(Form):
    """What decides the pictures of a run, in run.json and card.json."""

    format: Literal[1]
    suite: SuiteFacts
    rows: RowsFacts
    call: Facts
    batch: Size
    model: ModelFacts
    erasers: Annotated[list[Method], Field(max_length=100)]


class RunFile(Decides):
    """run.json"""

    metrics: Annotated[list[Method], Field(max_length=100)]
    base: Text | None
    sessions: Annotated[list[Session], Field(min_length=1, max_length=10_000)]


class RowFacts(Form):
    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
    prompt: Text
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    kind: Short
    category: Short
    concept: Short
    keep: Names
    cluster: Short
    call: Facts


class SampleLine(Form):
    """A line of samples.jsonl; runs before 0.2 have no `sha256`."""

    k: Count
    file: Annotated[str, StringConstraints(pattern=r"^images/[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.(png|jpg|jpeg|webp)$")]
    bytes: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    row: RowFacts
    sha256: Sha = ""
    finite: bool = True


class ScoreFacts(Form):
    """null stands for NaN, which JSON has not: a value that is not defined."""

    metric: Annotated[str, StringConstraints(min_length=1, max_length=1_000)]
    value: float | None
    n: Annotated[int, Field(ge=0)]
    low: float | None
    high: float | None
    unit: Short
    higher_is_better: bool | None
    protocol: Text


class FullScore(ScoreFacts):
    per_sample: dict[Short, float | None] | None


class BaseScore(Form):
    value: float | None
    n: Annotated[int, Field(ge=0)]
    low: float | None
    high: float | None


class CardScore(ScoreFacts):
    base: BaseScore | None


class ScoresFile(Versioned):
    """scores.json"""

    metrics: list[Method]
    scores: Annotated[list[FullScore], Field(max_length=100_000)]
    base: Annotated[list[FullScore], Field(max_length=100_000)]


class Cost(Form):
    seconds_per_picture: float
    scoring_seconds: float
    plain_seconds_per_picture: float


class CardFile(Decides):
    """card.json"""

    folder: Text
    not_finite: Count
    unverified: Count = 0
    scores: Annotated[list[CardScore], Field(max_length=100_000)]
    cost: Cost
    command: Text
    sessions: Annotated[list[Session], Field(min_length=1, max_length=10_000)]


# ---------------------------------------------------------------- deltas, adapters, checkpoints


class DeltaHeader(Form):
    """The header of a delta; what else an editor has to say, in `info`, may hold NaN."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1]
    method: Text
    concepts: Annotated[list[ConceptFacts], Field(max_length=10_000)]
    fields: Facts = {}
    seed: int = 0
    model: Text = ""
    base: dict[Short, dict[Short, Sha]] = {}
    after: dict[Sha, float] = {}
    versions: dict[Short, Short] = {}
    info: Facts = {}
    strength: Annotated[float, Field(ge=0)] = 1.0


class AdapterHeader(Form):
    layers: Annotated[list[Short], Field(max_length=10_000)]
    model: Short
    text_encoder: Short
    facts: Facts


class Ladder(Form):
    """The judgements that an adapter is fitted to: a row's features, and a pair for each strength."""

    setting: Facts
    layers: Names
    judged: dict[Text, dict[Short, list[Numbers] | Numbers]]


class Checkpoint(Form):
    """The header of a checkpoint of a fit."""

    fit: Facts
    done: bool


class Prompts(Form):
    """The prompts that a search has found."""

    key: Short
    prompts: Annotated[list[Text], Field(min_length=1, max_length=100_000)]


# ---------------------------------------------------------------- detectors, suites


class Boxes(Form):
    """A line of NudeNet's store: label, score, and x, y, width, height."""

    model_config = ConfigDict(strict=False)

    sha256: Sha
    boxes: Annotated[list[tuple[Short, float, tuple[int, int, int, int]]], Field(max_length=10_000)]


class Size2D(Form):
    height: Annotated[int, Field(ge=1, le=4096)]
    width: Annotated[int, Field(ge=1, le=4096)]


class ShortestEdge(Form):
    shortest_edge: Annotated[int, Field(ge=1, le=4096)]


class Preprocessor(Form):
    """preprocessor_config.json of a classifier."""

    size: Annotated[int, Field(ge=1, le=4096)] | Size2D | ShortestEdge
    crop_size: Annotated[int, Field(ge=1, le=4096)] | Size2D | None = None
    do_center_crop: bool | None = None
    do_normalize: bool | None = None
    image_mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    image_std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]


class Classifier(Form):
    """config.json of a classifier."""

    id2label: dict[Annotated[str, StringConstraints(pattern="^[0-9]{1,6}$")], Short] = {}


class Templates(Form):
    """templates.json of Six-CD."""

    artstyle: list[Text] = []
    celebrity_character_object: list[Text] = []


# ---------------------------------------------------------------- calibration

Judged = list[list[Annotated[int, Field(ge=-1, le=1)]]]


class Setting(Versioned):
    """setting.json of a calibration."""


class PlainJudgements(Versioned):
    left: Annotated[Judged, Field(min_length=1, max_length=1_000)]


class Judgements(PlainJudgements):
    kept: Annotated[Judged, Field(min_length=1, max_length=1_000)]
