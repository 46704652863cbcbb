"""`audit`: says how often a model still draws concepts, beside a base model, without applying an eraser."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, checks, files, registry, report, runs
from ..core import Concept, Concepts, as_concepts
from ..detectors._named import Spec, detector
from ..judged import LEVEL
from ..metrics.outcomes import Outcomes
from ..metrics.removal import Removal
from ..metrics.retention import Retention
from ..models import embedded, suite_of
from ..pipelines import EMBEDDED
from ..progress import shows
from ..records import Score, Suite, alike
from ..runs.record import now, this_command, versions
from . import verdict, words
from .draw import Plan, attacked
from .evidence import junit, statement
from .folder import agree, claim
from .hazards import categories
from .judge import Seen, control, figures, recognised, see
from .log import check_log, write_log
from .prepare import file_digests, ruined, shape
from .result import ATTACKS, AUDIT, AUDITED, JUNIT, LOCK, PAGE, STATEMENT, Audit
from .rows import check_asked, distinct, of_controls, others
from .since import check_since
from .since import since as regressions_since

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..feedback import Store
    from ..progress import Tell

AUTO = "auto"


@shows
def audit(
    model: str | Path | DiffusionPipeline,
    concepts: Concepts,
    *,
    base: str | Path | DiffusionPipeline | None = None,
    out: str | Path,
    suite: Suite | None = None,
    at_most: float | None = None,
    delta: Sequence[str | Path] = (),
    lora: Sequence[str | Path] = (),
    attacks: Sequence[str] = (),
    labels: Store | str | Path | None = None,
    detector: Spec = "eyes",
    recognises: Spec | None = AUTO,
    limit: int | None = None,
    batch: int = 8,
    guidance: float | None = None,
    budget: int = 2000,
    since: str | Path | None = None,
    log: str | Path | None = None,
    loading: Mapping[str, Any] | None = None,
    progress: bool | Tell | None = None,
    command: str | None = None,
) -> Audit:
    """Audits a model: how often it draws concepts, beside a base model on the same rows and seeds. Applies no eraser.

    Each picture has one of three outcomes: the concept, something else that is recognisable, or nothing recognisable.
    People's labels of the folder `audited` correct the rates (see `efface judge label`). A limit is met only if the
    upper bound with the judge's error is below it for every concept:

        U = bound on labelled positives + bound on misses among the others <= at_most

    Each audit draws controls: random weights and ruined pictures. A detector that sees something in them, a base model
    that rarely draws the concept, a ruined model, or missing labels end in "not judged", never in a success.

    Args:
        model: the model to audit: a name as `efface.load` takes it, or a pipeline without active erasers.
        concepts: the concepts to look for; rows of the suite name them.
        base: the model to compare with. None: the model itself without `delta` and `lora`; without these, there is no
            base model, and no limit can be met.
        out: the audit's folder; the same call continues there.
        suite: what to draw. None: the suite of the embedded model, or `emoji`, of these concepts.
        at_most: the limit in [0, 1]. None: rates are measured, and nothing passes.
        delta: deltas of weights to merge into the model.
        lora: LoRA files (.safetensors) to merge into the model.
        attacks: names from `efface list attacks` to run against the model.
        labels: a store of people's labels of the audited run, and of the base run.
        detector: the detector of the concepts; see `efface.detector`.
        recognises: the detector that says, without names, whether anything is recognisable. "auto": the same one for
            "eyes", otherwise None, and then no limit can be met.
        limit: the largest number of rows, alike from each concept and category.
        batch: pictures per pipeline call.
        guidance: the guidance scale. None: the suite's.
        budget: denoiser rows per prompt of an attack.
        since: the folder of an earlier audit of the same rows. A concept whose rate rose since then has regressed.
        log: a file that ends in .eval, for a log of inspect_ai.
        loading: further arguments of `efface.load`, for all models.
        progress: True shows a bar with the remaining time.
        command: the command in the record. None: the command of this process.

    Returns:
        The result: `verdict` in words, `outcome`, `code`, and `facts`. The folder holds audit.json, audit.html,
        junit.xml and statement.json.

    Raises:
        ValueError: the detector does not know a concept; the folder holds another audit; the base model has other rows;
            the labels are not of these runs; an argument is out of range; or a file does not fit.
        FileNotFoundError: a file or an earlier audit does not exist.
        ImportError: a package is missing, such as inspect_ai for `log`.

    Example:
        >>> import tempfile
        >>> import efface
        >>> made = efface.audit("emoji", "cat", base="emoji", at_most=0.05, limit=4, out=tempfile.mkdtemp() + "/audit")
        >>> made.outcome
        'exceeded'
    """
    targets, merged, out = as_concepts(concepts), [*delta, *lora], checks.path("out", out)
    if recognises == AUTO:
        recognises = detector if detector == "eyes" else None
    base = model if base is None and merged else base
    _check(model, base, targets, merged, at_most, attacks)
    _check_files(labels, since, log, out)
    first = model if base is None else base
    usual = suite_of(str(first) if isinstance(first, (str, Path)) else embedded(first) or "emoji")
    chosen, twice = distinct(suite if suite is not None else runs.make_suite(usual, targets, limit=limit))
    check_asked(chosen.rows, [target.name for target in targets])
    chosen = dataclasses.replace(chosen, rows=alike(chosen.rows, limit))
    chosen = dataclasses.replace(chosen, metrics=_metrics(targets, chosen, detector, recognises))
    runs.rehearse(chosen)
    folder = claim(out)
    plan = Plan(
        model, base, delta, lora, chosen, folder, detector, recognises, batch, guidance, loading or {}, progress, budget
    )
    began = time.perf_counter()
    with files.lock(folder / LOCK):
        facts, run, plain = _measured(plan, targets, attacks, labels, at_most)
        if twice:
            facts["not_covered"].append(f"{twice} rows of the suite, which repeat earlier ones with the same seed.")
        if since is not None:
            facts["since"], facts["regressions"] = regressions_since(
                since, run, facts["concepts"], detector, recognises
            )
            if facts["regressions"]:
                facts["outcome"] = verdict.EXCEEDED
                names = ", ".join(each["concept"] for each in facts["regressions"])
                facts["headline"] = f"Regressed: {names}. {facts['headline']}"
            if facts["since"]["lost"]:
                facts["outcome"] = verdict.worst([facts["outcome"], verdict.NOT_JUDGED])
                names = ", ".join(facts["since"]["lost"])
                facts["headline"] = f"Not compared with the earlier audit: {names}. {facts['headline']}"
        facts |= {"command": command or this_command(), "seconds": round(time.perf_counter() - began, 3)}
        _write(folder, facts, run, plain, file_digests(model, merged), set(file_digests(base, ()).values()))
        if log is not None:
            write_log(log, facts, run, plain)
    return Audit(folder, facts)


def _check(
    model: Any,
    base: Any,
    targets: Sequence[Concept],
    merged: Sequence[Any],
    at_most: float | None,
    attacks: Sequence[str],
) -> None:
    """Raises an error for arguments that are wrong or do not belong together, before anything is loaded."""
    if not targets:
        raise ValueError("Expected concepts to look for, got none. Name at least one.")
    if at_most is not None:
        checks.share("at_most", at_most)
    for name in attacks:
        registry.resolve(name, "attacks")
    if merged and not isinstance(model, (str, Path)):
        raise ValueError("Expected a model by name for `delta` and `lora`, got a pipeline. Give its folder.")
    if attacks and base is None:
        raise ValueError("Expected a base model for attacks, got none. Give `base` (--base).")


def _check_files(labels: Any, since: Any, log: Any, out: Path) -> None:
    """Raises an error if a file that the audit needs at its end is not there."""
    with runs.open_store(labels):
        pass
    if since is not None:
        check_since(since, out)
    if log is not None:
        check_log(log)


def _metrics(targets: Sequence[Concept], suite: Suite, spec: Spec, recognises: Spec | None) -> tuple[Any, ...]:
    """The metrics of the audit's run folders. Makes each detector once, so that a missing concept is found here."""
    asked = {row.concept for row in suite.rows}
    for target in targets:
        if target.name in asked:
            detector(spec, target.name)
    made: list[Any] = [Removal(spec)] if recognises is None else [Outcomes(spec, recognises), Removal(spec)]
    return (*made, *([Retention(spec)] if spec == "eyes" else []))


def _measured(
    plan: Plan, targets: Sequence[Concept], attacks: Sequence[str], labels: Any, at_most: float | None
) -> tuple[dict[str, Any], runs.Run, runs.Run | None]:
    """The facts of audit.json, and the two runs."""
    names = [target.name for target in targets]
    base_pipe = plan.load_base()
    base_facts = None if base_pipe is None else plan.facts_of_base(base_pipe)
    pipe = plan.load_model()
    model_facts = plan.facts_of_model(pipe)
    agree(plan.folder, {"model": model_facts, "base": base_facts})
    plain = None if base_pipe is None or base_facts is None else plan.draw_base(base_pipe, base_facts)
    run = plan.draw_model(pipe, model_facts, plain)
    random = plan.draw_random(pipe, names)
    runs.score(run, plan.suite.metrics, labels=labels)
    ran = [
        attacked(plan, name, target, base_pipe, pipe, model_facts, plan.folder / ATTACKS / f"{name}-{k}")
        for name in attacks
        for k, target in enumerate(targets)
        if base_pipe is not None
    ]
    ends = see(run.finished(), plan.detector, plan.recognises)
    before = None if plain is None else see(plain.finished(), plan.detector, plan.recognises)
    chosen = {row.id for row in of_controls(plan.suite.rows, names)}
    some = [each for each in (plain or run).finished() if each.row.id in chosen]
    controls = {
        "random weights": control(random.finished(), plan.detector, plan.recognises),
        "ruined pictures": control(ruined(some), plan.detector, plan.recognises),
    }
    facts = _decided(targets, ends, before, controls, run.card().get("labels", []), ran, at_most)
    facts |= {"format": 1, "made": now(), "efface": __version__, "versions": versions()}
    facts |= {"model": model_facts, "base": base_facts, "attacks": ran, "since": None, "regressions": []}
    facts |= {name: run.record[name] for name in ("suite", "rows", "call")}
    facts |= {"known_attacks": list(registry.methods("attacks")), "batch": plan.batch}
    ours = base_pipe is not None and plan.named(plan.base) in EMBEDDED and shape(base_pipe) == shape(pipe)
    facts["detector"] = {"words": ends.words, "note": _note(plan, ours, facts["labelled"])}
    facts["notes"] = words.notes(facts, *_kept(run))
    facts["left_out"] = others(plan.suite.rows, names)
    facts["hazards"] = categories(facts["concepts"])
    facts["not_covered"] = words.not_covered(facts)
    return facts, run, plain


def _kept(run: runs.Run) -> tuple[Score | None, Score | None]:
    """The retention of the audited model and of the base model, if it was measured."""
    now, base = ({score.metric: score for score in group}.get("retention") for group in run.scores())
    return now, base if run.base else None


def _decided(
    targets: Sequence[Concept],
    ends: Seen,
    before: Seen | None,
    controls: Mapping[str, Any],
    labels: Sequence[Mapping[str, Any]],
    ran: Sequence[Mapping[str, Any]],
    at_most: float | None,
) -> dict[str, Any]:
    """The figures and the verdict of each concept. The bounds hold for all concepts together."""
    level = LEVEL / len(targets)
    seen = {"audited": recognised(ends), "base": None if before is None else recognised(before)}
    blocked = verdict.general(seen, controls)
    found = []
    for target in targets:
        each = figures(target.name, ends, before, level)
        each["labels"] = next((facts for facts in labels if facts["concept"] == target.name), None)
        of = [attack for attack in ran if attack["concept"] == target.name]
        fooled = verdict.fooled(target.name, each, controls)
        each["verdict"] = verdict.judge_concept(each, each["labels"], at_most, level, blocked, of, fooled)
        each["words"] = words.sentences(each, level)
        found.append(each)
    outcome = verdict.overall(found)
    return {
        "outcome": outcome,
        "headline": words.headline(outcome, found, at_most),
        "limit": at_most,
        "level": level,
        "concepts": found,
        "recognised": seen,
        "controls": dict(controls),
        "labelled": bool(labels),
    }


def _note(plan: Plan, ours: bool, labelled: bool) -> str:
    """A note if the detector was not made for this model, or for one of its kind."""
    if plan.detector == "eyes" and (ours or plan.named(plan.model) in EMBEDDED):
        return ""
    text = f"The detector was not made for {plan.name}."
    return f"{text} People's labels say how often it is right here." if labelled else f"{text} Its error is unknown."


def _write(
    folder: Path,
    facts: dict[str, Any],
    run: runs.Run,
    plain: runs.Run | None,
    digests: Mapping[str, str],
    common: Collection[str],
) -> None:
    """Writes what people and machines read."""
    files.write_json(folder / AUDIT, files.as_json(facts))
    report.write_audit(facts, run, plain, folder / PAGE)
    files.write(folder / JUNIT, junit(facts))
    evidence = {name: files.sha256((folder / name).read_bytes()) for name in (AUDIT, PAGE, JUNIT)}
    evidence |= {
        f"{AUDITED}/{name}": files.sha256((run.folder / name).read_bytes()) for name in ("run.json", "samples.jsonl")
    }
    files.write_json(folder / STATEMENT, statement(facts, digests, evidence, common))
