"""Threads that do one thing to many items, and that nobody has to wait for when the process is asked to end."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], *, threads: int, every: float
) -> Iterator[Result | None]:
    """Do `work` to every item in several threads; yield results as they come, and None when none came for a while.

    An error ends it: no further item is begun, those that were are waited for, and it is raised. What is no error, such
    as a request to end the process, waits for nobody: a large file would hold the process up for minutes, which is
    what `concurrent.futures` does.

    Args:
        work: what to do.
        items: what to do it to, in this order.
        threads: the most threads at a time.
        every: seconds after which None is yielded.
    """
    todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    done: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        with suppress(queue.Empty):
            while not stop.is_set():
                item = todo.get_nowait()
                try:
                    done.put((work(item), None))
                except BaseException as error:  # noqa: BLE001, it is raised where it is waited for
                    stop.set()
                    done.put((None, error))

    crew = [threading.Thread(target=run, daemon=True) for _ in range(min(threads, len(items)))]
    for thread in crew:
        thread.start()
    try:
        yield from _results(done, len(items), every)
    except Exception:
        for thread in crew:
            thread.join()
        raise
    finally:
        stop.set()


def _results(
    done: queue.SimpleQueue[tuple[Result | None, BaseException | None]], count: int, every: float
) -> Iterator[Result | None]:
    """Yield `count` results, and None whenever none came for `every` seconds; raise the first error."""
    while count:
        try:
            result, error = done.get(timeout=every)
        except queue.Empty:
            yield None
            continue
        if error:
            raise error
        count -= 1
        yield result
