"""Classifiers on frozen features, by the protocols of the papers' tables. All but `attentive` are
linear.

    python eval_linear.py RUN_DIR  # lbfgs: Fig. 4b and Table A.1
    python eval_linear.py RUN_DIR --protocol grid  # Tables 3 and C.1
    python eval_linear.py RUN_DIR --protocol attentive  # CAPI's, which looks at the patches
    python eval_linear.py RUN_DIR --protocol sgd  # DINO's own, augmented; Table 2
    python eval_linear.py RUN_DIR --protocol transfer --data flowers  # Table 4
    python eval_linear.py dino_deitsmall16_pretrain.pth --arch vit_small --data FOLDER

The mathematics is in support/probes.py. The features are computed once and kept next to the
checkpoint (`cached` in support/backbones.py). `attentive` needs all patches of all images and
computes them at each call: it holds those of the training images in memory, and the others a batch
at a time.

Letters: N training images, M test images, n patches of an image, D width of a feature, C classes
that have training images, H heads.
"""
import argparse

import numpy as np
import torch
from tqdm import tqdm

import data
from models import VITS
from support import evaluation
from support import features
from support import groups
from support import probes
from support import transfer
from support.errors import one_sentence
from support.features import POOLS, embed
from support.flags import Help
from views import Recipe, batches, indices

VERSION = "linear-2"  # printed with every number; raise it with every change that changes a number
BATCH = 1024  # of sgd: 128 on each of 8 GPUs
MOST = 2 ** 31  # numbers that attentive holds in memory: 8.6 GB
LINEAR = ("lbfgs", "grid", "sgd", "transfer")  # protocols that see an image as one vector
# Flags that not every protocol reads: (the protocols that do, default).
PROTOCOL_FLAGS = {
    "weight_decay": (("lbfgs",), 0.0),
    "raw": (("lbfgs",), False),
    "steps": (("grid", "attentive"), 12_500),
    "epochs": (("sgd",), 100),
    "lr": (("sgd",), (0.001, 0.01, 0.1, 0.3)),
    "workers": (("sgd",), 0),
    "seed": (("grid", "attentive", "sgd"), 0),
    "layers": (LINEAR, None),
    "pool": (LINEAR, None),
    "dump": (LINEAR, None),
}
# those that stand in the column "settings" of results.csv
IN_SETTINGS = ("weight_decay", "raw", "steps", "epochs", "lr", "workers")
# (what a value must be, test, flags)
RANGES = [
    ("be at least 1", lambda v: v >= 1, ["layers", "steps", "epochs"]),
    ("be above 0", lambda v: v > 0, ["lr"]),
    ("not be negative", lambda v: v >= 0, ["weight_decay", "seed"]),
    ("lie in [0, 1000]", lambda v: 0 <= v <= 1000, ["workers"]),
]


def default_feature(protocol, backbone):
    """(layers, pool) of a protocol: DINO's choice for grid and sgd, otherwise the last class token.
    A ResNet has its average pool and no more, and CAPI's ViT the mean of its patches."""
    if protocol not in ("grid", "sgd") or backbone.arch not in VITS:
        return 1, "cls"
    if backbone.arch == "vit_base":
        return 1, "cls+mean"
    return min(4, len(backbone.blocks)), "cls"


# ---- protocols -----------------------------------------------------------------------------------
# Each returns {name of a result: predicted labels (M,)}, the headline first, and a line that says
# how it came about.
#
# x (N, D), q (M, D)   features of the training and the test images
# labels (C,)          the labels that the training images have, in order
# y (N,)               place of each training image's label in `labels`

def lbfgs(x, y, q, labels, flags):
    """Fig. 4b, Table A.1 (Appendix B.1.2): softmax regression on the whole set, on features that
    are standardised unless --raw."""
    if not flags.raw:
        x, q = probes.standardise(x, q)
    y = y.to(x.device)
    W, b, loss = probes.lbfgs(x, y, len(labels), weight_decay=flags.weight_decay)
    right = (probes.predict(x, W, b) == y).float().mean()
    predicted = labels[probes.predict(q, W, b).cpu()]  # (M,)
    note = f"training loss {loss:.4f}, training accuracy {100 * float(right):.2f} %"
    return {"test": predicted}, note


def grid(x, y, q, labels, flags):
    """Tables 3 and C.1: 30 heads are trained on nine tenths of the training set, and the one that
    is best on the other tenth is tested as it is."""
    # differs: features of plain images, computed once; CAPI crops and flips anew for every step.
    y = y.to(x.device)
    train, val = (part.to(x.device) for part in held_out_tenth(len(x)))
    W, b = probes.grid(x[train], y[train], len(labels), steps=flags.steps, seed=flags.seed,
                       progress=True)  # (H, C, D), (H, C)
    best, note = best_head(probes.grid_accuracy(x[val], y[val], W, b), len(val))
    predicted = labels[probes.predict(q, W[best], b[best]).cpu()]  # (M,)
    return {"test": predicted}, note


def held_out_tenth(N):
    """(training, validation): indices of N images, the same for every seed."""
    return probes.split(N, 0.1, torch.randperm(N, generator=torch.Generator().manual_seed(42)))


def best_head(score, n_val):
    """(index of the head with the best score, a line about it). score (H,): top-1 in percent on
    n_val held-out images."""
    best = int(score.argmax())  # the first of equal ones
    lr, wd = probes.GRID[best]
    return best, (f"of {len(score)} heads, lr {lr:g} with wd {wd:g} is best on {n_val} held-out "
                  f"images: {float(score[best]):.2f} %, the worst {float(score.min()):.2f} %")


def attentive(backbone, train, y, test, labels, flags):
    """CAPI's attentive probe: as grid, but each of the 30 heads looks at all patches of an image
    with a learned query. train, test: images; y (N,).

    The patches of the training images, N n D numbers, are held in memory, up to MOST of them. Of
    other images those of a batch are.
    """
    probes.look_width(backbone.dim)  # refuses before the long work
    fit, val = held_out_tenth(len(train))
    x = gather(patch_batches(backbone, data.subset(train, fit), flags), len(fit))  # (N, n, D)
    heads = probes.attentive(x, y[fit], len(labels), steps=flags.steps, seed=flags.seed,
                             device=flags.device, progress=True)
    predicted = probes.attentive_predict(patch_batches(backbone, data.subset(train, val), flags),
                                         heads)  # (H, images)
    score = 100 * (predicted == y[val]).double().mean(1)  # (H,)
    best, note = best_head(score, len(val))
    head = probes.Attentive(*(part[best:best + 1] for part in heads))
    predicted, = probes.attentive_predict(patch_batches(backbone, test, flags), head)  # (M,)
    return {"test": labels[predicted]}, note


def patch_batches(backbone, images, flags):
    """Yield the patches (B, n, D) of a batch of plain images, on the CPU. ValueError if they are
    not finite."""
    for x in features.patch_batches(backbone, images, flags.img_size, device=flags.device,
                                    batch_size=flags.batch_size, progress=True, mean=flags.mean,
                                    std=flags.std):
        evaluation.check_finite(x, f"{flags.checkpoint}: its network gives patches")
        yield x


def gather(batches, N):
    """The patches (N, n, D) of N images, from batches (B, n, D). ValueError where they are more
    than MOST numbers."""
    x, done = None, 0
    for batch in batches:
        if x is None:
            n, D = batch.shape[1:]
            if N * n * D > MOST:
                raise ValueError(
                    f"--protocol attentive would hold {N} images of {n} patches of {D} numbers in "
                    f"memory, {N * n * D * 4 / 1e9:.1f} GB, and stops at {MOST * 4 / 1e9:.1f}: "
                    "lower --img-size, or give smaller --data")
            x = torch.empty(N, n, D)
        x[done:done + len(batch)] = batch
        done += len(batch)
    return x


def sgd(backbone, train, y, q, test_y, labels, flags):
    """Table 2, DINO's protocol: random resized crops and flips go through the backbone, and the
    heads, one for each --lr, are tested after every epoch. train: images; test_y (M,)."""
    # differs: a small set takes smaller batches, 100 an epoch; batches of 1,024 would leave it too
    # few steps to learn in.
    batch_size = min(BATCH, max(64, len(train) // 100), len(train))
    steps = len(train) // batch_size
    recipe = Recipe(global_size=flags.img_size, n_local=0, global_scale=(0.08, 1.0), jitter_p=0,
                    gray_p=0, blur_p=(0, 0, 0), solarize_p=(0, 0, 0), mean=flags.mean,
                    std=flags.std)

    @torch.no_grad()
    def training_batches():
        views = batches(train, recipe, batch_size=batch_size, seed=flags.seed, start=0,
                        stop=flags.epochs * steps, device=flags.device, workers=flags.workers)
        bar = tqdm(total=flags.epochs * steps, desc="sgd", unit="step", leave=False, disable=None)
        with bar:
            for step, (x, _) in enumerate(views):  # a recipe has two views; one is used
                chosen = indices(len(train), batch_size, flags.seed, step)  # (batch,)
                yield embed(backbone, x, flags.layers, flags.pool), y[chosen].to(x.device)
                bar.update()

    rates = [lr * batch_size / 256 for lr in flags.lr]
    epochs = probes.sgd(training_batches(), q.shape[1], len(labels), rates, epochs=flags.epochs,
                        steps=steps, device=flags.device, seed=flags.seed)
    last, best, best_hits, best_epoch = {}, {}, {}, {}  # of each lr
    for epoch, heads in enumerate(epochs, 1):
        for lr, (W, b) in zip(flags.lr, heads):
            last[lr] = labels[probes.predict(q, W, b).cpu()]  # (M,)
            hits = int((last[lr] == test_y).sum())
            if hits > best_hits.get(lr, -1):
                best[lr], best_hits[lr], best_epoch[lr] = last[lr], hits, epoch
    results = {}
    rates_in_order = sorted(last, key=lambda lr: -best_hits[lr])  # the headline first
    for lr in rates_in_order:
        results[f"lr {lr:g}, best"] = best[lr]
        results[f"lr {lr:g}, last"] = last[lr]
    note = (f"{flags.epochs} epochs of {steps} steps of {batch_size}; the best epoch, "
            f"{', '.join(f'{best_epoch[lr]} of lr {lr:g}' for lr in rates_in_order)}, is picked on "
            "the test images, as DINO's code does, and so is the best lr; the last epoch is not")
    return results, note


def best_strength(train_x, train_y, val_x, val_y, q, metric):
    """Table 4: of 45 strengths of regularisation (scikit-learn's C, its inverse) the one that is
    best on the validation images is fitted again to all of them, and tested once.

    val_x None: a fifth of the training images serves for validation. Features and labels lie on the
    CPU. The result is predicted labels (M,), or scores (M, C) where the metric is map11.
    """
    scores_wanted = metric == "map11"
    if val_x is None:
        x, y = train_x, train_y
        order = np.random.RandomState(0).permutation(len(x))
        train, val = probes.split(len(x), 0.2, order)
    else:
        x, y = torch.cat([train_x, val_x]), torch.cat([train_y, val_y])
        train, val = torch.arange(len(train_x)), torch.arange(len(train_x), len(x))
    models, tried = None, []  # tried: (score, models) of each strength
    for strength in tqdm(probes.STRENGTHS, desc=f"{len(probes.STRENGTHS)} strengths", leave=False,
                         disable=None):
        # goes on from the models of the strength before
        models = probes.fit_logistic(x[train], y[train], strength, models)
        score = percent(metric, probes.apply_logistic(models, x[val], scores_wanted), y[val])
        tried.append((score, models))
    best = max(range(len(tried)), key=lambda i: tried[i][0])  # of equal ones the weakest
    score, models = tried[best]
    # differs: the second fit goes on from the chosen strength's solution. The official code's goes
    # on from the last one's, all but zero, and where 100 iterations are not enough from there it
    # tests a worse classifier than the one it chose.
    models = probes.fit_logistic(x, y, probes.STRENGTHS[best], models)
    note = (f"of {len(tried)} strengths C = {probes.STRENGTHS[best]:.3g} is best on {len(val)} "
            f"validation images: {score:.2f} %")
    return {"test": probes.apply_logistic(models, q, scores_wanted)}, note


def percent(metric, out, y):
    """The metric of a data set: top1 and per_class of labels (M,), map11 of scores (M, C)."""
    if metric == "map11":
        return probes.map11(out, y)
    counts = y.bincount()  # any would do, as they only divide classes into head, medium and tail
    return groups.report(out, y, counts)["all" if metric == "top1" else metric]


# ---- command line --------------------------------------------------------------------------------

def parser():
    p = argparse.ArgumentParser(
        "eval_linear.py", allow_abbrev=False,
        formatter_class=Help,
        description="Probes of frozen features.")
    evaluation.add_common_flags(p)
    add = p.add_argument
    add("--protocol", choices=["lbfgs", "grid", "attentive", "sgd", "transfer"],
        default="lbfgs",
        help="lbfgs: Fig. 4b; grid: Table 3; attentive: CAPI's, on patches; sgd: Table 2; "
        "transfer: Table 4")
    add("--layers", type=int, metavar="N",
        help="class tokens of the last N blocks; None: 1; with grid and sgd 4, or all if fewer, "
        "of a ViT smaller than ViT-B")
    add("--pool", choices=POOLS,
        help="cls: class token; mean: of the patches; cls+mean: both; predictor: of zoo/capi.py; "
        "None: cls, for grid and sgd of a ViT-B cls+mean")
    add("--raw", action="store_true", default=None,
        help="lbfgs: features as they are, not standardised")
    add("--weight-decay", type=float, metavar="WD",
        help="lbfgs: WD / 2 |W|^2 is added to the mean loss; None: 0")
    add("--steps", type=int, metavar="N",
        help="grid, attentive: steps of 1,024 images; None: 12,500")
    add("--epochs", type=int, metavar="N",
        help="sgd: passes over the training images; None: 100")
    add("--lr", type=float, nargs="+",
        help="sgd: rates per 256 images of a batch, a head for each; None: 0.001 (DINO's, for the "
        "125,000 steps of ImageNet), 0.01, 0.1 and 0.3 (for small sets)")
    add("--workers", type=int, metavar="N",
        help="sgd: processes that decode images on disk; None: 0")
    add("--seed", type=int,
        help="grid, attentive, sgd: of heads and crops; splits are the same for every seed; None: "
        "0")
    return p


def check_flags(flags):
    """ValueError, before the long work, for flags that cannot be. Sets the device, and the defaults
    of the flags that only the chosen protocol reads."""
    evaluation.check_common_flags(flags, RANGES)
    for name, (protocols, default) in PROTOCOL_FLAGS.items():
        if getattr(flags, name) is None:
            setattr(flags, name, default)
        elif flags.protocol not in protocols:
            raise ValueError(f"--{name.replace('_', '-')} is read by --protocol "
                             f"{' or '.join(protocols)} alone, not {flags.protocol}")


def open_images(flags, args):
    """(name, train, val or None, test, own) of --data; own: whether they are the run's own images.
    ValueError without labels or a test split."""
    name = evaluation.data_name(flags, args)
    if flags.protocol == "transfer" and name in transfer.METRIC and name not in data.SETS:
        return name, *transfer.load(name, flags.data_root or args.get("data_root", "data")), False
    train, test, own = evaluation.load_images(name, args, flags.data_root)
    if train.y is None:
        raise ValueError(f"--data {name} has no labels, and a probe needs labelled training and "
                         "test images")
    if test is None:
        raise ValueError(f"--data {name} has no test split, and a probe is tested on images that "
                         "it was not fitted to")
    return name, train, None, test, own


def evaluate(flags):
    """What main does once the flags are parsed."""
    check_flags(flags)
    backbone, args = evaluation.open_backbone(flags, flags.img_size)
    flags.img_size, flags.mean, flags.std = args["img_size"], args["mean"], args["std"]
    if flags.protocol == "attentive":
        flags.layers, flags.pool, D = 1, "patches", backbone.dim
    else:
        layers, pool = default_feature(flags.protocol, backbone)
        flags.pool = flags.pool or pool
        if flags.pool == "mean":
            if flags.layers not in (None, 1):
                raise ValueError("--pool mean takes the patches of the last block alone, got "
                                 f"--layers {flags.layers}")
            layers = 1
        flags.layers = layers if flags.layers is None else flags.layers
        D = features.width(backbone, flags.layers, flags.pool)
        flags.pool = features.pool_named(backbone, flags.pool)
    name, train, val, test, own = open_images(flags, args)
    backbone.to(flags.device)

    def features_of(images):
        return evaluation.features_of(images, backbone, flags, args, flags.layers, flags.pool,
                                      crop=flags.protocol != "transfer")

    known_y = train.y if val is None else torch.cat([train.y, val.y])  # of all but the test images
    metric = "top1"
    if flags.protocol == "transfer":
        metric = transfer.METRIC.get(name, "top1")
        val_x, val_y = (None, None) if val is None else (features_of(val), val.y)
        results, note = best_strength(features_of(train), train.y, val_x, val_y, features_of(test),
                                      metric)
    else:
        results, note = probe(backbone, train, test, features_of, flags)
    if metric == "map11":
        tables = {key: {"map11": probes.map11(out, test.y)} for key, out in results.items()}
    else:
        classes = max(len(train.classes), int(test.y.max()) + 1)
        counts = known_y.bincount(minlength=classes)  # (classes,)
        tables = {key: groups.report(out, test.y, counts, flags.head, flags.tail)
                  for key, out in results.items()}

    print(f"{name}: {len(known_y)} training images, {len(test)} test images, "
          f"{len(train.classes)} classes")
    print(f"protocol {VERSION} {flags.protocol}: {flags.which}'s features, layers {flags.layers}, "
          f"pool {flags.pool} ({D}-d, float32), {flags.img_size} px, "
          f"{evaluation.normalisation(args)}; {note}")
    print_tables(tables, metric, flags)

    row = evaluation.result_row("eval_linear", f"{VERSION} {flags.protocol}", flags, backbone, args,
                                name)
    seed = flags.seed if flags.protocol in PROTOCOL_FLAGS["seed"][0] else ""
    row |= {"imbalance": long_tail(args) if own else "", "train": len(known_y), "test": len(test),
            "metric": metric, "img_size": flags.img_size, "layers": flags.layers,
            "pool": flags.pool, "seed": seed, "head_above": flags.head,
            "tail_below": flags.tail, "settings": settings(flags)}
    evaluation.append_results(flags, row, tables)
    if flags.dump:
        known = torch.cat([features_of(part) for part in (train, val) if part is not None])
        evaluation.dump(flags.dump, known, known_y, features_of(test), test.y)
    headline = next(iter(tables.values()))
    return {"protocol": flags.protocol, "metric": metric,
            "accuracy": headline["all" if metric == "top1" else metric], "results": tables,
            "note": note, "data": name, "train": len(known_y), "test": len(test),
            "layers": flags.layers, "pool": flags.pool, "weights": row["weights"]}


def probe(backbone, train, test, features_of, flags):
    """The results and the note of the protocols that know one label for each image."""
    labels, y = train.y.unique(return_inverse=True)  # (C,), (N,)
    if flags.protocol == "sgd":
        q = features_of(test).to(flags.device)  # (M, D)
        return sgd(backbone, train, y, q, test.y, labels, flags)
    if flags.protocol == "attentive":
        return attentive(backbone, train, y, test, labels, flags)
    x = features_of(train).to(flags.device)  # (N, D)
    q = features_of(test).to(flags.device)  # (M, D)
    return {"lbfgs": lbfgs, "grid": grid}[flags.protocol](x, y, q, labels, flags)


def long_tail(args):
    """The long tail of a run's own data in words, "" where it has none."""
    imbalance = args.get("imbalance", 1.0)
    if imbalance == 1:
        return ""
    return f"{imbalance:g} {args.get('imbalance_law', 'exp')} seed {args.get('seed', 0)}"


def settings(flags):
    """The flags that the chosen protocol reads and others do not, as they stand in results.csv."""
    words = []
    for name in IN_SETTINGS:
        if flags.protocol in PROTOCOL_FLAGS[name][0]:
            value = getattr(flags, name)
            words.append(f"{name}={','.join(map(str, value)) if name == 'lr' else value}")
    return " ".join(words)


def print_tables(tables, metric, flags):
    """One line for each result, in percent."""
    if metric == "map11":
        for name, table in tables.items():
            print(f"{name:>16}   11-point mAP {table['map11']:.2f} %")
        return
    classes = next(iter(tables.values()))["classes"]
    names = evaluation.groups_with_classes(tables)
    titles = ["top-1 %", "per class", *(f"{name} ({classes[name]})" for name in names)]
    print(" " * 16 + "".join(f"{title:>15}" for title in titles))
    for result, table in tables.items():
        line = f"{result:>16}"
        for column in ["all", "per_class", *names]:
            line += f"{'-':>15}" if table[column] is None else f"{table[column]:15.2f}"
        print(line)
    print(f"{'':16}head: classes of more than {flags.head} training images, "
          f"tail: of fewer than {flags.tail}")


def main(argv=None):
    """Run the command line. Bad input: one sentence on stderr and exit code 2.

    Returns {"protocol", "metric", "accuracy": the headline in percent, "results": {name:
    groups.report, or {"map11"}}, "note", "data", "train", "test" (numbers of images), "layers",
    "pool", "weights": hash of the backbone}.
    """
    flags = parser().parse_args(argv)
    with one_sentence("eval_linear.py"):
        return evaluate(flags)


if __name__ == "__main__":
    main()
