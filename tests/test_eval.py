"""eval_knn.py, support/groups.py, support/features.py and support/evaluation.py: the classifier
against float64 loops, head, medium and tail, features, checkpoints, the command line. fast/knn.py
has its own file."""
import argparse
import csv
import errno
import math
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import data
import eval_knn
import forked
import models
import train
import views
from eval_knn import knn_accuracy, knn_predict, knn_scores
from support import evaluation
from support import backbones
from support import features
from support import groups


def sample(N, M, D=16, classes=5, seed=0):
    """Random features around class centres: (train_x, train_y, test_x, test_y)."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, D, generator=g)
    train_y = torch.randint(classes, (N,), generator=g)
    test_y = torch.randint(classes, (M,), generator=g)
    train_x = centres[train_y] + 1.5 * torch.randn(N, D, generator=g)
    test_x = centres[test_y] + 1.5 * torch.randn(M, D, generator=g)
    return train_x, train_y, test_x, test_y


def loop_scores(train_x, train_y, test_x, k, T, classes):
    """The definition, one query and one neighbour at a time, in float64."""
    train_x, test_x = train_x.double().numpy(), test_x.double().numpy()
    scores = np.zeros((len(test_x), classes))
    for m, query in enumerate(test_x):
        cosine = [query @ x / (np.linalg.norm(query) * np.linalg.norm(x)) for x in train_x]
        for i in sorted(range(len(cosine)), key=lambda i: (-cosine[i], i))[:k]:
            scores[m, train_y[i]] += math.exp(cosine[i] / T)
    return scores


# ---- the classifier ------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 7, 20, 150])
@pytest.mark.parametrize("T", [0.03, 0.07, 1.0])
def test_scores_against_float64_loops(k, T):
    train_x, train_y, test_x, _ = sample(150, 23)
    scores = knn_scores(train_x, train_y, test_x, k=k, T=T)
    assert scores.shape == (23, 5) and scores.dtype == torch.float32
    wanted = loop_scores(train_x, train_y, test_x, k, T, 5)
    np.testing.assert_allclose(scores.numpy(), wanted, rtol=3e-5)


def test_scores_by_hand():
    train_x = torch.tensor([[2.0, 0], [0, 5], [-1, 0]])  # cosines with (1, 0): 1, 0, -1
    train_y, test_x = torch.tensor([1, 0, 1]), torch.tensor([[3.0, 0]])
    scores = knn_scores(train_x, train_y, test_x, k=3, T=0.5, num_classes=4)
    torch.testing.assert_close(scores, torch.tensor([[1, math.exp(2) + math.exp(-2), 0, 0]]))


def test_length_and_dtype_of_features_do_not_matter():
    train_x, train_y, test_x, _ = sample(90, 11)
    wanted = knn_scores(train_x, train_y, test_x)
    stretch = torch.rand(90, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    stretched = knn_scores(train_x * stretch, train_y, 7 * test_x)
    torch.testing.assert_close(stretched, wanted, rtol=1e-4, atol=1e-2)
    half = train_x.half()
    wanted = knn_scores(half.float(), train_y, test_x)
    torch.testing.assert_close(knn_scores(half, train_y, test_x), wanted)


def test_k_beyond_the_bank_counts_the_whole_bank():
    train_x, train_y, test_x, test_y = sample(30, 9)
    whole = knn_scores(train_x, train_y, test_x, k=30)
    assert torch.equal(knn_scores(train_x, train_y, test_x, k=1000), whole)
    accuracy = knn_accuracy(train_x, train_y, test_x, test_y, ks=(30, 100, 5000))
    assert list(accuracy) == [30, 100, 5000] and len(set(accuracy.values())) == 1


def test_seven_queries_one_bank_image_one_class_no_queries():
    train_x, train_y, test_x, test_y = sample(40, 7)
    assert knn_scores(train_x, train_y, test_x).shape == (7, 5)
    one_class = torch.zeros_like(train_y)
    accuracy = knn_accuracy(train_x, one_class, test_x, torch.zeros_like(test_y), ks=[5])
    assert accuracy == {5: 100.0}
    assert knn_scores(train_x, one_class, test_x).shape == (7, 1)
    scores = knn_scores(train_x[:1], train_y[:1], test_x, num_classes=5)
    assert scores.argmax(1).tolist() == [int(train_y[0])] * 7
    assert knn_scores(train_x, train_y, test_x[:0]).shape == (0, 5)


def test_several_k_equal_one_k_each():
    train_x, train_y, test_x, test_y = sample(400, 150, classes=8)
    ks = (200, 1, 20, 10, 20)
    accuracy = knn_accuracy(train_x, train_y, test_x, test_y, ks=ks, T=0.2)
    for k in ks:
        hits = (knn_scores(train_x, train_y, test_x, k=k, T=0.2).argmax(1) == test_y).sum()
        assert accuracy[k] == pytest.approx(100 * int(hits) / 150)
    # the set tells the ks apart, and something is learned
    assert len(set(accuracy.values())) > 1 and min(accuracy.values()) > 100 / 8


def test_many_and_scattered_labels():
    train_x, train_y, test_x, test_y = sample(300, 40)
    wanted = knn_accuracy(train_x, train_y, test_x, test_y)
    apart = torch.tensor([3, 1500, 1501, 40_000, 2])
    scores = knn_scores(train_x, apart[train_y], test_x)
    assert scores.shape == (40, 40_001)
    torch.testing.assert_close(scores[:, apart], knn_scores(train_x, train_y, test_x))
    huge = torch.tensor([-7, 10**12, 5, 0, 10**9])  # a column per value would not fit anywhere
    assert knn_accuracy(train_x, huge[train_y], test_x, huge[test_y]) == wanted
    absent = knn_accuracy(train_x, train_y, test_x, test_y + 5)  # classes that the bank lacks
    assert set(absent.values()) == {0}


def test_collapsed_features_vote_for_the_first_images():
    """All features equal: every similarity is tied, and the answer must still not depend on
    anything but the order."""
    train_x = torch.eye(1, 8).repeat(500, 1)
    train_y = torch.arange(500) % 4 // 3  # 0 0 0 1 0 0 0 1 ...
    scores = knn_scores(train_x, train_y, torch.eye(1, 8).repeat(3, 1), k=8, T=1.0)
    torch.testing.assert_close(scores, math.e * torch.tensor([[6.0, 2.0]]).repeat(3, 1))


def test_zero_feature_has_cosine_zero():
    train_x, train_y, _, _ = sample(20, 1)
    scores = knn_scores(train_x, train_y, torch.zeros(1, 16), k=20)
    torch.testing.assert_close(scores[0], train_y.bincount(minlength=5).float())


@pytest.mark.parametrize("change, words", [
    (dict(k=0), "k must be at least 1, got 0"),
    (dict(T=0.0), "T must be at least 0.0118.*got 0.0"),
    (dict(T=-1.0), "T must be at least 0.*got -1.0"),
    (dict(T=0.01), "overflow.*0.01"),
    (dict(T=float("nan")), "T must be at least 0.*got nan"),
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


@pytest.mark.parametrize("chunk", [1, 50, 512])
def test_equal_similarities_go_to_the_smaller_bank_index(monkeypatch, chunk):
    monkeypatch.setattr(eval_knn, "CHUNK", chunk)
    train_x = torch.eye(4)[torch.arange(60) % 3]  # 20 copies each of three directions
    test_x = torch.eye(4)[[0, 2]]
    index = torch.cat([index for _, _, index in eval_knn.neighbours(train_x, test_x, 5)])
    assert index.tolist() == [[0, 3, 6, 9, 12], [2, 5, 8, 11, 14]]
    _, sim, index = next(eval_knn.neighbours(train_x, test_x, 25))  # 20 of cosine 1, 5 of cosine 0
    assert index[0].tolist() == list(range(0, 60, 3)) + [1, 2, 4, 5, 7]
    assert sim[0].tolist() == [1.0] * 20 + [0.0] * 5


def test_the_largest_are_those_of_a_stable_sort():
    """Rows with ties at the k-th place alone, before it, everywhere and nowhere; -0 is 0."""
    g = torch.Generator().manual_seed(0)
    tied, distinct = torch.randint(4, (20, 33), generator=g), torch.rand(5, 33, generator=g)
    sim = torch.cat([tied / 2 - 1, distinct])  # (25, 33)
    sim[sim == 0] = torch.tensor([0.0, -0.0])[torch.arange(int((sim == 0).sum())) % 2]
    for k in range(1, 34):
        values, index = eval_knn.largest(sim, k)
        for row, value, place in zip(sim.tolist(), values.tolist(), index.tolist()):
            wanted = sorted(range(33), key=lambda i: (-row[i], i))[:k]
            assert place == wanted and value == [row[i] for i in wanted]


def test_leave_one_out_by_index(monkeypatch):
    train_x, train_y, _, _ = sample(120, 1)
    train_x[100:] = train_x[:20]  # copies: they stay neighbours of each other
    train_y[100:] = train_y[:20]
    wanted = {k: [] for k in (1, 7, 500)}
    for i in range(120):
        others = torch.arange(120) != i
        for k in wanted:
            scores = loop_scores(train_x[others], train_y[others], train_x[i:i + 1], k, 0.07, 5)
            wanted[k].append(int(scores[0].argmax()))
    for chunk in (5, 50, 512):
        monkeypatch.setattr(eval_knn, "CHUNK", chunk)
        predicted = knn_predict(train_x, train_y, train_x, ks=(1, 7, 500), leave_one_out=True)
        assert {k: labels.tolist() for k, labels in predicted.items()} == wanted
        assert torch.equal(predicted[1][:20], train_y[:20])  # the copy at index 100 + i votes
        plain = knn_predict(train_x, train_y, train_x, ks=(1,))[1]
        assert torch.equal(plain, train_y) and not torch.equal(predicted[1], train_y)
        search = eval_knn.neighbours(train_x, train_x, 119, leave_one_out=True)
        index = torch.cat([index for _, _, index in search])  # (120, 119)
        for i in range(120):
            assert sorted(index[i].tolist()) == [j for j in range(120) if j != i]


def test_leave_one_out_with_a_class_of_one_image_and_its_errors():
    train_x, train_y = torch.eye(4)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 1])
    predicted = knn_predict(train_x, train_y, train_x, ks=[2], leave_one_out=True)
    assert predicted[2].tolist() == [0, 0, 0, 0]
    for N, M in ((4, 3), (1, 1)):
        with pytest.raises(ValueError, match=f"leave-one-out needs .*{N} in the bank and {M} quer"):
            knn_predict(train_x[:N], train_y[:N], train_x[:M], leave_one_out=True)


# ---- head, medium, tail --------------------------------------------------------------------------

def test_groups_by_hand():
    counts = torch.tensor([500, 101, 100, 20, 19, 1, 0])  # head head medium medium tail tail tail
    y = torch.tensor([0, 0, 0, 0, 1, 2, 2, 3, 4, 5, 6])
    pred = torch.tensor([0, 0, 0, 1, 1, 2, 0, 3, 0, 5, 0])
    out = groups.report(pred, y, counts)
    assert out["classes"] == {"head": 2, "medium": 2, "tail": 3}
    assert out["all"] == pytest.approx(100 * 7 / 11) and out["head"] == pytest.approx(80)
    assert out["medium"] == pytest.approx(100 * 2 / 3) and out["tail"] == pytest.approx(100 / 3)
    assert out["per_class"] == pytest.approx(100 * (3 / 4 + 1 + 1 / 2 + 1 + 0 + 1 + 0) / 7)
    other = groups.report(pred, y, counts, head=19, tail=1)  # 500 101 100 20 | 19 1 | 0
    assert other["classes"] == {"head": 4, "medium": 2, "tail": 1}
    assert (other["head"], other["medium"], other["tail"]) == (75, 50, 0)
    some = groups.report(pred[:5], y[:5], counts)  # no test image of a medium or tail class
    assert (some["all"], some["head"], some["medium"], some["tail"]) == (80, 80, None, None)
    assert some["per_class"] == pytest.approx(87.5)  # classes without test images do not count
    zero = torch.tensor([0])
    one = groups.report(zero, zero, torch.tensor([1]))  # one class, one image
    assert one["all"] == one["tail"] == one["per_class"] == 100 and one["head"] is None


def test_equal_test_images_per_class_make_all_the_weighted_mean():
    """As on iNaturalist-2018: three test images in each class (method of the paper's Table 2)."""
    g = torch.Generator().manual_seed(0)
    counts, y = torch.randint(1, 300, (200,), generator=g), torch.arange(200).repeat(3)
    pred = torch.where(torch.rand(600, generator=g) < 0.6, y, (y + 1) % 200)
    out = groups.report(pred, y, counts)
    mean = sum(out["classes"][n] * out[n] for n in groups.NAMES) / 200
    assert out["all"] == pytest.approx(mean) == pytest.approx(out["per_class"])


def test_inat18_counts_are_asserted():
    counts = torch.tensor([101] * 842 + [100] * 3000 + [20] * 701 + [19] * 3599)
    groups.check_inat18(counts)
    for c, n in ((0, 100), (842, 101), (8141, 20)):
        with pytest.raises(ValueError, match="842 head, 3701 medium, 3599 tail classes .* got "):
            groups.check_inat18(counts.scatter(0, torch.tensor([c]), n))


def test_prototype_shares_by_hand():
    counts = torch.tensor([200, 50, 5])
    won = torch.tensor([0, 0, 0, 1, 1, 3, 3, 4, 4, 4])
    y = torch.tensor([0, 1, 1, 0, 2, 2, 2, 1, 2, 0])  # prototype 0: medium; 1 and 4: a tie, so head
    assert groups.owners(won, y, 8, 3).tolist() == [1, 0, -1, 2, 0, -1, -1, -1]
    assert groups.prototype_share(won, y, counts, 8) == {
        "head": 25, "medium": 12.5, "tail": 12.5, "unused": 50}
    assert groups.prototype_share(won, y, counts, 8, head=300, tail=2) == {
        "head": 0, "medium": 50, "tail": 0, "unused": 50}


@pytest.mark.parametrize("call, words", [
    (lambda t: groups.report(t([0, 1]), t([0]), [5, 5]), r"\(2,\) and \(1,\)"),
    (lambda t: groups.report(t([]), t([]), [5, 5]), "one prediction for each label"),
    (lambda t: groups.report(t([0]), t([2]), [5, 5]), "labels run from 2 to 2 .* 2 classes"),
    (lambda t: groups.report(t([0]), t([-1]), [5, 5]), "labels run from -1"),
    (lambda t: groups.members([5], head=10, tail=12), "tail ends at 12 .* head begins above 10"),
    (lambda t: groups.members([5], head=10, tail=-1), "tail ends at -1"),
    (lambda t: groups.prototype_share(t([0, 8]), t([0, 0]), [5], 8), r"0..7 for each label"),
])
def test_groups_name_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call(lambda values: torch.tensor(values, dtype=torch.long))
    touching = groups.members([5, 11], head=10, tail=11)  # allowed: no class lies between them
    assert sum(int(mask.sum()) for mask in touching.values()) == 2


# ---- features ------------------------------------------------------------------------------------

class Tiny(nn.Module):
    """A backbone of one linear layer with BatchNorm; notes under which conditions it was called."""
    dim = 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.bn, self.frozen = nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.bn.running_mean.fill_(0.3), self.bn.running_var.fill_(2.0)
        self.calls = []

    def forward(self, x):
        h = self.fc(x.flatten(1))
        self.calls.append((len(x), h.dtype, self.training, self.bn.training,
                           torch.is_grad_enabled()))
        return self.frozen(self.bn(h)), None


def in_memory(images, img_size, *, batch_size=512, device="cpu", **preparation):
    """A stand-in for views.eval_batches on a float tensor."""
    assert img_size == images.shape[-1]
    return iter(images.to(device).split(batch_size))


def test_features_are_normalised_eval_mode_and_in_order(monkeypatch):
    monkeypatch.setattr(features, "eval_batches", in_memory)
    net, x = Tiny(), torch.randn(11, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    net.train()
    net.frozen.eval()  # a part that the caller keeps in eval mode
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = features.features(net, x, 2, batch_size=4)
    assert net.calls == [(n, torch.float32, False, False, False) for n in (4, 4, 3)]
    assert net.training and net.fc.training and net.bn.training and not net.frozen.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    h = (net.fc(x.flatten(1)) - 0.3) / math.sqrt(2 + 1e-5)
    torch.testing.assert_close(out, (h / h.norm(dim=1, keepdim=True)).detach())
    assert out.dtype == torch.float32 and out.device.type == "cpu" and not out.requires_grad


def test_features_put_the_mode_back_when_the_data_breaks(monkeypatch):
    def broken(images, img_size, *, batch_size, device, **preparation):
        yield images[:2]
        raise ValueError("broken image")
    monkeypatch.setattr(features, "eval_batches", broken)
    net = Tiny().train()
    with pytest.raises(ValueError, match="broken image"):
        features.features(net, torch.zeros(5, 3, 2, 2), 2)
    assert net.training and net.bn.training


# ---- checkpoints ---------------------------------------------------------------------------------

def checkpoint(path, arch="vit_nano", patch_size=8, img_size=32, in_small=True, **args):
    """Write a checkpoint as train.py does; returns its content. Student and teacher differ."""
    torch.manual_seed(0)
    args = dict(arch=arch, patch_size=patch_size, img_size=img_size, method="carp",
                prototypes="decoupled", num_prototypes=64, data="shapes", data_root="data", seed=0,
                imbalance=1.0) | args
    ckpt = {"version": 1, "step": 123, "args": args}
    ckpt |= {"rng": {}, "gmm": {}, "loss": {}, "optimizer": {}}
    for name in ("student", "teacher"):
        net = models.build(arch, patch_size=patch_size, img_size=img_size, in_small=in_small)
        ckpt[name] = {"head.0.weight": torch.zeros(2, 2)}
        ckpt[name] |= {f"backbone.{key}": w for key, w in net.state_dict().items()}
    torch.save(ckpt, path)
    return ckpt


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_load_backbone_from_file_and_directory(tmp_path, which):
    ckpt = checkpoint(tmp_path / "ckpt.pt")
    for path in (tmp_path, tmp_path / "ckpt.pt", str(tmp_path)):
        net, args, description = backbones.load_backbone(path, which)
        assert args == ckpt["args"] and not net.training and net.arch == "vit_nano"
        for key, w in net.state_dict().items():
            assert torch.equal(w, ckpt[which]["backbone." + key])
        for word in ("ckpt.pt", "step 123", "carp", "decoupled", "K = 64", which, "vit_nano"):
            assert word in description
        assert "\n" not in description
    a, b = (ckpt[net]["backbone.cls_token"] for net in ("teacher", "student"))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("in_small", [True, False])
def test_load_backbone_knows_the_stem_of_a_resnet(tmp_path, in_small):
    checkpoint(tmp_path / "ckpt.pt", arch="resnet18", patch_size=16, in_small=in_small)
    net, _, _ = backbones.load_backbone(tmp_path)
    assert net.conv1.kernel_size == ((3, 3) if in_small else (7, 7))


def test_load_backbone_refuses_in_one_sentence(tmp_path):
    good = checkpoint(tmp_path / "good.pt")

    def refused(words, name, which="teacher", content=None):
        if content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=words) as error:
            backbones.load_backbone(tmp_path / name, which)
        assert "\n" not in str(error.value)

    refused("absent.pt: no such file", "absent.pt")
    (tmp_path / "empty").mkdir()
    refused("ckpt.pt: no such file", "empty")
    whole = (tmp_path / "good.pt").read_bytes()
    broken = {"cut.pt": whole[:len(whole) // 2], "nothing.pt": b"", "text.pt": b"hello\n" * 50,
              "page.pt": b"<!DOCTYPE html><html>"}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    refused("cut.pt: cannot be read, it is cut short or damaged", "cut.pt")
    refused("nothing.pt: the file is empty", "nothing.pt")
    refused("text.pt: this is plain text, not a checkpoint", "text.pt")
    refused("page.pt: this is a web page", "page.pt")
    torch.save({"net": types.SimpleNamespace()}, tmp_path / "pickle.pt")  # unsafe: never run
    refused("pickle.pt: refused, it wants to build types.SimpleNamespace", "pickle.pt")
    refused("list.pt is not a checkpoint of a run of ours; .*--arch", "list.pt", content=[1, 2])
    refused("lacks args, step, teacher; .* --arch", "foreign.pt", content={"state_dict": {}})
    dino = {"teacher": good["teacher"], "epoch": 3, "args": argparse.Namespace(arch="vit_small")}
    refused("lacks args, step; .* --arch", "dino.pt", content=dino)
    refused("lacks args, teacher", "plain.pt", content=good | {"args": None, "teacher": [1]})
    half = {key: good[key] for key in ("args", "step", "teacher")}
    refused("lacks student", "half.pt", "student", half)
    few_args = {"arch": "vit_nano", "patch_size": 8}
    refused(r"lacks args\['img_size'\]", "args.pt", content=good | {"args": few_args})
    for key, value in (("img_size", "32"), ("arch", 3), ("seed", None), ("imbalance", "10"),
                       ("mean", [0.5]), ("std", "half"), ("data_seen", []), ("script", 3)):
        args = good["args"] | {key: value}
        refused(re.escape(f"type.pt: its args give {key} as {value!r}"), "type.pt",
                content=good | {"args": args})
    for arch in ("vit_tiny", "vit_none"):
        args = good["args"] | {"arch": arch}
        refused(f"do not fit.*{arch}", "arch.pt", content=good | {"args": args})
    gone = good | {"args": good["args"] | {"script": "zoo/gone.py"}}
    refused(r"gone.pt holds a run of zoo/gone.py, which is not here", "gone.pt", content=gone)
    teacher = {key: w for key, w in good["teacher"].items() if key != "backbone.cls_token"}
    refused("do not fit.*cls_token", "keys.pt", content=good | {"teacher": teacher})
    refused("--which ema is neither teacher nor student", "good.pt", "ema")


def test_runs_of_other_scripts_are_read_as_those_of_train(tmp_path):
    """A script of zoo/ names itself in its args, and may have no method and other prototypes."""
    ckpt = checkpoint(tmp_path / "ckpt.pt", script="train.py")
    assert "step 123, carp with decoupled" in backbones.load_backbone(tmp_path)[2]
    ckpt["args"] = {"script": "zoo/ibot.py", "arch": "vit_nano", "patch_size": 8, "img_size": 32,
                    "num_prototypes": 64}
    torch.save(ckpt, tmp_path / "ckpt.pt")
    for which in ("teacher", "student"):
        net, args, description = backbones.load_backbone(tmp_path, which)
        assert torch.equal(net.cls_token, ckpt[which]["backbone.cls_token"])
        assert f"step 123, zoo/ibot.py (K = 64), {which} vit_nano" in description


def test_the_copies_in_a_file(tmp_path):
    a, b, c = torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.ones(3)
    torch.save({"teacher": {"module.backbone.pos_embed": a, "module.head.last.weight": c},
                "student": {"backbone.pos_embed": b}, "extra": {"x": c}}, tmp_path / "f.pt")
    theirs, others, copy = backbones.find(tmp_path / "f.pt", "teacher", "vit_nano")
    assert torch.equal(theirs["pos_embed"], a) and list(theirs) == ["pos_embed"]
    assert (others, copy) == (["head.last.weight"], "teacher")
    theirs, others, copy = backbones.find(tmp_path / "f.pt", "student", "vit_nano")
    assert torch.equal(theirs["pos_embed"], b) and (others, copy) == ([], "student")
    torch.save({"one.pos_embed": a, "two.pos_embed": b}, tmp_path / "f.pt")
    with pytest.raises(ValueError, match="f.pt holds several networks that may .*: one, two$"):
        backbones.find(tmp_path / "f.pt", "teacher", "vit_nano")


@pytest.mark.parametrize("arch, small", [("vit_nano", False), ("resnet18", True)])
def test_the_untrained_network_has_the_shape_of_the_trained_one(arch, small):
    net = models.build(arch, patch_size=8, img_size=32, in_small=small)
    before = torch.random.get_rng_state()
    args = {"img_size": 32}
    twin, same = backbones.untrained(net, args, 3), backbones.untrained(net, args, 3)
    assert torch.equal(before, torch.random.get_rng_state())
    weights, others = net.state_dict(), backbones.untrained(net, args, 4).state_dict()
    for name, w in twin.state_dict().items():
        assert w.shape == weights[name].shape and torch.equal(w, same.state_dict()[name])
    assert any(not torch.equal(w, others[name]) for name, w in twin.state_dict().items())
    assert any(not torch.equal(w, weights[name]) for name, w in twin.state_dict().items())


# ---- which data is a run's own -------------------------------------------------------------------

def test_two_paths_of_a_folder_are_the_same_data(tmp_path, monkeypatch):
    (tmp_path / "tail").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "tail")
    (tmp_path / "shapes").mkdir()
    monkeypatch.chdir(tmp_path)
    args = {"data": str(tmp_path / "tail")}
    for name in ("tail", "tail/", "./link", str(tmp_path / "link"), str(tmp_path / "tail")):
        assert evaluation.is_own_name(name, args), name
    for name in ("shapes", "nowhere", str(tmp_path), "cifar10"):
        assert not evaluation.is_own_name(name, args), name
    # a named set is not the folder of that name
    assert not evaluation.is_own_name("./shapes", {"data": "shapes"})
    assert evaluation.is_own_name("shapes", {"data": "shapes"})
    assert not evaluation.is_own_name("shapes", {})
    assert not evaluation.is_own_name("shapes", {"data": None})


def test_a_long_tail_of_ones_own_folder_is_found_by_any_of_its_paths(tmp_path, monkeypatch):
    write_images(tmp_path / "images", "train", (20, 20))
    write_images(tmp_path / "images", "val", (2, 2), seed=1)
    monkeypatch.chdir(tmp_path)
    args = {"data": str(tmp_path / "images"), "img_size": 32, "imbalance": 10.0, "seed": 3}
    own, _, is_own = evaluation.load_images(str(tmp_path / "images"), args)
    assert is_own
    for name in ("images", "images/", "../" + tmp_path.name + "/images"):
        assert torch.equal(evaluation.load_images(name, args)[0].x, own.x) and len(own) == 22
    (tmp_path / "copy").symlink_to(tmp_path / "images")
    assert len(evaluation.load_images("copy", args)[0]) == 22
    assert len(evaluation.load_images("images", args | {"data": "shapes"})[0]) == 40


def test_a_run_knows_its_images_in_a_moved_folder_and_says_when_they_changed(tmp_path, capsys):
    """What a checkpoint remembers of its images decides, not their path alone."""
    write_images(tmp_path / "images", "train", (20, 20))
    write_images(tmp_path / "images", "val", (2, 2), seed=1)
    images = str(tmp_path / "images")
    tail, _ = data.load(images, imbalance=10, seed=3)
    args = {"data": images, "img_size": 32, "imbalance": 10.0, "seed": 3,
            "data_seen": data.identity(tail, images) | {"steps": 7}}
    os.rename(images, moved := str(tmp_path / "moved"))
    again, _, own = evaluation.load_images(moved, args)
    assert own and torch.equal(again.x, tail.x) and len(again) == 22
    _, _, own = evaluation.load_images(moved, args | {"seed": 4})  # another draw is not its own
    assert not own
    os.rename(moved, images)
    assert "note" not in capsys.readouterr().err
    os.remove(tmp_path / "images/train/class1/0.png")
    _, _, own = evaluation.load_images(images, args)
    assert own and "the run was trained on 22 images of 2 classes" in capsys.readouterr().err


@pytest.mark.parametrize("own", [True, False])
def test_mean_and_std_of_the_pixels(tmp_path, capsys, own):
    """They come from the flags, else from the run; they are printed, and other ones are other
    features."""
    write_images(tmp_path / "images", "train", (4, 4))
    write_images(tmp_path / "images", "val", (2, 2), seed=1)
    if own:
        checkpoint(tmp_path / "ckpt.pt", data=str(tmp_path / "images"), mean=[.1, .2, .3],
                   std=[.4, .5, .6])
        path, printed, mean, std = tmp_path, "less 0.1 0.2 0.3, over 0.4 0.5 0.6", .1, .4
        flags = []
    else:
        torch.save(models.build("vit_nano", patch_size=8, img_size=32).state_dict(),
                   tmp_path / "theirs.pth")
        path, printed, mean, std = tmp_path / "theirs.pth", "less 0.485 0.456", .485, .229
        flags = ["--arch", "vit_nano", "--data", tmp_path / "images"]
    command(path, *flags, "--k", 1, "--dump", tmp_path / "a.pt")
    assert printed in capsys.readouterr().out
    command(path, *flags, "--k", 1, "--dump", tmp_path / "b.pt", "--mean", .5, .5, .5, "--std", .5,
            .5, .5)
    assert "less 0.5 0.5 0.5, over 0.5 0.5 0.5" in capsys.readouterr().out
    a, b = (torch.load(tmp_path / f, weights_only=True)["test_x"] for f in ("a.pt", "b.pt"))
    assert not torch.allclose(a, b)
    net = backbones.load_backbone(path, arch=None if own else "vit_nano")[0]
    _, test = data.load(str(tmp_path / "images"))
    x = test.x / 255  # (4, 3, 32, 32)
    with torch.no_grad():
        half = F.normalize(net((x - .5) / .5)[0], dim=1)
        red = next(views.eval_batches(test, 32, mean=[mean, 0, 0], std=[std, 1, 1]))[:, 0]
    torch.testing.assert_close(b, half)
    torch.testing.assert_close(red, (x[:, 0] - mean) / std)


# ---- command line --------------------------------------------------------------------------------

def command(*flags):
    return eval_knn.main([*map(str, flags), "--device", "cpu"])


def write_images(root, split, counts, seed=0):
    """Noise images of 32 px: class 0 reddish, class 1 bluish, separable by any backbone that sees
    colour."""
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
    out = command(tmp_path, "--k", 1, 5, 200, "--dump", tmp_path / "f.pt", "--batch-size", 4)
    text = capsys.readouterr().out
    assert out["knn"][1] == 100 and out["knn"][5] == 100 and set(out["knn"]) == {1, 5, 200}
    assert out["guess"] == pytest.approx(40)
    assert (out["train"], out["test"], out["which"]) == (24, 15, "teacher")
    for words in ("step 123", "bank of 24 images, 15 test images, 2 classes", "T = 0.07",
                  "teacher's cls feature (96-d", "centre-cropped to 32 px", "protocol knn-2",
                  "all 24 of the bank", "guess"):
        assert words in text
    cells = [line.split() for line in text.splitlines()]
    printed = {int(line[0]): float(line[1]) for line in cells if line[0].isdigit()}
    assert printed == pytest.approx(out["knn"], abs=0.01)

    dump = torch.load(tmp_path / "f.pt", weights_only=True)
    assert {key: tuple(value.shape) for key, value in dump.items()} == {
        "train_x": (24, 96), "train_y": (24,), "test_x": (15, 96), "test_y": (15,)}
    assert knn_accuracy(**dump, ks=(1, 5, 200)) == out["knn"]
    command(tmp_path / "ckpt.pt", "--which", "student", "--dump", tmp_path / "s.pt")
    student = torch.load(tmp_path / "s.pt", weights_only=True)
    assert not torch.allclose(student["test_x"], dump["test_x"])
    assert torch.equal(student["test_y"], dump["test_y"])
    assert ckpt["args"]["data"] in capsys.readouterr().out


def test_command_line_appends_results_and_keeps_features(tmp_path, capsys, monkeypatch):
    write_images(tmp_path / "images", "train", (14, 10))
    write_images(tmp_path / "images", "val", (6, 9), seed=1)
    checkpoint(tmp_path / "ckpt.pt", data=str(tmp_path / "images"))
    out = command(tmp_path, "--k", 3, 5)
    assert len(list((tmp_path / "features").iterdir())) == 2
    monkeypatch.setattr(backbones, "features", None)  # the second time nothing is computed
    assert command(tmp_path, "--k", 3, 5, "--T", 0.5)["test"] == 15
    with open(tmp_path / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["result"] for row in rows] == ["k=3", "k=5", "guess"] * 2
    for row, k in zip(rows, (3, 5)):
        assert float(row["all"]) == out["knn"][k] and row["protocol"] == eval_knn.PROTOCOL
        assert row["settings"] == "T=0.07 leave_one_out=False"
        assert row["train"] == "24" and row["head"] == "" and row["metric"] == "top1"
    assert rows[3]["settings"] == "T=0.5 leave_one_out=False"
    weights = backbones.fingerprint(backbones.load_backbone(tmp_path)[0])
    assert {row["weights"] for row in rows} == {weights}
    assert {row["which"] for row in rows} == {"teacher"}
    assert list(rows[0]) == [
        "time", "tool", "protocol", "checkpoint", "weights", "which", "arch", "method",
        "prototypes", "num_prototypes", "data",
        "mean", "std", "train", "test", "img_size", "layers", "pool",
        "seed", "head_above", "tail_below", "settings", "result", "metric", "all", "head", "medium",
        "tail", "per_class"]
    monkeypatch.undo()
    capsys.readouterr()
    command(tmp_path / "ckpt.pt", "--no-cache", "--results", tmp_path / "mine.csv")
    assert "read from" not in capsys.readouterr().out and (tmp_path / "mine.csv").exists()
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 7
    command(tmp_path, "--no-cache", "--results", tmp_path / "results.csv")  # its own, by name
    assert len((tmp_path / "results.csv").read_text().splitlines()) > 7


def test_command_line_takes_the_mean_of_the_patches(tmp_path, capsys):
    write_images(tmp_path / "images", "train", (8, 6))
    write_images(tmp_path / "images", "val", (3, 3), seed=1)
    checkpoint(tmp_path / "ckpt.pt", data=str(tmp_path / "images"))
    net = backbones.load_backbone(tmp_path)[0]
    train, _ = data.load(str(tmp_path / "images"), img_size=32)
    with torch.no_grad():
        cls, patches = net(torch.cat(list(views.eval_batches(train, 32))))  # (14, 96), (14, n, 96)
    for pool, D, x in (("mean", 96, patches.mean(1)), ("cls", 96, cls),
                       ("cls+mean", 192, torch.cat([cls, patches.mean(1)], 1))):
        out = command(tmp_path, "--pool", pool, "--k", 3, "--dump", tmp_path / "f.pt")
        assert f"teacher's {pool} feature ({D}-d" in capsys.readouterr().out
        dump = torch.load(tmp_path / "f.pt", weights_only=True)
        torch.testing.assert_close(dump["train_x"], x / x.norm(dim=1, keepdim=True))
        assert out["knn"] == knn_accuracy(**dump, ks=(3,))
    with open(tmp_path / "results.csv", newline="") as f:
        assert [row["pool"] for row in csv.DictReader(f)] == [
            "mean", "mean", "cls", "cls", "cls+mean", "cls+mean"]


def test_command_line_leave_one_out_where_there_is_no_test_split(tmp_path, capsys):
    write_images(tmp_path / "images", "train", (9, 8))
    for c in range(2):
        folder = tmp_path / "single" / f"class{c}"
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), ("red", "blue")[c]).save(folder / "0.png")
    checkpoint(tmp_path / "ckpt.pt", data=str(tmp_path / "single"))
    with pytest.raises(SystemExit):  # a class's only image is never held out
        command(tmp_path)
    assert "no test split: --leave-one-out" in capsys.readouterr().err
    out = command(tmp_path, "--leave-one-out", "--k", 1, 5)
    assert out["knn"] == {1: 0, 5: 0}  # only an image of the other class is left
    assert (out["train"], out["test"]) == (2, 2)
    text = capsys.readouterr().out
    assert "each image against all others" in text and "(all 1 of the bank)" in text
    out = command(tmp_path, "--data", tmp_path / "images" / "train", "--k", 3, "--leave-one-out")
    # 15: of the 17 images a tenth of each class serves as the test split
    assert out["knn"][3] == 100 and out["train"] == out["test"] == 15


def test_command_line_on_a_long_tailed_run(tmp_path, capsys):
    """Training itself on a long tail, then k-NN by groups beside the prototypes that each group
    has."""
    write_images(tmp_path / "images", "train", (40, 40))
    write_images(tmp_path / "images", "val", (5, 5), seed=1)
    train.main(["--data", str(tmp_path / "images"), "--out", str(tmp_path / "run"),
                *"--imbalance 10 --steps 1 --batch-size 8 --prototypes frozen --num-prototypes 32 "
                "--partition-size 16 --head-hidden 16 --bottleneck-dim 16 --device cpu".split()])
    capsys.readouterr()
    out = command(tmp_path / "run", "--k", 3, "--head", 30, "--tail", 10)
    text, share = capsys.readouterr().out, out["prototypes"]
    table, guess = out["groups"][3], out["groups"]["guess"]
    assert table["classes"] == {"head": 1, "medium": 0, "tail": 1} and out["train"] == 44
    assert table["head"] is not None and table["medium"] is None
    assert guess["head"] == 100 and guess["tail"] == 0 and out["guess"] == 50
    assert sum(share.values()) == pytest.approx(100) and share["head"] > 0 and share["medium"] == 0
    for words in ("head (1)", "tail (1)", "prototypes", "head: classes of more than 30",
                  "tail: of fewer than 10"):
        assert words in text
    assert "medium (" not in text  # a group without classes has no column
    images, _ = data.load(str(tmp_path / "images"), imbalance=10)
    won, K = eval_knn.winners(tmp_path / "run", images)
    assert K == 32 and won.shape == (44,)
    assert len(set(won.tolist())) / K == pytest.approx(1 - share["unused"] / 100)
    out = command(tmp_path / "run", "--k", 3)  # classes of 40 and 4 images
    assert out["groups"][3]["classes"] == {"head": 0, "medium": 1, "tail": 1}
    assert out["prototypes"] is not None
    capsys.readouterr()
    out = command(tmp_path / "run", "--k", 3, "--head", 3, "--tail", 4)  # one group alone
    assert out["prototypes"] is None and "head (" not in capsys.readouterr().out


def test_command_line_takes_weights_of_others(tmp_path, capsys):
    write_images(tmp_path / "images", "train", (7, 7))
    write_images(tmp_path / "images", "val", (3, 3), seed=1)
    torch.manual_seed(0)
    net = models.build("vit_nano", patch_size=8, img_size=32)
    torch.save(net.state_dict(), tmp_path / "foreign.pth")
    with pytest.raises(SystemExit):
        command(tmp_path / "foreign.pth", "--arch", "vit_nano")
    assert "does not say on what data it was trained: give --data" in capsys.readouterr().err
    common = [tmp_path / "foreign.pth", "--arch=vit_nano", "--data", tmp_path / "images"]
    out = command(*common, "--k", 3, "--dump", tmp_path / "a.pt")
    assert out["knn"][3] == 100 and out["prototypes"] is None
    larger = command(*common, "--k", 3, "--img-size", 64, "--dump", tmp_path / "b.pt")
    assert larger["train"] == 14 and "centre-cropped to 64 px" in capsys.readouterr().out
    a, b = (torch.load(tmp_path / f, weights_only=True)["test_x"] for f in ("a.pt", "b.pt"))
    assert not torch.allclose(a, b) and torch.allclose(a.norm(dim=1), torch.ones(6))
    _, test = data.load(str(tmp_path / "images"))
    x = torch.cat(list(views.eval_batches(test, 32)))  # (6, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(a, F.normalize(net.eval()(x)[0], dim=1))
    for flag in ("--patch-size 16", "--arch vit_huge"):
        with pytest.raises(SystemExit) as stop:
            command(*common, *flag.split())
        assert stop.value.code == 2 and flag in capsys.readouterr().err


def test_command_line_gives_the_data_what_the_run_had(tmp_path, monkeypatch):
    calls = []

    def load(name, **kwargs):
        calls.append((name, kwargs))
        raise ValueError("enough")
    monkeypatch.setattr(data, "load", load)
    checkpoint(tmp_path / "ckpt.pt", seed=3, imbalance=50.0, imbalance_law="power",
               data_root="there")
    for extra in ([], ["--data", "cifar10"], ["--data", "shapes", "--data-root", "here"]):
        with pytest.raises(SystemExit):
            command(tmp_path, *extra)
    run, tail = dict(seed=3, img_size=32), dict(imbalance=50.0, imbalance_law="power")
    whole = {}
    assert calls == [("shapes", dict(root="there", **tail, **run)),  # the run's long-tailed bank
                     ("cifar10", dict(root="there", **whole, **run)),  # other data: as it is
                     ("shapes", dict(root="here", **tail, **run))]


@pytest.mark.parametrize("flags, words", [
    (["--data", "{tmp}/loose"], "loose.*no labels"),
    (["--data", "{tmp}/nowhere"], "nowhere"),
    (["--k", "0"], "k must be at least 1, got 0"),
    (["--T", "0"], "T must be at least 0.0121, or 200 votes"),
    (["--batch-size", "0"], "--batch-size.*0"),
    (["--dump", "{tmp}/no/such/f.pt"], "--dump .*no/such"),
    (["--dump", "{tmp}"], "--dump"),
    (["--dump", "{tmp}/f.csv", "--results", "{tmp}/f.csv"], "would overwrite the file of another"),
    (["--device", "abacus"], "--device abacus"),
    (["--device", "meta"], "--device meta"),
    (["--device", "hpu"], "--device hpu"),
    (["--dump", "/dev/null"], "--dump /dev/null must be a file"),
    (["--head", "5", "--tail", "50"], "--tail 50 must be at most --head 5 plus 1"),
    (["--tail", "-1"], "--tail must not be negative, got -1"),
    (["--k", "20", "9" * 20], f"--k must be a number below 4294967296 in size, got 20 {'9' * 20}"),
    (["--T", "inf"], "--T must be a number below 4294967296 in size, got inf"),
    (["--T", "nan"], "--T must be a number below 4294967296 in size, got nan"),
    (["--batch-size", "9" * 400], "--batch-size must be a number below"),
    (["--patch-size", "0"], "--patch-size must be at least 1, got 0"),
    (["--dump", ""], "--dump must not be empty"),
    (["--results", "{tmp}"], "--results .* must be a file in a folder that exists"),
    (["--dump", "{tmp}/results.csv"], "--dump .*results.csv would overwrite a file that is read"),
    (["--results", "{tmp}/ckpt.pt/r.csv"], "--results .*ckpt.pt/r.csv must be a file"),
    (["--mean", "0.5", "0.5", "nan"], "--mean must lie in .0, 1., got 0.5 0.5 nan"),
    (["--std", "0.5", "0", "0.5"], "--std must be positive, got 0.5 0.0 0.5"),
])
def test_command_line_refuses_with_exit_2(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.delattr(backbones, "cached")  # refused before the long work, not after it
    write_images(tmp_path / "images", "train", (2, 2))
    write_images(tmp_path / "images", "val", (1, 1))
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "loose" / "a.png")
    checkpoint(tmp_path / "ckpt.pt", data=str(tmp_path / "images"))
    (tmp_path / "results.csv").write_text("time,tool\n")  # earlier numbers of this run
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        eval_knn.main([str(tmp_path), "--device=cpu", *flags])
    err = capsys.readouterr().err
    *notes, sentence = err.splitlines()  # what was read stands before
    assert stop.value.code == 2 and sentence.startswith("eval_knn.py: ")
    assert re.search(words, sentence) and all(note.startswith("--data ") for note in notes)


def no_space(path, put, old_name=None):
    """A stand-in for files.write on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def test_a_full_disk_is_one_sentence_after_the_numbers(tmp_path, capsys, monkeypatch):
    write_images(tmp_path / "images", "train", (4, 4))
    write_images(tmp_path / "images", "val", (2, 2), seed=1)
    checkpoint(tmp_path / "ckpt.pt", data=str(tmp_path / "images"))
    monkeypatch.setattr(evaluation, "write", no_space)
    with pytest.raises(SystemExit) as stop:
        command(tmp_path, "--k", 1, "--dump", tmp_path / "f.pt")
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert err.endswith(f"eval_knn.py: error: {tmp_path / 'f.pt'}: No space left on device\n")
    assert " 100.00 " in out and "the numbers are not kept: " in out and "written" not in out


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_link_that_leads_nowhere_is_left_out_and_counted(tmp_path, capsys, monkeypatch,
                                                           in_memory):
    if not in_memory:
        monkeypatch.setattr(data, "IN_MEMORY", 0)
    write_images(tmp_path / "images", "train", (4, 4))
    write_images(tmp_path / "images", "val", (2, 2), seed=1)
    (tmp_path / "images/train/class0/9.png").symlink_to(tmp_path / "nowhere.png")
    checkpoint(tmp_path / "ckpt.pt", data=str(tmp_path / "images"))
    out = command(tmp_path, "--k", 1)
    assert out["train"] == 8 and "links that lead nowhere (1)" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_named(tmp_path, capsys):
    write_images(tmp_path / "images", "train", (4, 4))
    write_images(tmp_path / "images", "val", (2, 2), seed=1)
    ckpt = checkpoint(tmp_path / "ckpt.pt", data=str(tmp_path / "images"))
    ckpt["teacher"]["backbone.norm.weight"][3] = math.nan
    torch.save(ckpt, tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit) as stop:
        command(tmp_path)
    assert stop.value.code == 2
    assert f"{tmp_path}: its network gives features that are not finite" in capsys.readouterr().err


def test_what_a_training_run_imports_of_this_file_is_little():
    """train.py imports eval_knn.py for knn_accuracy: what only the command needs stays out."""
    root = Path(eval_knn.__file__).parent
    code = ("import sys, eval_knn; print(*(name for name in sys.modules if name.split('.')[0] in "
            "('data', 'fast', 'heads', 'models', 'support', 'views')))")
    result = forked.run([sys.executable, "-c", code], cwd=root, capture_output=True)
    assert result.stdout.split() == [] and result.returncode == 0


def test_prototypes_are_counted_for_the_teacher_alone_and_images_as_it_saw_them(monkeypatch,
                                                                               capsys):
    monkeypatch.setattr(eval_knn, "winners", lambda path, images, device: (torch.tensor([0, 1]), 4))
    counts, train = torch.tensor([200, 5]), argparse.Namespace(y=torch.tensor([0, 1]))
    y = torch.tensor([0, 1])
    found = {}
    for which, img_size in (("teacher", None), ("student", None), ("teacher", 64)):
        flags = argparse.Namespace(arch=None, which=which, head=100, tail=20, checkpoint="x",
                                   device="cpu", img_size=img_size, mean=None, std=None)
        table = groups.report(y, y, counts, 100, 20)
        found[which, img_size] = eval_knn.prototype_share(flags, train, counts, {1: table})
    assert found["teacher", None] == {"head": 25, "medium": 0, "tail": 25, "unused": 50}
    assert found["student", None] is None and found["teacher", 64] is None
    assert "not counted with --img-size: they won the images" in capsys.readouterr().out
