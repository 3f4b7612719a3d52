"""heads.py: the projection head, and prototype sets against float64 and cases worked by hand."""
import inspect
import math
import os
import re
import sys

import pytest
import torch
from torch.nn import functional as F

import config
import forked
import heads
import losses
from fast.gmm import FastGMM
from gmm import OnlineGMM
from heads import KP, VMF, Decoupled, Frozen, Head, Joint
from support import ddp
from zoo.live import Live


def KoLeoJoint(K, D, scale=1.0, seed=0):
    return Joint(K, D, scale, seed, kp=0.1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def vectors(N=8, D=4, seed=0):
    """Teacher vectors h (N, D)."""
    return torch.randn(N, D, generator=generator(seed))


# ---- projection head ---------------------------------------------------------------------------
@pytest.mark.parametrize("bn, norm", [(False, False), (True, False), (False, True)])
def test_the_shape_and_length_of_what_the_head_gives(bn, norm):
    head = Head(6, 16, 4, bn, norm)
    h = head(torch.randn(10, 6))
    assert h.shape == (10, 4)
    assert h.dtype == torch.float32
    assert torch.allclose(h.norm(dim=1), torch.ones(10)) == norm
    batch_norms = [m for m in head.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert len(batch_norms) == (2 if bn else 0)


# ---- what all sets share -----------------------------------------------------------------------
@pytest.mark.parametrize("kind", [Frozen, Joint, KoLeoJoint, Decoupled])
def test_logits_are_scaled_cosines_times_the_length_of_h(kind):
    protos, h = kind(20, 6, 2.5), 3 * vectors(4, 6)
    C = F.normalize(protos.vectors().double(), dim=1)
    z = 2.5 * (h.double() @ C.T)  # (4, K)
    assert torch.allclose(protos.logits(h).double(), z, atol=1e-5)
    ks = torch.tensor([3, 17, 5])
    some = protos.logits(h.view(2, 2, 6), ks)  # (2, 2, 3)
    assert torch.allclose(some.double(), z[:, ks].view(2, 2, 3), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(protos.logits(h).double(), z, atol=1e-5)


@pytest.mark.parametrize("kind", [Frozen, Joint, KoLeoJoint, Decoupled])
def test_assignments_are_a_softmax_of_what_the_loss_sees(kind):
    protos, h, centre = kind(20, 6, 2.5), vectors(4, 6), torch.linspace(-1, 1, 20)
    z = protos.logits(h).detach().double()
    assert torch.allclose(protos.assign(h).double(), z.softmax(-1), atol=1e-6)
    expected = (z / 0.3 - centre).softmax(-1)
    assert torch.allclose(protos.assign(h, tau=0.3, centre=centre).double(), expected, atol=1e-6)


def test_assignments_of_vmf_prototypes_know_their_bias():
    protos, h = VMF(20, 6), vectors(4, 6)
    with torch.no_grad():
        protos.gain.copy_(torch.linspace(0.1, 3, 20)[:, None])
        assert protos.bias(0.3).std() > 0.1
        expected = (protos.logits(h) / 0.3 + protos.bias(0.3)).softmax(-1)
        assert torch.allclose(protos.assign(h, tau=0.3), expected, atol=1e-6)


def test_all_sets_start_from_the_same_directions():
    frozen = Frozen(20, 6, seed=7).vectors()
    for kind in (Joint, KoLeoJoint, VMF, Decoupled):
        assert torch.allclose(kind(20, 6, seed=7).vectors(), frozen)
    assert not torch.allclose(Frozen(20, 6, seed=8).vectors(), frozen)


def test_frozen_prototypes_never_move():
    protos = Frozen(8, 4)
    before = protos.vectors().clone()
    assert protos.step(vectors(), 0) == {}
    assert torch.equal(protos.vectors(), before)
    assert not list(protos.parameters())


def test_a_set_with_logits_of_its_own_says_so():
    class Own(Joint):
        def logits(self, h, ks=None):
            return -super().logits(h, ks)

    class Child(Own):
        pass

    for kind in (Frozen, Joint, VMF, Decoupled):
        assert kind(8, 4).logits_are_products()
        assert kind(8, 4, scale=torch.tensor(2.0)).logits_are_products()
    assert not Own(8, 4).logits_are_products()
    assert not Child(8, 4).logits_are_products()
    learned = torch.nn.Parameter(torch.tensor(2.0))
    assert not Frozen(8, 4, scale=learned).logits_are_products()


# ---- sets with a gradient ----------------------------------------------------------------------
def test_the_twin_of_a_trained_set_is_a_copy_without_gradient():
    joint = Joint(8, 4)
    twin = joint.twin()
    assert torch.equal(twin.weight, joint.weight)
    assert twin.weight.data_ptr() != joint.weight.data_ptr()
    assert joint.weight.requires_grad
    assert not twin.weight.requires_grad


@pytest.mark.parametrize("kind", [Frozen, Decoupled])
def test_student_and_teacher_share_a_set_that_is_not_trained(kind):
    protos = kind(8, 4)
    assert protos.twin() is protos
    assert not list(protos.parameters())


def test_the_penalty_is_the_weighed_koleo():
    protos = KoLeoJoint(8, 4)
    assert protos.penalty().item() == pytest.approx(0.1 * losses.koleo(protos.weight).item())
    assert float(Joint(8, 4).penalty()) == 0


def test_gains_scale_logits_and_are_no_part_of_the_vectors_that_are_counted():
    protos, h, gains = Joint(6, 4, gain=True), vectors(5), torch.arange(1., 7.)
    with torch.no_grad():
        protos.gain.copy_(gains[:, None])
    C = F.normalize(protos.weight, dim=1)
    assert torch.allclose(protos.logits(h), h @ C.T * gains, atol=1e-5)
    assert torch.allclose(protos.vectors().norm(dim=1), torch.ones(6))
    assert not protos.twin().gain.requires_grad


# ---- von Mises-Fisher --------------------------------------------------------------------------
def log_bessel(nu, kappa):
    """log I_nu(k), float64, by its power series: sum_m (k/2)^(2m + nu) / (m! Gamma(m + nu + 1))."""
    m = torch.arange(2000, dtype=torch.float64).view(-1, *[1] * kappa.dim())
    log_terms = (2 * m + nu) * (kappa / 2).log() - torch.lgamma(m + 1) - torch.lgamma(m + nu + 1)
    return log_terms.logsumexp(0)


@pytest.mark.parametrize("dim, atol", [(8, 1e-3), (32, 1e-5), (128, 2e-7), (256, 2e-8)])
def test_the_log_normaliser_against_the_series_of_the_bessel_function(dim, atol):
    nu = dim / 2 - 1
    kappa = torch.tensor([0.01, 0.5, 5., 10., 25., 50., 200.], dtype=torch.float64)
    exact = nu * kappa.log() - dim / 2 * math.log(2 * math.pi) - log_bessel(nu, kappa)
    assert torch.allclose(heads.vmf_log_normalizer(kappa, dim), exact, rtol=0, atol=atol)


def test_the_log_normaliser_at_zero_is_one_over_the_area_of_the_sphere():
    area = math.log(2) + 128 * math.log(math.pi) - math.lgamma(128)  # log, of S^255
    at_0 = heads.vmf_log_normalizer(torch.zeros((), dtype=torch.float64), 256)
    assert float(at_0) == pytest.approx(-area, abs=1e-6)


def test_the_slope_of_the_log_normaliser_is_a_ratio_of_bessel_functions():
    """d log C / d kappa = -I_{nu+1} / I_nu, and nu = 31 in 64 dimensions."""
    kappa = torch.tensor([1., 10., 50.], dtype=torch.float64, requires_grad=True)
    heads.vmf_log_normalizer(kappa, 64).sum().backward()
    k = kappa.detach()
    slope = -(log_bessel(32, k) - log_bessel(31, k)).exp()
    assert torch.allclose(kappa.grad, slope, atol=1e-5)


def test_the_log_normaliser_needs_three_dimensions():
    with pytest.raises(ValueError, match="at least 3 dimensions, got 2"):
        heads.vmf_log_normalizer(torch.ones(1), 2)


# ---- decoupled sets ----------------------------------------------------------------------------
def decoupled(K=12, D=4, begin=0, **options):
    gmm = OnlineGMM(K, D, resurrect=None)
    return Decoupled(K, D, gmm=gmm, begin=begin, **options)


def test_no_gradient_reaches_decoupled_prototypes():
    protos, h = decoupled(8), vectors(16).requires_grad_()
    protos.step(h, 0)
    protos.logits(h).sum().backward()
    assert h.grad is not None
    assert not any(b.requires_grad for b in protos.buffers())


def test_random_directions_serve_until_the_start_which_takes_the_last_K_vectors():
    protos, hs = decoupled(K=12, begin=5), [vectors(5, seed=seed) for seed in range(6)]
    for step in range(5):
        assert protos.step(hs[step], step) == {}
        assert not protos.started
        assert torch.equal(protos.vectors(), Frozen(12, 4).vectors())
    report = protos.step(hs[5], 5)
    assert protos.started
    assert report.keys() == {"eta", "pi_max", "mixture_used", "resurrected"}
    assert report["eta"] == pytest.approx(0.89)  # A.7 counts from the start
    last = torch.cat(hs)[-12:]
    assert torch.allclose(protos.start[:, 0].sort().values, last[:, 0].sort().values)
    # the first batch is taken in already
    assert not torch.equal(protos.vectors(), protos.start)


def test_a_step_is_an_update_of_the_mixture():
    """At beta, and at the forgetting factor of A.7, which counts steps from the start."""
    protos = decoupled(begin=2, a=0.5, c=0.6)
    for step in range(4):
        protos.step(vectors(16, seed=step), step)
    gmm = OnlineGMM(12, 4, resurrect=None)
    gmm.load_state_dict(protos.gmm.state_dict())
    protos.step(vectors(16, seed=4), 4, beta=0.3)
    eta = 0.99 - 1 / (0.5 * 2 + 1 / (0.99 - 0.6))  # t = 4 - 2
    gmm.update(vectors(16, seed=4), 0.3, eta)
    assert torch.allclose(protos.vectors(), gmm.mu)
    h = vectors(20, seed=5)
    assert torch.allclose(protos.assign(h, 0.3, tau=9.0), gmm.responsibilities(h, 0.3))


def test_vectors_that_are_not_finite_are_not_collected_for_the_start():
    protos, h = decoupled(K=6, begin=1), vectors(8)
    h[2:] = float("nan")
    protos.step(h, 0)
    assert protos.collected == 2
    protos.step(torch.full((8, 4), float("inf")), 1)
    assert protos.started
    assert torch.isfinite(protos.vectors()).all()


def test_of_a_step_with_more_vectors_than_prototypes_random_ones_are_collected():
    """The rows of a step are ordered by view and image: the last ones would be of few images."""
    h = torch.arange(1000.)[:, None].expand(-1, 4)  # (1000, 4); a row says where it stood
    drawn = []
    for begin in (5, 6):
        protos = decoupled(K=100, begin=begin)
        protos.collect(h, begin - 1)
        drawn.append(protos.memory()[:, 0])
        assert drawn[-1].unique().numel() == 100 == protos.collected
        assert 400 < drawn[-1].mean() < 600  # of the last 100 it is 949.5
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("unit", [True, False])
def test_means_enter_the_logits_at_length_one_or_raw(unit):
    protos, h = decoupled(unit=unit), 3 * vectors(20)
    protos.step(h, 0)
    C = protos.gmm.mu.double()
    assert (C.norm(dim=1) - 1).abs().max() > 0.5
    C = F.normalize(C, dim=1) if unit else C
    assert torch.allclose(protos.logits(h).double(), h.double() @ C.T, atol=1e-4)


@pytest.mark.parametrize("unit", [True, False])
def test_directions_of_components_with_almost_no_mass(unit):
    """A starved component keeps its mean: S shrinks as a whole, and mu is a ratio of its parts."""
    protos = decoupled(unit=unit)
    protos.step(3 * vectors(20), 0)
    before = protos.directions()
    for S in (protos.gmm.S_pi, protos.gmm.S_mu, protos.gmm.S_sig):
        S[3:] *= 1e-30
    assert torch.allclose(protos.directions(), before, atol=1e-6)
    assert torch.allclose(before.norm(dim=1), torch.ones(12)) == unit


@pytest.mark.parametrize("saved_at", [2, 6])
def test_state_goes_on_before_and_after_the_start(saved_at):
    """A set that is saved and loaded ends where a set that goes through ends; the start is at 4."""
    through, resumed = decoupled(begin=4), decoupled(begin=4)
    for step in range(8):
        if step == saved_at:
            assert through.started == (saved_at > 4)
            resumed.load_state_dict(through.state_dict())
        through.step(vectors(5, seed=step), step)
        if step >= saved_at:
            resumed.step(vectors(5, seed=step), step)
    assert through.started and resumed.started
    for a, b in zip(through.buffers(), resumed.buffers(), strict=True):
        assert torch.equal(a, b)


def test_vectors_of_two_processes_come_in_the_order_of_one(monkeypatch):
    """The start takes the last K vectors, so the order counts. Each process has half the images."""
    h = torch.randn(2, 6, 4, generator=generator())  # two views of six images
    one = ddp.gather_views(h)
    halves = [h[:, :3], h[:, 3:]]
    monkeypatch.setattr(ddp, "WORLD", 2)
    monkeypatch.setattr(ddp, "all_gather", lambda x: torch.cat(halves))
    for half in halves:
        assert torch.equal(ddp.gather_views(half), one)
    assert torch.equal(one, torch.cat([h[0], h[1]]))


# ---- the table ---------------------------------------------------------------------------------
def arguments(flags):
    return config.parse(["--device", "cpu", *flags.split()], "train.py")


@pytest.mark.parametrize("flags, kind", [
    ("--prototypes joint", Joint),
    ("--prototypes kp", KP),
    ("--prototypes vmf --method dino", VMF),
    ("--prototypes frozen", Frozen),
    ("--prototypes decoupled", Decoupled),
    ("--prototypes live", Live)])
def test_the_set_that_the_flags_name(flags, kind):
    args = arguments(f"{flags} --num-prototypes 256 --bottleneck-dim 8 --logit-scale 3 --seed 5")
    protos = heads.prototypes(args, begin=7)
    assert type(protos) is kind
    assert protos.scale == 3
    assert torch.allclose(protos.vectors(), Frozen(256, 8, seed=5).vectors())
    assert getattr(protos, "begin", 7) == 7


@pytest.mark.parametrize("flags, kp, gain", [
    ("--prototypes joint", 0.0, False),
    ("--prototypes kp", 0.1, False),
    ("--prototypes kp --kp-weight 0.3", 0.3, False),
    ("--prototypes joint --no-norm-last-layer", 0.0, True)])
def test_the_flags_of_trained_sets(flags, kp, gain):
    protos = heads.prototypes(arguments(flags))
    assert protos.kp == kp
    assert (protos.gain is not None) == gain


def test_the_flags_of_the_mixture():
    off = arguments("--prototypes decoupled --resurrect 0")
    assert heads.prototypes(off).gmm.resurrect is None
    args = arguments("--prototypes decoupled --num-prototypes 256 --forgetting plain "
                     "--resurrect 0.2 --no-rescale --var-floor 0.01 --gmm-init random "
                     "--proto-norm raw --eta-a 0.5 --eta-c 0.6 --seed 5")
    protos = heads.prototypes(args)
    gmm = protos.gmm
    assert (gmm.forgetting, gmm.resurrect, gmm.rescale) == ("plain", 0.2, False)
    assert (gmm.var_floor, gmm.seed) == (0.01, 5)
    assert (protos.init, protos.unit, protos.a, protos.c) == ("random", False, 0.5, 0.6)


def test_the_flags_of_live():
    args = arguments("--prototypes live --live-eta 0.8 --live-patience 3 --live-apart 0.1 --seed 5")
    gmm = heads.prototypes(args).gmm
    assert (gmm.eta, gmm.patience, gmm.apart, gmm.seed) == (0.8, 3, 0.1, 5)


@pytest.mark.parametrize("forgetting", ["responsibility", "sample"])
@pytest.mark.parametrize("batch_size, fast", [(2 ** 15, False), (2 ** 15 + 1, True)])
def test_the_number_of_responsibilities_chooses_the_mixture(batch_size, fast, forgetting, capsys,
                                                            monkeypatch):
    """K is 2^10, so 2 batch_size K is 2^26, which is still plain, or more; no vector is needed.

    Where gmm.py is not what runs, a printed line says so."""
    monkeypatch.setattr(heads.ddp, "printed", set())
    args = arguments(f"--prototypes decoupled --num-prototypes 1024 --bottleneck-dim 4 "
                     f"--batch-size {batch_size} --forgetting {forgetting}")
    gmm = heads.prototypes(args).gmm
    assert isinstance(gmm, OnlineGMM)
    assert isinstance(gmm, FastGMM) == fast
    assert ("that of fast/gmm.py" in capsys.readouterr().out) == fast
    if forgetting == "responsibility":
        assert type(gmm) in (OnlineGMM, FastGMM)
        assert gmm.forgetting == "responsibility"


def test_a_mixture_of_ones_own_runs_at_any_size(monkeypatch):
    class Mine(OnlineGMM):
        pass

    class Other(Decoupled):
        Mixture = Mine
    monkeypatch.setitem(heads.PROTOTYPES, "mine", Other)
    for batch_size in (2, 2 ** 17):
        args = arguments(f"--prototypes mine --num-prototypes 1024 --bottleneck-dim 4 "
                         f"--batch-size {batch_size}")
        assert type(heads.prototypes(args).gmm) is Mine
    assert type(Other(8, 4).gmm) is Mine


@pytest.mark.parametrize("batch_size", [2 ** 17, 2 ** 17 + 1])
def test_the_rule_of_samples_runs_in_both_mixtures(batch_size):
    """S_pi <- eta^T S_pi + (1 - eta^T) / (1 - eta), with T = sum_i gamma_ik; K is 2^8."""
    args = arguments(f"--prototypes decoupled --num-prototypes 256 --bottleneck-dim 4 "
                     f"--resurrect 0 --batch-size {batch_size} --forgetting sample")
    gmm = heads.prototypes(args).gmm
    assert isinstance(gmm, FastGMM) == (batch_size > 2 ** 17)
    gmm.init_from(vectors(300))
    assert torch.equal(gmm.S_pi, torch.ones(256, dtype=torch.float64))
    for seed in range(3):
        h = vectors(40, seed=seed)
        T = gmm.responsibilities(h, 0.5).double().sum(0)  # (K,)
        expected = 0.9 ** T * gmm.S_pi + (1 - 0.9 ** T) / (1 - 0.9)
        of_A3 = gmm.S_pi + (1 - 0.9 ** (T / 40)) * (T - gmm.S_pi)
        gmm.update(h, 0.5, 0.9)
        assert torch.allclose(gmm.S_pi, expected, rtol=1e-4)
        assert (expected - of_A3).abs().max() > 0.1


@pytest.mark.parametrize("table, class_of_name, names", [
    (config.READ_BY_METHODS, losses.loss_class, list(losses.LOSSES)),
    (config.READ_BY_PROTOTYPES, heads.prototype_class, list(heads.PROTOTYPES))])
def test_the_lists_of_what_is_read_are_what_the_classes_read(table, class_of_name, names):
    """What a class reads of the flags stands in its from_args; of the loop it has beta, and the
    optimiser knows of --freeze-prototypes."""
    flags = {flag for words in table.values() for flag in words.split()}
    assert sorted(table) == sorted(names)
    for name, words in table.items():
        read = set(re.findall(r"args\.(\w+)", inspect.getsource(class_of_name(name).from_args)))
        of_the_loop = {"beta", "freeze_prototypes"} & set(words.split())
        assert (read & flags) | of_the_loop == set(words.split()), name


def test_a_set_of_a_fork_may_read_any_flag(monkeypatch):
    monkeypatch.setitem(heads.PROTOTYPES, "mine", Frozen)
    args = arguments("--prototypes mine --beta 1 1 --live-eta 0.5 --kp-weight 1")
    assert args.beta == [1.0, 1.0]


@pytest.mark.parametrize("parent, found", [
    (Joint, ("center", 0.0, 0.0)), (KP, ("center", 0.1, 0.0)), (VMF, ("prob", 0.0, 0.0)),
    (Frozen, ("center", 0.0, 0.0)), (Live, ("center", 0.0, 0.5))])
def test_a_set_of_a_fork_has_the_defaults_of_its_parent(monkeypatch, parent, found):
    monkeypatch.setitem(heads.PROTOTYPES, "mine", type("Mine", (parent,), {}))
    args = arguments("--method dino --prototypes mine")
    assert (args.targets, args.kp_weight, args.gmm_start) == found


def test_a_joint_student_needs_a_teachers_set_without_parameters(monkeypatch):
    class Own(Frozen):
        def __init__(self, K, D, scale=1.0, seed=0):
            super().__init__(K, D, scale, seed)
            self.length = torch.nn.Parameter(torch.ones(()))
    monkeypatch.setitem(heads.PROTOTYPES, "mine", Own)
    args = arguments("--prototypes mine --student-prototypes joint")
    with pytest.raises(ValueError, match="beside prototypes without parameters.*prototypes mine"):
        heads.student_and_teacher(args)


def test_what_the_table_names_by_a_string_is_loaded_when_asked_for():
    """In a process of its own: importing heads does not load zoo/live.py, and asking does."""
    code = """
import sys
import config
import heads
flags = "--num-prototypes 256 --bottleneck-dim 4 --device cpu --prototypes "
config.parse((flags + "frozen").split(), "train.py")
assert isinstance(heads.PROTOTYPES["live"], str)
print("zoo.live" in sys.modules)
args = config.parse((flags + "live").split(), "train.py")
protos = heads.prototypes(args)
print("zoo.live" in sys.modules, type(protos).__name__)
"""
    root = os.path.dirname(os.path.abspath(heads.__file__))
    result = forked.run([sys.executable, "-c", code], cwd=root, capture_output=True)
    assert result.stdout.split() == ["False", "True", "Live"], result.stderr


def test_a_file_of_ones_own_is_one_entry_of_the_table(tmp_path, monkeypatch):
    (tmp_path / "my_prototypes.py").write_text(
        "from heads import Frozen\n\n\n"
        "class Negative(Frozen):\n"
        "    def vectors(self):\n"
        "        return -self.start\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(heads.PROTOTYPES, "negative", "my_prototypes.Negative")
    protos = heads.prototypes(arguments("--prototypes negative --num-prototypes 256"))
    assert type(protos).__name__ == "Negative"
    assert torch.equal(protos.directions(), -Frozen(256, 128).directions())


def test_a_component_starts_with_its_share_of_all_vectors_of_a_step():
    """A.4: JB / K samples, also where a step has more vectors than the K that are collected."""
    protos = Decoupled(6, 4, gmm=OnlineGMM(6, 4, resurrect=None))
    protos.collect(vectors(20), 0)
    assert protos.gmm.S_pi.tolist() == pytest.approx([20 / 6] * 6)


def test_the_concentration_of_vmf_is_the_factor_of_the_cosine_in_its_softmax():
    """Of exp(kappa <m, y>) the log-normaliser has the same kappa as the logit, --logit-scale
    included."""
    protos = VMF(20, 6, scale=2.5)
    with torch.no_grad():
        protos.gain.copy_(torch.linspace(0.1, 3, 20)[:, None])
        kappa = protos.logits(protos.vectors()).diagonal() / 0.3  # where the cosine is 1
        assert torch.allclose(protos.bias(0.3), heads.vmf_log_normalizer(kappa, 6), atol=1e-5)


def test_the_head_starts_as_dinos():
    for layer in Head(200, 300, 100).mlp[::2]:
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()


def test_trained_prototypes_start_short_as_a_linear_layer_does():
    """AdamW's steps have a fixed size: longer vectors would hardly turn."""
    weight = Joint(500, 64).weight.detach()
    assert float(weight.abs().max()) == pytest.approx(1 / 8, rel=0.01)
    assert float(weight.std()) == pytest.approx(1 / 8 / math.sqrt(3), rel=0.02)
