"""Tables of runs: every row over several seeds, one process after the other.

    python -m lab.ablate main                            CARP and DINO with every prototype set
    python -m lab.ablate A1 --seeds 0 --dry-run          the commands alone
    python -m lab.ablate C3 --show                       the finished table again, from its file
    python -m lab.ablate main -- --preset cifar10-cpu    what follows -- goes to every run

Start it in the folder of train.py. lab/tables.py says which rows a table has. Results stand in
results/TABLE.csv. A run that stands there is not repeated, and one that was interrupted goes on
from its checkpoint. The table that is printed (lab/tabulate.py) shows mean and standard deviation
over the seeds, and the runs with other flags after -- as a block of their own. A row is only as
good as the control beside it, frozen random prototypes.
"""
import argparse
import datetime
import importlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import zlib
from typing import NamedTuple

import config
from lab import eval_dense
from lab.machine import hardware
from lab.tables import FIVE_SEEDS, MEASURES, PATCHES, SEEDS, STUDENTS, TABLES, TARGETS, VECTORS
from lab.tables import measures
from lab.tabulate import add, draw, is_done, read, read_results, table
from support.errors import one_sentence
from support.files import TEXT
from support.flags import check_values

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# with CIFAR-10 at 5,000 to 50 images, 4 classes are head, 3 medium and 3 tail; of the built-in
# images no class is head, as each has at most 1,000
GROUP_LIMITS = ["--head", "1000", "--tail", "200"]
PROBED = ["--steps", "100"]  # steps of the attentive probe
SEGMENTED = ["--train-images", "500", "--test-images", "250"]  # half of what lab.eval_dense takes


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
    columns = [column for column, _, _ in measures(args.table)]
    if "miou" in columns and read_args(out)["data"] in eval_dense.IMAGES:
        result |= segmentation(out)
    if "attentive" in columns:
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


def evaluated(command, file, columns):
    """The rows that a command of ours adds to a csv file with these columns.

    ValueError if it fails, or adds none, as where the folder cannot be written.
    """
    before = len(read(file, columns))
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError(f"{shlex.join(command[1:])} failed")
    new = read(file, columns)[before:]
    if not new:
        raise ValueError(f"{shlex.join(command[1:])} added no row to {file}")
    return new


def accuracy_of_groups(out):
    """k-NN (k 20) of head, medium and tail classes in the whole test split, by eval_knn.py."""
    command = [sys.executable, "eval_knn.py", out, "--k", "20", *GROUP_LIMITS]
    groups = ("head", "medium", "tail")
    new = evaluated(command, os.path.join(out, "results.csv"), ["result", *groups])
    of_20, = (row for row in new if row["result"] == "k=20")
    return {f"knn_{group}": of_20[group] for group in groups}


def segmentation(out):
    """mIoU of k-NN on patches, by lab/eval_dense.py."""
    command = [sys.executable, "-m", "lab.eval_dense", out, "--probe", "knn", *SEGMENTED]
    new = evaluated(command, os.path.join(out, "results_dense.csv"), ["result", "miou"])
    found = {row["result"]: row["miou"] for row in new}
    return {"miou": found["backbone knn"], "untrained_miou": found["untrained knn"],
            "raw_miou": found["pixels knn"]}


def attentive_accuracy(out):
    """Percent of the test images that an attentive probe classifies rightly, by eval_linear.py."""
    command = [sys.executable, "eval_linear.py", out, "--protocol", "attentive", *PROBED]
    new = evaluated(command, os.path.join(out, "results.csv"), ["all"])
    return new[0]["all"]  # the best of the tried settings


# ---- command line ------------------------------------------------------------------------------
def parser():
    tables = "; ".join(f"{name}: {what}" for name, (what, _) in TABLES.items())
    p = argparse.ArgumentParser("python -m lab.ablate", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("table", choices=TABLES, help=tables)
    flag("--seeds", type=int, nargs="+", help="seeds of every row; None: 0 1 2, and 0 to 4 for the "
         "four systems at the default length in the table instrument")
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
    own = {word.split("=")[0] for word in extra} & {"--seed", "--out", "--resume", "--stop-at",
                                                    "--export"}
    if own:
        raise ValueError("runs of a table go to their ends, with a seed and a folder of their own: "
                         f"{', '.join(sorted(own))} cannot follow --; use --seeds and --runs")
    typed = {word.split("=")[0] for word in extra if word.startswith("--")}

    def setting(flag):  # --steps is a length as --epochs is, and --no-X is a value of X
        return flag.replace("--steps", "--epochs").replace("--no-", "--")
    for row, command in TABLES[args.table][1]:
        of_row = {setting(word) for word in shlex.split(command)}
        told_apart = {flag for flag in typed if setting(flag) in of_row}
        if told_apart and (not args.rows or row in args.rows):
            raise ValueError(f"{', '.join(sorted(told_apart))} makes the row {row!r} of "
                             f"{args.table} what it is, and cannot follow --")
    if args.show and (args.seeds or args.rows or extra):
        raise ValueError("--show prints the whole file: leave out --seeds, --rows and what follows "
                         "--")
    names = [row for row, _ in TABLES[args.table][1]]
    for row in args.rows or []:
        if row not in names:
            raise ValueError(f"--rows {row!r} is not a row of {args.table}; there are: "
                             f"{', '.join(names)}")
    if os.path.realpath(os.getcwd()) != os.path.realpath(ROOT):  # the runs start there
        args.runs = os.path.abspath(args.runs)
    file = os.path.join(args.results, f"{args.table}.csv")
    block = shlex.join(extra)
    todo = [run for run in runs(args.table, args.seeds, extra)
            if not args.rows or run.row in args.rows]
    results = read_results(args.table, file)
    if args.dry_run:
        for run in todo:
            refuse_another_run(run, folder(args, run, block))
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
    except ValueError as error:  # no matplotlib, or nothing to draw
        print(f"no picture: {error}")
    return results


if __name__ == "__main__":
    main()
