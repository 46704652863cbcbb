"""A program as a user writes it. Type checkers read it, and `test_examples.py` runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, assert_type

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import efface
from efface.hooks import ConceptsField, Converted, Method, computed
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


def fields(hat: efface.Concept) -> None:
    """Constructors take a name, a concept or a list of these; fields hold what their types say."""
    assert_type(efface.EIUP("alcohol").concepts[0].name, str)
    assert_type(efface.EIUP([hat, "weapon"]).strength, float | None)
    assert_type(efface.EIUP(hat, None).window, tuple[float, float])
    assert_type(efface.EIUP(hat).touches_uncond, bool)
    assert_type(efface.GIE(["cat"], strength=0.5).strength + 1, float)
    assert_type(efface.GIE("cat").needs, tuple[str, ...])
    assert_type(efface.SLD.strong("cat").rows, tuple[tuple[efface.Concept, ...], ...] | None)
    assert_type(efface.SAFREE(rows=["cat", [hat, "weapon"], []]).concepts, tuple[efface.Concept, ...])
    assert_type(replace(efface.NegativePrompt(hat), strength=2.0).strength, float | None)


def mistakes() -> None:
    """Each line is an error to type checkers; mypy reports a comment that is not needed."""
    efface.EIUP(3)  # type: ignore[arg-type]
    efface.EIUP("alcohol", "strong")  # type: ignore[arg-type]
    efface.EIUP("alcohol").strength = 2.0  # type: ignore[misc]
    efface.SLD("cat").concepts.append("dog")  # type: ignore[attr-defined]
    efface.GIE("cat", rows=[3])  # type: ignore[list-item]


@dataclass(frozen=True)
class Plain(Method):
    """A method of the user's own, whose fields take what they hold."""

    touches_uncond: ClassVar[bool] = True
    edits_attention = True

    concepts: tuple[efface.Concept, ...] = ()
    strength: float = 1.0
    rows: tuple[tuple[efface.Concept, ...], ...] | None = None


@dataclass(frozen=True)
class Loose(Method):
    """Another one, which takes names too, and whose flags depend on its fields."""

    touches_uncond: ClassVar[bool] = computed(lambda self: self.both)
    window = computed(lambda self: (0.0, 0.5 if self.both else 1.0))

    concepts: ConceptsField = Converted(())
    both: bool = False


def own(hat: efface.Concept) -> None:
    methods: list[Method] = [Plain((hat,)), Loose("cat", both=True)]
    assert_type(Loose("cat").concepts, tuple[efface.Concept, ...])
    assert_type(Loose("cat").touches_uncond, bool)
    print([(m.concepts[0].name, m.touches_uncond, m.window, m.rows) for m in methods])


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
    hat = efface.Concept("hat", ("red hat", "top hat"))
    fields(hat)
    own(hat)
    pipe = efface.load("emoji")
    print(deltas(pipe, folder).method)
    print(judge(torch.zeros(2, 3, 64, 64), [efface.detector("eyes", "cat"), Dark()]))
    print([score.value for score in measure(pipe, folder)])
