"""Every attack on every tiny pipeline: it runs, or it is refused before anything is drawn, with the reason."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import re
import shlex
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from torch import Tensor

import efface
from efface import Concept, pipelines, redteam, registry
from efface._condition import call_settings
from efface._text import read
from efface.attacks._compose import Composition, Term
from efface.attacks._contract import Target
from efface.attacks._directions import directions, shifted
from efface.attacks._encoders import outputs, summaries
from efface.families import family
from efface.redteam.victim import GuardedModel

pytestmark = pytest.mark.thinned("long")

TARGET = Target(Concept("beer"), "a red beer")
SMALL: dict[str, dict[str, Any]] = {
    "concept_arithmetics": {"recipes": ("parts",), "context_weights": (2.0,)},
    "concept_inversion": {"steps": 1, "batch": 1, "initial": "beer", "templates": ("a {}",)},
    "gcg": {"tokens": 2, "steps": 1, "top": 2, "candidates": 2, "restarts": 1},
    "p4d": {"variant": "n", "tokens": 2, "steps": 1},
    "relearning": {"pictures": 1, "steps": (1,), "batch": 1},
    "ring_a_bell": {"tokens": 2, "population": 4, "keep": 2, "generations": 1, "pairs": (("a cat", "a"),)},
    "translation": {"dictionary": {"beer": ("wine",)}},
    "unlearndiffatk": {"tokens": 1, "times": 1, "iterations": 1},
}
"""Of each attack as little as it can do."""

EDIT = ("qwenimage_edit", "qwenimage_edit_plus")
FLOW = ("chroma", "cogview4", "flux", "sana", "sana15", "sd3", "sd35", "zimage")
OTHER_VAE = ("flux2", "klein", "qwenimage")
DENOISER = ("concept_inversion", "p4d", "relearning", "unlearndiffatk")  # call the denoiser outside of a drawing
COMPOSED = ("concept_arithmetics", "prompt_schedule")
WORDS = ("chroma", "cogview4", "flux", "flux2", "klein", "qwenimage", "sana", "sana15", "sd3", "bert", "zimage")
WORDS += ("pixart", "pixart_sigma")
"""A tokenizer of the tiny pipeline knows whole words alone."""


NO_IMG2IMG = ("chroma", "cogview4", "flux2", "klein", "sana", "sana15", "pixart", "pixart_sigma")

REFUSED: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (EDIT, tuple(registry.methods("attacks")), "text alone.*encodes each text with a picture"),
    (("flux2",), (*COMPOSED, "guidance_sweep", "prompt_as_negative"), r"needs guidance, but this Flux2Pipeline .*has"),
    (("zimage",), (*DENOISER, *COMPOSED), "takes lists of rows"),
    (
        OTHER_VAE,
        (*DENOISER, "detector_guidance", "inpainting", "latent_inversion"),
        "`scaling_factor`, got .*another way",
    ),
    (FLOW, ("latent_inversion",), "scheduler that DDIM can invert, got FlowMatch"),
    (NO_IMG2IMG, ("image_to_image",), "no image-to-image pipeline"),
    (("klein",), ("prompt_as_negative",), "takes a negative prompt, got a Flux2KleinPipeline"),
    (("cogview4", "qwenimage"), ("ring_a_bell",), "which pads to the longest text"),
    (WORDS, ("lookalike",), "tokenizer that knows look-alikes"),
)
"""Pipelines, attacks, and what the message of the refusal must match. The first one that fits counts."""


def refusal(name: str, kind: str) -> str:
    return next((reason for kinds, names, reason in REFUSED if kind in kinds and name in names), "")


class Eye:
    """A detector of everything, with gradients."""

    name = "a test's detector"

    def __call__(self, images: Tensor) -> Tensor:
        return torch.ones(1, len(images), dtype=torch.bool)

    def log_odds(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))[None]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness draws small pictures; the sizes of other families are in their pipelines."""
    sizes = ("height", "width", "use_resolution_binning")

    def draw(pipe: Any, prompts: Any, seeds: Any, *args: Any, **call: Any) -> Tensor:
        given = tiny.builders.call_options(pipe, {}, len(prompts))
        if "image" in call and "height" in inspect.signature(type(pipe).__call__).parameters:
            given = dict(zip(sizes, call["image"].shape[2:], strict=False))
        if hasattr(pipe, "prompt_template_encode_start_idx"):  # of the tiny tokenizer, also in pipelines made from it
            pipe.prompt_template_encode_start_idx = tiny.untouched("qwenimage").prompt_template_encode_start_idx
        return pipelines.draw(pipe, prompts, seeds, *args, **{k: given[k] for k in sizes if k in given} | call)

    monkeypatch.setattr("efface.redteam.victim.draw", draw)
    for kind in (PixArtAlphaPipeline, PixArtSigmaPipeline):  # latent_inversion calls the pipeline without the harness
        whole = functools.partialmethod(kind.__call__, use_resolution_binning=False)
        monkeypatch.setattr(kind, "__call__", whole)


@pytest.mark.filterwarnings("ignore:.*the loss did not fall")
@pytest.mark.parametrize("name", registry.methods("attacks"))
@pytest.mark.parametrize("kind", tiny.BUILDERS)
def test_an_attack_runs_or_is_refused_before_anything_is_drawn(kind: str, name: str, small: None) -> None:
    attack, pipe = redteam.build(name, **SMALL.get(name, {})), tiny.untouched(kind)
    victim = GuardedModel(pipe, (), Eye(), (1,), steps=2, guidance=3.0)
    drawn: list[Tensor] = []
    with victim.metered():
        try:
            attack.check(pipe)
            for made in itertools.islice(attack.propose(TARGET, victim), 1):
                control = attack.control(made, TARGET, victim, Random(0))
                drawn = [victim.draw(made), victim.draw(control)]
        except ValueError as error:
            assert (reason := refusal(name, kind)), error
            assert re.search(reason, str(error)), error
            assert str(error).count(". ") >= 1 and victim.spent.forward == 0 and victim.spent.pictures == 0
            return
    assert refusal(name, kind) == ""
    assert len(drawn) == 2 and all(each.isfinite().all() and each.shape[:2] == (1, 3) for each in drawn)
    assert victim.spent.forward > 0 and not efface.active(pipe)


LONG = "a big red cat at night"


@pytest.mark.parametrize("kind", ["chroma", "klein", "qwenimage", "sana"])
def test_texts_of_several_lengths_compose(kind: str) -> None:
    """Each text is encoded as in a call of its own, with the call's own settings, so the first one is recognised."""
    pipe, options = tiny.untouched(kind), {"num_inference_steps": 2}
    plain, other = (tiny.latents(pipe, "the dog", guidance_scale=scale, **options) for scale in (7.0, 2.0))
    assert float((plain - other).norm()) > 1e-2 * float(plain.norm())
    given = tiny.builders.call_options(pipe, {}, 1)
    settings = {name: given[name] for name in family(pipe).settings if name in given}
    scale = 7.0 if kind == "qwenimage" else 2.0  # whose pipeline scales predictions to the norm of the conditional one
    with Composition((Term("the dog", 7.0), Term(LONG, 0.0)), scale, settings=settings)(pipe):
        made = tiny.latents(pipe, "the dog", guidance_scale=scale, **options)
    assert float((made - plain).norm()) < 1e-4 * float(plain.norm())


@pytest.mark.parametrize("kind", ["flux2", "klein", "qwenimage", "sana", "zimage"])
def test_the_state_of_a_decoder_is_that_of_its_last_token(kind: str) -> None:
    """Padding may precede the text, and tokens that the pipeline drops; the encoder's own `input_ids` say where."""
    pipe = tiny.untouched(kind)
    found, (ids, out) = summaries(pipe, [LONG, "a cat"])["tokenizer"], outputs(pipe, [LONG, "a cat"])["tokenizer"]
    states = out.hidden_states[-1] if kind != "sana" else out.last_hidden_state
    for row, text in enumerate((LONG, "a cat")):
        seen = read(pipe, text, "tokenizer", **call_settings(pipe))
        (at,) = (states[row] - found[row]).abs().sum(-1).argsort()[:1].tolist()
        assert torch.equal(states[row][at], found[row])
        behind = seen.ids[seen.last - 2 : seen.last + 1]
        assert ids[row][at - 2 : at + 1].tolist() == behind and len(set(behind)) > 1


def test_an_encoding_that_no_call_reads_is_not_taken_for_resistance() -> None:
    pipe = tiny.untouched("sd1")
    shift = directions(pipe, "a red cat", (("a cat", "a"),))
    plain = tiny.latents(pipe, "a red cat")
    with shifted(pipe, shift, 1.0):
        assert not torch.equal(tiny.latents(pipe, "a red cat"), plain)
    with pytest.raises(ValueError, match=r"read other texts, so\s+nothing was moved"), shifted(pipe, shift, 1.0):
        tiny.latents(pipe, "a dog")


# ---------------------------------------------------------------- docs

DOCS = Path(__file__).parents[1] / "docs"


def test_every_attack_has_its_formula_access_cost_limits_and_example() -> None:
    text = (DOCS / "each_attack.md").read_text("utf-8")
    sections = {part.split("\n", 1)[0]: part for part in text.split("\n## ")[1:]}
    assert sorted(sections) == sorted(registry.methods("attacks"))
    for name, part in sections.items():
        labels = re.findall(r"^- (\w+): ", part, re.MULTILINE)
        assert labels == ["Formula", "Access", "Cost", "Limits", "Example"], name
        access = part.partition("- Access: ")[2].split("\n")[0]
        assert access.startswith(redteam.build(name).access), name
        command = re.search(r"- Example: `(efface attack .*)`$", part, re.MULTILINE)
        assert command, name
        words = shlex.split(command[1])
        given = [words[k + 1].partition("=")[::2] for k, word in enumerate(words) if word == "--option"]
        assert words[2] == name and redteam.build(name, **{key: parsed(value) for key, value in given})


def parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def test_every_method_has_one_threat_model() -> None:
    text = (DOCS / "attacks.md").read_text("utf-8").partition("## Threat models")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| in ")]
    named = [name for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[2])]
    assert sorted(named) == sorted(name for name, room in registry.methods().items() if room in ("erasers", "editors"))
    weakest = {
        name: line.split("|")[4].strip() for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[2])
    }
    assert weakest["eiup"].startswith("sampler") and weakest["uce"].startswith("weights")
