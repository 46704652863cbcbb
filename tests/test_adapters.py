"""GIE's adapter on a model of one's choice: what its recipe draws, and when the card calls it worth its fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import modules_of

import efface
from efface.erasers.gie import adapter as adapters
from efface.erasers.gie.adapter import Adapter
from experiments import docs
from experiments.adapters import ROW, Adapted
from experiments.catalogue import CATALOGUE
from experiments.runner import Plan, Unit
from experiments.worlds import SEEDS, World

RECIPE = Path(__file__).parents[1] / "recipes/emoji"
CARD: Any = CATALOGUE["gie_adapter"]
LADDER = {"concepts": ["alcohol"], "strengths": [0.5, 1.0, 2.0], "pictures": 1100, "prompts": 55}
LADDER |= {"losses": {"0": 0.6, "0.5": 0.5, "1": 0.2, "2": 0.4}, "best": {"0": 20, "0.5": 5, "1": 20, "2": 10}}


@pytest.fixture
def recipe() -> Iterator[Any]:
    with modules_of(RECIPE):
        import fit_gie

        yield fit_gie


# ---------------------------------------------------------------- the recipe


@pytest.mark.parametrize("model", ["emoji", "emoji-128"])
def test_the_ladder_is_of_tuning_prompts_with_both_ends_open(recipe: Any, model: str) -> None:
    args, world = recipe.parsed(["--model", model]), World(model)
    for concept in args.concepts:
        texts = recipe.prompts(world, concept, args.prompts)
        assert len(texts) >= 15 and {world.blocks[text] for text in texts} == {"tuning"}
        bystanders = {text for text, _ in world.prompts(concept, "bystander", "tuning")}
        assert 0 < len(bystanders & set(texts)) < len(texts)  # what draws the concept, and what must stay
    assert min(args.strengths) <= 0.125 and max(args.strengths) >= 8
    assert recipe.FIRST_SEED + args.seeds <= SEEDS["tuning"].stop
    assert args.out.parts[-3:] == ({"emoji": "emoji", "emoji-128": "emoji128"}[model], "weights", "gie.safetensors")
    assert all(f"{recipe.named(name).name}" == name for name in args.concepts)


@pytest.mark.parametrize(("losses", "code"), [({}, 0), ({"2": 0.1}, 3), ({"0.5": 0.1}, 3)])
def test_the_recipe_refuses_a_best_strength_at_an_end(
    losses: dict[str, float], code: int, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fit(pipe: Any, concepts: Any, texts: Any, **how: Any) -> None:
        asked.update(how, names=[concept.name for concept in concepts], texts=texts)
        facts = LADDER | {"losses": LADDER["losses"] | losses}
        old = Adapter.load("emoji")
        Adapter(old.net, old.mean, old.std, old.layers, old.model, old.text_encoder, facts).save(how["out"])

    monkeypatch.setattr(efface.GIE, "fit", fit)
    monkeypatch.setattr(recipe, "record", lambda model: pytest.fail("a trial is not the package's"))
    out = tmp_path / "a.safetensors"
    assert recipe.main(["--model", "emoji", "--seeds", "2", "--out", str(out)]) == code
    assert asked["names"] == list(asked["texts"]) == list(asked["detector"]) and list(asked["seeds"]) == [5000, 5001]


def test_an_adapter_of_the_second_model_is_named_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from efface.models import emoji128

    (tmp_path / "model.json").write_text(json.dumps({"version": emoji128.VERSION}))
    for name in (*emoji128.SHARED, *emoji128.FILES["emoji-128"], *emoji128.FILES["emoji-flux"], "gie.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    emoji128.record(tmp_path)
    assert "gie.safetensors" in emoji128.recorded(tmp_path, "emoji-128")
    assert "gie.safetensors" not in emoji128.recorded(tmp_path, "emoji-flux")
    (tmp_path / "gie.safetensors").unlink()
    emoji128.record(tmp_path)
    assert "gie.safetensors" not in emoji128.recorded(tmp_path, "emoji-128")
    monkeypatch.setitem(adapters.SHIPPED, "emoji-128", tmp_path / "gie.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gie\.safetensors is missing. .* fit one with recipes/emoji/fit_gie"):
        efface.GIE("alcohol", adapter="emoji-128")
    with pytest.raises(FileNotFoundError, match=r"name a shipped one \(emoji\)"):
        efface.GIE("alcohol", adapter=tmp_path / "none")


# ---------------------------------------------------------------- the card


@pytest.mark.long
def test_rows_are_the_strengths_of_the_adapters_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan("test", 1, "emoji")
    units = CARD.units(plan)
    facts = Adapter.load("emoji").facts
    assert {unit.row for unit in units} == {"base", ROW, *(f"gie {s:g}" for s in facts["strengths"])}
    digests = {unit.row: unit.digest for unit in units}
    monkeypatch.setattr("experiments.adapters.sha256", lambda content: "another adapter")
    other = {unit.row: unit.digest for unit in CARD.units(plan)}
    assert {row for row in digests if digests[row] != other[row]} == {ROW}


def card(adapter: tuple[str, str], fixed: tuple[str, str], **ladder: Any) -> dict[str, Any]:
    """A card of 8 prompts in 4 pictures each: residual and retention of the adapter, and of strength 1."""
    found = []
    rows = {"base": ("2" * 32, "1" * 32), "gie 1": fixed, ROW: adapter}
    for row, (digits, kept) in rows.items():
        for concept in ("alcohol", "cat"):
            eyes, retained = ([[int(c) for c in text]] * 2 for text in (digits, kept))
            prompts = [f"{concept} {k % 8}" for k in range(32)]
            setting = {"concept": concept, "cell": "pair", "prompts": prompts, "seeds": [0, 32], "erasers": []}
            raw = {"outcome": eyes, "retained": retained, "object": retained}
            found.append((Unit(row, setting, dict, 1.0, float), {"raw": raw}))
    made = super(Adapted, CARD).rows(Plan("test", 32, "emoji"), found) | {"ladder": LADDER | ladder}
    return made | CARD.derived(made)


def test_the_verdict_says_when_the_adapter_is_worth_its_fit() -> None:
    good, bad = ("0" * 32, "1" * 32), ("2" * 32, "0" * 32)
    words = {
        (good, bad): "The adapter is worth its fit.",
        (bad, good): "The fixed strength does better, so the adapter is not worth its fit.",
        (("0" * 32, "0" * 32), ("2" * 32, "1" * 32)): "It pays only where residual counts more than retention.",
        (good, good): "Without one, the fixed strength is the choice, for it needs no fit.",
    }
    for (adapter, fixed), verdict in words.items():
        lines = card(adapter, fixed)["verdict"]
        assert len(lines) == 4 and all(line.endswith(verdict) for line in lines[:3]), lines
        assert [line.partition(":")[0] for line in lines[:3]] == [
            "All concepts",
            "Concepts of its fit",
            "Other concepts",
        ]
        assert "1,100 pictures" in lines[3] and "Of 35 prompts that did best with a strength, 10 did" in lines[3]
    found = card(good, bad)["comparisons"]
    primary = [each for each in found if "p, Holm" not in each]
    assert {(e["row"], e["against"], e["metric"]) for e in primary} == {
        (ROW, "gie 1", m) for m in ("residual", "retention")
    }
    assert {each["difference"] for each in primary} == {-1.0, 1.0}


def test_there_is_no_verdict_where_the_ladder_ends_at_its_best() -> None:
    good, bad = ("0" * 32, "1" * 32), ("2" * 32, "0" * 32)
    (line,) = card(good, bad, losses={"0": 0.6, "0.5": 0.5, "1": 0.2})["verdict"]
    assert line.startswith("No verdict on the adapter. Expected the best fixed strength inside") and "worth" not in line
    (old,) = card(good, bad, losses={})["verdict"]
    assert "got one without. Fit it again with GIE.fit." in old


def test_the_page_names_the_cards_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/gie_adapter.json").write_text('{"date": "of an earlier runner"}')
    first, second = "`python -m experiments gie_adapter`", "`python -m experiments gie_adapter --model emoji-128`"
    assert docs.adapters(tmp_path) == f"Without a card so far: {first}, {second}."
