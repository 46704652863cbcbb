"""Deltas in policies: on the weights of their own rows, off again to the bit, and no picture without them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import ALCOHOL, CAT, change
from torch import Tensor

import efface
from efface import Guard, Policy
from efface.delta import Delta, active
from efface.guard import Edit, Erasure, NotRestored, PolicyNotApplied, deltas, parsed
from efface.guard.deltas import Shelf

PROMPT = "a night at the pub"
CALL: dict[str, Any] = {"num_inference_steps": 3}


def concept(each: efface.Concept) -> dict[str, Any]:
    return {"name": each.name, "phrases": [*each.phrases]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with two deltas of the tiny model, and the entries of a policy for each."""
    folder = tmp_path_factory.mktemp("deltas")
    for name, what in (("alcohol", ALCOHOL), ("cat", CAT)):
        efface.UCE(erase_scale=1.0).fit(pipeline(), [what]).save(folder / f"{name}.safetensors")
    entries = {
        name: {"file": f"{name}.safetensors", "sha256": sha256(folder / f"{name}.safetensors"), "concepts": [what]}
        for name, what in (("alcohol", concept(ALCOHOL)), ("cat", concept(CAT)))
    }
    return folder, entries


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pipeline() -> Any:
    return tiny.pipeline("sd1")


def weights(pipe: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}


def drawn(guarded: Guard, pipe: Any, tenants: list[str], **call: Any) -> Tensor:
    found = guarded(pipe, [PROMPT] * len(tenants), tenants, [7] * len(tenants), **CALL | call)
    assert found.again.pictures is not None
    return found.again.pictures


# ---------------------------------------------------------------- rows


def test_each_row_has_the_deltas_of_its_own_policy_and_the_weights_come_back(made: tuple[Path, dict[str, Any]]) -> None:
    folder, entries = made
    eiup = Erasure(concepts=[CAT], strength=3.0)
    policies = {
        "edit": Policy(deltas=[entries["alcohol"]]),
        "half": Policy(deltas=[entries["alcohol"] | {"strength": 0.5}]),
        "both": Policy(deltas=[entries["alcohol"]], erase=[eiup]),
        "two": Policy(deltas=[entries["alcohol"], entries["cat"]]),
        "press": efface.unguarded,
    }
    pipe, guarded = pipeline(), Guard(policies, deltas=folder)
    before = weights(pipe)
    alcohol, cat = (Delta.load(folder / f"{name}.safetensors") for name in ("alcohol", "cat"))
    expected = {"press": efface.api.draw(pipe, [PROMPT], [7], **CALL)[0]}
    for tenant, erasers in {
        "edit": [alcohol],
        "half": [efface.api.load_delta(folder / "alcohol.safetensors")],
        "both": [alcohol, eiup.build()],
        "two": [alcohol, cat],
    }.items():
        with efface.stack(pipe, *erasers) as handles:
            if tenant == "half":
                handles[0].strength = 0.5
            expected[tenant] = efface.api.draw(pipe, [PROMPT], [7], **CALL)[0]
    apart = [change(expected[a], expected[b]) for a, b in zip(expected, [*list(expected)[1:], "press"], strict=True)]
    assert min(apart) > 1e-3, apart  # the effect
    tenants = ["half", "press", "edit", "both", "two", "edit"]
    for tenant, picture in zip(tenants, drawn(guarded, pipe, tenants), strict=True):
        assert change(picture, expected[tenant]) < 1e-5, tenant
    after = weights(pipe)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) and active(pipe) == []


def test_the_record_names_the_deltas_of_each_row(made: tuple[Path, dict[str, Any]]) -> None:
    folder, entries = made
    policies = {"edit": Policy(deltas=[entries["alcohol"] | {"strength": 0.5}]), "press": efface.unguarded}
    result = Guard(policies, deltas=folder)(pipeline(), [PROMPT] * 2, ["press", "edit"], [7, 7], **CALL)
    press, row = (each.as_json() for each in result.rows)
    (facts,) = row["deltas"]
    expected = Delta.load(folder / "alcohol.safetensors")
    assert facts == {
        "file": "alcohol.safetensors", "sha256": entries["alcohol"]["sha256"], "hash": expected.hash,
        "concepts": ["alcohol"], "strength": 0.5,
    }  # fmt: skip
    assert press["deltas"] == [] and json.dumps(row)


def test_a_map_of_a_row_is_drawn_with_its_deltas(made: tuple[Path, dict[str, Any]]) -> None:
    folder, entries = made
    both = Policy(deltas=[entries["alcohol"]], erase=[Erasure(concepts=[CAT], strength=3.0)])
    guarded = Guard({"both": both, "edit": Policy(deltas=[entries["alcohol"]])}, deltas=folder)
    pipe = pipeline()
    result = guarded(pipe, [PROMPT] * 2, ["both", "edit"], [7, 7], **CALL)
    assert guarded.explain(result, 0).width > 200  # it checks that the picture is the same
    with pytest.raises(ValueError, match="row 1 has deltas only"):
        guarded.explain(result, 1)


# ---------------------------------------------------------------- the operator's files


def test_a_missing_foreign_or_changed_file_is_refused_at_the_start(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, entries = made
    shutil.copytree(folder, tmp_path / "deltas")
    entry = entries["alcohol"]
    file = tmp_path / "deltas/alcohol.safetensors"

    def refused(why: str, entries: dict[str, Any] = entry, folder: Path | None = tmp_path / "deltas") -> None:
        with pytest.raises((ValueError, OSError), match=why) as caught:
            Guard({"kids": Policy(deltas=[entries])}, deltas=folder)
        assert len(str(caught.value).split(". ")) >= 2 and str(caught.value).endswith("."), caught.value

    Guard({"kids": Policy(deltas=[entry])}, deltas=tmp_path / "deltas")
    refused("Name their folder by --deltas", folder=None)
    refused("alcohol.safetensors", entry | {"file": "absent-alcohol.safetensors"})
    refused("Expected a delta of 'dog' in alcohol.safetensors, got one of alcohol", entry | {"concepts": ["dog"]})
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("Expected the SHA-256")
    efface.files.write_tensors(file, {"unet.x": torch.zeros(2)}, {})
    refused("not a delta of Efface", entry | {"sha256": sha256(file)})
    file.unlink()
    file.symlink_to(folder / "alcohol.safetensors")
    refused("leads out of")
    for odd in ("../alcohol.safetensors", "/etc/passwd", "a/b.safetensors", "x.pt", "", "\0.safetensors"):
        with pytest.raises(ValueError, match="the name of a safetensors file"):
            Policy(deltas=[entry | {"file": odd}])


def test_a_file_that_changes_later_draws_nothing(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, entries = made
    shutil.copytree(folder, tmp_path / "deltas")
    file, other = tmp_path / "deltas/alcohol.safetensors", tmp_path / "deltas/cat.safetensors"
    monkeypatch.setattr(deltas, "KEPT", 1)
    shelf = Shelf(tmp_path / "deltas")
    guarded = Guard({name: Policy(deltas=[entries[name]]) for name in entries}, deltas=shelf)
    pipe = pipeline()
    first = drawn(guarded, pipe, ["alcohol"])
    other.write_bytes(other.read_bytes()[:-1] + b"x")  # in place, as `cp` does; not in memory any more
    with pytest.raises(ValueError, match="Expected the SHA-256"):
        drawn(guarded, pipe, ["alcohol", "cat"])
    with file.open("r+b") as overwritten:  # what is in memory is no view of the file
        overwritten.write(b"x" * file.stat().st_size)
    assert torch.equal(drawn(guarded, pipe, ["alcohol"]), first) and active(pipe) == []


def test_a_delta_of_another_model_draws_nothing(made: tuple[Path, dict[str, Any]]) -> None:
    folder, entries = made
    guarded = Guard({"edit": Policy(deltas=[entries["alcohol"]])}, deltas=folder)
    pipe = pipeline()
    guarded.check(pipe)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.01)
    for act in (lambda: guarded.check(pipe), lambda: drawn(guarded, pipe, ["edit"])):
        with pytest.raises(ValueError, match="was fitted on"):
            act()
    assert active(pipe) == []


def test_a_delta_of_other_parts_than_the_denoiser_is_refused(
    made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guard locks the denoiser only, and another pipeline may share the text encoder."""
    folder, entries = made
    guarded = Guard({"edit": Policy(deltas=[entries["alcohol"]])}, deltas=folder)
    found = guarded._shelf.get(guarded.policies["edit"].deltas[0])
    monkeypatch.setattr(
        guarded._shelf, "get", lambda edit: efface.Delta({"text_encoder.x": torch.ones(2)}, method="made")
    )
    assert found.weights
    with pytest.raises(ValueError, match="Expected changes of 'unet'"):
        drawn(guarded, pipeline(), ["edit"])


# ---------------------------------------------------------------- no picture without the delta


def test_a_delta_that_is_taken_off_while_drawing_is_not_proven(made: tuple[Path, dict[str, Any]]) -> None:
    folder, entries = made
    guarded = Guard({"edit": Policy(deltas=[entries["alcohol"]]), "press": efface.unguarded}, deltas=folder)
    pipe = pipeline()

    def take_off(step: int) -> None:
        if handles := efface.delta.handles(pipe):
            handles[0].remove()

    result = guarded.draw(pipe, [PROMPT] * 2, ["edit", "press"], [7, 7], on_step=take_off, **CALL)
    assert [row.outcome for row in result.rows] == ["not proven", "drawn"] and result.images[0] is None
    assert result.rows[0].why == "the delta alcohol.safetensors was not on the weights" and result.rows[0].deltas == ()


def test_weights_that_are_changed_while_drawing_give_no_picture_then_or_later(
    made: tuple[Path, dict[str, Any]],
) -> None:
    folder, entries = made
    guarded = Guard({"edit": Policy(deltas=[entries["alcohol"]]), "press": efface.unguarded}, deltas=folder)
    pipe = pipeline()
    name = next(iter(Delta.load(folder / "alcohol.safetensors").weights)).removeprefix("unet.")

    def overwrite(step: int) -> None:
        pipe.unet.get_parameter(name).data.add_(1.0)

    with pytest.raises(NotRestored):
        guarded.draw(pipe, [PROMPT], ["edit"], [7], on_step=overwrite, **CALL)
    with pytest.raises(NotRestored, match="Load the model again"):
        drawn(guarded, pipe, ["press"])


def test_an_unproven_eraser_beside_a_delta_is_not_proven(
    made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from efface.guard import drawing

    folder, entries = made
    both = Policy(deltas=[entries["alcohol"]], erase=[Erasure(concepts=[CAT])])
    monkeypatch.setattr(drawing, "lines", lambda *_: [])
    with pytest.raises(PolicyNotApplied, match="no eraser acted on 'cat'"):
        drawn(Guard({"both": both}, deltas=folder), pipeline(), ["both"])


# ---------------------------------------------------------------- policies


def test_deltas_are_part_of_the_hash_and_of_no_earlier_one(made: tuple[Path, dict[str, Any]]) -> None:
    entry = made[1]["alcohol"] | {"concepts": ["alcohol"]}
    plain = Policy(erase=["alcohol"])
    assert not {"deltas", "partial_pictures"} & plain.as_json().keys()
    changed = [
        Policy(erase=["weapon"], deltas=[entry]),
        Policy(erase=["weapon"], deltas=[entry | {"strength": 0.5}]),
        Policy(erase=["weapon"], deltas=[entry | {"sha256": "0" * 64}]),
        Policy(erase=["weapon"], deltas=[entry], partial_pictures=True),
        Policy(erase=["weapon"]),
    ]
    assert len({each.hash for each in changed}) == len(changed)
    assert all(Policy(**each.as_json()).hash == each.hash for each in changed)
    assert len({each.weights for each in changed}) == 4
    more = changed[3].plus(["cat", "alcohol"])
    assert more.deltas == changed[3].deltas and more.partial_pictures
    assert [c.name for c in more.concepts] == ["weapon", "cat", "alcohol"]  # also with a method, on the edited weights
    assert [each.method for each in Policy(deltas=[entry]).plus(["cat"]).erase] == ["eiup"]


def test_deltas_are_read_from_yaml(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, entries = made
    entry = entries["alcohol"]
    text = f"""
policies:
  kids:
    deltas:
      - file: {entry["file"]}
        sha256: "{entry["sha256"]}"
        concepts: [{{name: alcohol, phrases: [{", ".join(ALCOHOL.phrases)}]}}]
        strength: 0.5
    erase: [weapon]
    partial_pictures: true
"""
    (tmp_path / "policies.yaml").write_text(text)
    kids = Guard.load(tmp_path / "policies.yaml", deltas=folder).policies["kids"]
    assert kids.hash == Policy(deltas=[entry | {"strength": 0.5}], erase=["weapon"], partial_pictures=True).hash
    with pytest.raises(ValueError, match="--deltas"):
        Guard.load(tmp_path / "policies.yaml")
    assert parsed(text, "x")["kids"].hash == kids.hash


ENTRY: dict[str, Any] = {"file": "a.safetensors", "sha256": "0" * 64, "concepts": ["alcohol"]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unguarded and deltas": ({"deltas": [ENTRY], "unguarded": True}, "Leave out one of both"),
    "no concepts": ({"deltas": [ENTRY | {"concepts": []}]}, "at least 1"),
    "no hash": ({"deltas": [{"file": "a.safetensors", "concepts": ["alcohol"]}]}, "`sha256` of an edit"),
    "a short hash": ({"deltas": [ENTRY | {"sha256": "0" * 63}]}, "64 digits"),
    "an upper-case hash": ({"deltas": [ENTRY | {"sha256": "A" * 64}]}, "64 digits"),
    "a folder": ({"deltas": [ENTRY | {"folder": "/tmp"}]}, "folder"),
    "strength 0": ({"deltas": [ENTRY | {"strength": 0}]}, "greater than 0"),
    "one delta twice": ({"deltas": [ENTRY, ENTRY | {"concepts": ["cat"]}]}, "count twice"),
    "two strengths": ({"deltas": [ENTRY, ENTRY | {"sha256": "1" * 64}]}, "'alcohol' is erased twice by a delta"),
    "erased anchor": (
        {"deltas": [ENTRY | {"concepts": ["cat"]}], "erase": [{"name": "dog", "keep": ["cat"]}]},
        "'cat' is erased and also kept text of 'dog'",
    ),
    "two phrases": ({"deltas": [ENTRY], "erase": [{"name": "alcohol"}]}, "different phrases"),
    "nine deltas": (
        {"deltas": [ENTRY | {"sha256": f"{k}" * 64, "concepts": [{"name": f"c{k}"}]} for k in range(9)]},
        "at most 8",
    ),
    "redraw": ({"deltas": [ENTRY], "gate": {"detector": "eyes", "on_detection": "redraw"}}, "no strength to raise"),
    "partial pictures and a gate": (
        {"erase": ["alcohol"], "partial_pictures": True, "gate": {"detector": "eyes"}},
        "got both",
    ),
    "a text": ({"deltas": "a.safetensors"}, "deltas"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictory_deltas_are_refused(case: str) -> None:
    entries, why = REFUSED[case]
    with pytest.raises(ValueError, match=why):
        Policy(**entries)
    Policy(deltas=[Edit(**ENTRY)])
