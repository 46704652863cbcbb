"""P4D: the initial prompts of its attack."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from efface import checks, registry
from efface.core import Concept
from efface.records import Row, Suite, alike

from ._csv import Facts, Source, hash_of, read, unique

__all__ = ["P4D"]

SOURCE = Source(
    "p4d",
    "https://github.com/joycenerd/P4D, data/",
    "2cf3cda9d458373619989ec5e45150c67fed1e8c",
    "MIT; the prompts are I2P's, MIT",
    {
        "p4d_ideal_i2p_ids.csv": Facts(3473, "d5a14323787aa5fb153d08f812f9d7da629bc9cb259830a8ee8d2b2607929e9a"),
        "car_esd.csv": Facts(91, "975e4930f4457946c02d26ce2d1ede6303bfb0e16c3f57dbcc8ef318522cef52"),
        "frenchhorn200.csv": Facts(200, "a15f16e22d16c728ffa4a5a7e71bbafa07b619e11d1e37d36d9ccbc1fe3252b5"),
    },
)
SAFE_MODELS = {
    "esd": ("nudity",),
    "sld_max": ("nudity", "all"),
    "sld_strong": ("nudity", "all"),
    "sd_negp": ("nudity",),
}
FILES = {"car": "car_esd.csv", "french horn": "frenchhorn200.csv"}


@dataclasses.dataclass(frozen=True)
class P4D:
    """ "Ideal" prompts: the original Stable Diffusion draws the concept from them, and a given safe model does not.

    Paper: Chin, Jiang, Huang, Chen, Chiu 2023, "Prompting4Debugging", arXiv 2309.06135.

    Differs: the data holds only ids and the texts come from I2P, so both folders are needed. The screened copy holds
    3,473 of 3,742 ids. The optimised prompts are not included: they were found against one model, and are a transfer
    attack on any other.

    Args:
        set: "nudity" or "all" (unsafe prompts of I2P), "car" or "french horn".
        safe_model: for "nudity" and "all": the safe model of the ideal prompts: "esd", "sld_max", "sld_strong" or
            "sd_negp".

    Raises:
        ValueError: the set or safe model is unknown, or the safe model lacks the set.

    Example:
        >>> from efface.suites.p4d import P4D
        >>> P4D("french horn").set
        'french horn'
    """

    set: str = "nudity"
    safe_model: str = "esd"

    def __post_init__(self) -> None:
        checks.choice("set", self.set, ("nudity", "all", *FILES))
        checks.choice("safe_model", self.safe_model, tuple(SAFE_MODELS))
        if self.set not in FILES:
            checks.choice("set", self.set, SAFE_MODELS[self.safe_model])

    def load(self, concepts: tuple[Concept, ...] = (), data: Path | None = None, limit: int | None = None) -> Suite:
        """Reads the rows from `data`/p4d and `data`/i2p, for any erased concept.

        Raises:
            ValueError: no data folder was given, a file is malformed, or I2P lacks an id.
            FileNotFoundError: a file is missing. The message names its source.
        """
        rows = []
        if self.set in FILES:
            paths = [SOURCE.path(data, FILES[self.set])]
            for line in read(paths[0], ("case_number", "prompt", "evaluation_seed", "evaluation_guidance")):
                call = {"guidance": line.number_in("evaluation_guidance", 0, 1000)}
                name, seed = f"p4d-{line.whole('case_number'):05d}", line.whole("evaluation_seed")
                rows.append(
                    Row(name, line.text("prompt"), seed, "natural", self.set, self.set, cluster=name, call=call)
                )
        else:
            paths = [SOURCE.path(data, "p4d_ideal_i2p_ids.csv")]
            i2p = registry.resolve("i2p", "suites")(guidance=False, size=False).load((), data)
            texts = {row.id: row for row in i2p.rows}
            columns = ("safe_model", "concept", "case_number", "evaluation_seed", "evaluation_guidance")
            for line in read(paths[0], columns):
                seed, scale = line.whole("evaluation_seed"), line.number_in("evaluation_guidance", 0, 1000)
                name = f"i2p-{line.whole('case_number'):04d}"
                if (line["safe_model"], line["concept"]) != (self.safe_model, self.set):
                    continue
                if name not in texts:
                    raise line.wrong("case_number", f"I2P in {data} has no row {line['case_number']}")
                row, concept = texts[name], "nudity" if self.set == "nudity" else texts[name].concept
                rows.append(
                    Row(
                        name,
                        row.prompt,
                        seed,
                        "natural",
                        self.set,
                        concept,
                        cluster=name,
                        call={"guidance": scale},
                    )
                )
            paths.append(Path(data or "") / "i2p" / "i2p.csv")
        return Suite(
            f"p4d_{self.set.replace(' ', '_')}" + ("" if self.set in FILES else f"_{self.safe_model}"),
            f"{len(rows)} rows",
            alike(unique(rows), limit),
            f"{SOURCE.url}, commit {SOURCE.commit}",
            SOURCE.licence,
            hash_of(paths),
            {"num_inference_steps": 50, "guidance": 7.5},
            (registry.resolve("asr", "metrics")(detector="nudenet3_any5_t0.5"),) if self.set == "nudity" else (),
        )
