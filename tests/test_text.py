"""Which phrases a pipeline's text encoders can read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import latents, pipeline

import efface
from efface import CCRT, EIUP, ESD, GIE, RECE, SAFREE, SDD, SLD, UCE, Concept, NegativePrompt
from efface._text import encode, unknown

STRANGE = ("☃", "☃ cat", "酒")
RUN_TIME: dict[str, Callable[[Any], Any]] = {
    "eiup": EIUP,
    "eiup separate": lambda concepts: EIUP(concepts, normalization="separate"),
    "gie": GIE,
    "safree": SAFREE,
    "sld": SLD,
    "negative": NegativePrompt,
    "negative with a strength": lambda concepts: NegativePrompt(concepts, 3.0),
}
WHERE = [(family, name) for family in ("bert", "pixart") for name in RUN_TIME]
WHERE += [(family, name) for family in ("sd3", "flux", "cogview4") for name in ("safree", "sld", "negative")]
WHERE.remove(("pixart", "negative with a strength"))  # a family without a known guidance scale


@pytest.mark.parametrize("phrase", STRANGE)
@pytest.mark.parametrize(("family", "name"), WHERE)
def test_a_run_time_method_refuses_a_phrase_of_unknown_characters(family: str, name: str, phrase: str) -> None:
    pipe, apply = tiny.untouched(family), RUN_TIME[name]
    concept = Concept("thing", ("cat", phrase))
    with pytest.raises(ValueError, match=f"(?s){phrase}.* does not know .*Write the phrase in words that the model"):
        apply([concept]).apply(pipe)
    assert "encode_prompt" not in vars(pipe)
    with apply([Concept("cat")]).apply(pipe) as handle:
        if hasattr(handle.eraser, "rows"):
            with pytest.raises(ValueError, match="does not know"):
                handle.rows = [[concept]]
            assert handle.rows is None


@pytest.mark.parametrize("phrase", STRANGE)
@pytest.mark.parametrize("editor", [UCE(), RECE(rounds=1), ESD(steps=1), SDD(steps=1), CCRT(steps=1)])
def test_an_editor_refuses_a_phrase_of_unknown_characters(editor: Any, phrase: str, monkeypatch: Any) -> None:
    """Also of the last of several concepts, before anything is learned."""
    pipe = tiny.untouched("bert")
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=f"{phrase}.* does not know"):
        editor.fit(pipe, [Concept("cat", anchor="dog"), Concept("thing", (phrase,))])


def test_so_are_the_texts_beside_the_phrases(tmp_path: Path) -> None:
    pipe = tiny.untouched("bert")
    for editor, concept in (
        (UCE(), Concept("cat", anchor="☃")),
        (UCE(), Concept("cat", keep=("☃",))),
        (UCE(preserve=("☃",)), Concept("cat")),
        (ESD(steps=1, erase_from="☃"), Concept("cat")),
    ):
        with pytest.raises(ValueError, match="☃.* does not know"):
            editor.fit(pipe, concept)
    with pytest.raises(ValueError, match="☃.* does not know"):
        GIE.fit(pipe, Concept("☃"), [*tiny.WORDS], detector=efface.detector("eyes", "cat"), out=tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["bert", "pixart", "sd3"])
def test_a_prompt_may_have_unknown_characters(family: str) -> None:
    pipe = pipeline(family)
    prompt = "a ☃ and a cat"
    for eraser in (SLD([Concept("cat")], warmup=0.0), SAFREE([Concept("cat")])):
        plain = latents(pipe, prompt)
        with eraser.apply(pipe):
            assert tiny.change(latents(pipe, prompt), plain) > 1e-3
    assert encode(pipe, [prompt]).text.shape == encode(pipe, ["cat"]).text.shape


def test_clip_knows_every_character() -> None:
    """Its unknown token is its end token, which stands behind every text."""
    for family in tiny.FAMILIES:
        pipe = tiny.untouched(family)
        assert pipe.tokenizer.unk_token_id == pipe.tokenizer.eos_token_id
        with EIUP([Concept("☃ cat")]).apply(pipe), NegativePrompt([Concept("☃ cat")]).apply(pipe):
            pass


def test_the_words_that_are_unknown_are_named() -> None:
    words = tiny.untouched("bert").tokenizer
    assert unknown(words, "a ☃ and a 酒 cat") == ["☃", "酒"] and unknown(words, "a cat") == unknown(words, "") == []


def test_every_shipped_phrase_can_be_read_by_the_embedded_model() -> None:
    words = efface.load("emoji").tokenizer
    phrases = [phrase for concept in efface.concepts().values() for phrase in concept.phrases]
    assert len(phrases) > 50 and [phrase for phrase in phrases if unknown(words, phrase)] == []
