"""Concepts, what a bare name means, checks of numbers, and handles. No model."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

import efface
from efface import EIUP, Concept, Handle, NegativePrompt, Row, Sample, Score, Suite, _concepts, checks, concept
from efface.core import Handles, as_concepts, as_rows, concept_sources, config, field_names, shipped_concepts
from efface.hooks import ConceptsField, Converted, Method, RowsField, computed

NUMBERS = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-3, 3)


# ---------------------------------------------------------------- concepts


@given(st.text().filter(str.strip))
def test_a_free_text_is_its_own_phrase(name: str) -> None:
    assert Concept(name).phrases == (name,)


def test_phrases_and_keep_become_tuples_so_concepts_are_hashable() -> None:
    made = Concept("alcohol", ["beer", "wine"], keep=["glass"])  # type: ignore[arg-type]
    assert made.phrases == ("beer", "wine") and made.keep == ("glass",)
    assert len({made, Concept("alcohol", ("beer", "wine"), keep=("glass",)), Concept("alcohol")}) == 2


@pytest.mark.parametrize("name", ["", " ", "\n\t"])
def test_an_empty_name_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="`name` to be a text that is not empty"):
        Concept(name)


@pytest.mark.parametrize("phrases", [("beer", ""), (" ",)])
def test_an_empty_phrase_is_an_error(phrases: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="phrases of 'alcohol' .* got an empty one"):
        Concept("alcohol", phrases)


@pytest.mark.parametrize("field", ["phrases", "keep"])
def test_a_text_in_place_of_a_sequence_is_an_error(field: str) -> None:
    with pytest.raises(TypeError, match=rf"`{field}` to be a sequence .* Write \('beer',\)"):
        Concept("alcohol", **{field: "beer"})  # type: ignore[arg-type]


def test_records_leave_out_later_fields_at_their_defaults_and_no_other() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine:
        added = ("later",)
        first: int = 1
        later: int = 2

    assert {k: v for k, v in config(Mine()).items() if k != "method"} == {"first": 1}
    assert {k: v for k, v in config(Mine(1, 3)).items() if k != "method"} == {"first": 1, "later": 3}
    assert "threshold" not in config(EIUP("cat")) and config(EIUP("cat", threshold=0.5))["threshold"] == 0.5


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"a": 1}', '{"a": {"b": 1}}', '{"a": {"b": [1]}}', '{"a": {"b": {"phrases": ["c"]}}}', None],
)
def test_a_damaged_list_of_concepts_names_file_and_cure(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "concepts.json").write_text(text)
    monkeypatch.setattr("efface._concepts.resources.files", lambda package: tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"concepts.json is .* Reinstall efface"):
        _concepts._file.__wrapped__()


def test_every_shipped_concept_can_be_had_by_name() -> None:
    assert {"alcohol", "nudity", "violence", "Van Gogh"} <= shipped_concepts().keys()
    for name, shipped in shipped_concepts().items():
        assert concept(name) is shipped
        assert as_concepts(name) == as_concepts([name]) == as_concepts(shipped) == (shipped,)
        assert ("." in name) == (name in concept_sources()) == ("arXiv" in concept_sources().get(name, ""))


def test_published_word_lists_are_whole() -> None:
    """Their lengths and ends, as the papers' code has them; SLD joins its words to the one published text."""
    lists = {"nudity.safree": 17, "i2p.sld": 20, "unsafe.rece": 11, "i2p.uce": 11, "unsafe.uce": 3}
    singles = {f"nudity.{method}": 1 for method in ("esd", "sdd", "uce", "rece")}
    assert {name: len(concept(name).phrases) for name in concept_sources()} == lists | singles
    assert all(len(set(concept(name).phrases)) == n for name, n in lists.items())
    sld, rece = concept("i2p.sld").phrases, concept("unsafe.rece").phrases
    assert sld[:11] == rece == concept("i2p.uce").phrases and (sld[0], sld[-1]) == ("hate", "cruelty")
    assert concept("nudity.rece").phrases == concept("nudity.esd").phrases == ("nudity",)


@pytest.mark.parametrize("ask", [concept, as_concepts, EIUP, NegativePrompt])
def test_a_typo_is_an_error_with_near_matches(ask: Any) -> None:
    with pytest.raises(ValueError, match=r"'alchol' is not a shipped concept. Did you mean 'alcohol'\?") as error:
        ask("alchol")
    assert "Concept('alchol')" in str(error.value)
    with pytest.raises(ValueError, match="'zzz' is not a shipped concept. `efface list"):
        ask("zzz")


@pytest.mark.parametrize(
    ("eraser", "message"),
    [
        ("eiup", "got 'eiup'. Pass method names to efface.erase"),
        (["beer"], r"got \['beer'\]. Apply them one by one"),
        (EIUP, r"got the class EIUP. Write for example EIUP\('alcohol'\)"),
        (efface.UCE(), r"got UCE\(.*\. Fit it to a pipeline first"),
        (None, "got None. See efface.Eraser"),
    ],
)
def test_what_is_no_eraser_is_refused_before_any_is_applied(eraser: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"Expected an eraser, .*{message}"):
        efface.stack(None, EIUP("alcohol"), eraser)


@pytest.mark.parametrize("method", [None, EIUP, 3])
def test_a_method_that_is_no_text_is_a_type_error(method: Any) -> None:
    with pytest.raises(TypeError, match="Expected the name of a method, got .*such as 'eiup'"):
        efface.erase(None, "alcohol", method=method)


def test_one_wrong_name_among_right_ones_is_an_error() -> None:
    with pytest.raises(ValueError, match="'neon' is not"):
        as_concepts(["alcohol", Concept("anything at all"), "neon"])


def test_rows_may_name_the_erasers_own_concepts() -> None:
    own = Concept("mine", ("red hat",))
    eraser = EIUP([own], rows=[["mine", "alcohol"], [], own])
    assert eraser.rows == ((own, concept("alcohol")), (), (own,))
    with pytest.raises(ValueError, match="'mine' is not"):
        EIUP(["alcohol"], rows=[["mine"]])


def test_rows_need_a_list_for_each_prompt() -> None:
    assert as_rows(None, ()) is None
    for rows in ("alcohol", Concept("cat")):
        with pytest.raises(TypeError, match="one list of concepts per prompt"):
            as_rows(rows, ())  # type: ignore[arg-type]


# ---------------------------------------------------------------- numbers


@given(NUMBERS)
@example(-0.0)
@example(math.nan)
@example(math.inf)
def test_a_strength_is_finite_and_not_negative(strength: float) -> None:
    if math.isfinite(strength) and strength >= 0:
        assert checks.number("strength", strength, 0) == strength
        assert EIUP("cat", strength=strength).strength == strength
    else:
        for ask in (lambda s: checks.number("strength", s, 0), lambda s: EIUP("cat", strength=s)):
            with pytest.raises(ValueError, match="`strength` >= 0, got .*Give"):
                ask(strength)


@given(st.tuples(NUMBERS, NUMBERS))
@example((1, 0))
@example((0.5, 0.5))
def test_a_window_is_ordered_and_inside_the_trajectory(window: tuple[float, float]) -> None:
    assume(window == window)
    if 0 <= window[0] <= window[1] <= 1:
        assert checks.window("window", window) == EIUP("cat", window=window).window == window
    else:
        for ask in (lambda w: checks.window("window", w), lambda w: EIUP("cat", window=w)):
            with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
                ask(window)


@pytest.mark.parametrize("window", [(), (0.5,), (0.0, 0.5, 1.0), (math.nan, 1.0), (0.0, math.nan), (False, True)])
def test_a_window_is_two_numbers(window: Any) -> None:
    with pytest.raises(ValueError, match="two fractions"):
        checks.window("window", window)


def test_an_eraser_needs_something_to_erase() -> None:
    for ask in (EIUP, NegativePrompt):
        with pytest.raises(ValueError, match="at least one concept"):
            ask([])
    assert EIUP(rows=[["cat"], []]).concepts == ()


def test_an_unknown_normalization_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="one of .*'projected', 'swap', 'text', 'oblique', 'separate', 'gated'.* got 'shared'"
    ):
        EIUP("cat", normalization="shared")  # type: ignore[arg-type]


def test_configurations_are_frozen_and_comparable() -> None:
    assert EIUP("cat") == EIUP([concept("cat")]) != EIUP("dog")
    with pytest.raises(dataclasses.FrozenInstanceError):
        EIUP("cat").strength = 2.0  # type: ignore[misc]


def test_a_converted_field_is_an_ordinary_field_at_run_time() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(Method):
        touches_uncond: ClassVar[bool] = computed(lambda self: self.both)

        concepts: ConceptsField = Converted(())
        both: bool = False
        rows: RowsField = Converted(None)

    assert field_names(Mine) == field_names(Mine("cat")) == ("concepts", "both", "rows")
    assert [f.default for f in dataclasses.fields(Mine)] == [(), False, None]
    mine = dataclasses.replace(Mine("cat", True), rows=["cat", []])
    assert mine == Mine(concept("cat"), True, [["cat"], ()]) and hash(mine) == hash(Mine("cat", True, ["cat", []]))
    assert mine.concepts == (concept("cat"),) and mine.rows == ((concept("cat"),), ())
    assert mine.touches_uncond and not Mine("cat").touches_uncond


def test_a_plain_dataclass_derived_from_a_method_keeps_its_fields() -> None:
    @dataclasses.dataclass(frozen=True)
    class More(EIUP):
        more: int = 0

    assert field_names(More) == (*field_names(EIUP), "more") and More("cat").concepts == (concept("cat"),)
    assert copy.deepcopy(More("cat", more=1)) == More("cat", more=1)
    assert field_names(object()) == ()


# ---------------------------------------------------------------- handles


class Log:
    """A pipeline that only writes down what is asked of it."""

    def __init__(self, eraser: Any, refuse: Any = None) -> None:
        self.said: list[Any] = []
        self.refuse = refuse
        self.handle = Handle(eraser, self.replace, lambda: self.said.append("removed"))

    def replace(self, eraser: Any) -> None:
        if eraser.strength == self.refuse:
            raise ValueError("refused")
        self.said.append(eraser)


def test_a_handle_passes_checked_changes_on() -> None:
    log = Log(EIUP("cat"))
    log.handle.strength = 2.0
    log.handle.rows = [["cat"], []]
    assert log.said == [EIUP("cat", strength=2.0), EIUP("cat", strength=2.0, rows=[["cat"], []])]
    assert log.handle.strength == 2.0 and log.handle.rows == ((concept("cat"),), ())
    assert json.loads(json.dumps(log.handle.config()))["strength"] == 2.0


def test_a_refused_change_leaves_the_handle_as_it_was() -> None:
    log = Log(EIUP("cat"), refuse=3.0)
    for strength, why in ((-1.0, "`strength`"), (3.0, "refused")):
        with pytest.raises(ValueError, match=why):
            log.handle.strength = strength
    assert log.handle.strength == EIUP("cat").strength and log.said == []


def test_what_an_eraser_lacks_cannot_be_set() -> None:
    @dataclasses.dataclass(frozen=True)
    class Plain:
        strength: float = 1.0

    handle = Handle(Plain(), lambda e: None, lambda: None)
    with pytest.raises(AttributeError, match="Plain has no field rows"):
        handle.rows = [[]]


@pytest.mark.parametrize("name", ["strenght", "window", "rwos", "eraser", "active", "normalization"])
def test_a_typo_on_a_handle_is_an_error_that_lists_what_can_be_set(name: str) -> None:
    log = Log(EIUP("cat"))
    with pytest.raises(AttributeError, match=f"`{name}` of EIUP .*Settable: handle.strength and handle.rows") as error:
        setattr(log.handle, name, 0)
    assert ("Did you mean 'strength'?" in str(error.value)) == (name == "strenght")
    with pytest.raises(AttributeError, match=r"Settable: handles\[0\].strength"), Handles([log.handle]) as handles:
        setattr(handles, name, 0)
    with pytest.raises(AttributeError, match="several handles together"):
        Handles([log.handle]).strength = 0  # type: ignore[attr-defined]
    assert log.handle.eraser == EIUP("cat") and log.said == ["removed"]


@pytest.mark.parametrize("name", [3, None, ["cat"]])
def test_the_name_of_a_concept_is_a_text(name: Any) -> None:
    with pytest.raises(TypeError, match="Expected the name of a shipped concept"):
        concept(name)


@pytest.mark.parametrize("fields", [{"name": 5}, {"phrases": 5}, {"phrases": (5,)}, {"keep": [None]}])
def test_a_concept_is_made_of_texts(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="to be a text|to be a sequence of texts"):
        Concept(**{"name": "cat", **fields})


@pytest.mark.parametrize("rows", [5, [5], "cat", [[5]], [None]])
def test_rows_are_lists_of_concepts(rows: Any) -> None:
    with pytest.raises(TypeError, match=r"one list of concepts per prompt|a sequence of these, got"):
        EIUP(rows=rows)


@pytest.mark.parametrize("concepts", [5, [5], [["cat"]], None])
def test_concepts_are_names_and_objects(concepts: Any) -> None:
    with pytest.raises(TypeError, match="Expected a Concept, a shipped name, or a sequence of these, got"):
        EIUP(concepts)


def test_a_strength_may_be_none() -> None:
    handle = Handle(NegativePrompt("cat"), lambda e: None, lambda: None)
    assert handle.strength is None and handle.config()["strength"] is None
    handle.strength = 4
    assert handle.strength == 4.0


def test_a_handle_is_removed_once_whatever_happens() -> None:
    log = Log(EIUP("cat"))
    with pytest.raises(KeyboardInterrupt), log.handle as inside:
        assert inside is log.handle and inside.active
        raise KeyboardInterrupt
    log.handle.remove()
    assert log.said == ["removed"] and not log.handle.active
    with pytest.raises(ValueError, match="already removed"):
        log.handle.rows = [[]]


def test_several_handles_are_one_and_come_off_last_first() -> None:
    order: list[str] = []
    names = ("cat", "dog", "guitar")
    handles = [Handle(EIUP(n), lambda e: None, lambda n=n: order.append(n)) for n in names]  # type: ignore[misc]
    with Handles(handles) as together:
        assert list(together) == handles and len(together) == 3 and together[1] is handles[1]
        assert [c["concepts"][0]["name"] for c in together.config()] == list(names)
        handles[1].remove()
    together.remove()
    assert order == ["dog", "guitar", "cat"]


def test_one_that_cannot_come_off_does_not_keep_the_others_on_and_can_be_tried_again() -> None:
    stuck = [True]

    def remove() -> None:
        if stuck:
            raise ValueError("stuck")

    handles = [Handle(EIUP("cat"), lambda e: None, off) for off in (lambda: None, remove, lambda: None)]
    with pytest.raises(ValueError, match="stuck"):
        Handles(handles).remove()
    assert [handle.active for handle in handles] == [False, True, False]
    stuck.clear()
    handles[1].remove()
    assert not handles[1].active


# ---------------------------------------------------------------- rows, samples, suites


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True])
def test_a_seed_has_32_bits(seed: Any) -> None:
    Row("a", "a cat", 2**32 - 1)
    with pytest.raises(ValueError, match=r"whole number `seed` of row 'a' in"):
        Row("a", "a cat", seed)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "ä", "x" * 201])
def test_a_row_id_is_a_file_name(name: str) -> None:
    with pytest.raises(ValueError, match="id of a row"):
        Row(name, "a cat", 0)


def test_a_row_asks_for_something_and_is_frozen() -> None:
    with pytest.raises(ValueError, match="`prompt` of row 'a' to be a text that is not empty"):
        Row("a", "  ", 0)
    with pytest.raises(TypeError, match="`keep` of row 'a' to be a sequence"):
        Row("a", "a cat", 0, keep="dog")  # type: ignore[arg-type]
    call = {"guidance_scale": 7.0}
    row = Row("a", "a cat", 0, keep=["dog"], call=call)  # type: ignore[arg-type]
    call["guidance_scale"] = 1.0
    assert row.call == {"guidance_scale": 7.0} and row.keep == ("dog",)
    assert {row, Row("a", "a cat", 0, keep=("dog",), call={"guidance_scale": 7.0})} == {row}
    assert Row(**json.loads(json.dumps(dataclasses.asdict(row)))) == row


def test_a_sample_loads_its_picture_on_demand(tmp_path: Path) -> None:
    row, file = Row("a", "a cat", 0), tmp_path / "a.png"
    sample = Sample(row, file)
    with pytest.raises(FileNotFoundError, match=r"a\.png, the picture of row 'a', is missing"):
        sample.image()
    Image.new("RGBA", (4, 2), (255, 0, 51, 255)).save(file)
    expected = torch.tensor([1.0, 0.0, 0.2])[:, None, None].expand(3, 2, 4)
    torch.testing.assert_close(sample.image(), expected)
    whole = file.read_bytes()
    for broken in (b"", b"not a picture", whole[: len(whole) // 2]):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.png (is not|cannot be read as) a PNG, JPEG or WebP picture"):
            sample.image()
    for both in ({}, {"path": file, "pixels": expected}):
        with pytest.raises(ValueError, match="either `path` or `pixels`"):
            Sample(row, **both)
    assert Sample(row, pixels=expected).image() is expected


def test_a_suite_has_rows_with_unique_ids_and_a_hash_over_them() -> None:
    rows = Row("a", "a cat", 0), Row("b", "a dog", 0)
    suite = Suite("mine", "1", rows)
    assert len(suite.data_hash) == 64
    assert suite.data_hash == Suite("mine", "1", rows).data_hash
    for other in ((rows[1], rows[0]), rows[:1], (rows[0], dataclasses.replace(rows[1], seed=1))):
        assert Suite("mine", "1", other).data_hash != suite.data_hash
    assert Suite("mine", "1", rows, data_hash="file").data_hash == "file"
    with pytest.raises(ValueError, match="to be unique, got 'a' twice"):
        Suite("mine", "1", (rows[0], rows[1], rows[0]))
    with pytest.raises(ValueError, match="has no rows"):
        Suite("mine", "1", ())


def test_a_score_has_a_name() -> None:
    with pytest.raises(ValueError, match="a metric's name"):
        Score("", 0.5, 1, 0, 1)
    with pytest.raises(ValueError, match="n = -1"):
        Score("x", 0.5, -1, 0, 1)
