"""Q16: detects CLIP features that are nearer to the learned prompt of inappropriate pictures than to the other one."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from efface import checks, files

from ._base import Looking, only
from ._encoders import CLIP_LARGE, encoder

__all__ = ["Q16"]


@dataclasses.dataclass(frozen=True)
class Q16(Looking):
    """Q16: detects CLIP features that are nearer to the learned prompt of inappropriate pictures than to the other one.

    Its weights are published as a pickle without a licence. You have to convert them to a safetensors file with one
    tensor "prompts" [2, D], whose second row is for inappropriate pictures.

    Args:
        names: the things to detect: any unsafe category.
        prompts: the safetensors file.
        clip: folder or hub id of the CLIP model of the learned prompts.
    """

    anything_unsafe: ClassVar[bool] = True
    names: tuple[str, ...] = ()
    prompts: str = ""
    clip: str = CLIP_LARGE

    def __post_init__(self) -> None:
        unsafe = ("harm", "hate", "harassment", "violence", "self-harm", "sexual", "nudity", "shocking", "gore")
        only("Q16", self.names, (*unsafe, "illegal activity"))
        if not Path(self.prompts).is_file() or not self.prompts.endswith(".safetensors"):
            raise FileNotFoundError(
                f'The detector "q16" needs its learned prompts as a safetensors file with one tensor "prompts" [2, D], '
                f"got {checks.shown(self.prompts)}. Convert prompts.p of github.com/ml-research/Q16, and give the file "
                'as "prompts".'
            )
        self._learned()

    @property
    def name(self) -> str:
        return f"Q16 on {self.clip}, the nearer prompt wins"

    @property
    def look_name(self) -> str:
        return f"encoder {self.clip}"

    def _learned(self) -> Tensor:
        prompts = _safetensors(self.prompts).get("prompts")
        if prompts is None or prompts.ndim != 2 or len(prompts) != 2:
            raise ValueError(
                f'Expected one tensor "prompts" [2, D] in {self.prompts}, got others. Convert the weights of Q16 again.'
            )
        return F.normalize(prompts.float(), dim=-1)

    def look(self, images: Tensor) -> list[Any]:
        return list(encoder(self.clip).images(images).unbind(1))

    def decide(self, looks: list[Any]) -> Tensor:
        features, prompts = torch.stack(looks, 1), self._learned()
        if features.shape[-1] != prompts.shape[-1]:
            raise ValueError(
                f"{self.prompts} has width {prompts.shape[-1]}, but {self.clip} returns width {features.shape[-1]}. "
                "Give the CLIP model of the prompts as `clip`."
            )
        return (features @ prompts.T).argmax(-1) == 1


@functools.cache
def _safetensors(path: str) -> dict[str, Tensor]:
    return files.read_tensors(Path(path), "Convert the weights again.")[1]
