"""The prompts of each concept, in three blocks, and the two detectors of a model.

Cells are kinds of prompts. `explicit` names the concept, `theme` implies it in a text that was trained, `paraphrase` in
one that was not, `pair` names it with another icon, `bystander` asks for another icon alone.

Blocks differ in seeds and in prompts. Prompts that say the same in another order or wording are in one block. Concepts
outside `TUNED` have no tuning block. A cell with a single prompt has a test block only.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import efface
from efface import checks
from efface.core import Concept, shipped_concepts
from efface.families import filled_for

SEEDS = {"tuning": range(10_000), "selection": range(500_000, 1_000_000), "test": range(2_000_000, 3_000_000)}
CELLS = ("explicit", "theme", "paraphrase", "pair", "bystander")
CONCEPTS = ("alcohol", "weapon", "smoking", "cat", "neon sign", "gambling", "death")
TUNED = ("alcohol", "weapon", "neon sign")
TURNS = ("test", "selection", "tuning", "test")  # how the prompts of a cell are dealt
STRIDES = {"tuning": 280, "selection": 10_000, "test": 20_000}  # seeds of a cell; behind all cells: sequences
NOTHING, OTHER, CONCEPT = 0, 1, 2  # the three outcomes of a picture

Prompts = tuple[tuple[str, tuple[str, ...]], ...]
"""Prompts, each with the icons that must be retained."""


def named(concept: str) -> Concept:
    """The shipped concept of that name, or the word itself."""
    return shipped_concepts().get(concept, Concept(concept))


def seeds(block: str, concept: str, cell: str, n: int) -> range:
    """The seeds of a cell's pictures. No two cells share one.

    Raises:
        ValueError: more pictures than the cell has seeds.
    """
    stride, place = STRIDES[block], CONCEPTS.index(concept) * len(CELLS) + CELLS.index(cell)
    if not 1 <= n <= stride:
        raise ValueError(f"Expected n from 1 to {stride} on the {block} block, got {n}. More would share seeds.")
    first = SEEDS[block].start + stride * place
    if block == "tuning":
        checks.tuning_seeds("seeds", range(first, first + n))
    return range(first, first + n)


@dataclass(frozen=True)
class World:
    """An embedded model with its ground truth.

    Args:
        model: "emoji", "emoji-128" or "emoji-flux".
        device: the device of the pipeline. The detectors run on the CPU.
    """

    model: str = "emoji"
    device: str = "cpu"

    @functools.cached_property
    def small(self) -> bool:
        return self.model == "emoji"

    @functools.cached_property
    def data(self) -> dict[str, dict[str, Any]]:
        """The files that prompts are made of."""
        from efface.models import emoji, emoji128

        folder = Path((emoji if self.small else emoji128).__file__).parent
        names = ("vocabulary", "paraphrases") if self.small else ("vocabulary", "held_out")
        return {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in names}

    def filled(self, eraser: Any) -> Any:
        """The eraser with its defaults for this model, which is not loaded for that."""
        return filled_for(eraser, *(("emoji-128", "emoji") if self.model == "emoji-128" else (self.model,)))

    @property
    def data_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()

    @property
    def captions(self) -> dict[str, str]:
        return self.data["vocabulary"]["captions"]

    def truth(self, concept: str) -> tuple[str, ...] | None:
        """The icons of a concept; None for a style."""
        if self.small:
            from efface.models import emoji

            found = emoji.truth(concept)
            return None if isinstance(found, str) else found
        return tuple(self.data["vocabulary"]["concepts"][concept].get("icons", ())) or None

    @functools.cache  # noqa: B019 - worlds are few and live as long as the process
    def every(self, concept: str, cell: str) -> Prompts:
        """All prompts of a cell, of all blocks."""
        icons = self.truth(concept)
        if cell == "bystander":
            return tuple((text, (icon,)) for icon, text in sorted(self.captions.items()) if icon not in (icons or ()))
        from efface.models import emoji
        from efface.models.emoji128.concepts import prompts as larger

        return tuple((text, tuple(keep)) for text, keep in (emoji.prompts if self.small else larger)(concept, cell))

    @functools.cached_property
    def blocks(self) -> dict[str, str]:
        """Prompt to its block."""
        found: dict[str, str] = {}
        known: dict[tuple[str, ...], str] = {}
        rare_first = [(concept, cell) for cell in CELLS for concept in CONCEPTS]  # bystanders take what is left
        for concept, cell in rare_first:
            groups: dict[tuple[str, ...], list[str]] = {}
            for text, keep in self.every(concept, cell):
                same = keep if self.truth(concept) is None else tuple(sorted(text.split(" and ")))
                groups.setdefault(same, []).append(text)
            order = sorted(groups, key=lambda same: hashlib.sha256("\n".join(same).encode()).hexdigest())
            for k, same in enumerate(same for same in order if same not in known):
                turn = TURNS[k % len(TURNS)]
                known[same] = "test" if turn == "tuning" and concept not in TUNED else turn
            found |= {text: known[same] for same in order for text in groups[same]}
        return found

    def prompts(self, concept: str, cell: str, block: str) -> Prompts:
        """The prompts of a cell that belong to a block; none where the cell has no such block."""
        if block == "tuning" and concept not in TUNED:
            return ()
        return tuple(each for each in self.every(concept, cell) if self.blocks[each[0]] == block)

    # ---- drawing and judging

    @functools.cached_property
    def pipe(self) -> Any:
        pipe = efface.load(self.model, device=self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @functools.cached_property
    def eyes(self) -> Any:
        if self.small:
            from efface.models.emoji.eyes import load_eyes
        else:
            from efface.models.emoji128.eyes import load_eyes
        return load_eyes()

    @functools.cached_property
    def icons(self) -> dict[str, int]:
        if self.small:
            from efface.models.emoji.eyes import ICONS
        else:
            from efface.models.emoji128.eyes import ICONS
        return {name: k for k, name in enumerate(ICONS)}

    @property
    def detector(self) -> dict[str, Any]:
        """What a card says of the judges."""
        thresholds = json.dumps(self.eyes.facts["thresholds"], sort_keys=True)
        return {
            "name": f"{self.model} eyes, the worse of two",
            "sha256": self.eyes.facts["sha256"],
            "threshold": "frozen, one per icon and eye",
            "thresholds_sha256": hashlib.sha256(thresholds.encode()).hexdigest(),
        }

    def judge(self, images: Tensor, concept: str, keep: list[tuple[str, ...]], join: Any = torch.any) -> dict[str, Any]:
        """Per detector and picture: the outcome, and whether the picture shows a thing to retain (-1: there is none).

        Args:
            images: float [N, 3, H, W].
            concept: what is erased.
            keep: per picture, the icons to retain.
            join: whether any or all of them count.
        """
        seen = self.eyes.see(images)
        icons, truth = self.eyes.icons(seen), self.truth(concept)
        there = self.eyes.concept(seen, concept)
        other = icons.clone()
        other[..., [self.icons[icon] for icon in truth or ()]] = False
        outcome = torch.where(there, CONCEPT, torch.where(other.any(-1), OTHER, NOTHING))
        retained = [
            [int(join(icons[eye, k, [self.icons[i] for i in some]])) if some else -1 for k, some in enumerate(keep)]
            for eye in range(2)
        ]
        return {"outcome": outcome.tolist(), "retained": retained}

    def sees(self, images: Tensor, icons: list[str]) -> list[list[int]]:
        """Per detector and picture, whether it shows one icon."""
        found = self.eyes.icons(self.eyes.see(images))
        return [[int(found[eye, k, self.icons[icon]]) for k, icon in enumerate(icons)] for eye in range(2)]


@functools.cache
def world(model: str, device: str = "cpu") -> World:
    """Loaded once per process."""
    return World(model, device)
