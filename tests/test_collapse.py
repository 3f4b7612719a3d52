"""collapse.py and what it calls: counts against plain float64 loops, every checkpoint layout,
hostile files, the command line. The tests of the faster search are in test_fast_unique.py."""
import argparse
import bz2
import csv
import errno
import gzip
import io
import json
import lzma
import math
import os
import re
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch

import collapse
import data
import forked
from support import assign
from support import checkpoints
from support import plots
from support import report

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(*degrees):
    a = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([a.cos(), a.sin()], 1)


# ---- the oracle: one row at a time, float64 -----------------------------------------------------
def slow_representatives(C, eps):
    C = C.double().numpy()
    length = np.linalg.norm(C, axis=1)
    chosen, out = [], []
    for k in range(len(C)):
        if not length[k]:
            out.append(-1)
            continue
        covering = [r for r in chosen if 1 - C[k] @ C[r] / (length[k] * length[r]) < eps]
        out.append(covering[0] if covering else k)
        if not covering:
            chosen.append(k)
    return out


@pytest.mark.parametrize("seed", range(8))
def test_greedy_leader_is_the_loop(seed):
    K, D = 90 + 7 * seed, (2, 3, 8, 40)[seed % 4]
    C = randn(K, D, seed=seed)
    C[5], C[20], C[50] = 3 * C[2], 1e-30 * C[2], 0  # scaled copies and a zero row
    C[30:60:3] = C[1] + 1e-3 * randn(10, D, seed=99)  # a cluster
    C[61], C[62] = -C[1], C[1] + 1e-7  # an antipode, and a copy that only float64 tells apart
    eps_list = [1e-9, .025, .1, .5, 1.3]
    got = collapse.representatives(C, eps_list)
    counts = collapse.unique_counts(C, eps_list)
    for eps in eps_list:
        want = slow_representatives(C, eps)
        unique = [k for k, r in enumerate(want) if r == k]
        assert got[eps].tolist() == want
        assert collapse.unique_prototypes(C, eps).tolist() == unique
        assert counts[eps] == len(unique)


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
    step = math.degrees(math.acos(1 - .025)) * .7  # neighbours are within eps, next but one are not
    chain = angles(*(step * k for k in range(40)))
    assert collapse.unique_prototypes(chain, .025).tolist() == list(range(0, 40, 2))


def test_duplicates_count_at_any_eps_but_not_at_zero():
    C = randn(50, 33).repeat(3, 1)
    C[100:] *= torch.rand(50, 1, generator=torch.Generator().manual_seed(1)).exp2()
    got = collapse.unique_counts(C[:100], [0, 1e-300, 1e-7, .2])
    assert got == {0: 100, 1e-300: 50, 1e-7: 50, .2: 50}
    assert collapse.unique_counts(C, [0, 1e-7]) == {0: 150, 1e-7: 50}
    assert collapse.unique_counts(randn(4, 8).half().repeat(2, 1), [1e-9]) == {1e-9: 4}


@pytest.mark.parametrize("scale", [1e-200, 1e-44, 1e30, 1e200])
def test_extreme_lengths(scale):
    """Squares and products of such lengths overflow or vanish in float32, some in float64 too."""
    C = randn(20, 8).double()
    C[10:] = C[:10]
    C[::3] *= scale
    if 1e-38 < scale < 1e38:
        C = C.float()
    assert collapse.unique_counts(C, [0, 1e-9, 1e-300]) == {0: 20, 1e-9: 10, 1e-300: 10}
    assert collapse.unit_rows(C).norm(dim=1).sub(1).abs().max() < 1e-12
    tiny = torch.tensor([[1e-40, 2e-40], [1., 2], [2, 1]])  # below float32's normal numbers
    assert collapse.unique_prototypes(tiny, 1e-5).tolist() == [0, 2]


def test_low_precision_mode_does_not_matter():
    C = torch.nn.functional.normalize(randn(300, 64), dim=1)
    shift = torch.nn.functional.normalize(randn(300, 64, seed=1), dim=1)
    C = torch.cat([C, C + .0275 * shift])
    want = collapse.unique_counts(C, [3.75e-4])
    assert 300 < want[3.75e-4] < 600  # the threshold cuts the cloud
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert collapse.unique_counts(C, [3.75e-4]) == want
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
    assert collapse.unique_counts(torch.zeros(3, 4), [.5]) == {.5: 0}


# ---- the other measures -------------------------------------------------------------------------
def test_random_orders():
    C = angles(0, 10, 20)  # 2 unique from either end, 1 from the middle
    mean, sd = collapse.random_order_unique(C, .025, n=300)
    assert mean == pytest.approx(2 - 1 / 3, abs=.1)
    assert sd == pytest.approx(math.sqrt(2) / 3, abs=.05)
    assert collapse.random_order_unique(C, .025, n=300) == (mean, sd)  # seeded
    assert collapse.random_order_unique(C, .025, n=300, seed=1) != (mean, sd)
    assert collapse.random_order_unique(C, [.025, 1.], n=300)[.025] == (mean, sd)
    assert collapse.random_order_unique(randn(100, 64), .5) == (100, 0)
    assert collapse.random_order_unique(C, .025, n=1)[1] == 0


def test_effective_rank_and_drift():
    assert collapse.effective_rank(torch.eye(6)) == pytest.approx(6)
    assert collapse.effective_rank(torch.ones(9, 4)) == pytest.approx(1, abs=1e-4)
    assert collapse.effective_rank(torch.eye(6)[[0, 1, 1, 1, 1]]) == pytest.approx(
        math.exp(-(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3)))  # singular values 1, 2
    start = torch.tensor([[2., 0], [0, 4], [1, 0]])
    assert collapse.drift(start, start) == 0
    shift = torch.tensor([[0, 1.], [1, 0], [3, 0]])  # relative to start: .5, .25, 3
    assert collapse.drift(start + shift, start) == pytest.approx(.5)
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
    h = randn(5, 16).repeat_interleave(40, 0)
    assert collapse.ceiling(h, 200, .5) == 5 / 200
    assert collapse.ceiling(h, 1000, .5) == 5 / 200  # min(K, N)
    assert collapse.ceiling(h, 1, .5) == 1
    draws = {collapse.ceiling(h, 6, .5, seed) for seed in range(9)}
    assert len(draws) > 1
    assert collapse.ceiling(h, 6, .5, 0) == collapse.ceiling(h, 6, .5, 0)


def test_describe():
    C = torch.cat([randn(20, 64), randn(1, 64, seed=5).repeat(7, 1), torch.zeros(2, 64),
                   randn(1, 64, seed=6).repeat(3, 1)])
    m = collapse.describe(C, [.5, .025])
    assert (m["K"], m["D"], m["zero_rows"]) == (32, 64, 2)
    assert list(m["eps"]) == [.025, .5]
    e = m["eps"][.025]
    assert e["unique"] == e["components"] == e["any_order_mean"] == 22 and e["any_order_sd"] == 0
    assert e["share"] == 22 / 30
    assert e["with_neighbour"] == 10 and e["largest_groups"] == [7, 3]
    assert m["nearest_cosine"][.99] == pytest.approx(1, abs=1e-6)
    assert m["nearest_cosine"][.01] < .5
    one = collapse.describe(randn(1, 4), [.5])
    assert one["eps"][.5]["unique"] == 1 and one["nearest_cosine"] == {}
    chain = collapse.describe(angles(0, 10, 20, 90), [.025], orders=200)["eps"][.025]
    assert (chain["unique"], chain["components"], chain["with_neighbour"]) == (3, 2, 3)
    assert 2.5 < chain["any_order_mean"] < 2.8 and chain["any_order_sd"] > .4
    with pytest.raises(ValueError, match="all 3 prototypes are zero"):
        collapse.describe(torch.zeros(3, 4), [.5])
    assert "does not show" in collapse.verdict(1., 100, 256, .5)
    assert "not with 100 %" in collapse.verdict(.4, 100, 8, .5)


def test_largest_group():
    C = angles(0, 90, 180, 3, 92, 93, 0, 91)
    assert collapse.largest_group(C, [.5, .025]) == ([1, 4, 5, 7], .025)
    assert collapse.largest_group(C, [.025, 1e-9]) == ([0, 6], 1e-9)
    assert collapse.largest_group(angles(0, 90), [.025]) == ([], 0)


# ---- checkpoints: every layout of the known releases, small -------------------------------------
K, D = 12, 6
BACKBONE = {"cls_token": torch.zeros(1, 1, 8), "blocks.0.attn.qkv.weight": torch.ones(24, 8)}
T, S = randn(K, D, seed=1), randn(K, D, seed=2)  # the teacher's and the student's prototypes
FLAGS = argparse.Namespace(arch="vit_small", out_dim=K, lr=np.float64(5e-4), batch=np.int64(64))
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(K, D)}},
             "param_groups": [{"lr": np.float64(1e-3), "params": [0]}]}


def pre(prefix, d):
    return {prefix + k: v for k, v in d.items()}


def net(C, prefix="", head="head.last_layer", backbone="backbone."):
    layers = {"head.mlp.0.weight": torch.ones(9, 8), f"{head}.weight_v": C,
              f"{head}.weight_g": torch.ones(len(C), 1)}
    return pre(prefix, pre(backbone, BACKBONE) | layers)


def ibot(C, C2, prefix=""):
    second = {"head.last_layer2.weight_v": C2, "head.last_layer2.weight_g": C2[:, :1]}
    return net(C, prefix) | pre(prefix, second)


LEVELS = [randn(n, 4, seed=n) for n in (2, 4, 8)]
FRANCA = {f"{head}_head.last_layers.{i}": sign * C for head, sign in (("dino", 1), ("ibot", -1))
          for i, C in enumerate(LEVELS)}
DCV2 = [randn(K, D, seed=30 + i) for i in range(3)]
FULL = {"optimizer": OPTIMIZER, "epoch": 100, "args": FLAGS, "fp16_scaler": {"scale": 65536.0}}
RN50 = {"head.last_layer.weight": T, "backbone.layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1),
        "head.mlp.3.weight": torch.ones(6, 9)}
LAYOUTS = {  # what a release stores, and the prototype sets in it
    "dino vit": ({"student": net(S, "module."), "teacher": net(T),
                  "dino_loss": {"center": torch.zeros(1, K)}} | FULL,
                 {"head.last_layer": T}),
    "dino rn50": ({"student": pre("module.", {"head.last_layer.weight": S}),
                   "teacher": RN50} | FULL,
                  {"head.last_layer": T}),
    "carp": ({"student": net(S, "module."), "teacher": net(T, "module.")} | FULL,
             {"head.last_layer": T}),
    "student only": ({"student": net(S, "module.")} | FULL, {"head.last_layer": S}),
    "ibot": ({"student": ibot(S, S + 1, "module.")
              | {"module.backbone.masked_embed": torch.zeros(1, 8)},
              "teacher": ibot(T, -T),
              "ibot_loss": {"center": torch.zeros(1, K), "center2": torch.zeros(1, 1, K)}} | FULL,
             {"head.last_layer": T, "head.last_layer2": -T}),
    "ibot shared head": ({"student": ibot(S, S, "module."), "teacher": ibot(T, T.clone())} | FULL,
                         {"head.last_layer": T}),
    "dinov2": ({"teacher": net(T, head="dino_head.last_layer")
                | {"ibot_head.last_layer.weight_v": S[:, :4]}},
               {"dino_head.last_layer": T, "ibot_head.last_layer": S[:, :4]}),
    "franca": ({"teacher": {f"{head}.weight_v": C for head, C in FRANCA.items()}
                | pre("backbone.", BACKBONE)},
               FRANCA),
    "capi": (net(T), {"head.last_layer": T}),
    "capi training": ({"model": {"teacher.head.layer.weight": T,
                                 "teacher.head.layer.bias": torch.zeros(K)}
                       | pre("student.", net(S))},
                      {"head.layer": T}),
    "swav": ({"module.conv1.weight": torch.zeros(4, 3, 7, 7),
              "module.projection_head.0.weight": torch.ones(9, 8),
              "module.prototypes.weight": T},
             {"prototypes": T}),
    "swav state_dict": ({"epoch": 7, "state_dict": {"module.prototypes.weight": T},
                         "optimizer": OPTIMIZER},
                        {"prototypes": T}),
    "deepcluster": ({f"module.prototypes.prototypes{i}.weight": C for i, C in enumerate(DCV2)},
                    {f"prototypes.prototypes{i}": C for i, C in enumerate(DCV2)}),
    "msn": ({"encoder": {"module.fc.fc1.weight": torch.ones(9, 8)},
             "target_encoder": {"module.fc.fc1.weight": torch.ones(9, 8)},
             "prototypes": torch.nn.Parameter(T.clone()), "opt": OPTIMIZER, "epoch": 3},
            {"prototypes": T}),
    "new weight norm": ({"teacher": {
        "head.last_layer.parametrizations.weight.original0": torch.ones(K, 1),
        "head.last_layer.parametrizations.weight.original1": T}},
                        {"head.last_layer": T}),
    "compiled": ({"teacher": {"_orig_mod.module.head.last_layer.weight_v": T}},
                 {"head.last_layer": T}),
    "compiled head": ({"teacher": {"module.head._orig_mod.last_layer.weight_v": T}},
                      {"head.last_layer": T}),
    "solo-learn dino": ({"state_dict": pre("backbone.", BACKBONE)
                         | pre("momentum_backbone.", BACKBONE)
                         | {"head.last_layer.weight_v": S, "momentum_head.last_layer.weight_v": T}},
                        {"head.last_layer": T}),
    "solo-learn deepcluster": ({"state_dict": {f"prototypes.{i}.weight": C
                                               for i, C in enumerate(DCV2)}},
                               {f"prototypes.{i}": C for i, C in enumerate(DCV2)}),
    "lightly dino": ({"student_head.last_layer.weight_v": S, "teacher_head.last_layer.weight_v": T},
                     {"head.last_layer": T}),
    "lightly swav": ({"prototypes.heads.0.weight": T, "prototypes.heads.0.bias": torch.zeros(K),
                      "prototypes.heads.1.weight": S},
                     {"prototypes.heads.0": T, "prototypes.heads.1": S}),
    "vissl": ({"classy_state_dict": {"base_model": {"model": {
        "trunk": pre("_feature_blocks.", BACKBONE), "heads": {"0.prototypes0.weight": T}}}}},
              {"heads.0.prototypes0": T}),
    "mixture": ({"student": pre("backbone.", BACKBONE),
                 "gmm": {"mu": T, "var": T.exp(), "pi": torch.ones(K) / K}},
                {"gmm.mu": T}),
    "mixture as a module": ({"net.gmm.log_pi": torch.ones(K), "net.gmm.S_mu": T.double(),
                             "net.gmm.S_sig": T.exp()},
                            {"net.gmm.S_mu": T}),
    "mixture with both": ({"gmm": {"mu": T, "S_mu": 3 * T}}, {"gmm.mu": T}),
    "ours": ({"version": 1, "step": 9, "args": {"method": "carp"}, "student": net(S),
              "teacher": BACKBONE, "gmm": {"mu": S}, "optimizer": {"state": {}},
              "prototypes": {"vectors": T, "start": S, "student": {"prototypes": S},
                             "teacher": {}}},
             {"prototypes": T}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, tmp_path):
    stored, want = LAYOUTS[name]
    # today's zip format, and the one before torch 1.6
    for file, zipped in ("a.pth", True), ("b.pt", False):
        torch.save(stored, tmp_path / file, _use_new_zipfile_serialization=zipped)
        sets = collapse.load_prototypes(tmp_path / file)
        assert list(sets) == list(want)
        for set_name, C in want.items():
            assert torch.equal(sets[set_name], C) and sets[set_name].dtype == torch.float32


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_numpy_names_old_and_new(core, tmp_path):
    stored = {"teacher": net(T), "lr": np.float64(.1), "n": np.int64(3), "half": np.float16(2)}
    torch.save(stored, tmp_path / "new.pth")
    with (zipfile.ZipFile(tmp_path / "new.pth") as source,
          zipfile.ZipFile(tmp_path / "old.pth", "w") as target):
        for item in source.namelist():  # rewrite the module's name as the other NumPy would
            text = source.read(item)
            if item.endswith("data.pkl"):
                assert b"multiarray" in text
                text = text.replace(b"numpy._core.", b"numpy.core.")
                text = text.replace(b"numpy.core.", core.encode() + b".")
            target.writestr(item, text)
    assert torch.equal(collapse.load_prototypes(tmp_path / "old.pth")["head.last_layer"], T)


def test_arrays_and_keys(tmp_path):
    np.save(tmp_path / "C.npy", T.numpy())
    np.savez(tmp_path / "C.npz", a=T.numpy(), b=S.numpy().astype(np.float64), labels=np.arange(3))
    assert torch.equal(collapse.load_prototypes(tmp_path / "C.npy")["C"], T)
    sets = collapse.load_prototypes(tmp_path / "C.npz")
    assert list(sets) == ["a", "b"] and torch.equal(sets["b"], S)
    assert list(collapse.load_prototypes(tmp_path / "C.npz", "b")) == ["b"]
    torch.save({"odd": {"bank": [T, S]}, "teacher": {"x": T}, "student": {"x": S},
                "vector": torch.zeros(3)}, tmp_path / "o.pt")
    assert torch.equal(collapse.load_prototypes(tmp_path / "o.pt", "odd.bank.1")["odd.bank.1"], S)
    # the teacher before the student
    assert torch.equal(collapse.load_prototypes(tmp_path / "o.pt", "x")["x"], T)
    assert torch.equal(collapse.load_prototypes(tmp_path / "o.pt", "student.x")["student.x"], S)
    with pytest.raises(ValueError, match="--key y is not in the file.*odd.bank.0"):
        collapse.load_prototypes(tmp_path / "o.pt", "y")
    with pytest.raises(ValueError, match=r"--key vector is \(3,\)"):
        collapse.load_prototypes(tmp_path / "o.pt", "vector")


INTEGERS = torch.arange(K * D).view(K, D)


@pytest.mark.parametrize("stored, want", [
    (T, {"my.C": T}),
    (torch.nn.Parameter(T.double()), {"my.C": T}),
    (INTEGERS, {"my.C": INTEGERS}),
    ([T, S], {"0": T, "1": S}),
    ({"means": T, "others": S, "epoch": 3}, {"means": T, "others": S}),
    ({"means": T, "assigned": INTEGERS}, {"means": T}),
    (T.numpy(), {"my.C": T}),
    (np.asfortranarray(T.numpy()).astype(">f8"), {"my.C": T}),
    ({"means": T.numpy(), "epoch": np.int64(3)}, {"means": T}),
    ({"teacher": {"head.last_layer.weight": T.numpy()}, "student": BACKBONE},
     {"head.last_layer": T})])
def test_files_that_hold_nothing_but_matrices(tmp_path, stored, want):
    for zipped in True, False:
        torch.save(stored, tmp_path / "my.C.pt", _use_new_zipfile_serialization=zipped)
        sets = collapse.load_prototypes(tmp_path / "my.C.pt")
        assert list(sets) == list(want)
        for name, C in want.items():
            assert sets[name].dtype == torch.float32 and torch.equal(sets[name], C.float())


@pytest.mark.parametrize("stored", [
    torch.zeros(3, 4, 5), torch.zeros(7), {"weight": T, "bias": torch.zeros(K)},
    {"0.weight": T, "2.weight": S}, {"a": INTEGERS, "b": INTEGERS}, T.to(torch.complex64)])
def test_other_tensors_are_no_prototypes(tmp_path, stored):
    torch.save(stored, tmp_path / "o.pt")
    with pytest.raises(ValueError, match="o.pt: (no prototypes among its keys .*--key|it is )"):
        collapse.load_prototypes(tmp_path / "o.pt")


@pytest.mark.parametrize("kind", [">f4", ">f8", "f2", "g", "i8", ">i4", "u1"])
def test_any_type_of_number_in_an_array(tmp_path, kind):
    C = np.arange(K * D).reshape(K, D).astype(kind)
    np.save(tmp_path / "C.npy", C)
    torch.save({"head.last_layer": C}, tmp_path / "C.pt")
    (tmp_path / "C.dat").write_bytes((tmp_path / "C.npy").read_bytes())
    for file, name in ("C.npy", "C"), ("C.dat", "C"), ("C.pt", "head.last_layer"):
        sets = collapse.load_prototypes(tmp_path / file)
        assert list(sets) == [name] and torch.equal(sets[name], INTEGERS.float())


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, as these tensors are made
@pytest.mark.parametrize("convert, word", [
    (lambda C: C.to_sparse(), "sparse"),
    (lambda C: C.to_sparse_csr(), "sparse"),
    (lambda C: C.to("meta"), "without values"),
    (lambda C: torch.quantize_per_tensor(C, .1, 0, torch.qint8), "quantised"),
    (lambda C: torch.quantize_per_channel(C, torch.ones(K), torch.zeros(K), 0, torch.qint8),
     "quantised")])
def test_tensors_without_plain_numbers_are_refused(tmp_path, capsys, convert, word):
    C = convert(T)
    for stored, name in (C, "x"), ({"teacher": {"head.last_layer.weight": C}}, "head.last_layer"):
        torch.save(stored, tmp_path / "x.pt")
        assert f"x.pt: {name} is {word}" in refusal(capsys, str(tmp_path / "x.pt"))
    error = refusal(capsys, str(tmp_path / "x.pt"), "--key", "head.last_layer.weight")
    assert f"head.last_layer.weight is {word}" in error


def test_a_list_that_holds_itself_is_refused(tmp_path, capsys):
    once, twice, table = [T], [], {"x": T}
    once.append(once)
    twice += [twice, twice]
    table["table"] = table
    for stored in once, twice, table:
        torch.save(stored, tmp_path / "x.pt")
        error = refusal(capsys, str(tmp_path / "x.pt"))
        assert "x.pt: its lists and dicts are nested more than 50 deep" in error


@pytest.mark.parametrize("key, rank, name", [
    ("teacher.module.head.last_layer.weight", 0, "head.last_layer.weight"),
    ("state_dict.momentum_backbone.cls_token", 0, "backbone.cls_token"),
    ("projection_head_momentum.layers.0.weight", 0, "projection_head.layers.0.weight"),
    ("module.encoder_k.conv1.weight", 0, "encoder.conv1.weight"),
    ("target_network_state_dict.encoder.0.weight", 0, "encoder.0.weight"),
    ("student_ema.norm.weight", 1, "norm.weight"),
    ("state_dict_ema.norm.weight", 1, "norm.weight"),
    ("online_encoder.net.bn1.weight", 2, "encoder.net.bn1.weight"),
    ("module.encoder_q.fc.0.weight", 2, "encoder.fc.0.weight"),
    ("student._orig_mod.backbone._orig_mod.blocks.0._orig_mod.norm1.bias", 2,
     "backbone.blocks.0.norm1.bias"),
    ("module.base_encoder.norm.weight", 3, "base_encoder.norm.weight"),
    ("blocks.0.attn.q.weight", 3, "blocks.0.attn.q.weight"),
    ("teacher", 3, "teacher")])
def test_the_copy_that_a_key_names(key, rank, name):
    assert checkpoints.split_key(key) == (rank, name)


def test_safetensors(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    library.save_file({"teacher.head.last_layer.weight_v": T,
                       "student.head.last_layer.weight_v": S}, tmp_path / "m.safetensors")
    assert torch.equal(collapse.load_prototypes(tmp_path / "m.safetensors")["head.last_layer"], T)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="cut short"):
        collapse.load_prototypes(tmp_path / "cut.safetensors")
    (tmp_path / "renamed.pth").write_bytes((tmp_path / "m.safetensors").read_bytes())
    sets = collapse.load_prototypes(tmp_path / "renamed.pth")
    assert torch.equal(sets["head.last_layer"], T)


def test_queues_and_backbones_are_refused(tmp_path):
    torch.save({"teacher": pre("backbone.", BACKBONE),
                "class_memory_bank": {"queue": torch.zeros(6, 40)}}, tmp_path / "sop.pth")
    for key in None, "class_memory_bank.queue":
        with pytest.raises(ValueError, match="class_memory_bank.queue .*one in each COLUMN"):
            collapse.load_prototypes(tmp_path / "sop.pth", key)
    torch.save({"state_dict": BACKBONE}, tmp_path / "bb.pth")
    with pytest.raises(ValueError, match="state_dict.cls_token.*backbone-only files do not carry"):
        collapse.load_prototypes(tmp_path / "bb.pth")


def zipped(**files):
    """The bytes of a zip archive with these files."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("tensor, words", [
    (torch.zeros(7), r"(7,) torch.float32"), (torch.zeros(2, 3, 4), "(2, 3, 4) torch.float32"),
    (torch.zeros(2, 3, dtype=torch.bool), "(2, 3) torch.bool"),
    (torch.zeros(2, 3, dtype=torch.complex64), "(2, 3) torch.complex64"),
    (torch.zeros(0, 3), "(0, 3) torch.float32")])
def test_a_lone_tensor_that_is_no_set_says_what_it_is(tmp_path, tensor, words):
    torch.save(tensor, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=re.escape(f"x.pt: it is {words}, not (K, D) numbers")):
        collapse.load_prototypes(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("flag", ["--json", "--csv", "--plot"])
@pytest.mark.parametrize("name", ["ckpt.pt", "log.csv", "args.json", "C.npy"])
def test_no_output_overwrites_what_is_read(tmp_path, capsys, flag, name):
    np.save(tmp_path / "C.npy", np.eye(4, 3))
    for other in ("ckpt.pt", "log.csv", "args.json"):
        (tmp_path / other).write_text("of a run")
    before = (tmp_path / name).read_bytes()
    error = refusal(capsys, str(tmp_path / "C.npy"), flag, str(tmp_path / name))
    assert error == (f"collapse.py: error: {flag} {tmp_path / name} would overwrite a file that is "
                     "read, or that a run keeps; name another one\n")
    assert (tmp_path / name).read_bytes() == before


def test_a_file_whose_name_is_not_utf8(tmp_path):
    path = os.path.join(str(tmp_path), os.fsdecode(b"caf\xe9.pt"))
    with open(path, "wb") as file:
        torch.save({"prototypes.weight": torch.eye(3)}, file)
    assert torch.equal(collapse.load_prototypes(path)["prototypes"], torch.eye(3))


def test_hostile_pickles_do_not_run(tmp_path):
    trap = tmp_path / "trap"
    bad = {"teacher": net(T), "args": Hostile(trap)}
    torch.save(bad, tmp_path / "zip.pth")
    torch.save(bad, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"args": Hostile(trap)}, protocol=2))
    says = f"refused, it wants to build {os.mkdir.__module__}.mkdir.*nothing was run"
    for name in "zip.pth", "old.pth":
        with pytest.raises(ValueError, match=says):
            collapse.load_prototypes(tmp_path / name)
    for protocol in range(6):
        (tmp_path / "p.pth").write_bytes(pickle.dumps({"x": Hostile(trap)}, protocol=protocol))
        with pytest.raises(ValueError, match="p.pth: refused, it is a pickle that torch.save did"):
            collapse.load_prototypes(tmp_path / "p.pth")
    np.save(tmp_path / "bad.npy", np.array([Hostile(trap)], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "bad.npz", x=np.array([Hostile(trap)], dtype=object))
    for name in "bad.npy", "bad.npz":
        with pytest.raises(ValueError, match="refused, the array holds pickled"):
            collapse.load_prototypes(tmp_path / name)
    torch.save({"x": np.array([Hostile(trap), 1], dtype=object)}, tmp_path / "objects.pth")
    torch.save({"x": np.array([None, 1], dtype=object)}, tmp_path / "none.pth")
    for name in "objects.pth", "none.pth":
        with pytest.raises(ValueError, match=f"{name}: refused"):
            collapse.load_prototypes(tmp_path / name)
    script = zipped(**{"net/data.pkl": "", "net/code/net.py": "", "net/constants.pkl": ""})
    (tmp_path / "script.pth").write_bytes(script)
    with pytest.raises(ValueError, match="script.pth: refused, it is a TorchScript program"):
        collapse.load_prototypes(tmp_path / "script.pth")
    torch.save({"x": __import__("fractions").Fraction(1, 2)}, tmp_path / "harmless.pth")
    with pytest.raises(ValueError, match="fractions.Fraction"):
        collapse.load_prototypes(tmp_path / "harmless.pth")
    assert not trap.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())  # it would have worked
    assert trap.exists()


class Address:
    """NumPy would make an array of one Python object of it, at the address that the bytes name."""
    def __reduce__(self):
        return np.ndarray, ((1,), "O", b"\1" * 8)


def test_bytes_are_never_taken_for_the_addresses_of_objects(tmp_path):
    torch.save({"x": Address(), "head.last_layer": T}, tmp_path / "x.pt")
    sets = collapse.load_prototypes(tmp_path / "x.pt")
    assert list(sets) == ["head.last_layer"]
    stand_in = checkpoints.read(tmp_path / "x.pt")["x"]
    assert stand_in.values is None  # only a state fills it
    with pytest.raises(ValueError, match="(?i)object array"):
        stand_in.__setstate__((1, (1,), np.dtype("O"), False, b"\1" * 8))


@pytest.mark.parametrize("content, says", [
    (gzip.compress(b"\0" * 99), "a gzip archive"),
    (bz2.compress(b"\0" * 99), "a bzip2 archive"),
    (lzma.compress(b"\0" * 99), "an xz archive"),
    (b"name" + bytes(253) + b"ustar" + bytes(250), "a tar archive"),
    (zipped(readme="hello"), "a zip archive that torch.save did not write"),
    (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(99), "an ONNX file"),
    (b"\x89PNG\r\n\x1a\n" + bytes(99), "a picture (PNG)"),
    (b"\xff\xd8\xff\xe0" + bytes(99), "a picture (JPEG)"),
    (b"RIFF\x00\x01\x00\x00WEBPVP8 " + bytes(99), "a picture (WebP)"),
    (b'{"arch": "vit_small"}', "a JSON file"),
    (b"\xef\xbb\xbf[1, 2]", "a JSON file"),
    (b"cat\ndog\n", "plain text"),
    ("Köln".encode("latin-1"), "plain text"),
    (b"\n<!DOCTYPE html><html>404</html>", "a web page (HTML)"),
    (bytes(600), "of no known kind (it begins with 00 00 00 00)")],
    ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("file", ["x.pth", "x.npy", "x.safetensors"])
def test_what_is_no_checkpoint_is_named(tmp_path, capsys, content, says, file):
    (tmp_path / file).write_bytes(content)
    error = refusal(capsys, str(tmp_path / file))
    assert f"{tmp_path / file}: this is {says}" in error and "not a checkpoint" in error


def test_broken_files(tmp_path, capsys):
    torch.save({"teacher": net(T)}, tmp_path / "good.pth")
    torch.save({"teacher": net(T)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    np.save(tmp_path / "good.npy", T.numpy())
    np.savez(tmp_path / "good.npz", T.numpy())
    broken = {"empty.pth": (b"", "empty"),
              "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
              "list.pth": ((tmp_path / "good.pth").read_bytes().replace(b"PK\1\2", b"PK\0\0"),
                           "cut short or damaged"),
              "cut.pth": ((tmp_path / "good.pth").read_bytes()[:-300], "cut short"),
              "cut2.pth": ((tmp_path / "old.pth").read_bytes()[:-200], "cut short"),
              "cut.npy": ((tmp_path / "good.npy").read_bytes()[:-30], "cut short"),
              "cut.npz": ((tmp_path / "good.npz").read_bytes()[:-30], "cut short")}
    for name, (content, says) in broken.items():
        (tmp_path / name).write_bytes(content)
        error = refusal(capsys, str(tmp_path / name))
        assert says in error and name in error
    assert "no such file" in refusal(capsys, str(tmp_path / "none.pth"))


# ---- the command line ---------------------------------------------------------------------------
def refusal(capsys, *words):
    """The one line on stderr with which collapse.py refuses these words, by exit code 2."""
    with pytest.raises(SystemExit) as stop:
        collapse.main(list(words))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("collapse.py: error: ") and error.count("\n") == 1
    return error


def fake_run(folder, kind, unique, **more_args):
    """A run directory of 30 steps whose unique share at .5 falls to `unique`."""
    folder.mkdir()
    C = randn(40, 32, seed=3)
    C[int(40 * unique):] = C[0]
    args = {"method": "carp", "prototypes": kind, "num_prototypes": 40, **more_args}
    torch.save({"version": 1, "step": 30, "args": args,
                "prototypes": {"vectors": C, "start": C * 2, "student": {}}}, folder / "ckpt.pt")
    (folder / "args.json").write_text(json.dumps(args))
    lines = ["step,loss,knn,unique_0.025,unique_0.5,ceiling_0.5,used,perplexity,drift",
             "0,,25.5,,,,,,"]
    for step in range(5, 31, 5):
        if step % 10:
            lines.append(f"{step},6.9,,,,,,,")  # not evaluated
        else:
            share = 1 - (1 - unique) * step / 30
            lines.append(f"{step},6.5,{60 + step / 10},1.0,{share:.4f},0.05,.9,.8,.25")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def ink(file):
    """Share of the picture that is not white."""
    image = pytest.importorskip("matplotlib.image").imread(file)[..., :3]
    return float((image.min(2) < .99).mean())


def test_table_of_runs_and_training_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    a = fake_run(tmp_path / "joint", "joint", .25)
    b = fake_run(tmp_path / "decoupled", "decoupled", 1, script="zoo/mine.py")
    assert collapse.main([a, b, "--plot", str(tmp_path / "t.png")]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].split()[:6] == ["run", "method", "prototypes", "K", "step", "k-NN"]
    want = "joint carp joint 40 30 63.0 100.0% 25.0% 5.0% 90.0% 80.0% 0.25"
    assert lines[1].split() == want.split()
    assert lines[2].split()[:5] == ["decoupled", "carp", "decoupled", "40", "30"]
    assert any(line.startswith("joint") and "40 x 32" in line for line in lines[2:])
    assert any("random directions" in line for line in lines)
    assert any(line.startswith("At D = 32") for line in lines)
    assert ink(tmp_path / "t.png") > .01
    two = str(tmp_path / "two.png")
    assert collapse.main([a, b, "--plot", two, "--panels", "unique_0.5", "knn"]) == 0
    image = pytest.importorskip("matplotlib.image").imread
    assert image(two).shape[0] < image(tmp_path / "t.png").shape[0]  # one row of panels
    assert "--panels lr is not among the measures" in refusal(
        capsys, a, b, "--plot", two, "--panels", "lr")
    for flags in ([], ["--plot", two, "--picture", "sweep"]):
        assert "--panels needs --plot" in refusal(capsys, a, b, "--panels", "knn", *flags)
    assert "--picture fig1 needs --plot FILE" in refusal(capsys, a, "--picture", "fig1")


@pytest.mark.parametrize("place, values", [
    (("prototypes", "vectors"), ["x", None, torch.ones(3)]),
    (("prototypes", "start"), ["x", {}, torch.ones(40, 2)]),
    (("args", "num_prototypes"), [[], {}, "x", float("inf")]),
    (("step",), [[], float("inf")])])
def test_values_of_a_damaged_run_are_one_sentence(tmp_path, capsys, place, values):
    run = fake_run(tmp_path / "run", "joint", .5)
    os.remove(tmp_path / "run" / "log.csv")  # its step would take the place of the checkpoint's
    path = tmp_path / "run" / "ckpt.pt"
    whole = path.read_bytes()
    for value in values:
        path.write_bytes(whole)
        ckpt = torch.load(path, weights_only=True)
        part = ckpt
        for name in place[:-1]:
            part = part[name]
        part[place[-1]] = value
        torch.save(ckpt, path)
        wanted = "K" if place[-1] == "num_prototypes" else place[-1]
        assert re.search(rf"{run}\S* is damaged: .*{wanted}", refusal(capsys, run))


def test_a_step_beyond_all_numbers_is_no_place_on_a_curve(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = fake_run(tmp_path / "run", "joint", .5)
    path = tmp_path / "run" / "ckpt.pt"
    torch.save(torch.load(path, weights_only=True) | {"step": 10 ** 400}, path)
    assert "neither a step nor an epoch" in refusal(
        capsys, str(path), "--plot", str(tmp_path / "p.png"), "--picture", "training")


def test_a_log_alone_has_no_prototypes_to_judge(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = fake_run(tmp_path / "run", "joint", .5)
    os.remove(tmp_path / "run" / "ckpt.pt")
    for flags in (["--fail-below", "0.5"], ["--data", "shapes"]):
        assert "has no ckpt.pt, and --fail-below and --data need" in refusal(capsys, run, *flags)
    for picture in ("fig1", "sweep"):
        assert f"--picture {picture} needs prototypes" in refusal(
            capsys, run, "--plot", str(tmp_path / "p.png"), "--picture", picture)
    (tmp_path / "run" / "args.json").write_text("[1]")
    assert "args.json does not hold the flags of a run" in refusal(capsys, run)
    (tmp_path / "run" / "args.json").write_text("{")
    assert "args.json does not hold the flags of a run" in refusal(capsys, run)
    (tmp_path / "run" / "log.csv").write_text("step,knn\ninf,3\n")
    assert "log.csv: not a table of numbers (step inf)" in refusal(capsys, run)


def test_without_random_orders_nothing_is_said_of_them(tmp_path, capsys):
    C = angles(0, 10, 90)  # one pair of neighbours
    one = collapse.describe(C, [.025], orders=0)["eps"][.025]
    assert one["unique"] == 2 and one["any_order_mean"] is one["any_order_sd"] is None
    alone = collapse.describe(angles(0, 90), [.025], orders=0)["eps"][.025]
    assert (alone["any_order_mean"], alone["any_order_sd"]) == (2, 0)  # the same in any order
    torch.save(C, tmp_path / "C.pt")
    assert collapse.main([str(tmp_path / "C.pt"), "--orders", "0"]) == 0
    assert " ± " not in capsys.readouterr().out.splitlines()[1]


def test_checkpoints_with_different_places_on_a_curve(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = []
    for i, place in enumerate(({"epoch": 1, "step": 5}, {"epoch": 2})):
        files.append(str(tmp_path / f"{i}.pt"))
        torch.save({"prototypes.weight": angles(0, 10, 90), **place}, files[-1])
    picture = ["--plot", str(tmp_path / "p.png"), "--picture", "training"]
    assert collapse.main([*files, *picture]) == 0  # both have an epoch
    torch.save({"prototypes.weight": angles(0, 10, 90), "step": 1}, files[1])
    torch.save({"prototypes.weight": angles(0, 10, 90), "epoch": 1}, files[0])
    assert "neither a step nor an epoch stands in all of these files" in refusal(
        capsys, *files, *picture)


def test_logs_without_checkpoint_and_the_reverse(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    a, b = fake_run(tmp_path / "a", "joint", .5), fake_run(tmp_path / "b", "kp", .5)
    os.remove(tmp_path / "a" / "ckpt.pt")
    os.remove(tmp_path / "b" / "log.csv")
    assert collapse.main([a, b, "--plot", str(tmp_path / "t.png")]) == 0
    out = capsys.readouterr().out.split("\n")
    assert out[1].split()[:4] == ["a", "carp", "joint", "40"]
    assert out[2].split()[:5] == ["b", "carp", "kp", "40", "30"]
    assert out[2].split()[-1] == "0.5"  # drift from the checkpoint: |c - 2c| / |2c|
    assert "ckpt.pt: no such file" in refusal(capsys, str(tmp_path))  # a folder that is no run
    (tmp_path / "a" / "log.csv").write_text("step,knn\n0,many\n")
    assert "log.csv: not a table of numbers" in refusal(capsys, a)


def test_a_changed_definition_of_duplicates_counts_in_every_table(monkeypatch):
    """Antipodes as copies, say: 500 of 1,000 prototypes are left, and no two are neighbours."""
    V = randn(500, 64)
    C = torch.cat([V, -V])

    def covering(A, eps_list):
        half = torch.arange(len(A)) % 500
        return {eps: half.clone() for eps in eps_list}
    monkeypatch.setattr(collapse, "covering", covering)
    assert collapse.unique_counts(C, [0.025]) == {0.025: 500}
    assert collapse.describe(C, [0.025], orders=0)["eps"][0.025]["unique"] == 500


@pytest.mark.parametrize("copies, words", [
    (["teacher", "student"], "the prototypes of the teacher are counted; those of the student are "
     "not (--key NAME takes others)"),
    (["student"], "the prototypes of the student are counted"),
    (["teacher"], ""), ([""], "")])
def test_which_of_several_copies_is_counted_is_said(tmp_path, capsys, copies, words):
    path = tmp_path / "f.pth"
    torch.save({copy + "head.last_layer.weight_v": T for copy in
                (f"{copy}." if copy else "" for copy in copies)}, path)
    assert len(collapse.load_prototypes(str(path))) == 1
    assert capsys.readouterr().err == (f"{path}: {words}\n" if words else "")


def test_a_picture_of_a_run_and_a_file_has_both(tmp_path, monkeypatch):
    """Measures over training are there for the run alone: the count against eps shows both."""
    drawn = []
    monkeypatch.setattr(plots, "sweep", lambda curves, *_: drawn.extend(c[0] for c in curves))
    np.save(tmp_path / "C.npy", T.numpy())
    run = fake_run(tmp_path / "run", "joint", .25)
    assert collapse.main([run, str(tmp_path / "C.npy"), "--orders", "0", "--plot",
                          str(tmp_path / "p.png")]) == 0
    assert len(drawn) == 2


@pytest.mark.parametrize("stored", [
    [T], T.numpy(), {"teacher": {"prototypes": T}, "args": FLAGS, "epoch": 3}])
def test_a_folder_whose_checkpoint_is_no_run(tmp_path, capsys, stored):
    torch.save(stored, tmp_path / "ckpt.pt")
    assert collapse.main([str(tmp_path)]) == 0
    assert f"{K} x {D}" in capsys.readouterr().out
    assert "ckpt.pt is not a checkpoint of a run of ours" in refusal(
        capsys, str(tmp_path), "--data", "shapes")


def test_json_csv_and_exit_codes(tmp_path, capsys):
    C = randn(40, 32)
    C[10:] = C[0]
    np.save(tmp_path / "C.npy", C.numpy())
    C[5] = 0
    np.save(tmp_path / "Z.npy", C.numpy())
    C[7, 0] = math.nan
    np.save(tmp_path / "N.npy", C.numpy())
    file = str(tmp_path / "C.npy")
    table = str(tmp_path / "out.csv")
    assert collapse.main([file, "--json", "-", "--csv", table, "--eps", "0.1"]) == 0
    got = json.loads(capsys.readouterr().out)["sets"][0]
    assert got["eps"]["0.1"]["unique"] == 10 and got["eps"]["0.1"]["largest_groups"] == [31]
    assert got["random"]["eps"]["0.1"]["unique"] == 40
    row, = csv.DictReader(open(table))
    assert (row["unique"], row["random_unique"], row["K"], row["eps"]) == ("10", "40", "40", "0.1")
    low = [file, "--fail-below", "0.5", "--eps", "0.025"]
    assert collapse.main([*low, "--json", str(tmp_path / "o.json")]) == 1
    assert "unique(0.025) is 0.2500, below 0.5" in capsys.readouterr().err
    assert json.load(open(tmp_path / "o.json"))["sets"][0]["K"] == 40
    assert collapse.main([file, "--fail-below", "0.25", "--eps", "0.025"]) == 0
    assert collapse.main([str(tmp_path / "Z.npy")]) == 0
    assert "1 of 40 prototypes are zero rows" in capsys.readouterr().out
    for words, says in (([str(tmp_path / "N.npy")], "1 of 40 prototypes hold NaN"),
                        ([file, "--eps", "a"], "--eps a"),
                        ([file, "--eps", "3"], "--eps 3"),
                        ([file, "--fail-below", "50"], "--fail-below must be a share"),
                        ([file, "--assign", "x.csv"], "--data"),
                        ([file, "--picture", "training", "--plot", "x"], "step")):
        assert says in refusal(capsys, *words)


@pytest.mark.parametrize("flags, says", [
    ("--orders -1", "--orders must lie in [0, 1000], got -1"),
    ("--orders 99999999999999999999", "--orders must lie in [0, 1000], got 99999999999999999999"),
    ("--fail-below nan", "--fail-below must be a share in [0, 1], got nan"),
    ("--seed -1", "--seed must not be negative, got -1"),
    ("--seed 99999999999999999999", "--seed must be a number below 4294967296 in size"),
    ("--eps nan", "--eps nan is not a list of numbers in [0, 2]"),
    ("--eps 0.1,", "--eps 0.1, is not a list of numbers"),
    ("--eps=", "--eps must not be empty"),
    ("--csv no/x.csv", "--csv no/x.csv must be a file in a folder that exists"),
    ("--json .", "--json . must be a file"),
    ("--json /dev/full", "--json /dev/full must be a file"),
    ("--plot C.npy/x.png", "--plot C.npy/x.png must be a file in a folder that exists"),
    ("--plot x.docx", "the picture x.docx must end in one of"),
    ("--data toy --montage x.docx", "the picture x.docx must end in one of"),
])
def test_flags_that_cannot_be_are_refused_before_the_work(
        flags, says, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(collapse, "describe")
    np.save("C.npy", randn(4, 3).numpy())
    assert says in refusal(capsys, "C.npy", *flags.split())
    assert os.listdir() == ["C.npy"]


@pytest.mark.parametrize("flag, name", [("--json", "o.json"), ("--csv", "o.csv"),
                                        ("--plot", "o.png")])
def test_a_full_disk_costs_no_number_and_no_old_file(flag, name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    np.save(tmp_path / "C.npy", randn(4, 3).numpy())
    (tmp_path / name).write_text("old")

    def fsync(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SystemExit) as stop:
        collapse.main([str(tmp_path / "C.npy"), flag, str(tmp_path / name)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "4 x 3" in out
    assert err.startswith(f"collapse.py: error: {tmp_path / name}: No space left on device")
    assert (tmp_path / name).read_text() == "old" and len(os.listdir(tmp_path)) == 2


def test_names_that_are_not_utf_8_are_printed_and_written_with_escapes(tmp_path):
    """Also where the terminal is not UTF-8: the table of counts has a plus-minus sign."""
    name = os.fsdecode(b"caf\xe9.npy")
    np.save(tmp_path / name, randn(4, 3).numpy())
    program = ("import sys; sys.path.insert(0, sys.argv[1]); import collapse; "
               "sys.stdout.reconfigure(encoding='ascii'); sys.exit(collapse.main(sys.argv[2:]))")
    done = forked.run([sys.executable, "-c", program, HERE, name, "--csv", "o.csv"], cwd=tmp_path,
                      capture_output=True)
    assert done.returncode == 0 and not done.stderr
    assert "caf\\udce9.npy" in done.stdout and "\\xb1" in done.stdout
    assert "caf\\udce9.npy" in (tmp_path / "o.csv").read_text(encoding="utf-8")


def test_sweep_fig1_and_checkpoint_series(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = []
    for epoch in 0, 10, 20:
        C = randn(60, 16, seed=epoch)
        C[60 - 2 * epoch:] = C[0]
        files.append(str(tmp_path / f"ckp-{epoch}.pth"))
        torch.save({"epoch": epoch, "state_dict": {"module.prototypes.weight": C}}, files[-1])
    for picture in "auto", "fig1", "training":
        file = str(tmp_path / f"{picture}.png")
        assert collapse.main([*files, "--picture", picture, "--plot", file]) == 0
        assert ink(file) > .01
    capsys.readouterr()
    sets = [{"file": file, "set": "p", "several": False, "eps": {.5: {"share": 1 - i / 3}}}
            for i, file in enumerate(files[::-1])]
    runs, axis = report.over_training(sets)
    assert axis == "epoch" and [row["epoch"] for row in runs[0][1]] == [0, 10, 20]
    assert [row["unique_0.5"] for row in runs[0][1]] == pytest.approx([1 / 3, 2 / 3, 1])


def test_the_legend_names_a_run_that_the_first_panel_lacks(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plots, "save", lambda fig, file: drawn.append(fig))
    plots.training([("a memory", [{"step": s, "used": .5} for s in (0., 1.)]),
                    ("a set", [{"step": s, "unique_0.5": 1., "used": 1.} for s in (0., 1.)])],
                   str(tmp_path / "x.png"))
    first = drawn[0].axes[0]
    assert first.get_legend_handles_labels()[1] == ["a set"]
    assert {text.get_text() for text in drawn[0].legends[0].get_texts()} == {"a memory", "a set"}


def test_densities():
    circle = np.linspace(-np.pi, np.pi, 721)[:-1]
    a = np.array([0., 0, 2])
    density = plots.vmf_kde(a, circle)
    kappa = torch.tensor(20., dtype=torch.float64)
    kernels = torch.distributions.VonMises(torch.from_numpy(a)[:, None], kappa)
    want = kernels.log_prob(torch.from_numpy(circle)).exp().mean(0).numpy()
    assert density == pytest.approx(want, rel=1e-4, abs=1e-9)
    assert density.sum() * 2 * np.pi / 720 == pytest.approx(1)
    grid, points = np.linspace(-1.5, 1.5, 61), randn(7, 2).numpy() * .3
    got = plots.gaussian_kde(points, grid, .2)
    normal = torch.distributions.Normal(torch.from_numpy(points).double(), .2)
    want = normal.log_prob(torch.tensor([grid[33], grid[20]])).sum(1).exp().mean().item()
    assert got[20, 33] == pytest.approx(want)  # rows are y
    assert got.sum() * .05 ** 2 == pytest.approx(1, abs=1e-3)
    cluster = torch.tensor([1., 2, 3]) + .01 * randn(99, 3)
    assert np.abs(plots.plane(collapse.unit_rows(cluster))).max() < .1
    even = plots.plane(collapse.unit_rows(randn(999, 3)))
    assert np.histogram(even, 4, (-np.pi, np.pi))[0].min() > 150


# ---- images per prototype -----------------------------------------------------------------------
class ToyNet(torch.nn.Linear):
    def forward(self, views):
        return super().forward(views[0])


def test_with_images(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    C = torch.eye(6, 8)  # prototypes 4 and 5 get no image, 5 is a copy of 4
    C[5] = C[4]
    y = torch.tensor([0] * 30 + [1] * 12)
    k = torch.cat([torch.arange(30) % 3, torch.full((12,), 3)])
    x = (torch.eye(8)[k] * 255).byte().view(42, 2, 2, 2)[:, [0, 1, 1]]
    images = argparse.Namespace(x=x, y=y, classes=["cat", "dog"], name="toy", paths=None)
    net = ToyNet(8, 8, bias=False).train()
    net.weight.data = torch.eye(8)

    def probabilities(h, beta, tau, centre):
        assert beta == 0.7
        return (h @ C.T / tau - centre).softmax(1)

    there = {"to": lambda device: None}
    prototypes = argparse.Namespace(assign=probabilities, vectors=lambda: C, **there)
    centre = torch.zeros(6)
    centre[3] = 1.
    loss = argparse.Namespace(tau_and_centre=lambda: (1 / 9, centre), **there)
    saved = {"data": "toy", "img_size": 2, "imbalance": 5, "seed": 3, "script": "zoo/mine.py",
             "mean": [0.5] * 3, "std": [0.5] * 3, "beta": [0.1, 0.7]}
    loaded = []  # imbalance of each set that was asked for

    def load(data, imbalance=1, **others):
        loaded.append(imbalance)
        return images, None

    monkeypatch.setattr(assign.runs, "load_run",
                        lambda path: (net.eval(), prototypes, loss, saved), raising=False)
    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(assign.runs.views, "eval_batches",
                        lambda images, size, device, mean, std: torch.eye(8)[k].split(10))
    run = fake_run(tmp_path / "run", "joint", 1)
    files = ["--assign", str(tmp_path / "a.csv"), "--montage", str(tmp_path / "m.png")]
    assert collapse.main([run, "--data", "toy", *files]) == 0
    assert not net.training and loaded == [5]  # the long tail of the run's own data
    out = capsys.readouterr().out
    assert "run on 42 images of toy" in out and "used 66.7%" in out
    lines = [line.split() for line in out.split("\n")]
    assert ["cat", "71.4%", "75.0%"] in lines and ["dog", "28.6%", "25.0%"] in lines
    with open(tmp_path / "a.csv") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "prototype", "probability"]
    assert [int(row[1]) for row in rows[1:]] == k.tolist()
    # tau = 1 / 9 makes the logit of the right prototype 9; the centre takes 1 from prototype 3
    assert float(rows[1][2]) == pytest.approx(
        math.exp(9) / (math.exp(9) + 4 + math.exp(-1)), rel=1e-4)
    assert float(rows[-1][2]) == pytest.approx(math.exp(8) / (math.exp(8) + 5), rel=1e-4)
    assert ink(tmp_path / "m.png") > .01
    assigned = argparse.Namespace(h=torch.eye(8)[k], C=C, won=k, images=images)
    duplicates, eps = collapse.largest_group(C, [.025, .5])
    rows = assign.montage_rows(assigned, duplicates, eps, rows=2)
    assert [title for title, _ in rows] == [
        "most used\n3 (12 images)", "most used\n0 (10 images)", "least used\n4 (0 images)",
        "least used\n5 (0 images)", "duplicates at 0.025\n4 (0 images)",
        "duplicates at 0.025\n5 (0 images)"]
    assert torch.equal(rows[0][1][0], x[30])  # an image of prototype 3
    assert collapse.main([run, "--data", "elsewhere", "--json", "-"]) == 0
    assert loaded == [5, 1]
    assert json.loads(capsys.readouterr().out)["data"]["run"]["used"] == pytest.approx(4 / 6)


def test_prototypes_per_class():
    won, y = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 1, 0])
    out = assign.per_class(won, y, ["cat", "dog"], K=5)
    assert out["classes"] == {"cat": {"images": .5, "prototypes": pytest.approx(2 / 3)},
                              "dog": {"images": .5, "prototypes": pytest.approx(1 / 3)}}
    tie = assign.per_class(torch.tensor([0, 0]), torch.tensor([1, 0]), ["cat", "dog"], K=1)
    assert tie["classes"]["cat"]["prototypes"] == 1  # to the smaller class
    sizes = torch.tensor([0] * 101 + [1] * 100 + [2] * 20 + [3] * 19)
    by_size = assign.per_class(sizes, sizes, list("abcd"), K=4)["groups"]
    assert {name: shares["prototypes"] for name, shares in by_size.items()} == {
        "head (1 classes)": .25, "medium (2 classes)": .5, "tail (1 classes)": .25}


def test_the_entropy_of_assignments(monkeypatch):
    """One image is of two prototypes and one of all four: ln 2 and ln 4."""
    P, h = torch.tensor([[.5, .5, 0, 0], [.25, .25, .25, .25]]), torch.eye(2, 3)
    images = argparse.Namespace(y=None)
    run = (None, argparse.Namespace(vectors=lambda: torch.eye(4, 3)), None, {})
    monkeypatch.setattr(assign.runs, "load_run", lambda path: run)
    monkeypatch.setattr(assign.runs, "assignments",
                        lambda run, images: iter([(h[:1], P[:1]), (h[1:], P[1:])]))
    monkeypatch.setattr(assign, "load_images", lambda data, args: (images, None, None))
    found = assign.summary(assign.assign_images("run", "toy", collapse.usage))
    assert found["entropy"] == pytest.approx(1.5 * math.log(2))
    assert found["entropy_over_ln_k"] == pytest.approx(0.75)


def test_a_montage_shows_the_images_nearest_in_cosine_and_no_prototype_twice():
    """The long vector has the larger product with the prototype, and the short one the cosine."""
    x = torch.arange(3)[:, None, None, None].expand(3, 3, 2, 2)
    assigned = argparse.Namespace(h=torch.tensor([[9., 9.], [.1, 0.], [0., 5.]]), C=torch.eye(2),
                                  won=torch.tensor([0, 0, 1]), images=argparse.Namespace(x=x))
    rows = assign.montage_rows(assigned, [], 0, rows=4, n=3)
    assert [title for title, _ in rows] == ["most used\n0 (2 images)", "most used\n1 (1 images)"]
    assert [int(picture[0, 0, 0]) for picture in rows[0][1]] == [1, 0, 2]


def test_the_largest_rank_is_the_smaller_side():
    text = report.table_of_cosines([("wide", collapse.describe(randn(5, 64), [.5])),
                                    ("tall", collapse.describe(randn(64, 3), [.5]))])
    _, wide, tall = text.splitlines()
    assert wide.endswith(" of 5") and tall.endswith(" of 3")


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
