"""Speed and memory of ours, of the plain way, and of the floor, which is the matrix products alone.

    python -m lab.bench                                all items at sizes for 2 cores, some minutes
    python -m lab.bench gmm loss --K 65536 --reps 5    some of them, at your sizes
    python -m lab.bench --paper                        the paper's K and N; plan an hour on 2 cores

Start it in the folder of train.py. The contestants of an item (contestants.py) take turns, each in
a process of its own, so that a busy machine slows all of them alike. A ratio is the median of the
ratios within the --reps rounds, and a time is the median over the rounds: the fastest turns would
compare two lucky moments. Memory is the most that a turn took beyond what its process had before:
resident memory on a CPU, where Linux can restart its high-water mark; allocated memory on a GPU.
The items `step`, `loop`, `ranks` and `ibot` start train.py itself (`ibot` zoo/ibot.py too) and read
its log.
"""
import argparse
import csv
import ctypes
import datetime
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from lab import contestants
from lab.machine import cpu
from support.backbones import choose_device
from support.errors import one_sentence
from support.flags import check_values
from support.log import keep_freed_memory

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = {  # name: (default, with --paper)
    "K": (16384, 65536),  # prototypes
    "D": (256, 256),  # their dimensions
    "N": ([512], [512, 2048]),  # vectors of an update of the mixture
    "V": (8, 8),  # views
    "B": (64, 64),  # images of the losses
    "P": (512, 512),  # prototypes of a partition of CARP
    "unique": (16384, 65536),  # prototypes of the item unique
    "bank": (20000, 100000),  # images of the item knn
    "queries": (2000, 10000),  # images of the item knn
    "batch": (64, 64),  # images of a step of the item step
    "steps": (6, 6),  # of the item step; loop takes ten times as many, and ibot four times
}
# (what a value must be, test, flags)
RANGES = [
    ("be at least 1", lambda v: v >= 1,
     ["reps", "K", "D", "N", "B", "P", "unique", "queries", "batch"]),
    ("be at least 2, as the teacher has two views", lambda v: v >= 2, ["V"]),
    ("be at least 2, as the first step is not counted", lambda v: v >= 2, ["steps"]),
    ("be at least 20, the neighbours of a query", lambda v: v >= 20, ["bank"]),
]


def with_sizes(options, **sizes):
    """A copy of the options in which these sizes are other ones."""
    return argparse.Namespace(**{**vars(options), **sizes})


# ---- one contestant, one process ---------------------------------------------------------------
def memory(device, peak=False):
    """MB that this process has now; peak: the most that it had since restart_peak."""
    if device != "cpu":
        used = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        return used / 2 ** 20
    if sys.platform == "linux":
        key = "VmHWM" if peak else "VmRSS"
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) / 1024 for line in f if line.startswith(key))
    import resource  # not there on Windows
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of all turns so far
    return most / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def restart_peak(device):
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")


def turn(work, device, trim):
    """(seconds, MB beyond what the process had before) of one call of work().

    trim: give freed memory back to the system first. Else it would hide what this turn needs.
    """
    if trim and device == "cpu" and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    if device != "cpu":
        torch.cuda.synchronize()
    restart_peak(device)
    before = memory(device)
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, memory(device, peak=True) - before


def serve(pipe, item, way, options, threads):
    """The process of one contestant: receives `trim`, does a turn and sends what `turn` gives."""
    keep_freed_memory()  # as train.py does
    torch.set_num_threads(threads)
    prepare = getattr(contestants, item)
    # a first call at small sizes loads the libraries, whose memory and time belong to nobody's turn
    small = with_sizes(options, K=2 * options.P, N=8, B=2, unique=64, bank=64, queries=8)
    with one_sentence(f"lab.bench, {item}, {way}"):
        prepare(way, small)()
        work = prepare(way, options)
        while (trim := pipe.recv()) is not None:
            pipe.send(turn(work, options.device, trim))


def race(item, ways, options, reps=None):
    """{way: (seconds of each turn, MB)}: the contestants `ways` of an item take turns.

    One round more, the first, measures the memory. ValueError if a contestant's process ends, for
    lack of memory for instance.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    for way in ways:
        pipes[way], other_end = context.Pipe()
        arguments = (other_end, item, way, options, torch.get_num_threads())
        processes[way] = context.Process(target=serve, args=arguments, daemon=True)
        processes[way].start()
        other_end.close()
    turns = {way: [] for way in ways}
    for n in range(1 + (reps or options.reps)):
        # another one begins each round, since each finds the caches as the one before left them
        begin = n % len(ways)
        for way in ways[begin:] + ways[:begin]:
            try:
                pipes[way].send(n == 0)
                turns[way].append(pipes[way].recv())
            except (EOFError, OSError):
                processes[way].join()
                code = processes[way].exitcode
                raise ValueError(f"{item}: the process of '{way}' ended with code {code}") from None
    for way in ways:
        pipes[way].send(None)
        processes[way].join()
    return {way: ([s for s, _ in turns[way][1:]], turns[way][0][1]) for way in ways}


# ---- what is printed ---------------------------------------------------------------------------
def ratio(values, a, b):
    """Median over the rounds of a's value (seconds, images/s) divided by b's."""
    return statistics.median(x / y for x, y in zip(values[a], values[b]))


def verdict(text, value, limit, at_least=False):
    """Print a ratio or a number, its target, and whether the target is met."""
    met = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    print(f"    {text} {value:.3g}   target {sign} {limit:g}: {'met' if met else 'NOT MET'}",
          flush=True)


def show(options, title, measured, unit="MB extra"):
    """Print what race measured, and add it to the file --csv. Returns {way: seconds of each turn}
    and {way: MB}."""
    print(f"\n{title}")
    for way, (seconds, peak) in measured.items():
        print(f"    {way:12} {statistics.median(seconds):9.3f} s {peak:9.0f} {unit}", flush=True)
        if options.csv:
            add(options.csv, {"what": title, "way": way, "seconds": statistics.median(seconds),
                              "mb": peak, "mb_of": unit.removeprefix("MB "),
                              "device": device_name(options.device), "torch": torch.__version__,
                              "date": datetime.date.today()})
    times = {way: seconds for way, (seconds, _) in measured.items()}
    peaks = {way: peak for way, (_, peak) in measured.items()}
    return times, peaks


def add(file, row):
    """Add a row {column: value} to a csv file, and its header to a new one."""
    with open(file, "a", newline="") as f:
        writer = csv.DictWriter(f, row)
        if f.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def device_name(device):
    return device if device == "cpu" else torch.cuda.get_device_name(device)


# ---- items that race ---------------------------------------------------------------------------
def bench_gmm(options):
    ways = ("ours", "streaming", "readable", "plain", "floor")
    for N in options.N:
        measured = race("gmm", ways, with_sizes(options, N=N))
        times, peaks = show(options, f"gmm: K {options.K}, D {options.D}, N {N}", measured)
        verdict("ours / floor", ratio(times, "ours", "floor"), 1.3)
        verdict("streaming / floor", ratio(times, "streaming", "floor"), 1.9)
        verdict("streaming, MB", peaks["streaming"], 1024)
        verdict("plain / ours", ratio(times, "plain", "ours"), 1.5, at_least=True)
        print(f"    readable / ours {ratio(times, 'readable', 'ours'):.3g}")


def bench_loss(options):
    bench_one_loss("loss", "CARP", ("ours", "plain", "floor"), options)
    bench_one_loss("dino", "DINO", ("ours", "plain"), options)


def bench_one_loss(item, name, ways, options):
    for joint in (False, True):
        measured = race(item, ways, with_sizes(options, joint=joint))
        title = (f"{name} loss, {'joint' if joint else 'decoupled'} prototypes: K {options.K}, "
                 f"{options.V} views x {options.B}")
        times, peaks = show(options, title, measured)
        verdict("time, ours / plain", ratio(times, "ours", "plain"), 1)
        share = peaks["ours"] / peaks["plain"] if peaks["plain"] else math.inf
        if joint:
            gradient = options.K * options.D * 4 / 2 ** 20
            print(f"    memory, ours / plain {share:.3g}   (the gradient of C, which both return, "
                  f"has {gradient:.0f} MB)")
        else:
            verdict("memory, ours / plain", share, 0.1)


def bench_unique(options):
    reps = 1 if options.unique > 20000 else None  # the plain way then takes minutes
    measured = race("unique", ("ours", "plain", "floor"), options, reps)
    times, _ = show(options, f"unique: {options.unique} x {options.D}, all distinct", measured)
    verdict("ours / floor", ratio(times, "ours", "floor"), 2)
    verdict("plain / ours", ratio(times, "plain", "ours"), 20, at_least=True)


def bench_knn(options):
    measured = race("knn", ("ours", "plain", "floor"), options)
    title = f"knn: bank {options.bank} x 384, {options.queries} queries"
    times, peaks = show(options, title, measured)
    verdict("ours / floor", ratio(times, "ours", "floor"), 1.5)
    verdict("ours, MB", peaks["ours"], 1024)


def bench_data(options):
    measured = race("data", ("ours", "plain"), options)
    times, _ = show(options, "data: 64 images, 2 + 4 crops", measured)
    verdict("plain / ours", ratio(times, "plain", "ours"), 5, at_least=True)


# ---- items that are whole runs of train.py -----------------------------------------------------
def train(*flags, processes=1, threads=None, script="train.py"):
    """(rows of the log, vectors of the prototypes) of a run of a script with these flags.

    threads: of each process; None: as many as torch takes. ValueError if the run fails.
    """
    flags = [str(flag) for flag in flags]
    env = dict(os.environ)
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    with tempfile.TemporaryDirectory() as out:
        module = script.removesuffix(".py").replace("/", ".")
        command = [sys.executable, *launcher, "-m", module, "--out", out, *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
        if done.returncode:
            words = (done.stderr.strip() or "without a word").splitlines()[-1]
            raise ValueError(f"{script} {' '.join(flags)} ended with exit code {done.returncode}: "
                             f"{words}")
        with open(os.path.join(out, "log.csv"), newline="") as f:
            rows = [row for row in csv.DictReader(f) if row["loss"]]
        ckpt = torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)
        return rows, ckpt["prototypes"]["vectors"]


NO_EVALUATION = ["--eval-every", 10 ** 6, "--eval-bank", 64, "--eval-queries", 8]


def bench_step(options):
    """Decoupled against joint prototypes: whole steps with 12 crops, the mixture from step 0 on."""
    flags = ["--device", options.device, "--local-crops", 10, "--num-prototypes", options.K,
             "--partition-size", options.P, "--bottleneck-dim", options.D,
             "--batch-size", options.batch, "--steps", options.steps, "--gmm-start", 0,
             "--log-every", 1, *NO_EVALUATION, *options.step_flags]
    measured = {"joint": ([], 0), "decoupled": ([], 0)}
    for _ in range(options.reps):
        for kind, (seconds, peak) in measured.items():
            rows, _ = train(*flags, "--prototypes", kind)
            of_steps = [options.batch / float(row["images_per_s"]) for row in rows[1:]]
            seconds.append(statistics.median(of_steps))
            measured[kind] = seconds, max(peak, *(float(row["memory_mb"]) for row in rows))
    title = f"step: K {options.K}, D {options.D}, 12 crops, batch {options.batch}"
    times, peaks = show(options, title, measured, "MB in all")
    verdict("decoupled / joint, time", ratio(times, "decoupled", "joint"), 1.0)
    verdict("decoupled / joint, memory", peaks["decoupled"] / peaks["joint"], 1.0)


def bench_ibot(options):
    """iBOT's step beside DINO's on the same network, and its hidden patches beside all of them."""
    flags = ["--device", options.device, "--arch", "vit_micro", "--patch-size", 4, "--no-head-bn",
             "--prototypes", "joint", "--targets", "center", "--num-prototypes", 1024,
             "--batch-size", 32, "--steps", 4 * options.steps, "--log-every", 1, *NO_EVALUATION]
    measured = {"DINO": ([], 0), "iBOT": ([], 0)}
    for _ in range(options.reps):
        for kind, (seconds, peak) in measured.items():
            method, script = (["--num-patch-prototypes", 1024], "zoo/ibot.py") if (
                kind == "iBOT") else (["--method", "dino"], "train.py")
            rows, _ = train(*flags, *method, script=script)
            seconds.append(statistics.median(32 / float(row["images_per_s"]) for row in rows[1:]))
            measured[kind] = seconds, max(peak, *(float(row["memory_mb"]) for row in rows))
    title = "ibot: a step of 32 images, 64 patches in a crop"
    times, _ = show(options, title, measured, "MB in all")
    verdict("iBOT / DINO, time", ratio(times, "iBOT", "DINO"), 1.25)
    sizes = with_sizes(options, K=max(1, options.K // 2), B=max(1, options.B // 2),
                       joint=True)
    title = f"ibot: loss of the hidden patches, K {sizes.K}, {2 * sizes.B} crops of 64 patches"
    times, peaks = show(options, title, race("patches", ("ours", "plain"), sizes))
    verdict("ours / all patches, time", ratio(times, "ours", "plain"), 0.5)
    verdict("ours / all patches, memory", peaks["ours"] / peaks["plain"], 0.5)


def bench_loop(options):
    """images/s of the default run beside lightly's DINO, the share of the time for the data, and
    the time of a step over that of its matrix products.

    Of each run the fastest ten steps count, as of lightly's, and the smallest share of the data.
    """
    flags = ["--device", "cpu", "--steps", options.steps * 10, "--log-every", 10, *NO_EVALUATION]
    threads = torch.get_num_threads()
    ours, data_shares, lightly = [], [], {0: [], 1: []}
    of_step, of_products = [], []  # seconds
    for _ in range(options.reps):
        rows, _ = train(*flags)
        ours.append(max(float(row["images_per_s"]) for row in rows))
        of_step.append(64 / ours[-1])  # the default batch
        of_products.append(seconds_of_products())
        data_shares.append(min(float(row["data_share"]) for row in rows))
        for workers, speeds in lightly.items():  # 0: its crops are made in the training process
            torch.set_num_threads(max(1, threads - workers))
            speeds.append(contestants.lightly_loop(workers))
        torch.set_num_threads(threads)
    print(f"\nloop: default run {statistics.median(ours):.0f} images/s")
    verdict("share of the data in a step", statistics.median(data_shares), 0.2)
    print(f"    a step takes {1000 * statistics.median(of_step):.0f} ms, its matrix products alone "
          f"{1000 * statistics.median(of_products):.0f} ms")
    times = {"step": of_step, "products": of_products}
    verdict("step / its products", ratio(times, "step", "products"), 1.5)
    if lightly[0][0] is None:
        print("    lightly is not installed")
        return
    for workers, speeds in lightly.items():
        print(f"    lightly's DINO, {workers} processes for its crops, "
              f"{statistics.median(speeds):.0f} images/s")
        both = {"ours": ours, "lightly": speeds}
        verdict("ours / lightly", ratio(both, "ours", "lightly"), 3, at_least=True)


def seconds_of_products():
    """Of the default run, as lab/products.py measures them in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "lab.products"], capture_output=True, text=True,
                          cwd=ROOT)
    found = re.search(r"^products of a step: [\d,]+, ([\d.]+) s$", done.stdout, flags=re.M)
    if not found:
        words = (done.stderr.strip() or "without a word").splitlines()[-1]
        raise ValueError(f"lab.products ended with exit code {done.returncode}: {words}")
    return float(found[1])


def bench_ranks(options):
    """The same global batch on 1, 2 and 4 processes: losses, and means of the mixture.

    A process on one thread is compared too: it differs by rounding alone. Batch norm, which takes a
    mean off, enlarges rounding, so the head is tried without it as well.
    """
    flags = ["--device", "cpu", "--stop-at", 8, "--log-every", 1, "--gmm-start", 3, *NO_EVALUATION,
             *options.step_flags]
    launches = {"1 thread": {"threads": 1}, "2 processes": {"processes": 2},
                "4 processes": {"processes": 4}}
    for title, head in (("no batch norm in the head", ["--no-head-bn"]), ("as it is", [])):
        print(f"\nranks: the first 8 steps of the default run, {title}, the mixture from step 3")
        rows, means = train(*flags, *head)
        for name, launch in launches.items():
            other_rows, other_means = train(*flags, *head, **launch)
            losses = [(float(a["loss"]), float(b["loss"])) for a, b in zip(rows, other_rows)]
            of_losses = max(abs(a - b) for a, b in losses)
            verdict(f"{name}, largest difference of a loss", of_losses, 1e-6)
            of_means = float((other_means - means).abs().max() / means.abs().max())
            verdict(f"{name}, largest difference of a mean, relative", of_means, 1e-6)


# ---- command line ------------------------------------------------------------------------------
ITEMS = {"gmm": bench_gmm, "loss": bench_loss, "step": bench_step, "unique": bench_unique,
         "knn": bench_knn, "data": bench_data, "loop": bench_loop, "ranks": bench_ranks,
         "ibot": bench_ibot}
ON_CPU = ("data", "loop", "ranks")  # those that are measured on the CPU alone


def parser():
    p = argparse.ArgumentParser("python -m lab.bench", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("items", nargs="*",
                   help=f"of {', '.join(ITEMS)}; none: all, on a GPU without {', '.join(ON_CPU)}")
    p.add_argument("--paper", action="store_true",
                   help="K, N and the searches as large as in the paper; views and images of the "
                   "losses stay")
    p.add_argument("--reps", type=int, default=3, help="turns of each contestant; 3 by default")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--csv", metavar="FILE", help="add times and memory to this file as they come")
    p.add_argument("--step-flags", nargs=argparse.REMAINDER, default=[],
                   help="all that follows goes to train.py (step, ranks)")
    for name, (default, _) in SIZES.items():
        several = "+" if isinstance(default, list) else None
        p.add_argument(f"--{name}", type=int, nargs=several, help=f"default {default}")
    return p


def main(argv=None):
    """Run the items. Bad input is one sentence on stderr and exit code 2."""
    options = parser().parse_args(argv)
    with one_sentence("lab.bench"):
        for item in options.items:
            if item not in ITEMS:
                raise ValueError(f"{item} is none of the items {', '.join(ITEMS)}")
        for name, (default, paper) in SIZES.items():
            if getattr(options, name) is None:
                setattr(options, name, paper if options.paper else default)
        check_values(options, RANGES)
        partitioned = {"loss", "step"} & set(options.items or ITEMS)
        if partitioned and options.K % options.P:
            raise ValueError(f"--K {options.K} must be a multiple of --P {options.P}")
        if options.device not in ("cpu", "cuda"):
            raise ValueError(f"--device must be cpu or cuda, got {options.device}; "
                             "CUDA_VISIBLE_DEVICES says which GPU")
        options.device = choose_device(options.device)
        items = [item for item in options.items or ITEMS
                 if options.device == "cpu" or options.items or item not in ON_CPU]
        for item in items:
            if options.device != "cpu" and item in ON_CPU:
                raise ValueError(f"{item} is measured on the CPU alone, got --device "
                                 f"{options.device}")
        if options.csv:
            open(options.csv, "a").close()  # refused now, if ever, and not after minutes
        print(f"{cpu()}, {torch.get_num_threads()} threads, {options.device}, torch "
              f"{torch.__version__}, {datetime.date.today()}")
        for item in items:
            ITEMS[item](options)


if __name__ == "__main__":
    main()
