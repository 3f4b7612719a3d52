"""One-line changes of the code that no other test noticed: each test here fails on one of them.

Of zoo/capi.py.
"""
import math

import pytest
import torch

import heads
from conftest import read_checkpoint, read_log
from support import optim
from zoo import capi

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


def test_the_schedules_of_a_run(tmp_path, monkeypatch):
    seen, original = [], optim.CheckedStep.__call__
    monkeypatch.setattr(optim.CheckedStep, "__call__", lambda self, values, step, lr, decay: (
        seen.append((lr, decay)), original(self, values, step, lr, decay))[1])
    betas, step_of = [], heads.Decoupled.step
    monkeypatch.setattr(heads.Decoupled, "step", lambda protos, h, step, beta: (
        betas.append(beta), step_of(protos, h, step, beta))[1])
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
