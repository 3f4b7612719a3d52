"""Where the images of a folder are: which of its folders is a split, and which is a class.

    find(path) -> Found: the files of the training and the test split by class, and what is said

Every folder is read once, however many links lead to it. What is not taken is counted.
"""
import hashlib
import os
import re
from collections import Counter
from typing import NamedTuple

from PIL import Image

LAYOUTS = ("train/<class>/* with val/<class>/* or test/<class>/*, or <class>/*, "
           "or images without class folders")
# Names of the splits, in any mixture of upper and lower case. Of several test splits the first one
# in this order serves.
TRAIN = ("train", "training")
TEST = ("val", "valid", "validation", "test", "testing")
TINY_IMAGENET = "val_annotations.txt"  # its test images lie in one folder, and this names classes

# Formats that Pillow opens without decoding them, or only with a program beside it
NO_PIXELS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items()
            if name in Image.OPEN and name not in NO_PIXELS} | {".mpo"}  # opened as JPEG
# Parts of names by which folders are recognised as splits that have yet to be renamed
LIKE_TRAIN = {"train", "training", "trainset", "trn"}
LIKE_TEST = {"val", "valid", "validation", "test", "testing", "testset", "tst"}
# A folder with one of these and no image belongs to a run, and so does any folder with a ckpt.pt
RUN_FILES = {"args.json", "lock"}


class Found(NamedTuple):
    """The images of a folder. Without classes, "" is the only key of `train`, and `test` is None;
    `test` is also None where the folder has no test split."""
    train: dict  # {class: sorted paths}
    test: dict
    about: str  # one line: which folders serve as what, and what is left out


def find(path):
    """`Found` for a folder laid out as in LAYOUTS, or as Tiny-ImageNet is.

    ValueError, one sentence: no images, only one class, a class without images, classes of the test
    split that the training split lacks, folders that look like splits under other names.
    """
    left_out = Counter()  # {what: how many}
    folders = subfolders(path)
    train_folder, test_folder = split(path, folders, TRAIN), split(path, folders, TEST)
    if train_folder and not test_folder:
        # a folder named train without folders in it, beside no test split, is a class
        if not subfolders(os.path.join(path, train_folder)):
            train_folder = None
    base = os.path.join(path, train_folder or "")
    elsewhere = [path]  # a link in one split that leads to the other is not followed
    if train_folder and test_folder:
        elsewhere.append(os.path.join(path, test_folder))
    train, inner = walk(base, left_out, elsewhere)
    without_class = train.pop("")
    if not any(train.values()) and not without_class:
        raise ValueError(f"--data {path} holds no images; expected {LAYOUTS}{said(left_out)}")
    if train_folder:
        for folder in folders:
            if folder not in (train_folder, test_folder):
                left_out[f"the folder {folder}/"] = 1
        beside = [name for name in os.listdir(path) if is_image(name)]
        if beside:
            left_out["images beside the splits"] = len(beside)
    if not train:
        if test_folder:
            left_out[f"the folder {test_folder}/"] = 1
        about = f"{len(without_class)} images without classes{said(left_out)}"
        return Found({"": without_class}, None, about)
    if without_class:
        left_out["images beside the class folders"] += len(without_class)
    check_classes(path, train, inner, left_out)
    about = (f"{sum(map(len, train.values()))} images of {len(train)} classes"
             + (f" in {train_folder}/" if train_folder else ""))
    test = None
    if train_folder and test_folder:
        test = test_split(path, test_folder, train, left_out, [path, base])
    if test:
        about += f" for training, {sum(map(len, test.values()))} in {test_folder}/ for testing"
    return Found(train, test, about + said(left_out))


def split(path, folders, names):
    """The first of `names` that one of the folders has, whatever its case, as it is written there;
    None without one. ValueError where two folders differ in case alone."""
    for name in names:
        same = [folder for folder in folders if folder.lower() == name]
        if len(same) > 1:
            raise ValueError(f"--data {path} has both {' and '.join(same)}; which one is meant?")
        if same:
            return same[0]
    return None


def subfolders(path):
    """The names of the folders in a folder, sorted, without hidden ones."""
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries
                      if not is_hidden(entry.name) and is_folder(entry))


def is_folder(entry):
    """Whether an entry of os.scandir is a folder or leads to one. A file needs no look at the
    disk, and a link that leads to itself is none."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_image(name):
    """Whether Pillow opens files of that name, and it is not hidden."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not is_hidden(name)


def is_hidden(name):
    """Whether a file or folder is not meant to be seen: systems and archives leave them behind."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def walk(path, left_out, elsewhere=()):
    """(images, inner) of a folder. images {class: sorted paths}, with "" for those that lie in
    `path` itself; inner {class: names of the folders in its folder}.

    Folders are read before links to folders, and none is read twice, so that a link to a folder
    above it ends there, and images keep the class that they lie in. What is not taken is counted in
    left_out. elsewhere: folders that are read by themselves or hold this one. OSError for a folder
    that cannot be read.
    """
    images, inner, with_runs = {"": []}, {}, set()
    folders, links = [path], []
    seen = {inode_of(folder) for folder in elsewhere} - {inode_of(path)}
    while folders or links:
        place = folders.pop() if folders else links.pop(0)
        if inode_of(place) in seen:
            left_out["links to folders that are read already"] += 1
            continue
        seen.add(inode_of(place))
        inside = os.path.relpath(place, path)  # "." for the folder itself
        class_name = "" if inside == "." else inside.split(os.sep)[0]
        with os.scandir(place) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        names = [entry.name for entry in entries]
        of_run = not RUN_FILES.isdisjoint(names) and not any(map(is_image, names))
        if place != path and (of_run or "ckpt.pt" in names):
            left_out["folders of runs"] += 1
            with_runs.add(class_name)
            continue
        for entry in entries:
            is_link = entry.is_symlink()
            if is_hidden(entry.name):
                left_out["hidden files and folders"] += 1
            elif is_folder(entry):
                (links if is_link else folders).append(entry.path)
                images.setdefault(class_name or entry.name, [])
                if inside == class_name:
                    inner.setdefault(class_name, []).append(entry.name)
            elif is_link and not os.path.exists(entry.path):
                left_out["links that lead nowhere"] += 1
            elif is_image(entry.name):
                images[class_name].append(entry.path)
            else:
                suffix = os.path.splitext(entry.name)[1].lower()
                left_out[f"files {suffix}" if suffix else "files without a suffix"] += 1
    classes = [c for c in sorted(images) if images[c] or c not in with_runs]
    return {c: sorted(images[c]) for c in classes}, inner


def inode_of(folder):
    """What tells a folder from all others, by whatever path it is reached: device and inode."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def check_classes(path, train, inner, left_out):
    """ValueError unless the class folders of train {class: paths} can be the classes of the set in
    `path`; inner: of `walk`."""
    empty = [c for c, paths in train.items() if not paths]
    if empty:
        raise ValueError(f"--data {path}: class folders without an image that can be read: "
                         f"{', '.join(empty[:5])}{said(left_out)}; remove them, or convert their "
                         "files")
    if len(train) < 2:
        name = next(iter(train))
        advice = (f"if the classes lie in it, name it: --data {os.path.join(path, name)}"
                  if inner.get(name) else "name that folder itself to train without labels")
        raise ValueError(f"--data {path} has only one class folder, {name!r}; give two or more, "
                         f"or {advice}")
    # beside many others a folder of that name without folders in it, as freight_train, is a class
    candidates = [c for c in train if len(train) < 4 or inner.get(c)]
    like_train = [c for c in candidates if looks_like(c, LIKE_TRAIN)]
    like_test = [c for c in candidates if looks_like(c, LIKE_TEST)]
    for pair in [(a, b) for a in like_train for b in like_test if a != b]:
        one, other = sorted(pair)
        raise ValueError(f"--data {path}: {one}/ and {other}/ are splits by their names, and not "
                         "classes; rename them to train/ and val/, with the class folders in them")
    holder = {}  # {name of a folder inside a class folder: that class}
    for c in train:
        classes = [name for name in inner.get(c, ()) if name in train and name != c]
        if len(classes) > 1:  # one name in common is no sign
            raise ValueError(f"--data {path}: {c}/ holds folders of the names of classes beside it "
                             f"({', '.join(classes[:5])}). If it is their test split, move the "
                             "class folders beside it into train/ and call it val/; if it is a "
                             "class, move the images of those folders up into it")
        shared = [name for name in inner.get(c, ()) if name in holder]
        other = holder[shared[0]] if shared else None
        shared = [name for name in shared if holder[name] == other]
        if len(shared) > 1:
            raise ValueError(f"--data {path}: {other}/ and {c}/ hold folders of the same names "
                             f"({', '.join(shared[:5])}). If they are splits, rename them to "
                             "train/ and val/; if they are classes, move the images of those "
                             "folders up into them")
        holder |= dict.fromkeys(inner.get(c, ()), c)


def looks_like(name, words):
    """Whether a part of a folder's name, as train in seg_train or train2017, is one of words."""
    return not words.isdisjoint(re.split("[^a-z]+", name.lower()))


def test_split(path, folder, train, left_out, elsewhere):
    """{class: sorted paths} of the test images, whose classes are among those of `train`; None if
    the folder has no class folders, as that of ImageNet's images for testing."""
    base = os.path.join(path, folder)
    annotations = os.path.join(base, TINY_IMAGENET)
    if os.path.isfile(annotations):
        test = annotated(annotations, left_out)
    else:
        test, _ = walk(base, left_out, elsewhere)
        loose = len(test.pop(""))
        if not any(test.values()):
            left_out[f"the folder {folder}/, which has no class folders with images"] = 1
            return None
        if loose:
            left_out[f"images beside the class folders of {folder}/"] = loose
    unknown = sorted(set(test) - set(train))
    if unknown or not any(test.values()):
        raise ValueError(f"--data {path}: the class folders of {folder}/ must be among those of "
                         f"{TRAIN[0]}/, got {', '.join(unknown[:5]) or 'none with an image'}"
                         f"{said(left_out)}")
    for c in [c for c, paths in test.items() if not paths]:
        left_out[f"the empty folder {folder}/{c}/"] = 1
    return test


def annotated(file, left_out):
    """{class: sorted paths} of Tiny-ImageNet's test images: its list names a file in images/ and a
    class in each line, then a box."""
    test = {}
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            words = line.split()
            if len(words) < 2:
                raise ValueError(f"{file}, line {number}: expected a file and its class, got "
                                 f"{line.strip()!r}")
            image = os.path.join(os.path.dirname(file), "images", words[0])
            if os.path.isfile(image):
                test.setdefault(words[1], []).append(image)
            else:
                left_out[f"files that {os.path.basename(file)} names and that are not there"] += 1
    return {c: sorted(test[c]) for c in sorted(test)}


def said(left_out):
    """"; left out: ..." for {what: how many}, "" if nothing was."""
    words = [what if what.startswith("the ") else f"{what} ({n})"
             for what, n in left_out.most_common()]
    more = f" and {len(words) - 8} other kinds" if len(words) > 8 else ""
    return f"; left out: {', '.join(words[:8])}{more}" if words else ""


def choose_tenth(paths, base):
    """A tenth of a class, at least 1 image but never the only one, by a hash of the names."""
    def hash_of(path):
        name = os.path.relpath(path, base).replace(os.sep, "/")
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()

    n = max(1, round(len(paths) / 10)) if len(paths) > 1 else 0
    return sorted(paths, key=hash_of)[:n]
