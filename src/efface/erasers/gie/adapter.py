"""The network that predicts GIE's weights, and its file."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ... import files

VERSION = "1"
AGAIN = "Fit it again with GIE.fit."
SHIPPED = {
    name: Path(__file__).parents[2] / f"models/{folder}/weights/gie.safetensors"
    for name, folder in (("emoji", "emoji"), ("emoji-128", "emoji128"))
}
"""Where adapters of the embedded models are, by the name of the model."""


def network(layers: int) -> nn.Sequential:
    """`layers` -> 64 -> 32 -> 1, with ReLU between."""
    return nn.Sequential(nn.Linear(layers, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))


def best_fixed(losses: Mapping[str, float]) -> float:
    """The fixed strength with the least mean loss on the ladder that trained an adapter.

    Args:
        losses: strength to mean loss, as `Adapter.facts` holds it; "0" is the base model.

    Raises:
        ValueError: the best one is the smallest or the largest strength of the ladder, or the base model, so a better
            one may lie beyond; or there are no losses, because an earlier version fitted the adapter.
    """
    if not losses:
        raise ValueError(f"Expected an adapter with the losses of its ladder, got one without. {AGAIN}")
    best = min((loss, float(strength)) for strength, loss in losses.items())[1]
    ladder = sorted(strength for strength in map(float, losses) if strength > 0)
    if best not in ladder[1:-1]:
        where = "the base model" if best == 0 else "the largest" if best == ladder[-1] else "the smallest"
        raise ValueError(
            f"Expected the best fixed strength inside of its ladder, got {best:g}, {where} of {ladder[0]:g} to "
            f"{ladder[-1]:g}. Fit again with `strengths` beyond it: only new ones are drawn."
        )
    return best


@dataclass(frozen=True, eq=False)
class Adapter:
    """Maps the attention of a concept's tokens in the first step to strengths that erase it.

    Args:
        net: maps standardised features [..., layers] to a strength [..., 1].
        mean, std: mean and standard deviation of the training features, [layers].
        layers: names of the cross-attention layers, in execution order.
        model: `efface.pipelines.model_hash` of the training pipeline.
        text_encoder: class name of its text encoder, for error messages.
        facts: measurements of the training.
    """

    net: nn.Sequential
    mean: Tensor
    std: Tensor
    layers: tuple[str, ...]
    model: str
    text_encoder: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, features: Tensor) -> Tensor:
        """Strengths [B, tokens] from features [B, tokens, layers]."""
        x = (features.float().cpu() - self.mean) / self.std
        return self.net(x)[..., 0].to(features.device)

    def check(self, model: str, layers: Sequence[str], *, ordered: bool = False) -> None:
        """Raises ValueError if the model or the layers differ from the training; if `ordered`, also if their order
        differs."""
        mine, other = (tuple(names) if ordered else tuple(sorted(names)) for names in (self.layers, layers))
        if mine != other:
            pairs = zip_longest(mine, other, fillvalue="none")
            one, two = next(pair for pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"The adapter was fitted on a model with {len(mine)} cross-attention layers ({self.text_encoder}), but "
                f"this pipeline has {len(other)}; the first difference is {one!r} and {two!r}. Fit it again with "
                "GIE.fit."
            )
        if model != self.model:
            raise ValueError(
                f"The adapter was fitted on the model {self.model[:12]} ({self.text_encoder}), but this pipeline's "
                f"model is {model[:12]}. Fit it again with GIE.fit."
            )

    def save(self, path: str | Path) -> Path:
        """Writes the adapter to a safetensors file with a JSON header."""
        header: dict[str, Any] = {"layers": self.layers, "model": self.model, "text_encoder": self.text_encoder}
        header |= {"facts": dict(self.facts)}
        tensors = {f"net.{name}": weight for name, weight in self.net.state_dict().items()}
        tensors |= {"mean": self.mean, "std": self.std}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"efface": "gie adapter", "version": VERSION, "adapter": json.dumps(header)}
        files.write_tensors(path, tensors, metadata)
        return path

    @staticmethod
    def load(path: str | Path) -> Adapter:
        """Loads an adapter from a file, or a shipped one by name.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not an adapter, or is damaged.
        """
        name, path = str(path), SHIPPED.get(str(path), Path(path))
        if not files.there(path):
            if name in SHIPPED:
                raise FileNotFoundError(
                    f"{path} is missing. Reinstall efface, or fit one with recipes/emoji/fit_gie.py."
                )
            there = ", ".join(name for name, file in SHIPPED.items() if file.is_file())
            raise FileNotFoundError(
                f"There is no adapter {path}. Make one with GIE.fit, or name a shipped one ({there})."
            )
        files.check_ordinary(path, files.TENSORS)
        return _read(str(path), path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read(path: str, modified: int) -> Adapter:
    from ... import schema

    metadata, tensors = files.read_tensors(Path(path), AGAIN)
    if (metadata.get("efface"), metadata.get("version")) != ("gie adapter", VERSION):
        raise ValueError(f"{path} is not a GIE adapter of version {VERSION}. Give a file that GIE.fit wrote.")
    header = files.json_of(metadata.get("adapter", ""), f"the header of {path}", AGAIN)
    schema.check(header, schema.AdapterHeader, path, AGAIN)
    try:
        net = network(len(header["layers"]))
        net.load_state_dict({n.removeprefix("net."): t for n, t in tensors.items() if n.startswith("net.")})
        mean, std = tensors["mean"], tensors["std"]
        if not mean.shape == std.shape == (len(header["layers"]),) or not all(
            t.isfinite().all() for t in tensors.values()
        ):
            raise ValueError("its numbers are not finite, or not one per layer")
    except (KeyError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{path} is a damaged GIE adapter ({error}). {AGAIN}") from error
    net.requires_grad_(False)
    return Adapter(net, mean, std, tuple(header["layers"]), header["model"], header["text_encoder"], header["facts"])
