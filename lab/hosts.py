"""Train on two hosts, cut the cable between them in mid-run, and go on.

    python -m lab.hosts                 about a minute on 2 free cores; Linux, as root

Start it in the folder of train.py. The hosts are two network namespaces of this machine: each has
network interfaces of its own, and a virtual cable (veth) joins them. They share their files, as the
hosts of a cluster do with a network drive. Four runs are made, all on the CPU:

    1. one process
    2. two processes of one host
    3. torchrun --nnodes=2, and the cable is cut    both hosts leave, each with one sentence
    4. --resume with the cable mended               the losses of run 1, and the bits of run 2

The hosts are removed at the end, also after Ctrl-C.
"""
import argparse
import contextlib
import csv
import datetime
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import torch

import train
from lab.chaos import OFTEN, SMALL, differences, end_of, make_images, saved_step
from lab.chaos import start as start_fork
from lab.machine import cpu
from support import ddp
from support.errors import one_sentence
from support.flags import check_values

FIRST = "10.77.0.1"  # address of the first host, and of the second; nobody else sees them
SECOND = "10.77.0.2"
# so that the loss falls within some steps, and an error in a gradient would show in it
LEARNING = ["--lr", "0.1", "--logit-scale", "4"]
ONE_RUN = 300  # seconds that a run may take, the wait for --timeout aside
TO_LEAVE = 30  # seconds beyond --timeout in which a host must have left
# (what a value must be, test, flags)
RANGES = [("be at least 20", lambda v: v >= 20, ["steps"]),
          ("be at least 5", lambda v: v >= 5, ["timeout"])]


# ---- two hosts ---------------------------------------------------------------------------------
def ip(*words):
    """What `ip WORDS` prints. ValueError with its complaint if it refuses, or is not installed."""
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError("this needs Linux and its command ip, of the package iproute2") from None
    if done.returncode:
        raise ValueError(f"this needs root's right to make network namespaces and veth pairs: "
                         f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def two_hosts():
    """The names of two hosts with a cable between them, which last as long as this does.

    ValueError where the system does not allow it.
    """
    hosts = [f"nanoproto-{os.getpid()}-{i}" for i in range(2)]
    try:
        for host in hosts:
            ip("netns", "add", host)
        ip("link", "add", "cable", "netns", hosts[0], "type", "veth",
           "peer", "name", "cable", "netns", hosts[1])
        for host, address in zip(hosts, (FIRST, SECOND)):
            ip("-n", host, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", "cable", "up")
        yield hosts
    finally:
        for process in started:  # one that has just begun may not be on its host yet
            process.kill()
        for host in hosts:
            with contextlib.suppress(ValueError):  # it was never made
                for pid in ip("netns", "pids", host).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                ip("netns", "delete", host)


def cable(host, state):
    """Cut the cable at one host ("down"), or mend it ("up"). The other one is not told."""
    ip("-n", host, "link", "set", "cable", state)


# ---- runs on them ------------------------------------------------------------------------------
started = []  # processes of `start`


def start(host, words, output):
    """Start `python WORDS` on a host; what it prints goes to the file `output`."""
    with open(output, "w") as f:
        process = subprocess.Popen(["ip", "netns", "exec", host, sys.executable, *words],
                                   stdout=f, stderr=f, stdin=subprocess.DEVNULL,
                                   start_new_session=True,  # Ctrl-C is for us, and we end them
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    started.append(process)
    return process


def start_on_both(hosts, flags, base):
    """[process of the first host, of the second]: torchrun, as a user types it on each of them."""
    return [start(host, ["-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={i}",
                         f"--master_addr={FIRST}", "train.py", *flags], output_of(base, i))
            for i, host in enumerate(hosts)]


def train_as(rank, processes, port):
    """What chaos.start takes as a script: train.py as torchrun starts one of so many processes."""
    def main(flags):
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ddp.RANK, ddp.WORLD = rank, processes
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
        train.main(flags)
    return SimpleNamespace(main=main)


def run_here(name, flags, out, base, processes=1):
    """A whole run by forks of this process, on one host. ValueError with what it printed, if it
    fails."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    living = []
    try:
        for rank in range(processes):
            living.append(start_fork(train_as(rank, processes, port), flags, out,
                                     output_of(base, rank)))
        for rank in range(processes):
            code = os.waitstatus_to_exitcode(os.waitpid(living[0], 0)[1])
            del living[0]
            if code:
                raise ValueError(f"{name} failed with exit code {code}: "
                                 f"{end_of(output_of(base, rank))}")
    finally:
        for pid in living:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def output_of(base, i):
    return os.path.join(base, f"output{i}")


def codes(processes, seconds):
    """Their exit codes, None for those that have not ended after so many seconds together."""
    end = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0, end - time.monotonic()))
    return [process.poll() for process in processes]


def expect_success(name, processes, base):
    """Wait for a run. ValueError with what it printed, if it fails."""
    for i, code in enumerate(codes(processes, ONE_RUN)):
        if code != 0:
            how = (f"did not end within {ONE_RUN} s" if code is None
                   else f"failed with exit code {code}")
            raise ValueError(f"{name} {how} on host {i}: {end_of(output_of(base, i))}")


def loss_differences(a, b):
    """[difference of the losses in log.csv of two runs, as a share of the loss], row by row."""
    logs = []
    for out in (a, b):
        with open(os.path.join(out, "log.csv"), newline="") as f:
            logs.append({row["step"]: float(row["loss"]) for row in csv.DictReader(f)
                         if row["loss"]})
    if logs[0].keys() != logs[1].keys() or len(logs[0]) < 2:
        raise ValueError(f"the logs have rows of the steps {', '.join(logs[0])} and "
                         f"{', '.join(logs[1])}")
    return [abs(loss - logs[1][step]) / abs(loss) for step, loss in logs[0].items()]


# ---- the experiment ----------------------------------------------------------------------------
def cut(hosts, processes, out, base, args):
    """Cut the cable once a third of the steps is saved; sentences about what goes wrong then."""
    begin = time.monotonic()
    while saved_step(out) < args.steps // 3:
        if time.monotonic() - begin > ONE_RUN or any(p.poll() is not None for p in processes):
            raise ValueError("the run that was to be disturbed did not get to a third of its "
                             f"steps: {end_of(output_of(base, 0))}")
        time.sleep(0.05)
    cable(hosts[0], "down")
    begin = time.monotonic()
    ended = codes(processes, args.timeout + TO_LEAVE)
    left = "not both hosts have left" if None in ended else "both hosts have left"
    print(f"   cut after step {saved_step(out)} of {args.steps}; {left} "
          f"{time.monotonic() - begin:.0f} s later, with --timeout {args.timeout:g}", flush=True)
    failures = []
    for i, code in enumerate(ended):
        with open(output_of(base, i)) as f:
            sentences = [line.strip() for line in f if line.startswith("train.py: error")]
        print(f"   host {i}, exit code {code}: {' / '.join(sentences)}", flush=True)
        if code is None:
            failures.append(f"host {i} still waits {args.timeout + TO_LEAVE:g} s after the cut")
        elif code == 0:
            failures.append(f"host {i} ended as if nothing had happened: raise --steps, if the "
                            "run was over before the cable was cut")
        elif len(sentences) != 1 or "go on with --resume" not in sentences[0]:
            failures.append(f"host {i} did not say what to do: {end_of(output_of(base, i))}")
    if os.path.exists(os.path.join(out, "lock")):
        failures.append("the folder of the run is still locked")
    return failures


def experiment(args):
    """Sentences about what went wrong."""
    failures = []
    with tempfile.TemporaryDirectory() as base, two_hosts() as hosts:
        images, one, two, disturbed = (os.path.join(base, name) for name in
                                       ("images", "one", "two", "disturbed"))
        make_images(images)
        flags = ["--data", images, "--steps", str(args.steps), *SMALL, *OFTEN, *LEARNING]

        print("1. one process", flush=True)
        run_here("run 1", flags, one, base)

        print("2. two processes of one host", flush=True)
        run_here("run 2", flags, two, base, processes=2)

        print("3. two hosts, and the cable is cut", flush=True)
        flags += ["--out", disturbed, "--timeout", f"{args.timeout:g}"]
        processes = start_on_both(hosts, flags, base)
        failures += cut(hosts, processes, disturbed, base, args)
        if None in codes(processes, 0):
            return failures

        print("4. two hosts, the cable is mended, and the run goes on", flush=True)
        cable(hosts[0], "up")
        processes = start_on_both(hosts, [*flags, "--resume"], base)
        expect_success("run 4", processes, base)
        apart = loss_differences(one, disturbed)
        first = max(apart[:2])  # two rows of the log
        print(f"   the losses of one process to {first:.1e} of them in the first 14 steps, and to "
              f"{max(apart):.1e} in all, as the rounding of each step grows in the next",
              flush=True)
        if first > 1e-4 or max(apart) > 1e-2:
            failures.append("the losses on two hosts are not those of one process")
        different = differences(two, disturbed)
        failures += [f"the run that went on differs from run 2 in {name}" for name in different]
        print(f"   values that differ from those of run 2: {len(different)}", flush=True)
    return failures


def parser():
    p = argparse.ArgumentParser("python -m lab.hosts", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=40, help="length of the runs; 40 by default")
    p.add_argument("--timeout", type=float, default=10,
                   help="--timeout of the run whose cable is cut, in seconds; 10 by default")
    return p


def leave(number, frame):
    raise SystemExit(128 + number)  # through two_hosts, which removes the hosts


def main(argv=None):
    """Exit code 0 if all went as it should, 1 if not. Bad input, and a system that does not allow
    it: one sentence on stderr and exit code 2."""
    args = parser().parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    begin = time.perf_counter()
    with one_sentence("lab.hosts"):
        check_values(args, RANGES)
        failures = experiment(args)
    print(f"{len(failures)} failures. {datetime.date.today()}, {cpu()}, "
          f"torch {torch.__version__}, {time.perf_counter() - begin:.0f} s")
    for text in failures:
        print(text, file=sys.stderr)
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
