"""fast/gmm.py computes what gmm.py does, whatever the blocks and parts; and leaves out nothing."""
import math

import pytest
import torch

from fast.gmm import FastGMM, exp2_or_0
from gmm import OnlineGMM, eta_at
from zoo.sample_forgetting import per_sample


def both(K, D, N, seed=0, plain=OnlineGMM, fast=FastGMM, keep=2 ** 26, chunk=2048, **options):
    """The plain and the fast mixture with the same parameters, and N vectors."""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(K, D, generator=generator)
    var = torch.rand(K, D, generator=generator) + 0.5
    pi = torch.rand(K, generator=generator) + 0.1
    pair = plain(K, D, **options), fast(K, D, keep=keep, chunk=chunk, **options)
    for gmm in pair:
        gmm.set_params(mu, var, pi / pi.sum(), N / K)
    return *pair, 1.5 * torch.randn(N, D, generator=generator)


# keep 0: one vector at a time; 900: parts of at most 22 vectors; 2^26: all at once
@pytest.mark.parametrize("chunk, keep", [
    *((chunk, keep) for chunk in (7, 39, 40, 1000) for keep in (0, 900, 2 ** 26)),
    (1, 900), (1, 2 ** 26)])
@pytest.mark.parametrize("D", [6, 35])
def test_fast_equals_plain_over_several_steps(chunk, keep, D):
    plain, fast, h = both(40, D, 50, keep=keep, chunk=chunk, resurrect=0.05)
    for t in range(3):
        a = plain.update(h + 0.1 * t, 0.4, eta_at(t))
        b = fast.update(h + 0.1 * t, 0.4, eta_at(t))
        assert a["used"] == b["used"] and a["resurrected"] == b["resurrected"]
        assert float(a["pi_max"]) == pytest.approx(float(b["pi_max"]), rel=1e-5)
    assert plain.t == fast.t == 3
    for (name, x), (_, y) in zip(plain.named_buffers(), fast.named_buffers()):
        assert torch.allclose(x.double(), y.double(), rtol=1e-5, atol=1e-6), name


class FixedParameters:
    """A fork whose means and variances stand still: what it returns is its own."""

    def mean(self, ks=slice(None)):
        return self.own_mean[ks]

    def variance(self, ks=slice(None), mu=None):
        return self.own_var[ks]


def test_what_mean_and_variance_of_a_fork_return_is_only_read():
    pair = [type("Fork", (FixedParameters, base), {}) for base in (OnlineGMM, FastGMM)]
    for cls in pair:
        cls.own_mean = torch.linspace(-1, 1, 40 * 6, dtype=torch.float64).view(40, 6)
        cls.own_var = torch.full((40, 6), 2.0, dtype=torch.float64)
    plain, fast, h = both(40, 6, 50, plain=pair[0], fast=pair[1], chunk=16)
    for t in range(3):
        plain.update(h, 0.4, eta_at(t))
        fast.update(h, 0.4, eta_at(t))
    assert (fast.own_var == 2).all() and torch.equal(fast.own_mean, plain.own_mean)
    for x, y in zip(plain.buffers(), fast.buffers()):
        assert torch.allclose(x.double(), y.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("forgetting", ["plain", "sample"])
def test_other_rules_of_forgetting(forgetting):
    if forgetting == "sample":
        options = {"plain": per_sample(OnlineGMM), "fast": per_sample(FastGMM)}
    else:
        options = {"forgetting": "plain"}
    plain, fast, h = both(40, 6, 50, chunk=16, keep=300, **options)
    reference, _, _ = both(40, 6, 50)
    h = h.abs()  # sums of both signs cancel, and then rounding decides all digits that are left
    for t in range(3):
        for gmm in (plain, fast, reference):
            gmm.update(h + t, 0.4, 0.8)
    assert not torch.allclose(plain.S_pi, reference.S_pi, rtol=1e-2)  # the rule matters here
    for x, y in zip(plain.buffers(), fast.buffers()):
        assert torch.allclose(x.double(), y.double(), rtol=1e-5, atol=1e-6)


def test_vectors_that_are_not_finite_leave_the_mixture_alone():
    _, fast, h = both(40, 6, 150)
    fast.update(h, 0.5, 0.9)
    before = [b.clone() for b in fast.buffers()]
    h[3, 2] = float("nan")
    fast.update(h, 0.5, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(before, fast.buffers()))


def test_a_block_without_any_weight():
    plain, fast, h = both(40, 6, 150, chunk=8, forgetting="plain")
    for gmm in (plain, fast):
        for S in (gmm.S_pi, gmm.S_mu, gmm.S_sig):
            S[8:16] = 0
        gmm.update(h, 0.5, 0.9)
        gmm.update(h, 0.5, 0.9)
    for x, y in zip(plain.buffers(), fast.buffers()):
        assert torch.isfinite(y).all()
        assert torch.allclose(x.double(), y.double(), rtol=1e-5, atol=1e-6)


def test_immune_to_autocast():
    _, a, h = both(40, 6, 150)
    _, b, _ = both(40, 6, 150)
    a.update(h, 0.5, 0.9)
    with torch.autocast("cpu", torch.bfloat16):
        b.update(h, 0.5, 0.9)
    assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers()))


def test_powers_of_two_are_normal_numbers_or_zero():
    """What float64 sums would not see is 0, and no product of two powers is subnormal."""
    z = torch.tensor([0., -1., -53.5, -54., -80., -140., -1e4, -math.inf, math.nan])
    e = exp2_or_0(z.clone())
    assert e[:3].double() == pytest.approx(z[:3].double().exp2(), rel=1e-6)
    assert not e[3:8].any() and e[8].isnan()
    assert float(e[2] * e[2]) >= torch.finfo(torch.float32).tiny
