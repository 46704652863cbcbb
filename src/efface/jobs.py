"""Jobs without a screen, as the command line and a service run them.

Each tells the meter of `progress.telling` how far it is, and ends at its next word after `meter.cancel()`. What was
finished stays on the disk. To score a run again is `runs.score`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, api, checks, pipelines, runs
from .core import Concept, Editor, config
from .models import emoji
from .pictures import grid, to_pil
from .progress import shown

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

    from .delta import Delta
    from .records import Suite

SHOWN = 8  # pictures in the grid
BATCH = 8


# ---------------------------------------------------------------- erase


class Judge:
    """What the eyes of the emoji model say about pictures.

    Args:
        concepts: what is erased; `not_judged` are those that the eyes do not know.
    """

    def __init__(self, concepts: Sequence[Concept]) -> None:
        from .models.emoji.eyes import load_eyes

        self.eyes = load_eyes()
        names = dict.fromkeys(c.name for c in concepts)
        self.judged = [name for name in names if name == "watermark" or drawn_by_emoji(name)]
        self.not_judged = [name for name in names if name not in self.judged]

    def scores(self, images: Tensor) -> dict[str, list[list[bool]]]:
        """Concept to one list per eye, one answer per picture; also "any icon"."""
        seen = self.eyes.see(images)
        found = {name: self.eyes.concept(seen, name).tolist() for name in self.judged}
        return found | {"any icon": self.eyes.icons(seen).any(-1).tolist()}


def drawn_by_emoji(name: str) -> bool:
    """Whether the emoji model draws a concept of that name."""
    try:
        emoji.truth(name)
    except ValueError:
        return False
    return True


@dataclass
class Erasure:
    """A prompt drawn before and after erasing, into a folder.

    Args:
        pipe: the pipeline, without erasers.
        erasers: what to apply, in order.
        prompt, negative: the user's prompt and negative prompt.
        model: what the record calls the model.
        seed: of the first picture; the others follow.
        images: how many pictures.
        steps: denoising steps.
        guidance: the guidance scale, as `efface.pipelines.guided` takes it; None leaves the pipeline's own default.
        judge: what looks at the pictures, if anything does.
    """

    pipe: DiffusionPipeline
    erasers: Sequence[Any]
    prompt: str
    negative: str = ""
    model: str = ""
    seed: int = 1_000_000
    images: int = 4
    steps: int = 25
    guidance: float | None = None
    judge: Judge | None = None
    record: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        checks.text("prompt", self.prompt)
        checks.text("negative prompt", self.negative, empty=True)
        if self.guidance is not None:
            checks.number("guidance", self.guidance)
        checks.seed("seed", self.seed, checks.whole("images", self.images))
        for rows in (getattr(eraser, "rows", None) for eraser in self.erasers):
            if rows is not None and len(rows) != self.images:
                raise ValueError(
                    f"Expected `rows` to have one entry for each picture, got {len(rows)} entries for {self.images} "
                    "pictures. Give one list for each."
                )
        configs = [config(eraser) for eraser in self.erasers]
        self.record = {
            "prompt": self.prompt,
            "negative_prompt": self.negative,
            "model": {"name": self.model, "text_hash": pipelines.model_hash(self.pipe)},
            "eraser": configs[0] if len(configs) == 1 else configs,
            "steps": self.steps,
            **pipelines.scales(self.pipe, pipelines.guided(self.pipe, self.guidance)),
            "seeds": [self.seed, self.seed + self.images - 1],
            "versions": {"efface": __version__} | {p: version(p) for p in ("torch", "diffusers", "transformers")},
            "seconds": {"before": 0.0, "after": 0.0},
            "complete": False,
            "images": [],
            **({"not_judged": self.judge.not_judged} if self.judge else {}),
        }

    def run(self, folder: Path) -> dict[str, Any]:
        """Draws batch by batch with the same seeds before and after, and returns the record.

        Earlier results in the folder stay until the first batch can replace them. The record names what is on disk.
        """
        record, earlier, total = self.record, _results(folder), 2 * self.images
        with shown() as tell:
            tell("before", 0, total)
            for start in range(0, self.images, BATCH):
                seeds = [self.seed + k for k in range(start, min(start + BATCH, self.images))]
                unsaved: list[tuple[int, str, Image, dict[str, Any]]] = []
                own = [_part(eraser, start, len(seeds)) for eraser in self.erasers]
                for when in ("before", "after"):
                    unsaved += self._drawn(when, seeds, own)
                    if when == "before" and earlier:
                        continue
                    while earlier:
                        earlier.pop().unlink()
                    while unsaved:
                        seed, which, picture, facts = unsaved[0]
                        save(folder / facts["file"], picture)
                        if which == "before":
                            record["images"].append({"seed": seed})
                        record["images"][seed - self.seed][which] = facts
                        del unsaved[0]
                    self._write(folder)
                    tell("drawn", 2 * start + len(seeds) * (1 if when == "before" else 2), total)
        record["complete"] = True
        self._write(folder)
        return record

    def _drawn(
        self, when: str, seeds: Sequence[int], erasers: Sequence[Any]
    ) -> list[tuple[int, str, Image, dict[str, Any]]]:
        """Seed, "before" or "after", picture, and what there is to note about it."""
        call: dict[str, Any] = {"num_inference_steps": self.steps}
        call |= {"negative_prompt": self.negative} if self.negative else {}
        began = time.perf_counter()
        with api.stack(self.pipe, *(erasers if when == "after" else ())):
            pictures = api.draw(self.pipe, [self.prompt] * len(seeds), seeds, guidance=self.guidance, **call)
        self.record["seconds"][when] += time.perf_counter() - began
        scores, found = self.judge.scores(pictures) if self.judge else {}, []
        for k, (seed, picture) in enumerate(zip(seeds, to_pil(pictures), strict=True)):
            seen = {"seen": {c: [eye[k] for eye in eyes] for c, eyes in scores.items()}} if self.judge else {}
            found.append((seed, when, picture, {"file": f"{when}-{seed}.png", **seen}))
        return found

    def _write(self, folder: Path) -> None:
        """The record and the grid of what there is so far."""
        from PIL import Image as Pictures

        save(folder / "record.json", json.dumps(self.record, indent=1))
        both = [e for e in self.record["images"] if "after" in e]
        some = (both or self.record["images"])[:SHOWN]
        rows = {when: [Pictures.open(folder / e[when]["file"]) for e in some] for when in some[0] if when != "seed"}
        save(folder / "grid.png", grid(rows, [str(e["seed"]) for e in some]))

    def finished(self, folder: Path) -> str:
        """What there is of a job that ended early, recorded as far as the disk allows."""
        drawn = self.record["images"]
        if not drawn:
            return "No picture was finished."
        with suppress(OSError):  # the disk may be full, which was said already
            self._write(folder)
        both = sum("after" in entry for entry in drawn)
        more = f", and {len(drawn) - both} more without erasing" if both < len(drawn) else ""
        return f"{both} of {self.images} pictures were finished{more}; they are in {folder}."


def _results(folder: Path) -> list[Path]:
    """What an `Erasure` wrote there, and nothing else."""
    ours = re.compile(r"(before|after)-\d+\.png|grid\.png|record\.json")
    return [file for file in folder.iterdir() if ours.fullmatch(file.name)]


def _part(eraser: Any, start: int, n: int) -> Any:
    """The eraser for `n` pictures from number `start` on: with their `rows`, if it has any."""
    rows = getattr(eraser, "rows", None)
    return eraser if rows is None else replace(eraser, rows=rows[start : start + n])


def save(file: Path, made: Image | str) -> None:
    """Writes a picture or a text, whole or not at all; an error names the file."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as out:
            out.write(made.encode()) if isinstance(made, str) else made.save(out, "PNG")
            out.flush()
            os.fsync(out.fileno())  # some file systems tell only now that they are full
        partial.replace(file)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(f"{file} cannot be written ({why}). Free some space, or name another folder by --out.") from error
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------- fit


@dataclass
class Fit:
    """A delta learned on a model, and written to a file.

    Args:
        editor: what learns it.
        pipe: the pipeline.
        concepts: what to erase.
        file: the file to write. A fit that was stopped goes on from `checkpoint`, a file that is named like it.
        after: deltas that are on while this one is fitted.
        seed: of the fit.
    """

    editor: Editor
    pipe: DiffusionPipeline
    concepts: Sequence[Concept]
    file: Path
    after: Sequence[Delta] = ()
    seed: int = 0

    @cached_property
    def checkpoint(self) -> Path | None:
        resumes = "checkpoint" in signature(self.editor.fit).parameters
        return self.file.with_name(f"{self.file.name}.checkpoint") if resumes else None

    def run(self) -> Delta:
        """The delta, which is in the file."""
        kept, name = self.checkpoint, type(self.editor).__name__
        options: dict[str, Any] = {} if kept is None else {"checkpoint": kept}
        with shown() as tell, api.stack(self.pipe, *self.after):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            tell(f"fitting {name}", 0, 0)
            delta: Delta = self.editor.fit(self.pipe, self.concepts, seed=self.seed, **options)
        delta.save(self.file)
        if kept is not None:
            shutil.rmtree(kept) if kept.is_dir() else kept.unlink(missing_ok=True)
        return delta

    def finished(self) -> str:
        """What there is of a fit that ended early."""
        goes_on = self.checkpoint is not None and self.checkpoint.exists()
        return f"{self.file} was not written." + (
            f" The same command goes on from {self.checkpoint}." if goes_on else ""
        )


# ---------------------------------------------------------------- bench


def rehearse(suite: Suite) -> None:
    """Finds what a metric lacks before anything is drawn.

    Raises:
        ValueError: the suite could not be scored.
    """
    try:
        runs.rehearse(suite)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"Nothing is drawn yet, for it could not be scored: {error}\nMend that, change the metric with "
            "--judge METRIC.NAME=VALUE, or draw with --no-score and run `efface score` later."
        ) from error


def bench(suite: Suite, pipe: DiffusionPipeline, *, score: bool = True, **options: Any) -> runs.Run:
    """Draws a suite with and without erasers, and scores it.

    Args:
        suite: what to draw.
        pipe: the pipeline.
        score: whether to score what was drawn.
        options: those of `efface.run`: `eraser`, `out`, `base`, `batch`, `name`, `command`,
            `guidance` and `ray`.
    """
    if score:
        rehearse(suite)
    made = runs.run(suite, pipe, **options)
    if score:
        runs.score(made)
    return made
