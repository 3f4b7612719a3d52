"""Which folders of a set are splits, which are classes, and what is left out."""
import os

import numpy as np
import pytest
from PIL import Image

import data
from support import folders


def tree(root, counts):
    """{"train/cat": 3, ...}: so many images in each folder, all of another brightness."""
    number = 0
    for folder, n in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            number += 1
            Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(root / folder / f"{i:03d}.png")
    return str(root)


def sentence(path):
    with pytest.raises(ValueError) as error:
        data.load(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- links ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("links", [["a/up"], ["a/up", "b/up"], ["a/x/up", "a/up", "b/y/up"]])
def test_links_to_a_folder_above_are_not_followed(tmp_path, capsys, links):
    """Each image is read once, and the walk ends."""
    path = tree(tmp_path / "set", {"a": 10, "b": 10, "a/x": 1, "b/y": 1})
    for link in links:
        os.symlink(path, os.path.join(path, link))
    train, test = data.load(path)
    assert len(train) + len(test) == len(set(train.paths + test.paths)) == 22
    assert f"links to folders that are read already ({len(links)})" in capsys.readouterr().err


@pytest.mark.parametrize("link, target", [
    ("train/up", ".."), ("train/a/up", "../.."), ("train/other", "../val"),
    ("val/a/other", "../../train")])
def test_no_link_leads_from_one_split_into_the_other(tmp_path, link, target):
    """Neither directly nor over a folder that holds both."""
    path = tree(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 1, "val/b": 1})
    os.symlink(target, os.path.join(path, link))
    try:
        train, test = data.load(path)
    except ValueError as error:  # the link's name is that of a class without images
        assert "without an image that can be read" in str(error)
    else:
        assert (len(train), len(test), train.classes) == (6, 2, ["a", "b"])


def test_an_image_keeps_the_class_that_it_lies_in(tmp_path):
    """A link in the first class to the second must not move its images into the first."""
    path = tree(tmp_path / "set", {"a": 4, "b": 4})
    os.symlink(os.path.join(path, "b"), os.path.join(path, "a", "link"))
    train, test = data.load(path)
    assert (train.y.bincount() + test.y.bincount()).tolist() == [4, 4]


def test_a_link_to_itself_and_one_to_nothing_are_counted(tmp_path, capsys):
    path = tree(tmp_path / "set", {"a": 3, "b": 3})
    os.symlink("self", os.path.join(path, "a", "self"))
    os.symlink("nothing.png", os.path.join(path, "a", "gone.png"))
    train, test = data.load(path)
    assert len(train) + len(test) == 6
    assert "links that lead nowhere (2)" in capsys.readouterr().err


def test_classes_and_splits_may_be_links(tmp_path):
    tree(tmp_path / "elsewhere", {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    (tmp_path / "set/train").mkdir(parents=True)
    for c in "ab":
        os.symlink(tmp_path / "elsewhere/train" / c, tmp_path / "set/train" / c)
    os.symlink(tmp_path / "elsewhere/val", tmp_path / "set/val")
    train, test = data.load(str(tmp_path / "set"))
    assert (len(train), len(test), train.classes) == (4, 2, ["a", "b"])


def test_two_names_of_one_class_are_refused(tmp_path):
    path = tree(tmp_path / "set", {"a": 2, "b": 2})
    os.symlink(os.path.join(path, "a"), os.path.join(path, "c"))
    assert "without an image that can be read: c" in sentence(path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = tree(tmp_path / "set", {"a": 2, "b": 2})
    scandir = os.scandir

    def no_rights(place):
        if place.endswith("b"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)
    monkeypatch.setattr(os, "scandir", no_rights)
    with pytest.raises(PermissionError) as error:  # the tools print it as one sentence
        data.load(path)
    assert error.value.filename == os.path.join(path, "b")


# ---- splits --------------------------------------------------------------------------------------
@pytest.mark.parametrize("train_name, test_name", [
    ("train", "val"), ("Train", "Val"), ("TRAIN", "TEST"), ("Training", "Testing"),
    ("train", "valid"), ("training", "validation"), ("Train", "test")])
def test_names_of_splits(tmp_path, capsys, train_name, test_name):
    path = tree(tmp_path, {f"{train_name}/a": 3, f"{train_name}/b": 2,
                           f"{test_name}/a": 1, f"{test_name}/b": 1})
    train, test = data.load(path)
    assert (len(train), len(test), train.classes) == (5, 2, ["a", "b"])
    assert (f"5 images of 2 classes in {train_name}/ for training, 2 in {test_name}/ for testing"
            in capsys.readouterr().err)


def test_what_is_left_out_is_said_once(tmp_path, capsys):
    path = tree(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1, "test/a": 1,
                           "train": 1, "val": 1, ".": 1})
    for name in ("train/a/notes.txt", "train/b/list.csv", "train/b/README", "train/a/.DS_Store",
                 "train/Thumbs.db"):
        (tmp_path / name).write_text("no image")
    data.load(path)
    data.load(path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for words in ("the folder test/", "files .txt (1)", "files .csv (1)",
                  "files without a suffix (1)", "hidden files and folders (2)",
                  "images beside the splits (1)", "images beside the class folders (1)",
                  "images beside the class folders of val/ (1)"):
        assert words in said, words


def test_splits_under_other_names_are_no_classes(tmp_path):
    path = tree(tmp_path, {"one/cat": 3, "one/dog": 3, "two/cat": 1, "two/cow": 1, "two/dog": 1})
    assert sentence(path) == (f"--data {path}: one/ and two/ hold folders of the same names (cat, "
                              "dog). If they are splits, rename them to train/ and val/; if they "
                              "are classes, move the images of those folders up into them")


@pytest.mark.parametrize("folders", [
    ["seg_train/seg_train/a", "seg_train/seg_train/b", "seg_test/seg_test/a"],
    ["train_set/a", "train_set/b", "train_set/c", "test_set/a", "test_set/b"],
    ["train2017", "val2017"], ["train", "test1"], ["trainset", "testset"], ["my-train", "my-val"]])
def test_folders_that_are_splits_by_their_names_are_no_classes(tmp_path, folders):
    words = sentence(tree(tmp_path, dict.fromkeys(folders, 2)))
    assert "are splits by their names, and not classes; rename them to train/ and val/" in words


@pytest.mark.parametrize("name", ["test", "held-out"])
def test_a_split_beside_its_class_folders_is_no_class(tmp_path, name):
    path = tree(tmp_path, {"cat": 3, "dog": 3, f"{name}/cat": 1, f"{name}/dog": 1})
    assert sentence(path) == (f"--data {path}: {name}/ holds folders of the names of classes "
                              "beside it (cat, dog). If it is their test split, move the class "
                              "folders beside it into train/ and call it val/; if it is a class, "
                              "move the images of those folders up into it")


def test_names_of_classes_that_only_sound_like_splits(tmp_path):
    path = tree(tmp_path / "a", {"trains": 2, "testaments": 2, "valley": 2})
    assert data.load(path)[0].classes == ["testaments", "trains", "valley"]
    classes = ["bullet_train", "cat", "dog", "test_tube"]
    assert data.load(tree(tmp_path / "c", dict.fromkeys(classes, 2)))[0].classes == classes
    path = tree(tmp_path / "b", {"left/one": 2, "left/two": 2, "right/one": 2, "right/three": 2})
    assert data.load(path)[0].classes == ["left", "right"]  # one name in common is no sign
    path = tree(tmp_path / "d", {"indoor": 2, "indoor/kitchen": 2, "kitchen": 2})
    assert data.load(path)[0].classes == ["indoor", "kitchen"]


def test_a_test_folder_without_classes_is_left_out(tmp_path, capsys):
    """ImageNet's own images for testing lie flat, and have no labels."""
    path = tree(tmp_path, {"train/a": 20, "train/b": 20, "test": 5})
    train, test = data.load(path)
    assert (len(train), len(test)) == (36, 4)  # a tenth of each class is set aside
    assert "the folder test/, which has no class folders with images" in capsys.readouterr().err


def test_classes_one_folder_further_down(tmp_path):
    path = tree(tmp_path, {"train/train/a": 2, "train/train/b": 2})
    assert sentence(path).endswith(
        f"if the classes lie in it, name it: --data {path}/train")


def test_a_run_in_the_folder_of_its_images_is_no_class(tmp_path, capsys):
    """runs/NAME is where a run lies by default, also if it starts in the folder of its images."""
    path = tree(tmp_path, {"a": 3, "b": 3, "runs/mine": 0, "runs/drawn": 0})
    (tmp_path / "runs/mine/lock").write_text("{}")
    (tmp_path / "runs/drawn/ckpt.pt").write_text("")
    Image.new("RGB", (9, 9)).save(tmp_path / "runs/drawn/picture.png")
    assert data.load(path)[0].classes == ["a", "b"]
    assert "folders of runs (2)" in capsys.readouterr().err
    (tmp_path / "a/lock").write_text("no run")  # beside images it is a file like others
    assert data.load(path)[0].classes == ["a", "b"]
    path = tree(tmp_path / "flat", {".": 3, "runs/mine": 0})
    (tmp_path / "flat/runs/mine/lock").write_text("{}")
    assert data.load(path)[0].y is None


def test_two_folders_that_differ_in_case_are_refused(tmp_path):
    path = tree(tmp_path, {"train/a": 2, "Train/a": 2, "val/a": 1})
    assert "has both Train and train" in sentence(path)


def test_tiny_imagenet_as_it_is_unpacked(tmp_path, capsys):
    """train/CLASS/images/*, and val/images/* with a list of their classes; test/ has no labels."""
    path = tree(tmp_path, {"train/n02/images": 3, "train/n01/images": 2, "val/images": 3,
                           "test/images": 2})
    (tmp_path / "train/n01/n01_boxes.txt").write_text("n01_0.JPEG\t0\t0\t62\t62\n")
    (tmp_path / "wnids.txt").write_text("n02\nn01\n")
    (tmp_path / "val/val_annotations.txt").write_text(
        "000.png\tn02\t0\t32\t44\t62\n001.png\tn01\t52\t55\t57\t59\n"
        "002.png\tn02\t4\t0\t60\t55\n")
    train, test = data.load(path)
    assert train.classes == ["n01", "n02"] and train.y.tolist() == [0, 0, 1, 1, 1]
    assert test.y.tolist() == [0, 1, 1]
    assert [os.path.basename(p) for p in test.paths] == ["001.png", "000.png", "002.png"]
    said = capsys.readouterr().err
    assert "3 in val/ for testing" in said and "the folder test/" in said
    (tmp_path / "val/val_annotations.txt").write_text("000.png\tn03\t0\t32\t44\t62\n")
    assert "must be among those of train/, got n03" in sentence(path)
    (tmp_path / "val/val_annotations.txt").write_text("000.png\n")
    assert "val_annotations.txt, line 1: expected a file and its class" in sentence(path)


# ---- what Pillow opens ---------------------------------------------------------------------------
@pytest.mark.parametrize("suffix, format", [
    (".jfif", "JPEG"), (".jpe", "JPEG"), (".JPG", "JPEG"), (".avif", "AVIF"), (".jp2", "JPEG2000"),
    (".tga", "TGA"), (".ico", "ICO"), (".pbm", "PPM")])
def test_what_pillow_reads_is_read(tmp_path, suffix, format):
    path = tree(tmp_path, {"a": 3, "b": 3})
    Image.init()
    if format not in Image.SAVE or format not in Image.OPEN:
        pytest.skip(f"this Pillow has no {format}")
    for i in range(3):
        Image.new("RGB", (16, 16), (i, 90, 200)).save(f"{path}/b/{i:03d}{suffix}", format=format)
        os.remove(f"{path}/b/{i:03d}.png")
    train, test = data.load(path)
    assert (train.y.bincount() + test.y.bincount()).tolist() == [3, 3]


@pytest.mark.parametrize("name", ["film.mpg", "table.h5", "page.eps", "weather.grib"])
def test_what_pillow_names_and_does_not_decode_is_left_out(tmp_path, name):
    path = tree(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / name).write_bytes(b"something")
    assert f"files {os.path.splitext(name)[1]} (1)" in folders.find(path).about


def test_a_class_without_an_image_is_an_error(tmp_path):
    path = tree(tmp_path / "set", {"a": 2, "b": 2, "c": 0})
    (tmp_path / "set/c/0.heic").write_bytes(b"a phone's picture")
    words = sentence(path)
    assert "class folders without an image that can be read: c" in words
    assert "left out: files .heic (1)" in words
    path = tree(tmp_path / "splits", {"train/a": 2, "train/b": 2, "train/c": 0, "val/a": 1})
    assert "without an image that can be read: c" in sentence(path)


def test_what_archives_leave_behind_is_no_class(tmp_path):
    path = tree(tmp_path, {"a": 2, "b": 2, "__MACOSX": 1, ".git": 1})
    assert data.load(path)[0].classes == ["a", "b"]


def test_names_that_are_not_utf8(tmp_path):
    """Their hash decides whether they are test images; they must not end a run."""
    path = tree(tmp_path, {"a": 0, "b": 4})
    for i in range(4):
        name = os.path.join(os.fsencode(path), b"a", b"caf\xe9%d.png" % i)
        with open(name, "wb") as file:
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(file, "png")
    train, test = data.load(path)
    assert (train.y.bincount() + test.y.bincount()).tolist() == [4, 4]
    assert len(data.identity(train, path)["content"]) == 16
