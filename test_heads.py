"""heads.py and losses.py against double loops in float64, hand-worked cases, and what must never get a gradient."""
import math

import pytest
import torch
from torch.nn import functional as F

import losses
from gmm import OnlineGMM
from heads import KP, Decoupled, Frozen, Head, Joint


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
    q = losses.sinkhorn(torch.log(torch.tensor([[1., 2.], [3., 2.]])), 1.0, iters=1)     # columns 1/4 3/4 1/2 1/2, then rows
    assert torch.allclose(q, torch.tensor([[1 / 3, 2 / 3], [0.6, 0.4]]))
    assert torch.isfinite(losses.sinkhorn(1000 * z, 0.025)).all()


def test_koleo_matches_cdist_in_value_and_gradient():
    C = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    value = losses.koleo(C, block=77)                                                  # several blocks of rows
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
        assert torch.equal(protos.vectors(), Frozen(12, 4).vectors())              # until then random directions serve
    seen.append(torch.randn(5, 4, generator=gen))
    report = protos.step(seen[-1], 5)
    last = torch.cat(seen)[-12:]
    assert protos.started and report["eta"] == pytest.approx(0.89)
    assert torch.allclose(torch.sort(protos.start[:, 0]).values, torch.sort(last[:, 0]).values)
    assert not torch.equal(protos.vectors(), protos.start)                         # and the first batch already counts


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
