"""lab/fuzz.py: a few cases pass, and what it takes for a failure is one."""
import faulthandler
import os
import sys

import pytest

import forked
from lab import fuzz

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CASE = fuzz.Case(0, "collapse.py", ["run"])


def test_a_few_cases_end_as_they_should():
    done = forked.run([sys.executable, "-m", "lab.fuzz", "--cases", "4"], cwd=ROOT,
                      capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("8 of 8 cases of seed 0 ended as they should (")


@pytest.mark.parametrize("code, output, wrong", [
    (0, "numbers\n", ""),
    (1, "below\n", ""),
    (2, "numbers\ncollapse.py: error: x.npy: no such file\n", ""),
    (2, "collapse.py: error (process 1): x\n", ""),
    (2, "numbers\n", "exit code 2 without a sentence"),
    (2, "collapse.py: error: \n", "exit code 2 without a sentence"),
    (2, "error: 'ascii' codec can't encode\n", "does not say which text cannot be encoded"),
    (0, "Traceback (most recent call last):\n", "traceback"),
    (3, "", "exit code 3"),
    (-11, "", "exit code -11"),
    (None, "", "did not end within 60 s"),
])
def test_what_a_failure_is(code, output, wrong):
    assert fuzz.what_is_wrong(CASE, code, output, {}, {}) == wrong


def test_a_failed_case_must_lose_no_file():
    before = {"a": b"1", "b": b"2", "log.csv": b"3\n"}
    assert fuzz.lost_files(before, before) == []
    assert fuzz.lost_files(before, before | {"c": b"new", "log.csv": b"3\n4\n"}) == []
    assert fuzz.lost_files(before, {"a": b"1", "moved": b"2", "log.csv": b"3\n"}) == []
    assert fuzz.lost_files(before, {"a": b"", "b": b"2"}) == ["a", "log.csv"]
    sentence = "collapse.py: error: x\n"
    lost = fuzz.what_is_wrong(CASE, 2, sentence, before, {"a": b"1"})
    assert lost == "b, log.csv lost or changed"
    assert fuzz.what_is_wrong(CASE, 0, "", before, {"a": b"1"}) == ""


def abort():
    faulthandler.disable()  # pytest's, which would print a hundred lines
    os.abort()


def print_without_end():
    while True:
        print("x" * 999)


def test_a_fork_says_how_it_ended(monkeypatch):
    assert fuzz.run_in_fork(lambda: print("x") or 1) == (1, "x\n")
    assert fuzz.run_in_fork(lambda: sys.exit(2)) == (2, "")
    code, output = fuzz.run_in_fork(lambda: 1 / 0)
    assert code == 99 and "ZeroDivisionError" in output
    assert fuzz.run_in_fork(abort)[0] == -6
    monkeypatch.setattr(fuzz, "LIMIT", 0.5)
    assert fuzz.run_in_fork(lambda: __import__("time").sleep(20))[0] is None
    assert fuzz.run_in_fork(print_without_end)[0] is None


def test_a_case_is_a_function_of_seed_and_number():
    assert fuzz.draw_case(1, 7) == fuzz.draw_case(1, 7) != fuzz.draw_case(2, 7)
    cases = [fuzz.draw_case(0, number) for number in range(200)]
    assert {case.tool for case in cases} == set(fuzz.TOOLS)
    assert [bool(case.damaged_file) for case in cases] == [False, True] * 100
