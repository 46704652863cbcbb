"""The card `directions`: what is asked for, what a ratio means, and a verdict that controls and ruins can turn."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import efface
from experiments import directions, docs, runner, shares, tables
from experiments.catalogue import CATALOGUE
from experiments.directions import MEASURED, WORDINGS, Directed
from experiments.neighbours import FIRST as NEIGHBOURS
from experiments.runner import Plan, Unit
from experiments.shares import OTHERS, PEOPLE, SAFETY, spread
from experiments.worlds import CELLS, CONCEPTS, SEEDS, seeds, world

EACH: Any = CATALOGUE["directions"]
JOBS = ("doctor", "cook")


@functools.cache
def units() -> list[Unit]:
    return EACH.units(Plan(EACH.block, EACH.n, EACH.model))


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize("block", ["tuning", "selection", "test"])
def test_a_missing_wording_is_refused(block: str) -> None:
    with pytest.raises(ValueError, match="Expected wordings for each block"):
        dataclasses.replace(EACH, wordings={**WORDINGS, block: ()})


@pytest.mark.parametrize("text", ["a {}", "one {}", "this is a {}", "a doctor"])
def test_a_wording_of_the_fit_or_of_another_block_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Expected wordings for each block"):
        dataclasses.replace(EACH, wordings={**WORDINGS, "test": (*WORDINGS["test"], text)})


def test_the_tuning_block_shares_neither_a_prompt_nor_a_seed_with_what_is_reported() -> None:
    prompts: dict[str, set[str]] = {"tuning": set(), "cell": set()}
    numbers: dict[str, set[int]] = {"tuning": set(), "cell": set()}
    for unit in units():
        first, n = unit.setting.get("seeds", (0, 0))
        at = "cell" if unit.kind == "cell" else "tuning"
        numbers[at] |= set(range(first, first + n))
        prompts[at] |= set(unit.setting.get("asked", {}).get("prompts", ()))
    assert prompts["tuning"] and not prompts["tuning"] & prompts["cell"]
    assert max(numbers["tuning"]) < SEEDS["tuning"].stop and numbers["cell"] <= set(SEEDS["test"])
    learned = {text for unit in units() if "concepts" in unit.setting for text in unit.setting["fit"]["neutral"]}
    assert learned & prompts["cell"] == {f"a {job}" for job in EACH.jobs(world(EACH.model))}  # the cell `alone`


def test_people_have_seeds_of_their_own() -> None:
    taken = {s for c in CONCEPTS for cell in CELLS for s in seeds("tuning", c, cell, 280)}
    measured = {s for unit in units() if "rounds" in unit.setting for s in range(unit.setting["seeds"][0], 10_000)}
    ladder = {
        unit.setting["seeds"][0]: unit.setting["cell"]
        for unit in units()
        if unit.kind == "tuning" and unit.setting["cell"] in PEOPLE
    }
    assert min(ladder) > max(taken) and max(ladder) + EACH.few * 6 <= min(measured) and len(ladder) == 2
    behind = seeds("test", CONCEPTS[-1], CELLS[-1], 20_000).stop
    of_people = [u.setting["seeds"] for u in units() if u.kind == "cell" and u.setting["cell"] in PEOPLE]
    ranges = sorted({(first, first + n) for first, n in of_people})
    assert behind <= ranges[0][0] and ranges[-1][1] <= SEEDS["test"].start + NEIGHBOURS["test"]
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ranges)) and len(ranges) == 3
    with pytest.raises(
        ValueError, match="Expected at most 10000 pictures of a cell, got 10200. More would share seeds"
    ):
        EACH.units(Plan(EACH.block, 1700, EACH.model))
    assert 10_000 - min(measured) >= 6 * MEASURED


def test_rows_are_paired_and_a_rewritten_prompt_names_a_gender() -> None:
    of = {(u.row, u.setting["cell"]): u.setting for u in units() if u.kind == "cell"}
    for (_, cell), setting in of.items():
        assert setting["seeds"] == of["base", cell]["seeds"] and setting["asked"] == of["base", cell]["asked"]
    base, new = of["base", "pair"]["prompts"], of["rewriting", "pair"]["prompts"]
    women = [text for text in new if " female " in text]
    assert len(women) + sum(" male " in text for text in new) == len(new) and 0.3 < len(women) / len(new) < 0.7
    assert [text.replace(" female", "").replace(" male", "") for text in new] == base
    assert directions.rewritten("a cat", "", 1) == "a cat"


def test_the_settings_of_a_vector_name_what_its_strength_was_chosen_by() -> None:
    """So a new fit, or a new ladder, is drawn anew."""
    row = next(u for u in units() if (u.row, u.kind) == ("directions", "cell"))
    fit = next(u for u in units() if (u.row, u.kind) == ("directions", "fit"))
    ladder = [u.digest for u in units() if (u.row, u.kind) == ("directions", "tuning")]
    assert row.setting["acting"] == {"vectors": fit.digest, "random": False, "strength": ladder}
    assert len(ladder) == 3 * len(EACH.strengths["directions"])


# ---------------------------------------------------------------- what is seen


def test_the_surer_icon_of_the_asked_profession_decides() -> None:
    where = world("emoji")
    man, woman, other = (where.icons[icon] for icon in ("man-cook", "woman-cook", "man-teacher"))
    seen = torch.zeros(2, 5, len(where.icons))
    seen[:, 0, man], seen[:, 1, woman], seen[:, 2, man], seen[:, 2, woman] = 0.9, 0.9, 0.9, 0.8
    seen[:, 3, other] = 0.9
    eyes = SimpleNamespace(see=lambda images: SimpleNamespace(icons=seen), icons=lambda images: seen > 0.5)
    fake: Any = SimpleNamespace(eyes=eyes, icons=where.icons, data=where.data)
    told = directions.genders(fake, torch.zeros(5), ["cook", "cook", "cook", "cook", ""])
    assert told == [[0, 1, 0, -1, -1]] * 2
    kept = directions.retained(fake, torch.zeros(5), [("man-cook",), (), ("man-cook", "man-teacher"), (), ()])
    assert kept == [[1, -1, 0, -1, -1]] * 2


def test_random_vectors_have_the_norms_of_the_learned_ones() -> None:
    two = (efface.Concept("x"), efface.Concept("y"))
    vectors = {"unet.mid_block": torch.stack([torch.ones(4, 2, 2), 3 * torch.ones(4, 2, 2)])}
    learned = efface.Directions(vectors, two)
    (new,) = directions.of_equal_norm(learned).vectors.values()
    (old,) = vectors.values()
    assert torch.allclose(new.flatten(1).norm(dim=1), old.flatten(1).norm(dim=1))
    assert float(torch.cosine_similarity(new.flatten(1), old.flatten(1)).abs().max()) < 0.8


# ---------------------------------------------------------------- ratios


def of_shares(*women: float, n: int = 96) -> dict[str, tuple[list[int], list[str]]]:
    """Professions with these shares of women, each over six prompts."""
    return {
        f"job {j}": ([int(k < p * n) for k in range(n)], [f"{k % 6}" for k in range(n)]) for j, p in enumerate(women)
    }


def test_opposite_biases_do_not_cancel() -> None:
    assert spread(of_shares(0.0, 1.0))["rate"] == 1.0 and spread(of_shares(0.5, 0.5))["rate"] == 0.0
    assert spread(of_shares(0.25, 0.75))["rate"] == spread(of_shares(0.25))["rate"] == 0.5
    assert spread({"job": ([], []), **of_shares(0.5)})["rate"] == 0.5  # a profession that is never drawn counts as 1


def test_chance_is_what_fair_draws_have() -> None:
    fair = np.random.default_rng(1).binomial(25, 0.5, 4000)
    simulated = float(np.abs(2 * fair / 25 - 1).mean())
    assert abs(spread(of_shares(0.5, n=25))["chance"] - simulated) < 0.01 and 0.15 < simulated < 0.17


@pytest.mark.parametrize("share", [0.5, 0.6, 0.9, 0.99])
def test_its_interval_holds_the_ratio(share: float) -> None:
    """Six professions of 96 pictures over six prompts, whose shares vary; in 95 % of cards, less three errors."""
    rng, truth, inside, cards = np.random.default_rng(2), abs(2 * share - 1), 0, 60
    for _ in range(cards):
        of = {}
        for job in range(6):
            spots = np.clip(rng.normal(share, 0.03, 6), 0, 1) if share < 0.95 else np.full(6, share)
            of[str(job)] = ([int(rng.random() < spots[k % 6]) for k in range(96)], [str(k % 6) for k in range(96)])
        low, high = spread(of, draws=300)["interval"]
        inside += low <= truth <= high
    assert inside / cards >= 0.95 - 3 * (0.95 * 0.05 / cards) ** 0.5


# ---------------------------------------------------------------- the verdict

N = 300  # pictures of a cell
MEN, WOMEN, HALF, NOBODY = "0" * N, "1" * N, "0011" * (N // 4), "-" * N
HERE, GONE = "1" * N, "0" * N


def drawn(gender: str = MEN, others: str = HERE, pair: str = NOBODY, alcohol: str = "2" * N) -> dict[str, Any]:
    """Raw outcomes of a row. The men and women of half-and-half pictures go over both professions."""
    cells: dict[str, Any] = {cell: {"gender": gender, "retained": NOBODY} for cell in PEOPLE[:2]}
    cells |= {"pair": {"gender": pair, "retained": HERE}, OTHERS: {"gender": NOBODY, "retained": others}}
    return cells | {cell: {"outcome": alcohol, "retained": NOBODY} for cell in SAFETY}


def card_of(**rows: dict[str, Any]) -> Any:
    """The card of given outcomes; underscores are spaces. What the tuning block had is the same for all strengths."""
    found = []

    def add(row: str, cell: str, raw: dict[str, str], tuning: float | None = None) -> None:
        jobs = JOBS if cell in PEOPLE else ("",)
        some = 19 if cell in PEOPLE[:2] else 99
        prompts = tuple(f"{cell} {job} {k}" for k in range(some) for job in jobs)
        asked = {"prompts": prompts, "jobs": jobs * some, "keep": ((),) * len(prompts)}
        setting = {"cell": cell, "asked": asked, "seeds": [0, N], "acting": [], "tuning": tuning}
        eyes = {source: [[-1 if d == "-" else int(d) for d in digits]] * 2 for source, digits in raw.items()}
        unit = Unit(row, setting, dict, N, lambda: 0.0, "cell" if tuning is None else "tuning")
        found.append((unit, {"raw": eyes}))

    for row, strength in (("base", 0.0), ("directions", 1.0), ("safety vector", 1.0)):
        for cell in dict.fromkeys(c for name, of in directions.TUNED.items() if row in ("base", name) for c in of):
            add(row, cell, drawn()[cell], strength)
    for row, cells in {"base": drawn(), **rows}.items():
        which = {"base": cells}.get(row, (*SAFETY, OTHERS) if "safety" in row else (*PEOPLE, OTHERS))
        for cell in which:
            add(row.replace("_", " "), cell, cells[cell])
    card = EACH.rows(Plan("test", N), found)
    return card | EACH.derived(card)


def line(card: Any, *starts: str) -> str:
    (found,) = (each for each in card["verdict"] if each.startswith(starts))
    return found


def test_the_verdict_says_what_was_met() -> None:
    card = card_of(directions=drawn(HALF), uce=drawn("0111" * (N // 4)), rewriting=drawn(WOMEN))
    met, missed, turned = (line(card, f"{row}") for row in ("directions (strength 1):", "uce:", "rewriting:"))
    assert "directions (strength 1): deviation ratio 0.0 %" in met and "base model 100.0 %" in met
    assert "Aim <= 10 %: met" in met and "fair draws of as many pictures have 4.6 % by chance" in met
    assert "deviation ratio 50.0 %" in missed and "missed by 40.0 points" in missed
    assert "deviation ratio 100.0 %" in turned  # all are women now
    assert "Not judged in `pair`" in line(card, "Not judged") and "doctor (0 %), cook (0 %)" in line(card, "Not judged")


@pytest.mark.parametrize(
    ("lost", "words"), [(0, ", met."), (6, "met, but the interval is beyond"), (30, "missed by 2.0 points")]
)
def test_lost_icons_are_counted_against_the_base_model(lost: int, words: str) -> None:
    others = "0" * lost + "1" * (N - lost)
    found = line(card_of(directions=drawn(HALF, others)), "directions (strength")
    assert f"Other icons: {-100 * lost / (2 * N):+.1f} points".replace("-0.0", "+0.0") in found and words in found


@pytest.mark.long
def test_a_control_that_does_as_much_is_named() -> None:
    """And one that does nothing is not in the way."""
    card = card_of(directions=drawn(HALF), random_vectors=drawn(HALF), neutral_vectors=drawn(MEN))
    said = [each for each in card["verdict"] if "its control" in each]
    assert "directions is not shown to do more than its control, random vectors: the majority +0.0 points" in said[0]
    assert "directions draws the majority less often than its control, neutral vectors: -50.0 points" in said[1]
    safe = card_of(safety_vector=drawn(alcohol="20" * (N // 2)), random_safety_vector=drawn(alcohol="02" * (N // 2)))
    (said_,) = (each for each in safe["verdict"] if "its control" in each)
    assert "safety vector is not shown to do more than its control, random safety vector: alcohol +0.0" in said_
    safe = card_of(safety_vector=drawn(alcohol="1" * N), random_safety_vector=drawn())
    assert "draws alcohol less often than its control, random safety vector: -100.0 points" in " ".join(safe["verdict"])
    assert "alcohol in 0.0 % [" in line(safe, "safety vector (strength 1):")
    alone = card_of(directions=drawn(HALF))
    assert "directions was not compared with its control, random vectors." in alone["verdict"]


def test_ruined_pictures_are_no_balance() -> None:
    card = card_of(directions=drawn(NOBODY, others=GONE))
    row = card["rows"][1]
    assert row["deviation"]["rate"] == 1.0 and row["person"]["rate"] == 0.0 and row["deviation"]["n"] == 0
    assert "Aim <= 10 %: not judged, n = 0, 512 are needed" in line(card, "directions (strength 1):")


def test_the_less_favourable_detector_counts() -> None:
    card = card_of(directions=drawn(HALF))
    pictures = copy.deepcopy(card["pictures"])
    for cell in PEOPLE[:2]:
        pictures["directions"][cell]["gender"][1] = MEN
    pictures["directions"][OTHERS]["retained"][0] = "0" * 30 + "1" * (N - 30)
    row = shares.figures(card["cells"], pictures["directions"], False)
    assert row["deviation"]["rate"] == 1.0 and row[OTHERS]["rate"] == 0.9
    lost = shares.compare(("directions", "base", "kept"), card["cells"], pictures)
    more = shares.compare(("directions", "base", "majority"), card["cells"], pictures)
    assert lost and lost["difference"] == -0.05 and more and more["difference"] == 0.0


def test_the_weakest_loss_of_balance_is_chosen_that_keeps_other_icons() -> None:
    def at(left: float, kept: float) -> dict[str, Any]:
        return {"residual": {"rate": left}, "retention": {"rate": kept}}

    assert shares.choice({0.0: at(1, 0.9), 0.5: at(0.8, 0.9), 1.0: at(0.1, 0.86), 2.0: at(0.0, 0.5)}) == 1.0


def test_the_documents_show_the_card_and_say_if_there_is_none(tmp_path: Path) -> None:
    assert docs.directed(tmp_path) == "Without a card so far: `python -m experiments directions`."
    card = card_of(directions=drawn(HALF), safety_vector=drawn(alcohol="1" * N))
    head = {"model": {"name": "emoji"}, "detector": {"name": "eyes"}, "code": {"commit": "0" * 40}, "machine": "one"}
    head |= {
        "core_hours": {"spent": 1, "estimate": 1, "cap": 1},
        "date": "2026-01-01",
        "block": "test",
        "n": N,
        "form": 2,
    }
    card = head | card | {"question": "Is it fair?", "command": "a command", "columns": dict(EACH.columns)}
    (tmp_path / "results").mkdir()
    (tmp_path / "results/directions.json").write_text(json.dumps(card))
    text = docs.directed(tmp_path)
    assert "Is it fair?" in text and "| `directions` | 0.0 % [" in text and "| `safety vector` | 100.0 % [" in text
    assert "| `base` | 0 of 300 | 0 of 300 |" in text and "| `directions` | 150 of 300 | 150 of 300 |" in text
    assert "`safety vector`" in tables.of_card(card)


# ---------------------------------------------------------------- from end to end


STRENGTHS = {"directions": (1.0,), "safety vector": (1.0,)}


def small(**more: Any) -> Directed:
    fit = efface.LatentDirections(pictures=2, steps=1, batch=2, sampler_steps=1)
    about: dict[str, Any] = {
        "name": "trial",
        "question": "?",
        "cap": 1.0,
        "fit": fit,
        "strengths": STRENGTHS,
        "rounds": 1,
    }
    return Directed(**about | {"professions": JOBS, "few": 1, "n": 1} | more)


@pytest.mark.long
def test_a_run_that_was_cut_goes_on_to_the_whole_card(tmp_path: Path) -> None:
    trial = small()
    plan = Plan("test", 1, folder=tmp_path, call={"num_inference_steps": 1, "guidance": 7.5})
    seen: list[str] = []

    def cut(text: str) -> None:
        seen.append(text)
        if len(seen) == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(trial, plan, tmp_path / "card.json", "a command", say=cut)
    whole, rest = int(seen[0].split()[1]), list[str]()
    card = runner.run(trial, plan, tmp_path / "card.json", "a command", say=rest.append)
    assert card is not None and len(rest) == whole - 29  # nothing is measured twice
    assert [row["row"] for row in card["rows"]] == trial.names(trial.units(plan))
    assert card["chosen"] == {"directions": 1.0, "safety vector": 1.0} and len(card["rows"]) == 9
    assert {len(row["fits"]) for row in card["rows"] if "fits" in row} == {1, 2} and card["verdict"]
    assert "`uce`" in tables.of_card(card)


def test_a_choice_waits_for_its_ladder(tmp_path: Path) -> None:
    plan = Plan("test", 1, folder=tmp_path)
    steps, chosen = small()._ladder(
        plan, "directions", units()[-1], {c: units()[0] for c in directions.TUNED["directions"]}
    )
    assert len(steps) == 3
    with pytest.raises(ValueError, match="Expected all strengths of directions to be measured"):
        chosen()
