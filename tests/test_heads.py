"""heads.py and losses.py against double loops in float64, hand-worked cases, and what must never get a gradient."""
import math

import pytest
import torch
from torch.nn import functional as F

import losses
import methods
from gmm import OnlineGMM
import heads
from fast.losses import Rows
from heads import VMF, Decoupled, Frozen, Head, Joint


def KP(*a, **k):
    return Joint(*a, **k, kp=0.1)


def logits(V=4, B=3, K=12, seed=0, scale=3.0):
    gen = torch.Generator().manual_seed(seed)
    return scale * torch.randn(V, B, K, generator=gen), scale * torch.randn(2, B, K, generator=gen)


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


# ---- head and prototype sets -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("bn, norm", [(False, False), (True, False), (False, True)])
def test_head_shapes(bn, norm):
    h = Head(6, 16, 4, bn, norm)(torch.randn(10, 6))
    assert h.shape == (10, 4) and h.dtype == torch.float32
    assert torch.allclose(h.norm(dim=1), torch.ones(10)) == norm
    assert sum(isinstance(m, torch.nn.BatchNorm1d) for m in Head(6, 16, 4, bn).modules()) == 2 * bn


@pytest.mark.parametrize("kind", [Frozen, Joint, KP, Decoupled])
def test_logits_are_scaled_cosines_times_the_norm_of_h(kind):
    protos, h = kind(20, 6, 2.5), 3 * torch.randn(4, 6)
    C = F.normalize(protos.vectors().double(), dim=1)
    expected = 2.5 * (h.double() @ C.T)
    assert torch.allclose(protos.logits(h).double(), expected, atol=1e-5)
    ks = torch.tensor([3, 17, 5])
    assert torch.allclose(protos.logits(h.view(2, 2, 6), ks).double(), expected[:, ks].view(2, 2, 3), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(protos.logits(h).double(), expected, atol=1e-5)
    assert torch.allclose(protos.assign(h).sum(1), torch.ones(4), atol=1e-5)


@pytest.mark.parametrize("unit", [True, False])
def test_raw_rows_are_the_directions_up_to_length(unit):
    """What the losses over blocks are given, of means that are not of length one, at masses down to almost nothing."""
    protos = Decoupled(12, 4, unit=unit)
    protos.step(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)) * 3)
    protos.gmm.S_pi[3:] *= 1e-30
    protos.gmm.S_mu[3:] *= 1e-30
    protos.gmm.S_sig[3:] *= 1e-30
    (C, brought), want = protos.raw(), protos.directions()
    assert brought == unit and torch.allclose(Rows(C, slice(0, 12), brought, 1.0, False).c, want, atol=1e-6)
    assert torch.allclose(want.norm(dim=1), torch.ones(12)) == unit
    assert torch.allclose(protos.gmm.mu / protos.gmm.mu.norm(dim=1, keepdim=True), F.normalize(want, dim=1), atol=1e-6)


def test_all_sets_start_from_the_same_directions():
    a, *rest = [kind(20, 6, seed=7).vectors() for kind in (Frozen, Joint, KP, Decoupled)]
    assert all(torch.allclose(a, b) for b in rest) and not torch.allclose(a, Frozen(20, 6, seed=8).vectors())


def test_twin_of_joint_is_a_copy_without_gradient_and_the_others_share():
    joint = Joint(8, 4)
    twin = joint.twin()
    assert torch.equal(twin.weight, joint.weight) and twin.weight.data_ptr() != joint.weight.data_ptr()
    assert not twin.weight.requires_grad and joint.weight.requires_grad
    for protos in (Frozen(8, 4), Decoupled(8, 4)):
        assert protos.twin() is protos and not list(protos.parameters())


def test_no_gradient_reaches_decoupled_prototypes():
    protos = Decoupled(8, 4)
    h = torch.randn(16, 4, requires_grad=True)
    protos.step(h, 0)
    protos.logits(h).sum().backward()
    assert h.grad is not None and not any(b.requires_grad for b in protos.buffers())


def test_kp_adds_a_tenth_of_koleo():
    protos = KP(8, 4)
    assert float(protos.penalty()) == pytest.approx(0.1 * float(losses.koleo(protos.weight)))
    assert float(Joint(8, 4).penalty()) == 0


def test_decoupled_waits_queues_and_starts_on_the_last_K_features():
    gen = torch.Generator().manual_seed(0)
    protos = Decoupled(12, 4, gmm=OnlineGMM(12, 4, resurrect=None), begin=5)
    seen = []
    for step in range(5):
        seen.append(torch.randn(5, 4, generator=gen))
        assert protos.step(seen[-1], step) == {} and not protos.started
        assert torch.equal(protos.vectors(), Frozen(12, 4).vectors())  # until then random directions serve
    seen.append(torch.randn(5, 4, generator=gen))
    report = protos.step(seen[-1], 5)
    last = torch.cat(seen)[-12:]
    assert protos.started and report["eta"] == pytest.approx(0.89)
    assert torch.allclose(torch.sort(protos.start[:, 0]).values, torch.sort(last[:, 0]).values)
    assert not torch.equal(protos.vectors(), protos.start)  # and the first batch already counts


def test_vectors_that_are_not_finite_do_not_enter_the_queue():
    protos, h = Decoupled(6, 4, begin=1), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    bad = h.clone()
    bad[2:] = float("nan")
    protos.step(bad, 0)
    assert protos.queued == 2
    protos.step(torch.full((8, 4), float("inf")), 1)
    assert protos.started and torch.isfinite(protos.vectors()).all()


def test_decoupled_raw_means_keep_their_norm_in_the_logits():
    protos, h = Decoupled(6, 4, unit=False), 3 * torch.randn(8, 4)
    protos.step(h, 0)
    assert torch.allclose(protos.logits(h), h @ protos.gmm.mu.T, atol=1e-5)


def test_decoupled_state_goes_on_before_and_after_the_start():
    batches = [torch.randn(5, 4, generator=torch.Generator().manual_seed(s)) for s in range(8)]
    for cut in (2, 6):
        a, b = (Decoupled(12, 4, gmm=OnlineGMM(12, 4), begin=4) for _ in range(2))
        for s in range(cut):
            a.step(batches[s], s)
        b.load_state_dict(a.state_dict())
        for s in range(cut, 8):
            a.step(batches[s], s)
            b.step(batches[s], s)
        assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers())) and a.started and b.started


# ---- DINO for the loop -----------------------------------------------------------------------------------------------
def test_centre_serves_before_it_moves_and_follows_the_mean_of_raw_logits():
    """Three steps by hand in float64: softmax((z - c) / tau), then c <- .9 c + .1 mean(z)."""
    loss, protos = methods.DINOLoss(12, 10, temps=(0.04, 0.04)), Frozen(12, 6)
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
    loss, protos = methods.DINOLoss(8, 10, "prob", temps=(0.1, 0.1)), VMF(8, 6, tau=0.1)
    h = F.normalize(torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    for step in range(200):
        loss.targets(h, protos, step)
    z = protos.logits(h).double() / 0.1 + heads.vmf_log_normalizer(torch.full((8,), 10., dtype=torch.float64), 6)
    mean = z.softmax(-1).mean((0, 1))
    assert torch.allclose(loss.centre.double(), mean.log(), atol=1e-4)
    assert torch.allclose(loss.targets(h, protos, 0).double(), (z - mean.log()).softmax(-1), atol=1e-4)


def test_sinkhorn_targets_take_both_views_together():
    loss, protos = methods.DINOLoss(8, 10, "sinkhorn", temps=(0.05, 0.05)), Frozen(8, 6)
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
    loss = methods.DINOLoss(4, 10, temps=(0.04, 0.07), temp_epochs=epochs)
    assert [loss.temperature(10 * e + 3) for e in range(5)] == pytest.approx(expected)
    assert [loss.temperature(10 * e) for e in range(5)] == pytest.approx(expected)


def test_dino_loss_for_the_loop_matches_its_parts():
    loss, protos = methods.DINOLoss(12, 10, tau_s=0.2), VMF(12, 6, tau=0.2)
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


# ---- von Mises-Fisher ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim, atol", [(8, 1e-3), (32, 1e-5), (128, 2e-7), (256, 2e-8)])
def test_vmf_normalizer_against_the_series_of_the_bessel_function(dim, atol):
    """log I_nu by its power series in exact log-space float64: sum_m (k/2)^(2m + nu) / (m! Gamma(m + nu + 1))."""
    nu = dim / 2 - 1
    for kappa in (0.01, 0.5, 5., 10., 25., 50., 200.):
        m = torch.arange(2000, dtype=torch.float64)
        log_i = torch.logsumexp((2 * m + nu) * math.log(kappa / 2) - torch.lgamma(m + 1) - torch.lgamma(m + nu + 1), 0)
        exact = nu * math.log(kappa) - dim / 2 * math.log(2 * math.pi) - float(log_i)
        assert float(heads.vmf_log_normalizer(torch.tensor(kappa, dtype=torch.float64), dim)) == pytest.approx(exact, abs=atol)


def test_vmf_normalizer_at_zero_is_the_area_of_the_sphere_and_its_slope_a_ratio_of_bessel_functions():
    area = math.log(2) + 128 * math.log(math.pi) - math.lgamma(128)  # S^255
    assert float(heads.vmf_log_normalizer(torch.tensor(0., dtype=torch.float64), 256)) == pytest.approx(-area, abs=1e-6)
    k = torch.tensor([1., 10., 50.], dtype=torch.float64, requires_grad=True)
    heads.vmf_log_normalizer(k, 64).sum().backward()
    m = torch.arange(500, dtype=torch.float64)[:, None]

    def log_i(nu):
        return torch.logsumexp((2 * m + nu) * (k.detach() / 2).log() - torch.lgamma(m + 1) - torch.lgamma(m + nu + 1), 0)
    assert torch.allclose(k.grad, -(log_i(32) - log_i(31)).exp(), atol=1e-5)  # d log C / d kappa = -I_{nu+1} / I_nu
    with pytest.raises(ValueError, match="at least 3 dimensions, got 2"):
        heads.vmf_log_normalizer(torch.ones(1), 2)


def test_gains_scale_logits_and_count_for_nothing_in_a_unique_count():
    protos, h = Joint(6, 4, gain=True), torch.randn(5, 4)
    with torch.no_grad():
        protos.gain.copy_(torch.arange(1., 7.)[:, None])
    C = F.normalize(protos.weight, dim=1)
    assert torch.allclose(protos.logits(h), h @ C.T * torch.arange(1., 7.), atol=1e-5)
    assert torch.allclose(protos.vectors().norm(dim=1), torch.ones(6)) and protos.twin().gain.requires_grad is False
