"""Six-CD: harm, nudity, celebrities, characters, objects and art styles, with benign prompts and Dual-Version pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from efface import checks, registry
from efface.core import Concept
from efface.records import Row, Suite, alike

from ._csv import Facts, Source, hash_of, read, screen, slug, unique, wanted

__all__ = ["SixCD"]

SOURCE = Source(
    "six_cd",
    "https://github.com/Artanisax/Six-CD, Datasets/",
    "a30fe9e87c242e6eb57b1e9058aa7be364dc07f5",
    "MIT",
    {
        "harm.csv": Facts(966, "6d58fca31eb04fe72c2d92e26639e63ed274f5a69be7c1610c20287b6531e495"),
        "nudity.csv": Facts(398, "acaf1d93d1255f890359689c3b1722164ecbbe677a43b1119539a793b8bcb62b"),
        "benign.csv": Facts(500, "41ab9b5c10534892d78d00479ff24893b8edc3ee51beb29ee6e71e523577a684"),
        "concepts_celebrity.csv": Facts(94, "5cd23b34b9e91fabdfa3ce21b6194c70516c6e54f214a66016985669530b7c43"),
        "concepts_character.csv": Facts(100, "9c37084e2407d4f0aba76df7146e628a0b4ced0f66c677cb2a683e2f03db1528"),
        "concepts_object.csv": Facts(10, "4bb846be9a0bc100363385b118c20acfdf5a670be7daafbf2049ad20295c7db9"),
        "concepts_artstyle.csv": Facts(10, "45ad39774af81b64beb431f019ef15ea0a6ed23daef8fcee375d59e06cc3b2cb"),
        "dual_harm_malicious.csv": Facts(100, "d7a237d31bfa93a71fc10b02da9e032680aab32d2e322500526cf8c69518df08"),
        "dual_harm_clean.csv": Facts(100, "e586055359541074dac41cb0039ca1936984cdd1b147fbde694ae2ebb106ba1e"),
        "dual_nudity_malicious.csv": Facts(85, "9fbdbf247c983a55dbab24792bd0d26d763387c67a77133c8dea54e9f68f4910"),
        "dual_nudity_clean.csv": Facts(85, "57e5b09b088cd6441cab7da69831cc7930098e8f8f32973669fa610309a637bd"),
        "dual_celebrity_malicious.csv": Facts(100, "5756ee5e49900cf8cef505e6ea7c9116574ac4e0fe653aae192fdbc16345d84d"),
        "dual_celebrity_clean.csv": Facts(100, "545af9ad421b82044e2f5abc6129a03ae21730c1a59dc564b114bea24c513b21"),
        "dual_character_malicious.csv": Facts(100, "8fcfcef21f752d005a2ed4b97d8e25b6aa14e17bf7e38de227c62911fd2914de"),
        "dual_character_clean.csv": Facts(100, "abfd291afd943b327d44b8da360ce59416d51e8b4fc7b0c8df772854f16df2fe"),
        "dual_object_malicious.csv": Facts(100, "759dcdb41b4597820570809ddd1d849a9825eab10fa19e4679d83b2599aeeaac"),
        "dual_object_clean.csv": Facts(100, "1875d7792c7a400ab3f4023e1721a70eee32d61075d67d0609cd69a7bc67f54d"),
        "dual_artstyle_malicious.csv": Facts(100, "d4651934597b1f7a63026279adac4c29ee6ccf3656eca32f3e2fdba1b263274c"),
        "dual_artstyle_clean.csv": Facts(100, "684c67cfe267fadda190145696bb1727a5bf2f62b6195174dcf6af6c7e831379"),
    },
)
GENERAL = {
    "harm": ("harm", "hate", "harassment", "violence", "self-harm", "shocking", "illegal activity", "gore"),
    "nudity": ("nudity", "sexual"),
}
SPECIFIC = ("celebrity", "character", "object", "artstyle")
ODD_NAMES = {
    "oprah_winfre": "Oprah Winfrey",
    "leonardo_diCaprio": "Leonardo DiCaprio",
    "leBron_james": "LeBron James",
}
SEED = 1_000_000
CLIP = "openai/clip-vit-large-patch14"
Paths = Callable[[str], Path]


@dataclasses.dataclass(frozen=True)
class SixCD:
    """Six categories of prompts. A Dual-Version pair is a row of kind "dual" and its clean half, of kind "clean".

    The clean half has the same seed, and the same id with "-clean" at its end.

    Paper: Ren, Chen, Cui, Zeng, Liu, Xing, Tang, Lyu 2024, "Six-CD", arXiv 2406.14855; data of January 2026.

    Differs: the screened copy holds 398 of 1,539 nudity prompts, 966 of 991 harm prompts and 85 of 100 nudity pairs: do
    not compare with published figures. The paper does not state pictures per prompt, steps and sampler. Specific
    concepts have no published seeds; here they start at 1,000,000. The authors chose prompts from which Stable
    Diffusion 1.4 draws the concept in at least 4 of 5 pictures; for another model see `efface.effectiveness`. NudeNet
    judges removal of nudity, and Q16 of harm; Q16 needs weights that you convert. CLIP zero-shot over all names of the
    category judges the others, because only one of the paper's classifiers is published. No detector judges several
    general categories together.

    Args:
        categories: any of harm, nudity, celebrity, character, object, artstyle; () = those that the erased concepts
            name, or all.
        images: seeds per template. A specific concept has four templates.
        benign: whether to include the 500 benign captions.
        dual: whether to include the Dual-Version pairs.
        fix_truncated_names: adds the last letter of the artist's name, which all 100 prompts of the art style pairs
            lack.
        short_names: shortens names: "Dexter" for "Dexter (from Dexter's Laboratory)".

    Raises:
        ValueError: a category is unknown, or `images` is below 1.

    Example:
        >>> from efface.suites.six_cd import SixCD
        >>> SixCD(categories=("object",)).images
        5
    """

    categories: tuple[str, ...] = ()
    images: int = 5
    benign: bool = True
    dual: bool = True
    fix_truncated_names: bool = True
    short_names: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", tuple(self.categories))
        for each in self.categories:
            checks.choice("categories", each, (*GENERAL, *SPECIFIC))
        checks.whole("images", self.images)

    def load(self, concepts: tuple[Concept, ...] = (), data: Path | None = None, limit: int | None = None) -> Suite:
        """Reads the rows from `data`/six_cd.

        Args:
            concepts: the erased concepts. If they name specific concepts, those categories load only these rows.
            data: folder that holds six_cd/.
            limit: the largest number of rows, alike from each concept and category. Pairs stay together.

        Raises:
            ValueError: no data folder was given, a file is malformed, pairs do not match, or the suite measures none of
                the concepts.
            FileNotFoundError: a file is missing. The message names its source.
        """
        paths: list[Path] = []

        def path(name: str) -> Path:
            paths.append(SOURCE.path(data, name))
            return paths[-1]

        names = {c: self._names(c, path) for c in self.categories or SPECIFIC if c in SPECIFIC}
        known = GENERAL | {c: tuple(name.lower() for name in found) for c, found in names.items()}
        chosen = wanted(concepts, {c: known[c] for c in self.categories or (*GENERAL, *SPECIFIC)}, "six_cd")
        asked = {c.name.lower() for c in concepts}
        units: list[tuple[Row, ...]] = []
        for category in chosen:
            if category in GENERAL:
                units += self._general(category, path)
            else:
                units += self._specific(category, [n for n in names[category] if not asked or n.lower() in asked], path)
            if self.dual:
                pairs = self._pairs(category, path)
                units += [p for p in pairs if category in GENERAL or not asked or p[0].concept.lower() in asked]
        if self.benign:
            for line in read(path("benign.csv"), ("case_number", "prompt", "evaluation_seed")):
                seed, case = line.whole("evaluation_seed"), line.whole("case_number")
                units.append((Row(f"benign-{case:04d}", line.text("prompt"), seed, "benign", "benign"),))
        rows = unique([row for unit in units for row in unit])
        fixed = "names fixed" if self.fix_truncated_names else "names truncated as published"
        metrics = [registry.resolve("clip_score", "metrics")(encoder=CLIP)] if self.benign else []
        if self.dual:
            metrics.append(registry.resolve("in_prompt_clip", "metrics")(encoder=CLIP))
        named = [name for category in chosen if category in SPECIFIC for name in names[category]]
        if judge := self._judge(chosen, [*named, *(row.concept for unit in units for row in unit if row.concept)]):
            metrics.insert(0, registry.resolve("removal", "metrics")(detector=judge))
        return Suite(
            "six_cd",
            f"{len(rows)} rows of {', '.join(chosen)}; {fixed}",
            alike(rows, limit),
            f"{SOURCE.url}, commit {SOURCE.commit}",
            SOURCE.licence,
            hash_of(paths),
            {"num_inference_steps": 50, "guidance": 7.5},
            tuple(metrics),
        )

    @staticmethod
    def _judge(chosen: tuple[str, ...], named: list[str]) -> str | dict[str, Any] | None:
        """The detector for removal; None if no single detector knows all categories."""
        if chosen == ("nudity",):
            return "nudenet3_any5_t0.5"
        if chosen == ("harm",):
            return {"name": "q16"}
        if any(category in GENERAL for category in chosen):
            return None
        return {"name": "clip", "labels": list(dict.fromkeys(named)), "clip": CLIP}

    def _names(self, category: str, path: Paths) -> list[str]:
        names = [line.text("concept") for line in read(path(f"concepts_{category}.csv"), ("id", "concept"))]
        if category == "celebrity":
            names = [ODD_NAMES.get(name, name.replace("_", " ").title()) for name in names]
        return [name.partition(" (")[0] if self.short_names else name for name in names]

    def _general(self, category: str, path: Paths) -> Iterator[tuple[Row, ...]]:
        lines = read(file := path(f"{category}.csv"), ("case_number", "prompt", "evaluation_seed"))
        if not SOURCE.screened(file):
            lines, _ = screen(lines, ("prompt",), lambda line: True)
        for line in lines:
            name, seed = f"{category}-{line.whole('case_number'):04d}", line.whole("evaluation_seed")
            yield (Row(name, line.text("prompt"), seed, "natural", category, category),)

    def _specific(self, category: str, names: list[str], path: Paths) -> Iterator[tuple[Row, ...]]:
        from efface import schema

        file = path("templates.json")
        key, slot = ("artstyle", "{artist}") if category == "artstyle" else ("celebrity_character_object", "{name}")
        templates = schema.read(file, schema.Templates, "Get the file again from its authors.").get(key, [])
        if not templates or not all(slot in template for template in templates):
            raise ValueError(
                f"Expected {key!r} in {file} to be a list of texts with {slot}, got others. Get the file again."
            )
        for name in names:
            for t, template in enumerate(templates):
                for k in range(self.images):
                    seed, prompt = SEED + t * self.images + k, template.replace(slot, name)
                    row_id = f"{category}-{slug(name)}-{t}-{k}"
                    yield (Row(row_id, prompt, seed, "explicit", category, name, cluster=f"{category}-{slug(name)}"),)

    def _pairs(self, category: str, path: Paths) -> Iterator[tuple[Row, ...]]:
        columns = ("case_number", "evaluation_seed", "prompt")
        specific = category in SPECIFIC
        files = [path(f"dual_{category}_{half}.csv") for half in ("malicious", "clean")]
        dual = read(files[0], (*columns, "target") if specific else columns)
        clean = {line.whole("case_number"): line for line in read(files[1], columns)}
        if not specific and not all(map(SOURCE.screened, files)):
            dual, _ = screen(dual, ("prompt",), lambda line: True)
        for line in dual:
            case, seed = line.whole("case_number"), line.whole("evaluation_seed")
            if case not in clean:
                raise line.wrong("case_number", f"{files[1].name} has no clean half of pair {case}")
            if (other := clean[case].whole("evaluation_seed")) != seed:
                raise line.wrong("evaluation_seed", f"the clean half of pair {case} has another seed, {other}")
            target, prompt = line.text("target") if specific else category, line.text("prompt")
            cut = category == "artstyle" and prompt.endswith(target[:-1]) and not prompt.endswith(target)
            if cut and self.fix_truncated_names:
                prompt += target[-1]
            name, cluster = f"dual-{category}-{case:03d}", f"dual-{category}-{slug(target)}" if specific else ""
            first = Row(name, prompt, seed, "dual", category, target, cluster=cluster)
            yield first, Row(f"{name}-clean", clean[case].text("prompt"), seed, "clean", category, cluster=cluster)
