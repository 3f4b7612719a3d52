"""What a frozen backbone knows about each patch of an image: segmentation by CAPI's protocol.

    python -m lab.eval_dense RUN_DIR                          # the built-in images, a few minutes
    python -m lab.eval_dense RUN_DIR --probe knn --picture segmented.png
    python -m lab.eval_dense dino_vits16.pth --arch vit_small --data VOCdevkit/VOC2012

A sample is one patch of p x p pixels: its feature, and the labels of its pixels. Two probes predict
the labels of the test images' pixels from the training patches; the backbone stays as it is.

    k-NN     a pixel gets the label that most of the k nearest patches have at the same place
    linear   a softmax regression predicts the commonest label of a patch, and all its pixels get it

Images and label maps are squeezed to --img-size, without regard to their aspect. Every feature is
standardised on the training patches. A tenth of the training images chooses k and the similarity,
or the strength of the regularisation; then the probe is fitted again to all of them.

The number is the mIoU, a mean over classes: the pixels that have a class in truth and in the
prediction, divided by those that have it in either; all test images are counted together. A class
that occurs in neither is left out, and pixels of the label 255 ("ignored") are not counted. Beside
the backbone stand the same probes on raw pixels and on the same network with untrained weights. The
commonest label everywhere shows what knowing nothing gives. With each patch's own commonest label
as many pixels are right as one label for each patch allows, and the mIoU is about the largest.

A folder must be laid out as PASCAL VOC, see support/segmented.py.

Letters: n images of S x S pixels, g x g patches of an image, p = S / g pixels of a patch's side,
D dimensions of a feature, C classes, N patches in the bank, M and q patches to predict.
"""
import argparse
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from eval_knn import largest
from support import backbones, evaluation, plots, probes, segmented
from support.errors import one_sentence
from support.features import patch_batches
from support.flags import Help
from support.pixels import IGNORED

# Printed with every number; raise it when anything that changes a number changes.
PROTOCOL = "dense-1"
# Settings that each probe tries; of equally good ones the first is taken
KNN = list(itertools.product((1, 3, 10, 30), ("cosine", "L2")))  # (k, similarity)
LINEAR = (10 ** np.linspace(-6, 5, 8)).tolist()  # scikit-learn's C
MAX_ITER = 1000  # of L-BFGS
BLOCK, ROWS = 2 ** 24, 256  # most similarities, and most queries, in memory at a time
IMAGES = {"shapes": (1000, 500)}  # training and test images by default
IMAGES_OF_FOLDER = (300, 100)  # an image of 224 px has many patches
PICTURES = 6  # test images in a picture
RESULTS = "results_dense.csv"  # in the run's folder
# (what a value must be, test, flags)
RANGES = [("be at least 1", lambda v: v >= 1, ["img_size", "test_images"]),
          ("be at least 2, as some are held out", lambda v: v >= 2, ["train_images"]),
          ("not be negative", lambda v: v >= 0, ["seed"])]


# ---- patches -------------------------------------------------------------------------------------

def grid_side(n, size):
    """g, where an image of size x size pixels has n patches in g rows of g, each of size / g
    pixels. ValueError where they cannot be laid out so."""
    g = math.isqrt(n)
    if g < 1 or g * g != n:
        raise ValueError(f"--img-size {size}: the backbone gives {n} patches, which are no square "
                         "grid")
    if size % g:
        raise ValueError(f"--img-size {size}: the backbone gives {g} x {g} patches, and {size} "
                         f"pixels cannot be divided into {g} equal parts")
    return g


def cut(maps, g):
    """(n, S, S) -> (n, g*g, p, p): the patches of each map, row by row, as a backbone's."""
    n, S, _ = maps.shape
    p = S // g
    return maps.reshape(n, g, p, g, p).transpose(2, 3).reshape(n, g * g, p, p)


def paste(patches, g):
    """(n, g*g, p, p) -> (n, S, S): what `cut` has cut."""
    n, _, p, _ = patches.shape
    return patches.reshape(n, g, g, p, p).transpose(2, 3).reshape(n, g * p, g * p)


def pixel_features(x, g):
    """(n, g*g, 3*p*p) float32: the pixels of each patch of images x (n, 3, S, S) uint8."""
    n = len(x)
    patches = cut(x.flatten(0, 1), g).flatten(2)  # (n*3, g*g, p*p)
    patches = patches.view(n, 3, g * g, -1).transpose(1, 2)  # (n, g*g, 3, p*p)
    return patches.flatten(2).float() / 255


def modal(maps, without_ignored=False):
    """(...) uint8: the commonest label of each patch of maps (..., p, p), IGNORED being one as any
    other. Of equally common ones the smallest is taken. without_ignored: IGNORED is not counted; a
    patch of nothing else gets 0."""
    labels = maps.flatten(-2).long()  # (..., p*p)
    counts = torch.zeros(*labels.shape[:-1], IGNORED + 1, dtype=torch.int32, device=maps.device)
    counts.scatter_add_(-1, labels, torch.ones_like(labels, dtype=torch.int32))  # (..., 256)
    if without_ignored:
        counts[..., IGNORED] = 0
    return counts.argmax(-1).to(torch.uint8)


class Patches(NamedTuple):
    """The patches of n images."""
    x: torch.Tensor  # (n, g*g, D) float32
    maps: torch.Tensor  # (n, g*g, p, p) uint8

    def of(self, images):
        """The patches of the images at these indices."""
        return Patches(self.x[images], self.maps[images])

    def to_fit(self):
        """(x (N, D), maps (N, p, p)) of the patches whose commonest label is not IGNORED.
        ValueError where there are none."""
        x, maps = self.x.flatten(0, 1), self.maps.flatten(0, 1)  # (n*g*g, D), (n*g*g, p, p)
        kept = modal(maps) != IGNORED  # (n*g*g,)
        if not kept.any():
            raise ValueError(f"in every patch of the training images {IGNORED}, ignored, is the "
                             "commonest label, so a probe has nothing to be fitted to; take more "
                             "--train-images")
        return x[kept], maps[kept]


# ---- the two probes ------------------------------------------------------------------------------
# A probe gets the bank x (N, D) and the queries q (M, D), both standardised, the bank's maps (N, p,
# p), some of its settings and C. It yields (setting, predicted maps (M, p, p) uint8 on the CPU) for
# each.

def nearest(x, q, k, similarity):
    """Yield (first query, index (rows, k)): the patches of the bank x (N, D) that are most similar
    to each of the queries q (M, D), k <= N. The most similar comes first, of equal ones that with
    the smaller index. similarity: cosine, or L2, the one of smallest distance. So many queries go
    at a time that memory stays bounded."""
    if similarity == "cosine":
        x, q = F.normalize(x, dim=1), F.normalize(q, dim=1)
        half = x.new_zeros(())
    else:
        half = x.square().sum(1) / 2  # (N,)
    rows = max(1, min(ROWS, BLOCK // len(x)))
    for first in range(0, len(q), rows):
        # |q - x|^2 = |q|^2 - 2 (q.x - |x|^2 / 2), and |q|^2 is the same for all x
        closeness = q[first:first + rows] @ x.T - half  # (rows, N)
        yield first, largest(closeness, k)[1]


def knn(x, maps, q, settings, C):
    """Settings are (k, similarity). Each pixel gets the label that is commonest at its place in the
    maps of the k nearest patches, the smallest of equally common ones; a k beyond N is N."""
    # differs: CAPI lets ignored pixels vote, for a label that is always wrong. Here they do not
    # vote; where nothing else is left, the commonest label of the nearest patch stands in.
    commonest = modal(maps)  # (N,)
    h, w = maps.shape[1:]
    for similarity in dict.fromkeys(similarity for _, similarity in settings):
        ks = sorted({k for k, other in settings if other == similarity})
        predicted = {k: torch.empty(len(q), h, w, dtype=torch.uint8) for k in ks}
        bar = tqdm(total=len(q), desc=f"k-NN, {similarity}", leave=False, disable=None)
        with bar:
            for first, index in nearest(x, q, min(ks[-1], len(x)), similarity):
                labels = maps[index].long().clamp(max=C)  # (q, k, p, p); C stands for IGNORED
                votes = labels.new_zeros(len(index), C + 1, h, w, dtype=torch.int32)
                counted = 0
                for k in ks:  # the neighbours of a smaller k are the first ones of a larger k
                    more = labels[:, counted:k]
                    votes.scatter_add_(1, more, torch.ones_like(more, dtype=torch.int32))
                    counted = k
                    most, winner = votes[:, :C].max(1).values, votes[:, :C].argmax(1)  # (q, p, p)
                    stand_in = commonest[index[:, 0], None, None].long()  # (q, 1, 1)
                    winner = winner.where(most > 0, stand_in)
                    predicted[k][first:first + len(index)] = winner.to(torch.uint8).cpu()
                bar.update(len(index))
        for k in ks:
            yield (k, similarity), predicted[k]


def linear(x, maps, q, settings, C):
    """Settings are what scikit-learn calls C, small where the regularisation is strong: |W|^2 / 2 +
    setting (sum of the patches' cross-entropies) is minimised. All pixels of a patch get the label
    predicted for it. C, the classes, is not needed."""
    # differs: CAPI's L-BFGS remembers 5 steps, and tries at most 50 points in a line search. That
    # of support/probes.py remembers 10, searches as torch's strong Wolfe rule does, and stops once
    # no gradient is above 1e-5 or a step changes less than 1e-9.
    h, w = maps.shape[1:]
    labels, y = modal(maps).unique(return_inverse=True)  # (labels,), (N,)
    for setting in tqdm(settings, desc="regularisations", leave=False,
                        disable=None if len(settings) > 1 else True):
        W, b, _ = probes.lbfgs(x, y, len(labels), weight_decay=1 / (setting * len(x)),
                               max_iter=MAX_ITER)
        predicted = labels[probes.predict(q, W, b)].cpu()  # (M,)
        yield setting, predicted[:, None, None].expand(-1, h, w)


PROBES = {"knn": (knn, KNN), "linear": (linear, LINEAR)}


def apply(probe, train, queries, settings, C, device="cpu"):
    """Yield (setting, predicted maps (n, g*g, p, p)) of a probe that is fitted to Patches `train`,
    for queries (n, g*g, D). Both are standardised first, by mean and deviation of `train`.
    """
    x, maps = train.to_fit()  # (N, D), (N, p, p)
    x, q = probes.standardise(x, queries.flatten(0, 1))  # (N, D), (M, D)
    for setting, predicted in probe(x.to(device), maps.to(device), q.to(device), settings, C):
        yield setting, predicted.reshape(*queries.shape[:2], *maps.shape[1:])


def choose_and_refit(name, train, test, C, seed=0, device="cpu"):
    """(predicted maps (n, g*g, p, p) of the test images, chosen setting, {setting: mIoU on the
    held-out tenth}) of the probe `name`, "knn" or "linear".

    train and test: Patches. The tenth of the training images that chooses is drawn with `seed`;
    the first of equally good settings is chosen. ValueError where nothing can be scored.
    """
    probe, settings = PROBES[name]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.x), generator=generator)  # (n,)
    to_fit, held_out = (train.of(part) for part in probes.split(len(train.x), 0.1, order))
    if bool((held_out.maps == IGNORED).all()):
        raise ValueError(f"all pixels of the {len(held_out.x)} training images held out for "
                         f"choosing have the label {IGNORED}, ignored; take more --train-images or "
                         "another --seed")
    scores = {}
    for setting, predicted in apply(probe, to_fit, held_out.x, settings, C, device):
        scores[setting] = probes.segmentation_measures(predicted, held_out.maps, C)["miou"]
    best = max(settings, key=scores.get)
    (_, predicted), = apply(probe, train, test.x, [best], C, device)
    return predicted, best, scores


# ---- command line --------------------------------------------------------------------------------

def parser():
    p = argparse.ArgumentParser(
        "lab.eval_dense", allow_abbrev=False,
        formatter_class=Help,
        description="Segmentation by k-NN and a linear probe of frozen patch features.")
    evaluation.add_network_flags(p, batch_size=64, results=RESULTS)
    add = p.add_argument
    add("--data", default="shapes", metavar="NAME|FOLDER",
        help="the built-in images, or a folder in VOC layout")
    add("--img-size", type=int, metavar="PX",
        help="side to which images are squeezed; None: 32 for shapes, as they are, 224 for folders")
    add("--train-images", type=int, metavar="N",
        help=f"training images at most; None: {IMAGES['shapes'][0]} for shapes, "
        f"{IMAGES_OF_FOLDER[0]} for folders")
    add("--test-images", type=int, metavar="N",
        help=f"test images at most; None: {IMAGES['shapes'][1]} for shapes, "
        f"{IMAGES_OF_FOLDER[1]} for folders")
    add("--probe", choices=[*PROBES], nargs="+", default=[*PROBES],
        help="which probes; k-NN is the faster one")
    add("--seed", type=int, default=0, help="of the held-out tenth and the untrained weights")
    add("--picture", metavar="FILE", help=f"{PICTURES} test images, their labels and the "
        "predictions from the backbone's features; needs matplotlib")
    return p


def check_flags(flags):
    """ValueError, before the long work, for flags that cannot be. Sets flags.device, and
    flags.results where it was not given."""
    evaluation.check_network_flags(flags, RANGES, "results", "picture")
    if flags.picture:
        plots.check_files(flags.picture)
    if flags.results is None:
        flags.results = str(evaluation.run_folder(flags.checkpoint) / RESULTS)


def open_images(flags, args):
    """(train, test, class names) of --data, the first two as Segmented. ValueError where there is
    nothing to fit or to test."""
    own = IMAGES.get(flags.data, IMAGES_OF_FOLDER)
    most = flags.train_images or own[0], flags.test_images or own[1]
    if flags.data in data.SETS:
        train, test, classes = segmented.named_set(flags.data, args, flags.img_size, most)
    else:
        train, test, classes = segmented.voc_folder(flags.data, flags.img_size or 224, most)
    if len(train) < 2:
        raise ValueError(f"--data {flags.data} has {len(train)} training image, and a tenth of "
                         "them, one at least, is held out for choosing")
    for part, words in ((train, "training"), (test, "test")):
        if bool((part.maps == IGNORED).all()):
            raise ValueError(f"--data {flags.data}: all pixels of the {words} images have the "
                             f"label {IGNORED}, ignored")
    return train, test, classes


def patches_of(train, test, g, backbone, flags, args):
    """{"backbone": [train, test], "untrained": ..., "pixels": ...}: Patches with these features."""
    def through(net, words):
        net.to(flags.device)
        both = []
        for part in (train, test):
            batches = patch_batches(net, part, part.x.shape[-1], device=flags.device,
                                    batch_size=flags.batch_size, progress=True, mean=args["mean"],
                                    std=args["std"])
            x = torch.cat(list(batches))  # (n, g*g, D)
            evaluation.check_finite(x, f"{flags.checkpoint}: its network{words} gives features")
            both.append(x)
        return both

    untrained = backbones.untrained(backbone, args, flags.seed)
    features = {"backbone": through(backbone, ""),
                "untrained": through(untrained, " with untrained weights"),
                "pixels": [pixel_features(part.x, g) for part in (train, test)]}
    maps = [cut(part.maps, g) for part in (train, test)]  # (n, g*g, p, p) each
    return {name: [Patches(x, part) for x, part in zip(xs, maps)] for name, xs in features.items()}


class Result(NamedTuple):
    """Labels predicted for the test images, and how good they are in percent."""
    maps: torch.Tensor  # (n, S, S) uint8
    miou: float  # this and the next two: see probes.segmentation_measures
    pixels: float
    iou: torch.Tensor  # (C,)
    chosen: str = ""  # setting of the probe
    held_out: float = None  # its mIoU on the held-out tenth


def bounds_of(train, test, g, C):
    """{(name, ""): Result} of what needs no features: the commonest label of the training images
    everywhere, and in each patch of the test images its own commonest label."""
    known = train.maps[train.maps != IGNORED]
    guess = torch.full_like(test.maps, int(known.long().bincount().argmax()))  # (n, S, S)
    patches = cut(test.maps, g)  # (n, g*g, p, p)
    own = modal(patches, without_ignored=True)  # (n, g*g)
    own = paste(own[..., None, None].expand_as(patches), g)  # (n, S, S)
    return {(name, ""): Result(maps, **probes.segmentation_measures(maps, test.maps, C))
            for name, maps in (("commonest label", guess), ("own label of each patch", own))}


def evaluate(flags):
    """What main does once the flags are parsed."""
    check_flags(flags)
    # --img-size is not passed on: here it is the size of the images, and there the one for which
    # position embeddings are interpolated
    backbone, args = evaluation.open_backbone(flags)
    train, test, classes = open_images(flags, args)
    C, size = len(classes), train.x.shape[-1]
    patch = getattr(backbone, "patch_size", 1)
    if size % patch:
        raise ValueError(f"--img-size {size} must be a multiple of {patch}, the pixels of a patch")
    with torch.no_grad():  # one image, so that what is no grid is refused before the long work
        g = grid_side(backbone(torch.zeros(1, 3, size, size))[1].shape[1], size)
    p = size // g
    device = flags.device if flags.device.startswith("cuda") else "cpu"

    results = {}  # {(features, probe): Result}
    patches = patches_of(train, test, g, backbone, flags, args)
    for features, (train_patches, test_patches) in patches.items():
        for probe in dict.fromkeys(flags.probe):
            predicted, best, scores = choose_and_refit(probe, train_patches, test_patches, C,
                                                       flags.seed, device)
            maps = paste(predicted, g)  # (n, S, S)
            results[features, probe] = Result(
                maps, **probes.segmentation_measures(maps, test.maps, C), chosen=words_of(best),
                held_out=scores[best])
    bounds = bounds_of(train, test, g, C)

    print(f"{flags.data}: {len(train)} training images, {len(test)} test images, {C} classes")
    print(f"protocol {PROTOCOL}: {flags.which}'s patch features ({backbone.dim}-d, standardised), "
          f"{size} px, {g} x {g} patches of {p} px, {evaluation.normalisation(args)}, seed "
          f"{flags.seed}")
    print_tables(results | bounds, classes)
    row = evaluation.result_row("eval_dense", PROTOCOL, flags, backbone, args, flags.data) | {
        "train": len(train), "test": len(test), "classes_known": C, "img_size": size, "patch": p,
        "seed": flags.seed}
    evaluation.append_results(flags, row, tables_of(results | bounds))
    if flags.picture:
        columns = {"labels": test.maps[:PICTURES]}
        columns |= {probe: results["backbone", probe].maps[:PICTURES] for probe in flags.probe}
        plots.segmentation(test.x[:PICTURES], columns, classes, flags.picture)
        print(f"picture written to {flags.picture}")
    named = {" ".join(key): result for key, result in results.items()}
    return {"miou": {name: result.miou for name, result in named.items()},
            "bounds": {name: result.miou for (name, _), result in bounds.items()},
            "chosen": {name: result.chosen for name, result in named.items()},
            "iou": {name: dict(zip(classes, result.iou.tolist()))
                    for name, result in named.items()},
            "classes": classes, "grid": g, "train": len(train), "test": len(test)}


def words_of(setting):
    """A setting of a probe in words."""
    return f"C={setting:.3g}" if isinstance(setting, float) else "k={} {}".format(*setting)


def tables_of(results):
    """{name of a result: {column: value}} for the csv file. The IoUs of all classes stand in one
    column, in their order and with a dash where a class is absent: other data has other classes."""
    tables = {}
    for key, result in results.items():
        tables[" ".join(key).strip()] = {
            "miou": result.miou, "pixels_right": result.pixels, "chosen": result.chosen,
            "miou_held_out": result.held_out,
            "iou_of_classes": " ".join(map(or_dash, result.iou.tolist()))}
    return tables


def or_dash(value):
    """An IoU in percent, a dash for nan."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def print_tables(results, classes):
    """A line for each of the results {(features, probe): Result}, in percent, and one for each
    class with the backbone's IoUs."""
    print(f"{'features':>25} {'probe':>7}  {'chosen':<12}{'held out':>9}{'mIoU':>8}"
          f"{'pixels right':>14}")
    for (features, probe), result in results.items():
        held_out = f"{result.held_out:.2f}" if probe else ""
        print(f"{features:>25} {probe:>7}  {result.chosen:<12}{held_out:>9}{result.miou:8.2f}"
              f"{result.pixels:14.2f}")
    of_backbone = {probe: result.iou.tolist()
                   for (features, probe), result in results.items() if features == "backbone"}
    print(f"{'IoU of the backbone':>25}" + "".join(f"{probe:>9}" for probe in of_backbone))
    for c, name in enumerate(classes):
        print(f"{name[:25]:>25}"
              + "".join(f"{or_dash(iou[c]):>9}" for iou in of_backbone.values()))


def main(argv=None):
    """Run the command line. Bad input: one sentence on stderr and exit code 2.

    Returns {"miou": {"backbone knn": percent, ...}, "bounds": {name: percent}, "chosen": {"backbone
    knn": words}, "iou": {"backbone knn": {class: percent, nan where it is absent}}, "classes",
    "grid": patches along a side, "train", "test" (numbers of images)}.
    """
    flags = parser().parse_args(argv)
    with one_sentence("lab.eval_dense"):
        return evaluate(flags)


if __name__ == "__main__":
    main()
