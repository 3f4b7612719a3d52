"""data.py, views.py, support/shapes.py and support/transfer.py: sets, folders, long tails, the
layouts that torchvision reads, and that every pixel is a function of (seed, step, view)."""
import dataclasses
import itertools
import json
import math
import os
import textwrap
from collections import Counter
from types import SimpleNamespace
from xml.sax.saxutils import escape

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

import data
import views
from support import groups
from support import shapes
from support import transfer

TINY = views.Recipe(
    global_size=32, local_size=16, n_local=4, global_scale=(0.4, 1.0), local_scale=(0.15, 0.5),
    jitter=(0.4, 0.4, 0.2, 0.06), blur_p=(0.5, 0.1, 0.5))
ONLY_CROPS = dict(jitter=(0, 0, 0, 0), jitter_p=0.0, gray_p=0.0, blur_p=(0, 0, 0),
                  solarize_p=(0, 0, 0), flip_p=0.0)
PLAIN = views.Recipe(
    global_size=24, local_size=12, n_local=1, global_scale=(0.4, 1.0), local_scale=(0.15, 0.5),
    **ONLY_CROPS)


def noise(n, h=32, w=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=generator)


def unnormalise(x):
    return x * torch.tensor(views.STD).view(3, 1, 1) + torch.tensor(views.MEAN).view(3, 1, 1)


def picture(path, seed=0, size=(8, 8)):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def tree(root, counts):
    """{"train/cat": 3, ...}: so many images in each folder, all different."""
    seed = itertools.count()
    for sub, n in counts.items():
        for i in range(n):
            picture(f"{root}/{sub}/{i:03d}.png", next(seed))
    return str(root)


def damage(path):
    with open(path, "rb+") as f:
        f.truncate(os.path.getsize(path) // 2)


# ---- shapes --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shapes_set():
    return data.load("shapes")


@pytest.fixture
def made_once(monkeypatch, shapes_set):
    """data.load("shapes") takes the images of shapes_set: to make them anew takes seconds."""
    monkeypatch.setitem(data.SETS, "shapes", lambda root: shapes_set)


def test_shapes_are_balanced_fixed_and_split(shapes_set, monkeypatch):
    train, test = shapes_set
    assert train.x.shape == (10_000, 3, 32, 32) and train.x.dtype == torch.uint8
    assert test.x.shape == (2_000, 3, 32, 32)
    assert train.y.bincount().tolist() == [1000] * 10 and test.y.bincount().tolist() == [200] * 10
    assert (train.y[:-1] != train.y[1:]).float().mean() > 0.8  # shuffled
    again = shapes.make(2_000, 14_142)
    assert torch.equal(test.x, again[0]) and torch.equal(test.y, again[1])
    drawn = []
    monkeypatch.setitem(data.SETS, "shapes", data.builtin_shapes)
    monkeypatch.setattr(shapes, "make", lambda n, seed: drawn.append((n, seed)) or again)
    data.load("shapes", seed=5, img_size=64)  # the flags do not touch it
    assert drawn == [(10_000, 16_180), (2_000, 14_142)]
    train_images = {bytes(t) for t in train.x.flatten(1).numpy()}
    test_images = {bytes(t) for t in test.x.flatten(1).numpy()}
    assert len(train_images) == 10_000 and not train_images & test_images


def luma(x):
    """(n, 32, 32), without its mean over pixels, of x (n, 3, 32, 32) uint8."""
    grey = (x.float() / 255 * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    return grey - grey.mean((1, 2), keepdim=True)


def test_the_names_of_shapes_say_what_is_drawn():
    """Stripes vary from left to right, bands from top to bottom, diagonals across. A wave is 6
    pixels long, which is 5.3 in an image, or 2.8 where it is fine, 11.4: so is the power spectrum.
    What is plain varies least."""
    x, y, names, label_map = shapes.make(2000, 3)
    f = torch.fft.fftfreq(32) * 32  # waves in 32 pixels
    fy, fx = f[:, None].expand(32, 32), f[None].expand(32, 32)
    length, angle = (fx ** 2 + fy ** 2).sqrt(), torch.atan2(fy, fx) % math.pi
    power, contrast = {}, {}
    for c, name in enumerate(names):
        texture = name.split("-")[1]
        grey = luma(x[y == c])  # (n, 32, 32)
        power[texture] = torch.fft.fft2(grey).abs().square().mean(0)  # (32, 32)
        on_object = label_map[y == c] > 0
        steps = (grey[:, :, 1:] - grey[:, :, :-1])[on_object[:, :, 1:] & on_object[:, :, :-1]]
        contrast[texture] = float(steps.abs().mean())
    directions = {"stripes": 0, "diagonals": math.pi / 4, "bands": math.pi / 2}
    for kind in directions:
        for texture, waves in ((kind, 32 / 6), (f"fine {kind}", 32 / 2.8)):
            strength = {}
            for other, direction in directions.items():
                off = (angle - direction + math.pi / 2) % math.pi - math.pi / 2
                for n in (32 / 6, 32 / 2.8):
                    there = (off.abs() < .3) & ((length - n).abs() < 1.2)
                    strength[other, n] = float(power[texture][there].mean())
            assert max(strength, key=strength.get) == (kind, waves), (texture, strength)
    assert min(contrast, key=contrast.get) == "plain"


def test_two_textures_of_shapes_occur_with_two_shapes_and_each_shape_twice(shapes_set):
    """So that shapes have to be seen too, and none of them alone names a class."""
    names = shapes_set[0].classes
    shape, texture = zip(*(name.split("-") for name in names))
    assert len(set(names)) == 10
    assert sorted(Counter(texture).values()) == [1, 1, 1, 1, 1, 1, 2, 2]
    assert sorted(Counter(shape).values()) == [2] * 5


def test_colour_and_brightness_do_not_name_the_class_of_shapes():
    x, y, _, _ = shapes.make(4000, 3)
    colour = x.float().mean((2, 3))  # (n, 3)
    means = torch.stack([colour[:2000][y[:2000] == c].mean(0) for c in range(10)])  # (10, 3)
    nearest = torch.cdist(colour[2000:], means).argmin(1)
    assert (nearest == y[2000:]).float().mean() < 0.2  # guessing gives 0.1


def test_the_label_map_of_shapes_covers_the_objects(shapes_set):
    train, _ = shapes_set
    assert train.label_map.shape == (10_000, 32, 32) and train.label_map.dtype == torch.uint8
    some = data.subset(train, 500)
    classes = some.label_map.flatten(1).amax(1).long() - 1
    assert torch.equal(classes, some.y)
    assert ((some.label_map == 0) | (some.label_map == (some.y + 1)[:, None, None])).all()
    # away from objects there is noise of one grey; on them there are colours
    background = F.max_pool2d((some.label_map > 0).float()[:, None], 3, 1, 1)[:, 0] == 0
    colourful = (some.x.amax(1) - some.x.amin(1)).float() / 255  # (500, 32, 32)
    assert colourful[background].mean() < 0.2
    assert colourful[some.label_map > 0].mean() > 0.25
    spread = torch.stack([image[:, b].float().std() for image, b in zip(some.x, background)]) / 255
    assert (spread.mean() - shapes.NOISE).abs() < 0.01


def test_the_label_map_of_shapes_ends_where_an_object_covers_half_a_pixel(monkeypatch):
    """One plain object without noise: a pixel is as far from the background's colour as the object
    covers it."""
    monkeypatch.setattr(shapes, "OBJECTS", 1)
    monkeypatch.setattr(shapes, "NOISE", 0)
    x, y, names, label_map = shapes.make(1000, 4)
    plain = y == names.index("cross-plain")
    x, label_map = x[plain].float(), label_map[plain]  # (n, 3, 32, 32) (n, 32, 32)
    background = x.flatten(2).median(2).values[..., None, None]  # (n, 3, 1, 1)
    off = (x - background).abs().amax(1)  # (n, 32, 32)
    covered = off / off.amax((1, 2), keepdim=True)
    whole = off.amax((1, 2)) > 60  # an object that is seen, and differs from the background
    sure = ((covered - 0.5).abs() > 0.05) & whole[:, None, None]
    assert whole.sum() > 50 and torch.equal((label_map > 0)[sure], (covered > 0.5)[sure])


# ---- folders -------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", ["val", "test"])
def test_folder_with_splits(tmp_path, split):
    path = tree(tmp_path, {"train/dog": 3, "train/cat": 2, "train/cat/more": 1,
                           f"{split}/cat": 1, f"{split}/dog": 2})
    picture(f"{path}/train/cat/.hidden.png")
    picture(f"{path}/train/.git/x.png")
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    train, test = data.load(path)
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.y.tolist() == [0, 0, 0, 1, 1, 1] and train.y.dtype == torch.int64
    assert test.y.tolist() == [0, 1, 1] and len(test) == 3
    assert train.paths == sorted(train.paths) and isinstance(train, data.Images)
    for images in (train, test):
        for x, p in zip(images.x, images.paths):
            assert np.array_equal(x.permute(1, 2, 0).numpy(), np.array(Image.open(p)))


def test_a_tenth_of_class_folders_is_the_test_split_whatever_the_seed(tmp_path):
    path = tree(tmp_path, {"a": 30, "b": 12, "lonely": 1})
    picture(f"{path}/loose.png")
    train, test = data.load(path, seed=0)
    assert train.y.bincount().tolist() == [27, 11, 1] and test.y.bincount().tolist() == [3, 1]
    assert not set(train.paths) & set(test.paths) and len(set(train.paths + test.paths)) == 43
    assert data.load(path, seed=7)[1].paths == test.paths
    all_paths = sorted(train.paths + test.paths)
    assert test.paths[:3] != all_paths[:3]  # not simply the first ones


def test_flat_folder_is_unlabelled_and_train_may_be_a_class(tmp_path):
    train, test = data.load(tree(tmp_path / "flat", {".": 5}))
    assert train.y is None and test is None and len(train) == 5 and train.name == "flat"
    train, _ = data.load(tree(tmp_path / "vehicles", {"train": 2, "bus": 2}))
    assert train.classes == ["bus", "train"]
    train, test = data.load(tree(tmp_path / "nosplit", {"train/a": 2, "train/b": 2}))
    assert train.classes == ["a", "b"] and len(test) == 2
    train, test = data.load(tree(tmp_path / "bare", {"train": 2, "val": 2}))
    assert train.y is None and test is None and len(train) == 2


def test_folder_errors_are_one_sentence(tmp_path):
    def says(path, *words, **flags):
        with pytest.raises(ValueError) as e:
            data.load(str(path), **flags)
        assert all(w in str(e.value) for w in words) and "\n" not in str(e.value), str(e.value)

    says(tmp_path / "missing", "missing", "neither a folder", ", ".join(data.SETS))
    says("imagenette", "--data imagenette", "neither a folder")
    (tmp_path / "empty/train").mkdir(parents=True)
    says(tmp_path / "empty", "no images", "train/<class>/*", "val/<class>/*")
    says(tree(tmp_path / "one", {"cat": 3}), "only one class", "'cat'")
    says(tree(tmp_path / "alien", {"train/a": 1, "train/b": 1, "val/c": 1}), "val/", "got c")
    says("shapes", "--imbalance 0.5", imbalance=0.5)
    says("shapes", "--imbalance nan", imbalance=math.nan)
    says("shapes", "--imbalance-law linear", "exp, power", imbalance=10, imbalance_law="linear")
    says(tree(tmp_path / "flat", {".": 3}), "--imbalance 10", "no class folders", imbalance=10)
    path = tree(tmp_path / "broken", {"a": 2, "b": 2})
    train, _ = data.load(path)
    damage(train.paths[0])
    says(path, train.paths[0], "cannot be read")


def test_named_sets_and_no_network(monkeypatch, tmp_path):
    from torchvision import datasets
    asked = []

    class Fake:
        classes = ["a", "b"]

        def __init__(self, root, train, download=False):
            asked.append(download)
            if not download:
                raise RuntimeError("Dataset not found or corrupted.")
            self.data = np.arange(4 * 32 * 32 * 3, dtype=np.uint8).reshape(4, 32, 32, 3)
            self.targets = [0, 1, 1, 0]

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    train, test = data.load("cifar10", root=str(tmp_path))
    assert asked == [False, True] * 2
    assert train.y.tolist() == [0, 1, 1, 0] and train.x.is_contiguous() and train.name == "cifar10"
    assert train.x[1, 2, 3, 4] == Fake(None, True, True).data[1, 3, 4, 2]

    def offline(*_, **__):
        raise (OSError if __.get("download") else RuntimeError)("no route to host")
    monkeypatch.setattr(datasets, "STL10", offline)
    words = "stl10 is not under --data-root .* cannot be downloaded: no route"
    with pytest.raises(ValueError, match=words):
        data.load("stl10", root=str(tmp_path))


def test_stl10_through_torchvision(tmp_path):
    """Files as torchvision expects them: pixels column by column, labels from 1 on."""
    base = tmp_path / "stl10_binary"
    base.mkdir()
    x = noise(3, 96, 96)
    for split, labels in (("train", [3, 1]), ("test", [10])):
        pixels = x[:len(labels)].permute(0, 1, 3, 2)
        pixels.contiguous().numpy().tofile(base / f"{split}_X.bin")
        np.array(labels, dtype=np.uint8).tofile(base / f"{split}_y.bin")
    (base / "class_names.txt").write_text("\n".join("abcdefghij"))
    from torchvision import datasets
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.STL10, "_check_integrity", lambda _: True)
        train, test = data.load("stl10", root=str(tmp_path))
    assert torch.equal(train.x, x[:2]) and train.y.tolist() == [2, 0]
    assert torch.equal(test.x, x[:1]) and test.y.tolist() == [9] and test.y.dtype == torch.int64
    assert train.classes == list("abcdefghij") and train.name == "stl10"


def test_a_set_of_your_own_is_one_function_and_one_entry(monkeypatch, tmp_path):
    """The example in data.py's docstring, word for word."""
    x = noise(7)
    y = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    torch.save((x, y), tmp_path / "halves.pt")
    monkeypatch.setattr(data, "SETS", dict(data.SETS))
    example = data.__doc__.split("one entry in SETS:\n")[1].split("Letters:")[0]
    exec(textwrap.dedent(example), vars(data).copy())
    train, test = data.load("halves", root=str(tmp_path))
    assert torch.equal(train.x, x[::2]) and test.y.tolist() == [1, 0, 0]
    cut, whole = data.load("halves", root=str(tmp_path), imbalance=2)
    assert cut.y.bincount().tolist() == [2, 1] and len(whole) == 3
    steps = list(views.batches(train, PLAIN, batch_size=4, seed=0, start=0, stop=2))
    assert len(steps) == 2
    with pytest.raises(ValueError, match="neither a folder nor .* shapes, .*, halves"):
        data.load("quarters", root=str(tmp_path))


def test_a_named_set_comes_before_a_folder_of_that_name(monkeypatch, tmp_path, made_once):
    monkeypatch.chdir(tmp_path)
    tree("shapes", {"a": 2, "b": 2})
    assert len(data.load("shapes")[0]) == 10_000 and len(data.load("./shapes")[0]) == 2


def test_mixed_sizes_or_too_many_bytes_stay_on_disk(tmp_path, monkeypatch):
    path = tree(tmp_path, {"a": 3, "b": 3})
    assert isinstance(data.load(path)[0], data.Images)
    monkeypatch.setattr(data, "IN_MEMORY", 4 * 3 * 8 * 8)
    assert isinstance(data.load(path)[0], data.Files)
    monkeypatch.undo()
    for i in range(3):
        picture(f"{path}/b/{i:03d}.png", size=(9, 8))
    train, _ = data.load(path)
    assert isinstance(train, data.Files) and len(train) == 4
    assert [train.read(i)[0].shape for i in range(4)] == [(3, 8, 8)] * 2 + [(3, 8, 9)] * 2


def test_large_images_are_shrunk_when_kept(tmp_path):
    for i in range(4):
        picture(f"{tmp_path}/{i // 2}/{i}.png", i, (100, 50))
    assert data.load(str(tmp_path), img_size=8)[0].x.shape == (2, 3, 32, 64)
    assert data.load(str(tmp_path), img_size=13)[0].x.shape == (2, 3, 50, 100)


@pytest.mark.parametrize("in_memory", [True, False])
def test_truncated_images(tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(data, "IN_MEMORY", 0)
    path = tree(tmp_path, {"train/a": 75, "train/b": 75, "val/a": 1, "val/b": 1})
    damaged = f"{path}/train/b/000.png"
    damage(damaged)  # the first of its class: its left neighbour is of class a
    train, _ = data.load(path)

    def read_all():
        return torch.cat(list(views.eval_batches(train, 8, batch_size=64)))
    got = read_all()
    assert train.broken == [damaged] and isinstance(train, data.Images) == in_memory
    assert torch.equal(got[75], got[76]) and not torch.equal(got[75], got[74])
    read_all()
    assert train.broken == [damaged]  # counted once
    damage(f"{path}/train/a/010.png")
    words = r"2 of 150 .* more than 1 %: .*/train/./0.0.png cannot be read \(.+\)"
    with pytest.raises(ValueError, match=words):
        train, _ = data.load(path)  # raises where the set is in memory
        read_all()


@pytest.mark.parametrize("in_memory", [True, False])
def test_one_damaged_image_ends_no_small_set_and_two_do(tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(data, "IN_MEMORY", 0)
    path = tree(tmp_path, {".": 30})
    damage(f"{path}/000.png")  # the first one, by which the size of all is known
    train, _ = data.load(path)
    assert len(list(views.eval_batches(train, 8))) == 1 and train.broken == [f"{path}/000.png"]
    damage(f"{path}/020.png")
    with pytest.raises(ValueError, match="2 of 30 images of .* more than 1 %"):
        list(views.eval_batches(data.load(path)[0], 8))


def test_truncated_image_in_a_worker_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    path = tree(tmp_path, {".": 120})
    train, _ = data.load(path)
    damage(train.paths[60])
    for _ in views.batches(train, PLAIN, batch_size=60, seed=0, start=0, stop=2, workers=1):
        pass
    assert train.broken == [train.paths[60]]


def test_imbalance_by_hand(tmp_path, made_once):
    path = tree(tmp_path, {f"train/{c}": 16 for c in "abc"} | {"train/d": 1, "val/a": 1})
    train, test = data.load(path, imbalance=8)  # 16 * 8^(-c/3) = 16, 8, 4, 2; class d has only 1
    assert train.y.bincount().tolist() == [16, 8, 4, 1] and len(test) == 1
    assert torch.equal(data.load(path, imbalance=8)[0].x, train.x)
    assert train.paths == sorted(train.paths)
    assert data.load(path, imbalance=8, seed=1)[0].paths != train.paths
    for x, p in zip(train.x, train.paths):  # pixels, labels and paths were taken together
        assert np.array_equal(x.permute(1, 2, 0).numpy(), np.array(Image.open(p)))
        assert p.split("/")[-2] == "abcd"[train.y[train.paths.index(p)]]
    assert data.load(path, imbalance=1.0)[0].y.bincount().tolist() == [16, 16, 16, 1]
    long, _ = data.load("shapes", imbalance=100)
    assert long.y.bincount().tolist() == [round(1000 * 100 ** (-c / 9)) for c in range(10)]


def test_imbalance_by_a_power_law(tmp_path, made_once):
    path = tree(tmp_path, {f"train/{c}": 16 for c in "abcd"} | {f"val/{c}": 2 for c in "abcd"})
    train, test = data.load(path, imbalance=4, imbalance_law="power")
    # 16 / (c + 1): 16, 8, 5.33, 4
    assert train.y.bincount().tolist() == [16, 8, 5, 4] and test.y.bincount().tolist() == [2] * 4
    assert train.classes == list("abcd") and train.paths == sorted(train.paths)
    again, other = (data.load(path, imbalance=4, imbalance_law="power", seed=s)[0] for s in (0, 1))
    assert again.paths == train.paths != other.paths
    exp, _ = data.load(path, imbalance=4)  # 16, 10.08, 6.35, 4
    assert exp.y.bincount().tolist() == [16, 10, 6, 4]
    assert set(train.paths) < set(exp.paths)  # nested: both take the first of one order
    for law in ("exp", "power"):  # the two ends agree, whatever lies between
        sizes = data.load("shapes", imbalance=50, imbalance_law=law)[0].y.bincount().tolist()
        assert (sizes[0], sizes[-1]) == (1000, 20) and sizes == sorted(sizes, reverse=True)
        for c, size in enumerate(sizes):
            place = c / 9 if law == "exp" else math.log(c + 1) / math.log(10)
            assert size == round(1000 * 50 ** -place)


def test_imbalance_of_one_class_and_of_single_images():
    one = data.Images(noise(5), torch.zeros(5, dtype=torch.int64), ["a"], "one")
    for law in data.LAWS:
        assert len(data.long_tail(one, 10, 0, law)) == 5  # the first class of all keeps n_max
        two = data.Images(noise(2), torch.arange(2), ["a", "b"], "two")
        assert data.long_tail(two, 1e9, 0, law).y.tolist() == [0, 1]  # never less than 1


@pytest.mark.parametrize("in_memory", [True, False])
def test_imbalance_and_damaged_images(tmp_path, monkeypatch, in_memory):
    """The stand-in of a damaged image is of its class, also in what the long tail leaves."""
    if not in_memory:
        monkeypatch.setattr(data, "IN_MEMORY", 0)
    path = tree(tmp_path, {"train/a": 150, "train/b": 150, "val/a": 1, "val/b": 1})
    paths = data.load(path, imbalance=10)[0].paths
    damage(paths[150])  # the first image of class b that stays
    train, _ = data.load(path, imbalance=10)
    assert train.paths == paths and train.y.bincount().tolist() == [150, 15]
    got = torch.cat(list(views.eval_batches(train, 8)))
    assert train.broken == [paths[150]] and not torch.equal(got[150], got[149])


# ---- iNaturalist-2018 ----------------------------------------------------------------------------

def inat(root, train, val):
    """Folders 2018/<group>/<class number> with so many images of each class, and the list of those
    for validation."""
    val_list = []
    for c, (n_train, n_val) in enumerate(zip(train, val)):
        folder = f"{('Aves', 'Plantae', 'Insecta')[c % 3]}/{c}"
        for i in range(n_train + n_val):
            picture(f"{root}/2018/{folder}/{i:03d}.jpg", 100 * c + i)
        for i in range(n_val):
            name = f"train_val2018/{folder}/{i:03d}.jpg"
            val_list.append({"id": len(val_list), "file_name": name})
    (root / "val2018.json").write_text(json.dumps({"images": val_list, "annotations": []}))


def test_inat18_through_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "INAT18", {"head": 1, "medium": 1, "tail": 11})
    sizes = [101, 30] + [3] * 9 + [1, 2]  # class 10 and 11 sort after 9, not after 1
    inat(tmp_path, sizes, [3] * 13)
    (tmp_path / "2018/Aves/0/notes.txt").write_text("not an image")
    train, test = data.load("inat18", root=str(tmp_path), img_size=8)
    assert isinstance(train, data.Files) and train.y.bincount().tolist() == sizes
    assert test.y.bincount().tolist() == [3] * 13 and test.name == "inat18"
    assert len(train.classes) == len(test.classes) == 13
    assert not set(train.paths) & set(test.paths)
    for images in (train, test):
        for path, c in zip(images.paths, images.y.tolist()):
            assert os.path.isfile(path) and path.split(os.sep)[-2] == str(c)
    assert train.read(0)[0].shape == (3, 8, 8)
    cut, whole = data.load("inat18", root=str(tmp_path), imbalance=101)
    assert len(cut) < len(train) and whole.paths == test.paths

    with open(tmp_path / "val2018.json", "a") as f:  # a list that is no JSON
        f.write("}")
    with pytest.raises(ValueError, match="inat18 is expected as .*2018/<group>.*val2018.json"):
        data.load("inat18", root=str(tmp_path))
    absent = {"images": [{"file_name": "train_val2018/Aves/0/absent.jpg"}]}
    (tmp_path / "val2018.json").write_text(json.dumps(absent))
    with pytest.raises(ValueError, match="names 1 images, and 0 of them"):
        data.load("inat18", root=str(tmp_path))
    (tmp_path / "val2018.json").unlink()
    with pytest.raises(ValueError, match="inat18 is expected as .*val2018.json"):
        data.load("inat18", root=str(tmp_path))
    with pytest.raises(ValueError, match="inat18 is expected as .*nowhere.2018"):
        data.load("inat18", root=str(tmp_path / "nowhere"))


def test_inat18_counts_of_the_classes_are_asserted(tmp_path):
    inat(tmp_path, [3, 3, 3], [1, 1, 1])
    words = "842 head, 3701 medium, 3599 tail classes .* got 0 head, 0 medium, 3 tail"
    with pytest.raises(ValueError, match=words):
        data.load("inat18", root=str(tmp_path))


# ---- transfer sets: a small copy of each layout, read by torchvision's own class -----------------

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def agrees(name, root, lengths, classes):
    """Loads, compares lengths and classes, reads two images. -> (train, val, test)"""
    sets = transfer.load(name, str(root))
    assert tuple(s and len(s) for s in sets) == lengths
    for s in (s for s in sets if s):
        assert s.classes == classes and s.name == name and s.y.dtype == torch.int64
        assert isinstance(s, data.Files) and all(isinstance(p, str) for p in s.paths)
        assert s.read(len(s) - 1)[0].shape == (3, 8, 8) and s.read(0)[1] is None
    paths = [p for s in sets if s for p in s.paths]
    assert len(paths) == len(set(paths))
    return sets


def test_transfer_aircraft(tmp_path):
    base, n = tmp_path / "fgvc-aircraft-2013b/data", itertools.count()
    write(base / "variants.txt", "707-320\nA380 heavy\n")
    labels_of = {"train": ("707-320", "A380 heavy"), "val": ("A380 heavy",),
                 "test": ("707-320",) * 3}
    for split, labels in labels_of.items():
        names = [f"{next(n):07d}" for _ in labels]
        for name in names:
            picture(f"{base}/images/{name}.jpg", int(name))
        rows = [f"{name} {label}\n" for name, label in zip(names, labels)]
        write(base / f"images_variant_{split}.txt", "".join(rows))
    train, val, test = agrees("aircraft", tmp_path, (2, 1, 3), ["707-320", "A380 heavy"])
    assert [s.y.tolist() for s in (train, val, test)] == [[0, 1], [1], [0, 0, 0]]
    assert test.paths[0].endswith("0000003.jpg")
    write(base / "images_variant_val.txt", "")
    with pytest.raises(ValueError, match="aircraft is expected in .*a split is empty"):
        transfer.load("aircraft", str(tmp_path))


def test_transfer_dtd(tmp_path):
    base = tmp_path / "dtd/dtd"
    for s, split in enumerate(("train", "val", "test")):
        rows = [f"{c}/{c}_{s}{i}.jpg" for c in ("woven", "banded") for i in range(s + 1)]
        for i, row in enumerate(rows):
            picture(f"{base}/images/{row}", 10 * s + i)
        write(base / f"labels/{split}1.txt", "\n".join(rows) + "\n")
    for s in agrees("dtd", tmp_path, (2, 4, 6), ["banded", "woven"]):
        assert all(f"/{s.classes[y]}/" in p for p, y in zip(s.paths, s.y))


def test_transfer_food(tmp_path):
    base = tmp_path / "food-101"
    for split, n in (("train", 3), ("test", 2)):
        rows = {c: [f"{c}/{split}{i}" for i in range(n)] for c in ("tacos", "apple_pie")}
        for row in itertools.chain(*rows.values()):
            picture(f"{base}/images/{row}.jpg", n)
        write(base / f"meta/{split}.json", json.dumps(rows))
    train, val, test = agrees("food", tmp_path, (6, None, 4), ["apple_pie", "tacos"])
    assert val is None
    assert train.y.tolist() == [1, 1, 1, 0, 0, 0] and test.y.tolist() == [1, 1, 0, 0]
    for s in (train, test):
        assert all(f"/{s.classes[y]}/" in p for p, y in zip(s.paths, s.y))


def test_transfer_pets(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    rows_of = {
        "trainval": ["Abyssinian_1 1 1 1", "great_pyrenees_2 2 2 1", "Abyssinian_3 1 1 1"],
        "test": ["great_pyrenees_9 2 2 1", "Abyssinian_8 1 1 1"]}
    for split, rows in rows_of.items():
        write(base / f"annotations/{split}.txt", "\n".join(rows) + "\n")
        for row in rows:
            picture(f"{base}/images/{row.split()[0]}.jpg")
    train, _, test = agrees("pets", tmp_path, (3, None, 2), ["Abyssinian", "Great Pyrenees"])
    assert train.y.tolist() == [0, 1, 0] and test.y.tolist() == [1, 0]


def test_transfer_sun397_reads_the_first_partition(tmp_path):
    base = tmp_path / "SUN397"
    write(base / "ClassName.txt", "/a/abbey\n/c/church/indoor\n")
    rows = [f"/a/abbey/sun_a{i}.jpg" for i in range(4)]
    rows += [f"/c/church/indoor/sun_b{i}.jpg" for i in range(4)]
    for i, row in enumerate(rows):
        picture(f"{base}{row}", i)
    with pytest.raises(ValueError, match="sun397 is expected in .*SUN397/.*Training_01.txt"):
        transfer.load("sun397", str(tmp_path))
    write(base / "Training_01.txt", "\n".join(rows[:2] + rows[4:5]) + "\n")
    # two images are in neither list
    write(base / "Testing_01.txt", "\n".join(rows[6:] + rows[3:4]) + "\n\n")
    train, _, test = agrees("sun397", tmp_path, (3, None, 3), ["abbey", "church/indoor"])
    assert train.y.tolist() == [0, 0, 1] and test.y.tolist() == [1, 1, 0]
    assert test.paths == [f"{base}{row}" for row in rows[6:] + rows[3:4]]


def test_transfer_caltech_takes_thirty_of_each_class(tmp_path):
    base = tmp_path / "caltech101/101_ObjectCategories"
    sizes = {"BACKGROUND_Google": 35, "accordion": 40, "yin_yang": 4}
    for c, (name, n) in enumerate(sizes.items()):
        for i in range(1, n + 1):
            picture(f"{base}/{name}/image_{i:04d}.jpg", 100 * c + i)
    (base / "BACKGROUND_Google/tmp").write_text("as in the archive")
    train, _, test = agrees("caltech101", tmp_path, (63, None, 16), list(sizes))
    assert train.y.bincount().tolist() == [30, 30, 3] and test.y.bincount().tolist() == [5, 10, 1]
    for s in (train, test):
        assert all(f"/{s.classes[y]}/" in p for p, y in zip(s.paths, s.y))
    again = transfer.load("caltech101", str(tmp_path))[0]
    assert again.paths == train.paths  # the same for everybody
    accordions = sorted(p for p in train.paths + test.paths if "accordion" in p)
    assert test.paths[5:15] != accordions[-10:]


def test_transfer_flowers(tmp_path, monkeypatch):
    io = pytest.importorskip("scipy.io")
    from torchvision.datasets import Flowers102
    without_checksums = {k: (v[0], None) for k, v in Flowers102._file_dict.items()}
    monkeypatch.setattr(Flowers102, "_file_dict", without_checksums)
    base = tmp_path / "flowers-102"
    for i in range(1, 8):
        picture(f"{base}/jpg/image_{i:05d}.jpg", i)
    io.savemat(base / "imagelabels.mat", {"labels": np.array([[5, 1, 102, 5, 1, 2, 2]])})
    io.savemat(base / "setid.mat", {"trnid": np.array([[3, 1]]), "valid": np.array([[2, 7]]),
                                    "tstid": np.array([[6, 5, 4]])})
    names = getattr(Flowers102, "classes", [str(i) for i in range(1, 103)])  # not in 0.21
    train, val, test = agrees("flowers", tmp_path, (2, 2, 3), list(names))
    assert [s.y.tolist() for s in (train, val, test)] == [[101, 4], [0, 1], [1, 0, 4]]
    assert train.paths[0].endswith("image_00003.jpg")


def test_transfer_cars(tmp_path):
    io = pytest.importorskip("scipy.io")
    base = tmp_path / "stanford_cars"
    kinds = [("fname", "O"), ("class", "O")]
    train_rows = [("00001.jpg", 2), ("00002.jpg", 1)]
    test_rows = [("00001.jpg", 1), ("00002.jpg", 2), ("00003.jpg", 2)]
    for split, path, rows in (("train", "devkit/cars_train_annos.mat", train_rows),
                              ("test", "cars_test_annos_withlabels.mat", test_rows)):
        for name, c in rows:
            picture(f"{base}/cars_{split}/{name}", c)
        (base / path).parent.mkdir(exist_ok=True)
        io.savemat(base / path, {"annotations": np.array(rows, dtype=kinds)[None]})
    classes = ["AM General Hummer", "Acura RL"]
    io.savemat(base / "devkit/cars_meta.mat", {"class_names": np.array([classes], dtype="O")})
    train, _, test = agrees("cars", tmp_path, (2, None, 3), classes)
    assert train.y.tolist() == [1, 0] and test.y.tolist() == [0, 1, 1]
    assert "/cars_test/" in test.paths[0]


def test_transfer_voc2007_difficult_objects(tmp_path):
    base = tmp_path / "VOCdevkit/VOC2007"
    things = {"000001": [("dog", 0), ("dog", 0), ("person", 1)],  # person only as a difficult one
              "000002": [("tvmonitor", 1), ("tvmonitor", 0)],  # one of the two is plain to see
              "000003": [("aeroplane", 0), ("aeroplane", 1)], "000004": []}
    for name, objects in things.items():
        picture(f"{base}/JPEGImages/{name}.jpg", int(name))
        rows = "".join(f"<object><name>{escape(c)}</name><difficult>{d}</difficult>"
                       "<part><name>head</name></part></object>" for c, d in objects)
        write(base / f"Annotations/{name}.xml",
              f"<annotation><filename>{name}.jpg</filename>{rows}</annotation>")
    names_of = {"train": ["000001", "000004"], "val": ["000002"], "test": ["000003"]}
    for split, names in names_of.items():
        write(base / f"ImageSets/Main/{split}.txt", "\n".join(names) + "\n")
    train, val, test = agrees("voc2007", tmp_path, (2, 1, 1), list(transfer.VOC))
    assert train.y.shape == (2, 20)
    assert len(set(transfer.VOC)) == 20 and sorted(transfer.VOC) == list(transfer.VOC)

    def labels(images):
        return {transfer.VOC[c]: int(row[c]) for row in images.y for c in range(20) if row[c]}

    assert labels(train) == {"dog": 1, "person": -1}
    assert labels(val) == {"tvmonitor": 1} and labels(test) == {"aeroplane": 1}
    damage(train.paths[0])  # a stand-in must have all its labels
    with pytest.raises(ValueError, match="cannot be read .*, nor can the images around it"):
        train.read(0)
    train.y[1] = train.y[0]
    assert train.read(0)[1][0] == train.paths[0]


def test_transfer_cifar_has_no_validation_split(monkeypatch, tmp_path):
    from torchvision import datasets
    monkeypatch.setattr(datasets, "CIFAR100", lambda root, train: SimpleNamespace(
        data=np.full((3 if train else 2, 32, 32, 3), 7, np.uint8), classes=["a", "b"],
        targets=[0, 1, 1] if train else [1, 0]))
    train, val, test = transfer.load("cifar100", str(tmp_path))
    assert val is None and train.y.tolist() == [0, 1, 1] and test.y.tolist() == [1, 0]
    assert train.name == "cifar100" and train.x.shape == (3, 3, 32, 32)


@pytest.mark.parametrize("name", sorted(set(transfer.SETS) - {"cifar10", "cifar100"}))
def test_transfer_says_where_missing_files_are_expected(tmp_path, name):
    if name in ("cars", "flowers"):
        pytest.importorskip("scipy.io")
    with pytest.raises(ValueError) as error:
        transfer.load(name, str(tmp_path))
    text = str(error.value)
    kind, _, _, where = transfer.SETS[name]
    assert text.startswith(f"--data {name} is expected in {tmp_path}")
    assert where in text and kind in text and "\n" not in text


def test_transfer_names_and_metrics(tmp_path):
    words = "--data birdsnap is not one of the transfer sets aircraft, caltech101, cars"
    with pytest.raises(ValueError, match=words):
        transfer.load("birdsnap", str(tmp_path))
    names = {metric: {n for n, m in transfer.METRIC.items() if m == metric}
             for metric in ("top1", "per_class", "map11")}
    assert names["per_class"] == {"aircraft", "caltech101", "flowers", "pets"}
    assert names["map11"] == {"voc2007"} and len(names["top1"]) == 6 and len(transfer.METRIC) == 11


def test_subset(tmp_path, monkeypatch):
    images = data.Images(noise(10), torch.arange(10), list("abcdefghij"), "x")
    assert data.subset(images, 5).y.tolist() == [0, 2, 4, 6, 8]
    assert data.subset(images, 99).y.tolist() == list(range(10))
    assert torch.equal(data.subset(images, torch.tensor([3, 1])).x, images.x[[3, 1]])
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    files, _ = data.load(tree(tmp_path, {".": 4}))
    assert data.subset(files, 2).paths == files.paths[::2] and data.subset(files, 2).y is None


# ---- order and seeds -----------------------------------------------------------------------------

def test_indices_cover_an_epoch_once():
    n, B = 103, 10  # 10 steps an epoch, 3 images dropped
    epochs = [torch.cat([views.indices(n, B, 4, e * 10 + k) for k in range(10)]) for e in range(3)]
    for order in epochs:
        assert len(order) == 100 == len(order.unique()) and 0 <= order.min() and order.max() < n
    assert not torch.equal(epochs[0], epochs[1])
    assert len({frozenset(range(n)) - set(o.tolist()) for o in epochs}) > 1  # not always the same 3
    assert not torch.equal(views.indices(n, B, 4, 0), views.indices(n, B, 5, 0))


def test_seed_of_tells_tuples_apart():
    tuples = [t for n in (1, 2, 3, 4) for t in itertools.product((0, 1, 2, 2 ** 33), repeat=n)]
    seeds = {views.seed_of(*t) for t in tuples}
    assert len(seeds) == len(tuples) and all(0 <= s < 2 ** 63 for s in seeds)


@pytest.fixture(params=["memory", "disk"])
def some(request, tmp_path):
    """The same 40 images in memory and on disk."""
    x = noise(40)
    if request.param == "memory":
        return data.Images(x, torch.arange(40), [str(i) for i in range(40)], "x")
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:02d}.png")
    paths = sorted(str(p) for p in tmp_path.iterdir())
    return data.Files(paths, torch.arange(40), [str(i) for i in range(40)], "x")


def run(images, start, stop, recipe=TINY, **flags):
    flags = dict(batch_size=8, seed=3) | flags
    return list(views.batches(images, recipe, start=start, stop=stop, **flags))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b))


def test_batches_have_the_views_of_the_recipe(some):
    out = run(some, 0, 2)
    shapes_of_views = [tuple(v.shape) for v in out[0]]
    assert len(out) == 2 and shapes_of_views == [(8, 3, 32, 32)] * 2 + [(8, 3, 16, 16)] * 4
    for v in out[0]:
        assert v.dtype == torch.float32 and ((unnormalise(v) - 0.5).abs() < 0.5 + 1e-5).all()
    assert len(run(some, 0, 1, views.Recipe(16, 8, 0))[0]) == 2  # no local crops


def test_batches_do_not_depend_on_ranks_or_the_step_they_start_at(some):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    whole = run(some, 0, 7)  # 5 steps an epoch: into the second
    for step in (0, 6):
        halves = [run(some, step, step + 1, rank=r, world=2)[0] for r in (0, 1)]
        assert same(whole[step], [torch.cat(v) for v in zip(*halves)])
        assert same(run(some, step, step + 1)[0], whole[step])
    assert all(same(a, b) for a, b in zip(run(some, 5, 7), whole[5:]))
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is not touched


class Disk:
    """A set that is read image by image: x (N, 3, H, W)."""

    def __init__(self, x):
        self.images = x

    def __len__(self):
        return len(self.images)

    def read(self, i):
        return self.images[i], None

    def note_broken(self, paths):
        assert not paths


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_differ_by_step_view_and_seed(in_memory):
    x = noise(1).expand(8, 3, 32, 32).clone()  # the same image eight times
    one = data.Images(x, None, [], "x") if in_memory else Disk(x)
    a, b = run(one, 0, 2)
    flat = [v for v in torch.cat([a[0], a[1], b[0], b[1]])] + list(run(one, 0, 1, seed=4)[0][0])
    assert len({bytes(v.numpy()) for v in flat}) == len(flat)
    assert len({bytes(v.numpy()) for v in torch.cat(a[2:])}) == 32


def test_batches_show_the_images_of_indices(some):
    """Every image has one colour of its own, so its crops tell which image they come from."""
    if isinstance(some, data.Files):
        for i, p in enumerate(some.paths):
            Image.new("RGB", (32, 32), (6 * i, 255 - 6 * i, 40)).save(p)
    else:
        colours = torch.tensor([[6 * i, 255 - 6 * i, 40] for i in range(40)], dtype=torch.uint8)
        some.x = colours[..., None, None].repeat(1, 1, 32, 32)
    for v in run(some, 2, 3, PLAIN)[0]:
        red = unnormalise(v)[:, 0].mean((1, 2)) * 255  # (8,)
        assert torch.equal((red / 6).round().long(), views.indices(40, 8, 3, 2))


class Uneven(views.Recipe):
    def views(self):
        first, second, *locals_ = super().views()
        third = second._replace(scale=(0.01, 0.01))
        return [first, second._replace(size=16), third, locals_[0]._replace(size=10), *locals_[1:]]


def test_every_view_has_its_own_size_and_scale():
    """A row of the image holds 0 to 255 from left to right, and a column does so in another
    channel: so the range of a crop's values tells which share of the image it shows."""
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8)  # (64,)
    x = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64).byte()])
    images = data.Images(x.expand(8, 3, 64, 64).clone(), None, [], "x")
    crops = run(images, 0, 1, Uneven(24, 8, 3, (0.8, 0.8), (0.1, 0.1), **ONLY_CROPS))[0]
    assert [crop.shape[-1] for crop in crops] == [24, 16, 24, 10, 8, 8]
    for crop, share in zip(crops, (0.8, 0.8, 0.01, 0.1, 0.1, 0.1)):
        low, high = unnormalise(crop).flatten(2).aminmax(dim=2)  # (8, 3)
        sides = (high - low)[:, :2] * 255 / 256 * crop.shape[-1] / (crop.shape[-1] - 1)  # (8, 2)
        assert float(sides.prod(1).mean()) == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("x, y, words", [
    (torch.zeros(4, 3, 8, 8), None, r"of uint8, got a Tensor \(4, 3, 8, 8\) of torch.float32"),
    (torch.zeros(4, 1, 8, 8).byte(), None, r"got a Tensor \(4, 1, 8, 8\) of torch.uint8"),
    (torch.zeros(4, 8, 8, 3).byte(), None, r"got a Tensor \(4, 8, 8, 3\)"),
    (np.zeros((4, 3, 8, 8), np.uint8), None, r"got a ndarray \(4, 3, 8, 8\) of uint8"),
    ([1, 2], None, "the images of mine must be .* got a list"),
    (noise(4), [0, 1, 0, 1], "the labels of mine must be None or a tensor .* got a list"),
    (noise(4), torch.zeros(3), r"each of the 4 images, got a Tensor \(3,\)"),
    (noise(4), torch.zeros(4), "the labels of mine must be int64, got torch.float32"),
    (noise(4), torch.ones(4).byte(), "the labels of mine must be int64, got torch.uint8"),
    (noise(4), torch.tensor([1, 2, 1, 2]), "must lie in 0..1, one for each of its 2 .*got 1 to 2"),
    (noise(4), torch.tensor([0, -1, 1, 0]), "must lie in 0..1, .* got -1 to 1")])
def test_images_of_another_kind_are_one_sentence(x, y, words):
    with pytest.raises(ValueError, match=words):
        data.Images(x, y, ["a", "b"], "mine")


@pytest.mark.parametrize("splits, words", [
    (data.Images(noise(4), None, [], "mine"), "must return two splits"),
    ((data.Images(noise(4), None, [], "mine"),), "must return two splits"),
    ((data.Images(noise(4), torch.zeros(4, dtype=torch.int64), ["a"], "mine"),
      data.Images(noise(4), None, [], "mine")), "labels for both splits, or for none")])
def test_a_set_of_another_kind_is_one_sentence(splits, words, monkeypatch):
    monkeypatch.setitem(data.SETS, "mine", lambda root: splits)
    with pytest.raises(ValueError, match=f"the function of --data mine .*{words}"):
        data.load("mine")


def test_batches_refuse_what_cannot_work(some):
    for flags, words in ((dict(batch_size=41), "--batch-size 41 .* 40 images"),
                         (dict(batch_size=0), "--batch-size 0"),
                         (dict(batch_size=9, world=2), "--batch-size 9 .* 2 processes")):
        with pytest.raises(ValueError, match=words):  # at the call, not at the first batch
            views.batches(some, TINY, seed=0, start=0, stop=1, **flags)


def test_the_pixels_are_the_same_with_any_number_of_workers(some):
    """Images in memory need none, and take no notice of the number."""
    inline, two = run(some, 3, 6), run(some, 3, 6, workers=2)
    assert len(inline) == len(two) == 3 and all(same(a, b) for a, b in zip(inline, two))
    assert not same(inline[0], inline[1])


def test_files_and_memory_agree_on_the_statistics(tmp_path):
    """Two implementations of one recipe: mean and spread over many smooth images."""
    yy, xx = np.mgrid[0:32, 0:32] / 31
    rng = np.random.default_rng(0)
    a, b, c = rng.uniform(0, .33, (3, 100, 3, 1, 1))  # of each image and channel
    x = torch.from_numpy(((a + b * xx + c * yy) * 255).round().astype(np.uint8))  # (100, 3, 32, 32)

    recipe = views.Recipe(16, 8, 2, jitter=(0.4, 0.4, 0.2, 0.1))
    a, b = ([unnormalise(torch.cat(v)) for v in zip(*run(s, 0, 4, recipe, batch_size=100))]
            for s in (data.Images(x, None, [], "x"), Disk(x)))
    for v, w in zip(a, b):
        assert abs(v.mean() - w.mean()) < 0.03
        assert abs(v.mean((1, 2, 3)).std() - w.mean((1, 2, 3)).std()) < 0.02
        chroma = [t.mean((2, 3)).std(1).mean() for t in (v, w)]
        assert abs(chroma[0] / chroma[1] - 1) < 0.15


# ---- operations against torchvision --------------------------------------------------------------

@pytest.mark.parametrize("in_memory", [True, False])
def test_views_are_normalised_as_the_recipe_says(tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(data, "IN_MEMORY", 0)
    train, _ = data.load(tree(tmp_path, {".": 4}))
    colours = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    other = dataclasses.replace(PLAIN, **colours)
    a, b = (next(iter(views.batches(train, recipe, batch_size=4, seed=0, start=0, stop=1)))[0]
            for recipe in (PLAIN, other))  # (4, 3, 24, 24) each
    mean, std = (torch.tensor(colours[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(b * std + mean, unnormalise(a))


def test_crop_of_the_whole_image_is_the_image():
    x = noise(5, 20, 28).float() / 255
    box = torch.tensor([0., 0., 20., 28.]).expand(2, 5, 4)
    no = torch.zeros(2, 5, dtype=torch.bool)
    square = F.interpolate(x, (24, 24), mode="bilinear", align_corners=False)
    assert torch.allclose(views.crop(x, box, no, 24), square.repeat(2, 1, 1, 1), atol=1e-4)
    x = noise(5).float() / 255
    box = torch.tensor([0., 0., 32., 32.]).expand(2, 5, 4)
    flip = torch.tensor([[False] * 5, [True] * 5])
    out = views.crop(x, box, flip, 32).view(2, 5, 3, 32, 32)
    assert torch.allclose(out[0], x, atol=1e-4) and torch.allclose(out[1], x.flip(-1), atol=1e-4)


def test_crop_of_a_box_is_its_pixels():
    x = noise(3, 40, 30).float() / 255
    box = torch.tensor([[[4., 6., 16., 16.], [0., 14., 16., 16.], [24., 0., 16., 16.]]])
    out = views.crop(x, box, torch.tensor([[False, True, False]]), 16)
    want = [x[0, :, 4:20, 6:22], x[1, :, 0:16, 14:30].flip(-1), x[2, :, 24:40, 0:16]]
    assert torch.allclose(out, torch.stack(want), atol=1e-4)
    # every pixel is sampled once: the mean of each block
    small = views.crop(x, box, torch.tensor([[False] * 3]), 4, taps=4)
    assert torch.allclose(small[0], F.avg_pool2d(x[0, :, 4:20, 6:22], 4), atol=1e-4)


def test_large_images_do_not_alias():
    stripes = torch.zeros(4, 3, 256, 256, dtype=torch.uint8)
    stripes[..., (torch.arange(256) % 5) < 2] = 255  # finer than 16 pixels can show; mean .4
    recipe = views.Recipe(16, 8, 0, (0.9, 1.0), (0.1, 0.2), **ONLY_CROPS)
    out = unnormalise(run(data.Images(stripes, None, [], "x"), 0, 1, recipe, batch_size=4)[0][0])
    box = torch.tensor([[[3., 4., 246., 246.]]])
    naive = views.crop(stripes[:1].float() / 255, box, torch.tensor([[False]]), 16)
    assert out.std() < 0.1 < 0.3 < naive.std() and abs(out.mean() - 0.4) < 0.02


def test_crop_boxes_are_distributed_as_in_torchvision():
    for H, W, scale in ((32, 32, (0.4, 1.0)), (240, 800, (0.3, 1.0)), (800, 240, (0.3, 1.0))):
        u = torch.rand(20_000, 22, generator=torch.Generator().manual_seed(0))
        box = views.crop_boxes(u, scale, H, W)
        top, left, h, w = box.T
        assert (top >= 0).all() and (top + h <= H + 1e-3).all()
        assert (left >= 0).all() and (left + w <= W + 1e-3).all()
        torch.manual_seed(0)
        crop, blank = v2.RandomResizedCrop(8, scale), torch.empty(3, H, W)
        theirs = np.array([[p[k] for k in ("top", "left", "height", "width")]
                           for p in (crop.make_params([blank]) for _ in range(4000))])
        q = np.linspace(0.05, 0.95, 19)
        for ours, other, unit in zip((top, left, h, w), theirs.T, (H, W, H, W)):
            difference = np.abs(np.quantile(ours.numpy(), q) - np.quantile(other, q)).max()
            assert difference / unit < 0.03


def one_colour(x, **factors):
    n = len(x)
    default = dict(brightness=torch.ones(n), contrast=torch.ones(n), saturation=torch.ones(n),
                   hue=torch.zeros(n), grey=torch.zeros(n, dtype=torch.bool))
    return views.colour(x, **(default | factors))


def test_colour_operations_equal_torchvision():
    x, f = noise(6, 9, 11).float() / 255, torch.tensor([0.6, 0.8, 1.0, 1.2, 1.4, 0.0])
    for name, reference in (("brightness", TF.adjust_brightness), ("contrast", TF.adjust_contrast),
                            ("saturation", TF.adjust_saturation)):
        want = torch.stack([reference(i, float(k)) for i, k in zip(x, f)])
        assert torch.allclose(one_colour(x, **{name: f}), want, atol=3e-4), name
    grey = torch.tensor([True, False] * 3)
    want = torch.where(grey[:, None, None, None], TF.rgb_to_grayscale(x, 3), x)
    assert torch.allclose(one_colour(x, grey=grey), want, atol=3e-4)
    assert torch.equal(views.solarize(x), TF.solarize(x, 0.5)) and torch.equal(one_colour(x), x)


def test_hue_turns_the_colours_about_grey():
    x = noise(4, 9, 11).float() / 255
    for turn in (1 / 3, -1 / 3):  # a third of a turn swaps channels, exactly as in HSV
        want = torch.stack([TF.adjust_hue(i, turn) for i in x])
        assert torch.allclose(one_colour(x, hue=torch.full((4,), turn)), want, atol=1e-3)
    soft = 0.4 + 0.2 * x  # nothing to cut off: grey and chroma are kept
    out = one_colour(soft, hue=torch.tensor([0.1, -0.05, 0.02, 0.3]))
    assert torch.allclose(out.mean(1), soft.mean(1), atol=1e-5)
    assert torch.allclose(out.std(1), soft.std(1), atol=1e-5)
    assert not torch.allclose(out, soft, atol=1e-2)


def test_colour_is_the_operations_in_their_order():
    """Against a float64 loop over images; soft colours, so that nothing is cut off on the way."""
    g = torch.Generator().manual_seed(1)
    x = 0.45 + 0.1 * torch.rand(5, 3, 6, 7, generator=g)
    b = 0.8 + 0.4 * torch.rand(5, generator=g)
    c = torch.tensor([.6, .9, 1., 1.2, 1.4])
    s = torch.tensor([.8, 1.2, 1., 1.1, .9])
    hue = torch.tensor([.1, -.1, .05, 0., .02])
    grey = torch.tensor([False, False, True, False, False])
    out = views.colour(x, b, c, s, hue, grey)
    luma = np.array([.299, .587, .114])
    axis = np.ones(3) / np.sqrt(3)
    for i in range(5):
        p = x[i].double().numpy().reshape(3, -1) * float(b[i])
        p = float(c[i]) * p + (1 - float(c[i])) * (luma @ p).mean()
        p = float(s[i]) * p + (1 - float(s[i])) * (luma @ p)
        a = 2 * np.pi * float(hue[i])  # Rodrigues' formula
        along_axis = axis[:, None] * (axis @ p)
        p = p * np.cos(a) + np.cross(axis, p.T).T * np.sin(a) + along_axis * (1 - np.cos(a))
        p = np.repeat((luma @ p)[None], 3, 0) if grey[i] else p
        assert np.allclose(out[i].reshape(3, -1).numpy(), p, atol=1e-5)


def test_blur_equals_torchvision():
    for size in (32, 16, 5):
        x, sigma = noise(3, size, size).float() / 255, torch.tensor([0.1, 0.9, 2.0])
        k = 2 * min(6, size - 1) + 1
        want = torch.stack([TF.gaussian_blur(i, [k, k], [float(s)] * 2) for i, s in zip(x, sigma)])
        assert torch.allclose(views.blur(x, sigma), want, atol=1e-5)
    assert views.blur(x[:0], sigma[:0]).shape == (0, 3, 5, 5)


def test_probabilities_of_the_recipe():
    """Each switch alone: the share of images that it changes in a view, against the recipe."""
    n = 400
    images = data.Images(noise(n, 8, 8), None, [], "x")
    off = dict(global_size=8, local_size=8, n_local=1, global_scale=(1.0, 1.0),
               local_scale=(1.0, 1.0)) | ONLY_CROPS | dict(jitter=(.4, .4, .2, .1))
    x = images.x[views.indices(n, n, 3, 0)].float() / 255
    for switch, p in (("jitter_p", .8), ("gray_p", .2), ("flip_p", .5), ("blur_p", (1, .1, .5)),
                      ("solarize_p", (0, .2, .6))):
        out = run(images, 0, 1, views.Recipe(**(off | {switch: p})), batch_size=n)[0]
        base = run(images, 0, 1, views.Recipe(**off), batch_size=n)[0]
        for v, (view, plain) in enumerate(zip(out, base)):
            share = ((view - plain).abs().amax((1, 2, 3)) > 1e-3).float().mean()
            want = p if isinstance(p, float) else p[v]
            want *= 0.95 if switch == "blur_p" else 1  # a sigma of .1 to .2 shows nothing
            assert abs(share - want) < 4 * math.sqrt(want * (1 - want) / n) + 0.03, (switch, v)
    # at scale 1 of a square, no box but the whole fits
    assert torch.allclose(unnormalise(base[0]), x, atol=1e-4)


def test_jitter_spans_its_range():
    n = 300
    left = torch.tensor([120, 100, 110], dtype=torch.uint8).view(1, 3, 1, 1)
    soft = left.repeat(n, 1, 8, 8)
    soft[..., 4:] = 150
    x = soft[0].float() / 255

    def jittered(*jitter):
        switches = ONLY_CROPS | dict(jitter=jitter, jitter_p=1.0)
        recipe = views.Recipe(8, 8, 0, (1.0, 1.0), (1.0, 1.0), **switches)
        return unnormalise(run(data.Images(soft, None, [], "x"), 0, 1, recipe, batch_size=n)[0][0])

    def spans(values, low, high):
        edge = 0.1 * (high - low)
        at_low_end = low - 1e-4 <= values.min() < low + edge
        return at_low_end and high - edge < values.max() <= high + 1e-4

    assert spans(jittered(0.3, 0, 0, 0)[:, 0, 0, 0] / x[0, 0, 0], 0.7, 1.3)
    grey = torch.tensor([0.299, 0.587, 0.114])
    step = (x[:, 0, 7] - x[:, 0, 0]) @ grey
    out = jittered(0, 0.5, 0, 0)
    assert spans((out[:, :, 0, 7] - out[:, :, 0, 0]) @ grey / step, 0.5, 1.5)
    out = jittered(0, 0, 0.2, 0)[:, :, 0, 0]
    assert spans((out[:, 0] - out[:, 1]) / (x[0, 0, 0] - x[1, 0, 0]), 0.8, 1.2)
    p = jittered(0, 0, 0, 0.1)[:, :, 0, 0].double().numpy()
    r, g, b = np.vstack([x[:, 0, 0].numpy(), p]).T
    angle = np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b) / (2 * np.pi)
    assert spans((angle[1:] - angle[0] + 0.5) % 1 - 0.5, -0.1, 0.1)


# ---- evaluation ----------------------------------------------------------------------------------

def test_eval_batches_in_order_and_only_normalised():
    images = data.Images(noise(10), None, [], "x")
    parts = list(views.eval_batches(images, 32, batch_size=4))
    assert [len(p) for p in parts] == [4, 4, 2] and parts[0].dtype == torch.float32
    assert torch.allclose(unnormalise(torch.cat(parts)), images.x / 255, atol=1e-6)


def test_eval_batches_resize_and_crop_like_dino(some, tmp_path):
    out = torch.cat(list(views.eval_batches(some, 28, batch_size=16)))
    if isinstance(some, data.Images):
        x = some.x
    else:
        x = torch.stack([some.read(i)[0] for i in range(40)])  # (40, 3, 32, 32)
    # 28 * 256 / 224 = 32: not resized
    assert torch.allclose(unnormalise(out), x[:, :, 2:30, 2:30] / 255, atol=1e-6)
    out = unnormalise(torch.cat(list(views.eval_batches(some, 14))))  # shorter side to 16, by PIL
    for i in (0, 39):
        image = Image.fromarray(x[i].permute(1, 2, 0).numpy())
        small = image.resize((16, 16), Image.Resampling.BICUBIC)
        want = torch.from_numpy(np.array(small)[1:15, 1:15]).permute(2, 0, 1) / 255
        assert (out[i] - want).abs().max() < 2.5 / 255


def crops_of(images, recipe):
    (crops,) = views.batches(images, recipe, batch_size=len(images), seed=3, start=0, stop=1)
    return crops


def test_a_strong_jitter_makes_no_factor_negative():
    """As in torchvision: of 1.5 it is between 0 and 2.5, and hardly ever 0."""
    images = data.Images(torch.full((300, 3, 8, 8), 60, dtype=torch.uint8), None, [], "x")
    switches = ONLY_CROPS | dict(jitter=(1.5, 0, 0, 0), jitter_p=1.0)
    recipe = views.Recipe(8, 8, 0, (1.0, 1.0), (1.0, 1.0), **switches)
    out = unnormalise(crops_of(images, recipe)[0])
    factor = out[:, 0, 0, 0] / (60 / 255)
    assert (factor < 0.01).sum() < 10 and 2.4 < factor.max() <= 2.5 + 1e-4


def test_blur_has_a_sigma_between_a_tenth_and_two_pixels(monkeypatch):
    sigmas, blur = [], views.blur
    monkeypatch.setattr(views, "blur", lambda x, sigma: (sigmas.append(sigma), blur(x, sigma))[1])
    images = data.Images(torch.zeros(300, 3, 8, 8, dtype=torch.uint8), None, [], "x")
    crops_of(images, views.Recipe(8, 8, 0, **ONLY_CROPS | dict(blur_p=(1.0, 1.0, 0))))
    sigma = torch.cat(sigmas)
    assert 0.1 <= sigma.min() < 0.15 and 1.95 < sigma.max() <= 2
    assert float(sigma.mean()) == pytest.approx(1.05, abs=0.08)


def test_images_on_disk_are_solarized_from_128_on_and_blurred_as_those_in_memory():
    x = torch.tensor([100, 127, 128, 200], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    recipe = views.Recipe(8, 8, 0, (1.0, 1.0), (1.0, 1.0), **ONLY_CROPS | dict(
        solarize_p=(1.0, 1.0, 0)))
    out = unnormalise(crops_of(Disk(x), recipe)[0])[:, 0, 0, 0] * 255
    assert sorted(out.round().int().tolist()) == [55, 100, 127, 127]
    blurs = [t for step in views.transform(recipe, recipe.views()[0]).transforms
             for t in getattr(step, "transforms", [step]) if isinstance(t, v2.GaussianBlur)]
    assert [tuple(blur.sigma) for blur in blurs] == [(0.1, 2.0)]
