"""Tokens: new words with learned embeddings, which change nothing else; and their training."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from test_training import assert_as_found, everything
from tiny import CAT, latents
from torch import Tensor
from transformers import CLIPTokenizer
from typer.testing import CliRunner

import efface
from efface import Concept, NegativePrompt, Tokens
from efface._text import encode, read, readers
from efface.attacks._vocabulary import whole_words
from efface.cli import app
from efface.delta import present, words
from efface.delta.embeddings import Substitute, mean_row, optimiser, substituted, tables
from efface.delta.tokens import learning_words
from efface.testing.drawing import differences, snapshot
from efface.testing.tiny.parts import text_model

pytestmark = pytest.mark.thinned("long")

WORD = "<pet-1>"


@pytest.fixture
def pipe() -> Any:
    """A pipeline of the test alone."""
    return tiny.pipeline("sd1")


def made(pipe: Any, like: str = "cat", new: Sequence[str] = (WORD,), **facts: Any) -> Tokens:
    """New words with the embedding of a known one."""
    return Tokens.fitted(None, pipe, mean_row(pipe, like, len(new)), new, CAT, **facts)


def ids(pipe: Any, text: str) -> dict[str, list[int]]:
    return {name: list(getattr(pipe, name)(text).input_ids) for name in readers(pipe)}


def hooks(pipe: Any) -> list[Any]:
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    found = [hook for m in modules for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return [hook for hook in found if isinstance(getattr(hook, "__self__", None), Substitute)]


# ---------------------------------------------------------------- on a pipeline


@pytest.mark.parametrize("family", tiny.EACH)
def test_a_word_with_the_embedding_of_another_draws_the_same_and_leaves_no_trace(family: str) -> None:
    pipe = tiny.pipeline(family)
    cat, other = latents(pipe, "a cat at the pub"), latents(pipe, f"a {WORD} at the pub")
    before, tokenizers, read_before = snapshot(pipe), [getattr(pipe, n) for n in readers(pipe)], ids(pipe, f"a {WORD}")
    assert tiny.change(other, cat) > 0.01
    with made(pipe).apply(pipe):
        assert torch.equal(latents(pipe, f"a {WORD} at the pub"), cat)
        if family == "sd1":  # CLIP's tokenizer does not see capitals
            assert torch.equal(latents(pipe, f"a {WORD.upper()} at the pub"), cat)
        assert torch.equal(latents(pipe, "a cat at the pub"), cat)
    assert differences(snapshot(pipe), before) == [] and hooks(pipe) == []
    assert all(getattr(pipe, n) is each for n, each in zip(readers(pipe), tokenizers, strict=True))
    assert ids(pipe, f"a {WORD}") == read_before
    assert torch.equal(latents(pipe, f"a {WORD} at the pub"), other)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3"])
def test_negative_prompts_and_concepts_read_the_words(family: str) -> None:
    pipe = tiny.pipeline(family)
    plain, wanted = latents(pipe), latents(pipe, negative_prompt="cat")
    phrase, eraser = Concept("animal", [f"a {WORD}"]), NegativePrompt(Concept("animal", ["a cat"]))
    with eraser.apply(pipe):
        erased = latents(pipe)
    assert tiny.change(wanted, plain) > 0.001 and tiny.change(erased, plain) > 0.001
    with made(pipe).apply(pipe):
        assert torch.equal(latents(pipe, negative_prompt=WORD), wanted)
        with NegativePrompt(phrase).apply(pipe):
            assert torch.equal(latents(pipe), erased)


def test_the_phrase_of_an_eraser_may_hold_a_word_and_keeps_it(pipe: Any) -> None:
    with efface.EIUP(Concept("c", ["a cat"])).apply(pipe):
        erased = latents(pipe, "a cat")
    on = made(pipe).apply(pipe)
    with efface.EIUP(Concept("c", [f"a {WORD}"])).apply(pipe):
        assert torch.equal(latents(pipe, "a cat"), erased)
        with pytest.raises(ValueError, match="EIUP on this pipeline reads the word '<pet-1>'"):
            on.remove()
        assert on.active and torch.equal(latents(pipe, "a cat"), erased)
    on.remove()
    with pytest.raises(ValueError, match="Expected the learned word '<pet-1>' to be on this pipeline"):
        efface.EIUP(Concept("c", [f"a {WORD}"])).apply(pipe)  # the model would read its letters


def legacy() -> tuple[Any, CLIPTokenizer]:
    """A pipeline whose CLIP is like the published ones: the end token has the largest id, the config names id 2."""
    pipe, old = tiny.pipeline("sdxl"), tiny.tokenizer()
    vocab, (end, last) = old.get_vocab(), ("<|endoftext|>", max(old.get_vocab(), key=old.get_vocab().__getitem__))
    vocab[end], vocab[last] = vocab[last], vocab[end]
    merges = [tuple(pair) for pair in json.loads(old._tokenizer.to_str())["model"]["merges"]]
    tokens = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=tiny.LIMIT, pad_token=end)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        encoder = text_model(tokens, 24, type(pipe.text_encoder_2))
    encoder.config.eos_token_id = encoder.text_model.eos_token_id = 2
    pipe.tokenizer_2, pipe.text_encoder_2 = tokens, encoder
    return pipe, tokens


def test_old_clip_configs_pool_the_end_token_and_not_the_word_with_the_largest_id() -> None:
    pipe, tokens = legacy()
    plain = encode(pipe, ["a cat at the pub"])
    assert plain.pooled is not None and tiny.change(encode(pipe, ["a dog at the pub"]).pooled, plain.pooled) > 0.01
    on = made(pipe).apply(pipe)
    row = torch.tensor(pipe.tokenizer_2("a cat at the pub").input_ids)
    new = torch.tensor(pipe.tokenizer_2(f"a {WORD} at the pub").input_ids)
    assert int(row.argmax()) == len(row) - 1 and int(new.argmax()) == 2  # the trap is set: the new id is the largest
    same = encode(pipe, [f"a {WORD} at the pub"])
    assert torch.equal(same.pooled, plain.pooled) and torch.equal(same.text, plain.text)
    on.remove()
    assert pipe.tokenizer_2 is tokens


def test_several_tokens_come_and_go_in_any_order(pipe: Any) -> None:
    one, two = made(pipe), made(pipe, "dog", ("<a>", "<b>"))
    cat, dog = latents(pipe, "a cat"), latents(pipe, "a dog")
    first, second = one.apply(pipe), two.apply(pipe)
    delta = efface.UCE().fit(tiny.pipeline("sd1"), CAT).apply(pipe)
    assert [type(h.eraser).__name__ for h in efface.active(pipe)] == ["Tokens", "Tokens", "Delta"]
    assert present(pipe)["tokens"] == [one.hash, two.hash]
    delta.remove()
    first.remove()
    assert torch.equal(latents(pipe, "a <b>"), dog) and not torch.equal(latents(pipe, f"a {WORD}"), cat)
    again = one.apply(pipe)
    second.remove()
    assert torch.equal(latents(pipe, f"a {WORD}"), cat)
    again.remove()
    assert hooks(pipe) == [] and "tokens" not in present(pipe) and len(efface.active(pipe)) == 0


def test_a_copy_of_the_pipeline_has_the_words_for_itself(pipe: Any) -> None:
    cat, other = latents(pipe, "a cat"), latents(pipe, f"a {WORD}")
    on = made(pipe).apply(pipe)
    copied = copy.deepcopy(pipe)
    on.remove()
    assert torch.equal(latents(copied, f"a {WORD}"), cat) and torch.equal(latents(pipe, f"a {WORD}"), other)
    efface.active(copied).remove()
    assert torch.equal(latents(copied, f"a {WORD}"), other) and hooks(copied) == []


def test_pipelines_with_common_encoders(pipe: Any) -> None:
    earlier = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    read_before = ids(pipe, f"a {WORD}")
    on = made(pipe).apply(pipe)
    later = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert ids(earlier, f"a {WORD}") == read_before != ids(later, f"a {WORD}") == ids(pipe, f"a {WORD}")
    with pytest.raises(ValueError, match="shared with another pipeline that has new words"):
        made(tiny.untouched("sd1"), new=("<other>",)).apply(earlier)
    more = made(pipe, new=("<other>",)).apply(later)
    assert ids(pipe, "<other>") == ids(later, "<other>") and len(efface.active(pipe)) == 2
    on.remove()
    more.remove()
    for each in (pipe, earlier, later):  # no pipeline is left with ids that the encoder lacks
        assert ids(each, f"a {WORD}") == read_before
        encode(each, ["a <other>"[:12]])
    assert pipe.tokenizer is earlier.tokenizer is later.tokenizer


def test_other_code_that_adds_words_is_found(pipe: Any) -> None:
    on = made(pipe).apply(pipe)
    pipe.tokenizer.add_tokens("<textual-inversion>")
    with pytest.raises(RuntimeError, match=r"Expected token ids below 64 or of new words, got 65\. Other code changed"):
        latents(pipe, "a <textual-inversion>")
    on.remove()
    assert "<textual-inversion>" not in pipe.tokenizer.get_vocab()


def test_rows_of_an_attack_and_new_words_act_together(pipe: Any) -> None:
    """Both replace embeddings in one encoder call, in any order of their hooks."""
    plain, wanted = encode(pipe, [f"a {WORD} and red"]).text, encode(pipe, ["a cat and dog"]).text
    ids, rows = (
        {"tokenizer": torch.tensor(pipe.tokenizer("red", add_special_tokens=False).input_ids)},
        mean_row(pipe, "dog"),
    )
    assert tiny.change(plain, wanted) > 0.01
    with made(pipe).apply(pipe), substituted(pipe, ids, rows):
        assert torch.equal(encode(pipe, [f"a {WORD} and red"]).text, wanted)
    with substituted(pipe, ids, rows), made(pipe).apply(pipe):
        assert torch.equal(encode(pipe, [f"a {WORD} and red"]).text, wanted)
    assert torch.equal(encode(pipe, [f"a {WORD} and red"]).text, plain)


def test_an_attack_does_not_write_new_words(pipe: Any) -> None:
    with made(pipe).apply(pipe):
        assert WORD in pipe.tokenizer.get_vocab() and "cat" in whole_words(pipe.tokenizer)
        assert WORD not in whole_words(pipe.tokenizer)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ((), "at least one new word, got none"),
        (("cat",), "a new word in angle brackets, got 'cat'"),
        (("<Pet>",), "a new word in angle brackets"),
        (("<a b>",), "a new word in angle brackets"),
        (("<a>", "<a>"), "different new words, got '<a>'"),
    ],
)
def test_words_have_one_form(new: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokens({"tokenizer": torch.zeros(len(new), 4)}, new)
    with pytest.raises(TypeError, match="a sequence of texts"):
        Tokens({"tokenizer": torch.zeros(1, 4)}, "<a>")


def test_embeddings_are_checked() -> None:
    for rows, message in (
        ({}, "at least one text encoder"),
        ({"tokenizer": torch.zeros(2, 4)}, "Expected 1 rows for 'tokenizer'"),
        ({"tokenizer": torch.full((1, 4), torch.nan)}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            Tokens(rows, (WORD,))


def test_a_word_that_is_known_is_refused(pipe: Any) -> None:
    with made(pipe).apply(pipe), pytest.raises(ValueError, match="'<pet-1>' is already on this pipeline"):
        made(pipe, "dog").apply(pipe)
    pipe.tokenizer.add_tokens(WORD)  # as textual inversion does
    with pytest.raises(ValueError, match="which the tokenizer already knows"):
        made(pipe).apply(pipe)


def test_words_of_another_model_or_encoder_are_refused(pipe: Any) -> None:
    tokens, before = made(pipe), snapshot(pipe)
    with pytest.raises(ValueError, match="do not identify their base model"):
        Tokens(tokens.embeddings, tokens.words).apply(pipe)
    with pytest.raises(ValueError, match="Expected embeddings of width 32 for 'tokenizer', got 16"):
        Tokens({"tokenizer": torch.zeros(1, 16)}, (WORD,), base=tokens.base).apply(pipe)
    with pytest.raises(ValueError, match="got none for the CLIPTextModelWithProjection of 'tokenizer_2'"):
        tokens.apply(tiny.pipeline("sdxl"))
    with pytest.raises(ValueError, match="no such text encoder"):
        made(tiny.pipeline("sdxl")).apply(pipe)
    other = copy.deepcopy(pipe)
    other.text_encoder.get_input_embeddings().weight.data[3] += 1e-6
    with pytest.raises(ValueError, match=r"fitted on 'SD 1.x/2.x' \(base hash .* first 'tokenizer'"):
        tokens.apply(other)
    assert differences(snapshot(pipe), before) == [] and hooks(pipe) == [] and hooks(other) == []


def test_t5_needs_embeddings_or_to_be_away() -> None:
    pipe = tiny.pipeline("sd3")
    clip = {name: rows for name, rows in mean_row(pipe, "cat").items() if name != "tokenizer_3"}
    tokens = Tokens.fitted(None, pipe, clip, (WORD,), CAT)
    with pytest.raises(ValueError, match="got none for the T5EncoderModel of 'tokenizer_3'"):
        tokens.apply(pipe)
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    cat = latents(pipe, "a cat")
    with tokens.apply(pipe):
        assert torch.equal(latents(pipe, f"a {WORD}"), cat)


def test_one_encoder_for_two_tokenizers_is_refused() -> None:
    pipe = tiny.pipeline("sdxl")
    tokens, pipe.text_encoder_2 = made(pipe), pipe.text_encoder
    with pytest.raises(ValueError, match="a text encoder for each of tokenizer, tokenizer_2, got one for several"):
        tokens.apply(pipe)


def test_a_compiled_encoder_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = made(pipe)
    monkeypatch.setattr(pipe.text_encoder, "_compiled_call_impl", print)  # as `pipe.text_encoder.compile()` sets
    with pytest.raises(ValueError, match="a text encoder that is not compiled"):
        tokens.apply(pipe)


def test_half_precision_is_the_same_model(pipe: Any) -> None:
    tokens = made(pipe)
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    with tokens.apply(half):
        assert tokens.embeddings["tokenizer"].dtype == torch.float32
        assert torch.equal(encode(half, [f"a {WORD}"]).text, encode(half, ["a cat"]).text)


def test_nothing_of_a_handle_can_be_set(pipe: Any) -> None:
    with made(pipe).apply(pipe) as on, pytest.raises(AttributeError, match="Tokens has no field strength"):
        on.strength = 2.0


# ---------------------------------------------------------------- files


def test_a_file_holds_words_and_weights(pipe: Any, tmp_path: Path) -> None:
    delta = efface.UCE().fit(pipe, CAT)
    tokens = made(pipe, new=("<a>", "<b,1>"), delta=delta, info={"loss": 0.5}, seed=3)
    tokens.save(tmp_path / "words.safetensors")
    for found in (Tokens.load(tmp_path / "words.safetensors"), efface.api.load_delta(tmp_path / "words.safetensors")):
        assert isinstance(found, Tokens) and found.config() == tokens.config() and found.hash == tokens.hash
        assert found.delta is not None and found.delta.hash == delta.hash and found.words == ("<a>", "<b,1>")
    with delta.apply(pipe):
        wanted = latents(pipe, "a cat at the pub")
    plain, before = latents(pipe, "a cat at the pub"), snapshot(pipe)
    with found.apply(pipe):
        assert torch.equal(latents(pipe, "a <b,1> at the pub"), wanted) and tiny.change(wanted, plain) > 0.001
    assert differences(snapshot(pipe), before) == [] and torch.equal(latents(pipe, "a cat at the pub"), plain)
    assert made(pipe, new=("<a>", "<b,1>")).hash != tokens.hash != made(pipe, "dog", ("<a>", "<b,1>"), delta=delta).hash
    with pytest.raises(ValueError, match=r"holds tokens, not weights\. Load it with `efface.Tokens.load`"):
        efface.Delta.load(tmp_path / "words.safetensors")
    delta.save(tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match=r"Load it with `efface.Delta.load`"):
        Tokens.load(tmp_path / "delta.safetensors")


def test_words_that_cannot_be_put_on_leave_no_weights_changed(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, before = made(pipe, delta=efface.UCE().fit(pipe, CAT)), snapshot(pipe)

    def broken(*_: Any) -> None:
        raise OSError("broken")

    monkeypatch.setattr(words.Vocabulary, "put", broken)
    with pytest.raises(OSError, match="broken"):
        tokens.apply(pipe)
    assert differences(snapshot(pipe), before) == []


def test_tokens_need_the_deltas_of_their_fit(pipe: Any) -> None:
    delta = efface.UCE().fit(pipe, CAT)
    with delta.apply(pipe):
        tokens = made(pipe)
        with tokens.apply(pipe):
            pass
    with pytest.raises(ValueError, match="which is not on"):
        tokens.apply(pipe)


@pytest.mark.long
def test_the_command_line_shows_and_uses_a_file(tmp_path: Path) -> None:
    pipe, file = efface.load("emoji"), str(tmp_path / "words.safetensors")
    concept = Concept("pets", [f"{WORD}, a dog"])
    Tokens.fitted(None, pipe, mean_row(pipe, "cat"), (WORD,), concept).save(file)
    run = CliRunner().invoke
    shown = run(app, ["delta", "info", file])
    assert shown.exit_code == 0 and f"1: {WORD}" in shown.output and "pets" in shown.output
    refused = run(app, ["delta", "merge", file, "--out", str(tmp_path / "model")])
    assert refused.exit_code == 2 and "holds words" in refused.output
    erase = ["erase", f"a {WORD}", "--delta", file, "--method", "negative_prompt", "--steps", "2"]
    done = run(app, [*erase, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output


# ---------------------------------------------------------------- training


def test_only_new_rows_learn(pipe: Any) -> None:
    """A word learns the state of another; all else, and what asks for gradients, stays as found."""
    before, goal = everything(pipe), encode(pipe, ["a cat at night"]).text

    def distance() -> Tensor:
        return (encode(pipe, [f"a {WORD} at night"], differentiable=True).text - goal).square().mean()

    with learning_words(pipe, (WORD,), mean_row(pipe, "pub")) as learned:
        (row,) = learned.embeddings.values()
        start, first = row.detach().clone(), float(distance().detach())
        adam = optimiser(learned.embeddings, lr=0.05, weight_decay=0.01)
        for _ in range(60):
            adam.zero_grad()
            distance().backward()
            assert all(p.grad is None for p in pipe.text_encoder.parameters())
            adam.step()
        last = float(distance().detach())
        tokens = Tokens.fitted(None, pipe, learned.embeddings, learned.words, CAT)
        assert row.dtype == torch.float32 and tiny.change(row, start) > 0.1
    assert first > 0.01 and last < 0.2 * first
    assert_as_found(pipe, before)
    assert hooks(pipe) == []
    with tokens.apply(pipe):
        assert abs(float(distance().detach()) - last) < 1e-6


def test_a_changed_row_of_the_vocabulary_is_found(pipe: Any) -> None:
    changed = pytest.raises(RuntimeError, match="The embeddings of known words changed")
    with changed, learning_words(pipe, (WORD,), mean_row(pipe, "cat")):
        next(iter(tables(pipe).values()))[5] *= 1 + 1e-6
    assert hooks(pipe) == []


def test_words_learn_beside_others(pipe: Any) -> None:
    """The parameters in use are those of the optimiser, also while other words are on."""
    with made(pipe, new=("<a>",)).apply(pipe), learning_words(pipe, ("<b>",), mean_row(pipe, "dog")) as learned:
        before = encode(pipe, ["<b>", "<a>"]).text
        with torch.no_grad():
            learned.embeddings["tokenizer"] *= torch.arange(32)
        after = encode(pipe, ["<b>", "<a>"]).text
        assert tiny.change(after[0], before[0]) > 0.01 and torch.equal(after[1], before[1])
        assert read(pipe, "a <b>", "tokenizer").ids != read(pipe, "a <a>", "tokenizer").ids


def test_an_exception_leaves_no_word(pipe: Any) -> None:
    before = everything(pipe)
    with pytest.raises(KeyError), learning_words(pipe, (WORD,), mean_row(pipe, "cat")):
        raise KeyError
    assert_as_found(pipe, before)
    assert hooks(pipe) == [] and WORD not in pipe.tokenizer.get_vocab()


def test_an_encoder_that_moves_its_ids_reads_the_words(pipe: Any) -> None:
    """As offload does: `forward` is replaced, below the hooks."""
    cat, encoder = latents(pipe, "a cat"), pipe.text_encoder
    own = encoder.forward
    encoder.forward = lambda ids, *args, **kwargs: own(ids.clone(), *args, **kwargs)
    with made(pipe).apply(pipe):
        assert torch.equal(latents(pipe, f"a {WORD}"), cat)


def test_a_pipeline_with_words_is_not_saved_without_their_embeddings(pipe: Any, tmp_path: Path) -> None:
    handle = made(pipe).apply(pipe)
    with pytest.raises(ValueError, match=r"^A tokenizer with new words cannot be saved, .*Remove the `Tokens` first"):
        pipe.save_pretrained(tmp_path / "with")
    handle.remove()
    pipe.save_pretrained(tmp_path / "without")
    assert (tmp_path / "without/tokenizer").is_dir()
