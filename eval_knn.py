"""Weighted k-nearest-neighbour classification on frozen features: the protocol of DINO, the k-NN column of Table 3.

    python eval_knn.py RUN_DIR                       # the run's own data, teacher, k = 10 20 100 200
    python eval_knn.py RUN_DIR --data FOLDER --which student --dump features.pt

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

from data import eval_batches, load
from models import build

PROTOCOL = "knn-1"                  # printed with every number; raise it when anything that changes the number changes
BUDGET = 256 * 2**20                # bytes of working memory a k-NN search may use, whatever M and N are
MAX_QUERIES = 1024                  # queries of a block: above this the matrix product gains nothing more


# ----------------------------------------------------------------------------------------------------- the classifier

def unit(x):
    """Rows of x (n, D) scaled to length 1, float32. Raises ValueError where a feature is nan or infinite."""
    x = F.normalize(x.float(), dim=1)
    if not x.sum().isfinite():                          # an inf has become inf / inf = nan, and one nan is enough
        raise ValueError("k-NN got features that are not finite (nan or inf)")
    return x


def top(sim, k):
    """The k largest of each row of sim (q, n): values (q, k) descending, indices (q, k), equal values in index order.

    torch.topk alone picks and orders equal values as it likes, so that a number would depend on block sizes and device.
    """
    values, index = sim.topk(min(k + 1, sim.shape[1]), dim=1)                   # one more shows a tie at the k-th place
    edge, beyond, index = values[:, k - 1:k], values[:, k:], index[:, :k]
    for row in (beyond == edge).any(1).nonzero().flatten().tolist():            # rare, unless features have collapsed
        above = (sim[row] > edge[row]).nonzero().flatten()
        equal = (sim[row] == edge[row]).nonzero().flatten()
        index[row] = torch.cat([above, equal[:k - len(above)]])
    index = index.sort(dim=1).values
    values, order = sim.gather(1, index).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)


def neighbours(train_x, test_x, k, width=0):
    """Yield (first query, sim (q, k), index (q, k)) for blocks of queries: their k nearest rows of the bank in order.

    Walks over blocks of queries and of the bank with a running top-k, so the (M, N) similarities never exist. Works on
    test_x's device; the bank may lie elsewhere, its blocks are copied over. width: floats a query needs in the caller.
    """
    (M, D), N = test_x.shape, len(train_x)
    q = max(1, min(MAX_QUERIES, BUDGET // 4 // (4 * D + 128 * k + 4 * width)))  # 128: a dozen (q, k) temporaries below
    n = max(1, min(N, BUDGET // 2 // (8 * D + 4 * min(q, max(M, 1)))))          # similarities, bank rows and their copy
    for i in range(0, M, q):
        queries = unit(test_x[i:i + q])                                         # (q, D)
        sim = queries.new_empty(len(queries), 0)                                # (q, <= k) best so far
        index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
        for j in range(0, N, n):
            block_sim = queries @ unit(train_x[j:j + n].to(queries.device)).T   # (q, n)
            block_sim, block_index = top(block_sim, min(k, block_sim.shape[1]))
            # Earlier blocks stand first and the sort is stable: ties still go to the smaller bank index.
            sim, order = torch.cat([sim, block_sim], 1).sort(dim=1, descending=True, stable=True)
            index = torch.cat([index, block_index + j], 1).gather(1, order)[:, :k]
            sim = sim[:, :k]
        yield i, sim, index


def check_votes(ks, T):
    """Raise ValueError for a number of neighbours or a temperature that cannot be."""
    if min(ks) < 1:
        raise ValueError(f"k must be at least 1, got {min(ks)}")
    if not T > 0 or 1 / T + math.log(max(ks)) > 88:     # k votes of at most exp(1/T); float32 ends at exp(88.7)
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
    scores = torch.zeros(len(test_x), num_classes or classes, device=test_x.device)     # (M, C)
    for i, sim, index in neighbours(train_x, test_x, min(k, len(train_x))):
        scores[i:i + len(sim)].scatter_add_(1, y[index], (sim / T).exp())
    return scores


@torch.no_grad()
def knn_accuracy(train_x, train_y, test_x, test_y, ks=(10, 20, 100, 200), T=0.07):
    """{k: top-1 in percent} for several k from ONE search: the votes of a smaller k are a prefix of the larger one's.

    Arguments and errors as knn_scores; test_y (M,). Labels may be any integers: only those in the bank get a column.
    """
    ks = sorted(set(ks))
    check(train_x, train_y, test_x, ks, T)
    if test_y.shape != (len(test_x),) or not len(test_x):
        raise ValueError(f"k-NN needs one label for each test image, got {len(test_x)} images and labels of shape "
                         f"{tuple(test_y.shape)}")
    device = test_x.device
    labels, y = train_y.to(device).unique(return_inverse=True)                  # (C,) sorted; (N,) column of each image
    hits = dict.fromkeys(ks, 0)
    for i, sim, index in neighbours(train_x, test_x, min(ks[-1], len(train_x)), width=len(labels)):
        truth = test_y[i:i + len(sim)].to(device)
        weight, column = (sim / T).exp(), y[index]                              # (q, k)
        scores, done = sim.new_zeros(len(sim), len(labels)), 0                  # (q, C)
        for k in ks:
            scores.scatter_add_(1, column[:, done:k], weight[:, done:k])
            hits[k] += int((labels[scores.argmax(1)] == truth).sum())
            done = k
    return {k: 100 * hits[k] / len(test_x) for k in ks}


# --------------------------------------------------------------------------------------------- features, checkpoints

@torch.no_grad()
def features(backbone, images, img_size, *, device="cpu", batch_size=512, progress=False):
    """L2-normalised cls features (N, dim) float32, on the CPU, of every image in order, without augmentation.

    The backbone must be on device. It runs in eval mode (BatchNorm with running statistics) and without autocast; the
    train/eval flag of each of its modules is put back afterwards. img_size in pixels; progress: a bar on a terminal.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    x = torch.empty(len(images), backbone.dim)                                  # (N, dim)
    done = 0
    bar = tqdm(total=len(images), desc="features", unit="img", leave=False, disable=None if progress else True)
    backbone.eval()
    try:
        with bar, torch.autocast(torch.device(device).type, enabled=False):
            for batch in eval_batches(images, img_size, batch_size=batch_size, device=device):
                x[done:done + len(batch)] = F.normalize(backbone(batch)[0].float(), dim=1).cpu()
                done += len(batch)
                bar.update(len(batch))
    finally:
        for module, training in modes:
            module.training = training
    return x


def load_backbone(path, which="teacher"):
    """Of a checkpoint or run directory: backbone in eval mode on the CPU, args dict, and a line that describes it.

    which: "teacher" (what the papers report) or "student". Reads only what it needs of the file (memory-mapped).
    Raises ValueError where the file is missing, unreadable, not written by train.py, or does not fit its own args.
    """
    if which not in ("teacher", "student"):
        raise ValueError(f"which must be teacher or student, got '{which}'")
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:      # a foreign or cut-off file can fail in any way that zip and pickle know
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(f"{path} is not a checkpoint that can be read ({reason})") from None
    if not isinstance(ckpt, dict):
        raise ValueError(f"{path} holds a {type(ckpt).__name__}, not a checkpoint of train.py")
    wanted = {"args": dict, "step": int, which: dict}
    absent = [key for key, kind in wanted.items() if not isinstance(ckpt.get(key), kind)]
    absent = absent or [f"args['{key}']" for key in ("arch", "patch_size", "img_size") if key not in ckpt["args"]]
    if absent:
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(absent)}")
    args = ckpt["args"]
    weights = {key.removeprefix("backbone."): w for key, w in ckpt[which].items() if key.startswith("backbone.")}
    small = "conv1.weight" in weights and weights["conv1.weight"].shape[-1] == 3        # ResNet stem for small images
    try:
        backbone = build(args["arch"], patch_size=args["patch_size"], img_size=args["img_size"], in_small=small)
        backbone.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: the {which}'s weights do not fit its args, arch {args['arch']}, patch "
                         f"{args['patch_size']}, {args['img_size']} px ({reason})") from None
    info = (f"{path}: step {ckpt['step']}, {args.get('method', '?')} with {args.get('prototypes', '?')} prototypes "
            f"(K = {args.get('num_prototypes', '?')}), {which} {args['arch']}")
    return backbone.eval(), args, info


# ------------------------------------------------------------------------------------------------------- command line

def evaluate(flags):
    if flags.dump and (Path(flags.dump).is_dir() or not Path(flags.dump).absolute().parent.is_dir()):
        raise ValueError(f"--dump {flags.dump} must be a file in a folder that exists")     # said before the long work
    check_votes(flags.k, flags.T)
    if flags.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {flags.batch_size}")
    device = flags.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device} is not usable here") from None
    backbone, args, info = load_backbone(flags.checkpoint, flags.which)
    print(info)

    own = flags.data is None or flags.data == args.get("data")
    name = args.get("data") if own else flags.data
    if name is None:
        raise ValueError(f"{flags.checkpoint} does not say on what data it was trained: give --data")
    # On its own data the bank is what the run itself used: the same seed, and long-tailed if it was.
    train, test = load(name, root=flags.data_root or args.get("data_root", "data"), seed=args.get("seed", 0),
                       img_size=args["img_size"], imbalance=args.get("imbalance", 1.0) if own else 1.0)
    if test is None or train.y is None or test.y is None:
        raise ValueError(f"--data {name} has no labels, and k-NN needs labelled training and test images")
    backbone.to(device)
    options = dict(device=device, batch_size=flags.batch_size, progress=True)
    dump = {"train_x": features(backbone, train, args["img_size"], **options), "train_y": train.y,
            "test_x": features(backbone, test, args["img_size"], **options), "test_y": test.y}
    if flags.dump:
        torch.save(dump, flags.dump)
    accuracy = knn_accuracy(dump["train_x"].to(device), train.y, dump["test_x"].to(device), test.y, flags.k, flags.T)
    guess = 100 * float((test.y == train.y.mode().values).float().mean())       # always the bank's commonest class

    print(f"{name}: bank of {len(train)} images, {len(test)} test images, {len(train.classes)} classes")
    print(f"protocol {PROTOCOL}: weighted k-NN, cosine, T = {flags.T:g}, {flags.which}'s cls feature "
          f"({backbone.dim}-d, float32), images resized and centre-cropped to {args['img_size']} px, no augmentation")
    print("     k   top-1 %")
    for k, percent in accuracy.items():
        print(f"{k:6d}   {percent:7.2f}" + (f"   (all {len(train)} of the bank)" if k > len(train) else ""))
    print(f" guess   {guess:7.2f}   (always the bank's commonest class)")
    if flags.dump:
        print(f"features written to {flags.dump}")
    return {"knn": accuracy, "guess": guess, "which": flags.which, "T": flags.T, "data": name, "train": len(train),
            "test": len(test)}


def main(argv=None):
    """Run the command line. Returns {"knn": {k: percent}, "guess" in percent, "which", "T", "data", "train", "test"
    (numbers of images)}. Bad input: one sentence on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description="Weighted k-NN accuracy of a run's frozen features (DINO's protocol).", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT|RUN_DIR", help="a ckpt.pt, or the directory it lies in")
    add("--data", metavar="NAME|FOLDER", help="labelled images; None: those the run was trained on")
    add("--data-root", metavar="DIR", help="where named data sets lie; None: as in the run")
    add("--which", choices=["teacher", "student"], default="teacher", help="papers report the teacher")
    add("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours; 20 is the headline")
    add("--T", type=float, default=0.07, help="temperature of a neighbour's vote exp(similarity / T)")
    add("--batch-size", type=int, default=512, help="images per forward pass; changes speed only")
    add("--device", default="auto", help="auto: cuda where there is one, else cpu")
    add("--dump", metavar="FILE", help="torch.save {train_x, train_y, test_x, test_y} there")
    flags = parser.parse_args(argv)
    try:
        return evaluate(flags)
    except ValueError as error:
        print(f"eval_knn.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
