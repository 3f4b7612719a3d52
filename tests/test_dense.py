"""lab/eval_dense.py: cutting and pasting, labels of patches, both probes, choosing, the command,
also on folders in VOC layout. Oracles are loops in NumPy, or numbers worked out by hand."""
import csv
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import models
from conftest import make_voc_folder, random_maps
from lab import eval_dense as dense
from support import backbones, probes, shapes
from support.pixels import IGNORED as I


def uint8(rows):
    return torch.tensor(rows, dtype=torch.uint8)


def commonest(labels, among=range(256)):
    """The commonest of some labels, the smallest of equally common ones; None without any."""
    counts = Counter(int(label) for label in labels if int(label) in among)
    return min(counts, key=lambda label: (-counts[label], label)) if counts else None


# ---- patches -------------------------------------------------------------------------------------

def test_patches_are_cut_row_by_row_and_pasted_again():
    maps = torch.arange(2 * 36).view(2, 6, 6).to(torch.uint8)
    patches = dense.cut(maps, 3)
    assert patches.shape == (2, 9, 2, 2)
    for i in range(9):
        row, column = divmod(i, 3)
        there = maps[1, 2 * row:2 * row + 2, 2 * column:2 * column + 2]
        assert torch.equal(patches[1, i], there)
    assert torch.equal(dense.paste(patches, 3), maps)


def test_patches_are_cut_in_the_order_of_a_backbone():
    """A patch embedding that averages its patch sees the means of the pixels that are cut out."""
    x = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    pixels = dense.pixel_features(x, 4)  # (2, 16, 48)
    mean = nn.Conv2d(3, 1, kernel_size=4, stride=4, bias=False)
    nn.init.constant_(mean.weight, 1 / 48)
    tokens = mean(x.float() / 255).flatten(2).transpose(1, 2)  # (2, 16, 1)
    assert pixels.shape == (2, 16, 48)
    assert torch.allclose(pixels.mean(2, keepdim=True), tokens, atol=1e-5)
    assert torch.equal(pixels[1, 6], x[1, :, 4:8, 8:12].flatten().float() / 255)


def test_the_grid_follows_from_the_number_of_patches():
    assert dense.grid_side(49, 224) == 7 and dense.grid_side(1, 20) == 1
    for n, words in ((48, "48 patches, which are no square"), (25, "5 x 5 patches, and 224"),
                     (0, "0 patches")):
        with pytest.raises(ValueError, match=words):
            dense.grid_side(n, 224)


def test_the_commonest_label_of_a_patch_is_the_smallest_of_equally_common_ones():
    maps = random_maps(40, 5, 2, 3, ignored=.3)
    modal = dense.modal(maps)
    assert modal.shape == (40, 5)
    for i in range(40):
        for j in range(5):
            assert int(modal[i, j]) == commonest(maps[i, j].flatten())
    # 255 is a label as any other, and loses where a class is as common
    few = uint8([[[I, I], [I, 2]], [[I, I], [7, 7]], [[I, I], [I, I]]])
    assert dense.modal(few).tolist() == [I, 7, I]
    assert dense.modal(few, without_ignored=True).tolist() == [2, 7, 0]


def test_patches_that_are_mostly_ignored_are_not_fitted_to():
    maps = uint8([[[[I, I], [I, 2]], [[I, I], [2, 2]]], [[[0, 1], [1, I]], [[I, I], [I, I]]]])
    x = torch.arange(4.).view(2, 2, 1)  # (2, 2, 1)
    kept, their_maps = dense.Patches(x, maps).to_fit()
    assert kept.flatten().tolist() == [1, 2]
    assert torch.equal(their_maps, maps.flatten(0, 1)[[1, 2]])
    with pytest.raises(ValueError, match="every patch"):
        dense.Patches(x, torch.full_like(maps, I)).to_fit()


# ---- k-NN ----------------------------------------------------------------------------------------

def brute_force_knn(x, maps, q, k, similarity, C):
    """k-NN segmentation pixel by pixel, in float64."""
    x, q, maps = x.double().numpy(), q.double().numpy(), maps.numpy()
    predicted = np.empty((len(q), *maps.shape[1:]), dtype=np.uint8)
    for m, query in enumerate(q):
        if similarity == "L2":
            distance = ((x - query) ** 2).sum(1)
        else:
            distance = -(x @ query) / np.linalg.norm(x, axis=1) / np.linalg.norm(query)
        near = np.argsort(distance, kind="stable")[:k]
        for i in range(maps.shape[1]):
            for j in range(maps.shape[2]):
                label = commonest(maps[near, i, j], range(C))
                if label is None:
                    label = commonest(maps[near[0]].flatten())
                predicted[m, i, j] = label
    return torch.from_numpy(predicted)


@pytest.mark.parametrize("ignored", [0, .4])
@pytest.mark.parametrize("block", [2 ** 24, 100])
def test_knn_takes_the_mode_of_each_pixel_over_the_neighbours(ignored, block, monkeypatch):
    """Also if no more than three queries fit in memory at a time."""
    monkeypatch.setattr(dense, "BLOCK", block)
    g = torch.Generator().manual_seed(1)
    x, q = torch.randn(31, 4, generator=g), torch.randn(7, 4, generator=g)
    x[:, 0] += 2  # lengths and directions then tell different neighbours
    maps = random_maps(31, 3, 2, C=4, ignored=ignored)
    maps[:, 0, 0] = (torch.arange(31) % 4).to(torch.uint8)  # no patch is all ignored
    results = dict(dense.knn(x, maps, q, dense.KNN, 4))
    assert set(results) == {(k, s) for k in (1, 3, 10, 30) for s in ("cosine", "L2")}
    for (k, similarity), predicted in results.items():
        assert torch.equal(predicted, brute_force_knn(x, maps, q, k, similarity, 4))
    assert not torch.equal(results[3, "cosine"], results[3, "L2"])


def test_a_pixel_that_all_neighbours_ignore_gets_the_nearest_patches_commonest_label():
    x, q = torch.tensor([[0.], [1.], [5.]]), torch.tensor([[.4]])
    maps = uint8([[[I, 2], [2, 1]], [[I, I], [1, 1]], [[0, 0], [0, 0]]])
    (_, one), (_, two) = dense.knn(x, maps, q, [(1, "L2"), (2, "L2")], 3)
    assert one.tolist() == [[[2, 2], [2, 1]]] and two.tolist() == [[[2, 2], [1, 1]]]


def test_k_beyond_the_bank_is_the_bank():
    x, maps = torch.randn(5, 3), random_maps(5, 2, 2)
    results = dict(dense.knn(x, maps, x, [(10, "L2"), (30, "L2")], 3))
    everywhere = [[commonest(maps[:, i, j]) for j in range(2)] for i in range(2)]
    assert torch.equal(results[10, "L2"], uint8([everywhere] * 5))
    assert torch.equal(results[10, "L2"], results[30, "L2"])


# ---- linear --------------------------------------------------------------------------------------

def test_linear_is_scikit_learns_regression_on_the_commonest_labels():
    linear_model = pytest.importorskip("sklearn.linear_model")
    g = torch.Generator().manual_seed(3)
    maps = random_maps(200, 2, 2, C=3) + 4  # the classes 0 to 3 do not occur
    modal = dense.modal(maps)
    x = torch.randn(200, 5, generator=g) + modal[:, None] * torch.linspace(-.5, .5, 5)
    q = 2 * torch.randn(300, 5, generator=g)
    for strength in (1e-3, 1.):
        (setting, predicted), = dense.linear(x, maps, q, [strength], 7)
        theirs = linear_model.LogisticRegression(C=strength, max_iter=2000, tol=1e-8)
        wanted = torch.from_numpy(theirs.fit(x.double().numpy(), modal).predict(q.double().numpy()))
        assert setting == strength and predicted.shape == (300, 2, 2)
        assert (predicted == predicted[:, :1, :1]).all()  # the whole patch has one colour
        assert (predicted[:, 0, 0] == wanted).float().mean() > .99
    assert len(predicted.unique()) == 3


def test_linear_with_a_single_label():
    (_, predicted), = dense.linear(torch.randn(4, 2), torch.full((4, 1, 1), 2, dtype=torch.uint8),
                                   torch.randn(3, 2), [1.], 3)
    assert predicted.flatten().tolist() == [2, 2, 2]


def test_the_grids_are_those_of_capi():
    assert len(dense.KNN) == 8 and dense.KNN[:3] == [(1, "cosine"), (1, "L2"), (3, "cosine")]
    assert np.allclose(np.log10(dense.LINEAR), [-6 + i * 11 / 7 for i in range(8)])
    assert dense.MAX_ITER == 1000


# ---- choosing ------------------------------------------------------------------------------------

class Recorder:
    """A probe that remembers what it gets. The setting s labels everything rightly up to the first
    s patches, and wrongly after."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, maps, q, settings, C):
        self.calls.append((x, maps, q, list(settings)))
        for s in settings:
            # features are standardised: the order of the queries tells which one is which
            predicted = torch.zeros(len(q), *maps.shape[1:], dtype=torch.uint8)
            predicted[s:] = 1
            yield s, predicted


def some_patches(n=30, per_image=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = 5 + 3 * torch.randn(n, per_image, 2, generator=g)  # (n, per_image, 2)
    x[..., 0] = torch.arange(n)[:, None]  # tells the image
    return dense.Patches(x, torch.zeros(n, per_image, 1, 1, dtype=torch.uint8))


def test_a_tenth_of_the_images_chooses_and_all_are_fitted_to(monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(dense.PROBES, "knn", (recorder, [2, 12, 11, 13]))
    train, test = some_patches(), some_patches(5, seed=1)
    predicted, best, scores = dense.choose_and_refit("knn", train, test, 2)
    assert best == 12 and set(scores) == {2, 12, 11, 13}  # 12 patches are held out; 13 is as good
    assert scores[12] == scores[13] == 100 > scores[11] > scores[2]
    assert predicted.shape == (5, 4, 1, 1)

    (x, maps, q, tried), (all_x, all_maps, test_q, again) = recorder.calls
    assert tried == [2, 12, 11, 13] and again == [12]
    assert x.shape == (27 * 4, 2) and q.shape == (3 * 4, 2)
    assert all_x.shape == (30 * 4, 2) and test_q.shape == (5 * 4, 2)
    # standardised on what is fitted to, in either case
    for part in (x, all_x):
        assert torch.allclose(part.mean(0), torch.zeros(2), atol=1e-5)
        assert torch.allclose(part.std(0, correction=0), torch.ones(2), atol=1e-5)
    mean, std = train.x.flatten(0, 1).mean(0), train.x.flatten(0, 1).std(0, correction=0)
    assert torch.allclose(test_q, (test.x.flatten(0, 1) - mean) / std, atol=1e-5)
    # whole images are held out, and none of them is fitted to
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    held_out = set(order[:3].tolist())
    fitted = train.x[[i for i in range(30) if i not in held_out]].flatten(0, 1)
    back = x * fitted.std(0, correction=0) + fitted.mean(0)
    assert set(back[:, 0].round().int().tolist()) == set(range(30)) - held_out


def test_another_seed_holds_out_other_images(monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(dense.PROBES, "knn", (recorder, [1]))
    for seed in (0, 0, 1):
        dense.choose_and_refit("knn", some_patches(), some_patches(5, seed=1), 2, seed)
    first, same, other = (recorder.calls[i][2] for i in (0, 2, 4))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_held_out_images_without_labels_are_a_sentence():
    train = some_patches(10)
    for i in range(10):
        maps = train.maps.clone()
        maps[i] = I
        order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
        if i == int(order[0]):
            with pytest.raises(ValueError, match="held out for choosing have the label 255"):
                dense.choose_and_refit("knn", dense.Patches(train.x, maps), train, 2)


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_features_that_are_the_labels_give_all_pixels(probe):
    """A patch's feature is its label, and every patch has one colour."""
    def patches(n, seed):
        labels = random_maps(n, 4, C=3, seed=seed)  # (n, 4)
        x = nn.functional.one_hot(labels.long(), 3).float()  # (n, 4, 3)
        return dense.Patches(x, labels[..., None, None].expand(-1, -1, 2, 2))

    test = patches(10, 1)
    predicted, _, scores = dense.choose_and_refit(probe, patches(20, 0), test, 3)
    assert torch.equal(predicted, test.maps)
    assert probes.segmentation_measures(predicted, test.maps, 3)["miou"] == 100
    assert max(scores.values()) == 100


# ---- the command ---------------------------------------------------------------------------------

def checkpoint(folder, arch="vit_nano", **args):
    """A run's folder with random weights; returns its path as text."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(7)
    net = models.build(arch, patch_size=8, img_size=32, in_small=True)
    weights = {f"backbone.{key}": w for key, w in net.state_dict().items()}
    args = dict(arch=arch, patch_size=8, img_size=32, data="shapes", seed=0, imbalance=1.0,
                data_version=data.VERSIONS["shapes"]) | args
    torch.save({"version": 1, "step": 7, "args": args, "student": weights, "teacher": weights},
               folder / "ckpt.pt")
    return str(folder)


@pytest.fixture
def small(monkeypatch):
    """--data shapes is 40 training and 20 test images; L-BFGS may take five steps."""
    x, y, classes, maps = shapes.make(60, 5)
    images = data.Images(x, y, classes, "shapes", label_map=maps)
    sets = data.subset(images, torch.arange(40)), data.subset(images, torch.arange(40, 60))
    monkeypatch.setattr(data, "load", lambda name, **kw: sets)
    monkeypatch.setattr(dense, "MAX_ITER", 5)
    return sets


def go(*flags):
    return dense.main([*map(str, flags), "--device", "cpu"])


def refusal(capsys, *flags):
    """The one sentence with which the command refuses these flags, by exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        go(*flags)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("lab.eval_dense: error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18"])
def test_the_command_on_the_built_in_images(arch, small, tmp_path, capsys):
    run = checkpoint(tmp_path / "run", arch)
    result = go(run, "--train-images", 30, "--test-images", 10)
    assert (result["train"], result["test"], result["grid"]) == (30, 10, 4)
    assert result["classes"] == ["background", *small[0].classes]
    names = [f"{f} {p}" for f in ("backbone", "untrained", "pixels") for p in ("knn", "linear")]
    assert list(result["miou"]) == names
    assert all(0 < value <= 100 for value in result["miou"].values())
    features = ("backbone", "untrained", "pixels")
    assert len({tuple(result["miou"][f"{f} {p}"] for p in ("knn", "linear"))
                for f in features}) == 3
    assert 0 < result["bounds"]["commonest label"] < result["bounds"]["own label of each patch"]
    assert result["bounds"]["own label of each patch"] < 100
    printed = capsys.readouterr().out
    assert "30 training images, 10 test images, 11 classes" in printed
    assert "protocol dense-1" in printed and "4 x 4 patches of 8 px" in printed
    table = printed[printed.index("                 features"):]
    assert "disc-stripes" in table and max(map(len, table.splitlines())) <= 100

    with open(tmp_path / "run" / "results_dense.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["result"] for row in rows] == [*names, *result["bounds"]]
    assert float(rows[0]["miou"]) == pytest.approx(result["miou"]["backbone knn"], abs=1e-4)
    assert rows[0]["chosen"] == result["chosen"]["backbone knn"] and rows[0]["train"] == "30"
    assert len(rows[0]["iou_of_classes"].split()) == 11
    values = [float(v) for v in rows[1]["iou_of_classes"].split() if v != "-"]
    assert np.mean(values) == pytest.approx(result["miou"]["backbone linear"], abs=.01)
    if arch == "resnet18":  # once is enough
        return
    same = go(run, "--train-images", 30, "--test-images", 10)
    assert same["miou"] == result["miou"] and same["chosen"] == result["chosen"]


def test_the_commonest_label_and_the_patches_own_are_what_they_say(small, tmp_path):
    test = small[1].label_map
    test[0, :8, :8], test[0, 0, 0] = I, 3  # all that is left of a patch
    bounds = go(checkpoint(tmp_path / "run"), "--probe", "knn")["bounds"]
    own, truth = np.empty_like(test), test.numpy()
    for i, r, c in np.ndindex(len(test), 4, 4):
        window = np.s_[i, 8 * r:8 * r + 8, 8 * c:8 * c + 8]
        own[window] = commonest(truth[window].flatten(), range(11))
    assert own[0, 0, 0] == 3
    own, truth = own[truth != I], truth[truth != I]
    ious = []
    for c in np.union1d(own, truth):
        ious.append(((own == c) & (truth == c)).sum() / ((own == c) | (truth == c)).sum())
    assert bounds["own label of each patch"] == pytest.approx(100 * np.mean(ious))
    share = (truth == 0).mean()  # background is the commonest
    assert bounds["commonest label"] == pytest.approx(100 * share / len(np.unique(truth)))


class Stub(nn.Module):
    """A patch token is the mean colour of its patch of 4 pixels."""
    arch, dim, patch_size = "vit_nano", 3, 4

    def forward(self, x):
        patches = nn.functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        return patches.mean(1), patches


def test_a_backbone_that_sees_the_labels(small, tmp_path, monkeypatch):
    """The colour of each patch tells its label, which all its pixels have. Every number but that of
    the commonest label is 100."""
    for images in small:
        labels = random_maps(len(images), 8, 8, C=11, seed=len(images))
        images.label_map = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
        images.x = (images.label_map * 20)[:, None].repeat(1, 3, 1, 1)
        images.x[:, 1] = 200 - images.x[:, 1]
        images.x[:, 2] = images.label_map % 3 * 100
    made = Stub(), {"img_size": 32, "mean": [0] * 3, "std": [1] * 3}, "a stub"
    monkeypatch.setattr(backbones, "load_backbone", lambda *args: made)
    monkeypatch.setattr(backbones, "build", lambda *args, **kw: Stub())
    result = go(checkpoint(tmp_path / "run"), "--probe", "knn")
    assert result["grid"] == 8
    assert result["miou"] == {f"{f} knn": 100 for f in ("backbone", "untrained", "pixels")}
    assert result["bounds"]["own label of each patch"] == 100


def test_a_picture(small, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run, file = checkpoint(tmp_path / "run"), tmp_path / "few.png"
    go(run, "--probe", "knn", "--picture", file)
    assert Image.open(file).width > 300 and str(file) in capsys.readouterr().out
    assert "must end in" in refusal(capsys, run, "--picture", tmp_path / "few.nonsense")
    assert "--picture" in refusal(capsys, run, "--picture", tmp_path / "none" / "few.png")


def test_bad_flags_are_one_sentence(small, tmp_path, capsys, monkeypatch):
    run = checkpoint(tmp_path / "run")
    assert "--img-size 30 must be a multiple of 8" in refusal(capsys, run, "--img-size", 30)
    assert "--train-images must be at least 2" in refusal(capsys, run, "--train-images", 1)
    assert "--test-images must be at least 1" in refusal(capsys, run, "--test-images", 0)
    assert "--seed must not be negative, got -1" in refusal(capsys, run, "--seed", -1)
    assert "--std must be positive" in refusal(capsys, run, "--std", 0, 1, 1)
    assert "missing" in refusal(capsys, tmp_path / "missing")
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt")
    ckpt["teacher"]["backbone.norm.bias"][0] = torch.inf
    (tmp_path / "broken").mkdir()
    torch.save(ckpt, tmp_path / "broken" / "ckpt.pt")
    sentence = refusal(capsys, tmp_path / "broken")
    assert "broken: its network gives features that are not finite" in sentence
    assert "--data cifar10 has no label maps" in refusal(capsys, run, "--data", "cifar10")
    monkeypatch.setitem(data.SETS, "mine", None)
    without = [data.Images(part.x, part.y, part.classes, "mine") for part in small]
    monkeypatch.setattr(data, "load", lambda name, **kw: without)
    assert "--data mine has no label maps" in refusal(capsys, run, "--data", "mine")


# ---- a folder in VOC layout ----------------------------------------------------------------------

def test_the_command_on_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dense, "MAX_ITER", 20)
    folder = make_voc_folder(tmp_path / "voc")
    result = go(checkpoint(tmp_path / "run"), "--data", folder, "--img-size", 40)
    assert (result["train"], result["test"], result["grid"]) == (8, 4, 5)
    assert result["miou"]["pixels knn"] > 70
    assert "40 px, 5 x 5 patches of 8 px" in capsys.readouterr().out


def test_bad_folders_are_one_sentence(tmp_path, capsys):
    run = checkpoint(tmp_path / "run")

    def refused(name, change, *flags):
        """The sentence after change(folder)."""
        folder = make_voc_folder(tmp_path / name, train=3, val=1)
        change(folder)
        return refusal(capsys, run, "--data", folder, "--img-size", 16, "--probe", "knn", *flags)

    lists, masks, images = "ImageSets/Segmentation", "SegmentationClass", "JPEGImages"

    def save_mask(values, mode=None):
        return lambda f: Image.fromarray(values, mode).save(f / masks / "train_1.png")

    grey = np.zeros((24, 40), np.uint8)
    sentence = refused("a", lambda f: (f / lists / "val.txt").unlink())
    assert "neither shapes nor a folder in VOC layout" in sentence and "val.txt" in sentence
    assert "names no images" in refused("b", lambda f: (f / lists / "train.txt").write_text("\n"))
    assert "train_0 is in train.txt and in val.txt" in refused(
        "c", lambda f: (f / lists / "val.txt").write_text("train_0"))
    assert "has 1 training image" in refused(
        "d", lambda f: (f / lists / "train.txt").write_text("train_0"))
    assert "train_2.jpg cannot be read" in refused(
        "e", lambda f: (f / images / "train_2.jpg").write_bytes(b"no picture"))
    assert "train_1.png cannot be read" in refused(
        "f", lambda f: (f / masks / "train_1.png").unlink())
    assert "train_1.png is a picture of mode RGB" in refused(
        "g", save_mask(np.zeros((24, 40, 3), np.uint8)))
    assert "train_1.png is a picture of mode I" in refused("h", save_mask(grey.astype(np.uint16)))
    assert "has 40 x 23 pixels, and its image has 40 x 24" in refused("i", save_mask(grey[1:]))

    def ignore(split):
        def change(folder):
            for path in (folder / masks).glob(f"{split}_*.png"):
                Image.fromarray(grey + I).save(path)
        return change

    assert "all pixels of the training images have the label 255" in refused("j", ignore("train"))
    assert "all pixels of the test images have the label 255" in refused("k", ignore("val"))
    assert "neither shapes nor a folder" in refusal(capsys, run, "--data", tmp_path / "nowhere")


def test_what_a_line_of_the_results_holds():
    result = dense.Result(None, 1., 2., torch.tensor([math.nan, 3.]), "k=1 L2", 4.)
    assert dense.tables_of({("backbone", "knn"): result, ("commonest label", ""): result}) == {
        name: {"miou": 1, "pixels_right": 2, "chosen": "k=1 L2", "miou_held_out": 4,
               "iou_of_classes": "- 3.00"} for name in ("backbone knn", "commonest label")}


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
