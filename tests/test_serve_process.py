"""The server as a process: it drains, it is killed and started again, and many tenants draw with a real pipeline."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import tiny
from PIL import Image
from test_serve import LIMITS, URL, Desk, _until

from efface import Guard, Policy
from efface.serve.backend import PipelineBackend
from efface.serve.run import run
from efface.serve.service import opened
from efface.serve.worker import Worker

SERVES = """
import sys, time
from pathlib import Path
from efface.serve.run import run
from efface.serve.service import Limits, opened
from test_serve import Stub

class Slow(Stub):
    def draw(self, rows, call, on_step, on_partial):
        Path(sys.argv[2], "drawing").write_text("drawing")
        while not Path(sys.argv[2], "go").exists():
            time.sleep(0.02)
        return super().draw(rows, call, on_step, on_partial)

service = opened(Path(sys.argv[1]), limits=Limits(rows=2, lease=0.5, drain=10.0), model="stub", sizes=Stub.sizes)
sys.exit(run(service, Slow(), port=0, metrics_port=None))
"""


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path, LIMITS)
    yield made
    made.service.database.close()


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """A server process whose drawings wait for the file "go". Unguarded requests need no torch."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    drawing = folder / "drawing"
    command = [sys.executable, "-c", SERVES, str(folder / "service"), str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    assert process.stderr is not None
    try:
        told: dict[str, Any] = {}
        while told.get("event") != "listening":
            told = json.loads(process.stderr.readline())
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, f"http://127.0.0.1:{told['port']}", drawing
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("option", ["--port", "--metrics-port"])
def test_a_port_that_is_taken_ends_the_start(option: str, desk: Desk) -> None:
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        ports = (taken, None) if option == "--port" else (0, taken)
        with pytest.raises(OSError, match=f"Cannot listen on 127.0.0.1, port {taken} .*Give another {option}"):
            run(desk.service, desk.stub, "127.0.0.1", *ports)
    assert threading.active_count() == before


@pytest.mark.long
def test_sigterm_finishes_accepted_jobs_and_refuses_new_ones(desk: Desk, tmp_path: Path) -> None:
    asked = {"prompt": "a cat", "steps": 1}
    with serving(tmp_path) as (process, url, drawing), concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(httpx2.post, url + URL, json=asked, headers=desk.head("press"), timeout=20) for _ in range(4)
        ]
        _until(lambda: drawing.exists() and desk.service.jobs.count(["queued", "running"]) == 4)
        process.send_signal(signal.SIGTERM)
        _until(lambda: httpx2.get(url + "/readyz").status_code == 503)
        late = httpx2.post(url + URL, json=asked, headers=desk.head("press"))
        assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
        (tmp_path / "go").touch()
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert process.wait(15) == 0
    assert desk.service.jobs.count(["done"]) == 4


@pytest.mark.long
def test_a_killed_server_draws_what_it_had_accepted_after_its_next_start(desk: Desk, tmp_path: Path) -> None:
    head = desk.head("press", **{"idempotency-key": "order-1"})
    asked = {"prompt": "a cat", "steps": 1, "seed": 3}
    with serving(tmp_path) as (process, url, drawing), concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx2.post, url + URL, json=asked, headers=head, timeout=20)
        _until(drawing.exists)
        process.send_signal(signal.SIGKILL)
        with pytest.raises(httpx2.HTTPError):
            waiting.result()
    assert desk.service.jobs.count(["running"]) == 1
    (tmp_path / "go").touch()
    with serving(tmp_path) as (process, url, _):
        again = httpx2.post(url + URL, json=asked, headers=head, timeout=20)
        assert again.status_code == 200 and len(again.json()["data"]) == 1
    assert desk.service.jobs.count(["done"]) == 1 and desk.service.audit.verify()[1] == ""
    kinds = [entry["kind"] for entry in opened(tmp_path / "service").audit.entries()]
    assert kinds.count("job accepted") == kinds.count("job finished") == 1


@pytest.mark.long
def test_tenants_of_a_busy_server_get_what_their_own_policy_draws(desk: Desk) -> None:
    """Many requests at one time on a tiny pipeline. Each picture equals the one that its policy draws alone."""
    alcohol, cat = ({"name": c.name, "phrases": [*c.phrases]} for c in (tiny.ALCOHOL, tiny.CAT))
    entries: dict[str, dict[str, Any]] = {
        "strong": {"erase": [{"concepts": [alcohol], "strength": 3.0}]},
        "weak": {"erase": [{"concepts": [alcohol], "strength": 0.5}]},
        "both": {"erase": [{"concepts": [alcohol, cat], "strength": 3.0}]},
        "sld": {"erase": [{"concepts": [cat], "method": "sld"}]},
        "open": {"unguarded": True},
    }
    for name, policy in entries.items():
        desk.service.policies.add(name, policy, "test")
        desk.keys[name] = desk.service.keys.add(name, name)[1]
    pipe = tiny.pipeline("sd1")
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    desk.service.model, desk.service.sizes = "tiny", ((side, side),)
    desk.service.limits = replace(LIMITS, queue=100, wait=60.0)
    worker = Worker(desk.service, PipelineBackend(pipe, "tiny", desk.service.sizes))
    requests = [(tenant, prompt, seed) for tenant in entries for prompt in tiny.PROMPTS for seed in (7, 8)]
    with desk.client, concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        asked = [
            pool.submit(desk.post, {"prompt": prompt, "seed": seed, "steps": 3}, tenant)
            for tenant, prompt, seed in requests
        ]
        _until(lambda: len(desk.service.jobs.waiting("tiny")) == len(requests), 20)
        worker.start()
        answers = [each.result() for each in asked]
    worker.stop()
    worker.join()
    assert [answer.status_code for answer in answers] == [200] * len(requests)
    guarded = Guard({name: Policy(**policy) for name, policy in entries.items()})
    found, expected = [], []
    for (tenant, prompt, seed), answer in zip(requests, answers, strict=True):
        content = base64.b64decode(answer.json()["data"][0]["b64_json"])
        found.append(np.array(Image.open(io.BytesIO(content)), dtype=float))
        (alone,) = guarded(pipe, [prompt], [tenant], [seed], num_inference_steps=3).images
        expected.append(np.array(alone, dtype=float))
    apart = [float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)]
    assert max(apart) <= 1, apart  # of 255
    several = [
        np.abs(expected[k] - expected[k + 4]).max() for k in range(0, 12, 4)
    ]  # other policies, same prompt and seed
    assert min(several) > 1, several
    rows = desk.service.metrics.registry.get_sample_value("efface_batch_rows_count")
    assert rows is not None and rows < len(requests)
