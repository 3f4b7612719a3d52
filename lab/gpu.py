"""All that a GPU can tell about this project, by one command and in the minutes that you have.

    python -m lab.gpu --minutes 8 --out gpu --data images/cifar10
    python -m lab.gpu --device cpu --toy --data shapes --out rehearsal      without a GPU

Start it in the folder of train.py. Three parts, each with a file in --out that grows as results
come, so that a run that is cut short keeps what it has:

    checks.csv   values on the device beside those of a CPU: mixture, losses, counts, crops, a run
    bench.csv    time and memory at the paper's sizes, by lab.bench: its items gmm, loss, unique and
                 knn, and the whole step of ViT-S/16 with joint and with decoupled prototypes
    runs.csv     evaluations of runs with joint, frozen and decoupled prototypes. They train in
                 turns, --turn steps at a time, so that they are equally far when the time is over

Flags after -- go to the runs. What did not fit into the minutes is named at the end. The exit code
is 1 if a value differs or a command failed.
"""
import argparse
import contextlib
import csv
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import torch
from torch.nn import functional as F

import collapse
import config
import data
import eval_knn
import losses
import models
import views
from fast.gmm import FastGMM
from gmm import OnlineGMM, eta_at
from lab import contestants
from lab.bench import add, device_name
from support.backbones import choose_device
from support.errors import one_sentence
from support.files import locked
from support.flags import check_values

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KINDS = ("joint", "frozen", "decoupled")
# of the runs, which cannot be given after --
OWN_FLAGS = {"--device", "--data", "--data-root", "--prototypes", "--out", "--stop-at", "--resume"}
VIT_S = ["--arch", "vit_small", "--patch-size", "16", "--img-size", "224", "--local-size", "96"]
# each is a call of lab.bench: its items and sizes; the step comes first, as it says most
PAPER_SIZES = [["step", "--paper", "--step-flags", *VIT_S],
               ["gmm", "loss", "--paper"], ["unique", "knn", "--paper"]]
TOY_SIZES = [["step", "--K", "64", "--P", "16", "--D", "8", "--batch", "4", "--steps", "2"],
             ["gmm", "loss", "--K", "64", "--P", "16", "--D", "8", "--N", "20", "--B", "3"],
             ["unique", "knn", "--unique", "60", "--bank", "50", "--queries", "7"]]
TOY_RUN = ["--batch-size", "16", "--num-prototypes", "32", "--partition-size", "8",
           "--eval-bank", "200", "--eval-queries", "50", "--eval-every", "10", "--steps", "30"]
LEAST_LEFT = 20  # seconds; with less a command is not started
OF_BENCH = 0.6  # share of the minutes after which no benchmark goes on, so that runs get some
# (what a value must be, test, flags)
RANGES = [("be positive", lambda v: v > 0, ["minutes"]),
          ("be at least 1", lambda v: v >= 1, ["turn"])]


# ---- values on the device beside those of a CPU ------------------------------------------------
# {name: (function, most allowed)}. The function takes a device and returns how far its values lie
# from what is expected, mostly the values of a CPU, as a share
CHECKS = {}


def check(name, allowed):
    def register(function):
        CHECKS[name] = function, allowed
        return function
    return register


def apart(values, expected):
    """The largest difference of two lists of tensors, as a share of the largest expected value of
    each tensor."""
    shares = []
    for x, y in zip(values, expected, strict=True):
        x, y = x.detach().cpu().double(), y.detach().cpu().double()
        if x.shape != y.shape or not torch.isfinite(x).all():
            return float("inf")
        shares.append(float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)))
    return max(shares)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def six_updates(mixture, device):
    """Means, variances and log-weights after six updates with 64 vectors each."""
    mixture = mixture.to(device)
    mixture.init_from((randn(64, 24) * 0.5).to(device))
    for t in range(6):
        mixture.update(randn(64, 24, seed=t).to(device), 0.3, eta_at(t))
    return [mixture.mu, mixture.var, mixture.log_pi]


@check("mixture of gmm.py", 1e-4)
def mixture_check(device):
    expected = six_updates(OnlineGMM(96, 24), "cpu")
    return apart(six_updates(OnlineGMM(96, 24), device), expected)


@check("mixture of fast/gmm.py, beside gmm.py", 1e-4)
def fast_mixture_check(device):
    expected = six_updates(OnlineGMM(96, 24), "cpu")
    return apart(six_updates(FastGMM(96, 24), device), expected)


def gradients_apart(loss, way, device):
    """Gradients of h and of joint prototypes: `way` on the device beside the plain way on a CPU."""
    def gradients(way, device):
        sizes = SimpleNamespace(K=256, D=32, V=4, B=16, P=64, joint=True, device=device)
        return loss(way, sizes)()
    return apart(gradients(way, device), gradients("plain", "cpu"))


@check("CARP's loss of losses.py: gradients", 1e-4)
def carp_check(device):
    return gradients_apart(contestants.loss, "plain", device)


@check("CARP's loss of fast/losses.py, beside losses.py", 1e-4)
def fast_carp_check(device):
    return gradients_apart(contestants.loss, "ours", device)


@check("DINO's loss of fast/losses.py, beside losses.py", 1e-4)
def fast_dino_check(device):
    return gradients_apart(contestants.dino, "ours", device)


@check("Sinkhorn-Knopp at temperature .025", 1e-3)
def sinkhorn_check(device):
    z = F.normalize(randn(64, 48), dim=1)  # (64, 48)
    return apart([losses.sinkhorn(z.to(device), 0.025)], [losses.sinkhorn(z, 0.025)])


@check("unique prototypes: share of indices that differ", 0.0)
def unique_check(device):
    """Def. 2.1 with near-copies on both sides of eps, at the sizes of both implementations."""
    wrong = 0.0
    for K in (300, 3000):
        C = F.normalize(randn(K // 3, 64), dim=1).repeat(3, 1)  # (K, 64)
        C = C + randn(K, 64, seed=1) * torch.linspace(0, 0.06, K)[:, None]
        here = set(collapse.unique_prototypes(C.to(device), 0.025).tolist())
        there = set(collapse.unique_prototypes(C, 0.025).tolist())
        wrong = max(wrong, len(here ^ there) / K)
    return wrong


@check("k-NN: scores", 1e-3)
def knn_check(device):
    x, q = randn(3000, 48), randn(100, 48, seed=1)
    y = torch.arange(3000) % 10
    scores = eval_knn.knn_scores(x.to(device), y.to(device), q.to(device))
    return apart([scores], [eval_knn.knn_scores(x, y, q)])


@check("crops", 1e-4)
def crops_check(device):
    recipe = views.Recipe(global_size=32, local_size=16, n_local=2, global_scale=(0.4, 1.0),
                          local_scale=(0.15, 0.5), jitter=(0.4, 0.4, 0.4, 0.2), jitter_p=0.8,
                          gray_p=0.3, blur_p=(0.5, 0.1, 0.5), solarize_p=(0, 0.2, 0))
    images = data.subset(data.load("shapes", root="data")[0], torch.arange(32))

    def crops(device):
        return next(iter(views.batches(images, recipe, batch_size=32, seed=0, start=0, stop=1,
                                       device=device)))
    return apart(crops(device), crops("cpu"))


@check("backbone: outputs and gradients in float32", 1e-2)
def backbone_check(device):
    def outputs(device):
        torch.manual_seed(0)
        net = models.build("vit_nano", patch_size=8, img_size=32).to(device)
        cls, _ = net(randn(16, 3, 32, 32).to(device))  # (16, dim)
        cls.square().sum().backward()
        return [cls, *(p.grad for p in net.parameters() if p.grad is not None)]
    return apart(outputs(device), outputs("cpu"))


@check("a run, stopped and resumed: its last loss", 1e-2)
def resume_check(device):
    """Twelve steps beside four, a stop, and eight more."""
    flags = ["--device", device, "--steps", "12", "--log-every", "4", "--gmm-start", "2",
             "--prototypes", "decoupled", *TOY_RUN[:-2]]
    with tempfile.TemporaryDirectory() as folder:
        for name, more in (("whole", []), ("parts", ["--stop-at", "4"]), ("parts", ["--resume"])):
            call(["train.py", *flags, "--out", os.path.join(folder, name), *more])
        whole, parts = (rows_of(os.path.join(folder, name))[-1] for name in ("whole", "parts"))
    if whole["step"] != parts["step"]:
        return float("inf")
    return abs(float(whole["loss"]) - float(parts["loss"])) / abs(float(whole["loss"]))


def check_all(device, out, names=tuple(CHECKS)):
    """Run these checks, and add each to OUT/checks.csv as it ends. -> [sentence about a failure]"""
    bad = []
    for name in names:
        function, allowed = CHECKS[name]
        try:
            difference, words = function(device), ""
        except (RuntimeError, ValueError) as error:  # the next check may still work
            difference, words = float("nan"), str(error).splitlines()[0]
        passed = difference <= allowed
        add(os.path.join(out, "checks.csv"),
            {"check": name, "difference": f"{difference:.3g}", "allowed": allowed,
             "passed": passed, "error": words} | machine(device))
        print(f"    {'equal  ' if passed else 'DIFFERS'} {difference:.1e}  {name}", flush=True)
        bad += [] if passed else [f"{name}: {words or f'{difference:.3g}, allowed {allowed}'}"]
    return bad


def machine(device):
    return {"device": device_name(device), "torch": torch.__version__,
            "date": datetime.date.today()}


# ---- commands that must not outlive the time ---------------------------------------------------
class Deadline:
    """The seconds that are left of so many minutes since `start`, by default since now."""

    def __init__(self, minutes, start=None):
        self.start = time.monotonic() if start is None else start
        self.end = self.start + 60 * minutes

    def left(self):
        return self.end - time.monotonic()


def call(words, seconds=None, quiet=True):
    """Run `python WORDS`; after so many seconds it gets SIGTERM, with which train.py saves. (Not
    SIGINT: a process that a shell has started in the background ignores that.)

    True if it ended by itself, False if it was stopped. ValueError, with the last line that it
    wrote on stderr, if it failed.
    """
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True,
                               stdout=subprocess.DEVNULL if quiet else None,
                               stderr=subprocess.PIPE, start_new_session=True)
    stopped = False
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        stopped = True
        process.terminate()
        try:
            _, errors = process.communicate(timeout=LEAST_LEFT)
        except subprocess.TimeoutExpired:
            errors = ""
    finally:
        with contextlib.suppress(ProcessLookupError):  # and the processes that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode and not stopped:
        words = [os.path.relpath(word) if os.path.isabs(word) else word for word in words]
        last = (errors.strip() or "without a word").splitlines()[-1]
        raise ValueError(f"{' '.join(words)} ended with exit code {process.returncode}: {last}")
    return not stopped


# ---- speed and memory --------------------------------------------------------------------------
def bench_all(args, clock):
    """lab.bench, in as many calls as fit. -> ([sentence about a failure], [what did not fit])"""
    bad, left_out = [], []
    for words in TOY_SIZES if args.toy else PAPER_SIZES:
        # --step-flags takes all that follows, so it comes last
        of_run = words.index("--step-flags") if "--step-flags" in words else len(words)
        fixed = ["--device", args.device, "--csv", os.path.join(args.out, "bench.csv")]
        fixed += ["--reps", "1"] if args.toy else []
        command = ["-m", "lab.bench", *words[:of_run], *fixed, *words[of_run:]]
        if clock.left() < LEAST_LEFT:
            left_out.append(" ".join(command))
            continue
        try:
            if not call(command, clock.left(), quiet=False):
                left_out.append(" ".join(command))
        except ValueError as error:
            bad.append(str(error))
    return bad, left_out


# ---- runs --------------------------------------------------------------------------------------
def flags_of_runs(args):
    return ["--preset", "cifar10-cpu", *(TOY_RUN if args.toy else []), *args.flags,
            "--device", args.device, "--data", args.data, "--data-root", args.data_root]


def check_runs(args):
    """Before any minute is spent: ValueError where there are no images, and exit code 2 for flags
    that train.py refuses. Returns --steps of the runs, None without."""
    if not os.path.isdir(os.path.expanduser(args.data)):
        data.load(args.data, root=args.data_root)
    for kind in KINDS:
        parsed = config.parse([*flags_of_runs(args), "--prototypes", kind,
                               "--out", os.path.join(args.out, "runs")])
    return parsed.steps


def steps_of(out):
    """How many steps the run in this folder has in all."""
    with open(os.path.join(out, "args.json")) as f:
        return json.load(f)["data_seen"]["steps"]


def runs(args, clock):
    """Joint, frozen and decoupled prototypes in turns. -> as bench_all"""
    flags, total = flags_of_runs(args), check_runs(args)  # total: steps of a run, None: not known
    steps, longest = 0, 0.0  # of all runs; seconds of a turn so far
    while total is None or steps < total:
        before, steps = steps, min(steps + args.turn, total or sys.maxsize)
        for kind in KINDS:
            out = os.path.join(args.out, "runs", kind)
            if clock.left() < max(LEAST_LEFT, 1.1 * longest):
                return [], [f"steps after {before} of the runs, {kind} first"]
            begin = time.monotonic()
            try:
                ended = call(["train.py", *flags, "--prototypes", kind, "--out", out, "--resume",
                              "--stop-at", str(steps)], clock.left())
            except ValueError as error:
                return [str(error)], []
            longest = max(longest, time.monotonic() - begin)
            keep_evaluations(args)
            rows = rows_of(out)
            print(f"    {kind:10} {told(rows[-1]) if rows else 'no row of its log yet'}",
                  flush=True)
            if not ended:
                return [], [f"steps of the runs, in the turn that ends at {steps}"]
        total = steps_of(out)
    return [], []


def rows_of(out):
    """The rows of a run's log that have a loss, [{column: text}]; none before the first one."""
    path = os.path.join(out, "log.csv")
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:
        return [row for row in csv.DictReader(f) if row["loss"]]


def told(row):
    return (f"step {row['step']}, {float(row['images_per_s'] or 0):.0f} images/s"
            + (f", k-NN {float(row['knn']):.1f}, unique(.5) {float(row['unique_0.5']):.3f}, used "
               f"{float(row['used']):.3f}" if row["knn"] else ""))


COLUMNS = ["step", "images_per_s", "memory_mb", "knn", "unique_0.025", "unique_0.5", "ceiling_0.5",
           "used", "perplexity", "drift"]


def keep_evaluations(args):
    """Write OUT/runs.csv: the evaluations in the logs of all kinds so far."""
    file = os.path.join(args.out, "runs.csv")
    with contextlib.suppress(FileNotFoundError):
        os.remove(file)
    for kind in KINDS:
        out = os.path.join(args.out, "runs", kind)
        for row in rows_of(out):
            if row["used"]:
                add(file, {"prototypes": kind} | {column: row[column] for column in COLUMNS}
                    | machine(args.device))


# ---- command line ------------------------------------------------------------------------------
def parser():
    p = argparse.ArgumentParser("python -m lab.gpu", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("--minutes", type=float, default=8,
         help="after which no benchmark and no run goes on, counted from the start; the checks are "
         "not cut short; 8 by default")
    flag("--out", default="gpu", metavar="DIR", help="folder of the files; gpu by default")
    flag("--device", default="cuda", help="cuda by default; cpu rehearses")
    flag("--data", default="cifar10", help="as train.py --data, for the runs; cifar10 by default")
    flag("--data-root", default="data", metavar="DIR", help="as train.py --data-root")
    flag("--turn", type=int, metavar="STEPS",
         help="steps of a run before it is the next one's turn, at most the length of a run; 1562 "
         "by default, a pass over CIFAR-10, and 10 with --toy")
    flag("--toy", action="store_true", help="small sizes, and runs of 30 steps")
    flag("--parts", nargs="+", choices=["checks", "bench", "runs"], metavar="PART",
         default=["checks", "bench", "runs"], help="of checks, bench, runs; all by default")
    return p


def main(argv=None):
    """Exit code 0 if all that ran is as it should be. Bad input: one sentence, exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser().parse_args(argv[:end])
    args.flags = argv[end + 1:]
    with one_sentence("lab.gpu"):
        check_values(args, RANGES)
        own = {word.split("=")[0] for word in args.flags} & OWN_FLAGS
        if own:
            raise ValueError(f"{', '.join(sorted(own))} cannot follow --: the runs have their own")
        if args.turn is None:
            args.turn = 10 if args.toy else 1562
        if args.device not in ("cpu", "cuda"):
            raise ValueError(f"--device must be cpu or cuda, got {args.device}; "
                             "CUDA_VISIBLE_DEVICES says which GPU")
        args.device = choose_device(args.device)
        args.out = os.path.abspath(args.out)
        if "runs" in args.parts:
            check_runs(args)
        os.makedirs(args.out, exist_ok=True)
        with locked(args.out):
            experiment(args)


def experiment(args):
    clock = Deadline(args.minutes)
    print(", ".join(map(str, machine(args.device).values())))
    bad, left_out = [], []
    if "checks" in args.parts:
        print("values, beside those of a CPU:")
        bad += check_all(args.device, args.out)
    if "bench" in args.parts:
        failures, missing = bench_all(args, Deadline(args.minutes * OF_BENCH, clock.start))
        bad, left_out = bad + failures, left_out + missing
    if "runs" in args.parts:
        print(f"\nruns in turns of {args.turn} steps:")
        failures, missing = runs(args, clock)
        bad, left_out = bad + failures, left_out + missing
    for what in left_out:
        print(f"did not fit into --minutes {args.minutes:g}: {what}")
    for sentence in bad:
        print(f"lab.gpu: {sentence}", file=sys.stderr)
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
