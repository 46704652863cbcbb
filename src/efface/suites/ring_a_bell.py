"""Ring-A-Bell: attack prompts from a search without access to the attacked model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from efface import checks, registry
from efface.core import Concept
from efface.records import Row, Suite, alike

from ._csv import Facts, Source, hash_of, read, screen, unique

__all__ = ["RingABell"]

SOURCE = Source(
    "ring_a_bell",
    "https://github.com/chiayi-hsu/Ring-A-Bell, data/InvPrompt/Violence; "
    "nudity: https://huggingface.co/datasets/Chia15/RingABell-Nudity",
    "e4585ada0a5eb185fbef89bb94147c97f8d2f79a",
    "MIT",
    {
        "inv_violence_eta_5.5_k_38.csv": Facts(248, "aad5368eaab16e31c7d1fbb36efac736f6eed6ba0206574e32670909a602eab8"),
        "inv_violence_eta_5.5_k_77.csv": Facts(242, "6357873c06c79cdf38640f954c40466501e5076f8348aed377cb7e7f8902c862"),
        "inv_violence_eta_5_k_77.csv": Facts(246, "a74c145176aebd05a8cd6670bde4cdcc2dfb6e68b649e742247e14815be7ba23"),
    },
)
SETS = {f"violence_eta_{e}_k_{k}": f"inv_violence_eta_{e}_k_{k}.csv" for e, k in (("5.5", 77), ("5.5", 38), ("5", 77))}
SETS |= {f"nudity_eta_3_k_{k}": f"inv_nudity_eta_3_k_{k}.csv" for k in (77, 38, 16)}


@dataclasses.dataclass(frozen=True)
class RingABell:
    """Prompts optimised against Stable Diffusion's text encoder: a transfer attack on any other model.

    Paper: Tsai, Hsu, Xie, Lin, Chen, Li, Chen, Yu, Huang 2023, "Ring-A-Bell!", arXiv 2310.10012.

    Differs: the screened copies hold 242 to 248 of 250 prompts. No copy includes the nudity sets. The author provides
    them on request, and Efface screens your file (same columns) when it reads it. The "79 Ring-A-Bell prompts" of other
    papers are different: those are ordinary sentences.

    Args:
        set: the file, named by concept, strength eta and length k.

    Raises:
        ValueError: the set is unknown.

    Example:
        >>> from efface.suites.ring_a_bell import RingABell
        >>> RingABell().set
        'violence_eta_5.5_k_77'
    """

    set: str = "violence_eta_5.5_k_77"

    def __post_init__(self) -> None:
        checks.choice("set", self.set, tuple(SETS))

    def load(self, concepts: tuple[Concept, ...] = (), data: Path | None = None, limit: int | None = None) -> Suite:
        """Reads the rows of the set from `data`/ring_a_bell, for any erased concept.

        Raises:
            ValueError: no data folder was given, or a file is malformed.
            FileNotFoundError: a file is missing. The message names its source.
        """
        path = SOURCE.path(data, SETS[self.set])
        concept, dropped = self.set.partition("_")[0], 0
        lines = read(path, ("case_number", "prompt", "evaluation_seed"))
        if not SOURCE.screened(path):
            lines, dropped = screen(lines, ("prompt",), lambda line: True)
        rows = []
        for line in lines:
            name = f"{concept}-{line.whole('case_number'):04d}"
            seed = line.whole("evaluation_seed")
            rows.append(Row(name, line.text("prompt"), seed, "attack", "static attack", concept, cluster=name))
        return Suite(
            f"ring_a_bell_{self.set}",
            f"{len(rows)} rows" + (f", {dropped} dropped by the screen" if dropped else ""),
            alike(unique(rows), limit),
            f"{SOURCE.url}, commit {SOURCE.commit}",
            SOURCE.licence,
            hash_of([path]),
            {"num_inference_steps": 50, "guidance": 7.5},
            (registry.resolve("asr", "metrics")(detector="nudenet3_any5_t0.5"),) if concept == "nudity" else (),
        )
