"""How much strength a concept takes on a model: the smallest that erases enough and keeps enough."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checks, files
from ._trials import FORMAT, Kept, Trials, same_setting
from .core import Concept, ConceptLike, Detector, as_concepts, check_detector, check_eraser, config
from .fields import field_names
from .intervals import Rate

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

__all__ = ["Calibration", "Point", "calibrate", "same_picture"]

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SHOWN = 0.30  # what the base model has to show of the concept, or nothing can be told
LIKE = 0.9


def same_picture(erased: Tensor, plain: Tensor) -> Tensor:
    """Whether pictures [N, 3, H, W] are still the plain ones, bool [1, N]: `pictures.likeness` of at least 0.9.

    It knows nothing of what is drawn: a crude judge, for models without a better one.
    """
    from .pictures import likeness

    return (likeness(erased, plain) >= LIKE)[None]


@dataclass(frozen=True)
class Point:
    """One strength, by the worse judge: how much of the concept is left, and how much of the rest is kept."""

    strength: float
    left: Rate
    kept: Rate


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Args:
        strength: the smallest one tried that reaches both goals; None if none does.
        best: the point of that strength, or the one that comes closest: the smallest sum of what the two goals lack.
        points: every strength tried, ascending.
        plain: the concept in the base model's pictures, by the judge that sees less of it.
        target, keep: the goals.
    """

    strength: float | None
    best: Point
    points: tuple[Point, ...]
    plain: Rate
    target: float
    keep: float

    def __str__(self) -> str:
        goals = f"left <= {100 * self.target:g} %, kept >= {100 * self.keep:g} %"
        found = f"{self.best.strength:g}: left {self.best.left}, kept {self.best.kept}, plain {self.plain}"
        if self.strength is not None:
            return f"Strength {found} (goal: {goals})."
        return f"No strength from {self.points[0].strength:g} to {self.points[-1].strength:g} reaches {goals}. " + (
            f"The best trade-off is strength {found}."
        )

    def record(self) -> dict[str, Any]:
        """As JSON types."""

        def point(p: Point) -> dict[str, Any]:
            return {"strength": p.strength, "left": p.left.record(), "kept": p.kept.record()}

        return {
            "strength": self.strength,
            "best": point(self.best),
            "points": [point(p) for p in self.points],
            "plain": self.plain.record(),
            "target": self.target,
            "keep": self.keep,
        }

    def plot(self, path: str | Path) -> None:
        """Writes left and kept over strength, with intervals and goals, as a picture.

        Raises:
            ImportError: matplotlib is not installed.
        """
        check_plot()
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(5, 4))
        for name, goal, colour in (("left", self.target, "tab:red"), ("kept", self.keep, "tab:blue")):
            rates = [getattr(p, name) for p in self.points]
            y = [100 * r.rate for r in rates]
            bars = [[v - 100 * r.interval[0] for v, r in zip(y, rates, strict=True)]]
            bars += [[100 * r.interval[1] - v for v, r in zip(y, rates, strict=True)]]
            bars = [[max(v, 0.0) for v in bar] for bar in bars]
            axes.errorbar([p.strength for p in self.points], y, bars, fmt="o-", capsize=3, color=colour, label=name)
            axes.axhline(100 * goal, linestyle=":", color=colour)
        axes.axhline(100 * self.plain.rate, color="grey", linestyle="--", label="left, base model")
        axes.set(xlabel="strength", ylabel="%", ylim=(-3, 103), title="Tuning seeds, 95 % intervals")
        axes.legend()
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def check_plot() -> None:
    """ImportError with the cure if matplotlib is not there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('Plots need matplotlib: pip install "efface[bench]"')


def calibrate(
    pipe: DiffusionPipeline,
    eraser: Any,
    concept: ConceptLike,
    detector: Detector,
    target: float = 0.03,
    keep: float = 0.95,
    *,
    prompts: Sequence[str] = (),
    keep_prompts: Sequence[str] = (),
    kept: Kept = same_picture,
    strengths: Sequence[float] = STRENGTHS,
    refine: int = 2,
    n: int = 64,
    first_seed: int = 1_000,
    batch: int = 16,
    out: str | Path | None = None,
    plot: bool = False,
    guidance: float | None = None,
    progress: Callable[[str, int], None] | None = None,
    **call: Any,
) -> Calibration:
    """The smallest strength of an eraser at which at most `target` of the concept is left and `keep` of the rest kept.

    Strengths are tried upwards until the target is reached; then the gap below is halved `refine` times. More strength
    leaves less of a concept and of everything else, so nothing above is tried. Rates are those of the worse judge, and
    on tuning seeds: measure the strength found on test seeds before you believe its figures.

    Args:
        pipe: a diffusers text-to-image pipeline. Its scheduler, and the erasers, deltas and LoRAs (by weights and
            scale) that are on it, are part of the setting.
        eraser: any eraser of this concept with a `strength`; its other fields stay.
        concept: the one that is judged; says the prompts where none are given.
        detector: says whether the concept is in a picture; see `efface.Detector`.
        target: most of the concept that may be left, as a share of pictures.
        keep: least of the other pictures that must be kept.
        prompts: prompts that draw the concept; the concept's phrases if left out.
        keep_prompts: prompts whose pictures must stay; the concept's `keep` if left out.
        kept: from erased pictures and the base model's [N, 3, H, W] to whether each is kept, [judges, N]; -1: does not
            count.
        strengths: the ladder, each > 0.
        refine: how often to halve the gap below the first strength that reaches the target.
        n: pictures for each of the two rates, from prompts in turn.
        first_seed: of the tuning seeds, which go up to 9,999; 2 n are used.
        batch: pictures per pipeline call.
        out: a folder that keeps each strength's judgements as JSON: the same call goes on where it stopped.
        plot: also write `calibration.png` to `out`; needs matplotlib.
        guidance: the guidance scale, as `efface.pipelines.guided` takes it; None leaves the pipeline's own default.
        progress: called with the task and the number of pictures since the last call.
        call: further arguments of the pipeline, such as `num_inference_steps`.

    Raises:
        ValueError: an eraser without strength or of another concept, several concepts, no prompts, a number out of
            range, or seeds that are not tuning seeds. A base model that shows the concept in fewer than 30 % of the
            pictures. An `out` that is a file, damaged, or a calibration of other settings.
        TypeError: no eraser, a detector without a name, or prompts that are not a sequence of texts.
        ImportError: a plot without matplotlib.

    Example:
        >>> import efface
        >>> from efface.models.emoji.eyes import ConceptEyes
        >>> pipe, eyes = efface.load("emoji"), ConceptEyes("cat")
        >>> found = efface.calibrate(pipe, efface.EIUP("cat"), efface.Concept("cat", ("a cat",), keep=("a rocket",)),
        ...     eyes, kept=eyes.kept, strengths=[1.0], refine=0, n=2, num_inference_steps=8)
        >>> [point.strength for point in found.points]
        [1.0]
    """
    from .api import model_hash
    from .delta import present
    from .pipelines import guided

    about = _about(eraser, concept)
    check_detector(detector)
    prompts = checks.texts("prompts", prompts) or about.phrases
    keep_prompts = checks.texts("keep_prompts", keep_prompts) or about.keep
    _check(about, keep_prompts, strengths, target, keep)
    for name, value, least in (("n", n, 1), ("refine", refine, 0), ("first_seed", first_seed, 0), ("batch", batch, 1)):
        checks.whole(name, value, least)
    seeds = checks.tuning_seeds("first_seed", range(first_seed, first_seed + 2 * n))
    folder = None if out is None else Path(out)
    if plot:
        check_plot()
        if folder is None:
            raise ValueError("A plot needs a place: give `out`, or call `plot` of what is returned.")
    call = {**guided(pipe, guidance), **call}
    if folder is not None:
        setting = {
            "model": model_hash(pipe),
            "eraser": {k: v for k, v in config(eraser).items() if k != "strength"},
            "prompts": prompts,
            "keep_prompts": keep_prompts,
            "detector": detector.name,
            "kept": getattr(kept, "__qualname__", repr(kept)),
            "n": n,
            "first_seed": first_seed,
            "call": call,
            "present": present(pipe),
        }
        same_setting(folder, setting)
    asked = [prompts[k % len(prompts)] for k in range(n)], [keep_prompts[k % len(keep_prompts)] for k in range(n)]
    trials = Trials(pipe, eraser, detector, kept, asked, seeds, batch, call, folder, progress)
    plain = trials.plain()
    if plain.rate < SHOWN:
        raise checks.NotJudged(
            f"The base model shows {about.name!r} in {plain.hits} of {plain.n} pictures, fewer than {SHOWN:.0%}: "
            "nothing can be told about its erasure. Give `prompts` that draw it, and a detector that knows it."
        )
    points = tuple(Point(s, *trials.rates(s)) for s in _tried(trials, strengths, refine, target))
    good = [p for p in points if p.left.rate <= target and p.kept.rate >= keep]
    best = min(good or points, key=lambda p: (max(p.left.rate - target, 0) + max(keep - p.kept.rate, 0), p.strength))
    result = Calibration(best.strength if good else None, best, points, plain, target, keep)
    if folder is not None:
        files.write_json(folder / "calibration.json", {"format": FORMAT, **setting, **result.record()})
        if plot:
            result.plot(folder / "calibration.png")
    return result


def _tried(trials: Trials, strengths: Sequence[float], refine: int, target: float) -> list[float]:
    """The strengths that were tried, ascending: upwards to the first that reaches the target, then the gap below."""
    tried, low, high = [], 0.0, 0.0

    def reaches(strength: float) -> bool:
        tried.append(strength)
        return trials.rates(strength)[0].rate <= target

    for strength in sorted(strengths):
        low, high = high, strength
        if reaches(strength):
            for _ in range(refine):
                middle = float(f"{(low + high) / 2:.4g}")
                low, high = (low, middle) if reaches(middle) else (middle, high)
            break
    return sorted(set(tried))


def _about(eraser: Any, concept: ConceptLike) -> Concept:
    """The concept, if the eraser has a strength and erases it."""
    check_eraser(eraser)
    names = sorted(field_names(eraser))
    if "strength" not in names:
        raise ValueError(f"{type(eraser).__name__} has no `strength` to calibrate: its fields are {names}.")
    concepts = as_concepts(concept)
    if len(concepts) != 1:
        raise ValueError(f"Expected one concept, got {len(concepts)}. Calibrate them one at a time.")
    erased = [getattr(c, "name", c) for c in getattr(eraser, "concepts", concepts)]
    if concepts[0].name not in erased:
        raise ValueError(
            f"{type(eraser).__name__} erases {', '.join(map(repr, erased)) or 'by rows'}, but {concepts[0].name!r} is "
            "what is judged: give an eraser of that concept."
        )
    return concepts[0]


def _check(about: Concept, keep_prompts: Sequence[str], strengths: Sequence[float], target: float, keep: float) -> None:
    if not keep_prompts:
        raise ValueError(
            f"Nothing says what must survive the erasure of {about.name!r}: give `keep_prompts`, or a Concept with "
            "`keep`."
        )
    if not isinstance(strengths, Sequence) or not strengths:
        raise ValueError(f"Expected `strengths` to be numbers > 0, got {checks.shown(strengths)}. Give (0.5, 1, 2).")
    for strength in strengths:
        checks.number("strengths", strength, 0, above=True)
    for name, share in (("target", target), ("keep", keep)):
        checks.share(name, share)
