"""One round of CCRT: a probe, the search for prompts that it disturbs, and the fit that preserves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Generator, Tensor

from .._weights import digest
from ..core import config
from ..fields import field_names
from ._denoiser import Denoiser, Points, Weights, mse
from ._misalignment import Misalignment, calibration
from ._search import Calibration
from ._settings import Training
from ._training import State, run
from .esd import ESD


@dataclass(frozen=True)
class Round:
    """One removal in a sequence: probe, search, fit.

    Args:
        method: the settings of the training, all resolved.
        eta, teacher, reg: fields of `CCRT`.
        search: further arguments of the search for prompts.
        net: the denoiser, with the weights of the previous round.
        base: the base model's trained tensors.
        name: the name of the concept.
        rows: the concept's phrases as rows of the net's condition.
        seed: seed of all random numbers.
        folder: the folder of checkpoints.
    """

    method: Training
    eta: float
    teacher: str
    reg: float
    search: Mapping[str, Any]
    net: Denoiser
    base: Weights
    name: str
    rows: Tensor
    seed: int
    folder: Path | None

    def run(self, source: Calibration, fitness: Misalignment, judge: Misalignment) -> tuple[State, dict[str, Any]]:
        """Runs probe, search and fit. Returns the change, the prompts, and the distances before, after the probe and at
        the end."""
        probe = self.fit("probe").shipped
        prompts = source.prompts(
            lambda texts: fitness(texts, probe).tolist(),
            **self.search,
            seed=self.seed,
            path=self.folder and self.folder / "prompts.json",
            key=digest(probe),
        )
        state = self.fit("fit", prompts)
        stages = {"before": None, "probe": probe, "after": state.shipped}
        judged = {"prompts": prompts, "entities": [source.put([entity]) for entity in source.entities]}
        distance = {of: {s: float(judge(texts, w).mean()) for s, w in stages.items()} for of, texts in judged.items()}
        return state, {"prompts": prompts, "distance": distance}

    def fit(self, what: str, prompts: Sequence[str] = ()) -> State:
        """Fits ESD on the concept, with the distillation on `prompts`."""
        method, net = self.method, self.net
        esd = ESD(eta=self.eta, **{name: getattr(method, name) for name in field_names(Training)})
        teacher = self.base if self.teacher == "base" else None
        pool = calibration(net, prompts, teacher, method.guidance, self.seed + 2) if prompts else None

        def loss(weights: Weights, points: Points, rng: Mapping[str, Generator]) -> Tensor:
            texts, target = esd.target(net, points, teacher)
            if pool is None:
                return mse(net(points.x, points.t, texts, weights), target)
            held = pool[torch.randint(len(pool), (len(points),), generator=rng["calibration"]).to(net.device)]
            x, t, both = torch.cat([points.x, held.x]), torch.cat([points.t, held.t]), torch.cat([texts, held.prompt])
            removed, kept = net(x, t, both, weights).chunk(2)
            return mse(removed, target) + self.reg * mse(kept, cast("Tensor", held.own))

        return run(
            net,
            method,
            lambda weights, _, rng: esd.points(net, self.rows, weights, rng),
            loss,
            seed=self.seed,
            name=f"CCRT {what}: {self.name}",
            identity={**config(method), "texts": digest({"": net.condition.text[self.rows]}), "prompts": list(prompts)},
            streams=("points", "calibration"),
            checkpoint=self.folder and self.folder / f"{what}.safetensors",
        )
