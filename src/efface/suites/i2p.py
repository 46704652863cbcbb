"""I2P: prompts of real users from which Stable Diffusion drew unsafe pictures. Most are not explicit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from efface import checks, registry
from efface.core import Concept
from efface.records import Row, Suite, alike

from ._csv import Facts, Source, hash_of, read, screen, unique, wanted

__all__ = ["I2P"]

SOURCE = Source(
    "i2p",
    "https://huggingface.co/datasets/AIML-TUDA/i2p (mirror: rohitgandikota/erasing, data/unsafe-prompts4703.csv)",
    "25613d27892326e0c7770f7f3555bea4be150089",
    "MIT",
    {
        "i2p.csv": Facts(4452, "3ba3955ca2ef0bf3615c84b39a8c7eb32f37ab4ab17c4449064feaf08b97631b"),
    },
)
CATEGORIES = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal activity")
COLUMNS = ("prompt", "categories", "nudity_percentage", "case_number", "sd_image_width", "sd_image_height")
NO_PROMPT = {"2260"}


@dataclasses.dataclass(frozen=True)
class I2P:
    """I2P, with the seed, guidance scale and picture size of each row.

    Paper: Schramowski, Brack, Deiseroth, Kersting 2023, "Safe Latent Diffusion", arXiv 2211.05105.

    Differs: the screened copy holds 4,452 of 4,703 rows (no minors in a sexual context) and one of these has no prompt;
    do not compare with published figures of the full set. The authors draw ten pictures per prompt in one call with one
    seed. Here picture k has the row's seed plus k.

    Args:
        category: only rows of this category; "" = all. A row may have several categories.
        nudity: only rows with at least this percentage of nudity, as the authors measured; 0 = all. Papers call
            different sets "the nudity subset": category "sexual", nudity > 0, or nudity >= 50.
        images: pictures per prompt. The authors' two metrics need 10.
        guidance: whether to use the guidance scale of each row. Otherwise 7.5.
        size: whether to use the picture size of each row. Otherwise the model's size.

    Raises:
        ValueError: the category is unknown, or a number is out of range.

    Example:
        >>> from efface.suites.i2p import I2P
        >>> I2P(category="violence").images
        1
    """

    category: str = ""
    nudity: float = 0.0
    images: int = 1
    guidance: bool = True
    size: bool = True

    def __post_init__(self) -> None:
        checks.choice("category", self.category, ("", *CATEGORIES))
        checks.number("nudity", self.nudity, 0, 100)
        checks.whole("images", self.images, 1, 1000)

    def load(self, concepts: tuple[Concept, ...] = (), data: Path | None = None, limit: int | None = None) -> Suite:
        """Reads the rows from `data`/i2p/i2p.csv.

        Args:
            concepts: the erased concepts. If they name categories ("nudity" means "sexual"), only rows of these load.
            data: folder that holds i2p/.
            limit: the largest number of rows, alike from each concept and category.

        Raises:
            ValueError: no data folder was given, a file is malformed, or no row remains.
            FileNotFoundError: a file is missing. The message names its source.
        """
        known = {
            c: ((c, "nudity") if c == "sexual" else ("violence", "gore") if c == "violence" else (c,))
            for c in CATEGORIES
        }
        chosen = wanted(concepts, known, "i2p")
        path = SOURCE.path(data, "i2p.csv")
        lines = read(path, COLUMNS)
        hf = bool(lines) and "sd_seed" in lines[0]  # the names of the columns on the hub
        seed, scale = ("sd_seed", "sd_guidance_scale") if hf else ("evaluation_seed", "evaluation_guidance")
        lines = read(path, (*COLUMNS, seed, scale))
        dropped = 0
        if not SOURCE.screened(path):
            lines, dropped = screen(
                lines,
                ("prompt",),
                lambda x: "sexual" in x["categories"] or x.number_in("nudity_percentage", 0, 100) > 0,
            )
        rows = []
        for line in lines:
            named = [c.strip() for c in line["categories"].split(",")]
            asked = [c for c in named if c in chosen and c == (self.category or c)]
            if line["case_number"] in NO_PROMPT and not line["prompt"].strip():
                continue
            case = line.whole("case_number")
            prompt, first = line.text("prompt"), line.whole(seed)
            percent = line.number_in("nudity_percentage", 0, 100)
            call: dict[str, float | int] = {}
            if self.guidance:
                call["guidance"] = line.number_in(scale, 0, 1000)
            if self.size:
                call |= {"width": line.whole("sd_image_width", 4097), "height": line.whole("sd_image_height", 4097)}
            if not asked or percent < self.nudity:
                continue
            for k in range(self.images):
                name = f"i2p-{case:04d}" + (f"-{k}" if self.images > 1 else "")
                rows.append(
                    Row(
                        name,
                        prompt,
                        (first + k) % 2**32,
                        "natural",
                        asked[0],
                        asked[0],
                        cluster=f"i2p-{case:04d}",
                        call=call,
                    )
                )
        return Suite(
            "i2p",
            f"{len(rows)} rows" + (f", {dropped} dropped by the screen" if dropped else ""),
            alike(unique(rows), limit),
            f"{SOURCE.url}, commit {SOURCE.commit}",
            SOURCE.licence,
            hash_of([path]),
            {"num_inference_steps": 50, "guidance": 7.5},
            (registry.resolve("inappropriateness", "metrics")(),),
        )
