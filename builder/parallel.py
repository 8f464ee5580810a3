"""A parallel map over daemon threads, so that SIGTERM does not wait for work in progress."""

from __future__ import annotations

import queue
import threading
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


Item = TypeVar("Item")
Result = TypeVar("Result")
_LONG = 3600.0


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], *, threads: int, every: float
) -> Iterator[Result | None]:
    """Apply `work` to every item in several threads; yield results as they come, and None after a while without one.

    An error ends it: no further item is begun, those in progress are waited for, and it is raised. A request to end the
    process waits for none of them, since a large file would take minutes; `concurrent.futures` would wait.

    Args:
        work: what to do.
        items: what to do it to, in this order.
        threads: the most threads at a time.
        every: seconds after which None is yielded.
    """
    running = _Threads(work, items, threads)
    try:
        yield from running.results(every)
    except Exception:
        running.join()
        raise
    finally:
        running.stop.set()


@contextmanager
def in_background(
    tasks: Sequence[Callable[[], Result]], *, threads: int, stop: threading.Event
) -> Iterator[Callable[[], list[Result]]]:
    """Run tasks in several threads, beside what is done in the context; they have ended when that is left.

    Errors and what is no error are as in `side_by_side`, whether they come of a task or of the context.

    Args:
        tasks: what to run, in this order.
        threads: the most threads at a time.
        stop: is set when tasks that have begun should end early.

    Yields:
        What waits for all tasks, and returns their results in the order of the tasks.
    """
    running = _Threads(lambda task: (task[0], task[1]()), list(enumerate(tasks)), threads)

    def results() -> list[Result]:
        found = dict(each for each in running.results(_LONG) if each is not None)
        return [found[number] for number in range(len(tasks))]

    try:
        yield results
    except Exception:
        running.stop.set()
        stop.set()
        running.join()
        raise
    except BaseException:
        running.stop.set()
        stop.set()
        raise
    running.join()


class _Threads(Generic[Item, Result]):
    """Threads that have begun; the process may end while they run."""

    def __init__(self, work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> None:
        self.stop = threading.Event()
        self._work, self._count = work, len(items)
        self._todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
        for item in items:
            self._todo.put(item)
        self._done: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()
        # What they log names what the thread that began them works on; a context can be entered by one at a time.
        self._threads = [
            threading.Thread(target=copy_context().run, args=(self._run,), daemon=True)
            for _ in range(min(threads, len(items)))
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait for what has begun."""
        for thread in self._threads:
            thread.join()

    def results(self, every: float) -> Iterator[Result | None]:
        """Yield all results, and None whenever none came for `every` seconds; raise the first error."""
        left = self._count
        while left:
            try:
                result, error = self._done.get(timeout=every)
            except queue.Empty:
                yield None
                continue
            if error:
                raise error
            left -= 1
            yield result

    def _run(self) -> None:
        with suppress(queue.Empty):
            while not self.stop.is_set():
                item = self._todo.get_nowait()
                try:
                    self._done.put((self._work(item), None))
                except BaseException as error:  # noqa: BLE001, it is raised where it is waited for
                    self.stop.set()
                    self._done.put((None, error))
