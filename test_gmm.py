"""Appendix A as an executable specification: gmm.py against independent oracles in float64.

The oracles are torch.distributions, cases worked by hand, and the paper's sentences.
"""
import inspect
import math
import re

import pytest
import torch
from torch.nn import functional as F

from gmm import OnlineGMM, eta_at


def vectors(N, D):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def mixture(K=40, D=6, N=150, seed=0, **options):
    """A mixture with known parameters (mu, var, pi), these parameters in float64, and N vectors."""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(K, D, generator=generator)
    var = torch.rand(K, D, generator=generator) + 0.5
    pi = torch.rand(K, generator=generator) + 0.1
    pi /= pi.sum()
    gmm = OnlineGMM(K, D, **options)
    gmm.set_params(mu, var, pi, N / K)
    h = 1.5 * torch.randn(N, D, generator=generator)
    return gmm, (mu.double(), var.double(), pi.double()), h


def oracle_gamma(mu, var, pi, h, beta):
    """A.1 from torch.distributions, float64."""
    normal = torch.distributions.Normal(mu, var.sqrt())
    log_p = normal.log_prob(h.double()[:, None]).sum(-1)  # (N, K)
    return (pi.log() + beta * log_p).softmax(1)


def oracle_step(S, gamma, h, eta):
    """A.2, A.3 and A.5 read plainly, float64; no floor, no split."""
    h = h.double()
    T_pi, T_mu, T_sig = gamma.sum(0), gamma.T @ h, gamma.T @ (h * h)
    w = eta ** gamma.mean(0)  # (K,)
    S_pi = w * S[0] + (1 - w) * T_pi
    S_mu = w[:, None] * S[1] + (1 - w)[:, None] * T_mu
    S_sig = w[:, None] * S[2] + (1 - w)[:, None] * T_sig
    mu = S_mu / S_pi[:, None]
    return (S_pi, S_mu, S_sig), (mu, S_sig / S_pi[:, None] - mu ** 2, S_pi / S_pi.sum())


def equal(a, b):
    """Whether two mixtures have the same buffers, to the bit."""
    return all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers()))


def test_update_reads_in_the_order_of_the_paper():
    """Each equation is a statement of `update` under its number: A.1, A.2, A.3, A.5, A.6."""
    lines = [line.strip() for line in inspect.getsource(OnlineGMM.update).splitlines()]
    tagged = [(line[2:5], lines[i + 1]) for i, line in enumerate(lines) if line.startswith("# A.")]
    assert [tag for tag, _ in tagged] == ["A.1", "A.2", "A.3", "A.5", "A.6"]
    assert all(re.match(r"([\w, ]+ = )?self\.\w+", statement) for _, statement in tagged)


# ---- A.1 -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("D", [6, 16, 35])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_A1_matches_torch_distributions(beta, D):
    gmm, params, h = mixture(D=D)
    gamma = gmm.responsibilities(h, beta).double()
    assert torch.allclose(gamma, oracle_gamma(*params, h, beta), atol=2e-6)


def test_A1_beta_is_on_the_density_alone():
    gmm, (_, _, pi), h = mixture()
    assert torch.allclose(gmm.responsibilities(h, 0.0).double(), pi.expand(len(h), -1), atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 7, 39, 1000])
def test_any_block_size_gives_the_same(chunk):
    one, _, h = mixture(chunk=40)
    blocks, _, _ = mixture(chunk=chunk)
    for t in range(3):
        one.update(h + 0.1 * t, 0.4, 0.9)
        blocks.update(h + 0.1 * t, 0.4, 0.9)
    for a, b in zip(blocks.buffers(), one.buffers()):
        assert torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("offset", [100.0, 1000.0])
def test_A1_and_A5_far_from_the_origin(offset):
    """A common offset changes nothing but the means. Values on a grid of 1/64 shift exactly."""
    gmm, (mu, var, pi), h = mixture()
    mu, h = (mu * 64).round() / 64, (h * 64).round() / 64
    gmm.set_params(mu.float(), var.float(), pi, len(h) / 40)
    far, _, _ = mixture()
    far.set_params((mu + offset).float(), var.float(), pi, len(h) / 40)
    gamma = far.responsibilities(h + offset, 0.7).double()
    assert torch.allclose(gamma, oracle_gamma(mu, var, pi, h, 0.7), atol=1e-5)
    for _ in range(5):
        gmm.update(h, 0.7, 0.9)
        far.update(h + offset, 0.7, 0.9)
    assert torch.allclose(far.mu - offset, gmm.mu, atol=3e-7 * offset)
    assert torch.allclose(far.var, gmm.var, rtol=1e-3)


def test_A1_immune_to_autocast():
    a, _, h = mixture()
    b, _, _ = mixture()
    a.update(h, 0.5, 0.9)
    gamma = a.responsibilities(h, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        b.update(h, 0.5, 0.9)
        assert torch.equal(b.responsibilities(h, 0.5), gamma)
    assert equal(a, b)


def test_used_counts_the_most_responsible_components():
    gmm, params, h = mixture()
    expected = oracle_gamma(*params, h, 0.4).argmax(1).unique().numel()
    assert 8 < expected < 40
    assert gmm.update(h, 0.4, 0.9)["used"] == expected


# ---- A.2, A.3 and A.5 together -------------------------------------------------------------------
def test_A2_by_hand():
    """Two far components, three vectors: responsibilities are one-hot, and S~ plain sums."""
    gmm = OnlineGMM(2, 2, resurrect=None)
    gmm.set_params(torch.tensor([[0., 0.], [100., 100.]]), torch.ones(2, 2),
                   torch.tensor([0.5, 0.5]), mass=1.5)
    gmm.update(torch.tensor([[1., 0.], [0., 2.], [100., 103.]]), beta=1.0, eta=0.5)
    w = 1 - 0.5 ** (2 / 3), 1 - 0.5 ** (1 / 3)  # 1 - eta^g, g = 2/3 and 1/3
    S_pi = 1.5 + w[0] * (2 - 1.5), 1.5 + w[1] * (1 - 1.5)
    S_sig = [1.5 + w[0] * (1 - 1.5), 1.5 + w[0] * (4 - 1.5)]
    assert gmm.S_pi.tolist() == pytest.approx(S_pi)
    assert gmm.S_mu[0].tolist() == pytest.approx([w[0] * 1, w[0] * 2])  # sums 1 and 2, before: 0
    assert gmm.S_sig[0].tolist() == pytest.approx(S_sig, rel=1e-4)
    assert gmm.mu[0].tolist() == pytest.approx([w[0] * 1 / S_pi[0], w[0] * 2 / S_pi[0]], rel=1e-5)
    assert gmm.log_pi.exp().tolist() == pytest.approx([s / sum(S_pi) for s in S_pi])


def test_A2_A3_A5_eight_steps_against_the_plain_reading():
    gmm, (mu, var, pi), h = mixture(chunk=7, var_floor=1e-9, resurrect=None)
    n = (pi * len(h))[:, None]
    S = pi * len(h), n * mu, n * (var + mu ** 2)
    for t in range(8):
        x, eta = h + 0.1 * t, eta_at(t)
        S, (mu, var, pi) = oracle_step(S, oracle_gamma(mu, var, pi, x, 0.3), x, eta)
        gmm.update(x, 0.3, eta)
    assert torch.allclose(gmm.mu.double(), mu, atol=1e-6)
    assert torch.allclose(gmm.var.double(), var, atol=1e-6)
    assert torch.allclose(gmm.log_pi.exp().double(), pi, atol=1e-7)


def test_A3_small_gamma_moves_S():
    """g of 1e-6 moves S by g |log eta| of the way. Float32 and 1 - eta**g would not move it."""
    gmm = OnlineGMM(2, 1, resurrect=None)
    p = 1e-6  # responsibility of component 1 for every vector
    pi = torch.tensor([1 - p, p], dtype=torch.float64)
    gmm.set_params(torch.zeros(2, 1), torch.ones(2, 1), pi, mass=500.0)
    before = gmm.S_mu.clone()
    gmm.update(torch.full((1000, 1), 3.0), beta=0.0, eta=0.983)
    g = float(torch.tensor(p).log().exp())
    moved = float(gmm.S_mu[1] - before[1])
    assert moved == pytest.approx(-math.expm1(g * math.log(0.983)) * (1000 * g * 3.0), rel=1e-4)
    assert moved > 0


def test_A3_plain_forgetting_starves():
    """Table A.1, row 1: without the exponent, components without vectors lose all their mass."""
    mass = {}
    for forgetting in ("plain", "responsibility"):
        gmm = OnlineGMM(4, 2, forgetting=forgetting, resurrect=None)
        mu = torch.tensor([[0., 0.], [50., 0.], [0., 50.], [50., 50.]])
        gmm.set_params(mu, torch.ones(4, 2), torch.full((4,), .25), 25.)
        for t in range(1000):
            h = torch.randn(100, 2, generator=torch.Generator().manual_seed(t))
            gmm.update(h, 1.0, 0.89)
        assert torch.isfinite(gmm.mu).all() and torch.isfinite(gmm.var).all()
        mass[forgetting] = float(gmm.S_pi[3])
        # what has no vectors stays where it is
        assert gmm.mu[3] == pytest.approx(50, abs=1e-4)
        assert gmm.var[3] == pytest.approx(1, abs=1e-3)
    assert mass["plain"] < 1e-12 and mass["responsibility"] == pytest.approx(25.0)


# ---- A.4 and A.5 ---------------------------------------------------------------------------------
def test_A4_A5_round_trip():
    """S made from parameters gives them back: an update that forgets nothing shows it."""
    gmm, (mu, var, pi), h = mixture()
    assert float(gmm.S_pi.sum()) == pytest.approx(len(h))
    gmm.update(h, 0.5, 1 - 1e-15)
    assert torch.allclose(gmm.mu.double(), mu, atol=1e-7)
    assert torch.allclose(gmm.var.double(), var, atol=2e-7)
    assert torch.allclose(gmm.log_pi.exp().double(), pi, atol=1e-8)


def test_A4_uniform_mass_is_JB_over_K():
    gmm = OnlineGMM(5, 3)
    gmm.set_params(torch.randn(5, 3), torch.ones(5, 3), torch.full((5,), 0.2), mass=12.5)
    assert gmm.S_pi.tolist() == pytest.approx([12.5] * 5)


def test_A5_variance_floor_is_relative():
    gmm = OnlineGMM(1, 3, var_floor=0.01, resurrect=None)
    gmm.set_params(torch.zeros(1, 3), torch.full((1, 3), 1e-12), torch.ones(1), mass=1e9)
    h = torch.randn(500, 3)
    gmm.update(h, 1.0, 0.9)  # S outweighs the vectors
    pooled = h.var(0, unbiased=False).mean()
    assert torch.allclose(gmm.var, 0.01 * pooled.expand(1, 3), rtol=1e-4)


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


def test_equal_vectors_leave_a_variance_above_0():
    gmm, h = OnlineGMM(3, 4, resurrect=None), torch.full((50, 4), 3.)
    gmm.init_from(h)
    for _ in range(50):
        gmm.update(h, 1.0, 0.1)
    assert (gmm.var >= 1e-8).all()
    assert torch.allclose(gmm.responsibilities(h, 1.0).sum(1), torch.ones(50))


# ---- A.6 -----------------------------------------------------------------------------------------
def heavy(rescale=True, **options):
    """Component 0 holds 0.7 of the weight, with a mean of norm 5; component 5 is the lightest."""
    gmm = OnlineGMM(8, 2, rescale=rescale, **options)
    mu = torch.tensor([[3., 4.]] + [[float(k), -30.] for k in range(7)])
    gmm.set_params(mu, torch.ones(8, 2), torch.tensor([.7] + [.3 / 7] * 7), mass=10.)
    for S in (gmm.S_pi, gmm.S_mu, gmm.S_sig):
        S[5] *= 0.5
    h = torch.randn(64, 2, generator=torch.Generator().manual_seed(1)) + torch.tensor([3., 4.])
    return gmm, h


def test_split_resurrect_conserves_mass_and_survives():
    """Heaviest and lightest end with half of their joint mass each, and the next A.5 keeps it."""
    gmm, h = heavy(rescale=False)
    plain, _ = heavy(rescale=False)
    plain.resurrect = None
    plain.update(h, 1.0, 0.999)
    report = gmm.update(h, 1.0, 0.999)
    assert int(report["resurrected"]) == 1
    assert float(gmm.S_pi.sum()) == pytest.approx(float(plain.S_pi.sum()), rel=1e-12)
    half = float(plain.S_pi[0] + plain.S_pi[5]) / 2
    assert gmm.S_pi[[0, 5]].tolist() == pytest.approx([half, half])
    assert float(report["pi_max"]) == pytest.approx(half / float(gmm.S_pi.sum()), rel=1e-6)
    assert torch.allclose(gmm.mu[0], plain.mu[0])
    assert not torch.allclose(gmm.mu[5], plain.mu[5])
    rms = float(h.square().sum(1).mean().sqrt())
    assert float(gmm.mu[5].norm()) == pytest.approx(rms, rel=1e-5)  # scale-aware
    assert torch.allclose(gmm.var[5], h.var(0, unbiased=False).mean().expand(2), rtol=1e-4)
    others = [1, 2, 3, 4, 6, 7]
    assert torch.equal(gmm.S_mu[others], plain.S_mu[others])  # nobody else is touched, to the bit
    fresh = gmm.mu[5].clone()
    gmm.resurrect = None
    gmm.update(h, 1.0, 1 - 1e-12)
    assert torch.allclose(gmm.mu[5], fresh, atol=1e-5)


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


def test_each_restart_has_a_direction_of_its_own():
    directions = []
    gmm, h = of_weights(.7, .1, .1, .1)
    start = gmm.mu
    for _ in range(2):
        gmm.set_params(start, torch.ones(4, 2), torch.tensor([.7, .12, .12, .06]), mass=10.)
        assert int(gmm.update(h, 1.0, 0.999)["resurrected"]) == 1
        directions.append(F.normalize(gmm.mu[3], dim=0))
    assert not torch.allclose(*directions, atol=1e-3)


def test_split_needs_weight_above_the_limit():
    gmm, _, h = mixture()
    assert float(gmm.update(h, 0.5, 0.9)["resurrected"]) == 0


def test_A6_rescaled_mean_survives_the_next_update():
    gmm, h = heavy()
    plain, _ = heavy(resurrect=None)
    plain.update(h, 1.0, 0.999)
    gmm.update(h, 1.0, 0.999)
    norm = float(plain.mu[0].norm())
    assert float(gmm.mu[0].norm()) == pytest.approx(norm ** 0.5, rel=1e-5)
    gmm.resurrect = None
    gmm.update(h, 1.0, 1 - 1e-12)
    assert float(gmm.mu[0].norm()) == pytest.approx(norm ** 0.5, rel=1e-5)


def test_A6_leaves_short_means_alone():
    gmm, h = heavy()
    gmm.set_params(gmm.mu / 50, gmm.var, torch.tensor([.7] + [.3 / 7] * 7), mass=10.)  # norm 0.1
    gmm.update(h / 50, 1.0, 1 - 1e-12)
    assert float(gmm.mu[0].norm()) == pytest.approx(0.1, rel=1e-4)


# ---- A.7 -----------------------------------------------------------------------------------------
def test_A7_starts_at_c_and_rises_to_099():
    assert eta_at(0) == pytest.approx(0.89) and eta_at(0, c=0.75) == pytest.approx(0.75)
    assert eta_at(125_100) == pytest.approx(0.9826, abs=1e-4)
    values = [eta_at(t) for t in range(0, 400_000, 1000)]
    assert all(a < b < 0.99 for a, b in zip(values, values[1:]))
    b = 1 / (0.99 - 0.89)  # the printed sign leaves (0, 1) at once
    assert 0.99 - 1 / (0.001 * 0 - b) == pytest.approx(1.09)


# ---- start, state, bad input ---------------------------------------------------------------------
def test_init_from_features_and_random():
    h = torch.randn(100, 16, generator=torch.Generator().manual_seed(3)) + 5
    gmm = OnlineGMM(30, 16)
    gmm.init_from(h)
    assert all(any(torch.equal(mean, x) for x in h) for mean in gmm.mu)
    assert len(gmm.mu.unique(dim=0)) == 30
    assert float(gmm.S_pi.sum()) == pytest.approx(100)
    gmm.init_from(h[:7], mass=2.0)  # fewer vectors than components
    assert len(gmm.mu.unique(dim=0)) == 30 and float(gmm.S_pi.sum()) == pytest.approx(60)
    gmm.init_from(h, how="random")
    rms = h.square().sum(1).mean().sqrt()
    assert torch.allclose(gmm.mu.norm(dim=1), rms.expand(30), rtol=1e-5)


def test_reports_used_and_pi_max():
    gmm = OnlineGMM(4, 1)
    mu = torch.tensor([[0.], [10.], [20.], [30.]])
    gmm.set_params(mu, torch.ones(4, 1), torch.full((4,), 0.25), mass=1.)
    report = gmm.update(torch.tensor([[0.1], [9.9], [10.1]]), 1.0, 0.9)
    assert int(report["used"]) == 2
    assert float(report["pi_max"]) == pytest.approx(float(gmm.log_pi.exp().max()))


def test_values_that_are_not_finite_leave_the_mixture_alone():
    gmm, _, h = mixture()
    gmm.update(h, 0.5, 0.9)
    before = [b.clone() for b in gmm.buffers()]
    for bad in (float("nan"), float("inf"), 1e30):  # the square of the last one is not finite
        x = h.clone()
        x[3, 2] = bad
        gmm.update(x, 0.5, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(before, gmm.buffers()))
    with pytest.raises(ValueError, match="not finite"):
        gmm.init_from(torch.full_like(h, float("inf")))


def test_components_without_any_weight_leave_no_nan():
    """A whole block starved to nothing, and a step that is not finite leaves the floor alone."""
    gmm, _, h = mixture(chunk=8, var_floor=0.5, forgetting="plain")
    for S in (gmm.S_pi, gmm.S_mu, gmm.S_sig):
        S[8:16] = 0
    gmm.update(h, 0.5, 0.9)
    gmm.update(h, 0.5, 0.9)
    assert all(torch.isfinite(b).all() for b in gmm.buffers())
    var = gmm.var.clone()
    assert (var == var.min()).sum() > 10  # the floor holds some up
    gmm.update(torch.full_like(h, float("nan")), 0.5, 0.9)
    assert torch.equal(var, gmm.var)


def test_save_load_goes_on_bitwise():
    a, _, h = mixture()
    a.update(h, 0.5, 0.9)
    b = OnlineGMM(40, 6)
    b.load_state_dict(a.state_dict())
    a.update(h + 1, 0.5, 0.9)
    b.update(h + 1, 0.5, 0.9)
    assert equal(a, b) and a.t == b.t == 2


@pytest.mark.parametrize("call, text", [
    (lambda gmm, h: gmm.update(h, 0.5, 1.09), "eta must lie in"),
    (lambda gmm, h: gmm.update(h, 0.5, 0.0), "eta must lie in"),
    (lambda gmm, h: gmm.update(h, 1.5, 0.9), "beta must lie in"),
    (lambda gmm, h: OnlineGMM(4, 2, forgetting="no"), "forgetting"),
    (lambda gmm, h: OnlineGMM(4, 2, resurrect=1.0), "resurrect")])
def test_bad_input_raises(call, text):
    gmm, _, h = mixture()
    with pytest.raises(ValueError, match=text):
        call(gmm, h)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_equals_cpu():
    (a, _, h), (b, _, _) = mixture(resurrect=0.05), mixture(resurrect=0.05)
    b.to("cuda")
    for t in range(6):
        a.update(h + 0.1 * t, 0.3, eta_at(t))
        b.update((h + 0.1 * t).to("cuda"), 0.3, eta_at(t))
    for x, y in zip(a.buffers(), b.buffers()):
        assert torch.allclose(x.double(), y.cpu().double(), rtol=1e-4, atol=1e-5)
