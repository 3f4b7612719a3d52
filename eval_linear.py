"""Linear probes of frozen features, by the four protocols of the papers' tables.

    python eval_linear.py RUN_DIR  # lbfgs: Fig. 4b and Table A.1
    python eval_linear.py RUN_DIR --protocol grid  # Tables 3 and C.1
    python eval_linear.py RUN_DIR --protocol sgd  # DINO's own, augmented; Table 2
    python eval_linear.py RUN_DIR --protocol transfer --data flowers  # Table 4
    python eval_linear.py dino_deitsmall16_pretrain.pth --arch vit_small --data FOLDER

The mathematics is in probes.py; the features, computed once and kept next to the checkpoint, come from features.py.

Letters: N training images, M test images, D width of a feature, C classes that have training images.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support import groups
from support import probes
from support import transfer
from data import NAMED, Recipe, batches, indices, load
from support.features import POOLS, cached, embed, fingerprint, load_backbone, record, usable, width
from models import RESNETS

VERSION = "linear-1"  # printed with every number; raise it when anything that changes a number changes
BATCH = 1024  # of sgd: 128 on each of 8 GPUs
# flags that one protocol alone reads: (protocol, default)
OWN = {"weight_decay": ("lbfgs", 0.0), "raw": ("lbfgs", False), "steps": ("grid", 12_500), "epochs": ("sgd", 100),
       "lr": ("sgd", (0.001, 0.01, 0.1, 0.3)), "workers": ("sgd", 0)}


def tokens(protocol, backbone):
    """(layers, pool): DINO's choice for grid and sgd, else the last class token; of a ResNet always the pool."""
    if protocol not in ("grid", "sgd") or backbone.arch in RESNETS:
        return 1, "cls"
    return (1, "cls+mean") if backbone.arch == "vit_base" else (min(4, len(backbone.blocks)), "cls")


# ---------------------------------------------------------------------------------------------------------- protocols
# Each returns {name of a result: predicted labels (M,)}, the headline first, and a line on how it came about.
# labels (C,): the classes that training has, in order; y (N,): column of each training image among them; get: features.

def lbfgs(backbone, train, test, labels, y, get, flags):
    """Fig. 4b, Table A.1 (Appendix B.1.2): softmax regression on the whole set, features standardised unless --raw."""
    x, q = probes.finite(get(train)), probes.finite(get(test))  # (N, D), (M, D)
    if not flags.raw:
        x, q = probes.standardise(x, q)
    W, b, loss = probes.lbfgs(x, y.to(x.device), len(labels), weight_decay=flags.weight_decay)
    fitted = 100 * float((probes.predict(x, W, b).cpu() == y).float().mean())
    return {"test": labels[probes.predict(q, W, b).cpu()]}, (
        f"training loss {loss:.4f}, training accuracy {fitted:.2f} %")


def grid(backbone, train, test, labels, y, get, flags):
    """Tables 3 and C.1: 30 heads on nine tenths of the training set; the best on the other tenth is tested as it is."""
    # differs: features of plain images, computed once, where CAPI crops and flips anew for every step.
    x, q = probes.finite(get(train)), probes.finite(get(test))
    y = y.to(x.device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(42))
    kept, held = (part.to(x.device) for part in probes.hold_out(len(x), 0.1, order))
    W, b = probes.grid(x[kept], y[kept], len(labels), steps=flags.steps, seed=flags.seed, progress=True)
    score = probes.grid_accuracy(x[held], y[held], W, b)  # (H,)
    best = int(score.argmax())  # the first of equals
    lr, wd = probes.GRID[best]
    return {"test": labels[probes.predict(q, W[best], b[best]).cpu()]}, (
        f"of {len(W)} heads, lr {lr:g} with wd {wd:g} is best on {len(held)} held-out images: "
        f"{float(score[best]):.2f} %, the worst {float(score.min()):.2f} %")


def sgd(backbone, train, test, labels, y, get, flags):
    """Table 2, DINO's protocol: random resized crops and flips through the backbone, tested after every epoch."""
    # differs: a small set takes smaller batches, 100 an epoch; of 1,024 images there were too few to learn in.
    batch = min(BATCH, max(64, len(train) // 100), len(train))
    steps = len(train) // batch
    recipe = Recipe(global_size=flags.img_size, n_local=0, global_scale=(0.08, 1.0), jitter_p=0, gray_p=0,
                    blur_p=(0, 0, 0), solarize_p=(0, 0, 0))

    @torch.no_grad()
    def crops():
        views = batches(train, recipe, batch_size=batch, seed=flags.seed, start=0, stop=flags.epochs * steps,
                        device=flags.device, workers=flags.workers)
        with tqdm(total=flags.epochs * steps, desc="sgd", unit="step", leave=False, disable=None) as bar:
            for step, (x, _) in enumerate(views):  # the recipe's second view goes unused
                rows = indices(len(train), batch, flags.seed, step)
                yield embed(backbone, x, flags.layers, flags.pool), y[rows].to(x.device)
                bar.update()

    q, best, when = probes.finite(get(test)), {}, {}
    heads = probes.sgd(crops(), q.shape[1], len(labels), [lr * batch / 256 for lr in flags.lr], epochs=flags.epochs,
                       steps=steps, device=flags.device, seed=flags.seed)
    for epoch, pairs in enumerate(heads, 1):
        last = {lr: labels[probes.predict(q, W, b).cpu()] for lr, (W, b) in zip(flags.lr, pairs)}
        hits = {lr: int((pred == test.y).sum()) for lr, pred in last.items()}
        for lr in last:
            if lr not in best or hits[lr] > best[lr][0]:
                best[lr], when[lr] = (hits[lr], last[lr]), epoch
    results = {}
    for lr in sorted(last, key=lambda lr: -best[lr][0]):  # the headline first
        results |= {f"lr {lr:g}, best": best[lr][1], f"lr {lr:g}, last": last[lr]}
    return results, (f"{flags.epochs} epochs of {steps} steps of {batch}; the best epoch, "
                     f"{', '.join(map(str, when.values()))}, is picked on the test images, as DINO's code does, and so "
                     "is the best lr; the last epoch is not")


def path_of_C(train, val, test, metric, get):
    """Table 4: the best of 45 strengths on val (or on a fifth of train), refitted on both, tested once.
    Returns predicted labels (M,), or scores (M, C) where metric is map11, and a line as above."""
    x, q, y, columns = get(train).cpu(), get(test).cpu(), train.y, metric == "map11"
    if val is None:
        kept, held = probes.hold_out(len(x), 0.2, np.random.RandomState(0).permutation(len(x)))
    else:
        x, y = torch.cat([x, get(val).cpu()]), torch.cat([y, val.y])
        kept, held = torch.arange(len(train)), torch.arange(len(train), len(x))
    probes.finite(x), probes.finite(q)
    models, path = None, []
    for c in tqdm(probes.CS, desc="45 values of C", leave=False, disable=None):
        models = probes.fit_logistic(x[kept], y[kept], c, models)  # goes on from the last value's solution
        path.append((value(metric, probes.apply_logistic(models, x[held], columns), y[held]), models))
    best = max(range(len(path)), key=lambda i: path[i][0])  # the first, weakest, of equals
    # differs: the refit goes on from the chosen C's solution. The official code's goes on from the last C's, all but
    # zero, and where 100 iterations are not enough from there it tests a worse classifier than the one it chose.
    models = probes.fit_logistic(x, y, probes.CS[best], path[best][1])
    return probes.apply_logistic(models, q, columns), (
        f"of {len(path)} values C = {probes.CS[best]:.3g} is best on {len(held)} validation images: "
        f"{path[best][0]:.2f} %")


def value(metric, out, y):
    """The metric of a data set, in percent: top1 and per_class of labels (M,), map11 of scores (M, C)."""
    if metric == "map11":
        return probes.map11(out, y)
    return groups.report(out, y, y.bincount())["all" if metric == "top1" else metric]


# ------------------------------------------------------------------------------------------------------- command line

def sets(flags, args):
    """(name, train, val or None, test, its long tail in words or "") for --data. ValueError without labels."""
    own = flags.data is None or flags.data == args.get("data")
    name, root = args.get("data") if own else flags.data, flags.data_root or args.get("data_root", "data")
    if name is None:
        raise ValueError(f"{flags.checkpoint} does not say on what data it was trained: give --data")
    if flags.protocol == "transfer" and name in transfer.METRIC and name not in NAMED:
        return name, *transfer.load(name, root), ""
    # On its own data the classifier sees what the run itself saw: the same seed, and a long tail if it had one.
    tail = {key: args.get(key, default) if own else default for key, default in
            (("imbalance", 1.0), ("imbalance_law", "exp"))}
    train, test = load(name, root=root, seed=args.get("seed", 0), img_size=args["img_size"], **tail)
    if test is None or train.y is None or test.y is None:
        raise ValueError(f"--data {name} has no labels, and a probe needs labelled training and test images")
    return name, train, None, test, "" if tail["imbalance"] == 1 else (
        f"{tail['imbalance']:g} {tail['imbalance_law']} seed {args.get('seed', 0)}")


def check(flags):
    """Fill in the defaults of the protocol's own flags. ValueError for flags that cannot be, before the long work."""
    for name, (protocol, default) in OWN.items():
        if getattr(flags, name) is None:
            setattr(flags, name, default)
        elif flags.protocol != protocol:
            raise ValueError(f"--{name.replace('_', '-')} is read by --protocol {protocol} alone, not {flags.protocol}")
    for name in ("batch_size", "epochs", "steps"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(flags, name)}")
    if not min(flags.lr) > 0 or not flags.weight_decay >= 0:
        raise ValueError(f"--lr must be above 0 and --weight-decay at least 0, got {min(flags.lr):g} and "
                         f"{flags.weight_decay:g}")
    groups.members([], flags.head, flags.tail)
    if flags.dump and (Path(flags.dump).is_dir() or not Path(flags.dump).absolute().parent.is_dir()):
        raise ValueError(f"--dump {flags.dump} must be a file in a folder that exists")
    flags.device = usable(flags.device)


def evaluate(flags):
    check(flags)
    backbone, args, info = load_backbone(flags.checkpoint, flags.which, flags.arch, img_size=flags.img_size)
    print(info)
    flags.img_size = args["img_size"]
    layers, pool = tokens(flags.protocol, backbone)
    flags.layers, flags.pool = layers if flags.layers is None else flags.layers, flags.pool or pool
    D = width(backbone, flags.layers, flags.pool)
    name, train, val, test, imbalance = sets(flags, args)
    backbone.to(flags.device)
    folder = Path(flags.checkpoint) if Path(flags.checkpoint).is_dir() else Path(flags.checkpoint).parent

    def get(images):
        return cached(backbone, images, flags.img_size, None if flags.no_cache else folder / "features",
                      layers=flags.layers, pool=flags.pool, crop=flags.protocol != "transfer", device=flags.device,
                      batch_size=flags.batch_size, progress=True).to(flags.device)

    if flags.dump:
        torch.save({"train_x": get(train).cpu(), "train_y": train.y, "test_x": get(test).cpu(), "test_y": test.y},
                   flags.dump)
    metric, known = "top1", train.y
    if flags.protocol == "transfer":
        metric, known = transfer.METRIC.get(name, "top1"), known if val is None else torch.cat([known, val.y])
        out, note = path_of_C(train, val, test, metric, get)
        results = {"test": out}
    else:
        labels, y = train.y.unique(return_inverse=True)  # (C,), (N,)
        results, note = {"lbfgs": lbfgs, "grid": grid, "sgd": sgd}[flags.protocol](
            backbone, train, test, labels, y, get, flags)
    if metric == "map11":
        tables = {key: {"map11": probes.map11(scores, test.y)} for key, scores in results.items()}
    else:
        counts = known.bincount(minlength=max(len(train.classes), int(test.y.max()) + 1))  # (classes,)
        tables = {key: groups.report(pred, test.y, counts, flags.head, flags.tail) for key, pred in results.items()}

    print(f"{name}: {len(known)} training images, {len(test)} test images, {len(train.classes)} classes")
    print(f"protocol {VERSION} {flags.protocol}: {flags.which}'s features, layers {flags.layers}, pool {flags.pool} "
          f"({D}-d, float32), {flags.img_size} px; {note}")
    print_tables(tables, metric, flags)
    row = {"tool": "eval_linear", "protocol": f"{VERSION} {flags.protocol}", "checkpoint": flags.checkpoint,
           "weights": fingerprint(backbone), "which": flags.which, "arch": backbone.arch,
           **{key: args.get(key, "") for key in ("method", "prototypes", "num_prototypes")},
           "data": name, "imbalance": imbalance, "train": len(known), "test": len(test), "metric": metric}
    keep(flags.results or folder / "results.csv", row, tables, flags)
    headline = next(iter(tables.values()))
    return {"protocol": flags.protocol, "metric": metric, "accuracy": headline["all" if metric == "top1" else metric],
            "results": tables, "note": note, "data": name, "train": len(known), "test": len(test),
            "layers": flags.layers, "pool": flags.pool, "weights": row["weights"]}


def keep(path, row, tables, flags):
    """Append each result with what it was made of to the csv file at path; where that cannot be, say so and go on."""
    own = {key: getattr(flags, key) for key, (protocol, _) in OWN.items() if protocol == flags.protocol}
    own = " ".join(f"{key}={','.join(map(str, v)) if key == 'lr' else v}" for key, v in own.items())
    row |= {"img_size": flags.img_size, "layers": flags.layers, "pool": flags.pool, "seed": flags.seed,
            "head_above": flags.head, "tail_below": flags.tail, "settings": own}
    try:
        for key, table in tables.items():
            record(path, row | {"result": key} | {
                k: "" if v is None else round(v, 4) for k, v in table.items() if k != "classes"})
    except OSError as error:
        print(f"the numbers are not kept: {error}")


def print_tables(tables, metric, flags):
    """One line per result, percent."""
    if metric == "map11":
        for name, table in tables.items():
            print(f"{name:>16}   11-point mAP {table['map11']:.2f} %")
        return
    classes = next(iter(tables.values()))["classes"]
    columns = ["all", "per_class", *(n for n in groups.NAMES if classes[n])]
    titles = ["top-1 %", "per class", *(f"{n} ({classes[n]})" for n in columns[2:])]
    print(" " * 16 + "".join(f"{title:>15}" for title in titles))
    for name, table in tables.items():
        cells = ("-" if table[c] is None else f"{table[c]:.2f}" for c in columns)
        print(f"{name:>16}" + "".join(f"{cell:>15}" for cell in cells))
    print(f"{'':16}head: classes of more than {flags.head} training images, tail: of fewer than {flags.tail}")


def main(argv=None):
    """Run the command line. Returns {"protocol", "metric", "accuracy" (the headline, percent), "results": {name: what
    groups.report gives, or {"map11"}}, "note", "data", "train", "test" (numbers of images), "layers", "pool",
    "weights" (hash)}. Bad input: one sentence on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description="Linear probes of frozen features.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT|RUN_DIR", help="a ckpt.pt, the directory it lies in, or a foreign file with --arch")
    add("--protocol", choices=["lbfgs", "grid", "sgd", "transfer"], default="lbfgs", help="whose rules, see above")
    add("--arch", help="architecture of a foreign file: DINO's, torchvision's, timm's; None: a run of train.py")
    add("--data", metavar="NAME|FOLDER", help="labelled images; None: those the run was trained on")
    add("--data-root", metavar="DIR", help="where named data sets lie; None: as in the run")
    add("--img-size", type=int, metavar="PX", help="side of the images; None: what the backbone was made for")
    add("--which", choices=["teacher", "student"], default="teacher", help="papers report the teacher")
    add("--layers", type=int, metavar="N", help="class tokens of the last N blocks; None: 1, or 4 for grid, sgd")
    add("--pool", choices=POOLS, help="class tokens, mean patch; None: cls, or both for a ViT-B's grid, sgd")
    add("--raw", action="store_true", default=None, help="lbfgs: features as they are, not standardised")
    add("--weight-decay", type=float, metavar="WD", help="lbfgs: WD / 2 |W|^2 is added to the mean loss; None: 0")
    add("--steps", type=int, metavar="N", help="grid: steps of 1,024 images; None: 12,500")
    add("--epochs", type=int, metavar="N", help="sgd: passes over the training images; None: 100")
    add("--lr", type=float, nargs="+", help="sgd: rates per 256 images of a batch, a head for each; None: 0.001 "
        "(DINO's, for the 125,000 steps of ImageNet), 0.01, 0.1 and 0.3 (for small sets)")
    add("--workers", type=int, metavar="N", help="sgd: processes that decode images on disk; None: 0")
    add("--head", type=int, default=100, metavar="N", help="head classes have more training images than this")
    add("--tail", type=int, default=20, metavar="N", help="tail classes have fewer training images than this")
    add("--seed", type=int, default=0, help="of heads and crops; splits are the same for every seed")
    add("--batch-size", type=int, default=512, help="images per forward pass; changes speed only")
    add("--device", default="auto", help="auto: cuda where there is one, else cpu")
    add("--dump", metavar="FILE", help="torch.save {train_x, train_y, test_x, test_y} there, of plain images")
    add("--no-cache", action="store_true", help="neither read nor write features/ next to the checkpoint")
    add("--results", metavar="FILE", help="csv file to append to; None: results.csv next to the checkpoint")
    flags = parser.parse_args(argv)
    try:
        return evaluate(flags)
    except ValueError as error:
        print(f"eval_linear.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
