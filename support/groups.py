"""
Head, medium and tail: the classes of a long-tailed training set, by their training images.

Boundaries of the literature on iNaturalist-2018 (Sec. 4.4, B.1.3): head n > 100, medium
20 <= n <= 100, tail n < 20. The paper states them in three ways that differ at 20 and 100; these
are the ones that give its 842, 3,701 and 3,599 classes, and `check_inat18` verifies that.

Letters: C classes, counts (C,) training images of each, M test images, N training images, each
assigned to one of K prototypes.
"""
import torch

NAMES = ("head", "medium", "tail")
INAT18 = {"head": 842, "medium": 3701, "tail": 3599}  # Table 2 of the paper; together 8,142


def members(counts, head=100, tail=20):
    """{"head", "medium", "tail": (C,) bool}: each class lies in exactly one group.

    counts (C,): training images per class; a class with none lies in the tail. ValueError where
    tail is negative or above head + 1."""
    if not 0 <= tail <= head + 1:
        raise ValueError(f"the tail ends at {tail} images and the head begins above {head}: they "
                         f"overlap")
    counts = torch.as_tensor(counts)  # (C,)
    return {"head": counts > head,
            "medium": (counts >= tail) & (counts <= head),
            "tail": counts < tail}


def sizes(counts, head=100, tail=20):
    """{"head", "medium", "tail": number of classes}, for counts (C,) as in `members`."""
    return {name: int(mask.sum()) for name, mask in members(counts, head, tail).items()}


def check_inat18(counts):
    """ValueError unless the classes with counts (C,) training images are grouped as in the
    published list of iNaturalist-2018 (Table 2)."""
    got = sizes(counts)
    if got != INAT18:
        wanted = ", ".join(f"{n} {name}" for name, n in INAT18.items())
        raise ValueError(f"iNaturalist-2018 must have {wanted} classes by its training images, got "
                         f"{', '.join(f'{n} {name}' for name, n in got.items())}")


def percent(correct):
    """Share of True in correct (M,), in percent; None where there is nothing."""
    return 100 * float(correct.double().mean()) if len(correct) else None


def report(pred, y, counts, head=100, tail=20):
    """Accuracy of the predictions pred (M,) for the labels y (M,) of 0..C-1, by groups of
    classes, in percent (Sec. 4.4 and Table 2).

    -> {"all": top-1,
        "head", "medium", "tail": top-1 over the test images of the group's classes, None if none,
        "per_class": mean over the classes that have test images of the accuracy within each,
        "classes": {"head", "medium", "tail": number of classes}}
    counts (C,): training images per class; a class with none belongs to the tail, and nobody can
    get it right. ValueError for shapes or labels that do not belong together.
    """
    pred = torch.as_tensor(pred).cpu()  # (M,)
    y = torch.as_tensor(y).cpu()  # (M,)
    counts = torch.as_tensor(counts).cpu()  # (C,)
    if y.ndim != 1 or pred.shape != y.shape or not len(y):
        raise ValueError(f"group accuracy needs one prediction for each label, got shapes "
                         f"{tuple(pred.shape)} and {tuple(y.shape)}")
    if int(y.min()) < 0 or int(y.max()) >= len(counts):
        raise ValueError(f"labels run from {int(y.min())} to {int(y.max())} and must lie among the "
                         f"{len(counts)} classes that have a count")
    correct = pred == y  # (M,)
    tested = y.bincount(minlength=len(counts))  # (C,), test images of each class
    right = y[correct].bincount(minlength=len(counts))  # (C,), those predicted correctly
    accuracy = right[tested > 0].double() / tested[tested > 0]  # (classes with test images,)
    out = {"all": percent(correct)}
    for name, mask in members(counts, head, tail).items():
        out[name] = percent(correct[mask[y]])
    out["per_class"] = 100 * float(accuracy.mean())
    out["classes"] = sizes(counts, head, tail)
    return out


def owners(won, y, K, C):
    """(K,) int64: the class that most of a prototype's images belong to (the smaller one of a
    tie), -1 for a prototype without images.

    won (N,): the prototype that each image is assigned to, y (N,): its class, of C classes."""
    pairs, counts = (won.long().cpu() * C + y.long().cpu()).unique(return_counts=True)
    owner = [-1] * K
    most_images = [0] * K
    for pair, count in zip(pairs.tolist(), counts.tolist()):  # ascending, so smaller classes first
        k, c = divmod(pair, C)
        if count > most_images[k]:
            most_images[k] = count
            owner[k] = c
    return torch.tensor(owner)  # (K,)


def prototype_share(won, y, counts, K, head=100, tail=20):
    """{"head", "medium", "tail", "unused"}: shares of the K prototypes in percent, by the class
    that `owners` finds.

    won (N,) in 0..K-1 and y (N,): the prototype and the class of each training image; counts (C,)
    as in `report`. ValueError for shapes or prototypes that do not belong together."""
    if won.shape != y.shape or not len(won) or not 0 <= int(won.min()) <= int(won.max()) < K:
        raise ValueError(f"prototype shares need one prototype of 0..{K - 1} for each label, got "
                         f"shapes {tuple(won.shape)} and {tuple(y.shape)}")
    owner = owners(won, y, K, len(counts))  # (K,)
    used = owner[owner >= 0]
    out = {}
    for name, mask in members(torch.as_tensor(counts).cpu(), head, tail).items():
        out[name] = 100 * int(mask[used].sum()) / K
    out["unused"] = 100 * (K - len(used)) / K
    return out
