"""Tests of eval_knn.py and groups.py: the classifier against float64 loops, its memory, features, checkpoints, head /
medium / tail, the command line."""
import csv
import math
import re
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import eval_knn
from support import features as features_py
from support import groups
import models
import train
from eval_knn import knn_accuracy, knn_predict, knn_scores


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
    train_x = torch.tensor([[2.0, 0], [0, 5], [-1, 0]])  # cosines with (1, 0): 1, 0, -1
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
    monkeypatch.setattr(eval_knn, "QUERIES", queries)
    torch.testing.assert_close(knn_scores(train_x, train_y, test_x, k=50), wanted, rtol=1e-4, atol=1e-2)
    assert knn_accuracy(train_x, train_y, test_x, test_y) == accuracy


@pytest.mark.parametrize("k, D, classes", [(20, 16, 10), (200, 16, 10), (20, 256, 3000), (3000, 8, 10)])
def test_no_tensor_is_larger_than_the_budget(monkeypatch, k, D, classes):
    train_x, train_y, test_x, test_y = sample(4000, 400, D, classes)
    monkeypatch.setattr(eval_knn, "BUDGET", 2 * 2**20)  # the (M, N) matrix would take 6.1 MiB
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
    assert len(set(accuracy.values())) > 1 and min(accuracy.values()) > 100 / 8  # the set tells the ks apart


def test_many_and_scattered_labels():
    train_x, train_y, test_x, test_y = sample(300, 40)
    wanted = knn_accuracy(train_x, train_y, test_x, test_y)
    apart = torch.tensor([3, 1500, 1501, 40_000, 2])
    scores = knn_scores(train_x, apart[train_y], test_x)
    assert scores.shape == (40, 40_001)
    torch.testing.assert_close(scores[:, apart], knn_scores(train_x, train_y, test_x))
    huge = torch.tensor([-7, 10**12, 5, 0, 10**9])  # a column per value would not fit anywhere
    assert knn_accuracy(train_x, huge[train_y], test_x, huge[test_y]) == wanted
    assert set(knn_accuracy(train_x, train_y, test_x, test_y + 5).values()) == {0}  # classes that the bank lacks


@pytest.mark.parametrize("rows", [60, 25, 7])
def test_equal_similarities_go_to_the_smaller_bank_index(monkeypatch, rows):
    monkeypatch.setattr(eval_knn, "QUERIES", 1)
    monkeypatch.setattr(eval_knn, "ROWS", rows)  # one block; 2 and a rest; 8 and a rest
    train_x, test_x = torch.eye(4)[torch.arange(60) % 3], torch.eye(4)[[0, 2]]  # 20 copies each of three directions
    got = torch.cat([index for _, _, index in eval_knn.neighbours(train_x, test_x, 5)])
    assert got.tolist() == [[0, 3, 6, 9, 12], [2, 5, 8, 11, 14]]
    _, sim, index = next(eval_knn.neighbours(train_x, test_x, 25))  # all 20 of cosine 1, then 5 of cosine 0
    assert index[0].tolist() == list(range(0, 60, 3)) + [1, 2, 4, 5, 7] and sim[0].tolist() == [1.0] * 20 + [0.0] * 5


def test_collapsed_features_vote_for_the_first_images():
    """All features equal: every similarity is tied, and the answer must still not depend on anything but the order."""
    train_x, train_y = torch.eye(1, 8).repeat(500, 1), torch.arange(500) % 4 // 3  # labels 0 0 0 1 0 0 0 1
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


def test_keys_sort_as_similarity_then_index():
    sim = torch.tensor([-math.inf, -1.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0]).repeat(3)
    index = torch.tensor([0, 7, 2**32 - 1]).repeat_interleave(9)
    keys = eval_knn.to_keys(sim, index)
    wanted = sorted(range(27), key=lambda i: (-float(sim[i]), int(index[i])))
    order = keys.argsort(descending=True)
    assert torch.equal(sim[order], sim[wanted]) and torch.equal(index[order], index[wanted])
    assert keys.unique().numel() == 24  # 0 and -0 are one similarity, all else differs
    back, place = eval_knn.from_keys(keys)
    assert torch.equal(back, sim) and torch.equal(place, index)


@pytest.mark.parametrize("order", ["shuffled", "by class", "rising", "falling", "periodic"])
@pytest.mark.parametrize("k", [1, 20, 45, 611])
def test_search_is_a_stable_sort_for_any_order_of_the_bank(monkeypatch, order, k):
    """Axes and diagonals of four dimensions: every cosine is a multiple of 1/4, exact in any order of summation, and
    nearly every neighbour is tied."""
    g = torch.Generator().manual_seed(3)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)  # (16, 4)
    directions = torch.cat([torch.eye(4), -torch.eye(4), corners, torch.zeros(1, 4)])  # (25, 4)
    label, test_x = torch.randint(25, (611,), generator=g), directions[torch.randint(25, (37,), generator=g)]
    near = directions[label] @ test_x[3]
    train_x = directions[label[{"shuffled": torch.arange(611), "by class": label.argsort(), "rising": near.argsort(),
                                "falling": near.argsort(descending=True),
                                "periodic": torch.arange(611 * 13).view(611, 13).T.flatten() % 611}[order][:611]]]
    exact = F.normalize(test_x, dim=1) @ F.normalize(train_x, dim=1).T
    wanted, place = exact.sort(dim=1, descending=True, stable=True)
    monkeypatch.setattr(eval_knn, "ROWS", 48)  # 12 blocks and 35 rows, or fewer blocks of k
    monkeypatch.setattr(eval_knn, "GROUP", 8)  # of 48: whole groups; of 35: one group
    monkeypatch.setattr(eval_knn, "QUERIES", 16)
    blocks = list(eval_knn.neighbours(train_x, test_x, k))
    assert [i for i, _, _ in blocks] == [0, 16, 32]
    assert torch.equal(torch.cat([sim for _, sim, _ in blocks]), wanted[:, :k])
    assert torch.equal(torch.cat([index for _, _, index in blocks]), place[:, :k])


@pytest.mark.parametrize("rows, queries", [(4096, 2048), (13, 5), (60, 7)])
def test_leave_one_out_by_index(monkeypatch, rows, queries):
    train_x, train_y, _, _ = sample(120, 1)
    train_x[100:] = train_x[:20]  # copies: they stay neighbours of each other
    train_y[100:] = train_y[:20]
    monkeypatch.setattr(eval_knn, "ROWS", rows)
    monkeypatch.setattr(eval_knn, "QUERIES", queries)
    predicted = knn_predict(train_x, train_y, train_x, ks=(1, 7), leave_one_out=True)  # many blocks
    predicted |= knn_predict(train_x, train_y, train_x, ks=(500,), leave_one_out=True)  # k 119: one
    for i in range(120):
        others = torch.arange(120) != i
        for k in (1, 7, 500):
            scores = loop_scores(train_x[others], train_y[others], train_x[i:i + 1], k, 0.07, 5)
            assert predicted[k][i] == scores[0].argmax(), (i, k)
    assert torch.equal(predicted[1][:20], train_y[:20])  # the copy at index 100 + i votes
    plain = knn_predict(train_x, train_y, train_x, ks=(1,))[1]
    assert torch.equal(plain, train_y) and not torch.equal(predicted[1], train_y)
    got = torch.cat([index for _, _, index in eval_knn.neighbours(train_x, train_x, 119, leave_one_out=True)])
    assert all(sorted(got[i].tolist()) == [j for j in range(120) if j != i] for i in range(120))


def test_leave_one_out_with_a_class_of_one_image_and_its_errors():
    train_x, train_y = torch.eye(4)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 1])
    assert knn_predict(train_x, train_y, train_x, ks=[2], leave_one_out=True)[2].tolist() == [0, 0, 0, 0]
    for bank, queries in ((4, 3), (1, 1)):
        with pytest.raises(ValueError, match=f"leave-one-out needs .*{bank} in the bank and {queries} queries"):
            knn_predict(train_x[:bank], train_y[:bank], train_x[:queries], leave_one_out=True)


# ------------------------------------------------------------------------------------------------- head, medium, tail

def test_groups_by_hand():
    counts = torch.tensor([500, 101, 100, 20, 19, 1, 0])  # head head medium medium tail tail tail
    y = torch.tensor([0, 0, 0, 0, 1, 2, 2, 3, 4, 5, 6])
    pred = torch.tensor([0, 0, 0, 1, 1, 2, 0, 3, 0, 5, 0])
    out = groups.report(pred, y, counts)
    assert out["classes"] == {"head": 2, "medium": 2, "tail": 3}
    assert out["all"] == pytest.approx(100 * 7 / 11) and out["head"] == pytest.approx(80)
    assert out["medium"] == pytest.approx(100 * 2 / 3) and out["tail"] == pytest.approx(100 / 3)
    assert out["per_class"] == pytest.approx(100 * (3 / 4 + 1 + 1 / 2 + 1 + 0 + 1 + 0) / 7)
    moved = groups.report(pred, y, counts, head=19, tail=1)  # 500 101 100 20 | 19 1 | 0
    assert moved["classes"] == {"head": 4, "medium": 2, "tail": 1}
    assert (moved["head"], moved["medium"], moved["tail"]) == (75, 50, 0)
    some = groups.report(pred[:5], y[:5], counts)  # no test image of a medium or tail class
    assert (some["all"], some["head"], some["medium"], some["tail"]) == (80, 80, None, None)
    assert some["per_class"] == pytest.approx(87.5)  # classes without test images do not count
    one = groups.report(torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))  # one class, one image
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
    assert groups.prototype_share(won, y, counts, 8) == {"head": 25, "medium": 12.5, "tail": 12.5, "unused": 50}
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
    assert int(sum(groups.members([5, 11], head=10, tail=11)[n].sum() for n in groups.NAMES)) == 2  # may touch


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
    monkeypatch.setattr(features_py, "eval_batches", in_memory)
    net, x = Tiny(), torch.randn(11, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    net.train()
    net.frozen.eval()  # a part that the caller keeps in eval mode
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
    monkeypatch.setattr(features_py, "eval_batches", broken)
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
    torch.save({"net": types.SimpleNamespace()}, tmp_path / "pickle.pt")  # needs weights_only=False: never run
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


def test_command_line_appends_results_and_keeps_features(tmp_path, capsys, monkeypatch):
    write_images(tmp_path / "images", "train", (14, 10))
    write_images(tmp_path / "images", "val", (6, 9), seed=1)
    checkpoint(tmp_path / "ckpt.pt", data=str(tmp_path / "images"))
    first = eval_knn.main([str(tmp_path), "--device", "cpu", "--k", "3", "5"])
    assert len(list((tmp_path / "features").iterdir())) == 2
    monkeypatch.setattr(features_py, "features", None)  # the second time nothing is computed
    assert eval_knn.main([str(tmp_path), "--device", "cpu", "--k", "3", "5", "--T", "0.5"])["test"] == 15
    with open(tmp_path / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["result"] for row in rows] == ["k=3", "k=5", "guess"] * 2
    for row, k in zip(rows, (3, 5)):
        assert float(row["all"]) == first["knn"][k] and row["protocol"] == eval_knn.PROTOCOL
        assert row["settings"] == "T=0.07 leave_one_out=False" and row["train"] == "24" and row["head"] == ""
    assert rows[3]["settings"] == "T=0.5 leave_one_out=False"
    weights = features_py.fingerprint(eval_knn.load_backbone(tmp_path)[0])
    assert {row["weights"] for row in rows} == {weights} and {row["which"] for row in rows} == {"teacher"}
    monkeypatch.undo()
    eval_knn.main([str(tmp_path / "ckpt.pt"), "--device", "cpu", "--no-cache", "--results", str(tmp_path / "mine.csv")])
    assert "read from" not in capsys.readouterr().out.split("step 123")[-1] and (tmp_path / "mine.csv").exists()
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 7


def test_command_line_leave_one_out_where_there_is_no_test_split(tmp_path, capsys):
    write_images(tmp_path / "images", "train", (9, 8))
    for c in range(2):
        (tmp_path / "single" / f"class{c}").mkdir(parents=True)
        Image.new("RGB", (32, 32), ("red", "blue")[c]).save(tmp_path / "single" / f"class{c}" / "0.png")
    checkpoint(tmp_path / "ckpt.pt", data=str(tmp_path / "single"))
    with pytest.raises(SystemExit):  # a class's only image is never held out
        eval_knn.main([str(tmp_path), "--device", "cpu"])
    assert "no test split: --leave-one-out" in capsys.readouterr().err
    out = eval_knn.main([str(tmp_path), "--device", "cpu", "--leave-one-out", "--k", "1", "5"])
    assert out["knn"] == {1: 0, 5: 0} and (out["train"], out["test"]) == (2, 2)  # only the other class is left
    text = capsys.readouterr().out
    assert "each image against all others" in text and "(all 1 of the bank)" in text
    out = eval_knn.main([str(tmp_path), "--data", str(tmp_path / "images" / "train"), "--device", "cpu", "--k", "3",
                         "--leave-one-out"])
    assert out["knn"][3] == 100 and out["train"] == out["test"] == 15  # 17 less the tenth of each class held out


def test_command_line_on_a_long_tailed_run(tmp_path, capsys):
    """Training itself on a long tail, then k-NN by groups beside the prototypes that each group has."""
    write_images(tmp_path / "images", "train", (40, 40))
    write_images(tmp_path / "images", "val", (5, 5), seed=1)
    train.main(["--data", str(tmp_path / "images"), "--imbalance", "10", "--steps", "1", "--batch-size", "8",
                "--num-prototypes", "32", "--partition-size", "16", "--prototypes", "frozen", "--device", "cpu",
                "--head-hidden", "16", "--bottleneck-dim", "16", "--out", str(tmp_path / "run")])
    capsys.readouterr()
    out = eval_knn.main([str(tmp_path / "run"), "--device", "cpu", "--k", "3", "--head", "30", "--tail", "10"])
    text, share = capsys.readouterr().out, out["prototypes"]
    assert out["groups"][3]["classes"] == {"head": 1, "medium": 0, "tail": 1} and out["train"] == 44
    assert out["groups"][3]["head"] is not None and out["groups"][3]["medium"] is None
    assert out["groups"]["guess"]["head"] == 100 and out["groups"]["guess"]["tail"] == 0 and out["guess"] == 50
    assert sum(share.values()) == pytest.approx(100) and share["head"] > 0 and share["medium"] == 0
    for words in ("head (1)", "tail (1)", "prototypes", "head: classes of more than 30", "tail: of fewer than 10"):
        assert words in text
    assert "medium (" not in text  # a group without classes has no column
    won, K = eval_knn.winners(tmp_path / "run", eval_knn.load(str(tmp_path / "images"), imbalance=10)[0])
    assert K == 32 and won.shape == (44,)
    assert len(set(won.tolist())) / K == pytest.approx(1 - share["unused"] / 100)
    out = eval_knn.main([str(tmp_path / "run"), "--device", "cpu", "--k", "3"])  # one group: 40 and 4
    assert out["prototypes"] is not None and out["groups"][3]["classes"] == {"head": 0, "medium": 1, "tail": 1}
    out = eval_knn.main([str(tmp_path / "run"), "--device", "cpu", "--k", "3", "--head", "3", "--tail", "4"])
    assert out["prototypes"] is None and "head (" not in capsys.readouterr().out.split("of fewer than 20")[-1]


def test_command_line_takes_weights_of_others(tmp_path, capsys):
    write_images(tmp_path / "images", "train", (7, 7))
    write_images(tmp_path / "images", "val", (3, 3), seed=1)
    torch.manual_seed(0)
    net = models.build("vit_nano", patch_size=8, img_size=32)
    torch.save(net.state_dict(), tmp_path / "foreign.pth")
    with pytest.raises(SystemExit):
        eval_knn.main([str(tmp_path / "foreign.pth"), "--arch", "vit_nano", "--device", "cpu"])
    assert "does not say on what data it was trained: give --data" in capsys.readouterr().err
    common = [str(tmp_path / "foreign.pth"), "--arch=vit_nano", "--device=cpu", "--data", str(tmp_path / "images")]
    out = eval_knn.main([*common, "--k", "3", "--dump", str(tmp_path / "a.pt")])
    assert out["knn"][3] == 100 and out["prototypes"] is None
    larger = eval_knn.main([*common, "--k", "3", "--img-size", "64", "--dump", str(tmp_path / "b.pt")])
    assert larger["train"] == 14 and "centre-cropped to 64 px" in capsys.readouterr().out
    a, b = (torch.load(tmp_path / f, weights_only=True)["test_x"] for f in ("a.pt", "b.pt"))
    assert not torch.allclose(a, b) and torch.allclose(a.norm(dim=1), torch.ones(6))
    x = torch.cat(list(eval_knn.eval_batches(eval_knn.load(str(tmp_path / "images"))[1], 32)))
    with torch.no_grad():
        torch.testing.assert_close(a, F.normalize(net.eval()(x)[0], dim=1))
    for extra, words in ((["--patch-size", "16"], "--patch-size 16"), (["--arch", "vit_huge"], "--arch vit_huge")):
        with pytest.raises(SystemExit) as caught:
            eval_knn.main([*common, *extra])
        assert caught.value.code == 2 and words in capsys.readouterr().err


def test_command_line_gives_the_data_what_the_run_had(tmp_path, monkeypatch):
    calls = []

    def load(name, **kwargs):
        calls.append((name, kwargs))
        raise ValueError("enough")
    monkeypatch.setattr(eval_knn, "load", load)
    checkpoint(tmp_path / "ckpt.pt", seed=3, imbalance=50.0, imbalance_law="power", data_root="there")
    for extra in ([], ["--data", "cifar10"], ["--data", "shapes", "--data-root", "here"]):
        with pytest.raises(SystemExit):
            eval_knn.main([str(tmp_path), "--device", "cpu", *extra])
    run, tail = dict(seed=3, img_size=32), dict(imbalance=50.0, imbalance_law="power")
    assert calls == [("shapes", dict(root="there", **tail, **run)),  # the long-tailed bank of the run
                     ("cifar10", dict(root="there", imbalance=1.0, imbalance_law="exp", **run)),  # another: as it is
                     ("shapes", dict(root="here", **tail, **run))]


@pytest.mark.parametrize("flags, words", [
    (["--data", "{tmp}/loose"], "loose.*no labels"),
    (["--data", "{tmp}/nowhere"], "nowhere"),
    (["--k", "0"], "k must be at least 1, got 0"),
    (["--T", "0"], "T must be above 0"),
    (["--batch-size", "0"], "--batch-size.*0"),
    (["--dump", "{tmp}/no/such/f.pt"], "--dump .*no/such"),
    (["--dump", "{tmp}"], "--dump"),
    (["--device", "abacus"], "--device abacus"),
    (["--head", "5", "--tail", "50"], "tail ends at 50"),
])
def test_command_line_refuses_with_exit_2(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.delattr(eval_knn, "cached")  # refused before the long work, not after it
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
