"""The jobs of the command line, without a terminal, so that services can run them as well.

Each job reports its progress to the meter of `progress.telling`. After `meter.cancel()` it ends at its next report.
Finished results stay on disk. `runs.score` scores a run again.
"""

from __future__ import annotations

import json
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

from . import __version__, api, checks, files, pipelines, runs
from .core import Concept, Editor, config
from .pictures import grid, png, to_pil
from .progress import shown

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

    from .auditing import Audit
    from .delta import Delta
    from .records import Suite

SHOWN = 8  # pictures in the grid
BATCH = 8


# ---------------------------------------------------------------- erase


class Judge:
    """Judges pictures with the detectors of an embedded model.

    Args:
        concepts: the erased concepts. `not_judged` lists those without a detector.
        model: the model that draws the pictures.
    """

    def __init__(self, concepts: Sequence[Concept], model: str = "emoji") -> None:
        from .models import eyes_of

        self.eyes = eyes_of(model)
        names = dict.fromkeys(c.name for c in concepts)
        self.judged = [name for name in names if self.eyes.vocabulary.knows(name)]
        self.not_judged = [name for name in names if name not in self.judged]

    def scores(self, images: Tensor) -> dict[str, list[list[bool]]]:
        """Concept to one list per judge, with one answer per picture. Includes "any icon"."""
        seen = self.eyes.see(images)
        found = {name: self.eyes.concept(seen, name).tolist() for name in self.judged}
        return found | {"any icon": self.eyes.icons(seen).any(-1).tolist()}


@dataclass
class Erasure:
    """Draws a prompt before and after erasing, into a folder.

    Args:
        pipe: the pipeline, without erasers.
        erasers: the erasers to apply, in order.
        prompt, negative: the user's prompt and negative prompt.
        model: the model's name in the record.
        seed: seed of the first picture. The other pictures use the following seeds.
        images: number of pictures.
        steps: denoising steps.
        guidance: the guidance scale, as `efface.pipelines.guided` takes it. None keeps the pipeline's default.
        judge: judges the pictures. None: no judgement.
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
                    "pictures. Give one list for each picture."
                )
        from .families import filled

        configs = [config(filled(eraser, self.pipe)) for eraser in self.erasers]
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
        """Draws batch by batch, with equal seeds before and after, and returns the record.

        Earlier results in the folder stay until the first batch replaces them. The record lists the files on disk.
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
        """Yields the seed, "before" or "after", the picture, and notes about it."""
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
        """Writes the record and the grid of the pictures so far."""
        from PIL import Image as Pictures

        save(folder / "record.json", json.dumps(self.record, indent=1))
        both = [e for e in self.record["images"] if "after" in e]
        some = (both or self.record["images"])[:SHOWN]
        rows = {when: [Pictures.open(folder / e[when]["file"]) for e in some] for when in some[0] if when != "seed"}
        save(folder / "grid.png", grid(rows, [str(e["seed"]) for e in some]))

    def finished(self, folder: Path) -> str:
        """Describes the results of a job that ended early, and records them if the disk allows."""
        drawn = self.record["images"]
        if not drawn:
            return "No picture was finished."
        with suppress(OSError):  # the disk may be full, which was reported before
            self._write(folder)
        both = sum("after" in entry for entry in drawn)
        more = f", and {len(drawn) - both} more of the base model" if both < len(drawn) else ""
        return f"{both} of {self.images} pictures were finished{more}. They are in {folder}."


def _results(folder: Path) -> list[Path]:
    """The files that an `Erasure` wrote there."""
    ours = re.compile(r"(before|after)-\d+\.png|grid\.png|record\.json")
    return [file for file in folder.iterdir() if ours.fullmatch(file.name)]


def _part(eraser: Any, start: int, n: int) -> Any:
    """The eraser for `n` pictures from number `start` on, with the `rows` of these pictures."""
    rows = getattr(eraser, "rows", None)
    return eraser if rows is None else replace(eraser, rows=rows[start : start + n])


def save(file: Path, made: Image | str) -> None:
    """Writes a picture or a text as `files.write`. The error of a failed write names the file."""
    try:
        files.write(file, made if isinstance(made, str) else png(made))
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(f"{file} cannot be written ({why}). Free some space, or name another folder by --out.") from error


# ---------------------------------------------------------------- fit


@dataclass
class Fit:
    """Learns a delta on a model, and writes it to a file.

    Args:
        editor: the editor that learns it.
        pipe: the pipeline.
        concepts: what to erase.
        file: the file to write. An interrupted fit continues from `checkpoint`, a file with a similar name.
        after: deltas that are applied during the fit.
        seed: seed of the fit.
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
        """Fits the delta, writes it to the file, and returns it."""
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
        """Describes the results of a fit that ended early."""
        goes_on = self.checkpoint is not None and self.checkpoint.exists()
        return f"{self.file} was not written." + (
            f" The same command continues from {self.checkpoint}." if goes_on else ""
        )


# ---------------------------------------------------------------- bench


def rehearse(suite: Suite) -> None:
    """Checks, before anything is drawn, that the metrics have all they need.

    Raises:
        ValueError: the suite cannot be scored.
    """
    try:
        runs.rehearse(suite)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"The suite could not be scored, so nothing was drawn: {error}\nCorrect that, change the metric with "
            "--judge METRIC.NAME=VALUE, or draw with --no-score and run `efface score` later."
        ) from error


def bench(suite: Suite, pipe: DiffusionPipeline, *, score: bool = True, **options: Any) -> runs.Run:
    """Draws a suite with and without erasers, and scores it.

    Args:
        suite: the suite to draw.
        pipe: the pipeline.
        score: whether to score the pictures.
        options: options of `efface.run`: `eraser`, `out`, `base`, `batch`, `name`, `command`, `guidance` and `ray`.
    """
    if score:
        rehearse(suite)
    made = runs.run(suite, pipe, **options)
    if score:
        runs.score(made)
    return made


# ---------------------------------------------------------------- audit


def audit(model: str | Path | DiffusionPipeline, concepts: Sequence[Concept], *, out: Path, **options: Any) -> Audit:
    """Audits a model. After an early end, the same call continues with the pictures in the folder.

    Args:
        model: the model, as `efface.audit` takes it.
        concepts: what to look for.
        out: the folder of the audit.
        options: further options of `efface.audit`.
    """
    from . import auditing

    return auditing.audit(model, concepts, out=out, **options)


def audited(out: Path) -> str:
    """Describes the results of an audit that ended early; "" if there are none."""
    from . import auditing

    there = files.there(out / auditing.SETTING)
    return f"Finished pictures are in {out}. Run the same command, which continues." if there else ""
