"""Speed and memory: ours, the plain way, and the floor (the matrix products alone), measured beside each other.

    python bench.py                                  all items at sizes for 2 cores, a few minutes
    python bench.py gmm loss --K 65536 --reps 5      some of them, at your sizes
    python bench.py --paper                          all at the paper's size; plan an hour on 2 cores

Every side of a comparison lives in a process of its own, and the sides take turns, so that a busy machine slows all of
them alike. A ratio is the middle of the ratios within the --reps turns, and a time is the middle of the turns: the
fastest ones would compare two lucky moments. Peak: the most memory a turn took beyond what the process held before
it (resident memory on a CPU, where Linux can reset its high-water mark; allocated memory on a GPU). `step`, `loop` and
`ranks` start train.py itself and read its log.
"""
import argparse
import csv
import ctypes
import datetime
import multiprocessing as mp
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from lab import sides
from support.run import keep_freed_memory

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
#             default                                                          --paper
SIZES = dict(K=(16384, 65536), D=(256, 256), N=([512], [512, 2048]), V=(8, 8), B=(64, 64), P=(512, 512),
             unique=(16384, 65536), bank=(20000, 100000), queries=(2000, 10000), batch=(64, 64), steps=(6, 6))


# ---- one side, one process -------------------------------------------------------------------------------------------
def resident(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(key))  # MB


def turn(run, device, first):
    """(seconds, peak MB beyond what was held before) of one call."""
    linux = sys.platform == "linux" and device == "cpu"
    if linux:
        if first:
            ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier would hide what this turn needs
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the high-water mark starts again from here
    elif device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    unit = 1 if sys.platform == "darwin" else 1024
    before = resident("VmRSS") if linux else torch.cuda.memory_allocated() / 2 ** 20 if device != "cpu" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after = resident("VmHWM") if linux else torch.cuda.max_memory_allocated() / 2 ** 20 if device != "cpu" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20
    return seconds, after - before


def serve(pipe, item, side, a, threads):
    keep_freed_memory()  # as train.py does, for all sides
    torch.set_num_threads(threads)
    small = argparse.Namespace(**{**vars(a), "K": 2 * a.P, "N": 8, "B": 2, "unique": 64, "bank": 64, "queries": 8})
    getattr(sides, item)(side, small)()  # loads the code, which is nobody's extra memory
    run = getattr(sides, item)(side, a)
    while (order := pipe.recv()) is not None:
        pipe.send(turn(run, a.device, order == 0))


def race(item, names, a, reps=None):
    """{side: (seconds of every turn, MB)}: the sides take turns. One more, the first, shows the memory."""
    context, lanes = mp.get_context("spawn"), {}
    for side in names:
        ours, theirs = context.Pipe()
        child = context.Process(target=serve, args=(theirs, item, side, a, torch.get_num_threads()), daemon=True)
        child.start()
        lanes[side] = ours, child, []
        theirs.close()
    for order in range((reps or a.reps) + 1):
        for side in names[order % len(names):] + names[:order % len(names)]:  # the one before leaves its mark
            pipe, _, turns = lanes[side]
            pipe.send(order)
            turns.append(pipe.recv())
    for pipe, child, _ in lanes.values():
        pipe.send(None)
        child.join()
    return {side: ([t for t, _ in turns[1:]], turns[0][1]) for side, (_, _, turns) in lanes.items()}


def ratio(t, a, b):
    """How much more side a has than b (seconds, images/s): the middle over the turns."""
    return statistics.median(x / y for x, y in zip(t[a], t[b]))


def verdict(text, value, limit, more=False):
    """One line: a ratio, its target, and whether it is met."""
    met, sign = (value >= limit, ">=") if more else (value <= limit, "<=")
    print(f"    {text} {value:.3g}   target {sign} {limit:g}: {'met' if met else 'NOT MET'}", flush=True)
    return met


def table(title, got, unit="MB extra"):
    print(f"\n{title}")
    for side, (seconds, peak) in got.items():
        print(f"    {side:12} {statistics.median(seconds):9.3f} s {peak:9.0f} {unit}", flush=True)
    return {s: t for s, (t, _) in got.items()}, {s: m for s, (_, m) in got.items()}


# ---- whole runs: train.py as a user starts it ------------------------------------------------------------------------
def train(*flags, processes=1, threads=None):
    """(rows of the log, vectors of the prototypes) of a run of train.py in a folder that is thrown away."""
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with tempfile.TemporaryDirectory() as out:
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] * (processes > 1)
        run = subprocess.run([sys.executable, *launch, os.path.join(HERE, "train.py"), "--out", out, *map(str, flags)],
                             capture_output=True, text=True, env=env)
        if run.returncode:
            raise ValueError(f"train.py {' '.join(map(str, flags))} ended with {run.returncode}: {run.stderr[-500:]}")
        with open(os.path.join(out, "log.csv"), newline="") as f:
            rows = [row for row in csv.DictReader(f) if row["loss"]]
        ckpt = torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)
        return rows, ckpt["prototypes"]["vectors"]


def step(a):
    """Decoupled against joint: whole steps of train.py, 12 crops, the mixture at work from the first step."""
    flags = ["--device", a.device, "--local-crops", 10, "--num-prototypes", a.K, "--partition-size", a.P,
             "--bottleneck-dim", a.D, "--batch-size", a.batch, "--steps", a.steps, "--gmm-start", 0, "--log-every", 1,
             "--eval-every", 10 ** 6, "--eval-bank", 64, "--eval-queries", 8, *a.step_flags]
    got = {"joint": ([], 0), "decoupled": ([], 0)}
    for _ in range(a.reps):
        for kind, (seconds, peak) in got.items():
            rows = train(*flags, "--prototypes", kind)[0]
            seconds.append(statistics.median(a.batch / float(row["images_per_s"]) for row in rows[1:]))
            got[kind] = seconds, max(peak, *(float(row["memory_mb"]) for row in rows))
    t, m = table(f"step: K {a.K}, D {a.D}, 12 crops, batch {a.batch}", got, "MB in all")
    verdict("decoupled / joint, time", ratio(t, "decoupled", "joint"), 1.0)
    verdict("decoupled / joint, memory", m["decoupled"] / m["joint"], 1.0)


def ranks(a):
    """The same global batch on 1, 2 and 4 gloo processes: losses, and the mixture's means; and how much one process
    differs from itself on one thread, by rounding alone. Batch norm, which takes a mean off, enlarges rounding."""
    flags = ["--device", "cpu", "--stop-at", 8, "--log-every", 1, "--eval-every", 10 ** 6, "--gmm-start", 3,
             "--eval-bank", 64, "--eval-queries", 8, *a.step_flags]
    for title, more in (("no batch norm in the head", ["--no-head-bn"]), ("as it is", [])):
        print(f"\nranks: the first 8 steps of the default run, {title}, the mixture from step 3")
        ways = {"1 thread": dict(threads=1), "2 processes": dict(processes=2), "4 processes": dict(processes=4)}
        rows, means = train(*flags, *more)
        for way, options in ways.items():
            other, vectors = train(*flags, *more, **options)
            verdict(f"{way}, largest difference of a loss",
                    max(abs(float(p["loss"]) - float(q["loss"])) for p, q in zip(rows, other)), 1e-6)
            verdict(f"{way}, largest difference of a mean, relative",
                    float((vectors - means).abs().max() / means.abs().max()), 1e-6)


def loop(a):
    """images/s of the default run, ours and lightly's DINO in turns, and the share of its time that the data take."""
    threads, ours, shares, other = torch.get_num_threads(), [], [], {0: [], 1: []}
    for _ in range(a.reps):
        rows = train("--device", "cpu", "--steps", a.steps * 10, "--log-every", 10, "--eval-every", 10 ** 6,
                     "--gmm-start", 5, "--eval-bank", 64, "--eval-queries", 8)[0]
        ours.append(max(float(row["images_per_s"]) for row in rows))
        shares.append(min(float(row["data_share"]) for row in rows))
        for workers, speeds in other.items():  # its crops in the same process, or in another one beside it
            torch.set_num_threads(max(1, threads - workers))
            speeds.append(sides.lightly_loop(workers))
        torch.set_num_threads(threads)
    print(f"\nloop: default preset {statistics.median(ours):.0f} images/s")
    verdict("share of the data in a step", statistics.median(shares), 0.2)
    if other[0][0] is None:
        print("    lightly is not installed")
        return
    for workers, speeds in other.items():
        print(f"    lightly's DINO, {workers} processes for its crops, {statistics.median(speeds):.0f} images/s")
        verdict("ours / lightly", ratio({"ours": ours, "lightly": speeds}, "ours", "lightly"), 3, more=True)


# ---- command line ----------------------------------------------------------------------------------------------------
def race_gmm(a):
    for a.N in a.N:
        t, m = table(f"gmm: K {a.K}, D {a.D}, N {a.N}", race("gmm", ("ours", "streaming", "plain", "floor"), a))
        verdict("ours / floor", ratio(t, "ours", "floor"), 1.3)
        verdict("streaming / floor", ratio(t, "streaming", "floor"), 1.9)
        verdict("streaming, MB", m["streaming"], 1024)
        verdict("plain / ours", ratio(t, "plain", "ours"), 1.5, more=True)


def race_loss(a):
    for item, a.joint in ((i, j) for i in ("loss", "dino") for j in (False, True)):
        names = ("ours", "plain") + ("floor",) * (item == "loss")
        t, m = table(f"{'CARP' if item == 'loss' else 'DINO'} loss, {'joint' if a.joint else 'decoupled'}: K {a.K}, "
                     f"{a.V} views x {a.B}", race(item, names, a))
        verdict("time, ours / plain", ratio(t, "ours", "plain"), 1)
        verdict("memory, ours / plain", m["ours"] / m["plain"], 0.1)
        if a.joint:  # K x D floats that both have to return
            grad = a.K * a.D * 4 / 2 ** 20
            print(f"    of which the gradient of C, which both return: {grad:.0f} MB; "
                  f"without it {(m['ours'] - grad) / (m['plain'] - grad):.3f}")


def race_unique(a):
    got = race("unique", ("ours", "plain", "floor"), a, reps=1 if a.unique > 20000 else None)
    t, m = table(f"unique: {a.unique} x {a.D}, all distinct", got)
    verdict("ours / floor", ratio(t, "ours", "floor"), 2)
    verdict("plain / ours", ratio(t, "plain", "ours"), 20, more=True)


def race_knn(a):
    t, m = table(f"knn: bank {a.bank} x 384, {a.queries} queries", race("knn", ("ours", "plain", "floor"), a))
    verdict("ours / floor", ratio(t, "ours", "floor"), 1.5)
    verdict("ours, MB", m["ours"], 1024)


def race_data(a):
    t, _ = table("data: 32 images, 2 + 4 crops", race("data", ("ours", "plain"), a))
    verdict("plain / ours", ratio(t, "plain", "ours"), 5, more=True)


ITEMS = {"gmm": race_gmm, "loss": race_loss, "step": step, "unique": race_unique, "knn": race_knn, "data": race_data,
         "loop": loop, "ranks": ranks}


def main(argv=None):
    p = argparse.ArgumentParser("bench.py", description=__doc__.split("\n")[0])
    p.add_argument("items", nargs="*", help=f"of {', '.join(ITEMS)}; none: all")
    p.add_argument("--paper", action="store_true", help="the paper's sizes")
    p.add_argument("--reps", type=int, default=3, help="turns of each side; the middle counts")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--step-flags", nargs=argparse.REMAINDER, default=[], help="the rest goes to train.py (step, ranks)")
    for name, (small, _) in SIZES.items():
        p.add_argument(f"--{name}", type=int, nargs="+" if isinstance(small, list) else None, help=f"default {small}")
    a = p.parse_args(argv)
    try:
        if unknown := [i for i in a.items if i not in ITEMS]:
            raise ValueError(f"{unknown[0]} is none of the items {', '.join(ITEMS)}")
        for name, pair in SIZES.items():
            if getattr(a, name) is None:
                setattr(a, name, pair[a.paper])
        if a.K % a.P:
            raise ValueError(f"--K {a.K} must be a multiple of --P {a.P}")
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
              f"threads, {a.device}, torch {torch.__version__}, {datetime.date.today()}")
        for item in a.items or ITEMS:
            ITEMS[item](argparse.Namespace(**vars(a)))
    except ValueError as e:
        print(f"bench.py: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
