"""
Which prototype does an image belong to?

    python collapse.py RUN --data shapes [--assign out.csv] [--montage fig.png]

The teacher of a run is put in evaluation mode, and every training image passes once, without
augmentation. N images, K prototypes: h (N, D) the teacher's vectors, P (N, K) assignment
probabilities, won (N,) the most probable prototype of each image, y (N,) labels.
"""
import csv
import io
import math
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from support import groups
from support import plots
from support import runs
from support.evaluation import load_images


def assign_images(path, data, usage):
    """Assign the training images of `data` (a name or a folder) to the prototypes of a run at path.

    usage: collapse.usage. -> a namespace of data, images (the set), C (K, D), h (N, D), won (N,),
    probability (N,) of the prototype that won, used and perplexity (shares of K) and entropy (mean
    over images of that of P, in nats). ValueError for what load_run or data.load refuses."""
    run = runs.load_run(path)
    _, prototypes, _, args = run
    images, _, _ = load_images(data, args)
    features, winners, probabilities, entropies = [], [], [], []  # a tensor per batch in each

    def batches():
        for h, p in runs.assignments(run, images):  # (n, D) (n, K)
            probability, k = p.max(1)  # (n,) each
            features.append(h.cpu())
            winners.append(k.cpu())
            probabilities.append(probability.cpu())
            entropies.append(torch.special.entr(p.double()).sum(1).cpu())
            yield p  # P as a whole may not fit in memory

    used, perplexity = usage(batches())
    C = prototypes.vectors().cpu()  # (K, D)
    return SimpleNamespace(data=data, images=images, C=C, h=torch.cat(features),
                           won=torch.cat(winners), probability=torch.cat(probabilities),
                           used=used, perplexity=perplexity,
                           entropy=float(torch.cat(entropies).mean()))


def summary(assigned):
    """Plain numbers from what assign_images returns: used and perplexity (shares of K), mean
    assignment entropy in nats and over ln K, prototypes per class and per class size."""
    K = len(assigned.C)
    out = {"data": assigned.data, "images": len(assigned.won), "used": assigned.used,
           "perplexity": assigned.perplexity, "entropy": assigned.entropy,
           "entropy_over_ln_k": assigned.entropy / math.log(K) if K > 1 else 0.}
    if assigned.images.y is not None:
        out |= per_class(assigned.won, assigned.images.y.cpu(), assigned.images.classes, K)
    return out


def per_class(won, y, classes, K):
    """Shares of the images and of the used prototypes, {"images", "prototypes"}, for each class and
    for the head, medium and tail classes (support/groups.py). A used prototype belongs to the class
    of most of its images. -> {"classes": {class: shares}, "groups": {group: shares}}; B.1.3."""
    n_images = torch.bincount(y, minlength=len(classes))  # (classes,)
    owner = groups.owners(won, y, K, len(classes))  # (K,), -1 where unused
    n_prototypes = torch.bincount(owner[owner >= 0], minlength=len(classes))  # (classes,)

    def shares(mask):
        return {"images": float(n_images[mask].sum() / n_images.sum()),
                "prototypes": float(n_prototypes[mask].sum() / n_prototypes.sum())}

    by_class = {name: shares(torch.tensor([c])) for c, name in enumerate(classes)}
    by_size = {}
    for name, mask in groups.members(n_images).items():
        if mask.any():
            by_size[f"{name} ({int(mask.sum())} classes)"] = shares(mask)
    return {"classes": by_class, "groups": by_size}


def csv_text(assigned):
    """A line per image: its path (or its number in the set), its prototype, the probability."""
    names = assigned.images.paths
    if not names:
        names = [f"{assigned.images.name}[{i}]" for i in range(len(assigned.won))]
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(["path", "prototype", "probability"])
    for name, k, p in zip(names, assigned.won.tolist(), assigned.probability.tolist()):
        writer.writerow([name, k, f"{p:.6g}"])
    return out.getvalue()


def draw_montage(assigned, duplicates, eps, file):
    """A picture of the images nearest to some prototypes; see montage_rows."""
    plots.montage(montage_rows(assigned, duplicates, eps), file)


def montage_rows(assigned, duplicates, eps, rows=4, n=9):
    """[(title, [n images])]: for the `rows` most used, least used and duplicate prototypes, the
    images nearest in cosine, the nearest first. duplicates: indices of prototypes that are
    duplicates at eps, or []."""
    hits = torch.bincount(assigned.won, minlength=len(assigned.C))  # (K,)
    by_use = hits.argsort(descending=True, stable=True).tolist()
    chosen = [("most used", k) for k in by_use[:rows]]
    chosen += [("least used", k) for k in by_use[rows:][-rows:]]
    chosen += [(f"duplicates at {eps:g}", k) for k in duplicates[:rows]]
    h = F.normalize(assigned.h.float(), dim=1)  # (N, D)
    C = F.normalize(assigned.C.float(), dim=1)  # (K, D)
    out = []
    for kind, k in chosen:
        nearest = (h @ C[k]).topk(min(n, len(h)))[1].tolist()
        pictures = [picture(assigned.images, i) for i in nearest]
        out.append((f"{kind}\n{k} ({int(hits[k])} images)", pictures))
    return out


def picture(images, i):
    """Image i as (3, H, W) uint8: from memory where the set is there, else from its file."""
    return images.x[i] if hasattr(images, "x") else images.read(i)[0]
