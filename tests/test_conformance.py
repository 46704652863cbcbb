"""What every run-time eraser promises, on every family: `efface.testing.conformance`, tried on the methods of Efface.

New methods are found by walking: they need no line here.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from tiny import ALCOHOL, ALIKE, CAT, EACH, adapter_file, fitted, steps_for, untouched
from torch import Tensor

from efface import api, core, registry
from efface.core import Concept
from efface.testing import conformance
from efface.testing.conformance import EFFECT, Trial, origin
from efface.testing.drawing import differences, scratch, snapshot

pytestmark = pytest.mark.thinned("long")

__all__ = ["EFFECT", "ERASERS", "assert_same", "assert_unchanged", "each", "refusal", "snapshot"]

VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "eiup": ({"normalization": "separate"}, {"normalization": "gated"}),
    "gie": ({"values": "official"}, {"trajectories": 2}, {"adapter": adapter_file(untouched("sd1"))}),
    "negative_prompt": ({"strength": 6.0},),
    "safree": ({"validation": (2.5, -5.0)},),
}
# they act only where the concept is, which is nowhere in random texts at their defaults
GATED: dict[str, dict[str, Any]] = {"crg": {"threshold": -1.0}, "semantic_surgery": {"threshold": -1.0, "gamma": 0.5}}
# a mask with an edge turns a rounding error into a difference, which says nothing about rows
SMOOTH: dict[str, dict[str, Any]] = {"SLD": {"sld_guidance_scale": 5.0, "threshold": 10.0}}


def every_eraser(concept: Any) -> dict[str, Any]:
    return {
        "-".join([name, *map(label, fields.values())]): registry.resolve(name)(
            [concept], **GATED.get(name, {}), **fields
        )
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


@pytest.fixture(params=[name for name in EACH if name not in ALIKE])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def suits(request: pytest.FixtureRequest) -> None:
    """Skips what an eraser refuses on a family, if it says why; on a pipeline that no promise looks at."""
    if {"eraser", "pipe"} <= set(request.fixturenames):
        reason = refusal(request.getfixturevalue("eraser"), scratch(request.getfixturevalue("family")))
        if reason:
            pytest.skip(reason)


def refusal(eraser: Any, pipe: Any) -> str:
    """What an eraser refuses a pipeline with; "" if it does not."""
    return conformance.refusal(Trial(eraser, type(pipe).__name__, pipe))


def assert_same(after: Any, before: Any) -> None:
    assert differences(after, before) == []


def assert_unchanged(after: Tensor, before: Tensor, eraser: Any) -> None:
    """To the bit, or up to float rounding if the eraser adds rows to the batch."""
    Trial(eraser, "a tiny pipeline", None).require_unchanged(after, before, "Rows differ.")


@pytest.fixture
def trial(eraser: Any, pipe: Any, family: str) -> Trial:
    return Trial(eraser, family, pipe)


@pytest.fixture
def on_sd1(eraser: Any, sd1: Any) -> Trial:
    return Trial(eraser, "sd1", sd1)


# ---------------------------------------------------------------- on and off


@pytest.mark.thinned
@each
def test_leaving_the_block_restores_everything_to_the_bit(trial: Trial) -> None:
    conformance.restores(trial)


@pytest.mark.thinned
@each
def test_so_does_an_exception_in_the_middle_of_a_call(trial: Trial) -> None:
    conformance.restores_after_an_exception(trial)


@each
def test_a_bare_apply_acts_until_it_is_removed(on_sd1: Trial) -> None:
    conformance.acts_until_removed(on_sd1)


@pytest.mark.thinned
@each
def test_off_is_plain_to_the_bit(trial: Trial) -> None:
    conformance.off_is_the_base_model(trial)


@each
def test_config_survives_json_and_makes_the_same_eraser(on_sd1: Trial) -> None:
    conformance.config_survives_json(on_sd1)
    config = core.config(on_sd1.method)
    assert config["concepts"][0]["phrases"] == ["beer", "wine glass"]
    concepts = [Concept(**fields) for fields in config.pop("concepts")]
    assert api.build(config.pop("method"), concepts, **config) == on_sd1.method


@pytest.mark.thinned
@having("strength")
def test_strength_can_be_set_while_on(trial: Trial) -> None:
    conformance.strength_can_be_set(trial)


# ---------------------------------------------------------------- rows


@pytest.mark.thinned
@each
def test_unconditional_rows_are_touched_only_if_the_class_says_so(trial: Trial) -> None:
    conformance.touches_unconditional_rows_only_if_declared(trial)


@pytest.mark.thinned
@each
def test_without_guidance_it_acts_or_says_that_it_cannot(trial: Trial) -> None:
    conformance.acts_without_guidance_or_refuses(trial)


@pytest.mark.thinned
@each
def test_images_per_prompt_are_like_prompts_of_their_own(trial: Trial) -> None:
    conformance.images_per_prompt_are_rows(trial)


@pytest.mark.thinned
@having("rows")
def test_row_i_of_a_batch_is_row_i_alone(trial: Trial) -> None:
    conformance.a_row_is_the_row_alone(trial.having(**SMOOTH.get(type(trial.method).__name__, {})))


@having("rows")
def test_rows_count_prompts_not_images(on_sd1: Trial) -> None:
    conformance.rows_count_prompts(on_sd1)


# ---------------------------------------------------------------- several


@pytest.mark.thinned
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=map("+".join, PAIRS))
def test_erasers_come_off_in_any_order(first: str, second: str, sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = ERASERS[first], every_eraser(CAT)[second]
    steps_for(monkeypatch, a, b)
    conformance.comes_off_in_any_order(Trial(a, "sd1", sd1), b)


@each
def test_the_same_eraser_may_be_on_twice(on_sd1: Trial) -> None:
    conformance.may_be_on_twice(on_sd1)


@pytest.mark.long
def test_all_erasers_at_once_come_off_shuffled(pipe: Any, family: str) -> None:
    conformance.come_off_shuffled([Trial(fitted(eraser, pipe), family, pipe) for eraser in ERASERS.values()])


@each
def test_pipelines_do_not_see_each_others_erasers(on_sd1: Trial) -> None:
    conformance.pipelines_are_apart(on_sd1)


# ---------------------------------------------------------------- what it says of itself


@pytest.mark.parametrize("name", registry.methods())
def test_docstring_says_which_paper_what_differs_and_how_to_use_it(name: str) -> None:
    assert conformance.undocumented(registry.resolve(name)) == []


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
