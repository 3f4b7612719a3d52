"""losses.py against double loops in float64 and cases worked by hand.

The second half is about the losses as the training loop calls them. There are two paths to the same
numbers: the plain functions, and fast/losses.py where a step has many logits. A change of a term or
of a prototype set has to change the gradient on both.
"""
import functools
import math
import threading

import pytest
import torch
from torch.nn import functional as F

import config
import fast.losses
import heads
import losses
from gmm import OnlineGMM
from heads import VMF, Decoupled, Frozen, Joint
from support import ddp
from zoo.live import Live, LiveMixture


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(V=4, B=3, K=12, seed=0):
    """z_s (V, B, K) and z_t (2, B, K)."""
    g = generator(seed)
    return 3 * torch.randn(V, B, K, generator=g), 3 * torch.randn(2, B, K, generator=g)


def unit_vectors(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


# ---- CARP --------------------------------------------------------------------------------------
def softmax(z):
    """Of a list of floats."""
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def carp_loop(z_s, z_t, P, perm):
    """(consistency, entropy): the definition of the official code, one number at a time."""
    V, B, K = z_s.shape
    consistency, entropy = [], []
    for n in range(K // P):
        block = perm[n * P:(n + 1) * P]
        p = [[softmax(z_s[v, b, block].tolist()) for b in range(B)] for v in range(V)]
        q = [[softmax(z_t[v, b, block].tolist()) for b in range(B)] for v in range(2)]
        for i in range(V):
            for j in range(2):
                for b in range(B):
                    if i != j:
                        agree = sum(x * y for x, y in zip(p[i][b], q[j][b]))
                        consistency.append(-math.log(agree))
        rows = [row for view in p + q for row in view]  # (V + 2) B of them
        mean = [sum(row[c] for row in rows) / len(rows) for c in range(P)]
        entropy.append(math.log(P) + sum(m * math.log(m) for m in mean))
    return sum(consistency) / len(consistency), sum(entropy) / len(entropy)


@pytest.mark.parametrize("P", [2, 3, 4, 6, 12])
def test_carp_matches_a_double_loop(P):
    z_s, z_t = logits()
    perm = torch.randperm(12, generator=generator(1))
    terms = losses.carp(z_s, z_t, P, perm)
    consistency, entropy = carp_loop(z_s.double(), z_t.double(), P, perm)
    assert float(terms["consistency"]) == pytest.approx(consistency, rel=1e-5)
    assert float(terms["entropy"]) == pytest.approx(entropy, rel=1e-4)


def test_carl_is_carp_with_one_block():
    """The order of the prototypes cannot matter: -log <p, q> over all K, plus log K - H."""
    z_s, z_t = logits()
    terms = losses.carp(z_s, z_t, 12, torch.randperm(12, generator=generator(1)))
    p, q = z_s.double().softmax(-1), z_t.double().softmax(-1)
    agree = [-(p[i] * q[j]).sum(-1).log().mean() for i in range(4) for j in range(2) if i != j]
    mean = (p.sum((0, 1)) + q.sum((0, 1))) / 18  # 4 + 2 views of 3 images
    entropy = math.log(12) + float((mean * mean.log()).sum())
    assert float(terms["consistency"]) == pytest.approx(float(sum(agree)) / 6, rel=1e-5)
    assert float(terms["entropy"]) == pytest.approx(entropy, rel=1e-4)


def test_carp_of_uniform_logits():
    """The consistency of uniform probabilities is ln P, and their entropy term is 0."""
    terms = losses.carp(torch.zeros(4, 2, 16), torch.zeros(2, 2, 16), 8)
    assert float(terms["consistency"]) == pytest.approx(math.log(8))
    assert float(terms["entropy"]) == pytest.approx(0, abs=1e-6)


def test_carp_is_finite_when_views_disagree_completely():
    z = torch.zeros(2, 1, 4)
    z[0, 0, 0] = 500.
    z[1, 0, 1] = 500.
    z.requires_grad_()
    terms = losses.carp(z, z.detach(), 4)
    assert terms["consistency"].item() == pytest.approx(-math.log(losses.EPS))
    sum(terms.values()).backward()
    assert torch.isfinite(z.grad).all()


def test_carp_needs_whole_blocks():
    with pytest.raises(ValueError, match=r"12\) must be a multiple of the partition size \(5"):
        losses.carp(*logits(), 5)


def test_carp_gives_the_teacher_no_gradient():
    z_s, z_t = (z.requires_grad_() for z in logits())
    sum(losses.carp(z_s, z_t, 4).values()).backward()
    assert z_s.grad.abs().sum() > 0
    assert z_t.grad is None


# ---- DINO, Sinkhorn-Knopp, KoLeo ---------------------------------------------------------------
def test_dino_matches_a_double_loop():
    z_s, z_t = logits()
    p_t = (z_t.double() / 0.04).softmax(-1)
    total = []
    for i in range(4):
        for j in range(2):
            for b in range(3):
                if i != j:
                    log_p = (z_s[i, b].double() / 0.1).log_softmax(-1)
                    total.append(-float((p_t[j, b] * log_p).sum()))
    value = losses.dino(z_s, p_t.float())["cross_entropy"]
    assert float(value) == pytest.approx(sum(total) / len(total), rel=1e-5)


def test_sinkhorn_ends_with_equal_masses():
    z = torch.randn(64, 8, generator=generator())
    q = losses.sinkhorn(z, 0.1, iters=200)
    assert torch.allclose(q.sum(1), torch.ones(64), atol=1e-5)
    assert torch.allclose(q.sum(0), torch.full((8,), 64 / 8), rtol=1e-3)
    far_apart = losses.sinkhorn(1000 * z, 0.025)  # exp of such logits has no float32
    assert torch.allclose(far_apart.sum(1), torch.ones(64))  # no vector is left without a target


def test_a_vector_far_below_the_others_keeps_its_target():
    z = torch.tensor([[200., 0., 1.], [0., 1., 2.]])
    q = (z.double() - 200).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    assert q[1].tolist() == pytest.approx([0, 0.5, 0.5])
    assert torch.allclose(losses.sinkhorn(z, 1.0).double(), q, atol=1e-6)


def test_the_first_round_of_sinkhorn_by_hand():
    """[[1, 2], [3, 2]] -> columns to 1: [[1/4, 1/2], [3/4, 1/2]] -> rows to 1."""
    z = torch.tensor([[1., 2.], [3., 2.]]).log()
    q = losses.sinkhorn(z, 1.0, iters=1)
    assert torch.allclose(q, torch.tensor([[1 / 3, 2 / 3], [3 / 5, 2 / 5]]))


def test_sinkhorn_over_two_processes_is_sinkhorn_over_all():
    """Two threads stand for two processes. Each has half of the rows; they reduce at a barrier."""
    z = torch.randn(12, 5, generator=generator())
    barrier = threading.Barrier(2, timeout=60)
    given, results = {}, {}

    def process(rank):
        def reduce(x, op="sum"):
            given[rank] = x.clone()
            barrier.wait()
            both = torch.stack([given[0], given[1]])
            barrier.wait()
            return both.sum(0) if op == "sum" else both.amax(0)

        own = z[6 * rank:6 * rank + 6]
        results[rank] = losses.sinkhorn(own, 0.3, all_reduce=reduce)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    q = torch.cat([results[0], results[1]])
    assert torch.allclose(q, losses.sinkhorn(z, 0.3), atol=1e-6)


def test_koleo_matches_cdist_in_value_and_gradient():
    C = torch.randn(30, 5, generator=generator()).requires_grad_()
    value = losses.koleo(C, block=77)  # 77 // 30 = 2 rows at a time
    value.backward()
    exact = C.detach().double().requires_grad_()
    distance = torch.cdist(F.normalize(exact), F.normalize(exact))
    distance = distance + 9 * torch.eye(30)  # not its own neighbour
    reference = -distance.min(1).values.log().mean()
    reference.backward()
    assert value.item() == pytest.approx(reference.item(), rel=1e-5)
    assert torch.allclose(C.grad.double(), exact.grad, atol=1e-5)


def test_koleo_of_duplicates_and_of_one_prototype():
    C = torch.ones(3, 4, requires_grad=True)
    losses.koleo(C).backward()
    assert torch.isfinite(C.grad).all()
    assert float(losses.koleo(torch.randn(1, 4))) == 0


# ---- DINO's targets ----------------------------------------------------------------------------
def test_the_centre_moves_after_it_has_served_and_follows_the_mean_of_raw_logits():
    """Three steps by hand in float64: softmax((z - c) / tau), then c <- 0.9 c + 0.1 mean(z)."""
    loss, protos = losses.DINOLoss(12, 10, temps=(0.04, 0.04)), Frozen(12, 6)
    c = torch.zeros(12, dtype=torch.float64)
    for step in range(3):
        h = unit_vectors(2, 5, 6, seed=step)
        z = protos.logits(h).double()
        p_t = loss.targets(h, protos, step)
        assert torch.allclose(p_t.double(), ((z - c) / 0.04).softmax(-1), atol=1e-5)
        c = 0.9 * c + 0.1 * z.mean((0, 1))
        assert torch.allclose(loss.centre.double(), c, atol=1e-6)


def test_the_centre_of_probabilities_settles_on_the_log_of_their_mean():
    """Of a batch that stays the same; vMF prototypes have a bias."""
    loss, protos = losses.DINOLoss(8, 10, "prob", temps=(0.1, 0.1)), VMF(8, 6)
    h = unit_vectors(2, 20, 6)
    for step in range(200):
        loss.targets(h, protos, step)
    kappa = torch.full((8,), 1 / 0.1, dtype=torch.float64)
    z_tau = protos.logits(h).double() / 0.1 + heads.vmf_log_normalizer(kappa, 6)
    centre = z_tau.softmax(-1).mean((0, 1)).log()
    p_t = (z_tau - centre).softmax(-1)
    assert torch.allclose(loss.centre.double(), centre, atol=1e-4)
    assert torch.allclose(loss.targets(h, protos, 0).double(), p_t, atol=1e-4)


def test_sinkhorn_targets_take_both_views_together():
    loss, protos = losses.DINOLoss(8, 10, "sinkhorn", temps=(0.05, 0.05)), Frozen(8, 6)
    h = unit_vectors(2, 20, 6)
    q = (protos.logits(h).double().flatten(0, 1) / 0.05).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    assert torch.allclose(loss.targets(h, protos, 0).flatten(0, 1).double(), q, atol=1e-5)
    assert not loss.centre.any()


@pytest.mark.parametrize("targets, factor", [("center", 1 / 0.04), ("prob", 1), ("sinkhorn", 0)])
def test_what_a_softmax_over_prototypes_takes_off(targets, factor):
    """The centre of logits is divided by the temperature, that of probabilities is not."""
    loss = losses.DINOLoss(12, 10, targets, tau=0.2)
    for step in range(5):
        loss.targets(unit_vectors(2, 5, 6, seed=step), Frozen(12, 6), step)
    assert loss.centre.any() == (targets != "sinkhorn")
    tau, taken_off = loss.tau_and_centre()  # () (12,)
    assert tau == (0.2 if targets == "sinkhorn" else 0.04)
    assert torch.allclose(taken_off, factor * loss.centre, rtol=1e-5)
    assert losses.CARPLoss(12, 4).tau_and_centre() == (1, 0)


@pytest.mark.parametrize("kind, targets", [(Frozen, "center"), (VMF, "center"), (VMF, "prob")])
def test_what_is_measured_is_the_softmax_of_the_teacher(kind, targets):
    """Also with vMF's log-normaliser, which depends on the temperature in another way than logits
    do: `used`, perplexity and what collapse.py assigns speak of the targets."""
    protos, loss = kind(40, 6), losses.DINOLoss(40, 10, targets, temps=(0.025, 0.025))
    if kind is VMF:
        with torch.no_grad():
            protos.gain.copy_(torch.linspace(0.2, 2, 40)[:, None])
    for step in range(30):
        h = unit_vectors(2, 50, 6, seed=step)
        before = loss.tau_and_centre()  # the centre moves after it has served
        before = before[0], before[1].clone()
        p_t = loss.targets(h, protos, step)
    assigned = protos.assign(h.flatten(0, 1), 0.5, *before)  # (100, 40)
    assert torch.allclose(assigned, p_t.flatten(0, 1), atol=1e-6)
    assert len(assigned.argmax(1).unique()) > 5  # not all by one


@pytest.mark.parametrize("epochs, expected", [
    (0, [.07, .07, .07, .07, .07]),
    (1, [.04, .07, .07, .07, .07]),
    (3, [.04, .055, .07, .07, .07])])
def test_the_temperature_of_the_teacher(epochs, expected):
    """DINO's official schedule: numpy's linspace over the warm-up, then flat; one value a pass."""
    loss = losses.DINOLoss(4, 10, temps=(0.04, 0.07), temp_epochs=epochs)
    assert [loss.temperature(10 * epoch) for epoch in range(5)] == pytest.approx(expected)
    assert [loss.temperature(10 * epoch + 9) for epoch in range(5)] == pytest.approx(expected)


def test_dino_for_the_loop_matches_its_parts():
    """In float64, with vMF prototypes of different lengths."""
    loss, protos = losses.DINOLoss(12, 10, tau=0.2), VMF(12, 6)
    with torch.no_grad():
        protos.gain += torch.rand(12, 1, generator=generator())
    h_s, h_t = unit_vectors(4, 5, 6), unit_vectors(2, 5, 6, seed=1)
    p_t = loss.targets(h_t, protos, 0)
    value = loss(h_s, p_t, protos, protos, 0)["cross_entropy"]
    w = protos.directions().detach().double()
    z_tau = (h_s.double() @ w.T) / 0.2 + heads.vmf_log_normalizer(w.norm(dim=1) / 0.2, 6)
    log_p = z_tau.log_softmax(-1)
    expected = [-(p_t[j].double() * log_p[i]).sum(-1).mean()
                for i in range(4) for j in range(2) if i != j]
    assert value.item() == pytest.approx(float(sum(expected)) / 6, rel=1e-5)


# ---- two paths to the same numbers -------------------------------------------------------------
V, B, K, D, P = 4, 5, 24, 6, 4  # views, images, prototypes, dimensions, partition size


@pytest.fixture
def take(monkeypatch):
    """take("plain") or take("fast"): makes the losses take this path, and returns the list of the
    calls of fast/losses.py so far."""
    calls = []
    for name in ("carp", "dino"):
        function = getattr(fast.losses, name)

        def recorded(*args, name=name, function=function):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(fast.losses, name, recorded)

    def take(path):
        monkeypatch.setattr(losses, "MOST_LOGITS", 0 if path == "fast" else 2 ** 24)
        # two partitions of CARP at a time, and DINO's prototypes in groups of 8
        monkeypatch.setattr(fast.losses, "logits_at_a_time", lambda device: V * B * 2 * P)
        monkeypatch.setattr(ddp, "printed", set())
        calls.clear()
        return calls

    return take


def with_gains(protos):
    """Every prototype gets another length, as training would give it."""
    with torch.no_grad():
        protos.gain.copy_(0.5 + torch.rand(K, 1, generator=generator(5)))
    return protos


def started(protos):
    """A set with a mixture, after steps of vectors with a common part and growing lengths."""
    for step in range(4):
        h = torch.randn(2 * B, D, generator=generator(step)) + 0.5
        protos.step((1 + step) * h, step)
    assert protos.started
    return protos


SETS = {
    "frozen": lambda: Frozen(K, D, 2.0),
    "joint": lambda: Joint(K, D, 2.0),
    "joint with gains": lambda: with_gains(Joint(K, D, 2.0, gain=True)),
    "vmf": lambda: with_gains(VMF(K, D, 2.0)),
    "decoupled": lambda: started(Decoupled(K, D, 2.0, gmm=OnlineGMM(K, D), begin=2)),
    "decoupled, raw": lambda: started(Decoupled(K, D, gmm=OnlineGMM(K, D), begin=2, unit=False)),
    "live": lambda: started(Live(K, D, 2.0, gmm=LiveMixture(K, D), begin=2)),
}


def sets_of(kind):
    """Student's and teacher's set; a copy of the teacher's own has moved somewhere else."""
    protos_s = SETS[kind]()
    protos_t = protos_s.twin()
    with torch.no_grad():
        for parameter in protos_t.parameters():
            if protos_t is not protos_s:
                noise = torch.rand(parameter.shape, generator=generator(6))
                parameter.add_(0.2 * noise)
    return protos_s, protos_t


def call(loss, protos_s, protos_t, step=3):
    """One micro-batch: ({name: value} of the terms, {name: gradient} of h_s and the prototypes)."""
    h_s = (1.5 * unit_vectors(V, B, D)).requires_grad_()
    h_t = 1.5 * unit_vectors(2, B, D, seed=1)
    targets = loss.targets(h_t, protos_t, step)
    terms = loss(h_s, targets, protos_s, protos_t, step)
    return of_terms(terms, h_s, protos_s)


def of_terms(terms, h_s, protos_s):
    names = ["h_s", *(name for name, _ in protos_s.named_parameters())]
    gradients = torch.autograd.grad(sum(terms.values()), [h_s, *protos_s.parameters()])
    values = {name: value.detach() for name, value in terms.items()}
    return values, dict(zip(names, gradients, strict=True))


def assert_equal(ours, expected):
    """Two results of `call`, up to rounding."""
    for a, b in zip(ours, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            difference = (a[name] - b[name]).abs().max()
            assert difference <= 2e-5 * b[name].abs().max().clamp_min(1e-3), name


def carp_by_hand(protos_s, protos_t, step=3, entropy_weight=1.0, mean_over_ranks=None):
    """What `call` gives of CARPLoss(K, P, seed=7), by the plain function."""
    h_s = (1.5 * unit_vectors(V, B, D)).requires_grad_()
    h_t = 1.5 * unit_vectors(2, B, D, seed=1)
    perm = torch.randperm(K, generator=generator(7 * 1_000_003 + step))
    terms = losses.carp(protos_s.logits(h_s), protos_t.logits(h_t), P, perm, mean_over_ranks)
    terms["entropy"] = entropy_weight * terms["entropy"]
    return of_terms(terms, h_s, protos_s)


def dino_by_hand(protos_s, protos_t):
    """What `call` gives of DINOLoss(K, 10, tau=0.2) in its first step, by the plain function."""
    h_s = (1.5 * unit_vectors(V, B, D)).requires_grad_()
    h_t = 1.5 * unit_vectors(2, B, D, seed=1)
    p_t = (protos_t.logits(h_t) / 0.04 + protos_t.bias(0.04)).softmax(-1)
    terms = losses.dino(protos_s.logits(h_s), p_t, 0.2, protos_s.bias(0.2))
    return of_terms(terms, h_s, protos_s)


@pytest.mark.parametrize("path", ["plain", "fast"])
@pytest.mark.parametrize("kind", [kind for kind in SETS if kind != "vmf"])
def test_carp_on_both_paths(take, path, kind):
    """Values and gradients; vMF prototypes have a bias, which CARP does not know."""
    calls = take(path)
    sets = sets_of(kind)
    assert_equal(call(losses.CARPLoss(K, P, seed=7), *sets), carp_by_hand(*sets))
    assert calls == ["carp"] * (path == "fast")


@pytest.mark.parametrize("path", ["plain", "fast"])
@pytest.mark.parametrize("kind", SETS)
def test_dino_on_both_paths(take, path, kind):
    """Values and gradients, of the lengths of vMF prototypes too."""
    calls = take(path)
    sets = sets_of(kind)
    assert_equal(call(losses.DINOLoss(K, 10, tau=0.2), *sets), dino_by_hand(*sets))
    assert calls == ["dino"] * (path == "fast")


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_a_trained_set_that_serves_the_teacher_too_gets_no_gradient_from_it(take, path):
    take(path)
    protos = Joint(K, D, 2.0)
    ours = call(losses.CARPLoss(K, P, seed=7), protos, protos)
    assert_equal(ours, carp_by_hand(protos, protos.twin()))


def test_the_number_of_logits_decides(take, monkeypatch):
    calls = take("plain")
    sets = sets_of("frozen")
    monkeypatch.setattr(losses, "MOST_LOGITS", V * B * K)
    call(losses.CARPLoss(K, P), *sets)
    call(losses.DINOLoss(K, 10), *sets)
    assert calls == []
    monkeypatch.setattr(losses, "MOST_LOGITS", V * B * K - 1)
    call(losses.CARPLoss(K, P), *sets)
    call(losses.DINOLoss(K, 10), *sets)
    assert calls == ["carp", "dino"]


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_the_partition_is_another_one_in_each_step_and_for_each_seed(take, path):
    take(path)
    sets = sets_of("frozen")
    by_step = [call(losses.CARPLoss(K, P, seed=7), *sets, step) for step in (3, 4)]
    assert_equal(by_step[1], carp_by_hand(*sets, step=4))
    of_seed_8 = call(losses.CARPLoss(K, P, seed=8), *sets, 3)
    values = [result[0]["consistency"].item() for result in (*by_step, of_seed_8)]
    assert len(set(values)) == 3


# ---- a term that is dropped or weighed ---------------------------------------------------------
class WeighedCARP(losses.CARPLoss):
    """The ablation that a reader would write: another weight of the entropy, or no entropy."""

    weight = None

    def forward(self, *args):
        terms = super().forward(*args)
        if self.weight is None:
            del terms["entropy"]
        else:
            terms["entropy"] *= self.weight
        return terms


@pytest.mark.parametrize("path", ["plain", "fast"])
@pytest.mark.parametrize("kind", ["joint", "frozen"])
@pytest.mark.parametrize("weight", [None, 0.0, 10.0])
def test_a_term_that_is_dropped_or_weighed_changes_the_gradient(take, path, kind, weight):
    """By as much as the plain function says, and by much more than the tolerance."""
    calls = take(path)
    sets = sets_of(kind)
    loss = WeighedCARP(K, P, seed=7)
    loss.weight = weight
    _, gradients = call(loss, *sets)
    assert calls == ["carp"] * (path == "fast")
    _, expected = carp_by_hand(*sets, entropy_weight=weight or 0.0)
    assert_equal((gradients,), (expected,))
    _, unchanged = carp_by_hand(*sets)
    for name in expected:
        change = (expected[name] - unchanged[name]).norm() / unchanged[name].norm()
        assert change > 0.01, name


# ---- prototype sets that override a method -----------------------------------------------------
class Louder(Frozen):
    def logits(self, h, ks=None):
        return 3 * super().logits(h, ks)


class LouderJoint(Joint):
    def logits(self, h, ks=None):
        return 3 * super().logits(h, ks)


class OtherVectors(Frozen):
    def vectors(self):
        return self.start + torch.linspace(0, 1, D)


class OtherDirections(Joint):
    def directions(self):
        return 3 * super().directions()


LOSSES = {
    "carp": (functools.partial(losses.CARPLoss, K, P, seed=7), carp_by_hand),
    "dino": (functools.partial(losses.DINOLoss, K, 10, tau=0.2), dino_by_hand),
}


def relative_change(ours, unchanged):
    """How far the gradient of h_s is from that of another result."""
    a, b = ours[1]["h_s"], unchanged[1]["h_s"]
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("method", LOSSES)
@pytest.mark.parametrize("kind, parent", [(Louder, Frozen), (LouderJoint, Joint)])
def test_a_set_with_logits_of_its_own_runs_on_the_plain_path_and_a_line_says_so(
        take, capsys, method, kind, parent):
    make, by_hand = LOSSES[method]
    calls = take("fast")
    protos_s = kind(K, D, 2.0)
    protos_t = protos_s.twin()
    ours = call(make(), protos_s, protos_t)
    call(make(), protos_s, protos_t)
    assert calls == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1  # though the loss was called twice
    assert f"{kind.__name__} overrides `logits`, or trains its scale: the plain loss" in lines[0]
    assert str(V * B * K) in lines[0]
    assert_equal(ours, by_hand(protos_s, protos_t))
    other = parent(K, D, 2.0)
    unchanged = call(make(), other, other.twin())
    assert calls == [method]
    line, = capsys.readouterr().out.splitlines()
    assert "fast/losses.py computes the loss" in line and "overrides" not in line
    assert relative_change(ours, unchanged) > 0.1


def test_it_is_enough_that_the_teachers_set_has_logits_of_its_own(take, capsys):
    calls = take("fast")
    sets = Frozen(K, D, 2.0), Louder(K, D, 2.0)
    assert_equal(call(losses.CARPLoss(K, P, seed=7), *sets), carp_by_hand(*sets))
    assert calls == []
    assert "Louder overrides `logits`" in capsys.readouterr().out


def test_below_the_limit_no_line_is_printed(take, capsys):
    take("plain")
    protos = Louder(K, D)
    call(losses.CARPLoss(K, P), protos, protos)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("path", ["plain", "fast"])
@pytest.mark.parametrize("method", LOSSES)
@pytest.mark.parametrize("kind, parent", [(OtherVectors, Frozen), (OtherDirections, Joint)])
def test_vectors_or_directions_of_its_own_change_the_loss_on_both_paths(
        take, capsys, path, method, kind, parent):
    make, by_hand = LOSSES[method]
    calls = take(path)
    protos_s = kind(K, D, 2.0)
    protos_t = protos_s.twin()
    ours = call(make(), protos_s, protos_t)
    assert calls == [method] * (path == "fast")
    lines = capsys.readouterr().out.splitlines()
    assert ["fast/losses.py computes the loss" in line for line in lines] == [True] * len(calls)
    assert_equal(ours, by_hand(protos_s, protos_t))
    other = parent(K, D, 2.0)
    assert relative_change(ours, call(make(), other, other.twin())) > 0.1


@pytest.mark.parametrize("method", LOSSES)
def test_a_scale_that_is_trained_gets_its_gradient_at_any_size(take, method):
    make, _ = LOSSES[method]
    slopes = {}
    for path in ("plain", "fast"):
        take(path)
        scale = torch.nn.Parameter(torch.tensor(2.0))
        protos = Frozen(K, D, scale)
        slopes[path] = float(call(make(), protos, protos)[1]["scale"])
    assert slopes["fast"] == pytest.approx(slopes["plain"], rel=1e-5) and slopes["plain"] != 0


# ---- several processes -------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["plain", "fast"])
def test_the_entropy_of_carp_is_of_the_mean_over_processes(take, monkeypatch, path):
    """The other process is one whose probabilities are uniform."""
    take(path)

    def mean_over_ranks(p):
        return (p + 1 / P) / 2

    monkeypatch.setattr(ddp, "mean_over_ranks", mean_over_ranks)
    sets = sets_of("joint")
    ours = call(losses.CARPLoss(K, P, seed=7), *sets)
    assert_equal(ours, carp_by_hand(*sets, mean_over_ranks=mean_over_ranks))
    alone = carp_by_hand(*sets)[0]["entropy"]
    assert ours[0]["entropy"] < 0.5 * alone


@pytest.mark.parametrize("targets", ["center", "prob"])
def test_the_centre_of_dino_is_of_the_mean_over_processes(monkeypatch, targets):
    """The other process has other vectors; one process with all vectors is the oracle."""
    protos, hs = Frozen(K, D), [unit_vectors(2, B, D, seed=seed) for seed in (0, 1)]
    together = losses.DINOLoss(K, 10, targets)
    together.targets(torch.cat(hs, dim=1), protos, 0)
    means = []
    for h in hs:
        z = protos.logits(h)
        z = (z / 0.04).softmax(-1) if targets == "prob" else z
        means.append(z.mean((0, 1)))
    monkeypatch.setattr(ddp, "mean_over_ranks", lambda x: (means[0] + means[1]) / 2)
    apart = losses.DINOLoss(K, 10, targets)
    apart.targets(hs[0], protos, 0)
    assert together.centre.any()
    assert torch.allclose(apart.centre, together.centre, atol=1e-6)


def test_sinkhorn_targets_reduce_over_processes(monkeypatch):
    """The other process has the same vectors: every total doubles, and the result stays."""
    protos, h = Frozen(K, D), unit_vectors(2, B, D)
    alone = losses.DINOLoss(K, 10, "sinkhorn").targets(h, protos, 0)
    operations = []

    def all_reduce(x, op="sum"):
        operations.append(op)
        return 2 * x if op == "sum" else x

    monkeypatch.setattr(ddp, "all_reduce", all_reduce)
    doubled = losses.DINOLoss(K, 10, "sinkhorn").targets(h, protos, 0)
    assert operations == 3 * ["max", "sum"]
    assert torch.allclose(doubled, alone, atol=1e-6)


# ---- the table ---------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, kind, tau, uniform", [
    ("--method carp --partition-size 128 --seed 3", losses.CARPLoss, 1.0, math.log(128)),
    ("--method carl", losses.CARPLoss, 1.0, math.log(1024)),
    ("--method dino --student-temp 0.2", losses.DINOLoss, 0.2, math.log(1024))])
def test_the_loss_that_the_flags_name(flags, kind, tau, uniform):
    args = config.parse([*flags.split(), "--num-prototypes", "1024"], "train.py")
    loss = losses.loss(args, steps_per_epoch=10)
    assert type(loss) is kind
    assert loss.tau == tau
    assert loss.uniform == pytest.approx(uniform)
    if kind is losses.CARPLoss:
        assert loss.seed == args.seed


@pytest.mark.parametrize("make", [functools.partial(losses.CARPLoss, K, P),
                                  functools.partial(losses.DINOLoss, K, 10)])
def test_uniform_is_the_value_of_the_first_term_while_the_output_is_uniform(make):
    loss, protos = make(), Frozen(K, D)
    targets = loss.targets(unit_vectors(2, B, D), protos, 0)
    terms = loss(torch.zeros(V, B, D), targets, protos, protos, 0)
    assert float(next(iter(terms.values()))) == pytest.approx(loss.uniform, rel=1e-5)
