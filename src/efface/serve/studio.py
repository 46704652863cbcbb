"""The studio: one page that draws through the images API with a key, and compares two keys on the same seeds.

The page holds no key. Whoever opens it enters one, or has it behind the `#` of the address, which browsers do not send.
It stays in the page's memory and goes out only as the API's own Bearer header, so there is no session and no cookie.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from .errors import Refused

pages = APIRouter()
FILES = {
    "": ("studio.html", "text/html"),
    "studio.js": ("studio.js", "text/javascript"),
    "studio.css": ("studio.css", "text/css"),
}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


@pages.get("/studio/{name}", include_in_schema=False)
@pages.get("/studio", include_in_schema=False)
async def page(name: str = "") -> Response:
    """The page, and what belongs to it."""
    if name not in FILES:
        raise Refused(404, "There is no such page. The studio is at /studio.", "not_found")
    file, kind = FILES[name]
    content = (Path(__file__).parent / "static" / file).read_bytes()
    return Response(content, headers=HEADERS, media_type=f"{kind}; charset=utf-8")
