"""The pictures that train a word, with their rewards, from people's judgements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..core import Concept
from ..pictures import read_picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..feedback.reward import RewardModel


@dataclass(frozen=True)
class Judged:
    """Pictures [N, 3, H, W] with their rewards [N], and facts on the judgements as JSON types."""

    pictures: Tensor
    rewards: Tensor
    facts: Mapping[str, Any]


def best(rewards: Tensor, top: int) -> Tensor:
    """The places of the `top` highest rewards, in the order of the pictures."""
    return rewards.topk(min(top, len(rewards))).indices.sort().values


def judged(pictures: str, feedback: str, encoder: str, concept: Concept, top: int, seed: int) -> Judged:
    """The pictures of a folder with the highest rewards.

    Args:
        pictures: the folder.
        feedback: the store of judgements, or the file of a reward model.
        encoder: the name of the encoder of pictures.
        concept: the concept, by the name under which it was judged.
        top: the number of pictures.
        seed: seed of the reward model.

    Raises:
        ValueError, FileNotFoundError: see `HFI`.
    """
    from ..detectors import _encoders
    from ..feedback import pool

    if not pictures:
        raise ValueError("Expected `pictures`, the folder with the judged pictures, got ''. Name it.")
    items = pool(pictures)
    names = [item.picture for item in items]
    features = _encoders.embedded(_encoders.encoder(encoder), [item.path for item in items])
    model = _model(feedback, encoder, concept, names, features, seed)
    rewards = model.rewards(features, names)
    chosen = best(rewards, top)
    read = [_tensor(read_picture(items[k].path, items[k].picture)) for k in chosen.tolist()]
    if len({each.shape for each in read}) > 1:
        sizes = " and ".join(sorted({f"{each.shape[2]} x {each.shape[1]}" for each in read}))
        raise ValueError(f"Expected pictures of one size, got {sizes}. Use pictures that the model has drawn.")
    facts = {"reward": {**model.facts, "judged": len(model.folds), "of": len(items)}}
    return Judged(torch.stack(read), rewards[chosen], facts)


def _model(
    feedback: str, encoder: str, concept: Concept, names: Sequence[str], features: Tensor, seed: int
) -> RewardModel:
    """The reward model: read from its file, or fitted on the judgements in the store."""
    from ..feedback import Evidence, Store
    from ..feedback.reward import RewardModel

    if feedback.endswith(".safetensors"):
        model = RewardModel.load(feedback)
        for what, here, wanted in (("concept", model.concept, concept.name), ("encoder", model.encoder, encoder)):
            if here != wanted:
                raise ValueError(
                    f"Expected a reward model of the {what} {wanted!r}, got one of {checks.shown(here)} in {feedback}. "
                    f"Name that {what}, or fit another reward model."
                )
    else:
        with Store(feedback, create=False) as store:
            evidence = Evidence.of(store.judgements(), concept.name)
        model = RewardModel.fit(evidence, names, features, encoder=encoder, seed=seed)
    if not model.reliable:
        raise ValueError(
            f"Expected judgements that predict held-out ones better than chance, got {model}. Judge more pictures, or "
            "let annotators agree first on what they look for."
        )
    return model


def _tensor(picture: Image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
