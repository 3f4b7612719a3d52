"""Appendix A of "Why Prototypes Collapse" (ICLR 2026): an online Gaussian mixture.

Its means are the prototypes.

    code       paper           meaning                                            shape
    h          h_i             teacher vectors of one step: J views x B images    (N, D), N = J B
    K, D                       components (= prototypes), dimensions
    log_pi     log pi_k        mixture weights                                    (K,)
    mu         mu_k = c_k      means, the prototypes                              (K, D)
    var        diag Sigma_k    diagonal covariances                               (K, D)
    gamma      gamma_ik        responsibility of component k for vector i         (N, K)
    T_*        S~_k            statistics of this step; * is pi, mu or sig        (K,) (K, D) (K, D)
    S_*        S_k             running statistics; S_pi counts samples            (K,) (K, D) (K, D)
    g          gamma^_k        mean responsibility over the step                  (K,)
    eta        eta             forgetting factor (A.7); eta^g is the share of S that is kept
    beta       beta            exponent of the density; below 1 it flattens gamma (A.1)
    mass       JB / K          samples that a component of weight 1/K starts with (A.4)
    c                          mean of h, around which products are taken         (D,)
                               (in A.7 c is a number, where eta starts)
    ks                         a block of components, as a slice                  |ks| of them

gamma^_k is the paper's gamma with a hat, S~ its S with a tilde; eta^g is eta to the power of g. The
mixture keeps S; mu and var follow from it (A.5) and are computed when they are asked for. S is
float64: with K = 65,536 the mean g is 1/K, and a late step (eta near 0.99) then changes S by about
1e-7 of itself, which is as little as float32 can add. Components are handled in blocks, so that
what is computed on the way from S to S has (|ks|, D) numbers and not (K, D); that changes no more
than rounding. A.1 holds three tensors (N, K), and for very large N K fast/gmm.py computes the same.
The paper leaves some things open and misprints others; each choice of ours is a line that starts
with `# differs:`.
"""
import math

import torch
from torch import nn

TINY = torch.finfo(torch.float64).tiny  # the smallest weight; its logarithm is finite


def eta_at(t, a=0.001, c=0.89):
    """Forgetting factor at update t = 0, 1, 2, ...: rises from c towards 0.99 (Table A.2: a, c)."""
    # A.7  eta = 0.99 - 1 / (a t + b),  b = 1 / (0.99 - c)
    # differs: the paper prints a t - b, which gives 1.09 at t = 0 and a pole at t = b / a
    return 0.99 - 1 / (a * t + 1 / (0.99 - c))


def statistics(n, mu, var):
    """S of components worth n (k,) samples, with means mu and variances var (k, D); float64."""
    n, mu, var = n.double(), mu.double(), var.double()
    # A.4  S = { n,  n mu,  n Sigma + S_mu S_mu / n },  and S_mu S_mu / n = n mu^2
    return n, n[:, None] * mu, n[:, None] * (var + mu * mu)


def spread(h):
    """Of h (N, D): mean c (D,), variance averaged over dimensions (), root mean square length ().

    The mean is float32, the others float64. The averaged variance is called pooled.
    """
    h = h.double()
    return h.mean(0).float(), h.var(0, correction=0).mean(), h.square().sum(1).mean().sqrt()


class OnlineGMM(nn.Module):
    """K Gaussians in D dimensions with diagonal covariances, updated once per training step.

        mixture = OnlineGMM(K, D)
        mixture.init_from(h, "random")  # h (N, D): teacher vectors of the first step
        mixture.update(h, beta=0.1, eta=eta_at(t))  # at every step t = 0, 1, 2, ...
        C = mixture.mu  # (K, D), the prototypes

    chunk       components in a block
    forgetting  "responsibility": eta to the power of g (A.3);
                "plain": eta itself (Table A.1, row 1: components without vectors starve)
    resurrect   weight above which a component is split (0.3 in B.1); None: never
    rescale     shrink the mean of a component that is split (A.6)
    var_floor   smallest variance, as a share of the pooled variance of the step
    seed        of the random directions
    Raises ValueError for another `forgetting`, or a `resurrect` outside (0, 1).
    """

    def __init__(self, K, D, *, chunk=2048, forgetting="responsibility", resurrect=0.3,
                 rescale=True, var_floor=1e-3, seed=0):
        super().__init__()
        if forgetting not in ("responsibility", "plain"):
            raise ValueError(f"forgetting must be 'responsibility' or 'plain', got {forgetting!r}")
        if resurrect is not None and not 0 < resurrect < 1:
            raise ValueError(f"resurrect must lie in (0, 1) or be None, got {resurrect}")
        self.K, self.D, self.chunk, self.seed = K, D, chunk, seed
        self.forgetting, self.resurrect, self.rescale = forgetting, resurrect, rescale
        self.var_floor = var_floor
        self.t = 0  # updates so far; every one has random directions of its own
        self.register_buffer("log_pi", torch.zeros(K))
        self.register_buffer("floor", torch.zeros(()))  # smallest variance
        self.register_buffer("S_pi", torch.zeros(K, dtype=torch.float64))
        self.register_buffer("S_mu", torch.zeros(K, D, dtype=torch.float64))
        self.register_buffer("S_sig", torch.zeros(K, D, dtype=torch.float64))
        # something to hold until `init_from` or `set_params` is called
        self.set_params(self.random_directions(K), torch.tensor(1 / D), 1 / K, mass=1.0)

    # ---- start: A.4 ----------------------------------------------------------------------------
    @torch.no_grad()
    def set_params(self, mu, var, pi, mass):
        """Take mu (K, D), var > 0 (K, D) and pi (K,), or what expands to them, as the parameters.

        mass: samples that a component of weight 1/K is worth, JB/K (A.4).
        """
        self.floor.fill_(1e-18)  # so small that it does nothing; `update` sets the real one
        device = self.S_pi.device
        pi = torch.as_tensor(pi, dtype=torch.float64, device=device).expand(self.K)  # (K,)
        mu, var = (torch.as_tensor(v, device=device).expand(self.K, self.D) for v in (mu, var))
        # differs: A.4 prints the mass JB/K for every component. Here it is pi_k JB, which is JB/K
        # where pi_k = 1/K. For any other pi, A.5 then returns the pi that was given
        n = self.K * mass * pi  # (K,)
        for ks in self.blocks():
            self.S_pi[ks], self.S_mu[ks], self.S_sig[ks] = statistics(n[ks], mu[ks], var[ks])
        self.log_pi.copy_(pi.log())

    @torch.no_grad()
    def init_from(self, h, how="features", mass=None):
        """Start from teacher vectors h (N, D), the same on all processes.

        how   "features": K of the vectors are the means; where N < K some are drawn again, and
              all get noise of half the pooled deviation.
              "random": random directions, as long as the typical vector.
        mass  JB/K of the steps to come; None: N/K
        Raises ValueError if a value of h is not finite.
        """
        # differs: the paper names no start. It reports that all means are unique from the first
        # epoch on. Random directions are unique; after such a start a few components take nearly
        # all vectors, and the others hardly move. Vectors of the teacher put the means on the data
        h = h.float()
        if not torch.isfinite(h).all():
            raise ValueError("OnlineGMM.init_from: h holds values that are not finite")
        _, pooled, rms = spread(h)  # () ()
        if how == "features":
            generator = torch.Generator().manual_seed(self.seed)
            rounds = [torch.randperm(len(h), generator=generator) for _ in range(0, self.K, len(h))]
            picks = torch.cat(rounds)[:self.K].to(h.device)  # (K,)
            mu, var = h[picks], pooled  # (K, D) ()
            if len(h) < self.K:
                for ks in self.blocks():
                    noise = torch.randn(mu[ks].shape, generator=generator).to(h.device)  # (|ks|, D)
                    mu[ks] += 0.5 * pooled.sqrt().float() * noise
        elif how == "random":
            mu = self.random_directions(self.K).to(h.device) * rms.float()  # (K, D)
            var = rms ** 2 / self.D  # one component then covers all vectors
        else:
            raise ValueError(f"OnlineGMM.init_from: {how!r} is neither features nor random")
        mass = len(h) / self.K if mass is None else mass
        self.set_params(mu, var.clamp_min(1e-8), 1 / self.K, mass)

    def random_directions(self, n):
        """n random unit vectors (n, D): a function of (seed, t), so equal on all processes."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.t)
        x = torch.randn(n, self.D, generator=generator)  # (n, D)
        return x / x.norm(dim=1, keepdim=True)

    # ---- parameters: A.5 -----------------------------------------------------------------------
    def mean(self, ks):
        """mu (|ks|, D) of the components ks, float64."""
        # A.5  mu = S_mu / S_pi
        return self.S_mu[ks] / self.S_pi[ks, None].clamp_min(TINY)  # "plain" can bring S_pi to 0

    def variance(self, ks, mu):
        """Sigma (|ks|, D) of the components ks with means mu (|ks|, D), float64."""
        # A.5  Sigma = S_sig / S_pi - mu^2
        # differs: the paper names no floor. Without one, a component of a single vector has
        # variance 0, and rounding can make the difference negative
        var = self.S_sig[ks] / self.S_pi[ks, None].clamp_min(TINY) - mu * mu
        return var.clamp_min_(self.floor)

    @property
    def mu(self):
        """Means (K, D), float32; a new tensor at each call."""
        return torch.cat([self.mean(ks).float() for ks in self.blocks()])  # (K, D)

    @property
    def var(self):
        """Variances (K, D), float32; a new tensor at each call."""
        var = [self.variance(ks, self.mean(ks)).float() for ks in self.blocks()]  # (|ks|, D) each
        return torch.cat(var)  # (K, D)

    def weights(self):
        """pi (K,), float64, above 0 so that its logarithm is finite."""
        # A.5  pi = S_pi / sum_k S_pi
        return (self.S_pi / self.S_pi.sum()).clamp_min(TINY)

    # ---- one step of online EM: Eq. 3, A.1 to A.6 ----------------------------------------------
    @torch.no_grad()
    def update(self, h, beta, eta):
        """Take in the teacher vectors h (N, D) of all processes, at beta in [0, 1], eta in (0, 1).

        Returns 0-dim tensors: used (components that are the most responsible one of some vector),
        pi_max (largest weight afterwards) and resurrected (components that restarted). If a value
        of h is not finite, the step is discarded: it counts in t alone, and `used` says nothing.
        Raises ValueError for beta or eta out of range.
        """
        h, eta = self.checked(h, beta, eta)
        c, pooled, rms = spread(h)  # (D,) () ()
        self.t += 1
        with torch.autocast(h.device.type, enabled=False):  # bfloat16 is too coarse for log P
            # A.1  gamma_ik = pi_k P(h_i | k)^beta / sum_k' pi_k' P(h_i | k')^beta
            gamma = self.responsibilities(h, beta)  # (N, K)

            for ks in self.blocks():
                # A.2  S~ = { sum_i gamma_ik,  sum_i gamma_ik h_i,  sum_i gamma_ik h_i^2 }
                T_pi, T_mu, T_sig = self.step_statistics(gamma[:, ks], h, c)

                # A.3  S <- eta^g S + (1 - eta^g) S~,  g_k = mean_i gamma_ik
                self.forget(ks, T_pi, T_mu, T_sig, len(h), eta)

            # A.5  pi = S_pi / sum_k S_pi;  mu and Sigma follow from S too, see mean and variance
            self.log_pi.copy_(self.weights().log())
            self.set_floor(pooled, eta)  # smallest variance, until the next call

            # A.6  where pi_k > limit: mu_k <- mu_k / sqrt(||mu_k||); the lightest j restarts
            resurrected = self.split_resurrect(pooled, rms)
            used = torch.zeros_like(self.log_pi).index_fill_(0, gamma.argmax(1), 1).sum()
        return {"used": used, "pi_max": self.log_pi.max().exp(), "resurrected": resurrected}

    def checked(self, h, beta, eta):
        """h (N, D) float32 and eta (), safe to compute with. ValueError: beta or eta out of range.

        If the sum of squares of h is not finite, all of h becomes 0 and eta becomes 1, which
        discards the step: A.3 then leaves S as it is. This is a tensor operation and not an `if`,
        so that the CPU does not wait for a GPU.
        """
        if not 0 < eta < 1:
            raise ValueError(f"eta must lie in (0, 1), got {eta}")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {beta}")
        h = h.float()
        finite = torch.isfinite(h.square().sum())
        eta = torch.full((), eta, dtype=torch.float64, device=h.device)
        return torch.where(finite, h, 0.), torch.where(finite, eta, 1.)

    @torch.no_grad()
    def responsibilities(self, h, beta):
        """gamma (N, K) of vectors h (N, D) at smoothing beta (A.1); rows sum to 1."""
        with torch.autocast(h.device.type, enabled=False):
            h = h.float()
            log_P = torch.cat([self.log_density(h, ks) for ks in self.blocks()], dim=1)  # (N, K)
            # A.1  gamma_ik = pi_k P(h_i | k)^beta / sum_k' pi_k' P(h_i | k')^beta
            gamma = (self.log_pi + beta * log_P).softmax(1)  # (N, K)
            # a gamma below 1e-20 is lost beside S. As 0 it makes no products that are subnormal
            # numbers, which are very slow on CPUs
            return nn.functional.threshold_(gamma, 1e-20, 0.)

    def log_density(self, h, ks):
        """log P(h_i | mu_k, Sigma_k) (N, |ks|) of vectors h (N, D) under the components ks."""
        c, mu = h.mean(0), self.mean(ks)  # (D,) (|ks|, D)
        var = self.variance(ks, mu)  # (|ks|, D)
        # a shift of both h and mu by c leaves P as it is, and makes the numbers small: far from the
        # origin the rounding of float32 would be larger than the distances
        h, mu, precision = h - c, (mu - c).float(), (1 / var).float()  # (N, D) (|ks|, D) (|ks|, D)
        # -2 log P = sum_d (h - mu)^2 / Sigma + log Sigma + log(2 * 3.14...). The square is
        # multiplied out, so that two matrix products do most of the work
        const = (mu * mu * precision).sum(1) + (var.log() + math.log(2 * math.pi)).sum(1)  # (|ks|,)
        square = (h * h) @ precision.T - 2 * h @ (mu * precision).T  # (N, |ks|)
        return -(square + const.float()) / 2

    def step_statistics(self, gamma, h, c):
        """S~ of responsibilities gamma (N, |ks|) and vectors h (N, D): T_pi (|ks|,), T_mu and T_sig
        (|ks|, D), float64 (A.2)."""
        # differs: the sums are of h - c and of h^2 - c^2 = (h - c)(h + c), and are shifted back in
        # float64; float32 sums of vectors far from the origin would consist of rounding
        T_pi = gamma.sum(0).double()  # (|ks|,)
        T_mu = (gamma.T @ (h - c)).double()  # (|ks|, D)
        T_sig = (gamma.T @ ((h - c) * (h + c))).double()  # (|ks|, D), of h^2 - c^2
        c, total = c.double(), T_pi[:, None]  # (D,) (|ks|, 1)
        return T_pi, T_mu + total * c, T_sig + total * c ** 2

    def forget(self, ks, T_pi, T_mu, T_sig, N, eta):
        """A.3 for the components ks and a step of N vectors; eta (), where 1 leaves S as it is.

        With the exponent g, a component forgets only as far as the step's vectors are its own.
        """
        g = T_pi / N if self.forgetting == "responsibility" else torch.ones_like(T_pi)  # (|ks|,)
        # A.3  S <- eta^g S + (1 - eta^g) S~
        # 1 - eta^g would lose digits where g is small, and expm1 loses none
        w = -torch.expm1(g * eta.log())  # (|ks|,)
        self.S_pi[ks].lerp_(T_pi, w)
        self.S_mu[ks].lerp_(T_mu, w[:, None])
        self.S_sig[ks].lerp_(T_sig, w[:, None])

    def set_floor(self, pooled, eta):
        """Set the smallest variance that A.5 gives, unless the step was discarded (eta = 1)."""
        floor = (self.var_floor * pooled).clamp_min(1e-8)  # equal vectors have pooled variance 0
        self.floor.copy_(torch.where(eta < 1, floor, self.floor))

    def split_resurrect(self, pooled, rms):
        """A component k above the weight limit shares its mass with the lightest, j; j restarts.

        pooled, rms: what `spread` gives of the step's vectors. Returns how many restarted, ().
        As weights sum to 1, at most 1/limit of them can be above the limit. So the heaviest few are
        always computed, and a mask says which of them count: the CPU never waits for a GPU.
        """
        if self.resurrect is None or self.K == 1:
            return torch.zeros_like(self.S_pi[0])
        most = min(int(1 / self.resurrect), self.K // 2)
        pi = self.weights()
        order = pi.argsort(descending=True, stable=True)
        k, j = order[:most], order[-most:].flip(0)  # (n,) each: heaviest, lightest; n = most
        # of a discarded step all vectors are 0 (see `checked`), so rms is 0 and nothing is split
        # differs: where even the lightest is above the limit, nothing is split or shrunk
        heavy = (pi[k] > self.resurrect) & (pi[j] < self.resurrect) & (rms > 0)  # (n,)
        mu = self.mean(k)  # (n, D)
        var = self.variance(k, mu)  # (n, D)
        if self.rescale:
            # A.6  mu_k <- mu_k / sqrt(||mu_k||)
            # differs: only where ||mu_k|| > 1, as shorter means would grow
            mu = mu / mu.norm(dim=1, keepdim=True).clamp_min(1).sqrt()  # (n, D)
        # A.6  pi_k and pi_j both become pi_k / 2
        # differs: each gets half of S_pi_k + S_pi_j, so that no mass is lost
        half = (self.S_pi[k] + self.S_pi[j]) / 2  # (n,)
        # differs: "scale-aware random initialization" is read as a random direction as long as the
        # typical vector, and "reset its variance" as the pooled variance of the step
        fresh = rms * self.random_directions(most).to(rms.device, non_blocking=True)  # (n, D)
        # differs: everything is written back into S, or the next A.5 would undo it
        split = statistics(half, mu, var)
        restarted = statistics(half, fresh, pooled.clamp_min(1e-8))
        for S, of_k, of_j in zip((self.S_pi, self.S_mu, self.S_sig), split, restarted):
            mask = heavy.view(-1, *[1] * (S.dim() - 1))  # (n,) for S (K,), (n, 1) for S (K, D)
            S[k] = torch.where(mask, of_k, S[k])
            S[j] = torch.where(mask, of_j, S[j])
        self.log_pi.copy_(self.weights().log())
        return heavy.sum()

    # ---- helpers -------------------------------------------------------------------------------
    def blocks(self):
        return [slice(k, min(k + self.chunk, self.K)) for k in range(0, self.K, self.chunk)]

    def get_extra_state(self):
        return {"t": self.t}  # t seeds the directions of components that restart

    def set_extra_state(self, state):
        self.t = state["t"]
