"""Proposals of phrases: what they are computed from, and that nothing is added without a person."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import pytest
import torch
from tiny import ALCOHOL, pipeline
from torch import Tensor
from typer.testing import CliRunner

import efface
from efface import Concept, propose_phrases
from efface.cli import app
from efface.erasers._anchors import THINGS

TEXTS = ("the pub", "a red moon", "a dog", "beer", "big wine", "a wine glass")


@functools.cache
def emoji() -> Any:
    pipe = efface.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mean_state(pipe: Any, text: str) -> Tensor:
    """Of the tokens between start and end."""
    ids = pipe.tokenizer(text).input_ids
    with torch.no_grad():
        states = pipe.encode_prompt(text, pipe.device, 1, False)[0][0]
    return states[1 : len(ids) - 1].double().mean(0)


def test_a_proposal_is_what_its_formula_says(sd1: Any) -> None:
    ordinary = torch.stack([mean_state(sd1, text) for text in THINGS]).mean(0)

    def meaning(text: str) -> Tensor:
        found = mean_state(sd1, text) - ordinary
        return found / found.norm()

    own = torch.stack([meaning(phrase) for phrase in ALCOHOL.phrases], 1)
    want = {}
    for text in TEXTS:
        m = meaning(text)
        want[text] = (own.T @ m).amax(), (own @ torch.linalg.pinv(own) @ m).square().sum()
    found = propose_phrases(sd1, ALCOHOL, texts=TEXTS, least=-1, most_covered=1)
    known = {"beer"} & {*ALCOHOL.phrases}
    assert {each.phrase for each in found} == {*TEXTS} - known - {*ALCOHOL.phrases}
    for each in found:
        assert (each.cosine, each.covered) == pytest.approx([float(x) for x in want[each.phrase]], abs=1e-5)
        assert each.nearest in ALCOHOL.phrases and each.covered >= each.cosine**2 - 1e-5
    assert [each.cosine for each in found] == sorted((each.cosine for each in found), reverse=True)
    middle = found[len(found) // 2]
    fewer = propose_phrases(sd1, ALCOHOL, texts=TEXTS, least=middle.cosine, most_covered=1)
    assert 0 < len(fewer) < len(found) and fewer == found[: len(fewer)]
    assert propose_phrases(sd1, ALCOHOL, texts=TEXTS, least=-1, most_covered=1, n=2) == found[:2]
    least = min(found, key=lambda each: each.covered).covered
    assert len(propose_phrases(sd1, ALCOHOL, texts=TEXTS, least=-1, most_covered=least)) == 1


def test_words_of_the_vocabulary_are_proposed_but_not_what_the_concept_has(sd1: Any) -> None:
    found = {each.phrase for each in propose_phrases(sd1, Concept("pub", ("pub", "night")), least=-1, most_covered=1)}
    assert {"beer", "dog", "moon"} <= found and not {"pub", "night"} & found
    kept = Concept("pub", ("pub",), keep=("Beer",))
    assert "beer" not in {each.phrase for each in propose_phrases(sd1, kept, least=-1, most_covered=1)}
    spanned = propose_phrases(sd1, Concept("beer", ("beer", "a dog")), texts=("beer!", "the moon"), least=-1)
    assert all(each.covered <= 0.95 for each in spanned)


def test_nothing_is_added() -> None:
    pipe = pipeline()
    mine = Concept("pub", ("pub",))
    before = dataclasses.astuple(mine), efface.concept("alcohol")
    assert propose_phrases(pipe, mine, least=-1)
    assert (dataclasses.astuple(mine), efface.concept("alcohol")) == before


def test_what_cannot_be_asked_is_refused(sd1: Any) -> None:
    for wrong, message in (
        ({"n": 0}, "`n`"),
        ({"least": 2}, "`least`"),
        ({"most_covered": -1}, "`most_covered`"),
        ({"texts": ("beer " * 20,)}, "tokens long"),
    ):
        with pytest.raises(ValueError, match=message):
            propose_phrases(sd1, ALCOHOL, **wrong)
    with pytest.raises(TypeError, match="sequence of texts"):
        propose_phrases(sd1, ALCOHOL, texts="beer")
    with pytest.raises(ValueError, match="not a shipped concept"):
        propose_phrases(sd1, "alcohool")
    with pytest.raises(ValueError, match="one concept"):
        propose_phrases(sd1, ["cat", "dog"])  # type: ignore[arg-type]


def test_the_encoder_of_emoji_knows_members_that_no_phrase_names() -> None:
    """Words of the concept come before words of other things, and other things are left out."""
    members = ("headstone", "grave", "cemetery", "zombie")
    others = ("rocket", "pizza", "guitar", "laptop", "banana")
    found = propose_phrases(emoji(), "death", texts=(*members, *others))
    names = [each.phrase for each in found]
    assert {*names} <= {*members} and {"headstone", "grave"} <= {*names}
    assert next(each.nearest for each in found if each.phrase == "headstone") == "gravestone"


def test_the_command_prints_what_the_function_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efface.cli.concept.load", lambda model, loading: emoji())
    argv = ["concept", "propose", "death", "--text", "grave", "--text", "pizza"]
    told = CliRunner().invoke(app, [*argv, "--json"])
    (found,) = propose_phrases(emoji(), "death", texts=("grave", "pizza"))
    assert told.exit_code == 0 and json.loads(told.stdout) == [dataclasses.asdict(found)]
    assert "grave" in CliRunner().invoke(app, [*argv, "--format", "csv"]).stdout
    own = CliRunner().invoke(app, ["concept", "propose", "mine", "--phrase", "grave", "--text", "grave"])
    assert own.exit_code == 0 and "No text is like" in own.stdout
