"""One-line changes of the code that no other test noticed: each test here fails on one of them.

Of heads.py, gmm.py, zoo/ibot.py and zoo/masks.py.
"""
import math

import pytest
import torch
from torch.nn import functional as F

import heads
from conftest import TINY, differences, read_checkpoint, read_log
from gmm import OnlineGMM
from heads import VMF, Decoupled, Head, Joint
from support import optim
from zoo import ibot

pytestmark = pytest.mark.usefixtures("small_shapes")


def vectors(N=8, D=4, seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def test_a_component_starts_with_its_share_of_all_vectors_of_a_step():
    """A.4: JB / K samples, also where a step has more vectors than the K that are collected."""
    protos = Decoupled(6, 4, gmm=OnlineGMM(6, 4, resurrect=None))
    protos.collect(vectors(20), 0)
    assert protos.gmm.S_pi.tolist() == pytest.approx([20 / 6] * 6)


def test_the_concentration_of_vmf_is_the_factor_of_the_cosine_in_its_softmax():
    """Of exp(kappa <m, y>) the log-normaliser has the same kappa as the logit, --logit-scale
    included."""
    protos = VMF(20, 6, scale=2.5)
    with torch.no_grad():
        protos.gain.copy_(torch.linspace(0.1, 3, 20)[:, None])
        kappa = protos.logits(protos.vectors()).diagonal() / 0.3  # where the cosine is 1
        assert torch.allclose(protos.bias(0.3), heads.vmf_log_normalizer(kappa, 6), atol=1e-5)


def test_the_head_starts_as_dinos():
    for layer in Head(200, 300, 100).mlp[::2]:
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()


def test_trained_prototypes_start_short_as_a_linear_layer_does():
    """AdamW's steps have a fixed size: longer vectors would hardly turn."""
    weight = Joint(500, 64).weight.detach()
    assert float(weight.abs().max()) == pytest.approx(1 / 8, rel=0.01)
    assert float(weight.std()) == pytest.approx(1 / 8 / math.sqrt(3), rel=0.02)


def test_the_start_has_the_variance_of_the_vectors_and_noise_of_half_their_deviation():
    h = 3 * vectors(100, 16) + 5
    pooled = float(h.var(0, unbiased=False).mean())
    gmm = OnlineGMM(30, 16)
    gmm.init_from(h)
    assert torch.allclose(gmm.var, torch.full((30, 16), pooled), rtol=1e-4)
    gmm.init_from(h, how="random")  # one component covers all: its variance is rms^2 / D
    assert torch.allclose(gmm.var, h.square().mean().expand(30, 16), rtol=1e-4)
    gmm, few = OnlineGMM(200, 64), 10 * vectors(3, 64)
    gmm.init_from(few)
    noise = gmm.mu - few[torch.cdist(gmm.mu, few).argmin(1)]  # (200, 64)
    half = 0.5 * float(few.var(0, unbiased=False).mean().sqrt())
    assert float(noise.std()) == pytest.approx(half, rel=0.03)


def of_weights(*weights, resurrect=0.3):
    """Far apart components of these weights, and vectors that all lie at the first."""
    gmm = OnlineGMM(len(weights), 2, resurrect=resurrect, rescale=False)
    mu = torch.tensor([[30. * k, 5.] for k in range(len(weights))])
    gmm.set_params(mu, torch.ones(len(weights), 2), torch.tensor(weights), mass=10.)
    return gmm, vectors(64, 2) + mu[0]


def test_two_heavy_components_share_with_the_two_lightest_the_heaviest_with_the_lightest():
    gmm, h = of_weights(.42, .36, .05, .01, .06, .10)
    before = gmm.S_pi.clone()
    report = gmm.update(h, 1.0, 1 - 1e-12)  # nothing is forgotten
    assert int(report["resurrected"]) == 2
    for k, j in ((0, 3), (1, 2)):
        half = float(before[k] + before[j]) / 2
        assert gmm.S_pi[[k, j]].tolist() == pytest.approx([half, half])
    assert gmm.S_pi[[4, 5]].tolist() == pytest.approx(before[[4, 5]].tolist())


def test_nobody_restarts_who_is_above_the_limit_itself():
    gmm, h = of_weights(.6, .4)
    mu = gmm.mu
    assert int(gmm.update(h, 1.0, 1 - 1e-12)["resurrected"]) == 0
    assert torch.allclose(gmm.mu, mu, atol=1e-5)


def test_a_step_that_is_not_finite_restarts_nobody():
    gmm, h = of_weights(.7, .1, .1, .1)
    before = [S.clone() for S in (gmm.S_pi, gmm.S_mu, gmm.S_sig)]
    h[3, 1] = math.nan
    assert int(gmm.update(h, 1.0, 0.9)["resurrected"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, (gmm.S_pi, gmm.S_mu, gmm.S_sig)))


def run(out, *flags):
    return ibot.main([*TINY, "--targets", "center", "--num-patch-prototypes", "16",
                      "--out", str(out), *map(str, flags)])


MIXTURE = ["--prototypes", "frozen", "--patch-prototypes", "decoupled", "--patch-targets",
           "sinkhorn", "--gmm-start", "0"]


def half_cosine(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def test_the_schedules_of_a_run(tmp_path, monkeypatch):
    seen, original = [], optim.CheckedStep.__call__
    monkeypatch.setattr(optim.CheckedStep, "__call__", lambda self, values, step, lr, decay: (
        seen.append((lr, decay)), original(self, values, step, lr, decay))[1])
    betas, step_of = [], heads.Decoupled.step
    monkeypatch.setattr(heads.Decoupled, "step", lambda protos, h, step, beta: (
        betas.append(beta), step_of(protos, h, step, beta))[1])
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
    import views
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


def args_of(*flags):
    return ibot.parse([*TINY, "--out", "nowhere", *flags])


def test_the_flags_say_how_much_is_hidden_and_the_crops_of_an_image_hide_other_patches():
    from zoo import masks
    few = masks.hidden_patches(args_of("--mask-ratio", "0.1", "0.1", "--mask-share", "1"), 40, 0, 8)
    assert few.shape == (2, 40, 64) and few.any(2).all() and few.sum(2).max() <= 6
    half = args_of("--mask-ratio", "0.5", "0.5", "--mask-share", "1")
    many = masks.hidden_patches(half, 40, 0, 8)
    assert many.sum(2).float().mean() > 20
    assert not torch.equal(many[0], many[1])


def test_places_of_the_two_crops_are_drawn_apart():
    places = ibot.ibot_places(args_of("--patch-rows", "3", "--place-mean"), 5, 16)
    assert not torch.equal(places[0], places[1])


def test_an_inverse_block_is_at_most_twice_as_long_as_wide():
    """90 of 16 x 16 patches: a side has between sqrt(45) and sqrt(180) of them, rounded up."""
    import random

    from zoo.masks import inverse_block_mask
    rng = random.Random(1)
    sides = []
    for _ in range(300):
        shown = ~inverse_block_mask(16, 16, 90, rng)
        sides += [int(shown.any(0).sum()), int(shown.any(1).sum())]
    assert (min(sides), max(sides)) == (7, 14)


def test_the_gradient_of_four_micro_batches_is_that_of_one_batch(tmp_path):
    """AdamW would hide a factor of it."""
    for accum in ("1", "4"):
        run(tmp_path / accum, "--accum", accum, "--log-every", "1", "--stop-at", "1")
    one, four = (float(read_log(tmp_path / accum)[1]["grad_norm"]) for accum in "14")
    assert one == pytest.approx(four, rel=1e-4)


def test_a_shared_set_that_follows_the_teacher_takes_the_vectors_of_both_processes(tmp_path):
    from conftest import compare_one_process_with_two
    kind = ["--prototypes", "decoupled", "--targets", "sinkhorn", "--shared-prototypes",
            "--gmm-start", "0"]
    compare_one_process_with_two("ibot", [kind], [*TINY, "--lr", "1e-3"],
                                 ("cross_entropy", "patch"), tmp_path)


def test_equal_vectors_leave_a_variance_above_0():
    gmm, h = OnlineGMM(3, 4, resurrect=None), torch.full((50, 4), 3.)
    gmm.init_from(h)
    for _ in range(50):
        gmm.update(h, 1.0, 0.1)
    assert (gmm.var >= 1e-8).all()
    assert torch.allclose(gmm.responsibilities(h, 1.0).sum(1), torch.ones(50))


def test_each_restart_has_a_direction_of_its_own():
    directions = []
    gmm, h = of_weights(.7, .1, .1, .1)
    start = gmm.mu
    for _ in range(2):
        gmm.set_params(start, torch.ones(4, 2), torch.tensor([.7, .12, .12, .06]), mass=10.)
        assert int(gmm.update(h, 1.0, 0.999)["resurrected"]) == 1
        directions.append(F.normalize(gmm.mu[3], dim=0))
    assert not torch.allclose(*directions, atol=1e-3)
