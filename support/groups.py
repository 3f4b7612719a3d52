"""
Head, medium and tail: the classes of a long-tailed training set by how many training images they have.

Boundaries of the literature on iNaturalist-2018 (Sec. 4.4, B.1.3): head n > 100, medium 20 <= n <= 100, tail n < 20.
The paper states them in three ways that differ at 20 and 100; these are the ones that give its 842, 3,701 and 3,599
classes, and `check_inat18` asserts that.

Letters: C classes, counts (C,) training images of each, M test images, N images that prototypes win, K prototypes.
"""
import torch

NAMES = ("head", "medium", "tail")
INAT18 = {"head": 842, "medium": 3701, "tail": 3599}  # Table 2 of the paper; together 8,142


def members(counts, head=100, tail=20):
    """{"head", "medium", "tail": (C,) bool}: each class lies in exactly one. ValueError where tail > head + 1."""
    if not 0 <= tail <= head + 1:
        raise ValueError(f"the tail ends at {tail} images and the head begins above {head}: they overlap")
    counts = torch.as_tensor(counts)  # (C,)
    return {"head": counts > head, "medium": (counts >= tail) & (counts <= head), "tail": counts < tail}


def sizes(counts, head=100, tail=20):
    """{"head", "medium", "tail": number of classes}."""
    return {name: int(mask.sum()) for name, mask in members(counts, head, tail).items()}


def check_inat18(counts):
    """ValueError unless the training images per class are grouped as in iNaturalist-2018's published list."""
    if sizes(counts) != INAT18:
        raise ValueError(f"iNaturalist-2018 must have {', '.join(f'{n} {name}' for name, n in INAT18.items())} classes "
                         f"by its training images, got {', '.join(f'{n} {k}' for k, n in sizes(counts).items())}")


def percent(hit):
    return 100 * float(hit.double().mean()) if len(hit) else None


def report(pred, y, counts, head=100, tail=20):
    """Accuracy of the predictions pred (M,) for the labels y (M,) of 0..C-1, by groups of classes, in percent.

    -> {"all": top-1, "head", "medium", "tail": top-1 over the test images of the group's classes, None without any,
        "per_class": mean over the classes that have test images of the accuracy within each,
        "classes": {"head", "medium", "tail": number of classes}}
    counts (C,): training images per class; a class with none belongs to the tail, and nobody can get it right.
    ValueError for shapes or labels that do not fit. Sec. 4.4 and Table 2.
    """
    pred, y, counts = torch.as_tensor(pred).cpu(), torch.as_tensor(y).cpu(), torch.as_tensor(counts).cpu()
    if y.ndim != 1 or pred.shape != y.shape or not len(y):
        raise ValueError(f"group accuracy needs one prediction for each label, got shapes {tuple(pred.shape)} and "
                         f"{tuple(y.shape)}")
    if int(y.min()) < 0 or int(y.max()) >= len(counts):
        raise ValueError(f"labels run from {int(y.min())} to {int(y.max())} and must lie among the {len(counts)} "
                         "classes that have a count")
    hit = pred == y  # (M,)
    seen = y.bincount(minlength=len(counts))  # (C,)
    right = y[hit].bincount(minlength=len(counts))  # (C,)
    groups = members(counts, head, tail)
    return {"all": percent(hit), **{name: percent(hit[mask[y]]) for name, mask in groups.items()},
            "per_class": 100 * float((right[seen > 0].double() / seen[seen > 0]).mean()),
            "classes": {name: int(mask.sum()) for name, mask in groups.items()}}


def owners(won, y, K, C):
    """(K,) int64: the class most of a prototype's images belong to (the smaller one of a tie), -1 where it wins none.

    won (N,) the prototype that each image is assigned to, y (N,) its class."""
    pair, n = (won.long().cpu() * C + y.long().cpu()).unique(return_counts=True)  # ascending: smaller classes first
    order = n.argsort(stable=True, descending=True).flip(0)  # the most frequent pair of a prototype is written last
    owner = torch.full((K,), -1)  # (K,)
    for k, c in zip((pair[order] // C).tolist(), (pair[order] % C).tolist()):
        owner[k] = c
    return owner


def prototype_share(won, y, counts, K, head=100, tail=20):
    """{"head", "medium", "tail", "unused"}: shares of the K prototypes in percent, by the class that `owners` finds.

    won (N,) in 0..K-1 and y (N,): the prototype and the class of each training image; counts (C,) as in `report`."""
    if won.shape != y.shape or not len(won) or not 0 <= int(won.min()) <= int(won.max()) < K:
        raise ValueError(f"prototype shares need one prototype of 0..{K - 1} for each label, got shapes "
                         f"{tuple(won.shape)} and {tuple(y.shape)}")
    owner = owners(won, y, K, len(counts))
    groups = members(torch.as_tensor(counts).cpu(), head, tail)
    used = owner[owner >= 0]
    return {name: 100 * int(mask[used].sum()) / K for name, mask in groups.items()} | {
        "unused": 100 * (K - len(used)) / K}
