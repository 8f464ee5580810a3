from __future__ import annotations

import threading

import pytest

from builder.errors import Terminated
from builder.process import in_background, side_by_side
from tests.waiting import HANG, growing


def test_every_item_is_done_once():
    results = side_by_side(lambda number: number * 2, range(100), threads=7, every=60)
    assert sorted(result for result in results if result is not None) == [2 * number for number in range(100)]
    assert list(side_by_side(str, [], threads=7, every=60)) == []


def test_an_error_is_raised_when_what_was_begun_has_ended():
    for seconds in growing(0.2):
        begun, ended = threading.Barrier(2, timeout=HANG), []

        def work(number, begun=begun, ended=ended, seconds=seconds):
            if number > 1:
                ended.append("begun")
                return
            begun.wait()
            if number == 0:
                raise ValueError
            # Until the other's error is known.
            threading.Event().wait(seconds)
            ended.append(number)

        with pytest.raises(ValueError):
            list(side_by_side(work, range(50), threads=2, every=60))
        assert ended[0] == 1
        if ended == [1]:
            break


def test_a_request_to_end_waits_for_nobody():
    release = threading.Event()
    results = side_by_side(lambda _: release.wait(HANG), [1], threads=1, every=0.01)
    assert next(results) is None
    with pytest.raises(Terminated):
        results.throw(Terminated())
    assert not release.is_set()
    release.set()


def test_a_waiting_caller_is_woken_regularly():
    release = threading.Event()
    results = side_by_side(lambda _: release.wait(HANG), [1], threads=1, every=0.01)
    assert next(results) is None
    release.set()
    assert [result for result in results if result is not None] == [True]


def test_tasks_in_the_background_give_their_results_in_order():
    stop = threading.Event()
    first = threading.Event()

    def slow():
        assert first.wait(HANG)
        return "slow"

    def quick():
        first.set()
        return "quick"

    with in_background([slow, quick], threads=2, stop=stop) as results:
        assert results() == ["slow", "quick"]
    assert not stop.is_set()


def test_a_failure_beside_background_tasks_stops_and_joins_them():
    stop, ended = threading.Event(), []

    def task():
        stop.wait(HANG)
        ended.append(stop.is_set())

    with pytest.raises(ValueError), in_background([task, task], threads=1, stop=stop):
        raise ValueError
    assert ended in ([], [True])
    assert stop.is_set()


def test_the_error_of_a_task_is_raised_where_its_result_is_wanted():
    stop = threading.Event()
    with pytest.raises(ZeroDivisionError), in_background([lambda: 1 // 0], threads=1, stop=stop) as results:
        results()
    assert stop.is_set()


def test_a_request_to_end_does_not_wait_for_tasks():
    stop, release = threading.Event(), threading.Event()
    with pytest.raises(Terminated), in_background([lambda: release.wait(HANG)], threads=1, stop=stop):
        raise Terminated
    assert stop.is_set()
    assert not release.is_set()
    release.set()
