import pytest
import torch
from efface_dampen import Dampen

import efface
import efface.testing


@pytest.mark.parametrize("check", efface.testing.checks(), ids=str)
def test_dampen_keeps_the_promises(check: efface.testing.Check) -> None:
    check(Dampen("cat"))


def test_strengths_add_up() -> None:
    """What Dampen subtracts does not depend on other methods, so two of them are one of both strengths."""
    cat, pipe = efface.Concept("cat"), efface.testing.pipeline("sd1")
    with Dampen(cat, strength=0.5).apply(pipe), Dampen(cat, strength=1.0).apply(pipe):
        both = efface.testing.latents(pipe, "a red cat", num_inference_steps=1)
    with Dampen(cat, strength=1.5).apply(pipe):
        one = efface.testing.latents(pipe, "a red cat", num_inference_steps=1)
    assert efface.testing.change(both, one) < 1e-4
    assert not torch.equal(one, efface.testing.latents(pipe, "a red cat", num_inference_steps=1))
