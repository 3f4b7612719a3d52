"""monitor.py: every warning is given when it must be, once, and not in a healthy run.
optim.py: LARS by hand, clipping, decay, skipped steps."""
import math

import pytest
import torch

from config import parse
from support import optim
from support.monitor import Monitor

HEALTHY = {"loss_over_ln_k": 0.7, "progress": 0.9, "perplexity": 0.5, "unique_0.025": 1.0,
           "unique_0.5": 0.9, "ceiling_0.5": 0.01, "used": 0.4, "h_norm": 12.0,
           "mixture_used": None}


def first_warnings(row):
    return Monitor(1024).warnings(row)


def test_a_healthy_row_is_silent_and_so_are_rows_without_measures():
    assert first_warnings(HEALTHY) == []
    without = {"loss_over_ln_k": 0.9, "progress": 0.5, "mixture_used": None, "used": None}
    assert first_warnings(without) == []
    # means that lie on the data are as unique as the data are
    on_the_data = {"perplexity": 0.024, "unique_0.025": 0.592, "unique_0.5": 0.014,
                   "ceiling_0.5": 0.012, "used": 0.092, "mixture_used": 30, "eta": 0.9}
    assert first_warnings(HEALTHY | on_the_data) == []
    assert Monitor(1024).remarks(HEALTHY | on_the_data) == []


def test_a_mixture_of_few_components_is_remarked_on_once_and_no_warning():
    """The default run: a few random directions take all images, and the others stay."""
    default_run = HEALTHY | {"perplexity": 1.2 / 1024, "unique_0.5": 1.0, "used": 3 / 1024,
                             "mixture_used": 2, "eta": 0.9, "pi_max": torch.tensor(0.4375)}
    monitor = Monitor(1024)
    assert monitor.warnings(default_run) == []
    (sentence,) = monitor.remarks(default_run)
    assert "only 3 of the mixture's 1024 components" in sentence and "0.44" in sentence
    assert "docs/collapse.md" in sentence
    assert monitor.remarks(default_run) == []
    # other prototypes that are hardly used are in trouble
    joint = default_run | {"mixture_used": None, "eta": None}
    assert Monitor(1024).remarks(joint) == [] and len(first_warnings(joint)) == 1


@pytest.mark.parametrize("change, words", [
    ({"loss_over_ln_k": 0.999}, "stays at 0.999 of its value"),
    ({"perplexity": 1.5 / 1024}, "the perplexity is 1.5 of 1024"),
    ({"unique_0.025": 0.3}, "30 % of the prototypes are unique at eps 0.025"),
    ({"unique_0.5": 0.14}, "only 14 % are unique at eps 0.5"),
    ({"used": 0.02, "mixture_used": 9}, "most prototypes are unused: only 2.0 %"),
    ({"h_norm": 1e-4}, "shrink to nothing"),
    ({"h_norm": 1e5}, "grow without limit")])
def test_every_warning_is_given_once_and_names_flags(change, words):
    monitor = Monitor(1024)
    sentences = monitor.warnings(HEALTHY | change)
    assert len(sentences) == 1 and words in sentences[0] and "--" in sentences[0]
    assert monitor.warnings(HEALTHY | change) == []


@pytest.mark.parametrize("prototypes, advice", [
    ("joint", "Try --prototypes kp, live or frozen"), ("kp", "Try --prototypes live or frozen"),
    ("frozen", "Try a larger --bottleneck-dim or fewer --num-prototypes")])
def test_nobody_is_told_to_try_what_runs(prototypes, advice):
    for change in ({"unique_0.025": 0.3}, {"unique_0.5": 0.14}):
        sentence, = Monitor(1024, prototypes).warnings(HEALTHY | change)
        assert sentence.endswith(advice)


def test_a_new_kind_of_trouble_is_named_after_an_old_one():
    monitor = Monitor(1024)
    monitor.warnings(HEALTHY | {"h_norm": 1e5})
    sentences = monitor.warnings(HEALTHY | {"h_norm": 1e5, "unique_0.025": 0.3})
    assert len(sentences) == 1 and "partial prototype collapse" in sentences[0]


def test_what_is_no_trouble_yet():
    # every run starts at ln K
    assert first_warnings(HEALTHY | {"loss_over_ln_k": 0.999, "progress": 0.1}) == []
    assert first_warnings(HEALTHY | {"used": 0.02}) == []  # no mixture runs


def test_lars_by_hand():
    w = torch.tensor([[3.0, 4.0]], requires_grad=True)
    b = torch.tensor([1.0], requires_grad=True)
    opt = optim.LARS([{"params": [w]}, {"params": [b]}])
    for group, decay in zip(opt.param_groups, (0.1, 0.0)):
        group["lr"] = 2.0
        group["weight_decay"] = decay
    w_ref = torch.tensor([[3.0, 4.0]]).double()
    b_ref = 1.0
    momentum_w = torch.zeros(1, 2).double()
    momentum_b = 0.0
    for g in (torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 2.0]])):
        w.grad = g.clone()
        b.grad = torch.tensor([0.25])
        opt.step()
        u = g.double() + 0.1 * w_ref
        # as long as 0.001 of the tensor, whatever the gradient
        momentum_w = 0.9 * momentum_w + u * 0.001 * w_ref.norm() / u.norm()
        momentum_b = 0.9 * momentum_b + 0.25  # biases and norms: plain momentum, no decay
        w_ref = w_ref - 2.0 * momentum_w
        b_ref = b_ref - 2.0 * momentum_b
    assert torch.allclose(w.detach().double(), w_ref, atol=1e-6)
    assert float(b.detach()) == pytest.approx(b_ref)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_optimisers_skip_a_bad_step_and_decay_matrices_alone(name):
    w = torch.ones(2, 2, requires_grad=True)
    b = torch.ones(2, requires_grad=True)
    args = parse(["--optimizer", name, "--device", "cpu"])
    norm = torch.nn.BatchNorm1d(2, affine=False)
    take_step = optim.CheckedStep(optim.make(args, [w, b]), [norm])
    for gradient, loss in ((math.nan, 1.0), (0.0, math.inf)):
        w.grad = torch.full((2, 2), gradient)
        b.grad = torch.zeros(2)
        norm.running_mean.fill_(7.0)  # as a forward pass on the bad batch does
        values, taken = take_step(torch.tensor([loss]), 0, lr=0.1, weight_decay=0.5)
        assert taken == 0 and not values.isfinite().all()
        assert torch.equal(w.detach(), torch.ones(2, 2)) and torch.equal(b.detach(), torch.ones(2))
        assert norm.running_mean.tolist() == [0, 0]
    w.grad = torch.zeros(2, 2)
    b.grad = torch.zeros(2)
    norm.running_mean.fill_(3.0)
    values, taken = take_step(torch.tensor([2.0]), 1, lr=0.1, weight_decay=0.5)
    assert taken == 1 and values.tolist() == [2, 0]
    assert (w < 1).all() and torch.equal(b.detach(), torch.ones(2))
    assert norm.running_mean.tolist() == [3, 3] and w.grad is None


def test_frozen_parameters_move_after_their_last_frozen_step():
    w = torch.ones(2, 2, requires_grad=True)
    v = torch.ones(2, 2, requires_grad=True)
    optimizer = optim.make(parse(["--device", "cpu"]), [w, v])
    take_step = optim.CheckedStep(optimizer, [], 0.0, [v], 2)
    for step in range(3):
        w.grad = torch.ones(2, 2)
        v.grad = torch.ones(2, 2)
        take_step(torch.tensor([1.0]), step, lr=0.1, weight_decay=0.0)
        assert (w < 1).all() and bool((v < 1).all()) == (step == 2)


def test_clipping_is_tensor_by_tensor():
    a = torch.tensor([3.0, 4.0, 0.0])
    b = torch.tensor([0.3, 0.4])
    assert float(optim.clip([a, b], 1.0)) == pytest.approx(math.hypot(5, 0.5))
    assert torch.allclose(a, torch.tensor([0.6, 0.8, 0.0]), atol=1e-5)
    assert torch.allclose(b, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("change, K, named", [
    ({"loss_over_ln_k": 1.0, "progress": 0.19}, 1024, 0),
    ({"loss_over_ln_k": 1.0, "progress": 0.21}, 1024, 1),
    ({"perplexity": 1.5 / 8}, 8, 0), ({"perplexity": 1.5 / 9}, 9, 1)])
def test_where_a_warning_begins(change, K, named):
    assert len(Monitor(K).warnings(HEALTHY | change)) == named


SGD = parse(["--optimizer", "sgd", "--device", "cpu"])


def test_sgd_by_hand():
    w = torch.tensor([[1.0]], requires_grad=True)
    take_step = optim.CheckedStep(optim.make(SGD, [w]), [])
    for step in range(2):
        w.grad = torch.tensor([[0.5]])
        take_step(torch.tensor([1.0]), step, lr=0.1, weight_decay=0.0)
    assert float(w.detach()) == pytest.approx(1 - 0.1 * 0.5 - 0.1 * (0.9 * 0.5 + 0.5))


def test_a_step_is_taken_along_the_clipped_gradient():
    w = torch.tensor([[3.0, 4.0]], requires_grad=True)
    take_step = optim.CheckedStep(optim.make(SGD, [w]), [], clip_grad=0.5)
    w.grad = torch.tensor([[3.0, 4.0]])
    values, _ = take_step(torch.tensor([1.0]), 0, lr=1.0, weight_decay=0.0)
    assert torch.allclose(w.detach(), torch.tensor([[2.7, 3.6]]), atol=1e-5)
    assert float(values[-1]) == pytest.approx(5)  # before the clipping
