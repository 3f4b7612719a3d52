"""support/probes.py, support/features.py, support/evaluation.py and eval_linear.py: solvers against
scikit-learn and torch.optim, cache, foreign files, protocols through main([...]). Images and
networks are tiny; nothing is downloaded."""
import csv
import dataclasses
import functools
import math
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms import InterpolationMode, v2

import data
import eval_linear
import models
import views
from conftest import random_maps
from support import evaluation
from support import backbones
from support import features
from support import probes
from support.pixels import IGNORED as I


def sample(N, D=12, C=4, seed=0, noise=1.5):
    """Random features around class centres: x (N, D) float32, y (N,)."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(C, D, generator=torch.Generator().manual_seed(99))  # (C, D)
    y = torch.randint(C, (N,), generator=g)  # (N,)
    return centres[y] + noise * torch.randn(N, D, generator=g), y


def checkpoint(folder, arch="vit_nano", seed=0, img_size=32, **args):
    """A run directory as train.py leaves it, with random weights; returns its path as text."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    args = dict(arch=arch, patch_size=8, img_size=img_size, method="carp", prototypes="joint",
                num_prototypes=64, data="shapes", data_root="data", seed=seed, imbalance=1.0,
                data_version=data.VERSIONS["shapes"]) | args
    ckpt = {"version": 1, "step": 7, "args": args}
    for name in ("student", "teacher"):
        net = models.build(arch, patch_size=8, img_size=img_size, in_small=True)
        ckpt[name] = {f"backbone.{key}": w for key, w in net.state_dict().items()}
        ckpt[name]["head.0.weight"] = torch.zeros(2, 2)
    torch.save(ckpt, folder / "ckpt.pt")
    return str(folder)


def pictures(labels, seed=0, names=("a", "b", "c")):
    """32 px noise whose mean colour tells the class: any backbone that sees colour can learn it."""
    g, y = torch.Generator().manual_seed(seed), torch.tensor(labels)
    x = torch.randint(90, (len(y), 3, 32, 32), generator=g)
    x[torch.arange(len(y)), y % 3] += 160
    return data.Images(x.to(torch.uint8), y, list(names), "pictures")


@pytest.fixture
def small(monkeypatch):
    """--data shapes is 60 training and 30 test pictures of three classes."""
    images = pictures([0, 1, 2] * 20), pictures([0, 1, 2] * 10, seed=1)
    monkeypatch.setattr(data, "load", lambda name, **kw: images)
    return images


def go(*flags):
    return eval_linear.main([*map(str, flags), "--device", "cpu"])


# ---- L-BFGS --------------------------------------------------------------------------------------

@pytest.mark.parametrize("weight_decay", [1e-3, 1e-1])
def test_lbfgs_is_scikit_learns_logistic_regression(weight_decay):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = sample(700)
    q, truth = sample(2000, seed=1)
    W, b, loss = probes.lbfgs(x, y, 4, weight_decay=weight_decay)
    # scikit-learn minimises |W|^2 / 2 + C sum of losses: divided by C N that is ours with weight
    # decay 1 / (C N)
    strength = 1 / (weight_decay * len(x))
    theirs = linear_model.LogisticRegression(C=strength, max_iter=2000, tol=1e-8)
    theirs.fit(x.double().numpy(), y)
    p = theirs.predict_proba(x.double().numpy())
    wanted = -np.log(p[np.arange(len(y)), y]).mean()
    wanted += weight_decay / 2 * (theirs.coef_ ** 2).sum()
    assert abs(loss - wanted) < 1e-3
    ours = float((probes.predict(q, W, b) == truth).float().mean())
    assert abs(ours - theirs.score(q.double().numpy(), truth)) < 0.005 and 0.5 < ours < 0.99
    np.testing.assert_allclose(W - W.mean(0), theirs.coef_ - theirs.coef_.mean(0), atol=0.02)


def test_lbfgs_has_the_settings_of_appendix_B12(monkeypatch):
    settings = {}

    class Spy(torch.optim.LBFGS):
        def __init__(self, params, **kwargs):
            settings.update(kwargs)
            super().__init__(params, **kwargs)
    monkeypatch.setattr(torch.optim, "LBFGS", Spy)
    probes.lbfgs(*sample(50), 4)
    assert settings == dict(lr=1, max_iter=150, tolerance_grad=1e-5, tolerance_change=1e-9,
                            history_size=10, line_search_fn="strong_wolfe")


def test_lbfgs_takes_the_whole_set_whatever_the_chunk(monkeypatch):
    x, y = sample(300)
    whole = probes.lbfgs(x.double(), y, 4, weight_decay=0.01)
    monkeypatch.setattr(probes, "CHUNK", 7)
    parts = probes.lbfgs(x.double(), y, 4, weight_decay=0.01)
    torch.testing.assert_close(parts[0], whole[0], atol=1e-4, rtol=1e-4)
    assert parts[2] == pytest.approx(whole[2], abs=1e-8)
    h = x.double() @ whole[0].T + whole[1]
    loss = F.cross_entropy(h, y) + 0.005 * whole[0].square().sum()
    assert whole[2] == pytest.approx(float(loss), abs=1e-9)


def test_standardise_uses_the_training_set_alone_and_survives_a_constant_column():
    x, q = torch.tensor([[1., 5, 1e6], [3, 5, 1e6]]), torch.tensor([[5., 7, 0]])
    a, b = probes.standardise(x, q)
    assert a.tolist() == [[-1, 0, 0], [1, 0, 0]] and b.tolist() == [[3, 0, 0]]


# ---- the grid ------------------------------------------------------------------------------------

def test_the_grid_is_capis():
    assert len(probes.GRID) == len(set(probes.GRID)) == 30
    rates = {1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2}
    assert {lr for lr, _ in probes.GRID} == rates
    assert {wd for _, wd in probes.GRID} == {5e-4, 1e-3, 5e-2}


def test_a_head_of_the_grid_equals_the_same_head_trained_alone():
    x, y = sample(200)
    W, b = probes.grid(x.double(), y, 4, steps=60, batch_size=64)
    assert W.shape == (30, 4, 12) and b.shape == (30, 4)
    for j in (0, 13, 29):
        alone = probes.grid(x.double(), y, 4, [probes.GRID[j]], steps=60, batch_size=64)
        torch.testing.assert_close(W[j], alone[0][0], atol=1e-10, rtol=0)
        torch.testing.assert_close(b[j], alone[1][0], atol=1e-10, rtol=0)
    assert (W[0] - W[29]).abs().max() > 0.01


@pytest.mark.parametrize("lr, wd", [(1e-2, 5e-2), (1e-3, 5e-4)])
def test_a_head_of_the_grid_is_torchs_adamw(lr, wd):
    """Autograd, torch.optim.AdamW and LambdaLR on the same batches from the same start."""
    x, y = sample(200)
    x, (start, _) = x.double(), probes.grid(x.double(), y, 4, [(0.0, 0.0)], steps=1, batch_size=64)
    W, b = nn.Parameter(start[0].clone()), nn.Parameter(torch.zeros(4, dtype=torch.double))
    decayed, free = {"params": [W], "weight_decay": wd}, {"params": [b], "weight_decay": 0}
    solver = torch.optim.AdamW([decayed, free], lr=lr * 64 / 256, betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.LambdaLR(
        solver, lambda t: t / 4 if t < 4 else 0.5 * (1 + math.cos(math.pi * (t - 4) / 36)))
    for step in range(40):
        rows = views.indices(200, 64, 0, step)
        solver.zero_grad()
        F.cross_entropy(x[rows] @ W.T + b, y[rows]).backward()
        solver.step()
        rate.step()
    ours = probes.grid(x, y, 4, [(1e-4, 1.0), (lr, wd)], steps=40, batch_size=64)
    torch.testing.assert_close(ours[0][1], W.detach(), atol=1e-8, rtol=0)
    torch.testing.assert_close(ours[1][1], b.detach(), atol=1e-8, rtol=0)
    assert 0.01 < start.std() < 0.03 and (W - start[0]).abs().max() > 0.001


def test_accuracy_of_all_heads_is_that_of_each():
    x, y = sample(2100)
    W = torch.randn(5, 4, 12, generator=torch.Generator().manual_seed(0))
    b = torch.randn(5, 4)
    wanted = []
    for j in range(5):
        right = (x @ W[j].T + b[j]).argmax(1) == y  # (N,)
        wanted.append(100 * float(right.double().mean()))
    assert probes.grid_accuracy(x, y, W, b).tolist() == pytest.approx(wanted, abs=1e-3)


def test_for_validation_there_is_a_tenth_and_at_least_one():
    order = torch.randperm(1005)
    train, val = probes.split(1005, 0.1, order)
    assert torch.equal(val, order[:100]) and torch.equal(train, order[100:])
    assert [len(part) for part in probes.split(3, 0.1, np.arange(3))] == [2, 1]
    with pytest.raises(ValueError, match="1 training image.*too few"):
        probes.split(1, 0.1, [0])


def test_the_grid_holds_out_the_same_tenth_and_trains_on_the_rest(monkeypatch):
    trained_on, chosen_on = [], []

    def train(x, y, C, **kw):
        trained_on.append(x)
        return torch.zeros(30, C, 12), torch.zeros(30, C)

    def accuracy(x, y, W, b):
        chosen_on.append(x)
        return torch.arange(30.)
    monkeypatch.setattr(probes, "grid", train)
    monkeypatch.setattr(probes, "grid_accuracy", accuracy)
    x, y = sample(200, C=3)
    flags = SimpleNamespace(steps=1, seed=5)
    _, note = eval_linear.grid(x, y, x, torch.arange(3), flags)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(42))
    assert torch.equal(chosen_on[0], x[order[:20]])
    assert torch.equal(trained_on[0], x[order[20:]])
    assert "lr 0.01 with wd 0.05" in note and "29.00 %" in note


# ---- the attentive probe -------------------------------------------------------------------------

class OfficialProbe(nn.Module):
    """CAPI's attentive probe in the plain way, with torch's own modules."""

    def __init__(self, D, C, looks):
        super().__init__()
        self.looks = looks
        self.query = nn.Parameter(torch.zeros(D))
        self.kv = nn.Linear(D, 2 * D)
        self.linear = nn.Linear(D, C)

    def forward(self, x):  # (B, n, D) -> (B, C)
        B, n, D = x.shape
        k, v = (part.view(B, n, self.looks, -1).transpose(1, 2)
                for part in self.kv(x).chunk(2, -1))  # (B, looks, n, d) each
        q = self.query.view(1, self.looks, 1, -1).expand(B, -1, -1, -1)
        pooled = F.scaled_dot_product_attention(q, k, v)  # (B, looks, 1, d)
        return self.linear(pooled.flatten(1))


def patches(N, n=5, D=64, C=3, seed=0):
    """Random patches (N, n, D) float64 that depend on the labels (N,)."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(C, (N,), generator=g)  # (N,)
    x = torch.randn(N, n, D, generator=g, dtype=torch.double)
    x[torch.arange(N), y, y] += 3
    return x, y


def official(probe, head, D, C, looks):
    """An OfficialProbe with the weights of one head of an Attentive."""
    net = OfficialProbe(D, C, looks).double()
    with torch.no_grad():
        net.query.copy_(probe.query[head])
        net.kv.weight.copy_(torch.cat([probe.key[head], probe.value[head]]))
        net.kv.bias.copy_(torch.cat([torch.zeros(D), probe.value_bias[head]]))
        net.linear.weight.copy_(probe.W[head])
        net.linear.bias.copy_(probe.b[head])
    return net


def test_each_attentive_head_is_the_official_one_under_torchs_adamw():
    """Autograd through torch's attention, torch.optim.AdamW and LambdaLR, in float64."""
    x, y = patches(80)
    steps, batch = 20, 32
    ours = probes.attentive(x, y, 3, steps=steps, batch_size=batch, seed=4)
    assert [tuple(part.shape) for part in ours] == [
        (30, 64), (30, 64, 64), (30, 64, 64), (30, 64), (30, 3, 64), (30, 3)]
    start = probes.attentive(x, y, 3, [(0.0, 0.0)], steps=1, batch_size=batch, seed=4)
    for weights in (start.query, start.key, start.value, start.W):
        assert 0.015 < weights.std() < 0.025
    assert not start.value_bias.any() and not start.b.any()
    assert not torch.equal(start.key, start.value)
    for head in (0, 8, 19, 29):
        lr, wd = probes.GRID[head]
        net = official(start, 0, 64, 3, looks=2)
        decayed = [w for name, w in net.named_parameters() if "bias" not in name]
        free = [w for name, w in net.named_parameters() if "bias" in name]
        solver = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": wd}, {"params": free, "weight_decay": 0}],
            lr=lr * batch / 256, betas=(0.9, 0.95))
        rate = torch.optim.lr_scheduler.LambdaLR(
            solver, lambda t: t / 2 if t < 2 else 0.5 * (1 + math.cos(math.pi * (t - 2) / 18)))
        for step in range(steps):
            rows = views.indices(80, batch, 4, step)
            solver.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            solver.step()
            rate.step()
        logits = probes.attentive_logits(x, probes.Attentive(*(part[[head]] for part in ours)))[0]
        torch.testing.assert_close(logits, net(x).detach(), atol=1e-7, rtol=0)
        wanted = (net.query, net.kv.weight[:64], net.kv.weight[64:], net.kv.bias[64:],
                  net.linear.weight, net.linear.bias)
        for mine, theirs in zip(ours, wanted):
            torch.testing.assert_close(mine[head], theirs.detach(), atol=1e-7, rtol=0)
    assert (ours.key[29] - start.key[0]).abs().max() > 1e-3
    assert (ours.query[2] - ours.query[0]).abs().max() > 1e-9  # wd alone differs


def test_an_attentive_head_by_hand():
    """Two looks of 32 channels: the first gives 3/4 to one patch, the second 1/2 to both."""
    unit = torch.eye(64, dtype=torch.double)
    query = math.sqrt(32) * math.log(3) * unit[0]
    head = probes.Attentive(query[None], unit[None], unit[None], 0.5 * torch.ones(1, 64).double(),
                            torch.stack([unit[0], unit[1], unit[40]])[None],
                            torch.tensor([[0., 0, 10]]).double())
    x = torch.stack([unit[0] + 2 * unit[1] + 8 * unit[40], 4 * unit[1]])[None]  # (1, 2, 64)
    wanted = [3 / 4 + 0.5, 3 / 4 * 2 + 1 / 4 * 4 + 0.5, 8 / 2 + 0.5 + 10]
    assert probes.attentive_logits(x, head)[0, 0].tolist() == pytest.approx(wanted)
    assert probes.attentive_predict([x, x.repeat(3, 1, 1)], head).tolist() == [[2] * 4]


def test_the_attentive_probe_is_the_same_whatever_is_in_memory_at_a_time(monkeypatch):
    x, y = patches(40)
    heads = [(1e-2, 5e-2), (1e-3, 0.0)]
    whole = probes.attentive(x, y, 3, heads, steps=6, batch_size=30)
    seen = probes.attentive_predict([x], whole)
    monkeypatch.setattr(probes, "PART", 7 * 2 * 2 * (5 + 2 * 64))
    assert probes.images_at_a_time(5, 64, 2) == 7
    parts = probes.attentive(x, y, 3, heads, steps=6, batch_size=30)
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)
    assert torch.equal(probes.attentive_predict(x.split(16), parts), seen)
    alone = probes.attentive(x, y, 3, heads[1:], steps=6, batch_size=30)
    for a, b in zip(whole, alone):
        torch.testing.assert_close(a[1], b[0], atol=1e-8, rtol=0)


def test_attention_finds_the_marked_patch_and_a_mean_cannot():
    """Each image has every label once, in one patch each; that of the marked patch counts."""
    def marked(N, seed):
        g = torch.Generator().manual_seed(seed)
        labels = torch.rand(N, 4, generator=g).argsort(1)  # (N, 4) of its four patches
        at = torch.randint(4, (N,), generator=g)
        x = 0.02 * torch.randn(N, 4, 32, generator=g)
        x[..., :4] += 3 * F.one_hot(labels, 4)
        x[torch.arange(N), at, 4] += 3
        return x, labels[torch.arange(N), at]
    (x, y), (q, truth) = marked(400, 0), marked(400, 1)
    heads = probes.attentive(x, y, 4, [(2e-3, 5e-4), (1e-2, 1e-3)], steps=200)
    right = (probes.attentive_predict([q], heads) == truth).double().mean(1)
    W, b = probes.grid(x.mean(1), y, 4, [(2e-3, 5e-4), (1e-2, 1e-3)], steps=200)
    by_mean = probes.grid_accuracy(q.mean(1), truth, W, b)
    assert right.max() > 0.98 and by_mean.max() < 40  # of four classes


@pytest.mark.parametrize("D, d", [(96, 32), (192, 32), (352, 32), (384, 64), (2048, 64)])
def test_looks_have_64_channels_and_32_in_small_models(D, d):
    assert probes.look_width(D) == d


@pytest.mark.parametrize("D, d", [(48, 32), (400, 64)])
def test_a_width_that_looks_do_not_divide_is_refused(D, d):
    with pytest.raises(ValueError, match=f"attentive .* {d} channels.* {D}, .* multiple of {d}"):
        probes.look_width(D)


# of a ResNet its wide patches count, for which 2 of the 30 heads are enough
@pytest.mark.parametrize("arch, D, n, steps, tried", [
    ("vit_nano", 96, 16, 40, 30), ("resnet18", 512, 16, 1, 2)])
def test_the_attentive_protocol_learns_colours_and_says_so(tmp_path, small, capsys, monkeypatch,
                                                           arch, D, n, steps, tried):
    fit = functools.partial(probes.attentive, heads=probes.GRID[:tried])
    monkeypatch.setattr(probes, "attentive", fit)
    run = checkpoint(tmp_path / "run", arch=arch)
    out = go(run, "--protocol", "attentive", "--steps", steps)
    text = capsys.readouterr().out
    assert out["accuracy"] > 90 or steps == 1
    assert (out["train"], out["test"]) == (60, 30)
    assert f"attentive: teacher's features, layers 1, pool patches ({D}-d, float32)" in text
    assert f"of {tried} heads, lr " in text and "on 6 held-out images" in text
    line, = rows(tmp_path / "run" / "results.csv")
    assert (line["protocol"], line["pool"], line["layers"], line["settings"]) == (
        f"{eval_linear.VERSION} attentive", "patches", "1", f"steps={steps}")
    assert not (tmp_path / "run" / "features").exists()
    if steps > 1:
        again = go(run, "--protocol", "attentive", "--steps", steps, "--batch-size", "20")
        assert again["results"] == out["results"]
    net = backbones.load_backbone(run)[0].train()
    batches = list(features.patch_batches(net, small[0], 32, batch_size=25))
    assert [tuple(batch.shape) for batch in batches] == [(25, n, D), (25, n, D), (10, n, D)]
    assert all(module.training for module in net.modules())
    x = torch.cat(list(views.eval_batches(small[0], 32)))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(batches), net.eval()(x)[1], atol=1e-5, rtol=1e-5)


def test_the_attentive_probe_holds_out_the_same_tenth_and_trains_on_the_rest(tmp_path, monkeypatch,
                                                                             small):
    fitted, predicted = [], []

    def attentive(x, y, C, **settings):
        fitted.append((x, y))
        return probes.Attentive(*(torch.arange(30.)[:, None].expand(30, 96) for _ in range(6)))

    def predict(batches, heads):
        x = torch.cat(list(batches))
        predicted.append((x, heads.query[:, 0].tolist()))
        if len(heads.query) == 1:
            return torch.ones(1, len(x), dtype=int)
        truth = small[0].y[order[:6]]  # head 13 alone is right
        return torch.stack([truth if head == 13 else (truth + 1) % 3 for head in range(30)])
    monkeypatch.setattr(probes, "attentive", attentive)
    monkeypatch.setattr(probes, "attentive_predict", predict)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(42))
    run = checkpoint(tmp_path / "run")
    out = go(run, "--protocol", "attentive", "--seed", "5")
    lr, wd = probes.GRID[13]
    assert f"lr {lr:g} with wd {wd:g} is best on 6 held-out images: 100.00 %, the worst 0.00" in (
        out["note"])
    assert out["accuracy"] == pytest.approx(100 / 3)  # label 1 everywhere
    net = backbones.load_backbone(run)[0]
    x, q = (torch.cat(list(features.patch_batches(net, part, 32))) for part in small)
    for got, wanted in ((fitted[0][0], x[order[6:]]), (predicted[0][0], x[order[:6]]),
                        (predicted[1][0], q)):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(fitted[0][1], small[0].y[order[6:]])
    assert predicted[1][1] == [13]


def test_more_patches_than_memory_may_hold_are_refused(tmp_path, monkeypatch, small, capsys):
    monkeypatch.setattr(eval_linear, "MOST", 54 * 16 * 96 - 1)
    with pytest.raises(SystemExit) as stop:
        go(checkpoint(tmp_path / "run"), "--protocol", "attentive", "--steps", "1")
    assert stop.value.code == 2
    assert "54 images of 16 patches of 96 numbers" in capsys.readouterr().err
    monkeypatch.setattr(eval_linear, "MOST", 54 * 16 * 96)
    go(tmp_path / "run", "--protocol", "attentive", "--steps", "1")


def test_patches_that_are_not_finite_are_refused(tmp_path, small, capsys):
    run = checkpoint(tmp_path / "run")
    stored = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    stored["teacher"]["backbone.norm.bias"][0] = math.nan
    torch.save(stored, tmp_path / "run" / "ckpt.pt")
    with pytest.raises(SystemExit):
        go(run, "--protocol", "attentive", "--steps", "1")
    assert "gives patches that are not finite" in capsys.readouterr().err


# ---- SGD -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("lr", [0.3, 0.02])
def test_sgd_is_torchs_with_a_cosine_per_epoch(lr):
    x, y = sample(96)
    batches = [(x[i:i + 32], y[i:i + 32]) for i in (0, 32, 64)] * 5
    ours = list(probes.sgd(iter(batches), 12, 4, [0.02, 0.3], epochs=5, steps=3, seed=3))
    W, b = ours[-1][[0.02, 0.3].index(lr)]
    net = nn.Linear(12, 4)
    with torch.no_grad():
        net.weight.copy_(0.01 * torch.randn(4, 12, generator=torch.Generator().manual_seed(3)))
        net.bias.zero_()
    solver = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(solver, 5, eta_min=0)
    for i, (h, labels) in enumerate(batches):
        solver.zero_grad()
        F.cross_entropy(net(h), labels).backward()
        solver.step()
        if i % 3 == 2:
            rate.step()
    torch.testing.assert_close(W, net.weight.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b, net.bias.detach(), atol=1e-5, rtol=1e-5)
    assert len(ours) == 5 and net.weight.abs().max() > 0.05


# ---- logistic regression and its measures --------------------------------------------------------

def test_eleven_point_average_precision_by_hand():
    # in order of score: + - + + -; precision at the hits 1, 2/3, 3/4; recall 1/3, 2/3, 1 recalls 0
    # .1 .2 .3 -> 1, .4 .5 .6 -> 3/4 (the best at that recall or beyond), .7 .8 .9 1 -> 3/4
    score = torch.tensor([[.9], [.8], [.7], [.6], [.5]])
    truth = torch.tensor([[1], [0], [1], [1], [0]])
    wanted = (4 + 7 * .75) / 11
    assert probes.map11(score, truth) == pytest.approx(100 * wanted)
    shuffle = torch.tensor([3, 0, 4, 1, 2])
    assert probes.map11(score[shuffle], truth[shuffle]) == pytest.approx(100 * wanted)
    # a difficult object on top counts for nothing
    more_scores = torch.cat([score, torch.tensor([[5.]])])
    with_difficult = torch.cat([truth, torch.tensor([[-1]])])
    assert probes.map11(more_scores, with_difficult) == pytest.approx(100 * wanted)
    # a second class with the scores reversed: - + + - +
    both = probes.map11(torch.cat([score, -score], 1), torch.cat([truth, truth], 1))
    reversed_wanted = (2 / 3 * 7 + 3 / 5 * 4) / 11
    assert both == pytest.approx(100 * (wanted + reversed_wanted) / 2)
    # a class without positives is left out
    none = torch.zeros(5, 1, dtype=int)
    one_of_two = probes.map11(torch.cat([score, score], 1), torch.cat([truth, none], 1))
    assert one_of_two == pytest.approx(100 * wanted)
    with pytest.raises(ValueError, match="positive"):
        probes.map11(score, torch.zeros(5, 1, dtype=int))


def test_a_recall_of_exactly_three_tenths_counts():
    truth = torch.tensor([1] * 3 + [0] * 90 + [1] * 7)[:, None]
    score = torch.arange(100, 0, -1.)[:, None]
    late = max((3 + j) / (93 + j) for j in range(1, 8))
    assert probes.map11(score, truth) == pytest.approx(100 * (4 + 7 * late) / 11)


def test_mean_per_class_by_hand():
    pred = torch.tensor([0, 0, 1, 1, 2, 0])
    y = torch.tensor([0, 0, 0, 0, 1, 2])  # right: 2 of 4, 0 of 1, 0 of 1
    assert eval_linear.percent("per_class", pred, y) == pytest.approx(100 * .5 / 3)
    assert eval_linear.percent("top1", pred, y) == pytest.approx(100 * 2 / 6)


def test_strengths_are_those_of_ericsson():
    assert len(probes.STRENGTHS) == 45
    assert probes.STRENGTHS[0] == pytest.approx(1e6)
    assert probes.STRENGTHS[-1] == pytest.approx(1e-5)
    assert np.allclose(np.diff(np.log10(probes.STRENGTHS)), -11 / 44)


def test_the_strength_is_chosen_on_val_and_refitted_on_both(monkeypatch):
    linear_model = pytest.importorskip("sklearn.linear_model")
    monkeypatch.setattr(probes, "STRENGTHS", np.array([1e3, 1e-1, 1e-3]))
    train_x, train_y = sample(60, seed=0, noise=2.5)
    val_x, val_y = sample(300, seed=1, noise=2.5)
    q, _ = sample(400, seed=2, noise=2.5)
    results, note = eval_linear.best_strength(train_x, train_y, val_x, val_y, q, "top1")

    def fitted(C, x, y):
        return linear_model.LogisticRegression(C=C, max_iter=1000).fit(x, y)
    score = {C: fitted(C, train_x, train_y).score(val_x, val_y) for C in probes.STRENGTHS}
    best = max(score, key=score.get)
    assert f"C = {best:.3g} " in note and best != 1e3 and "300 validation" in note
    both = fitted(best, torch.cat([train_x, val_x]), torch.cat([train_y, val_y])).predict(q)
    alone = fitted(best, train_x, train_y).predict(q)
    out = results["test"].numpy()
    assert (out == both).mean() > 0.99 and (out == alone).mean() < 0.95


def test_without_a_validation_split_a_fifth_is_held_out_as_numpy_draws_it(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(probes, "STRENGTHS", np.array([1.0]))
    fitted_to, fit_logistic = [], probes.fit_logistic

    def spy(x, *rest):
        fitted_to.append(x)
        return fit_logistic(x, *rest)
    monkeypatch.setattr(probes, "fit_logistic", spy)
    x, y = sample(101)
    eval_linear.best_strength(x, y, None, None, x, "top1")
    order = list(range(101))
    np.random.RandomState(0).shuffle(order)  # as the official code
    assert torch.equal(fitted_to[0], x[order[20:]]) and torch.equal(fitted_to[1], x)


def test_voc_is_a_binary_problem_per_class_without_difficult_objects(monkeypatch):
    linear_model = pytest.importorskip("sklearn.linear_model")
    monkeypatch.setattr(probes, "STRENGTHS", np.array([1.0]))
    x, y = sample(400, C=3)
    hot = F.one_hot(y, 4)  # the fourth class occurs nowhere
    hot[:50, 0] = -1
    results, note = eval_linear.best_strength(x[:200], hot[:200], x[200:300], hot[200:300], x[300:],
                                              "map11")
    scores = results["test"]  # (100, 4)
    assert scores.shape == (100, 4) and "100 validation" in note
    for c in range(3):
        easy = slice(50 if c == 0 else 0, 300)
        theirs = linear_model.LogisticRegression().fit(x[easy], hot[easy, c])
        np.testing.assert_allclose(scores[:, c], theirs.decision_function(x[300:]), atol=5e-2)
    assert scores[:, 3].unique().tolist() == [0]


def test_without_scikit_learn_one_sentence(monkeypatch):
    import builtins
    real = builtins.__import__

    def absent(name, *rest, **kw):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **kw)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match="needs scikit-learn"):
        probes.fit_logistic(*sample(20), 1.0)


# ---- mIoU ----------------------------------------------------------------------------------------

def test_miou_by_hand():
    """Class 0: 2 of 4 pixels, class 1: 1 of 3, class 3: 0 of 1; class 2 is absent, and two pixels
    are ignored whatever is predicted."""
    truth = torch.tensor([[0, 0, 0, I], [1, 1, I, 1]], dtype=torch.uint8)
    guess = torch.tensor([[0, 0, 3, 1], [1, 0, 2, 0]], dtype=torch.uint8)
    result = probes.segmentation_measures(guess, truth, 4)
    assert result["iou"].tolist()[:2] == pytest.approx([100 * 2 / 5, 100 / 3])
    assert math.isnan(result["iou"][2]) and result["iou"][3] == 0
    assert result["miou"] == pytest.approx(100 * (2 / 5 + 1 / 3 + 0) / 3)
    assert result["pixels"] == 50


def test_miou_is_scikit_learns_over_all_images_together():
    metrics = pytest.importorskip("sklearn.metrics")
    truth = random_maps(150, 4, 4, C=5, ignored=.2)
    guess = random_maps(150, 4, 4, C=5, seed=1)
    counted = truth != I
    wanted = metrics.jaccard_score(truth[counted], guess[counted], average="macro")
    assert probes.segmentation_measures(guess, truth, 5)["miou"] == pytest.approx(100 * wanted)
    counts = probes.confusion(guess, truth, 5)
    assert torch.equal(counts, torch.from_numpy(metrics.confusion_matrix(truth[counted],
                                                                         guess[counted])))


# ---- features ------------------------------------------------------------------------------------

def test_layers_and_pools():
    torch.manual_seed(0)
    net = models.build("vit_nano", patch_size=8, img_size=32).eval()
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        blocks = net.intermediate(x, 3)  # [(cls (5, 96), patches (5, 16, 96))] * 3
        cls = [block[0] for block in blocks]
        mean = blocks[2][1].mean(1)  # (5, 96)
        for layers, pool, wanted in [(1, "cls", cls[2:]), (3, "cls", cls), (2, "mean", [mean]),
                                     (2, "cls+mean", [*cls[1:], mean])]:
            got = features.embed(net, x, layers, pool)
            torch.testing.assert_close(got, torch.cat(wanted, 1), atol=1e-6, rtol=1e-6)
            assert got.shape[1] == features.width(net, layers, pool)
    small = models.build("resnet18", in_small=True)
    assert features.width(small) == features.width(small, 1, "mean") == 512
    for layers, pool in [(2, "cls"), (1, "cls+mean")]:
        with pytest.raises(ValueError, match="needs a ViT"):
            features.width(small, layers, pool)
    for layers, pool, words in [(4, "cls", "--layers 4 must lie in 1..3"),
                                (1, "max", "--pool max")]:
        with pytest.raises(ValueError, match=words):
            features.width(net, layers, pool)


def test_defaults_are_the_papers():
    nets = {"vit_nano": models.build("vit_nano", patch_size=8),
            "vit_small": models.build("vit_small"),
            "resnet18": models.build("resnet18"),
            "vit_base": SimpleNamespace(arch="vit_base", blocks=range(12))}
    for protocol in ("grid", "sgd"):
        chosen = {arch: eval_linear.default_feature(protocol, net) for arch, net in nets.items()}
        assert chosen == {"vit_nano": (3, "cls"), "vit_small": (4, "cls"), "resnet18": (1, "cls"),
                          "vit_base": (1, "cls+mean")}
    for protocol in ("lbfgs", "transfer"):
        for net in nets.values():
            assert eval_linear.default_feature(protocol, net) == (1, "cls")


def test_normalised_or_not():
    torch.manual_seed(0)
    net = models.build("vit_nano", patch_size=8, img_size=32).eval()
    images = pictures([0, 1, 2])
    raw, unit = (features.features(net, images, 32, normalize=n) for n in (False, True))
    torch.testing.assert_close(unit, raw / raw.norm(dim=1, keepdim=True))
    assert (raw.norm(dim=1) - 1).abs().min() > 1


@pytest.mark.parametrize("on_disk", [False, True])
def test_ericsson_resizes_to_the_crop_itself(tmp_path, on_disk):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (3, 3, 60, 48), generator=g, dtype=torch.uint8)
    images = data.Images(x, None, [], "")
    if on_disk:
        for i in range(3):
            Image.fromarray(x[i].permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        images = data.Files([str(tmp_path / f"{i}.png") for i in range(3)], None, [], "")
    mean, std = (torch.tensor(values)[:, None, None] for values in (views.MEAN, views.STD))
    wanted = v2.functional.resize(x, [32], InterpolationMode.BICUBIC, antialias=True)
    wanted = (v2.functional.center_crop(wanted, [32, 32]) / 255 - mean) / std  # (3, 3, 32, 32)
    got = list(views.eval_batches(images, 32, batch_size=2, crop=False))
    assert [len(b) for b in got] == [2, 1]
    torch.testing.assert_close(torch.cat(got), wanted, atol=1e-5, rtol=0)
    dino = torch.cat(list(views.eval_batches(images, 32)))  # which cuts more off
    assert (dino - wanted).abs().max() > 0.1


def test_patch_features_are_those_of_eval_mode_for_normalised_pixels():
    torch.manual_seed(0)
    net = models.build("resnet18", in_small=True)
    x = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    net.train()
    images = data.Images(x, None, [], "noise")
    got = torch.cat(list(features.patch_batches(net, images, 32, batch_size=2, mean=(.5, .4, .3),
                                                std=(.2, .3, .4))))
    mean, std = torch.tensor((.5, .4, .3)), torch.tensor((.2, .3, .4))
    wanted = net.eval()((x / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))[1]
    assert got.shape == (5, 16, 512) and torch.allclose(got, wanted, atol=1e-4)


# ---- the cache -----------------------------------------------------------------------------------

class Counting(nn.Module):
    """Counts the images that go through it."""
    dim, arch, calls = 4, "tiny", 0

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        self.calls += len(x)
        return self.fc(x.mean((2, 3))), None


@pytest.mark.parametrize("name", ["models.py", "support/features.py", "zoo/of_a_fork.py"])
def test_an_edit_of_any_file_that_may_make_features_counts(tmp_path, monkeypatch, name):
    for folder in ("support", "zoo"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(backbones, "__file__", str(tmp_path / "support/backbones.py"))
    found = [backbones.code_of_features.__wrapped__()]
    for text in ("one", "two"):
        (tmp_path / name).write_text(text)
        found.append(backbones.code_of_features.__wrapped__())
    assert len(set(found)) == 3


def test_cached_features_are_computed_once_and_belong_to_what_made_them(tmp_path, capsys,
                                                                        monkeypatch):
    net, images = Counting(), pictures([0, 1, 2, 0, 1])
    x = backbones.cached(net, images, 32, tmp_path / "features")
    assert net.calls == 5 and torch.equal(x, features.features(net, images, 32, normalize=False))
    net.calls = 0
    again = backbones.cached(net, images, 32, tmp_path / "features")
    assert net.calls == 0 and torch.equal(again, x) and "read from" in capsys.readouterr().out
    others = {"weights": (Counting(1), images, 32), "size": (net, images, 16),
              "pixels": (net, pictures([0, 1, 2, 0, 1], seed=1), 32),
              "fewer": (net, data.subset(images, 4), 32)}
    for name, (backbone, part, img_size) in others.items():
        backbone.calls = 0
        backbones.cached(backbone, part, img_size, tmp_path / "features")
        assert backbone.calls == len(part), name
    with monkeypatch.context() as patch:
        patch.setattr(backbones, "code_of_features", lambda: "that of an edited file")
        net.calls = 0
        backbones.cached(net, images, 32, tmp_path / "edited")
        patch.undo()
        backbones.cached(net, images, 32, tmp_path / "edited")
        assert net.calls == 10
    net.calls = 0
    backbones.cached(net, images, 32, tmp_path / "features", crop=False)
    backbones.cached(net, images, 32, tmp_path / "features", pool="mean")
    backbones.cached(net, images, 32, None)  # --no-cache
    assert net.calls == 15 and len(os.listdir(tmp_path / "features")) == 7
    assert all(f.endswith(".pt") for f in os.listdir(tmp_path / "features"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "text"])
def test_a_damaged_cache_file_is_said_and_computed_anew(tmp_path, capsys, damage):
    net, images = Counting(), pictures([0, 1, 2] * 30)
    x = backbones.cached(net, images, 32, tmp_path)
    path, = tmp_path.iterdir()
    whole = path.read_bytes()
    at = whole.index(x.numpy().tobytes()[:64]) + 5  # a byte in the numbers
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
    path.write_bytes({"cut": whole[:len(whole) // 2], "flipped": flipped, "empty": b"",
                      "text": b"hello", "other": whole}[damage])
    if damage == "other":
        torch.save({"about": {}, "x": torch.zeros(90, 4)}, path)
    net.calls = 0
    assert torch.equal(backbones.cached(net, images, 32, tmp_path), x) and net.calls == 90
    assert "computed anew" in capsys.readouterr().out
    net.calls = 0
    assert torch.equal(backbones.cached(net, images, 32, tmp_path), x) and net.calls == 0


def test_a_cache_that_cannot_be_written_is_not_fatal(tmp_path, capsys):
    (tmp_path / "features").write_text("a file is in the way")
    assert backbones.cached(Counting(), pictures([0, 1]), 32, tmp_path / "features").shape == (2, 4)
    assert "not kept" in capsys.readouterr().out


def test_files_on_disk_are_known_by_path_size_and_time(tmp_path):
    for i in range(2):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / f"{i}.png")
    images = data.Files([str(tmp_path / f"{i}.png") for i in range(2)], None, [], "")
    first = backbones.hash_of_images(images)
    assert backbones.hash_of_images(images) == first
    os.utime(tmp_path / "1.png", (1, 1))
    assert backbones.hash_of_images(images) != first
    os.utime(tmp_path / "0.png", (1, 1))
    second = backbones.hash_of_images(images)
    # the pixels of deep files change with what is white in them
    assert backbones.hash_of_images(dataclasses.replace(images, white=4095)) != second


# ---- backbones of others -------------------------------------------------------------------------

def nano(seed=0):
    torch.manual_seed(seed)
    return models.build("vit_nano", patch_size=8, img_size=32).state_dict()


def prefixed(tensors, prefix="module.backbone."):
    return {prefix + name: tensor for name, tensor in tensors.items()}


DINO = {"teacher": prefixed(nano(1)) | {"module.head.last_layer.weight_v": torch.zeros(9, 4)},
        "student": prefixed(nano(2)), "epoch": 3}
CLASSIFIER = nano(1) | {"head.weight": torch.zeros(10, 96), "head.bias": torch.zeros(10)}


@pytest.mark.parametrize("content, which, seed, words", [
    (DINO, "teacher", 1, "teacher, vit_nano.*not used: head.last_layer"),
    (DINO, "student", 2, "student, vit_nano"),
    (nano(1), "teacher", 1, "only copy.*not used: none"),
    ({"state_dict": nano(1)}, "teacher", 1, "only copy"),
    ({"model": CLASSIFIER}, "teacher", 1, "not used: head.weight, head.bias"),
    ({"model": nano(1) | {"mask_token": torch.zeros(1, 1, 96), "masked_embed": torch.zeros(1, 96),
                          "decoder_pos_embed": torch.zeros(1, 17, 8)}}, "teacher", 1,
     "not used: mask_token, masked_embed, decoder_pos_embed"),  # MAE's and iBOT's
    ({"student": DINO["student"], "loss": {"center": torch.zeros(3)}}, "teacher", 2,
     "student, vit_nano")])
def test_layouts_of_others(tmp_path, content, which, seed, words):
    torch.save(content, tmp_path / "foreign.pth")
    path = tmp_path / "foreign.pth"
    net, args, description = backbones.load_backbone(path, which, arch="vit_nano")
    wanted = nano(seed)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, wanted[name])
    assert args == {"arch": "vit_nano", "patch_size": 8, "img_size": 32} and not net.training
    assert re.search(words, description) and "\n" not in description


@pytest.mark.parametrize("teacher, student, words", [
    ("state_dict.momentum_backbone.", "state_dict.backbone.",  # solo-learn
     (r"teacher \(state_dict.momentum_backbone\)", r"student \(state_dict.backbone\)")),
    ("module.encoder_k.", "module.encoder_q.",  # MoCo
     (r"teacher \(module.encoder_k\)", r"student \(module.encoder_q\)")),
    ("module.momentum_encoder.", "module.base_encoder.",  # MoCo v3
     (r"teacher \(module.momentum_encoder\)", r"student \(module.base_encoder\)")),
    ("target_encoder.net.", "online_encoder.net.",  # BYOL
     (r"teacher \(target_encoder.net\)", r"student \(online_encoder.net\)")),
    ("target_network_state_dict.encoder.", "online_network_state_dict.encoder.",
     (r"teacher \(target_network_state_dict.encoder\)", "student")),
    ("teacher_backbone.", "student_backbone.", ("teacher,", "student,")),  # lightly
    ("backbone_momentum.", "backbone.",
     (r"teacher \(backbone_momentum\)", r"student \(backbone\)")),
    ("backbone.vit.", "anchor_backbone.vit.",
     (r"teacher \(backbone.vit\)", r"student \(anchor_backbone.vit\)")),
    ("target_encoder.module.", "encoder.module.", (r"teacher \(target", r"student \(encoder")),
    ("teacher.backbone._orig_mod.", "student._orig_mod.module.backbone.", ("teacher,", "student,")),
    ("student_ema.", "student.", (r"moving average \(student_ema\)", "student,"))])
def test_each_copy_is_found_and_named(tmp_path, teacher, student, words):
    heads = {f"{student}head.weight": torch.zeros(2), "projector.0.weight": torch.zeros(2)}
    torch.save(prefixed(nano(1), teacher) | prefixed(nano(2), student) | heads, tmp_path / "f.pth")
    for which, seed, copy in ("teacher", 1, words[0]), ("student", 2, words[1]):
        net, _, description = backbones.load_backbone(tmp_path / "f.pth", which, arch="vit_nano")
        expected = nano(seed)
        assert all(torch.equal(w, expected[name]) for name, w in net.state_dict().items())
        assert re.search(rf"unknown\), {copy}.*vit_nano", description)


def numbered(net):
    """The weights of nn.Sequential(*net.children()[:-1]), as lightly's examples build a ResNet."""
    return nn.Sequential(*list(net.children())[:-1]).state_dict()


def nested(net):
    """The file of a ResNet as VISSL writes it."""
    trunk = prefixed(net.state_dict(), "_feature_blocks.")
    return {"classy_state_dict": {"base_model": {"model": {
        "trunk": trunk, "heads": {"0.prototypes0.weight": torch.zeros(5, 4)}}}}}


@pytest.mark.parametrize("stored, copy, unused", [
    (lambda net: prefixed(numbered(net), "backbone_momentum."),
     r"teacher \(backbone_momentum\)", "none"),
    (nested, "only copy", "heads.0.prototypes0.weight, fc.weight, fc.bias")])
def test_resnets_with_other_names(tmp_path, stored, copy, unused):
    torch.manual_seed(0)
    net = resnet18()
    torch.save(stored(net), tmp_path / "r.pth")
    ours, _, description = backbones.load_backbone(tmp_path / "r.pth", arch="resnet18")
    theirs = net.state_dict()
    assert all(torch.equal(w, theirs[name]) for name, w in ours.state_dict().items())
    assert re.search(f", {copy}, resnet18; not used: {unused}$", description)


def test_a_run_of_ours_can_be_read_by_arch_and_at_another_size(tmp_path):
    path = checkpoint(tmp_path / "run")
    ours, args, description = backbones.load_backbone(path, img_size=64)
    assert args["img_size"] == 64
    assert "step 7, carp with joint prototypes (K = 64), teacher" in description
    foreign = backbones.load_backbone(path, arch="vit_nano")[0]
    student = backbones.load_backbone(path, "student")[0]
    assert backbones.fingerprint(ours) == backbones.fingerprint(foreign)
    assert backbones.fingerprint(ours) != backbones.fingerprint(student)
    with pytest.raises(ValueError, match="--img-size 30 must be a multiple of 8"):
        backbones.load_backbone(path, img_size=30)


@pytest.mark.parametrize("size", [7, 3])
def test_torchvisions_resnets(tmp_path, size):
    torch.manual_seed(0)
    net = resnet18()
    net.bn1.running_mean.fill_(0.2)
    if size == 3:
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    old = {name: w for name, w in net.state_dict().items() if "tracked" not in name}  # as old files
    torch.save(old, tmp_path / "r.pth")
    ours, args, description = backbones.load_backbone(tmp_path / "r.pth", arch="resnet18")
    assert args["img_size"] == (224 if size == 7 else 32)
    assert "not used: fc.weight, fc.bias" in description
    net.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(features.embed(ours, x), net.eval()(x))


@pytest.mark.parametrize("change, kind, words", [
    (lambda s: s.pop("norm.weight"), {}, "no norm.weight"),
    (lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(96)}), {}, "blocks.0.ls1.gamma too many"),
    (lambda s: s.update({"blocks.3.norm1.weight": torch.ones(96)}), {},
     "blocks.3.norm1.weight too many"),
    (lambda s: s.update(reg_token=torch.ones(1, 4, 96)), {}, "reg_token too many"),
    (lambda s: s.update({"norm.bias": torch.zeros(5)}), {}, r"norm.bias \(5,\) for \(96,\)"),
    (lambda s: s.update(pos_embed=torch.zeros(5)), {}, r"pos_embed \(5,\) for"),
    (lambda s: s.update(pos_embed=torch.zeros(1, 0, 96)), {}, r"pos_embed \(1, 0, 96\) for"),
    (lambda s: s.update({"patch_embed.proj.weight": torch.tensor(1.)}), {}, r"patch_embed.proj.w"),
    (lambda s: s.update({"blocks.0.norm1.bias": torch.zeros(96).to_sparse()}), {},
     "blocks.0.norm1.bias is sparse"),
    (lambda s: s.update({"layer1.0.conv1.weight": torch.ones(()), "conv1.weight": torch.ones(())}),
     {"arch": "resnet18"}, "does not fit --arch resnet18"),
    (lambda s: s.clear() or s.update(a=torch.zeros(2)), {},
     "holds no teacher that fits --arch vit_nano; its keys: a"),
    (lambda s: None, {"arch": "vit_tiny"}, "does not fit --arch vit_tiny"),
    (lambda s: None, {"arch": "resnet18"}, "holds no teacher that fits --arch resnet18"),
    (lambda s: None, {"arch": "vit_huge"}, "--arch vit_huge is not one of"),
    (lambda s: None, {"arch": None}, "lacks args.*--arch"),
    (lambda s: None, {"patch_size": 16}, "--patch-size 16 does not fit"),
])
def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path, change, kind, words):
    state = nano()
    change(state)
    torch.save(state, tmp_path / "f.pth")
    with pytest.raises(ValueError, match=words) as error:
        backbones.load_backbone(tmp_path / "f.pth", **{"arch": "vit_nano"} | kind)
    assert "\n" not in str(error.value)


def test_timms_vit_small_in_dinos_format_gives_timms_features(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    teacher = prefixed(theirs.state_dict(), "backbone.") | {"head.mlp.0.bias": torch.zeros(2)}
    torch.save({"teacher": teacher}, tmp_path / "dino.pth")
    ours, args, _ = backbones.load_backbone(tmp_path / "dino.pth", arch="vit_small")
    assert args == {"arch": "vit_small", "patch_size": 16, "img_size": 224}
    x = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    images = data.Images(x, None, [], "")
    got = features.features(ours, images, 224, normalize=False)
    with torch.no_grad():
        wanted = theirs(torch.cat(list(views.eval_batches(images, 224))))
    assert (got - wanted).abs().max() < 1e-4 and wanted.std() > 0.1


# ---- the file of results -------------------------------------------------------------------------

def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_results_gather_in_one_file_whatever_their_columns(tmp_path):
    path = tmp_path / "results.csv"
    evaluation.record(path, {"a": 1, "b": "x, y"})
    evaluation.record(path, {"b": "z", "a": 2})
    assert path.read_text().count("\n") == 3
    evaluation.record(path, {"a": 3, "c": 0.5})
    lines = rows(path)
    assert [(line["a"], line["b"], line["c"]) for line in lines] == [
        ("1", "x, y", ""), ("2", "z", ""), ("3", "", "0.5")]
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line["time"])
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"]


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    path = tmp_path / "results.csv"
    evaluation.record(path, {"a": 1, "b": 2})
    with open(path, "a") as f:
        f.write("2026-01-01 00:00:00,7")  # the disk was full
    evaluation.record(path, {"a": 3, "b": 4})
    assert [(r["a"], r["b"]) for r in rows(path)] == [("1", "2"), ("7", None), ("3", "4")]
    evaluation.record(path, {"c": 5})
    assert [r["c"] for r in rows(path)] == ["", "", "", "5"]
    path.write_text("")
    evaluation.record(path, {"a": 1})
    assert [r["a"] for r in rows(path)] == ["1"]


# ---- protocols through the command line ----------------------------------------------------------

SHORT = {"lbfgs": [], "grid": ["--steps", "40"], "attentive": ["--steps", "40"],
         "sgd": ["--epochs", "3", "--lr", "0.01", "0.5"], "transfer": []}


@pytest.mark.parametrize("protocol", eval_linear.LINEAR)
def test_every_linear_protocol_learns_colours_and_says_so(tmp_path, monkeypatch, small, capsys,
                                                          protocol):
    if protocol == "transfer":
        pytest.importorskip("sklearn")
        monkeypatch.setattr(probes, "STRENGTHS", probes.STRENGTHS[::9])
    run = checkpoint(tmp_path / "run")
    out = go(run, "--protocol", protocol, *SHORT[protocol], "--dump", tmp_path / "f.pt")
    text = capsys.readouterr().out
    assert out["accuracy"] > 90 and out["protocol"] == protocol and out["metric"] == "top1"
    assert (out["train"], out["test"]) == (60, 30)
    layers = 3 if protocol in ("grid", "sgd") else 1
    assert (out["layers"], out["pool"]) == (layers, "cls") and f"({96 * layers}-d" in text
    for words in ("step 7, carp with joint prototypes (K = 64), teacher vit_nano",
                  f"protocol linear-2 {protocol}", "medium (3)",
                  "shapes: 60 training images, 30 test images, 3 classes"):
        assert words in text
    table = rows(tmp_path / "run" / "results.csv")
    assert len(table) == len(out["results"]) == (4 if protocol == "sgd" else 1)
    line = table[0]
    assert list(line) == [
        "time", "tool", "protocol", "checkpoint", "weights", "which", "arch", "method",
        "prototypes", "num_prototypes", "data",
        "mean", "std", "imbalance", "train", "test", "metric", "img_size",
        "layers", "pool", "seed", "head_above", "tail_below", "settings", "result", "all", "head",
        "medium", "tail", "per_class"]
    assert float(line["all"]) == pytest.approx(out["accuracy"], abs=1e-3)
    assert line["protocol"] == f"linear-2 {protocol}"
    weights = backbones.fingerprint(backbones.load_backbone(run)[0])
    assert line["weights"] == out["weights"] == weights
    assert line["imbalance"] == "" and line["head"] == ""
    assert line["seed"] == ("0" if protocol in ("grid", "sgd") else "")
    assert float(line["medium"]) > 90 and float(line["per_class"]) > 90
    assert line["settings"] == {
        "lbfgs": "weight_decay=0.0 raw=False", "grid": "steps=40",
        "sgd": "epochs=3 lr=0.01,0.5 workers=0", "transfer": ""}[protocol]
    dump = torch.load(tmp_path / "f.pt", weights_only=True)
    assert dump["train_x"].shape == (60, 96 * layers) and dump["test_y"].tolist() == [0, 1, 2] * 10
    again = go(run, "--protocol", protocol, *SHORT[protocol], "--results", tmp_path / "other.csv",
               "--no-cache")
    assert again["results"] == out["results"]  # the same seed gives the same number
    assert len(rows(tmp_path / "other.csv")) == len(table)


def test_sgd_reports_the_best_epoch_and_the_last_and_leaves_the_backbone_alone(tmp_path, small,
                                                                               monkeypatch):
    run = checkpoint(tmp_path / "run", arch="resnet18")
    loaded, load_backbone = [], backbones.load_backbone

    def spy(*args):
        loaded.append(load_backbone(*args))
        return loaded[-1]
    monkeypatch.setattr(backbones, "load_backbone", spy)

    def always(c):  # W, b of a head that predicts class c
        return torch.zeros(3, 512), 9.0 * F.one_hot(torch.tensor(c), 3)

    def heads(batches, D, C, lrs, **kw):  # lr 1: 1/2, 1/3, 1/6 right; lr 2: 1/6 each
        list(batches)
        for c in range(3):
            yield [always(c), always(2)]
    edge(monkeypatch, [0, 1, 2] * 4, [0, 0, 0, 1, 1, 2])
    monkeypatch.setattr(probes, "sgd", heads)
    out = go(run, "--protocol", "sgd", "--epochs", "3", "--lr", "1", "2")
    assert {k: round(6 * v["all"] / 100) for k, v in out["results"].items()} == {
        "lr 1, best": 3, "lr 1, last": 1, "lr 2, best": 1, "lr 2, last": 1}
    assert out["accuracy"] == 50 and "the best epoch, 1 of lr 1, 1 of lr 2, is" in out["note"]
    fresh = load_backbone(run)[0]
    used = loaded[0][0]
    assert backbones.fingerprint(used) == backbones.fingerprint(fresh)  # statistics too


class Stop(Exception):
    """Raised by a stand-in: what comes after it is not of interest."""


@pytest.mark.parametrize("n, batch", [(60, 60), (500, 64), (10_000, 100), (1_281_167, 1024)])
def test_sgd_has_dinos_batch_on_large_sets_and_a_hundred_steps_on_small_ones(monkeypatch, n, batch):
    asked = {}

    def sgd(batches, D, C, lrs, *, steps, **kw):
        asked.update(steps=steps, lr=lrs[0])
        next(batches)

    def batches(images, recipe, **kw):
        asked.update(recipe=recipe, batch_size=kw["batch_size"])
        raise Stop
    monkeypatch.setattr(eval_linear, "batches", batches)
    monkeypatch.setattr(probes, "sgd", sgd)
    flags = SimpleNamespace(img_size=32, epochs=1, lr=[0.001], device="cpu", seed=0, workers=0,
                            mean=[0.5] * 3, std=[0.25] * 3)
    with pytest.raises(Stop):
        eval_linear.sgd(None, range(n), None, torch.zeros(2, 5), None, range(3), flags)
    assert asked["steps"] == n // batch and asked["batch_size"] == batch
    assert asked["lr"] == pytest.approx(0.001 * batch / 256)
    recipe = asked["recipe"]  # RandomResizedCrop(.08, 1) and a flip, no more
    assert recipe.views()[0] == (32, (0.08, 1.0), 0, 0) and recipe.n_local == 0
    assert (recipe.jitter_p, recipe.gray_p, recipe.flip_p) == (0, 0, 0.5)
    assert (recipe.mean, recipe.std) == ([0.5] * 3, [0.25] * 3)


def test_sgd_crops_anew_for_each_epoch(tmp_path, small, monkeypatch):
    crops, labels, embed = [], [], eval_linear.embed

    def spy(backbone, x, *rest):
        crops.append(x.clone())
        return embed(backbone, x, *rest)

    def sgd(batches, D, C, lrs, **kw):
        labels.extend(y for _, y in batches)
        yield [(torch.zeros(C, D), torch.zeros(C)) for _ in lrs]
    monkeypatch.setattr(eval_linear, "embed", spy)
    monkeypatch.setattr(probes, "sgd", sgd)
    go(checkpoint(tmp_path / "run"), "--protocol", "sgd", "--epochs", "2", "--no-cache")
    assert [tuple(x.shape) for x in crops] == [(60, 3, 32, 32)] * 2
    mean, std = (torch.tensor(values)[:, None, None] for values in (views.MEAN, views.STD))
    for x, y in zip(crops, labels):  # a crop of a picture still shows its class
        assert torch.equal((x * std + mean).mean((2, 3)).argmax(1), y)
    sums = [x.sum((1, 2, 3)).sort().values for x in crops]  # whatever the order of the images
    assert not torch.equal(sums[0], sums[1])


@pytest.mark.parametrize("protocol", SHORT)
def test_a_folder_of_images_of_many_sizes(tmp_path, monkeypatch, protocol):
    """Not in memory: decoded when needed, cropped by torchvision, known in the cache by path, size
    and time."""
    monkeypatch.setattr(probes, "STRENGTHS", probes.STRENGTHS[::15])
    for split, n in (("train", 10), ("val", 3)):
        for c in range(2):
            folder = tmp_path / "images" / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(n):
                x = np.random.default_rng(i + 100 * c).integers(0, 90, (36 + i, 44 - i, 3))
                x[..., 2 * c] += 160
                Image.fromarray(x.astype(np.uint8)).save(folder / f"{i}.png")
    run = checkpoint(tmp_path / "run")
    out = go(run, "--data", tmp_path / "images", "--protocol", protocol, *SHORT[protocol])
    assert (out["train"], out["test"]) == (20, 6) and out["accuracy"] == 100
    files = sorted((tmp_path / "run").rglob("*"))
    again = go(run, "--data", tmp_path / "images", "--protocol", protocol, *SHORT[protocol])
    assert again["results"] == out["results"]
    assert sorted((tmp_path / "run").rglob("*")) == files


def edge(monkeypatch, train, test):
    """--data shapes is pictures of these labels."""
    images = pictures(train), pictures(test, seed=1)
    monkeypatch.setattr(data, "load", lambda name, **kw: images)


@pytest.mark.parametrize("protocol", SHORT)
def test_a_class_that_training_lacks_is_never_predicted_and_counts_as_wrong(tmp_path, monkeypatch,
                                                                            protocol):
    monkeypatch.setattr(probes, "STRENGTHS", probes.STRENGTHS[::15])
    edge(monkeypatch, [0, 2] * 40, [0, 1, 2, 2])
    out = go(checkpoint(tmp_path / "run"), "--protocol", protocol, *SHORT[protocol])
    table = next(iter(out["results"].values()))
    assert table["all"] == 75 and table["per_class"] == pytest.approx(100 * 2 / 3)
    assert table["classes"] == {"head": 0, "medium": 2, "tail": 1}


@pytest.mark.parametrize("protocol", SHORT)
def test_one_class_alone(tmp_path, monkeypatch, protocol):
    monkeypatch.setattr(probes, "STRENGTHS", probes.STRENGTHS[:2])
    edge(monkeypatch, [1] * 12, [1] * 4)
    out = go(checkpoint(tmp_path / "run"), "--protocol", protocol, *SHORT[protocol])
    assert out["accuracy"] == 100


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("protocol", SHORT)
def test_a_class_with_a_single_image(tmp_path, monkeypatch, protocol, held_out):
    """Among the images that train, or among those held out for choosing, so that a refit meets a
    class more."""
    monkeypatch.setattr(probes, "STRENGTHS", probes.STRENGTHS[::15])
    if protocol in ("grid", "attentive"):
        order = torch.randperm(31, generator=torch.Generator().manual_seed(42)).tolist()
    else:
        order = np.random.RandomState(0).permutation(31).tolist()
    labels = [0, 2] * 15 + [0]
    labels[order[0 if held_out else -1]] = 1
    edge(monkeypatch, labels, [0, 2, 2])
    out = go(checkpoint(tmp_path / "run"), "--protocol", protocol, *SHORT[protocol])
    assert out["accuracy"] == 100


def test_a_path_goes_on_and_starts_anew_where_a_class_comes_in():
    pytest.importorskip("sklearn")
    x, y = sample(80)
    one = probes.fit_logistic(x[:3], torch.zeros(3, dtype=int), 1.0)
    assert one == [0] and probes.apply_logistic(one, x).tolist() == [0] * 80
    weak = probes.fit_logistic(x, y, 1e-4, one)
    before = weak[0].coef_.copy()
    strong = probes.fit_logistic(x, y, 10.0, weak)
    assert (weak[0].coef_ == before).all()  # the earlier one stays as it is
    again = probes.fit_logistic(x, y, 10.0, strong)
    assert again[0].n_iter_ < strong[0].n_iter_  # a warm start has little left to do
    assert len(probes.fit_logistic(x, y + (y == 3), 1.0, strong)[0].classes_) == 4
    assert probes.fit_logistic(x, y * (y != 3), 1.0, strong)[0].classes_.tolist() == [0, 1, 2]


@pytest.mark.parametrize("protocol", ["grid", "attentive", "transfer"])
def test_nothing_can_be_held_out_of_one_image(tmp_path, monkeypatch, capsys, protocol):
    edge(monkeypatch, [0], [0])
    with pytest.raises(SystemExit) as stop:
        go(checkpoint(tmp_path / "run"), "--protocol", protocol)
    assert stop.value.code == 2 and "1 training image" in capsys.readouterr().err


def test_the_classifier_sees_what_the_run_saw(tmp_path, monkeypatch):
    calls = []

    def load(name, **kwargs):
        calls.append((name, kwargs))
        raise ValueError("enough")
    monkeypatch.setattr(data, "load", load)
    run = checkpoint(tmp_path / "run", seed=3, imbalance=50.0, imbalance_law="power",
                     data_root="there")
    for extra in ([], ["--data", "cifar10"], ["--data", "shapes", "--data-root", "here"]):
        with pytest.raises(SystemExit):
            go(run, *extra)
    whole = dict(seed=3, img_size=32)
    own = whole | dict(imbalance=50.0, imbalance_law="power")
    assert calls == [("shapes", own | {"root": "there"}), ("cifar10", whole | {"root": "there"}),
                     ("shapes", own | {"root": "here"})]


def test_results_that_cannot_be_kept_are_still_shown(tmp_path, small, capsys):
    run = checkpoint(tmp_path / "run", imbalance=5.0)
    (tmp_path / "run" / "results.csv").mkdir()
    out = go(run)
    text = capsys.readouterr().out
    assert out["accuracy"] > 90 and f"{out['accuracy']:.2f}" in text.split("not kept")[0]
    (tmp_path / "run" / "results.csv").rmdir()
    go(run)
    assert rows(tmp_path / "run" / "results.csv")[0]["imbalance"] == "5 exp seed 0"


def test_transfer_data_sets_bring_their_own_splits_and_measure(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    from support import transfer
    monkeypatch.setattr(probes, "STRENGTHS", np.array([1.0, 0.1]))
    monkeypatch.setitem(transfer.METRIC, "flowers", "per_class")
    monkeypatch.setitem(transfer.METRIC, "voc2007", "map11")
    splits = (pictures([0, 1, 2] * 9), pictures([0, 1, 2] * 3, seed=1),
              pictures([0, 0, 0, 1, 2], seed=2))
    multi_label = [data.Images(part.x, F.one_hot(part.y, 3), part.classes, "") for part in splits]
    sets = {"flowers": splits, "voc2007": tuple(multi_label)}
    monkeypatch.setattr(transfer, "load", lambda name, root: sets[name])
    run = checkpoint(tmp_path / "run")
    out = go(run, "--protocol", "transfer", "--data", "flowers", "--dump", tmp_path / "f.pt")
    assert out["metric"] == "per_class" and out["train"] == 36
    dump = torch.load(tmp_path / "f.pt", weights_only=True)  # all that the probe was fitted to
    assert dump["train_y"].tolist() == [0, 1, 2] * 12 and dump["train_x"].shape == (36, 96)
    assert out["accuracy"] == out["results"]["test"]["per_class"]
    out = go(run, "--protocol", "transfer", "--data", "voc2007")
    assert out["results"]["test"] == {"map11": out["accuracy"]} and out["accuracy"] > 90
    assert "11-point mAP" in capsys.readouterr().out
    assert rows(tmp_path / "run" / "results.csv")[1]["map11"]


@pytest.mark.parametrize("flags, words", [
    (["--protocol", "lbfgs", "--steps", "5"],
     "--steps is read by --protocol grid or attentive alone, not lbfgs"),
    (["--protocol", "attentive", "--pool", "mean"],
     "--pool is read by --protocol lbfgs or grid or sgd or transfer alone, not attentive"),
    (["--protocol", "attentive", "--layers", "2"], "--layers is read by .* not attentive"),
    (["--protocol", "attentive", "--dump", "f.pt"], "--dump is read by .* not attentive"),
    (["--protocol", "grid", "--raw"], "--raw is read by --protocol lbfgs alone"),
    (["--protocol", "sgd", "--weight-decay", "0"], "--weight-decay is read by"),
    (["--protocol", "lbfgs", "--seed", "3"], "--seed is read by .* sgd alone, not"),
    (["--weight-decay", "-1"], "--weight-decay must not be negative, got -1"),
    (["--weight-decay", "inf"], "--weight-decay must be a number below 4294967296 in size"),
    (["--weight-decay", "nan"], "--weight-decay must not be negative, got nan"),
    (["--weight-decay", "1e400"], "--weight-decay must be a number below"),
    (["--seed", "9" * 20], f"--seed must be a number below 4294967296 in size, got {'9' * 20}"),
    (["--seed", "-1"], "--seed must not be negative, got -1"),
    (["--protocol", "grid", "--steps", "9" * 400], "--steps must be a number below"),
    (["--protocol", "sgd", "--workers", "2000"], r"--workers must lie in \[0, 1000\], got 2000"),
    (["--protocol", "sgd", "--epochs", "0"], "--epochs must be at least 1, got 0"),
    (["--protocol", "sgd", "--lr", "0"], "--lr must be above 0"),
    (["--protocol", "sgd", "--lr", "0.1", "inf"], "--lr must be a number below .* got 0.1 inf"),
    (["--protocol", "sgd", "--lr", "nan", "0.1"], "--lr must be above 0, got nan 0.1"),
    (["--batch-size", "0"], "--batch-size must be at least 1"),
    (["--head", "5"], "--tail 20 must be at most --head 5 plus 1"),
    (["--layers", "9"], r"--layers 9 must lie in 1\.\.3"),
    (["--layers", "0"], "--layers must be at least 1, got 0"),
    (["--layers", "2", "--pool", "mean"], "--pool mean takes the patches of .* got --layers 2"),
    (["--img-size", "33"], "--img-size 33"),
    (["--img-size", "0"], "--img-size must be at least 2, got 0"),
    (["--data", ""], "--data must not be empty, got an empty text"),
    (["--results", "no/such/results.csv"], "--results no/such/results.csv must be a file in"),
    (["--arch", "resnet18"], "fits --arch resnet18"),
    (["--data", "nowhere"], "nowhere"),
    (["--dump", "no/such/f.pt"], "--dump no/such"),
    (["--device", "abacus"], "--device abacus"),
])
def test_command_line_refuses_with_exit_2(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.delattr(backbones, "cached")  # before the long work, not after it
    device = [] if "--device" in flags else ["--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        eval_linear.main([checkpoint(tmp_path / "run"), *device, *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("eval_linear.py: ") and err.count("\n") == 1
    assert re.search(words, err)


def test_test_images_are_standardised_as_the_training_images_were(tmp_path, monkeypatch):
    edge(monkeypatch, [0, 1, 2] * 20, [1] * 9)  # by their own mean they would look like anything
    assert go(checkpoint(tmp_path / "run"))["accuracy"] == 100


def test_raw_features_are_left_as_they_are(tmp_path, monkeypatch, small):
    fitted_to, lbfgs = [], probes.lbfgs

    def spy(x, *rest, **kw):
        fitted_to.append(x)
        return lbfgs(x, *rest, **kw)
    monkeypatch.setattr(probes, "lbfgs", spy)
    run = checkpoint(tmp_path / "run")
    go(run)
    go(run, "--raw", "--weight-decay", "0.01")
    standardised, raw = fitted_to
    assert standardised.mean(0).abs().max() < 1e-4
    assert (standardised.std(0, correction=0) - 1).abs().max() < 1e-3
    backbone = backbones.load_backbone(run)[0]
    plain = features.features(backbone, small[0], 32, normalize=False)
    torch.testing.assert_close(raw, plain)


@pytest.mark.parametrize("protocol", eval_linear.LINEAR)
def test_transfer_alone_cuts_no_border_off(tmp_path, monkeypatch, small, protocol):
    crops = []

    def cached(*args, crop, **kw):
        crops.append(crop)
        raise ValueError("enough")
    monkeypatch.setattr(backbones, "cached", cached)
    with pytest.raises(SystemExit):
        go(checkpoint(tmp_path / "run"), "--protocol", protocol)
    assert crops == [protocol != "transfer"]


def test_images_without_labels_or_without_a_test_split_are_refused(tmp_path, monkeypatch, capsys):
    """A folder with one image of each class has labels, and nothing is left for a test split."""
    loose = data.Images(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), None, [], "x")
    for images, words in ((loose, "no labels"), (pictures([0, 1, 2]), "no test split")):
        monkeypatch.setattr(data, "load", lambda name, **kw: (images, None))
        with pytest.raises(SystemExit) as stop:
            go(checkpoint(tmp_path / "run"))
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_images_that_a_run_has_never_seen_are_named_beside_its_numbers(tmp_path, small, capsys):
    go(checkpoint(tmp_path / "today"))
    assert "note:" not in capsys.readouterr().err
    go(checkpoint(tmp_path / "before", data_version=1))
    err = capsys.readouterr().err
    assert f"saw version 1 of the images shapes; these are version {data.VERSIONS['shapes']}" in err


def test_a_full_disk_is_one_sentence_after_the_numbers(tmp_path, monkeypatch, small, capsys):
    def write(path, put, old_name=None):
        raise OSError(28, "No space left on device", path)
    run = checkpoint(tmp_path / "run")
    monkeypatch.setattr(evaluation, "write", write)
    with pytest.raises(SystemExit) as stop:
        go(run, "--dump", tmp_path / "f.pt")
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert err == f"eval_linear.py: error: {tmp_path / 'f.pt'}: No space left on device\n"
    assert " 100.00 " in out and "the numbers are not kept: " in out


def test_a_column_whose_deviation_is_rounding_becomes_0():
    x = torch.full((999, 1), 0.1)
    x[::2] = torch.nextafter(torch.tensor(0.1), torch.tensor(1.))  # the next float32
    assert x.std() > 0
    part, = probes.standardise(x)
    assert not part.any()
