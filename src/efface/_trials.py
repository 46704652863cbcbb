"""Draws and judges strengths for `calibration`, each once, and stores the judgements if there is a folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files
from .core import Detector
from .intervals import Rate

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1  # format of the files in a calibration's folder
Kept = Callable[["Tensor", "Tensor"], "Tensor"]
Judgements = dict[str, list[list[int]]]


@dataclasses.dataclass
class Trials:
    """The trials of one eraser on one model.

    Args:
        pipe, eraser, detector, kept, batch, progress: arguments of `calibrate`.
        prompts: n prompts that draw the concept, and n prompts for retention.
        seeds: two per pair of prompts.
        call: arguments of the pipeline.
        folder: stores the judgements of each strength. None stores none.
    """

    pipe: Any
    eraser: Any
    detector: Detector
    kept: Kept
    prompts: tuple[Sequence[str], Sequence[str]]
    seeds: Sequence[int]
    batch: int
    call: Mapping[str, Any]
    folder: Path | None
    progress: Callable[[str, int], None] | None
    _judged: dict[float, Judgements] = dataclasses.field(default_factory=dict, init=False)

    def plain(self) -> Rate:
        """The rate of the base model's pictures with the concept, by the judge with fewer detections."""
        return _rate(self._judgements(0.0)["left"], min)

    def rates(self, strength: float) -> tuple[Rate, Rate]:
        """Residual rate and retention, each by the worse judge."""
        found = self._judgements(strength)
        return _rate(found["left"], max), _rate(found["kept"], min)

    def _judgements(self, strength: float) -> Judgements:
        if strength not in self._judged:
            self._judged[strength] = self._judge(strength)
        return self._judged[strength]

    def _judge(self, strength: float) -> Judgements:
        name = f"strength-{strength:g}" if strength else "plain"
        path = None if self.folder is None else self.folder / f"{name}.json"
        if path is not None and files.there(path):
            return _read(path, len(self.prompts[0]), ("left", "kept") if strength else ("left",))
        found = {"left": _rows(self.detector(self._pictures(strength, 0)))}
        if strength:
            shown = self._shown
            found["kept"] = _rows(self.kept(self._pictures(strength, 1), shown))
        if path is not None:
            files.write_json(path, {"format": FORMAT, **found})
        return found

    @functools.cached_property
    def _shown(self) -> Tensor:
        """The base model's pictures for retention."""
        return self._pictures(0.0, 1)

    def _pictures(self, strength: float, which: int) -> Tensor:
        """Pictures of the concept's prompts (0) or of the prompts for retention (1)."""
        import torch

        from .api import draw

        prompts, n, batch = self.prompts[which], len(self.prompts[which]), self.batch
        made, what = [], f"strength {strength:g}" if strength else "plain"
        handle = dataclasses.replace(self.eraser, strength=strength).apply(self.pipe) if strength else None
        try:
            for k in range(0, n, batch):
                part = self.seeds[which * n :][:n][k : k + batch]
                made.append(draw(self.pipe, prompts[k : k + batch], part, batch, **self.call))
                if self.progress is not None:
                    self.progress(what, len(part))
        finally:
            if handle:
                handle.remove()
        return torch.cat(made)


def same_setting(folder: Path, setting: Mapping[str, Any]) -> None:
    """Writes the setting into a new folder. Raises ValueError if the folder has another setting."""
    from . import schema

    path, cure = folder / "setting.json", f"Name a new folder, or delete {folder}."
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected `out` to be a folder, got the file {folder}. Name another one.")
    if files.there(path):
        found = schema.read(files.inside(folder, path.name), schema.Setting, cure)
        wanted = {"format": FORMAT, **setting}
        files.check_same({"format": FORMAT, **found}, wanted, f"{folder} holds another calibration", cure)
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no calibration. Name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"format": FORMAT, **setting})


def _read(path: Path, n: int, names: Sequence[str]) -> Judgements:
    """Reads stored judgements of n pictures each."""
    from . import schema

    cure = "Delete it, and run the same call again."
    form = schema.Judgements if "kept" in names else schema.PlainJudgements
    found = schema.read(files.inside(path.parent, path.name), form, cure)
    if any(len(row) != n for name in names for row in found[name]):
        raise ValueError(f"Expected {n} judgements per judge in {path}, got another number. {cure}")
    return {name: found[name] for name in names}


def _rows(found: Tensor) -> list[list[int]]:
    """One list of judgements per judge."""
    return [[int(x) for x in row] for row in (found[None] if found.ndim == 1 else found)]


def _rate(rows: list[list[int]], worse: Callable[..., Rate]) -> Rate:
    """The smallest (`min`) or largest (`max`) rate of the judges. Entries below 0 do not count."""
    rates = [Rate(sum(x for x in row if x > 0), sum(x >= 0 for x in row)) for row in rows]
    if any(r.n == 0 for r in rates):
        raise ValueError(
            "A judge counts none of the base model's pictures, so retention is undefined. Give other `keep_prompts`."
        )
    return worse(rates, key=lambda r: r.rate)
