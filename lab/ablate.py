"""Tables of runs: every row of a table over seeds, one process after the other, into results/NAME.csv.

    python ablate.py main  # CARP and DINO with every prototype set, seeds 0 1 2
    python ablate.py A1 --seeds 0 --dry-run  # the commands alone
    python ablate.py C3 --show  # the finished table again, from its file
    python ablate.py main -- --preset cifar10-cpu  # what follows -- goes to every run; another block of the file

A run that stands in the file is not repeated, and one that was interrupted goes on from its checkpoint. The table shows
mean and standard deviation over seeds; a row is only as good as the control, frozen random prototypes, beside it.
"""
import argparse
import csv
import datetime
import io
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import zlib

import torch

import config
from support import plots
from support.guard import write

CARP, DINO = "--method carp --prototypes ", "--method dino --prototypes "
DEC = "--gmm-start 0.25 --prototypes decoupled"  # early, so that the flags of the mixture have time to matter
SK = "--method dino --prototypes decoupled --targets sinkhorn"
WARM, SHARP = " --teacher-temp 0.04 0.07 --teacher-temp-epochs 2", " --teacher-temp 0.05 0.025 --teacher-temp-epochs 3"
CONTROL = ("frozen random (control)", "--prototypes frozen")
TABLES = {  # name: (what it is, [(row, flags)])
    "main": ("method x prototype set", [
        *[(f"CARP, {kind}", CARP + kind) for kind in ("joint", "kp", "frozen", "decoupled", "live")],
        ("CARP, live that never starts", CARP + "live --gmm-start 1e9"),  # what its centring does alone
        *[(f"DINO, {kind}", DINO + kind) for kind in ("joint", "kp", "vmf", "frozen", "decoupled", "live")]]),
    "A1": ("Table A.1 of the paper: components of the mixture", [
        ("no responsibility forgetting", f"{DEC} --forgetting plain"),
        ("no annealing, no rescaling", f"{DEC} --beta 1 1 --no-rescale"),
        ("no annealing", f"{DEC} --beta 1 1"),
        ("no annealing, resurrect, rescaling", f"{DEC} --beta 1 1 --resurrect 0"),
        ("no resurrect, rescaling", f"{DEC} --resurrect 0"),
        ("full, as printed", DEC), CONTROL]),
    "A2": ("Table A.2: a and c of the forgetting factor", [
        *[(f"a {a}, c {c}", f"{DEC} --eta-a {a} --eta-c {c}")
          for a, c in ((0.001, 0.75), (0.001, 0.95), (0.0005, 0.89), (0.002, 0.89), (0.001, 0.89))], CONTROL]),
    "C3": ("Table C.3: DINO with decoupled prototypes, one change at a time", [
        ("joint, centre", "--method dino --prototypes joint" + WARM),
        ("decoupled, centre", "--method dino --prototypes decoupled" + WARM),
        ("+ Sinkhorn-Knopp", SK + WARM), ("+ temperature .05 to .025", SK + SHARP),
        ("+ K / 8", SK + SHARP + " --num-prototypes 128"), ("+ K / 4 instead", SK + SHARP + " --num-prototypes 256"),
        ("frozen, Sinkhorn-Knopp (control)", "--method dino --prototypes frozen --targets sinkhorn" + SHARP)]),
    "choices": ("points the paper leaves open: beta, exponent, means in the logits, start, scale", [
        ("as shipped", "--prototypes decoupled"), ("beta 1", "--prototypes decoupled --beta 1 1"),
        ("exponent per sample", "--prototypes decoupled --forgetting sample"),
        ("raw means in the logits", "--prototypes decoupled --proto-norm raw"),
        ("start at 0, features", "--prototypes decoupled --gmm-start 0"),
        ("start at 0, random", "--prototypes decoupled --gmm-start 0 --gmm-init random"),
        ("variance floor .1", "--prototypes decoupled --var-floor 0.1"),
        ("unit h, scale 20", "--prototypes decoupled --head-norm --logit-scale 20"),
        ("unit h, scale 20, frozen (control)", "--prototypes frozen --head-norm --logit-scale 20"), CONTROL]),
    "longtail": ("long tail, largest class over smallest 100; head: above 1,000 images, tail: below 200", [
        (f"CARP, {kind}", f"{CARP}{kind} --imbalance 100")
        for kind in ("joint", "kp", "frozen", "decoupled", "live")]),
}
SHOWN = (("knn", "k-NN (%)", 1), ("unique_0.025", "unique(.025)", 3), ("unique_0.5", "unique(.5)", 3),
         ("ceiling_0.5", "ceiling(.5)", 3), ("used", "used", 3), ("perplexity", "perplexity", 3), ("drift", "drift", 3))
GROUPS = (("knn_head", "k-NN head", 1), ("knn_medium", "medium", 1), ("knn_tail", "tail", 1))
TAIL = ["--head", "1000", "--tail", "200"]  # a third of CIFAR-10's classes each, at 5,000 to 50 images
FIELDS = ["row", "seed", "block", *[key for key, _, _ in SHOWN + GROUPS], "ceiling_0.025", "h_norm", "raw_knn",
          "untrained_knn", "steps", "command", "hardware", "torch", "date"]


def runs(name, seeds, extra):
    """[(row, seed, arguments of train.py)] of a table; extra: more arguments for every run."""
    return [(row, seed, [*shlex.split(flags), *extra, "--seed", str(seed)])
            for row, flags in TABLES[name][1] for seed in seeds]


def read(file):
    if not os.path.exists(file):
        return []
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def add(file, result):
    """Write a row into the file, the old content whole beside it until it is done."""
    text = io.StringIO()
    table = csv.DictWriter(text, FIELDS, lineterminator="\n")
    table.writeheader()
    table.writerows([*read(file), result])
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    write(file, lambda f: f.write(text.getvalue().encode()))


def measured(out):
    """The last evaluation and the controls of step 0 in the log of a finished run."""
    log = read(os.path.join(out, "log.csv"))
    with open(os.path.join(out, "args.json")) as f:
        args = json.load(f)
    last = [r for r in log if r["used"]][-1]
    keys = [*[key for key, _, _ in SHOWN], "ceiling_0.025", "h_norm"]
    return {key: last[key] for key in keys} | {
        "raw_knn": log[0].get("raw_knn", ""), "untrained_knn": log[0]["knn"], "steps": last["step"],
        "torch": args["torch"]}


def grouped(out):
    """k-NN (k 20) of the whole test split for head, medium and tail classes, by eval_knn.py, of a long-tailed run."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([sys.executable, os.path.join(here, "eval_knn.py"), out, "--k", "20", *TAIL], check=True)
    last = [r for r in read(os.path.join(out, "results.csv")) if r["result"] == "k=20"][-1]
    return {f"knn_{group}": last[group] for group in ("head", "medium", "tail")}


def columns(name):
    """What a table shows: (column of the file, title, digits)."""
    return SHOWN[:1] + GROUPS + SHOWN[1:] if name == "longtail" else SHOWN


def hardware():
    """CPU or GPU by name, with how many cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name, cores = platform.processor() or platform.machine(), len(os.sched_getaffinity(0)) \
        if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    return f"{name}, {cores} cores"


def train(args, out, block, row, seed, flags):
    """One run to its end; what the file holds of it. ValueError if the folder holds a run that its command would not
    make: --resume takes the flags of the folder, and the table would name others."""
    old = os.path.join(out, "args.json")
    if os.path.exists(old):
        new = vars(config.parse(flags))
        with open(old) as f:
            made = {k: v for k, v in json.load(f).items() if k in new}
        if changed := config.differences(made, new):
            raise ValueError(f"{out} holds a run with other flags ({', '.join(changed)}); move it away")
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, os.path.join(here, "train.py"), *flags, "--out", out, "--resume"])
    if done.returncode:
        raise ValueError(f"{row}, seed {seed}: train.py ended with exit code {done.returncode}; run the same command "
                         "again to go on from there")
    tail = grouped(out) if args.table == "longtail" else {}
    return {"row": row, "seed": seed, "block": block, **measured(out), **tail,
            "command": shlex.join(["train.py", *flags]), "hardware": hardware(),
            "date": datetime.date.today().isoformat()}


def blocks(results):
    """{block: {row: [results, one a seed]}} in the order of the file's rows within each table."""
    out = {}
    for r in results:
        out.setdefault(r["block"], {}).setdefault(r["row"], []).append(r)
    return out


def cell(group, key, digits):
    values = [float(r[key]) for r in group if r.get(key)]
    if not values:
        return "-"
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{sd}"


def table(name, results):
    """The Markdown text of a finished table: a block for each set of extra flags, mean and sd over seeds."""
    lines = []
    for block, rows in blocks(results).items():
        order = [row for row, _ in TABLES[name][1] if row in rows]
        every = [r for row in order for r in rows[row]]
        steps, dates = sorted({r["steps"] for r in every}), sorted({r["date"] for r in every})
        lines += [f"`python ablate.py {name}{f' -- {block}' if block else ''}`: {TABLES[name][0]}; "
                  f"{' and '.join(steps)} steps; k-NN of raw pixels {cell(every, 'raw_knn', 1)}, of the untrained "
                  f"backbone {cell(every, 'untrained_knn', 1)}; {every[0]['hardware']}, torch {every[0]['torch']}, "
                  f"{dates[-1]}", "",
                  f"| prototypes | seeds | {' | '.join(title for _, title, _ in columns(name))} |",
                  "|---|---|" + "---|" * len(columns(name))]
        lines += [f"| {row} | {len(rows[row])} | {' | '.join(cell(rows[row], key, d) for key, _, d in columns(name))} |"
                  for row in order] + [""]
    return "\n".join(lines)


def parser():
    p = argparse.ArgumentParser("ablate.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flag = p.add_argument
    add_flag("table", choices=TABLES, help="; ".join(f"{name}: {what}" for name, (what, _) in TABLES.items()))
    add_flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every row")
    add_flag("--rows", nargs="+", metavar="ROW", help="only these rows of the table, by name")
    add_flag("--runs", default="runs", metavar="DIR", help="folder for the runs, DIR/TABLE/ROW-sSEED")
    add_flag("--results", default="results", metavar="DIR", help="folder for TABLE.csv and TABLE.png")
    add_flag("--dry-run", action="store_true", help="print the commands and leave")
    add_flag("--show", action="store_true", help="print and draw the table from its file, run nothing")
    return p


def main(argv=None):
    """Run a table. Returns the rows of its file as dicts; bad input: one sentence and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    argv, extra = argv[:cut], argv[cut + 1:]
    args = parser().parse_args(argv)
    try:
        return ablate(args, extra)
    except (ValueError, OSError) as e:
        print(f"ablate.py: error: {e}", file=sys.stderr)
        raise SystemExit(2) from None


def ablate(args, extra):
    file, block = os.path.join(args.results, f"{args.table}.csv"), shlex.join(extra)
    if {"--seed", "--out", "--resume"} & set(extra):
        raise ValueError("--seed, --out and --resume are this tool's to give; use --seeds and --runs")
    known = [row for row, _ in TABLES[args.table][1]]
    if wrong := set(args.rows or []) - set(known):
        raise ValueError(f"--rows {sorted(wrong)[0]!r} is not a row of {args.table}; there are: {', '.join(known)}")
    todo = [run for run in runs(args.table, args.seeds, extra) if not args.rows or run[0] in args.rows]
    for n, (row, seed, flags) in enumerate([] if args.show else todo, 1):
        name = re.sub(r"[^\w.+]+", "-", row).strip("-") + (f"-{zlib.crc32(block.encode()):08x}" if block else "")
        out = os.path.join(args.runs, args.table, f"{name}-s{seed}")
        if args.dry_run:
            print(shlex.join(["python", "train.py", *flags, "--out", out]))
        elif not any((r["row"], r["seed"], r["block"]) == (row, str(seed), block) for r in read(file)):
            print(f"== {args.table} {n}/{len(todo)}: {row}, seed {seed}", flush=True)
            add(file, train(args, out, block, row, seed, flags))
    results = read(file)
    if args.dry_run:
        return results
    if not results:
        raise ValueError(f"{file} holds no results yet")
    print("\n" + table(args.table, results))
    try:
        plots.ablation(known, blocks(results), columns(args.table), f"{file[:-4]}.png")
    except ValueError as e:
        print(f"no picture: {e}")
    return results


if __name__ == "__main__":
    main()
