"""A blob on its way from a registry: where the connection breaks, it is taken up again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus

from builder.errors import BuilderError, ServiceUnavailable
from builder.images.answers import Answer, unexpected
from builder.images.exchange import Body
from builder.images.retry import Again
from builder.images.transport import Transport
from builder.log import get_logger
from builder.reference import Digest

_log = get_logger("registry")


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """A `Blob` as a registry sends it, not checked yet.

    Attributes:
        what: what is done and on what, the beginning of a sentence.
        transport: leads to the registry.
        path: of the blob there.
        scopes: what a token has to be good for.
        refusal: gives the error that an answer stands for.
        digest: that the blob should have.
        size: that it should have, bytes.
    """

    what: str
    transport: Transport
    path: str
    scopes: frozenset[str]
    refusal: Callable[[Answer], BuilderError]
    digest: Digest
    size: int

    def stream(self) -> Iterator[bytes]:
        """Yield its bytes from the beginning.

        Raises:
            BuilderError: see `Registry`.
        """
        position, broken = 0, 0
        until: float | None = None
        while True:
            body, skipped, until = self._opened(position, until)
            try:
                with contextlib.closing(body):
                    for chunk in body:
                        rest = chunk[skipped:]
                        skipped -= len(chunk) - len(rest)
                        position += len(rest)
                        if rest:
                            yield rest
                if position >= self.size:
                    return
                # Without a length, an end too early looks like an end.
                message = f"{self.what} ended after {position} of {self.size} bytes."
                raise Again(ServiceUnavailable(message, remedy="Try again later."))  # noqa: TRY301 -- as if it broke
            except Again as again:
                broken += 1
                if broken >= self.transport.attempts:
                    raise again.error(self.what) from again.__cause__
                _log.warning("taking up again", what=self.what, at=position, attempt=broken)

    def _opened(self, position: int, until: float | None) -> tuple[Body, int, float]:
        """Return the content from `position` on, how much of it comes before that, and when all has to be over."""

        def begin(limit: float) -> tuple[Body, int, float]:
            over = limit if until is None else min(limit, until)
            headers = {"Range": f"bytes={position}-"} if position else {}
            answer, body = self.transport.open(self.path, until=over, scopes=self.scopes, headers=headers)
            if body is None:
                raise self.refusal(answer)
            try:
                return body, position - self._start(answer, position), over
            except BaseException:
                body.close()
                raise

        return self.transport.patiently(self.what, begin, size=self.size)

    def _start(self, answer: Answer, position: int) -> int:
        """Return where an answer's content begins: where it was asked to, or at the beginning."""
        if answer.is_page:
            raise self.refusal(answer)
        if answer.status == HTTPStatus.OK:
            return 0
        if not answer.headers.get("Content-Range", "").startswith(f"bytes {position}-"):
            raise unexpected(self.what, "with another part than was asked for")
        return position
