"""zoo/sample_forgetting.py against the rule of Celaya and Agostini, one vector after the other."""
import pytest
import torch

from gmm import OnlineGMM
from zoo.sample_forgetting import per_sample

SampleGMM = per_sample(OnlineGMM)


def mixture(K=7, D=6, N=150):
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(K, D, generator=generator)
    gmm = SampleGMM(K, D, chunk=3, var_floor=1e-9, resurrect=None)
    gmm.set_params(mu, torch.ones(K, D), 1 / K, N / K)
    return gmm, 1.5 * torch.randn(N, D, generator=generator)


def one_by_one(gmm, gamma, h, eta):
    """S <- eta^g S + (1 - eta^g) / (1 - eta) {1, h, h^2} for every vector, in float64."""
    S = [gmm.S_pi.clone(), gmm.S_mu.clone(), gmm.S_sig.clone()]
    for x, g in zip(h.double(), gamma.double()):
        for k in range(gmm.K):
            w = eta ** float(g[k])
            for s, value in zip(S, (torch.ones(()), x, x * x)):
                s[k] = w * s[k] + (1 - w) / (1 - eta) * value
    return S


def exact_gamma(gmm, h, beta):
    normal = torch.distributions.Normal(gmm.mu.double(), gmm.var.double().sqrt())
    log_p = normal.log_prob(h.double()[:, None]).sum(-1)  # (N, K)
    return (gmm.log_pi.double() + beta * log_p).softmax(1)


@pytest.mark.parametrize("rows", [[0], [3] * 9])
def test_exact_for_vectors_that_are_equal(rows):
    """There the order of the vectors cannot matter."""
    gmm, h = mixture()
    S = one_by_one(gmm, exact_gamma(gmm, h[rows], 0.4), h[rows], 0.8)
    gmm.update(h[rows], 0.4, 0.8)
    for a, b in zip((gmm.S_pi, gmm.S_mu, gmm.S_sig), S):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_different_vectors_keep_their_total_effect():
    """Each vector has the weight of its responsibility; masses do not depend on the order."""
    gmm, h = mixture()
    S, gamma, x = gmm.S_mu.clone(), exact_gamma(gmm, h, 0.4), h.double()
    total = one_by_one(gmm, gamma, h, 0.8)[0]
    gmm.update(h, 0.4, 0.8)
    assert torch.allclose(gmm.S_pi, total, rtol=1e-5)
    for k in range(gmm.K):
        r = float(gamma[:, k].sum())
        w = 0.8 ** r
        mean = (gamma[:, k, None] * x).sum(0) / r
        expected = w * S[k] + (1 - w) / (1 - 0.8) * mean
        assert torch.allclose(gmm.S_mu[k], expected, rtol=1e-4, atol=1e-4)


def test_follows_where_the_printed_rule_stays_behind():
    """64 far components whose vectors all move by 1 in 200 steps of 32."""
    behind, home = {}, 10 * torch.eye(64)
    for Mixture in (OnlineGMM, SampleGMM):
        gmm = Mixture(64, 64, resurrect=None)
        gmm.init_from(home, mass=0.5)
        assert float(gmm.S_pi[0]) == (1 if Mixture is SampleGMM else 0.5)
        gmm.set_params(home, torch.ones(64, 64), 1 / 64, float(gmm.S_pi[0]))
        for t in range(200):
            picks = torch.randint(64, (32,), generator=torch.Generator().manual_seed(t))
            gmm.update(home[picks] + (t + 1) / 200, 1.0, 0.89)
        behind[Mixture] = float((home + 1 - gmm.mu).mean())
    assert behind[SampleGMM] < 0.15 < 0.5 < behind[OnlineGMM]


def test_a_step_that_is_not_finite_changes_nothing():
    gmm, h = mixture()
    before = [b.clone() for b in gmm.buffers()]
    gmm.update(torch.full_like(h, float("nan")), 0.4, 0.8)
    assert all(torch.equal(a, b) for a, b in zip(before, gmm.buffers(), strict=True))
