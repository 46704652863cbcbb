"""Errors in the shape that clients of the images API expect."""

from __future__ import annotations

from typing import Any

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request ends with an error.

    Args:
        status: the HTTP status.
        message: two sentences: cause and cure.
        code: a word for programs.
        param: the field at fault.
        retry: seconds after which to try again; None if trying again does not help.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        if self.retry is not None:
            return {"retry-after": str(self.retry), "x-should-retry": "true"}
        return {"x-should-retry": "false"}

    def stored(self) -> dict[str, Any]:
        """As a job keeps it."""
        return {"status": self.status, "message": self.message, "code": self.code, "param": self.param}


def restored(facts: dict[str, Any]) -> Refused:
    return Refused(facts["status"], facts["message"], facts["code"], facts["param"])


def unavailable(message: str, code: str = "unavailable", retry: int = 5) -> Refused:
    return Refused(503, message, code, retry=retry)
