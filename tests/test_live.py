"""live.py against a plain loop in float64, hand-worked cases, and a toy in which the printed mixture dies."""
import math

import pytest
import torch
from torch.nn import functional as F

import collapse
from gmm import OnlineGMM
from heads import Frozen, Live
from zoo.live import LiveMixture


def batches(steps=12, N=20, D=6, seed=0, shift=1.0):
    """Vectors with a common part that moves, and lengths that grow."""
    gen = torch.Generator().manual_seed(seed)
    return [(1 + 0.1 * t) * torch.randn(N, D, generator=gen) + shift + 0.05 * t for t in range(steps)]


def started(K=10, D=6, hs=None, **options):
    gmm = LiveMixture(K, D, **options)
    first = torch.randn(3 * K, D, generator=torch.Generator().manual_seed(99)) + 1
    gmm.centre(first)
    gmm.init_from(first)
    return gmm


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))


def loop(state, h, eta, patience, apart, pace, f):
    """L.1 to L.5, one vector and one component at a time, in Python floats."""
    m, mu, n, idle = state
    K, D, N = len(mu), len(m), len(h)
    m = [a + f * (sum(x[d] for x in h) / N - a) for d, a in enumerate(m)]
    u = [[a - b for a, b in zip(x, m)] for x in h]
    u = [[a / math.sqrt(sum(b * b for b in x)) for a in x] for x in u]
    order = [sorted(range(K), key=lambda k: -cosine(x, mu[k])) for x in u]
    for k in range(K):
        won = [x for x, o in zip(u, order) if o[0] == k]
        if won:
            w, r = eta ** len(won), len(won)
            total = w * n[k] + (1 - w) / ((1 - eta) * r) * r
            mu[k] = [(w * n[k] * mu[k][d] + (1 - w) / ((1 - eta) * r) * sum(x[d] for x in won)) / total for d in range(D)]
            n[k], idle[k] = total, 0
        else:
            idle[k] += N
    for k in {o[0] for o in order}:
        twin = max((j for j in range(K) if j != k), key=lambda j: cosine(mu[j], mu[k]))
        if cosine(mu[twin], mu[k]) > 1 - apart:
            idle[max(k, twin)] = math.inf
    dead = [k for k in sorted(range(K), key=lambda k: -idle[k]) if idle[k] > patience * K][:min(N, max(1, int(pace * K)))]
    far = sorted(range(N), key=lambda i: cosine(u[i], mu[order[i][0]]))
    alone = [i for p, i in enumerate(far) if not any(cosine(u[i], u[j]) > 1 - apart for j in far[:p])
             and cosine(u[i], mu[order[i][0]]) <= 1 - apart] if apart else far
    dead = dead[:len(alone)]
    for k, i in zip(dead, alone):
        mu[k], n[k], idle[k] = u[i], 1.0, 0.0
    return (m, mu, n, idle), len(dead)


@pytest.mark.parametrize("apart, patience", [(0.0, 1000.0), (0.1, 1000.0), (0.1, 2.0)])
def test_L1_to_L5_against_a_plain_loop(apart, patience):
    options = dict(eta=0.8, patience=patience, apart=apart, pace=0.2, follow=0.1)
    gmm, restarts = started(K=30, D=4, seed=1, **options), 0
    state = gmm.m.tolist(), gmm.mu.tolist(), gmm.n.tolist(), gmm.idle.tolist()
    for h in batches(D=4):
        gmm.centre(h)
        report = gmm.update(h)
        state, dead = loop(state, h.tolist(), *options.values())
        assert torch.allclose(gmm.m, torch.tensor(state[0]), atol=1e-5)
        assert torch.allclose(gmm.mu, torch.tensor(state[1]), atol=1e-5)
        assert gmm.n.tolist() == pytest.approx(state[2]) and gmm.idle.tolist() == state[3]
        assert int(report["resurrected"]) == dead
        restarts += dead
    assert (restarts > 0) == (apart > 0)


def test_L1_starts_at_the_first_mean():
    gmm, (a, b, *_) = LiveMixture(10, 6, follow=0.1), batches()
    gmm.centre(a)
    assert torch.allclose(gmm.m, a.mean(0))
    gmm.centre(b)
    assert torch.allclose(gmm.m, 0.9 * a.mean(0) + 0.1 * b.mean(0))


def test_L2_responsibilities_are_the_nearest_direction_from_m():
    gmm, h = started(), batches(1)[0]
    gamma = gmm.responsibilities(h)
    for x, row in zip((h - gmm.m).tolist(), gamma.tolist()):
        best = max(range(10), key=lambda k: cosine(x, gmm.mu[k].tolist()))
        assert row == [float(k == best) for k in range(10)]


def test_L3_by_hand():
    """One vector to a mean that is worth one sample: n = .5 + 1, the mean goes 2/3 of the way; two at once: n = .25 + 1.5."""
    for rows, n, share in (([0], 1.5, 2 / 3), ([0, 0], 1.75, 1.5 / 1.75)):
        gmm = LiveMixture(2, 2, eta=0.5, apart=0.0)
        gmm.init_from(torch.tensor([[1., 0.], [0., 1.]]))
        k = int(gmm.mu[:, 0].argmax())
        u = F.normalize(torch.tensor([[3., 1.]]), dim=1)[rows]
        gmm.update(2 * u)
        assert float(gmm.n[k]) == pytest.approx(n) and float(gmm.n[1 - k]) == 1
        assert torch.allclose(gmm.mu[k], (1 - share) * torch.tensor([1., 0.]) + share * u[0])
        assert gmm.mu[1 - k].tolist() == [0, 1] and gmm.idle[1 - k] == len(rows)


def test_L4_twins_part_and_the_later_one_goes_to_the_farthest_vector():
    gmm = LiveMixture(3, 2, pace=1.0)
    gmm.init_from(torch.eye(2))
    gmm.mu.copy_(torch.tensor([[0., 1.], [1., 0.], [1., .01]]))
    report = gmm.update(torch.tensor([[1., 0.], [1., 0.], [-1., -1.]]))
    assert int(report["resurrected"]) == 1
    assert torch.allclose(gmm.mu[2], F.normalize(torch.tensor([-1., -1.]), dim=0))


def test_L5_idle_components_restart_after_patience_and_not_before():
    gmm = LiveMixture(4, 2, patience=3.0, apart=0.0)
    gmm.init_from(torch.tensor([[1., 0.], [-1., 0.], [0., 1.], [0., -1.]]))
    west = int(gmm.mu[:, 0].argmin())
    h = F.normalize(torch.tensor([[1., .2], [.2, 1.], [.2, -1.], [1., -.4]]), dim=1)
    restarts = [int(gmm.update(h)["resurrected"]) for _ in range(4)]
    assert restarts == [0, 0, 0, 1]  # 12 vectors are 3 a component, the next 4 are too many
    assert (h @ gmm.mu[west]).max() == pytest.approx(1) and float(gmm.n[west]) == 1


def test_L5_two_views_of_one_image_take_one_component():
    """Three components wait, three vectors came, two of them equal: two restart, on different vectors; one waits on."""
    gmm = LiveMixture(4, 2, pace=1.0)
    gmm.init_from(torch.eye(2))
    gmm.mu.copy_(torch.tensor([[2., 1.], [0., -1.], [-.5, -1.], [-1., -.4]]))
    gmm.idle[1:] = math.inf
    report = gmm.update(torch.tensor([[1., .2], [-.2, 1.], [-.2, 1.]]))
    assert int(report["resurrected"]) == 2 and gmm.idle.tolist() == [0, 0, 0, math.inf]
    assert float((F.normalize(gmm.mu[1], dim=0) * F.normalize(gmm.mu[2], dim=0)).sum()) < 0.1


@pytest.mark.parametrize("chunk", [1, 3, 10, 999])
def test_any_chunk(chunk):
    a, b = started(chunk=chunk, apart=0.3), started(apart=0.3)
    for h in batches():
        for gmm in (a, b):
            gmm.centre(h)
            gmm.update(h)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a.buffers(), b.buffers()))


def test_vectors_that_are_not_finite_leave_it_untouched():
    gmm, h = started(patience=1e-9), batches(1)[0]
    before = [b.clone() for b in gmm.buffers()]
    for bad in (float("nan"), float("inf")):
        h[3, 2] = bad
        gmm.centre(h)
        report = gmm.update(h)
        assert int(report["used"]) == int(report["resurrected"]) == 0
        assert all(torch.equal(x, y) for x, y in zip(gmm.buffers(), before))
    with pytest.raises(ValueError, match="not finite"):
        gmm.init_from(h)


def test_immune_to_autocast():
    a, b = Live(10, 6, gmm=LiveMixture(10, 6), begin=1), Live(10, 6, gmm=LiveMixture(10, 6), begin=1)
    for t, h in enumerate(batches()):
        a.step(h, t)
        with torch.autocast("cpu", torch.bfloat16):
            b.step(h, t)
            assert torch.equal(a.logits(h), b.logits(h))
    assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers()))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="got K = 1"):
        LiveMixture(1, 4)
    with pytest.raises(ValueError, match="got 1.0"):
        LiveMixture(4, 4, eta=1.0)


# ---- as a prototype set ----------------------------------------------------------------------------------------------
def test_logits_are_cosines_times_the_length_of_h_from_m():
    protos, hs = Live(10, 6, 2.5, gmm=LiveMixture(10, 6), begin=1), batches()
    assert torch.equal(protos.vectors(), Frozen(10, 6).vectors())
    for t, h in enumerate(hs):
        protos.step(h, t)
        C = F.normalize(protos.vectors().double(), dim=1)
        z = 2.5 * (h.double() - protos.gmm.m) @ C.T
        assert torch.allclose(protos.logits(h).double(), z, atol=1e-4)
        ks = torch.tensor([3, 7])
        assert torch.allclose(protos.logits(h.view(2, -1, 6), ks).double(), z[:, ks].view(2, -1, 2), atol=1e-4)
        assert torch.equal(protos.assign(h).argmax(1), protos.logits(h).argmax(1))
    assert protos.started and not list(protos.parameters()) and protos.twin() is protos


def test_two_ranks_equal_one():
    """Each of two ranks sees half of the vectors; all_gather joins them in the order of one process."""
    hs = batches()
    one = Live(10, 6, gmm=LiveMixture(10, 6, apart=0.3), begin=3)
    ranks = []
    for rank in range(2):
        protos = Live(10, 6, gmm=LiveMixture(10, 6, apart=0.3), begin=3)
        for t, h in enumerate(hs):
            protos.all_gather = lambda part, h=h: h
            protos.step(h[10 * rank:10 * rank + 10], t)
        ranks.append(protos)
    for t, h in enumerate(hs):
        one.step(h, t)
    for protos in ranks:
        assert all(torch.equal(x, y) for x, y in zip(protos.buffers(), one.buffers()))


def test_state_goes_on_before_and_after_the_start():
    hs = batches()
    for cut in (2, 8):
        a, b = (Live(10, 6, gmm=LiveMixture(10, 6, patience=2.0), begin=4) for _ in range(2))
        for t in range(cut):
            a.step(hs[t], t)
        b.load_state_dict(a.state_dict())
        for t in range(cut, len(hs)):
            a.step(hs[t], t)
            b.step(hs[t], t)
        assert a.started and b.started and all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers()))


def test_stays_alive_where_the_printed_mixture_dies():
    """Vectors of 40 groups that turn and grow, as a teacher's do; 128 components, 64 vectors a step."""
    gen = torch.Generator().manual_seed(0)
    centres, turn = torch.randn(40, 16, generator=gen), torch.randn(16, 16, generator=gen)
    turn = torch.linalg.matrix_exp(0.001 * (turn - turn.T))

    def draw(N, t, seed):
        g = torch.Generator().manual_seed(seed)
        x = centres[torch.randint(40, (N,), generator=g)] + 0.5 * torch.randn(N, 16, generator=g)
        return (1 + t / 50) * x @ torch.linalg.matrix_power(turn, t) + t / 100
    live, printed = LiveMixture(128, 16), OnlineGMM(128, 16)
    live.centre(draw(512, 0, 0))
    live.init_from(draw(512, 0, 0))
    printed.init_from(draw(512, 0, 0), mass=0.5)
    first = live.mu.clone()
    for t in range(1, 301):
        h = draw(64, t, t)
        live.centre(h)
        live.update(h)
        printed.update(h, 0.5, 0.9)
    h = draw(4000, 300, 1000)
    used, perplexity = collapse.usage(live.responsibilities(h))
    assert used > 0.9 and perplexity > 0.4 and collapse.drift(live.mu, first) > 0.1
    assert collapse.unique_counts(live.mu, [0.025])[0.025] >= 0.99 * 128
    used, perplexity = collapse.usage(printed.responsibilities(h, 0.5))
    assert used < 0.2 and perplexity < 0.05
