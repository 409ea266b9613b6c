"""What a client did wrong, or what befell its request, as OpenAI's API says it.

Not a `W8A8Error`: nobody who calls this package made the mistake, and it ends as an answer, not as a message.
"""

from http import HTTPStatus

MISTAKE = "invalid_request_error"
OURS = "server_error"


class RefusedError(Exception):
    """A request that is answered with an error.

    Args:
        reason: What was asked, what was found, and the way out.
        param: The field of the body that it is about.
        status: 4xx for what the client can mend.
        code: A word for programs.
    """

    def __init__(
        self,
        reason: str,
        *,
        param: str | None = None,
        status: int = HTTPStatus.BAD_REQUEST,
        code: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.param, self.status, self.code = param, int(status), code

    @property
    def body(self) -> dict[str, object]:
        return error_body(str(self), self.status, param=self.param, code=self.code)


def error_body(reason: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """An error as OpenAI's API has it."""
    kind = MISTAKE if status < HTTPStatus.INTERNAL_SERVER_ERROR else OURS
    return {"error": {"message": reason, "type": kind, "param": param, "code": code}}
