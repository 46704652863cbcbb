"""What suites, runs and metrics pass on: rows to draw, the pictures drawn for them, and scores. No model code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from . import checks

if TYPE_CHECKING:
    from torch import Tensor

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One picture to draw.

    Args:
        id: unique within the suite, and safe as a file name: letters, digits, `.`, `_` and `-`.
        prompt: what to draw.
        seed: 0 <= seed < 2**32.
        kind: what the row asks: "explicit", "theme", "paraphrase", "benign", "dual", ...
        category: group shown in reports.
        concept: name of the concept whose presence is judged in this row; "" = none.
        keep: things of which at least one should survive.
        cluster: rows with the same value share a target, and the bootstrap resamples whole clusters; "" = its own.
        call: pipeline arguments of this row alone, such as {"guidance": 7.5}.

    Raises:
        ValueError: an empty prompt, a seed out of range, or an id that is no file name.

    Example:
        >>> from efface import Row
        >>> Row("cat-0", "a cat", 1_000_000, kind="explicit", concept="cat").seed
        1000000
    """

    id: str
    prompt: str
    seed: int
    kind: str = ""
    category: str = ""
    concept: str = ""
    keep: tuple[str, ...] = ()
    cluster: str = ""
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not _FILE_NAME.fullmatch(self.id):
            cure = "Leave all other characters out."
            expected = "the id of a row to be a file name of letters, digits, '.', '_' and '-'"
            raise ValueError(checks.refusal(expected, self.id, cure))
        checks.text(f"`prompt` of row {self.id!r}", self.prompt)
        checks.seed(f"`seed` of row {self.id!r}", self.seed)
        checks.texts(f"`keep` of row {self.id!r}", self.keep)
        object.__setattr__(self, "keep", tuple(self.keep))
        object.__setattr__(self, "call", dict(self.call))


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A row and the picture that was drawn for it.

    Args:
        row: the row.
        path: a picture file, loaded on demand.
        pixels: or the picture itself, float [3, H, W] in [0, 1].
        sha256: of the file's bytes, checked whenever it is read; "" = not known.

    Raises:
        ValueError: neither `path` nor `pixels`, or both.

    Example:
        >>> import torch
        >>> from efface import Row, Sample
        >>> Sample(Row("cat-0", "a cat", 1_000_000), pixels=torch.zeros(3, 64, 64)).image().shape
        torch.Size([3, 64, 64])
    """

    row: Row
    path: Path | None = None
    pixels: Tensor | None = None
    sha256: str = ""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.pixels is None):
            raise ValueError(
                f"Expected either `path` or `pixels` for row {self.row.id!r}, got neither or both. Give one of them."
            )

    def image(self) -> Tensor:
        """The picture, float [3, H, W] in [0, 1].

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is another file than the one with `sha256`, or no PNG, JPEG or WebP picture.
        """
        if self.path is None:
            return cast("Tensor", self.pixels)
        import numpy
        import torch

        from .pictures import read_picture

        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}, the picture of row {self.row.id!r}, is missing: draw it again.")
        pixels = numpy.array(read_picture(self.path, self.sha256))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


@dataclasses.dataclass(frozen=True)
class Score:
    """One number that an auditor can defend.

    Args:
        metric: what was measured, such as "removal.absolute" or "detection/cat".
        value: the number; NaN where it is not defined, such as a removal rate where the plain model draws nothing.
        n: of how many pictures (or pairs).
        low, high: the 95 % interval.
        unit: "share", "cosine", ...
        higher_is_better: None where neither is.
        protocol: detector, label set, threshold, in words.
        per_sample: row id to value, where there is one value per row.

    Raises:
        ValueError: no name, or a negative n.

    Example:
        >>> from efface import Score
        >>> Score("removal.absolute", 0.9, 320, 0.86, 0.93, higher_is_better=True).value
        0.9
    """

    metric: str
    value: float
    n: int
    low: float
    high: float
    unit: str = "share"
    higher_is_better: bool | None = None
    protocol: str = ""
    per_sample: Mapping[str, float] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not self.metric or self.n < 0:
            raise ValueError(
                f"Expected a metric's name and n >= 0, got {self.metric!r} and n = {self.n}. Say what was measured."
            )


class Metric(Protocol):
    """Pictures to scores. The object is its own configuration (a frozen dataclass)."""

    name: ClassVar[str]
    unit: ClassVar[str]
    higher_is_better: ClassVar[bool | None]

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        """Scores of `samples`; `base` are the plain model's pictures of the same rows."""
        ...


@dataclasses.dataclass(frozen=True)
class Suite:
    """Rows to draw and how to score them.

    Args:
        name: of the suite.
        version: changes whenever the rows do.
        rows: at least one, with unique ids.
        source: where the data comes from.
        licence: of the data.
        data_hash: sha256 of the data files; over the rows if left empty.
        call: pipeline arguments of all rows; a row's own `call` goes before them.
        metrics: what is measured unless others are asked for.

    Raises:
        ValueError: no rows, or an id used twice.

    Example:
        >>> from efface import Row, Suite
        >>> len(Suite("mine", "1", (Row("cat-0", "a cat", 1_000_000), Row("dog-0", "a dog", 1_000_001))).rows)
        2
    """

    name: str
    version: str
    rows: tuple[Row, ...]
    source: str = ""
    licence: str = ""
    data_hash: str = ""
    call: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"num_inference_steps": 25, "guidance": 7.5}, hash=False
    )
    metrics: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "call", dict(self.call))
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if not self.rows:
            raise ValueError(f"The suite {self.name!r} has no rows: raise its limit, or choose others.")
        ids = [row.id for row in self.rows]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(
                f"Expected row ids of the suite {self.name!r} to be unique, but {twice!r} is there twice. Rename a row."
            )
        if not self.data_hash:
            object.__setattr__(self, "data_hash", rows_hash(self.rows))


def rows_hash(rows: Sequence[Row]) -> str:
    """sha256 over the rows: one line of JSON each, keys sorted."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(dataclasses.asdict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
