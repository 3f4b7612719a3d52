"""Two hosts: lab/hosts.py at its smallest, where the system lets us make them."""
import os
import signal
import socket
import time

import pytest

from conftest import ROOT
from lab import hosts
from support import ddp


@pytest.fixture
def can_make_hosts():
    try:
        with hosts.two_hosts():
            pass
    except ValueError as reason:
        pytest.skip(str(reason))


def code_of_main(*flags):
    """The exit code of lab.hosts in this process, whose own handlers of signals come back."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(BaseException) as stop:  # a KeyboardInterrupt would end all tests
            hosts.main(list(flags))
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert isinstance(stop.value, SystemExit)
    return stop.value.code


def test_two_hosts_train_as_one_process_and_survive_a_cut_cable(
        can_make_hosts, monkeypatch, capsys):
    """Both leave with a sentence; the run that goes on has the losses of one process, and the bits
    of two processes of one host, which nobody disturbed."""
    monkeypatch.chdir(ROOT)
    code = code_of_main("--steps", "24", "--timeout", "5")
    printed, errors = capsys.readouterr()
    assert code == 0, printed + errors
    assert printed.count("and leaves; the last checkpoint is whole, go on with --resume") == 2
    assert "values that differ from those of run 2: 0\n" in printed
    assert f"nanoproto-{os.getpid()}-" not in hosts.ip("netns", "list")


def test_the_hosts_are_removed_after_a_signal(can_make_hosts, monkeypatch):
    """With what runs on them."""
    started = []

    def sleeping_run(name, flags, out, base, processes=1):
        """In place of run 1: a process on a host, and the signal while it lives."""
        host = f"nanoproto-{os.getpid()}-0"
        assert host in hosts.ip("netns", "list")
        started.append(hosts.start(host, ["-c", "import time; time.sleep(60)"],
                                   hosts.output_of(base, 0)))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # Python calls the handler between two statements
    monkeypatch.setattr(hosts, "run_here", sleeping_run)
    assert code_of_main() == 128 + signal.SIGTERM
    assert started[0].wait(5) == -signal.SIGKILL
    assert f"nanoproto-{os.getpid()}-" not in hosts.ip("netns", "list")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_through_what_removes_the_hosts(monkeypatch, number):
    """An exception reaches the with statement of two_hosts, where a dead process would not."""
    left = []

    def experiment(args):
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)  # Python calls the handler between two statements
        finally:
            left.append(number)
    monkeypatch.setattr(hosts, "experiment", experiment)
    assert code_of_main() == 128 + number and left == [number]


def test_without_the_rights_there_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert code_of_main() == 2
    assert capsys.readouterr().err == ("lab.hosts: error: this needs Linux and its command ip, of "
                                       "the package iproute2\n")


def test_gloo_takes_the_interface_that_leads_to_the_first_host():
    assert ddp.interface_towards("127.0.0.1") is None  # the host itself: gloo may choose
    assert ddp.interface_towards("no.such.host.invalid") is None
    names = [name for _, name in socket.if_nameindex()]
    assert ddp.interface_towards("192.0.2.1") in [None, *names]  # None without a network
