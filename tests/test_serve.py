"""The service: what it accepts, what it answers, and what no request can do. A stub draws."""

from __future__ import annotations

import base64
import concurrent.futures
import functools
import io
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql
from PIL import Image
from starlette.testclient import TestClient

from efface import _hub
from efface.guard import Policy
from efface.serve import fields
from efface.serve.app import create_app
from efface.serve.backend import Drawn, OnPartial, Row
from efface.serve.service import Limits, initialise, opened
from efface.serve.worker import Worker

URL = "/v1/images/generations"


class Stub:
    """Draws one colour per prompt and seed, and records what it was asked for."""

    name, sizes, shows = "stub", ((64, 64), (32, 64)), True

    def __init__(self) -> None:
        self.batches: list[tuple[list[Row], dict[str, Any]]] = []
        self.outcomes: dict[str, str] = {}  # prompt to outcome
        self.fails: dict[str, BaseException] = {}  # prompt to error
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()

    def cut_off(self, prompt: str) -> str:
        return prompt[200:]

    def check(self, policy: Policy) -> None:
        pass

    def draw(
        self, rows: Sequence[Row], call: Mapping[str, Any], on_step: Callable[[int], None], on_partial: OnPartial
    ) -> list[Drawn]:
        self.batches.append((list(rows), dict(call)))
        self.began.set()
        for step in range(call["steps"]):
            on_step(step + 1)
            for k, row in enumerate(rows):
                for number, shown in enumerate(fields.partial_steps(row.partial, call["steps"])):
                    if shown == step + 1:
                        on_partial(k, number, Image.new("RGB", tuple(call["size"]), (shown, 0, 99)))
            if step == 0:
                while not self.gate.wait(0.02):
                    on_step(1)
        for row in rows:
            if row.prompt in self.fails:
                raise self.fails[row.prompt]
        return [self._drawn(row, call) for row in rows]

    def _drawn(self, row: Row, call: Mapping[str, Any]) -> Drawn:
        outcome = self.outcomes.get(row.prompt, "drawn")
        width, height = call["size"]
        picture = Image.new("RGB", (width, height), (row.seed % 256, len(row.prompt) % 256, 0))
        acted = [{"concepts": [c.name], "steps": [[0, 1]], "calls": 2, "eraser": {}} for c in row.policy.concepts]
        found = [["alcohol"]] if outcome == "blocked" else []
        record = {"outcome": outcome, "policy": row.policy.hash, "acted": acted, "detections": found}
        record["deltas"] = [{"sha256": each.sha256, "concepts": []} for each in row.policy.deltas]
        return Drawn(picture if outcome == "drawn" else None, record)


@functools.cache
def template() -> tuple[Path, str, dict[str, str]]:
    """A folder with a service, its admin key, and the keys of its tenants. Made once."""
    folder = Path(tempfile.mkdtemp()) / "service"
    service, admin = initialise(folder)
    for name, entries in POLICIES.items():
        service.policies.add(name, entries, "test")
    keys = {name: service.keys.add(name, name)[1] for name in POLICIES}
    service.database.close()
    return folder, admin, keys


class Desk:
    """A service with three policies, its keys, a client and, on demand, a worker."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        made, self.admin, keys = template()
        shutil.copytree(made, folder / "service")
        self.service = opened(folder / "service", limits=limits, model=Stub.name, sizes=Stub.sizes)
        self.keys = dict(keys)
        self.stub = Stub()
        self.workers: list[Worker] = []
        self.client = TestClient(create_app(self.service), raise_server_exceptions=False)

    def start(self) -> None:
        self.workers.append(Worker(self.service, self.stub))
        self.workers[-1].start()

    def head(self, key: str = "kids", **more: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys.get(key, key)}", **more}

    def post(self, body: Any, key: str = "kids", **more: str) -> Any:
        return self.client.post(URL, json=body, headers=self.head(key, **more))


DELTA: dict[str, Any] = {"file": "a.safetensors", "sha256": "0" * 64, "concepts": ["alcohol"]}
POLICIES: dict[str, dict[str, Any]] = {
    "kids": {"erase": ["alcohol"]},
    "teens": {"erase": ["weapon"]},
    "press": {"unguarded": True},
}
LIMITS = Limits(rows=4, queue=6, tenant=5, wait=10.0, lease=0.5, drain=5.0, read=0.3, send=1.0)


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[Desk]:
    """Without a worker: jobs stay in the queue."""
    made = Desk(tmp_path, LIMITS)
    with made.client:
        yield made
    made.stub.gate.set()
    for worker in made.workers:
        worker.stop()
        worker.join(10)
    made.service.database.close()


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """One for many requests that leave no trace."""
    made = Desk(tmp_path_factory.mktemp("idle"), LIMITS)
    with made.client:
        yield made


@pytest.fixture
def desk(quiet: Desk) -> Desk:
    quiet.start()
    return quiet


def error(response: Any, status: int, code: str) -> dict[str, Any]:
    """The error of a response, in the shape of the API."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code, body
    assert body["error"]["message"].endswith(".") and len(body["error"]["message"].split(". ")) >= 2
    assert response.headers["x-request-id"].startswith("req_")
    return dict(body["error"])


# ---------------------------------------------------------------- from a request to a picture


def test_a_request_is_drawn_under_the_policy_of_its_key(desk: Desk) -> None:
    asked = {"prompt": "a cat", "n": 2, "seed": 5, "steps": 2, "size": "32x64", "negative_prompt": "dog"}
    response = desk.post(asked)
    assert response.status_code == 200, response.text
    body = response.json()
    pictures = [Image.open(io.BytesIO(base64.b64decode(each["b64_json"]))) for each in body["data"]]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(5, 5, 0), (6, 5, 0)]
    assert [picture.size for picture in pictures] == [(32, 64)] * 2
    policy = desk.service.policies.latest("kids")
    assert policy is not None
    assert pictures[0].info["efface:policy"] == policy.policy.hash and "cat" not in str(pictures[0].info)
    (rows, call), *others = desk.stub.batches
    assert not others and [row.policy.hash for row in rows] == [policy.policy.hash] * 2
    assert call["steps"] == 2 and call["negative_prompt"] and {row.negative for row in rows} == {"dog"}
    assert body["efface"]["policy"] == policy.policy.hash
    assert body["efface"]["rows"][0]["acted"][0]["concepts"] == ["alcohol"]
    assert body["output_format"] == "png" and body["size"] == "32x64"
    kinds = [entry["kind"] for entry in desk.service.audit.entries()]
    assert kinds[-2:] == ["job accepted", "job finished"] and desk.service.audit.verify()[1] == ""
    assert "a cat" not in json.dumps(desk.service.audit.entries())


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats(kind: str, desk: Desk) -> None:
    body = desk.post({"prompt": "a cat", "steps": 1, "output_format": kind, "output_compression": 50}).json()
    assert Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"]))).format == kind.upper()


def test_a_request_can_only_add_erasures(desk: Desk) -> None:
    assert desk.post({"prompt": "a cat", "steps": 1, "also_erase": ["cat", "alcohol"]}).status_code == 200
    assert desk.post({"prompt": "a cat", "steps": 1, "also_erase": ["cat"]}, "press").status_code == 200
    first, second = ([c.name for c in rows[0].policy.concepts] for rows, _ in desk.stub.batches)
    assert first == ["alcohol", "cat"] and second == ["cat"]
    assert error(desk.post({"prompt": "x", "also_erase": ["caat"]}), 400, "invalid_value")["param"] == "also_erase"


def test_a_stream_tells_progress_and_ends_with_the_pictures(desk: Desk) -> None:
    asked = {"prompt": "a cat", "n": 2, "seed": 1, "steps": 3, "stream": True}
    desk.stub.gate.clear()

    def release() -> None:
        _until(lambda: any(step for _, step, _ in desk.service.jobs.states(_names(desk)).values()))
        time.sleep(0.3)
        desk.stub.gate.set()

    threading.Thread(target=release).start()
    text = desk.post(asked).text
    assert ": accepted job_" in text and ": step 1 of 3" in text and text.endswith("data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [event["type"] for event in events] == ["image_generation.completed"] * 2
    assert base64.b64decode(events[0]["b64_json"])[:4] == b"\x89PNG"


def _names(desk: Desk) -> list[str]:
    return [name for name, _ in desk.service.jobs.running()]


def test_jobs_can_be_followed_read_and_deleted_by_their_tenant_only(desk: Desk) -> None:
    name = desk.post({"prompt": "a cat", "steps": 2}).json()["efface"]["job"]
    path = f"/v1/efface/jobs/{name}"
    found = desk.client.get(path, headers=desk.head()).json()
    assert found["state"] == "done" and found["step"] == 2 and len(found["result"]["data"]) == 1
    events = desk.client.get(f"{path}/events", headers=desk.head()).text
    assert '"state": "done"' in events and events.endswith("data: [DONE]\n\n")
    for method, where in [("GET", path), ("DELETE", path), ("GET", f"{path}/events")]:
        error(desk.client.request(method, where, headers=desk.head("teens")), 404, "not_found")
    assert desk.client.delete(path, headers=desk.head()).json()["deleted"]
    found = desk.client.get(path, headers=desk.head()).json()
    assert found["result"] is None and found["error"]["code"] == "expired"


@pytest.mark.parametrize("allow", [False, True])
def test_a_worker_may_download_what_its_command_allowed(allow: bool, quiet: Desk) -> None:
    seen: list[bool] = []
    draw = quiet.stub.draw
    quiet.stub.draw = lambda *given: [seen.append(_hub.allowed()), draw(*given)][1]  # type: ignore[method-assign]
    with _hub.allowing(allow):
        quiet.start()
    assert quiet.post({"prompt": "a cat", "steps": 1}).status_code == 200
    assert seen == [allow]


def test_the_prompt_is_not_kept_after_the_job(desk: Desk) -> None:
    desk.post({"prompt": "a secret cat", "negative_prompt": "hidden dog", "steps": 1})
    stored = Path(str(desk.service.database.name))
    with desk.service.database.reading() as connection:
        rows = connection.execute(sql.text("SELECT request FROM jobs")).scalars().all()
        bodies = connection.execute(sql.text("SELECT body FROM audit")).scalars().all()
        records = connection.execute(sql.text("SELECT record FROM pictures")).scalars().all()
    assert stored.is_file() and not any("secret" in text or "hidden" in text for text in [*rows, *bodies, *records])


def test_models_health_and_metrics(desk: Desk, quiet: Desk) -> None:
    assert desk.client.get("/v1/models", headers=desk.head()).json()["data"][0]["id"] == "stub"
    assert desk.client.get("/healthz").status_code == 200
    assert desk.client.get("/readyz").json()["status"] == "ready"
    desk.post({"prompt": "a cat", "steps": 1})
    desk.post({"prompt": "a cat", "policy": "press"})
    from prometheus_client import generate_latest

    registry = desk.service.metrics.registry
    finished = "efface_jobs_finished_total", {"state": "done"}
    _until(lambda: registry.get_sample_value(*finished) == 1)  # the worker counts after it has answered
    text = generate_latest(registry).decode()
    assert f'efface_requests_total{{code="200",route="{URL}"}} 1.0' in text
    assert 'efface_rejected_total{reason="unknown_field"} 1.0' in text
    assert 'efface_jobs_finished_total{state="done"} 1.0' in text and "efface_batch_rows_count 1.0" in text
    assert "cat" not in text and "kids" not in text
    desk.service.draining.set()
    assert desk.client.get("/readyz").status_code == 503
    response = desk.post({"prompt": "a cat"})
    assert error(response, 503, "draining") and int(response.headers["retry-after"]) >= 1


# ---------------------------------------------------------------- no picture without proof


def test_what_is_not_proven_or_blocked_is_never_answered(desk: Desk) -> None:
    desk.stub.outcomes = {"unproven": "not proven", "beer": "blocked"}
    for stream in (False, True):
        response = desk.post({"prompt": "unproven", "n": 2, "steps": 1, "stream": stream})
        assert "policy_not_applied" in response.text and "b64" not in response.text
        response = desk.post({"prompt": "beer", "steps": 1, "stream": stream})
        assert "content_blocked" in response.text and "b64" not in response.text
    assert error(desk.post({"prompt": "beer", "steps": 1}), 403, "content_blocked")["param"] == "prompt"
    assert desk.post({"prompt": "unproven", "steps": 1}).headers["x-should-retry"] == "false"
    with desk.service.database.reading() as connection:
        assert connection.execute(sql.text("SELECT count(*) FROM pictures")).scalar() == 0


def test_a_stored_policy_that_was_changed_draws_nothing(quiet: Desk) -> None:
    weaker = Policy(unguarded=True)
    values = {"body": json.dumps(weaker.as_json(), sort_keys=True), "hash": weaker.hash}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(quiet.post, {"prompt": "a cat", "steps": 1})
        _until(lambda: len(quiet.service.jobs.waiting("stub")) == 1)
        with quiet.service.database.writing() as connection:
            connection.execute(sql.text("UPDATE policies SET body = :body, hash = :hash WHERE name = 'kids'"), values)
        quiet.start()
        error(waiting.result(), 500, "policy_not_applied")
    assert quiet.stub.batches == []


def test_a_stored_policy_without_its_hash_accepts_nothing(desk: Desk) -> None:
    body = json.dumps(Policy(unguarded=True).as_json(), sort_keys=True)
    with desk.service.database.writing() as connection:
        connection.execute(sql.text("UPDATE policies SET body = :body WHERE name = 'kids'"), {"body": body})
    error(desk.post({"prompt": "a cat", "steps": 1}), 500, "server_error")
    assert desk.stub.batches == []


def test_a_failure_hits_its_own_request_only_and_shows_no_inside(
    quiet: Desk, capfd: pytest.CaptureFixture[str]
) -> None:
    quiet.stub.fails = {"poison": RuntimeError("secret weights at /srv")}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(quiet.post, {"prompt": prompt, "steps": 1}) for prompt in ("a cat", "poison", "a dog")]
        _until(lambda: len(quiet.service.jobs.waiting("stub")) == 3)
        quiet.start()
        answers = [each.result() for each in asked]
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert len(quiet.stub.batches[0][0]) == 3  # one batch, which failed as a whole first
    assert "secret" not in error(answers[1], 500, "drawing_failed")["message"]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "drawing failed" in line][-1:]
    assert "RuntimeError at test_serve.py:" in line and "secret" not in line and "poison" not in line


def _until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


# ---------------------------------------------------------------- fields


VALUES: dict[str, tuple[Any, Any]] = {
    "prompt": ("a", "b"),
    "negative_prompt": ("a", "b"),
    "n": (1, 2),
    "seed": (1, 2),
    "also_erase": ([], ["cat"]),
    "output_format": ("png", "webp"),
    "output_compression": (1, 2),
    "model": ("stub", None),
    "size": ("64x64", "32x64"),
    "quality": ("low", "high"),
    "steps": (1, 2),
    "guidance_scale": (2.0, 3.0),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "partial_images": (2, None),
    "response_format": ("b64_json", None),
    "safety_identifier": ("a", "b"),
    "stream": (True, False),
    "style": ("vivid", "natural"),
    "user": ("a", "b"),
}


def test_the_table_declares_every_field() -> None:
    assert fields.FIELDS.keys() == fields.ImageRequest.model_fields.keys() == VALUES.keys()
    assert set(fields.FIELDS.values()) == {"batch", "row", "http"}


@pytest.mark.parametrize("name", fields.FIELDS)
def test_only_fields_of_the_batching_key_change_it(name: str) -> None:
    keys = []
    for k, value in enumerate(VALUES[name]):
        request = fields.parsed({"prompt": "x", "stream": name == "partial_images", name: value})
        size = fields.size_of(request, Stub.sizes)
        model = "stub" if name != "model" or not k else "other"  # a server has one model; the key names it all the same
        keys.append(fields.key_of(fields.batch_facts(request, model, size, Policy(erase=["alcohol"]))))
    assert (len(set(keys)) == 2) == (fields.FIELDS[name] == "batch"), name


def test_a_negative_prompt_other_methods_and_other_deltas_make_another_batch() -> None:
    plain, negative = fields.parsed({"prompt": "x"}), fields.parsed({"prompt": "x", "negative_prompt": ""})
    eiup, sld, none = {"erase": ["cat"]}, {"erase": [{"concepts": ["cat"], "method": "sld"}]}, {"unguarded": True}
    half, other = DELTA | {"strength": 0.5}, DELTA | {"sha256": "1" * 64}
    deltas = [eiup | {"deltas": [each]} for each in (DELTA, half, other)]
    made = [(negative, eiup), *((plain, each) for each in (eiup, sld, none, *deltas))]
    assert len({fields.key_of(fields.batch_facts(r, "m", (8, 8), Policy(**each))) for r, each in made}) == 7
    same = [{"erase": ["cat"]}, {"erase": ["weapon"], "gate": {"detector": "eyes"}}]
    assert len({fields.key_of(fields.batch_facts(plain, "m", (8, 8), Policy(**each))) for each in same}) == 1


BAD: dict[str, tuple[Any, str | None]] = {
    "no prompt": ({}, "prompt"),
    "no object": ([], None),
    "text": ("x", None),
    "empty prompt": ({"prompt": ""}, "prompt"),
    "blank prompt": ({"prompt": " \n"}, None),
    "number as prompt": ({"prompt": 1}, "prompt"),
    "long prompt": ({"prompt": "x" * 32_001}, "prompt"),
    "NUL": ({"prompt": "a\0b"}, "prompt"),
    "escape": ({"prompt": "a\x1b[31mb"}, "prompt"),
    "policy": ({"prompt": "x", "policy": "press"}, "policy"),
    "tenant": ({"prompt": "x", "tenant": "press"}, "tenant"),
    "strength": ({"prompt": "x", "strength": 0}, "strength"),
    "embeddings": ({"prompt": "x", "prompt_embeds": [[0.0]]}, "prompt_embeds"),
    "attention": ({"prompt": "x", "cross_attention_kwargs": {"scale": 0}}, "cross_attention_kwargs"),
    "scheduler": ({"prompt": "x", "scheduler": "ddim"}, "scheduler"),
    "save path": ({"prompt": "x", "save_disk_path": "/tmp/x"}, "save_disk_path"),
    "picture": ({"prompt": "x", "image": "http://localhost/x.png"}, "image"),
    "prototype": ({"prompt": "x", "__class__": {}}, "__class__"),
    "n 0": ({"prompt": "x", "n": 0}, "n"),
    "n -1": ({"prompt": "x", "n": -1}, "n"),
    "n 11": ({"prompt": "x", "n": 11}, "n"),
    "n 1e9": ({"prompt": "x", "n": 1e9}, "n"),
    "n text": ({"prompt": "x", "n": "1"}, "n"),
    "n true": ({"prompt": "x", "n": True}, "n"),
    "size 0": ({"prompt": "x", "size": "0x0"}, "size"),
    "size -1": ({"prompt": "x", "size": "-1x-1"}, "size"),
    "size 1e9": ({"prompt": "x", "size": "1000000000x1000000000"}, "size"),
    "size 513": ({"prompt": "x", "size": "513x513"}, "size"),
    "size of digits of another script": ({"prompt": "x", "size": "٦٤x٦٤"}, "size"),
    "guidance 0": ({"prompt": "x", "guidance_scale": 0}, "guidance_scale"),
    "guidance 1": ({"prompt": "x", "guidance_scale": 1.0}, "guidance_scale"),
    "guidance -7": ({"prompt": "x", "guidance_scale": -7.5}, "guidance_scale"),
    "guidance 1e9": ({"prompt": "x", "guidance_scale": 1e9}, "guidance_scale"),
    "steps 0": ({"prompt": "x", "steps": 0}, "steps"),
    "steps 1e6": ({"prompt": "x", "steps": 1_000_000}, "steps"),
    "steps and quality": ({"prompt": "x", "steps": 2, "quality": "high"}, None),
    "seed -1": ({"prompt": "x", "seed": -1}, "seed"),
    "seed 2**32": ({"prompt": "x", "seed": 2**32}, "seed"),
    "seeds over 2**32": ({"prompt": "x", "seed": 2**32 - 1, "n": 2}, None),
    "url": ({"prompt": "x", "response_format": "url"}, "response_format"),
    "transparent": ({"prompt": "x", "background": "transparent"}, "background"),
    "gif": ({"prompt": "x", "output_format": "gif"}, "output_format"),
    "svg": ({"prompt": "x", "output_format": "svg"}, "output_format"),
    "partial pictures without a stream": ({"prompt": "x", "partial_images": 1}, "partial_images"),
    "partial pictures of two": ({"prompt": "x", "partial_images": 1, "stream": True, "n": 2}, "partial_images"),
    "partial pictures 4": ({"prompt": "x", "partial_images": 4, "stream": True}, "partial_images"),
    "deltas": ({"prompt": "x", "deltas": []}, "deltas"),
    "a delta": ({"prompt": "x", "delta": "no-alcohol.safetensors"}, "delta"),
    "many erasures": ({"prompt": "x", "also_erase": ["cat"] * 9}, "also_erase"),
    "erasures as text": ({"prompt": "x", "also_erase": "cat"}, "also_erase"),
    "erasure as object": ({"prompt": "x", "also_erase": [{"name": "x"}]}, "also_erase.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_body_is_refused_before_anything_is_stored(case: str, idle: Desk) -> None:
    body, param = BAD[case]
    response = idle.post(body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
    error(response, 400, response.json()["error"]["code"])
    assert idle.service.jobs.waiting("stub") == [] and response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"prompt": NaN}',
        b'{"prompt": "x", "guidance_scale": NaN}',
        b'{"prompt": "x", "guidance_scale": Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b"[" * 50_000,
        b"9" * 60_000,
    ],
)
def test_what_is_no_json_is_refused(content: bytes, idle: Desk) -> None:
    response = idle.client.post(URL, content=content, headers=idle.head(**{"content-type": "application/json"}))
    assert response.status_code == 400, response.text


def test_a_prompt_that_the_model_would_cut_is_refused(desk: Desk) -> None:
    """The model reads 200 characters."""
    assert error(desk.post({"prompt": "x" * 201, "steps": 1}), 400, "prompt_too_long")["param"] == "prompt"
    asked = {"prompt": "x", "negative_prompt": "y" * 201, "steps": 1}
    assert error(desk.post(asked), 400, "prompt_too_long")["param"] == "negative_prompt"
    assert desk.stub.batches == []
