"""Hands TCP connections on from one network namespace to another, by way of a socket in the file system.

`python -m tests.servers.relay FROM TO`, each a port of 127.0.0.1 or a path; it prints a line once it listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(1 << 16):
            writer.write(chunk)
            await writer.drain()
    with contextlib.suppress(OSError, RuntimeError):
        writer.write_eof()


async def _serve(begin: str, end: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other = asyncio.open_connection("127.0.0.1", end) if end.isdigit() else asyncio.open_unix_connection(end)
        there, back = await other
        await asyncio.gather(_pipe(reader, back), _pipe(there, writer))
        writer.close()
        back.close()

    if begin.isdigit():
        server = await asyncio.start_server(handle, "127.0.0.1", int(begin))
    else:
        server = await asyncio.start_unix_server(handle, begin)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await server.serve_forever()


@contextlib.contextmanager
def relayed(ports: Sequence[str], within: Sequence[str], folder: Path) -> Iterator[None]:
    """Make ports of this namespace's 127.0.0.1 reachable in another one.

    Args:
        ports: which.
        within: the beginning of a command line that enters the other one.
        folder: for the sockets.
    """
    with contextlib.ExitStack() as stack:
        for port in ports:
            socket = str(folder / port)
            for prefix, begin, end in ((), socket, port), (within, port, socket):
                argv = [*prefix, sys.executable, "-m", "tests.servers.relay", begin, end]
                process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
                stack.callback(process.stdout.close)
                stack.callback(process.wait)
                stack.callback(process.kill)
                assert process.stdout.readline() == "ready\n"
        yield


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], sys.argv[2]))
