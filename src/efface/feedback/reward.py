"""The reward model: how much of a concept a picture shows, learned from people's judgements on frozen embeddings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__, checks, files
from .evidence import Evidence
from .networks import Task, deal, held_out, logits_of, trained

AGAIN = "Fit it again with `efface feedback reward`."


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
    """Scores pictures by how much of a concept they show: one small MLP per fold, on frozen embeddings.

        L = mean_i (sigmoid(r(x_i)) - y_i)^2  -  mean_(a > b) log sigmoid(r(x_a) - r(x_b))       r: MLP of fold k
        reward(x) = sigmoid((r(x) - shift) / scale)

    y_i is the share of annotators who see the concept, a > b the pairs of rankings. Ties are no pairs, and a picture
    with x loses against every ranked one. With rankings alone, only differences of r mean something. Shift and scale
    then give pictures with x a reward near 0.1 and ranked ones near 0.9; without any x they standardise r.

    Each judged picture is in one fold, and the network of that fold never saw it. So the reward of a judged picture is
    held out, and choosing the pictures with the highest rewards is not optimistic. Other pictures get the mean of all
    networks.

    Args:
        concept: what was judged.
        encoder: the name of the encoder of the embeddings.
        folds: picture (SHA-256) to its fold.
        facts: the held-out results and what is known about the judgements, as JSON types.
        tensors: `up` [K, D, H], `bias` [K, H], `out` [K, H], `offset`, `shift` and `scale` [K].
    """

    concept: str
    encoder: str
    folds: Mapping[str, int]
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def fit(
        cls, evidence: Evidence, pictures: Sequence[str], features: Tensor, *, encoder: str = "", seed: int = 0
    ) -> RewardModel:
        """Fits the model, and judges it on held-out pictures.

        Args:
            evidence: what people said.
            pictures: SHA-256 of each picture with features, at least all judged ones.
            features: embeddings [N, D] of length 1.
            encoder: the name of their encoder.
            seed: seed of folds, initial weights and dropout.

        Raises:
            ValueError: a judged picture has no features; or fewer than 2 pictures show the concept, or do not, and
                there are fewer than 2 ranked sets.
            RuntimeError: the weights are not finite.

        Example:
            >>> import torch
            >>> from efface.feedback import Evidence
            >>> from efface.feedback.reward import RewardModel
            >>> names = [f"{k:064x}" for k in range(40)]
            >>> x = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=1)
            >>> votes = {name: float(row[0] > 0) for name, row in zip(names, x)}
            >>> model = RewardModel.fit(Evidence("red", votes, (), {}, {}, 0, 0, ("ana",)), names, x)
            >>> model.facts["binary"]["auc"] > 0.9
            True
        """
        place = {picture: k for k, picture in enumerate(pictures)}
        if lost := [picture for picture in evidence.pictures if picture not in place]:
            raise ValueError(
                f"Expected a picture for each of {len(evidence.pictures)} judged ones, got none for {len(lost)} of "
                f"them, such as the one with SHA-256 {lost[0][:16]}. Name the folder that was judged."
            )
        folds = deal(evidence, seed)
        names = sorted(folds)
        x = features[[place[name] for name in names]].float()
        task = Task.of(evidence, names, folds)
        weights = trained(x, task, seed)
        logits = logits_of(weights, x)
        known = torch.zeros(task.k), torch.ones(task.k)  # of a probability
        shift, scale = known if evidence.shares else _scale(evidence, names, task.fold, logits)
        weights |= {"shift": shift, "scale": scale}
        made = cls(evidence.concept, encoder, folds, {}, weights)
        said = {"annotators": len(evidence.annotators), "ties": evidence.ties, "seed": seed, "efface": __version__}
        said |= {"contradictions": evidence.contradictions, "notes": evidence.notes()}
        return dataclasses.replace(made, facts=said | held_out(evidence, names, task, logits))

    def rewards(self, features: Tensor, pictures: Sequence[str] = ()) -> Tensor:
        """The rewards [N] in [0, 1] of embeddings [N, D]; `pictures` are their SHA-256, to hold judged ones out.

        Raises:
            ValueError: the embeddings have another width, or there are other numbers of both.
        """
        wide = self.tensors["up"].shape[1]
        if features.ndim != 2 or features.shape[1] != wide:
            cure = f"Use the encoder {self.encoder!r}."
            raise ValueError(checks.refusal(f"embeddings [N, {wide}]", tuple(features.shape), cure))
        if pictures and len(pictures) != len(features):
            raise ValueError(f"Expected {len(features)} pictures, got {len(pictures)}. Name each picture.")
        each = (logits_of(self.tensors, features.float()) - self.tensors["shift"][:, None]) / self.tensors["scale"][
            :, None
        ]
        scores = each.mean(0)
        for n, picture in enumerate(pictures):
            if picture in self.folds:
                scores[n] = each[self.folds[picture], n]
        return scores.sigmoid()

    @property
    def reliable(self) -> bool:
        """Whether a held-out result is above chance: its 95 % interval is above 0.5."""
        return any(each and each["interval"][0] > 0.5 for each in (self.facts["binary"], self.facts["ranking"]))

    def __str__(self) -> str:
        parts = []
        if each := self.facts["binary"]:
            parts.append(
                f"AUC {each['auc']:.3f} {_ends(each)} on {each['n']} held-out pictures ({each['yes']} show it)"
            )
        if each := self.facts["ranking"]:
            what = f"{each['pairs']} held-out pairs of {each['sets']} sets"
            parts.append(f"pair accuracy {each['accuracy']:.3f} {_ends(each)} on {what}")
        return f"{self.concept}: {'; '.join(parts)}"

    def save(self, path: str | Path) -> None:
        """Writes the model into a safetensors file.

        Raises:
            OSError: the file cannot be written. An earlier file stays.
        """
        header = {"format": 1, **{name: getattr(self, name) for name in ("concept", "encoder", "folds", "facts")}}
        files.write_tensors(checks.path("path", path), self.tensors, {"reward": json.dumps(header, allow_nan=False)})

    @classmethod
    def load(cls, path: str | Path) -> RewardModel:
        """Reads what `save` wrote. The file may come from an untrusted source.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged, or not a reward model.
        """
        from .. import schema
        from .forms import RewardHeader

        path = checks.path("path", path)
        said, tensors = files.read_tensors(path, AGAIN)
        header = files.json_of(said.get("reward", "null"), f"the header of {path}", AGAIN)
        schema.check(header, RewardHeader, path, AGAIN)
        folds, shapes = header["folds"], {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        k, d, h = shapes.get("up", ()) if len(shapes.get("up", ())) == 3 else (0, 0, 0)
        wanted = {"up": (k, d, h), "bias": (k, h), "out": (k, h), **dict.fromkeys(("offset", "shift", "scale"), (k,))}
        sound = all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in tensors.values())
        if not k or shapes != wanted or not sound or not float(tensors["scale"].min()) > 0:
            raise ValueError(
                f"{path} is a damaged reward model, because its tensors have wrong shapes or values. {AGAIN}"
            )
        if max(folds.values(), default=0) >= k:
            raise ValueError(f"{path} is a damaged reward model, because it names a fold that is missing. {AGAIN}")
        return cls(header["concept"], header["encoder"], folds, header["facts"], tensors)


def _scale(evidence: Evidence, names: Sequence[str], fold: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale [K] of outputs [K, N] that were learned from rankings alone, from the answers of other folds."""
    ranked = torch.tensor([evidence.applies[name] >= 0.5 for name in names])
    others = fold != torch.arange(len(logits))[:, None]
    n, m = (others & ranked).sum(1), (others & ~ranked).sum(1)
    high = (logits * (others & ranked)).sum(1) / n.clamp_min(1)
    low = (logits * (others & ~ranked)).sum(1) / m.clamp_min(1)
    apart = (n > 0) & (m > 0) & (high > low)
    shift = torch.where(apart, (high + low) / 2, logits.mean(1))
    return shift, torch.where(apart, (high - low) / 4, logits.std(1)).clamp_min(1e-6)


def _ends(each: Mapping[str, Any]) -> str:
    return f"[{each['interval'][0]:.3f}, {each['interval'][1]:.3f}]"
