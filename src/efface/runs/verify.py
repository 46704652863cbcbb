"""Draws sampled rows of a run again, and compares the pictures."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checks, files, registry
from ..core import Concept, config
from ..fields import field_names
from ..pictures import read_picture
from ..pipelines import EMBEDDED
from ..progress import shows
from ..records import Sample
from .draw import Paint, calls, painter, several
from .folder import RUN
from .record import MODELS, Progress, Run, model_facts, session, silent

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..core import Eraser


@dataclasses.dataclass(frozen=True)
class Redrawn:
    """One picture, drawn again.

    Args:
        row: the id of its row.
        base: whether the base model drew it.
        largest: the largest difference of a channel, 0 to 255.
        share: the share of pixels that differ. 1 if the sizes differ.
    """

    row: str
    base: bool
    largest: int
    share: float

    @property
    def same(self) -> bool:
        """Whether all pixels are equal."""
        return self.share == 0


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Args:
        folder: the run.
        rows: the compared pictures: first those of the run, then those of its base run.
        versions: packages whose versions differ, with their versions in the run's first session and now.
    """

    folder: Path
    rows: tuple[Redrawn, ...]
    versions: Mapping[str, tuple[str, str]]

    @property
    def same(self) -> bool:
        """Whether all pictures are equal, bit by bit."""
        return all(row.same for row in self.rows)

    def record(self) -> dict[str, Any]:
        """As JSON types."""
        rows = [dataclasses.asdict(row) | {"same": row.same} for row in self.rows]
        return {
            "out": str(self.folder),
            "same": self.same,
            "rows": rows,
            "versions": {name: list(pair) for name, pair in self.versions.items()},
        }

    def __str__(self) -> str:
        """One line per differing picture, then the number of equal pictures."""
        lines = []
        for row in self.rows:
            if not row.same:
                which = "base model" if row.base else "run"
                lines.append(f"{row.row} ({which}): {row.share:.2%} of pixels differ, by at most {row.largest} of 255")
        lines.append(f"{sum(row.same for row in self.rows)} of {len(self.rows)} pictures are the same to the bit.")
        lines += [f"{name}: {there} there, {here} here" for name, (there, here) in self.versions.items()]
        return "\n".join(lines)


@shows
def verify(
    run: Run | str | Path,
    redraw: int = 16,
    *,
    model: str | Path | DiffusionPipeline | None = None,
    eraser: Eraser | Sequence[Eraser] | None = None,
    seed: int | None = None,
    progress: bool | Progress | None = None,
) -> Verification:
    """Draws sampled rows of a run and of its base run again, and compares them with the stored pictures.

    A picture may depend on its batch, so `verify` repeats complete pipeline calls. It compares at least `redraw` rows,
    and at most one batch more. Another machine or version changes a few pixels by a few of 255 levels. A replaced
    picture differs by more.

    Args:
        run: a finished run, or its folder.
        redraw: the smallest number of rows to draw again.
        model: the model. None: the embedded model that the record names. A record may come from an untrusted source, so
            `verify` never opens a folder or hub id from it.
        eraser: erasers of the run. Missing ones are rebuilt from the record by name. Deltas must be given.
        seed: seed of the choice of rows. None: a new choice in each call.
        progress: True shows a bar. A callable receives the task, the number of finished pictures and the total.

    Returns:
        The difference of each picture.

    Raises:
        FileNotFoundError: the folder holds no run, or the base run is missing.
        ValueError: the run is not finished, or a file is damaged; the model is missing or is not the run's; the erasers
            cannot be rebuilt from the record, or are not the run's.

    Example:
        >>> import tempfile
        >>> import efface
        >>> cat = efface.Row("cat-0", "a cat", 1_000_000)
        >>> suite = efface.Suite("cats", "1", (cat,), call={"num_inference_steps": 1})
        >>> run = efface.run(suite, "emoji", eraser=efface.EIUP("cat"), out=tempfile.mkdtemp() + "/cats")
        >>> print(efface.verify(run))
        2 of 2 pictures are the same to the bit.
    """
    checks.whole("redraw", redraw)
    run = run if isinstance(run, Run) else Run.open(run)
    base = run.base if run.record.get("compares") != MODELS else None  # another model, to be verified by itself
    drawn, plain = run.finished(), base.finished() if base else []
    from .. import api
    from ..families import filled

    pipe = _model(run, model)
    erasers = _erasers(run, [filled(each, pipe) for each in several(eraser)])
    tell = progress if callable(progress) else silent
    groups = _chosen(run, drawn, redraw, random.SystemRandom() if seed is None else random.Random(seed))
    total = sum(len(group) for _, group in groups) * (2 if base else 1)
    found: list[Redrawn] = []
    paint = painter(pipe)
    for on, samples, of_base in ((erasers, drawn, False), ((), plain, True)):
        with api.stack(pipe, *on):
            for call, group in groups if samples else ():
                found += _again(paint, call, [samples[k] for k in group], of_base)
                tell("base again" if of_base else "drawn again", len(found), total)
    sessions = run.record["sessions"][0], session(None)
    then, today = ({**each["versions"], "machine": each["machine"]} for each in sessions)
    differ = {name: (then.get(name, "none"), today[name]) for name in today if then.get(name) != today[name]}
    return Verification(run.folder, tuple(found), differ)


def _model(run: Run, model: str | Path | DiffusionPipeline | None) -> DiffusionPipeline:
    """The run's model, without erasers."""
    from .. import api
    from ..delta import active
    from ..hooks.sites import handles

    recorded = run.record["model"]
    if model is None and recorded["name"] not in EMBEDDED:
        raise ValueError(
            f"{run.folder / RUN} names the model {checks.shown(recorded['name'])}, which is not embedded in Efface. If "
            "you trust it, give it as `model=`."
        )
    given = recorded["name"] if model is None else model
    pipe = api.load(given) if isinstance(given, (str, Path)) else given
    if handles(pipe) or active(pipe):
        raise ValueError("The pipeline already has an eraser. Remove it, and give it as `eraser=` instead.")
    pipe.set_progress_bar_config(disable=True)
    asked = ("text_hash", "pipeline", "scheduler", "dtype")
    facts = model_facts(pipe, None)
    there, here = ({key: of[key] for key in asked} for of in (recorded, facts))
    files.check_same(there, here, f"The model is not that of {run.folder}", "Give the run's own model as `model=`.")
    return pipe


def _erasers(run: Run, given: Sequence[Any]) -> list[Any]:
    """The run's erasers: the given ones, and the others rebuilt by name."""
    recorded, configs = run.record["erasers"], [files.as_json(config(each)) for each in given]
    if any(each not in recorded for each in configs):
        there, here = {"erasers": recorded}, {"erasers": configs}
        files.check_same(there, here, f"The erasers are not those of {run.folder}", "Give the run's own as `eraser=`.")
    return [given[configs.index(each)] if each in configs else _rebuilt(run, each) for each in recorded]


def _rebuilt(run: Run, recorded: Mapping[str, Any]) -> Any:
    """Rebuilds a recorded eraser. Its configuration must equal the record, and no field may name a file."""
    fields, name = {k: v for k, v in recorded.items() if k != "method"}, recorded["method"]
    try:
        cls = registry.resolve(name, "erasers")
        files_named = [k for k, v in fields.items() if isinstance(v, str) and _path(v)]
        if strange := [*(fields.keys() - set(field_names(cls))), *files_named]:
            raise ValueError(f"its field {min(strange)!r}")
        made = cls(**{k: _concepts(v) if k in ("concepts", "rows") else v for k, v in fields.items()})
        files.check_same(recorded, config(made), "it becomes another", "")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"The eraser {checks.shown(name)} of {run.folder} cannot be rebuilt from its record "
            f"({checks.short(str(error), 160)}). Give it as `eraser=` (--delta for a delta)."
        ) from error
    return made


def _path(value: str) -> bool:
    return "/" in value or "\\" in value or value.startswith("~") or Path(value).exists()


def _concepts(value: Any) -> Any:
    """Concepts from their JSON, also in lists."""
    if isinstance(value, list):
        return tuple(map(_concepts, value))
    return Concept(**value) if isinstance(value, dict) else value


def _chosen(
    run: Run, drawn: Sequence[Sample], redraw: int, chance: random.Random
) -> list[tuple[Mapping[str, Any], list[int]]]:
    """Random pipeline calls of the run with at least `redraw` rows, in the run's order."""
    rows, size, found = [sample.row for sample in drawn], run.record["batch"], []
    for start in range(0, run.n, size):
        found += calls(rows, range(start, min(start + size, run.n)), run.record["call"])
    taken: list[int] = []
    for k in chance.sample(range(len(found)), len(found)):
        if sum(len(found[each][1]) for each in taken) < redraw:
            taken.append(k)
    return [found[k] for k in sorted(taken)]


def _again(paint: Paint, call: Mapping[str, Any], samples: Sequence[Sample], base: bool) -> list[Redrawn]:
    from PIL import ImageChops

    found = []
    for sample, (picture, _) in zip(samples, paint([s.row for s in samples], call), strict=True):
        if sample.path is None:
            raise ValueError(f"The picture of row {sample.row.id!r} is not in a file. Verify a run folder.")
        kept = read_picture(sample.path, sample.sha256)
        largest, share = 255, 1.0
        if kept.size == picture.size:
            red, green, blue = ImageChops.difference(kept, picture.convert("RGB")).split()
            counts = ImageChops.lighter(ImageChops.lighter(red, green), blue).histogram()
            largest = max(apart for apart, count in enumerate(counts) if count)
            share = 1 - counts[0] / (kept.width * kept.height)
        found.append(Redrawn(sample.row.id, base, largest, share))
    return found
