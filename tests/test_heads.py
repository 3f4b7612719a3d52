"""heads.py: prototype sets against float64, hand-worked cases, and what must never get a gradient."""
import math

import pytest
import torch
from torch.nn import functional as F

import heads
import losses
from gmm import OnlineGMM
from heads import VMF, Decoupled, Frozen, Head, Joint


def KP(*a, **k):
    return Joint(*a, **k, kp=0.1)


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
