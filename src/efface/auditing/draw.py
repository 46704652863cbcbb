"""Draws the pictures of an audit: the base model, the audited one, the control, and attacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import api, redteam, runs
from ..detectors._named import Spec, detector
from ..pipelines import model_hash
from ..records import Suite
from .prepare import OtherModel, add_changes, digest, random_weights, weights_of
from .result import AUDITED, BASE, RANDOM
from .rows import of_controls

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..core import Concept

ATTACKED = 8  # prompts of an attack


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an audit draws, and how it is judged.

    Args:
        model, base: the audited model and the base model: names as `efface.load` takes them, or pipelines. The base may
            be None.
        delta, lora: files that are merged into the audited model.
        suite: the rows to draw.
        folder: the audit's folder.
        detector, recognises: the detectors, by name or with options.
        batch, guidance, loading, progress: as `efface.run` and `efface.load` take them.
        budget: of each attack.
    """

    model: Any
    base: Any
    delta: Sequence[str | Path]
    lora: Sequence[str | Path]
    suite: Suite
    folder: Path
    detector: Spec
    recognises: Spec | None
    batch: int
    guidance: float | None
    loading: Mapping[str, Any]
    progress: Any
    budget: int

    def load_base(self) -> DiffusionPipeline | None:
        return None if self.base is None else self._load(self.base)

    def load_model(self) -> DiffusionPipeline:
        pipe = self._load(self.model)
        add_changes(pipe, self.delta, self.lora)
        return pipe

    def _load(self, model: Any) -> Any:
        pipe = api.load(model, **self.loading) if isinstance(model, (str, Path)) else model
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def named(self, model: Any) -> str:
        return str(model) if isinstance(model, (str, Path)) else f"a {type(model).__name__} in memory"

    @property
    def name(self) -> str:
        """The audited model with what is merged into it."""
        return " + ".join([self.named(self.model), *(Path(each).name for each in (*self.delta, *self.lora))])

    def draw(
        self, pipe: DiffusionPipeline, place: str, suite: Suite, facts: Mapping[str, Any], base: Any = None
    ) -> runs.Run:
        """Draws a run. Its model's name holds the digest, because labels have to tell models apart by all weights."""
        name = f"{facts['name']}, weights {facts['digest'][:12]}"
        options: dict[str, Any] = {"batch": self.batch, "guidance": self.guidance, "progress": self.progress}
        return runs.run(suite, pipe, out=self.folder / place, name=name, base=base, **options)

    def draw_base(self, pipe: DiffusionPipeline, facts: Mapping[str, Any]) -> runs.Run:
        return self.draw(pipe, BASE, self.suite, facts)

    def draw_model(self, pipe: DiffusionPipeline, facts: Mapping[str, Any], base: runs.Run | None) -> runs.Run:
        return self.draw(pipe, AUDITED, self.suite, facts, base)

    def draw_random(self, pipe: DiffusionPipeline, concepts: Sequence[str]) -> runs.Run:
        """The control: the audited model's denoiser with random weights."""
        suite = dataclasses.replace(self.suite, rows=of_controls(self.suite.rows, concepts), data_hash="")
        made = random_weights(pipe)
        name = f"random weights of {self.name}"
        return self.draw(made, RANDOM, suite, {"name": name, "digest": digest(made) or "not in memory"})

    def facts_of_base(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        return facts_of(pipe, self.named(self.base), weights_of(pipe, self.base, ()))

    def facts_of_model(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        return facts_of(pipe, self.name, weights_of(pipe, self.model, (*self.delta, *self.lora)))


def facts_of(pipe: DiffusionPipeline, name: str, weights: str) -> dict[str, Any]:
    """The facts on a model for audit.json."""
    dtype = str(pipe.dtype).removeprefix("torch.")
    kind = {"pipeline": type(pipe).__name__, "dtype": dtype}
    return {"name": name, "digest": weights, "text_hash": model_hash(pipe), **kind}


def attacked(
    plan: Plan,
    attack: str,
    concept: Concept,
    base: DiffusionPipeline,
    pipe: DiffusionPipeline,
    facts: Mapping[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Runs an attack on the audited model, and returns its rate; or says why it did not run.

    The harness takes the audited model as an eraser of the base model: it replaces its weights.
    """
    rows = [row for row in plan.suite.rows if row.concept == concept.name]
    named = [row for row in rows if row.kind == "explicit"] or rows
    made: dict[str, Any] = {"attack": attack, "concept": concept.name, "access": "", "refused": ""}
    made |= {"value": None, "low": None, "high": None, "n": 0, "prompts": 0, "budget": plan.budget}
    try:
        found = redteam.attack(
            base,
            attack,
            concept,
            eraser=OtherModel(pipe, {"name": facts["name"], "digest": facts["digest"]}),
            out=out,
            prompts=tuple(dict.fromkeys(row.prompt for row in named))[:ATTACKED],
            budget=plan.budget,
            steps=int(plan.suite.call.get("num_inference_steps", 25)),
            guidance=plan.guidance if plan.guidance is not None else plan.suite.call.get("guidance"),
            judge=detector(plan.detector, concept.name),
            recognises=None if plan.recognises is None else detector(plan.recognises),
            batch=plan.batch,
            progress=plan.progress,
        )
    except ValueError as error:
        return made | {"refused": str(error)}
    share = found.share("attacked")
    if share is None:
        return made | {"refused": found.verdict()}
    return made | {"access": found.setting["access"], **dataclasses.asdict(share), "prompts": found.prompts}
