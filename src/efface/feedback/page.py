"""A local page with keys. Only this machine reaches it, and only with the token in its address."""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .. import files
from ..pictures import png
from .session import Session

BODY = 10_000  # bytes of a request


class Page(ThreadingHTTPServer):
    """Serves one session on 127.0.0.1, until all pictures are judged or the process ends.

    Each answer is stored before the next picture is shown. A request needs the token in its path and this host in its
    `Host`; an answer also needs this page as its `Origin`.

    Args:
        session: the annotator's pass.
        port: the port. 0: any free one.

    Raises:
        OSError: the port is taken.

    Example:
        >>> import tempfile
        >>> from efface.feedback import Session, Store
        >>> from efface.feedback.page import Page
        >>> with Page(Session(Store(tempfile.mkdtemp() + "/labels.db"), [], "cat", "ana", 1)) as page:
        ...     page.url
        'http://127.0.0.1:.../.../'
    """

    daemon_threads = True

    def __init__(self, session: Session, port: int = 0) -> None:
        self.session, self.token, self.lock = session, secrets.token_urlsafe(24), threading.Lock()
        self.again: int | None = None
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser may end a connection early; other errors are shown."""
        import sys

        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return f"{self.origin}/{self.token}/"

    def state(self) -> dict[str, Any]:
        """What the page shows now."""
        left, session = self.session.left, self.session
        asked = self.again if self.again is not None else left[0] if left else None
        shown = [] if asked is None else session.shown(asked)
        veiled = any(session.items[place].details.get("explicit") for place in shown)
        facts = {"kind": session.kind, "concept": session.concept, "pass": session.number, "total": session.total}
        return facts | {"done": len(session.answered), "picture": asked, "shown": shown, "veiled": veiled}

    def answer(self, body: Any) -> None:
        asked: Any
        asked, answer = (body.get(name) if isinstance(body, dict) else None for name in ("picture", "answer"))
        state = self.state()
        shown = type(asked) is int and asked == state["picture"]
        outcome = _outcome(answer, self.session.outcomes(asked), state["kind"]) if shown else None
        if outcome is None:
            raise ValueError(
                f"Expected {_wanted(state)} that is shown, got another answer or picture. Load the page again."
            )
        self.session.answer(asked, outcome, replace=self.again is not None)
        self.again = None

    def back(self) -> None:
        place = self.session.back()
        self.again = self.again if place is None else place


def _outcome(answer: Any, known: Sequence[str], kind: str) -> str | list[str] | None:
    """The outcome of a key, or the ranks of a set; None if there is no such answer."""
    if kind == "ranking":
        return answer if isinstance(answer, list) and all(each in known for each in answer) else None
    return known[answer - 1] if type(answer) is int and 1 <= answer <= len(known) else None


def _wanted(state: Mapping[str, Any]) -> str:
    return {"label": "an answer 1, 2 or 3 for the picture", "binary": "an answer 1 or 2 for the picture"}.get(
        state["kind"], "a rank or x for each picture of the set"
    )


class _Handler(BaseHTTPRequestHandler):
    server: Page  # pyright: ignore[reportIncompatibleVariableOverride] # typeshed knows no handler of one server
    server_version, sys_version, timeout = "efface", "", 30

    def do_GET(self) -> None:
        what = self._allowed()
        if what == "":
            nonce = secrets.token_urlsafe(16)
            text = (Path(__file__).parent / "page.html").read_text("utf-8").replace("%NONCE%", nonce)
            self._send(200, text.encode(), "text/html; charset=utf-8", nonce)
        elif what == "next":
            self._do(lambda: None)
        elif what is not None and what.startswith("picture/"):
            self._picture(what.removeprefix("picture/"))
        elif what is not None:
            self._refuse(404, "There is no such page. Use the address that the command printed.")

    def do_POST(self) -> None:
        what = self._allowed()
        if what is None:
            return
        if self.headers.get("Origin") != self.server.origin:
            self._refuse(403, "Answers are taken from this page only. Use the address that the command printed.")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > BODY or "json" not in self.headers.get("Content-Type", ""):
            self._refuse(400, "Expected an answer as JSON, got something else. Load the page again.")
            return
        content = self.rfile.read(int(length))
        if what == "answer":
            self._do(lambda: self.server.answer(files.parse(content)))
        elif what == "back":
            self._do(self.server.back)
        else:
            self._refuse(404, "There is no such page. Use the address that the command printed.")

    def _allowed(self) -> str | None:
        """The path behind the token; None after a refusal."""
        token, _, what = self.path.partition("?")[0].removeprefix("/").partition("/")
        if self.headers.get("Host") != self.server.origin.removeprefix("http://"):
            self._refuse(403, "This page has another address. Use the one that the command printed.")
        elif not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(403, "The token in the address is wrong. Use the address that the command printed.")
        else:
            return what
        return None

    def _do(self, act: Any) -> None:
        """Does something and sends the new state. A refused answer and a held store are messages on the page."""
        try:
            with self.server.lock:
                act()
                state = self.server.state()
        except (ValueError, TypeError, OSError) as error:
            self._refuse(409, str(error))
            return
        self._send(200, json.dumps(state).encode(), "application/json")
        if state["picture"] is None:
            threading.Thread(target=self.server.shutdown, daemon=True).start()

    def _picture(self, place: str) -> None:
        items = self.server.session.items
        if not place.isdecimal() or len(place) > 9 or int(place) >= len(items):
            self._refuse(404, "There is no such picture. Load the page again.")
            return
        try:
            item = items[int(place)]
            content = png(item.read())  # without the file's name and other data
        except (ValueError, OSError) as error:
            self.log_error("%s", error)
            self._refuse(409, "The picture is missing or was changed. Restore it, and load the page again.")
            return
        self._send(200, content, "image/png")

    def _refuse(self, code: int, message: str) -> None:
        self._send(code, json.dumps({"error": message}).encode(), "application/json")

    def _send(self, code: int, content: bytes, kind: str, nonce: str = "") -> None:
        self.send_response(code)
        own = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; connect-src 'self'; "
        policy = f"default-src 'none'; {own if nonce else ''}frame-ancestors 'none'; base-uri 'none'"
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """No line per request: the address holds the token."""

    def log_error(self, format: str, *args: Any) -> None:
        import sys

        print(format % args, file=sys.stderr)
