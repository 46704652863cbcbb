"""Runs at an address of fsspec: made in a copy, sent batch by batch, fetched where they are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tiny import ALCOHOL as CONCEPT

import efface
from efface import EIUP, Row, Suite
from efface.runs import remote

ROWS = tuple(Row(f"row-{k}", f"a cat {k}", 1_000_000 + k) for k in range(5))
SUITE = Suite("cats", "1", ROWS, call={"num_inference_steps": 1, "height": 16, "width": 16})
ERASER = EIUP(CONCEPT, strength=1.0)
URL = "memory://bucket/runs/a"


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("EFFACE_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if on another machine: no copies."""
    monkeypatch.setenv("EFFACE_CACHE", str(tmp_path / "other"))


def test_a_run_is_at_its_address_with_its_base(
    sd1: Any, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = efface.run(SUITE, sd1, eraser=ERASER, out=URL, batch=2)
    assert run.base is not None
    there = {name.removeprefix("/bucket/runs/") for name in memory.find("/bucket/runs")}
    base = run.base.folder.name
    parts = ["run.json", "samples.jsonl", *(f"images/row-{k}.png" for k in range(5))]
    assert there == {f"{folder}/{part}" for folder in ("a", base) for part in parts}
    forget(tmp_path, monkeypatch)
    again = efface.Run.open(URL)
    assert again.folder != run.folder and again.complete and again.entries() == run.entries()
    assert [s.image().shape for s in again.finished()] == [(3, 16, 16)] * 5  # SHA-256 of each is checked


def test_a_run_that_stopped_goes_on_elsewhere(
    sd1: Any, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what == "plain" and done == 2:
            raise Stop

    with pytest.raises(Stop):
        efface.run(SUITE, sd1, out=URL, batch=2, progress=stop)
    assert memory.cat("/bucket/runs/a/samples.jsonl").count(b"\n") == 2
    forget(tmp_path, monkeypatch)
    drawn: list[int] = []
    run = efface.run(SUITE, sd1, out=URL, batch=2, progress=lambda what, done, total: drawn.append(done))
    assert run.complete and drawn == [2, 4, 5]
    assert memory.cat("/bucket/runs/a/samples.jsonl").count(b"\n") == 5


def test_what_could_not_be_sent_is_sent_later(sd1: Any, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = type(memory).put_file

    def broken(self: Any, local: str, target: str, **more: Any) -> None:
        if target.endswith("row-3.png"):
            raise OSError("the network is gone")
        real(self, local, target, **more)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", broken)
        with pytest.raises(OSError, match="the network is gone"):
            efface.run(SUITE, sd1, out=URL, batch=2)
    assert memory.cat("/bucket/runs/a/samples.jsonl").count(b"\n") == 2  # lines follow their pictures
    assert efface.run(SUITE, sd1, out=URL, batch=2).complete
    assert memory.cat("/bucket/runs/a/samples.jsonl").count(b"\n") == 5


def test_a_name_that_leads_out_of_the_copy_is_refused(memory: Any, tmp_path: Path) -> None:
    memory.pipe_file("/bucket/runs/a/run.json", b"{}")
    memory.store["/bucket/runs/a/../../x.png"] = memory.store["/bucket/runs/a/run.json"]
    with pytest.raises(ValueError, match=r"Expected the name of a file in .*x\.png"):
        efface.Run.open(URL)
    assert [path.name for path in tmp_path.rglob("x.png")] == []


@pytest.mark.parametrize("address", ["nosuchthing://bucket/a", "nosuchthing:/bucket/a"])
def test_an_address_of_an_unknown_kind(address: str) -> None:
    with pytest.raises(ValueError, match="nosuchthing"):
        efface.Run.open(address)


@pytest.mark.parametrize("path", ["runs/a", "/tmp/a", "C:/runs", "a:b"])
def test_paths_are_not_addresses(path: str) -> None:
    assert remote.local(path) == Path(path)
