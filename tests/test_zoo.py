"""Prototype sets and losses of zoo/: kmeans, clustered, bank, swav, against hand-worked cases."""
import importlib
import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import config
import heads
import losses
import presets
from conftest import TINY, differences, read_checkpoint, read_log, sentence_of_refusal, train_tiny
from views import indices
from zoo.bank import SOP, Bank
from zoo.clustered import Clustered
from zoo.kmeans import DeepCluster, KMeans, spherical_kmeans
from zoo.swav import SwAV
from zoo.uniformity import UniformCARP, uniformity

pytestmark = pytest.mark.usefixtures("small_shapes", "small_network")
CPU = torch.device("cpu")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def at_angles(*degrees):
    """Unit vectors (n, 2)."""
    a = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([a.cos(), a.sin()], 1)


def angles(C):
    return torch.atan2(C[:, 1], C[:, 0]).rad2deg().tolist()


# ---- kmeans and deepcluster --------------------------------------------------------------------
def test_two_rounds_of_k_means_by_hand():
    u = at_angles(0, 10, 80, 100)
    C, labels = spherical_kmeans(u, u[:2], rounds=1)
    # the first assignment is 0 1 1 1: the mean of 10, 80 and 100 degrees lies at 65.3 degrees
    assert angles(C) == pytest.approx([0, 65.3], abs=0.05)
    assert labels.tolist() == [0, 0, 1, 1]
    C, labels = spherical_kmeans(u, C, rounds=1)
    assert angles(C) == pytest.approx([5, 90])
    assert labels.tolist() == [0, 0, 1, 1]
    again, _ = spherical_kmeans(u, C)
    assert torch.allclose(again, C)


def test_an_empty_cluster_keeps_its_vector():
    u = at_angles(0, 10, 80, 100)
    C = torch.cat([u[[0, 3]], at_angles(-90)])
    moved, labels = spherical_kmeans(u, C)
    assert torch.equal(moved[2], C[2])
    assert not torch.equal(moved[:2], C[:2])
    assert 2 not in labels


def one_pass_of_kmeans(n=24, batch_size=8, K=4, D=3, seed=5):
    """A KMeans set after a pass of random vectors, and those vectors: h (steps, 2 batch, D)."""
    protos = KMeans(K, D, seed=seed, n=n, batch_size=batch_size)
    h = randn(n // batch_size, 2 * batch_size, D, seed=1)
    for step, h_step in enumerate(h):
        assert protos.step(h_step, step) == {}
        assert torch.equal(protos.vectors(), protos.start)
    return protos, h


def test_the_memory_of_kmeans_holds_the_first_view_of_each_image_by_its_index():
    protos, h = one_pass_of_kmeans()
    for step, h_step in enumerate(h):
        i = indices(24, 8, 5, step)
        for row, image in enumerate(i):
            assert torch.allclose(protos.memory[image], h_step[row] / h_step[row].norm())


def test_k_means_runs_at_the_first_step_of_each_pass_but_the_first():
    protos, h = one_pass_of_kmeans()
    memory = protos.memory.clone()
    report = protos.step(h[0], 3)
    C = protos.vectors().clone()
    assert report["mixture_used"] == len(protos.labels.unique())
    # a fixed point, or near: each centre is the direction of the mean of its members
    a = (memory @ C.T).argmax(1)
    assert torch.equal(a, protos.labels)
    for k in a.unique():
        mean = memory[a == k].mean(0)
        assert torch.allclose(C[k], mean / mean.norm(), atol=1e-6)
    labels = protos.labels.clone()
    for step in (4, 5):  # in mid-pass nothing moves
        protos.step(h[1], step)
        assert torch.equal(protos.vectors(), C) and torch.equal(protos.labels, labels)
    protos.step(h[2], 6)
    assert not torch.equal(protos.vectors(), C)


def test_images_that_a_pass_drops_have_no_label_and_vectors_that_are_not_finite_do_not_enter():
    protos = KMeans(2, 3, n=10, batch_size=4)  # a pass has two steps, and drops two images
    h = randn(2, 8, 3)
    h[1, 2] = math.nan
    protos.step(h[0], 0)
    protos.step(h[1], 1)
    protos.step(h[0], 2)
    assert protos.memory.isfinite().all()
    assert (protos.labels < 0).sum() == 3
    assert protos.vectors().isfinite().all()


def test_more_clusters_than_images_start_twice_on_some():
    protos = KMeans(7, 3, n=4, batch_size=2)
    for step in range(3):
        protos.step(randn(4, 3, seed=step), step)
    assert torch.allclose(protos.vectors().norm(dim=1), torch.ones(7))
    assert protos.used <= 4


def test_deepcluster_is_the_cross_entropy_of_all_views_with_the_label_of_the_image():
    protos, h = one_pass_of_kmeans()
    protos.step(h[0], 3)
    loss = DeepCluster(4, 0.1, 8, 5)
    h_t = randn(2, 8, 3, seed=2)
    labels = loss.targets(h_t, protos, 4)
    assert labels.shape == (1, 8)
    assert torch.equal(labels[0], protos.labels[indices(24, 8, 5, 4)])
    h_s = randn(3, 8, 3, seed=3)
    z = (h_s.double() @ protos.vectors().double().T / 0.1).numpy()
    by_hand = [np.log(np.exp(z[v, b]).sum()) - z[v, b, labels[0, b]]
               for v in range(3) for b in range(8)]
    value = loss(h_s, labels, protos, protos, 4)["cross_entropy"]
    assert float(value) == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_in_the_first_pass_deepcluster_takes_the_nearest_random_direction():
    protos = KMeans(4, 3, n=24, batch_size=8)
    h_t = randn(2, 8, 3)
    labels = DeepCluster(4, 0.1, 8, 0).targets(h_t, protos, 0)
    assert torch.equal(labels[0], (h_t[0] @ protos.start.T).argmax(1))


# ---- clustered ---------------------------------------------------------------------------------
def test_a_step_of_clustered_is_adamw_on_the_loss_of_cl3():
    """Three steps beside autograd and an optimiser of its own, in float64 but for W itself."""
    N, K, D, lr, total = 12, 5, 4, 0.01, 10
    protos = Clustered(K, D, seed=3, lr=lr, total=total)
    W = protos.W.clone().requires_grad_()
    b = protos.b.clone().requires_grad_()
    optimizer = torch.optim.AdamW([W, b], betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(3):
        h = 3 * randn(N, D, seed=step)
        l = (h / h.norm(dim=1, keepdim=True)) @ W.T + b
        q = (l.detach().double() / 0.06).exp()
        for _ in range(3):
            q = q / q.sum(0)
            q = q / q.sum(1, keepdim=True)
        loss = -(q * (l.double() / 0.12).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr / 2 * (1 + math.cos(0.8 * math.pi * step / total))
        optimizer.step()
        report = protos.step(h, step)
        assert float(report["clustering_loss"]) == pytest.approx(loss.item(), rel=1e-5)
        # AdamW hides a factor of the gradient
        assert torch.allclose(protos.W.grad, W.grad, rtol=1e-3, atol=1e-5)
        assert torch.allclose(protos.b.grad, b.grad, rtol=1e-3, atol=1e-5)
        assert torch.allclose(protos.W, W, atol=1e-5)
        assert torch.allclose(protos.b, b, atol=1e-5)
    h = randn(7, D)
    z = protos.logits(h)
    assert torch.allclose(z, (F.normalize(h, dim=1) @ W.T + b).detach() / 0.12, atol=1e-4)
    assert torch.equal(protos.logits(h, torch.tensor([3, 1])), z[:, [3, 1]])


def test_clustered_starts_at_ln_k_without_weights_and_does_not_move_from_there():
    protos = Clustered(6, 4, lr=0.1, total=10)
    protos.W.zero_()
    report = protos.step(randn(20, 4), 0)
    assert float(report["clustering_loss"]) == pytest.approx(math.log(6))
    assert protos.W.abs().max() < 1e-6


def test_no_loss_of_the_encoder_reaches_clustered_and_its_logits_start_with_deviation_one():
    protos = Clustered(500, 64, lr=0.1, total=10)
    assert list(protos.parameters()) == []
    h = randn(300, 64).requires_grad_()
    z = protos.logits(h)
    z.square().mean().backward()
    assert h.grad.abs().max() > 0
    assert not protos.W.requires_grad and protos.W.grad is None
    assert float(z.detach().std()) * 0.12 == pytest.approx(1, abs=0.05)


def test_clustered_leaves_out_vectors_that_are_not_finite():
    a, b = (Clustered(6, 4, lr=0.1, total=10) for _ in range(2))
    h = randn(20, 4)
    a.step(h, 0)
    b.step(torch.cat([h, torch.full((2, 4), math.nan)]), 0)
    assert torch.allclose(a.W, b.W)
    before = b.W.clone()
    assert b.step(torch.full((2, 4), math.nan), 1) == {}
    assert torch.equal(b.W, before)


def test_the_clusters_follow_the_vectors():
    """Four groups of vectors, four clusters: after some steps each group has one of its own."""
    centres = F.normalize(randn(4, 8, seed=1), dim=1)
    group = torch.arange(64) % 4
    protos = Clustered(4, 8, lr=0.05, total=300)
    for step in range(200):
        protos.step(centres[group] + 0.05 * randn(64, 8, seed=step), step)
    winner = protos.logits(centres).argmax(1)
    assert sorted(winner.tolist()) == [0, 1, 2, 3]


# ---- the student's own set ---------------------------------------------------------------------
@pytest.mark.parametrize("teacher", ["clustered", "decoupled", "kmeans", "frozen"])
def test_partial_decoupling_trains_the_students_set_and_not_the_teachers(tmp_path, teacher):
    flags = ["--prototypes", teacher, "--student-prototypes", "joint", "--gmm-start", "0"]
    metrics = train_tiny(tmp_path, *flags)
    ckpt = read_checkpoint(tmp_path)["prototypes"]
    moved = (ckpt["student_vectors"] - F.normalize(ckpt["start"], dim=1)).abs().max()
    assert moved > 1e-3
    assert "weight" not in ckpt["teacher"]
    if teacher == "frozen":
        assert torch.equal(ckpt["vectors"], ckpt["start"])
    for name in ("student_unique_0.5", "student_used", "student_perplexity", "student_drift"):
        assert float(read_log(tmp_path)[-1][name]) == pytest.approx(metrics[name], rel=1e-4)
    assert metrics["student_drift"] > 0


def test_collapse_counts_both_sets(tmp_path, capsys):
    import collapse
    train_tiny(tmp_path, "--prototypes", "clustered", "--student-prototypes", "joint")
    sets = collapse.load_prototypes(str(tmp_path))
    ckpt = read_checkpoint(tmp_path)["prototypes"]
    assert torch.equal(sets["prototypes"], ckpt["vectors"])
    assert torch.equal(sets["student_prototypes"], ckpt["student_vectors"])
    collapse.main([str(tmp_path)])
    assert "student_prototypes" in capsys.readouterr().out


@pytest.mark.parametrize("flags, sentence", [
    (["--prototypes", "kp", "--student-prototypes", "joint"], "--prototypes kp"),
    (["--prototypes", "bank"], "--prototypes bank belongs to --method sop; got --method carp"),
    (["--method", "sop", "--prototypes", "frozen"],
     "--method sop takes its targets from --prototypes bank; got --prototypes frozen"),
    (["--method", "deepcluster"],
     "--method deepcluster takes its targets from --prototypes kmeans; got --prototypes decoupled"),
    (["--method", "sop", "--prototypes", "bank", "--num-prototypes", "1"],
     "--num-prototypes must be at least 2, got 1"),
    (["--method", "sop", "--prototypes", "bank", "--memory", "20"],
     "--memory 20 is too small for --num-prototypes 16 anchors and --neighbours 8 others")])
def test_what_does_not_belong_together_is_refused(tmp_path, capsys, flags, sentence):
    assert sentence in sentence_of_refusal(capsys, tmp_path, *flags)


# ---- bank and sop ------------------------------------------------------------------------------
def bank_with(members, s):
    """A Bank whose SOPs are given: members (K, k + 1, D), s (K, k + 1)."""
    K, m, D = members.shape
    bank = Bank(K, D, M=K + m, k=m - 1, B=1)
    bank.members, bank.s = members, torch.tensor(s)
    return bank


def logits_that_give(*softmax):
    """Members (n, n) whose products with the vector 1, 0, 0... have this softmax at tau 1."""
    members = torch.zeros(len(softmax), len(softmax))
    members[:, 0] = torch.tensor(softmax).log()
    return members


def test_an_anchor_alone_is_a_smoothed_softmax():
    members = logits_that_give(0.7, 0.1, 0.1, 0.1)[:, None]
    bank = bank_with(members, [[0.9]] * 4)
    P = bank.log_probabilities(torch.eye(4)[:1], 1.0).exp()
    assert P[0].tolist() == pytest.approx([0.64, 0.12, 0.12, 0.12])


def test_two_sops_of_a_neighbour_and_an_anchor_by_hand():
    members = logits_that_give(0.4, 0.3, 0.2, 0.1).view(2, 2, 4)
    bank = bank_with(members, [[0.8, 0.9], [0.8, 0.9]])
    P = bank.log_probabilities(torch.eye(4)[:1], 1.0).exp()
    assert P[0].tolist() == pytest.approx([0.64, 0.36])


def drawn_bank(K=6, D=5, M=40, k=3, B=4, seed=2):
    bank = Bank(K, D, seed=seed, M=M, k=k, B=B)
    for step in range(3):
        bank.step(randn(2 * B, D, seed=step), step)
    return bank


def test_probabilities_are_the_softmax_times_y():
    bank, tau = drawn_bank(), 0.2
    u = F.normalize(randn(7, 5, seed=9), dim=1)
    K, m, _ = bank.members.shape
    Y = np.zeros((K * m, K))
    for j in range(K):
        for i in range(m):
            s = float(bank.s[j, i])
            Y[j * m + i] = (1 - s) / (K - 1)
            Y[j * m + i, j] = s
    assert np.allclose(Y.sum(1), 1)
    z = u.double().numpy() @ bank.members.flatten(0, 1).double().numpy().T / tau
    w = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert np.allclose(bank.log_probabilities(u, tau).exp(), w @ Y, atol=1e-6)


def test_anchors_are_no_neighbours_and_neighbours_are_the_nearest():
    bank = drawn_bank()
    anchors, neighbours = bank.members[:, -1], bank.members[:, :-1]
    memory = bank.memory
    is_anchor = (memory[:, None] == anchors[None]).all(2).any(1)  # (M,)
    assert is_anchor.sum() == len(anchors)
    assert torch.equal(bank.s[:, -1], torch.full((6,), 0.9))
    for j, anchor in enumerate(anchors):
        cos = memory[~is_anchor] @ anchor
        best = cos.sort(descending=True).values[:3]
        assert torch.allclose(bank.s[j, :-1], best.clamp(0, 1))
        assert torch.allclose(neighbours[j] @ anchor, best)


def test_the_memory_is_first_in_first_out_and_a_step_does_not_meet_its_own_vectors():
    bank = Bank(2, 3, M=8, k=1, B=4)
    start = bank.memory.clone()
    second = []
    for step in range(3):
        h = randn(8, 3, seed=step)
        second.append(F.normalize(h[4:], dim=1))
        bank.step(h, step)
        in_memory = (bank.memory[:, None] == second[-1][None]).all(2).any()
        assert not in_memory  # nor among the members, which come from the memory
    assert torch.equal(bank.memory[:4], second[0]) and torch.equal(bank.memory[4:], second[1])
    bank.step(randn(8, 3, seed=3), 3)
    assert torch.equal(bank.memory, torch.cat([second[2], second[1]]))
    assert not torch.equal(bank.memory, start)


def test_a_memory_that_is_no_multiple_of_the_batch_wraps():
    bank = Bank(2, 3, M=5, k=1, B=4)
    second = [F.normalize(randn(8, 3, seed=step)[4:], dim=1) for step in range(3)]
    for step in range(3):
        bank.step(randn(8, 3, seed=step), step)
    assert torch.equal(bank.memory[[4, 0, 1, 2]], second[1])
    assert torch.equal(bank.memory[3], second[0][3])


def test_the_loss_of_sop_at_agreement_and_where_all_is_uniform():
    """The floor at one-hot agreement: smoothing keeps it above 0 (k 1, dense_facts: K 512, 4)."""
    for K, floor in ((512, 0.9487), (4, 0.4349)):
        members = 50 * torch.eye(K)[:, None]
        bank = bank_with(members, [[0.9]] * K)
        loss, h = SOP(K, 1.0, 1.0), torch.eye(K)[None].expand(2, -1, -1)
        P_t = loss.targets(h, bank, 0)
        value = loss(h, P_t, bank, bank, 0)["cross_entropy"]
        assert float(value) == pytest.approx(floor, abs=2e-4)
        uniform = loss(torch.zeros(2, K, K), P_t, bank, bank, 0)["cross_entropy"]
        assert float(uniform) == pytest.approx(math.log(K), rel=1e-5)


def test_the_loss_of_sop_is_a_mean_over_pairs_of_crops():
    bank, loss = drawn_bank(), SOP(6, 0.1, 0.04)
    h_s = F.normalize(randn(3, 4, 5, seed=1), dim=-1).requires_grad_()
    h_t = F.normalize(randn(2, 4, 5, seed=2), dim=-1)
    value = loss(h_s, loss.targets(h_t, bank, 0), bank, bank, 0)["cross_entropy"]
    log_p = bank.log_probabilities(h_s, 0.1).detach().numpy()
    P_t = bank.log_probabilities(h_t, 0.04).exp().numpy()
    pairs = [(i, j) for i in range(3) for j in range(2) if i != j]
    by_hand = np.mean([-(P_t[j, b] * log_p[i, b]).sum() for i, j in pairs for b in range(4)])
    assert float(value) == pytest.approx(by_hand, rel=1e-5)
    value.backward()
    assert h_s.grad.abs().max() > 0
    assert not bank.memory.requires_grad and not bank.members.requires_grad


def test_a_duplicate_of_an_anchor_in_the_memory_costs_no_infinity():
    bank = bank_with(torch.eye(2).repeat_interleave(2, 0).view(2, 2, 2), [[1.0, 1.0], [1.0, 1.0]])
    log_p = bank.log_probabilities(1000 * torch.eye(2)[:1], 0.1)
    assert log_p.isfinite().all()


def test_a_run_with_a_bank_prints_memory_for_a_count_and_so_does_collapse(tmp_path, capsys):
    import collapse
    metrics = train_tiny(tmp_path, "--method", "sop", "--prototypes", "bank")
    printed = capsys.readouterr().out
    assert re.search(r"unique\(\.025\) memory", printed)
    assert "no control with frozen prototypes" in printed
    assert metrics["unique"] == {0.025: None, 0.5: None}
    assert read_log(tmp_path)[-1]["unique_0.5"] == ""
    with pytest.raises(ValueError, match="in the place of prototypes it has a memory"):
        collapse.load_prototypes(str(tmp_path))
    memory = read_checkpoint(tmp_path)["prototypes"]["memory"]
    key = "prototypes.memory"
    assert torch.equal(collapse.load_prototypes(str(tmp_path), key)[key], memory)
    assert collapse.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path.name} prototypes: memory. It has 512 x 8" in printed
    for flags in (["--fail-below", "0.5"], ["--data", "shapes"]):
        with pytest.raises(SystemExit) as refusal:
            collapse.main([str(tmp_path), *flags])
        assert refusal.value.code == 2
        assert "in the place of prototypes it has a memory" in capsys.readouterr().err


# ---- swav --------------------------------------------------------------------------------------
def test_sinkhorn_runs_on_each_view_alone():
    """One view with the matrix 4 1; 1 1, whose three rounds are worked by hand."""
    protos = heads.Frozen(2, 2)
    protos.start.copy_(torch.eye(2))
    h_t = torch.stack([torch.tensor([[4., 1.], [1., 1.]]).log(), torch.zeros(2, 2)])
    loss = SwAV(2, 2, 1, temps=(1.0, 1.0))
    q = loss.targets(h_t, protos, 0)
    assert q[0].flatten().tolist() == pytest.approx([.66606, .33394, .33272, .66728], abs=1e-5)
    assert torch.allclose(q[1], torch.full((2, 2), 0.5))


def test_the_queue_changes_the_targets_once_it_is_full_and_holds_the_newest_vectors():
    protos, B, Q = heads.Frozen(4, 3), 2, 5
    with_queue, without = SwAV(4, 3, 1, queue=Q), SwAV(4, 3, 1)
    steps = [F.normalize(randn(2, B, 3, seed=s), dim=-1) for s in range(5)]
    for step, h in enumerate(steps):
        q = with_queue.targets(h, protos, step)
        assert q.shape == (2, B, 4)
        assert torch.allclose(q.sum(-1), torch.ones(2, B))
        assert torch.equal(q, without.targets(h, protos, step)) == (step < 3)
        newest = torch.cat(steps[step::-1], 1)[:, :Q]
        assert torch.equal(with_queue.queue[:, :newest.shape[1]], newest)
    rows = torch.cat([steps[4][0], torch.cat(steps[3::-1], 1)[0, :Q]])
    by_hand = losses.sinkhorn(rows @ protos.start.T, 0.05)[:B]
    assert torch.allclose(q[0], by_hand, atol=1e-6)


def test_a_vector_that_is_not_finite_does_not_stay_in_the_queue():
    loss = SwAV(4, 3, 1, queue=4)
    loss.targets(torch.full((2, 2, 3), math.nan), heads.Frozen(4, 3), 0)
    assert loss.queue.isfinite().all()


def test_swavs_teacher_is_the_student_after_every_step(tmp_path):
    for step in (1, 2, 3):
        train_tiny(tmp_path / str(step), "--method", "swav", "--prototypes", "joint",
                   "--stop-at", step)
        ckpt = read_checkpoint(tmp_path / str(step))
        running = ("running_mean", "running_var", "num_batches_tracked")
        for name, value in ckpt["student"].items():
            if not name.endswith(running):
                assert torch.equal(value, ckpt["teacher"][name]), name
        assert torch.equal(ckpt["prototypes"]["student"]["weight"],
                           ckpt["prototypes"]["teacher"]["weight"])


def test_what_a_method_is_published_with_is_the_default_of_its_flags():
    args = config.parse([*TINY, "--method", "swav", "--prototypes", "joint"])
    assert (args.momentum, args.momentum_end, args.teacher_temp) == (0, 0, [0.05, 0.05])
    assert args.head_norm
    args = config.parse([*TINY, "--method", "swav", "--prototypes", "joint", "--momentum", "0.5",
                         "--momentum-end", "1", "--no-head-norm", "--teacher-temp", "0.1", "0.1"])
    assert (args.momentum, args.momentum_end, args.teacher_temp) == (0.5, 1, [0.1, 0.1])
    assert not args.head_norm
    args = config.parse(TINY)
    assert (args.momentum, args.momentum_end) == (0.98, 1)
    assert not args.head_norm


# ---- uniformity --------------------------------------------------------------------------------
def test_uniformity_by_hand():
    h = 3 * at_angles(0, 60, 180)
    squared = [1, 1, 3, 3, 4, 4]  # of both orders of a pair
    expected = math.log(sum(math.exp(-2 * d) for d in squared) / 6)
    assert float(uniformity(h)) == pytest.approx(expected, abs=1e-6)
    assert float(uniformity(h[:1])) == 0
    assert float(uniformity(h[:1].expand(4, 2))) == pytest.approx(0, abs=1e-6)


def test_uniform_carp_is_carp_and_one_more_term_that_spreads_the_vectors():
    protos, h_t = heads.Frozen(8, 3), randn(2, 5, 3, seed=1)
    h_s = (randn(3, 5, 3, seed=2) + 4).requires_grad_()
    loss = UniformCARP(8, 4, weight=2.0)
    terms = loss(h_s, h_t, protos, protos, 7)
    carp = losses.CARPLoss(8, 4)(h_s, h_t, protos, protos, 7)
    for name in ("consistency", "entropy"):
        assert torch.equal(terms[name], carp[name])
    expected = float(uniformity(h_s[0])) + float(uniformity(h_s[1]))
    assert float(terms["uniformity"]) == pytest.approx(expected, rel=1e-5)
    terms["uniformity"].backward()
    before = float(uniformity(h_s[0].detach()))
    assert float(uniformity(h_s[0].detach() - 0.5 * h_s.grad[0])) < before
    assert h_s.grad[2].abs().max() == 0


# ---- whole runs --------------------------------------------------------------------------------
KINDS = [["--prototypes", "kmeans"], ["--prototypes", "kmeans", "--method", "deepcluster"],
         ["--prototypes", "clustered"],
         ["--prototypes", "clustered", "--student-prototypes", "joint", "--method", "dino",
          "--targets", "sinkhorn"],
         ["--prototypes", "bank", "--method", "sop", "--memory", "37"],
         ["--prototypes", "joint", "--method", "swav", "--queue", "12"],
         ["--prototypes", "live", "--method", "carp-uniform", "--gmm-start", "2"],
         ["--prototypes", "decoupled", "--student-prototypes", "joint", "--gmm-start", "2"]]
NAMES = [" ".join(flag for flag in kind if not flag.startswith("--")) for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_run_that_was_stopped_ends_at_the_bits_of_one_that_was_not(tmp_path, kind):
    """A pass has 12 steps here: runs with k-means cross into their second one, where it runs."""
    # before and after the first clustering; other sets have changed by the first stop
    steps, stops = (16, (5, 14)) if "kmeans" in kind else (8, (3, 6))
    flags = [*kind, "--steps", steps, "--log-every", "4", "--eval-every", "8"]
    train_tiny(tmp_path / "whole", *flags)
    for stop in stops:
        train_tiny(tmp_path / "parts", *flags, "--stop-at", stop, "--resume")
    if "--gmm-start" in kind:
        # the mixture that the last part of the run starts from
        states = read_checkpoint(tmp_path / "parts")["prototypes"]["teacher"]
        assert states["_extra_state"]["started"]
    train_tiny(tmp_path / "parts", *flags, "--resume")
    assert not differences(*(read_checkpoint(tmp_path / name) for name in ("whole", "parts")))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_four_micro_batches_are_one_batch(tmp_path, kind):
    """The teacher stays (momentum 1), as CARP's entropy is one of micro-batches: the student moves
    elsewhere. A set that follows the teacher gets the same vectors, and the first losses agree."""
    steps = 14 if "kmeans" in kind else 6  # into the second pass, where k-means runs
    flags = [*kind, "--no-head-bn", "--steps", steps, "--log-every", "1", "--lr", "0.3",
             "--momentum", "1", "--momentum-end", "1"]
    for accum in ("1", "4"):
        train_tiny(tmp_path / accum, *flags, "--accum", accum)
    one, four = (read_checkpoint(tmp_path / accum)["prototypes"] for accum in "14")
    name = "memory" if "bank" in kind else "vectors"
    assert torch.allclose(one[name], four[name], atol=1e-3)
    moved = (one[name] - one["start"]).abs().max()
    assert (moved > 1e-5) == (kind[1] != "joint")
    first_1, first_4 = (read_log(tmp_path / accum)[1] for accum in "14")
    for term in ("consistency", "cross_entropy"):
        if term in first_1:
            assert float(first_1[term]) == pytest.approx(float(first_4[term]), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_run_is_evaluated_counted_and_assigned(tmp_path, kind):
    from support import runs
    train_tiny(tmp_path, *kind)
    _, protos, loss, _ = runs.load_run(str(tmp_path))
    h = F.normalize(randn(5, 8), dim=1)
    tau, centre = loss.tau_and_centre()
    gamma = protos.assign(h, tau=tau, centre=centre)
    assert gamma.shape == (5, len(protos.vectors()))
    assert torch.allclose(gamma.sum(1), torch.ones(5), atol=1e-5)


# ---- scripts with flags of their own -----------------------------------------------------------
SCRIPTS = ["ibot", "sop", "msn", "capi"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_one_method_and_no_preset_of_another(name, capsys):
    """argparse takes a preset's value unchecked, so a preset of DINO would set the method "dino".
    """
    script = importlib.import_module(f"zoo.{name}")
    small = ["--device", "cpu", "--data", "shapes"]
    for preset in ["tiny", *script.PRESETS]:
        assert script.parse(["--preset", preset, *small]).method == name
    for preset in presets.PRESETS.keys() - {"tiny"}:
        with pytest.raises(SystemExit) as refusal:
            script.parse(["--preset", preset, *small])
        assert refusal.value.code == 2
        assert f"invalid choice: '{preset}'" in capsys.readouterr().err
    method, = (a for a in config.parser(script.flags)._actions if a.dest == "method")
    assert method.choices == [name] and method.default == name
    assert method.help == "the method of this script; there is no choice"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_that_is_older_than_the_flags_of_its_script_has_their_defaults(name):
    script = importlib.import_module(f"zoo.{name}")
    new = vars(script.parse(["--device", "cpu"]))
    own = {a.dest for a in config.parser(script.flags)._actions if a.dest in new}
    own -= {a.dest for a in config.parser()._actions}
    assert len(own) > 4
    old = {flag: value for flag, value in new.items() if flag not in own}
    assert config.differences(old, new, script.flags) == []
    flag = sorted(own)[0]
    change, = config.differences(new | {flag: 0.123}, new, script.flags)
    assert change == f"--{flag.replace('_', '-')} 0.123 -> {new[flag]}"
    assert vars(config.completed(old, script.flags)).items() >= {f: new[f] for f in own}.items()


def test_a_neighbour_that_points_away_has_similarity_0():
    """Two vectors in one direction and two against it, of which two are anchors."""
    for step in range(4):
        bank = Bank(2, 2, M=4, k=2, B=1)
        bank.memory.copy_(torch.tensor([[1., 0.], [1., 0.], [-1., 0.], [-1., 0.]]))
        bank.draw(step)
        assert bank.s.min() == 0 and bank.s.max() <= 1


def test_vectors_that_are_not_finite_do_not_enter_the_bank():
    bank = Bank(2, 3, M=8, k=1, B=4)
    h = randn(8, 3)
    h[5] = math.nan  # of the second crop
    bank.step(h, 0)
    bank.step(randn(8, 3, seed=1), 1)
    assert bank.memory.isfinite().all()
    assert torch.equal(bank.memory[:3], F.normalize(h[[4, 6, 7]], dim=1)) and int(bank.place) == 3


def test_clustered_learns_from_half_of_the_peak_rate_on_and_as_long_as_the_run():
    args = config.parse([*TINY, "--prototypes", "clustered", "--lr", "3.2"])
    args.data_seen = {"steps": 40}
    protos = Clustered.from_args(args)
    assert protos.learning_rate(0) == pytest.approx(3.2 * 8 / 256 / 2)
    assert protos.learning_rate(40) == pytest.approx(0.05 * (1 + math.cos(0.8 * math.pi)) / 2)


def test_the_scale_of_logits_is_one_of_clustered_too():
    one, two = (Clustered(5, 4, scale, lr=0.1, total=10) for scale in (1.0, 2.0))
    h = randn(3, 4)
    assert torch.allclose(two.logits(h), 2 * one.logits(h))


def test_k_means_starts_from_other_images_in_each_pass(monkeypatch):
    from zoo import kmeans
    protos, starts = kmeans.KMeans(4, 3, seed=5, n=24, batch_size=8), []
    protos.memory.copy_(F.normalize(randn(24, 3), dim=1))
    monkeypatch.setattr(kmeans, "spherical_kmeans", lambda u, C: (
        starts.append(C), (C, kmeans.assign(u, C)))[1])
    for step in (3, 6):
        protos.cluster(step)
    assert not torch.equal(*starts)
    for C in starts:
        assert len({int((protos.memory == c).all(1).nonzero()) for c in C}) == 4


@pytest.mark.parametrize("K, typed, Q", [(16, [], 15 * 8), (8, [], 0), (16, ["--queue", "3"], 3),
                                         (16, ["--queue", "0"], 0)])
def test_the_queue_of_swav_is_15_batches_where_a_batch_is_smaller_than_K(K, typed, Q):
    args = config.parse([*TINY, "--method", "swav", "--prototypes", "joint", "--num-prototypes",
                         str(K), *typed])
    assert losses.loss(args).queue.shape == (2, Q, 8)


def test_the_flag_is_the_weight_of_uniformity():
    args = config.parse([*TINY, "--method", "carp-uniform", "--uniformity", "0.3"])
    loss = losses.loss(args)
    assert (loss.weight, loss.partition_size) == (0.3, 8)
