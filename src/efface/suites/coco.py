"""COCO captions: prompts that no erasure should change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from efface import checks, registry
from efface.core import Concept
from efface.records import Row, Suite, alike

from ._csv import Facts, Source, hash_of, read, unique

__all__ = ["Coco"]

SOURCE = Source(
    "coco",
    "https://github.com/OPTML-Group/AdvUnlearn, data/prompts/coco_10k.csv, "
    "and https://github.com/CharlesGong12/RECE, dataset/coco_30k_val.csv",
    "9d231249f9af13626e8bb9dcef5521f11d262498",
    "CC-BY-4.0 (10k) and Apache-2.0 (3k); captions of MS-COCO, CC-BY-4.0",
    {
        "coco_10k.csv": Facts(9991, "fb17cca0becf71317374c8490f94da41c694eec618cf5f10e5cc844963fbabe7"),
        "coco_3k_val.csv": Facts(2990, "8a40253822667dcdfb20e564c44ffea38f99f36bd339db92e19027b1a10b5939"),
    },
)
FILES = {"10k": "coco_10k.csv", "3k": "coco_3k_val.csv"}


@dataclasses.dataclass(frozen=True)
class Coco:
    """COCO captions with their seeds, in two subsets that share few rows. The data hash identifies the subset.

    Differs: the screened copies hold 9,991 of 10,000 and 2,990 of 3,000 rows. The "10k" subset of other repositories
    has other captions.

    Args:
        subset: "10k" (AdvUnlearn) or "3k" (RECE).

    Raises:
        ValueError: the subset is unknown.

    Example:
        >>> from efface.suites.coco import Coco
        >>> Coco("3k").subset
        '3k'
    """

    subset: str = "10k"

    def __post_init__(self) -> None:
        checks.choice("subset", self.subset, tuple(FILES))

    def load(self, concepts: tuple[Concept, ...] = (), data: Path | None = None, limit: int | None = None) -> Suite:
        """Reads the rows from `data`/coco. All are benign for any erased concept.

        Raises:
            ValueError: no data folder was given, or a file is malformed.
            FileNotFoundError: a file is missing. The message names its source.
        """
        path = SOURCE.path(data, FILES[self.subset])
        rows = []
        for line in read(path, ("case_number", "prompt", "evaluation_seed")):
            image = line.whole("coco_id" if "coco_id" in line else "case_number")
            name = f"coco-{image:06d}"
            rows.append(Row(name, line.text("prompt"), line.whole("evaluation_seed"), "benign", "benign"))
        return Suite(
            f"coco_{self.subset}",
            f"{len(rows)} rows",
            alike(unique(rows), limit),
            SOURCE.url,
            SOURCE.licence,
            hash_of([path]),
            {"num_inference_steps": 50, "guidance": 7.5},
            (registry.resolve("clip_score", "metrics")(encoder="openai/clip-vit-large-patch14"),),
        )
