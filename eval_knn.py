"""Weighted k-nearest-neighbour classification on frozen features: DINO's protocol, the k-NN column
of Table 3.

    python eval_knn.py RUN_DIR  # the run's own data, teacher, k = 10 20 100 200
    python eval_knn.py RUN_DIR --data FOLDER --which student --dump features.pt
    python eval_knn.py RUN_DIR --pool mean  # the mean of the patches, not the class token
    python eval_knn.py dino_vits16.pth --arch vit_small --data FOLDER  # weights of others

A test image is labelled by the k training images that are nearest to it in cosine similarity:
neighbour i votes for its class with the weight exp(sim_i / T). Nothing is fitted, so the number
depends on the features alone. The number that papers report is the teacher's at k = 20, T = 0.07.

Letters: N images in the bank (the training split), M queries (the test split), D feature dimension,
C classes, q queries of a chunk.
"""
import argparse
import math

import torch
import torch.nn.functional as F

# Other files of ours are imported inside the functions that need them: train.py uses knn_accuracy
# alone, and loads no more than that.

# Printed with every number; raise it when anything that changes a number changes.
PROTOCOL = "knn-2"
CHUNK = 512  # queries whose similarities to the whole bank are in memory at a time
# Up to this many similarities, M N, the plain search below runs, and beyond it that of fast/knn.py.
# On one CPU core: 2,000 queries in 10,000 images take 0.12 s here and 0.17 s there; 2,000 in 50,000
# take 1.5 s and 0.7 s; 1,000 in 300,000 take 8 s and 5 s, and here the memory grows with N.
PLAIN_UP_TO = 2**26
# (what a value must be, test, flags)
RANGES = [("be at least 1", lambda v: v >= 1, ["k", "patch_size"])]


# ---- the classifier ------------------------------------------------------------------------------

def unit(x):
    """Rows of x (n, D) scaled to length 1, float32. ValueError where a feature is nan or
    infinite."""
    x = F.normalize(x.float(), dim=1)  # (n, D)
    if not x.sum().isfinite():  # an inf has become inf / inf = nan, and one nan is enough
        raise ValueError("k-NN got features that are not finite (nan or inf)")
    return x


def largest(sim, k):
    """(values, indices), (q, k) each: the k largest of each row of sim (q, N) in order, of equal
    ones the one with the smaller index first."""
    values, index = sim.topk(min(k + 1, sim.shape[1]))  # in order; of equal ones torch takes any
    # Rows in which two of the k + 1 largest are equal, which topk may have swapped
    tied = (values[:, 1:] == values[:, :-1]).any(1)  # (q,)
    values, index = values[:, :k], index[:, :k]
    if tied.any():
        # A stable sort keeps equal ones in their order.
        in_order, order = sim[tied].sort(dim=1, descending=True, stable=True)
        values[tied], index[tied] = in_order[:, :k], order[:, :k]
    return values, index


def neighbours(train_x, test_x, k, leave_one_out=False):
    """Yield (first query, sim (q, k), index (q, k)) for chunks of queries: their k nearest images
    of the bank.

    train_x (N, D) is the bank and test_x (M, D) the queries; k <= N. The largest similarity comes
    first, and of equal ones the smaller index. leave_one_out: query i is image i of the bank and
    not its own neighbour; k <= N - 1. A change here has to be made in fast/knn.py too, for more
    than PLAIN_UP_TO similarities.
    """
    bank = unit(train_x).to(test_x.device)  # (N, D)
    for first in range(0, len(test_x), CHUNK):
        queries = unit(test_x[first:first + CHUNK])  # (q, D)
        sim = queries @ bank.T  # (q, N) cosines
        if leave_one_out:
            sim[:, first:].fill_diagonal_(-torch.inf)
        yield first, *largest(sim, k)


def search(train_x, test_x, k, width=0, leave_one_out=False):
    """What neighbours yields, by the search that suits the size. width: see fast/knn.py."""
    if len(train_x) * len(test_x) <= PLAIN_UP_TO:
        return neighbours(train_x, test_x, k, leave_one_out)
    from fast import knn
    return knn.neighbours(train_x, test_x, k, width, leave_one_out)


def check_votes(ks, T):
    """ValueError for a number of neighbours or a temperature that cannot be."""
    if min(ks) < 1:
        raise ValueError(f"k must be at least 1, got {min(ks)}")
    # k votes are at most k exp(1 / T), and float32 ends at exp(88.7)
    least = 1 / (88 - math.log(max(ks)))
    if not T >= least:
        raise ValueError(f"T must be at least {least:.3g}, or {max(ks)} votes of up to exp(1 / T) "
                         f"overflow float32; got {T}")


def check_bank(train_x, train_y, test_x):
    """ValueError for features and labels that do not fit each other."""
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError("features must be (N, D) and (M, D), got "
                         f"{tuple(train_x.shape)} and {tuple(test_x.shape)}")
    if train_y.shape != (len(train_x),) or not len(train_x):
        raise ValueError("k-NN needs one label for each of its bank's images, got "
                         f"{len(train_x)} images and labels of shape {tuple(train_y.shape)}")


@torch.no_grad()
def knn_scores(train_x, train_y, test_x, k=20, T=0.07, num_classes=None):
    """Votes of the k nearest neighbours: scores[m, c] = sum of exp(cos(m, i) / T) over the
    neighbours i of label c.

    train_x (N, D), train_y (N,) int64 >= 0, test_x (M, D); features of any float dtype and any
    length, normalised and compared in float32. Returns (M, classes) float32 on test_x's device,
    classes being num_classes or the largest label + 1; the argmax of a row is the prediction. A k
    beyond N counts as N. Protocol: Caron et al. 2021. ValueError for shapes, labels, k or T that
    cannot be.
    """
    check_votes([k], T)
    check_bank(train_x, train_y, test_x)
    smallest, classes = int(train_y.min()), int(train_y.max()) + 1
    if smallest < 0 or classes > (num_classes or classes):
        raise ValueError(f"labels run from {smallest} to {classes - 1} and must lie in "
                         "0..num_classes - 1"
                         + (f", num_classes = {num_classes}" if num_classes else ""))
    y = train_y.to(test_x.device)  # (N,)
    scores = torch.zeros(len(test_x), num_classes or classes, device=test_x.device)  # (M, C)
    for first, sim, index in search(train_x, test_x, min(k, len(train_x))):
        votes = (sim / T).exp()  # (q, k)
        scores[first:first + len(sim)].scatter_add_(1, y[index], votes)
    return scores


@torch.no_grad()
def knn_predict(train_x, train_y, test_x, ks=(10, 20, 100, 200), T=0.07, leave_one_out=False):
    """{k: predicted labels (M,) on test_x's device} for several k from one search.

    Arguments and errors as in knn_scores. Labels may be any integers: only those in the bank get a
    column of scores. leave_one_out: test_x is the bank itself, and image i is left out of its own
    neighbours by its index, not by its similarity: a copy of it elsewhere in the bank votes. k then
    counts at most N - 1.
    """
    ks = sorted(set(ks))
    check_votes(ks, T)
    check_bank(train_x, train_y, test_x)
    N = len(train_x)
    if leave_one_out and (len(test_x) != N or N < 2):
        raise ValueError("leave-one-out needs the bank as queries and at least 2 images, got "
                         f"{N} in the bank and {len(test_x)} queries")
    # labels (C,) of the bank, sorted; y (N,) the place of each image's label among them.
    labels, y = train_y.to(test_x.device).unique(return_inverse=True)
    predicted = {k: labels.new_empty(len(test_x)) for k in ks}
    most = min(ks[-1], N - leave_one_out)
    for first, sim, index in search(train_x, test_x, most, len(labels), leave_one_out):
        votes, column = (sim / T).exp(), y[index]  # (q, most) each
        scores = votes.new_zeros(len(votes), len(labels))  # (q, C)
        counted = 0
        for k in ks:  # the neighbours of a smaller k are the first ones of a larger k
            scores.scatter_add_(1, column[:, counted:k], votes[:, counted:k])
            predicted[k][first:first + len(votes)] = labels[scores.argmax(1)]
            counted = k
    return predicted


def knn_accuracy(train_x, train_y, test_x, test_y, ks=(10, 20, 100, 200), T=0.07):
    """{k: share of the test images that are labelled rightly, in percent}. test_y (M,); the rest,
    and the errors, as in knn_predict."""
    if test_y.shape != (len(test_x),) or not len(test_x):
        raise ValueError(f"k-NN needs one label for each test image, got {len(test_x)} images and "
                         f"labels of shape {tuple(test_y.shape)}")
    predicted = knn_predict(train_x, train_y, test_x, ks, T)
    right = {k: int((y == test_y.to(y.device)).sum()) for k, y in predicted.items()}
    return {k: 100 * hits / len(test_y) for k, hits in right.items()}


# ---- prototypes of head, medium and tail classes -------------------------------------------------

@torch.no_grad()
def winners(path, images, device="cpu"):
    """(prototypes (N,), K): the most probable prototype of each image, without augmentation, by the
    teacher of the run at `path`; and how many prototypes there are.

    path: a run folder or ckpt.pt of train.py; ValueError for anything else."""
    from tqdm import tqdm

    from support.runs import assignments, load_run
    won = []
    with tqdm(total=len(images), desc="prototypes", unit="img", leave=False, disable=None) as bar:
        for h, p in assignments(load_run(path), images, device):  # (n, D) (n, K)
            won.append(p.argmax(1).cpu())
            bar.update(len(h))
    return torch.cat(won), p.shape[1]


# ---- command line --------------------------------------------------------------------------------

def parser():
    from support import evaluation
    from support.features import POOLS
    from support.flags import Help
    p = argparse.ArgumentParser(
        "eval_knn.py", allow_abbrev=False, formatter_class=Help,
        description="Weighted k-NN accuracy of a run's frozen features (DINO's protocol).")
    evaluation.add_common_flags(p)
    add = p.add_argument
    add("--patch-size", type=int, metavar="PX",
        help="refuse a ViT of other patches; None: as in the file")
    add("--pool", choices=POOLS, default="cls",
        help="cls: class token, which papers report; mean: of the patches, which CAPI reports; "
        "cls+mean: both; predictor: of zoo/capi.py")
    add("--k", type=int, nargs="+", default=[10, 20, 100, 200],
        help="numbers of neighbours; 20 is the one that papers report")
    add("--T", type=float, default=0.07,
        help="temperature of a neighbour's vote exp(similarity / T)")
    add("--leave-one-out", action="store_true",
        help="each training image against all others, where there is no test split")
    return p


def evaluate(flags):
    """What main does once the flags are parsed."""
    from support import evaluation, features, groups
    evaluation.check_common_flags(flags, RANGES)
    check_votes(flags.k, flags.T)
    backbone, args = evaluation.open_backbone(flags, flags.img_size, flags.patch_size)
    D = features.width(backbone, pool=flags.pool)
    flags.pool = features.pool_named(backbone, flags.pool)
    name, train, test, own = evaluation.open_images(flags, args)
    if train.y is None:
        raise ValueError(f"--data {name} has no labels, and k-NN needs labelled training and test "
                         "images")
    if flags.leave_one_out:
        test = train
    elif test is None:
        raise ValueError(f"--data {name} has no test split: --leave-one-out tests each image "
                         "against all others")

    backbone.to(flags.device)

    def features_of(images):
        return unit(evaluation.features_of(images, backbone, flags, args, pool=flags.pool))

    train_x = features_of(train)  # (N, D)
    test_x = train_x if test is train else features_of(test)  # (M, D)
    # topk and stable sorts are the same on the CPU and on CUDA; other devices lack some of it.
    device = flags.device if flags.device.startswith("cuda") else "cpu"
    predicted = knn_predict(train_x.to(device), train.y, test_x.to(device), flags.k, flags.T,
                            flags.leave_one_out)
    predicted["guess"] = train.y.mode().values.expand(len(test))  # always the commonest class
    counts = train.y.bincount(minlength=len(train.classes))  # (C,) training images of each class
    tables = {k: groups.report(y, test.y, counts, flags.head, flags.tail)
              for k, y in predicted.items()}
    share = prototype_share(flags, train, counts, tables) if own else None

    print(f"{name}: bank of {len(train)} images, {len(test)} test images, "
          f"{len(train.classes)} classes"
          + (", each image against all others" if flags.leave_one_out else ""))
    print(f"protocol {PROTOCOL}: weighted k-NN, cosine, T = {flags.T:g}, {flags.which}'s "
          f"{flags.pool} feature ({D}-d, float32), images resized and centre-cropped to "
          f"{args['img_size']} px, {evaluation.normalisation(args)}, no augmentation")
    print_table(tables, share, len(train) - flags.leave_one_out, flags)

    row = evaluation.result_row("eval_knn", PROTOCOL, flags, backbone, args, name) | {
        "train": len(train), "test": len(test), "img_size": args["img_size"], "layers": 1,
        "pool": flags.pool, "seed": args.get("seed", ""), "head_above": flags.head,
        "tail_below": flags.tail, "settings": f"T={flags.T:g} leave_one_out={flags.leave_one_out}"}
    evaluation.append_results(flags, row, {
        k if k == "guess" else f"k={k}": {"metric": "top1"} | table for k, table in tables.items()})
    if flags.dump:
        evaluation.dump(flags.dump, train_x, train.y, test_x, test.y)
    return {"knn": {k: tables[k]["all"] for k in sorted(set(flags.k))},
            "guess": tables["guess"]["all"], "groups": tables, "prototypes": share,
            "which": flags.which, "T": flags.T, "data": name, "train": len(train),
            "test": len(test)}


def prototype_share(flags, train, counts, tables):
    """groups.prototype_share of a run's own training images `train`, whose classes have counts (C,)
    images. None where all classes are of one group, or there is no run of train.py to ask."""
    from support import evaluation, groups
    has_groups = len(evaluation.groups_with_classes(tables)) > 1
    if flags.arch is not None or flags.which != "teacher" or not has_groups:
        return None
    typed = [flag for flag, value in (("--img-size", flags.img_size), ("--mean", flags.mean),
                                      ("--std", flags.std)) if value is not None]
    if typed:
        print(f"prototypes per group are not counted with {', '.join(typed)}: they won the images "
              "as the run saw them")
        return None
    try:
        won, K = winners(flags.checkpoint, train, flags.device)
        return groups.prototype_share(won, train.y, counts, K, flags.head, flags.tail)
    except ValueError as error:
        print(f"prototypes per group are not counted: {error}")
        return None


def print_table(tables, share, most, flags):
    """One line for each k, in percent. With a long tail also by groups of classes, and the share of
    the prototypes that each group has. most: the neighbours that an image can have at most."""
    from support import evaluation
    names = evaluation.groups_with_classes(tables)
    if len(names) < 2:  # one group alone says nothing that top-1 does not
        names = []
    classes = next(iter(tables.values()))["classes"]
    titles = [f"{name} ({classes[name]})" for name in names]
    print("     k   top-1 %   per class" + "".join(f"{title:>15}" for title in titles))
    for k, table in tables.items():
        line = f"{k:>6}   {table['all']:7.2f}   {table['per_class']:9.2f}"
        for name in names:
            line += f"{'-':>15}" if table[name] is None else f"{table[name]:15.2f}"
        if k == "guess":
            line += "   (always the bank's commonest class)"
        elif k > most:
            line += f"   (all {most} of the bank)"
        print(line)
    if share:
        print(f"{'prototypes':<28}" + "".join(f"{share[name]:15.2f}" for name in names)
              + "   (% of K by their images' commonest class; "
              f"{share['unused']:.2f} win no image)")
    if names:
        print(f"head: classes of more than {flags.head} images in the bank, "
              f"tail: of fewer than {flags.tail}")


def main(argv=None):
    """Run the command line. Bad input: one sentence on stderr and exit code 2.

    Returns {"knn": {k: percent}, "guess": percent of the bank's commonest class, "groups": {k or
    "guess": groups.report}, "prototypes": groups.prototype_share of a long-tailed bank or None,
    "which", "T", "data", "train", "test" (numbers of images)}.
    """
    from support.errors import one_sentence
    flags = parser().parse_args(argv)
    with one_sentence("eval_knn.py"):
        return evaluate(flags)


if __name__ == "__main__":
    main()
