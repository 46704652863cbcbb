"""Policies act on their rows and on no others, what they say is consistent, and no picture comes without proof."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import ALCOHOL, CAT, change
from torch import Tensor

import efface
import efface.testing
from efface import Guard, Policy
from efface.guard import Erasure, Partial, PolicyNotApplied, drawing, explain, parsed, proof
from efface.guard import guard as module
from efface.guard.record import Batch
from efface.hooks import watch
from efface.hooks.prompts import Applied
from efface.testing.tiny import call_options

PROMPT = "a night at the pub"
CALL: dict[str, Any] = {"num_inference_steps": 3}
STRONG = Policy(erase=[Erasure(concepts=[ALCOHOL], strength=3.0)])
WEAK = Policy(erase=[Erasure(concepts=[ALCOHOL], strength=0.5)])
TWO = Policy(erase=[Erasure(concepts=[CAT], method="sld"), Erasure(concepts=[ALCOHOL], method="safree")])
POLICIES = {"strong": STRONG, "weak": WEAK, "two": TWO, "press": efface.unguarded}


def pipeline() -> Any:
    return tiny.pipeline("sd1").to(torch.float64)


def drawn(guarded: Guard, pipe: Any, tenants: list[str], seeds: list[int] | None = None, **call: Any) -> Tensor:
    made = guarded(pipe, [PROMPT] * len(tenants), tenants, seeds or [7] * len(tenants), **CALL | call)
    assert made.again.pictures is not None
    return made.again.pictures


# ---------------------------------------------------------------- rows


def test_each_row_has_its_own_policy_whatever_stands_in_the_batch() -> None:
    pipe, guarded = pipeline(), Guard(POLICIES)
    alone = {tenant: drawn(guarded, pipe, [tenant])[0] for tenant in POLICIES}
    base = efface.api.draw(pipe, [PROMPT], [7], **CALL)[0]
    assert torch.equal(alone["press"], base)
    others = [change(alone[tenant], base) for tenant in ("strong", "weak", "two")]
    assert min(others) > 1e-3 and change(alone["strong"], alone["weak"]) > 1e-3
    for tenants in (["strong", "press", "weak", "two"], ["two", "weak", "strong", "press"]):
        for tenant, picture in zip(tenants, drawn(guarded, pipe, tenants), strict=True):
            assert change(picture, alone[tenant]) < 1e-5, tenant
    assert len(efface.active(pipe)) == 0


def test_concepts_of_one_name_with_other_phrases_are_kept_apart() -> None:
    """Two tenants call different things the same, in one batch and one after the other."""
    lines = {"one": ALCOHOL, "two": CAT}
    named = {key: {"name": "thing", "phrases": [*concept.phrases]} for key, concept in lines.items()}
    policies = {key: Policy(erase=[Erasure(concepts=[entry], strength=3.0)]) for key, entry in named.items()}
    alone = {key: drawn(Guard({key: policy}), pipeline(), [key])[0] for key, policy in policies.items()}
    assert change(alone["one"], alone["two"]) > 1e-3
    pipe, guarded = pipeline(), Guard(policies)
    for tenants in (["two", "one"], ["one"]):
        for tenant, picture in zip(tenants, drawn(guarded, pipe, tenants), strict=True):
            assert change(picture, alone[tenant]) < 1e-5, tenants


def test_the_record_names_policy_eraser_and_steps_of_each_row() -> None:
    window = Policy(erase=[Erasure(concepts=[ALCOHOL], fields={"window": (0.5, 1.0)}, strength=2.0)], version=4)
    guarded = Guard({**POLICIES, "late": window})
    made = guarded(pipeline(), [PROMPT] * 3, ["late", "press", "two"], num_inference_steps=5)
    late, press, two = made.rows
    assert (late.policy, late.version, late.outcome) == (window.hash, 4, "drawn")
    (acted,) = late.acted
    ((first, last),) = acted.steps
    assert 0 < first <= last == 4 and acted.calls == 5 and acted.exempt == {watch.OUTSIDE_WINDOW: first}
    assert acted.eraser["strength"] == 2.0 and acted.concepts == ("alcohol",)
    assert press.acted == () and press.policy == efface.unguarded.hash
    assert [each.eraser["method"] for each in two.acted] == ["sld", "safree"]
    assert len(set(made.seeds)) == 3  # drawn at random


@pytest.mark.thinned("long")
@pytest.mark.parametrize("family", efface.testing.FAMILIES)
def test_rows_are_proven_on_every_family(family: str) -> None:
    pipe = tiny.pipeline(family)
    nag = Policy(erase=[Erasure(concepts=[ALCOHOL], method="nag")])
    guarded = Guard({"strong": STRONG, "nag": nag, "press": efface.unguarded})
    given = call_options(pipe, {}, 1)
    options = CALL | {name: value for name, value in given.items() if "scale" not in name and "negative" not in name}
    base = efface.api.draw(pipe, [PROMPT], [7], guidance=4.0, **options)[0]
    made = guarded(pipe, [PROMPT] * 3, ["strong", "press", "nag"], [7] * 3, guidance=4.0, **options)
    pictures = made.again.pictures
    assert pictures is not None and [row.acted[0].steps if row.acted else () for row in made.rows] == [
        ((0, 2),),
        (),
        ((0, 2),),
    ]
    apart = [float((picture - base).abs().max()) for picture in pictures]
    assert apart[0] > 1e-2 and apart[1] < 1e-4 and apart[2] > 1e-2, apart


@pytest.mark.long
def test_two_threads_with_one_denoiser_wait_for_each_other() -> None:
    first = pipeline()
    second = type(first)(**first.components)
    second.set_progress_bar_config(disable=True)
    guarded = Guard(POLICIES)
    expected = {tenant: drawn(guarded, first, [tenant])[0] for tenant in POLICIES}
    found: list[tuple[str, Tensor]] = []
    failures: list[BaseException] = []

    def work(pipe: Any, tenant: str) -> None:
        try:
            found.append((tenant, drawn(guarded, pipe, [tenant])[0]))
        except BaseException as error:
            failures.append(error)
            raise

    jobs = [threading.Thread(target=work, args=(pipe, t)) for t in POLICIES for pipe in (first, second)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert not failures and len(found) == 8
    assert all(change(picture, expected[tenant]) < 1e-5 for tenant, picture in found)
    assert module.lock_of(first) is module.lock_of(second) is not module.lock_of(pipeline())


def test_arguments_of_as_many_values_as_rows_are_no_rows() -> None:
    """Such as two coordinates for two prompts, of which one is drawn again."""
    given = {"negative_prompt": ["a", "b"], "original_size": (64, 32), "crops_coords_top_left": [0, 8], "eta": 0.0}
    batch = Batch(lambda: None, ("x", "y"), ("kids", "press"), (1, 2), None, given)  # type: ignore[arg-type]
    assert batch.some([1]).call == {**given, "negative_prompt": ["b"]}


# ---------------------------------------------------------------- fail closed


def test_a_row_that_the_engine_did_not_edit_gives_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    edited = Applied.edited_rows
    monkeypatch.setattr(Applied, "edited_rows", lambda self, n: [row for row in edited(self, n) if row != 1])
    pipe, guarded = pipeline(), Guard(POLICIES)
    with pytest.raises(PolicyNotApplied, match=r"of 'weak' is not proven for row 1, because eiup did not edit the row"):
        guarded(pipe, [PROMPT] * 2, ["strong", "weak"], **CALL)
    made = guarded.draw(pipe, [PROMPT] * 3, ["strong", "weak", "press"], **CALL)
    assert [row.outcome for row in made.rows] == ["drawn", "not proven", "drawn"]
    assert [image is None for image in made.images] == [False, True, False]
    kept = made.again.pictures
    assert kept is not None and [bool(each.any()) for each in kept] == [True, False, True]  # nor is it in the result


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda record: record.log.clear(), "saw 0 denoiser calls"),
        (lambda record: record.log.pop(), "saw 2 denoiser calls"),
        (lambda record: record.log.__setitem__(1, (frozenset(), watch.NO_CONCEPTS)), "did not act because"),
        (lambda record: record.log.__setitem__(1, (frozenset(), watch.OFF)), "did not act because"),
        (lambda record: record.log.__setitem__(1, (frozenset({1}), "")), "did not edit the row in denoiser call 1"),
        (
            lambda record: record.log.__setitem__(slice(0, 3), [(frozenset(), watch.OUTSIDE_WINDOW)] * 3),
            "edited the row in no denoiser call",
        ),
    ],
)
def test_a_record_with_a_gap_proves_nothing(change: Any, why: str) -> None:
    (line,) = proof.lines([WEAK], tiny.pipeline("sd1"))
    record = watch.Record()
    for _ in range(3):
        record.add([0])
    assert proof.acted(line, record, 0, 3)[1] == ""
    change(record)
    assert why in proof.acted(line, record, 0, 3)[1]


def test_a_policy_that_no_eraser_serves_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "lines", lambda *_: [])
    with pytest.raises(PolicyNotApplied, match="no eraser acted on 'alcohol'"):
        drawn(Guard(POLICIES), pipeline(), ["weak"])


def test_a_pipeline_with_erasers_and_calls_that_name_what_the_guard_sets_are_refused() -> None:
    pipe, guarded = pipeline(), Guard(POLICIES)
    with efface.EIUP(CAT).apply(pipe), pytest.raises(RuntimeError, match="without run-time erasers"):
        drawn(guarded, pipe, ["weak"])
    for name in module.OWN:
        with pytest.raises((ValueError, TypeError), match=name):
            guarded(pipe, [PROMPT], ["weak"], **{name: None})
    for tenants, seeds, why in [
        (["weak", "weak"], None, "one tenant per prompt"),
        (["weaker"], None, "Did you mean 'weak'"),
        (["weak"], [1, 2], "one seed per prompt"),
        (["weak"], [-1], "seed"),
    ]:
        with pytest.raises(ValueError, match=why):
            guarded(pipe, [PROMPT], tenants, seeds)
    with pytest.raises(TypeError, match="a sequence of texts"):
        guarded(pipe, PROMPT, ["weak"])


# ---------------------------------------------------------------- gates


class Detects:
    """Finds a concept in the first pictures that it sees."""

    name = "a stub"

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self, images: Tensor) -> Tensor:
        self.left -= 1
        return torch.tensor([[self.left >= 0], [False]])


@pytest.mark.thinned("long")
@pytest.mark.parametrize(
    ("gate", "times", "outcome", "strengths"),
    [
        ({"on_detection": "block"}, 0, "drawn", [2.0]),
        ({"on_detection": "block"}, 1, "blocked", [2.0]),
        ({"on_detection": "log"}, 1, "logged", [2.0]),
        ({"on_detection": "redraw"}, 1, "redrawn", [3.0]),
        ({"on_detection": "redraw"}, 2, "blocked", [3.0]),
        ({"on_detection": "redraw", "redraws": 2, "stronger": 2.0}, 2, "redrawn", [8.0]),
        ({"on_detection": "redraw", "redraws": 2, "stronger": 2.0}, 9, "blocked", [8.0]),
    ],
)
def test_a_detector_blocks_redraws_or_logs(
    gate: dict[str, Any], times: int, outcome: str, strengths: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(erase=[Erasure(concepts=[ALCOHOL], strength=2.0)], gate={"detector": "eyes", **gate})
    monkeypatch.setattr(module, "detector", lambda spec, names: Detects(times))
    pipe = pipeline()
    guarded = Guard({"gated": policy, "press": efface.unguarded})
    made = guarded(pipe, [PROMPT] * 2, ["press", "gated"], [7, 7], **CALL)
    row = made.rows[1]
    assert row.outcome == outcome and [each.eraser["strength"] for each in row.acted] == strengths
    assert (made.images[1] is None) == (outcome == "blocked") and made.images[0] is not None
    assert [bool(seen) for seen in row.detections] == [k < times for k in range(len(row.detections))]
    if outcome == "redrawn":  # with the strength of the record, and with the same seed
        same = Guard({"x": Policy(erase=[Erasure(concepts=[ALCOHOL], strength=strengths[0])])})
        assert made.again.pictures is not None
        assert change(made.again.pictures[1], drawn(same, pipe, ["x"])[0]) < 1e-5


def test_a_gate_needs_a_detector_that_can_judge_the_concepts() -> None:
    with pytest.raises(ValueError, match="nudity"):
        Guard({"kids": Policy(erase=["nudity"], gate={"detector": "eyes"})})
    with pytest.raises(ValueError, match="Did you mean 'eyes'"):
        Guard({"kids": Policy(erase=["alcohol"], gate={"detector": "eye"})})


# ---------------------------------------------------------------- policies

LINE = {"concepts": ["alcohol"]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({}, r"Write `unguarded: true`"),
    "empty list": ({"erase": []}, r"Write `unguarded: true`"),
    "no concept": ({"erase": [{"concepts": []}]}, "at least 1"),
    "unguarded and erased": ({"erase": ["alcohol"], "unguarded": True}, "Leave out one"),
    "unguarded and gate": ({"unguarded": True, "gate": {"detector": "eyes"}}, "Leave out one"),
    "unknown concept": ({"erase": ["alcohool"]}, "Did you mean 'alcohol'"),
    "unknown method": ({"erase": [LINE | {"method": "eipu"}]}, "Did you mean 'eiup'"),
    "an editor": ({"erase": [LINE | {"method": "uce"}]}, "uce"),
    "unknown field": ({"erase": [LINE | {"fields": {"windo": 1}}]}, "Did you mean 'window'"),
    "field out of range": ({"erase": [LINE | {"fields": {"window": [0, 2]}}]}, "start <= end <= 1"),
    "rows as a field": ({"erase": [LINE | {"fields": {"rows": []}}]}, "The policy decides it"),
    "strength 0": ({"erase": [LINE | {"strength": 0}]}, "greater than 0"),
    "strength as a field": ({"erase": [LINE | {"fields": {"strength": 1}}]}, "beside `method`"),
    "strength as text": ({"erase": [LINE | {"strength": "1"}]}, "strength"),
    "unknown entry": ({"erase": ["alcohol"], "strenght": 1}, "strenght"),
    "unknown entry of a line": ({"erase": [LINE | {"strenght": 1}]}, "strenght"),
    "two strengths": (
        {"erase": [LINE | {"strength": 1.0}, LINE | {"strength": 2.0}]},
        "erased twice by 'eiup', so it would have two strengths",
    ),
    "two presets": ({"erase": [LINE | {"method": "sld"}, LINE | {"method": "sld.strong"}]}, "erased twice by 'sld'"),
    "two phrases": ({"erase": [LINE, {"concepts": [{"name": "alcohol"}], "method": "sld"}]}, "different phrases"),
    "its own anchor": (
        {"erase": [{"concepts": ["alcohol"], "anchors": {"alcohol": "Beer mug "}}]},
        "'alcohol' is erased and also an anchor of 'alcohol'",
    ),
    "erased anchor": (
        {"erase": [{"concepts": ["alcohol", "cat"], "anchors": {"alcohol": "cat"}}]},
        "'cat' is erased and also an anchor of 'alcohol'",
    ),
    "erased and kept": (
        {"erase": ["cat", {"name": "dog", "keep": ["cat"]}]},
        "'cat' is erased and also kept text of 'dog'",
    ),
    "anchor of another": ({"erase": [LINE | {"anchors": {"cat": "dog"}}]}, "anchors"),
    "anchor without effect": ({"erase": [LINE | {"anchors": {"alcohol": "water"}}]}, "maps no concept to an anchor"),
    "redraw without strength": (
        {"erase": [LINE | {"method": "negative_prompt"}], "gate": {"detector": "eyes", "on_detection": "redraw"}},
        "no strength to raise",
    ),
    "three redraws": ({"erase": ["cat"], "gate": {"detector": "eyes", "redraws": 3}}, "redraws"),
    "weaker redraw": ({"erase": ["cat"], "gate": {"detector": "eyes", "stronger": 1.0}}, "stronger"),
    "unknown reaction": ({"erase": ["cat"], "gate": {"detector": "eyes", "on_detection": "ignore"}}, "on_detection"),
    "version 0": ({"erase": ["cat"], "version": 0}, "version"),
    "version 1.5": ({"erase": ["cat"], "version": 1.5}, "version"),
    "concept of another form": ({"erase": [{"name": "cat", "phrase": "x"}]}, "name, phrases, anchor, keep"),
    "not JSON": ({"erase": [LINE | {"fields": {"window": {1}}}]}, "JSON types"),
    "a number": ({"erase": [1]}, "erase"),
    "an entry with the name of an argument": (
        {"erase": ["cat"], "self": 1},
        "`self` of a policy, because it is unknown",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_empty_unknown_or_contradictory_policy_is_refused(case: str) -> None:
    entries, why = REFUSED[case]
    with pytest.raises(ValueError, match=why) as caught:
        Policy(**entries)
    said = str(caught.value)
    assert type(caught.value) is ValueError and said.endswith((".", "?")) and len(said) < 420, said


def test_a_guard_says_unguarded_in_words() -> None:
    for empty in ([], (), ""):
        with pytest.raises(ValueError, match=r"efface\.unguarded"):
            Guard({"press": empty})
    for odd in (None, 1, {"erase": ["cat"]}):
        with pytest.raises(TypeError, match=r"efface\.unguarded"):
            Guard({"press": odd})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="from tenants to policies"):
        Guard({})
    made = Guard({"kids": "alcohol", "press": efface.unguarded}, method="sld.strong", strength=0.5).policies
    assert made["kids"].erase[0].setting == '["sld.strong", 0.5, {}]' and made["press"].unguarded


def test_a_policy_has_one_hash_and_does_not_change() -> None:
    policy = Policy(erase=[LINE | {"fields": {"window": [0.0, 0.5]}}], version=2, gate={"detector": "eyes"})
    assert Policy(**policy.as_json()).hash == policy.hash
    changes: list[dict[str, Any]] = [
        {"version": 3},
        {"gate": None},
        {"gate": {"detector": "eyes", "on_detection": "log"}},
        {"erase": [LINE]},
        {"erase": [LINE | {"fields": {"window": [0.0, 0.6]}}]},
        {"erase": [{"concepts": [{"name": "alcohol"}], "fields": {"window": [0.0, 0.5]}}]},
    ]
    hashes = {Policy(**{**policy.as_json(), **each}).hash for each in changes}
    assert len(hashes | {policy.hash}) == len(changes) + 1
    copied = policy.model_copy(update={"gate": None})
    assert copied.gate is None and copied.hash == Policy(**{**policy.as_json(), "gate": None}).hash != policy.hash
    assert policy.model_copy().hash == policy.hash
    with pytest.raises(ValueError, match="got an empty one"):
        policy.model_copy(update={"erase": (), "gate": None})
    with pytest.raises(ValueError, match="frozen"):
        policy.version = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        policy.erase[0].fields["window"] = [0, 1]  # type: ignore[index]


def test_further_erasures_can_only_be_added() -> None:
    policy = Policy(erase=[Erasure(concepts=["alcohol"], strength=1.5)], gate={"detector": "eyes"}, version=2)
    more = policy.plus(["cat", "alcohol"])
    assert [each.name for each in more.concepts] == ["alcohol", "cat"] and more.gate == policy.gate
    assert {each.strength for each in more.erase} == {1.5} and more.hash != policy.hash
    assert policy.plus([]) is policy is policy.plus(["alcohol"])
    assert [each.name for each in efface.unguarded.plus(["cat"]).concepts] == ["cat"]
    with pytest.raises(ValueError, match="Did you mean 'alcohol'"):
        policy.plus(["alcohool"])


YAML = """
policies:
  kids:
    version: 3
    erase:
      - alcohol
      - {name: neon sign, phrases: [neon sign, glowing sign]}
      - {concepts: [weapon], method: sld.strong}
    gate: {detector: eyes, on_detection: redraw, redraws: 2}
  press: {unguarded: true}
"""


def test_policies_are_read_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "policies.yaml").write_text(YAML)
    kids = Guard.load(tmp_path / "policies.yaml").policies["kids"]
    assert [(each.method, [c.name for c in each.concepts]) for each in kids.erase] == [
        ("eiup", ["alcohol", "neon sign"]),
        ("sld.strong", ["weapon"]),
    ]
    assert kids.concepts[1].phrases == ("neon sign", "glowing sign") and kids.version == 3
    assert kids.gate is not None and (kids.gate.on_detection, kids.gate.redraws) == ("redraw", 2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("policies: {kids: {erase: [cat], erase: [dog]}}", "occurs twice"),
        ("policies: {kids: {erase: [cat]}, kids: {unguarded: true}}", "occurs twice"),
        ("policies: {a: &x {erase: [cat]}, b: *x}", "alias"),
        ("policies: {1: {erase: [cat]}}", "not a text"),
        ("policies: !!python/object/apply:os.system ['true']", "YAML"),
        ("policies: " + "[" * 5_000, "nested"),
        ("policies: {}", "at least one policy"),
        ("policies: {kids: }", "to be a mapping"),
        ("policies: {kids: {erase: [no]}}", "erase"),
        ("policies: {kids: {unguarded: 'true'}}", "unguarded"),
        ("policies: {kids: {self: 1}}", "unknown"),
        ("kids: {erase: [cat]}", "one entry `policies`"),
        ("policies: {kids: {erase: [cat]}}\nmore: 1", "one entry `policies`"),
        ("", "one entry `policies`"),
        ("--- 1\n--- 2", "YAML"),
    ],
)
def test_yaml_with_two_meanings_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        parsed(text, "policies.yaml")
    assert "policies.yaml" in str(caught.value)


# ---------------------------------------------------------------- where


def test_the_map_shows_where_the_eraser_changed_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eraser that changes the left half only is found there."""
    edit = efface.EIUP.edit

    def left(self: Any, out: Tensor, cross: Any, prompts: Any) -> Tensor:
        side = round(out.shape[1] ** 0.5)
        there = (torch.arange(out.shape[1]) % side < side // 2)[None, :, None]
        return torch.where(there, edit(self, out, cross, prompts), out)

    monkeypatch.setattr(efface.EIUP, "edit", left)
    pipe, guarded = pipeline(), Guard(POLICIES)
    made = guarded(pipe, [PROMPT] * 2, ["press", "strong"], [7, 8], **CALL)
    seen: list[Tensor] = []
    monkeypatch.setattr(explain, "_overlay", lambda picture, found: seen.append(explain.heat(found, 16, 16)) or picture)
    assert guarded.explain(made, 1).width > 200
    assert float(seen[0][:, :5].mean()) > 5 * float(seen[0][:, 11:].mean())
    with pytest.raises(ValueError, match="has no erasure"):
        guarded.explain(made, 0)
    with pytest.raises(ValueError, match="`row`"):
        guarded.explain(made, 2)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cannot be drawn again"):
        guarded.explain(made, 1)


def test_a_method_outside_attention_has_no_map() -> None:
    pipe, guarded = pipeline(), Guard({"two": TWO})
    made = guarded(pipe, [PROMPT], ["two"], **CALL)
    with pytest.raises(ValueError, match="sld, safree changes the prompt or the prediction"):
        guarded.explain(made)


# ---------------------------------------------------------------- partial pictures


def shown(guarded: Guard, pipe: Any, tenants: list[str], steps: dict[int, list[int]], **call: Any) -> Any:
    """The partial pictures by row and step, and the result."""
    found: dict[tuple[int, int], Any] = {}
    partial = Partial(steps, lambda row, step, picture: found.__setitem__((row, step), picture))
    options = {"num_inference_steps": 4} | call
    return found, guarded.draw(pipe, [PROMPT] * len(tenants), tenants, [7] * len(tenants), partial=partial, **options)


@pytest.mark.parametrize("family", efface.testing.FAMILIES)
def test_latents_are_shown_as_the_pipeline_decodes_them(family: str) -> None:
    """The latents of the last step give the finished picture."""
    pipe = tiny.pipeline(family)
    guarded = Guard({"open": Policy(unguarded=True, partial_pictures=True)})
    given = call_options(pipe, {}, 1)
    options = {name: value for name, value in given.items() if "scale" not in name and "negative" not in name}
    if not Partial.possible(pipe):
        assert family in {"flux", "flux2", "chroma", "qwenimage", "pixart", "pixart_sigma"}, family
        with pytest.raises(ValueError, match="whose latents can be shown"):
            shown(guarded, pipe, ["open"], {0: [1]}, **options)
        return
    found, result = shown(guarded, pipe, ["open"] * 2, {1: [1, 2]}, **options | {"num_inference_steps": 2})
    assert found.keys() == {(1, 1), (1, 2)}
    last = np.array(result.images[1], dtype=float)
    apart = [float(np.abs(np.array(found[1, step], dtype=float) - last).max()) for step in (1, 2)]
    assert apart[1] == 0 and apart[0] >= 1, apart  # of 255


@pytest.mark.long
def test_only_rows_that_are_proven_so_far_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Erasure(concepts=[ALCOHOL], fields={"window": (0.5, 1.0)}, strength=2.0)
    policies = {"late": Policy(erase=[late], partial_pictures=True), "press": efface.unguarded}
    pipe, guarded = pipeline(), Guard(policies | {"strong": Policy(erase=STRONG.erase, partial_pictures=True)})
    found, result = shown(guarded, pipe, ["press", "late", "strong"], {1: [1, 2, 3], 2: [1]})
    ((first, _),) = result.rows[1].acted[0].steps
    assert first > 0 and found.keys() == {(1, step) for step in (1, 2, 3) if step > first} | {(2, 1)}
    edited = Applied.edited_rows
    monkeypatch.setattr(Applied, "edited_rows", lambda self, n: [row for row in edited(self, n) if row != 1])
    found, result = shown(guarded, pipe, ["strong", "strong"], {0: [2], 1: [2]})
    assert found.keys() == {(0, 2)} and [row.outcome for row in result.rows] == ["drawn", "not proven"]


def test_partial_pictures_need_a_policy_that_allows_them_and_a_pipeline_without_a_checker() -> None:
    pipe, guarded = pipeline(), Guard({"weak": WEAK, "open": Policy(unguarded=True, partial_pictures=True)})
    with pytest.raises(ValueError, match="policies allow partial pictures, got row 0"):
        shown(guarded, pipe, ["weak", "open"], {0: [1]})
    with pytest.raises(ValueError, match="`row`"):
        shown(guarded, pipe, ["open"], {1: [1]})
    pipe.safety_checker = torch.nn.Identity()
    with pytest.raises(ValueError, match="whose latents can be shown"):
        shown(guarded, pipe, ["open"], {0: [1]})


def test_a_policy_bounds_the_guidance_scale_that_calls_may_ask_for() -> None:
    pipe, bounded = pipeline(), Policy(erase=WEAK.erase, guidance=[3, 8])
    guarded = Guard({"weak": WEAK, "bounded": bounded, "late": Policy(erase=WEAK.erase, guidance=[9, 12])})

    def draw(tenants: list[str], guidance: float | None) -> Any:
        return guarded(pipe, ["a cat"] * len(tenants), tenants, [1] * len(tenants), guidance, num_inference_steps=1)

    for scale in (1.01, 2.9, 8.1):
        with pytest.raises(ValueError, match=f"a guidance scale from 3 to 8, as the policy says, got {scale}"):
            draw(["weak", "bounded"], scale)
    with pytest.raises(ValueError, match="from 9 to 12, as the policy says, got 7.5"):  # the pipeline's default
        draw(["late"], None)
    for scale in (3, 8.0, None):
        assert draw(["bounded"], scale).rows[0].outcome == "drawn"
    assert draw(["weak"], 1.01).rows[0].outcome == "drawn"
    again = Policy(**bounded.as_json())
    assert again == bounded and again.hash != WEAK.hash and "guidance" not in WEAK.as_json()
    assert bounded.plus(["weapon"]).guidance == (3, 8)
    for wrong in ([1, 5], [5, 4], [3], [3, 4, 5], 7.5, [3, float("inf")], ["3", 4]):
        with pytest.raises(ValueError, match="guidance"):
            Policy(erase=["cat"], guidance=wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- outcome


@pytest.mark.long
def test_one_batch_shows_wine_to_the_press_and_none_to_kids() -> None:
    pipe = efface.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    guarded = Guard({"kids": Policy(erase=["alcohol"], gate={"detector": "eyes"}), "press": efface.unguarded})
    seeds = [1_000_000, 1_000_001]
    made = guarded(pipe, ["a glass of wine"] * 4, ["kids", "press"] * 2, sorted(seeds * 2), num_inference_steps=8)
    eyes = efface.detector("eyes", "alcohol")
    assert made.again.pictures is not None
    seen = eyes(made.again.pictures).any(0).tolist()
    assert sum(seen[1::2]) == 2 and sum(seen[::2]) == 0
    assert [row.outcome for row in made.rows] == ["drawn"] * 4
    with pytest.raises(ValueError, match="another guard"):
        Guard({"kids": ["weapon"]}).explain(made)
