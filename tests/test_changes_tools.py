"""One-line changes of the code that no other test noticed: each test here fails on one of them.

Of lab/eval_dense.py and tabulate, collapse.py, eval_knn.py, views.py, support/probes.py, control.
"""
import csv
import math

import numpy as np
import pytest
import torch

import collapse
import config
import data
import models
from lab import eval_dense as dense
from lab import tables, tabulate
from support import backbones, control, report, shapes


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_control_is_that_of_the_first_table_that_has_one(tmp_path):
    for name, knn, unique in (("a", 50, .25), ("b", 70, .75)):
        with open(tmp_path / f"{name}.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, ["command", "knn", "unique_0.5", "data_version"])
            writer.writeheader()
            writer.writerow({"command": "train.py --prototypes frozen", "knn": knn,
                             "unique_0.5": unique, "data_version": data.VERSIONS["shapes"]})
    sentence = control.sentence(config.parse(["--device", "cpu"]), tmp_path)
    assert "k-NN 50.0, unique(.5) 0.250\n  in one earlier run" in sentence and "a.csv" in sentence


def test_the_largest_rank_is_the_smaller_side():
    text = report.table_of_cosines([("wide", collapse.describe(randn(5, 64), [.5])),
                                    ("tall", collapse.describe(randn(64, 3), [.5]))])
    _, wide, tall = text.splitlines()
    assert wide.endswith(" of 5") and tall.endswith(" of 3")


def test_what_a_line_of_the_results_holds():
    result = dense.Result(None, 1., 2., torch.tensor([math.nan, 3.]), "k=1 L2", 4.)
    assert dense.tables_of({("backbone", "knn"): result, ("commonest label", ""): result}) == {
        name: {"miou": 1, "pixels_right": 2, "chosen": "k=1 L2", "miou_held_out": 4,
               "iou_of_classes": "- 3.00"} for name in ("backbone knn", "commonest label")}


@pytest.fixture
def small(monkeypatch):
    x, y, classes, maps = shapes.make(60, 5)
    images = data.Images(x, y, classes, "shapes", label_map=maps)
    sets = data.subset(images, torch.arange(40)), data.subset(images, torch.arange(40, 60))
    monkeypatch.setattr(data, "load", lambda name, **kw: sets)


def test_the_seed_and_the_pixels_mean_reach_the_work(small, tmp_path, monkeypatch):
    net = models.build("vit_nano", patch_size=8, img_size=32)
    weights = {f"backbone.{key}": w for key, w in net.state_dict().items()}
    args = dict(arch="vit_nano", patch_size=8, img_size=32, data="shapes", seed=0, imbalance=1.0,
                data_version=data.VERSIONS["shapes"], mean=[.1, .2, .3], std=[.4, .5, .6])
    torch.save({"version": 1, "step": 7, "args": args, "student": weights, "teacher": weights},
               tmp_path / "ckpt.pt")
    seeds, prepared = [], []
    untrained, chosen, batches = backbones.untrained, dense.choose_and_refit, dense.patch_batches
    monkeypatch.setattr(backbones, "untrained", lambda net, args, seed: (
        seeds.append(seed), untrained(net, args, seed))[1])
    monkeypatch.setattr(dense, "choose_and_refit", lambda name, train, test, C, seed, device: (
        seeds.append(seed), chosen(name, train, test, C, seed, device))[1])
    monkeypatch.setattr(dense, "patch_batches", lambda *images, **how: (
        prepared.append((how["mean"], how["std"])), batches(*images, **how))[1])
    dense.main([str(tmp_path), "--probe", "knn", "--seed", "3", "--device", "cpu"])
    assert seeds == [3] * 4  # the untrained weights, and the held-out tenth of three features
    assert prepared == [([.1, .2, .3], [.4, .5, .6])] * 4


def test_a_line_of_the_table_says_what_was_right(capsys):
    result = dense.Result(None, 11., 22., torch.tensor([33.]), "k=1 L2", 44.)
    dense.print_tables({("backbone", "knn"): result}, ["sky"])
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line == ["backbone", "knn", "k=1", "L2", "44.00", "11.00", "22.00"]


def test_a_picture_shows_the_backbones_predictions(small, tmp_path, monkeypatch):
    net = models.build("vit_nano", patch_size=8, img_size=32)
    weights = {f"backbone.{key}": w for key, w in net.state_dict().items()}
    args = dict(arch="vit_nano", patch_size=8, img_size=32, data="shapes", seed=0, imbalance=1.0,
                data_version=data.VERSIONS["shapes"])
    torch.save({"version": 1, "step": 7, "args": args, "student": weights, "teacher": weights},
               tmp_path / "ckpt.pt")
    drawn, predicted, chosen = [], [], dense.choose_and_refit

    def choose(*args):
        predicted.append(chosen(*args))
        return predicted[-1]
    monkeypatch.setattr(dense, "choose_and_refit", choose)
    monkeypatch.setattr(dense.plots, "check_files", lambda *files: None)
    monkeypatch.setattr(dense.plots, "segmentation", lambda x, columns, classes, file: (
        drawn.append((x, columns))))
    dense.main([str(tmp_path), "--probe", "knn", "--picture", str(tmp_path / "x.png"),
                "--device", "cpu"])
    (x, columns), = drawn
    assert list(columns) == ["labels", "knn"] and len(x) == 6
    of_backbone = dense.paste(predicted[0][0], 4)  # the first features are the backbone's
    assert torch.equal(columns["knn"], of_backbone[:6])
    assert not torch.equal(columns["knn"], dense.paste(predicted[2][0], 4)[:6])


def test_the_picture_is_of_runs_without_flags_of_their_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(tabulate.plots, "space", lambda means, file: drawn.append(means))
    rows = [{"row": "CARP, joint", "seed": "0", "block": block, "knn": knn, "unique_0.5": ".2",
             "used": ".1"} for block, knn in (("--steps 3", "20"), ("", "80"))]
    tabulate.draw("space", rows, str(tmp_path / "x.png"))
    tabulate.draw("space", rows[:1], str(tmp_path / "x.png"))
    assert [means["CARP, joint"]["knn"] for means in drawn] == [80, 20]


def words_of(line):
    return line.split(": ")[1].split(" (")[0]


@pytest.mark.parametrize("values, third, fails", [
    ([80, 80, 80], [80.4, 80.4, 80.4], []), ([80, 80, 80], [80.6, 80.6, 80.6], [1]),
    ([60.1, 60.1, 60.1], [60, 60, 60], []), ([59.9, 59.9, 59.9], [59, 59, 59], [3]),
    ([79, 80.4, 81.8], [60, 60, 60], []), ([78.6, 80.4, 82.2], [60, 60, 60], [2]),
    ([87.9, 87.9, 87.9], [60, 60, 60], []), ([88.1, 88.1, 88.1], [60, 60, 60], [4])])
def test_where_a_claim_about_the_instrument_ends_to_be_met(values, third, fails):
    knn = {}
    for system in tables.SYSTEMS:
        knn |= {f"{system}, a third": [60, 60, 60], f"{system}, default length": [80, 80, 80],
                f"{system}, three times": [90, 90, 90]}
    knn |= {"labels, default length": [95, 95, 95], "CARP, joint, default length": values,
            "CARP, joint, a third": third}
    rows = {row: [{"seed": str(seed), "knn": str(value), "raw_knn": "40", "untrained_knn": "35"}
                  for seed, value in enumerate(of_row)] for row, of_row in knn.items()}
    words = [words_of(line) for line in tabulate.verdict(rows)]
    assert [i for i, word in enumerate(words) if word == "NOT MET"] == fails


def test_zero_rows_are_no_prototypes_in_the_control_and_the_limit(tmp_path, capsys):
    """10 of 40 rows are not zero, and 8 of them are unique."""
    C = torch.zeros(40, 32)
    C[:10] = randn(10, 32)
    C[8:10] = C[0]
    np.save(tmp_path / "C.npy", C.numpy())
    about = {"label": "C", "file": "C.npy", "set": "C", "several": False}
    args = collapse.parser().parse_args(["C.npy"])
    one = collapse.describe_set(C, about, [.025], args)
    assert (one["K"], one["random"]["K"], one["eps"][.025]["share"]) == (40, 10, 0.8)
    for limit, code in (("0.75", 0), ("0.85", 1)):
        flags = ["--fail-below", limit, "--eps", ".025"]
        assert collapse.main([str(tmp_path / "C.npy"), *flags]) == code


def test_a_verdict_depends_on_99_percent_of_random_directions():
    assert "compare the count with that" in collapse.verdict(.98, 100, 16, .5)
    assert "reaching it does not show" in collapse.verdict(.995, 100, 16, .5)


def test_prototypes_are_counted_for_the_teacher_alone(tmp_path, monkeypatch):
    import argparse

    import eval_knn
    from support import groups
    monkeypatch.setattr(eval_knn, "winners", lambda path, images, device: (torch.tensor([0, 1]), 4))
    counts, train = torch.tensor([200, 5]), argparse.Namespace(y=torch.tensor([0, 1]))
    y = torch.tensor([0, 1])
    found = {}
    for which in ("teacher", "student"):
        flags = argparse.Namespace(arch=None, which=which, head=100, tail=20, checkpoint="x",
                                   device="cpu")
        table = groups.report(y, y, counts, 100, 20)
        found[which] = eval_knn.prototype_share(flags, train, counts, {1: table})
    assert found["teacher"] == {"head": 25, "medium": 0, "tail": 25, "unused": 50}
    assert found["student"] is None


def test_a_column_whose_deviation_is_rounding_becomes_0():
    from support import probes
    x = torch.full((999, 1), 0.1)
    x[::2] = torch.nextafter(torch.tensor(0.1), torch.tensor(1.))  # the next float32
    assert x.std() > 0
    part, = probes.standardise(x)
    assert not part.any()


ONLY_CROPS = dict(jitter=(0, 0, 0, 0), jitter_p=0.0, gray_p=0.0, blur_p=(0, 0, 0),
                  solarize_p=(0, 0, 0), flip_p=0.0)


def crops_of(images, recipe):
    import views
    (crops,) = views.batches(images, recipe, batch_size=len(images), seed=3, start=0, stop=1)
    return crops


def unnormalise(x):
    import views
    return x * torch.tensor(views.STD).view(3, 1, 1) + torch.tensor(views.MEAN).view(3, 1, 1)


def test_a_strong_jitter_makes_no_factor_negative():
    """As in torchvision: of 1.5 it is between 0 and 2.5, and hardly ever 0."""
    import views
    images = data.Images(torch.full((300, 3, 8, 8), 60, dtype=torch.uint8), None, [], "x")
    switches = ONLY_CROPS | dict(jitter=(1.5, 0, 0, 0), jitter_p=1.0)
    recipe = views.Recipe(8, 8, 0, (1.0, 1.0), (1.0, 1.0), **switches)
    out = unnormalise(crops_of(images, recipe)[0])
    factor = out[:, 0, 0, 0] / (60 / 255)
    assert (factor < 0.01).sum() < 10 and 2.4 < factor.max() <= 2.5 + 1e-4


def test_blur_has_a_sigma_between_a_tenth_and_two_pixels(monkeypatch):
    import views
    sigmas, blur = [], views.blur
    monkeypatch.setattr(views, "blur", lambda x, sigma: (sigmas.append(sigma), blur(x, sigma))[1])
    images = data.Images(torch.zeros(300, 3, 8, 8, dtype=torch.uint8), None, [], "x")
    crops_of(images, views.Recipe(8, 8, 0, **ONLY_CROPS | dict(blur_p=(1.0, 1.0, 0))))
    sigma = torch.cat(sigmas)
    assert 0.1 <= sigma.min() < 0.15 and 1.95 < sigma.max() <= 2
    assert float(sigma.mean()) == pytest.approx(1.05, abs=0.08)


class Disk:
    """Images as a folder gives them: one at a time."""

    def __init__(self, x):
        self.x_of = x

    def __len__(self):
        return len(self.x_of)

    def read(self, i):
        return self.x_of[i], None

    def note_broken(self, damaged):
        assert not damaged


def test_images_on_disk_are_solarized_from_128_on_and_blurred_as_those_in_memory():
    import views
    from torchvision.transforms import v2
    x = torch.tensor([100, 127, 128, 200], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    recipe = views.Recipe(8, 8, 0, (1.0, 1.0), (1.0, 1.0), **ONLY_CROPS | dict(
        solarize_p=(1.0, 1.0, 0)))
    out = unnormalise(crops_of(Disk(x), recipe)[0])[:, 0, 0, 0] * 255
    assert sorted(out.round().int().tolist()) == [55, 100, 127, 127]
    blurs = [t for step in views.transform(recipe, recipe.views()[0]).transforms
             for t in getattr(step, "transforms", [step]) if isinstance(t, v2.GaussianBlur)]
    assert [tuple(blur.sigma) for blur in blurs] == [(0.1, 2.0)]


def test_a_released_patch_that_does_not_divide_224():
    from support import capi
    patch, dim, d = 10, 32, 16
    theirs = {"patch_embed.weight": torch.zeros(dim, 3, patch, patch),
              "registers": torch.zeros(1, 4, dim), capi.FREQUENCIES: torch.zeros(2, d),
              capi.LANDMARK: torch.zeros(dim, dim)}
    backbone, _, words = capi.build("x.pth", theirs)
    assert (backbone.grid, backbone.patch_size) == (22, 10)
    assert words == ", patch 10, 32 wide, 1 blocks of 2 heads, 4 registers"
