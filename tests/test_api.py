"""What users call: wrong arguments are named, before anything is drawn where that can be known."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

import efface
from efface import api, pipelines


@pytest.mark.parametrize("model", [None, 3, ["emoji"]])
def test_a_model_is_a_name_or_a_path(model: Any) -> None:
    with pytest.raises(TypeError, match=r'Expected the model to be "emoji", a folder or a hub id, got'):
        efface.load(model)


@pytest.mark.parametrize("name", ["concepts", "method"])
def test_the_concepts_are_no_field(name: str) -> None:
    with pytest.raises(ValueError, match="concepts of eiup cannot be set|has no field 'method'"):
        api.build("eiup", "cat", **{name: 2})


def test_pictures_that_became_nan_say_what_to_lower(sd1: Any) -> None:
    with pytest.raises(ValueError, match=r"2 of 2 pictures became NaN \(seed 5\).*Lower the strength or the guidance"):
        pipelines.draw(sd1, [tiny.PROMPT] * 2, [5, 6], num_inference_steps=1, guidance_scale=3e38, height=16, width=16)
