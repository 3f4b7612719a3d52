"""zoo/live.py against a plain loop in Python floats, cases worked by hand, and a toy in which the
mixture of the paper dies."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import collapse
from gmm import OnlineGMM
from heads import Frozen
from zoo.live import Live, LiveMixture


def batches(steps=12, N=20, D=6, seed=0, shift=1.0):
    """Vectors with a common part that moves, and lengths that grow."""
    generator = torch.Generator().manual_seed(seed)
    hs = []
    for t in range(steps):
        noise = torch.randn(N, D, generator=generator)
        hs.append((1 + 0.1 * t) * noise + shift + 0.05 * t)
    return hs


def started_mixture(K=10, D=6, **options):
    """A mixture that has started from 3K vectors; the same for the same K and D."""
    gmm = LiveMixture(K, D, **options)
    h = torch.randn(3 * K, D, generator=torch.Generator().manual_seed(99)) + 1
    gmm.follow(h)
    gmm.init_from(h)
    return gmm


def step(gmm, h):
    gmm.follow(h)
    return gmm.update(h)


def live_set(K=10, D=6, scale=1.0, begin=1, **options):
    return Live(K, D, scale, gmm=LiveMixture(K, D, **options), begin=begin)


def same_buffers(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


# ---- the oracle: L.1 to L.5, one vector and one component at a time ----------------------------
def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))


class PlainLive:
    """L.1 to L.5 in lists of Python floats, from the state of a LiveMixture on."""

    def __init__(self, gmm):
        self.m = gmm.m.tolist()
        self.mu = gmm.mu.tolist()
        self.n = gmm.n.tolist()
        self.idle = gmm.idle.tolist()
        self.options = gmm.eta, gmm.patience, gmm.apart, gmm.restart_share, gmm.f

    def update(self, h):
        """One step on the list of vectors h; returns the number of restarts."""
        eta, patience, apart, restart_share, f = self.options
        K, D, N = len(self.mu), len(self.m), len(h)
        # L.1
        for d in range(D):
            self.m[d] += f * (sum(x[d] for x in h) / N - self.m[d])
        u = []
        for x in h:
            difference = [a - b for a, b in zip(x, self.m)]
            length = math.sqrt(sum(a * a for a in difference))
            u.append([a / length for a in difference])
        # L.2
        winner = [max(range(K), key=lambda k: cosine(x, self.mu[k])) for x in u]
        # L.3, as the mean of the samples that are remembered and of those that come in
        for k in range(K):
            won = [x for x, of_x in zip(u, winner) if of_x == k]
            if not won:
                self.idle[k] += N
                continue
            w = eta ** len(won)
            weight = (1 - w) / (1 - eta) / len(won)  # of each new sample
            n = w * self.n[k] + weight * len(won)
            for d in range(D):
                new = weight * sum(x[d] for x in won)
                self.mu[k][d] = (w * self.n[k] * self.mu[k][d] + new) / n
            self.n[k] = n
            self.idle[k] = 0
        # L.4
        for k in set(winner):
            others = [j for j in range(K) if j != k]
            nearest = max(others, key=lambda j: cosine(self.mu[j], self.mu[k]))
            if apart and cosine(self.mu[nearest], self.mu[k]) > 1 - apart:
                self.idle[max(k, nearest)] = math.inf
        # L.5: which components
        dead = [k for k in range(K) if self.idle[k] > patience * K]
        dead.sort(key=lambda k: -self.idle[k])
        dead = dead[:min(N, max(1, int(restart_share * K)))]
        # L.5: on which vectors
        to_winner = [cosine(x, self.mu[k]) for x, k in zip(u, winner)]
        places, farther = [], []
        for i in sorted(range(N), key=lambda i: to_winner[i]):
            twins = [j for j in farther if cosine(u[i], u[j]) > 1 - apart]
            if not apart or not twins and to_winner[i] <= 1 - apart:
                places.append(u[i])
            farther.append(i)
        restarts = list(zip(dead, places))
        for k, place in restarts:
            self.mu[k], self.n[k], self.idle[k] = place, 1.0, 0.0
        return len(restarts)


@pytest.mark.parametrize("apart, patience", [(0.0, 1000.0), (0.1, 1000.0), (0.1, 2.0), (0.0, 2.0)])
def test_L1_to_L5_against_a_plain_loop(apart, patience):
    gmm = started_mixture(K=30, D=4, seed=1, eta=0.8, patience=patience, apart=apart,
                          restart_share=0.1, f=0.1)
    plain, restarts = PlainLive(gmm), 0
    for h in batches(D=4):
        report = step(gmm, h)
        expected = plain.update(h.tolist())
        assert torch.allclose(gmm.m, torch.tensor(plain.m), atol=1e-5)
        assert torch.allclose(gmm.mu, torch.tensor(plain.mu), atol=1e-5)
        assert gmm.n.tolist() == pytest.approx(plain.n)
        assert gmm.idle.tolist() == plain.idle
        assert int(report["resurrected"]) == expected
        restarts += expected
    assert (restarts > 0) == (apart > 0 or patience < 1000)


# ---- one equation at a time, by hand -----------------------------------------------------------
def test_L1_starts_at_the_first_mean():
    gmm, (a, b) = LiveMixture(10, 6, f=0.1), batches(2)
    gmm.follow(a)
    assert torch.allclose(gmm.m, a.mean(0))
    gmm.follow(b)
    assert torch.allclose(gmm.m, 0.9 * a.mean(0) + 0.1 * b.mean(0))


def test_L2_responsibilities_are_1_for_the_nearest_direction_from_m():
    gmm, h = started_mixture(), batches(1)[0]
    gamma = gmm.responsibilities(h)
    for x, row in zip((h - gmm.m).tolist(), gamma.tolist(), strict=True):
        best = max(range(10), key=lambda k: cosine(x, gmm.mu[k].tolist()))
        assert row == [float(k == best) for k in range(10)]


@pytest.mark.parametrize("times, n, share", [(1, 1.5, 2 / 3), (2, 1.75, 1.5 / 1.75)])
def test_L3_by_hand(times, n, share):
    """A mean that is worth one sample wins the same vector once or twice, at eta = 1/2.

    Once:  w = 1/2, g = 1:    n = 0.5 + 1,     and the mean goes 1 / 1.5 of the way.
    Twice: w = 1/4, g = 3/2:  n = 0.25 + 1.5,  and the mean goes 1.5 / 1.75 of the way.
    """
    gmm = LiveMixture(2, 2, eta=0.5, apart=0.0)
    gmm.init_from(torch.eye(2))
    k = int(gmm.mu[:, 0].argmax())
    u = F.normalize(torch.tensor([3., 1.]), dim=0)
    gmm.update(2 * u.expand(times, 2))
    assert float(gmm.n[k]) == pytest.approx(n)
    assert torch.allclose(gmm.mu[k], (1 - share) * torch.tensor([1., 0.]) + share * u)
    assert float(gmm.n[1 - k]) == 1
    assert gmm.mu[1 - k].tolist() == [0, 1]
    assert gmm.idle[1 - k] == times


def test_L4_the_later_one_of_two_twins_goes_to_the_farthest_vector():
    gmm = LiveMixture(3, 2, restart_share=1.0)
    gmm.init_from(torch.eye(2))
    gmm.mu.copy_(torch.tensor([[0., 1.], [1., 0.], [1., .01]]))
    report = gmm.update(torch.tensor([[1., 0.], [1., 0.], [-1., -1.]]))
    assert int(report["resurrected"]) == 1
    assert torch.allclose(gmm.mu[2], F.normalize(torch.tensor([-1., -1.]), dim=0))


def test_L4_twins_stay_if_apart_is_0():
    """Rounding brings the cosine of equal means above 1."""
    gmm = LiveMixture(400, 6, apart=0.0)
    gmm.init_from(torch.randn(200, 6, generator=torch.Generator().manual_seed(0)))
    gmm.mu[200:] = gmm.mu[:200]
    gmm.update(gmm.mu[:200].clone())
    directions = F.normalize(gmm.mu, dim=1)
    assert (directions @ directions.T > 1).any()
    assert int(torch.isinf(gmm.idle).sum()) == 0


def test_L5_idle_components_restart_after_patience_and_not_before():
    """Patience is 3 vectors for each of 4 components; a step brings 4 vectors."""
    gmm = LiveMixture(4, 2, patience=3.0, apart=0.0)
    gmm.init_from(torch.tensor([[1., 0.], [-1., 0.], [0., 1.], [0., -1.]]))
    west = int(gmm.mu[:, 0].argmin())
    h = F.normalize(torch.tensor([[1., .2], [.2, 1.], [.2, -1.], [1., -.4]]), dim=1)
    restarts = [int(gmm.update(h)["resurrected"]) for _ in range(4)]
    assert restarts == [0, 0, 0, 1]
    assert (h @ gmm.mu[west]).max() == pytest.approx(1)
    assert float(gmm.n[west]) == 1


def test_L5_two_views_of_one_image_take_one_component():
    """Three components have to restart. Of the three vectors two are equal: two components restart,
    on different vectors, and the third one goes on waiting."""
    gmm = LiveMixture(4, 2, restart_share=1.0)
    gmm.init_from(torch.eye(2))
    gmm.mu.copy_(torch.tensor([[2., 1.], [0., -1.], [-.5, -1.], [-1., -.4]]))
    gmm.idle[1:] = math.inf
    report = gmm.update(torch.tensor([[1., .2], [-.2, 1.], [-.2, 1.]]))
    assert int(report["resurrected"]) == 2
    assert gmm.idle.tolist() == [0, 0, 0, math.inf]
    assert cosine(gmm.mu[1].tolist(), gmm.mu[2].tolist()) < 0.1


# ---- what must not change the result -----------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 3, 10, 999])
def test_any_chunk(chunk):
    chunked = started_mixture(chunk=chunk, apart=0.3)
    whole = started_mixture(apart=0.3)
    for h in batches():
        step(chunked, h)
        step(whole, h)
    for a, b in zip(chunked.buffers(), whole.buffers(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_leave_the_mixture_as_it_was(bad):
    gmm, h = started_mixture(), batches(1)[0]
    gmm.idle[5:] = math.inf  # half of the components wait for vectors to restart on
    before = [b.clone() for b in gmm.buffers()]
    h[3, 2] = bad
    report = step(gmm, h)
    assert int(report["used"]) == 0
    assert int(report["resurrected"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(gmm.buffers(), before, strict=True))
    with pytest.raises(ValueError, match="not finite"):
        gmm.init_from(h)


def test_autocast_changes_nothing():
    a, b = live_set(), live_set()
    for t, h in enumerate(batches()):
        a.step(h, t)
        with torch.autocast("cpu", torch.bfloat16):
            b.step(h, t)
            assert torch.equal(a.logits(h), b.logits(h))
    assert same_buffers(a, b)


@pytest.mark.parametrize("K, eta, message", [(1, 0.9, "got K = 1"), (4, 1.0, "got 1.0")])
def test_bad_settings_are_named(K, eta, message):
    with pytest.raises(ValueError, match=message):
        LiveMixture(K, 4, eta=eta)


# ---- as a prototype set ------------------------------------------------------------------------
def test_logits_are_cosines_times_the_length_of_h_from_m():
    protos = live_set(scale=2.5)
    assert torch.equal(protos.vectors(), Frozen(10, 6).vectors())
    ks = torch.tensor([3, 7])
    for t, h in enumerate(batches()):  # the mixture starts at t = 1
        protos.step(h, t)
        C = F.normalize(protos.vectors().double(), dim=1)
        z = 2.5 * (h.double() - protos.gmm.m) @ C.T  # (N, K)
        assert torch.allclose(protos.logits(h).double(), z, atol=1e-4)
        some = protos.logits(h.view(2, -1, 6), ks)  # (2, N/2, 2)
        assert torch.allclose(some.double(), z[:, ks].view(2, -1, 2), atol=1e-4)
        assert torch.equal(protos.assign(h).argmax(1), protos.logits(h).argmax(1))
    assert protos.started
    assert not list(protos.parameters())
    assert protos.twin() is protos


def test_assignments_are_a_softmax_before_the_start_and_one_hot_after_it():
    protos, (h, *_) = live_set(), batches()
    protos.step(h, 0)
    assert not protos.started
    softmax = (protos.logits(h).double() / 0.5).softmax(-1)
    assert torch.allclose(protos.assign(h, tau=0.5).double(), softmax, atol=1e-5)
    protos.step(h, 1)
    assert protos.started
    assert torch.equal(protos.assign(h, tau=0.5), protos.gmm.responsibilities(h))


def test_the_start_takes_the_last_K_vectors_and_m_has_followed_all_of_them():
    protos, hs = live_set(K=10, begin=3), batches(4, N=4)
    for t, h in enumerate(hs):
        protos.step(h, t)
        assert protos.started == (t == 3)
    m = hs[0].mean(0)
    for h in hs[1:]:
        m = m + 0.05 * (h.mean(0) - m)
    u = F.normalize(torch.cat(hs)[-10:] - m, dim=1)  # (K, D)
    assert torch.allclose(protos.gmm.m, m, atol=1e-6)
    # the mixture starts from these vectors in some order: each has one that is equal to it
    distances = torch.cdist(protos.start, u)
    assert distances.min(0).values.max() < 1e-5
    assert distances.min(1).values.max() < 1e-5


@pytest.mark.parametrize("saved_at", [2, 8])
def test_state_goes_on_before_and_after_the_start(saved_at):
    """A set that is saved and loaded ends where a set that goes through ends; the start is at 4."""
    through, resumed = (live_set(begin=4, patience=2.0) for _ in range(2))
    for t, h in enumerate(batches()):
        if t == saved_at:
            assert through.started == (saved_at > 4)
            resumed.load_state_dict(through.state_dict())
        through.step(h, t)
        if t >= saved_at:
            resumed.step(h, t)
    assert through.started and resumed.started
    assert same_buffers(through, resumed)


def test_names_in_checkpoints_stay():
    """Checkpoints of earlier versions hold these names, shapes and types."""
    state = {name: v for name, v in live_set().state_dict().items() if torch.is_tensor(v)}
    shapes = {name: tuple(v.shape) for name, v in state.items()}
    assert shapes == {"start": (10, 6), "gmm.m": (6,), "gmm.mu": (10, 6), "gmm.n": (10,),
                      "gmm.idle": (10,), "gmm.t": ()}
    float64 = {name for name, v in state.items() if v.dtype == torch.float64}
    assert float64 == {"gmm.n", "gmm.idle", "gmm.t"}


# ---- what it is for ----------------------------------------------------------------------------
def test_stays_alive_where_the_mixture_of_the_paper_dies():
    """Vectors of 40 groups turn and grow, as those of a teacher do; 128 components, N 64."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 16, generator=generator)
    turn = torch.randn(16, 16, generator=generator)
    turn = torch.linalg.matrix_exp(0.001 * (turn - turn.T))  # a small rotation

    def draw(N, t, seed):
        generator = torch.Generator().manual_seed(seed)
        group = torch.randint(40, (N,), generator=generator)
        x = centres[group] + 0.5 * torch.randn(N, 16, generator=generator)
        return (1 + t / 50) * x @ torch.linalg.matrix_power(turn, t) + t / 100

    live, paper = LiveMixture(128, 16), OnlineGMM(128, 16)
    h = draw(512, 0, 0)
    live.follow(h)
    live.init_from(h)
    paper.init_from(h, mass=0.5)
    start = live.mu.clone()
    for t in range(1, 301):
        h = draw(64, t, t)
        step(live, h)
        paper.update(h, 0.5, 0.9)
    h = draw(4000, 300, 1000)
    used, perplexity = collapse.usage(live.responsibilities(h))
    assert used > 0.9
    assert perplexity > 0.4
    assert collapse.drift(live.mu, start) > 0.1
    assert collapse.unique_counts(live.mu, [0.025])[0.025] >= 0.99 * 128
    used, perplexity = collapse.usage(paper.responsibilities(h, 0.5))
    assert used < 0.2
    assert perplexity < 0.05


def test_a_subclass_of_live_may_have_a_mixture_of_its_own():
    class Mine(LiveMixture):
        pass

    class Other(Live):
        Mixture = Mine
    args = SimpleNamespace(num_prototypes=8, bottleneck_dim=4, logit_scale=1.0, seed=0,
                           live_eta=0.9, live_patience=2.0, live_apart=0.5)
    assert type(Other.from_args(args).gmm) is Mine
