"""The schemas of Efface's files: runs, scores, cards, deltas, adapters, checkpoints, calibrations, and so on.

Types are strict, numbers finite, counts and lengths bounded. Entries without a schema are kept and have no effect. This
module loads pydantic, so Efface imports it only when it reads a file.
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
    """A file of format 1. Old files do not name their format."""

    format: Literal[1] = 1


def check(value: Any, form: type[Form], where: str | Path, cure: str) -> Any:
    """Returns the value unchanged if it matches the schema.

    Args:
        value: the content of a file.
        form: its schema.
        where: the file, and the line or entry in it, for the message.
        cure: the end of the message.

    Raises:
        ValueError: the value does not match. The message names the entry.
    """
    try:
        form.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{_wrong(error, where)} {cure}") from None
    return value


def read(path: Path, form: type[Form], cure: str, most: int = files.TEXT) -> Any:
    """Reads a JSON file and checks it against a schema.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not ordinary, too large, not JSON, or does not match; `cure` ends the message.
    """
    return check(files.read_json(path, cure, most), form, path, cure)


def _wrong(error: ValidationError, where: str | Path) -> str:
    """Describes the first wrong entry."""
    found = error.errors(include_url=False)[0]
    entry, message = ".".join(checks.short(str(part)) for part in found["loc"]), found["msg"]
    if found["type"] == "missing":
        return f"{where} is damaged and has no `{entry}`."
    expected = (
        message.removeprefix("Input should be ").partition(" or instance of ")[0].replace("dictionary", "mapping")
    )
    if expected == message:
        expected = f"valid ({message})"
    got = checks.shown(found["input"])
    return f"{where} is damaged, expected {f'`{entry}`' if entry else 'it'} to be {expected}, got {got}."


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
    """The facts that determine the pictures of a run, in run.json and card.json."""

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
    """A line of samples.jsonl. Runs before 0.2 have no `sha256`."""

    k: Count
    file: Annotated[str, StringConstraints(pattern=r"^images/[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.(png|jpg|jpeg|webp)$")]
    bytes: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    row: RowFacts
    sha256: Sha = ""
    finite: bool = True


class ScoreFacts(Form):
    """null stands for NaN, an undefined value, which JSON cannot hold."""

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
    """The header of a delta. `info` holds further facts from the editor, and may contain NaN."""

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


class DirectionsHeader(DeltaHeader):
    """The header of a delta that adds vectors to outputs of modules."""

    kind: Literal["directions"]
    window: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.0, 1.0]
    shares: Numbers | None = None


class AdapterHeader(Form):
    layers: Annotated[list[Short], Field(max_length=10_000)]
    model: Short
    text_encoder: Short
    facts: Facts


class Ladder(Form):
    """The judgements for fitting an adapter: the features of each row, and a pair for each strength."""

    setting: Facts
    layers: Names
    judged: dict[Text, dict[Short, list[Numbers] | Numbers]]


class Checkpoint(Form):
    """The header of a checkpoint of a fit."""

    fit: Facts
    done: bool


class Prompts(Form):
    """The prompts that a search found."""

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
