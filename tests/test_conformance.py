"""What every run-time eraser promises, on every family. New methods are found by walking: they need no line here."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import random
import re
from typing import Any

import pytest
import torch
from tiny import (
    ALCOHOL,
    CAT,
    EACH,
    PROMPT,
    PROMPTS,
    adapter_file,
    change,
    denoiser_of,
    drawn,
    fitted,
    latents,
    pipeline,
    steps_for,
    untouched,
)
from torch import Tensor, nn

from efface import api, registry
from efface.core import Concept
from efface.families import OFFERS, lacking
from efface.families import family as facts

EFFECT = 1e-3  # a smaller relative change means that a hook is dead
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "eiup": ({"normalization": "separate"}, {"normalization": "gated"}),
    "gie": ({"values": "official"}, {"trajectories": 2}, {"adapter": adapter_file(untouched("sd1"))}),
    "negative_prompt": ({"strength": 6.0},),
    "safree": ({"validation": (2.5, -5.0)},),
}
# a mask with an edge turns a rounding error into a difference, which says nothing about rows
SMOOTH: dict[str, dict[str, Any]] = {"SLD": {"sld_guidance_scale": 5.0, "threshold": 10.0}}


def every_eraser(concept: Any) -> dict[str, Any]:
    return {
        "-".join([name, *map(label, fields.values())]): registry.resolve(name)([concept], **fields)
        for name in registry.methods("erasers")
        for fields in ({}, *VARIANTS.get(name, ()))
    }


def label(value: Any) -> str:
    return "adapter" if str(value).endswith(".safetensors") else "filter" if isinstance(value, tuple) else str(value)


def having(field: str) -> pytest.MarkDecorator:
    return _each({name: e for name, e in ERASERS.items() if field in {f.name for f in dataclasses.fields(e)}})


def _each(erasers: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("eraser", erasers.values(), ids=erasers, indirect=True)


ERASERS = every_eraser(ALCOHOL)
PAIRS = list(itertools.combinations_with_replacement(ERASERS, 2))  # one order will do: the test takes both off first
each = _each(ERASERS)


@pytest.fixture(params=EACH)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def suits(request: pytest.FixtureRequest) -> None:
    """Skips what an eraser refuses on a family, if it says why."""
    if {"eraser", "pipe"} <= set(request.fixturenames):
        reason = refusal(request.getfixturevalue("eraser"), request.getfixturevalue("pipe"))
        if reason:
            pytest.skip(reason)


def refusal(eraser: Any, pipe: Any) -> str:
    """What an eraser refuses a pipeline with: what it needs and the family does not offer; "" if it does not."""
    lacks = lacking(eraser.needs, facts(pipe).offers)
    try:
        eraser.apply(pipe).remove()
    except ValueError as error:
        assert lacks and says_what_is_missing(str(error), eraser, lacks), error
        return str(error)
    assert not lacks
    return ""


def says_what_is_missing(said: str, eraser: Any, lacks: tuple[str, ...]) -> bool:
    return said.startswith(type(eraser).__name__) and all(OFFERS[need].words in said for need in lacks)


def snapshot(pipe: Any) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, int]]:
    """All that an eraser could change: weights by value, processors and other attributes by identity."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    weights = {f"{p}.{n}": weight.clone() for p, part in parts.items() for n, weight in part.state_dict().items()}
    inside = {
        f"{p}.{n}.{attribute}": id(value)
        for p, part in parts.items()
        for n, module in part.named_modules()
        for attribute, value in vars(module).items()
    }
    outside = {name: id(value) for name, value in vars(pipe).items() if callable(value)}
    return weights, processors(denoiser_of(pipe)), inside | outside


def processors(denoiser: nn.Module) -> dict[str, Any]:
    """Of the attention layers; not every denoiser lists them itself."""
    return {name: m.processor for name, m in denoiser.named_modules() if hasattr(m, "processor")}


def assert_same(after: Any, before: Any) -> None:
    for name, weight in before[0].items():
        assert torch.equal(after[0][name], weight), name
    assert after[1].keys() == before[1].keys()
    assert all(after[1][name] is processor for name, processor in before[1].items())
    assert after[2] == before[2]


def assert_unchanged(after: Tensor, before: Tensor, eraser: Any) -> None:
    """To the bit, or up to float rounding if the eraser puts rows of its own beside them."""
    assert torch.equal(after, before) or (eraser.guides and change(after, before) < 1e-5)


def first_prediction(pipe: Any, **options: Any) -> Tensor:
    """What the denoiser predicts in the first step: unconditional rows, then conditional ones (FLUX: two calls)."""
    seen: list[Tensor] = []
    watch = denoiser_of(pipe).register_forward_hook(lambda module, args, out: seen.append(out[0]))
    try:
        # an empty negative prompt would hide a touch: the projected form leaves it alone anyway
        latents(pipe, PROMPTS, negative_prompt=["a big dog", "wine"], **options)
    finally:
        watch.remove()
    return seen[0] if len(seen[0]) == 2 * len(PROMPTS) else torch.cat(seen[1::-1])


# ---------------------------------------------------------------- on and off


@each
def test_leaving_the_block_restores_everything_to_the_bit(eraser: Any, pipe: Any, family: str) -> None:
    before = snapshot(pipe)
    with eraser.apply(pipe):
        erased = latents(pipe)
    assert change(erased, drawn(family)) > EFFECT
    assert torch.equal(latents(pipe), drawn(family))
    assert_same(snapshot(pipe), before)


@each
def test_so_does_an_exception_in_the_middle_of_a_call(eraser: Any, pipe: Any, family: str) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = snapshot(pipe)
    with pytest.raises(KeyboardInterrupt), eraser.apply(pipe):
        latents(pipe, **{"callback" if family == "pixart" else "callback_on_step_end": stop})
    assert_same(snapshot(pipe), before)
    assert torch.equal(latents(pipe), drawn(family))


@each
def test_a_bare_apply_acts_until_it_is_removed(eraser: Any, sd1: Any) -> None:
    handle = eraser.apply(sd1)
    assert change(latents(sd1), drawn()) > EFFECT
    handle.remove()
    handle.remove()
    assert torch.equal(latents(sd1), drawn())
    with pytest.raises(ValueError, match="already removed"):
        handle.strength = 1.0


@each
def test_off_is_plain_to_the_bit(eraser: Any, pipe: Any, family: str) -> None:
    if eraser.off is None:
        pytest.skip("has no setting that makes it the identity")
    with dataclasses.replace(eraser, **eraser.off).apply(pipe):
        assert torch.equal(latents(pipe, PROMPTS), drawn(family, prompt=PROMPTS))


@each
def test_config_survives_json_and_makes_the_same_eraser(eraser: Any, sd1: Any) -> None:
    with eraser.apply(sd1) as handle:
        config = handle.config()
    assert json.loads(json.dumps(config)) == config
    name = config.pop("method")
    assert registry.resolve(name) is type(eraser)
    assert config.keys() == {f.name for f in dataclasses.fields(eraser)}
    assert config["concepts"][0]["phrases"] == ["beer", "wine glass"]
    concepts = [Concept(**fields) for fields in config.pop("concepts")]
    assert api.build(name, concepts, **config) == handle.eraser


@having("strength")
def test_strength_can_be_set_while_on(eraser: Any, pipe: Any, family: str) -> None:
    with eraser.apply(pipe) as handle:
        try:
            handle.strength = 0.5
        except ValueError as error:
            assert eraser.strength is None
            lacks = lacking(dataclasses.replace(eraser, strength=0.5).needs, facts(pipe).offers)
            assert lacks and says_what_is_missing(str(error), eraser, lacks)
            pytest.skip(str(error))
        assert handle.strength == handle.config()["strength"] == 0.5
        weaker = latents(pipe)
        with pytest.raises(ValueError, match="strength"):
            handle.strength = -1.0
    assert torch.equal(weaker, drawn(family, dataclasses.replace(eraser, strength=0.5)))
    assert change(weaker, drawn(family, eraser)) > EFFECT


# ---------------------------------------------------------------- rows


@each
def test_unconditional_rows_are_touched_only_if_the_class_says_so(eraser: Any, pipe: Any) -> None:
    plain = first_prediction(pipe)
    fields = {"strength": 16.0, "warmup": 0.0}  # it is the first step
    strong = dataclasses.replace(eraser, **{n: v for n, v in fields.items() if getattr(eraser, n, None)})
    with strong.apply(pipe):
        erased = first_prediction(pipe)
    assert len(plain) == 2 * len(PROMPTS)
    if eraser.touches_uncond:
        assert all(change(e, p) > EFFECT for e, p in zip(erased[:2], plain[:2], strict=True))
    else:
        assert_unchanged(erased[:2], plain[:2], eraser)
        assert all(change(e, p) > EFFECT for e, p in zip(erased[2:], plain[2:], strict=True))


@each
def test_without_guidance_it_acts_or_says_that_it_cannot(eraser: Any, pipe: Any, family: str) -> None:
    with eraser.apply(pipe):
        try:
            erased = latents(pipe, guidance_scale=1.0)
        except ValueError as error:
            assert (eraser.touches_uncond or eraser.guides) and facts(pipe).scale in str(error)
            return
    assert change(erased, drawn(family, guidance_scale=1.0)) > EFFECT


@each
def test_images_per_prompt_are_like_prompts_of_their_own(eraser: Any, pipe: Any, family: str) -> None:
    repeated = (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1])
    with eraser.apply(pipe):
        erased = latents(pipe, PROMPTS, num_images_per_prompt=2)
    assert change(erased, drawn(family, eraser, prompt=repeated)) < 1e-5
    assert change(erased, drawn(family, prompt=repeated)) > EFFECT


@having("rows")
def test_row_i_of_a_batch_is_row_i_alone(eraser: Any, pipe: Any, family: str) -> None:
    prompts, rows = (*PROMPTS, "a dog"), [[ALCOHOL], [CAT, ALCOHOL], []]
    eraser = dataclasses.replace(eraser, **SMOOTH.get(type(eraser).__name__, {}))
    with dataclasses.replace(eraser, concepts=(), rows=rows).apply(pipe):
        together = latents(pipe, prompts)
    plain = drawn(family, prompt=prompts)
    assert_unchanged(together[2], plain[2], eraser)
    assert change(together[0], plain[0]) > EFFECT and change(together[1], plain[1]) > EFFECT
    for i, prompt in enumerate(prompts):
        alone = [dataclasses.replace(eraser, concepts=rows[i])] if rows[i] else []
        difference = together[i] - drawn(family, *alone, prompt=prompt, seed=i)[0]
        assert float(difference.abs().max()) < 1e-4


@having("rows")
def test_rows_count_prompts_not_images(eraser: Any, sd1: Any) -> None:
    with eraser.apply(sd1) as handle:
        handle.rows = [[], [ALCOHOL]]
        erased = latents(sd1, PROMPTS, num_images_per_prompt=2)
        plain = drawn(prompt=PROMPTS, num_images_per_prompt=2)
        assert_unchanged(erased[:2], plain[:2], eraser)
        assert change(erased[2], plain[2]) > EFFECT and change(erased[3], plain[3]) > EFFECT
        assert latents(sd1, PROMPTS, num_images_per_prompt=1).shape[0] == 2
        with pytest.raises(ValueError, match=r"`rows` has 2 entries, but the call has 3 prompts"):
            latents(sd1, [PROMPT] * 3)
        handle.rows = None
        assert torch.equal(latents(sd1), drawn("sd1", eraser))


# ---------------------------------------------------------------- several


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=map("+".join, PAIRS))
def test_erasers_come_off_in_any_order(first: str, second: str, sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = ERASERS[first], every_eraser(CAT)[second]
    steps_for(monkeypatch, a, b)
    on_a, on_b = a.apply(sd1), b.apply(sd1)
    both = latents(sd1)
    on_a.remove()
    assert torch.equal(latents(sd1), drawn("sd1", b))
    on_a = a.apply(sd1)  # now b, a
    on_b.remove()
    assert torch.equal(latents(sd1), drawn("sd1", a))
    on_b = b.apply(sd1)
    assert torch.equal(latents(sd1), both)
    on_b.remove()  # last in, first out
    assert torch.equal(latents(sd1), drawn("sd1", a))
    on_a.remove()
    assert torch.equal(latents(sd1), drawn())
    assert change(both, drawn("sd1", a)) > EFFECT and change(both, drawn("sd1", b)) > EFFECT


@each
def test_the_same_eraser_may_be_on_twice(eraser: Any, sd1: Any) -> None:
    first, second = eraser.apply(sd1), eraser.apply(sd1)
    latents(sd1)
    second.remove()
    assert torch.equal(latents(sd1), drawn("sd1", eraser))
    first.remove()
    assert torch.equal(latents(sd1), drawn())


def test_all_erasers_at_once_come_off_shuffled(pipe: Any, family: str) -> None:
    before = snapshot(pipe)
    erasers = [fitted(eraser, pipe) for eraser in ERASERS.values()]
    handles = [eraser.apply(pipe) for eraser in erasers if not refusal(eraser, pipe)]
    assert change(latents(pipe), drawn(family)) > EFFECT
    random.Random(0).shuffle(handles)
    last = handles.pop()
    for handle in handles:
        handle.remove()
    assert torch.equal(latents(pipe), drawn(family, last.eraser))
    last.remove()
    assert torch.equal(latents(pipe), drawn(family))
    assert_same(snapshot(pipe), before)


@each
def test_pipelines_do_not_see_each_others_erasers(eraser: Any, sd1: Any) -> None:
    other, cat = pipeline(), dataclasses.replace(eraser, concepts=[CAT])
    with eraser.apply(sd1):
        assert torch.equal(latents(other), drawn())
        with cat.apply(other):
            assert torch.equal(latents(sd1), drawn("sd1", eraser))
            assert torch.equal(latents(other), drawn("sd1", cat))
        assert torch.equal(latents(sd1), drawn("sd1", eraser))


# ---------------------------------------------------------------- what it says of itself


def origin(cls: type) -> str:
    """Where a method comes from: its paper, or its source if there is none; "" if it tells neither."""
    doc = inspect.getdoc(cls) or ""
    paper, source = (doc.partition(f"\n{heading}: ")[2].partition("\n\n")[0] for heading in ("Paper", "Source"))
    if re.search(r"arXiv[ \n]+\d{4}\.\d{5}", paper):
        return paper
    return (source or str(getattr(cls, "source", ""))).strip()


@pytest.mark.parametrize("name", registry.methods())
def test_docstring_says_which_paper_what_differs_and_how_to_use_it(name: str) -> None:
    doc = inspect.getdoc(registry.resolve(name)) or ""
    headings = ("Differs: ", "Args:\n", "Shapes: ", "Raises:\n", "Example:\n    >>> ")
    assert [heading for heading in headings if f"\n{heading}" not in doc] == []
    assert origin(registry.resolve(name))
    arguments = doc.partition("\nArgs:\n")[2].partition("\n\n")[0]
    fields = {f.name for f in dataclasses.fields(registry.resolve(name))}
    described = {n for line in re.findall(r"(?m)^    (\w[\w, ]*):", arguments) for n in line.split(", ")}
    assert fields <= described


def test_a_method_without_a_paper_names_its_source() -> None:
    class Paper:
        """Does something.

        Paper: A. Author, 2026, "Title", arXiv 2601.00001, equation 3.
        """

    class Journal:
        """Does something.

        Paper: A. Author, 2026, "Title", in a journal.
        """

    class Source:
        """Does something.

        Source: the usual practice in image tools.

        Differs: nothing.
        """

    class Attribute:
        source = "https://example.org/method"

    assert origin(Paper).endswith("equation 3.")
    assert origin(Journal) == ""
    assert origin(Source) == "the usual practice in image tools."
    assert origin(Attribute) == "https://example.org/method"
