"""Kill a run with SIGKILL at random moments, resume it each time, and compare it with a run that nothing disturbed.

    python chaos.py                 50 kills, about 3 minutes on one core
    python chaos.py --kills 500

The run saves after every step, so that many kills fall into the writing of a checkpoint. Each attempt is a fork of this
process, which has imported torch already: it lives from a few hundredths of a second to --longest seconds. A run that
reaches its end before all kills are done is compared too, and the next begins in a new folder.
"""
import argparse
import contextlib
import csv
import datetime
import os
import platform
import random
import signal
import sys
import tempfile
import time

import torch
from torchvision.utils import save_image

import train

TIMES = ("images_per_s", "data_share", "memory_mb")  # columns of log.csv that are not a function of the flags


def images(path, n=60):
    """A folder of random images of two classes."""
    for c in "ab":
        os.makedirs(os.path.join(path, c))
        for i in range(n // 2):
            x = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1000 * ord(c) + i))
            save_image(x, os.path.join(path, c, f"{i}.png"))
    return path


def attempt(flags, out, log):
    """Start a process that goes on with the run in folder `out`; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with open(log, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
        try:
            train.main([*flags, "--out", out, "--resume"])
            code = 0
        except SystemExit as e:
            code = e.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def step_of(out):
    """Step of the newest checkpoint, 0 without one."""
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        with contextlib.suppress(Exception):
            return torch.load(os.path.join(out, name), weights_only=True)["step"]
    return 0


def flat(x, name=""):
    """{path: tensor or value} of a nested checkpoint."""
    if isinstance(x, (dict, list, tuple)):
        pairs = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: v for key, part in pairs for k, v in flat(part, f"{name}/{key}").items()}
    return {name: x}


def differences(a, b):
    """What is not the same to the bit in the runs in two folders: paths in the checkpoint, rows of the log."""
    one, two = (flat({k: v for k, v in torch.load(os.path.join(out, "ckpt.pt"), weights_only=True).items()
                      if k != "args"}) for out in (a, b))
    found = [k for k in one.keys() | two.keys() if k not in one or k not in two or not (
        torch.equal(one[k], two[k]) if torch.is_tensor(one[k]) else one[k] == two[k])]
    logs = []
    for out in (a, b):
        with open(os.path.join(out, "log.csv"), newline="") as f:
            logs.append([{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(f)])
    return found + ["log.csv"] * (logs[0] != logs[1])


def main(argv=None):
    p = argparse.ArgumentParser("chaos.py", description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--kills", type=int, default=50, help="how often")
    p.add_argument("--steps", type=int, default=300, help="length of the run")
    p.add_argument("--longest", type=float, default=2.0, help="seconds that an attempt lives at most")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    args = p.parse_args(argv)
    torch.set_num_threads(1)  # before the forks: a fork has none of its parent's threads
    rng, begun = random.Random(args.seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as base:
        flags = ["--data", images(os.path.join(base, "images")), "--steps", str(args.steps), "--device", "cpu",
                 "--batch-size", "8", "--num-prototypes", "32", "--partition-size", "8", "--bottleneck-dim", "16",
                 "--head-hidden", "32", "--local-crops", "1", "--eval-bank", "40", "--eval-queries", "6",
                 "--gmm-start", "5", "--log-every", "7", "--eval-every", "25", "--save-every", "1"]
        log, whole = os.path.join(base, "output"), os.path.join(base, "whole")
        if os.waitpid(attempt(flags, whole, log), 0)[1]:
            raise SystemExit(f"chaos.py: the undisturbed run failed:\n{open(log).read()[-2000:]}")
        kills = early = writing = runs = 0
        wrong, out, ended = [], os.path.join(base, "run0"), False
        while not (ended and kills >= args.kills):
            before, pid = step_of(out), attempt(flags, out, log)
            if kills < args.kills:
                time.sleep(rng.uniform(0.02, args.longest))
                os.kill(pid, signal.SIGKILL)  # in vain if it has ended; its id is kept until waitpid
            status = os.waitpid(pid, 0)[1]
            ended = not os.WIFSIGNALED(status)
            if ended and os.WEXITSTATUS(status):
                wrong.append(f"after kill {kills}, code {os.WEXITSTATUS(status)}:\n{open(log).read()[-1000:]}")
                break
            if ended:
                wrong += differences(whole, out)
                runs += 1
                out = os.path.join(base, f"run{runs}")
                continue
            kills, after = kills + 1, step_of(out)
            early += after == 0
            writing += os.path.exists(os.path.join(out, "ckpt.pt.tmp"))
            print(f"kill {kills}: step {before} -> {after}", flush=True)
            wrong += [f"kill {kills} lost step {before}"] * (after < before)
    went_on = kills - any("code" in text for text in wrong)
    print(f"{went_on} of {kills} kills resumed ({writing} fell into the writing of a checkpoint, {early} before the "
          f"first); {runs} runs of {args.steps} steps reached their end, {len(wrong)} differences from the undisturbed "
          f"run in weights, optimiser, mixture and log (to the bit). {datetime.date.today()}, "
          f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"{time.perf_counter() - begun:.0f} s")
    for text in wrong[:5]:
        print(text, file=sys.stderr)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
