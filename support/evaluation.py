"""What the evaluation commands share: their flags, the checkpoint and the images they open, the
features they cache, and where their numbers go.

A command shows its numbers before it writes anything that can fail: first `append_results`, which
says so where it cannot write and goes on, then `dump`.
"""
import csv
import io
import os
import sys
import time
from pathlib import Path

import torch

import data
import views
from support import backbones
from support import groups
from support.files import TEXT, write
from support.flags import check_files, check_values

# (what a value must be, test, flags of add_network_flags)
RANGES = [("be at least 1", lambda v: v >= 1, ["batch_size"]),
          ("lie in [0, 1]", lambda v: 0 <= v <= 1, ["mean"]),
          ("be positive", lambda v: v > 0, ["std"])]
# the same of add_common_flags
COMMON_RANGES = [("be at least 2", lambda v: v >= 2, ["img_size"]),
                 ("not be negative", lambda v: v >= 0, ["head", "tail"])]


# ---- flags ---------------------------------------------------------------------------------------

def add_network_flags(parser, batch_size=512, results="results.csv"):
    """The checkpoint, and the flags that every evaluation of a network has: how it is read, how it
    is run and where the numbers go. batch_size: the default; results: the file next to the
    checkpoint that is written by default."""
    add = parser.add_argument
    add("checkpoint", metavar="CKPT|RUN_DIR",
        help="a ckpt.pt, the directory it lies in, or a foreign file with --arch")
    add("--arch", help="architecture of a foreign file: DINO's, torchvision's, timm's; None: a run "
        "of ours")
    add("--which", choices=["teacher", "student"], default="teacher",
        help="papers report the teacher")
    add("--mean", type=float, nargs=3, metavar=("R", "G", "B"),
        help="what is subtracted from pixels in [0, 1]; None: as in the run, ImageNet's for others")
    add("--std", type=float, nargs=3, metavar=("R", "G", "B"),
        help="what they are divided by then; timm's plain ViTs have 0.5 for all six")
    add("--batch-size", type=int, default=batch_size,
        help="images per forward pass of a frozen network; changes speed only")
    add("--device", default="auto", help="auto: cuda where there is one, else cpu")
    add("--results", metavar="FILE",
        help=f"csv file to append to; None: {results} next to the checkpoint")


def add_common_flags(parser):
    """The flags that eval_knn.py and eval_linear.py have: those above, and those of images with one
    label each."""
    add_network_flags(parser)
    add = parser.add_argument
    add("--img-size", type=int, metavar="PX",
        help="side of the images; None: what the backbone was made for")
    add("--data", metavar="NAME|FOLDER",
        help="labelled images; None: those the run was trained on")
    add("--data-root", metavar="DIR", help="where named data sets lie; None: as in the run")
    add("--head", type=int, default=100, metavar="N",
        help="head classes have more training images than this")
    add("--tail", type=int, default=20, metavar="N",
        help="tail classes have fewer training images than this")
    add("--dump", metavar="FILE", help="torch.save {train_x, train_y, test_x, test_y} there: the "
        "features of plain images; those of k-NN have length one, and those of --protocol transfer "
        "have the validation images in train_x")
    add("--no-cache", action="store_true",
        help="neither read nor write features/ next to the checkpoint")


def check_network_flags(flags, ranges, *files):
    """ValueError, before the long work, for flags that cannot be. Sets flags.device to a device.

    ranges: as RANGES, for the flags that the command has beside those of add_network_flags. files:
    the names of its flags that name a file to be written.
    """
    check_values(flags, [*RANGES, *ranges])
    check_files(flags, *files, inputs=[flags.checkpoint])
    flags.device = backbones.choose_device(flags.device)


def check_common_flags(flags, ranges):
    """check_network_flags for a command with add_common_flags; ranges: of its own flags."""
    check_network_flags(flags, [*COMMON_RANGES, *ranges], "dump", "results")
    # --results adds to the run's own file, and --dump would take its place
    check_files(flags, "dump", inputs=[run_folder(flags.checkpoint) / "results.csv"])
    if flags.tail > flags.head + 1:
        raise ValueError(f"--tail {flags.tail} must be at most --head {flags.head} plus 1, so that "
                         "no class is both head and tail")


# ---- what is evaluated ---------------------------------------------------------------------------

def open_backbone(flags, img_size=None, patch_size=None):
    """(backbone on the CPU, args dict of its run), as backbones.load_backbone gives them, with the
    mean and std of the pixels that it takes; a line that describes it is printed. img_size: to
    evaluate at, in place of that of the file. patch_size: refuse a ViT of other patches."""
    backbone, args, description = backbones.load_backbone(
        flags.checkpoint, flags.which, flags.arch, patch_size, img_size)
    print(description)
    return backbone, args | {"mean": flags.mean or args.get("mean", views.MEAN),
                             "std": flags.std or args.get("std", views.STD)}


def normalisation(args):
    """The mean and std of `open_backbone` in words."""
    return f"pixels less {numbers(args['mean'])}, over {numbers(args['std'])}"


def numbers(values):
    return " ".join(f"{value:g}" for value in values)


def data_name(flags, args):
    """--data, or else the name or folder of the images that the run was trained on. ValueError
    where there is neither."""
    name = args.get("data") if flags.data is None else flags.data
    if name is None:
        raise ValueError(f"{flags.checkpoint} does not say on what data it was trained: give "
                         "--data")
    return name


def is_own_name(name, args):
    """Whether `name`, a named set or a folder, is where the run with these args had its images. Two
    paths of one folder are the same."""
    trained_on = args.get("data")
    if trained_on is None or name == trained_on:
        return name == trained_on
    if name in data.SETS or trained_on in data.SETS:
        return False
    folder, own_folder = (os.path.realpath(os.path.expanduser(path)) for path in (name, trained_on))
    return folder == own_folder


def load_images(name, args, root=None):
    """(train, test, own) of the set or folder `name`, for the run with these args; see data.load.

    own: whether they are the run's own images, where they lay then or in a folder that was moved. A
    run with --imbalance was trained on a part of its set: that part is drawn again here. Other data
    is used whole. root: where named sets lie; None: as in the run. A line on stderr says so where
    the run saw other images under that name.
    """
    own, seen = is_own_name(name, args), args.get("data_seen")
    version, seed = args.get("data_version", 1), args.get("seed", 0)
    tail = {"imbalance": args.get("imbalance", 1.0),
            "imbalance_law": args.get("imbalance_law", "exp")}
    train, test = data.load(name, root=root or args.get("data_root", "data"), seed=seed,
                            img_size=args["img_size"], **(tail if own else {}))
    if own and name in data.VERSIONS and version != data.VERSIONS[name]:
        print(f"note: the run saw version {version} of the images {name}; these are version "
              f"{data.VERSIONS[name]}, which it has never seen", file=sys.stderr)
    elif own and seen and not is_same(train, name, seen):
        print(f"note: the run was trained on {seen['images']} images of {seen['classes']} classes "
              f"under the name {name}, which now holds others ({len(train)} of "
              f"{len(train.classes)})", file=sys.stderr)
    elif not own and seen:
        cut = train
        if tail["imbalance"] > 1 and train.y is not None:
            cut = data.long_tail(train, tail["imbalance"], seed, tail["imbalance_law"])
        if is_same(cut, name, seen):  # the folder was moved
            train, own = cut, True
    return train, test, own


def is_same(images, name, seen):
    """Whether a training set is the one that a run remembers as `seen`."""
    return all(seen.get(key) == value for key, value in data.identity(images, name).items())


def open_images(flags, args):
    """(name, train, test, own) of --data, or of the data that the run was trained on; see
    load_images."""
    name = data_name(flags, args)
    return name, *load_images(name, args, flags.data_root)


def run_folder(checkpoint):
    """The folder of a run, given that folder or a file in it."""
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent


def features_of(images, backbone, flags, args, layers=1, pool="cls", crop=True):
    """Features (N, D) float32 on the CPU of plain images, from features/ next to the checkpoint
    where they are there, unless --no-cache. args: of open_backbone; layers, pool, crop: see
    features.features. ValueError if they are not finite."""
    folder = None if flags.no_cache else run_folder(flags.checkpoint) / "features"
    x = backbones.cached(backbone, images, args["img_size"], folder, layers=layers, pool=pool,
                         crop=crop, mean=args["mean"], std=args["std"], device=flags.device,
                         batch_size=flags.batch_size, progress=True)  # (N, D)
    check_finite(x, f"{flags.checkpoint}: its network gives features")
    return x


def check_finite(x, words):
    """ValueError if x has numbers that are not finite; words: how its sentence begins."""
    if not x.isfinite().all():
        raise ValueError(f"{words} that are not finite (nan or inf)")


# ---- what comes out ------------------------------------------------------------------------------

def groups_with_classes(tables):
    """Those of groups.NAMES that have classes, where tables holds what groups.report returned."""
    classes = next(iter(tables.values()))["classes"]
    return [name for name in groups.NAMES if classes[name]]


def result_row(tool, protocol, flags, backbone, args, name):
    """The first columns of results.csv: which weights were evaluated, on the data `name`."""
    return {"tool": tool, "protocol": protocol, "checkpoint": flags.checkpoint,
            "weights": backbones.fingerprint(backbone), "which": flags.which, "arch": backbone.arch,
            "method": args.get("method", ""), "prototypes": args.get("prototypes", ""),
            "num_prototypes": args.get("num_prototypes", ""), "data": name,
            "mean": numbers(args["mean"]), "std": numbers(args["std"])}


def append_results(flags, row, tables):
    """Append one line for each {result: {column: value}} of tables, with the columns of row before
    it, to --results or results.csv next to the checkpoint. Where that cannot be, say so."""
    path = flags.results or run_folder(flags.checkpoint) / "results.csv"
    try:
        for result, table in tables.items():
            line = row | {"result": result}
            for column, value in table.items():
                if value is None:
                    line[column] = ""
                elif column != "classes":
                    line[column] = round(value, 4) if isinstance(value, float) else value
            record(path, line)
    except (OSError, ValueError, csv.Error) as error:
        print(f"the numbers are not kept: {error}")


def record(path, row):
    """Append row, {column: value}, to the csv file at path, with the time in front.

    One line is appended where the header has every column. Otherwise the file is written anew with
    the new columns in its header, whole or not at all. OSError if it cannot be written, ValueError
    if it is not text in UTF-8.
    """
    path = Path(path)
    row = {"time": time.strftime("%Y-%m-%d %H:%M:%S")} | row
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None
    header = next(csv.reader(io.StringIO(text)), [])
    new_columns = [column for column in row if column not in header]
    out = io.StringIO(newline="")
    table = csv.DictWriter(out, header + new_columns, lineterminator="\n", extrasaction="ignore")
    if header and not new_columns:
        if not text.endswith("\n"):
            out.write("\n")  # the last line was cut off: it must not swallow this one
        table.writerow(row)
        with open(path, "a", newline="", **TEXT) as file:
            file.write(out.getvalue())
        return
    table.writeheader()
    table.writerows([*csv.DictReader(io.StringIO(text)), row])
    write(str(path), lambda file: file.write(out.getvalue().encode(**TEXT)))


def dump(path, train_x, train_y, test_x, test_y):
    """torch.save features (N, D) and (M, D) with their labels at path, whole or not at all. OSError
    if it cannot be written."""
    parts = {"train_x": train_x.cpu(), "train_y": train_y, "test_x": test_x.cpu(), "test_y": test_y}
    write(str(path), lambda file: torch.save(parts, file))
    print(f"features written to {path}")
