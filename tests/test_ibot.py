"""zoo/ibot.py: the patch stream beside hand-worked cases, and as a run."""
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import collapse
import heads
import models
import views
from conftest import (TINY, compare_one_process_with_two, differences, half_cosine, read_checkpoint,
                      read_log, watch_schedules)
from fast.gmm import FastGMM
from losses import DINOLoss
from support.monitor import Monitor
from zoo import ibot, masks

CENTRE = ["--targets", "center", "--num-patch-prototypes", "16"]  # iBOT's, and not our default
pytestmark = pytest.mark.usefixtures("small_shapes", "small_network")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(out, *flags):
    return ibot.main([*TINY, *CENTRE, "--out", str(out), *map(str, flags)])


def identity_prototypes(K):
    protos = heads.Frozen(K, K)
    protos.start.copy_(torch.eye(K))
    return protos


def weights_of(hidden):
    """(rows (m, 2), weights (m,)) of masks hidden (crops, n)."""
    rows = hidden.nonzero()
    return rows, ibot.row_weights(hidden, rows)


# ---- the loss ----------------------------------------------------------------------------------
def test_three_rows_by_hand_and_the_centre_after_them():
    """Three crops of 2 x 2 patches, of which 2, 1 and 0 are hidden; DINOv2's code gives .4057."""
    hidden = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    _, weights = weights_of(hidden)
    assert weights.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 3])
    protos = identity_prototypes(2)
    loss = ibot.PatchLoss(2, 1, temps=(0.1, 0.1), tau=0.2)
    p_t = loss.targets(torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), protos, 0)
    h_s = torch.tensor([[0.7, 0.8], [0.9, 1.0], [1.1, 1.2]])
    assert float(loss(h_s, p_t, weights, protos)) == pytest.approx(0.405698, abs=1e-6)
    assert loss.centre.tolist() == pytest.approx([0.03, 0.04])


def test_a_uniform_student_pays_ln_k_for_each_masked_crop():
    hidden = torch.zeros(4, 16, dtype=torch.bool)
    hidden[1, :3] = hidden[3, 5:6] = True
    rows, weights = weights_of(hidden)
    p_t = randn(len(rows), 8).softmax(1)
    value = ibot.PatchLoss(8, 1)(torch.zeros(len(rows), 8), p_t, weights, identity_prototypes(8))
    assert float(value) == pytest.approx(0.5 * math.log(8)) == pytest.approx(1.039721, abs=1e-6)


@pytest.mark.parametrize("crops, n, K", [(2, 5, 3), (4, 4, 7), (6, 9, 5)])
@pytest.mark.parametrize("kind", ["joint", "vmf"])
def test_the_patch_loss_beside_a_loop_in_float64(crops, n, K, kind):
    """Value and gradients of vectors and prototypes; the first crop has nothing hidden."""
    D, tau, tau_t = 64, 0.1, 0.05
    hidden = torch.rand(crops, n, generator=torch.Generator().manual_seed(3)) < 0.5
    hidden[0] = False
    rows, weights = weights_of(hidden)
    make = heads.Joint if kind == "joint" else heads.VMF
    protos_s, protos_t = make(K, D, seed=1), make(K, D, seed=2)
    lengths = torch.linspace(0.5, 3, K)[:, None] if kind == "vmf" else torch.ones(K, 1)
    if kind == "vmf":  # lengths that differ, so that the biases do
        protos_s.gain.data, protos_t.gain.data = lengths.clone(), lengths.flip(0)
    h_t = F.normalize(randn(len(rows), D, seed=4), dim=1)
    h_s = F.normalize(randn(len(rows), D, seed=5), dim=1).requires_grad_()
    loss = ibot.PatchLoss(K, 1, "prob" if kind == "vmf" else "center", (tau_t, tau_t), tau=tau)
    loss.centre += torch.linspace(-0.1, 0.1, K)
    centre = loss.centre.double().clone()
    p_t = loss.targets(h_t, protos_t, 0)
    value = loss(h_s, p_t, weights, protos_s)
    value.backward()

    bias_t = protos_t.bias(tau_t).double() if kind == "vmf" else 0
    h = h_s.detach().double().requires_grad_()
    weight = protos_s.weight.detach().double().requires_grad_()
    bias = protos_s.bias(tau).detach() if kind == "vmf" else 0
    total = 0
    for crop in range(crops):
        n_hidden = int(hidden[crop].sum())
        for r in [r for r in range(len(rows)) if rows[r, 0] == crop]:
            z_t = h_t[r].double() @ protos_t.directions().double().T / tau_t + bias_t
            q = (z_t - (centre if kind == "vmf" else centre / tau_t)).softmax(0)
            z_s = h[r] @ (lengths * F.normalize(weight, dim=1)).T / tau + bias
            log_p = z_s - z_s.logsumexp(0)
            for k in range(K):
                total = total - q[k].detach() * log_p[k] / max(n_hidden, 1) / crops
    total.backward()
    assert float(value) == pytest.approx(float(total), rel=1e-4)
    assert torch.allclose(h_s.grad.double(), h.grad, atol=1e-4)
    assert torch.allclose(protos_s.weight.grad.double(), weight.grad, atol=1e-3)


def test_sinkhorn_of_the_patches_is_one_matrix_of_all_rows():
    protos = identity_prototypes(3)
    h = randn(7, 3)
    q = ibot.PatchLoss(3, 1, "sinkhorn", (0.5, 0.5)).targets(h, protos, 0)
    p = (h.double() / 0.5).exp()
    for _ in range(3):
        p = p / p.sum(0)
        p = p / p.sum(1, keepdim=True)
    assert torch.allclose(q.double(), p, atol=1e-6)


@pytest.mark.parametrize("how", ["center", "prob", "sinkhorn"])
def test_a_step_without_hidden_patches_costs_nothing_and_moves_no_centre(how):
    protos, loss = heads.Joint(4, 3), ibot.PatchLoss(4, 1, how)
    p_t = loss.targets(torch.zeros(0, 3), protos, 0)
    assert p_t.shape == (0, 4)
    value = loss(torch.zeros(0, 3), p_t, torch.zeros(0), protos)
    assert float(value) == 0
    value.backward()
    assert protos.weight.grad.abs().max() == 0
    assert loss.centre.abs().max() == 0 and loss.centre.isfinite().all()


# ---- the network -------------------------------------------------------------------------------
def student(arch="vit_micro", patch=8, shared=True):
    own_head = [] if shared else ["--no-shared-head"]
    args = ibot.parse([*TINY, "--patch-size", str(patch), *own_head])
    args.arch = arch
    net = ibot.network(args, student=True)
    torch.nn.init.normal_(net.mask_token)
    return net.eval()


@pytest.mark.parametrize("arch, leaks", [("vit_micro", False), ("vit_nano", True)])
def test_what_lies_under_a_mask_does_not_reach_the_student(arch, leaks):
    """Unless the stem is convolutional: its neighbours see the edge of a hidden patch."""
    net, x = student(arch), [randn(1, 3, 32, 32, seed=1), randn(1, 3, 32, 32, seed=2)]
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[0, 5] = True  # row 1, column 1
    rows = torch.tensor([[0, 5], [0, 6], [1, 5]])
    other = [x[0].clone(), x[1]]
    other[0][..., 8:16, 8:16] += 1
    with torch.no_grad():
        before, after = net(x, hidden, rows), net(other, hidden, rows)
        assert (not torch.equal(before[0], after[0])) == leaks
        assert (not torch.equal(before[1], after[1])) == leaks
        assert not torch.equal(net(x, None, rows)[0], net(other, None, rows)[0])


def test_without_masks_the_student_is_a_plain_multi_crop_to_the_bit():
    net = student()
    x = [randn(2, 3, 32, 32, seed=s) for s in (1, 2)] + [randn(2, 3, 16, 16, seed=3)]
    nothing = torch.zeros(4, 16, dtype=torch.bool)
    h, patches = net(x, nothing, nothing.nonzero())
    assert torch.equal(h, models.MultiCrop(net.backbone, net.head)(x))
    assert patches.shape == (0, 8)
    (h.sum() + patches.sum()).backward()
    assert net.mask_token.grad.abs().max() == 0


@pytest.mark.parametrize("shared", [True, False])
def test_rows_are_the_head_of_the_patches_that_they_name(shared):
    net = student(shared=shared)
    x = [randn(2, 3, 32, 32, seed=s) for s in (1, 2)]
    rows = torch.tensor([[0, 3], [3, 0], [2, 15]])
    h, patches = net(x, None, rows)
    head = net.head if shared else net.patch_head
    features = net.backbone(torch.cat(x))[1]
    expected = head(torch.stack([features[crop, place] for crop, place in rows]))
    assert torch.allclose(patches, expected, atol=1e-6)
    assert h.shape == (4, 8)
    assert (net.patch_head is None) == shared


def test_the_mask_token_stands_outside_the_backbone_and_the_teacher_has_none(tmp_path):
    run(tmp_path)
    ckpt = read_checkpoint(tmp_path)
    plain = models.build("vit_micro", patch_size=4, img_size=32).state_dict().keys()
    for net in ("student", "teacher"):
        keys = {k.removeprefix("backbone.") for k in ckpt[net] if k.startswith("backbone.")}
        assert keys == plain
    assert ckpt["student"]["mask_token"].abs().max() > 0
    assert "mask_token" not in ckpt["teacher"]


# ---- places ------------------------------------------------------------------------------------
def test_sampled_places_depend_on_seed_and_step_and_name_their_crops():
    args = ibot.parse([*TINY, "--patch-rows", "3", "--place-mean"])
    places = ibot.ibot_places(args, 5, 16)
    assert places.shape == (2, 8, 3)
    assert torch.equal(places, ibot.ibot_places(args, 5, 16))
    assert not torch.equal(places, ibot.ibot_places(args, 6, 16))
    rows = ibot.rows_at(places)
    assert rows[:, 0].tolist() == [c for c in range(16) for _ in range(3)]
    assert torch.equal(rows[:, 1], places.flatten())
    many = torch.cat([ibot.ibot_places(args, step, 16).flatten() for step in range(100)])
    assert many.bincount().min() > 0.8 * len(many) / 16  # evenly over the grid


@pytest.mark.parametrize("shared", [True, False])
def test_a_set_of_patches_chooses_its_mixture_by_all_vectors_of_a_step(tmp_path, shared):
    """Of a crop there is one class token, and there are 4 patches with --patch-rows 4."""
    kinds = ["--shared-prototypes"] if shared else ["--num-patch-prototypes", "64"]
    args = ibot.parse([*TINY, *kinds, "--out", str(tmp_path), "--patch-rows", "4",
                       "--batch-size", "32", "--num-prototypes", "64", "--prototypes", "decoupled",
                       "--patch-prototypes", "decoupled"])
    args.batch_size = 2 ** 18  # 2 B K is 2^25, below the limit, and with all patches above it
    cls, patch = ibot.streams(args, 10, 0, torch.device("cpu"))
    assert isinstance(patch.teacher.gmm, FastGMM)
    assert isinstance(cls.teacher.gmm, FastGMM) == shared


def test_mutual_information_by_hand():
    a = torch.tensor([0, 0, 1, 1])
    assert masks.mutual_information(a, a) == pytest.approx(math.log(2))
    assert masks.mutual_information(a, torch.tensor([0, 1, 0, 1])) == pytest.approx(0)
    b = torch.tensor([0, 0, 0, 1])  # joint 1/2, 1/4, 1/4; margins 1/2 and 3/4
    expected = 0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375) + 0.25 * math.log(2)
    assert masks.mutual_information(a, b) == pytest.approx(expected)


def test_the_mean_of_each_place_follows_its_vectors_and_is_taken_off():
    mean = ibot.PlaceMean(3, 2)
    h = torch.tensor([[1., 0.], [3., 0.], [0., 2.], [math.nan, 0.]])
    mean.update(h, torch.tensor([0, 0, 2, 1]))
    assert torch.allclose(mean.mean, torch.tensor([[0.2, 0.], [0., 0.], [0., 0.2]]))
    out = mean(torch.tensor([[1.2, 0.], [0., 1.]]), torch.tensor([0, 1]))
    assert torch.allclose(out, torch.tensor([[1., 0.], [0., 1.]]))


# ---- whole runs --------------------------------------------------------------------------------
KINDS = [[], ["--prototypes", "vmf", "--shared-prototypes", "--targets", "prob"],
         ["--prototypes", "frozen", "--patch-prototypes", "decoupled", "--patch-targets",
          "sinkhorn", "--gmm-start", "0", "--place-mean"],
         ["--targets", "sinkhorn", "--prototypes", "live", "--gmm-start", "1",
          "--no-shared-head", "--num-patch-prototypes", "24"]]
NAMES = ["joint", "vmf shared", "dense decoupled", "live"]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_run_that_was_stopped_ends_at_the_bits_of_one_that_was_not(tmp_path, kind):
    metrics = run(tmp_path / "whole", *kind)
    run(tmp_path / "parts", *kind, "--stop-at", "3")
    run(tmp_path / "parts", *kind, "--resume")
    assert not differences(*(read_checkpoint(tmp_path / name) for name in ("whole", "parts")))
    log = read_log(tmp_path / "whole")
    assert read_log(tmp_path / "parts") == log
    assert {"cross_entropy", "patch", "patch_over_ln_k"} < log[0].keys()
    for name in ("patch_unique_0.5", "patch_used", "patch_place_nats"):
        assert float(log[-1][name]) == pytest.approx(metrics[name], rel=1e-4)
    sets = collapse.load_prototypes(str(tmp_path / "whole"))
    assert set(sets) == ({"prototypes"} if "--shared-prototypes" in kind
                         else {"prototypes", "patch_prototypes"})
    from support import runs
    _, protos, loss, _ = runs.load_run(str(tmp_path / "whole"))
    assert torch.equal(protos.vectors(), sets["prototypes"])


@pytest.mark.parametrize("kind", KINDS[::2], ids=NAMES[::2])
def test_four_micro_batches_are_one_batch(tmp_path, kind):
    for accum in ("1", "4"):
        run(tmp_path / accum, *kind, "--accum", accum, "--log-every", "1", "--lr", "1e-4")
    for row_1, row_4 in zip(*(read_log(tmp_path / accum)[1:] for accum in "14")):
        for term in ("cross_entropy", "patch"):
            assert float(row_1[term]) == pytest.approx(float(row_4[term]), rel=1e-4, abs=1e-6)
    one, four = (read_checkpoint(tmp_path / accum)["prototypes"]["patch_vectors"] for accum in "14")
    assert torch.allclose(one, four, atol=1e-4)


def test_two_processes_equal_one_though_their_hidden_patches_differ_in_number(tmp_path):
    compare_one_process_with_two("ibot", KINDS, [*TINY, *CENTRE, "--lr", "1e-3"],
                                 ("cross_entropy", "patch", "penalty"), tmp_path)


def test_the_backbones_of_student_and_teacher_are_compiled(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(net.arch))
    run(tmp_path, "--compile", "--stop-at", "1")
    assert compiled == ["vit_micro"] * 2


def test_masks_change_no_crop(tmp_path, monkeypatch):
    seen = []
    original = ibot.Clock.next

    def remember(clock, batches):
        crops = original(clock, batches)
        seen.append([float(crop.sum()) for crop in crops])
        return crops
    monkeypatch.setattr(ibot.Clock, "next", remember)
    run(tmp_path / "masks", "--stop-at", "2")
    run(tmp_path / "none", "--stop-at", "2", "--mask-share", "0", "--patch-weight", "0")
    assert seen[:2] == seen[2:]


def test_shared_prototypes_get_both_gradients_and_one_penalty(tmp_path, monkeypatch):
    penalties = []
    original = heads.Joint.penalty

    def counted(protos):
        penalties.append(protos)
        return original(protos)
    monkeypatch.setattr(heads.Joint, "penalty", counted)
    run(tmp_path / "shared", "--prototypes", "kp", "--shared-prototypes", "--stop-at", "1")
    assert len(penalties) == 1
    run(tmp_path / "two", "--prototypes", "kp", "--stop-at", "1")
    assert len(penalties) == 3
    optimizer = read_checkpoint(tmp_path / "shared")["optimizer"]
    other = read_checkpoint(tmp_path / "two")["optimizer"]
    assert len(other["state"]) == len(optimizer["state"]) + 1


def test_the_loss_of_patches_has_its_weight(tmp_path):
    terms = []
    for weight in (1, 0.25):
        run(tmp_path / str(weight), "--patch-weight", weight, "--log-every", "1", "--stop-at", "1")
        terms.append(read_log(tmp_path / str(weight))[-1])
    whole, quarter = terms
    assert float(quarter["patch"]) == pytest.approx(float(whole["patch"]) / 4, rel=1e-4)
    assert quarter["cross_entropy"] == whole["cross_entropy"]
    assert quarter["patch_over_ln_k"] == whole["patch_over_ln_k"]


@pytest.mark.parametrize("flags", [[], ["--shared-prototypes"]])
def test_a_teacher_without_momentum_is_the_student_prototypes_included(tmp_path, flags):
    run(tmp_path, "--momentum", "0", "--momentum-end", "0", "--lr", "0.1", "--stop-at", "2", *flags)
    ckpt = read_checkpoint(tmp_path)
    sets = [(ckpt["prototypes"]["student"], ckpt["prototypes"]["teacher"])]
    if not flags:
        sets.append((ckpt["patch_student"], ckpt["patch_teacher"]))
    for student, teacher in sets:
        assert torch.equal(student["weight"], teacher["weight"])
    trained = ckpt["student"]
    assert all(torch.equal(weight, trained[name]) for name, weight in ckpt["teacher"].items()
               if name in trained and not name.endswith(("running_mean", "running_var")))


def test_the_mean_of_places_is_taken_off_both_networks_and_follows_what_it_was_taken_off(
        tmp_path, monkeypatch):
    """Each step: teacher's hidden patches, those that move prototypes, student's hidden patches;
    then the mean takes in the second ones as they were."""
    calls = []
    forward, update = ibot.PlaceMean.forward, ibot.PlaceMean.update
    monkeypatch.setattr(ibot.PlaceMean, "forward", lambda place_mean, h, at: (
        calls.append(("off", h)), forward(place_mean, h, at))[1])
    monkeypatch.setattr(ibot.PlaceMean, "update", lambda place_mean, h, at: (
        calls.append(("in", h)), update(place_mean, h, at))[1])
    run(tmp_path, "--place-mean", "--stop-at", "2")
    steps = [calls[:4], calls[4:8]]
    for (off_t, h_t), (off_sampled, sampled), (off_s, h_s), (into, taken) in steps:
        assert [off_t, off_sampled, off_s, into] == ["off", "off", "off", "in"]
        assert h_t.shape == h_s.shape and h_s.requires_grad and not h_t.requires_grad
        assert taken is sampled and len(sampled) == 2 * 8 * 4


def test_a_shared_set_follows_class_tokens_and_patches(tmp_path, monkeypatch):
    seen = []
    original = heads.Decoupled.step
    monkeypatch.setattr(heads.Decoupled, "step", lambda protos, h, *a: (
        seen.append(h.flatten(0, -2).shape[0]), original(protos, h, *a))[1])
    same = ["--prototypes", "decoupled", "--targets", "sinkhorn", "--stop-at", "1"]
    run(tmp_path / "shared", *same, "--shared-prototypes")
    run(tmp_path / "two", *same)
    assert seen == [16 + 64, 16, 64]  # two crops of 8 images, 4 places in each


def test_prototypes_of_patches_start_elsewhere_and_have_the_rate_of_their_rows():
    args = ibot.parse([*TINY, *CENTRE, "--out", "nowhere", "--place-mean"])
    of_patches = ibot.args_of_patches(args)
    starts = [heads.prototypes(flags, 0).start for flags in (args, of_patches)]
    assert starts[0].shape == starts[1].shape and not torch.equal(*starts)
    # `clustered` multiplies both
    assert of_patches.lr * of_patches.batch_size == pytest.approx(args.lr * args.batch_size)


def test_without_the_patch_stream_the_class_stream_is_that_of_dino(tmp_path):
    """On the same network train.py prints the same losses."""
    import train
    same = ["--arch", "vit_micro", "--patch-size", "4", "--no-head-bn", "--prototypes", "joint",
            "--momentum", "0.99", "--teacher-temp", "0.04", "0.04", "--lr", "0.01",
            "--log-every", "1"]
    train.main([*TINY, "--out", str(tmp_path / "dino"), "--method", "dino", *same])
    run(tmp_path / "ibot", *same, "--mask-share", "0", "--patch-weight", "0")
    for dino, patches in zip(read_log(tmp_path / "dino")[1:], read_log(tmp_path / "ibot")[1:]):
        assert float(dino["loss"]) == pytest.approx(float(patches["loss"]), rel=1e-5)
        assert float(patches["patch"]) == 0


@pytest.mark.parametrize("flags, sentence", [
    (["--arch", "vit_nano", "--patch-size", "8"], "see 39 of the 64 pixels of a hidden patch"),
    (["--arch", "resnet18"], "a hidden patch needs a ViT, got --arch resnet18"),
    (["--patch-size", "16"], "a grid of fewer than 4 x 4"),
    (["--prototypes", "decoupled"], "--prototypes decoupled under a centre: in Table C.3"),
    (["--patch-prototypes", "live"], "--patch-targets sinkhorn"),
    (["--patch-prototypes", "kmeans"], "--patch-prototypes kmeans holds vectors of images"),
    (["--targets", "sinkhorn", "--num-prototypes", "32"], "shares 16 class tokens among"),
    (["--shared-prototypes", "--num-patch-prototypes", "9"], "--shared-prototypes is one set"),
    (["--shared-prototypes", "--patch-kp-weight", "1"], "and --patch-kp-weight cannot differ"),
    (["--patch-prototypes", "frozen", "--patch-kp-weight", "0.3"],
     "--patch-kp-weight 0.3 changes nothing with --patch-prototypes frozen"),
    (["--prototypes", "frozen", "--patch-prototypes", "joint", "--kp-weight", "0.3"],
     "--kp-weight 0.3 changes nothing with --prototypes frozen"),
    (["--prototypes", "frozen", "--kp-weight", "0.3"],
     "--kp-weight changes nothing with --prototypes frozen"),
    (["--patch-kp-weight", "-1"], "--patch-kp-weight must not be negative, got -1.0"),
    (["--patch-temp", "0.1", "0"], "--patch-temp must be positive, got 0.1 0.0"),
    (["--patch-temp", "0.1", "0.2"], "--patch-temp 0.1 0.2: START counts only with"),
    (["--teacher-temp", "0.1", "0.2"], "--teacher-temp 0.1 0.2: START counts only with"),
    (["--uniformity", "1"], "--uniformity has no effect in zoo/ibot.py; got 1.0"),
    (["--queue", "9"], "--queue has no effect in zoo/ibot.py; got 9"),
    (["--mask-share", "2"], "--mask-share must lie in [0, 1], got 2.0"),
    (["--mask-ratio", "0.5", "0.1"], "--mask-ratio needs 0 <= LO <= HI <= 1, got 0.5 0.1"),
    (["--mask-ratio", "0", "0.01"], "--mask-ratio 0.0 0.01 of 64 patches hides less than one"),
    (["--mask-share", "0"], "--mask-share 0 hides no patch, and --patch-weight 0.1 then changes"),
    (["--prototypes", "frozen", "--patch-prototypes", "kp", "--kp-weight", "0.2",
      "--patch-kp-weight", "0.3"], "--kp-weight 0.2 changes nothing with --prototypes frozen"),
    (["--patch-rows", "0"], "--patch-rows must be at least 1, got 0"),
    (["--patch-rows", "3"],
     "--patch-rows has no effect in zoo/ibot.py with --patch-prototypes joint and without"),
    (["--patch-temp", "0.1", "0.2", "--resume"], "--patch-temp 0.1 0.2: START counts only with"),
    (["--teacher-temp-epochs", "2"], "--teacher-temp-epochs changes nothing with --teacher-temp"),
    (["--mask-share", "0", "--mask-ratio", "0.2", "0.3"],
     "--mask-ratio changes nothing with --mask-share 0; got [0.2, 0.3]"),
    (["--num-prototypes", "1"], "--num-prototypes must be at least 2, got 1"),
    (["--num-patch-prototypes", "1"], "--num-patch-prototypes must be at least 2, got 1"),
    (["--head-bn", "--no-shared-head"], "--head-bn with --no-shared-head"),
    (["--method", "dino"], "--method")])
def test_bad_flags_are_one_sentence(tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit) as refusal:
        run(tmp_path / "run", *flags)
    assert refusal.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_temperature_of_patches_may_rise_alone():
    args = ibot.parse("--data shapes --patch-temp 0.04 0.07 --teacher-temp-epochs 2".split())
    cls, patch = ibot.streams(args, 10, 0, torch.device("cpu"))
    assert [patch.loss.temperature(step) for step in (0, 10)] == pytest.approx([0.04, 0.07])
    assert cls.loss.temperature(0) == cls.loss.temperature(10)


@pytest.mark.parametrize("flags, start", [
    ("", 0), ("--prototypes live", 0.5), ("--patch-prototypes live", 0.5),
    ("--prototypes live --patch-prototypes decoupled --patch-targets sinkhorn", 0.5),
    ("--prototypes live --patch-prototypes decoupled --gmm-init features", 0.75),
    ("--patch-prototypes live --gmm-start 0.25", 0.25)])
def test_a_start_that_nobody_names_is_the_later_one_of_the_two_kinds(flags, start):
    assert ibot.parse(["--data", "shapes", *flags.split()]).gmm_start == start


@pytest.mark.parametrize("flags, of_class, of_patches", [
    ("--patch-prototypes kp", 0, 0.1), ("--patch-prototypes kp --kp-weight 0.3", 0.3, 0.3),
    ("--patch-prototypes kp --kp-weight 0", 0, 0), ("--prototypes kp", 0.1, 0.1),
    ("--prototypes kp --kp-weight 0", 0, 0), ("--prototypes kp --kp-weight 0.3", 0.3, 0.3),
    ("--prototypes kp --patch-prototypes joint --kp-weight 0.3", 0.3, 0), ("", 0, 0),
    ("--patch-prototypes kp --patch-kp-weight 0.3", 0, 0.3), ("--kp-weight 0.3", 0.3, 0.3),
    ("--prototypes kp --shared-prototypes --kp-weight 0", 0, 0)])
def test_the_weight_of_koleo_that_is_typed_counts_wherever_the_kind_is_kp(flags, of_class,
                                                                          of_patches):
    args = ibot.parse([*TINY, *CENTRE, "--out", "nowhere", *flags.split()])
    sets = [stream.student for stream in ibot.streams(args, 1, 0, torch.device("cpu"))]
    assert [protos.kp for protos in sets] == [of_class, of_patches]


def test_a_run_goes_on_with_the_weight_of_koleo_that_nobody_typed(tmp_path):
    """Its args.json has 0 for class tokens, which must not look as if it had been typed."""
    run(tmp_path, "--patch-prototypes", "kp", "--stop-at", "2")
    args = ibot.parse(["--device", "cpu", "--out", str(tmp_path), "--resume"])
    assert (args.kp_weight, args.patch_kp_weight) == (0, 0.1)
    ibot.main(["--device", "cpu", "--out", str(tmp_path), "--resume", "--stop-at", "3"])
    assert read_checkpoint(tmp_path)["step"] == 3


def test_a_run_that_is_older_than_a_flag_of_ibot_goes_on(tmp_path):
    run(tmp_path, "--stop-at", "2")
    ckpt = read_checkpoint(tmp_path)
    for flag in ("mask_share", "patch_temp", "patch_kp_weight"):
        del ckpt["args"][flag]
    torch.save(ckpt, tmp_path / "ckpt.pt")
    (tmp_path / "args.json").unlink()
    run(tmp_path, "--resume", "--stop-at", "3")
    assert read_checkpoint(tmp_path)["step"] == 3


def test_the_default_is_balanced_with_more_prototypes_for_patches():
    args = ibot.parse(["--device", "cpu", "--out", "nowhere"])
    assert args.targets == args.patch_targets == "sinkhorn"
    assert (args.num_prototypes, args.num_patch_prototypes) == (64, 256)
    args = ibot.parse(["--device", "cpu", "--out", "nowhere", "--shared-prototypes"])
    assert args.num_patch_prototypes == 64


@pytest.mark.parametrize("flags, of_class, of_patches", [
    ("--prototypes vmf", "prob", "prob"),
    ("--prototypes vmf --targets sinkhorn", "sinkhorn", "sinkhorn"),
    ("--prototypes vmf --patch-prototypes decoupled", "prob", "sinkhorn"),
    ("--patch-prototypes vmf", "sinkhorn", "sinkhorn"), ("--targets center", *["center"] * 2)])
def test_targets_that_nobody_types_go_with_the_prototypes(flags, of_class, of_patches):
    args = ibot.parse(["--data", "shapes", *flags.split()])
    assert (args.targets, args.patch_targets) == (of_class, of_patches)


def test_more_prototypes_than_hidden_patches_can_fill_are_named(capsys):
    def made(K):
        ibot.streams(ibot.parse(["--data", "shapes", "--num-patch-prototypes", K]), 1, 0,
                     torch.device("cpu"))
        return capsys.readouterr().out
    # 64 crops, half of them masked, 0.3 of 64 patches in the mean
    assert ("Sinkhorn-Knopp shares about 614 patches among --num-patch-prototypes 4096, so the "
            "entropy of a target is about 1.9 nats or more") in made("4096")
    assert "warning" not in made("2048")


def test_a_collapse_of_the_patches_prototypes_is_named_once():
    monitor = Monitor(8)
    row = {"patch_unique_0.025": 1.0, "patch_unique_0.5": 0.29}
    first, = monitor.new(ibot.patch_troubles(row))
    assert "29 % of its prototypes are unique at eps 0.5" in first
    assert not monitor.new(ibot.patch_troubles(row | {"patch_unique_0.5": 0.1}))
    assert not ibot.patch_troubles(row | {"patch_mixture_used": 5})  # as unique as the data
    assert ibot.patch_troubles({"patch_unique_0.025": 0.4, "patch_mixture_used": 5})
    assert not ibot.patch_troubles({"loss": 1.0})  # a row without an evaluation


@pytest.mark.parametrize("preset, arch", [("paper-ibot-vits", "vit_small"),
                                          ("paper-ibot-vitb", "vit_base")])
def test_presets_hold_the_numbers_of_the_official_recipes(preset, arch):
    args = ibot.parse(["--preset", preset, "--device", "cpu", "--data", "shapes"])
    assert (args.arch, args.num_prototypes, args.num_patch_prototypes) == (arch, 8192, 8192)
    assert args.shared_prototypes and args.shared_head and not args.head_bn
    assert args.targets == args.patch_targets == "center"
    assert args.teacher_temp == args.patch_temp == [0.04, 0.07]
    assert args.mask_ratio == [0.1, 0.5] and args.mask_share == 0.5 and args.student_temp == 0.1
    assert args.patch_weight == 1 and ibot.parse(["--data", "shapes"]).patch_weight == 0.1
    assert np.isclose(args.momentum, 0.996)


# ---- flags, schedules and columns of a run ------------------------------------------------------
MIXTURE = ["--prototypes", "frozen", "--patch-prototypes", "decoupled", "--patch-targets",
           "sinkhorn", "--gmm-start", "0"]


def test_the_schedules_of_a_run(tmp_path, monkeypatch):
    seen, betas = watch_schedules(monkeypatch)
    run(tmp_path, *MIXTURE, "--lr", "3.2", "--min-lr", "0.02", "--weight-decay", "0.1",
        "--weight-decay-end", "0.5", "--beta", "0.2", "0.8")
    # peak 3.2 * 8 / 256; the rise takes a tenth of 6 steps
    lrs = [0] + [half_cosine(0.1, 0.02, (step - 0.6) / 5.4) for step in range(1, 6)]
    assert [lr for lr, _ in seen] == pytest.approx(lrs)
    assert [decay for _, decay in seen] == pytest.approx(
        [half_cosine(0.1, 0.5, step / 6) for step in range(6)])
    assert betas == pytest.approx([0.2 + 0.6 * step / 6 for step in range(6)])


STILL = ["--momentum", "1", "--momentum-end", "1", "--lr", "0.5"]


def test_targets_and_measures_of_patches_are_those_of_the_teachers_prototypes(tmp_path,
                                                                             monkeypatch):
    """With a momentum of 1 these stay where they started, and the student's move."""
    seen, original = [], ibot.PatchLoss.targets
    monkeypatch.setattr(ibot.PatchLoss, "targets", lambda loss, h, protos, step: (
        seen.append(protos.vectors().clone()), original(loss, h, protos, step))[1])
    run(tmp_path, *STILL)
    ckpt = read_checkpoint(tmp_path)
    start = ckpt["patch_teacher"]["start"]
    assert len(seen) == 6 and all(torch.allclose(C, start, atol=1e-6) for C in seen)
    moved = F.normalize(ckpt["patch_student"]["weight"], dim=1) - start
    assert moved.abs().max() > 1e-3
    assert float(read_log(tmp_path)[-1]["patch_drift"]) < 1e-5


def test_measures_of_patches_are_of_vectors_without_the_mean_of_their_places(tmp_path,
                                                                             monkeypatch):
    off, measured = [], []
    forward, measure = ibot.PlaceMean.forward, ibot.patch_measures
    monkeypatch.setattr(ibot.PlaceMean, "forward", lambda place_mean, h, at: (
        off.append(forward(place_mean, h, at)), off[-1])[1])
    monkeypatch.setattr(ibot, "patch_measures", lambda patch, h, *rest: (
        measured.append(h), measure(patch, h, *rest))[1])
    run(tmp_path, "--place-mean")
    assert len(measured) == 1 and measured[0] is off[-1]


def test_the_patch_term_over_that_of_a_uniform_student(tmp_path):
    """Crops without a mask count 0, so a uniform student pays weight x share x ln K."""
    run(tmp_path, "--patch-weight", "0.5", "--mask-share", "0.25", "--stop-at", "1")
    row = read_log(tmp_path)[-1]
    assert float(row["patch_over_ln_k"]) == pytest.approx(
        float(row["patch"]) / (0.5 * 0.25 * math.log(16)), rel=1e-4)


def test_the_temperatures_of_patches_and_of_class_tokens_are_their_own():
    args = ibot.parse([*TINY, "--out", "nowhere", "--teacher-temp", "0.03", "0.05",
                       "--patch-temp", "0.06", "0.09", "--teacher-temp-epochs", "2"])
    cls, patch = ibot.streams(args, 10, 0, torch.device("cpu"))
    assert [cls.loss.temperature(step) for step in (0, 10)] == pytest.approx([0.03, 0.05])
    assert [patch.loss.temperature(step) for step in (0, 10)] == pytest.approx([0.06, 0.09])


def test_the_student_alone_has_drop_path(tmp_path, monkeypatch):
    rates, original = [], ibot.network

    def network(args, drop_path=0.0, **settings):
        rates.append((drop_path, settings.get("student", False)))
        return original(args, drop_path, **settings)
    monkeypatch.setattr(ibot, "network", network)
    run(tmp_path, "--drop-path", "0.2", "--stop-at", "1")
    assert rates == [(0.2, True), (0.0, False)]


def test_prototypes_of_both_streams_stand_still_in_the_first_passes(tmp_path):
    """--freeze-prototypes 1: for 12 steps, of which the run has 6."""
    run(tmp_path, "--freeze-prototypes", "1", "--lr", "0.5")
    ckpt = read_checkpoint(tmp_path)
    for student in (ckpt["prototypes"]["student"], ckpt["patch_student"]):
        assert torch.allclose(F.normalize(student["weight"], dim=1), student["start"], atol=1e-6)


def test_a_step_that_is_not_finite_moves_neither_network(tmp_path, monkeypatch):
    original, calls = ibot.PatchLoss.forward, []

    def broken_at_the_third_step(*args):
        calls.append(1)
        return original(*args) * (math.nan if len(calls) == 3 else 1)
    flags = ["--lr", "0.1", "--momentum", "0.5"]
    run(tmp_path / "two", *flags, "--stop-at", "2")
    calls.clear()
    monkeypatch.setattr(ibot.PatchLoss, "forward", broken_at_the_third_step)
    run(tmp_path / "three", *flags, "--stop-at", "3")
    two, three = (read_checkpoint(tmp_path / name) for name in ("two", "three"))
    assert not differences(two, three, "student", "teacher", "patch_student", "patch_teacher")


def test_each_step_draws_its_own_drop_path(tmp_path, monkeypatch):
    """And that of a step is the same in every run: a function of seed and step."""
    seen, original = [], ibot.Network.forward
    monkeypatch.setattr(ibot.Network, "forward", lambda net, crops, hidden=None, rows=None: (
        seen.append(torch.initial_seed()) if hidden is not None else None,
        original(net, crops, hidden, rows))[1])
    run(tmp_path, "--drop-path", "0.2", "--seed", "3", "--stop-at", "3")
    assert seen == [views.seed_of(views.DROP_PATH, 3, step, 0) for step in range(3)]


def test_both_mixtures_start_when_the_flags_say(tmp_path):
    metrics = run(tmp_path, "--prototypes", "decoupled", "--targets", "sinkhorn", "--patch-targets",
                  "sinkhorn", "--gmm-start", "4", "--log-every", "1")
    log = read_log(tmp_path)[1:]
    for name in ("eta", "patch_eta"):
        assert [bool(row[name]) for row in log] == [False] * 4 + [True] * 2
    assert float(metrics["pi_max"]) == pytest.approx(float(log[-1]["pi_max"]), rel=1e-5)
    assert log[-1]["pi_max"] != log[-1]["patch_pi_max"]


def test_evaluated_patches_are_the_teachers_at_places_all_over_the_grid(tmp_path, monkeypatch):
    seen, original = [], ibot.coming_vectors
    monkeypatch.setattr(ibot, "coming_vectors", lambda *args: (
        seen.append(args), seen.append(original(*args)))[1] or seen[-1])
    run(tmp_path, "--eval-bank", "200")
    (teacher, images, recipe, step, args, device), (h, h_patch, at) = seen
    assert len(at) == len(h_patch) == len(h) == 192  # 12 steps of two crops of 8 images
    assert at.bincount(minlength=64).count_nonzero() > 50


def test_the_gradient_of_four_micro_batches_is_that_of_one_batch(tmp_path):
    """AdamW would hide a factor of it."""
    for accum in ("1", "4"):
        run(tmp_path / accum, "--accum", accum, "--log-every", "1", "--stop-at", "1")
    one, four = (float(read_log(tmp_path / accum)[1]["grad_norm"]) for accum in "14")
    assert one == pytest.approx(four, rel=1e-4)


def test_a_shared_set_that_follows_the_teacher_takes_the_vectors_of_both_processes(tmp_path):
    kind = ["--prototypes", "decoupled", "--targets", "sinkhorn", "--shared-prototypes",
            "--gmm-start", "0"]
    compare_one_process_with_two("ibot", [kind], [*TINY, "--lr", "1e-3"],
                                 ("cross_entropy", "patch"), tmp_path)


class Scaled(DINOLoss):
    """DINO on vectors that a number of the loss scales."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, h_s, *others):
        return super().forward(self.factor * h_s, *others)


def test_parameters_of_a_loss_are_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(ibot, "DINOLoss", Scaled)
    run(tmp_path, "--lr", "1")
    assert read_checkpoint(tmp_path)["loss"]["class.factor"] != 1


def test_local_crops_of_a_fork_may_have_several_sizes(tmp_path, small_shapes, small_network,
                                                      monkeypatch):
    whole = views.Recipe.views
    monkeypatch.setattr(views.Recipe, "views", lambda self: [
        *whole(self), views.View(24, (0.2, 0.6), 0.0, 0.0)])
    seen, original = [], ibot.coming_vectors
    monkeypatch.setattr(ibot, "coming_vectors", lambda *args: (
        seen.append(original(*args)), seen[-1])[1])
    run(tmp_path, "--steps", "2")
    assert read_checkpoint(tmp_path)["step"] == 2
    h, h_patches, places = seen[-1]  # of the two global crops alone
    assert len(h) == len(h_patches) == len(places)
