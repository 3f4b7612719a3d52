"""Kill a run at random moments, resume it each time, and compare it with a run nobody disturbed.

    python -m lab.chaos                 50 kills, about 3 minutes on one core
    python -m lab.chaos --kills 500
    python -m lab.chaos --script zoo/capi.py -- --batch-size 8 --num-prototypes 16

Start it in the folder of train.py. Flags after -- are those of the run, in place of the small ones
that it has without them; images, length, device, evaluation, log and times of saving are set here.
The run saves after every step, so that many kills (SIGKILL, which no process can refuse) fall into
the writing of a checkpoint. Each attempt is a fork of this process, which has imported torch
already, and lives from 0.02 to --longest seconds. A run that reaches its end before all kills are
done is compared too, and the next one begins in a new folder.
"""
import argparse
import contextlib
import csv
import datetime
import importlib
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback

import torch
from torchvision.utils import save_image

import train
from lab.machine import cpu
from support.errors import one_sentence
from support.flags import check_values

SPEED = ("images_per_s", "data_share", "memory_mb")  # columns of log.csv that differ between runs
SMALL = ["--batch-size", "8", "--num-prototypes", "32", "--partition-size", "8",
         "--bottleneck-dim", "16", "--head-hidden", "32", "--local-crops", "1", "--gmm-start", "5"]
# set for every run, by `experiment`: after what the user gives, so that they hold
OFTEN = ["--device", "cpu", "--eval-bank", "40", "--eval-queries", "6",
         "--log-every", "7", "--eval-every", "25", "--save-every", "1"]
# (what a value must be, test, flags)
RANGES = [("not be negative", lambda v: v >= 0, ["kills", "seed"]),
          ("be at least 1", lambda v: v >= 1, ["steps"]),
          ("be at least 0.02", lambda v: v >= 0.02, ["longest"])]


# ---- a run in a process of its own -------------------------------------------------------------
def make_images(path, n=60):
    """Fill the folder `path` with n random images of two classes."""
    for c in "ab":
        os.makedirs(os.path.join(path, c))
        for i in range(n // 2):
            generator = torch.Generator().manual_seed(1000 * ord(c) + i)
            x = torch.rand(3, 32, 32, generator=generator)  # (3, 32, 32)
            save_image(x, os.path.join(path, c, f"{i}.png"))


def start(script, flags, out, output):
    """Fork a process that goes on with the run in the folder `out`; returns its id.

    script: the module whose `main` makes the run. output: the file that what it prints is appended
    to.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with open(output, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
        try:
            script.main([*flags, "--out", out, "--resume"])
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # this process must not go on with what its parent does


def end_of(path):
    """The last 2,000 characters of a text file."""
    with open(path) as f:
        return f.read()[-2000:]


# ---- comparing two runs ------------------------------------------------------------------------
def saved_step(out):
    """The step of the newest checkpoint in a folder, 0 without one."""
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        with contextlib.suppress(Exception):  # not there, or cut short
            return torch.load(os.path.join(out, name), weights_only=True)["step"]
    return 0


def unfinished_checkpoint(out):
    """When the unfinished checkpoint in a folder was last written to, in ns; None without one."""
    path = os.path.join(out, "ckpt.pt.tmp")
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None


def leaves(x, name=""):
    """{path: tensor or value} of a nested checkpoint."""
    if isinstance(x, dict):
        parts = x.items()
    elif isinstance(x, (list, tuple)):
        parts = enumerate(x)
    else:
        return {name: x}
    result = {}
    for key, part in parts:
        result |= leaves(part, f"{name}/{key}")
    return result


def same(x, y):
    """Whether two leaves are equal to the last bit."""
    if torch.is_tensor(x) and torch.is_tensor(y):
        return torch.equal(x, y)
    return type(x) is type(y) and x == y


def differences(a, b):
    """What differs between the runs in the folders a and b: paths in the checkpoint, or log.csv."""
    checkpoints, logs = [], []
    for out in (a, b):
        ckpt = torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)
        del ckpt["args"]  # the folder is one of them
        checkpoints.append(leaves(ckpt))
        with open(os.path.join(out, "log.csv"), newline="") as f:
            rows = list(csv.DictReader(f))
        logs.append([{k: v for k, v in row.items() if k not in SPEED} for row in rows])
    x, y = checkpoints
    different = [path for path in sorted(x.keys() | y.keys())
                 if path not in x or path not in y or not same(x[path], y[path])]
    if logs[0] != logs[1]:
        different.append("log.csv")
    return different


# ---- the experiment ----------------------------------------------------------------------------
class Counts:
    """What happened so far."""

    def __init__(self):
        self.kills = 0
        self.while_writing = 0  # kills that left an unfinished checkpoint behind
        self.before_checkpoint = 0  # kills before the first checkpoint was there
        self.finished = 0  # runs that reached their end
        self.failures = []  # sentences; none if all is well
        self.failed_resumes = 0


def disturb(args, script, flags, base, undisturbed):
    """Kill args.kills times, and let the last run reach its end. script, flags: the run's module
    and flags; base: a folder for the runs; undisturbed: the folder of the run to compare with.
    -> Counts"""
    counts, moments = Counts(), random.Random(args.seed)
    out, output = os.path.join(base, "run0"), os.path.join(base, "output")
    finished = False
    while not finished or counts.kills < args.kills:
        before, unfinished_before = saved_step(out), unfinished_checkpoint(out)
        pid = start(script, flags, out, output)
        if counts.kills < args.kills:
            time.sleep(moments.uniform(0.02, args.longest))
            # in vain if the process has ended; until waitpid its id belongs to nobody else
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)  # negative: the signal that ended it
        finished = code != -signal.SIGKILL
        if finished and code:  # by another signal too, as after a crash
            counts.failed_resumes += 1
            counts.failures.append(f"after kill {counts.kills} the run ended with exit code "
                                   f"{code}:\n{end_of(output)}")
            break
        if finished:
            counts.failures += [f"run {counts.finished} differs in {name}"
                                for name in differences(undisturbed, out)]
            counts.finished += 1
            out = os.path.join(base, f"run{counts.finished}")
            continue
        after = saved_step(out)
        counts.kills += 1
        counts.before_checkpoint += after == 0
        counts.while_writing += unfinished_checkpoint(out) not in (None, unfinished_before)
        print(f"kill {counts.kills}: step {before} -> {after}", flush=True)
        if after < before:
            counts.failures.append(f"kill {counts.kills} lost step {before}")
    return counts


def parser():
    p = argparse.ArgumentParser("python -m lab.chaos", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--script", default="train.py", metavar="FILE",
                   help="train.py, or a script of zoo/; train.py by default")
    p.add_argument("--kills", type=int, default=50, help="how often; 50 by default")
    p.add_argument("--steps", type=int, default=300, help="length of the run; 300 by default")
    p.add_argument("--longest", type=float, default=2.0,
                   help="seconds that an attempt lives at most; 2 by default")
    p.add_argument("--seed", type=int, default=0, help="of the moments; 0 by default")
    return p


def main(argv=None):
    """Exit code 0 if every run went on and equals the undisturbed one, 1 if not, and 1 too for
    flags after -- with which the undisturbed run fails. Bad input: one sentence on stderr and exit
    code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser().parse_args(argv[:end]), argv[end + 1:]
    with one_sentence("lab.chaos"):
        check_values(args, RANGES)
        experiment(args, script_of(args.script), flags or SMALL)


def script_of(name):
    """The module of train.py or of a script of zoo/; ValueError if there is none of this name."""
    if name == "train.py":
        return train
    if re.fullmatch(r"zoo/\w+\.py", name) and os.path.exists(name):
        script = importlib.import_module(name[:-3].replace("/", "."))
        if hasattr(script, "main"):
            return script
    raise ValueError(f"--script {name} is neither train.py nor a script of zoo/")


def experiment(args, script, flags):
    torch.set_num_threads(1)  # before the forks: a fork has none of its parent's threads
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as base:
        images, undisturbed, output = (os.path.join(base, name)
                                       for name in ("images", "undisturbed", "output"))
        make_images(images)
        flags = [*flags, "--data", images, "--steps", str(args.steps), *OFTEN]
        _, status = os.waitpid(start(script, flags, undisturbed, output), 0)
        if status:
            print(f"lab.chaos: the undisturbed run failed:\n{end_of(output)}", file=sys.stderr)
            raise SystemExit(1)
        counts = disturb(args, script, flags, base, undisturbed)
    resumed = counts.kills - counts.failed_resumes
    print(f"{resumed} of {counts.kills} kills resumed ({counts.while_writing} fell into the "
          f"writing of a checkpoint, {counts.before_checkpoint} before the first); "
          f"{counts.finished} runs of {args.script}, {args.steps} steps, reached their end; "
          f"{len(counts.failures)} failures (lost steps, "
          "and differences to the bit from the undisturbed run in weights, optimiser, mixture and "
          f"log). {datetime.date.today()}, {cpu()}, torch {torch.__version__}, "
          f"{time.perf_counter() - begin:.0f} s")
    for text in counts.failures[:5]:
        print(text, file=sys.stderr)
    raise SystemExit(bool(counts.failures))


if __name__ == "__main__":
    main()
