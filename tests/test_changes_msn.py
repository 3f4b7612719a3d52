"""One-line changes of the code that no other test noticed: each test here fails on one of them.

Of zoo/msn.py.
"""
import math

import pytest
import torch
from torch.nn import functional as F

import heads
import losses
from conftest import TINY, compare_one_process_with_two, differences, read_checkpoint, read_log
from support import optim
from zoo import msn

pytestmark = pytest.mark.usefixtures("small_shapes")


def run(out, *flags):
    return msn.main([*TINY, "--out", str(out), *map(str, flags)])


def half_cosine(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def test_the_schedules_of_a_run(tmp_path, monkeypatch):
    seen, original = [], optim.CheckedStep.__call__
    monkeypatch.setattr(optim.CheckedStep, "__call__", lambda self, values, step, lr, decay: (
        seen.append((lr, decay)), original(self, values, step, lr, decay))[1])
    betas, step_of = [], heads.Decoupled.step
    monkeypatch.setattr(heads.Decoupled, "step", lambda protos, h, step, beta: (
        betas.append(beta), step_of(protos, h, step, beta))[1])
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
