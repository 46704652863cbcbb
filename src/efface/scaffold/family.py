"""The first files of a family of pipelines, in a clone of Efface."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from .. import checks
from ._base import Scaffold, checked, clone_of, filled, titled
from .facts import TEXT, Facts, read

READS = ("joint_text", "cross_text")
LOUDER = """    for name, weight in denoiser.named_parameters():
        if ".attn2.to_" in name and name.endswith("weight"):  # else texts hardly matter
            weight.data *= 2.5"""
USUAL = {"text": "encoder_hidden_states", "time": "timestep", "mask": "encoder_attention_mask"}
USUAL |= {"pooled": "pooled_projections"}


def family(name: str, pipeline: str, clone: Path, reads: str = "joint_text") -> Scaffold:
    """A family's facts, its tiny pipelines, its test and a note, as far as diffusers' code tells them.

    Args:
        name: the family's name in files, such as "lumina2".
        pipeline: the pipeline's class in diffusers.
        clone: the folder of a clone of Efface.
        reads: how the denoiser reads text: "joint_text" or "cross_text".

    Raises:
        ValueError: the name cannot be used, diffusers has no such pipeline, or the folder is no clone of Efface.
    """
    checked(name, "family")
    checks.choice("--reads", reads, READS)
    clone, facts = clone_of(clone), read(pipeline)
    words = {"name": name, "title": titled(name), "constant": name.upper(), "pipeline": pipeline, "reads": reads}
    words |= {"facts": "\n".join(f"    {line}" for line in _facts(facts))}
    words |= _tiny(facts, reads)
    texts = {
        f"src/efface/families/{name}.py": filled("family", words),
        f"src/efface/testing/tiny/{name}.py": filled("tiny", words),
        f"tests/test_{name}.py": filled("family_test", words),
        f"docs/families/{name}.md": filled("family_note", words),
    }
    steps = (
        f"Fill in src/efface/testing/tiny/{name}.py until `pytest tests/test_{name}.py -k draws` passes.",
        f"Check each fact of src/efface/families/{name}.py against diffusers' code.",
        f"Run `pytest tests/test_{name}.py`. Add offers one at a time, and run it again after each.",
        f"Run `pytest tests/test_conformance.py -k {name}`: every method on this family.",
        "Run `python -m experiments docs`, and add a line to CHANGELOG.md.",
    )
    return Scaffold(name, pipeline, clone, texts, "", steps)


def _facts(facts: Facts) -> Iterator[str]:
    """The arguments of `Family` that differ from its defaults."""
    yield f"denoiser_class={_text(facts.parts[facts.denoiser])},"
    yield f"encoders={_texts(facts.encoders)},"
    if facts.denoiser != "transformer":
        yield f"denoiser={_text(facts.denoiser)},"
    yield f"returns={_texts(facts.returns)},"
    if len(facts.tokenizers) > 1:
        yield f"texts=({_texts(facts.tokenizers)},),  # side by side; a group each if they follow each other"
    if facts.bidirectional:
        yield f"bidirectional={_texts(facts.bidirectional)},"
    if "max_sequence_length" in facts.arguments and facts.tokenizers:
        yield f"resizable={_texts(facts.tokenizers[-1:])},"
    if facts.width not in ("", "joint_attention_dim"):
        yield f"width_names={_texts((facts.width,))},"
    if facts.apart:
        yield "guidance_in_two_calls=True,"
    asked: Mapping[str, tuple[str, ...]] = {
        "text": ("encoder_hidden_states", "caption", "context", "cap_feats", "text"),
        "time": ("timestep", "time"),
        "mask": ("encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask", "mask"),
        "pooled": ("pooled", "text_embeds"),
    }
    for kind, usual in USUAL.items():
        found = facts.argument(*asked[kind]) if kind in ("text", "time") or kind in facts.returns else usual
        if found and found != usual:
            yield f"{kind}_argument={_text(found)},"


def _tiny(facts: Facts, reads: str) -> dict[str, str]:
    """The imports, the denoiser's arguments and the parts of the tiny pipeline."""
    denoiser = facts.parts[facts.denoiser]
    joint = reads == "joint_text"
    given, before = {facts.denoiser: "louder(denoiser)" if joint else "denoiser"}, list[str]()
    ours = {"louder"} if joint else set[str]()
    known = {"AutoencoderKL": ("picture_model()", "picture_model")}
    scheduler = facts.parts.get("scheduler", "")
    flow = scheduler.startswith("FlowMatch")
    given["scheduler"] = f"{scheduler}()" if flow else "scheduler()"
    ours |= set() if flow else {"scheduler"}
    for name in sorted(name for name in facts.parts if name.startswith("text_encoder")):
        tokens = name.replace("text_encoder", "tokenizer")
        if facts.parts[name].startswith("T5"):
            before.append(f"{tokens}, {name} = t5({TEXT})")
            ours.add("t5")
        elif facts.parts[name].startswith("CLIP"):
            before += [f"{tokens} = tokenizer()", f"{name} = text_model({tokens}, {TEXT})"]
            ours |= {"tokenizer", "text_model"}
        else:
            before += [f'{tokens}, {name} = fill("a tokenizer and a small {facts.parts[name] or "text encoder"}")']
            ours.add("fill")
        given |= {tokens: tokens, name: name}
    for name in facts.needed:
        if name not in given:
            text, part = known.get(facts.parts[name], (f'fill("a small {facts.parts[name] or name}")', "fill"))
            given[name] = text
            ours.add(part)
    order = [name for name in facts.parts if name in given]
    return {
        "diffusers": ", ".join(sorted({facts.pipeline, denoiser, *([scheduler] if flow else [])})),
        "parts": ", ".join(sorted(ours)),
        "denoiser": denoiser,
        "before": "\n".join(f"    {line}" for line in before),
        "sizes": "\n".join(f"        {name}={size}," for name, size in facts.small.items()),
        "louder": "" if joint else f"\n{LOUDER}",
        "given": "\n".join(f"        {name}={given[name]}," for name in order),
    }


def _text(value: str) -> str:
    return json.dumps(value)


def _texts(values: tuple[str, ...]) -> str:
    return f"({', '.join(map(_text, values))}{',' if len(values) == 1 else ''})"
