"""One wording of what users give wrongly: what was expected, what came, what to do."""

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import efface
from efface import GIE, SLD, UCE, Concept, Delta, checks, registry
from efface.core import field_names

JUNK: list[Any] = [None, True, "much", "", [], {}, math.nan, math.inf, -math.inf, 10**400, object(), b"x", [[]] * 9]
NUMBERS = st.floats() | st.integers(-(10**400), 10**400) | st.integers(-3, 3)


def told(error: Exception) -> str:
    """The message, if it has a cause and a cure and no long value."""
    message = str(error)
    assert re.fullmatch(r"(Expected|\S+ has no field) .*\. [A-Z].*[.?]", message), message
    assert len(message) < 400
    return message


@given(NUMBERS, st.integers(-2, 2), st.integers(0, 3), st.booleans(), st.booleans())
def test_a_number_is_finite_and_inside_its_bounds(
    value: float, least: int, span: int, above: bool, below: bool
) -> None:
    most = least + span
    inside = (value > least if above else value >= least) and (value < most if below else value <= most)
    if inside:
        assert checks.number("x", value, least, most, above=above, below=below) == value
    else:
        with pytest.raises(ValueError, match="`x`") as error:
            checks.number("x", value, least, most, above=above, below=below)
        assert "inf" not in told(error.value).replace(repr(value), "")


@given(st.integers(-(10**30), 10**30) | st.floats(), st.integers(0, 3))
def test_a_whole_number_is_no_float(value: float, least: int) -> None:
    if isinstance(value, int) and value >= least:
        assert checks.whole("n", value, least) == value
    else:
        with pytest.raises(ValueError, match="whole number `n`") as error:
            checks.whole("n", value, least)
        told(error.value)


CHECKS: dict[str, Any] = {
    "number": lambda x: checks.number("x", x, 5, 6),
    "whole": lambda x: checks.whole("x", x, 5, 6),
    "share": lambda x: checks.share("x", 2.0 if x is True else x),
    "seed": lambda x: checks.seed("x", x, 3),
    "tuning seeds": lambda x: checks.tuning_seeds("x", [x]),
    "window": lambda x: checks.window("x", (0, x)),
    "choice": lambda x: checks.choice("x", x, ("a", 1)),
    "text": lambda x: checks.text("x", "" if isinstance(x, str) else x),
    "texts": lambda x: checks.texts("x", x if isinstance(x, str) else [x]),
    "path": lambda x: checks.path("x", "" if isinstance(x, str) else x),
}


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: checks.shown(junk)[:20])
@pytest.mark.parametrize("check", CHECKS)
def test_every_refusal_has_a_cause_and_a_cure(check: str, junk: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        CHECKS[check](junk)
    told(error.value)


def test_a_value_is_shown_whole_if_short_and_on_one_line() -> None:
    assert checks.shown("a\nb") == r"'a\nb'" and checks.shown([1] * 100).endswith("...")
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert checks.shown(deep) == "a list too large to show"
    assert checks.shown(10**5000) == "a int too large to show"


@pytest.mark.parametrize("name", ["", "a\0b", "cat\udcff.png"])
def test_a_path_can_be_written_into_a_record(name: str) -> None:
    with pytest.raises(ValueError, match="to be a path in UTF-8"):
        checks.path("--out", name)
    assert checks.path("--out", "größe/ж") == Path("größe/ж")


def registered() -> list[tuple[str, str]]:
    rooms = ("erasers", "editors", "metrics", "suites")
    return [(room, name) for room in rooms for name in registry.methods(room)]


@pytest.mark.parametrize(("room", "name"), registered())
def test_fields_of_a_wrong_type_are_named_in_every_room(room: str, name: str) -> None:
    """What the command line and records hand over: no bare error of an operator or a constructor."""
    cls = registry.resolve(name, room)
    for field in field_names(cls):
        if field in ("concepts", "rows"):
            continue
        for junk in ({"x": {}}, [[[]]], math.inf, "\0"):
            given = {field: junk}
            try:
                checks.fields(name, cls, given)
                cls("cat", **given) if room == "erasers" else cls(**given)
            except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
                bare = (
                    "operand|not supported between|unexpected keyword|has no attribute|object is not|argument of type"
                )
                assert not re.search(bare, str(error)), f"{field}={junk!r}: {error}"


def test_all_unknown_fields_are_refused_in_the_order_given() -> None:
    with pytest.raises(ValueError, match="no field 'strenght'. Did you mean 'strength'"):
        efface.erase(tiny.pipeline(), "cat", strenght=1, zzz=2)


@pytest.mark.parametrize("beta", [1.0, 1, -0.1, math.inf])
def test_the_momentum_of_sld_decays(beta: float) -> None:
    with pytest.raises(ValueError, match=r"`momentum_beta` in \[0, 1\)"):
        SLD("cat", momentum_beta=beta)
    assert SLD("cat", momentum_beta=0.999).momentum_beta == 0.999


@pytest.mark.parametrize(
    ("room", "word"), [("suites", "suite"), ("metrics", "metric"), ("detectors", "detector"), ("erasers", "method")]
)
def test_what_is_misspelt_is_called_what_it_is(room: str, word: str) -> None:
    with pytest.raises(ValueError, match=f"^Unknown {word} 'nothing-like-it'"):
        registry.resolve("nothing-like-it", room)


def test_an_adapter_is_no_damaged_delta() -> None:
    with pytest.raises(ValueError, match=r"a safetensors file, but not a delta of Efface\. .*GIE\(adapter=") as error:
        Delta.load(tiny.adapter_file(tiny.pipeline()))
    assert "damaged" not in str(error.value)


def test_a_warning_points_at_the_line_of_the_user() -> None:
    pipe, editor = tiny.pipeline(), UCE(lam=1e9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        editor.fit(pipe, Concept("cat", anchor="dog"))
    (warning,) = [w for w in caught if "complete, and would be" in str(w.message)]
    assert warning.filename == __file__


def test_the_unknown_option_of_a_detector_is_told_with_near_names() -> None:
    with pytest.raises(ValueError, match="no option 'labelz'. Did you mean 'labels'"):
        efface.detector({"name": "clip", "labelz": 1, "zzz": 2}, "cat")


def test_gie_takes_one_or_two_trajectories() -> None:
    with pytest.raises(ValueError, match="`trajectories` to be one of 1, 2, got True"):
        GIE("cat", trajectories=True)
