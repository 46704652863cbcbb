"""A picture classifier in ONNX, whose labels you name."""

from __future__ import annotations

import dataclasses
import functools
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efface import checks, files

from ._base import Looking
from ._encoders import normalised, resized

__all__ = ["ONNX"]

MOST = 2048 * files.MIB
SCORES = ("softmax", "sigmoid", "none")


@dataclasses.dataclass(frozen=True)
class ONNX(Looking):
    """A picture classifier in ONNX, whose labels you name.

    It has one input and one output [N, L], a score per label, and runs on the CPU. The labels that count are summed for
    "softmax"; otherwise the largest one decides.

    Args:
        names: what is asked for.
        file: the .onnx file, with its weights inside.
        labels: all L labels, in the order of the output.
        counts: the labels that count, whatever name is asked for; () = the names.
        threshold: in (0, 1]: the score from which on a picture shows it.
        size: pixels of the square input.
        mean, std: the normalisation of the channels.
        layout: "NCHW" or "NHWC".
        scores: how outputs become scores: "softmax", "sigmoid" or "none".
    """

    names: tuple[str, ...]
    file: str = ""
    labels: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    threshold: float = 0.5
    size: int = 224
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    layout: str = "NCHW"
    scores: str = "softmax"

    def __post_init__(self) -> None:
        for name in ("labels", "counts"):
            object.__setattr__(self, name, checks.texts(name, getattr(self, name)))
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) != 3:
                raise ValueError(checks.refusal(f"`{name}` to be three numbers", values, "Give one per channel."))
            object.__setattr__(self, name, tuple(checks.number(name, each) for each in values))
        for each in self.std:
            checks.number("std", each, 0, above=True)
        checks.number("threshold", self.threshold, 0, 1, above=True)
        checks.whole("size", self.size, 1, 4096)
        checks.choice("layout", self.layout, ("NCHW", "NHWC"))
        checks.choice("scores", self.scores, SCORES)
        if Path(self.file).suffix.lower() != ".onnx" or not files.there(Path(self.file)):
            raise FileNotFoundError(
                f'The detector "onnx" needs a "file" that ends in .onnx, got {checks.shown(self.file)}. Name the file.'
            )
        wanted = self.counts or self.names
        strangers = [name for name in wanted if name not in self.labels]
        if strangers or not wanted:
            raise ValueError(
                f"Expected labels out of {checks.short(', '.join(self.labels)) or 'none'}, got "
                f"{checks.shown(strangers or 'none')}. Name all of the model's labels in `labels`, and in `counts` "
                "those that mean the concept."
            )

    @property
    def name(self) -> str:
        wanted = ", ".join(self.counts or self.names)
        return f"ONNX {Path(self.file).name}, {self.scores} of {wanted} >= {self.threshold:g}"

    @property
    def look_name(self) -> str:
        shape = f"{self.size} {self.mean} {self.std} {self.layout}"
        return f"onnx {_session(self.file)[1]} {shape}"

    def look(self, images: Tensor) -> list[Any]:
        x = normalised(resized(images, {"height": self.size, "width": self.size}, None), self.mean, self.std)
        x = x if self.layout == "NCHW" else x.movedim(1, -1)
        session, _ = _session(self.file)
        try:
            (found,) = session.run(None, {session.get_inputs()[0].name: x.contiguous().numpy()})
        except _errors() as error:
            raise ValueError(
                f"{self.file} cannot judge pictures of {self.size} pixels ({checks.short(str(error), 160)}). Set "
                "`size` and `layout` as the model expects them."
            ) from error
        if found.ndim != 2 or len(found) != len(images):
            raise ValueError(
                f"Expected {self.file} to answer [{len(images)}, labels], got {list(found.shape)}. Export it with a "
                "batch of any size and one score per label."
            )
        return list(torch.from_numpy(found).float())

    def ratios(self, looks: list[Any]) -> Tensor:
        if not looks:
            return torch.zeros(1, 0)
        raw = torch.stack(looks)
        if raw.shape[1] != len(self.labels):
            raise ValueError(
                f"Expected {self.file} to score {len(self.labels)} labels, got {raw.shape[1]} scores. Name all of its "
                "labels, in order."
            )
        made = {"softmax": lambda: raw.softmax(-1), "sigmoid": raw.sigmoid, "none": lambda: raw}[self.scores]()
        if not bool(made.isfinite().all()):
            raise ValueError(f"{self.file} answers with values that are not finite. Use another model or dtype.")
        some = made[:, [self.labels.index(name) for name in self.counts or self.names]]
        return (some.sum(-1) if self.scores == "softmax" else some.amax(-1))[None] / self.threshold

    def decide(self, looks: list[Any]) -> Tensor:
        return self.ratios(looks) >= 1


@functools.cache
def _session(file: str) -> tuple[Any, str]:
    """The session and the SHA-256 of its file. It is made from bytes, so it opens no file that the model names."""
    content = files.read(Path(file), MOST)
    options = _runtime().SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = _runtime().InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except _errors() as error:
        raise ValueError(
            f"{file} is not a model in ONNX ({checks.short(str(error), 160)}). Export it again."
        ) from error
    if len(session.get_inputs()) != 1 or len(session.get_outputs()) != 1:
        raise ValueError(f"Expected {file} to have one input and one output, got more. Export the classifier alone.")
    return session, files.sha256(content)


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            'The detector "onnx" needs onnxruntime. Install it with pip install "efface[onnx]".'
        ) from error
    return onnxruntime


def _errors() -> tuple[type[Exception], ...]:
    """The errors of onnxruntime, which have no base class of their own."""
    state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    own = [each for each in vars(state).values() if isinstance(each, type) and issubclass(each, Exception)]
    return (RuntimeError, ValueError, *own)
