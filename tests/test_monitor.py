"""monitor.py and optim.py: every warning fires when provoked, once, and not in a healthy run; LARS by hand."""
import math

import pytest
import torch

from support import optim
from config import parse
from support.monitor import Monitor

HEALTHY = {"loss_over_ln_k": 0.7, "progress": 0.9, "perplexity": 0.5, "unique_0.025": 1.0, "unique_0.5": 0.9, "ceiling_0.5": 0.01,
           "used": 0.4, "h_norm": 12.0, "mixture_used": None}


def test_a_healthy_row_is_silent_and_so_are_rows_without_measures():
    assert Monitor(1024).look(HEALTHY) == []
    assert Monitor(1024).look({"loss_over_ln_k": 0.9, "progress": 0.5, "mixture_used": None, "used": None}) == []
    # what the default run looks like from the start of its mixture on: means on the data, as unique as the data are
    assert Monitor(1024).look({**HEALTHY, "perplexity": 0.024, "unique_0.025": 0.592, "unique_0.5": 0.014, "ceiling_0.5": 0.012,
                               "used": 0.092, "mixture_used": 30}) == []


@pytest.mark.parametrize("change, words", [
    ({"loss_over_ln_k": 0.999}, "rests at 0.999 of ln K"), ({"perplexity": 1.5 / 1024}, "1.5 of 1024 are in effect"),
    ({"unique_0.025": 0.3}, "30 % of the prototypes are unique at eps 0.025"),
    ({"unique_0.5": 0.14}, "14 % of the prototypes are unique at eps 0.5"), ({"used": 0.02, "mixture_used": 9}, "the mixture is dead: 2.0 %"),
    ({"h_norm": 1e-4}, "vanish"), ({"h_norm": 1e5}, "explode")])
def test_every_warning_fires_once_and_names_flags(change, words):
    watch = Monitor(1024)
    said = watch.look(HEALTHY | change)
    assert len(said) == 1 and words in said[0] and "--" in said[0]
    assert watch.look(HEALTHY | change) == []


def test_warnings_that_must_wait():
    assert Monitor(1024).look(HEALTHY | {"loss_over_ln_k": 0.999, "progress": 0.1}) == []  # every run starts at ln K
    assert Monitor(1024).look(HEALTHY | {"used": 0.02}) == []  # no mixture runs


def test_lars_by_hand():
    w, b = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    opt = optim.LARS([{"params": [w]}, {"params": [b]}])
    for group, decay in zip(opt.param_groups, (0.1, 0.0)):
        group["lr"], group["weight_decay"] = 2.0, decay
    w_ref, b_ref, mu_w, mu_b = torch.tensor([[3.0, 4.0]]).double(), 1.0, torch.zeros(1, 2).double(), 0.0
    for g in (torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 2.0]])):
        w.grad, b.grad = g.clone(), torch.tensor([0.25])
        opt.step()
        u = g.double() + 0.1 * w_ref
        mu_w = 0.9 * mu_w + u * 0.001 * w_ref.norm() / u.norm()  # as long as 0.001 of the tensor, whatever the gradient
        mu_b = 0.9 * mu_b + 0.25  # biases and norms: plain momentum, no decay
        w_ref, b_ref = w_ref - 2.0 * mu_w, b_ref - 2.0 * mu_b
    assert torch.allclose(w.detach().double(), w_ref, atol=1e-6) and float(b.detach()) == pytest.approx(b_ref)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_optimisers_skip_a_bad_step_and_decay_matrices_alone(name):
    w, b = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    opt = optim.make(parse(["--optimizer", name, "--device", "cpu"]), [w, b], torch.device("cpu"))
    for group, decay in zip(opt.param_groups, (0.5, 0.0)):
        group["lr"], group["weight_decay"] = 0.1, decay
    w.grad, b.grad = torch.full((2, 2), math.nan), torch.zeros(2)
    optim.advance(opt, torch.tensor(False))
    assert torch.equal(w.detach(), torch.ones(2, 2)) and torch.equal(b.detach(), torch.ones(2))
    w.grad = torch.zeros(2, 2)
    optim.advance(opt, torch.tensor(True))
    assert (w < 1).all() and torch.equal(b.detach(), torch.ones(2))


def test_clipping_is_tensor_by_tensor():
    a, b = torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)
    a.grad, b.grad = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.3, 0.4])
    assert float(optim.clip([a, b], 1.0)) == pytest.approx(math.hypot(5, 0.5))
    assert torch.allclose(a.grad, torch.tensor([0.6, 0.8, 0.0]), atol=1e-5) and torch.allclose(b.grad, torch.tensor([0.3, 0.4]))
