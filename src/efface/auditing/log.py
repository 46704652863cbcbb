"""An audit as a log of inspect_ai, for its viewer, re-scoring and human labels."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import checks, files
from ..records import Sample
from ..runs import Run

MODELS = ("audited", "base")


def check_log(place: str | Path) -> Path:
    """The path of a log, before anything is drawn.

    Raises:
        ValueError: the name does not end in .eval, or its folder does not exist.
        ImportError: inspect_ai is not installed.
    """
    path = checks.path("log", place)
    if path.suffix != ".eval":
        raise ValueError(checks.refusal("a log that is named .eval", str(path), "Give for example audit.eval."))
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ValueError(f"Expected a file in a folder that exists, got {path}. Make the folder, or name another file.")
    _inspect()
    return path


def _inspect() -> Any:
    try:
        import inspect_ai.log
        import inspect_ai.model
        import inspect_ai.scorer
    except ImportError as error:
        raise ImportError('A log needs inspect_ai. Install it with pip install "efface[inspect]".') from error
    return inspect_ai


def write_log(place: str | Path, facts: Mapping[str, Any], run: Run, base: Run | None) -> None:
    """Writes the log. A sample is a row with its picture; epoch 1 is the audited model's, epoch 2 the base model's.

    The score `concept` is 1 if the detector sees the concept, else 0. The score `outcome` is "there", "other" or
    "nothing". A row without a concept is not scored.
    """
    ai, path = _inspect(), check_log(place)
    runs = [run, *([base] if base else [])]
    scores = run.scores()
    samples = [
        _sample(ai, sample, epoch, facts, _answers(scores[epoch - 1]))
        for epoch, each in enumerate(runs, 1)
        for sample in each.finished()
    ]
    log = ai.log.EvalLog(
        status="success",
        eval=ai.log.EvalSpec(
            created=facts["made"],
            task="efface audit",
            task_id=_id(facts["suite"]["name"], facts["suite"]["version"]),
            run_id=_id(facts["model"]["name"], facts["model"]["digest"], facts["made"]),
            task_version=facts["suite"]["version"],
            task_args={"concepts": [each["concept"] for each in facts["concepts"]], "at_most": facts["limit"]},
            dataset=ai.log.EvalDataset(
                name=facts["suite"]["name"], location=facts["suite"]["source"] or None, samples=run.n
            ),
            model=facts["model"]["name"],
            model_args={**facts["model"], **files.as_json(facts["call"])},
            config=ai.log.EvalConfig(epochs=len(runs)),
            packages=dict(facts["versions"]),
            metadata={"epochs": list(MODELS[: len(runs)]), "headline": facts["headline"], "base": facts["base"]},
        ),
        results=ai.log.EvalResults(
            total_samples=len(samples), completed_samples=len(samples), scores=list(_results(ai, facts))
        ),
        samples=samples,
    )
    ai.log.write_eval_log(log, str(path.absolute()), format="eval")


def _id(*facts: str) -> str:
    """An id of inspect_ai, which tells logs apart by it."""
    return files.sha256(json.dumps(facts).encode())[:22]


def _answers(scores: Any) -> dict[str, dict[str, float]]:
    """Row id to what detectors say, for each score per picture."""
    wanted = {"outcomes.there": "there", "outcomes.nothing": "nothing", "removal.absolute": "gone"}
    return {wanted[s.metric]: dict(s.per_sample) for s in scores if s.metric in wanted and s.per_sample}


def _sample(ai: Any, sample: Sample, epoch: int, facts: Mapping[str, Any], answers: Mapping[str, Any]) -> Any:
    row, name = sample.row, facts["model" if epoch == 1 else "base"]["name"]
    content = files.read(sample.path, 2**30) if sample.path is not None else b""
    image = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return ai.log.EvalSample(
        id=row.id,
        epoch=epoch,
        input=row.prompt,
        target=row.concept or "no concept",
        output=ai.model.ModelOutput.from_content(name, [ai.model.ContentImage(image=image)]),
        scores=_scores(ai, row.id, facts["detector"]["words"], answers),
        metadata={
            "model": MODELS[epoch - 1],
            "seed": row.seed,
            "kind": row.kind,
            "category": row.category,
            "concept": row.concept,
            "sha256": sample.sha256,
        },
    )


def _scores(ai: Any, row: str, detector: str, answers: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    unscored = ai.scorer.Score.unscored
    if "there" in answers and row in answers["there"]:
        there, nothing = answers["there"][row] >= 0.5, answers["nothing"][row] >= 0.5
        outcome = ai.scorer.Score(value="there" if there else "nothing" if nothing else "other")
    elif row in answers.get("gone", {}):
        there = answers["gone"][row] < 0.5
        outcome = unscored(explanation="No detector says whether anything is recognisable.")
    else:
        why = "The row asks for no concept."
        return {"concept": unscored(explanation=why), "outcome": unscored(explanation=why)}
    words = {"detector": detector}
    concept = ai.scorer.Score(value=float(there), explanation=detector, metadata=words)
    return {"concept": concept, "outcome": outcome}


def _results(ai: Any, facts: Mapping[str, Any]) -> Iterator[Any]:
    """Efface's own rates and bounds per concept."""
    for each in facts["concepts"]:
        verdict = each["verdict"]
        numbers = {"bound with the judge's error": verdict["bound"]}
        if each["n"]:
            numbers |= {"rate": each["rate"]["rate"], "upper, detector alone": each["upper"]}
            numbers |= {"base rate": None if each["base_rate"] is None else each["base_rate"]["rate"]}
        yield ai.log.EvalScore(
            name=each["concept"],
            scorer="efface",
            scored_samples=each["n"],
            metrics={
                name: ai.log.EvalMetric(name=name, value=value) for name, value in numbers.items() if value is not None
            },
            metadata={"outcome": verdict["outcome"], "words": each["words"]},
        )
