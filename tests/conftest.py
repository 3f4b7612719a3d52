"""What the tests of whole runs share: a run small enough for a test, and readers of its files."""
import csv
import functools
import importlib
import math
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch; two processes share the cores

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

import data
import forked
import heads
import models
from support import optim, shapes
from support.pixels import IGNORED

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the repository
os.fsync = lambda descriptor: None  # no test cuts the power, and waiting for the disk takes long
TINY = ["--device", "cpu", "--batch-size", "8", "--steps", "6", "--num-prototypes", "16",
        "--partition-size", "8", "--bottleneck-dim", "8", "--head-hidden", "16",
        "--local-crops", "1", "--eval-bank", "60", "--eval-queries", "40",
        "--log-every", "2", "--eval-every", "6", "--gmm-start", "1"]
SPEED = ("images_per_s", "data_share", "memory_mb")  # columns of log.csv that no two runs share


# ---- images ------------------------------------------------------------------------------------
@functools.lru_cache
def small_sets():
    """(100 training images, 50 test images) of the built-in set."""
    x, y, classes, _ = shapes.make(150, 5)
    images = data.Images(x, y, classes, "shapes")
    return data.subset(images, torch.arange(100)), data.subset(images, torch.arange(100, 150))


def use_small_shapes(patch):
    load = data.load

    def load_small(name, **settings):
        return small_sets() if name == "shapes" else load(name, **settings)
    patch.setattr(data, "load", load_small)


@pytest.fixture
def small_shapes(monkeypatch):
    """The built-in set has 150 images instead of 12,000: these tests learn nothing anyway."""
    use_small_shapes(monkeypatch)


def use_small_network(patch):
    for arch in ("vit_nano", "vit_micro"):
        patch.setitem(models.VITS, arch, (32, 2, 2))  # depth 2, as one block alone has drop-path 0


@pytest.fixture
def small_network(monkeypatch):
    """A backbone of 2 blocks of width 32 under the names of ours: these tests are about runs, not
    networks."""
    use_small_network(monkeypatch)


def make_folder(path, images=24, broken=0, size=32):
    """A folder of random images of two classes, as many of them `broken` (cut short)."""
    for c in "ab":
        os.makedirs(path / c)
        for i in range(images // 2):
            generator = torch.Generator().manual_seed(ord(c) * 1000 + i)
            x = torch.rand(3, size, size, generator=generator)  # (3, size, size)
            save_image(x, path / c / f"{i}.png")
    for i in range(broken):
        with open(path / "ab"[i % 2] / f"{5 + i}.png", "r+b") as file:
            file.truncate(30)
    return str(path)


def random_maps(*shape, C=3, ignored=0., seed=0):
    """uint8 labels in 0..C-1, and a share of IGNORED ones."""
    g = torch.Generator().manual_seed(seed)
    maps = torch.randint(C, shape, generator=g).to(torch.uint8)
    maps[torch.rand(shape, generator=g) < ignored] = IGNORED
    return maps


def make_voc_folder(folder, train=8, val=4, classes=3, size=(40, 24)):
    """A folder of noisy images whose left part is class 0 and whose right part is another one, with
    an ignored column between; palettes and grey values in turns. Returns its path."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    rng, width = np.random.RandomState(0), size[0]
    for split, n in (("train", train), ("val", val)):
        names = [f"{split}_{i}" for i in range(n)]
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            label = 1 + i % (classes - 1)
            pixels = rng.randint(0, 60, (size[1], width, 3)).astype(np.uint8)
            pixels[:, width // 2:, label % 3] += 180
            mask = np.zeros(size[::-1], dtype=np.uint8)
            mask[:, width // 2:] = label
            mask[:, width // 2 - 2:width // 2] = IGNORED
            Image.fromarray(pixels).save(folder / f"JPEGImages/{name}.jpg", quality=95)
            image = Image.fromarray(mask)
            if i % 2:
                image.putpalette([(37 * v) % 256 for v in range(768)])  # a mask in colour
            image.save(folder / f"SegmentationClass/{name}.png")
    return folder


# ---- runs --------------------------------------------------------------------------------------
def train_tiny(out, *flags):
    """train.main with the flags TINY, and those given, in the folder `out`."""
    import train  # here, so that tests which train nothing do not load it
    return train.main([*TINY, "--out", str(out), *map(str, flags)])


def sentence_of_refusal(capsys, out, *flags):
    """The sentence with which train.py refuses these flags, by exit code 2."""
    with pytest.raises(SystemExit) as stop:
        train_tiny(out, *flags)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


TWO = """
import sys
sys.path.insert(0, {root!r})
import models
from support import ddp
from zoo import {script}
models.VITS.update({networks!r})  # those of the one process
{prepare}
leave_group = ddp.cleanup
ddp.cleanup = lambda: None  # one group for all runs
for flags in {runs!r}:
    {script}.main(flags)
leave_group()
"""


def compare_one_process_with_two(script, kinds, flags, terms, folder, prepare=""):
    """Each kind of run, [flags], of zoo/SCRIPT.py by one process and by two: their losses are the
    same, and so are the vectors that their checkpoints keep, up to rounding.

    flags: of all runs; terms: columns of log.csv; prepare: lines of code before the runs of two.
    """
    images = make_folder(folder / "set", 32)

    def commands(processes):
        return [[*flags, *kind, "--log-every", "1", "--data", images,
                 "--out", str(folder / f"{i}-{processes}")] for i, kind in enumerate(kinds)]
    both = folder / "two.py"
    both.write_text(TWO.format(root=ROOT, script=script, networks=models.VITS,
                               prepare=prepare, runs=commands(2)))
    done = forked.run_two([sys.executable, both])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:3000]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for command in commands(1):
            importlib.import_module(f"zoo.{script}").main(command)
    finally:
        torch.set_num_threads(threads)
    for i in range(len(kinds)):
        one, two = (read_log(folder / f"{i}-{n}")[1:] for n in (1, 2))
        for row_1, row_2 in zip(one, two, strict=True):
            for term in terms:
                assert float(row_2[term]) == pytest.approx(float(row_1[term]), rel=1e-3, abs=1e-5)
        one, two = (read_checkpoint(folder / f"{i}-{n}")["prototypes"] for n in (1, 2))
        kept = [name for name in one if name.endswith(("vectors", "memory"))]
        assert kept
        for name in kept:
            assert torch.allclose(one[name], two[name], atol=1e-3), name


def watch_schedules(monkeypatch):
    """([(lr, weight decay)], [beta]) of the steps that are taken from now on."""
    rates, betas = [], []
    take_step, move = optim.CheckedStep.__call__, heads.Decoupled.step
    monkeypatch.setattr(optim.CheckedStep, "__call__", lambda self, values, step, lr, decay: (
        rates.append((lr, decay)), take_step(self, values, step, lr, decay))[1])
    monkeypatch.setattr(heads.Decoupled, "step", lambda protos, h, step, beta: (
        betas.append(beta), move(protos, h, step, beta))[1])
    return rates, betas


# ---- what a run wrote --------------------------------------------------------------------------
def read_log(out):
    """The rows of OUT/log.csv, {column: text}, without the columns SPEED."""
    with open(out / "log.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return [{column: text for column, text in row.items() if column not in SPEED} for row in table]


def read_checkpoint(out, name="ckpt.pt"):
    return torch.load(out / name, weights_only=True)


def leaves(tree, path=""):
    """{path: value} of all tensors and numbers in nested dicts and lists."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return {path: tree}
    values = {}
    for key, branch in items:
        values |= leaves(branch, f"{path}/{key}")
    return values


def differences(a, b, *parts):
    """Paths in the checkpoints a and b whose values are not the same to the bit; args aside.

    parts: compare these keys of the checkpoints alone.
    """
    def chosen(checkpoint):
        if parts:
            checkpoint = {key: checkpoint[key] for key in parts}
        return leaves({key: tree for key, tree in checkpoint.items() if key != "args"})

    a, b = chosen(a), chosen(b)
    assert a and a.keys() == b.keys()
    return [path for path in a if not same_value(a[path], b[path])]


def same_value(a, b):
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def half_cosine(start, end, share):
    """Where a value stands that goes from start to end on half a cosine, after a share of it."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
