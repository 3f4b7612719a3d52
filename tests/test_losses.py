"""losses.py against double loops in float64, hand-worked cases, and what must never get a gradient."""
import math

import pytest
import torch
from torch.nn import functional as F

import heads
import losses
from heads import VMF, Frozen
from support import ddp


def logits(V=4, B=3, K=12, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    z_s = scale * torch.randn(V, B, K, generator=generator)
    return z_s, scale * torch.randn(2, B, K, generator=generator)


# ---- CARP ------------------------------------------------------------------------------------------------------------
def carp_loop(z_s, z_t, P, perm):
    """The official code's definition as a plain loop in float64."""
    V, B, K = z_s.shape
    blocks = [perm[n * P:(n + 1) * P].tolist() for n in range(K // P)]

    def softmax(z):
        e = [math.exp(v - max(z)) for v in z]
        return [v / sum(e) for v in e]
    p = [[[softmax([float(z_s[v, b, k]) for k in ks]) for ks in blocks] for b in range(B)] for v in range(V)]
    q = [[[softmax([float(z_t[v, b, k]) for k in ks]) for ks in blocks] for b in range(B)] for v in range(2)]
    agree = []
    for i in range(V):
        for j in range(2):
            if i != j:
                for b in range(B):
                    for n in range(K // P):
                        agree.append(-math.log(sum(x * y for x, y in zip(p[i][b][n], q[j][b][n]))))
    entropy = []
    for n in range(K // P):
        mean = [(sum(p[v][b][n][c] for v in range(V) for b in range(B)) + sum(q[v][b][n][c] for v in range(2) for b in range(B)))
                / ((V + 2) * B) for c in range(P)]
        entropy.append(math.log(P) + sum(m * math.log(m) for m in mean))
    return sum(agree) / len(agree), sum(entropy) / len(entropy)


@pytest.mark.parametrize("P", [2, 3, 4, 6, 12])
def test_carp_matches_a_double_loop(P):
    z_s, z_t = logits()
    perm = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    terms = losses.carp(z_s, z_t, P, perm)
    consistency, entropy = carp_loop(z_s.double(), z_t.double(), P, perm)
    assert float(terms["consistency"]) == pytest.approx(consistency, rel=1e-5)
    assert float(terms["entropy"]) == pytest.approx(entropy, rel=1e-4)


def test_carl_is_carp_with_one_block():
    """One block: the order of the prototypes cannot matter, and the loss is -log <p, q> over all K plus log K - H."""
    z_s, z_t = logits()
    terms = losses.carp(z_s, z_t, 12, torch.randperm(12))
    p, q = z_s.double().softmax(-1), z_t.double().softmax(-1)
    agree = [-(p[i] * q[j]).sum(-1).log().mean() for i in range(4) for j in range(2) if i != j]
    mean = (p.sum((0, 1)) + q.sum((0, 1))) / 18
    assert float(terms["consistency"]) == pytest.approx(float(sum(agree)) / len(agree), rel=1e-5)
    assert float(terms["entropy"]) == pytest.approx(math.log(12) + float((mean * mean.log()).sum()), rel=1e-4)


def test_carp_of_uniform_logits():
    """A student that says nothing costs ln P, and its entropy term is 0."""
    terms = losses.carp(torch.zeros(4, 2, 16), torch.zeros(2, 2, 16), 8)
    assert float(terms["consistency"]) == pytest.approx(math.log(8)) and float(terms["entropy"]) == pytest.approx(0, abs=1e-6)


def test_carp_is_finite_when_views_disagree_completely():
    z = torch.zeros(2, 1, 4)
    z[0, 0, 0] = z[1, 0, 1] = 500.
    z.requires_grad_(True)
    terms = losses.carp(z, z.detach(), 4)
    assert float(terms["consistency"].detach()) == pytest.approx(-math.log(losses.EPS))
    sum(terms.values()).backward()
    assert torch.isfinite(z.grad).all()


def test_carp_needs_whole_blocks_and_stops_the_teacher():
    z_s, z_t = logits()
    with pytest.raises(ValueError, match=r"12\) must be a multiple of the partition size \(5"):
        losses.carp(z_s, z_t, 5)
    z_s.requires_grad_(True), z_t.requires_grad_(True)
    sum(losses.carp(z_s, z_t, 4).values()).backward()
    assert z_s.grad.abs().sum() > 0 and z_t.grad is None


# ---- DINO, Sinkhorn, KoLeo -------------------------------------------------------------------------------------------
def test_dino_matches_a_double_loop():
    z_s, z_t = logits()
    p_t = (z_t.double() / 0.04).softmax(-1)
    total = [-(p_t[j, b] * (z_s[i, b].double() / 0.1).log_softmax(-1)).sum() for i in range(4) for j in range(2) if i != j for b in range(3)]
    assert float(losses.dino(z_s, p_t.float())["cross_entropy"]) == pytest.approx(float(sum(total)) / len(total), rel=1e-5)


def test_sinkhorn_marginals_and_first_round_by_hand():
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    q = losses.sinkhorn(z, 0.1, iters=200)
    assert torch.allclose(q.sum(1), torch.ones(64), atol=1e-5) and torch.allclose(q.sum(0), torch.full((8,), 8.), rtol=1e-3)
    q = losses.sinkhorn(torch.log(torch.tensor([[1., 2.], [3., 2.]])), 1.0, iters=1)  # columns 1/4 3/4 1/2 1/2, then rows
    assert torch.allclose(q, torch.tensor([[1 / 3, 2 / 3], [0.6, 0.4]]))
    assert torch.isfinite(losses.sinkhorn(1000 * z, 0.025)).all()


def test_koleo_matches_cdist_in_value_and_gradient():
    C = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    value = losses.koleo(C, block=77)  # several blocks of rows
    value.backward()
    D = C.detach().double().requires_grad_(True)
    d = torch.cdist(F.normalize(D), F.normalize(D)) + torch.diag(torch.full((30,), 9., dtype=torch.float64))
    reference = -d.min(1).values.log().mean()
    reference.backward()
    assert float(value) == pytest.approx(float(reference), rel=1e-5)
    assert torch.allclose(C.grad.double(), D.grad, atol=1e-5)


def test_koleo_of_duplicates_is_finite():
    C = torch.ones(3, 4, requires_grad=True)
    losses.koleo(C).backward()
    assert torch.isfinite(C.grad).all()
    assert float(losses.koleo(torch.randn(1, 4))) == 0


# ---- DINO for the loop -----------------------------------------------------------------------------------------------
def test_centre_serves_before_it_moves_and_follows_the_mean_of_raw_logits():
    """Three steps by hand in float64: softmax((z - c) / tau), then c <- .9 c + .1 mean(z)."""
    loss, protos = losses.DINOLoss(12, 10, temps=(0.04, 0.04)), Frozen(12, 6)
    c = torch.zeros(12, dtype=torch.float64)
    for step in range(3):
        h = F.normalize(torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(step)), dim=-1)
        z = protos.logits(h).double()
        p_t = loss.targets(h, protos, step)
        assert torch.allclose(p_t.double(), ((z - c) / 0.04).softmax(-1), atol=1e-5)
        c = 0.9 * c + 0.1 * z.flatten(0, 1).mean(0)
        assert torch.allclose(loss.centre.double(), c, atol=1e-6)


def test_probability_centre_divides_by_the_mean_probability():
    """When the centre has settled on a fixed batch, the mean of the targets before renormalising is uniform over prototypes."""
    loss, protos = losses.DINOLoss(8, 10, "prob", temps=(0.1, 0.1)), VMF(8, 6, tau=0.1)
    h = F.normalize(torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    for step in range(200):
        loss.targets(h, protos, step)
    z = protos.logits(h).double() / 0.1 + heads.vmf_log_normalizer(torch.full((8,), 10., dtype=torch.float64), 6)
    mean = z.softmax(-1).mean((0, 1))
    assert torch.allclose(loss.centre.double(), mean.log(), atol=1e-4)
    assert torch.allclose(loss.targets(h, protos, 0).double(), (z - mean.log()).softmax(-1), atol=1e-4)


def test_sinkhorn_targets_take_both_views_together():
    loss, protos = losses.DINOLoss(8, 10, "sinkhorn", temps=(0.05, 0.05)), Frozen(8, 6)
    h = F.normalize(torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    q = (protos.logits(h).double().flatten(0, 1) / 0.05).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    assert torch.allclose(loss.targets(h, protos, 0).flatten(0, 1).double(), q, atol=1e-5) and not loss.centre.any()


def test_sinkhorn_over_two_ranks_is_sinkhorn_over_all(tmp_path):
    """Two threads stand for two ranks: each holds half of the rows, and the reductions meet at a barrier."""
    import threading
    z, barrier, box, out = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), threading.Barrier(2), {}, {}

    def rank(r):
        def reduce(x, op="sum"):
            box[r] = x.clone()
            barrier.wait()
            total = torch.stack([box[0], box[1]])
            barrier.wait()
            return total.sum(0) if op == "sum" else total.amax(0)
        out[r] = losses.sinkhorn(z[6 * r:6 * r + 6], 0.3, all_reduce=reduce)
    threads = [threading.Thread(target=rank, args=(r,)) for r in (0, 1)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert torch.allclose(torch.cat([out[0], out[1]]), losses.sinkhorn(z, 0.3), atol=1e-6)


@pytest.mark.parametrize("epochs, expected", [(0, [.07] * 5), (1, [.04, .07, .07, .07, .07]), (3, [.04, .055, .07, .07, .07])])
def test_teacher_temperature_is_a_line_over_epochs(epochs, expected):
    """numpy's linspace over the warm-up, then flat, one value per epoch: DINO's official schedule."""
    loss = losses.DINOLoss(4, 10, temps=(0.04, 0.07), temp_epochs=epochs)
    assert [loss.temperature(10 * e + 3) for e in range(5)] == pytest.approx(expected)
    assert [loss.temperature(10 * e) for e in range(5)] == pytest.approx(expected)


def test_dino_loss_for_the_loop_matches_its_parts():
    loss, protos = losses.DINOLoss(12, 10, tau_s=0.2), VMF(12, 6, tau=0.2)
    gen = torch.Generator().manual_seed(0)
    h_s, h_t = (F.normalize(torch.randn(v, 5, 6, generator=gen), dim=-1) for v in (4, 2))
    with torch.no_grad():
        protos.gain += torch.rand(12, 1, generator=gen)
    p_t = loss.targets(h_t, protos, 0)
    value = loss(h_s, p_t, protos, protos, 0)["cross_entropy"]
    w = protos.directions().double()
    z = (h_s.double() @ w.T) / 0.2 + heads.vmf_log_normalizer(w.norm(dim=1) / 0.2, 6)
    pairs = [(i, j) for i in range(4) for j in range(2) if i != j]
    expected = sum(-(p_t[j].double() * z[i].log_softmax(-1)).sum(-1).mean() for i, j in pairs) / len(pairs)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    value.backward()
    assert protos.gain.grad.abs().sum() > 0 and protos.weight.grad.abs().sum() > 0
