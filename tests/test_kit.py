"""The conformance kit: a method that keeps its promises passes, and each broken promise is found and named."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import efface.testing
from efface import Concept
from efface._text import SITES
from efface.core import Handle
from efface.hooks import CrossAttention, ErasurePrompts, Method, Prediction
from efface.testing import ConformanceError, DoesNotApply, conformance, drawing
from efface.testing.conformance import two_sentences


@dataclass(frozen=True)
class Good(Method):
    """Takes out of cross-attention what the concept adds.

    Source: this test.
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    needs: ClassVar[tuple[str, ...]] = ("cross_text",)
    edits_attention: ClassVar[bool] = True

    concepts: tuple[Concept, ...] = ()
    strength: float = 1.0
    rows: tuple[tuple[Concept, ...], ...] | None = None

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        found = cross.with_empty(prompts.text)
        return out - self.strength * (found[1:] - found[:1]).sum(0)


class Dead(Good):
    edits_attention: ClassVar[bool] = False


class Litters(Good):
    def apply(self, pipe: Any) -> Any:
        pipe.unet.conv_in.litter = self
        return super().apply(pipe)


class Damages(Good):
    def apply(self, pipe: Any) -> Any:
        with torch.no_grad():
            next(pipe.unet.parameters()).mul_(1.5)
        return super().apply(pipe)


class Quiet(Handle):
    def __exit__(self, *_: Any) -> bool:  # type: ignore[override]
        self.remove()
        return True


class Swallows(Good):
    def apply(self, pipe: Any) -> Any:
        handle = super().apply(pipe)
        return Quiet(self, handle._replace, handle.remove)


class NotOff(Good):
    off: ClassVar[dict[str, Any] | None] = {"strength": 0.5}

    def is_off(self) -> bool:
        return False


@dataclass(frozen=True)
class Unequal(Good):
    tag: object = field(default_factory=lambda: [1])

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return 1


@dataclass
class Unhashable(Method):
    """Is not frozen.

    Source: this test.
    """

    edits_attention: ClassVar[bool] = True

    concepts: tuple[Concept, ...] = ()

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        return out - cross.with_empty(prompts.text)[1:].sum(0)


class Stubborn(Good):
    """Keeps the strength of its first call.

    Source: this test.
    """

    first: ClassVar[dict[str, float]] = {}

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        found = cross.with_empty(prompts.text)
        return out - self.first.setdefault("strength", self.strength) * (found[1:] - found[:1]).sum(0)


class Moody(Good):
    def check(self, pipe: Any) -> None:
        raise ValueError("no")


class Guides(Good):
    """Changes the prediction: of methods that edit attention, the engine itself checks the needs."""

    edits_attention: ClassVar[bool] = False
    guides: ClassVar[bool] = True

    def guide(self, seen: Prediction) -> Tensor:
        return seen.negative - seen.concept


class Greedy(Guides):
    needs: ClassVar[tuple[str, ...]] = ("joint_text",)

    def check(self, pipe: Any) -> None:
        pass


class Terse(Guides):
    needs: ClassVar[tuple[str, ...]] = ("causal_text",)

    def check(self, pipe: Any) -> None:
        raise ValueError("Terse needs a causal text encoder")


class Untouching(Good):
    touches_uncond: ClassVar[bool] = True

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        return out if cross.unconditional else super().edit(out, cross, prompts)


class Mixes(Good):
    """Takes a mean over the rows of the batch.

    Source: this test.
    """

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        return super().edit(out, cross, prompts).lerp(out.mean(0, keepdim=True), 0.5)


class Remembers(Good):
    """Acts more in each call.

    Source: this test.
    """

    calls: ClassVar[list[int]] = []

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        self.calls.append(1)
        return super().edit(out, cross, prompts) * (1 + len(self.calls) / 1000)


class Sourceless(Good):
    """Says nothing of where it comes from."""


ONE = {"families": ["sd1"], "steps": 1}


@pytest.mark.long
@pytest.mark.thinned("long")
@pytest.mark.parametrize(
    ("method", "promise", "said"),
    [
        (
            Dead,
            "restores",
            r"Dead on sd1: The method changes the picture by 0\.0e\+00 .* `edits_attention` or `guides` is True",
        ),
        (Litters, "restores", r"The pipeline changed in unet\.conv_in\.litter\. .*Store values .* in `memory`"),
        (Damages, "restores", r"After `remove\(\)` the base model draws another picture"),
        (Swallows, "restores_after_an_exception", "does not reach the caller"),
        (
            NotOff,
            "off_is_the_base_model",
            r"With \{'strength': 0\.5\} the picture is not the base model's\. Name in `off`",
        ),
        (Unequal, "config_survives_json", r"Unequal\(concepts, \*\*config\) is not equal"),
        (Unhashable, "config_survives_json", "has no hash. Write `@dataclass"),
        (Stubborn, "strength_can_be_set", r"A strength of 0\.5 instead of 1\.0 changes .* Read the field"),
        (Greedy, "refuses_what_it_cannot_do", r"lacks joint_text, but `apply` works\. Call `super\(\)\.check"),
        (
            Untouching,
            "touches_unconditional_rows_only_if_declared",
            "`touches_uncond` is True, but on an unconditional",
        ),
        (Mixes, "a_row_is_the_row_alone", r"Row 0 of a batch differs by .* Take no mean"),
        (Remembers, "comes_off_in_any_order", r"Remembers and Remembers.*Keep no state outside of `memory`"),
        (Remembers, "may_be_on_twice", "Applied twice and removed once"),
        (Remembers, "pipelines_are_apart", "On two sd1 pipelines|also acts"),
        (Sourceless, "says_where_it_comes_from", "names neither paper nor source"),
    ],
)
def test_a_broken_promise_is_found(method: Any, promise: str, said: str) -> None:
    check = next(c for c in efface.testing.checks(**ONE) if c.promise.__name__ == promise)
    with pytest.raises(ConformanceError, match=said) as caught:
        check(method("cat"))
    assert two_sentences(str(caught.value)) and str(caught.value).startswith(f"{method.__name__} on sd1: ")
    assert not [site for site in SITES.values() if site.applied]
    check(Good("cat"))  # the next one gets pipelines that nobody has spoilt


def test_a_refusal_without_a_need_and_one_without_a_cure_are_found() -> None:
    refuses = next(c for c in efface.testing.checks(["bert"]) if c.promise is conformance.refuses_what_it_cannot_do)
    refuses(Good("cat"))
    with pytest.raises(ConformanceError, match=r"refuses a family that meets its needs, with 'no'\. Name"):
        refuses(Moody("cat"))
    with pytest.raises(ConformanceError, match="lacks the need or the cure. Write two sentences"):
        refuses(Terse("cat"))


@pytest.mark.long
def test_every_check_sees_what_a_method_leaves() -> None:
    class Marks(Good):
        def apply(self, pipe: Any) -> Any:
            pipe.unet.conv_in.mark = True
            return super().apply(pipe)

    for check in efface.testing.checks(**ONE):
        if check.promise is not conformance.says_where_it_comes_from:
            with pytest.raises(ConformanceError, match=r"unet\.conv_in\.mark"):
                check(Marks("cat"))


@pytest.mark.long
def test_check_returns_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    report = efface.testing.check(Good("cat"), ["flux", "sd1"], steps=1)
    assert not report.broken and {finding.outcome for finding in report} == {"kept", "-"}
    lines = str(report).splitlines()
    assert lines[0].split() == ["flux", "sd1"]
    assert [*lines[1].split()[-2:], *lines[2].split()[-2:]] == ["kept", "kept", "-", "kept"]
    assert len(lines) == 2 + len(conformance.ON_EACH_FAMILY) + len(conformance.ONCE)
    flux = next(finding for finding in report if (finding.promise, finding.family) == ("restores", "flux"))
    assert flux.message.startswith("Good needs cross-attention layers, but this FluxPipeline")
    assert capsys.readouterr().out == ""


@pytest.mark.long
def test_check_raises_with_the_table_and_every_broken_promise() -> None:
    with pytest.raises(ConformanceError) as caught:
        efface.testing.check(Litters("cat"), "sd1", steps=1)
    said = str(caught.value)
    assert re.match(r"Litters breaks \d+ promises\.\n", said)
    assert "BROKEN: refuses what it cannot do, restores, " in said
    assert said.count("Litters on sd1: The pipeline changed in") == 1
    assert re.search(r"^says where it comes from +kept$", said, re.MULTILINE)


@pytest.mark.long
def test_a_method_that_works_nowhere_is_not_conforming() -> None:
    with pytest.raises(ConformanceError, match=r"Good refuses all of flux, sd3\. Add .*\. Good needs cross-attention"):
        efface.testing.check(Good("cat"), ["flux", "sd3"])
    with pytest.raises(ConformanceError, match=r"Good refuses all of flux\. Add a working family"):
        efface.testing.checks(["flux"])[-1](Good("cat"))


def test_the_concept_of_the_method_does_not_matter() -> None:
    """The tiny tokenizers do not know these words."""
    efface.testing.checks(["bert"])[1](Good(Concept("zebra crossing"), rows=[[Concept("zebra")]]))


def test_a_promise_that_does_not_apply_skips_the_test() -> None:
    @dataclass(frozen=True)
    class Plain(Method):
        concepts: tuple[Concept, ...] = ()

    each = {c.promise.__name__: c for c in efface.testing.checks(["sd1"])}
    for promise in ("strength_can_be_set", "off_is_the_base_model", "rows_count_prompts"):
        with pytest.raises(DoesNotApply):
            each[promise](Plain("cat"))


def test_checks_have_names_and_build_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "pipeline", None)
    names = [str(check) for check in efface.testing.checks()]
    assert len(set(names)) == len(names) > 60
    assert {"restores-sd1", "restores-flux", "comes_off_in_any_order"} <= set(names)


@pytest.mark.parametrize("families", [[], ["sdx"], "sdx", ["sd1", 3]])
def test_unknown_families_are_refused(families: Any) -> None:
    with pytest.raises(ValueError, match="names of tiny pipelines, got .* Use some of chroma, cogview4") as caught:
        efface.testing.checks(families)
    assert ("Did you mean 'sdxl'" in str(caught.value)) == ("sdx" in families)


def test_unknown_pipelines_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no tiny pipeline 'sd'\. Did you mean .*'sd1'.*\? Use one of chroma,"):
        efface.testing.pipeline("sd")


@pytest.mark.parametrize("method", [Good, "eiup", None, object()])
def test_no_method_object_is_a_type_error(method: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected a method object .* Make one, such as `Mine\('cat'\)`"):
        efface.testing.check(method, ["sd1"])


@pytest.mark.long
def test_what_a_method_raises_itself_is_not_caught() -> None:
    class Fails(Good):
        def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
            raise ZeroDivisionError

    before, _ = drawing.ready("sd1")
    with pytest.raises(ZeroDivisionError):
        efface.testing.check(Fails("cat"), ["sd1"])
    assert drawing.ready("sd1")[0] is not before
    efface.testing.check(Good("cat"), ["sd1"], steps=1)


@pytest.mark.long
def test_a_method_that_guides_passes() -> None:
    @dataclass(frozen=True)
    class Away(Method):
        """Guides away from the concept.

        Source: this test.
        """

        needs: ClassVar[tuple[str, ...]] = ("guidance",)
        guides: ClassVar[bool] = True

        concepts: tuple[Concept, ...] = ()

        def guide(self, seen: Prediction) -> Tensor:
            return -(seen.concept - seen.negative)

    report = efface.testing.check(Away("cat"), ["sdxl", "flux"], steps=1)
    assert {f.outcome for f in report if f.promise == "restores"} == {"kept"}


def test_snapshots_see_every_kind_of_change() -> None:
    pipe = efface.testing.pipeline("sd1")
    before = drawing.snapshot(pipe)
    assert drawing.differences(drawing.snapshot(pipe), before) == []
    pipe.unet.conv_in.forward = pipe.unet.conv_in.forward
    pipe.encode_prompt = pipe.encode_prompt
    pipe.unet.set_attn_processor(dict(pipe.unet.attn_processors))
    nn.init.zeros_(pipe.vae.post_quant_conv.bias)
    found = drawing.differences(drawing.snapshot(pipe), before)
    assert {"unet.conv_in.forward", "encode_prompt"} <= set(found)
    with torch.no_grad():
        pipe.vae.post_quant_conv.bias.add_(1.0)
    assert "vae.post_quant_conv.bias" in drawing.differences(drawing.snapshot(pipe), before)
