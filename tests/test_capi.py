"""zoo/capi.py: its equations beside hand-worked cases and plain loops, and as a run."""
import math

import pytest
import torch
from torch.nn import functional as F

import collapse
import config
import heads
import losses
import models
import views
from conftest import (compare_one_process_with_two, differences, read_checkpoint, read_log,
                      small_sets, watch_schedules)
from support import backbones, ddp, optim, runs
from support.features import embed, width
from zoo import capi
from zoo.masks import capi_masks
from zoo.rope_vit import take

pytestmark = pytest.mark.usefixtures("small_shapes")

TINY = ["--device", "cpu", "--batch-size", "8", "--steps", "6", "--num-prototypes", "16",
        "--arch", "capi_test", "--eval-bank", "60", "--eval-queries", "40", "--log-every", "2",
        "--eval-every", "6"]


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch):
    monkeypatch.setitem(capi.ENCODERS, "capi_test", (16, 1, 2, 1))
    monkeypatch.setitem(capi.CHOICES, "arch", list(capi.ENCODERS))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(out, *flags):
    return capi.main([*TINY, "--out", str(out), *map(str, flags)])


def args_of(*flags):
    return capi.parse([*TINY, "--out", "nowhere", *map(str, flags)])


# ---- which patches ------------------------------------------------------------------------------
@pytest.mark.parametrize("grid, hidden, visible, predicted", [
    (16, 166, 90, 8), (14, 127, 69, 6), (8, 41, 23, 2), (6, 23, 13, 1), (4, 10, 6, 1)])
def test_every_image_has_the_same_numbers_of_patches(grid, hidden, visible, predicted):
    seen, asked = capi_masks(range(20), grid, grid, 0, 3, hidden_share=0.65, predicted_share=0.05)
    assert seen.shape == (20, visible) and asked.shape == (20, predicted)
    assert hidden + visible == grid ** 2
    for a, b in zip(seen.tolist(), asked.tolist()):
        assert a == sorted(set(a)) and not set(a) & set(b) and len(set(b)) == predicted
        assert set(a + b) <= set(range(grid ** 2))


def test_masks_and_guessed_places_are_those_of_the_image_in_the_batch():
    whole = capi_masks(range(8), 8, 8, 1, 5, 0.65, 0.25)
    part = capi_masks(range(4, 8), 8, 8, 1, 5, 0.65, 0.25)
    for a, b in zip(whole, part):
        assert torch.equal(a[4:], b)
    other = capi_masks(range(8), 8, 8, 1, 6, 0.65, 0.25)
    assert not torch.equal(whole[0], other[0])


def test_hidden_places_are_guessed_equally_often():
    _, asked = capi_masks(range(3000), 8, 8, 0, 0, 0.65, 0.25)
    share = torch.bincount(asked.flatten(), minlength=64) / 3000  # 10 of 64 places an image
    assert (share - 10 / 64).abs().max() < 0.03


# ---- CA.2 ---------------------------------------------------------------------------------------
HAND = torch.tensor([[4.0, 1.0], [1.0, 1.0]]).log()[:, None]  # (2 images, 1 place, 2 clusters)


def balanced(l, tau=capi.TAU_TARGETS, iters=3):
    return losses.sinkhorn(l, tau, iters)


@pytest.mark.parametrize("iters, rows", [
    (1, [[.6154, .3846], [.2857, .7143]]), (2, [[.6612, .3388], [.3279, .6721]]),
    (3, [[.66606, .33394], [.33272, .66728]]), (60, [[2 / 3, 1 / 3], [1 / 3, 2 / 3]])])
def test_two_images_and_two_clusters_by_hand(iters, rows):
    a = balanced(HAND, tau=1.0, iters=iters)
    assert torch.allclose(a[:, 0], torch.tensor(rows), atol=6e-5)


def test_balancing_as_a_plain_loop_over_places():
    l = randn(6, 3, 5)
    expected = torch.empty(6, 3, 5, dtype=torch.float64)
    for place in range(3):
        q = (l[:, place].double() / 0.06 - 40).exp()
        for _ in range(3):
            q = q / q.sum(0)
            q = q / q.sum(1, keepdim=True)
        expected[:, place] = q
    assert torch.allclose(balanced(l).double(), expected, atol=1e-5)


def test_each_place_is_balanced_on_its_own():
    l = randn(6, 4, 5)
    a = balanced(l)
    swapped = [2, 0, 3, 1]
    assert torch.equal(balanced(l[:, swapped]), a[:, swapped])
    other = l.clone()
    other[:, 1:] = randn(6, 3, 5, seed=1)
    assert torch.equal(balanced(other)[:, 0], a[:, 0])
    shifted = balanced(l + randn(1, 4, 5, seed=2))  # a constant for each place and cluster
    assert torch.allclose(shifted, a, atol=1e-4)


def test_one_cluster_gets_all_and_equal_images_share_evenly():
    assert torch.equal(balanced(randn(4, 3, 1)), torch.ones(4, 3, 1))
    alike = balanced(randn(1, 3, 5).expand(4, -1, -1))
    assert torch.allclose(alike, torch.full((4, 3, 5), 0.2), atol=1e-5)


def test_logits_far_apart_leave_no_row_empty():
    """At temperature 0.06 they differ by hundreds, and exp of that has no float32."""
    l = 20 * randn(8, 2, 6)
    a = balanced(l)
    assert torch.isfinite(a).all() and torch.allclose(a.sum(-1), torch.ones(8, 2), atol=1e-5)


def test_over_all_patches_the_rows_of_a_step_are_balanced_together():
    l = randn(6, 3, 5)
    a = capi.targets_of(l, args_of("--sinkhorn", "all"))
    assert torch.allclose(a, balanced(l.reshape(18, 1, 5)).view(6, 3, 5), atol=1e-5)
    assert not torch.allclose(a, capi.targets_of(l, args_of()), atol=1e-2)


# ---- the losses ---------------------------------------------------------------------------------
def test_clusters_that_know_nothing_pay_ln_k_and_feel_no_pull():
    clusters = capi.LinearClusters(8, 4)
    with torch.no_grad():
        clusters.W.zero_()
    l = clusters.logits(randn(6, 3, 4))
    a = balanced(l.detach())
    assert torch.allclose(a, torch.full((6, 3, 8), 1 / 8))
    loss = capi.cross_entropy(a, l)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(8))
    assert clusters.W.grad.abs().max() < 1e-7 and clusters.b.grad.abs().max() < 1e-7


def test_cross_entropy_as_a_loop():
    a, l = randn(2, 3, 4).softmax(-1), randn(2, 3, 4, seed=1)
    total = 0
    for b in range(2):
        for i in range(3):
            z = [float(v) / 0.12 for v in l[b, i]]
            norm = math.log(sum(math.exp(v) for v in z))
            total -= sum(float(a[b, i, k]) * (z[k] - norm) for k in range(4))
    assert float(capi.cross_entropy(a, l)) == pytest.approx(total / 6, rel=1e-5)


def test_logits_of_both_sets_as_equations():
    x = randn(3, 2, 4)
    clusters, student = capi.LinearClusters(5, 4, seed=1), capi.StudentPrototypes(5, 4, seed=1)
    clusters.requires_grad_(False), student.requires_grad_(False)
    with torch.no_grad():
        clusters.b.copy_(randn(5))
        student.gain.copy_(1 + randn(5, 1).abs())
    W, b, V, g = clusters.W, clusters.b, student.weight, student.gain
    for i in range(3):
        for j in range(2):
            u = x[i, j] / x[i, j].norm()
            for k in range(5):
                assert float(clusters.logits(x)[i, j, k]) == pytest.approx(
                    float(W[k] @ u + b[k]), abs=1e-5)
                assert float(student.logits(x)[i, j, k]) == pytest.approx(
                    float(g[k, 0] * (V[k] / V[k].norm()) @ u), abs=1e-5)


def test_what_both_sets_start_from():
    clusters, student = capi.LinearClusters(2000, 64), capi.StudentPrototypes(2000, 64)
    assert float(clusters.W.detach().std()) == pytest.approx(1, abs=0.01)
    assert not clusters.b.any() and bool((student.gain == 1).all())
    assert float(student.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    # l has standard deviation 1 for every D, and so have the logits of a set without lengths
    x = randn(500, 64)
    assert float(clusters.logits(x).detach().std()) == pytest.approx(1, abs=0.05)
    args = args_of("--prototypes", "decoupled", "--num-prototypes", "2000")
    of_mixture = capi.teacher_clusters(args).logits(F.normalize(randn(500, 16), dim=1))
    assert float(of_mixture.std()) == pytest.approx(1, abs=0.05)
    # the control starts where the clusters of a published run start
    both = [capi.teacher_clusters(args_of("--prototypes", k)) for k in ("clustered", "frozen")]
    assert torch.equal(both[0].W, both[1].W) and not both[1].W.requires_grad


# ---- who is touched by what ---------------------------------------------------------------------
def one_step(args):
    """Networks, sets and losses of one step, before any gradient."""
    student, teacher = capi.network(args), capi.network(args)
    clusters, protos = capi.teacher_clusters(args), capi.student_prototypes(args)
    image = randn(8, 3, 32, 32)
    visible, predicted = capi.visible_and_predicted(args, 8, 0, 8, torch.device("cpu"))
    x = F.normalize(teacher.backbone(image)[1], dim=-1)
    l = clusters.logits(x.detach())
    a = capi.targets_of(l.detach(), args)
    z = student(image, visible, predicted)
    of_student = capi.cross_entropy(take(a, predicted), protos.logits(z))
    return student, teacher, clusters, protos, capi.cross_entropy(a, l), of_student


def has_gradient(module):
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_each_loss_trains_its_own_set():
    student, teacher, clusters, protos, of_clusters, of_student = one_step(args_of())
    of_clusters.backward()
    assert has_gradient(clusters) == {"W", "b"}
    assert not has_gradient(student) | has_gradient(teacher) | has_gradient(protos)
    clusters.zero_grad()
    of_student.backward()
    assert has_gradient(protos) == {"weight", "gain"}
    assert {"predictor.mask_token", "backbone.registers"} < has_gradient(student)
    assert not has_gradient(teacher) | has_gradient(clusters)


def test_guesses_do_not_depend_on_one_another_nor_on_hidden_pixels():
    args = args_of()
    net = capi.network(args).eval()
    image = randn(2, 3, 32, 32)
    visible, predicted = capi.visible_and_predicted(args, 2, 0, 8, torch.device("cpu"))
    z = net(image, visible, predicted)
    one = net(image, visible, predicted[:, 3:4])
    assert torch.allclose(z[:, 3:4], one, atol=1e-6)
    hidden = torch.ones(2, 64, dtype=torch.bool).scatter(1, visible, False)
    pixels = hidden.view(2, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    other = torch.where(pixels, randn(2, 3, 32, 32, seed=1), image)
    assert torch.equal(net(other, visible, predicted), z)
    seen, _ = capi.visible_and_predicted(args, 2, 1, 8, torch.device("cpu"))
    assert not torch.allclose(net(image, seen, predicted), z, atol=1e-3)


def test_the_student_meets_the_clusters_of_the_step_before(tmp_path, monkeypatch):
    """With clusters that learn a thousand times faster the first loss is the same, and the second
    is another: they move after the student."""
    def losses(rate, name):
        monkeypatch.setattr(capi, "CLUSTER_RATE", rate)
        run(tmp_path / name, "--log-every", "1", "--stop-at", "3")
        return [float(row["cross_entropy"]) for row in read_log(tmp_path / name)[1:]]
    # the first step has the learning rate 0: the second is the first that moves anything
    slow, fast = losses(0.5, "slow"), losses(500.0, "fast")
    assert slow[:2] == fast[:2] and abs(slow[2] - fast[2]) > 1e-3


def test_the_predictor_gets_all_visible_tokens_and_where_they_stand():
    args = args_of("--registers", "4")
    net = capi.network(args).eval()
    image = randn(2, 3, 32, 32)
    visible, predicted = capi.visible_and_predicted(args, 2, 0, 8, torch.device("cpu"))
    seen = []
    net.predictor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    net(image, visible, predicted)
    context, coords, query_coords, places = seen[0]
    registers, patches = net.backbone.tokens(image, visible)
    assert torch.equal(context, torch.cat([registers, patches], 1)) and places is predicted
    for b in range(2):
        for coordinates, of in ((coords[b, 4:], visible[b]), (query_coords[b], predicted[b])):
            for (row, column), place in zip(coordinates.tolist(), of.tolist()):
                assert (row, column) == pytest.approx((place // 8 / 7, place % 8 / 7))
        # four registers stand on the corners of the rectangle of visible patches
        low, high = coords[b, 4:].amin(0).tolist(), coords[b, 4:].amax(0).tolist()
        corners = {(r, c) for r in (low[0], high[0]) for c in (low[1], high[1])}
        assert {tuple(corner) for corner in coords[b, :4].tolist()} == corners


@pytest.mark.parametrize("rule", ["place", "all"])
def test_the_losses_of_a_run_as_loops_over_images_and_places(tmp_path, rule):
    """At step 0 teacher and student are the same network, and nothing has moved."""
    run(tmp_path, "--sinkhorn", rule, "--stop-at", "1", "--log-every", "1")
    args = args_of("--sinkhorn", rule)
    recipe = capi.OneView(**vars(config.recipe(args)))
    image, = next(views.batches(small_sets()[0], recipe, batch_size=8, seed=0, start=0, stop=1))
    visible, predicted = capi_masks(range(8), 8, 8, 0, 0, 0.65, 0.25)
    net, clusters = capi.network(args), capi.teacher_clusters(args)
    protos = capi.student_prototypes(args)
    with torch.no_grad():
        x = F.normalize(net.backbone.tokens(image)[1], dim=-1)  # (8, 64, D)
        l = x @ clusters.W.T
        q = (l.double() / 0.06).exp()
        q = q if rule == "place" else q.view(512, 1, -1)
        for _ in range(3):
            q = q / q.sum(0)
            q = q / q.sum(-1, keepdim=True)
        q = q.view(8, 64, -1)
        z = F.normalize(net(image, visible, predicted), dim=-1)
        s = z @ F.normalize(protos.weight, dim=1).T
        of_student = [-(q[b, predicted[b, j]] * (s[b, j].double() / 0.12).log_softmax(0)).sum()
                      for b in range(8) for j in range(predicted.shape[1])]
        of_clusters = [-(q[b, i] * (l[b, i].double() / 0.12).log_softmax(0)).sum()
                       for b in range(8) for i in range(64)]
        entropy = [-(q[b, i] * q[b, i].clamp_min(1e-300).log()).sum()
                   for b in range(8) for i in range(64)]
    row = read_log(tmp_path)[-1]
    for column, values in (("cross_entropy", of_student), ("clustering_loss", of_clusters),
                           ("target_entropy", entropy)):
        assert float(row[column]) == pytest.approx(float(torch.stack(values).mean()), rel=1e-4)


# ---- schedules ----------------------------------------------------------------------------------
def test_learning_rate_and_momentum_at_the_three_points_of_the_official_run():
    total, peak = 500_000, 1e-3
    assert capi.rate_at(0, total, peak) == 0
    assert 1 - capi.rate_at(25_000, total, peak) == pytest.approx(0.9995)
    assert capi.rate_at(50_000, total, peak) == pytest.approx(peak)
    assert capi.rate_at(total, total, peak) == pytest.approx(9.549e-5, rel=1e-4)
    assert 1 - capi.rate_at(total, total, peak) == pytest.approx(0.9999045, abs=1e-7)
    mean = sum(capi.rate_at(step, total, peak) for step in range(50_000, total, 1000)) / 450
    assert mean / peak == pytest.approx(0.617, abs=2e-3)


def test_the_rates_and_decays_of_the_parameters(tmp_path):
    args = args_of()
    student, protos = capi.network(args), capi.student_prototypes(args)
    optimizer, factors = capi.optimizer_of([student, protos])
    of = {id(p): factor for group, factor in zip(optimizer.param_groups, factors)
          for p in group["params"]}
    names = dict(student.named_parameters()) | dict(protos.named_parameters())
    assert of[id(names["backbone.patch_embed.weight"])] == (0.2, 1.0)
    assert of[id(names["backbone.patch_embed.bias"])] == (0.2, 0.0)
    assert of[id(names["predictor.blocks.0.norm1.weight"])] == (1.0, 0.1)
    for name in ("backbone.registers", "predictor.mask_token", "weight", "gain",
                 "backbone.blocks.0.attn.q.weight"):
        assert of[id(names[name])] == (1.0, 1.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    run(tmp_path, "--weight-decay", "0.3", "--weight-decay-end", "0.3")
    saved = read_checkpoint(tmp_path)
    lr = capi.rate_at(5, 6, 0.008 * 8 / 256)
    assert [(group["lr"], group["weight_decay"]) for group in saved["optimizer"]["param_groups"]
            ] == [pytest.approx((lr * a, 0.3 * b)) for a, b in factors]
    of_clusters, = saved["cluster_optimizer"]["param_groups"]
    assert (of_clusters["lr"], of_clusters["weight_decay"]) == pytest.approx((lr / 2, 0.01))


def test_the_teacher_keeps_one_minus_c_times_the_learning_rate(tmp_path):
    for c in (0, 10):
        run(tmp_path / str(c), "--ema-per-lr", c, "--stop-at", "2", "--lr", "0.1")
    start, moved = (read_checkpoint(tmp_path / str(c)) for c in (0, 10))
    key = "backbone.registers"
    share = 10 * capi.rate_at(1, 6, 0.1 * 8 / 256)
    expected = start["teacher"][key] + share * (moved["student"][key] - start["teacher"][key])
    assert torch.allclose(moved["teacher"][key], expected, atol=1e-7)
    assert not torch.equal(moved["teacher"][key], start["teacher"][key])


# ---- runs ---------------------------------------------------------------------------------------
KINDS = [[], ["--sinkhorn", "all", "--positions", "learned", "--drop-path", "0.2"],
         ["--prototypes", "frozen"], ["--prototypes", "decoupled", "--forgetting", "sample"],
         ["--student-prototypes", "frozen"]]
NAMES = ["published", "all", "frozen", "mixture", "frozen student"]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_run_that_was_stopped_ends_at_the_bits_of_one_that_was_not(tmp_path, kind):
    metrics = run(tmp_path / "whole", *kind)
    run(tmp_path / "parts", *kind, "--stop-at", "3")
    run(tmp_path / "parts", *kind, "--resume")
    assert not differences(*(read_checkpoint(tmp_path / name) for name in ("whole", "parts")))
    log = read_log(tmp_path / "whole")
    assert read_log(tmp_path / "parts") == log
    for name in ("student_unique_0.5", "place_nats", "target_entropy", "entropy_floor"):
        assert float(log[-1][name]) == pytest.approx(metrics[name], rel=1e-4)
    assert ("cluster_length_sd" in log[-1]) == ("decoupled" not in kind)
    assert float(log[-1]["momentum"]) == pytest.approx(1 - 10 * float(log[-1]["lr"]))


@pytest.mark.parametrize("kind, moves", [(KINDS[0], True), (KINDS[2], False), (KINDS[3], True),
                                         (KINDS[4], True)])
def test_both_sets_are_counted_by_name(tmp_path, kind, moves):
    run(tmp_path, *kind, "--lr", "0.5", "--ema-per-lr", "1")
    sets = collapse.load_prototypes(str(tmp_path))
    names = ["prototypes", "student_prototypes", "student_average_prototypes"]
    assert list(sets) == names[:2 if "--student-prototypes" in kind else 3]  # equal ones are one
    ckpt = read_checkpoint(tmp_path)
    assert torch.equal(sets["prototypes"], ckpt["prototypes"]["vectors"])
    assert torch.equal(sets["prototypes"], ckpt["prototypes"]["start"]) != moves
    log = read_log(tmp_path)
    assert (float(log[-1]["drift"]) > 0) == moves
    assert (float(log[-1]["student_drift"]) > 0) == ("--student-prototypes" not in kind)
    assert float(log[-1]["student_unique_0.5"]) == len(
        collapse.unique_prototypes(sets["student_prototypes"], 0.5)) / 16


def test_the_evaluations_read_a_run(tmp_path):
    run(tmp_path / "run", "--registers", "8")
    backbone, args, words = backbones.load_backbone(str(tmp_path / "run"))
    assert "zoo/capi.py" in words and backbone.registers.shape == (8, 16)
    image = randn(2, 3, 32, 32)
    cls, patches = backbone(image)
    assert torch.allclose(cls, patches.mean(1)) and patches.shape == (2, 64, 16)
    state = read_checkpoint(tmp_path / "run")["teacher"]
    assert torch.equal(backbone.patch_embed.weight, state["backbone.patch_embed.weight"])
    net, clusters, loss, _ = runs.load_run(str(tmp_path / "run"))
    h = net([image])
    assert torch.allclose(h, F.normalize(cls, dim=1)) and loss.tau == 0.12
    assert clusters.assign(h, tau=loss.tau).shape == (2, 16)
    assert torch.allclose(embed(backbone, image, pool="mean"), cls)
    # the predictor's first block, with all patches in sight; its one block is all it has here
    whole = capi.network(config.completed(args, capi.flags))
    whole.load_state_dict(state)
    everywhere = torch.arange(64).expand(2, -1)
    guesses = whole(image, everywhere, everywhere)  # (2, 64, 16)
    assert torch.allclose(embed(backbone, image, pool="predictor"), guesses.mean(1), atol=1e-6)
    with pytest.raises(ValueError, match="a vit_micro has no predictor beside it"):
        width(models.build("vit_micro", patch_size=4, img_size=32), pool="predictor")
    with pytest.raises(ValueError, match="--pool predictor has one layer, got --layers 2"):
        width(backbone, 2, pool="predictor")
    untrained = [backbones.untrained(backbone, args, seed) for seed in (0, 1)]
    fresh = capi.network(config.completed(args, capi.flags)).backbone
    assert torch.equal(untrained[0].registers, fresh.registers)
    assert not torch.equal(untrained[1].registers, untrained[0].registers)
    student, _, _ = backbones.load_backbone(str(tmp_path / "run"), "student")
    assert not torch.equal(student.patch_embed.weight, backbone.patch_embed.weight)


def test_a_set_that_is_added_to_the_choices_serves_the_teacher(monkeypatch):
    class Mine(heads.Frozen):
        pass
    monkeypatch.setitem(heads.PROTOTYPES, "mine", Mine)
    monkeypatch.setitem(capi.CHOICES, "prototypes", ["clustered", "mine"])
    args = capi.parse([*TINY, "--out", "nowhere", "--prototypes", "mine"])
    assert type(capi.teacher_clusters(args)) is Mine


def test_two_processes_equal_one(tmp_path):
    compare_one_process_with_two(
        "capi", [KINDS[0], KINDS[1][:2], KINDS[3]], [*TINY, "--lr", "0.05", "--ema-per-lr", "1"],
        ("cross_entropy", "clustering_loss", "target_entropy"), tmp_path,
        'capi.ENCODERS["capi_test"] = (16, 1, 2, 1); capi.CHOICES["arch"].append("capi_test")')


def test_a_step_that_is_not_finite_moves_nothing(tmp_path, monkeypatch):
    original, calls = capi.cross_entropy, []

    def broken_at_the_third_step(a, logits, bias):
        calls.append(1)
        value = original(a, logits, bias)
        return value * math.nan if len(calls) == 6 else value  # the student's, of step 3
    run(tmp_path / "two", "--stop-at", "2", "--lr", "0.1")
    monkeypatch.setattr(capi, "cross_entropy", broken_at_the_third_step)
    run(tmp_path / "three", "--stop-at", "3", "--lr", "0.1")
    two, three = (read_checkpoint(tmp_path / name) for name in ("two", "three"))
    assert not differences(two, three, "student", "teacher", "prototypes", "student_average")


@pytest.mark.parametrize("flags, sentence", [
    (["--momentum", "0.9"], "--momentum has no effect in zoo/capi.py; got 0.9"),
    (["--targets", "sinkhorn"], "--targets has no effect"),
    (["--local-crops", "2"], "--local-crops has no effect in zoo/capi.py; got 2"),
    (["--accum", "2"], "--accum has no effect"),
    (["--patch-rows", "2"],
     "--patch-rows has no effect in zoo/capi.py with --prototypes clustered"),
    (["--export", "a.pt"], "--export has no effect"),
    (["--hidden-share", "0"], "--hidden-share must lie in (0, 1], got 0"),
    (["--hidden-share", "1"], "--hidden-share 1.0 of 64 patches hides none or all of them"),
    (["--registers", "6"], "--registers must be a multiple of 4"),
    (["--num-prototypes", "1"], "--num-prototypes must be at least 2, got 1"),
    (["--local-scale", "0.1", "0.2"],
     "--local-scale changes nothing with --local-crops 0"),
    (["--min-lr", "1"], "CA.7 would give the teacher a negative momentum"),
    (["--preset", "cifar10-cpu"], "--preset"),
    (["--ema-per-lr", "9999"], "CA.7 would give the teacher a negative momentum"),
    (["--blur", "0", "1", "0"], "--blur 0.0 1.0 0.0: a step has one view here"),
    (["--solarize", "0", "0", "1"], "--solarize 0.0 0.0 1.0: a step has one view here"),
    (["--resume", "--logit-scale", "3"], "--logit-scale has no effect in zoo/capi.py; got 3.0"),
    (["--img-size", "30"], "--img-size 30 must be a multiple of --patch-size 4"),
    (["--prototypes", "joint"], "--prototypes"),
    (["--arch", "vit_tiny"], "--arch")])
def test_bad_flags_are_one_sentence(tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit) as refusal:
        run(tmp_path / "run", *flags)
    assert refusal.value.code == 2
    assert sentence in capsys.readouterr().err


def test_more_clusters_than_patches_can_fill_are_named(tmp_path, capsys):
    run(tmp_path / "many", "--num-prototypes", "64", "--stop-at", "1")
    printed = capsys.readouterr().out
    assert ("warning: Sinkhorn-Knopp shares about 8 patches among --num-prototypes 64, so the "
            "entropy of a target is about 2.1 nats or more; at most 32 prototypes are better"
            in printed)
    run(tmp_path / "few", "--num-prototypes", "32", "--stop-at", "1")
    run(tmp_path / "all", "--num-prototypes", "64", "--sinkhorn", "all", "--stop-at", "1")
    assert "warning: Sinkhorn-Knopp" not in capsys.readouterr().out


def test_an_added_term_and_a_penalty_reach_the_gradient(tmp_path, monkeypatch):
    run(tmp_path / "plain", "--lr", "0.1")
    monkeypatch.setattr(capi.StudentPrototypes, "penalty", lambda self: self.gain.square().sum())
    run(tmp_path / "penalty", "--lr", "0.1")
    plain, penalty = (read_checkpoint(tmp_path / name) for name in ("plain", "penalty"))
    assert differences(plain, penalty, "prototypes")
    assert float(read_log(tmp_path / "penalty")[-1]["penalty"]) > 0


def test_any_set_with_parameters_is_trained_by_the_clusters_own_loss(tmp_path, monkeypatch):
    """A forker's clusters of length one: no line of the loop names a class."""
    class Cosine(heads.Joint):
        def __init__(self, K, D, seed):
            super().__init__(K, D, D ** 0.5, seed)
    monkeypatch.setattr(capi, "LinearClusters", Cosine)
    run(tmp_path, "--lr", "0.1")
    saved = read_checkpoint(tmp_path)
    assert saved["cluster_optimizer"]["state"]
    assert not torch.equal(saved["prototypes"]["vectors"], saved["prototypes"]["start"])


def test_the_students_measures_look_at_all_of_the_image():
    args = args_of()
    top = [float((capi.visible_and_predicted(args, 8, step, 8, "cpu")[1][:, 0] < 32).float().mean())
           for step in range(100)]
    assert 0.4 < sum(top) / 100 < 0.6


def test_a_collapse_of_the_students_set_is_named_once():
    monitor = capi.Monitor(16)
    assert not monitor.new(capi.troubles({"student_unique_0.025": 0.5}))
    first, = monitor.new(capi.troubles({"student_unique_0.025": 0.25}))
    assert "25 % of its prototypes are unique" in first
    assert not monitor.new(capi.troubles({"student_unique_0.025": 0.2}))
    strict = capi.troubles({"student_unique_0.025": 1.0, "student_unique_0.5": 0.2})
    assert "20 % of its prototypes are unique at eps 0.5" in strict["collapse"]
    assert not capi.troubles({"loss": 1.0})  # a row without an evaluation


def test_the_preset_holds_the_numbers_of_the_official_recipe():
    args = capi.parse(["--preset", "paper-capi-vitl", "--device", "cpu", "--data", "shapes"])
    assert capi.ENCODERS[args.arch] == (1024, 24, 16, 12)
    assert (args.patch_size, args.registers, args.num_prototypes) == (14, 16, 16384)
    assert (args.hidden_share, args.predicted_share, args.drop_path) == (0.65, 0.05, 0.2)
    assert args.lr * args.batch_size / 256 == pytest.approx(1e-3)
    assert args.global_scale == [0.6, 1.0] and args.weight_decay == 0.1 and args.clip_grad == 0
    assert heads.prototype_class(args.prototypes) and ddp.WORLD == 1


# ---- flags, schedules and columns of a run ------------------------------------------------------
def test_the_schedules_of_a_run(tmp_path, monkeypatch):
    seen, betas = watch_schedules(monkeypatch)
    run(tmp_path, "--prototypes", "decoupled", "--gmm-start", "0", "--lr", "3.2", "--min-lr",
        "0.02", "--weight-decay", "0.1", "--weight-decay-end", "0.5", "--beta", "0.2", "0.8",
        "--ema-per-lr", "1")
    # peak 3.2 * 8 / 256; the rise takes a tenth of 6 steps
    lrs = [0] + [0.02 + 0.08 * (1 + math.cos(0.8 * math.pi * (step - 0.6) / 5.4)) / 2
                 for step in range(1, 6)]
    assert [lr for lr, _ in seen] == pytest.approx(lrs)
    assert [decay for _, decay in seen] == pytest.approx(
        [0.5 - 0.4 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)])
    assert betas == pytest.approx([0.2 + 0.6 * step / 6 for step in range(6)])


def test_both_optimisers_have_capis_betas(tmp_path):
    run(tmp_path, "--stop-at", "1")
    saved = read_checkpoint(tmp_path)
    groups = saved["optimizer"]["param_groups"] + saved["cluster_optimizer"]["param_groups"]
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.95)}


@pytest.mark.parametrize("rule, floor", [("place", math.log(64 / 8)), ("all", 0)])
def test_the_least_entropy_of_a_target(tmp_path, rule, floor):
    """K clusters share the 8 patches at a place, or all 512 of a step."""
    run(tmp_path, "--num-prototypes", "64", "--sinkhorn", rule, "--stop-at", "1")
    row = read_log(tmp_path)[-1]
    assert float(row["entropy_floor"]) == pytest.approx(floor, rel=1e-4)
    assert float(row["loss_over_ln_k"]) == pytest.approx(
        float(row["cross_entropy"]) / math.log(64), rel=1e-4)


def test_how_unequal_lengths_and_biases_are():
    clusters = capi.LinearClusters(3, 2)
    with torch.no_grad():
        clusters.W.copy_(torch.tensor([[3., 4.], [0., 1.], [0., 6.]]))
        clusters.b.copy_(torch.tensor([1., 2., 6.]))
    found = {name: float(value) for name, value in capi.spread(clusters).items()}
    assert found == pytest.approx({"cluster_length": 4, "cluster_length_sd": math.sqrt(14 / 3),
                                   "cluster_bias_sd": math.sqrt(14 / 3)})
    assert capi.spread(heads.Frozen(3, 2)) == {}


def test_measures_are_of_each_set_with_its_own_vectors():
    """The teacher's clusters with tokens, the student's set and its average with guesses."""
    D = 4
    clusters, student = capi.LinearClusters(D, D), capi.StudentPrototypes(D, D)
    average = capi.StudentPrototypes(D, D)
    with torch.no_grad():
        for weight, rows in ((clusters.W, torch.eye(D)), (student.weight, torch.eye(D)),
                             (average.weight, torch.ones(D, D))):
            weight.copy_(rows)
    h, h_s = torch.eye(D)[[0, 1, 2, 2]], torch.eye(D)[[0, 0, 0, 0]]
    found = capi.measures_of_both(clusters, student, average, h, torch.arange(4), h_s, 0.5, 0)
    assert (found["used"], found["student_used"]) == (0.75, 0.25)
    assert (found["student_unique_0.025"], found["student_average_unique_0.025"]) == (1, 0.25)


def test_an_evaluation_drops_no_path_and_leaves_the_student_as_it_was(tmp_path, monkeypatch):
    training, original = [], capi.Network.forward
    monkeypatch.setattr(capi.Network, "forward", lambda net, *inputs: (
        training.append((net.training, net.backbone.blocks[0].drop_path)),
        original(net, *inputs))[1])
    run(tmp_path, "--drop-path", "0.2", "--eval-every", "3", "--log-every", "3")
    n = (len(training) - 6) // 2  # calls of an evaluation
    assert n > 0 and training == 2 * (3 * [(True, 0.2)] + n * [(False, 0.2)])


def test_evaluated_tokens_are_the_teachers(tmp_path, monkeypatch):
    """Here the teacher stays at the start, and the student moves far from it."""
    seen, original = [], capi.coming_tokens
    monkeypatch.setattr(capi, "coming_tokens", lambda student, teacher, *rest: (
        seen.append((student, teacher, rest)), seen.append(original(student, teacher, *rest)),
    )[1] or seen[-1])
    run(tmp_path, "--ema-per-lr", "0", "--lr", "0.5")
    (student, teacher, (images, recipe, step, args, device)), (h, at, h_s) = seen
    again, _, _ = original(teacher, teacher, images, recipe, step, args, device)
    assert torch.equal(h, again)
    of_student, _, _ = original(student, student, images, recipe, step, args, device)
    assert not torch.allclose(h, of_student, atol=1e-2)


def test_a_mixture_starts_when_the_flags_say(tmp_path):
    run(tmp_path, "--prototypes", "decoupled", "--gmm-start", "4", "--log-every", "1")
    assert [bool(row.get("eta")) for row in read_log(tmp_path)[1:]] == [False] * 4 + [True] * 2


def test_clipping(tmp_path, monkeypatch):
    limits, original = [], optim.clip
    monkeypatch.setattr(optim, "clip", lambda grads, limit: (
        limits.append(limit), original(grads, limit))[1])
    run(tmp_path, "--clip-grad", "0.3", "--prototypes", "frozen", "--stop-at", "2")
    assert limits == [0.3, 0.3]


def test_a_step_draws_other_places_than_the_last():
    args = args_of()
    places = [capi.capi_places(args, step, 64) for step in (3, 4)]
    assert places[0].shape == (8, 4) and not torch.equal(*places)


def test_the_clusters_skip_a_step_that_the_student_skips(tmp_path, monkeypatch):
    """Though their own loss and gradient are finite."""
    calls = []

    def broken_at_the_third_step(protos):
        calls.append(1)
        return protos.gain.sum() * (math.nan if len(calls) == 3 else 0)
    monkeypatch.setattr(capi.StudentPrototypes, "penalty", broken_at_the_third_step)
    run(tmp_path / "two", "--stop-at", "2", "--lr", "0.1")
    calls.clear()
    run(tmp_path / "three", "--stop-at", "3", "--lr", "0.1")
    two, three = (read_checkpoint(tmp_path / name)["prototypes"] for name in ("two", "three"))
    assert torch.equal(two["vectors"], three["vectors"])
    assert not torch.equal(two["vectors"], two["start"])


def test_the_student_alone_has_drop_path(tmp_path, monkeypatch):
    rates, original = [], capi.network
    monkeypatch.setattr(capi, "network", lambda args, drop_path=0.0: (
        rates.append(drop_path), original(args, drop_path))[1])
    run(tmp_path, "--drop-path", "0.2", "--stop-at", "1")
    assert rates == [0.2, 0.0]


def test_the_rate_falls_towards_its_end():
    """At the end of a run 0.0955 of the way from r_end to r are left."""
    end = capi.rate_at(1000, 1000, 0.5, 0.1)
    assert end == pytest.approx(0.1 + 0.4 * (1 + math.cos(0.8 * math.pi)) / 2)
    assert capi.rate_at(100, 1000, 0.5, 0.1) == pytest.approx(0.5)
