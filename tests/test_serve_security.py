"""Attacks on the service, each with what it answers; the official client; and what listens."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import sqlalchemy as sql
import torch
import uvicorn
from PIL import Image
from test_serve import LIMITS, URL, Desk, _until, desk, error, idle, quiet
from typer.testing import CliRunner

import efface
from efface.cli import app as cli
from efface.guard import read
from efface.serve import fields
from efface.serve.app import create_app
from efface.serve.backend import PipelineBackend, Row
from efface.serve.http import Edge
from efface.serve.run import check_host

__all__ = ["desk", "idle", "quiet"]
ASKED = {"prompt": "a cat", "steps": 1}


# ---------------------------------------------------------------- keys and policies


def test_every_bad_key_has_the_same_answer_in_the_same_time(idle: Desk) -> None:
    name, revoked = idle.service.keys.add("kids", "kids")
    idle.service.keys.revoke(name)
    bad = [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic abc",
        f"Bearer {revoked}",
        f"Bearer ef_{'a' * 43}",
        "Bearer " + "x" * 300,
    ]
    bad += [f"bearer  {revoked} x", "Bearer é", idle.keys["kids"]]
    bodies, times = set(), dict[int, list[float]]()
    for _ in range(8):
        for k, value in enumerate(bad):
            began = time.perf_counter()
            headers = {} if value is None else {"authorization": value.encode("latin-1")}
            response = idle.client.post(URL, json=ASKED, headers=headers)
            times.setdefault(k, []).append(time.perf_counter() - began)
            error(response, 401, "invalid_api_key")
            bodies.add(response.text)
    assert len(bodies) == 1
    shortest = [min(each) for each in times.values()]
    assert max(shortest) - min(shortest) < 0.05, shortest


def test_the_body_is_not_read_before_the_key(idle: Desk) -> None:
    headers = {"content-type": "application/json"}
    error(idle.client.post(URL, content=b"{" * 100_000, headers=headers), 401, "invalid_api_key")
    error(idle.client.put("/v1/efface/policies/x", content=b"{", headers=headers), 401, "invalid_api_key")


def test_neither_query_nor_headers_choose_a_policy(desk: Desk) -> None:
    for query in ("?policy=press", "?tenant=press", "?api_key=x", f"?key={desk.keys['press']}"):
        error(desk.client.post(f"{URL}{query}", json=ASKED, headers=desk.head()), 400, "unexpected_query")
    names = ("policy", "tenant", "x-policy", "x-efface-policy", "efface-tenant", "serve_multiplexed_model_id")
    names += ("serve-multiplexed-model-id", "openai-organization", "openai-project", "x-forwarded-user")
    stored = desk.service.policies.latest("kids")
    assert stored is not None
    for name in names:
        body = desk.post(ASKED, **{name: "press"}).json()
        assert body["efface"]["policy"] == stored.policy.hash and body["efface"]["rows"][0]["acted"]
    forged = desk.post(ASKED, **{"x-request-id": "req_forged"})
    assert forged.status_code == 200 and forged.headers["x-request-id"] != "req_forged"
    assert forged.headers.get_list("x-request-id") == [forged.headers["x-request-id"]]


def test_two_keys_or_two_idempotency_keys_are_refused(idle: Desk) -> None:
    for name, values in (
        ("authorization", [f"Bearer {idle.keys['kids']}", f"Bearer {idle.keys['press']}"]),
        ("idempotency-key", ["a", "b"]),
    ):
        headers = [(each, value) for each, value in idle.head().items() if each != name]
        headers += [(name, value) for value in values]
        error(idle.client.post(URL, json=ASKED, headers=headers), 400, "invalid_header")
    assert idle.post(ASKED, **{"idempotency-key": "x" * 201}).status_code == 400


def test_tenants_cannot_touch_policies_and_admins_cannot_draw(quiet: Desk) -> None:
    body = {"unguarded": True}
    for method, where in [("GET", ""), ("GET", "/kids"), ("PUT", "/kids")]:
        more = {"json": body} if method == "PUT" else {}
        path = f"/v1/efface/policies{where}"
        error(quiet.client.request(method, path, headers=quiet.head("kids"), **more), 403, "admin_only")
    error(quiet.post(ASKED, quiet.admin), 403, "no_policy")
    before = quiet.client.get("/v1/efface/policies/kids", headers=quiet.head(quiet.admin)).json()
    stronger = {"erase": ["alcohol", "weapon"]}
    after = quiet.client.put("/v1/efface/policies/kids", json=stronger, headers=quiet.head(quiet.admin)).json()
    assert (before["version"], after["version"]) == (1, 2) and before["hash"] != after["hash"]
    names = [
        each["name"] for each in quiet.client.get("/v1/efface/policies", headers=quiet.head(quiet.admin)).json()["data"]
    ]
    assert names == ["kids", "press", "teens"]
    for wrong in (
        {},
        {"erase": ["alcohool"]},
        {"erase": ["cat"], "version": 7},
        {"erase": 1},
        {"unguarded": 1},
        {"__init__": 1},
        {"erase": [{"concepts": ["cat"], "strength": 1.0}, {"concepts": ["cat"], "strength": 2.0}]},
        {"erase": ["cat", {"name": "dog", "anchor": "cat"}]},
        {"erase": ["cat"], "unguarded": True},
        {"deltas": [{"file": "../serve.db", "sha256": "0" * 64, "concepts": ["cat"]}]},
    ):
        response = quiet.client.put("/v1/efface/policies/kids", json=wrong, headers=quiet.head(quiet.admin))
        error(response, 400, "invalid_policy")
    for odd in ([], "x", 1):
        response = quiet.client.put("/v1/efface/policies/kids", json=odd, headers=quiet.head(quiet.admin))
        error(response, 400, "invalid_value")
    error(quiet.client.get("/v1/efface/policies/absent", headers=quiet.head(quiet.admin)), 404, "not_found")
    entry = quiet.service.audit.entries()[-1]
    assert (entry["kind"], entry["before"], entry["after"]) == ("policy stored", before["hash"], after["hash"])


def test_a_new_version_of_a_policy_acts_on_later_requests_only(quiet: Desk) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        earlier = pool.submit(quiet.post, ASKED)
        _until(lambda: len(quiet.service.jobs.waiting("stub")) == 1)
        quiet.service.policies.add("kids", {"erase": ["weapon"]}, "test")
        quiet.start()
        names = [
            row["acted"][0]["concepts"]
            for row in (earlier.result().json(), quiet.post(ASKED).json())
            for row in row["efface"]["rows"]
        ]
    assert names == [["alcohol"], ["weapon"]]


def test_the_policys_bounds_of_the_guidance_scale_hold(quiet: Desk) -> None:
    quiet.service.policies.add("kids", {"erase": ["alcohol"], "guidance": [3, 8]}, "test")
    for scale in (1.01, 2.99, 20):
        found = error(quiet.post(ASKED | {"guidance_scale": scale}), 400, "invalid_value")
        assert found["param"] == "guidance_scale"
    quiet.start()
    assert quiet.post(ASKED | {"guidance_scale": 3}).status_code == 200
    assert quiet.post(ASKED | {"guidance_scale": 1.01}, "press").status_code == 200


# ---------------------------------------------------------------- prompts, paths, logs


@pytest.mark.parametrize(
    "prompt",
    [
        "(beer:1.9)",
        "[beer|wine]",
        "beer AND wine",
        "BREAK beer",
        "<lora:beer:1>",
        "{{7*7}}",
        "%n%s",
        "'; DROP TABLE jobs; --",
    ],
)
def test_syntax_in_prompts_is_plain_text(prompt: str, desk: Desk) -> None:
    assert desk.post({"prompt": prompt, "negative_prompt": prompt, "steps": 1}).status_code == 200
    ((row,), _) = desk.stub.batches[-1]
    assert (row.prompt, row.negative) == (prompt, prompt) and [c.name for c in row.policy.concepts] == ["alcohol"]


def test_the_log_is_one_line_per_event_and_shows_no_text_of_a_user(
    desk: Desk, capfd: pytest.CaptureFixture[str]
) -> None:
    evil = 'a\ncat\r\n{"event": "forged"}\t'
    assert desk.post({"prompt": evil, "steps": 1, "user": evil, "safety_identifier": evil}).status_code == 200
    desk.client.get("/v1/efface/jobs/%0d%0aforged%1b[31m", headers=desk.head())
    lines = capfd.readouterr().err.splitlines()
    events = [json.loads(line) for line in lines]
    assert len(events) >= 2 and {each["event"] for each in events} == {"request"}
    assert not any("cat" in line or "forged" in line or "\x1b" in line for line in lines)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/efface/jobs/../policies",
        "/v1/efface/jobs/%2e%2e%2fpolicies",
        "/v1/efface/jobs/..%2f..%2fetc%2fpasswd",
        "/v1/efface/jobs/job_0",
        "/v1/efface/jobs/%00",
        "/v1/efface/jobs/'%20OR%201=1--",
        "/v1/images/edits",
        "/v1/images/variations",
        "/docs",
        "/metrics",
        "/",
    ],
)
def test_ids_are_no_paths_and_other_routes_do_not_exist(path: str, idle: Desk) -> None:
    response = idle.client.get(path, headers=idle.head())
    code = "admin_only" if response.status_code == 403 else "not_found"
    error(response, 403 if code == "admin_only" else 404, code)
    assert code == "not_found" or path == "/v1/efface/jobs/../policies"  # which clients send as another route


def test_other_methods_and_content_types_are_refused_in_the_same_shape(idle: Desk) -> None:
    error(idle.client.get(URL, headers=idle.head()), 405, "method_not_allowed")
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""):
        response = idle.client.post(URL, content=b'{"prompt": "x"}', headers=idle.head(**{"content-type": kind}))
        error(response, 415, "invalid_content_type")
    error(idle.post({"prompt": "x", "user": "y" * 70_000}), 413, "body_too_large")
    error(idle.post({"prompt": "x", "model": "dall-e-3"}), 404, "model_not_found")


def test_ids_cannot_be_guessed(quiet: Desk) -> None:
    from test_serve_state import new, nothing

    names = {quiet.service.jobs.accept(new(), nothing)[0] for _ in range(20)}
    assert len(names) == 20 and all(re.fullmatch("job_[0-9a-f]{32}", name) for name in names)


# ---------------------------------------------------------------- queue, time and shutdown


def test_a_full_queue_says_when_to_come_back(quiet: Desk) -> None:
    from test_serve_state import new, nothing

    for _ in range(LIMITS.tenant):
        quiet.service.jobs.accept(new("kids"), nothing)
    response = quiet.post(ASKED)
    assert "of this tenant" in error(response, 429, "queue_full")["message"]
    assert 1 <= int(response.headers["retry-after"]) <= 120 and response.headers["x-should-retry"] == "true"
    quiet.service.jobs.accept(new("press"), nothing)
    assert "in the queue." in error(quiet.post(ASKED, "teens"), 429, "queue_full")["message"]
    quiet.service.metrics.drew(1, 1.0, 0.001)
    assert quiet.service.metrics.retry_after(1e9) == 120 and quiet.service.metrics.retry_after(1.0) == 1


def test_a_request_that_waits_too_long_is_cancelled(quiet: Desk) -> None:
    from dataclasses import replace

    quiet.service.limits = replace(LIMITS, wait=0.3)
    response = quiet.post(ASKED)
    assert error(response, 504, "timeout") and response.headers["x-should-retry"] == "false"
    assert "timeout" in quiet.post({**ASKED, "stream": True}).text
    _until(lambda: quiet.service.jobs.count(["cancelled"]) == 2)
    assert quiet.service.jobs.waiting("stub") == []


def test_requests_join_on_an_idempotency_key_only(desk: Desk) -> None:
    head = {"idempotency-key": "order-7"}
    first, again = desk.post(ASKED, **head).json(), desk.post(ASKED, **head).json()
    assert first["efface"]["job"] == again["efface"]["job"] and first["data"] == again["data"]
    assert len(desk.stub.batches) == 1
    error(desk.post({**ASKED, "prompt": "a dog"}, **head), 422, "idempotency_key_reused")
    assert desk.post(ASKED, "teens", **head).json()["efface"]["job"] != first["efface"]["job"]
    assert desk.post(ASKED).json()["efface"]["job"] != desk.post(ASKED).json()["efface"]["job"]


def test_a_cancelled_job_ends_its_batch_and_its_request(desk: Desk) -> None:
    desk.stub.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(desk.post, {**ASKED, "steps": 5})
        assert desk.stub.began.wait(5)
        ((name, _),) = desk.service.jobs.running()
        assert desk.client.delete(f"/v1/efface/jobs/{name}", headers=desk.head()).status_code == 200
        error(waiting.result(10), 409, "cancelled")
    _until(lambda: desk.service.jobs.states([name])[name][0] == "cancelled")
    assert desk.service.jobs.pictures(name) == []


def test_a_database_that_goes_away_and_comes_back(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert desk.post(ASKED).status_code == 200
    there, away = desk.service.database.engine, sql.create_engine("sqlite:////absent/serve.db")
    desk.service.database.engine = away
    response = desk.post(ASKED)
    assert error(response, 503, "unavailable") and response.headers["retry-after"]
    assert desk.client.get("/readyz").json() == {
        "database": False,
        "worker": True,
        "draining": False,
        "status": "not ready",
    }
    assert desk.client.get("/healthz").status_code == 200
    desk.service.database.engine = there
    with monkeypatch.context() as patch:  # a disk without room
        patch.setattr(type(desk.service.database), "usable", lambda _: False)
        assert desk.client.get("/readyz").status_code == 503
    _until(lambda: desk.client.get("/readyz").status_code == 200)
    assert desk.post(ASKED).status_code == 200


def test_a_job_is_finished_when_the_database_comes_back_during_drawing(desk: Desk) -> None:
    desk.stub.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(desk.post, ASKED)
        assert desk.stub.began.wait(5)
        there = desk.service.database.engine
        desk.service.database.engine = sql.create_engine("sqlite:////absent/serve.db")
        desk.stub.gate.set()
        time.sleep(0.3)
        desk.service.database.engine = there
        assert waiting.result(10).status_code == 200
    assert len(desk.stub.batches) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unknown_error_of_a_worker_makes_the_server_not_ready(desk: Desk) -> None:
    desk.stub.fails = {"strange": KeyError("x")}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(desk.post, {"prompt": "strange", "steps": 1})
        desk.workers[0].join(5)
        assert not desk.workers[0].is_alive() and desk.client.get("/readyz").status_code == 503
        desk.stub.fails = {}
        desk.start()  # another worker takes the job
        assert waiting.result(10).status_code == 200


# ---------------------------------------------------------------- a real socket


@pytest.fixture
def address(desk: Desk) -> Iterator[tuple[str, int]]:
    config = uvicorn.Config(
        create_app(desk.service), port=0, log_config=None, http="h11", loop="asyncio", lifespan="on"
    )
    server = uvicorn.Server(config)
    sockets = [config.bind_socket()]
    thread = threading.Thread(target=lambda: asyncio.run(server._serve(sockets)), daemon=True)
    thread.start()
    _until(lambda: server.started)
    yield sockets[0].getsockname()
    desk.stub.gate.set()
    server.should_exit = server.force_exit = True
    thread.join(10)


def sent(address: tuple[str, int], text: bytes, wait: float = 5.0) -> bytes:
    """What the server answers to raw bytes."""
    with socket.create_connection(address, wait) as line:
        line.sendall(text)
        answer = b""
        while part := line.recv(65_536):
            answer += part
            if b"\r\n\r\n" in answer and b"content-length: " in answer:
                head, _, body = answer.partition(b"\r\n\r\n")
                if len(body) >= int(re.findall(rb"content-length: (\d+)", head)[0]):
                    break
    return answer


def raw(desk: Desk, *more: str, body: str = '{"prompt": "a cat"}', length: int | None = None) -> bytes:
    lines = [f"POST {URL} HTTP/1.1", "host: x", f"authorization: Bearer {desk.keys['kids']}", *more]
    lines += ["content-type: application/json", f"content-length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, "", body]).encode()


def test_ambiguous_framing_and_slow_bodies_are_refused(desk: Desk, address: tuple[str, int]) -> None:
    both = sent(address, raw(desk, "transfer-encoding: chunked", body='13\r\n{"prompt": "a cat"}\r\n0\r\n\r\n'))
    assert b" 400 " in both.splitlines()[0] and b"invalid_header" in both
    assert b" 400 " in sent(address, raw(desk, "content-length: 3")).splitlines()[0]
    slow = sent(address, raw(desk, length=500))
    assert b" 408 " in slow.splitlines()[0] and b"request_timeout" in slow
    assert b" 413 " in sent(address, raw(desk, body="x" * 70_000)).splitlines()[0]
    assert desk.service.jobs.count(["queued", "running", "done"]) == 0


def test_a_client_that_leaves_cancels_its_request_unless_it_can_ask_again(desk: Desk, address: tuple[str, int]) -> None:
    desk.stub.gate.clear()
    for more, state in (((), "cancelled"), (("idempotency-key: a",), "done")):
        for stream in ("false", "true"):
            desk.stub.began.clear()
            more = tuple(f"{each}{stream}" for each in more)
            with socket.create_connection(address) as line:
                line.sendall(raw(desk, *more, body=f'{{"prompt": "a cat", "steps": 3, "stream": {stream}}}'))
                assert desk.stub.began.wait(20)
            ((name, _),) = desk.service.jobs.running()
            if state == "done":
                time.sleep(0.2)
                desk.stub.gate.set()
            _until(lambda name=name, state=state: desk.service.jobs.states([name])[name][0] == state)  # type: ignore[misc]
            desk.stub.gate.clear()


def test_a_reader_of_events_that_leaves_cancels_nothing(desk: Desk, address: tuple[str, int]) -> None:
    from test_serve_faults import accept

    desk.stub.gate.clear()
    name = accept(desk)
    assert desk.stub.began.wait(20)
    with socket.create_connection(address, 5) as line:
        head = f"authorization: Bearer {desk.keys['kids']}"
        line.sendall(f"GET /v1/efface/jobs/{name}/events HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n".encode())
        answer = b""
        while b"running" not in answer:
            answer += line.recv(65_536)
    time.sleep(0.3)
    desk.stub.gate.set()
    _until(lambda: desk.service.jobs.states([name])[name][0] == "done")


def test_a_reader_that_stalls_is_cut() -> None:
    """The answer is sent in parts; each has to be taken within the limit."""
    cut: list[str] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
        except OSError as error:
            cut.append(str(error))
            raise

    async def stalls(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    service: Any = type("Service", (), {"limits": type("Limits", (), {"send": 0.1})(), "metrics": _NoMetrics()})()
    scope = {"type": "http", "method": "GET", "headers": []}
    with pytest.raises(OSError, match="does not read"):
        asyncio.run(Edge(endless, service)(scope, None, stalls))  # type: ignore[arg-type]
    assert cut


class _NoMetrics:
    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any) -> Any:
        return self


# ---------------------------------------------------------------- the official client


def test_the_official_client(desk: Desk, address: tuple[str, int]) -> None:
    base = f"http://127.0.0.1:{address[1]}/v1"
    client = openai.OpenAI(base_url=base, api_key=desk.keys["kids"], max_retries=0)
    made = client.images.generate(
        prompt="a cat", n=2, size="64x64", response_format="b64_json", extra_body={"seed": 3, "steps": 2}
    )
    assert made.data is not None and len(made.data) == 2 and made._request_id
    picture = Image.open(io.BytesIO(base64.b64decode(made.data[1].b64_json or "")))
    assert picture.getpixel((0, 0)) == (4, 5, 0)
    assert made.model_extra is not None and made.model_extra["efface"]["rows"][0]["acted"]
    assert [model.id for model in client.models.list()] == ["stub"] == [client.models.retrieve("stub").id]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")
    for error_type, options in (
        (openai.BadRequestError, {"extra_body": {"policy": "press"}}),
        (openai.BadRequestError, {"size": "1024x1024"}),
        (openai.NotFoundError, {"model": "gpt-image-1"}),
    ):
        with pytest.raises(error_type) as caught:
            client.images.generate(prompt="a cat", **options)  # type: ignore[call-overload]
        assert caught.value.code and caught.value.message.endswith(("'}}", "."))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="ef_wrong").images.generate(prompt="a cat")
    desk.stub.outcomes = {"beer": "blocked", "odd": "not proven"}
    with pytest.raises(openai.PermissionDeniedError):
        client.images.generate(prompt="beer", extra_body={"steps": 1})
    with pytest.raises(openai.InternalServerError):
        client.with_options(max_retries=2).images.generate(prompt="odd", extra_body={"steps": 1})
    assert sum(row.prompt == "odd" for rows, _ in desk.stub.batches for row in rows) == 1  # not repeated

    events = list(client.images.generate(prompt="a cat", stream=True, extra_body={"steps": 2}))
    assert [event.type for event in events] == ["image_generation.completed"]
    with pytest.raises(openai.APIError, match="erased concepts"):
        list(client.images.generate(prompt="beer", stream=True, extra_body={"steps": 1}))

    page = (Path(__file__).parents[1] / "docs/serve.md").read_text("utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    told: list[Any] = []
    exec(example, {"base_url": base, "key": desk.keys["kids"], "print": lambda *words: told.append(words)})
    assert told[0][1] == ["drawn", "drawn"]

    async def both() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=base, api_key=desk.keys["press"]) as other:
            asked = [other.images.generate(prompt=text, extra_body={"steps": 1}) for text in ("a cat", "a dog")]
            return list(await asyncio.gather(*asked))

    assert [len(each.data) for each in asyncio.run(both())] == [1, 1]


# ---------------------------------------------------------------- what listens, and the whole of it


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])
def test_nothing_listens_beyond_this_machine_unless_told(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--everywhere"):
        check_host(host, False)
    check_host(host, True)
    done = CliRunner().invoke(cli, ["serve", "run", str(tmp_path), "--host", host])
    assert done.exit_code == 2 and "--everywhere" in done.output
    for near in ("127.0.0.1", "::1", "localhost"):
        check_host(near, False)


def command(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["serve", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def _tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


@pytest.mark.long
def test_a_negative_prompt_that_repeats_the_prompt_does_not_bring_a_concept_back() -> None:
    """At the largest guidance that a request may ask for."""
    pipe = efface.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    prompt, policies = "a beer mug", (efface.Policy(erase=["alcohol"]), efface.unguarded)
    rows = [Row(prompt, prompt, seed, policy) for policy in policies for seed in (1_000_000, 1_000_001)]
    asked = fields.parsed(
        {"prompt": prompt, "negative_prompt": prompt, "guidance_scale": fields.MOST_SCALE, "steps": 8}
    )
    call = fields.batch_facts(asked, "emoji", (64, 64), policies[0])
    drawn = PipelineBackend(pipe, "emoji", ((64, 64),)).draw(rows, call, lambda _: None, lambda *_: None)
    pictures = [each.picture for each in drawn if each.picture is not None]
    seen = efface.detector("eyes", "alcohol")(torch.cat([_tensor(picture) for picture in pictures])).any(0)
    assert seen.tolist() == [False, False, True, True]


YAML = "policies: {kids: {erase: [alcohol]}, press: {unguarded: true}}"


@pytest.mark.long
def test_from_init_to_a_picture_and_a_clean_end(tmp_path: Path) -> None:
    """The command line, the emoji model, the official client, SIGTERM."""
    folder, policies = str(tmp_path / "service"), tmp_path / "policies.yaml"
    policies.write_text(YAML)
    assert re.search(r"^ef_[\w-]{43}$", command("init", folder), re.MULTILINE)
    assert os.stat(tmp_path / "service/pepper").st_mode & 0o077 == 0
    assert "kids: version 1" in command("policy", "add", folder, str(policies))
    keys = {
        name: command("key", "add", folder, "--tenant", name, "--policy", name).split()[-1] for name in read(policies)
    }
    run = [sys.executable, "-m", "efface", "serve", "run", folder, "--port", "0", "--metrics-port", "0"]
    server = subprocess.Popen(run, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        ports = {}
        while "listening" not in ports:
            line = json.loads(server.stderr.readline())
            ports[line["event"]] = line["port"]
        drain = threading.Thread(target=server.stderr.read, daemon=True)
        drain.start()
        pictures = {}
        for name, key in keys.items():
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{ports['listening']}/v1", api_key=key)
            asked = {"seed": 1_000_000, "steps": 10}
            made = client.images.generate(prompt="a glass of wine", extra_body=asked)
            assert made.data is not None
            pictures[name] = Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json or ""))).convert("RGB")
            assert made.model_extra is not None
            assert (made.model_extra["efface"]["rows"][0]["acted"] != []) == (name == "kids")
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{ports['metrics']}/metrics") as answer:
            assert b"efface_jobs_finished_total" in answer.read()
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(30)
    assert code == 0
    eyes = efface.detector("eyes", "alcohol")
    seen = {name: bool(eyes(_tensor(picture)).any()) for name, picture in pictures.items()}
    assert seen == {"kids": False, "press": True}
    assert "the chain holds" in command("audit", folder)
    assert "kids" in command("key", "list", folder) and "unguarded" in command("policy", "list", folder)
