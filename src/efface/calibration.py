"""Calibration: finds the smallest strength that meets goals for residual rate and retention."""

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
SHOWN = 0.30  # the base model's smallest rate of pictures with the concept; below, erasure cannot be judged
LIKE = 0.9


def same_picture(erased: Tensor, plain: Tensor) -> Tensor:
    """Whether pictures [N, 3, H, W] match the base model's, bool [1, N]: `pictures.likeness` of at least 0.9.

    This judge compares pixels only. Use it for models without a better judge.
    """
    from .pictures import likeness

    return (likeness(erased, plain) >= LIKE)[None]


@dataclass(frozen=True)
class Point:
    """One strength with its residual rate (`left`) and retention (`kept`), each by the worse judge."""

    strength: float
    left: Rate
    kept: Rate


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`.

    Args:
        strength: the smallest tried strength that meets both goals. None if none does.
        best: the point of that strength; without one, the point with the smallest summed distance from the goals.
        points: the points of all tried strengths, ascending.
        plain: the rate of the base model's pictures with the concept, by the judge with fewer detections.
        target, keep: the goals for residual rate and retention.
    """

    strength: float | None
    best: Point
    points: tuple[Point, ...]
    plain: Rate
    target: float
    keep: float

    def __str__(self) -> str:
        goals = f"residual rate <= {100 * self.target:g} %, retention >= {100 * self.keep:g} %"
        found = f"{self.best.strength:g}: residual rate {self.best.left}, retention {self.best.kept}"
        found += f", base model {self.plain}"
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
        """Plots residual rate and retention over strength, with intervals and goals.

        Raises:
            ImportError: matplotlib is not installed.
        """
        check_plot()
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(5, 4))
        for name, label, goal, colour in (
            ("left", "residual rate", self.target, "tab:red"),
            ("kept", "retention", self.keep, "tab:blue"),
        ):
            rates = [getattr(p, name) for p in self.points]
            y = [100 * r.rate for r in rates]
            bars = [[v - 100 * r.interval[0] for v, r in zip(y, rates, strict=True)]]
            bars += [[100 * r.interval[1] - v for v, r in zip(y, rates, strict=True)]]
            bars = [[max(v, 0.0) for v in bar] for bar in bars]
            axes.errorbar([p.strength for p in self.points], y, bars, fmt="o-", capsize=3, color=colour, label=label)
            axes.axhline(100 * goal, linestyle=":", color=colour)
        axes.axhline(100 * self.plain.rate, color="grey", linestyle="--", label="base model")
        axes.set(xlabel="strength", ylabel="%", ylim=(-3, 103), title="Tuning seeds, 95 % intervals")
        axes.legend()
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def check_plot() -> None:
    """Raises ImportError, with the cure, if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('Plots need matplotlib. Install it with pip install "efface[bench]".')


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
    """Finds the smallest strength of an eraser with residual rate <= `target` and retention >= `keep`.

    Tries strengths upwards until one meets the target, then halves the gap below `refine` times. Higher strengths
    reduce both residual rate and retention, so they are not tried. All rates are those of the worse judge, on tuning
    seeds. Measure the result on test seeds before you report it.

    Args:
        pipe: a diffusers text-to-image pipeline. Its scheduler, erasers, deltas and LoRAs (by weights and scale) are
            part of the setting.
        eraser: any eraser of this concept with a `strength`. Its other fields stay.
        concept: the judged concept. It provides the default prompts.
        detector: detects the concept; see `efface.Detector`.
        target: the largest residual rate, as a share of pictures.
        keep: the smallest retention, as a share of the other pictures.
        prompts: prompts that draw the concept. Default: the concept's phrases.
        keep_prompts: prompts whose pictures the erasure should not change. Default: the concept's `keep`.
        kept: judges retention: maps erased pictures and the base model's [N, 3, H, W] to [judges, N], 1 for retained, 0
            for not, -1 for not counted.
        strengths: the strengths to try, each > 0.
        refine: number of halvings of the gap below the first strength that meets the target.
        n: pictures per rate, from the prompts in turn.
        first_seed: first of 2 n tuning seeds, all below 10,000.
        batch: pictures per pipeline call.
        out: a folder for each strength's judgements as JSON. The same call continues from it.
        plot: also writes `calibration.png` to `out`. Needs matplotlib.
        guidance: the guidance scale, as `efface.pipelines.guided` takes it. None keeps the pipeline's default.
        progress: called with the task and the number of pictures since the last call.
        call: further arguments of the pipeline, such as `num_inference_steps`.

    Raises:
        ValueError: the eraser has no strength or another concept, there are several concepts or no prompts, a number is
            out of range, or seeds are not tuning seeds. Also if the base model shows the concept in fewer than 30 % of
            the pictures, or `out` is a file, is damaged, or has other settings.
        TypeError: `eraser` is not an eraser, the detector has no name, or prompts are not a sequence of texts.
        ImportError: `plot` is set, but matplotlib is not installed.

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
            raise ValueError("Expected `out` for the plot, got none. Give a folder, or call `plot` on the result.")
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
            f"The base model shows {about.name!r} in {plain.hits} of {plain.n} pictures, fewer than {SHOWN:.0%}, so "
            "its erasure cannot be judged. Give `prompts` that draw it, and a detector that knows it."
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
    """The tried strengths, ascending: upwards to the first that meets the target, then halving the gap below."""
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
    """The concept. Raises ValueError unless the eraser has a strength and erases it."""
    check_eraser(eraser)
    names = sorted(field_names(eraser))
    if "strength" not in names:
        raise ValueError(
            f"{type(eraser).__name__} has no `strength` among its fields {names}. Calibrate an eraser with a strength."
        )
    concepts = as_concepts(concept)
    if len(concepts) != 1:
        raise ValueError(f"Expected one concept, got {len(concepts)}. Calibrate them one at a time.")
    erased = [getattr(c, "name", c) for c in getattr(eraser, "concepts", concepts)]
    if concepts[0].name not in erased:
        raise ValueError(
            f"{type(eraser).__name__} erases {', '.join(map(repr, erased)) or 'by rows'}, but the judged concept is "
            f"{concepts[0].name!r}. Give an eraser of that concept."
        )
    return concepts[0]


def _check(about: Concept, keep_prompts: Sequence[str], strengths: Sequence[float], target: float, keep: float) -> None:
    if not keep_prompts:
        raise ValueError(
            f"There are no prompts for the retention of {about.name!r}. Give `keep_prompts`, or a Concept with `keep`."
        )
    if not isinstance(strengths, Sequence) or not strengths:
        raise ValueError(f"Expected `strengths` to be numbers > 0, got {checks.shown(strengths)}. Give (0.5, 1, 2).")
    for strength in strengths:
        checks.number("strengths", strength, 0, above=True)
    for name, share in (("target", target), ("keep", keep)):
        checks.share(name, share)
