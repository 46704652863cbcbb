"""Tests the promises of a method, one by one or all together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..fields import field_names
from ..hooks import Method
from ..hooks.sites import handles
from ..registry import near
from . import conformance, drawing
from .conformance import ConformanceError, DoesNotApply, Promise, Trial, changed, refusal
from .tiny import BUILDERS, FAMILIES

KEPT, BROKEN, DOES_NOT_APPLY = "kept", "BROKEN", "-"


@dataclasses.dataclass(frozen=True)
class Check:
    """A test of one promise on one family, callable with a method.

    Args:
        promise: a function of `efface.testing.conformance`.
        families: candidate families. The check uses the first one that the method does not refuse.
        steps: denoising steps of each call.
    """

    promise: Promise
    families: tuple[str, ...]
    steps: int = drawing.STEPS

    def __call__(self, method: Any) -> None:
        """Tests the promise.

        Args:
            method: a method object. The kit replaces its concept by one whose words the tiny tokenizers know.

        Raises:
            ConformanceError: the method breaks the promise, or refuses all `families`.
            DoesNotApply: the promise does not apply to this method on this family.
            TypeError: `method` is not a method object.
        """
        trial, before = self._trial(method)
        skipped = None
        try:
            try:
                self.promise(trial)
            except DoesNotApply as reason:
                skipped = reason
            trial.require_restored(before)
        except BaseException:
            drawing.forget()  # a broken method may leave traces on the kit's pipelines
            for handle in reversed(handles(trial.pipe)):
                handle.remove()
            raise
        if skipped is not None:
            raise skipped

    def __str__(self) -> str:
        name = getattr(self.promise, "__name__", repr(self.promise))
        return f"{name}-{self.families[0]}" if len(self.families) == 1 else name

    def _trial(self, method: Any) -> tuple[Trial, drawing.State]:
        """The method with the kit's concept, on a pipeline of its first working family; and the snapshot."""
        if not isinstance(method, Method) or not field_names(method):
            raise TypeError(
                "Expected a method object of a frozen dataclass that is derived from `efface.hooks.Method`, got "
                f"{repr(method)[:80]}. Make one, such as `Mine('cat')`."
            )
        own = {"concepts": [drawing.ALCOHOL]} | ({"rows": None} if "rows" in field_names(method) else {})
        method, said = changed(method, **own), ""
        for family in self.families:
            asked = Trial(method, family, drawing.scratch(family), self.steps)
            if self.promise is conformance.refuses_what_it_cannot_do or not (said := refusal(asked)):
                pipe, before = drawing.ready(family)
                return dataclasses.replace(asked, pipe=pipe), before
        if self.promise in conformance.ONCE:  # otherwise a run with only skipped tests would pass
            name, families = type(method).__name__, ", ".join(self.families)
            raise ConformanceError(f"{name} refuses all of {families}. Add a working family. {said}")
        raise DoesNotApply(said)


def checks(families: Sequence[str] | None = None, steps: int = drawing.STEPS) -> list[Check]:
    """The promises as named callables, for parametrised tests. Building the list builds no pipeline.

    Args:
        families: names of `FAMILIES`; None: all.
        steps: denoising steps of each call; more than 3 for a method that acts only in a part of the trajectory.

    Returns:
        One check per promise and family, and one per promise that needs only one family.

    Raises:
        ValueError: `families` is empty or has an unknown name.

    Example:
        >>> import efface.testing
        >>> [str(check) for check in efface.testing.checks(["sd1"])][:2]
        ['refuses_what_it_cannot_do-sd1', 'restores-sd1']

        In a test of yours:

            @pytest.mark.parametrize("check", efface.testing.checks(), ids=str)
            def test_mine(check):
                check(Mine("cat"))
    """
    names = _known(families)
    each: tuple[Promise, ...] = (conformance.refuses_what_it_cannot_do, *conformance.ON_EACH_FAMILY)
    found = [Check(promise, (family,), steps) for promise in each for family in names]
    return found + [Check(promise, names, steps) for promise in conformance.ONCE]


def _known(families: Sequence[str] | None) -> tuple[str, ...]:
    names = FAMILIES if families is None else (families,) if isinstance(families, str) else tuple(families)
    unknown = next((name for name in names if name not in BUILDERS), None)
    if unknown is not None or not names:
        hint = near(str(unknown), BUILDERS)
        raise ValueError(
            f"Expected `families` to be names of tiny pipelines, got {families!r}. {hint}{' ' if hint else ''}Use some "
            f"of {', '.join(FAMILIES)}."
        )
    return names


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        promise: the name of the promise.
        family: the tested family; "" for the first working family.
        outcome: "kept", "BROKEN", or "-" if the promise does not apply.
        message: the fault and where to look, or why the promise does not apply.
    """

    promise: str
    family: str
    outcome: str
    message: str = ""


class Report(tuple[Finding, ...]):
    """The findings of `check`. Prints as a table of promises and families."""

    def __str__(self) -> str:
        families = list(dict.fromkeys(finding.family for finding in self if finding.family))
        cells: dict[str, dict[str, str]] = {}
        for finding in self:
            cells.setdefault(finding.promise.replace("_", " "), {})[finding.family] = finding.outcome
        lines = [["", *families]]
        for promise, outcomes in cells.items():
            # a promise with a single test is in the first column
            once = [outcomes[""], *[""] * (len(families) - 1)] if "" in outcomes else None
            lines.append([promise, *(once or [outcomes[family] for family in families])])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        said: dict[str, list[str]] = {}
        for each in self.broken:
            said.setdefault(each.message, []).append(each.promise.replace("_", " "))
        return "\n".join([*rows, *(f"{BROKEN}: {', '.join(names)}: {message}" for message, names in said.items())])

    @property
    def broken(self) -> list[Finding]:
        """The findings of broken promises."""
        return [finding for finding in self if finding.outcome == BROKEN]


def check(method: Any, families: Sequence[str] | None = None, steps: int = drawing.STEPS) -> Report:
    """Tests all promises of a run-time method on tiny pipelines. All families take half a minute.

    Args:
        method: a method object, such as `Mine("cat")`. The kit replaces its concept by one whose words the tiny
            tokenizers know.
        families: names of `FAMILIES`; None: all.
        steps: denoising steps of each call; more than 3 for a method that acts only in a part of the trajectory.

    Returns:
        The findings. `print(check(...))` shows a table: "kept", or "-" if a promise does not apply.

    Raises:
        ConformanceError: the method breaks promises, or refuses all families. The message has the table, and says where
            to look for each broken promise. Other exceptions of the method pass through.
        TypeError: `method` is not a method object.
        ValueError: a family is unknown.

    Example:
        >>> import efface, efface.testing
        >>> print(efface.testing.check(efface.NegativePrompt("cat"), families=["sd1"]))
                                                     sd1
        refuses what it cannot do                    kept
        restores                                     kept
        ...
    """
    found = []
    for each in checks(families, steps):
        family = each.families[0] if len(each.families) == 1 and each.promise not in conformance.ONCE else ""
        outcome, message = KEPT, ""
        try:
            each(method)
        except DoesNotApply as reason:
            outcome, message = DOES_NOT_APPLY, str(reason)
        except ConformanceError as error:
            outcome, message = BROKEN, str(error)
        found.append(Finding(each.promise.__name__, family, outcome, message))
    report, name = Report(found), type(method).__name__
    if report.broken:
        promises = len({finding.promise for finding in report.broken})
        raise ConformanceError(f"{name} breaks {promises} promise{'s' * (promises > 1)}.\n{report}")
    return report
