"""collapse.py and what it calls: counts against plain float64 loops, every checkpoint layout, hostile files."""
import argparse
import csv
import json
import math
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from support import checkpoints
import collapse
from support import plots
from support import report


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(*degrees):
    a = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([a.cos(), a.sin()], 1)


# ---- the oracles: one row at a time, float64 -------------------------------------------------------------------------
def slow_owner(C, eps):
    C = C.double().numpy()
    size, reps, owner = np.linalg.norm(C, axis=1), [], []
    for k in range(len(C)):
        claims = [r for r in reps if 1 - C[k] @ C[r] / (size[k] * size[r]) < eps] if size[k] else []
        owner.append(claims[0] if claims else k if size[k] else -1)
        if owner[-1] == k:
            reps.append(k)
    return owner


def slow_components(C, eps):
    U = torch.nn.functional.normalize(C.double(), dim=1).numpy()
    name = list(range(len(U)))
    for i in range(len(U)):
        for j in range(i):
            if 1 - U[i] @ U[j] < eps and name[i] != name[j]:
                old, new = max(name[i], name[j]), min(name[i], name[j])
                name = [new if n == old else n for n in name]
    return name


@pytest.mark.parametrize("seed", range(8))
def test_greedy_leader_is_the_loop(seed):
    K, D = 90 + 7 * seed, (2, 3, 8, 40)[seed % 4]
    C = randn(K, D, seed=seed)
    C[5], C[20], C[50] = 3 * C[2], 1e-30 * C[2], 0  # scaled copies and a zero row
    C[30:60:3] = C[1] + 1e-3 * randn(10, D, seed=99)  # a cluster
    C[61], C[62] = -C[1], C[1] + 1e-7  # an antipode, and a copy that only float64 tells apart
    eps_list = [1e-9, .025, .1, .5, 1.3]
    owners = collapse.leaders(C, eps_list, block=7)  # 7: chains and clusters lie across many borders
    counts = collapse.unique_counts(C, eps_list)
    for eps in eps_list:
        want = slow_owner(C, eps)
        assert owners[eps].tolist() == want
        assert collapse.unique_prototypes(C, eps).tolist() == [k for k, o in enumerate(want) if o == k]
        assert counts[eps] == sum(k == o for k, o in enumerate(want))


@pytest.mark.parametrize("block", [1, 2, 5, 64])
def test_chains_across_blocks(block):
    step = math.degrees(math.acos(1 - .025)) * .7  # neighbours are within eps, next but one are not
    orders = torch.arange(40), torch.arange(39, -1, -1), torch.arange(40).view(2, 20).T.flatten()
    for order in orders:
        C = angles(*(step * k for k in range(40)))[order]
        assert collapse.leaders(C, [.025], block=block)[.025].tolist() == slow_owner(C, .025)
        _, graph = collapse.neighbours(C, [.025], block=block)
        assert graph[.025][0].all() and len(graph[.025][1].unique()) == 1
    in_line = angles(*(step * k for k in range(40)))
    assert len(collapse.unique_prototypes(in_line, .025)) == 20


@pytest.mark.parametrize("kind", ["even", "few axes", "one axis"])
def test_sketches_never_hide_a_duplicate(kind):
    """A sketch's products bound the cosines from above, it is narrower where that pays, and nothing is lost."""
    C = randn(300, 64, seed=5)
    if kind == "few axes":  # two thirds of the length in 4 dimensions
        C[:, :4] *= 6
    if kind == "one axis":  # all cosines above .9: no sketch can pay
        C[:, 0] = 40
    for k, cos in enumerate((1, .9999, .9751, .9749, .95, .91, .89)):  # planted pairs, on both sides of eps
        a, b = C[10 + k], randn(64, seed=k)
        b = b - (b @ a) / (a @ a) * a
        C[200 + 9 * k] = cos * a / a.norm() + math.sqrt(1 - cos ** 2) * b / b.norm()
    X, _ = collapse.unit_rows(C)
    Y = collapse.sketch(X, .1, 10)
    assert (Y is X) == (kind == "one axis") and Y.shape[1] in (9, 17, 33, 64)
    assert (Y @ Y.T - X @ X.T).min() > -collapse.slack(64) and (Y.norm(dim=1) - 1).abs().max() < 1e-6
    assert collapse.sketch(X, .1, 200) is X  # few blocks: not worth its axes
    owners = collapse.leaders(C, [.025, .1], block=10)
    assert all(owners[eps].tolist() == slow_owner(C, eps) for eps in owners)


def test_known_angles_and_strictness():
    C = angles(0, 10, 12, 90, 91, 180)
    assert collapse.unique_prototypes(C, .025).tolist() == [0, 3, 5]  # 12.8 degrees
    assert collapse.unique_prototypes(C, 1.5).tolist() == [0, 5]
    exactly_60 = torch.tensor([[1., 1, 0], [1, 0, 1]])
    assert len(collapse.unique_prototypes(exactly_60, .5)) == 2  # 1 - cos = eps is not < eps
    assert len(collapse.unique_prototypes(exactly_60, .5001)) == 1
    antipodes = torch.tensor([[1., 2, 3], [-1, -2, -3]])
    assert len(collapse.unique_prototypes(antipodes, 1.99)) == 2
    assert collapse.unique_prototypes(torch.tensor([[.1, .2]]), .5).tolist() == [0]  # K = 1


def test_duplicates_count_at_any_eps_but_not_at_zero():
    C = randn(50, 33).repeat(3, 1)
    C[100:] *= torch.rand(50, 1, generator=torch.Generator().manual_seed(1)).exp2()
    assert collapse.unique_counts(C[:100], [0, 1e-300, 1e-7, .2]) == {0: 100, 1e-300: 50, 1e-7: 50, .2: 50}
    assert collapse.unique_counts(C, [0, 1e-7]) == {0: 150, 1e-7: 50}
    assert collapse.unique_counts(randn(4, 8).half().repeat(2, 1), [1e-9]) == {1e-9: 4}
    assert collapse.unique_counts(torch.full((3, 4), 1e30), [.5]) == {.5: 1}  # squares overflow float32
    many = torch.ones(300, 8)  # 44,850 doubtful pairs: the product path
    many[150:, 0] += 1e-3
    assert collapse.unique_counts(many, [1e-9, 1e-12]) == {1e-9: 2, 1e-12: 2}
    at_60 = torch.tensor([[1., 1, 0], [1, 0, 1]]).repeat_interleave(150, 0)
    assert collapse.unique_counts(at_60, [.5]) == {.5: 2}


def test_low_precision_mode_is_overridden():
    C = randn(300, 64)
    near = torch.nn.functional.normalize(C, dim=1)
    near = torch.cat([near, near + .0275 * torch.nn.functional.normalize(randn(300, 64, seed=1), dim=1)])
    want = collapse.unique_counts(near, [3.75e-4])
    assert 300 < want[3.75e-4] < 600  # the threshold cuts the cloud
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert collapse.unique_counts(near, [3.75e-4]) == want
            with collapse.plain_float32(near.device):  # a CPU without bfloat16 products would not show it
                assert torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_bad_prototypes():
    C = randn(10, 4)
    C[3, 1], C[7, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of 10 .* row 3"):
        collapse.unique_prototypes(C, .5)
    for wrong in torch.zeros(5), torch.zeros(0, 4):
        with pytest.raises(ValueError, match="shape"):
            collapse.unique_prototypes(wrong, .5)
    for eps in -.1, 2.1, math.nan:
        with pytest.raises(ValueError, match="eps"):
            collapse.unique_prototypes(randn(3, 4), eps)
    assert collapse.unique_prototypes(torch.zeros(3, 4), .5).tolist() == []


# ---- the other measures ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
def test_neighbours_and_components(seed):
    C = randn(80, 5 + seed, seed=seed)
    C[40:60] = C[:20] + .3 * randn(20, 5 + seed, seed=9)
    nearest, graph = collapse.neighbours(C, [.02, .1, .4], block=9)
    U = torch.nn.functional.normalize(C.double(), dim=1)
    S = (U @ U.T).fill_diagonal_(-4)
    assert torch.allclose(nearest.double(), S.amax(1), atol=1e-6)
    for eps, (has, component) in graph.items():
        assert torch.equal(has, (1 - S < eps).any(1))
        assert component.tolist() == slow_components(C, eps)


def test_random_orders():
    C = angles(0, 10, 20)  # 2 unique from either end, 1 from the middle
    mean, sd = collapse.random_order_unique(C, .025, n=300)
    assert mean == pytest.approx(2 - 1 / 3, abs=.1) and sd == pytest.approx(math.sqrt(2) / 3, abs=.05)
    assert collapse.random_order_unique(C, .025, n=300) == (mean, sd)  # seeded
    assert collapse.random_order_unique(C, .025, n=300, seed=1) != (mean, sd)
    assert collapse.random_order_unique(C, [.025, 1.], n=300)[.025] == (mean, sd)
    assert collapse.random_order_unique(randn(100, 64), .5) == (100, 0)


def test_effective_rank_and_drift():
    assert collapse.effective_rank(torch.eye(6)) == pytest.approx(6)
    assert collapse.effective_rank(torch.ones(9, 4)) == pytest.approx(1, abs=1e-4)
    assert collapse.effective_rank(torch.eye(6)[[0, 1, 1, 1, 1]]) == pytest.approx(
        math.exp(-(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3)))  # singular values 1 and 2
    start = torch.tensor([[2., 0], [0, 4], [1, 0]])
    assert collapse.drift(start, start) == 0
    assert collapse.drift(start + torch.tensor([[0, 1.], [1, 0], [3, 0]]), start) == pytest.approx(.5)  # .5, .25, 3
    with pytest.raises(ValueError, match="equal shapes"):
        collapse.drift(start, start[:2])


def test_usage_by_hand():
    P = torch.tensor([[.7, .3, 0, 0], [.6, .4, 0, 0], [.1, .9, 0, 0], [.5, 0, .5, 0]])
    mean = P.double().mean(0)
    perplexity = math.exp(-sum(float(p) * math.log(p) for p in mean if p > 0)) / 4
    assert collapse.usage(P) == pytest.approx((.5, perplexity))  # argmax: 0, 0, 1, 0
    assert collapse.usage(p for p in P.split(3)) == pytest.approx((.5, perplexity))
    assert collapse.usage(torch.eye(5)) == pytest.approx((1, 1))
    for wrong in randn(4, 4), torch.ones(3), P * math.nan, iter([]):
        with pytest.raises(ValueError, match="usage"):
            collapse.usage(wrong)


def test_ceiling():
    features = randn(5, 16).repeat_interleave(40, 0)
    assert collapse.ceiling(features, 200, .5) == 5 / 200
    assert collapse.ceiling(features, 1000, .5) == 5 / 200  # min(K, N)
    assert collapse.ceiling(features, 1, .5) == 1
    draws = {collapse.ceiling(features, 6, .5, seed) for seed in range(9)}
    assert len(draws) > 1 and collapse.ceiling(features, 6, .5, 0) == collapse.ceiling(features, 6, .5, 0)


def test_describe():
    C = torch.cat([randn(20, 64), randn(1, 64, seed=5).repeat(7, 1), torch.zeros(2, 64),
                   randn(1, 64, seed=6).repeat(3, 1)])
    m = report.describe(C, [.025, .5])
    assert (m["K"], m["D"], m["zero_rows"]) == (32, 64, 2)
    e = m["eps"][.025]
    assert e["unique"] == e["components"] == e["any_order_mean"] == 22 and e["any_order_sd"] == 0
    assert e["share"] == 22 / 30 and e["with_neighbour"] == 10 and e["largest_groups"] == [7, 3]
    assert m["nearest_cosine"][.99] == pytest.approx(1, abs=1e-6) and m["nearest_cosine"][.01] < .5
    one = report.describe(randn(1, 4), [.5])
    assert one["eps"][.5]["unique"] == 1 and one["nearest_cosine"] == {}
    with pytest.raises(ValueError, match="all 3 prototypes are zero"):
        report.describe(torch.zeros(3, 4), [.5])
    assert "does not show" in report.verdict(1., 100, 256, .5) and "not with 100 %" in report.verdict(.4, 100, 8, .5)


# ---- checkpoints: every layout of the known releases, small ----------------------------------------------------------
K, D = 12, 6
BACKBONE = {"cls_token": torch.zeros(1, 1, 8), "blocks.0.attn.qkv.weight": torch.ones(24, 8)}
T, S = randn(K, D, seed=1), randn(K, D, seed=2)  # the teacher's and the student's prototypes
FLAGS = argparse.Namespace(arch="vit_small", out_dim=K, lr=np.float64(5e-4), batch=np.int64(64))
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(K, D)}}, "param_groups": [{"lr": np.float64(1e-3), "params": [0]}]}


def pre(prefix, d):
    return {prefix + k: v for k, v in d.items()}


def net(C, prefix="", head="head.last_layer", backbone="backbone."):
    return pre(prefix, pre(backbone, BACKBONE) | {"head.mlp.0.weight": torch.ones(9, 8), f"{head}.weight_v": C,
                                                  f"{head}.weight_g": torch.ones(len(C), 1)})


def ibot(C, C2, prefix=""):
    return net(C, prefix) | pre(prefix, {"head.last_layer2.weight_v": C2, "head.last_layer2.weight_g": C2[:, :1]})


LEVELS = [randn(n, 4, seed=n) for n in (2, 4, 8)]
FRANCA = {f"{head}_head.last_layers.{i}": sign * C for head, sign in (("dino", 1), ("ibot", -1))
          for i, C in enumerate(LEVELS)}
DCV2 = [randn(K, D, seed=30 + i) for i in range(3)]
FULL = {"optimizer": OPTIMIZER, "epoch": 100, "args": FLAGS, "fp16_scaler": {"scale": 65536.0}}
LAYOUTS = {
    "dino vit": ({"student": net(S, "module."), "teacher": net(T), "dino_loss": {"center": torch.zeros(1, K)}} | FULL,
                 {"head.last_layer": T}),
    "dino rn50": ({"student": pre("module.", {"head.last_layer.weight": S}), "teacher": {"head.last_layer.weight": T,
                   "backbone.layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1), "head.mlp.3.weight": torch.ones(6, 9)}}
                  | FULL,
                  {"head.last_layer": T}),
    "carp": ({"student": net(S, "module."), "teacher": net(T, "module.")} | FULL, {"head.last_layer": T}),
    "student only": ({"student": net(S, "module.")} | FULL, {"head.last_layer": S}),
    "ibot": ({"student": ibot(S, S + 1, "module.") | {"module.backbone.masked_embed": torch.zeros(1, 8)},
              "teacher": ibot(T, -T),
              "ibot_loss": {"center": torch.zeros(1, K), "center2": torch.zeros(1, 1, K)}} | FULL,
             {"head.last_layer": T, "head.last_layer2": -T}),
    "ibot shared head": ({"student": ibot(S, S, "module."), "teacher": ibot(T, T.clone())} | FULL,
                         {"head.last_layer": T}),
    "dinov2": ({"teacher": net(T, head="dino_head.last_layer") | {"ibot_head.last_layer.weight_v": S[:, :4]}},
               {"dino_head.last_layer": T, "ibot_head.last_layer": S[:, :4]}),
    "franca": ({"teacher": {f"{head}.weight_v": C for head, C in FRANCA.items()} | pre("backbone.", BACKBONE)}, FRANCA),
    "capi": (net(T), {"head.last_layer": T}),
    "capi training": ({"model": {"teacher.head.layer.weight": T, "teacher.head.layer.bias": torch.zeros(K)}
                       | pre("student.", net(S))}, {"head.layer": T}),
    "swav": ({"module.conv1.weight": torch.zeros(4, 3, 7, 7), "module.projection_head.0.weight": torch.ones(9, 8),
              "module.prototypes.weight": T}, {"prototypes": T}),
    "swav state_dict": ({"epoch": 7, "state_dict": {"module.prototypes.weight": T}, "optimizer": OPTIMIZER},
                        {"prototypes": T}),
    "deepcluster": ({f"module.prototypes.prototypes{i}.weight": C for i, C in enumerate(DCV2)},
                    {f"prototypes.prototypes{i}": C for i, C in enumerate(DCV2)}),
    "msn": ({"encoder": {"module.fc.fc1.weight": torch.ones(9, 8)},
             "target_encoder": {"module.fc.fc1.weight": torch.ones(9, 8)},
             "prototypes": torch.nn.Parameter(T.clone()), "opt": OPTIMIZER, "epoch": 3}, {"prototypes": T}),
    "new weight norm": ({"teacher": {"head.last_layer.parametrizations.weight.original0": torch.ones(K, 1),
                                     "head.last_layer.parametrizations.weight.original1": T}}, {"head.last_layer": T}),
    "compiled": ({"teacher": {"_orig_mod.module.head.last_layer.weight_v": T}}, {"head.last_layer": T}),
    "mixture": ({"student": pre("backbone.", BACKBONE), "gmm": {"mu": T, "var": T.exp(), "pi": torch.ones(K) / K}},
                {"gmm.mu": T}),
    "mixture as a module": ({"net.gmm.log_pi": torch.ones(K), "net.gmm.S_mu": T.double(), "net.gmm.S_sig": T.exp()}, {"net.gmm.S_mu": T}),
    "mixture with both": ({"gmm": {"mu": T, "S_mu": 3 * T}}, {"gmm.mu": T}),
    "ours": ({"version": 1, "step": 9, "args": {"method": "carp"}, "student": net(S), "teacher": BACKBONE,
              "prototypes": {"vectors": T, "start": S, "student": {"prototypes": S}, "teacher": {}}, "gmm": {"mu": S},
              "optimizer": {"state": {}}}, {"prototypes": T}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, tmp_path):
    stored, want = LAYOUTS[name]
    for file, zipped in ("a.pth", True), ("b.pt", False):  # today's zip format, and the one before torch 1.6
        torch.save(stored, tmp_path / file, _use_new_zipfile_serialization=zipped)
        sets = collapse.load_prototypes(tmp_path / file)
        assert list(sets) == list(want)
        assert all(torch.equal(sets[k], C) and sets[k].dtype == torch.float32 for k, C in want.items())


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_numpy_names_old_and_new(core, tmp_path):
    torch.save({"teacher": net(T), "lr": np.float64(.1), "n": np.int64(3), "half": np.float16(2)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as old, zipfile.ZipFile(tmp_path / "old.pth", "w") as new:
        for item in old.namelist():  # rewrite the module's name as the other NumPy would
            text = old.read(item)
            if item.endswith("data.pkl"):
                assert b"multiarray" in text
                text = text.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", core.encode() + b".")
            new.writestr(item, text)
    assert torch.equal(collapse.load_prototypes(tmp_path / "old.pth")["head.last_layer"], T)


def test_arrays_and_keys(tmp_path):
    np.save(tmp_path / "C.npy", T.numpy())
    np.savez(tmp_path / "C.npz", a=T.numpy(), b=S.numpy().astype(np.float64), labels=np.arange(3))
    assert torch.equal(collapse.load_prototypes(tmp_path / "C.npy")["C"], T)
    sets = collapse.load_prototypes(tmp_path / "C.npz")
    assert list(sets) == ["a", "b"] and torch.equal(sets["b"], S)
    assert list(collapse.load_prototypes(tmp_path / "C.npz", "b")) == ["b"]
    torch.save({"odd": {"bank": [T, S]}, "teacher": {"x": T}, "student": {"x": S}, "vector": torch.zeros(3)},
               tmp_path / "o.pt")
    assert torch.equal(collapse.load_prototypes(tmp_path / "o.pt", "odd.bank.1")["odd.bank.1"], S)
    assert torch.equal(collapse.load_prototypes(tmp_path / "o.pt", "x")["x"], T)  # teacher before student
    assert torch.equal(collapse.load_prototypes(tmp_path / "o.pt", "student.x")["student.x"], S)
    with pytest.raises(ValueError, match="--key y is not in the file.*odd.bank.0"):
        collapse.load_prototypes(tmp_path / "o.pt", "y")
    with pytest.raises(ValueError, match=r"--key vector is \(3,\)"):
        collapse.load_prototypes(tmp_path / "o.pt", "vector")


def test_safetensors(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    library.save_file({"teacher.head.last_layer.weight_v": T, "student.head.last_layer.weight_v": S},
                      tmp_path / "m.safetensors")
    assert torch.equal(collapse.load_prototypes(tmp_path / "m.safetensors")["head.last_layer"], T)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="cut short"):
        collapse.load_prototypes(tmp_path / "cut.safetensors")


def test_queues_and_backbones_are_refused(tmp_path):
    torch.save({"teacher": pre("backbone.", BACKBONE), "class_memory_bank": {"queue": torch.zeros(6, 40)}},
               tmp_path / "sop.pth")
    for key in None, "class_memory_bank.queue":
        with pytest.raises(ValueError, match="class_memory_bank.queue .*per COLUMN"):
            collapse.load_prototypes(tmp_path / "sop.pth", key)
    torch.save({"state_dict": BACKBONE}, tmp_path / "bb.pth")
    with pytest.raises(ValueError, match="state_dict.cls_token.*backbone-only files do not carry"):
        collapse.load_prototypes(tmp_path / "bb.pth")


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_hostile_pickles_do_not_run(tmp_path):
    trap = tmp_path / "trap"
    bad = {"teacher": net(T), "args": Hostile(trap)}
    torch.save(bad, tmp_path / "zip.pth")
    torch.save(bad, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"args": Hostile(trap)}, protocol=2))
    for name in "zip.pth", "old.pth", "plain.pth":
        with pytest.raises(ValueError, match=f"wants to build {os.mkdir.__module__}.mkdir.*nothing was run"):
            collapse.load_prototypes(tmp_path / name)
    np.save(tmp_path / "bad.npy", np.array([Hostile(trap)], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "bad.npz", x=np.array([Hostile(trap)], dtype=object))
    for name in "bad.npy", "bad.npz":
        with pytest.raises(ValueError, match="refused, the array holds pickled"):
            collapse.load_prototypes(tmp_path / name)
    torch.save({"x": __import__("fractions").Fraction(1, 2)}, tmp_path / "harmless.pth")
    with pytest.raises(ValueError, match="fractions.Fraction"):
        collapse.load_prototypes(tmp_path / "harmless.pth")
    assert not trap.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())  # it would have worked
    assert trap.exists()


def test_broken_files(tmp_path, capsys):
    torch.save({"teacher": net(T)}, tmp_path / "good.pth")
    torch.save({"teacher": net(T)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    np.save(tmp_path / "good.npy", T.numpy())
    np.savez(tmp_path / "good.npz", T.numpy())
    broken = {"empty.pth": (b"", "empty"), "page.pth": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
              "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
              "text.pth": (b"hello, this is text", "cannot be read"),
              "cut.pth": ((tmp_path / "good.pth").read_bytes()[:-300], "cut short"),
              "cut2.pth": ((tmp_path / "old.pth").read_bytes()[:-200], "cut short"),
              "cut.npy": ((tmp_path / "good.npy").read_bytes()[:-30], "cut short"),
              "cut.npz": ((tmp_path / "good.npz").read_bytes()[:-30], "cut short")}
    for name, (content, says) in broken.items():
        (tmp_path / name).write_bytes(content)
        assert collapse.main([str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert says in error and name in error and error.startswith("collapse.py: ") and error.count("\n") == 1
    assert collapse.main([str(tmp_path / "none.pth")]) == 2 and "no such file" in capsys.readouterr().err


# ---- the command line ------------------------------------------------------------------------------------------------
def fake_run(folder, kind, unique, knn=60.0):
    folder.mkdir()
    C = randn(40, 32, seed=3)
    C[int(40 * unique):] = C[0]
    args = {"method": "carp", "prototypes": kind, "num_prototypes": 40}
    torch.save({"version": 1, "step": 30, "args": args, "prototypes": {"vectors": C, "start": C * 2, "student": {}}},
               folder / "ckpt.pt")
    (folder / "args.json").write_text(json.dumps(args))
    head = "step,loss,knn,unique_0.025,unique_0.5,ceiling_0.5,used,perplexity,drift"
    rows = ["0,,25.5,,,,,,"] + [f"{s},6.9,,,,,,," if s % 10 else
                                f"{s},6.5,{knn + s / 10},1.0,{1 - (1 - unique) * s / 30:.4f},0.05,.9,.8,.25"
                                for s in range(5, 31, 5)]
    (folder / "log.csv").write_text("\n".join([head, *rows]) + "\n")
    return str(folder)


def ink(file):
    """Share of the picture that is not white."""
    image = pytest.importorskip("matplotlib.image").imread(file)[..., :3]
    return float((image.min(2) < .99).mean())


def test_table_of_runs_and_training_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    a, b = fake_run(tmp_path / "joint", "joint", .25), fake_run(tmp_path / "decoupled", "decoupled", 1)
    assert collapse.main([a, b, "--plot", str(tmp_path / "t.png")]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].split()[:6] == ["run", "method", "prototypes", "K", "step", "k-NN"]
    assert lines[1].split() == "joint carp joint 40 30 63.0 100.0% 25.0% 5.0% 90.0% 80.0% 0.25".split()
    assert any(line.startswith("joint") and "40 x 32" in line for line in lines[2:])
    assert any("random directions" in line for line in lines) and any(line.startswith("At D = 32") for line in lines)
    assert ink(tmp_path / "t.png") > .01


def test_logs_without_checkpoint_and_the_reverse(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    a, b = fake_run(tmp_path / "a", "joint", .5), fake_run(tmp_path / "b", "kp", .5)
    os.remove(tmp_path / "a" / "ckpt.pt")
    os.remove(tmp_path / "b" / "log.csv")
    assert collapse.main([a, b, "--plot", str(tmp_path / "t.png")]) == 0
    out = capsys.readouterr().out.split("\n")
    assert out[1].split()[:4] == ["a", "carp", "joint", "40"] and out[2].split()[:5] == ["b", "carp", "kp", "40", "30"]
    assert out[2].split()[-1] == "0.5"  # drift from the checkpoint: |c - 2c| / |2c|
    assert collapse.main([str(tmp_path)]) == 2  # a folder that is no run
    assert "ckpt.pt: no such file" in capsys.readouterr().err
    (tmp_path / "a" / "log.csv").write_text("step,knn\n0,many\n")
    assert collapse.main([a]) == 2 and "log.csv: not a table of numbers" in capsys.readouterr().err


def test_json_csv_and_exit_codes(tmp_path, capsys):
    C = randn(40, 32)
    C[10:] = C[0]
    np.save(tmp_path / "C.npy", C.numpy())
    C[5] = 0
    np.save(tmp_path / "Z.npy", C.numpy())
    C[7, 0] = math.nan
    np.save(tmp_path / "N.npy", C.numpy())
    file = str(tmp_path / "C.npy")
    assert collapse.main([file, "--json", "-", "--csv", str(tmp_path / "out.csv"), "--eps", "0.1"]) == 0
    got = json.loads(capsys.readouterr().out)["sets"][0]
    assert got["eps"]["0.1"]["unique"] == 10 and got["eps"]["0.1"]["largest_groups"] == [31]
    assert got["random"]["eps"]["0.1"]["unique"] == 40
    row, = csv.DictReader(open(tmp_path / "out.csv"))
    assert (row["unique"], row["random_unique"], row["K"], row["eps"]) == ("10", "40", "40", "0.1")
    assert collapse.main([file, "--fail-below", "0.5", "--eps", "0.025", "--json", str(tmp_path / "o.json")]) == 1
    assert "unique(0.025) is 0.2500, below 0.5" in capsys.readouterr().err
    assert json.load(open(tmp_path / "o.json"))["sets"][0]["K"] == 40
    assert collapse.main([file, "--fail-below", "0.25", "--eps", "0.025"]) == 0
    assert collapse.main([str(tmp_path / "Z.npy")]) == 0
    assert "1 of 40 prototypes are zero rows" in capsys.readouterr().out
    for words, says in (([str(tmp_path / "N.npy")], "1 of 40 prototypes hold NaN"), ([file, "--eps", "a"], "--eps a"),
                        ([file, "--eps", "3"], "--eps 3"), ([file, "--fail-below", "50"], "--fail-below 50"),
                        ([file, "--assign", "x.csv"], "--data"),
                        ([file, "--csv", str(tmp_path / "no" / "x.csv")], "No such file"),
                        ([file, "--plot", str(tmp_path / "x.docx")], "x.docx"),
                        ([file, "--picture", "training", "--plot", "x"], "step")):
        assert collapse.main(words) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_sweep_fig1_and_checkpoint_series(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = []
    for epoch in 0, 10, 20:
        C = randn(60, 16, seed=epoch)
        C[60 - 2 * epoch:] = C[0]
        torch.save({"epoch": epoch, "state_dict": {"module.prototypes.weight": C}}, tmp_path / f"ckp-{epoch}.pth")
        files.append(str(tmp_path / f"ckp-{epoch}.pth"))
    for picture in "auto", "fig1", "training":
        assert collapse.main([*files, "--picture", picture, "--plot", str(tmp_path / f"{picture}.png")]) == 0
        assert ink(tmp_path / f"{picture}.png") > .01
    capsys.readouterr()
    runs, axis = report.over_training([{"file": f, "set": "p", "several": False, "eps": {.5: {"share": 1 - i / 3}}}
                                       for i, f in enumerate(files[::-1])])
    assert axis == "epoch" and [row["epoch"] for row in runs[0][1]] == [0, 10, 20]
    assert [row["unique_0.5"] for row in runs[0][1]] == pytest.approx([1 / 3, 2 / 3, 1])


def test_densities():
    around = np.linspace(-np.pi, np.pi, 721)[:-1]
    a = np.array([0., 0, 2])
    density = plots.vmf_kde(a, around)
    want = [sum(torch.distributions.VonMises(torch.tensor(m), torch.tensor(20., dtype=torch.float64)).log_prob(
        torch.tensor(x)).exp().item() for m in a) / 3 for x in around[::60]]
    assert density[::60] == pytest.approx(want, rel=1e-4, abs=1e-9)
    assert density.sum() * 2 * np.pi / 720 == pytest.approx(1)
    grid, points = np.linspace(-1.5, 1.5, 61), randn(7, 2).numpy() * .3
    got = plots.gaussian_kde(points, grid, .2)
    normal = torch.distributions.Normal(torch.from_numpy(points).double(), .2)
    want = normal.log_prob(torch.tensor([grid[33], grid[20]])).sum(1).exp().mean().item()
    assert got[20, 33] == pytest.approx(want)  # rows are y
    assert got.sum() * .05 ** 2 == pytest.approx(1, abs=1e-3)
    tight, wide = (plots.plane(collapse.unit_rows(C)[0])
                   for C in (torch.tensor([1., 2, 3]) + .01 * randn(99, 3), randn(999, 3)))
    assert np.abs(tight).max() < .1 and np.histogram(wide, 4, (-np.pi, np.pi))[0].min() > 150


def test_with_images(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from support import assign
    C = torch.eye(6, 8)  # prototypes 4 and 5 win nothing, 5 is a copy of 4
    C[5] = C[4]
    y = torch.tensor([0] * 30 + [1] * 12)
    k = torch.cat([torch.arange(30) % 3, torch.full((12,), 3)])
    x = (torch.eye(8)[k] * 255).byte().view(42, 2, 2, 2)[:, [0, 1, 1]]
    images = argparse.Namespace(x=x, y=y, classes=["cat", "dog"], name="toy", paths=None)

    class Net(torch.nn.Linear):
        def forward(self, views):
            return super().forward(views[0])
    net = Net(8, 8, bias=False).train()
    net.weight.data = torch.eye(8)
    prototypes = argparse.Namespace(assign=lambda h: (9 * h @ C.T).softmax(1), vectors=lambda: C)
    saved = {"data": "toy", "img_size": 2, "imbalance": 5, "seed": 3}
    monkeypatch.setattr(assign.run, "load_run", lambda path: (net, prototypes, saved), raising=False)
    seen = []
    monkeypatch.setattr(assign.datasets, "load", lambda data, **kw: (seen.append(kw["imbalance"]), (images, None))[1])
    monkeypatch.setattr(assign.datasets, "eval_batches", lambda images, size, device: torch.eye(8)[k].split(10))
    run = fake_run(tmp_path / "run", "joint", 1)
    files = ["--assign", str(tmp_path / "a.csv"), "--montage", str(tmp_path / "m.png")]
    assert collapse.main([run, "--data", "toy", *files]) == 0
    assert not net.training and seen == [5]  # the long tail of the run's own data
    out = capsys.readouterr().out
    assert "run on 42 images of toy" in out and "used 66.7%" in out
    lines = [line.split() for line in out.split("\n")]
    assert ["cat", "71.4%", "75.0%"] in lines and ["dog", "28.6%", "25.0%"] in lines
    rows = list(csv.reader(open(tmp_path / "a.csv")))
    assert rows[0] == ["path", "prototype", "probability"] and [int(r[1]) for r in rows[1:]] == k.tolist()
    assert float(rows[1][2]) == pytest.approx(math.exp(9) / (math.exp(9) + 5), rel=1e-4)
    assert ink(tmp_path / "m.png") > .01
    titles = [title for title, _ in assign.montage_rows(torch.eye(8)[k], C, k, images, [.025, .5], rows=2)]
    assert titles == ["most used\n3 (12 images)", "most used\n0 (10 images)", "least used\n4 (0 images)",
                      "least used\n5 (0 images)",
                      "duplicates at 0.025\n4 (0 images)", "duplicates at 0.025\n5 (0 images)"]
    assert collapse.main([run, "--data", "elsewhere", "--json", "-"]) == 0 and seen == [5, 1]
    assert json.loads(capsys.readouterr().out)["data"]["run"]["used"] == pytest.approx(4 / 6)


def test_prototypes_per_class():
    from support import assign
    won, y = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 1, 0])
    out = assign.per_class(won, y, ["cat", "dog"])
    assert out["classes"] == {"cat": {"images": .5, "prototypes": pytest.approx(2 / 3)},
                              "dog": {"images": .5, "prototypes": pytest.approx(1 / 3)}}
    sizes = torch.tensor([0] * 101 + [1] * 100 + [2] * 20 + [3] * 19)
    groups = assign.per_class(sizes, sizes, list("abcd"))["groups"]
    assert {k: v["prototypes"] for k, v in groups.items()} == {
        "head (1 classes)": .25, "medium (2 classes)": .5, "tail (1 classes)": .25}
