"""The application: the same on uvicorn, in tests and under other hosts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from .. import __version__
from . import images, own
from .database import Unavailable
from .errors import Refused
from .http import Edge, broken, missing, refused
from .log import named, told
from .service import Service
from .studio import pages
from .watch import Watcher


def create_app(service: Service, *, studio: bool = False) -> FastAPI:
    """The application of a service. It draws nothing: a `Worker` on the same database does.

    Args:
        service: the service.
        studio: whether the page at /studio is served.
    """

    def over(task: asyncio.Task[None]) -> None:
        """Nobody would be told of an end any more, so the process has to end."""
        if not task.cancelled() and (error := task.exception()) is not None:
            told("watcher ended", error=named(error))
            service.stalled.set()

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.watcher = Watcher(service.jobs, service.ended)
        task = asyncio.create_task(app.state.watcher.run())
        task.add_done_callback(over)
        with service.arrived.ringing():
            yield
        task.cancel()

    app = FastAPI(
        title="Efface", version=__version__, lifespan=life, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service
    app.include_router(images.routes)
    app.include_router(own.routes)
    if studio:
        app.include_router(pages)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, missing)
    app.add_exception_handler(RequestValidationError, missing)
    app.add_exception_handler(Unavailable, broken)
    app.add_exception_handler(Exception, broken)
    inner, described = app.build_middleware_stack, app.openapi
    app.build_middleware_stack = lambda: Edge(inner(), service)  # type: ignore[method-assign]

    def openapi() -> dict[str, object]:
        found = described()
        found.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return found

    app.openapi = openapi  # type: ignore[method-assign]
    return app
