"""
Partial prototype collapse (Def. 2.1): how many prototypes of a checkpoint differ, and the measures
that show what such a count is worth.

    python collapse.py RUN [RUN ...] --plot fig.png  # our run directories: tables and curves
    python collapse.py dino_full_checkpoint.pth      # anybody's checkpoint (support/checkpoints.py)

Two prototypes are duplicates at eps when 1 - cos < eps. Def. 2.1 divides the prototypes into parts,
each covered by one representative, and counts the representatives. It leaves open which cover to
take, and the smallest one is NP-hard to find. We take the greedy one: read the prototypes in index
order; a prototype that no representative covers yet becomes one itself, and covers every later
prototype within eps of it that is not covered yet. So representatives are at least eps apart.

C (K, D) prototypes, one per row; A (M, D) those that are not zero, in float64; h (N, D) features;
P (N, K) assignment probabilities. support/report.py prints and writes what is measured here.
"""
import argparse
import functools
import os
import sys

import torch

# Up to this many prototypes the plain search below runs. On one CPU core it takes 0.04 s for 1,024
# and 0.2 s for 2,048. Time and memory grow with the square: 8,192 would take 3 s, and their cosines
# 512 MiB. fast/unique.py gives the same answers for 8,192 in 0.4 s and a fraction of that memory.
PLAIN_UP_TO = 2048
ROUNDING = 1e-14  # float64 cannot tell prototypes closer than this from equal ones


# ---- Def. 2.1 -----------------------------------------------------------------------------------
def covering(A, eps_list):
    """{eps: cover (M,)}: for each row of A (M, D) the index of the representative that covers it,
    which is its own index if it is one. A float64, no zero row. A change here has to be made in
    fast/unique.py too, for more than PLAIN_UP_TO prototypes."""
    squares = A.square().sum(1)  # (M,)
    cos = A @ A.T / (squares[:, None] * squares).sqrt()  # (M, M)
    itself = torch.arange(len(A))  # (M,)
    out = {}
    for eps in eps_list:
        cover = itself.clone()  # (M,)
        if eps > 0:  # at eps = 0 nothing is a duplicate
            duplicate = 1 - cos < max(eps, ROUNDING)  # (M, M); ROUNDING: equal rows always are
            later = duplicate.triu(1).cpu()  # (M, M): row i may cover column j, as it comes earlier
            for i in later.any(1).nonzero()[:, 0].tolist():
                if cover[i] == i:  # nobody else covers i, so it is a representative
                    cover[later[i] & (cover == itself)] = i
        out[eps] = cover.to(A.device)
    return out


def representatives(C, eps_list, progress=False):
    """{eps: (K,)}: for each prototype of C (K, D) the index of the representative that covers it,
    -1 for zero rows, by `covering` or, for many prototypes, its twin in fast/unique.py.
    ValueError for NaN rows or eps outside [0, 2]."""
    A, rows = nonzero_rows(C)  # (M, D), (M,)
    eps_list = valid_eps(eps_list)
    if len(A) <= PLAIN_UP_TO:
        covers = covering(A, eps_list)
    else:
        from fast import unique
        covers = unique.covering(A, eps_list, progress)
    out = {eps: torch.full((len(C),), -1, device=rows.device) for eps in eps_list}
    for eps, cover in covers.items():
        out[eps][rows] = rows[cover]
    return out


def nonzero_rows(C):
    """C (K, D) -> A (M, D), its rows that are not zero, in float64, and their indices in C (M,).

    Each row of A is scaled so that its largest entry lies in [.5, 1), as squares could overflow.
    The scale is a power of two, so nothing is rounded. ValueError for other shapes, NaN and
    infinity."""
    C = torch.as_tensor(C).detach()
    if C.ndim != 2 or not C.numel():
        raise ValueError(f"prototypes must have the shape (K, D), not {tuple(C.shape)}")
    broken = (~torch.isfinite(C).all(1)).nonzero()[:, 0]
    if len(broken):
        raise ValueError(f"{len(broken)} of {len(C)} prototypes hold NaN or infinity "
                         f"(the first is row {int(broken[0])})")
    rows = (C != 0).any(1).nonzero()[:, 0]  # (M,)
    A = C[rows].double()  # (M, D)
    largest = A.abs().amax(1, keepdim=True)  # (M, 1)
    return A * (torch.frexp(largest)[0] / largest), rows


def unit_rows(C):
    """The rows of C (K, D) that are not zero, at length one, (M, D) float64."""
    A, _ = nonzero_rows(C)
    return A / A.norm(dim=1, keepdim=True)


def valid_eps(eps_list):
    """The values of eps in order, each once. ValueError outside [0, 2]."""
    for eps in eps_list:
        if not 0 <= eps <= 2:
            raise ValueError(f"eps must lie in [0, 2] (it is 1 - cosine), not {eps}")
    return sorted(set(eps_list))


def unique_prototypes(C, eps):
    """Indices (int64) of the unique prototypes of C (K, D) at eps: the representatives of Def. 2.1,
    found greedily in index order with strict <. eps = 0 gives all; zero rows have no direction and
    are never among them. ValueError for NaN rows or eps outside [0, 2]."""
    representative = representatives(C, [eps])[eps]  # (K,)
    return stands_for_itself(representative).nonzero()[:, 0]


def unique_counts(C, eps_list, progress=False):
    """{eps: number of unique prototypes of C (K, D)}; progress: a bar where it takes long."""
    counts = {}
    for eps, representative in representatives(C, eps_list, progress).items():
        counts[eps] = int(stands_for_itself(representative).sum())
    return counts


def stands_for_itself(representative):
    """(K,) bool: which prototypes are their own representative, and so unique."""
    return representative == torch.arange(len(representative), device=representative.device)


def random_order_unique(C, eps, n=5, seed=0):
    """(mean, standard deviation) of the count over n random orders of the rows of C (K, D): how
    much the answer depends on the order. For a list of eps, {eps: (mean, standard deviation)}."""
    C = torch.as_tensor(C)
    eps_list = [eps] if isinstance(eps, (int, float)) else list(eps)
    generator = torch.Generator().manual_seed(seed)
    counts = []
    for _ in range(n):
        order = torch.randperm(len(C), generator=generator).to(C.device)
        counts.append(unique_counts(C[order], eps_list))
    out = {}
    for e in eps_list:
        values = torch.tensor([count[e] for count in counts], dtype=torch.float64)  # (n,)
        out[e] = (float(values.mean()), float(values.std(correction=min(1, n - 1))))
    return out[eps] if isinstance(eps, (int, float)) else out


# ---- the measures beside it ---------------------------------------------------------------------
def effective_rank(C):
    """How many dimensions the directions of C (K, D) fill, 1 to min(K, D): exp of the entropy of
    the singular values of the unit rows, over their sum (Roy and Vetterli 2007)."""
    X = unit_rows(C)  # (M, D)
    p = torch.linalg.eigvalsh(X.T @ X).clamp_min(0).sqrt()  # (D,)
    return float(torch.special.entr(p / p.sum()).sum().exp())


def drift(C, C_0):
    """Median over prototypes of |c - c_0| / |c_0|, for C (K, D) and its start C_0 (K, D). 0 means
    that training did not move them. Prototypes that began at 0 are left out. ValueError for unequal
    shapes."""
    C, C_0 = torch.as_tensor(C).double(), torch.as_tensor(C_0).double()
    if C.shape != C_0.shape:
        raise ValueError(f"drift compares equal shapes, not {tuple(C.shape)} and "
                         f"{tuple(C_0.shape)}")
    length = C_0.norm(dim=1)  # (K,)
    distance = (C - C_0).norm(dim=1)  # (K,)
    return float((distance[length > 0] / length[length > 0]).median())


def usage(P):
    """(used, perplexity), both shares of K, from assignment probabilities P: a tensor (N, K), or an
    iterable of such batches. ValueError for another shape, negative values, rows that do not sum to
    1 within .01, and no batch.

    used: prototypes that are the most probable one of at least one sample.
    perplexity: exp(entropy of the mean of P) / K."""
    hits = total = 0
    for p in [P] if torch.is_tensor(P) else P:
        if p.ndim != 2 or not len(p) or not (p.min() >= 0 and (p.sum(1) - 1).abs().max() < 1e-2):
            raise ValueError("usage needs for each vector (`assign` of a prototype set) K shares "
                             "that are not negative and sum to 1, not this tensor of shape "
                             f"{tuple(p.shape)}, which may hold nan")
        hits = hits + torch.bincount(p.argmax(1), minlength=p.shape[1])  # (K,)
        total = total + p.double().sum(0)  # (K,)
    if not torch.is_tensor(hits):
        raise ValueError("usage was given no batch")
    entropy = torch.special.entr(total / total.sum()).sum()
    return float((hits > 0).double().mean()), float(entropy.exp() / len(total))


def ceiling(h, K, eps, seed=0):
    """Unique share of min(K, N) random features of h (N, D): about the most that prototypes which
    lie on the data can reach."""
    chosen = torch.randperm(len(h), generator=torch.Generator().manual_seed(seed))[:K]
    return len(unique_prototypes(h[chosen.to(h.device)], eps)) / len(chosen)


def random_directions(K, D, seed=0):
    """(K, D) prototypes that nobody trained, even in all directions: the control of every count."""
    return torch.randn(K, D, generator=torch.Generator().manual_seed(seed))


def load_prototypes(path, key=None):
    """{name: (K, D) float32 tensor} of every prototype set in a checkpoint, ours or foreign; see
    support/checkpoints.py."""
    from support import checkpoints
    return checkpoints.load_prototypes(path, key)


# ---- the command line ---------------------------------------------------------------------------
# (what a value must be, test, flags)
RANGES = [
    ("lie in [0, 1000]", lambda v: 0 <= v <= 1000, ["orders"]),
    ("be a share in [0, 1]", lambda v: 0 <= v <= 1, ["fail_below"]),
    ("not be negative", lambda v: v >= 0, ["seed"]),
]
SWEEP = [round(.025 * i, 3) for i in range(21)]  # Fig. 3a: eps from 0 to 0.5
QUANTILES = (.01, .25, .5, .75, .99)  # of the cosine to the nearest neighbour


def describe(C, eps_list, orders=5, seed=0, progress=False):
    """Every measure of one prototype set C (K, D) as plain numbers; shares are of the M rows that
    are not zero. ValueError as for `representatives`, and where all rows are zero."""
    from fast import unique
    eps_list = valid_eps(eps_list)
    A, _ = nonzero_rows(C)  # (M, D)
    M = len(A)
    if not M:
        raise ValueError(f"all {len(C)} prototypes are zero rows: they have no direction to "
                         f"compare")
    out = {"K": len(C), "D": A.shape[1], "zero_rows": len(C) - M,
           "effective_rank": effective_rank(C), "eps": {}, "nearest_cosine": {}}
    nearest, graph = unique.neighbours(A, eps_list, progress)
    if M > 1:
        out["nearest_cosine"] = {q: float(nearest.double().quantile(q)) for q in QUANTILES}
    # A row without a neighbour is unique in any order, so random orders of the others are enough;
    # they and the neighbours do not follow a change of `covering`, and the count does
    crowded = A[graph[eps_list[-1]][0]]  # (rows with a neighbour, D)
    alone = M - len(crowded)
    searched = A if M <= PLAIN_UP_TO else crowded
    groups = {eps: [] for eps in eps_list}  # how many rows each representative covers
    shuffled = {}
    if len(searched):
        for eps, representative in representatives(searched, eps_list, progress).items():
            groups[eps] = representative.unique(return_counts=True)[1].tolist()
    if len(crowded) and orders:
        shuffled = random_order_unique(crowded, eps_list, orders, seed)
    for eps in eps_list:
        has_neighbour, component = graph[eps]  # (M,), (M,)
        count = M - len(searched) + len(groups[eps])
        duplicates = sorted((n for n in groups[eps] if n > 1), reverse=True)
        # where no row has a neighbour, all orders give the same; without orders nobody knows
        mean, sd = shuffled.get(eps, (None, None) if len(crowded) else (0, 0.))
        out["eps"][eps] = {"unique": count, "share": count / M,
                           "any_order_mean": None if mean is None else float(alone + mean),
                           "any_order_sd": sd,
                           "components": len(component.unique()),
                           "with_neighbour": int(has_neighbour.sum()),
                           "largest_groups": duplicates[:5]}
    return out


@functools.lru_cache  # one measurement for all sets of the same shape
def describe_random(K, D, eps_list, orders, seed):
    """`describe` of K random directions: what the measures show where nothing was learned."""
    return describe(random_directions(K, D, seed), eps_list, orders, seed, progress=True)


def verdict(share, K, D, eps):
    """One sentence: does a count at eps mean anything at this (K, D)? share: the unique share of
    random directions."""
    if share > .99:
        most = "all" if share == 1 else f"{100 * share:.2f} % of"
        return (f"At D = {D}, {most} {K:,} random directions are unique at eps {eps:g}: a smaller "
                f"share shows collapse, but reaching it does not show that the prototypes were "
                f"learned or used.")
    return (f"At D = {D}, only {100 * share:.3g} % of {K:,} random directions are unique at eps "
            f"{eps:g}: compare the count with that, not with 100 %.")


def parser():
    p = argparse.ArgumentParser(
        "collapse.py", allow_abbrev=False,
        description="How many prototypes of a checkpoint are unique (Def. 2.1), beside the numbers "
                    "that show what such a count is worth.")
    p.add_argument("paths", nargs="+", metavar="PATH",
                   help="run directory, or a checkpoint, .npy, .npz, .safetensors")
    p.add_argument("--eps", default="0.025,0.5", metavar="LIST",
                   help="duplicates are 1 - cos < eps (%(default)s)")
    p.add_argument("--key", metavar="NAME",
                   help="dotted name of the (K, D) tensor, for a layout that is not recognised")
    p.add_argument("--orders", type=int, default=5, metavar="N",
                   help="random orders to count in (%(default)s)")
    p.add_argument("--seed", type=int, default=0,
                   help="of the random orders and random directions (%(default)s)")
    p.add_argument("--plot", metavar="FILE", help="draw a picture (needs matplotlib)")
    p.add_argument("--picture", choices=("auto", "training", "sweep", "fig1"), default="auto",
                   help="with --plot; training: Fig. 4a; sweep: Fig. 3a, unique against eps; fig1: "
                        "where prototypes lie; auto: training where every PATH has a log.csv, else "
                        "sweep")
    p.add_argument("--panels", nargs="+", metavar="COLUMN",
                   help="measures that get a panel in --picture training, of unique_0.5, "
                        "unique_0.025, knn, used, perplexity and drift; all by default")
    p.add_argument("--json", metavar="FILE", help="all numbers; - prints them instead of tables")
    p.add_argument("--csv", metavar="FILE", help="a line per prototype set and eps")
    p.add_argument("--fail-below", type=float, metavar="SHARE",
                   help="exit code 1 if a set is less unique at any eps")
    p.add_argument("--data", metavar="NAME|FOLDER",
                   help="runs of ours: which prototypes these images are assigned to")
    p.add_argument("--assign", metavar="FILE.csv",
                   help="with --data and one run: path, prototype, probability")
    p.add_argument("--montage", metavar="FILE.png",
                   help="with --data and one run: images nearest to some prototypes")
    return p


def main(argv=None):
    """`python collapse.py --help`. Returns the exit code, 0 or 1 (--fail-below). Bad input: one
    sentence on stderr and exit code 2."""
    from support.errors import one_sentence
    args = parser().parse_args(argv)
    with one_sentence("collapse.py"):
        return measure(args)


def check(args):
    """The --eps of args as a list; ValueError, before the long work, for flags that cannot be."""
    from support.flags import check_files, check_values
    check_values(args, RANGES)
    try:
        eps_list = valid_eps([float(word) for word in args.eps.split(",")])
    except ValueError:
        message = f"--eps {args.eps} is not a list of numbers in [0, 2], as in 0.025,0.5"
        raise ValueError(message) from None
    check_files(args, "csv", "assign", "montage", "plot", *["json"] * (args.json != "-"),
                inputs=args.paths)
    if args.plot or args.montage:
        from support import plots
        plots.check_files(args.plot, args.montage)
    if (args.assign or args.montage) and (not args.data or len(args.paths) > 1):
        raise ValueError("--assign and --montage need --data and exactly one run")
    if args.picture != "auto" and not args.plot:
        raise ValueError(f"--picture {args.picture} needs --plot FILE")
    if args.panels and (not args.plot or args.picture in ("sweep", "fig1")):
        raise ValueError("--panels needs --plot FILE, and only --picture training has panels")
    return eps_list


def measure(args):
    """Measure every set and run; print, then write and draw, what args ask for. Returns the exit
    code."""
    from support import checkpoints, report
    eps_list = check(args)
    result = {"runs": [], "sets": [], "memories": {}, "data": {}}
    logs = []  # [(run, evaluated rows of its log.csv)]
    prototypes = {}  # {label: (K, D)}
    assigned = None  # assign.assign_images of the last run
    for path, name in zip(args.paths, report.short_names(args.paths)):
        log = report.read_log(path)
        has_checkpoint = os.path.isfile(os.path.join(path, "ckpt.pt"))
        if log:
            logs.append((name, log))
        if log or has_checkpoint:
            result["runs"].append(report.describe_run(path, name, log, drift))
        if log and not has_checkpoint:
            if args.fail_below is not None or args.data:
                raise ValueError(f"{path} has no ckpt.pt, and --fail-below and --data need its "
                                 "prototypes")
            continue  # a log alone can still be drawn
        try:
            sets = load_prototypes(path, args.key)
        except checkpoints.OnlyMemories as error:
            if args.fail_below is not None or args.data:
                raise  # to fail or to assign needs prototypes
            for which, memory in error.memories.items():
                result["memories"][f"{name} {which}"] = list(memory.shape)
            continue
        for which, C in sets.items():
            label = f"{name} {which}" if len(sets) > 1 else name
            prototypes[label] = C
            about = {"label": label, "file": path, "set": which, "several": len(sets) > 1}
            result["sets"].append(describe_set(C, about, eps_list, args))
        if args.data:
            from support import assign
            assigned = assign.assign_images(path, args.data, usage)
            result["data"][name] = assign.summary(assigned)
    if args.json == "-":
        print(report.json_text(result))
    else:
        report.show(result)
    code = 0
    for one in result["sets"]:
        for eps, e in one["eps"].items():
            if args.fail_below is not None and e["share"] < args.fail_below:
                print(f"collapse.py: {one['label']}: unique({eps:g}) is {e['share']:.4f}, below "
                      f"{args.fail_below:g}", file=sys.stderr)
                code = 1
    # the numbers are out: from here on a full disk costs none of them
    if args.json and args.json != "-":
        report.write_text(report.json_text(result), args.json)
    if args.csv:
        report.write_text(report.csv_text(result["sets"]), args.csv)
    if args.assign:
        report.write_text(assign.csv_text(assigned), args.assign)
    if args.montage:
        assign.draw_montage(assigned, *largest_group(assigned.C, eps_list), args.montage)
    if args.plot:
        draw(args, logs, result["sets"], prototypes)
    return code


def describe_set(C, about, eps_list, args):
    """`about` with the measures of C (K, D), those of as many random directions, the verdict."""
    try:
        one = describe(C, eps_list, args.orders, args.seed, progress=True)
    except ValueError as error:
        raise ValueError(f"{about['file']}, {about['set']}: {error}") from None
    M = one["K"] - one["zero_rows"]
    random = describe_random(M, one["D"], tuple(eps_list), args.orders, args.seed)
    verdicts = [verdict(e["share"], M, one["D"], eps) for eps, e in random["eps"].items()]
    return one | about | {"random": random, "verdict": verdicts}


def largest_group(C, eps_list):
    """(indices, eps) of the largest group of duplicates among C (K, D), at the smallest eps that
    has any; ([], 0) where none has."""
    for eps, representative in representatives(C, eps_list).items():
        size = representative[representative >= 0].bincount(minlength=len(C))  # (K,)
        if size.max() > 1:
            return (representative == size.argmax()).nonzero()[:, 0].tolist(), eps
    return [], 0


def draw(args, logs, sets, prototypes):
    """The picture --plot. logs: [(run, rows of its log.csv)]; sets: what describe_set returns;
    prototypes: {label: (K, D)}."""
    from support import plots, report
    picture = args.picture
    if picture == "auto":
        picture = "training" if len(logs) == len(args.paths) else "sweep"
    if picture != "training" and not prototypes:
        raise ValueError(f"--picture {picture} needs prototypes, and no PATH has any")
    if args.panels and picture != "training":
        raise ValueError("--panels is for --picture training: type that too, as not every PATH has "
                         "a log.csv")
    if picture == "training":
        runs, x_axis = (logs, "step") if logs else report.over_training(sets)
        plots.training(runs, args.plot, x_axis, args.panels)
    elif picture == "fig1":
        plots.fig1([(label, unit_rows(C)) for label, C in prototypes.items()], args.plot)
    else:
        curves = [curve(label, C) for label, C in prototypes.items()]
        shapes = dict.fromkeys((M, prototypes[label].shape[1]) for label, _, M in curves)
        controls = [curve(f"random directions, {K:,} x {D}", random_directions(K, D, args.seed))
                    for K, D in shapes]
        plots.sweep(curves, controls, args.plot)


def curve(label, C):
    """(label, {eps: unique share}, number of rows that are not zero), for plots.sweep."""
    M = len(nonzero_rows(C)[0])
    return label, {eps: n / M for eps, n in unique_counts(C, SWEEP, progress=True).items()}, M


if __name__ == "__main__":
    sys.exit(main())
