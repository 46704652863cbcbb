"""Deltas and partial pictures in the service: what the operator set, never what a key's holder asks for."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import sqlalchemy as sql
import tiny
from PIL import Image
from test_policy_deltas import concept, made, weights
from test_serve import DELTA, Desk, _until, desk, error, quiet
from test_serve_cluster import hosting
from test_serve_faults import accept, entries, state
from test_serve_security import address
from test_serve_state import PICTURE, nothing

import efface
from efface.guard import NotRestored
from efface.serve import cluster, tables
from efface.serve.backend import Drawn, PipelineBackend, check_deltas
from efface.serve.database import Unavailable
from efface.serve.errors import Refused
from efface.serve.run import run
from efface.serve.worker import Worker

__all__ = ["address", "desk", "made", "quiet"]
ASKED = {"prompt": "a cat", "steps": 4}


def key(desk: Desk, name: str, **policy: Any) -> str:
    """A key whose tenant has this policy."""
    desk.service.policies.add(name, policy, "test")
    desk.keys[name] = desk.service.keys.add(name, name)[1]
    return name


# ---------------------------------------------------------------- deltas


def test_rows_with_other_deltas_are_never_in_one_batch(quiet: Desk) -> None:
    names = [
        key(quiet, "edit", deltas=[DELTA]),
        key(quiet, "half", deltas=[DELTA | {"strength": 0.5}]),
        key(quiet, "plain", unguarded=True),
    ]
    jobs = [accept(quiet, key=name) for name in names * 2]
    quiet.start()
    _until(lambda: all(state(quiet, job) == "done" for job in jobs))
    found = [{row.policy.weights for row in rows} for rows, _ in quiet.stub.batches]
    assert all(len(each) == 1 for each in found) and len(found) == 3  # the effect: each pair shares a batch
    assert [call["deltas"] for _, call in quiet.stub.batches if call["deltas"]] == [
        [["0" * 64, None]],
        [["0" * 64, 0.5]],
    ]


def test_a_record_that_lacks_the_delta_answers_no_picture(desk: Desk) -> None:
    edit, drawn = key(desk, "edit", deltas=[DELTA]), desk.stub._drawn
    shown = desk.post(ASKED, edit).json()["efface"]["rows"][0]
    assert shown["deltas"] == [{"sha256": DELTA["sha256"], "concepts": []}]
    (end,) = entries(desk, "job finished")
    assert [each["sha256"] for each in end["rows"][0]["deltas"]] == [DELTA["sha256"]]  # the audit log names it
    changes: list[dict[str, Any]] = [{"deltas": []}, {"deltas": [{"sha256": "1" * 64}]}, {"policy": "0" * 64}]
    for change in changes:
        desk.stub._drawn = lambda row, call, change=change: Drawn(  # type: ignore[method-assign,misc]
            drawn(row, call).picture, {**drawn(row, call).record, **change}
        )
        error(desk.post(ASKED, edit), 500, "policy_not_applied")
    with desk.service.database.reading() as connection:
        assert connection.execute(sql.text("SELECT count(*) FROM pictures")).scalar() == 1


def service(desk: Desk, made: tuple[Path, dict[str, Any]], pipe: Any) -> PipelineBackend:
    """A backend with deltas for a desk whose policies name them."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    desk.service.model, desk.service.sizes = "tiny", ((side, side),)
    folder, facts = made
    cat = {"concepts": [concept(tiny.CAT)], "strength": 3.0}
    key(desk, "edit", deltas=[facts["alcohol"]])
    key(desk, "both", deltas=[facts["alcohol"] | {"strength": 0.5}], erase=[cat])
    key(desk, "plain", unguarded=True)
    return PipelineBackend(pipe, "tiny", desk.service.sizes, folder)


def test_a_worker_switches_deltas_between_batches(quiet: Desk, made: tuple[Path, dict[str, Any]]) -> None:
    pipe = tiny.pipeline("sd1")
    before, drawing = weights(pipe), service(quiet, made, pipe)
    check_deltas(quiet.service, drawing)
    names = ["edit", "plain", "both", "edit"]
    expected = {}
    guarded = efface.Guard(
        {name: quiet.service.policies.latest(name).policy for name in names},  # type: ignore[union-attr]
        deltas=made[0],
    )
    for name in names:
        (alone,) = guarded(pipe, ["a cat"], [name], [7], num_inference_steps=4).images
        expected[name] = np.array(alone, dtype=float)
    jobs = [accept(quiet, key=name, steps=4, seed=7) for name in names]
    worker = Worker(quiet.service, drawing)
    while quiet.service.jobs.count(["queued"]):
        assert worker.once()
    apart = []
    for name, job in zip(names, jobs, strict=True):
        (picture,) = quiet.service.jobs.pictures(job)
        found = np.array(Image.open(io.BytesIO(picture.content or b"")), dtype=float)
        apart.append(np.abs(found - expected[name]).max())
        assert [each["file"] for each in picture.record["deltas"]] == (
            ["alcohol.safetensors"] if name != "plain" else []
        )
    assert max(apart) <= 1, apart  # of 255
    assert min(np.abs(expected["plain"] - expected[name]).max() for name in ("edit", "both")) > 1  # the effect
    assert all((pipe.unet.state_dict()[name] == tensor).all() for name, tensor in before.items())


def test_no_server_starts_with_a_delta_that_cannot_act(
    quiet: Desk, made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.pipeline("sd1")
    service(quiet, made, pipe)
    for folder in (None, tmp_path):
        broken = PipelineBackend(pipe, "tiny", quiet.service.sizes, folder)
        with pytest.raises(ValueError, match=r"The policy '(both|edit)' of a valid key cannot act\."):
            run(quiet.service, broken, port=0, metrics_port=None)
    monkeypatch.setattr(cluster, "load_backend", lambda each: PipelineBackend(pipe, "tiny", each.sizes, each.deltas))
    every = hosting(quiet, backend=cluster.load_backend, deltas=str(tmp_path))
    with pytest.raises(ValueError, match="cannot act"):
        cluster.Drawer(every)
    drawer = cluster.Drawer(replace(every, deltas=str(made[0])))
    _until(drawer.ready)
    drawer.__del__()
    drawer.service.database.close()
    for each in quiet.service.keys.list():  # policies that no valid key carries do no harm
        if each["policy"] in ("edit", "both"):
            quiet.service.keys.revoke(each["id"])
    check_deltas(quiet.service, broken)


def test_a_delta_that_goes_missing_refuses_its_own_requests_only(
    quiet: Desk, made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    drawing = service(quiet, made, tiny.pipeline("sd1"))
    key(quiet, "later", deltas=[made[1]["cat"] | {"sha256": "9" * 64}])  # stored while the server runs
    jobs = [accept(quiet, key=name, steps=1) for name in ("later", "edit", "plain")]
    worker = Worker(quiet.service, drawing)
    while quiet.service.jobs.count(["queued"]):
        worker.once()
    assert [state(quiet, job) for job in jobs] == ["failed", "done", "done"]
    found = quiet.service.jobs.get("later", jobs[0])
    assert found is not None and found.error is not None and found.error.code == "policy_not_applied"
    assert "safetensors" not in found.error.message  # the operator's files are no business of the tenant


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_weights_that_cannot_be_restored_end_the_worker(quiet: Desk) -> None:
    quiet.stub.fails = {"a cat": NotRestored("The weights are gone.")}
    job = accept(quiet)
    quiet.start()
    quiet.workers[0].join(10)
    assert not quiet.workers[0].is_alive() and state(quiet, job) == "running"  # another worker takes it
    assert quiet.client.get("/readyz").status_code == 503


# ---------------------------------------------------------------- partial pictures


@pytest.fixture
def open_desk(desk: Desk) -> Desk:
    key(desk, "open", erase=["alcohol"], partial_pictures=True)
    return desk


def pixels(event: Any) -> Any:
    return Image.open(io.BytesIO(base64.b64decode(event.b64_json))).getpixel((0, 0))


def test_the_official_client_gets_partial_pictures(open_desk: Desk, address: tuple[str, int]) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{address[1]}/v1", api_key=open_desk.keys["open"], max_retries=0)
    events = list(client.images.generate(prompt="a cat", stream=True, partial_images=3, extra_body={"steps": 8}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    first, second, third, last = events
    assert [pixels(each) for each in (first, second, third)] == [(2, 0, 99), (4, 0, 99), (6, 0, 99)]
    assert [each.partial_image_index for each in (first, second, third)] == [0, 1, 2]  # type: ignore[union-attr]
    assert (first.size, first.quality, first.background, first.output_format) == ("64x64", "auto", "opaque", "png")
    assert first.created_at == last.created_at and pixels(last)[2] == 0
    told = entries(open_desk, "partial picture")  # the audit log has the hash of each
    assert [each["number"] for each in told] == [0, 1, 2] and len({each["sha256"] for each in told}) == 3
    with pytest.raises(openai.PermissionDeniedError, match="allows no partial pictures"):
        client.with_options(api_key=open_desk.keys["kids"]).images.generate(
            prompt="a cat", stream=True, partial_images=1
        )
    with pytest.raises(openai.BadRequestError, match="without `stream`"):
        client.images.generate(prompt="a cat", partial_images=1)
    assert (
        len(list(client.images.generate(prompt="a cat", stream=True, partial_images=0, extra_body={"steps": 8}))) == 1
    )


def test_a_partial_picture_comes_while_the_rest_is_drawn(open_desk: Desk, address: tuple[str, int]) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{address[1]}/v1", api_key=open_desk.keys["open"], max_retries=0)
    open_desk.stub.gate.clear()
    asked = {"steps": 2}
    with client.images.generate(prompt="a cat", stream=True, partial_images=1, extra_body=asked) as stream:
        first = next(stream)
        assert first.type == "image_generation.partial_image" and open_desk.service.jobs.count(["running"]) == 1
        open_desk.stub.gate.set()
        assert next(stream).type == "image_generation.completed"


def left(desk: Desk) -> int:
    with desk.service.database.reading() as connection:
        return int(connection.execute(sql.select(sql.func.count()).select_from(tables.partial)).scalar() or 0)


@pytest.mark.parametrize("end", ["done", "failed", "cancelled", "lost"])
def test_partial_pictures_live_no_longer_than_their_job(end: str, quiet: Desk) -> None:
    key(quiet, "open", erase=["alcohol"], partial_pictures=True)
    job = accept(quiet, key="open", stream=True, partial_images=1, steps=4)
    jobs, holder = quiet.service.jobs, quiet.service.keys.holder(quiet.keys["open"])
    assert holder is not None
    (claim,) = jobs.claim([job], "a")
    assert jobs.show(claim, 0, b"one", nothing) and jobs.show(claim, 0, b"two", nothing)
    assert jobs.partial(job, 0) == [(0, b"two")]
    assert not jobs.show(replace(claim, fence=claim.fence + 1), 1, b"late", nothing)
    if end == "cancelled":
        jobs.cancel("open", job, nothing)
    elif end == "lost":
        for attempt in range(3):
            if attempt:
                (claim,) = jobs.claim([job], "a")
                jobs.show(claim, 0, b"again", nothing)
            assert jobs.release(job, claim.fence, 0, nothing)
    else:
        failed = Refused(500, "It failed. Try again.", "drawing_failed")
        jobs.finish(claim, [PICTURE], None if end == "done" else failed, nothing)
    assert left(quiet) == (end == "done")
    assert jobs.expire(-1.0) == (end != "cancelled") and left(quiet) == 0


def test_a_stream_that_ends_badly_sends_no_partial_picture_after_its_end(open_desk: Desk) -> None:
    open_desk.stub.outcomes["odd"] = "not proven"
    text = open_desk.post({"prompt": "odd", "steps": 4, "stream": True, "partial_images": 1}, "open").text
    assert text.rstrip().endswith("}") and "policy_not_applied" in text.splitlines()[-2] + text.splitlines()[-1]
    assert left(open_desk) == 0


def test_a_partial_picture_that_cannot_be_stored_stops_nothing(
    open_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> bool:
        raise Unavailable("The disk is full.")

    monkeypatch.setattr(type(open_desk.service.jobs), "show", away)
    text = open_desk.post({**ASKED, "stream": True, "partial_images": 1}, "open").text
    assert "partial_image" not in text and text.endswith("data: [DONE]\n\n")


def test_a_model_that_cannot_show_latents_says_so(open_desk: Desk) -> None:
    open_desk.stub.shows = False
    asked = {**ASKED, "stream": True, "partial_images": 1}
    assert "shows no partial pictures" in open_desk.post(asked, "open").text and open_desk.stub.batches == []


def test_a_pipeline_shows_rows_that_asked_for_it(quiet: Desk) -> None:
    pipe = tiny.pipeline("sd1")
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    quiet.service.model, quiet.service.sizes = "tiny", ((side, side),)
    alcohol = {"concepts": [concept(tiny.ALCOHOL)], "strength": 2.0}
    key(quiet, "open", erase=[alcohol], partial_pictures=True)
    some = accept(quiet, key="open", steps=4, seed=7, stream=True, partial_images=2)
    none = accept(quiet, key="open", steps=4, seed=8)
    worker = Worker(quiet.service, PipelineBackend(pipe, "tiny", quiet.service.sizes))
    assert worker.once() == 2  # in one batch
    jobs = quiet.service.jobs
    assert [number for number, _ in jobs.partial(some, 0)] == [0, 1] and jobs.partial(none, 0) == []
    found = [np.array(Image.open(io.BytesIO(content)), dtype=float) for _, content in jobs.partial(some, 0)]
    last = np.array(Image.open(io.BytesIO(jobs.pictures(some)[0].content or b"")), dtype=float)
    apart = [np.abs(each - last).mean() for each in found]
    assert apart[0] > apart[1] > 0  # nearer and nearer
    assert Image.open(io.BytesIO(jobs.partial(some, 0)[0][1])).info["efface:policy"]
