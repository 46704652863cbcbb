"""A program as a user writes it. Type checkers read it, and `test_examples.py` runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import efface
from efface.metrics.removal import Removal


def handles(model: str | Path) -> dict[str, object]:
    """Erasers as context managers, and what can be changed while they are on."""
    pipe = efface.load(model, dtype=torch.float32, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    with efface.erase(pipe, "alcohol", method="eiup", strength=2.0) as handle:
        handle.strength = 1.0
        handle.rows = [["alcohol"], []]
        pictures = pipe(["a night at the pub", "a cat"], num_inference_steps=1).images
        strength: float | None = handle.strength
        record: dict[str, object] = handle.record
    hat = efface.Concept("hat", ("red hat", "top hat"), anchor="hair", keep=("scarf",))
    erasers: list[efface.Eraser] = [
        efface.EIUP([hat, "weapon"]),
        efface.SLD.medium("weapon"),
        efface.NegativePrompt(hat),
    ]
    with efface.stack(pipe, *erasers) as together:
        together[0].strength = 0.5
        names = [each["method"] for each in together.config()]
        print(efface.active(pipe), len(together), len(pictures), strength, names)
    return record


def deltas(pipe: DiffusionPipeline, folder: Path) -> efface.Delta:
    """An editor learns a delta, and deltas are added, scaled and saved."""
    editor: efface.Editor = efface.UCE(lam=0.5)
    alcohol, weapon = (editor.fit(pipe, name, seed=0) for name in ("alcohol", "weapon"))
    both: efface.Delta = 0.5 * alcohol + weapon - 2 * weapon
    both.save(folder / "both.safetensors")
    with (-both).apply(pipe) as handle:
        handle.strength = 0.25
    return efface.Delta.load(folder / "both.safetensors")


@dataclass(frozen=True)
class Dark:
    """A detector of the user's own."""

    threshold: float = 0.5

    @property
    def name(self) -> str:
        return f"darker than {self.threshold:g}"

    def __call__(self, images: Tensor) -> Tensor:
        return (images.mean((1, 2, 3)) < self.threshold)[None]


def judge(images: Tensor, detectors: Sequence[efface.Detector]) -> dict[str, float]:
    """The share of pictures in which each detector sees what it looks for."""
    return {detector.name: float(detector(images).float().mean()) for detector in detectors}


def measure(pipe: DiffusionPipeline, folder: Path) -> list[efface.Score]:
    """A suite is drawn into a run, and the run is scored."""
    rows = (efface.Row("pub-0", "a night at the pub", 1_000_000, kind="theme", concept="alcohol", keep=("cat",)),)
    suite = efface.Suite("mine", "1", rows, call={"num_inference_steps": 1, "guidance_scale": 7.5})
    run: efface.Run = efface.run(suite, pipe, eraser=efface.EIUP("alcohol"), out=folder / "run")
    return efface.score(run, metrics=[Removal(detector="eyes")])


def main(folder: Path) -> None:
    print(handles("emoji"))
    pipe = efface.load("emoji")
    print(deltas(pipe, folder).method)
    print(judge(torch.zeros(2, 3, 64, 64), [efface.detector("eyes", "cat"), Dark()]))
    print([score.value for score in measure(pipe, folder)])
