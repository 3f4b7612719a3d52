"""
What `python collapse.py` reads from run directories, and how it prints and writes what it measured.

Nothing is measured here. Everything comes as plain numbers, as collapse.measure collects them:

    {"runs": [a line of RUN_COLUMNS], "sets": [collapse.describe of a set, its label, its control],
     "memories": {name of a set: [M, D]}, "data": {run: support.assign.summary of the run}}
"""
import csv
import io
import json
import math
import os

from support import checkpoints
from support.files import TEXT, write

SHARE = "{:.1%}"
RUN_COLUMNS = {"run": "{}", "method": "{}", "prototypes": "{}", "K": "{:,}", "step": "{:,}",
               "knn": "{:.1f}", "unique_0.025": SHARE, "unique_0.5": SHARE, "ceiling_0.5": SHARE,
               "used": SHARE, "perplexity": SHARE, "drift": "{:.3g}"}


# ---- run directories ----------------------------------------------------------------------------
def read_log(path):
    """The evaluated rows of a run directory's log.csv as [{column: float}]; [] for files and for
    runs without a log. ValueError for a log that is not a table of numbers."""
    log = os.path.join(path, "log.csv")
    if not os.path.isfile(log):
        return []
    rows = []
    try:
        with open(log, newline="", **TEXT) as file:
            for row in csv.DictReader(file):
                rows.append({k: float(v) for k, v in row.items() if k and v})
                if not math.isfinite(rows[-1].get("step", 0)):
                    raise ValueError(f"step {rows[-1]['step']}")
    except (TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{log}: not a table of numbers ({error})") from None
    return [row for row in rows if "step" in row and is_evaluated(row)]


def is_evaluated(row):
    """Whether a row of a log has an evaluation: without labels it has no k-NN, and of a memory no
    unique share."""
    return any(column in ("knn", "used") or column.startswith("unique_") for column in row)


def describe_run(path, name, log, drift):
    """A line of the table of runs, {column of RUN_COLUMNS: value or None}: the last evaluated row
    of log.csv, and what the checkpoint or args.json add. drift: collapse.drift, which is taken of
    the checkpoint where the log has none. ValueError for a checkpoint or log with values of another
    kind than a run has."""
    args, row = {}, {}
    if os.path.isfile(os.path.join(path, "ckpt.pt")):
        saved = checkpoints.read(path)
        saved = saved if isinstance(saved, dict) else {}  # or it is no run of ours
        args = saved.get("args")
        args = args if isinstance(args, dict) else {}
        row["step"] = saved.get("step")
        own = saved.get("prototypes")
        if isinstance(own, dict) and {"vectors", "start"} <= own.keys():
            try:
                row["drift"] = drift(own["vectors"], own["start"])
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                raise ValueError(f"{path}/ckpt.pt is damaged: prototypes.vectors and "
                                 "prototypes.start are not two matrices of one shape") from None
    elif os.path.isfile(os.path.join(path, "args.json")):
        try:
            with open(os.path.join(path, "args.json"), **TEXT) as file:
                args = json.load(file)
        except ValueError:
            args = None
        if not isinstance(args, dict):
            raise ValueError(f"{path}/args.json does not hold the flags of a run")
    if log:
        row |= log[-1]
    row |= {"run": name, "method": args.get("method"), "prototypes": args.get("prototypes"),
            "K": args.get("num_prototypes")}
    for column in "K", "step":
        try:
            row[column] = None if row.get(column) is None else int(row[column])
        except (OverflowError, TypeError, ValueError):
            raise ValueError(f"{path} is damaged: {column} is {row[column]!r} and not a whole "
                             "number") from None
    return {column: row.get(column) for column in RUN_COLUMNS}


def short_names(paths):
    """The last part of each path, with more parts in front where two names would be the same."""
    parts = [os.path.normpath(os.path.abspath(path)).split(os.sep) for path in paths]
    different = len({tuple(p) for p in parts})
    n = 1
    while len({tuple(p[-n:]) for p in parts}) < different:
        n += 1
    return ["/".join(p[-n:]) for p in parts]


def over_training(sets):
    """Checkpoints of one folder, in order of their step or epoch, as the rows that a log.csv would
    have: ([(folder, rows)], "step" or "epoch"). ValueError if not all files store the same one."""
    places = {}  # {file: {"step" or "epoch": number}}; a file may be large and is not kept
    for file in dict.fromkeys(one["file"] for one in sets):
        saved = checkpoints.read(file)
        saved = saved if isinstance(saved, dict) else {}
        places[file] = {axis: float(saved[axis]) for axis in ("step", "epoch")
                        if isinstance(saved.get(axis), (int, float)) and abs(saved[axis]) < 1e300}
    axes = [axis for axis in ("step", "epoch") if all(axis in at for at in places.values())]
    if not axes:
        raise ValueError(f"{', '.join(places)}: neither a step nor an epoch stands in all of these "
                         "files, so they have no place on a curve over training")
    x_axis = axes[0]
    runs = {}  # {folder, and the set where a file has several: rows}
    for one in sets:
        row = {x_axis: places[one["file"]][x_axis]}
        for eps, e in one["eps"].items():
            row[f"unique_{eps:g}"] = e["share"]
        path = os.path.abspath(one["file"])
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        if one["several"]:
            folder += f" {one['set']}"
        runs.setdefault(folder, []).append(row)
    for rows in runs.values():
        rows.sort(key=lambda row: row[x_axis])
    return list(zip(short_names(runs), runs.values())), x_axis


# ---- printing -----------------------------------------------------------------------------------
def table(head, rows):
    """Aligned text: the first column to the left, the others to the right; None shows as -."""
    cells = [head] + [["-" if cell is None else str(cell) for cell in row] for row in rows]
    width = [max(len(cell) for cell in column) for column in zip(*cells)]
    lines = []
    for row in cells:
        aligned = [row[0].ljust(width[0])]
        aligned += [cell.rjust(w) for cell, w in zip(row[1:], width[1:])]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def show(result):
    """Print the tables of everything that was measured."""
    if result["runs"]:
        print(table_of_runs(result["runs"]) + "\n")
    if result["sets"]:
        controls = {}  # one for all sets of the same shape
        for one in result["sets"]:
            controls[one["random"]["K"], one["D"]] = ("random directions", one["random"])
        named = [(one["label"], one) for one in result["sets"]] + list(controls.values())
        print(table_of_counts(named) + "\n")
        print(table_of_cosines(named) + "\n")
    for one in result["sets"]:
        if one["zero_rows"]:
            print(f"{one['label']}: {one['zero_rows']} of {one['K']} prototypes are zero rows, "
                  f"left out of every count")
    sentences = [sentence for one in result["sets"] for sentence in one["verdict"]]
    print("\n".join(dict.fromkeys(sentences)))  # each once
    for name, (M, D) in result["memories"].items():
        print(f"{name}: memory. It has {M:,} x {D}, the last vectors of the teacher, and nothing "
              "to count")
    for run, images in result["data"].items():
        show_images(run, images)


def table_of_runs(runs):
    head = [column.replace("_", " ").replace("knn", "k-NN") for column in RUN_COLUMNS]
    rows = []
    for run in runs:
        rows.append([None if run[column] is None else form.format(run[column])
                     for column, form in RUN_COLUMNS.items()])
    return table(head, rows)


def table_of_counts(named):
    """Unique counts of [(name, collapse.describe of a set)], a line per eps."""
    rows = []
    for name, measures in named:
        for eps, e in measures["eps"].items():
            is_first = eps == min(measures["eps"])
            rows.append([name if is_first else "",
                         f"{measures['K']:,} x {measures['D']}" if is_first else "",
                         f"{eps:g}", f"{e['unique']:,}", f"{e['share']:.1%}",
                         None if e["any_order_mean"] is None else
                         f"{e['any_order_mean']:,.1f} ± {e['any_order_sd']:.1f}",
                         f"{e['components']:,}", f"{e['with_neighbour']:,}",
                         " ".join(str(n) for n in e["largest_groups"]) or None])
    return table(["prototype set", "K x D", "eps", "unique", "share", "any order", "components",
                  "with neighbour", "largest groups"], rows)


def table_of_cosines(named):
    """Quantiles of the cosine to the nearest neighbour, and the effective rank, of the same."""
    quantiles = max((measures["nearest_cosine"] for _, measures in named), key=len)  # {} if K = 1
    rows = []
    for name, measures in named:
        cosines = [f"{cos:.3f}" for cos in measures["nearest_cosine"].values()]
        rank = f"{measures['effective_rank']:.1f} of {min(measures['K'], measures['D'])}"
        rows.append([name, *(cosines or [None] * len(quantiles)), rank])
    return table(["cosine to the nearest", *(f"{100 * q:g} %" for q in quantiles),
                  "effective rank"], rows)


def show_images(run, images):
    """Print what support.assign.summary found of a run."""
    print(f"\n{run} on {images['images']:,} images of {images['data']} (evaluation mode, no "
          f"augmentation): used {images['used']:.1%}, perplexity {images['perplexity']:.1%}, "
          f"assignment entropy {images['entropy']:.3f} nats "
          f"({images['entropy_over_ln_k']:.1%} of ln K)")
    for key, title in ("groups", "class size"), ("classes", "class"):
        if key in images:
            rows = [[name, f"{share['images']:.1%}", f"{share['prototypes']:.1%}"]
                    for name, share in images[key].items()]
            print(table([title, "images", "used prototypes"], rows))


# ---- files --------------------------------------------------------------------------------------
def write_text(text, file):
    """Write a text file, whole or not at all. OSError if it cannot be written."""
    write(file, lambda out: out.write(text.encode(**TEXT)))


def json_text(result):
    """What `show` prints, and all other numbers, as JSON."""
    return json.dumps(result, indent=1) + "\n"


def csv_text(sets):
    """One line per prototype set and eps; random_* are the same numbers for random directions."""
    rows = []
    for one in sets:
        for eps, e in one["eps"].items():
            row = {"file": one["file"], "set": one["set"], "K": one["K"], "D": one["D"],
                   "zero_rows": one["zero_rows"], "effective_rank": one["effective_rank"],
                   "eps": eps}
            for q, cos in one["nearest_cosine"].items():
                row[f"nearest_cosine_{q:g}"] = cos
            for prefix, values in ("", e), ("random_", one["random"]["eps"][eps]):
                for key, value in values.items():
                    if isinstance(value, list):
                        value = " ".join(str(n) for n in value)
                    row[prefix + key] = value
            rows.append(row)
    columns = dict.fromkeys(column for row in rows for column in row)  # in order, each once
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
