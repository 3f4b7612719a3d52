"""Tests of eval_knn.py: the classifier against float64 loops, its memory, features, checkpoints, the command line."""
import math
import re
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import eval_knn
import models
from eval_knn import knn_accuracy, knn_scores


def sample(N, M, D=16, classes=5, seed=0):
    """Random features around class centres: (train_x, train_y, test_x, test_y)."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, D, generator=g)
    train_y, test_y = (torch.randint(classes, (n,), generator=g) for n in (N, M))
    train_x, test_x = (centres[y] + 1.5 * torch.randn(len(y), D, generator=g) for y in (train_y, test_y))
    return train_x, train_y, test_x, test_y


def loop_scores(train_x, train_y, test_x, k, T, classes):
    """The definition, one query and one neighbour at a time, in float64."""
    train_x, test_x, scores = train_x.double().numpy(), test_x.double().numpy(), np.zeros((len(test_x), classes))
    for m, query in enumerate(test_x):
        cosine = [query @ x / (np.linalg.norm(query) * np.linalg.norm(x)) for x in train_x]
        for i in sorted(range(len(cosine)), key=lambda i: (-cosine[i], i))[:k]:
            scores[m, train_y[i]] += math.exp(cosine[i] / T)
    return scores


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() and not func.is_view:
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


# ------------------------------------------------------------------------------------------------------- the classifier

@pytest.mark.parametrize("k", [1, 7, 20, 150])
@pytest.mark.parametrize("T", [0.03, 0.07, 1.0])
def test_scores_against_float64_loops(k, T):
    train_x, train_y, test_x, _ = sample(150, 23)
    scores = knn_scores(train_x, train_y, test_x, k=k, T=T)
    assert scores.shape == (23, 5) and scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), loop_scores(train_x, train_y, test_x, k, T, 5), rtol=3e-5)


def test_scores_by_hand():
    train_x = torch.tensor([[2.0, 0], [0, 5], [-1, 0]])                 # cosines with (1, 0): 1, 0, -1
    scores = knn_scores(train_x, torch.tensor([1, 0, 1]), torch.tensor([[3.0, 0]]), k=3, T=0.5, num_classes=4)
    torch.testing.assert_close(scores, torch.tensor([[1, math.exp(2) + math.exp(-2), 0, 0]]))


def test_length_and_dtype_of_features_do_not_matter():
    train_x, train_y, test_x, _ = sample(90, 11)
    wanted = knn_scores(train_x, train_y, test_x)
    stretch = torch.rand(90, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    torch.testing.assert_close(knn_scores(train_x * stretch, train_y, 7 * test_x), wanted, rtol=1e-4, atol=1e-2)
    half = train_x.half()
    torch.testing.assert_close(knn_scores(half, train_y, test_x), knn_scores(half.float(), train_y, test_x))


@pytest.mark.parametrize("budget, queries", [(1, 1024), (30_000, 1024), (20_000, 3), (10**6, 5)])
def test_blocks_do_not_change_the_result(monkeypatch, budget, queries):
    train_x, train_y, test_x, test_y = sample(301, 29)
    wanted, accuracy = knn_scores(train_x, train_y, test_x, k=50), knn_accuracy(train_x, train_y, test_x, test_y)
    monkeypatch.setattr(eval_knn, "BUDGET", budget)
    monkeypatch.setattr(eval_knn, "MAX_QUERIES", queries)
    torch.testing.assert_close(knn_scores(train_x, train_y, test_x, k=50), wanted, rtol=1e-4, atol=1e-2)
    assert knn_accuracy(train_x, train_y, test_x, test_y) == accuracy


@pytest.mark.parametrize("k, D, classes", [(20, 16, 10), (200, 16, 10), (20, 256, 3000), (3000, 8, 10)])
def test_no_tensor_is_larger_than_the_budget(monkeypatch, k, D, classes):
    train_x, train_y, test_x, test_y = sample(4000, 400, D, classes)
    monkeypatch.setattr(eval_knn, "BUDGET", 2 * 2**20)                  # the (M, N) matrix would take 6.1 MiB
    with Largest() as largest:
        knn_accuracy(train_x, train_y, test_x, test_y, ks=[k])
    assert 2**16 < largest.bytes <= eval_knn.BUDGET // 2


def test_k_beyond_the_bank_counts_the_whole_bank():
    train_x, train_y, test_x, test_y = sample(30, 9)
    assert torch.equal(knn_scores(train_x, train_y, test_x, k=1000), knn_scores(train_x, train_y, test_x, k=30))
    accuracy = knn_accuracy(train_x, train_y, test_x, test_y, ks=(30, 100, 5000))
    assert list(accuracy) == [30, 100, 5000] and len(set(accuracy.values())) == 1


def test_seven_queries_one_bank_image_one_class_no_queries():
    train_x, train_y, test_x, test_y = sample(40, 7)
    assert knn_scores(train_x, train_y, test_x).shape == (7, 5)
    assert knn_accuracy(train_x, torch.zeros_like(train_y), test_x, torch.zeros_like(test_y), ks=[5]) == {5: 100.0}
    assert knn_scores(train_x, torch.zeros_like(train_y), test_x).shape == (7, 1)
    assert knn_scores(train_x[:1], train_y[:1], test_x, num_classes=5).argmax(1).tolist() == [int(train_y[0])] * 7
    assert knn_scores(train_x, train_y, test_x[:0]).shape == (0, 5)


def test_several_k_equal_one_k_each():
    train_x, train_y, test_x, test_y = sample(400, 150, classes=8)
    ks = (200, 1, 20, 10, 20)
    accuracy = knn_accuracy(train_x, train_y, test_x, test_y, ks=ks, T=0.2)
    for k in ks:
        hits = (knn_scores(train_x, train_y, test_x, k=k, T=0.2).argmax(1) == test_y).sum()
        assert accuracy[k] == pytest.approx(100 * int(hits) / 150)
    assert len(set(accuracy.values())) > 1 and min(accuracy.values()) > 100 / 8     # the set tells the ks apart


def test_many_and_scattered_labels():
    train_x, train_y, test_x, test_y = sample(300, 40)
    wanted = knn_accuracy(train_x, train_y, test_x, test_y)
    apart = torch.tensor([3, 1500, 1501, 40_000, 2])
    scores = knn_scores(train_x, apart[train_y], test_x)
    assert scores.shape == (40, 40_001)
    torch.testing.assert_close(scores[:, apart], knn_scores(train_x, train_y, test_x))
    huge = torch.tensor([-7, 10**12, 5, 0, 10**9])                      # a column per value would not fit anywhere
    assert knn_accuracy(train_x, huge[train_y], test_x, huge[test_y]) == wanted
    assert set(knn_accuracy(train_x, train_y, test_x, test_y + 5).values()) == {0}      # classes that the bank lacks


@pytest.mark.parametrize("block", [60, 7, 1])
def test_equal_similarities_go_to_the_smaller_bank_index(monkeypatch, block):
    monkeypatch.setattr(eval_knn, "MAX_QUERIES", 1)
    monkeypatch.setattr(eval_knn, "BUDGET", 2 * block * (8 * 4 + 4))    # bank blocks of this many rows
    train_x, test_x = torch.eye(4)[torch.arange(60) % 3], torch.eye(4)[[0, 2]]      # 20 copies each of three directions
    got = torch.cat([index for _, _, index in eval_knn.neighbours(train_x, test_x, 5)])
    assert got.tolist() == [[0, 3, 6, 9, 12], [2, 5, 8, 11, 14]]
    _, sim, index = next(eval_knn.neighbours(train_x, test_x, 25))      # all 20 of cosine 1, then 5 of cosine 0
    assert index[0].tolist() == list(range(0, 60, 3)) + [1, 2, 4, 5, 7] and sim[0].tolist() == [1.0] * 20 + [0.0] * 5


def test_collapsed_features_vote_for_the_first_images():
    """All features equal: every similarity is tied, and the answer must still not depend on anything but the order."""
    train_x, train_y = torch.eye(1, 8).repeat(500, 1), torch.arange(500) % 4 // 3       # labels 0 0 0 1 0 0 0 1
    scores = knn_scores(train_x, train_y, torch.eye(1, 8).repeat(3, 1), k=8, T=1.0)
    torch.testing.assert_close(scores, math.e * torch.tensor([[6.0, 2.0]]).repeat(3, 1))


def test_zero_feature_has_cosine_zero():
    train_x, train_y, _, _ = sample(20, 1)
    scores = knn_scores(train_x, train_y, torch.zeros(1, 16), k=20)
    torch.testing.assert_close(scores[0], train_y.bincount(minlength=5).float())


@pytest.mark.parametrize("change, words", [
    (dict(k=0), "k must be at least 1, got 0"),
    (dict(T=0.0), "T must be above 0.*0.0"),
    (dict(T=-1.0), "T must be above 0.*-1.0"),
    (dict(T=0.01), "overflow.*0.01"),
    (dict(T=float("nan")), "T must be above 0.*nan"),
    (dict(num_classes=3), "0 to 4.*num_classes = 3"),
    (dict(train_y=torch.full((50,), -1)), "-1"),
    (dict(train_y=torch.zeros(49, dtype=torch.long)), r"50 images.*\(49,\)"),
    (dict(train_x=torch.zeros(0, 16), train_y=torch.zeros(0, dtype=torch.long)), "0 images"),
    (dict(test_x=torch.zeros(5, 15)), r"\(50, 16\) and \(5, 15\)"),
    (dict(test_x=torch.zeros(16)), r"\(16,\)"),
    (dict(test_x=torch.full((5, 16), float("nan"))), "not finite"),
    (dict(train_x=torch.full((50, 16), float("inf"))), "not finite"),
])
def test_scores_name_what_is_wrong(change, words):
    train_x, train_y, test_x, _ = sample(50, 5)
    with pytest.raises(ValueError, match=words):
        knn_scores(**{"train_x": train_x, "train_y": train_y, "test_x": test_x, **change})


def test_accuracy_needs_test_labels():
    train_x, train_y, test_x, test_y = sample(50, 5)
    for x, y in [(test_x, test_y[:4]), (test_x[:0], test_y[:0])]:
        with pytest.raises(ValueError, match="label for each test image"):
            knn_accuracy(train_x, train_y, x, y)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        knn_accuracy(train_x, train_y, test_x, test_y, ks=(0, 5))


# ------------------------------------------------------------------------------------------------------------ features

class Tiny(nn.Module):
    """A backbone of one linear layer with BatchNorm; notes under which conditions it was called."""
    dim = 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.bn, self.frozen = nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.bn.running_mean.fill_(0.3), self.bn.running_var.fill_(2.0)
        self.seen = []

    def forward(self, x):
        h = self.fc(x.flatten(1))
        self.seen.append((len(x), h.dtype, self.training, self.bn.training, torch.is_grad_enabled()))
        return self.frozen(self.bn(h)), None


def in_memory(images, img_size, *, batch_size=512, device="cpu"):
    """A stand-in for data.eval_batches on a float tensor."""
    assert img_size == images.shape[-1]
    return iter(images.to(device).split(batch_size))


def test_features_are_normalised_eval_mode_and_in_order(monkeypatch):
    monkeypatch.setattr(eval_knn, "eval_batches", in_memory)
    net, x = Tiny(), torch.randn(11, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    net.train()
    net.frozen.eval()                                                   # a part that the caller keeps in eval mode
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = eval_knn.features(net, x, 2, batch_size=4)
    assert net.seen == [(n, torch.float32, False, False, False) for n in (4, 4, 3)]
    assert (net.training, net.fc.training, net.bn.training, net.frozen.training) == (True, True, True, False)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    h = (net.fc(x.flatten(1)) - 0.3) / math.sqrt(2 + 1e-5)
    torch.testing.assert_close(out, (h / h.norm(dim=1, keepdim=True)).detach())
    assert out.dtype == torch.float32 and out.device.type == "cpu" and not out.requires_grad


def test_features_put_the_mode_back_when_the_data_breaks(monkeypatch):
    def broken(images, img_size, *, batch_size, device):
        yield images[:2]
        raise ValueError("broken image")
    monkeypatch.setattr(eval_knn, "eval_batches", broken)
    net = Tiny().train()
    with pytest.raises(ValueError, match="broken image"):
        eval_knn.features(net, torch.zeros(5, 3, 2, 2), 2)
    assert net.training and net.bn.training


# --------------------------------------------------------------------------------------------------------- checkpoints

def checkpoint(path, arch="vit_nano", patch_size=8, img_size=32, in_small=True, **args):
    """Write a checkpoint as train.py does; returns its content. Student and teacher differ."""
    torch.manual_seed(0)
    nets = [models.build(arch, patch_size=patch_size, img_size=img_size, in_small=in_small) for _ in range(2)]
    args = dict(arch=arch, patch_size=patch_size, img_size=img_size, method="carp", prototypes="decoupled",
                num_prototypes=64, data="shapes", data_root="data", seed=0, imbalance=1.0) | args
    ckpt = {"version": 1, "step": 123, "args": args, "rng": {}, "gmm": {}, "loss": {}, "optimizer": {}}
    for name, net in zip(("student", "teacher"), nets):
        ckpt[name] = {"head.0.weight": torch.zeros(2, 2)}
        ckpt[name] |= {f"backbone.{key}": w for key, w in net.state_dict().items()}
    torch.save(ckpt, path)
    return ckpt


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_load_backbone_from_file_and_directory(tmp_path, which):
    ckpt = checkpoint(tmp_path / "ckpt.pt")
    for path in (tmp_path, tmp_path / "ckpt.pt", str(tmp_path)):
        net, args, info = eval_knn.load_backbone(path, which)
        assert args == ckpt["args"] and not net.training and net.arch == "vit_nano"
        assert all(torch.equal(w, ckpt[which]["backbone." + key]) for key, w in net.state_dict().items())
        for word in ("ckpt.pt", "step 123", "carp", "decoupled", "K = 64", which, "vit_nano"):
            assert word in info
        assert "\n" not in info
    assert not torch.equal(ckpt["teacher"]["backbone.cls_token"], ckpt["student"]["backbone.cls_token"])


@pytest.mark.parametrize("in_small", [True, False])
def test_load_backbone_knows_the_stem_of_a_resnet(tmp_path, in_small):
    checkpoint(tmp_path / "ckpt.pt", arch="resnet18", patch_size=16, in_small=in_small)
    net, _, _ = eval_knn.load_backbone(tmp_path)
    assert net.conv1.kernel_size == ((3, 3) if in_small else (7, 7))


def test_load_backbone_refuses_in_one_sentence(tmp_path):
    good = checkpoint(tmp_path / "good.pt")

    def refused(words, name, which="teacher", content=None):
        if content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=words) as caught:
            eval_knn.load_backbone(tmp_path / name, which)
        assert "\n" not in str(caught.value)

    refused("no checkpoint .*absent.pt", "absent.pt")
    (tmp_path / "empty").mkdir()
    refused("no checkpoint .*ckpt.pt", "empty")
    whole = (tmp_path / "good.pt").read_bytes()
    for name, text in [("cut.pt", whole[:len(whole) // 2]), ("nothing.pt", b""), ("text.pt", b"hello\n" * 50)]:
        (tmp_path / name).write_bytes(text)
        refused(f"{name} is not a checkpoint that can be read", name)
    torch.save({"net": types.SimpleNamespace()}, tmp_path / "pickle.pt")        # needs weights_only=False: never run
    refused("pickle.pt is not a checkpoint that can be read", "pickle.pt")
    refused("holds a list", "list.pt", content=[1, 2])
    refused("lacks args, step, teacher", "foreign.pt", content={"state_dict": {}})
    refused("lacks args, teacher", "plain.pt", content=good | {"args": None, "teacher": [1]})
    refused("lacks student", "half.pt", "student", {key: good[key] for key in ("args", "step", "teacher")})
    refused(r"lacks args\['img_size'\]", "args.pt", content=good | {"args": {"arch": "vit_nano", "patch_size": 8}})
    refused("do not fit.*vit_tiny", "arch.pt", content=good | {"args": good["args"] | {"arch": "vit_tiny"}})
    refused("do not fit.*vit_none", "none.pt", content=good | {"args": good["args"] | {"arch": "vit_none"}})
    refused("do not fit.*cls_token", "keys.pt", content=good | {"teacher": {
        key: w for key, w in good["teacher"].items() if key != "backbone.cls_token"}})
    refused("which must be teacher or student, got 'ema'", "good.pt", "ema")


# -------------------------------------------------------------------------------------------------------- command line

def write_images(root, split, counts, seed=0):
    """Noise images of 32 px: class 0 reddish, class 1 bluish, separable by any backbone that sees colour."""
    rng = np.random.default_rng(seed)
    for c, n in enumerate(counts):
        (root / split / f"class{c}").mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 90, (32, 32, 3))
            pixels[..., 2 * c] += 160
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / f"class{c}" / f"{i}.png")


def test_command_line_end_to_end(tmp_path, capsys):
    write_images(tmp_path / "images", "train", (14, 10))
    write_images(tmp_path / "images", "val", (6, 9), seed=1)
    ckpt = checkpoint(tmp_path / "ckpt.pt", data=str(tmp_path / "images"))
    out = eval_knn.main([str(tmp_path), "--device", "cpu", "--k", "1", "5", "200", "--dump", str(tmp_path / "f.pt"),
                         "--batch-size", "4"])
    text = capsys.readouterr().out
    assert out["knn"][1] == 100 and out["knn"][5] == 100 and set(out["knn"]) == {1, 5, 200}
    assert out["guess"] == pytest.approx(40) and (out["train"], out["test"], out["which"]) == (24, 15, "teacher")
    for words in ("step 123", "bank of 24 images, 15 test images, 2 classes", "T = 0.07", "teacher's cls feature (96-d",
                  "centre-cropped to 32 px", "protocol knn-1", "all 24 of the bank", "guess"):
        assert words in text
    rows = {int(row.split()[0]): float(row.split()[1]) for row in text.splitlines() if row.split()[0].isdigit()}
    assert rows == pytest.approx(out["knn"], abs=0.01)

    dump = torch.load(tmp_path / "f.pt", weights_only=True)
    assert {key: tuple(value.shape) for key, value in dump.items()} == {
        "train_x": (24, 96), "train_y": (24,), "test_x": (15, 96), "test_y": (15,)}
    assert knn_accuracy(**dump, ks=(1, 5, 200)) == out["knn"]
    eval_knn.main([str(tmp_path / "ckpt.pt"), "--which", "student", "--device", "cpu", f"--dump={tmp_path / 's.pt'}"])
    student = torch.load(tmp_path / "s.pt", weights_only=True)
    assert not torch.allclose(student["test_x"], dump["test_x"]) and torch.equal(student["test_y"], dump["test_y"])
    assert ckpt["args"]["data"] in capsys.readouterr().out


def test_command_line_gives_the_data_what_the_run_had(tmp_path, monkeypatch):
    calls = []

    def load(name, **kwargs):
        calls.append((name, kwargs))
        raise ValueError("enough")
    monkeypatch.setattr(eval_knn, "load", load)
    checkpoint(tmp_path / "ckpt.pt", seed=3, imbalance=50.0, data_root="there")
    for extra in ([], ["--data", "cifar10"], ["--data", "shapes", "--data-root", "here"]):
        with pytest.raises(SystemExit):
            eval_knn.main([str(tmp_path), "--device", "cpu", *extra])
    run = dict(seed=3, img_size=32)
    assert calls == [("shapes", dict(root="there", imbalance=50.0, **run)),         # the long-tailed bank of the run
                     ("cifar10", dict(root="there", imbalance=1.0, **run)),         # another set: as it is
                     ("shapes", dict(root="here", imbalance=50.0, **run))]


@pytest.mark.parametrize("flags, words", [
    (["--data", "{tmp}/loose"], "loose.*no labels"),
    (["--data", "{tmp}/nowhere"], "nowhere"),
    (["--k", "0"], "k must be at least 1, got 0"),
    (["--T", "0"], "T must be above 0"),
    (["--batch-size", "0"], "--batch-size.*0"),
    (["--dump", "{tmp}/no/such/f.pt"], "--dump .*no/such"),
    (["--dump", "{tmp}"], "--dump"),
    (["--device", "abacus"], "--device abacus"),
])
def test_command_line_refuses_with_exit_2(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.delattr(eval_knn, "features")                           # refused before the long work, not after it
    write_images(tmp_path / "images", "train", (2, 2))
    write_images(tmp_path / "images", "val", (1, 1))
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "loose" / "a.png")
    checkpoint(tmp_path / "ckpt.pt", data=str(tmp_path / "images"))
    with pytest.raises(SystemExit) as caught:
        eval_knn.main([str(tmp_path), "--device", "cpu", *(flag.format(tmp=tmp_path) for flag in flags)])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith("eval_knn.py: ") and err.count("\n") == 1
    assert re.search(words, err)
