"""Trains GIE's adapter with a ladder of fixed strengths, a detector as judge, and a small regression."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ... import checks, files
from ..._text import check_phrases
from ..._weights import learning, text_hash
from ...core import (
    Concept,
    Detector,
    check_detector,
    check_pictures,
)
from ...delta import present, unedited
from ...hooks import DenoiserCall, Method
from ...pictures import likeness
from .adapter import Adapter, network
from .measure import Weigh, measured

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
LEAST = 5  # prompts
FREE = "strengths"  # of a ladder's settings, what may change: the judgements of other strengths stay
Progress = Callable[[str, int], None]
Prompts = Sequence[str] | Mapping[str, Sequence[str]]
Detectors = Detector | Mapping[str, Detector]
Faithful = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One picture of the ladder: a prompt of a concept and a seed."""

    concept: Concept
    prompt: str
    seed: int

    @property
    def key(self) -> str:
        return json.dumps([self.concept.name, self.prompt, self.seed])


@learning()
def fit_adapter(
    gie: type[Any],
    pipe: DiffusionPipeline,
    concepts: Sequence[Concept],
    prompts: Prompts,
    detector: Detectors,
    out: Path,
    *,
    strengths: Sequence[float] = STRENGTHS,
    seeds: Sequence[int] = tuple(range(2_000, 2_004)),
    faithful: Faithful | Mapping[str, Faithful] = likeness,
    fidelity: float = 0.5,
    held_out: float = 0.2,
    batch: int = 16,
    patience: int = 200,
    most_epochs: int = 5_000,
    seed: int = 0,
    progress: Progress | None = None,
    **call: Any,
) -> Path:
    """Draws and judges the ladder, trains the adapter and writes it. `GIE.fit` explains the settings."""
    strengths = sorted({checks.number("strengths", s, 0) for s in strengths} - {0.0})
    rows = _rows(concepts, prompts, checks.tuning_seeds("seeds", seeds))
    held_out = checks.number("held_out", held_out, 0, 1, above=True, below=True)
    different = len({(r.concept.name, r.prompt) for r in rows})
    if different < LEAST or not strengths:
        raise ValueError(
            f"Expected at least {LEAST} prompts and a strength above 0, got {different} prompts and the strengths "
            f"{strengths}. Give more prompts, or larger strengths."
        )
    for name, value in (("batch", batch), ("patience", patience), ("most_epochs", most_epochs)):
        checks.whole(name, value)
    checks.number("fidelity", fidelity, 0)
    judges, like = _by_name("detector", detector, concepts), _by_name("faithful", faithful, concepts)
    for judge in judges.values():
        check_detector(judge)
    if out.is_dir():
        raise ValueError(f"Expected `out` to be a file, got the folder {out}. Add a name, such as adapter.safetensors.")
    check_phrases(pipe, [phrase for concept in concepts for phrase in concept.phrases])
    standing = present(pipe)
    if standing["erasers"]:
        names = ", ".join(eraser["method"] for eraser in standing["erasers"])
        raise ValueError(
            f"{names} is applied to the pipeline and would affect the ladder. Call `handle.remove()` before `fit`."
        )
    setting = {
        "model": text_hash(pipe, unedited(pipe)),
        "concepts": [asdict(c) for c in concepts],
        "rows": [r.key for r in rows],
        "strengths": strengths,
        "detectors": {name: judge.name for name, judge in judges.items()},
        "faithful": {name: getattr(each, "__qualname__", repr(each)) for name, each in like.items()},
        "call": call,
        "present": standing,
    }
    ladder = Ladder(Path(f"{out}.ladder.json"), setting)
    for concept in concepts:
        mine = [r for r in rows if r.concept == concept]
        for k in range(0, len(mine), batch):
            some, judge = mine[k : k + batch], judges[concept.name]
            ladder.judge(gie, pipe, some, strengths, judge, like[concept.name], progress, call)
    if not any(ladder.content["judged"][r.key]["0"][0] for r in rows):
        raise ValueError(
            f"The detector sees the concept in none of {len(rows)} pictures of the base model. Give prompts that draw "
            "it, and a detector that knows it."
        )
    features, targets, groups = ladder.samples(rows, strengths, fidelity)
    layers = tuple(ladder.content["layers"])
    net, mean, std, facts = train(features, targets, groups, held_out, patience, most_epochs, seed)
    facts |= {"pictures": len(rows) * (1 + len(strengths)), "fidelity": fidelity, "strengths": strengths}
    facts |= ladder.facts(rows, strengths, fidelity)
    return Adapter(
        net, mean, std, layers, text_hash(pipe, unedited(pipe)), type(pipe.text_encoder).__name__, facts
    ).save(out)


def _rows(concepts: Sequence[Concept], prompts: Prompts, seeds: Sequence[int]) -> list[Row]:
    """All pictures of the ladder: each concept's prompts with each seed."""
    if isinstance(prompts, str):
        raise TypeError(
            f"Expected `prompts` to be a sequence of texts, or a mapping from concept names to these, got "
            f"{checks.shown(prompts)}. Write ({checks.shown(prompts)},)."
        )
    texts = {name: checks.texts("prompts", of) for name, of in _by_name("prompts", prompts, concepts).items()}
    return [Row(c, text, s) for c in concepts for text in dict.fromkeys(texts[c.name]) for s in seeds]


def _by_name(what: str, given: Any, concepts: Sequence[Concept]) -> dict[str, Any]:
    """Concept name to its thing. A single thing applies to all concepts."""
    names = [c.name for c in concepts]
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    if differing := set(names) ^ given.keys():
        raise ValueError(
            f"Expected `{what}` and `concepts` to have the same names, got differences in {sorted(differing)}. Name "
            "each concept once."
        )
    return dict(given)


@dataclass(frozen=True)
class _Measuring(Method):
    """Draws the base model's picture, and measures the erasure prompts' attention in its first denoiser call."""

    concepts: tuple[Concept, ...]
    see: Weigh

    edits_attention: ClassVar[bool] = True  # enables watching the layers
    calls_denoiser: ClassVar[bool] = True

    def around(self, call: DenoiserCall, forward: Callable[[], Any]) -> Any:
        if "seen" not in call.memory and len(call.prompt):
            call.memory["seen"] = measured(call, self.see)
        return forward()


class Ladder:
    """The judgements, which a JSON file stores after every batch.

    `judged` holds, per row, its `features` [tokens, layers]; and per strength, the detector's score and the
    faithfulness.
    """

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"setting": files.as_json(setting), "layers": [], "judged": {}}
        if files.there(path):
            from ... import schema

            cure = "Delete it, and the same call draws the ladder again."
            self.content = schema.read(path, schema.Ladder, cure)
            if not all(row.get("features") and row.get("0") for row in self.content["judged"].values()):
                raise ValueError(f"{path} is damaged, because a row lacks features or the base model's picture. {cure}")
            cure = "Delete it, or name another `out`."
            there, here = ({k: v for k, v in s.items() if k != FREE} for s in (self.content["setting"], setting))
            files.check_same(there, here, f"{path} was judged with another setting", cure)
            self.content["setting"] = files.as_json(setting)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write()  # before anything is drawn

    def write(self) -> None:
        files.write(self.path, json.dumps(self.content))

    def judge(
        self,
        gie: type[Any],
        pipe: DiffusionPipeline,
        rows: Sequence[Row],
        strengths: Sequence[float],
        detector: Detector,
        faithful: Faithful,
        progress: Progress | None,
        call: dict[str, Any],
    ) -> None:
        """Draws the missing pictures of one batch: each strength, and the base model's pictures with their features."""
        judged, concept = self.content["judged"], rows[0].concept
        missing = [s for s in strengths if any(f"{s:g}" not in judged.get(r.key, {}) for r in rows)]
        if not missing:
            return
        seen: list[Tensor] = []
        names = self.content["layers"]

        def see(features: Tensor, layers: tuple[str, ...]) -> Tensor:
            seen.append(features.detach().float().cpu())
            names[:] = layers
            return features

        def draw(eraser: Any, what: str) -> Tensor:
            generators = [torch.Generator().manual_seed(r.seed) for r in rows]
            settings = {"num_inference_steps": 25, **call}
            with eraser.apply(pipe):
                out = cast("Any", pipe)([r.prompt for r in rows], generator=generators, output_type="pt", **settings)
            if progress is not None:
                progress(what, len(rows))
            return check_pictures(out.images)

        def keep(strength: float, images: Tensor) -> None:
            found, alike = detector(images), faithful(images, plain)
            scores = found.float() if found.ndim == 1 else found.float().amax(0)  # the judge with most detections
            for k, row in enumerate(rows):
                judged[row.key][f"{strength:g}"] = [float(scores[k]), float(alike[k])]
            self.write()

        plain = draw(_Measuring((concept,), see), f"{concept.name}, plain")
        features = torch.cat(seen, 1)
        for k, row in enumerate(rows):
            judged.setdefault(row.key, {})["features"] = features[k].tolist()
        keep(0.0, plain)
        for strength in missing:
            keep(strength, draw(gie([concept], strength=strength), f"{concept.name}, strength {strength:g}"))

    def samples(
        self, rows: Sequence[Row], strengths: Sequence[float], fidelity: float
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Features [S, layers], the prompt's best strength [S] and the prompt's number, for each row and token.

        The best strength has the smallest mean over seeds of score + fidelity (1 - faithfulness). Ties go to the
        smallest strength.
        """
        features: list[list[float]] = []
        targets: list[float] = []
        groups: list[int] = []
        for number, (mine, best) in enumerate(self._best(rows, strengths, fidelity)):
            for entry in (self.content["judged"][r.key] for r in mine):
                features += entry["features"]
                targets += [best] * len(entry["features"])
                groups += [number] * len(entry["features"])
        return torch.tensor(features), torch.tensor(targets), groups

    def facts(self, rows: Sequence[Row], strengths: Sequence[float], fidelity: float) -> dict[str, Any]:
        """The concepts, the mean loss of each strength over all pictures, and how many prompts did best with it."""
        losses, best = self._losses(rows, strengths, fidelity), [b for _, b in self._best(rows, strengths, fidelity)]
        return {
            "concepts": list(dict.fromkeys(row.concept.name for row in rows)),
            "losses": {f"{strength:g}": loss for strength, loss in losses.items()},
            "best": {f"{strength:g}": best.count(strength) for strength in losses},
        }

    def _best(self, rows: Sequence[Row], strengths: Sequence[float], fidelity: float) -> list[tuple[list[Row], float]]:
        """Each prompt's rows, and its best strength."""
        by_prompt: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            by_prompt.setdefault((row.concept.name, row.prompt), []).append(row)
        losses = [(mine, self._losses(mine, strengths, fidelity)) for mine in by_prompt.values()]
        return [(mine, min((round(loss, 9), s) for s, loss in each.items())[1]) for mine, each in losses]

    def _losses(self, rows: Sequence[Row], strengths: Sequence[float], fidelity: float) -> dict[float, float]:
        """The mean loss of the base model's pictures, which have strength 0, and of each strength."""
        judged, found = [self.content["judged"][row.key] for row in rows], {}
        for strength in (0.0, *strengths):
            pairs = [entry[f"{strength:g}"] for entry in judged]
            found[strength] = float(sum(score + fidelity * (1 - alike) for score, alike in pairs) / len(pairs))
        return found


def train(
    features: Tensor,
    targets: Tensor,
    groups: Sequence[int],
    held_out: float,
    patience: int,
    most_epochs: int,
    seed: int,
) -> tuple[nn.Sequential, Tensor, Tensor, dict[str, Any]]:
    """Trains with Huber loss and Adam at 1e-3, all samples in one batch. Stops when the held-out loss stops improving.

    Returns:
        The best network, the mean and standard deviation of its inputs, and measurements: the loss on the held-out
        prompts, and the loss there of a constant prediction, the training median.
    """
    prompts = torch.tensor(sorted(set(groups)))
    generator = torch.Generator().manual_seed(seed)
    held = prompts[torch.randperm(len(prompts), generator=generator)][: max(1, round(held_out * len(prompts)))]
    out = torch.isin(torch.tensor(groups), held)
    mean, std = features[~out].mean(0), features[~out].std(0)
    std = torch.where(std > 1e-9, std, torch.ones_like(std))
    x, huber = (features - mean) / std, nn.HuberLoss()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = network(features.shape[1])
        optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
        best, best_state, best_epoch = float("inf"), copy.deepcopy(net.state_dict()), 0
        for epoch in range(most_epochs):
            with torch.no_grad():
                loss = float(huber(net(x[out])[:, 0], targets[out]))
            if loss < best:
                best, best_state, best_epoch = loss, copy.deepcopy(net.state_dict()), epoch
            elif epoch - best_epoch >= patience:
                break
            optimiser.zero_grad()
            huber(net(x[~out])[:, 0], targets[~out]).backward()
            optimiser.step()
    net.load_state_dict(best_state)
    constant = float(huber(targets[~out].median().expand(int(out.sum())), targets[out]))
    facts = {"held_out_loss": best, "held_out_loss_of_a_constant": constant, "epochs": best_epoch}
    return net.requires_grad_(False), mean, std, facts | {"prompts": len(prompts), "held_out": len(held)}
