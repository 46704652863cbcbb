"""A day of a real server on the emoji model, as its users and its operator meet it."""

from __future__ import annotations

import concurrent.futures
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from test_serve import URL, _until
from test_serve_security import command

from efface.serve.service import opened

YAML = "policies: {kids: {erase: [alcohol]}, teens: {erase: [alcohol], partial_pictures: true}}"
PROMPT, SEED = "a night at the pub", 1_000_000


@contextmanager
def running(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    run = [sys.executable, "-m", "efface", "serve", "run", str(folder), "--port", "0", "--metrics-port", "0"]
    server = subprocess.Popen([*run, "--model", "emoji"], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        told: dict[str, Any] = {}
        while told.get("event") != "listening":
            told = json.loads(server.stderr.readline())
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield server, f"http://127.0.0.1:{told['port']}"
    finally:
        server.kill()
        server.wait()


@contextmanager
def accepted(url: str, key: str, steps: int, **head: str) -> Iterator[tuple[str, Iterator[str]]]:
    """The job of a stream that has begun, and the lines of the stream."""
    asked = {"prompt": PROMPT, "seed": SEED, "steps": steps, "stream": True}
    headers = {"authorization": f"Bearer {key}", **head}
    with httpx2.stream("POST", url + URL, json=asked, headers=headers, timeout=300) as answer:
        lines = answer.iter_lines()
        yield next(lines).removeprefix(": accepted "), lines


@pytest.mark.long
def test_a_day_of_a_server(tmp_path: Path) -> None:
    folder, policies = tmp_path / "service", tmp_path / "policies.yaml"
    policies.write_text(YAML)
    command("init", str(folder))
    command("policy", "add", str(folder), str(policies))
    told = {name: command("key", "add", str(folder), "--tenant", name, "--policy", name) for name in ("kids", "teens")}
    keys = {name: text.split()[-1] for name, text in told.items()}
    with running(folder) as (server, url):
        kids, teens = (openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=300) for key in keys.values())
        asked: dict[str, Any] = {"seed": SEED, "steps": 4}

        # the first picture, and no weaker policy
        made: Any = kids.images.generate(prompt=PROMPT, extra_body=asked)
        assert made.data[0].b64_json and made.efface["rows"][0]["acted"][0]["concepts"] == ["alcohol"]
        for more in ({"policy": "teens"}, {"strength": 0}, {"also_erase": ["alcohool"]}):
            with pytest.raises(openai.BadRequestError):
                kids.images.generate(prompt=PROMPT, extra_body=asked | more)
        again: Any = kids.images.generate(prompt=PROMPT, extra_body=asked, extra_headers={"x-policy": "teens"})
        assert again.efface["policy"] == made.efface["policy"] and again.data[0].b64_json == made.data[0].b64_json
        wider: Any = kids.images.generate(prompt=PROMPT, extra_body=asked | {"also_erase": ["weapon"]})
        assert {name for each in wider.efface["rows"][0]["acted"] for name in each["concepts"]} == {"alcohol", "weapon"}

        # partial pictures, where the policy allows them
        streamed = teens.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=asked)
        kinds = [event.type.partition(".")[2] for event in streamed]
        assert kinds == ["partial_image", "partial_image", "completed"]
        with pytest.raises(openai.PermissionDeniedError):
            kids.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=asked)

        # cancelled while it is drawn
        head = {"authorization": f"Bearer {keys['kids']}"}
        with accepted(url, keys["kids"], 100) as (job, lines):
            assert httpx2.delete(f"{url}/v1/efface/jobs/{job}", headers=head).json()["deleted"]
            assert '"code": "cancelled"' in "\n".join(lines)

        # a revoked key
        (name,) = re.findall(r"key_[0-9a-f]+", told["teens"])
        command("key", "revoke", str(folder), name)
        with pytest.raises(openai.AuthenticationError):
            teens.images.generate(prompt=PROMPT)

        # killed with an accepted job
        with accepted(url, keys["kids"], 20, **{"idempotency-key": "order-1"}) as (lost, _):
            server.send_signal(signal.SIGKILL)
            server.wait()
    with running(folder) as (server, url), concurrent.futures.ThreadPoolExecutor(1) as pool:
        kids = openai.OpenAI(base_url=f"{url}/v1", api_key=keys["kids"], timeout=300)
        later: Any = kids.images.generate(
            prompt=PROMPT, stream=True, extra_body=asked | {"steps": 20}, extra_headers={"idempotency-key": "order-1"}
        )
        assert [event.efface["job"] for event in later] == [lost]

        # shut down while a job is drawn
        with accepted(url, keys["kids"], 20) as (_, lines):
            server.send_signal(signal.SIGTERM)
            _until(lambda: httpx2.get(f"{url}/readyz").status_code == 503)
            late = pool.submit(kids.with_options(max_retries=0).images.generate, prompt=PROMPT)
            assert isinstance(late.exception(), openai.InternalServerError)
            assert "image_generation.completed" in "\n".join(lines)
        assert server.wait(120) == 0
    assert "the chain holds" in command("audit", str(folder))
    service = opened(folder)
    ends = [entry["job"] for entry in service.audit.entries() if entry["kind"] == "job finished"]
    assert ends.count(lost) == 1 and service.jobs.count(["queued", "running"]) == 0
    service.database.close()
