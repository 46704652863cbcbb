"""EIUP's swap form, which draws an anchor where the concept is read. Its formula is in test_eiup.py with the others."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_eiup import ANCHORS, THRESHOLD, eiup, swapped
from test_eiup_joint import CLOSE, NEGATIVE, double, written_out
from tiny import ALCOHOL, CAT, PROMPTS, bare, change, latents, pipeline, untouched
from torch import Tensor

import efface
from efface import EIUP, Concept
from efface.core import shipped_anchors, shipped_concepts
from efface.erasers import _anchors
from efface.guard import Erasure
from efface.hooks import CrossAttention, ErasurePrompts
from efface.models.emoji.eyes import load_eyes

TEA = Concept("alcohol", ("beer mug", "wine glass"), anchor="a cup of tea")


@functools.cache
def model() -> Any:
    pipe = efface.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def swap(*concepts: Any, **fields: Any) -> EIUP:
    return EIUP(concepts, normalization="swap", **fields)


# ---------------------------------------------------------------- the gate


@dataclasses.dataclass(frozen=True)
class Seen:
    """One edit of conditional rows: the layer's output, what both forms make of it, and the anchors' outputs."""

    out: Tensor
    projected: Tensor
    swapped: Tensor
    anchors: Tensor


def seen(pipe: Any, eraser: EIUP, monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    found: list[Seen] = []
    original = EIUP.edit

    def spy(self: EIUP, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        edited = original(self, out, cross, prompts)
        first = 1 + len(self.neutral)
        others = dataclasses.replace(cross, neutral=cross.neutral[:first])
        without = original(dataclasses.replace(self, normalization="projected"), out, others, prompts)
        found.append(Seen(out, without, edited, cross.with_empty(prompts.text)[first : len(cross.neutral)]))
        return edited

    monkeypatch.setattr(EIUP, "edit", spy)
    with eraser.apply(pipe):
        latents(pipe, PROMPTS)
    return found


def test_each_query_is_projected_or_reads_an_anchor_or_is_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where little of the concept is read, nothing but the projection; where most is, an anchor's output alone."""
    kinds = torch.zeros(3)
    for each in seen(double("sd1"), eiup("swap", ALCOHOL, CAT, strength=1.5), monkeypatch):
        as_projected = torch.isclose(each.swapped, each.projected, atol=1e-10).all(-1)
        as_anchor = torch.isclose(each.swapped, each.anchors, atol=1e-10).all(-1).any(0)
        line = each.anchors - each.projected
        share = ((each.swapped - each.projected) * line).sum(-1) / (line * line).sum(-1)
        off = (each.swapped - each.projected - share[..., None] * line).norm(dim=-1).amin(0)
        assert bool((off <= 1e-8 * each.out.norm(dim=-1)).all())  # on the way to one of the anchors
        kinds += torch.tensor([x.sum() for x in (as_projected, as_anchor, ~as_projected & ~as_anchor)])
    assert len(each.anchors) == 2 and bool((kinds / kinds.sum() > 0.1).all())


def test_strength_goes_to_nothing_without_a_step(sd1: Any) -> None:
    plain, last = latents(sd1, PROMPTS), 10.0
    for strength in (0.3, 0.03, 0.003):
        with eiup("swap", ALCOHOL, CAT, strength=strength).apply(sd1):
            moved = change(latents(sd1, PROMPTS), plain)
        assert 1e-5 < moved < last / 3
        last = moved


def test_a_threshold_of_1_is_the_projected_form(sd1: Any) -> None:
    """Nothing is more than the whole."""
    with eiup("projected", ALCOHOL, strength=2.0).apply(sd1):
        want = latents(sd1, PROMPTS)
    with eiup("swap", ALCOHOL, strength=2.0, threshold=1.0).apply(sd1):
        assert change(latents(sd1, PROMPTS), want) < 1e-5
    with eiup("swap", ALCOHOL, strength=2.0).apply(sd1):
        assert change(latents(sd1, PROMPTS), want) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_reads_no_anchor(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The empty prompt's output differs from the empty text's by rounding, of which no share is a concept's."""
    pipe, moved = pipeline("sd1").to(dtype), list[tuple[float, float]]()
    original = EIUP.edit

    def spy(self: EIUP, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        nothing = cross.with_empty(prompts.text)[0]
        rounded = nothing + nothing * torch.finfo(dtype).eps * (torch.rand(nothing.shape) - 0.5).to(dtype)
        edited = original(self, rounded, cross, prompts)
        moved.append((change(edited.float(), nothing.float()), change(original(self, out, cross, prompts), out)))
        return out

    monkeypatch.setattr(EIUP, "edit", spy)
    torch.manual_seed(1_000_000)
    with eiup("swap", ALCOHOL, CAT, threshold=0.2).apply(pipe):
        latents(pipe, PROMPTS, num_inference_steps=1)
    assert max(rounding for rounding, _ in moved) < 4 * torch.finfo(dtype).eps + 1e-6
    assert min(text for _, text in moved) > 0.05


def test_direct_calls_of_the_denoiser_read_the_anchors(sd1: Any) -> None:
    """Also after a pipeline call, whose memory is gone."""
    plain = bare(sd1)
    with eiup("swap").apply(sd1):
        before = bare(sd1)
        latents(sd1)
        assert torch.equal(bare(sd1), before)
    with eiup("projected").apply(sd1):
        assert change(before, plain) > 1e-3 and change(before, bare(sd1)) > 1e-3


# ---------------------------------------------------------------- rows


@pytest.mark.long
def test_rows_read_their_own_anchors(sd1: Any) -> None:
    """In any order, and as if each row were alone, whatever other rows erase."""
    moon, pub = (dataclasses.replace(c, anchor=ANCHORS[c.name]) for c in (ALCOHOL, CAT))
    fields: dict[str, Any] = {"neutral": (("a dog",),), "strength": 1.5, "threshold": THRESHOLD}
    for rows in ([[pub, moon], [moon]], [[], [pub]]):
        with EIUP(rows=rows, normalization="swap", **fields).apply(sd1):
            together = latents(sd1, PROMPTS)
        for k, concepts in enumerate(rows):
            with efface.stack(sd1, *([swap(*concepts, **fields)] if concepts else [])):
                assert change(together[k : k + 1], latents(sd1, PROMPTS)[k : k + 1]) < 1e-5


def test_an_anchor_may_be_erased_in_another_row_but_not_in_its_own() -> None:
    cat, dog = Concept("cat", anchor="a dog"), Concept("dog")
    assert EIUP(rows=[[cat], [dog]], normalization="swap").rows
    with pytest.raises(ValueError, match="which the concept 'dog' erases. Choose another `anchor`"):
        EIUP(rows=[[cat, dog]], normalization="swap")
    with pytest.raises(ValueError, match="which 'dog' erases, whose anchor is 'cat' in turn"):
        swap(cat, Concept("dog", anchor="Cat"))
    with pytest.raises(ValueError, match="which is the concept 'cat' itself"):
        swap(Concept("cat", anchor="the  CAT"))
    assert EIUP([cat, dog]).concepts  # the other forms read no anchor


# ---------------------------------------------------------------- which anchor


def anchors_of(eraser: EIUP) -> dict[tuple[int, ...], tuple[str, ...]]:
    """Per set of phrases, their anchors in words."""
    found = _anchors.all_of(_anchors.candidates(eraser._sets, eraser.anchors))
    chosen = _anchors.chosen(model(), eraser._sets, eraser.anchors, {})
    return {which: tuple(found[k] for k in numbers) for which, numbers in chosen.items()}


def test_the_anchor_is_the_users_else_the_shipped_one_else_a_thing() -> None:
    own = Concept("fruit", ("banana", "red apple"))
    assert anchors_of(swap(TEA)) == {(0, 1): ("a cup of tea",) * 2}
    assert set(*anchors_of(swap("alcohol")).values()) == set(shipped_anchors()["alcohol"])
    assert set(*anchors_of(swap("nudity.safree")).values()) == {"a person in everyday clothes"}
    assert "a red apple" not in anchors_of(swap(own))[0, 1]  # it is erased
    assert set(anchors_of(swap(TEA, "cat", anchors=("a horse",)))[0, 1, 2]) == {"a cup of tea", "a horse"}
    for pair in (("cat", "dog"), ("dog", "cat")):  # each is the other's shipped anchor
        (texts,) = anchors_of(swap(*pair)).values()
        assert set(texts) <= set(_anchors.DEFAULT)


def test_each_phrase_takes_its_nearest_anchor_that_means_no_phrase() -> None:
    mixed = Concept("mixed", ("beer mug", "banana"))
    pool = ("a red apple", "a mug of beer", "a cup of tea")
    assert anchors_of(swap(mixed, anchors=pool)) == {(0, 1): ("a cup of tea", "a red apple")}
    drinks = Concept("drinks", ("a hot tea", "a cup of coffee"))
    made = anchors_of(EIUP(rows=[[mixed], [mixed, drinks]], normalization="swap", anchors=pool))
    assert made[0, 1] == ("a cup of tea", "a red apple")  # as without the other row
    assert set(made[0, 1, 2, 3]) == {"a red apple"}


def test_an_anchor_that_means_the_concept_is_warned_of() -> None:
    for anchor, warned in (("a mug of beer", True), ("a cup of tea", False)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            swap(dataclasses.replace(TEA, anchor=anchor)).apply(model()).remove()
        said = [str(each.message) for each in found if "means nearly what is erased" in str(each.message)]
        assert len(said) == warned and all("cosine 0.9" in text and anchor in text for text in said)


@pytest.mark.long
def test_shipped_anchors_follow_their_rule() -> None:
    """Every shipped concept has one that the encoder can read and that means none of its phrases."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap(*list(shipped_concepts().values())[:3]).check(model())
    anchors = {name: shipped_anchors()[name.partition(".")[0]] for name in shipped_concepts()}
    texts = list(dict.fromkeys(text for some in anchors.values() for text in some))
    phrases = {name: concept.phrases for name, concept in shipped_concepts().items()}
    every = list(dict.fromkeys(text for some in phrases.values() for text in some))
    meanings = _anchors.meanings(model(), [*texts, *every], {})
    cosines = meanings[: len(texts)] @ meanings[len(texts) :].T
    assert not any(concept.anchor for concept in shipped_concepts().values()) and cosines.amax() > 0.9
    for name, some in anchors.items():
        at = [[texts.index(text)] for text in some], [every.index(phrase) for phrase in phrases[name]]
        assert some and float(cosines[at].amax()) <= _anchors.BOUND, name


def test_what_cannot_be_read_or_held_is_refused() -> None:
    with pytest.raises(ValueError, match="characters that the pipeline's tokenizer does not know"):
        swap(Concept("cat", anchor="a ☃")).apply(model())
    many = [Concept(f"thing {k}", anchor="a cup of tea") for k in range(1000)]
    for form in ("projected", "swap"):
        with pytest.raises(ValueError, match=r"at most 256 phrases in a row of EIUP, got 1000, of 1000 concepts.*UCE"):
            EIUP(many, normalization=form)
        assert EIUP(rows=[many[:250], many[250:500]], normalization=form).rows  # each row has fewer
    assert EIUP(many, normalization="separate").concepts
    with pytest.raises(ValueError, match="`threshold`"):
        swap(CAT, threshold=1.5)
    with pytest.raises(TypeError, match="`anchors` to be a sequence"):
        swap(CAT, anchors="a dog")


def test_policies_and_records_take_the_form() -> None:
    line = {"concepts": ["alcohol"], "anchors": {"alcohol": "a cup of tea"}}
    policy = efface.Policy(erase=[line | {"fields": {"normalization": "swap", "threshold": 0.5}}])
    (eraser,) = [each.build() for each in policy.erase]
    assert eraser.normalization == "swap" and eraser.concepts[0].anchor == "a cup of tea"
    config = json.loads(json.dumps(efface.core.config(eraser)))
    method = config.pop("method")
    concepts = [Concept(**each) for each in config.pop("concepts")]
    assert efface.api.build(method, concepts, **config) == eraser
    with pytest.raises(ValueError, match=r"no concept to an anchor with these fields.*\"normalization\": \"swap\""):
        Erasure(**line).check_method()


# ---------------------------------------------------------------- joint attention


@pytest.mark.filterwarnings("ignore:The anchor")  # random encoders find everything alike
@pytest.mark.parametrize("family", ["sd3", "flux", "cogview4"])
def test_joint_attention_equals_the_definition(family: str) -> None:
    """Two anchors, three phrases, all layers."""
    pipe, gates, threshold = double(family), list[Tensor](), 0.45 if family == "flux" else THRESHOLD
    texts = tuple(ANCHORS.values())

    def row(out: Tensor, nothing: Tensor, neutral: Sequence[Tensor], rest: Sequence[Tensor]) -> Tensor:
        moon, pub, *erased = rest
        edited, gate = swapped(1.5, out, nothing, erased, neutral, (moon, moon, pub), threshold)
        gates.append(gate)
        return edited

    concepts = [dataclasses.replace(c, anchor=ANCHORS[c.name]) for c in (ALCOHOL, CAT)]
    neutral = (("a dog", "the moon"), ("a big cat",), ("a red night",))
    eraser = swap(*concepts, strength=1.5, neutral=neutral, threshold=threshold)
    plain, options = latents(pipe, PROMPTS), {"num_inference_steps": 2}
    with eraser.apply(pipe):
        erased = latents(pipe, PROMPTS, **options)
    want = written_out(pipe, phrases=(*texts, *ALCOHOL.phrases, *CAT.phrases), row=row, **options)
    assert change(erased, want) < CLOSE[family]
    open_ = float((torch.cat(gates) > 0).double().mean())
    assert 0.1 < open_ < 0.9 and change(erased, plain) > 1e-2


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
def test_rows_with_a_negative_prompt_are_those_of_the_projected_form(family: str) -> None:
    """Guidance pushes away from them, so no anchor goes there."""
    pipe = untouched(family)

    def first(eraser: EIUP | None) -> Tensor:
        rows: list[Tensor] = []
        net = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
        watch = net.register_forward_hook(lambda module, args, out: rows.append(out[0]))
        with efface.stack(pipe, *filter(None, [eraser])):
            latents(pipe, PROMPTS, num_inference_steps=1, negative_prompt=NEGATIVE)
        watch.remove()
        return rows[0] if len(rows[0]) == 4 else torch.cat(rows[1::-1])

    plain, projected, swap = (first(e) for e in (None, eiup("projected", CAT), eiup("swap", CAT)))
    assert change(swap[:2], projected[:2]) < 1e-5 and change(swap[:2], plain[:2]) > 1e-3
    assert change(swap[2:], projected[2:]) > 1e-3


# ---------------------------------------------------------------- the outcome


@pytest.mark.long
def test_a_beer_mug_becomes_a_cup_of_tea_instead_of_a_blot() -> None:
    seeds = range(1_000_100, 1_000_102)  # neither tuned on nor in a card
    found = {}
    for form in ("projected", "swap"):
        with EIUP("alcohol", normalization=form).apply(model()):
            images = efface.pipelines.draw(model(), ["a wine glass"] * len(seeds), seeds, num_inference_steps=10)
        eyes = load_eyes()
        icons = eyes.icons(eyes.see(images))
        alcohol = eyes.concept(eyes.see(images), "alcohol")
        found[form] = int(icons.any(-1).sum(1).min()), int(alcohol.sum(1).max())
    assert found["swap"][1] == found["projected"][1] == 0
    assert found["swap"][0] == 2 and found["projected"][0] == 0
