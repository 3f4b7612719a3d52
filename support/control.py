"""The control of a run: the same run with frozen prototypes, which are random and never move.

What such a run reaches too is no merit of the prototypes.
"""
import contextlib
import csv
import functools
import glob
import io
import os
import shlex
import statistics

import config
import losses
from presets import PRESETS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def flags_of_control(args):
    """{flag: value} of what decides the results of a run's control, apart from the seed."""
    free = config.FREE - {"data"} | {"preset", "prototypes", "seed"}
    free |= {"epochs" if args.steps else "steps"}  # --steps wins over --epochs
    free |= config.not_read(args.method, ["frozen"]).keys()
    # frozen prototypes do not read --gmm-start, and the partition of carl is always K
    free |= {"gmm_start"} | ({"partition_size"} if args.method == "carl" else set())
    return {name: value for name, value in vars(args).items() if name not in free}


@functools.cache  # a table holds the same command more than once, and a test asks again and again
def interpret(*words):
    """The args of a command line, unchecked: it need not be able to run here and now. Do not
    change them: the next caller gets the same object."""
    p = config.parser()
    preset = p.parse_args(words).preset
    p.set_defaults(**PRESETS[preset])
    args = p.parse_args(words)
    config.complete(args)
    return args


def typed(args):
    """[words] of a command line that gives the args that decide the results of a control."""
    words = [] if args.preset == "tiny" else ["--preset", args.preset]
    # defaults depend on the method, so they are those of this run's; the method itself is typed
    # where the preset has another one
    base = dict(vars(interpret(*words, "--method", args.method)))
    wanted = flags_of_control(args).keys() | {"seed", "data_root"}
    base["method"] = interpret(*words).method
    for action in config.parser()._actions:
        name, value = action.dest, vars(args).get(action.dest)
        if name not in wanted or value == base[name]:
            continue
        if isinstance(value, bool):
            words.append(action.option_strings[0 if value else -1])
        else:
            values = value if isinstance(value, list) else [value]
            words += [action.option_strings[0], *map(str, values)]
    return words


def has_own_flags(args):
    """Whether the script of a run has flags that train.py lacks, so that its command line cannot be
    read or written here."""
    return not flags_of_control(args).keys() <= vars(config.parser().parse_args([])).keys()


def command(args):
    """The command line of a run's control, for a script without flags of its own."""
    script = "train.py" if args.script == "train.py" else "-m " + args.script[:-3].replace("/", ".")
    return shlex.join(["python", *script.split(), *typed(args), "--prototypes", "frozen"])


def rows(args, folder):
    """(file, [row]) of the first csv file in `folder` with runs that are the control of this one;
    (None, []) without any.

    A run that has ended must not fail over a file that is no table of ours: it is passed over.
    """
    for file in sorted(glob.glob(os.path.join(folder, "*.csv"))):
        with contextlib.suppress(OSError, ValueError, csv.Error), open(file, newline="") as f:
            if found := [row for row in csv.DictReader(f) if is_control(row, args)]:
                return file, found
    return None, []


def is_control(row, args):
    """Whether a row of a table, {column: text}, is of the control of the run with these args."""
    text = row.get("command") or ""
    if "frozen" not in text or not row.get("unique_0.5"):
        return False
    try:
        words = shlex.split(text)
        float(row["unique_0.5"]), float(row.get("knn") or 0)
    except ValueError:  # a command that no shell could read, or no numbers
        return False
    if words[:1] != [args.script] or "frozen" not in words:
        return False
    methods = [word for flag, word in zip(words, words[1:]) if flag == "--method"]
    if methods and methods[-1] != args.method:
        return False  # before its flags are read, which loads the file of the method
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            other = interpret(*words[1:])
    except SystemExit:  # a flag that is no longer there
        return False
    same_images = row.get("data_version", "") == str(args.data_version or "")
    return same_images and flags_of_control(other) == flags_of_control(args)


def sentence(args, folder=os.path.join(ROOT, "results")):
    """What frozen prototypes reached with the same flags, or the command that finds it out."""
    # the flags that name a kind of prototypes which is not frozen
    kinds = ("prototypes",) if getattr(args, "shared_prototypes", False) else (
        "prototypes", "patch_prototypes")
    moving = [name for name in kinds if getattr(args, name, "frozen") != "frozen"]
    if not moving:
        return "This run is the control of runs with the same flags and other prototypes."
    only_with = losses.loss_class(args.method).only_with
    if only_with:
        return (f"It has no control with frozen prototypes, as --method {args.method} takes its "
                f"targets from --prototypes {only_with}.")
    if has_own_flags(args):
        flags = " or ".join(f"--{name.replace('_', '-')} frozen" for name in moving)
        return ("Its control, the same run with random prototypes, is the same command with\n"
                f"  {flags}, and another --out.")
    file, found = rows(args, folder)
    if not found:
        return ("Its control, the same run with random prototypes, is not in results/:\n"
                f"  {command(args)}")
    knn = [float(row["knn"]) for row in found if row.get("knn")]
    unique = statistics.mean(float(row["unique_0.5"]) for row in found)
    text = f"k-NN {statistics.mean(knn):.1f}" if knn else ""
    text += f" ({min(knn):.1f} to {max(knn):.1f}), " if len(knn) > 1 else ", " if knn else ""
    earlier = "one earlier run" if len(found) == 1 else f"{len(found)} earlier runs"
    return (f"Its control, the same run with random prototypes: {text}unique(.5) {unique:.3f}\n"
            f"  in {earlier} ({os.path.relpath(file, ROOT)}), without your changes; to run it:\n"
            f"  {command(args)}")
