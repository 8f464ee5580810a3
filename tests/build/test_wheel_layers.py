"""How much stands on disk while layers are made."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from builder.build.wheel_layers import Room


def test_what_is_in_the_works_is_bounded_and_what_is_larger_is_alone():
    room, lock, used, most, alone = Room(10), threading.Lock(), [], [], []

    def work(size):
        with room.taken(size):
            with lock:
                used.append(size)
                most.append(sum(used))
            threading.Event().wait(0.01)
            with lock:
                if size > 10:
                    alone.append(list(used))
                used.remove(size)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, [25, 9, 8, 1, 1, 1, 5, 5, 0, 0, 25, 3, 3, 3, 3]))
    assert alone == [[25], [25]]
    assert max(total for total in most if total != 25) <= 10
    assert max(most) == 25
