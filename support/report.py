"""
The command line of collapse.py: what to measure of which file, and how to print it.

    python collapse.py RUN|FILE [RUN|FILE ...] [--eps 0.025,0.5] [--plot fig.png] [--json -] [--fail-below 0.5]
"""
import argparse
import contextlib
import csv
import functools
import json
import os
import sys

import torch

from support import checkpoints
from support import plots
from collapse import (check_eps, drift, effective_rank, leaders, neighbours, random_directions, random_order_unique,
                      unique_counts, unit_rows)

SWEEP = [round(.025 * i, 3) for i in range(21)]  # Fig. 3a: 0 to 0.5
QUANTILES = (.01, .25, .5, .75, .99)  # of the nearest neighbour's cosine
SHARE = "{:.1%}"
RUN_COLUMNS = {"run": "{}", "method": "{}", "prototypes": "{}", "K": "{:,}", "step": "{:,}", "knn": "{:.1f}",
               "unique_0.025": SHARE, "unique_0.5": SHARE, "ceiling_0.5": SHARE, "used": SHARE, "perplexity": SHARE,
               "drift": "{:.3g}"}


# ---- measuring -------------------------------------------------------------------------------------------------------
def describe(C, eps_list, orders=5, seed=0, progress=False):
    """Every measure of one prototype set C (K, D) as plain numbers; shares are of the M rows that are not zero.
    Rows without a neighbour are unique in any order, so only the others are counted and shuffled."""
    C, eps_list = torch.as_tensor(C), check_eps(eps_list)
    nearest, graph = neighbours(C, eps_list, progress)
    M = len(nearest)
    if not M:
        raise ValueError(f"all {len(C)} prototypes are zero rows: they have no direction to compare")
    rows = unit_rows(C)[1][graph[eps_list[-1]][0]]  # indices in C of the rows with a neighbour
    owners = leaders(C[rows], eps_list, progress) if len(rows) else {eps: rows for eps in eps_list}
    shuffled = random_order_unique(C[rows], eps_list, orders, seed) if len(rows) and orders else {}
    out = {"K": len(C), "D": C.shape[1], "zero_rows": len(C) - M, "effective_rank": effective_rank(C), "eps": {},
           "nearest_cosine": {q: float(nearest.double().quantile(q)) for q in QUANTILES} if M > 1 else {}}
    for eps in eps_list:
        has, component = graph[eps]
        sizes = owners[eps].bincount().sort(descending=True)[0] if len(rows) else rows
        alone = M - len(rows)
        unique = alone + int((sizes > 0).sum())
        mean, sd = shuffled.get(eps, (unique - alone, 0.))
        out["eps"][eps] = {"unique": unique, "share": unique / M, "any_order_mean": float(alone + mean),
                           "any_order_sd": sd,
                           "components": len(component.unique()), "with_neighbour": int(has.sum()),
                           "largest_groups": [n for n in sizes[:5].tolist() if n > 1]}
    return out


def verdict(share, K, D, eps):
    """One sentence: does a count at eps mean anything at this (K, D)? share: unique share of random directions."""
    if share > .99:
        most = "all" if share == 1 else f"{100 * share:.2f} % of"
        return (f"At D = {D}, {most} {K:,} random directions are unique at eps {eps:g}: a smaller share shows "
                f"collapse, but reaching it does not show that the prototypes were learned or used.")
    return (f"At D = {D}, only {100 * share:.3g} % of {K:,} random directions are unique at eps {eps:g}: "
            f"compare the count with that, not with 100 %.")


@functools.lru_cache  # one measurement for all sets of the same shape
def baseline(K, D, eps_list, orders, seed):
    """describe() of K random directions in D dimensions: what the same measures show where nothing was learned."""
    return describe(random_directions(K, D, seed), eps_list, orders, seed, progress=True)


# ---- runs of ours ----------------------------------------------------------------------------------------------------
def read_log(path):
    """The evaluated rows of a run directory's log.csv as [{column: float}]; [] for files and for runs without a log."""
    log = os.path.join(path, "log.csv")
    if not os.path.isfile(log):
        return []
    try:
        with open(log, newline="") as file:
            rows = [{k: float(v) for k, v in row.items() if k and v} for row in csv.DictReader(file)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{log}: not a table of numbers ({error})") from None
    return [row for row in rows if "step" in row and ("knn" in row or any(k.startswith("unique_") for k in row))]


def run_row(path, label, log):
    """A line of the table of runs: the last evaluated row of log.csv, and what the checkpoint or args.json know."""
    row, args = {}, {}
    if os.path.isfile(os.path.join(path, "ckpt.pt")):
        saved = checkpoints.read(path)
        args, own, row["step"] = saved.get("args", {}), saved.get("prototypes", {}), saved.get("step")
        if isinstance(own, dict) and "start" in own:
            row["drift"] = drift(own["vectors"], own["start"])
    elif os.path.isfile(os.path.join(path, "args.json")):
        with open(os.path.join(path, "args.json")) as file:
            args = json.load(file)
    if log:
        row |= log[-1]
    row |= {"run": label, "K": args.get("num_prototypes")} | {k: args.get(k) for k in ("method", "prototypes")}
    return {k: int(row[k]) if k in ("K", "step") and row.get(k) is not None else row.get(k) for k in RUN_COLUMNS}


def names(paths):
    """The last part of each path, with more parts in front where two would be the same."""
    parts = [os.path.normpath(os.path.abspath(p)).split(os.sep) for p in paths]
    n = next(n for n in range(1, 99) if len({tuple(p[-n:]) for p in parts}) == len({tuple(p) for p in parts}))
    return ["/".join(p[-n:]) for p in parts]


def over_training(sets):
    """Checkpoints of one folder, in order of their step or epoch, as the rows that a log.csv would have."""
    runs, axis = {}, "step"
    for one in sets:
        saved = checkpoints.read(one["file"])
        axis = next((k for k in ("step", "epoch") if isinstance(saved, dict) and k in saved), None)
        if axis is None:
            raise ValueError(f"{one['file']}: no step or epoch inside, so it has no place on a curve over training")
        folder = os.path.dirname(os.path.abspath(one["file"])) + (f" {one['set']}" if one["several"] else "")
        row = {axis: float(saved[axis])} | {f"unique_{eps:g}": e["share"] for eps, e in one["eps"].items()}
        runs.setdefault(folder, []).append(row)
    order = [(name, sorted(rows, key=lambda row: row[axis])) for name, rows in zip(names(runs), runs.values())]
    return order, axis


# ---- printing --------------------------------------------------------------------------------------------------------
def table(head, rows):
    """Aligned text: the first column to the left, the others to the right; None shows as -."""
    cells = [head] + [["-" if c is None else str(c) for c in row] for row in rows]
    width = [max(map(len, column)) for column in zip(*cells)]
    rows = [[f"{c:{'<>'[i > 0]}{w}}" for i, (c, w) in enumerate(zip(row, width))] for row in cells]
    return "\n".join("  ".join(row).rstrip() for row in rows)


def show(result):
    if result["runs"]:
        head = [c.replace("_", " ").replace("knn", "k-NN") for c in RUN_COLUMNS]
        print(table(head, [[None if row[c] is None else form.format(row[c]) for c, form in RUN_COLUMNS.items()]
                           for row in result["runs"]]) + "\n")
    counts, spread = [], []
    shapes = {(one["random"]["K"], one["D"]): ("random directions", one["random"]) for one in result["sets"]}
    for who, m in [(one["label"], one) for one in result["sets"]] + list(shapes.values()):
        for i, (eps, e) in enumerate(m["eps"].items()):
            counts.append(["" if i else who, "" if i else f"{m['K']:,} x {m['D']}", f"{eps:g}", f"{e['unique']:,}",
                           f"{e['share']:.1%}", f"{e['any_order_mean']:,.1f} ± {e['any_order_sd']:.1f}",
                           f"{e['components']:,}", f"{e['with_neighbour']:,}",
                           " ".join(map(str, e["largest_groups"])) or None])
        cosines = [f"{v:.3f}" for v in m["nearest_cosine"].values()] or [None] * len(QUANTILES)
        spread.append([who, *cosines, f"{m['effective_rank']:.1f} of {min(m['K'], m['D'])}"])
    if counts:
        print(table(["prototype set", "K x D", "eps", "unique", "share", "any order", "components", "with neighbour",
                     "largest groups"], counts) + "\n")
        print(table(["cosine to the nearest", *(f"{100 * q:g} %" for q in QUANTILES), "effective rank"], spread) + "\n")
    for one in result["sets"]:
        if one["zero_rows"]:
            print(f"{one['label']}: {one['zero_rows']} of {one['K']} prototypes are zero rows, left out of every count")
    print("\n".join(dict.fromkeys(line for one in result["sets"] for line in one["verdict"])))
    for label, d in result["data"].items():
        print(f"\n{label} on {d['images']:,} images of {d['data']} (evaluation mode, no augmentation): "
              f"used {d['used']:.1%}, perplexity {d['perplexity']:.1%}, "
              f"assignment entropy {d['entropy']:.3f} nats ({d['entropy_over_ln_k']:.1%} of ln K)")
        for what, title in ("groups", "class size"), ("classes", "class"):
            print(table([title, "images", "used prototypes"], [[name, f"{v['images']:.1%}", f"{v['prototypes']:.1%}"]
                                                               for name, v in d.get(what, {}).items()]))


def write_csv(sets, file):
    """One line per prototype set and eps; random_* are the same numbers for random directions."""
    rows = []
    for one in sets:
        for eps, e in one["eps"].items():
            row = {k: one[k] for k in ("file", "set", "K", "D", "zero_rows", "effective_rank")} | {"eps": eps}
            row |= {f"nearest_cosine_{q:g}": v for q, v in one["nearest_cosine"].items()}
            for prefix, values in ("", e), ("random_", one["random"]["eps"][eps]):
                row |= {prefix + k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in values.items()}
            rows.append(row)
    with open(file, "w", newline="") as out:
        write = csv.DictWriter(out, list(dict.fromkeys(k for row in rows for k in row)))
        write.writeheader()
        write.writerows(rows)


# ---- command line ----------------------------------------------------------------------------------------------------
def parser():
    p = argparse.ArgumentParser("collapse.py", allow_abbrev=False, description="How many prototypes of a checkpoint "
                                "are unique (Def. 2.1), beside the numbers that show what such a count is worth.")
    p.add_argument("paths", nargs="+", metavar="PATH", help="run directory, or a checkpoint, .npy, .npz, .safetensors")
    p.add_argument("--eps", default="0.025,0.5", metavar="LIST", help="duplicates are 1 - cos < eps (%(default)s)")
    p.add_argument("--key", metavar="NAME", help="dotted name of the (K, D) tensor, for a layout not known")
    p.add_argument("--orders", type=int, default=5, metavar="N", help="random orders to count in (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the random orders and random directions (%(default)s)")
    p.add_argument("--plot", metavar="FILE", help="draw a picture (needs matplotlib)")
    p.add_argument("--picture", choices=("auto", "training", "sweep", "fig1"), default="auto",
                   help="training: Fig. 4a; sweep: Fig. 3a, unique against eps; fig1: where prototypes lie; "
                        "auto: training where there is a log.csv, else sweep")
    p.add_argument("--json", metavar="FILE", help="all numbers; - prints them instead of the tables")
    p.add_argument("--csv", metavar="FILE", help="a line per prototype set and eps")
    p.add_argument("--fail-below", type=float, metavar="SHARE", help="exit code 1 if a set is less unique at any eps")
    p.add_argument("--data", metavar="NAME|FOLDER", help="runs of ours: which prototypes win these images")
    p.add_argument("--assign", metavar="FILE.csv", help="with --data and one run: path, prototype, probability")
    p.add_argument("--montage", metavar="FILE.png", help="with --data and one run: images nearest to some prototypes")
    return p


def run(args):
    try:
        eps_list = check_eps([float(word) for word in args.eps.split(",")])
    except ValueError:
        raise ValueError(f"--eps {args.eps} is not a list of numbers in [0, 2], as in 0.025,0.5") from None
    if args.fail_below is not None and not 0 <= args.fail_below <= 1:
        raise ValueError(f"--fail-below {args.fail_below} must be a share in [0, 1]")
    if (args.assign or args.montage) and (not args.data or len(args.paths) > 1):
        raise ValueError("--assign and --montage need --data and exactly one run")
    result, logs, vectors = {"runs": [], "sets": [], "data": {}}, [], {}
    for path, name in zip(args.paths, names(args.paths)):
        log = read_log(path)
        if os.path.isdir(path) and (log or os.path.isfile(os.path.join(path, "ckpt.pt"))):
            result["runs"].append(run_row(path, name, log))
        if log:
            logs.append((name, log))
            if not os.path.isfile(os.path.join(path, "ckpt.pt")):
                continue  # a log alone can still be drawn
        sets = checkpoints.load_prototypes(path, args.key)
        for which, C in sets.items():
            label = name + (f" {which}" if len(sets) > 1 else "")
            vectors[label] = C
            try:
                one = describe(C, eps_list, args.orders, args.seed, True)
            except ValueError as error:
                raise ValueError(f"{path}, {which}: {error}") from None
            one |= {"label": label, "file": path, "set": which, "several": len(sets) > 1,
                    "random": baseline(one["K"] - one["zero_rows"], one["D"], tuple(eps_list), args.orders, args.seed)}
            one["verdict"] = [verdict(e["share"], one["random"]["K"], one["D"], eps)
                              for eps, e in one["random"]["eps"].items()]
            result["sets"].append(one)
        if args.data:
            from support import assign
            result["data"][name] = assign.assigned(path, args.data, eps_list, args.assign, args.montage)
    if args.json:
        with contextlib.nullcontext(sys.stdout) if args.json == "-" else open(args.json, "w") as file:
            print(json.dumps(result, indent=1), file=file)
    if args.csv:
        write_csv(result["sets"], args.csv)
    if args.json != "-":
        show(result)
    if args.plot:
        draw(args, logs, result["sets"], vectors)
    low = [(one["label"], eps, e["share"]) for one in result["sets"] for eps, e in one["eps"].items()
           if args.fail_below is not None and e["share"] < args.fail_below]
    for label, eps, share in low:
        print(f"collapse.py: {label}: unique({eps:g}) is {share:.4f}, below {args.fail_below:g}", file=sys.stderr)
    return 1 if low else 0


def draw(args, logs, sets, vectors):
    picture = ("training" if logs else "sweep") if args.picture == "auto" else args.picture
    if picture == "training":
        runs, axis = (logs, "step") if logs else over_training(sets)
        plots.training(runs, args.plot, axis)
    elif picture == "fig1":
        plots.fig1([(label, unit_rows(C)[0]) for label, C in vectors.items()], args.plot)
    else:
        def share(C):
            M = len(unit_rows(C)[1])
            return {eps: n / M for eps, n in unique_counts(C, SWEEP, True).items()}, M
        shapes = dict.fromkeys((len(unit_rows(C)[1]), C.shape[1]) for C in vectors.values())
        plots.sweep([(label, *share(C)) for label, C in vectors.items()],
                    [(f"random directions, {K:,} x {D}", *share(random_directions(K, D, args.seed)))
                     for K, D in shapes], args.plot)


def main(argv=None):
    """0, or 1 with --fail-below, or 2 after one sentence about bad input."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"collapse.py: {error}", file=sys.stderr)
        return 2
