"""Count the bytes between a job and a server of this machine, and what comes from outside it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

_CHUNK = 1 << 20
_DEVICES = Path("/proc/net/dev")
_ROUTES = Path("/proc/net/route")


class Meter:
    """Hands on connections to a port of this machine, and counts their bytes.

    The bytes move inside the kernel (splice), so that a job beside it is hardly slower.

    Args:
        target: port of the server, on the loopback interface.

    Attributes:
        port: port that this listens on.
        sent: bytes from clients to the server so far.
        received: bytes from the server to its clients so far.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.sent = self.received = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no further connection; those that are open end with their clients."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server:
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = threading.Thread(target=self._copy, args=(server, client, "received"), daemon=True)
            answers.start()
            self._copy(client, server, "sent")
            answers.join()

    def _copy(self, source: socket.socket, target: socket.socket, counter: str) -> None:
        """Move bytes until the source ends, then end the target."""
        into, out = os.pipe()
        try:
            with contextlib.suppress(OSError):
                while count := os.splice(source.fileno(), out, _CHUNK):
                    left = count
                    while left:
                        left -= os.splice(into, target.fileno(), left)
                    with self._lock:
                        setattr(self, counter, getattr(self, counter) + count)
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)
        finally:
            os.close(into)
            os.close(out)


@contextlib.contextmanager
def metered(port: int) -> Iterator[Meter]:
    """Give a meter before a port of this machine."""
    meter = Meter(port)
    try:
        yield meter
    finally:
        meter.close()


def bytes_from_outside() -> int:
    """Return how many bytes this machine has received on the interfaces of its default routes, since it started.

    A package index speaks TLS, so a proxy could not count what it sends without breaking that; this can.
    """
    outside = {line.split()[0] for line in _ROUTES.read_text().splitlines()[1:] if line.split()[1] == "00000000"}
    lines = (line.partition(":") for line in _DEVICES.read_text().splitlines()[2:])
    return sum(int(figures.split()[0]) for name, _, figures in lines if name.strip() in outside)
