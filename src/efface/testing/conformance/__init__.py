"""The promises of every run-time method, as functions that raise if a method breaks one.

Each promise is a function of a `Trial`: a method on a tiny pipeline of one family. It first tests that the method has
an effect, because a dead hook would keep most promises. Then it compares pictures bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable

from .on_off import (
    acts_until_removed,
    config_survives_json,
    off_is_the_base_model,
    restores,
    restores_after_an_exception,
    strength_can_be_set,
)
from .refusals import acts_without_guidance_or_refuses, refusal, refuses_what_it_cannot_do, suits, two_sentences
from .rows import (
    a_row_is_the_row_alone,
    first_prediction,
    images_per_prompt_are_rows,
    rows_count_prompts,
    touches_unconditional_rows_only_if_declared,
)
from .several import (
    come_off_shuffled,
    comes_off_in_any_order,
    goes_with_shipped_methods,
    may_be_on_twice,
    pipelines_are_apart,
)
from .trial import EFFECT, ROUNDING, ConformanceError, DoesNotApply, Trial, changed
from .words import HEADINGS, origin, says_where_it_comes_from, undocumented

__all__ = [
    "EFFECT",
    "HEADINGS",
    "ONCE",
    "ON_EACH_FAMILY",
    "ROUNDING",
    "ConformanceError",
    "DoesNotApply",
    "Promise",
    "Trial",
    "a_row_is_the_row_alone",
    "acts_until_removed",
    "acts_without_guidance_or_refuses",
    "changed",
    "come_off_shuffled",
    "comes_off_in_any_order",
    "config_survives_json",
    "first_prediction",
    "goes_with_shipped_methods",
    "images_per_prompt_are_rows",
    "may_be_on_twice",
    "off_is_the_base_model",
    "origin",
    "pipelines_are_apart",
    "refusal",
    "refuses_what_it_cannot_do",
    "restores",
    "restores_after_an_exception",
    "rows_count_prompts",
    "says_where_it_comes_from",
    "strength_can_be_set",
    "suits",
    "touches_unconditional_rows_only_if_declared",
    "two_sentences",
    "undocumented",
]


Promise = Callable[[Trial], None]

ON_EACH_FAMILY: tuple[Promise, ...] = (
    restores,
    restores_after_an_exception,
    off_is_the_base_model,
    strength_can_be_set,
    touches_unconditional_rows_only_if_declared,
    acts_without_guidance_or_refuses,
    images_per_prompt_are_rows,
    a_row_is_the_row_alone,
)
"""Promises for every family, tested after `refuses_what_it_cannot_do`."""

ONCE: tuple[Promise, ...] = (
    says_where_it_comes_from,
    config_survives_json,
    acts_until_removed,
    rows_count_prompts,
    comes_off_in_any_order,
    goes_with_shipped_methods,
    may_be_on_twice,
    pipelines_are_apart,
)
"""Promises for the first family on which the method works."""
