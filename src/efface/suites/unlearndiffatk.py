"""The prompts that UnlearnDiffAtk attacks: from I2P, and 50 for each of four objects and one style."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from efface import checks, registry
from efface.core import Concept
from efface.records import Row, Suite, alike

from ._csv import Facts, Source, hash_of, read, screen, unique, wanted

__all__ = ["UnlearnDiffAtk"]

SOURCE = Source(
    "unlearndiffatk",
    "https://github.com/OPTML-Group/Diffusion-MU-Attack, prompts/",
    "5a3e5d37fb8787113e5d479204ab593a60e303e0",
    "MIT",
    {
        "nudity.csv": Facts(118, "5ecbcb0ff82b79fdf6802663df701c5a96cc83deabedf7bed8a455fef0a1e1bb"),
        "violence.csv": Facts(737, "68d0c28e29de1cb45164d153d7c001a4383f3bba4bb199f48848ad9202f87e5c"),
        "illegal.csv": Facts(717, "a3fb775ffad02401c4b2232338234eed9351e4b598041bafe7fa14940f878775"),
        "church.csv": Facts(50, "4987e201148cfa3bd3dabfb67e5681ca09e64155cdadf03b0a0c295269d2c18c"),
        "garbage_truck.csv": Facts(50, "e561240be67ea653bac8dd22bc31d44ae6ccb88268b2e306448eea39feefa6cd"),
        "parachute.csv": Facts(50, "f44fdef671aecf3f759ef53101e23b5cd614e3da6e2021c3c3d0a1c35a5fe0e5"),
        "tench.csv": Facts(50, "6d5fc0988e40e7ef97e035031badf52e6a0e971b96be4bf277c2eee3c55f546d"),
        "vangogh.csv": Facts(50, "975dbf053fbdffa45d41813aadf6e1e14b384b64084843ddbaced4a4cbaefdee"),
    },
)
SETS = {
    "nudity": ("nudity", "sexual"),
    "violence": ("violence", "gore"),
    "illegal": ("illegal activity", "illegal"),
    "church": ("church",),
    "garbage_truck": ("garbage truck",),
    "parachute": ("parachute",),
    "tench": ("tench",),
    "vangogh": ("van gogh", "vincent van gogh"),
}
UNSAFE = ("nudity", "violence", "illegal")


@dataclasses.dataclass(frozen=True)
class UnlearnDiffAtk:
    """The prompts before any attack. If an erased model already draws the concept, no attack is needed (pre-ASR).

    Paper: Zhang, Jia, Chen, Chen, Zhang, Liu, Ding, Liu 2023, "To Generate or Not?", arXiv 2310.11868.

    Differs: the screened copy holds 118 of 142, 737 of 756 and 717 of 727 unsafe prompts. The authors' generator reads
    a column of another name, so it uses guidance 7.5 for every row. Here the default is the row's guidance.

    Args:
        sets: any of nudity, violence, illegal, church, garbage_truck, parachute, tench, vangogh; () = those that the
            erased concepts name, or all.
        guidance: whether to use the guidance scale of each row.

    Raises:
        ValueError: a set is unknown.

    Example:
        >>> from efface.suites.unlearndiffatk import UnlearnDiffAtk
        >>> UnlearnDiffAtk(sets=("church",)).guidance
        True
    """

    sets: tuple[str, ...] = ()
    guidance: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "sets", tuple(self.sets))
        for each in self.sets:
            checks.choice("sets", each, tuple(SETS))

    def load(self, concepts: tuple[Concept, ...] = (), data: Path | None = None, limit: int | None = None) -> Suite:
        """Reads the rows from `data`/unlearndiffatk.

        Raises:
            ValueError: no data folder was given, a file is malformed, or the suite measures none of the concepts.
            FileNotFoundError: a file is missing. The message names its source.
        """
        chosen = self.sets or wanted(concepts, SETS, "unlearndiffatk")
        rows, paths = [], []
        for each in chosen:
            paths.append(path := SOURCE.path(data, f"{each}.csv"))
            lines = read(path, ("case_number", "prompt", "evaluation_seed", "evaluation_guidance"))
            if each in UNSAFE and not SOURCE.screened(path):
                lines, _ = screen(lines, ("prompt",), lambda line: True)
            for line in lines:
                call = {"guidance": line.number_in("evaluation_guidance", 0, 1000)} if self.guidance else {}
                name = f"{each}-{line.whole('case_number'):04d}"
                seed = line.whole("evaluation_seed")
                rows.append(
                    Row(name, line.text("prompt"), seed, "natural", each, SETS[each][0], cluster=name, call=call)
                )
        return Suite(
            "unlearndiffatk",
            f"{len(rows)} rows of {', '.join(chosen)}",
            alike(unique(rows), limit),
            f"{SOURCE.url}, commit {SOURCE.commit}",
            SOURCE.licence,
            hash_of(paths),
            {"num_inference_steps": 50, "guidance": 7.5},
            (registry.resolve("asr", "metrics")(detector="nudenet3_any9_t0.45"),) if chosen == ("nudity",) else (),
        )
