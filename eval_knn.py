"""Weighted k-nearest-neighbour classification on frozen features: the protocol of DINO, the k-NN column of Table 3.

    python eval_knn.py RUN_DIR  # the run's own data, teacher, k = 10 20 100 200
    python eval_knn.py RUN_DIR --data FOLDER --which student --dump features.pt
    python eval_knn.py dino_vits16.pth --arch vit_small --data FOLDER  # weights of others

A test image is labelled by its k nearest training images in cosine similarity; neighbour i votes for its class with
weight exp(sim_i / T). Nothing is fitted: the number moves with the features alone. Headline: k 20, T .07, teacher.

Letters: N images in the bank (the training split), M queries (the test split), D feature dimension, C classes.
"""
import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from support import groups
from support import run
from data import eval_batches, load
from support.features import cached, features, fingerprint, load_backbone, record, usable  # noqa: F401  of eval_knn's names

PROTOCOL = "knn-1"  # printed with every number; raise it when anything that changes the number changes
BUDGET = 640 * 2**20  # bytes a k-NN search may use, whatever M and N are; a third unless all are alike
QUERIES, ROWS, GROUP = 2048, 2048, 64  # of a block of similarities; GROUP of a query's are looked at together
LAST = 2**32 - 1  # largest bank index


# ----------------------------------------------------------------------------------------------------- the classifier

def unit(x):
    """Rows of x (n, D) scaled to length 1, float32. Raises ValueError where a feature is nan or infinite."""
    x = F.normalize(x.float(), dim=1)
    if not x.sum().isfinite():  # an inf has become inf / inf = nan, and one nan is enough
        raise ValueError("k-NN got features that are not finite (nan or inf)")
    return x


def to_keys(sim, index):
    """int64 keys that sort as (larger similarity, then smaller bank index), no two alike: their largest k are the same
    on every device and for every block size, where torch.topk on similarities picks among equal ones as it likes."""
    bits = (sim + 0.0).view(torch.int32)  # + 0 turns -0 into 0, its equal
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats are ordered backwards, as integers
    return (bits.long() << 32).bitwise_or_(LAST - index)


def from_keys(keys):
    """(sim float32, index) of to_keys."""
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32), LAST - (keys & LAST)


def neighbours(train_x, test_x, k, width=0, leave_one_out=False):
    """Yield (first query, sim (q, k), index (q, k)) for blocks of queries: their k <= N nearest rows of the bank in
    order; equal similarities by the smaller index. The (M, N) similarities never exist.

    Of a block of similarities only those are looked at whose GROUP reaches the query's k-th best so far: about
    k log(N / n) groups a query in all. Works on test_x's device; the bank may lie elsewhere, its blocks are copied
    over. width: floats a query needs in the caller. leave_one_out: query i is row i of the bank, not its own neighbour.
    """
    (M, D), N = test_x.shape, len(train_x)
    # Rows of a block, whole GROUPs unless k or the bank are odd: products of other widths are a fifth slower.
    n = max(k, min(N, ROWS, BUDGET // 4 // (72 + 12 * D) // GROUP * GROUP))
    # Every stride-th row makes a block, so that a bank sorted by class is a mixture of classes in each; then the rest.
    stride = N // n
    blocks = [(j, n * stride, stride) for j in range(stride)] + [(n * stride, N, 1)] * (n * stride < N)
    # 72 bytes for a similarity that is looked at, all of them where features have collapsed; a dozen (q, k) tensors.
    q = max(1, min(QUERIES, (BUDGET - 12 * D * n) // (72 * n + 8 * D + 128 * k + 4 * width)))
    with tqdm(total=M, desc="k-NN", unit="img", leave=False, disable=None, delay=2) as bar:
        for i in range(0, M, q):
            queries = unit(test_x[i:i + q])  # (q, D)
            keys = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)  # (q, <= k) best so far
            for first, stop, step in blocks:
                sim = queries @ unit(train_x[first:stop:step].to(queries.device)).T  # (q, n)
                if leave_one_out:
                    own = torch.arange(i - first, i - first + len(queries), device=sim.device)
                    there = (own >= 0) & (own < stop - first) & (own % step == 0)  # (q,) own row is in this block
                    sim[there, own[there] // step] = -torch.inf
                worst = from_keys(keys.amin(1, True))[0] if first else sim.topk(k, sorted=False).values.amin(1, True)
                groups = sim.unflatten(1, (-1, GROUP if sim.shape[1] % GROUP == 0 else sim.shape[1]))  # (q, groups, g)
                row, group = (groups.amax(2) >= worst).nonzero(as_tuple=True)
                near = groups[row, group]  # (hits, g), row after row
                hit, place = (near >= worst[row]).nonzero(as_tuple=True)
                row, column = row[hit], group[hit] * groups.shape[2] + place  # (hits,) each
                count = row.bincount(minlength=len(queries))  # (q,)
                found = keys.new_full((len(queries), int(count.max())), torch.iinfo(torch.long).min)
                rank = torch.arange(len(row), device=row.device).sub_((count.cumsum(0) - count)[row])
                found[row, rank] = to_keys(near[hit, place], column * step + first)
                keys = torch.cat([keys, found], 1).topk(k, sorted=False).values
            yield i, *from_keys(keys.sort(1, descending=True).values)
            bar.update(len(queries))


def check_votes(ks, T):
    """Raise ValueError for a number of neighbours or a temperature that cannot be."""
    if min(ks) < 1:
        raise ValueError(f"k must be at least 1, got {min(ks)}")
    if not T > 0 or 1 / T + math.log(max(ks)) > 88:  # k votes of at most exp(1/T); float32 ends at exp(88.7)
        raise ValueError(f"T must be above 0 and large enough that {max(ks)} votes of exp(1 / T) do not overflow "
                         f"float32, got {T}")


def check(train_x, train_y, test_x, ks, T):
    """Raise ValueError, in one sentence, for inputs a k-NN search cannot use."""
    check_votes(ks, T)
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), got {tuple(train_x.shape)} and {tuple(test_x.shape)}")
    if train_y.shape != (len(train_x),) or not len(train_x):
        raise ValueError(f"k-NN needs one label for each of its bank's images, got {len(train_x)} images and labels of "
                         f"shape {tuple(train_y.shape)}")


@torch.no_grad()
def knn_scores(train_x, train_y, test_x, k=20, T=0.07, num_classes=None):
    """Votes of the k nearest neighbours: scores[m, c] = sum of exp(cos(m, i) / T) over m's neighbours i of label c.

    train_x (N, D), train_y (N,) int64 >= 0, test_x (M, D), any float dtype (computed in float32, normalised in here)
    -> (M, classes) float32 on test_x's device, classes = num_classes or the largest label + 1; argmax predicts.
    k beyond N counts as N. Equal similarities at the k-th place: the smaller bank index is taken. Beside the result it
    needs about BUDGET bytes. Protocol: Caron et al. 2021. Raises ValueError on shapes, labels, k or T that cannot be.
    """
    check(train_x, train_y, test_x, [k], T)
    classes = int(train_y.max()) + 1
    if int(train_y.min()) < 0 or classes > (num_classes or classes):
        raise ValueError(f"labels run from {int(train_y.min())} to {classes - 1} and must lie in 0..num_classes - 1"
                         + (f", num_classes = {num_classes}" if num_classes else ""))
    y = train_y.to(test_x.device)
    scores = torch.zeros(len(test_x), num_classes or classes, device=test_x.device)  # (M, C)
    for i, sim, index in neighbours(train_x, test_x, min(k, len(train_x))):
        scores[i:i + len(sim)].scatter_add_(1, y[index], (sim / T).exp())
    return scores


@torch.no_grad()
def knn_predict(train_x, train_y, test_x, ks=(10, 20, 100, 200), T=0.07, leave_one_out=False):
    """{k: labels (M,) on test_x's device} from ONE search: the votes of a smaller k are a prefix of the larger one's.

    Arguments and errors as knn_scores. Labels may be any integers: only those in the bank get a column.
    leave_one_out: test_x is the bank itself, and image i is left out of its own neighbours by its index, not by its
    similarity: a copy of it elsewhere in the bank votes. k then counts at most N - 1.
    """
    ks = sorted(set(ks))
    check(train_x, train_y, test_x, ks, T)
    if leave_one_out and (len(test_x) != len(train_x) or len(train_x) < 2):
        raise ValueError("leave-one-out needs the bank as queries and at least 2 images, got "
                         f"{len(train_x)} in the bank and {len(test_x)} queries")
    labels, y = train_y.to(test_x.device).unique(return_inverse=True)  # (C,) sorted; (N,) column of each image
    out = {k: labels.new_empty(len(test_x)) for k in ks}
    for i, sim, index in neighbours(train_x, test_x, min(ks[-1], len(y) - leave_one_out), len(labels), leave_one_out):
        weight, column = (sim / T).exp(), y[index]  # (q, k)
        scores, done = sim.new_zeros(len(sim), len(labels)), 0  # (q, C)
        for k in ks:
            scores.scatter_add_(1, column[:, done:k], weight[:, done:k])
            out[k][i:i + len(sim)] = labels[scores.argmax(1)]
            done = k
    return out


def knn_accuracy(train_x, train_y, test_x, test_y, ks=(10, 20, 100, 200), T=0.07):
    """{k: top-1 in percent}. Arguments and errors as knn_predict; test_y (M,)."""
    if test_y.shape != (len(test_x),) or not len(test_x):
        raise ValueError(f"k-NN needs one label for each test image, got {len(test_x)} images and labels of shape "
                         f"{tuple(test_y.shape)}")
    predicted = knn_predict(train_x, train_y, test_x, ks, T)
    return {k: 100 * int((y == test_y.to(y.device)).sum()) / len(test_y) for k, y in predicted.items()}


# ---------------------------------------------------------------------------------------------------- prototype shares

@torch.no_grad()
def winners(path, images, device="cpu"):
    """(N,) the prototype of each image by the teacher of the run at path, without augmentation, and K.

    The most probable one of what its prototype set assigns, as in assign.py. ValueError where it is no run of ours."""
    net, prototypes, args = run.load_run(path)
    net.to(device), prototypes.to(device)
    bar = tqdm(total=len(images), desc="prototypes", unit="img", leave=False, disable=None)
    won = []
    with bar:
        for x in eval_batches(images, args["img_size"], device=device):
            won.append(prototypes.assign(net([x])).argmax(1).cpu())  # (n,)
            bar.update(len(x))
    return torch.cat(won), len(prototypes.vectors())


# ------------------------------------------------------------------------------------------------------- command line

def evaluate(flags):
    if flags.dump and (Path(flags.dump).is_dir() or not Path(flags.dump).absolute().parent.is_dir()):
        raise ValueError(f"--dump {flags.dump} must be a file in a folder that exists")  # said before the long work
    check_votes(flags.k, flags.T)
    groups.members([], flags.head, flags.tail)
    if flags.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {flags.batch_size}")
    device = usable(flags.device)
    backbone, args, info = load_backbone(flags.checkpoint, flags.which, flags.arch, flags.patch_size, flags.img_size)
    print(info)

    own = flags.data is None or flags.data == args.get("data")
    name, img_size = args.get("data") if own else flags.data, args["img_size"]
    if name is None:
        raise ValueError(f"{flags.checkpoint} does not say on what data it was trained: give --data")
    # On its own data the bank is what the run itself used: the same seed, and long-tailed if it was.
    train, test = load(name, root=flags.data_root or args.get("data_root", "data"), seed=args.get("seed", 0),
                       img_size=img_size, imbalance=args.get("imbalance", 1.0) if own else 1.0,
                       imbalance_law=args.get("imbalance_law", "exp") if own else "exp")
    if train.y is None:
        raise ValueError(f"--data {name} has no labels, and k-NN needs labelled training and test images")
    if test is None and not flags.leave_one_out:
        raise ValueError(f"--data {name} has no test split: --leave-one-out tests each image against all others")
    test = train if flags.leave_one_out else test
    backbone.to(device)
    folder = Path(flags.checkpoint) if Path(flags.checkpoint).is_dir() else Path(flags.checkpoint).parent

    def get(images):
        return unit(cached(backbone, images, img_size, None if flags.no_cache else folder / "features", device=device,
                           batch_size=flags.batch_size, progress=True))
    x = get(train)  # (N, D)
    q = x if test is train else get(test)  # (M, D)
    if flags.dump:
        torch.save({"train_x": x, "train_y": train.y, "test_x": q, "test_y": test.y}, flags.dump)
    where = device if str(device).startswith("cuda") else "cpu"  # the search needs int64 top-k
    predicted = knn_predict(x.to(where), train.y, q.to(where), flags.k, flags.T, flags.leave_one_out)
    predicted["guess"] = train.y.mode().values.expand(len(test))  # always the bank's commonest class
    counts = train.y.bincount(minlength=len(train.classes))  # (C,)
    tables = {k: groups.report(y, test.y, counts, flags.head, flags.tail) for k, y in predicted.items()}
    share = None
    if own and flags.arch is None and flags.which == "teacher" and len(shown_groups(tables)) > 1:
        try:
            won, K = winners(flags.checkpoint, train, device)
            share = groups.prototype_share(won, train.y, counts, K, flags.head, flags.tail)
        except ValueError as error:
            print(f"prototypes per group are not counted: {error}")

    print(f"{name}: bank of {len(train)} images, {len(test)} test images, {len(train.classes)} classes"
          + (", each image against all others" if flags.leave_one_out else ""))
    print(f"protocol {PROTOCOL}: weighted k-NN, cosine, T = {flags.T:g}, {flags.which}'s cls feature "
          f"({backbone.dim}-d, float32), images resized and centre-cropped to {img_size} px, no augmentation")
    print_table(tables, share, len(train) - flags.leave_one_out, flags)
    if flags.dump:
        print(f"features written to {flags.dump}")
    row = {"tool": "eval_knn", "protocol": PROTOCOL, "checkpoint": flags.checkpoint, "weights": fingerprint(backbone),
           "which": flags.which, "arch": backbone.arch,
           **{key: args.get(key, "") for key in ("method", "prototypes", "num_prototypes")}, "data": name,
           "train": len(train), "test": len(test), "img_size": img_size, "layers": 1, "pool": "cls",
           "seed": args.get("seed", ""), "head_above": flags.head, "tail_below": flags.tail,
           "settings": f"T={flags.T:g} leave_one_out={flags.leave_one_out}"}
    for k, table in tables.items():
        cells = {key: "" if value is None else round(value, 4) for key, value in table.items() if key != "classes"}
        try:
            record(flags.results or folder / "results.csv", row | {"result": k if k == "guess" else f"k={k}",
                                                                   "metric": "top1"} | cells)
        except OSError as error:
            print(f"the numbers are not kept: {error}")
    return {"knn": {k: tables[k]["all"] for k in sorted(set(flags.k))}, "guess": tables["guess"]["all"],
            "groups": tables, "prototypes": share, "which": flags.which, "T": flags.T, "data": name,
            "train": len(train), "test": len(test)}


def shown_groups(tables):
    """Names of the groups that have classes; one alone says nothing that top-1 does not."""
    classes = next(iter(tables.values()))["classes"]
    return [name for name in groups.NAMES if classes[name]]


def print_table(tables, share, most, flags):
    """One line per k in percent; with a long tail also by groups, and the share of the prototypes that each has."""
    names = shown_groups(tables) if len(shown_groups(tables)) > 1 else []
    classes = next(iter(tables.values()))["classes"]
    print("     k   top-1 %   per class" + "".join(f"{f'{n} ({classes[n]})':>15}" for n in names))
    for k, table in tables.items():
        cells = "".join(f"{'-' if table[n] is None else format(table[n], '.2f'):>15}" for n in names)
        note = "   (always the bank's commonest class)" if k == "guess" else \
            f"   (all {most} of the bank)" if k > most else ""
        print(f"{k:>6}   {table['all']:7.2f}   {table['per_class']:9.2f}{cells}{note}")
    if share:
        print(f"{'prototypes':<28}" + "".join(f"{share[n]:15.2f}" for n in names)
              + f"   (% of K by their images' commonest class; {share['unused']:.2f} win no image)")
    if names:
        print(f"head: classes of more than {flags.head} images in the bank, tail: of fewer than {flags.tail}")


def main(argv=None):
    """Run the command line. Returns {"knn": {k: percent}, "guess" in percent, "groups": {k or "guess": groups.report},
    "prototypes": groups.prototype_share of a long-tailed bank or None, "which", "T", "data", "train", "test" (numbers
    of images)}. Bad input: one sentence on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description="Weighted k-NN accuracy of a run's frozen features (DINO's protocol).", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT|RUN_DIR", help="a ckpt.pt, the directory it lies in, or a foreign file with --arch")
    add("--arch", help="architecture of a foreign file: DINO's, torchvision's, timm's; None: a run of train.py")
    add("--patch-size", type=int, metavar="PX", help="refuse a ViT of other patches; None: as in the file")
    add("--img-size", type=int, metavar="PX", help="side of the images; None: what the backbone was made for")
    add("--data", metavar="NAME|FOLDER", help="labelled images; None: those the run was trained on")
    add("--data-root", metavar="DIR", help="where named data sets lie; None: as in the run")
    add("--which", choices=["teacher", "student"], default="teacher", help="papers report the teacher")
    add("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours; 20 is the headline")
    add("--T", type=float, default=0.07, help="temperature of a neighbour's vote exp(similarity / T)")
    add("--leave-one-out", action="store_true", help="each training image against all others, where no test split is")
    add("--head", type=int, default=100, metavar="N", help="head classes have more training images than this")
    add("--tail", type=int, default=20, metavar="N", help="tail classes have fewer training images than this")
    add("--batch-size", type=int, default=512, help="images per forward pass; changes speed only")
    add("--device", default="auto", help="auto: cuda where there is one, else cpu")
    add("--dump", metavar="FILE", help="torch.save {train_x, train_y, test_x, test_y} there, features of length one")
    add("--no-cache", action="store_true", help="neither read nor write features/ next to the checkpoint")
    add("--results", metavar="FILE", help="csv file to append to; None: results.csv next to the checkpoint")
    flags = parser.parse_args(argv)
    try:
        return evaluate(flags)
    except ValueError as error:
        print(f"eval_knn.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
