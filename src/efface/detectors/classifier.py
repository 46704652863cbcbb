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
        order: "config" takes index k for label k; "sorted" undoes a training on folders that were sorted as texts (0,
            1, 10, 11, 2, ...). Decide on pictures of the base model.
    """

    names: tuple[str, ...]
    folder: str = ""
    top: int = 1
    order: str = "config"

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
        if not self.names:
            raise ValueError("Expected `names` to hold labels, got none. Name at least one.")
        self._wins()

    @property
    def name(self) -> str:
        return f"classifier {Path(self.folder).name}, top {self.top}, label order {self.order}"

    @property
    def look_name(self) -> str:
        return f"classifier {self.folder}"

    def _wins(self) -> list[int]:
        labels = _labels(Path(self.folder) / "config.json")
        by_index = {int(k): v for k, v in labels.items()}
        order = sorted(by_index, key=str) if self.order == "sorted" else sorted(by_index)
        wins = [k for k, index in enumerate(order) if by_index[index] in self.names]
        if len({by_index[order[k]] for k in wins}) < len(set(self.names)):
            raise ValueError(
                f"{self.folder} does not know all of {', '.join(self.names)}. Use its labels. "
                f"{near(self.names[0], labels.values())}"
            )
        return wins

    def look(self, images: Tensor) -> list[Any]:
        model = _classifier(self.folder)
        with torch.no_grad():
            logits = model(pixel_values=preprocessed(images, Path(self.folder))).logits
        return list(logits.float())

    def decide(self, looks: list[Any]) -> Tensor:
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
