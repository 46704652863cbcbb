"""A picture classifier of transformers, from a folder with safetensors weights. Any of the `top` labels counts."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efface import checks
from efface.registry import near

from ._base import Looking
from ._encoders import preprocessed

__all__ = ["Classifier"]


@dataclasses.dataclass(frozen=True)
class Classifier(Looking):
    """A picture classifier of transformers, from a folder with safetensors weights. Any of the `top` labels counts.

    Args:
        names: the labels to detect, as in `id2label` of its config.
        folder: a folder with config.json, model.safetensors and preprocessor_config.json.
        top: number of the likeliest labels that count.
        labels: the labels that count, whatever name is asked for; () = the names.
        threshold: in (0, 1]: the labels count if their probabilities sum to at least this, instead of by `top`.
        order: "config" takes index k for label k; "sorted" undoes a training on folders that were sorted as texts (0,
            1, 10, 11, 2, ...). Decide on pictures of the base model.
    """

    names: tuple[str, ...]
    folder: str = ""
    top: int = 1
    order: str = "config"
    labels: tuple[str, ...] = ()
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not (Path(self.folder) / "config.json").is_file():
            raise FileNotFoundError(
                f'The detector "classifier" needs a "folder" with config.json, got {checks.shown(self.folder)}. Name '
                "the folder that `save_pretrained` wrote."
            )
        if not (Path(self.folder) / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"{self.folder} has no model.safetensors, and Efface reads no pickles. Convert the weights."
            )
        checks.choice("order", self.order, ("config", "sorted"))
        checks.whole("top", self.top)
        object.__setattr__(self, "labels", checks.texts("labels", self.labels))
        if self.threshold is not None:
            checks.number("threshold", self.threshold, 0, 1, above=True)
        if not self.names and not self.labels:
            raise ValueError("Expected `names` to hold labels, got none. Name at least one.")
        self._wins()

    @property
    def name(self) -> str:
        words = f"classifier {Path(self.folder).name}"
        words += f", labels {', '.join(self.labels)}" if self.labels else ""
        if self.threshold is not None:
            return f"{words}, probability >= {self.threshold:g}, label order {self.order}"
        return f"{words}, top {self.top}, label order {self.order}"

    @property
    def look_name(self) -> str:
        return f"classifier {self.folder}"

    def _wins(self) -> list[int]:
        labels = _labels(Path(self.folder) / "config.json")
        by_index = {int(k): v for k, v in labels.items()}
        order = sorted(by_index, key=str) if self.order == "sorted" else sorted(by_index)
        wanted = self.labels or self.names
        wins = [k for k, index in enumerate(order) if by_index[index] in wanted]
        if len({by_index[order[k]] for k in wins}) < len(set(wanted)):
            raise ValueError(
                f"{self.folder} does not know all of {', '.join(wanted)}. Use its labels. "
                f"{near(wanted[0], labels.values())}"
            )
        return wins

    def look(self, images: Tensor) -> list[Any]:
        model = _classifier(self.folder)
        with torch.no_grad():
            logits = model(pixel_values=preprocessed(images, Path(self.folder))).logits
        return list(logits.float())

    def ratios(self, looks: list[Any]) -> Tensor | None:
        if self.threshold is None:
            return None
        chances = torch.stack(looks).softmax(-1)[:, self._wins()].sum(-1) if looks else torch.zeros(0)
        return chances[None] / self.threshold

    def decide(self, looks: list[Any]) -> Tensor:
        ratios = self.ratios(looks)
        if ratios is not None:
            return ratios >= 1
        best = torch.stack(looks).topk(self.top, -1).indices
        return torch.isin(best, torch.tensor(self._wins())).any(-1)[None]


def _labels(path: Path) -> dict[str, str]:
    from efface import schema

    found: dict[str, str] = schema.read(path, schema.Classifier, "Save the classifier again.").get("id2label", {})
    return found


@functools.cache
def _classifier(folder: str) -> Any:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
