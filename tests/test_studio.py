"""The studio: a page that holds no key, draws what the API draws, and compares two keys on the same seeds."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import tiny
import uvicorn
from browser import CHROMIUM, Browser
from starlette.testclient import TestClient
from test_serve import LIMITS, Desk, error, idle, quiet
from typer.testing import CliRunner

from efface import core
from efface.cli import app
from efface.guard import DELIVERED
from efface.serve.app import create_app

__all__ = ["idle", "quiet"]
PAGES = ("/studio", "/studio/studio.js", "/studio/studio.css")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    made = Desk(tmp_path_factory.mktemp("studio"), LIMITS)
    with TestClient(create_app(made.service, studio=True), raise_server_exceptions=False) as client:
        yield client
    made.service.database.close()


def test_the_page_loads_only_its_own_files_and_runs_nothing_else(client: TestClient) -> None:
    for path in PAGES:
        found = client.get(path)
        assert found.status_code == 200 and found.headers["x-content-type-options"] == "nosniff"
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "set-cookie" not in found.headers
    page = client.get("/studio").text
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert set(named) == {"data:,", "/studio/studio.css", "/studio/studio.js", "#made"}
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", page)
    script = client.get("/studio/studio.js").text
    assert not re.search(
        r"innerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|sessionStorage|cookie", script
    )
    for path in ("/studio/studio.html", "/studio/..%2Fown.py", "/studio/..%2Fstudio.py", "/studio/x/y"):
        error(client.get(path), 404, "not_found")


def test_every_control_of_the_page_has_a_label(client: TestClient) -> None:
    page = client.get("/studio").text
    for name in re.findall(r'<(?:input|textarea|select)[^>]*\bid="([^"]+)"', page):
        assert f'for="{name}"' in page or re.search(rf'<label[^>]*><input id="{name}"', page), name
    used = set(re.findall(r'\$\("([\w-]+)"\)', client.get("/studio/studio.js").text))
    assert used <= set(re.findall(r'\bid="([^"]+)"', page))


def test_the_page_knows_which_outcomes_have_a_picture(client: TestClient) -> None:
    found = re.search(r"DELIVERED = new Set\((\[.*?\])\)", client.get("/studio/studio.js").text)
    assert found and set(json.loads(found[1])) == set(DELIVERED)


def test_there_is_no_page_unless_it_was_asked_for(idle: Desk) -> None:
    for path in PAGES:
        error(idle.client.get(path), 404, "not_found")


def test_a_key_says_what_it_may_do_and_not_how(idle: Desk) -> None:
    found = idle.client.get("/v1/efface/me", headers=idle.head()).json()
    policy = idle.service.policies.latest("kids")
    assert policy is not None
    assert found["policy"] == {
        **{"name": "kids", "version": 1, "hash": policy.policy.hash},
        **{"unguarded": False, "erase": ["alcohol"], "gate": False, "partial_pictures": False},
    }
    assert (found["tenant"], found["model"], found["sizes"]) == ("kids", "stub", ["64x64", "32x64"])
    assert set(found["concepts"]) == set(core.shipped_concepts()) - {"alcohol"}
    assert idle.client.get("/v1/efface/me", headers=idle.head("press")).json()["policy"]["unguarded"]
    error(idle.client.get("/v1/efface/me"), 401, "invalid_api_key")
    error(idle.client.get("/v1/efface/me", headers=idle.head(idle.admin)), 403, "no_policy")


def test_the_command_serves_one_guarded_key_and_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(service: Any, backend: Any, host: str, port: int, metrics: Any, *, studio: bool, ready: Any) -> int:
        seen.update(host=host, metrics=metrics, studio=studio, policies=service.policies.list())
        seen["keys"] = [(each["tenant"], each["policy"]) for each in service.keys.list() if each["policy"]]
        ready(1234)
        service.database.close()
        return 0

    monkeypatch.setattr("efface.serve.run.run", run)
    monkeypatch.setattr("efface.api.load", lambda *_, **__: tiny.pipeline("bert"))
    said = CliRunner().invoke(app, ["studio", "--concept", "alcohol", "--set", "strength=1.5"])
    assert said.exit_code == 0, said.output
    assert re.search(r"http://127\.0\.0\.1:1234/studio#key=ef_[\w-]+&other=ef_[\w-]+", said.output)
    assert (seen["host"], seen["metrics"], seen["studio"]) == ("127.0.0.1", None, True)
    assert seen["keys"] == [("studio", "guarded"), ("studio", "base")]
    base, guarded = (each.policy for each in seen["policies"])
    assert base.unguarded and [each.name for each in guarded.concepts] == ["alcohol"]
    assert guarded.erase[0].strength == 1.5
    nothing = CliRunner().invoke(app, ["studio"])
    assert nothing.exit_code == 2 and "nothing to erase" in nothing.output
    wrong = CliRunner().invoke(app, ["studio", "--concept", "alcohol", "--method", "uce"])
    assert wrong.exit_code == 2 and "Traceback" not in wrong.output


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def address(quiet: Desk) -> Iterator[str]:
    """The studio of a service whose worker is a stub."""
    quiet.start()
    config = uvicorn.Config(create_app(quiet.service, studio=True), port=0, log_config=None, loop="asyncio", http="h11")
    server, sockets = uvicorn.Server(config), [config.bind_socket()]
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}/studio"
    server.should_exit = True
    thread.join(10)


DRAWN = "document.getElementById('status').textContent.includes('from seed')"


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser_two_keys_draw_the_same_seeds_side_by_side(quiet: Desk, address: str, tmp_path: Path) -> None:
    keys = quiet.keys
    with Browser(tmp_path / "profile", 320, dark=True) as page:
        page.open(f"{address}#key={keys['kids']}&other={keys['press']}")
        page.until("!document.getElementById('ask').hidden")
        assert page.run("location.href") == address, "the keys stay in the address"
        assert "erases alcohol" in page.run("document.getElementById('policies').innerText")
        page.run("document.getElementById('prompt').value = '<b>a cat</b>'")
        for field, value in {"seed": 7, "n": 2, "steps": 3}.items():
            page.run(f"document.getElementById('{field}').value = {value}")
        page.run("document.getElementById('go').click()")
        page.until(DRAWN)
        rows = sorted((row.seed, row.policy.unguarded, row.prompt) for rows, _ in quiet.stub.batches for row in rows)
        assert rows == [(seed, free, "<b>a cat</b>") for seed in (7, 8) for free in (False, True)]
        assert page.run("document.querySelectorAll('#made li').length") == 2
        assert page.run("document.querySelectorAll('#made img').length") == 4
        assert "Picture 1 for “<b>a cat</b>”" in page.run("document.images[0].alt")
        words = page.run("document.querySelector('figcaption').innerText")
        assert "Left, policy press: nothing erased" in words and "Right, policy kids: erased alcohol" in words
        page.run("{const s = document.querySelector('#made input'); s.value = 20; s.dispatchEvent(new Event('input'))}")
        assert page.run("getComputedStyle(document.images[1]).clipPath") == "inset(0px 0px 0px 20%)"
        page.run("document.getElementById('blur').click()")
        page.until("getComputedStyle(document.images[0]).filter.startsWith('blur')")
        assert page.run("document.getElementById('blur').getAttribute('aria-pressed')") == "true"
        text = unquote(page.run("document.getElementById('record').href")).partition(",")[2]
        assert [arm["request"]["seed"] for arm in json.loads(text)] == [7, 7]
        assert not any(key in text for key in keys.values())
        assert page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert page.said == []


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser_blocked_pictures_wrong_keys_and_stopping_are_told(
    quiet: Desk, address: str, tmp_path: Path
) -> None:
    quiet.stub.outcomes["beer"] = "blocked"
    with Browser(tmp_path / "profile") as page:
        page.open(f"{address}#key=ef_wrong")
        page.until("document.getElementById('error').innerText.includes('The API key is not valid')")
        assert page.run("document.getElementById('ask').hidden")
        page.run(f"document.getElementById('key').value = {json.dumps(quiet.keys['kids'])}")
        page.run("document.querySelector('#keys button').click()")
        page.until("!document.getElementById('ask').hidden")
        assert page.run("document.getElementById('error').hidden && document.getElementById('compare').disabled")
        page.run("document.getElementById('prompt').value = 'beer'; document.getElementById('go').click()")
        page.until("!document.getElementById('go').disabled")
        said = page.run("document.getElementById('error').innerText + document.getElementById('made').innerText")
        assert "detector" in said.lower(), said
        quiet.stub.gate.clear()
        page.run("document.getElementById('prompt').value = 'a cat'; document.getElementById('go').click()")
        page.until("!document.getElementById('stop').hidden && document.getElementById('progress').value > 0")
        page.run("document.getElementById('stop').click()")
        page.until("document.getElementById('status').textContent === 'Stopped.'")
        quiet.stub.gate.set()
        page.run("document.querySelector('#concepts input[value=cat]').click()")
        assert not page.run("document.getElementById('compare').disabled")
        page.run("document.getElementById('compare').click(); document.getElementById('go').click()")
        page.until(DRAWN)
        last = [sorted(c.name for c in row.policy.concepts) for rows, _ in quiet.stub.batches for row in rows][-8:]
        assert sorted(map(tuple, last)) == [("alcohol",)] * 4 + [("alcohol", "cat")] * 4
