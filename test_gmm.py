"""gmm.py against independent oracles in float64: torch.distributions, hand-worked cases, and the paper's sentences."""
import math
import os

import pytest
import torch
import torch.multiprocessing as mp

from gmm import OnlineGMM, eta_at


def mixture(K=40, D=6, N=150, seed=0, **options):
    """A mixture with known parameters, and N vectors."""
    gen = torch.Generator().manual_seed(seed)
    mu, var = torch.randn(K, D, generator=gen), torch.rand(K, D, generator=gen) + 0.5
    pi = torch.rand(K, generator=gen) + 0.1
    pi /= pi.sum()
    gmm = OnlineGMM(K, D, **options)
    gmm.set_params(mu, var, pi, N / K)
    return gmm, (mu.double(), var.double(), pi.double()), 1.5 * torch.randn(N, D, generator=gen)


def oracle_gamma(mu, var, pi, h, beta):
    """A.1 from torch.distributions, float64."""
    log_p = torch.distributions.Normal(mu, var.sqrt()).log_prob(h.double()[:, None]).sum(-1)  # (N, K)
    return (pi.log() + beta * log_p).softmax(1)


def oracle_step(S, gamma, h, eta):
    """A.2, A.3 and A.5 read plainly, float64; no floor, no split."""
    h = h.double()
    T = gamma.sum(0), gamma.T @ h, gamma.T @ (h * h)
    w = eta ** gamma.mean(0)
    S = [w.view(-1, *[1] * (s.dim() - 1)) * s + (1 - w).view(-1, *[1] * (s.dim() - 1)) * t for s, t in zip(S, T)]
    mu = S[1] / S[0][:, None]
    return S, (mu, S[2] / S[0][:, None] - mu ** 2, S[0] / S[0].sum())


@pytest.mark.parametrize("D", [6, 16, 35])  # variances are multiplied sixteen at a time
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_A1_matches_torch_distributions(beta, D):
    gmm, params, h = mixture(D=D)
    assert torch.allclose(gmm.responsibilities(h, beta).double(), oracle_gamma(*params, h, beta), atol=2e-6)


def test_A1_beta_is_on_the_density_alone():
    gmm, (_, _, pi), h = mixture()
    assert torch.allclose(gmm.responsibilities(h, 0.0).double(), pi.expand(len(h), -1), atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 7, 39, 40, 1000])
def test_A1_any_chunk_and_streaming(chunk):
    """Neither the block size nor streaming over blocks (keep=0) changes an update."""
    reference, _, h = mixture(chunk=40)
    reference.update(h, 0.4, 0.9)
    for keep in (0, 2 ** 28):
        gmm, _, _ = mixture(chunk=chunk)
        gmm.update(h, 0.4, 0.9, keep=keep)
        for a, b in zip(gmm.buffers(), reference.buffers()):
            assert torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("offset", [100.0, 1000.0])
def test_A1_and_A5_far_from_the_origin(offset):
    """A common offset (a power-of-two grid keeps the shifted float32 inputs exact) changes nothing but the means."""
    def grid(x):
        return (x * 64).round() / 64
    gmm, (mu, var, pi), h = mixture()
    mu, h = grid(mu), grid(h)
    gmm.set_params(mu.float(), var.float(), pi, len(h) / 40)
    far, _, _ = mixture()
    far.set_params((mu + offset).float(), var.float(), pi, len(h) / 40)
    gamma = far.responsibilities(h + offset, 0.7)
    assert torch.allclose(gamma.double(), oracle_gamma(mu, var, pi, h, 0.7), atol=1e-5)
    for _ in range(5):
        gmm.update(h, 0.7, 0.9)
        far.update(h + offset, 0.7, 0.9)
    assert torch.allclose(far.mu - offset, gmm.mu, atol=3e-7 * offset)
    assert torch.allclose(far.var, gmm.var, rtol=1e-3)


@pytest.mark.parametrize("chunk", [7, 40])
def test_used_counts_the_most_responsible_components(chunk):
    gmm, params, h = mixture(chunk=chunk)
    want = oracle_gamma(*params, h, 0.4).argmax(1).unique().numel()
    assert 8 < want < 40 and gmm.update(h, 0.4, 0.9)["used"] == want


def test_powers_of_two_are_normal_numbers_or_nothing():
    """What float64 sums would not see is 0, and no product of two powers is subnormal, which is slow on many CPUs."""
    z = torch.tensor([0., -1., -53.5, -54., -80., -140., -1e4, -math.inf, math.nan])
    e = exp2_or_0(z.clone())
    assert e[:3].double() == pytest.approx(z[:3].double().exp2(), rel=1e-6) and not e[3:8].any() and e[8].isnan()
    assert float(e[2] * e[2]) >= torch.finfo(torch.float32).tiny


def test_A1_immune_to_autocast():
    a, _, h = mixture()
    b, _, _ = mixture()
    a.update(h, 0.5, 0.9)
    gamma = a.responsibilities(h, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        b.update(h, 0.5, 0.9)
        assert torch.equal(b.responsibilities(h, 0.5), gamma)
    assert torch.equal(a.mu, b.mu) and torch.equal(a.S_sig, b.S_sig)


def test_A2_by_hand():
    """Two far components, three vectors: one-hot responsibilities, so that S~ is plain sums."""
    gmm = OnlineGMM(2, 2, resurrect=None)
    gmm.set_params(torch.tensor([[0., 0.], [100., 100.]]), torch.ones(2, 2), torch.tensor([0.5, 0.5]), mass=1.5)
    gmm.update(torch.tensor([[1., 0.], [0., 2.], [100., 103.]]), beta=1.0, eta=0.5)
    w = 1 - 0.5 ** (2 / 3), 1 - 0.5 ** (1 / 3)  # 1 - eta^g, g = 2/3 and 1/3
    S_pi = 1.5 + w[0] * (2 - 1.5), 1.5 + w[1] * (1 - 1.5)
    assert gmm.S_pi.tolist() == pytest.approx(S_pi)
    assert gmm.S_mu[0].tolist() == pytest.approx([w[0] * 1, w[0] * 2])  # sums (1, 2), from S_mu = 0
    assert gmm.S_sig[0].tolist() == pytest.approx([1.5 + w[0] * (1 - 1.5), 1.5 + w[0] * (4 - 1.5)], rel=1e-4)
    assert gmm.mu[0].tolist() == pytest.approx([w[0] * 1 / S_pi[0], w[0] * 2 / S_pi[0]], rel=1e-5)
    assert gmm.log_pi.exp().tolist() == pytest.approx([s / sum(S_pi) for s in S_pi])


def test_A2_A3_A5_eight_steps_against_the_plain_reading():
    gmm, (mu, var, pi), h = mixture(chunk=7, var_floor=1e-9, resurrect=None)
    S = [pi * len(h), (pi * len(h))[:, None] * mu, (pi * len(h))[:, None] * (var + mu ** 2)]
    for t in range(8):
        x, eta = h + 0.1 * t, eta_at(t)
        S, (mu, var, pi) = oracle_step(S, oracle_gamma(mu, var, pi, x, 0.3), x, eta)
        gmm.update(x, 0.3, eta)
    assert torch.allclose(gmm.mu.double(), mu, atol=1e-6)
    assert torch.allclose(gmm.var.double(), var, atol=1e-6)
    assert torch.allclose(gmm.log_pi.exp().double(), pi, atol=1e-7)


def test_A3_small_gamma_moves_S():
    """g of 1e-6 must move S by g |log eta| of the way: float32 (1 - eta^g is 0 there) and naive 1 - eta**g do not."""
    gmm = OnlineGMM(2, 1, resurrect=None)
    p = 1e-6  # responsibility of component 1 for every vector
    gmm.set_params(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([1 - p, p], dtype=torch.float64), mass=500.0)
    before = gmm.S_mu.clone()
    gmm.update(torch.full((1000, 1), 3.0), beta=0.0, eta=0.983)
    g = float(torch.tensor(p).log().exp())
    moved, exact = float(gmm.S_mu[1] - before[1]), -math.expm1(g * math.log(0.983)) * (1000 * g * 3.0)
    assert moved == pytest.approx(exact, rel=1e-4) and moved > 0


def test_A3_plain_forgetting_starves():
    """Table A.1, row 1: without the exponent, components without vectors lose all their mass; with it they keep it."""
    mass = {}
    for forgetting in ("plain", "responsibility"):
        gmm = OnlineGMM(4, 2, forgetting=forgetting, resurrect=None)
        gmm.set_params(torch.tensor([[0., 0.], [50., 0.], [0., 50.], [50., 50.]]), torch.ones(4, 2), torch.full((4,), .25), 25.)
        for t in range(1000):
            gmm.update(torch.randn(100, 2, generator=torch.Generator().manual_seed(t)), 1.0, 0.89)
        assert torch.isfinite(gmm.mu).all() and torch.isfinite(gmm.var).all()
        mass[forgetting] = float(gmm.S_pi[3])
        # what has no vectors stays where it is: no sum over vectors that are nothing to it moves it
        assert gmm.mu[3] == pytest.approx(50, abs=1e-4) and gmm.var[3] == pytest.approx(1, abs=1e-3)
    assert mass["plain"] < 1e-12 and mass["responsibility"] == pytest.approx(25.0)


def sample_loop(gmm, gamma, h, eta):
    """Celaya and Agostini's update, one vector after the other, float64: S <- eta^g S + (1 - eta^g) / (1 - eta) {1, h, h^2}."""
    S = [gmm.S_pi.clone(), gmm.S_mu.clone(), gmm.S_sig.clone()]
    for x, g in zip(h.double(), gamma.double()):
        for k in range(gmm.K):
            w = eta ** float(g[k])
            for s, v in zip(S, (torch.ones(()), x, x * x)):
                s[k] = w * s[k] + (1 - w) / (1 - eta) * v
    return S


def test_A3_sample_forgetting_is_celaya_and_agostinis_rule():
    """Exact for one vector, and for many that are equal, where the order cannot matter; a step of many different ones
    keeps its total effect and gives each vector the weight of its responsibility."""
    for rows in (slice(0, 1), [3] * 9):
        gmm, params, h = mixture(K=7, chunk=3, var_floor=1e-9, resurrect=None, forgetting="sample")
        h = h[rows]
        S = sample_loop(gmm, oracle_gamma(*params, h, 0.4), h, 0.8)
        gmm.update(h, 0.4, 0.8)
        for a, b in zip((gmm.S_pi, gmm.S_mu, gmm.S_sig), S):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    gmm, params, h = mixture(K=7, var_floor=1e-9, resurrect=None, forgetting="sample")
    S, gamma, x = gmm.S_mu.clone(), oracle_gamma(*params, h, 0.4), h.double()
    total = sample_loop(gmm, gamma, h, 0.8)[0]  # masses do not depend on the order
    gmm.update(h, 0.4, 0.8)
    for k in range(7):
        r = sum(float(g) for g in gamma[:, k])
        w = 0.8 ** r
        T = sum(float(g) * v for g, v in zip(gamma[:, k], x))
        assert torch.allclose(gmm.S_mu[k], w * S[k] + (1 - w) / ((1 - 0.8) * r) * T, rtol=1e-4, atol=1e-4)
    assert torch.allclose(gmm.S_pi, total, rtol=1e-5)


def test_A3_sample_forgetting_follows_where_the_printed_rule_stays_behind():
    """64 far components whose vectors all move by 1 in 200 steps of 32: as printed, a mean makes a part of the way."""
    behind, home = {}, 10 * torch.eye(64)
    for forgetting in ("responsibility", "sample"):
        gmm = OnlineGMM(64, 64, forgetting=forgetting, resurrect=None)
        gmm.init_from(home, mass=0.5)
        assert float(gmm.S_pi[0]) == (1 if forgetting == "sample" else 0.5)
        gmm.set_params(home, torch.ones(64, 64), torch.full((64,), 1 / 64), float(gmm.S_pi[0]))
        for t in range(200):
            pick = torch.randint(64, (32,), generator=torch.Generator().manual_seed(t))
            gmm.update(home[pick] + (t + 1) / 200, 1.0, 0.89)
        behind[forgetting] = float((home + 1 - gmm.mu).mean())
    assert behind["sample"] < 0.15 < 0.5 < behind["responsibility"], behind


def test_A4_A5_round_trip():
    """S written from parameters gives back these parameters: an update that forgets nothing leaves them (A.4, A.5)."""
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
    gmm.set_params(torch.zeros(1, 3), torch.full((1, 3), 1e-12), torch.ones(1), mass=1e9)  # S outweighs the vectors
    h = torch.randn(500, 3)
    gmm.update(h, 1.0, 0.9)
    assert torch.allclose(gmm.var, 0.01 * h.var(0, unbiased=False).mean().expand(1, 3), rtol=1e-4)


def heavy(rescale=True, **options):
    """Component 0 holds 0.7 of the weight, with a mean of norm 5."""
    gmm = OnlineGMM(8, 2, rescale=rescale, **options)
    mu = torch.tensor([[3., 4.]] + [[float(k), -30.] for k in range(7)])
    gmm.set_params(mu, torch.ones(8, 2), torch.tensor([.7] + [.3 / 7] * 7), mass=10.)
    gmm.S_pi[5] *= 0.5  # the lightest
    gmm.S_mu[5] *= 0.5
    gmm.S_sig[5] *= 0.5
    return gmm, torch.randn(64, 2, generator=torch.Generator().manual_seed(1)) + torch.tensor([3., 4.])


def test_split_resurrect_conserves_mass_and_survives():
    """The heaviest and the lightest end with half their joint mass each, the total stays, and the next A.5 keeps it."""
    gmm, h = heavy(rescale=False)
    plain, _ = heavy(rescale=False)
    plain.resurrect = None
    plain.update(h, 1.0, 0.999)
    report = gmm.update(h, 1.0, 0.999)
    assert int(report["resurrected"]) == 1
    assert float(gmm.S_pi.sum()) == pytest.approx(float(plain.S_pi.sum()), rel=1e-12)
    half = float(plain.S_pi[0] + plain.S_pi[5]) / 2
    assert gmm.S_pi[[0, 5]].tolist() == pytest.approx([half, half])
    assert torch.allclose(gmm.mu[0], plain.mu[0]) and not torch.allclose(gmm.mu[5], plain.mu[5])
    assert float(gmm.mu[5].norm()) == pytest.approx(float(h.square().sum(1).mean().sqrt()), rel=1e-5)  # scale-aware
    assert torch.allclose(gmm.var[5], h.var(0, unbiased=False).mean().expand(2), rtol=1e-4)
    others = [1, 2, 3, 4, 6, 7]
    assert torch.equal(gmm.S_mu[others], plain.S_mu[others])  # nobody else is touched, to the bit
    fresh = gmm.mu[5].clone()
    gmm.resurrect = None
    gmm.update(h, 1.0, 1 - 1e-12)
    assert torch.allclose(gmm.mu[5], fresh, atol=1e-5)


def test_split_draws_new_directions_each_time():
    gmm, h = heavy()
    gmm.update(h, 1.0, 0.999)
    first = gmm.mu[5].clone()
    gmm.set_params(gmm.mu, gmm.var, torch.tensor([.7] + [.3 / 7] * 7), mass=10.)
    gmm.update(h, 1.0, 0.999)
    new = torch.nn.functional.normalize(gmm.mu, dim=1) @ torch.nn.functional.normalize(first, dim=0)
    assert int((new > 0.999999).sum()) <= 1  # at most the old one itself, no second copy


def test_split_needs_weight_above_the_limit():
    gmm, params, h = mixture()
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


def test_A7_starts_at_c_and_rises_to_099():
    assert eta_at(0) == pytest.approx(0.89) and eta_at(0, c=0.75) == pytest.approx(0.75)
    assert eta_at(125_100) == pytest.approx(0.9826, abs=1e-4)
    values = [eta_at(t) for t in range(0, 400_000, 1000)]
    assert all(a < b < 0.99 for a, b in zip(values, values[1:]))
    b = 1 / (0.99 - 0.89)  # the printed sign leaves (0, 1) at once
    assert 0.99 - 1 / (0.001 * 0 - b) == pytest.approx(1.09)


def test_init_from_features_and_random():
    h = torch.randn(100, 16, generator=torch.Generator().manual_seed(3)) + 5
    gmm = OnlineGMM(30, 16)
    gmm.init_from(h)
    assert all(any(torch.equal(m, x) for x in h) for m in gmm.mu) and len(gmm.mu.unique(dim=0)) == 30
    assert float(gmm.S_pi.sum()) == pytest.approx(100)
    gmm.init_from(h[:7], mass=2.0)  # fewer vectors than components
    assert len(gmm.mu.unique(dim=0)) == 30 and float(gmm.S_pi.sum()) == pytest.approx(60)
    gmm.init_from(h, how="random")
    assert torch.allclose(gmm.mu.norm(dim=1), h.square().sum(1).mean().sqrt().expand(30), rtol=1e-5)


def test_reports_used_and_pi_max():
    gmm = OnlineGMM(4, 1)
    gmm.set_params(torch.tensor([[0.], [10.], [20.], [30.]]), torch.ones(4, 1), torch.full((4,), 0.25), mass=1.)
    report = gmm.update(torch.tensor([[0.1], [9.9], [10.1]]), 1.0, 0.9)
    assert int(report["used"]) == 2 and float(report["pi_max"]) == pytest.approx(float(gmm.log_pi.exp().max()))


def test_values_that_are_not_finite_leave_the_mixture_alone():
    gmm, _, h = mixture()
    gmm.update(h, 0.5, 0.9)
    before = [b.clone() for b in gmm.buffers()]
    for bad in (float("nan"), float("inf")):
        x = h.clone()
        x[3, 2] = bad
        gmm.update(x, 0.5, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(before, gmm.buffers()))
    with pytest.raises(ValueError, match="not finite"):
        gmm.init_from(x)


def test_save_load_goes_on_bitwise():
    a, _, h = mixture()
    a.update(h, 0.5, 0.9)
    b = OnlineGMM(40, 6)
    b.load_state_dict(a.state_dict())
    a.update(h + 1, 0.5, 0.9)
    b.update(h + 1, 0.5, 0.9)
    assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers())) and a.t == b.t == 2


@pytest.mark.parametrize("call, text", [
    (lambda g, h: g.update(h, 0.5, 1.09), "eta must lie in"), (lambda g, h: g.update(h, 0.5, 0.0), "eta must lie in"),
    (lambda g, h: g.update(h, 1.5, 0.9), "beta must lie in"), (lambda g, h: OnlineGMM(4, 2, forgetting="no"), "forgetting"),
    (lambda g, h: OnlineGMM(4, 2, resurrect=1.0), "resurrect")])
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


def gather(h):
    parts = [torch.empty_like(h) for _ in range(2)]
    torch.distributed.all_gather(parts, h)
    return torch.cat(parts)


def two_ranks(rank, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29_600 + os.getppid() % 300))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for way, more in (("summed", {}), ("gathered", {"all_gather": gather, "ranks": 2})):
        gmm, _, h = mixture(all_reduce=torch.distributed.all_reduce, resurrect=0.05, **more)  # in place, returns None
        for t in range(6):
            gmm.update((h + 0.1 * t).chunk(2)[rank], 0.3, eta_at(t))
        torch.save(gmm.state_dict(), f"{path}/{way}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    """Real gloo processes with half the vectors each, by either way: bitwise equal to each other, and equal to one process;
    where the vectors are gathered, to the bit."""
    mp.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    one, _, h = mixture(resurrect=0.05)
    for t in range(6):
        one.update(h + 0.1 * t, 0.3, eta_at(t))
    for way in ("summed", "gathered"):
        a, b = (torch.load(tmp_path / f"{way}{r}.pt", weights_only=True) for r in (0, 1))
        for name, value in one.named_buffers():
            assert torch.equal(a[name], b[name])
            assert torch.allclose(a[name].double(), value.double(), rtol=1e-5, atol=1e-6), name
            assert way == "summed" or torch.equal(a[name], value), name


@pytest.mark.parametrize("N, ways", [(150, ["gather"]), (200, ["reduce"])])
def test_the_smaller_of_vectors_and_statistics_goes_over_the_wire(N, ways):
    """Two ranks in pretence, K 40, D 6: 2 N D floats against 2 K (1 + 2D) = 1,040."""
    seen = set()
    gmm, _, _ = mixture(all_reduce=lambda x: (seen.add("reduce"), 2 * x)[1], ranks=2,
                        all_gather=lambda h: (seen.add("gather"), torch.cat([h, h]))[1])
    gmm.update(torch.randn(N // 2, 6, generator=torch.Generator().manual_seed(0)), 0.3, 0.9)
    assert seen == set(ways)


def test_a_block_of_dead_components_and_floored_variances():
    """Weights that starved to nothing leave no NaN behind; a step that is not finite leaves floored variances alone."""
    gmm, _, h = mixture(chunk=8, var_floor=0.5, forgetting="plain")
    gmm.S_pi[8:16], gmm.S_mu[8:16], gmm.S_sig[8:16] = 0, 0, 0  # a block so narrow that it answers for nothing
    gmm.update(h, 0.5, 0.9)
    gmm.update(h, 0.5, 0.9)
    assert all(torch.isfinite(b).all() for b in gmm.buffers())
    var = gmm.var.clone()
    assert (var == var.min()).sum() > 10  # the floor holds some up
    gmm.update(torch.full_like(h, float("nan")), 0.5, 0.9)
    assert torch.equal(var, gmm.var)
