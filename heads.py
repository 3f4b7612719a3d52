"""Projection head and prototype sets.

A prototype set holds K vectors of D dimensions. It is one class, a subclass of Frozen, and one
entry of the table PROTOTYPES at the end of this file. Its methods:

    logits(h, ks=None)    h (..., D) -> z (..., K), or (..., len(ks)) for some prototypes   Eq. 1
    step(h, step, beta)   take in the teacher vectors h (N, D) of a step, of all processes  Eq. 3
    bias(tau)             what joins z / tau in a softmax with a temperature, as DINO's and that of
                          `assign`: the log-normaliser of vMF, or 0
    penalty()             a term of the loss about the prototypes alone (KoLeo), or 0
    vectors()             (K, D), what a count of unique prototypes counts                  Def. 2.1
    assign(h, beta, tau, centre)
                          h (N, D) -> (N, K), how much each prototype answers for each vector
    twin()                the teacher's set: the same object, or a copy of a set with gradients.
                          `step` is called on the teacher's set alone, `penalty` on the student's

Frozen has all of them. A new set overrides what differs, mostly `vectors` and `step`; one that is
trained overrides `directions` too, the rows of C that h is multiplied with. The rest of the code
also reads `start`, and what a set says about itself at the top of Frozen; fast/losses.py reads
`scale` and `directions` too.
"""
import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from gmm import OnlineGMM, eta_at
from losses import koleo
from support import ddp
from support.entries import loaded


# added to a run's seed for its second set of prototypes, so that it starts at other directions
SEED_OF_SECOND_SET = 1_000_003


class Head(nn.Module):
    """3-layer MLP (DINO, CARP): in_dim -> hidden -> hidden -> out_dim with GELU.

    bn: batch norm after the first two layers; norm: output of length one.
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
        h = self.mlp(x).float()  # no bfloat16 in products with prototypes, or in their softmax
        return F.normalize(h, dim=-1) if self.norm else h


# ---- prototype sets ----------------------------------------------------------------------------
def short_vectors(K, D, seed):
    """C (K, D), uniform in +-1/sqrt(D), as nn.Linear starts: a function of the seed.

    Only the direction counts in the logits. But AdamW's steps have a fixed size, so long vectors
    would hardly turn, and that would hide the collapse.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(K, D).uniform_(-1, 1, generator=generator).mul_(D ** -0.5)


class Frozen(nn.Module):
    """Random unit directions that never move: the control that every other set has to beat.

    It is the base class of all sets: each of its methods does the plain thing, or nothing.
    scale: factor on all logits, an inverse temperature. With one seed all sets start from the same
    directions; a mixture replaces them when it starts. `start` (K, D) is where a set began; its
    drift is measured from there.
    `origin` is the point that h is measured from: 0 for all sets of the paper.

    A set may also say what a flag is where nobody types it: `kp_weight` for --kp-weight,
    `targets_of_dino` for --targets, and `gmm_start` for --gmm-start.
    """

    origin = 0.0
    countable = True  # False: the vectors are a memory, so a count of unique ones says nothing
    only_with = None  # the name of the only method it works with
    kp_weight = 0.0
    targets_of_dino = "center"
    gmm_start = None  # 0.75 with --gmm-init features, else 0

    def __init__(self, K, D, scale=1.0, seed=0):
        super().__init__()
        self.scale = scale
        self.register_buffer("start", F.normalize(short_vectors(K, D, seed), dim=1))

    @classmethod
    def from_args(cls, args, begin=0):
        """The set that the flags ask for; begin: the step at which a set may start to learn."""
        return cls(args.num_prototypes, args.bottleneck_dim, args.logit_scale, args.seed)

    def vectors(self):
        return self.start

    def directions(self):
        """(K, D), the rows that h is multiplied with."""
        return F.normalize(self.vectors(), dim=1)

    def logits(self, h, ks=None):
        # Eq. 1  z = h C^T, as prototypes are rows here; float32 also under autocast
        with torch.autocast(h.device.type, enabled=False):
            C = self.directions() if ks is None else self.directions()[ks]  # (K, D) or (len(ks), D)
            return self.scale * ((h.float() - self.origin) @ C.T)  # (..., K) or (..., len(ks))

    def logits_are_products(self):
        """Whether logits(h) is scale (h - origin) C^T with C = directions(), as above.

        fast/losses.py takes that product apart, so it serves no set that overrides `logits`. It has
        gradients for h and C alone, so it serves no set that trains its scale or origin either.
        """
        trained = [x for x in (self.scale, self.origin) if torch.is_tensor(x) and x.requires_grad]
        return not trained and getattr(self.logits, "__func__", None) is Frozen.logits

    def bias(self, tau):
        return 0.0

    def step(self, h, step, beta=0.5):
        """Returns {column of log.csv: number}; a row has those of its own step."""
        return {}

    @classmethod
    def follows_the_teacher(cls):
        """Whether `step` takes in vectors: that of this class does not."""
        return cls.step is not Frozen.step

    def penalty(self):
        return self.start.new_zeros(())

    def assign(self, h, beta=0.5, tau=1.0, centre=0.0):
        """(N, K), how much each prototype answers for each vector of h (N, D): a softmax.

        beta: read by a mixture (A.1). tau, centre: what `tau_and_centre` of the loss gives.
        """
        return (self.logits(h) / tau + self.bias(tau) - centre).softmax(-1)

    def twin(self):
        return self


class Joint(Frozen):
    """Prototypes trained by the encoder's loss (Eq. 2); of length one in the logits.

    kp      weight of KoLeo, which pushes them apart: KoLeo-Proto (Govindarajan et al. 2024)
    gain    train their lengths too (--no-norm-last-layer; norm_last_layer false in DINO's code)
    """

    def __init__(self, K, D, scale=1.0, seed=0, *, kp=0.0, gain=False):
        super().__init__(K, D, scale, seed)
        self.kp = kp
        self.weight = nn.Parameter(short_vectors(K, D, seed))  # (K, D)
        self.gain = nn.Parameter(torch.ones(K, 1)) if gain else None  # (K, 1)

    @classmethod
    def from_args(cls, args, begin=0):
        return cls(args.num_prototypes, args.bottleneck_dim, args.logit_scale, args.seed,
                   kp=args.kp_weight, gain=not args.norm_last_layer)

    def vectors(self):
        return F.normalize(self.weight.detach(), dim=1)

    def directions(self):
        C = F.normalize(self.weight, dim=1)  # (K, D)
        return C if self.gain is None else self.gain * C

    def penalty(self):
        return self.kp * koleo(self.weight) if self.kp else super().penalty()

    def twin(self):
        twin = copy.deepcopy(self).requires_grad_(False)
        twin.start = self.start
        return twin


class KP(Joint):
    """Joint with KoLeo-Proto, whose weight is that of B.1 where nobody types --kp-weight."""

    kp_weight = 0.1


class VMF(Joint):
    """DINO-vMF (Govindarajan et al. 2023): a prototype is a von Mises-Fisher density on the sphere.

    Of prototype w_k the direction is w_k / |w_k| and the concentration |w_k| / tau. The
    log-normaliser of the density joins the logit, which is what makes it possible to train the
    lengths.
    """

    targets_of_dino = "prob"

    def __init__(self, K, D, scale=1.0, seed=0, *, kp=0.0):
        super().__init__(K, D, scale, seed, kp=kp, gain=True)

    @classmethod
    def from_args(cls, args, begin=0):
        return cls(args.num_prototypes, args.bottleneck_dim, args.logit_scale, args.seed,
                   kp=args.kp_weight)

    def bias(self, tau):
        # differs: scale is ours; <h, scale w> / tau makes scale |w| / tau the concentration
        kappa = self.scale * self.gain.abs().squeeze(1) / tau  # (K,)
        return vmf_log_normalizer(kappa, self.weight.shape[1])


def vmf_log_normalizer(kappa, dim):
    """log C_dim(kappa) of the density C exp(kappa <m, y>) on the unit sphere of `dim` dimensions.

    kappa >= 0, any shape -> the same shape and dtype, differentiable; computed in float64. With
    nu = dim / 2 - 1, C = kappa^nu / ((2 pi)^(dim/2) I_nu(kappa)). For large orders I_nu has a
    uniform expansion in 1 / nu (Debye), in which the two nu log kappa cancel: nothing is singular
    at 0. Against exact values the error is below 1e-6 from dim = 64 on, 5e-6 at 32, 1e-3 at 8.
    Raises ValueError below dim 3.
    """
    if dim < 3:
        raise ValueError(f"vmf_log_normalizer needs at least 3 dimensions, got {dim}")
    nu, k = dim / 2 - 1, kappa.double()
    s = (nu * nu + k * k).sqrt()
    # log I_nu(k) = s + nu log(k / (nu + s)) - log(2 pi s) / 2 + log(1 + u1 + u2 + ...)
    # with Debye's first two terms, of the order of 1 / nu and 1 / nu^2
    u1 = (3 / s - 5 * nu ** 2 / s ** 3) / 24
    u2 = (81 / s ** 2 - 462 * nu ** 2 / s ** 4 + 385 * nu ** 4 / s ** 6) / 1152
    log_c = nu * (nu + s).log() - s + 0.5 * s.log() - torch.log1p(u1 + u2)
    return (log_c - (dim - 1) / 2 * math.log(2 * math.pi)).to(kappa.dtype)


class Decoupled(Frozen):
    """Means of an online Gaussian mixture of teacher vectors (Eq. 3, Appendix A).

    No gradient reaches them. Until the mixture starts, the random directions of Frozen serve.

    gmm     an OnlineGMM of the same K and D
    init    "features": start from the last K teacher vectors; "random": from random directions
    begin   the step at which the mixture starts, counted from 0
    unit    means enter the logits at length one; False: raw, with their norm as a temperature
    a, c    of the forgetting factor (A.7), counted from `begin`
    """

    Mixture = OnlineGMM  # a subclass may name another, which then runs at any size

    def __init__(self, K, D, scale=1.0, seed=0, *, gmm=None, init="features", begin=0, unit=True,
                 a=0.001, c=0.89):
        super().__init__(K, D, scale, seed)
        self.gmm = gmm or self.Mixture(K, D)
        self.init, self.begin, self.unit, self.a, self.c = init, begin, unit, a, c
        self.started = False
        self.collected = 0  # teacher vectors collected so far for the start

    @classmethod
    def from_args(cls, args, begin=0):
        K, D = args.num_prototypes, args.bottleneck_dim
        Mixture = cls.Mixture
        # N K above 2^26: more responsibilities than memory should hold. N are two crops an image
        if Mixture is OnlineGMM and 2 * args.batch_size * K > 2 ** 26:
            from fast.gmm import FastGMM
            Mixture = FastGMM
            ddp.print_once("N K is above 2^26: `update` with A.1 and A.2 is that of fast/gmm.py; "
                           "what you change of it in gmm.py has to be changed there too")
        forgetting = args.forgetting
        if forgetting == "sample":
            from zoo.sample_forgetting import per_sample
            Mixture, forgetting = per_sample(Mixture), "responsibility"
        gmm = Mixture(K, D, forgetting=forgetting, rescale=args.rescale, seed=args.seed,
                      resurrect=args.resurrect or None, var_floor=args.var_floor)
        return cls(K, D, args.logit_scale, args.seed, gmm=gmm, init=args.gmm_init, begin=begin,
                   unit=args.proto_norm == "unit", a=args.eta_a, c=args.eta_c)

    def vectors(self):
        return self.gmm.mu if self.started else self.start

    def directions(self):
        # differs: the paper does not say whether means are normalised in the logits. Here they are,
        # as weight-normalised last layers are. Raw means (--proto-norm raw) saturate CARP's softmax
        C = self.vectors()  # (K, D)
        return F.normalize(C, dim=1) if self.unit else C

    def step(self, h, step, beta=0.5):
        # Eq. 3  C^t = argmin L_C(C^{t-1}, h): one step of online EM
        if not self.started:
            self.collect(h, step)
        if not self.started:
            return {}
        eta = eta_at(step - self.begin, self.a, self.c)
        report = self.gmm.update(h, beta, eta)
        return {"eta": eta, "pi_max": report["pi_max"], "mixture_used": report["used"],
                "resurrected": report["resurrected"]}

    def assign(self, h, beta=0.5, tau=1.0, centre=0.0):
        if self.started:
            return self.gmm.responsibilities(h, beta)  # A.1
        return super().assign(h, beta, tau, centre)

    # ---- the start ----
    def memory(self):
        """(K, D), where the last K teacher vectors wait: S_mu, which is free until the start."""
        return self.gmm.S_mu

    def start_from(self, h, mass):
        self.gmm.init_from(h, self.init, mass)

    @torch.no_grad()
    def collect(self, h, step):
        """Collect the last K teacher vectors, and start from them when the step has come. Of a step
        with more than K vectors, K enter."""
        K, N = self.start.shape[0], len(h)
        h = h[torch.isfinite(h).all(1)]  # (n, D), as the run skips steps that are not finite
        if len(h) > K:  # K of them at random: the last ones would be of few images
            order = torch.randperm(len(h), generator=torch.Generator().manual_seed(step))  # (n,)
            h = h[order[:K].to(h.device)]  # (K, D)
        if step >= self.begin - math.ceil(K / N):  # the ring would drop earlier ones
            # the memory is a ring: vector i lies in row i mod K
            places = (self.collected + torch.arange(len(h), device=h.device)) % K  # (n,)
            self.memory()[places] = h.to(self.memory().dtype)
            self.collected += len(h)
        if step >= self.begin and self.collected:
            # a copy, as the start writes over that memory
            h = self.memory()[:self.collected].to(torch.float32, copy=True)  # (at most K, D)
            self.start_from(h, N / K)
            self.start.copy_(self.gmm.mu)
            self.started = True

    def get_extra_state(self):
        return {"started": self.started, "queued": self.collected}  # "queued": its name in files

    def set_extra_state(self, state):
        self.started, self.collected = state["started"], state["queued"]


# ---- the table ---------------------------------------------------------------------------------
# name of --prototypes: a class, or "module.Class" of one that is loaded when it is asked for
PROTOTYPES = {
    "joint": Joint,
    "kp": KP,
    "vmf": VMF,
    "frozen": Frozen,
    "decoupled": Decoupled,
    "live": "zoo.live.Live",
    "kmeans": "zoo.kmeans.KMeans",
    "clustered": "zoo.clustered.Clustered",
    "bank": "zoo.bank.Bank",
}


def prototype_class(name):
    """The class that the table has under a name; Frozen for a name that is not in the table."""
    return loaded(PROTOTYPES.get(str(name), Frozen))


def prototypes(args, begin=0):
    """The prototype set that --prototypes names; begin: the step at which a mixture starts.

    ValueError if its vectors are not (K, D).
    """
    protos = loaded(PROTOTYPES[args.prototypes]).from_args(args, begin)
    shape, asked = tuple(protos.vectors().shape), (args.num_prototypes, args.bottleneck_dim)
    if protos.countable and shape != asked:
        raise ValueError(f"--prototypes {args.prototypes} has vectors() of shape {shape}, where "
                         f"--num-prototypes and --bottleneck-dim ask for {asked}")
    return protos


def student_and_teacher(args, begin=0):
    """(the student's set, the teacher's set) as --prototypes and --student-prototypes say."""
    protos = prototypes(args, begin)
    if args.student_prototypes == "same":
        return protos, protos.twin()
    if list(protos.parameters()):
        raise ValueError("--student-prototypes joint stands beside prototypes without parameters, "
                         f"as no loss trains them; got --prototypes {args.prototypes}")
    # Sec. 3, partial decoupling: the loss trains a set of the student's own, which has to agree
    # with assignments to a set that the loss does not touch
    return Joint.from_args(args), protos
