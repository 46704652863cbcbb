"""Human Feedback Inversion against words: is a token that was learned from judged pictures a better erasure prompt?

The first detector stands for the annotator: it sees pixels alone, and a share of its answers is turned around. The
second one judges what is drawn, alone. Both were trained on the same pictures, so a real annotator would agree less.
Members that are `unseen` are in no prompt of the judged pictures.

The pictures of one token were judged by looking instead: `results/judged_alcohol.jsonl`, from `efface feedback collect
--sheets`, `read` and `export`. Two passes of a vision-language model filled in the sheets, not people.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

import efface
from efface import api, files
from efface.core import Concept, config
from efface.detectors import _encoders
from efface.feedback import Evidence, Judgement, Store, load, pool
from efface.feedback.reward import RewardModel
from efface.intervals import difference
from efface.pictures import to_pil
from efface.pipelines import draw

from .code import ROOT, code_hash
from .outcome import PILOT, packed, rate
from .runner import Experiment, Plan, Unit, timed
from .worlds import SEEDS

ANNOTATOR, JUDGE = 0, 1  # places of the two detectors
MEMBERS, OTHERS, STRIDE = ("seen", "unseen"), ("near", "far"), 2_000
LOOKED = ROOT / "results" / "judged_alcohol.jsonl"
HOSTS: dict[str, Any] = {"eiup": efface.EIUP, "sld": efface.SLD, "negative_prompt": efface.NegativePrompt}
TRAINERS: dict[str, Any] = {"esd": efface.ESD, "sdd": efface.SDD}


How = tuple[int, float | Path]


@dataclasses.dataclass(frozen=True)
class Fuzzy:
    """A concept that people know when they see it.

    Args:
        cells: cell -> icons. `seen` and `unseen` are members, `near` looks or sounds alike and stays, `far` stays.
        words: what a person writes: a name, and a list.
        judgements: the (number of judged pictures, share of wrong answers) of each token. Instead of a share, a file of
            judgements that people made by looking at these pictures.
        trainers: whether editors of weights are fitted too.
    """

    cells: Mapping[str, tuple[str, ...]]
    words: Mapping[str, tuple[str, ...]]
    judgements: tuple[How, ...] = ((200, 0.0),)
    trainers: bool = False

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(icon for cell in MEMBERS for icon in self.cells[cell])


CONCEPTS = {
    "alcohol": Fuzzy(
        {
            "seen": ("beer-mug", "clinking-beer-mugs", "wine-glass", "cocktail-glass", "bottle-with-popping-cork"),
            "unseen": ("tropical-drink", "clinking-glasses", "tumbler-glass"),
            "near": ("hot-beverage", "glass-of-milk", "teacup-without-handle", "cup-with-straw"),
            "far": ("dog-face", "guitar", "rose", "bus", "pizza", "trophy"),
        },
        {"name": ("alcohol",), "list": ("alcohol", "beer", "wine", "a cocktail", "champagne")},
        ((50, 0.0), (200, 0.0), (800, 0.0), (200, 0.1), (200, 0.2), (200, LOOKED)),
        trainers=True,
    ),
    "party drinks": Fuzzy(
        {
            "seen": ("wine-glass", "cocktail-glass", "bottle-with-popping-cork", "cup-with-straw"),
            "unseen": ("tropical-drink", "clinking-glasses"),
            "near": ("hot-beverage", "glass-of-milk", "teacup-without-handle"),
            "far": ("cat-face", "violin", "sunflower", "rocket", "taco", "crown"),
        },
        {"name": ("party drinks",), "list": ("party drinks", "wine", "a cocktail", "champagne", "a soft drink")},
    ),
    "scary things": Fuzzy(
        {
            "seen": ("skull", "ghost", "bat", "skull-and-crossbones", "coffin"),
            "unseen": ("jack-o-lantern", "snake"),
            "near": ("owl", "dog-face", "grinning-face", "robot"),
            "far": ("bus", "guitar", "rose", "banana", "camera", "star"),
        },
        {"name": ("scary things",), "list": ("scary things", "a skull", "a ghost", "a bat", "a monster")},
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feedback(Experiment):
    """Rows are concepts x methods x sources of the erasure prompt.

    Args:
        concepts: what is erased.
        fit: the inversion.
    """

    name: str
    question: str
    cap: float
    concepts: Mapping[str, Fuzzy] = dataclasses.field(default_factory=lambda: CONCEPTS)
    fit: efface.HFI = dataclasses.field(default_factory=efface.HFI)
    n: int = 24
    model: str = "emoji"
    block: str = "selection"
    columns: ClassVar[Mapping[str, str]] = {
        "seen": "residual, judged members",
        "unseen": "residual, other members",
        "near": "near things retained",
        "far": "other things retained",
    }

    # ---- the units

    def units(self, plan: Plan) -> list[Unit]:
        found: list[Unit] = []
        for name, about in self.concepts.items():
            tokens = {how: self._token(plan, name, about, *how) for how in about.judgements}
            found += tokens.values()
            found += self._cells(plan, name, about, "base", (), None)
            for method, make in HOSTS.items():
                for source, words in about.words.items():
                    erasers = (make(Concept(name, words)),)
                    found += self._cells(plan, name, about, f"{method} | words: {source}", erasers, None)
                for how, token in tokens.items():
                    if method == "eiup" or how == (200, 0.0):
                        erasers = (make(Concept(name, (word_of(name),))),)
                        found += self._cells(plan, name, about, f"{method} | {said(*how)}", erasers, token)
            for method, editor in TRAINERS.items() if about.trainers else ():
                for source, token in (("words: list", None), (said(200, 0.0), tokens[200, 0.0])):
                    words = (word_of(name),) if token else about.words["list"]
                    fitted = self._fitted(plan, name, f"{method} | {source}", editor(), Concept(name, words), token)
                    found.append(fitted)
                    found += self._cells(plan, name, about, f"{method} | {source}", (), fitted)
        return found

    def _token(self, plan: Plan, name: str, about: Fuzzy, count: int, answers: float | Path) -> Unit:
        """The token that is learned from so many judged pictures."""
        setting = {
            "token": config(self.fit.resolved(plan.world.pipe)),
            "concept": name,
            "cells": {cell: list(icons) for cell, icons in about.cells.items()},
            "judgements": [count, files.sha256(answers.read_bytes()) if isinstance(answers, Path) else answers],
            "model": plan.facts["model"],
            "call": dict(plan.call),
            "versions": plan.facts["versions"],
            "code": code_hash(efface.HFI, RewardModel, Evidence, Feedback),
        }
        unit = Unit("tokens", setting, lambda: measure(), float(count), lambda: pilot(), "fit")

        def measure() -> dict[str, Any]:
            folder = self._pool(plan, name, about, count)
            shown = _encoders.embedded(_encoders.encoder("emoji"), [item.path for item in pool(folder)])
            names = [item.picture for item in pool(folder)]
            evidence = (
                looked(folder, name, answers)
                if isinstance(answers, Path)
                else judged(plan, folder, name, about, answers)
            )
            reward = RewardModel.fit(evidence, names, shown, encoder="emoji")
            file = artefact(plan, unit).with_suffix(".reward.safetensors")
            reward.save(file)
            fit = dataclasses.replace(self.fit, pictures=str(folder), feedback=str(file))
            fit.fit(plan.world.pipe, Concept(name)).save(artefact(plan, unit))
            yes = sum(share > 0.5 for share in evidence.shares.values())
            return {"judged": len(names), "yes": yes, "who": list(evidence.annotators), "reward": dict(reward.facts)}

        def pilot() -> float:
            few = [dataclasses.replace(self.fit, steps=k) for k in (1, 5)]
            images, rewards = torch.rand(8, 3, 64, 64), torch.linspace(0, 1, 8)
            spent = [timed(lambda f=f: f.invert(plan.world.pipe, images, rewards, Concept(name)))[1] for f in few]
            steps = self.fit.resolved(plan.world.pipe).steps or 0
            return (steps * max(spent[1] - spent[0], 0.0) / 4) / count + _drawing(plan, ())

        return unit

    def _fitted(self, plan: Plan, name: str, row: str, editor: Any, concept: Concept, token: Unit | None) -> Unit:
        """The delta of an editor that erases the words or the token."""
        settled = editor.resolved(plan.world.pipe)
        setting = {"fit": config(settled), "concept": config(concept), "token": token.digest if token else None}
        setting |= {"model": plan.facts["model"], "versions": plan.facts["versions"], "code": code_hash(type(editor))}
        unit = Unit(f"{name} | {row}", setting, lambda: measure(), 1.0, lambda: pilot(), "fit")

        def measure() -> dict[str, Any]:
            with efface.stack(plan.world.pipe, *loaded(plan, token)):
                editor.fit(plan.world.pipe, concept).save(artefact(plan, unit))
            return {}

        def pilot() -> float:
            few = [dataclasses.replace(editor, steps=k) for k in (1, 3)]
            spent = [timed(lambda f=f: f.fit(plan.world.pipe, Concept(name)))[1] for f in few]
            return spent[0] + (settled.steps - 1) * max(spent[1] - spent[0], 0.0) / 2

        return unit

    def _cells(
        self, plan: Plan, name: str, about: Fuzzy, row: str, erasers: tuple[Any, ...], file: Unit | None
    ) -> list[Unit]:
        made = []
        for place, (cell, icons) in enumerate(about.cells.items()):
            first = SEEDS[plan.block].stop - 150_000 + STRIDE * (4 * list(self.concepts).index(name) + place)
            prompts = [plan.world.captions[icons[k % len(icons)]] for k in range(plan.n)]
            numbers = range(first, first + plan.n)
            setting = {
                **plan.facts,
                "concept": name,
                "cell": cell,
                "prompts": prompts,
                "members": list(about.members),
                "seeds": [first, plan.n],
                "erasers": [*map(config, erasers), *([file.digest] if file else [])],
                "code": code_hash(*map(type, erasers), efface.HFI, draw),
            }
            draws = partial(self._there, plan, about, cell, icons, prompts, numbers, erasers, file)
            made.append(Unit(f"{name} | {row}", setting, draws, plan.n, lambda: _drawing(plan, erasers)))
        return made

    @staticmethod
    def _there(
        plan: Plan,
        about: Fuzzy,
        cell: str,
        icons: Sequence[str],
        prompts: Sequence[str],
        numbers: range,
        erasers: tuple[Any, ...],
        file: Unit | None,
    ) -> dict[str, Any]:
        """Per picture: whether it shows a member of the concept, or in other cells the thing that was asked for."""
        with efface.stack(plan.world.pipe, *loaded(plan, file), *erasers):
            images = draw(plan.world.pipe, prompts, numbers, **plan.call)
        seen = plan.world.eyes.icons(images)[JUDGE]
        if cell in MEMBERS:
            there = seen[:, [plan.world.icons[icon] for icon in about.members]].any(-1)
        else:
            asked = [plan.world.icons[icons[k % len(icons)]] for k in range(len(prompts))]
            there = seen[torch.arange(len(asked)), asked]
        return {"there": [int(each) for each in there]}

    # ---- the judged pictures

    def _pool(self, plan: Plan, name: str, about: Fuzzy, count: int) -> Path:
        """A folder with `count` pictures, of which half are for prompts of judged members and near things."""
        facts = [name, count, {k: list(v) for k, v in about.cells.items()}, dict(plan.call), plan.facts["model"]]
        folder = plan.folder / "pools" / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        if not (folder / "whole").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            close = [*about.cells["seen"], *about.cells["near"]]
            left = sorted(set(plan.world.captions) - {*about.members, *close})
            far = random.Random(name).sample(left, len(left))
            turns = zip(itertools.cycle(close), itertools.cycle(far), strict=False)
            icons = list(itertools.islice(itertools.chain.from_iterable(turns), count))
            first = STRIDE * list(self.concepts).index(name)  # tuning seeds
            prompts = [plan.world.captions[icon] for icon in icons]
            images = draw(plan.world.pipe, prompts, range(first, first + count), **plan.call)
            for k, image in enumerate(to_pil(images)):
                image.save(folder / f"{k:04d}.png")
            (folder / "whole").touch()
        return folder

    # ---- the card

    def names(self, units: Sequence[Unit]) -> list[str]:
        return list(dict.fromkeys(unit.row for unit in units if unit.kind == "cell"))

    def rows(self, plan: Plan, found: Sequence[tuple[Unit, dict[str, Any]]]) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = {}
        pictures: dict[str, Any] = {}
        tokens = []
        for unit, each in found:
            setting, raw = unit.setting, each["raw"]
            if unit.kind == "fit":
                if unit.row == "tokens":
                    tokens.append({"concept": setting["concept"], "judgements": setting["judgements"], **raw})
                continue
            row = rows.setdefault(unit.row, {"row": unit.row})
            row[setting["cell"]] = rate(raw["there"], setting["prompts"])
            pictures[f"{unit.row} | {setting['cell']}"] = packed([raw["there"]])
        cells = {
            name: {"prompts": sorted(plan.world.captions[icon] for icons in about.cells.values() for icon in icons)}
            for name, about in self.concepts.items()
        }
        judge = {**plan.facts["detector"], "name": f"the second detector of `{plan.model}`; the first one annotated"}
        return {"rows": list(rows.values()), "pictures": pictures, "tokens": tokens, "cells": cells, "detector": judge}

    def derived(self, card: dict[str, Any]) -> dict[str, Any]:
        """Each token of 200 judgements against the words that leave least, by method; and tokens by judgements."""
        compared, verdict = [], []
        for name, about in self.concepts.items():
            of = self._outcomes(card, name, about)
            for method in dict.fromkeys(row.partition(" | ")[0] for row in of if row != "base"):
                mine = {row: each for row, each in of.items() if row.startswith(f"{method} | ")}
                words = min((row for row in mine if "words" in row), key=lambda row: _mean(mine[row]["left"]))
                token = f"{method} | {said(200, 0.0)}"
                if token not in mine:
                    continue
                found = {"concept": name, "method": method, "words": words.partition(": ")[2]}
                for what, cells in (("left", MEMBERS), ("kept", OTHERS)):
                    clusters = [(cell, k % len(about.cells[cell])) for cell in cells for k in range(card["n"])]
                    gap = difference(of[token][what], of[words][what], clusters)
                    found[what] = {
                        "token": _mean(of[token][what]),
                        "words": _mean(of[words][what]),
                        "difference": gap.value,
                        "interval": list(gap.interval),
                    }
                found["better"] = _better(found["left"]["interval"], found["kept"]["interval"])
                compared.append(found)
                verdict.append(_in_words(found))
            by = [
                f"{row.partition(' | ')[2]}: {100 * _mean(each['left']):.0f} %"
                for row, each in of.items()
                if row.startswith("eiup | ") and "words" not in row
            ]
            verdict.append(f"{name}, members left by EIUP, by what the token was learned from: {'; '.join(by)}.")
        return {"comparisons": compared, "verdict": verdict}

    @staticmethod
    def _outcomes(card: Mapping[str, Any], name: str, about: Fuzzy) -> dict[str, dict[str, list[int]]]:
        """Row to whether a member is left in each picture of members, and whether each other thing is there."""
        of: dict[str, dict[str, list[int]]] = {}
        for what, cells in (("left", MEMBERS), ("kept", OTHERS)):
            for cell in cells:
                for key, (digits,) in card["pictures"].items():
                    concept, _, rest = key.partition(" | ")
                    row, _, at = rest.rpartition(" | ")
                    if (concept, at) == (name, cell):
                        of.setdefault(row, {}).setdefault(what, []).extend(map(int, digits))
        return of


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def _better(left: Sequence[float], kept: Sequence[float]) -> str:
    """What erases more, if it retains no less for sure: "pictures", "words", or "" where the intervals do not say."""
    if left[1] < 0 and kept[1] >= 0:
        return "pictures"
    return "words" if left[0] > 0 and kept[0] <= 0 else ""


def _in_words(found: Mapping[str, Any]) -> str:
    parts = []
    for what, about in (("left", "of the members are left"), ("kept", "of other things are retained")):
        each = found[what]
        low, high = (100 * bound for bound in each["interval"])
        gap = f"{100 * each['difference']:+.0f} points [{low:.0f}, {high:.0f}]"
        parts.append(
            f"{100 * each['token']:.0f} % {about}, with words ({found['words']}) {100 * each['words']:.0f} %, {gap}"
        )
    who = {"pictures": "Pictures beat words.", "words": "Words beat pictures.", "": "The intervals do not decide."}
    first = f"{found['concept']}, {found['method']}: with the token of 200 judgements"
    return f"{first} {'; '.join(parts)}. {who[found['better']]}"


def said(count: int, answers: float | Path) -> str:
    if isinstance(answers, Path):
        return f"{count} judgements, by looking"
    return f"{count} judgements" + (f", {100 * answers:.0f} % wrong" if answers else "")


def word_of(name: str) -> str:
    return efface.HFI().words(Concept(name))[0]


def artefact(plan: Plan, unit: Unit) -> Path:
    path = plan.folder / "fitted" / f"{unit.digest}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def loaded(plan: Plan, unit: Unit | None) -> tuple[Any, ...]:
    return (api.load_delta(artefact(plan, unit)),) if unit else ()


def judged(plan: Plan, folder: Path, name: str, about: Fuzzy, wrong: float) -> Evidence:
    """What the simulated annotator says of each picture of a folder."""
    from efface.pictures import read_picture

    rng, members, given = random.Random(f"{name}, {wrong}"), [plan.world.icons[i] for i in about.members], []
    for item in pool(folder):
        image = torch.frombuffer(bytearray(read_picture(item.path).tobytes()), dtype=torch.uint8).view(1, 64, 64, 3)
        seen = plan.world.eyes.icons(image.permute(0, 3, 1, 2) / 255)[ANNOTATOR, 0, members].any()
        yes = bool(seen) != (rng.random() < wrong)
        facts = ("0" * 64, "", item.row, item.picture, name, "simulated", 1, "yes" if yes else "no")
        given.append(Judgement(*facts, "2026-01-01T00:00:00+00:00", "binary"))
    return Evidence.of(given, name)


def looked(folder: Path, name: str, file: Path) -> Evidence:
    """What people said of each picture of a folder, by its SHA-256.

    Raises:
        ValueError: nobody judged some of these pictures.
    """
    shown = {item.picture for item in pool(folder)}
    with tempfile.TemporaryDirectory() as where, Store(Path(where) / "judged.db") as store:
        load(store, file)
        given = [each for each in store.judgements(concept=name) if each.picture in shown]
    if missing := len(shown - {each.picture for each in given}):
        raise ValueError(
            f"Expected judgements of all {len(shown)} pictures of {folder}, got none of {missing} in {file}. Another "
            f"machine may draw other bits: judge them with `efface feedback collect {folder} --sheets FOLDER`."
        )
    return Evidence.of(given, name)


def _drawing(plan: Plan, erasers: tuple[Any, ...]) -> float:
    """Core-seconds of a picture."""
    known = [each for each in erasers if not any("<" in p for c in each.concepts for p in c.phrases)]
    with efface.stack(plan.world.pipe, *known):  # a token that is not learned yet costs as much as a word
        return timed(lambda: draw(plan.world.pipe, ["a cat"] * PILOT, range(PILOT), **plan.call))[1] / PILOT
