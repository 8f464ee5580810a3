"""Checks that run side by side: none stops another, none is waited for too long."""

import threading

import pytest

from builder.doctor import Check, Once, diagnose, exit_code, ok, skipped, warn
from builder.errors import InvalidSettings, PermissionRefused, ServiceUnavailable
from tests.waiting import HANG, growing


def raising(error):
    def look():
        raise error

    return look


def test_a_failure_and_a_defect_stop_nothing_and_the_order_is_kept():
    checks = [
        Check(name="refused", look=raising(PermissionRefused("No.", remedy="Ask."))),
        Check(name="defect", look=raising(RuntimeError("oops"))),
        Check(name="well", look=lambda: ok("Fine.")),
    ]
    found = diagnose(checks, seconds=HANG)
    assert [(each.check, each.state, each.exit_code) for each in found] == [
        ("refused", "fail", 77),
        ("defect", "fail", 70),
        ("well", "ok", 0),
    ]
    assert (found[0].found, found[0].remedy) == ("No.", "Ask.")
    assert "oops" not in found[1].found


def test_a_check_that_hangs_is_given_up_and_the_others_are_told():
    for seconds in growing(0.5):
        release = threading.Event()
        checks = [
            Check(name="hangs", look=lambda release=release: ok(str(release.wait(HANG)))),
            Check(name="well", look=lambda: ok("Fine.")),
        ]
        try:
            hangs, well = diagnose(checks, seconds=seconds)
        finally:
            release.set()
        assert (hangs.state, hangs.exit_code) == ("fail", 69)
        assert f"{seconds:g} seconds" in hangs.found
        if well.state == "ok":
            break


def test_checks_run_side_by_side():
    meet = threading.Barrier(3)
    checks = [Check(name=name, look=lambda: ok(str(meet.wait(HANG)))) for name in "abc"]
    assert {each.state for each in diagnose(checks, seconds=HANG)} == {"ok"}


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([ok(""), warn("", ""), skipped("")], 0),
        ([Check(name="", look=raising(ServiceUnavailable(""))).run(), ok("")], 69),
        ([Check(name="", look=raising(kind(""))).run() for kind in (InvalidSettings, ServiceUnavailable)], 78),
        ([], 0),
    ],
)
def test_the_exit_code_is_the_highest_of_what_failed(findings, code):
    assert exit_code(findings) == code


def test_what_several_checks_need_is_made_once_and_its_error_is_theirs():
    made = []
    once = Once(lambda: made.append(1) or "it")
    results = diagnose([Check(name=name, look=lambda: ok(once())) for name in "abcd"], seconds=HANG)
    assert {each.found for each in results} == {"it"}
    assert made == [1]
    broken = Once(raising(ServiceUnavailable("Away.")))
    results = diagnose([Check(name=name, look=lambda: ok(broken())) for name in "ab"], seconds=HANG)
    assert [each.found for each in results] == ["Away.", "Away."]
