"""Tables of runs: every row over several seeds, one process after the other.

    python -m lab.ablate main                            CARP and DINO with every prototype set
    python -m lab.ablate A1 --seeds 0 --dry-run          the commands alone
    python -m lab.ablate C3 --show                       the finished table again, from its file
    python -m lab.ablate main -- --preset cifar10-cpu    what follows -- goes to every run

Start it in the folder of train.py. Results stand in results/TABLE.csv. A run that stands there is
not repeated, and one that was interrupted goes on from its checkpoint. The table that is printed
shows mean and standard deviation over the seeds, and the runs with other flags after -- as a block
of their own. A row is only as good as the control beside it, frozen random prototypes.
"""
import argparse
import csv
import datetime
import importlib
import io
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
import zlib
from typing import NamedTuple

import torch

import config
from lab import eval_dense
from lab.machine import hardware
from support import plots
from support.errors import one_sentence
from support.files import TEXT, write
from support.flags import check_values

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# ---- the tables --------------------------------------------------------------------------------
# pieces of commands that several rows share
CARP = "--method carp --prototypes "
DINO = "--method dino --prototypes "
DECOUPLED = "--prototypes decoupled"
SINKHORN = DINO + "decoupled --targets sinkhorn"
RISING = " --teacher-temp 0.04 0.07 --teacher-temp-epochs 2"
FALLING = " --teacher-temp 0.05 0.025 --teacher-temp-epochs 3"
CONTROL = ("frozen random (control)", "--prototypes frozen")
# The design space of Eq. 3: who moves the prototypes, under two losses that keep them in use in
# two ways, and under CARP with a term that spreads the vectors. Sinkhorn-Knopp flattens targets
# with K above the rows of a step, so K is the batch there
MOVED_BY = {"joint": "joint", "kp": "kp", "frozen": "frozen", "kmeans": "kmeans",
            "clustered": "clustered", "clustered, joint student":
            "clustered --student-prototypes joint", "decoupled": "decoupled",
            "decoupled per sample": "decoupled --forgetting sample", "live": "live"}
BALANCED = "--method dino --targets sinkhorn --num-prototypes 64 --prototypes "
SPREAD = "--method carp-uniform --prototypes "
# A loss of patches beside that of class tokens, whose prototypes are trained in all rows. Without
# the patches' loss this is DINO: patch prototypes then do not change the network, but those that
# follow the teacher still move
DENSE = "zoo/ibot.py --prototypes joint --patch-prototypes "
IN_DENSE = ["joint", "kp", "frozen", "decoupled", "decoupled per sample"]
NO_PATCH_LOSS = " --patch-weight 0 --mask-share 0"
# The clusters of CAPI's teacher, and over what its targets are balanced
CLUSTERS = {"as published": "clustered", "frozen clusters": "frozen", "mixture": "decoupled"}
BALANCED_OVER = {"each place": "place", "all patches": "all"}

# The instrument: what its k-NN does if a run is shorter or longer, and with other seeds
EPOCHS = config.parser().get_default("epochs")
SYSTEMS = {"CARP, joint": CARP + "joint", "CARP, frozen": CARP + "frozen",
           "CARP, decoupled": CARP + "decoupled", "DINO, joint": DINO + "joint --batch-size 32"}
LENGTHS = {"a third": 1 / 3, "default length": 1, "three times": 3}
INSTRUMENT = [(f"{system}, {length}", f"{command} --epochs {factor * EPOCHS:g}")
              for system, command in SYSTEMS.items() for length, factor in LENGTHS.items()]
LABELS = "labels, default length"

# name: (what it is, [(row, command)]). A command holds the flags of train.py, or a script of zoo/
# and its flags: "zoo/NAME.py --lr 0.01"
TABLES = {
    "main": ("method x prototype set", [
        ("CARP, joint", CARP + "joint"),
        ("CARP, kp", CARP + "kp"),
        ("CARP, frozen", CARP + "frozen"),
        ("CARP, decoupled", CARP + "decoupled"),
        ("CARP, live", CARP + "live"),
        # the set never starts: what remains is that h is measured from its mean
        ("CARP, live before its start", CARP + "live --gmm-start 1e9"),
        ("DINO, joint", DINO + "joint"),
        ("DINO, kp", DINO + "kp"),
        ("DINO, vmf", DINO + "vmf"),
        ("DINO, frozen", DINO + "frozen"),
        ("DINO, decoupled", DINO + "decoupled"),
        ("DINO, live", DINO + "live")]),
    "A1": ("Table A.1 of the paper: components of the mixture", [
        ("no responsibility forgetting", f"{DECOUPLED} --forgetting plain"),
        ("no annealing, no rescaling", f"{DECOUPLED} --beta 1 1 --no-rescale"),
        ("no annealing", f"{DECOUPLED} --beta 1 1"),
        ("no annealing, resurrect, rescaling", f"{DECOUPLED} --beta 1 1 --resurrect 0"),
        ("no resurrect, rescaling", f"{DECOUPLED} --resurrect 0"),
        ("full, as printed", DECOUPLED),
        CONTROL]),
    "A2": ("Table A.2: a and c of the forgetting factor", [
        ("a 0.001, c 0.75", f"{DECOUPLED} --eta-a 0.001 --eta-c 0.75"),
        ("a 0.001, c 0.95", f"{DECOUPLED} --eta-a 0.001 --eta-c 0.95"),
        ("a 0.0005, c 0.89", f"{DECOUPLED} --eta-a 0.0005 --eta-c 0.89"),
        ("a 0.002, c 0.89", f"{DECOUPLED} --eta-a 0.002 --eta-c 0.89"),
        ("a 0.001, c 0.89", f"{DECOUPLED} --eta-a 0.001 --eta-c 0.89"),
        CONTROL]),
    "C3": ("Table C.3: DINO with decoupled prototypes, one change at a time", [
        ("joint, centre", DINO + "joint" + RISING),
        ("decoupled, centre", DINO + "decoupled" + RISING),
        ("+ Sinkhorn-Knopp", SINKHORN + RISING),
        ("+ temperature .05 to .025", SINKHORN + FALLING),
        ("+ K / 8", SINKHORN + FALLING + " --num-prototypes 128"),
        ("+ K / 4 instead", SINKHORN + FALLING + " --num-prototypes 256"),
        ("frozen, Sinkhorn-Knopp (control)", DINO + "frozen --targets sinkhorn" + FALLING)]),
    "choices": ("points the paper leaves open: beta, exponent, means in the logits, start, scale", [
        ("as shipped", DECOUPLED),
        ("beta 1", f"{DECOUPLED} --beta 1 1"),
        ("exponent per sample", f"{DECOUPLED} --forgetting sample"),
        ("raw means in the logits", f"{DECOUPLED} --proto-norm raw"),
        ("start at 0, features", f"{DECOUPLED} --gmm-start 0 --gmm-init features"),
        ("start at three quarters, features", f"{DECOUPLED} --gmm-init features"),
        ("variance floor .1", f"{DECOUPLED} --var-floor 0.1"),
        ("unit h, scale 20", f"{DECOUPLED} --head-norm --logit-scale 20"),
        ("unit h, scale 20, frozen (control)", "--prototypes frozen --head-norm --logit-scale 20"),
        CONTROL]),
    "longtail": ("long tail, largest class over smallest 100; head: above 1,000 images, "
                 "tail: below 200", [
                     ("CARP, joint", CARP + "joint --imbalance 100"),
                     ("CARP, kp", CARP + "kp --imbalance 100"),
                     ("CARP, frozen", CARP + "frozen --imbalance 100"),
                     ("CARP, decoupled", CARP + "decoupled --imbalance 100"),
                     ("CARP, live", CARP + "live --imbalance 100")]),
    "space": ("who moves the prototypes", [
        *[(f"CARP, {name}", CARP + flags) for name, flags in MOVED_BY.items()],
        *[(f"CARP + uniformity, {name}", SPREAD + MOVED_BY[name])
          for name in ("frozen", "kmeans", "clustered", "live")],
        *[(f"DINO + Sinkhorn, {name}", BALANCED + flags) for name, flags in MOVED_BY.items()],
        ("SOP, bank", "--method sop --prototypes bank --num-prototypes 128")]),
    "dense": ("who moves the prototypes of patches", [
        *[(f"iBOT, {name}", DENSE + MOVED_BY[name]) for name in IN_DENSE],
        ("iBOT, decoupled, place mean", DENSE + "decoupled --place-mean"),
        *[(f"DINO, {name}", DENSE + MOVED_BY[name] + NO_PATCH_LOSS)
          for name in ("joint", "decoupled", "decoupled per sample")]]),
    "capi": ("who moves the clusters of CAPI's teacher", [
        *[(f"{kind}, {over}", f"zoo/capi.py --prototypes {flag} --sinkhorn {rule}")
          for kind, flag in CLUSTERS.items() for over, rule in BALANCED_OVER.items()],
        ("frozen student, each place", "zoo/capi.py --student-prototypes frozen")]),
    "instrument": ("what the default run can tell: length, seeds, room above",
                   [*INSTRUMENT, (LABELS, "--method supervised --prototypes joint")]),
}
SEEDS = [0, 1, 2]
# rows of "instrument" whose spread over seeds is a claim
FIVE_SEEDS = [f"{system}, default length" for system in SYSTEMS]
# with CIFAR-10 at 5,000 to 50 images, 4 classes are head, 3 medium and 3 tail; of the built-in
# images no class is head, as each has at most 1,000
GROUP_LIMITS = ["--head", "1000", "--tail", "200"]
PROBED = ["--steps", "100"]  # steps of the attentive probe
SEGMENTED = ["--train-images", "500", "--test-images", "250"]  # half of what lab.eval_dense takes

# (column of the file, its title in the table, digits)
MEASURES = [("knn", "k-NN", 1), ("unique_0.025", "unique(.025)", 3),
            ("unique_0.5", "unique(.5)", 3), ("ceiling_0.5", "ceiling(.5)", 3), ("used", "used", 3),
            ("perplexity", "perplexity", 3), ("drift", "drift", 3)]
# of the vectors and of their logits, beside the prototypes
VECTORS = [("h_rank", "rank h", 1), ("h_cosine", "cos h", 2), ("z_sd", "sd z", 2),
           ("ms_per_step", "ms/step", 0)]
GROUPS = [("knn_head", "head", 1), ("knn_medium", "medium", 1), ("knn_tail", "tail", 1)]
# of patches: their prototypes, and what the network knows of them, by lab/eval_dense.py
PATCHES = [("miou", "mIoU", 1),
           *[(f"patch_{column}", title, digits) for column, title, digits in MEASURES[2:]],
           ("patch_place_nats", "place", 2), ("patch_place_nats_shuffled", "shuffled", 2)]
# of CAPI: its features and targets, and its second set of prototypes
TARGETS = [("attentive", "attentive", 1), ("target_entropy", "entropy of targets", 2),
           ("entropy_floor", "about at least", 2), ("place_nats", "place", 2),
           ("place_nats_shuffled", "shuffled", 2)]
STUDENTS = [(f"student_{column}", title, digits) for column, title, digits in MEASURES[1:]]
# what untrained weights and raw pixels reach
CONTROLS = ["raw_knn", "untrained_knn", "raw_miou", "untrained_miou"]
# block: the flags after --; command: the script of the run and its flags
FIELDS = ["row", "seed", "block",
          *dict.fromkeys(column for column, _, _ in
                         MEASURES + VECTORS + GROUPS + PATCHES + TARGETS + STUDENTS),
          "ceiling_0.025", "h_norm", *CONTROLS, "steps", "command", "hardware", "torch", "date",
          "data_version"]


def parts(name):
    """[(heading or "", measures as in MEASURES)]: a table of runs is shown as one Markdown table,
    or as several where it has two kinds of prototypes. They are at most 100 columns wide."""
    if name == "dense":
        of_class = [m for m in MEASURES if m[0] != "unique_0.025"] + VECTORS[:1]
        return [("class tokens", of_class), ("patches", PATCHES)]
    if name == "capi":
        return [("features", [MEASURES[0], PATCHES[0], TARGETS[0]]), ("targets", TARGETS[1:]),
                ("teacher's clusters", MEASURES[1:]), ("student's set", STUDENTS)]
    if name == "space":
        ceiling, = (m for m in MEASURES if m[0] == "ceiling_0.5")  # of random vectors
        return [("", [m for m in MEASURES if m != ceiling]), ("vectors", [ceiling, *VECTORS])]
    if name == "longtail":
        return [("", MEASURES[:1] + GROUPS + [m for m in MEASURES[1:] if m[0] != "ceiling_0.5"])]
    return [("", MEASURES)]


def measures(name):
    """All that a table shows, as in MEASURES."""
    return [measure for _, part in parts(name) for measure in part]


# ---- commands ----------------------------------------------------------------------------------
class Run(NamedTuple):
    """One run of a table."""
    row: str
    seed: int
    script: str  # train.py or zoo/NAME.py
    flags: list  # of that script; --out and --resume come on top


def runs(name, seeds, extra):
    """[Run] of a table; seeds: those of every row, None: the usual ones; extra: more flags."""
    result = []
    for row, command in TABLES[name][1]:
        of_row = seeds or (range(5) if name == "instrument" and row in FIVE_SEEDS else SEEDS)
        words = shlex.split(command)
        script = words.pop(0) if words and words[0].startswith("zoo/") else "train.py"
        result += [Run(row, seed, script, [*words, *extra, "--seed", str(seed)]) for seed in of_row]
    return result


def module_of(script):
    """"zoo.NAME" of zoo/NAME.py."""
    return script.removesuffix(".py").replace("/", ".")


def command_line(run, out):
    """What follows `python` on the command line of a run into the folder `out`."""
    script = ["train.py"] if run.script == "train.py" else ["-m", module_of(run.script)]
    return [*script, *run.flags, "--out", out]


def folder(args, run, block):
    """Where a run is kept: DIR/TABLE/ROW-sSEED, with a number for the flags after --."""
    name = re.sub(r"[^\w.+]+", "-", run.row).strip("-")
    if block:
        name += f"-{zlib.crc32(block.encode()):08x}"
    return os.path.join(args.runs, args.table, f"{name}-s{run.seed}")


# ---- one run -----------------------------------------------------------------------------------
def train(args, run, out, block):
    """One run to its end, in the folder `out`. Returns what the file holds of it, {field: value}.

    ValueError if the run fails.
    """
    command = [sys.executable, *command_line(run, out), "--resume"]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        raise ValueError(f"{run.row}, seed {run.seed}: {run.script} ended with exit code {code}; "
                         "run the same command again to go on from there")
    result = {"row": run.row, "seed": run.seed, "block": block, **last_evaluation(out)}
    if args.table == "longtail":
        result |= accuracy_of_groups(out)
    if args.table in ("dense", "capi") and read_args(out)["data"] in eval_dense.IMAGES:
        result |= segmentation(out)
    if args.table == "capi":
        result["attentive"] = attentive_accuracy(out)
    return result | {"command": shlex.join([run.script, *run.flags]), "hardware": hardware(),
                     "date": datetime.date.today().isoformat()}


def refuse_another_run(run, out):
    """ValueError if `out` holds a run of another script or with other flags.

    --resume takes the flags of the folder, and the table would then name flags that did not run.
    Flags that cannot be end the process, as they do in the run's own script.
    """
    old = read_args(out) if os.path.exists(os.path.join(out, "args.json")) else {}
    script = old.get("script", "train.py")
    if old and script != run.script:
        raise ValueError(f"{out} holds a run of {script}, not of {run.script}; move it away")
    parse, flags = config.parse, None
    if run.script != "train.py":  # a script with flags of its own has its own `parse`
        module = importlib.import_module(module_of(run.script))
        parse, flags = getattr(module, "parse", parse), getattr(module, "flags", flags)
    new = vars(parse(run.flags))
    old = {flag: value for flag, value in old.items() if flag in new}
    if old and (changed := config.differences(old, new, flags)):
        raise ValueError(f"{out} holds a run with other flags ({', '.join(changed)}); move it away")


def read_args(out):
    """The flags of the run in the folder `out`, from its args.json; ValueError if it is damaged."""
    path = os.path.join(out, "args.json")
    try:
        with open(path, **TEXT) as f:
            args = json.load(f)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(args, dict):
        raise ValueError(f"{path} does not hold the flags of a run")
    return args


def last_evaluation(out):
    """The last evaluation in the log of a finished run, and the controls in its row of step 0; the
    log of a run that was resumed without its old one has no such row."""
    columns = [column for column, _, _ in MEASURES] + ["ceiling_0.025", "h_norm"]
    log = read(os.path.join(out, "log.csv"), ["step", "images_per_s", *columns])
    evaluated = [row for row in log if row["used"]]
    if not evaluated:
        raise ValueError(f"{out}/log.csv has no row of an evaluation")
    last, args = evaluated[-1], read_args(out)
    untrained = log[0] if log[0]["step"] == "0" else {}
    speeds = [float(row["images_per_s"]) for row in log if row["images_per_s"]]
    # some runs have no patches, and some are older than a column
    where_there = {column: last.get(column, "")
                   for column, _, _ in VECTORS + PATCHES + TARGETS + STUDENTS}
    return where_there | {column: last[column] for column in columns} | {
        "ms_per_step": f"{1000 * args['batch_size'] / statistics.median(speeds):.4g}",
        "raw_knn": untrained.get("raw_knn", ""), "untrained_knn": untrained.get("knn", ""),
        "steps": last["step"],
        "torch": args.get("torch", ""), "data_version": args.get("data_version") or ""}


def accuracy_of_groups(out):
    """k-NN (k 20) of head, medium and tail classes in the whole test split, by eval_knn.py."""
    command = [sys.executable, "eval_knn.py", out, "--k", "20", *GROUP_LIMITS]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError(f"eval_knn.py of {out} failed")
    file, groups = os.path.join(out, "results.csv"), ("head", "medium", "tail")
    results = [row for row in read(file, ["result", *groups]) if row["result"] == "k=20"]
    if not results:
        raise ValueError(f"{file} has no row of k=20")
    return {f"knn_{group}": results[-1][group] for group in groups}


def segmentation(out):
    """mIoU of k-NN on patches, by lab/eval_dense.py."""
    command = [sys.executable, "-m", "lab.eval_dense", out, "--probe", "knn", *SEGMENTED]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError(f"lab.eval_dense of {out} failed")
    file = os.path.join(out, "results_dense.csv")
    found = {row["result"]: row["miou"] for row in read(file, ["result", "miou"])}
    return {"miou": found["backbone knn"], "untrained_miou": found["untrained knn"],
            "raw_miou": found["pixels knn"]}


def attentive_accuracy(out):
    """Percent of the test images that an attentive probe classifies rightly, by eval_linear.py."""
    command = [sys.executable, "eval_linear.py", out, "--protocol", "attentive", *PROBED]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError(f"eval_linear.py of {out} failed")
    rows = read(os.path.join(out, "results.csv"), ["protocol", "result", "all"])
    return [row["all"] for row in rows if row["protocol"].endswith(" attentive")][-1]


# ---- the file and the printed table ------------------------------------------------------------
def read(file, columns):
    """The rows of a csv file as dicts of text; none where there is no file.

    ValueError if it is no table, or lacks one of these columns.
    """
    if not os.path.exists(file):
        return []
    try:
        with open(file, newline="", **TEXT) as f:
            table = csv.DictReader(f)
            rows, there = list(table), table.fieldnames or []
    except csv.Error as error:
        raise ValueError(f"{file} is not a csv file: {error}") from None
    lacking = [column for column in columns if column not in there]
    if lacking:
        raise ValueError(f"{file} lacks the column {lacking[0]}")
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{file} has rows with more or fewer cells than columns")
    return rows


def read_results(name, file):
    """The rows of a table's file, as `add` wrote them; ValueError for another file."""
    numbers = ["raw_knn", "untrained_knn", *[column for column, _, _ in measures(name)]]
    results = read(file, ["row", "seed", "block", "steps", "hardware", "torch", "date", *numbers])
    if results and not rows_of_table(name, results):
        raise ValueError(f"{file} has no row of the table {name}")
    for result in results:
        for column in numbers:
            try:
                float(result[column] or 0)
            except ValueError:
                raise ValueError(f"{file}: {column} {result[column]!r} is no number") from None
    return results


def rows_of_table(name, results):
    """The results of rows that the table has; a file may have more, of an earlier version of it."""
    rows = [row for row, _ in TABLES[name][1]]
    return [result for result in results if result["row"] in rows]


def add(file, results, result):
    """Write the results and one more; the old file stays whole until the new one is."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*results, result])
    write(file, lambda f: f.write(text.getvalue().encode(**TEXT)))


def is_done(run, block, results):
    """Whether the results hold this run with the flags `block` after --."""
    done = {(result["row"], result["seed"], result["block"]) for result in results}
    return (run.row, str(run.seed), block) in done


def blocks(results):
    """{block: {row: [results, one a seed]}} of the file's rows."""
    out = {}
    for result in results:
        out.setdefault(result["block"], {}).setdefault(result["row"], []).append(result)
    return out


def mean(results, column, digits):
    """Mean over the results that have the column, as text; "-" if none has."""
    values = [float(result[column]) for result in results if result.get(column)]
    return f"{statistics.mean(values):.{digits}f}" if values else "-"


def deviation(results, column, digits):
    """Standard deviation over the results that have the column, as text; "" for fewer than two."""
    values = [float(result[column]) for result in results if result.get(column)]
    return f"{spread(values):.{digits}f}" if len(values) > 1 else ""


def spread(values):
    """Standard deviation of at least two numbers; nan where one is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def table(name, results):
    """The Markdown text of a finished table, block by block."""
    return "\n".join(line for block, rows in blocks(rows_of_table(name, results)).items()
                     for line in lines_of_block(name, block, rows))


def lines_of_block(name, block, rows):
    """[line] for the rows {row: [results]} of one block: what it is, and its tables.

    A row holds means over seeds, and the row below it, "± sd", their standard deviations.
    """
    order = [row for row, _ in TABLES[name][1] if row in rows]
    results = [result for row in order for result in rows[row]]
    command = f"python -m lab.ablate {name}" + (f" -- {block}" if block else "")
    steps = " and ".join(sorted({result["steps"] for result in results},
                                key=lambda number: (len(number), number)))
    hardware = " and ".join(sorted({result["hardware"] for result in results}))
    raw, untrained = mean(results, "raw_knn", 1), mean(results, "untrained_knn", 1)
    notes = [f"* {TABLES[name][0]}",
             f"* {steps} steps; k-NN of raw pixels {raw}, of the untrained backbone {untrained}",
             f"* {hardware}, torch {results[0]['torch']}, "
             f"{max(result['date'] for result in results)}"]
    if any(result.get("raw_miou") for result in results):
        raw, untrained = mean(results, "raw_miou", 1), mean(results, "untrained_miou", 1)
        notes.insert(2, f"* mIoU of raw pixels {raw}, of the untrained backbone {untrained}")
    lines = [f"`{command}`", "", *wrapped(notes)]
    for heading, shown in parts(name):
        lines += ["",
                  f"| {heading or 'row'} | runs | {' | '.join(title for _, title, _ in shown)} |",
                  "|---|---|" + "---|" * len(shown)]
        for row in order:
            cells = [mean(rows[row], column, digits) for column, _, digits in shown]
            lines.append(f"| {row} | {len(rows[row])} | {' | '.join(cells)} |")
            if len(rows[row]) > 1:
                cells = [deviation(rows[row], column, digits) for column, _, digits in shown]
                lines.append(f"| ± sd | | {' | '.join(cells)} |")
    return [*lines, "", *wrapped(verdict(rows) if name == "instrument" else [])]


def wrapped(items):
    """The lines of items "* ...", at most 98 columns wide."""
    return [line for item in items for line in textwrap.wrap(item, 98, subsequent_indent="  ")]


def verdict(rows):
    """[line]: what the rows {row: [results]} of the table "instrument" say of the default run.

    A claim that lacks a run says so.
    """
    def knn(row):
        """{seed: k-NN} of a row."""
        return {result["seed"]: float(result["knn"]) for result in rows.get(row, [])
                if result["knn"]}

    def line(claim, values, least=-math.inf, most=math.inf):
        if None in values.values():
            return f"* {claim}: not run"
        met = all(least <= value <= most for value in values.values())
        told = ", ".join(f"{name} {value:.1f}" for name, value in values.items())
        return f"* {claim}: {'met' if met else 'NOT MET'} ({told})"

    def difference(a, b):
        """Mean of a - b over the seeds that both have; None without one."""
        shared = a.keys() & b.keys()
        return statistics.mean(a[seed] - b[seed] for seed in shared) if shared else None

    third, default, three = ({s: knn(f"{s}, {length}") for s in SYSTEMS} for length in LENGTHS)
    controls = {s: {r["seed"]: max(float(r["raw_knn"] or 0), float(r["untrained_knn"] or 0))
                    for r in rows.get(f"{s}, default length", [])} for s in SYSTEMS}
    lines = [
        line("(a) three times the length gains, or loses at most 0.5 points",
             {s: difference(three[s], default[s]) for s in SYSTEMS}, least=-0.5),
        line("(a) the default length gains on a third of it, or loses at most 0.5 points",
             {s: difference(default[s], third[s]) for s in SYSTEMS}, least=-0.5),
        line("(b) standard deviation over seeds at most 1.5 points",
             {s: spread(list(default[s].values())) if len(default[s]) > 1 else None
              for s in SYSTEMS}, most=1.5),
        line("(c) at least 20 points above raw pixels and the untrained backbone",
             {s: difference(default[s], controls[s]) for s in SYSTEMS}, least=20),
        line("(d) at most 88 % at the default length",
             {s: statistics.mean(default[s].values()) if default[s] else None
              for s in SYSTEMS}, most=88),
        line("(d) labels reach at least 5 points more",
             {s: difference(knn(LABELS), default[s]) for s in SYSTEMS}, least=5)]
    return [*lines, ""]


def draw(name, results, file):
    """The picture of a table. ValueError without matplotlib."""
    rows = rows_of_table(name, results)
    if name == "space":
        columns = ("knn", "unique_0.5", "used")
        by_block = blocks(rows)
        # runs without flags after --; the first block of the file if there are none
        first = by_block.get("") or next(iter(by_block.values()))
        means = {row: {column: float(mean(first[row], column, 6)) for column in columns}
                 | {"knn_sd": float(deviation(first[row], "knn", 6) or 0)}
                 for row, _ in TABLES[name][1]
                 if row in first and all(first[row][0][column] for column in columns)}
        plots.space(means, file)
    else:
        order = [row for row, _ in TABLES[name][1]]
        plots.ablation(order, blocks(rows), measures(name), file)


# ---- command line ------------------------------------------------------------------------------
def parser():
    tables = "; ".join(f"{name}: {what}" for name, (what, _) in TABLES.items())
    p = argparse.ArgumentParser("python -m lab.ablate", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("table", choices=TABLES, help=tables)
    flag("--seeds", type=int, nargs="+", help="seeds of every row; None: 0 1 2, and 0 to 4 for the "
         "default length in the table instrument")
    flag("--rows", nargs="+", metavar="ROW", help="only these rows of the table, by name")
    flag("--runs", default="runs", metavar="DIR", help="folder of the runs, DIR/TABLE/ROW-sSEED")
    flag("--results", default="results", metavar="DIR", help="folder of TABLE.csv and TABLE.png")
    flag("--dry-run", action="store_true", help="print the commands and leave")
    flag("--show", action="store_true", help="print and draw the table from its file, run nothing")
    return p


def main(argv=None):
    """Run a table. Returns the rows of its file as dicts; bad input: one sentence, exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    args, extra = parser().parse_args(argv[:end]), argv[end + 1:]
    with one_sentence("lab.ablate"):
        return ablate(args, extra)


def ablate(args, extra):
    check_values(args, [("not be negative", lambda v: v >= 0, ["seeds"])])
    if {"--seed", "--out", "--resume"} & set(extra):
        raise ValueError("--seed, --out and --resume are set for each run: use --seeds and --runs")
    names = [row for row, _ in TABLES[args.table][1]]
    for row in args.rows or []:
        if row not in names:
            raise ValueError(f"--rows {row!r} is not a row of {args.table}; there are: "
                             f"{', '.join(names)}")
    file = os.path.join(args.results, f"{args.table}.csv")
    block = shlex.join(extra)
    todo = [run for run in runs(args.table, args.seeds, extra)
            if not args.rows or run.row in args.rows]
    results = read_results(args.table, file)
    if args.dry_run:
        for run in todo:
            print(shlex.join(["python", *command_line(run, folder(args, run, block))]))
        return results
    if not args.show:
        for run in todo:  # all of them before the first one starts
            if not is_done(run, block, results):
                refuse_another_run(run, folder(args, run, block))
        os.makedirs(args.results, exist_ok=True)
        for n, run in enumerate(todo, 1):
            if not is_done(run, block, read_results(args.table, file)):
                print(f"== {args.table} {n}/{len(todo)}: {run.row}, seed {run.seed}", flush=True)
                result = train(args, run, folder(args, run, block), block)
                add(file, read_results(args.table, file), result)
        results = read_results(args.table, file)
    if not results:
        raise ValueError(f"{file} holds no results yet")
    print("\n" + table(args.table, results))
    try:
        draw(args.table, results, f"{file[:-4]}.png")
    except ValueError as error:  # no matplotlib
        print(f"no picture: {error}")
    return results


if __name__ == "__main__":
    main()
