"""Projection head and prototype sets.

A prototype set holds K vectors of D dimensions and answers six questions; the training loop asks nothing else:

    logits(h)      h (..., D) -> z (..., K)                                                          Eq. 1, z = h C
    step(h, ...)   take in the teacher vectors of a step; moves the prototypes if they are decoupled             Eq. 3
    bias(tau)      what joins z / tau in a softmax: the log-normaliser of von Mises-Fisher prototypes, or 0
    penalty()      a term of the loss that is about the prototypes alone (KoLeo), or 0
    vectors()      (K, D), what a count of unique prototypes counts                                           Def. 2.1
    assign(h)      h (N, D) -> (N, K), how much each prototype answers for each vector

The student and the teacher hold the same set unless it is trained by gradient: then `twin()` gives the teacher a copy
that follows by moving average. All sets start from the same random directions for the same seed.
"""
import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from gmm import OnlineGMM, eta_at
from zoo.live import LiveMixture
from losses import koleo


class Head(nn.Module):
    """3-layer MLP (DINO, CARP): in_dim -> hidden -> hidden -> out_dim, GELU, batch norm and unit length optional.

    forward: (N, in_dim) -> h (N, out_dim), float32.
    """

    def __init__(self, in_dim, hidden=2048, out_dim=256, bn=False, norm=False):
        super().__init__()
        layers = []
        for i, o in ((in_dim, hidden), (hidden, hidden)):
            layers += [nn.Linear(i, o)] + [nn.BatchNorm1d(o)] * bn + [nn.GELU()]
        self.mlp, self.norm = nn.Sequential(*layers, nn.Linear(hidden, out_dim)), norm
        for m in self.mlp:
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, x):
        h = self.mlp(x).float()  # no bf16 in products with prototypes or their softmax
        return F.normalize(h, dim=-1) if self.norm else h


class Frozen(nn.Module):
    """Random unit directions that never move: the control every other set has to beat. Base class of the others."""

    def __init__(self, K, D, scale=1.0, seed=0, tau=1.0):
        super().__init__()
        # for assign(): temperature of the student's softmax, and what DINO's centre takes off logits / tau
        self.scale, self.tau, self.offset = scale, tau, 0.0
        # uniform and short, as nn.Linear starts: only the direction counts in the logits, but AdamW's steps have a
        # fixed size, so that long vectors would hardly turn and hide the collapse
        C = torch.empty(K, D).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed)).mul_(D ** -0.5)  # (K, D)
        self.make(C)
        self.register_buffer("start", C.div_(C.norm(dim=1, keepdim=True)))  # (K, D), drift is measured from here

    def make(self, C):
        """Take a copy of C (K, D), if need be, before it is brought to length one."""

    def raw(self):
        """(C (K, D), unit): directions() as they are kept, and whether they still have to be brought to length one: a
        loss over blocks of prototypes does that to a block at a time."""
        return self.start, False

    def directions(self):
        """(K, D), the rows that h is multiplied with."""
        C, unit = self.raw()
        return F.normalize(C, dim=1) if unit else C

    def centred(self, h):
        """What of h (..., D) is multiplied with the directions: all of it."""
        return h.float()

    def logits(self, h, ks=None):
        """h (..., D) -> (..., K), or (..., len(ks)) for some of the prototypes; float32 also under autocast."""
        with torch.autocast(h.device.type, enabled=False):
            C = self.directions()
            return self.scale * (self.centred(h) @ (C if ks is None else C[ks]).T)

    def bias(self, tau):
        """What comes on top of logits / tau inside a softmax: (K,), or 0."""
        return 0.0

    def step(self, h, step=0, beta=None):
        return {}

    def penalty(self):
        return self.start.new_zeros(())

    def vectors(self):
        return self.start

    def assign(self, h, beta=None):
        return (self.logits(h) / self.tau + self.bias(self.tau) - self.offset).softmax(-1)

    def twin(self):
        return self


class Joint(Frozen):
    """Prototypes trained by the encoder's loss (Eq. 2), weight-normalised at length one as DINO's and CARP's are.

    kp      weight of KoLeo, which pushes them apart: KoLeo-Proto (Govindarajan et al. 2024), 0.1 in B.1
    gain    let their lengths be trained too (--no-norm-last-layer of DINO's official code)
    """

    def __init__(self, K, D, scale=1.0, seed=0, tau=1.0, *, kp=0.0, gain=False):
        self.kp, self.with_gain = kp, gain
        super().__init__(K, D, scale, seed, tau)

    def make(self, C):
        self.weight = nn.Parameter(C.clone())  # (K, D)
        if self.with_gain:
            self.gain = nn.Parameter(torch.ones(len(C), 1))  # (K, 1)

    def raw(self):
        return (self.gain * F.normalize(self.weight, dim=1), False) if self.with_gain else (self.weight, True)

    def penalty(self):
        return self.kp * koleo(self.weight) if self.kp else super().penalty()

    def vectors(self):
        return F.normalize(self.weight.detach(), dim=1)

    def twin(self):
        twin = copy.deepcopy(self).requires_grad_(False)
        twin.start = self.start
        return twin


class VMF(Joint):
    """DINO-vMF (Govindarajan et al. 2023): a prototype w_k is a von Mises-Fisher density on the sphere, of direction
    w_k / |w_k| and concentration |w_k| / tau; its log-normaliser joins the logit, so that lengths can be trained."""

    def __init__(self, K, D, scale=1.0, seed=0, tau=1.0, *, kp=0.0):
        super().__init__(K, D, scale, seed, tau, kp=kp, gain=True)

    def bias(self, tau):
        # differs: scale is ours; <h, scale w> / tau makes scale |w| / tau the concentration
        kappa = self.scale * self.gain.abs().squeeze(1) / tau  # (K,)
        return vmf_log_normalizer(kappa, self.weight.shape[1])


def vmf_log_normalizer(kappa, dim):
    """log C_dim(kappa) of the von Mises-Fisher density C exp(kappa <m, y>) on the unit sphere of `dim` >= 3 dimensions.

    kappa >= 0, any shape -> the same shape and dtype, differentiable; computed in float64. With nu = dim / 2 - 1,
    C = kappa^nu / ((2 pi)^(dim/2) I_nu(kappa)). For large orders I_nu has a uniform expansion in 1 / nu (Debye), in
    which the two nu log kappa cancel: nothing is singular at 0. Against exact values the error stays below 1e-6 from
    dim = 64 on, 5e-6 at 32, 1e-3 at 8. Raises ValueError below dim 3.
    """
    if dim < 3:
        raise ValueError(f"vmf_log_normalizer needs at least 3 dimensions, got {dim}")
    nu, k = dim / 2 - 1, kappa.double()
    s = (nu * nu + k * k).sqrt()
    # log I_nu(k) = s + nu log(k / (nu + s)) - log(2 pi s) / 2 + log(1 + u1(t) / nu + u2(t) / nu^2 + ...),  t = nu / s
    u1 = (3 / s - 5 * nu ** 2 / s ** 3) / 24
    u2 = (81 / s ** 2 - 462 * nu ** 2 / s ** 4 + 385 * nu ** 4 / s ** 6) / 1152
    log_c = nu * (nu + s).log() - s + 0.5 * s.log() - torch.log1p(u1 + u2) - (dim - 1) / 2 * math.log(2 * math.pi)
    return log_c.to(kappa.dtype)


class Decoupled(Frozen):
    """Means of an online Gaussian mixture of teacher vectors (Eq. 3, Appendix A); no gradient reaches them.

    gmm         an OnlineGMM of the same K and D
    init        "features": start from teacher vectors; "random": from random directions as long as they are
    begin       the step at which the mixture starts; until then the random directions of Frozen serve, and with
                "features" the mixture's memory is a ring of the last K teacher vectors
    unit        means enter the logits at length one (False: raw, their norm then acts as an inverse temperature)
    a, c        of the forgetting factor (A.7), counted from `begin`
    all_gather  joins the vectors of all ranks for the start
    """

    def __init__(self, K, D, scale=1.0, seed=0, tau=1.0, *, gmm=None, init="features", begin=0, unit=True, a=0.001,
                 c=0.89, all_gather=lambda h: h):
        super().__init__(K, D, scale, seed, tau)
        self.gmm, self.init, self.begin, self.unit, self.a, self.c = gmm or OnlineGMM(K, D), init, begin, unit, a, c
        self.all_gather, self.started, self.queued = all_gather, False, 0

    def rows(self):
        """(K, D), the means at a length that costs nothing: S_mu is S_pi mu. Until the start it is free, for wait."""
        return self.gmm.S_mu

    def raw(self):
        # differs: the paper does not say whether means are normalised in the logits. Weight-normalised last layers and
        # Def. 2.1 are; raw means bring their own norm, which saturates CARP's softmax (--proto-norm raw)
        return (self.rows() if self.started and self.unit else self.vectors()), self.unit

    def directions(self):
        return F.normalize(self.vectors(), dim=1) if self.unit else self.vectors()

    def step(self, h, step=0, beta=0.5):
        """Eq. 3: one online-EM step on the teacher vectors h (n, D) of this rank; step counts from 0."""
        if not self.started:
            self.wait(self.all_gather(h), step)
        if not self.started:
            return {}
        eta = eta_at(step - self.begin, self.a, self.c)
        return {"eta": eta, **self.gmm.update(h, beta, eta)}

    @torch.no_grad()
    def wait(self, h, step):
        """Before the mixture starts: collect the last K teacher vectors, h (N, D) those of this step and of all ranks,
        and start from them when the step has come."""
        K, N = len(self.start), len(h)
        h = h[torch.isfinite(h).all(1)]  # as the run skips such steps, the queue skips vectors
        if step >= self.begin - -(-K // N):  # the steps before cannot be in the queue
            rows = (self.queued + torch.arange(len(h), device=h.device))[-K:] % K  # (n,)
            self.rows()[rows] = h[-K:].to(self.rows().dtype)
            self.queued += len(h)
        if step >= self.begin and self.queued:
            self.begin_on(self.rows()[:self.queued].to(torch.float32, copy=True), N / K)
            self.start.copy_(self.gmm.mu)
            self.started = True

    def begin_on(self, h, mass):
        self.gmm.init_from(h, self.init, mass)

    def vectors(self):
        return self.gmm.mu if self.started else self.start

    def assign(self, h, beta=0.5):
        return self.gmm.responsibilities(h, beta) if self.started else super().assign(h)

    def get_extra_state(self):
        return {"started": self.started, "queued": self.queued}

    def set_extra_state(self, state):
        self.started, self.queued = state["started"], state["queued"]


class Live(Decoupled):
    """Means of a LiveMixture, our own rule (live.py). Student and teacher logits are (h - m) . mu_k / |mu_k|, m the
    running mean of the teacher's vectors, before the start as after it. init, a and c mean nothing here."""

    def rows(self):
        return self.gmm.mu

    def centred(self, h):
        return self.gmm.centred(h)

    def step(self, h, step=0, beta=None):
        h = self.all_gather(h)  # every rank updates on the vectors of all, see live.py
        self.gmm.centre(h)
        if not self.started:
            self.wait(h, step)
        return self.gmm.update(h) if self.started else {}

    def begin_on(self, h, mass):
        self.gmm.init_from(h)

    def assign(self, h, beta=None):
        return self.gmm.responsibilities(h) if self.started else Frozen.assign(self, h)


def prototypes(args, begin=0, all_reduce=None, all_gather=lambda h: h, ranks=1):
    """The prototype set that the flags ask for; begin: the step at which a mixture starts; ranks: their number."""
    def gmm():
        return OnlineGMM(args.num_prototypes, args.bottleneck_dim, forgetting=args.forgetting, rescale=args.rescale,
                         resurrect=args.resurrect or None, var_floor=args.var_floor, seed=args.seed,
                         all_reduce=all_reduce, all_gather=all_gather, ranks=ranks)

    def live():
        return LiveMixture(args.num_prototypes, args.bottleneck_dim, eta=args.live_eta, patience=args.live_patience,
                           apart=args.live_apart, seed=args.seed)
    tau = args.student_temp if args.method == "dino" else 1.0
    base = (args.num_prototypes, args.bottleneck_dim, args.logit_scale, args.seed, tau)
    return {
        "joint": lambda: Joint(*base, kp=args.kp_weight, gain=not args.norm_last_layer),
        "kp": lambda: Joint(*base, kp=args.kp_weight, gain=not args.norm_last_layer),
        "vmf": lambda: VMF(*base, kp=args.kp_weight),
        "frozen": lambda: Frozen(*base),
        "decoupled": lambda: Decoupled(*base, gmm=gmm(), init=args.gmm_init, begin=begin, all_gather=all_gather,
                                       unit=args.proto_norm == "unit", a=args.eta_a, c=args.eta_c),
        "live": lambda: Live(*base, gmm=live(), begin=begin, all_gather=all_gather),
    }[args.prototypes]()
