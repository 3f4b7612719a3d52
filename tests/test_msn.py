"""zoo/msn.py: MSN and PMSN beside hand-worked cases, and as a run."""
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import heads
import losses
import models
from conftest import (TINY, compare_one_process_with_two, differences, half_cosine, read_checkpoint,
                      read_log, watch_schedules)
from zoo import msn

pytestmark = pytest.mark.usefixtures("small_shapes", "small_network")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(out, *flags):
    return msn.main([*TINY, "--out", str(out), *map(str, flags)])


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=-1)


def test_sharpened_targets_are_a_softmax_at_the_product_of_both_temperatures():
    protos, h = heads.Frozen(5, 3), unit(1, 7, 3).double()
    z = h[0] @ protos.start.double().T
    sharp = (z / 0.1).softmax(1) ** (1 / 0.25)
    sharp = sharp / sharp.sum(1, keepdim=True)
    assert torch.allclose((z / 0.025).softmax(1), sharp, atol=1e-12)
    q = msn.MSNLoss(5, balance=False).targets(h, protos)
    assert torch.allclose(q.double(), sharp, atol=1e-5)


def test_balanced_targets_are_three_rounds_on_the_probabilities():
    protos, h = heads.Frozen(5, 3), unit(1, 7, 3)
    q = msn.MSNLoss(5, balance=False).targets(h, protos).double()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    assert torch.allclose(msn.MSNLoss(5).targets(h, protos).double(), q, atol=1e-6)


@pytest.mark.parametrize("prior", [0, 0.25])
def test_the_loss_beside_a_loop_in_float64(prior):
    V, B, K, D = 4, 3, 6, 5
    protos, h_s = heads.Frozen(K, D), unit(V - 1, B, D, seed=1)
    q = randn(B, K, seed=2).softmax(1)
    terms = msn.MSNLoss(K, prior_weight=2.0, prior=prior)(h_s, q, protos)
    z = (h_s.double() @ protos.start.double().T).numpy() / 0.1
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    match = np.mean([-(q[b].numpy() * np.log(p[i, b])).sum()
                     for i in range(V - 1) for b in range(B)])
    p_bar = p.mean((0, 1))
    pi = np.arange(1, K + 1) ** -float(prior)
    divergence = (p_bar * np.log(p_bar / (pi / pi.sum()))).sum()
    assert float(terms["match"]) == pytest.approx(match, rel=1e-5)
    assert float(terms["prior"]) == pytest.approx(2 * divergence, rel=1e-4)


def test_the_prior_term_is_nothing_at_equal_shares_and_ln_k_on_one_prototype():
    protos = heads.Frozen(4, 4)
    protos.start.copy_(torch.eye(4))
    q = torch.full((4, 4), 0.25)
    loss = msn.MSNLoss(4, tau=0.01)
    equal = loss(torch.eye(4).expand(2, 4, 4), q, protos)["prior"]
    assert float(equal) == pytest.approx(0, abs=1e-6)
    on_one = loss(torch.eye(4)[:1].expand(2, 4, 4), q, protos)["prior"]
    assert float(on_one) == pytest.approx(math.log(4), rel=1e-5)


def test_the_power_law_of_pmsn():
    pi = msn.MSNLoss(1024, prior=0.25).pi.double()
    assert float(pi[0] / pi[-1]) == pytest.approx(5.6569, abs=1e-4)
    assert float((pi * (pi * 1024).log()).sum()) == pytest.approx(0.0420, abs=1e-4)
    assert torch.equal(msn.MSNLoss(4).pi, torch.full((4,), 0.25))


@pytest.mark.parametrize("n, kept", [(196, 166), (64, 54), (16, 13)])
def test_how_many_patches_stay(n, kept):
    keep = msn.kept_patches(n, 0.15, 0, 7)
    assert len(keep) == len(keep.unique()) == kept
    assert 0 <= keep.min() and keep.max() < n
    assert torch.equal(keep, msn.kept_patches(n, 0.15, 0, 7))
    assert not torch.equal(keep, msn.kept_patches(n, 0.15, 0, 8))


def test_a_dropped_patch_is_as_if_it_were_not_there_and_the_class_token_stays():
    net = models.build("vit_tiny", patch_size=8, img_size=32).eval()
    x = randn(2, 3, 32, 32)
    keep = torch.tensor([0, 3, 7, 15])
    cls, patches = net(x, keep)
    assert patches.shape == (2, 4, net.dim)
    other = x.clone()
    other[..., :8, 8:16] = 0  # patch 1
    assert torch.equal(net(other, keep)[0], cls)
    assert not torch.allclose(net(other)[0], net(x)[0])
    everything = net(x, torch.arange(16))
    for a, b in zip(everything, net(x)):
        assert torch.equal(a, b)


def test_the_students_vectors_are_those_of_each_view_alone():
    backbone = models.build("vit_nano", patch_size=8, img_size=32)
    net = models.MultiCrop(backbone, heads.Head(backbone.dim, 16, 8, bn=True, norm=True)).eval()
    crops = [randn(2, 3, 32, 32, seed=1), randn(2, 3, 16, 16, seed=2), randn(2, 3, 16, 16, seed=3)]
    h = msn.student_vectors(net, crops, torch.arange(16))
    assert h.shape == (3, 2, 8)
    for i, crop in enumerate(crops):
        assert torch.allclose(h[i], net([crop]), atol=1e-5)


@pytest.mark.parametrize("flags", [["--prototypes", "joint"], ["--prior", "0.25", "--no-balance"],
                                   ["--prototypes", "decoupled", "--gmm-start", "0"]])
def test_a_run_resumes_to_the_bit_and_is_evaluated(tmp_path, flags):
    from support import runs
    metrics = run(tmp_path / "whole", *flags)
    run(tmp_path / "parts", *flags, "--stop-at", "3")
    run(tmp_path / "parts", *flags, "--resume")
    assert not differences(*(read_checkpoint(tmp_path / name) for name in ("whole", "parts")))
    assert 0 <= metrics["knn"] <= 100
    assert {"match", "prior"} < read_log(tmp_path / "whole")[0].keys()
    ckpt = read_checkpoint(tmp_path / "whole")
    assert ckpt["args"]["script"] == "zoo/msn.py"
    _, protos, loss, _ = runs.load_run(str(tmp_path / "whole"))
    assert isinstance(loss, msn.MSNLoss)
    assert protos.assign(unit(3, 8), tau=loss.tau).shape == (3, 16)
    del ckpt["args"]["sharpen"]  # as if the run were older than this flag
    torch.save(ckpt, tmp_path / "whole" / "ckpt.pt")
    assert runs.load_run(str(tmp_path / "whole"))[2].sharpen == 0.25


def test_prototypes_are_one_set_and_the_teacher_follows_along_a_line(tmp_path):
    run(tmp_path, "--stop-at", "1", "--warmup-epochs", "0", "--momentum", "0.9")
    ckpt = read_checkpoint(tmp_path)
    states = ckpt["prototypes"]
    assert torch.equal(states["student"]["weight"], states["teacher"]["weight"])
    assert not torch.equal(states["vectors"], states["start"])


def test_the_student_never_sees_the_teachers_view(tmp_path, monkeypatch):
    crops, of_student, of_teacher = [], [], []
    next_crops, vectors = msn.Clock.next, msn.student_vectors
    forward = models.MultiCrop.forward

    def remember(clock, batches):
        crops.extend(next_crops(clock, batches))
        return crops

    def student_vectors(student, views, keep):
        of_student.extend(views)
        return vectors(student, views, keep)

    def multi_crop(net, views):
        if crops and not of_student:
            of_teacher.extend(views)
        return forward(net, views)
    monkeypatch.setattr(msn.Clock, "next", remember)
    monkeypatch.setattr(msn, "student_vectors", student_vectors)
    monkeypatch.setattr(models.MultiCrop, "forward", multi_crop)
    run(tmp_path, "--stop-at", "1")
    assert [torch.equal(view, crops[0]) for view in of_teacher] == [True]
    assert len(of_student) == len(crops) - 1
    assert all(torch.equal(a, b) for a, b in zip(of_student, crops[1:]))


def test_the_backbones_of_student_and_teacher_are_compiled(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(net.arch))
    run(tmp_path, "--compile", "--stop-at", "1")
    assert compiled == ["vit_nano"] * 2


@pytest.mark.parametrize("flags, sentence", [
    (["--patch-drop", "1"], "--patch-drop must lie in [0, 1), got 1.0"),
    (["--sharpen", "0"], "--sharpen must be positive, got 0.0"),
    (["--prior", "-1"], "--prior must not be negative, got -1.0"),
    (["--prior", "0.2", "--prior-weight", "0"], "--prior changes nothing with --prior-weight 0"),
    (["--arch", "resnet18", "--patch-drop", "0"], "has no patches that can be left out"),
    (["--teacher-temp", "0.1", "0.1"], "--teacher-temp has no effect in MSN"),
    (["--targets", "sinkhorn"], "--targets has no effect in MSN"),
    (["--uniformity", "1"], "--uniformity has no effect in MSN"),
    (["--queue", "9"], "--queue has no effect in MSN"),
    (["--prototypes", "frozen", "--student-prototypes", "joint"],
     "--student-prototypes has no effect in MSN"),
    (["--prototypes", "vmf"], "--prototypes vmf does not work here"),
    (["--prototypes", "kmeans"], "--prototypes kmeans does not work here"),
    (["--num-prototypes", "1"], "--num-prototypes must be at least 2, got 1"),
    (["--method", "dino"], "--method")])
def test_bad_flags_are_one_sentence(tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit) as refusal:
        run(tmp_path / "run", *flags)
    assert refusal.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run" / "ckpt.pt").exists()


@pytest.mark.parametrize("preset, prior, weight", [("paper-msn", 0, 1), ("paper-pmsn", 0.25, 5)])
def test_presets_hold_the_numbers_of_the_official_code(preset, prior, weight):
    args = msn.parse(["--preset", preset, "--device", "cpu", "--data", "shapes"])
    assert args.lr * args.batch_size / 256 == pytest.approx(1e-3)
    assert (args.patch_drop, args.sharpen, args.student_temp) == (0.15, 0.25, 0.1)
    assert (args.prior, args.prior_weight, args.num_prototypes) == (prior, weight, 8142)
    assert args.head_norm and args.prototypes == "joint"


# ---- flags, schedules and columns of a run ------------------------------------------------------
def test_the_schedules_of_a_run(tmp_path, monkeypatch):
    seen, betas = watch_schedules(monkeypatch)
    run(tmp_path, "--prototypes", "decoupled", "--gmm-start", "0", "--lr", "3.2", "--min-lr",
        "0.02", "--weight-decay", "0.1", "--weight-decay-end", "0.5", "--beta", "0.2", "0.8")
    # peak 3.2 * 8 / 256; the rise takes a tenth of 6 steps
    lrs = [0] + [half_cosine(0.1, 0.02, (step - 0.6) / 5.4) for step in range(1, 6)]
    assert [lr for lr, _ in seen] == pytest.approx(lrs)
    assert [decay for _, decay in seen] == pytest.approx(
        [half_cosine(0.1, 0.5, step / 6) for step in range(6)])
    assert betas == pytest.approx([0.2 + 0.6 * step / 6 for step in range(6)])


def test_the_teachers_momentum_rises_along_a_line(tmp_path):
    """In the second of 6 steps it is a sixth of the way; along a cosine it would be 0.24."""
    flags = ["--momentum", "0.2", "--momentum-end", "0.8", "--lr", "0.5"]
    for step in (1, 2):
        run(tmp_path / str(step), *flags, "--stop-at", step)
    one, two = (read_checkpoint(tmp_path / str(step)) for step in (1, 2))
    name = "head.mlp.6.weight"
    before, student = one["teacher"][name], two["student"][name]
    assert (student - before).abs().max() > 1e-3
    assert torch.allclose(two["teacher"][name], 0.3 * before + 0.7 * student, atol=1e-6)


def test_two_processes_equal_one(tmp_path):
    compare_one_process_with_two(
        "msn", [[], ["--prior", "0.25", "--no-balance"],
                ["--prototypes", "decoupled", "--gmm-start", "0"]],
        [*TINY, "--no-head-bn", "--lr", "1e-3"], ("match", "prior", "penalty"), tmp_path)


def test_four_micro_batches_are_one_batch(tmp_path):
    """Of M.3: the mean of M.4 is one of a micro-batch."""
    for accum in ("1", "4"):
        run(tmp_path / accum, "--no-head-bn", "--accum", accum, "--prior-weight", "0",
            "--log-every", "1", "--stop-at", "1")
    one, four = (read_log(tmp_path / accum)[1] for accum in "14")
    for column in ("match", "grad_norm"):
        assert float(one[column]) == pytest.approx(float(four[column]), rel=1e-4)


def test_the_loss_that_the_flags_ask_for():
    args = msn.parse([*TINY, "--out", "nowhere", "--student-temp", "0.2", "--sharpen", "0.5",
                      "--no-balance", "--prior", "0.25", "--prior-weight", "5"])
    loss = msn.make_loss(args)
    assert (loss.tau, loss.sharpen, loss.balance, loss.weight) == (0.2, 0.5, False, 5)
    assert float(loss.pi[0] / loss.pi[15]) == pytest.approx(2)  # 16 ** 0.25


def test_a_row_of_the_log_and_the_patches_that_stay(tmp_path, monkeypatch):
    """The first step has learning rate 0, so the prototypes are those of the start."""
    kept, original = [], msn.student_vectors
    monkeypatch.setattr(msn, "student_vectors", lambda net, crops, keep: (
        kept.append(len(keep)), original(net, crops, keep))[1])
    run(tmp_path, "--prototypes", "kp", "--patch-drop", "0.5", "--log-every", "1", "--stop-at", "1")
    row = {name: float(text) for name, text in read_log(tmp_path)[1].items() if text}
    start = read_checkpoint(tmp_path)["prototypes"]["start"]
    assert row["penalty"] == pytest.approx(0.1 * float(losses.koleo(start)), rel=1e-4)
    assert row["loss"] == pytest.approx(row["match"] + row["prior"] + row["penalty"], rel=1e-5)
    assert row["loss_over_ln_k"] == pytest.approx(row["match"] / math.log(16), rel=1e-4)
    assert kept == [8]  # of 4 x 4


def test_prototypes_stand_still_in_the_first_pass(tmp_path):
    """--freeze-prototypes 1: for 12 steps, of which the run has 6."""
    run(tmp_path, "--freeze-prototypes", "1", "--lr", "0.5")
    states = read_checkpoint(tmp_path)["prototypes"]
    assert torch.allclose(F.normalize(states["student"]["weight"], dim=1), states["start"],
                          atol=1e-6)


def test_a_step_that_is_not_finite_moves_neither_network(tmp_path, monkeypatch):
    original, calls = msn.MSNLoss.forward, []

    def broken_at_the_third_step(*args):
        calls.append(1)
        terms = original(*args)
        return terms | {"match": terms["match"] * (math.nan if len(calls) == 3 else 1)}
    flags = ["--lr", "0.1", "--momentum", "0.5"]
    run(tmp_path / "two", *flags, "--stop-at", "2")
    monkeypatch.setattr(msn.MSNLoss, "forward", broken_at_the_third_step)
    run(tmp_path / "three", *flags, "--stop-at", "3")
    two, three = (read_checkpoint(tmp_path / name) for name in ("two", "three"))
    assert not differences(two, three, "student", "teacher")


class Scaled(msn.MSNLoss):
    """MSN on vectors that a number of the loss scales."""

    def __init__(self, *args):
        super().__init__(*args)
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, h_s, *others):
        return super().forward(self.factor * h_s, *others)


def test_parameters_of_a_loss_are_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(msn, "MSNLoss", Scaled)
    run(tmp_path, "--lr", "1")
    assert read_checkpoint(tmp_path)["loss"]["factor"] != 1


class Biased(heads.Frozen):
    def bias(self, tau):
        return torch.arange(16.)


def test_a_bias_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(heads.PROTOTYPES, "joint", Biased)
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert "--prototypes joint has a `bias`, which MSN does not read" in capsys.readouterr().err
