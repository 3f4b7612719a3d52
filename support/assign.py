"""
Which prototype does an image belong to? `python collapse.py RUN --data shapes [--assign out.csv] [--montage fig.png]`.

A run of ours is put in evaluation mode and every training image passes once, without augmentation. h (N, D) bottleneck
features, P (N, K) assignment probabilities, won (N,) the argmax of P, y (N,) labels.
"""
import csv
import math

import torch
from torch.nn import functional as F

import data as datasets
from support import plots
from support import run
from collapse import leaders, usage


def assigned(path, data, eps_list, assign=None, montage=None):
    """Measures of the run at `path` on the training images of `data` (a name or a folder), as plain numbers: used and
    perplexity (shares of K), mean assignment entropy in nats and over ln K, prototypes per class and per class size.
    assign: CSV file of path, prototype, probability. montage: picture file. ValueError for what load_run refuses."""
    net, prototypes, args = run.load_run(path)
    args = args if isinstance(args, dict) else vars(args)
    images, _ = datasets.load(data, root=args.get("data_root", "data"), seed=args.get("seed", 0),
                              img_size=args["img_size"], imbalance_law=args.get("imbalance_law", "exp"),
                              imbalance=args.get("imbalance", 1) if data == args["data"] else 1)
    device, kept, won, sure, entropy = next(net.parameters()).device, [], [], [], []
    net.eval()  # no drop path, running BN statistics

    def batches():
        for x in datasets.eval_batches(images, args["img_size"], device=device):
            h = net([x])  # (n, D)
            p = prototypes.assign(h)  # (n, K)
            top, k = p.max(1)
            for store, value in (kept, h), (won, k), (sure, top), (entropy, torch.special.entr(p.double()).sum(1)):
                store.append(value.cpu())
            yield p
    with torch.no_grad():
        used, perplexity = usage(batches())
        C = prototypes.vectors().detach().cpu()  # (K, D)
    won, sure, nats = torch.cat(won), torch.cat(sure), float(torch.cat(entropy).mean())
    out = {"data": data, "images": len(won), "used": used, "perplexity": perplexity, "entropy": nats,
           "entropy_over_ln_k": nats / math.log(len(C)) if len(C) > 1 else 0.}
    if images.y is not None:
        out |= per_class(won, images.y.cpu(), images.classes)
    if assign:
        names = images.paths or [f"{images.name}[{i}]" for i in range(len(won))]
        with open(assign, "w", newline="") as file:
            write = csv.writer(file)
            write.writerow(["path", "prototype", "probability"])
            write.writerows((name, int(k), f"{float(p):.6g}") for name, k, p in zip(names, won, sure))
    if montage:
        plots.montage(montage_rows(torch.cat(kept), C, won, images, eps_list), montage)
    return out


def per_class(won, y, classes):
    """A prototype that wins images belongs to the class of most of them. Share of the images and of the used prototypes
    for each class, and for the classes with more than 100 images (head), 20 to 100 (medium) and fewer (tail): B.1.3."""
    size = torch.bincount(y, minlength=len(classes))  # (classes,)
    pairs, count = (won * len(classes) + y).unique(return_counts=True)
    owner = {}
    for pair in pairs[count.argsort(descending=True, stable=True)].tolist():
        owner.setdefault(pair // len(classes), pair % len(classes))  # most frequent first, so this is the majority
    owned = torch.bincount(torch.tensor(list(owner.values())), minlength=len(classes)) / len(owner)

    def line(mask):
        return {"images": float(size[mask].sum() / size.sum()), "prototypes": float(owned[mask].sum())}
    groups = {"head": size > 100, "medium": (size >= 20) & (size <= 100), "tail": (size < 20) & (size > 0)}
    return {"classes": {name: line(torch.tensor([c])) for c, name in enumerate(classes)},
            "groups": {f"{name} ({int(m.sum())} classes)": line(m) for name, m in groups.items() if m.any()}}


def montage_rows(h, C, won, images, eps_list, rows=4, n=9):
    """[(title, n images)] for the most used, least used and duplicated prototypes, nearest (in cosine) first."""
    hits = torch.bincount(won, minlength=len(C))  # (K,)
    order = hits.argsort(descending=True, stable=True).tolist()
    twins, near = [], 0
    for eps in sorted(e for e in eps_list if e > 0):  # the largest group at the smallest eps that has one
        owner = leaders(C, [eps])[eps]
        size = owner[owner >= 0].bincount(minlength=len(C))
        if size.max() > 1:
            twins, near = (owner == size.argmax()).nonzero()[:, 0].tolist(), eps
            break
    chosen = [("most used", k) for k in order[:rows]] + [("least used", k) for k in order[rows:][-rows:]]
    chosen += [(f"duplicates at {near:g}", k) for k in twins[:rows]]
    H, out = F.normalize(h.float(), dim=1), []  # (N, D)
    for kind, k in chosen:
        best = (H @ F.normalize(C[k].float(), dim=0)).topk(min(n, len(H)))[1].tolist()
        pictures = [images.x[i] if hasattr(images, "x") else images.read(i)[0] for i in best]
        out.append((f"{kind}\n{k} ({int(hits[k])} images)", pictures))
    return out
