"""The data that suites, runs and metrics exchange: rows to draw, drawn pictures, and scores. Holds no model code."""

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
        id: a file name, unique within the suite, of letters, digits, `.`, `_` and `-`.
        prompt: what to draw.
        seed: 0 <= seed < 2**32.
        kind: the kind of prompt: "explicit", "theme", "paraphrase", "benign", "dual", ...
        category: the group in reports.
        concept: name of the concept that the detector looks for in this row; "" means none.
        keep: things of which the picture should still show at least one.
        cluster: rows with the same value share a target. The bootstrap resamples whole clusters. "" means that the row
            is a cluster by itself.
        call: pipeline arguments of this row only, such as {"guidance": 7.5}.

    Raises:
        ValueError: `prompt` is empty, `seed` is out of range, or `id` is not a file name.

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
            cure = "Remove all other characters."
            expected = "the id of a row to be a file name of letters, digits, '.', '_' and '-'"
            raise ValueError(checks.refusal(expected, self.id, cure))
        checks.text(f"`prompt` of row {self.id!r}", self.prompt)
        checks.seed(f"`seed` of row {self.id!r}", self.seed)
        checks.texts(f"`keep` of row {self.id!r}", self.keep)
        object.__setattr__(self, "keep", tuple(self.keep))
        object.__setattr__(self, "call", dict(self.call))


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A row and its picture.

    Args:
        row: the row.
        path: the picture's file, loaded on demand.
        pixels: the picture itself, float [3, H, W] in [0, 1], instead of `path`.
        sha256: hash of the file's bytes, checked at each read. "" means unknown.

    Raises:
        ValueError: neither `path` nor `pixels` is given, or both are.

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
            FileNotFoundError: the file does not exist.
            ValueError: the file does not have the hash `sha256`, or is not a PNG, JPEG or WebP picture.
        """
        if self.path is None:
            return cast("Tensor", self.pixels)
        import numpy
        import torch

        from .pictures import read_picture

        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}, the picture of row {self.row.id!r}, is missing. Draw it again.")
        pixels = numpy.array(read_picture(self.path, self.sha256))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


@dataclasses.dataclass(frozen=True)
class Score:
    """One measured number, with its interval and how it was measured.

    Args:
        metric: what was measured, such as "removal.absolute" or "detection/cat".
        value: the number. NaN if it is not defined, such as a removal rate when the base model never shows the concept.
        n: the number of pictures or pairs.
        low, high: the 95 % interval.
        unit: "share", "cosine", ...
        higher_is_better: None if neither direction is better.
        protocol: detector, label set and threshold, in words.
        per_sample: row id to value, if each row has a value.

    Raises:
        ValueError: `metric` is empty or `n` is negative.

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
                f"Expected a metric's name and n >= 0, got {self.metric!r} and n = {self.n}. Name the metric and count "
                "the pictures."
            )


class Metric(Protocol):
    """Computes scores from pictures. A metric is a frozen dataclass, which is also its configuration."""

    name: ClassVar[str]
    unit: ClassVar[str]
    higher_is_better: ClassVar[bool | None]

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        """The scores of `samples`. `base` holds the base model's pictures of the same rows."""
        ...


@dataclasses.dataclass(frozen=True)
class Suite:
    """Rows to draw and how to score them.

    Args:
        name: the suite's name.
        version: changes whenever the rows do.
        rows: at least one, with unique ids.
        source: where the data comes from.
        licence: the licence of the data.
        data_hash: SHA-256 of the data files. Default: SHA-256 over the rows.
        call: pipeline arguments of all rows. A row's `call` overrides them.
        metrics: the default metrics.
        side: pixels of the grey pictures that try the metrics before anything is drawn.

    Raises:
        ValueError: there are no rows, or two rows have the same id.

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
    side: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "call", dict(self.call))
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if not self.rows:
            raise ValueError(f"The suite {self.name!r} has no rows. Raise its limit, or choose others.")
        ids = [row.id for row in self.rows]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(
                f"Expected row ids of the suite {self.name!r} to be unique, got {twice!r} twice. Rename a row."
            )
        if not self.data_hash:
            object.__setattr__(self, "data_hash", rows_hash(self.rows))


def alike(rows: Sequence[Row], limit: int | None) -> tuple[Row, ...]:
    """At most `limit` rows, in order, with as many of each concept, category and kind as possible.

    Groups of equal concept, category and kind take turns, and concepts alternate. Inside a group, the rows are evenly
    spread. A row and its row "ID-clean" stay together; only with `limit` 1, both of a single pair are returned.

    Args:
        rows: the rows of a suite.
        limit: the largest number of rows, at least 1. None: all of them.

    Raises:
        ValueError: `limit` is below 1.

    Example:
        >>> from efface.records import Row, alike
        >>> rows = [Row(f"{name}-{k}", f"a {name}", k, concept=name) for name in ("cat", "dog") for k in range(8)]
        >>> [row.id for row in alike(rows, 4)]
        ['cat-0', 'cat-4', 'dog-0', 'dog-4']
    """
    if limit is None or checks.whole("limit", limit) >= len(rows):
        return tuple(rows)
    groups: dict[tuple[str, str, str], list[tuple[Row, ...]]] = {}
    for unit in _units(rows):
        groups.setdefault((unit[0].concept, unit[0].category, unit[0].kind), []).append(unit)
    counts = shares({key: (len(units), len(units[0])) for key, units in groups.items()}, limit)
    chosen = {row.id for key, n in counts.items() for k in range(n) for row in groups[key][k * len(groups[key]) // n]}
    return tuple(row for row in rows if row.id in chosen)


def shares(sizes: Mapping[tuple[str, str, str], tuple[int, int]], limit: int) -> dict[tuple[str, str, str], int]:
    """How many units to take of each group, so that groups share a limit alike.

    Args:
        sizes: (concept, category, kind) to the number of units and the rows of a unit.
        limit: the largest number of rows. The first group gives a unit if none fits.

    Example:
        >>> from efface.records import shares
        >>> shares({("cat", "", ""): (100, 1), ("dog", "", ""): (2, 1)}, 10)
        {('cat', '', ''): 8, ('dog', '', ''): 2}
    """
    concepts = [concept for concept, _, _ in sizes]
    seen: dict[str, int] = {}
    turns = []
    for concept in concepts:
        turns.append(seen.get(concept, 0))
        seen[concept] = turns[-1] + 1
    order = [key for _, key in sorted(zip(turns, sizes, strict=True), key=lambda pair: (pair[0], not pair[1][0]))]
    counts, left = dict.fromkeys(order, 0), limit
    while fits := [key for key in order if counts[key] < sizes[key][0] and sizes[key][1] <= left]:
        for key in (key for key in fits if sizes[key][1] <= left):
            counts[key] += 1
            left -= sizes[key][1]
    if left == limit:
        counts[order[0]] = 1
    return counts


def _units(rows: Sequence[Row]) -> list[tuple[Row, ...]]:
    """The rows, each with its row "ID-clean" if there is one."""
    ids = {row.id for row in rows}
    clean = {row.id: row for row in rows if row.id.endswith("-clean") and row.id.removesuffix("-clean") in ids}
    return [
        (row, clean[f"{row.id}-clean"]) if f"{row.id}-clean" in clean else (row,) for row in rows if row.id not in clean
    ]


def rows_hash(rows: Sequence[Row]) -> str:
    """SHA-256 over the rows: one line of JSON per row, keys sorted."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(dataclasses.asdict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
