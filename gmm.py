"""Appendix A of "Why Prototypes Collapse" (ICLR 2026): prototypes as the means of an online Gaussian mixture.

    code        paper             meaning                                                        shape
    h           h_i               teacher vectors of one step: J views x B images, all ranks     (N, D), N = J*B
    K, D                          components (= prototypes), dimensions
    log_pi      log pi_k          mixture weights                                                (K,)
    mu          mu_k = c_k        means, the prototypes; worked out from S (A.5) when asked for  (K, D)
    var         diag Sigma_k      diagonal covariances, likewise                                 (K, D)
    gamma       gamma_ik          responsibility of component k for vector i                     (N, K)
    T_*         S~_k              statistics of this step                                        (K,) (K, D) (K, D)
    S_*         S_k               running statistics, in samples: they sum to about N            (K,) (K, D) (K, D)
    g           gamma^_k          mean responsibility over the step, T_pi / N                    (K,)
    eta, beta                     forgetting factor (A.7), smoothing of the density (A.1)
    mass        JB / K            samples each component starts with (A.4)

The statistics S live in float64: at g = 1/K a step changes them by less than one float32 ulp. Nothing else of size
(K, D) is kept: 16 bytes a number, as joint training needs for a gradient, two moments of AdamW and a teacher's copy.
The paper leaves things open and misprints others; every choice of ours is a line that starts with `# differs:`.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


def eta_at(t, a=0.001, c=0.89):
    """Forgetting factor at update t = 0, 1, 2, ...: rises from c towards 0.99 (A.7; a, c from Table A.2)."""
    # A.7  eta = 0.99 - 1 / (a t + b),  b = 1 / (0.99 - c)
    # differs: the paper prints a t - b, which gives 1.09 at t = 0 and a pole at t = b / a; a t + b gives its 0.89
    return 0.99 - 1 / (a * t + 1 / (0.99 - c))


def sum_ranks(x, reduce):
    """reduce(x), which may work in place and return nothing; x on one process (None)."""
    out = reduce(x) if reduce else x
    return x if out is None else out


def exp2_or_0(z):
    """2^z in place, faster than e^z; 0 below 2^-54, which the float64 sums S would not see: the product of two powers
    is then never subnormal, and subnormal numbers are slow."""
    return F.threshold_(z, -54, -math.inf).exp2_()


class OnlineGMM(nn.Module):
    """A mixture of K Gaussians in D dimensions with diagonal covariances, updated once per training step.

    chunk       components handled at a time: bounds memory, never changes the result
    forgetting  "responsibility": eta to the power of g (A.3); "plain": eta itself (Table A.1, row 1: it starves);
                "sample": eta to the power of T_pi, the gain of Celaya and Agostini that A.3 goes back to
    resurrect   weight above which a component is split (0.3 in B.1), None: never
    rescale     shrink the mean of a component above that weight (A.6)
    var_floor   smallest variance, as a share of the pooled variance of the step
    all_reduce  sums a tensor over the ranks, in place or returning it; None on one process
    all_gather  joins the rows (n, D) of all ranks; needs `ranks`, their number. None: statistics are summed always
    """

    def __init__(self, K, D, *, chunk=2048, forgetting="responsibility", resurrect=0.3, rescale=True,
                 var_floor=1e-3, seed=0, all_reduce=None, all_gather=None, ranks=1):
        super().__init__()
        if forgetting not in ("responsibility", "plain", "sample"):
            raise ValueError(f"forgetting must be 'responsibility', 'plain' or 'sample', got {forgetting!r}")
        if resurrect is not None and not 0 < resurrect < 1:
            raise ValueError(f"resurrect must lie in (0, 1) or be None, got {resurrect}")
        self.K, self.D, self.chunk, self.forgetting, self.resurrect = K, D, chunk, forgetting, resurrect
        self.rescale, self.var_floor, self.seed, self.t = rescale, var_floor, seed, 0
        self.reduce, self.gather, self.ranks = all_reduce, all_gather, ranks
        for dtype, sizes in ((torch.float32, {"log_pi": (K,), "floor": ()}),                # floor: smallest variance
                             (torch.float64, {"S_pi": (K,), "S_mu": (K, D), "S_sig": (K, D)})):
            for name, size in sizes.items():
                self.register_buffer(name, torch.zeros(size, dtype=dtype))
        self.set_params(self.directions(K), torch.tensor(1 / D), 1 / K, mass=1.0)

    # ---- where the mixture starts ----------------------------------------------------------------------------------
    @torch.no_grad()
    def set_params(self, mu, var, pi, mass):
        """Take mu, var > 0 (K, D) and pi (K,), or what expands to them, as the parameters, worth `mass` = JB/K samples
        each (A.4)."""
        self.floor.fill_(1e-18)                                                          # see the products in log_joint
        pi = torch.as_tensor(pi, dtype=torch.float64, device=self.S_pi.device).expand(self.K)                    # (K,)
        self.log_pi.copy_(pi.log())
        mu, var = (torch.as_tensor(v, device=pi.device).expand(self.K, self.D) for v in (mu, var))             # (K, D)
        # differs: A.4 prints one mass JB/K for all; K pi_k JB/K is the same for pi = 1/K, and A.5 returns any other pi
        for ks in self.blocks():                                                  # float64 copies of a part at a time
            self.to_stats(ks, self.K * mass * pi[ks], mu[ks], var[ks], torch.ones_like(pi[ks], dtype=torch.bool))

    def to_stats(self, ks, n, mu, var, where):
        """Write mu, var (|ks|, D) into S of components ks with n samples each, where the mask says; A.5 undoes it."""
        mu, var = mu.double(), var.double()                                                                  # (|ks|, D)
        # A.4  S = { n,  n mu,  n Sigma + S_mu S_mu / n }
        self.S_pi[ks] = torch.where(where, n, self.S_pi[ks])
        self.S_mu[ks] = torch.where(where[:, None], n[:, None] * mu, self.S_mu[ks])
        self.S_sig[ks] = torch.where(where[:, None], n[:, None] * (var + mu * mu), self.S_sig[ks])

    def params(self, ks, out=(None, None)):
        """mu and Sigma (|ks|, D) of components ks, float64."""
        # A.5  mu = S_mu / S_pi,  Sigma = S_sig / S_pi - mu^2
        n = self.S_pi[ks, None].clamp_min(torch.finfo(torch.float64).tiny)                          # "plain": 0 / 0
        mu = torch.div(self.S_mu[ks], n, out=out[0])                                                         # (|ks|, D)
        # differs: the paper names no floor; round-off can make the difference negative
        var = torch.div(self.S_sig[ks], n, out=out[1]).addcmul_(mu, mu, value=-1).clamp_(min=self.floor)     # (|ks|, D)
        return mu, var

    def table(self, which):
        """mu (0) or Sigma (1) of all components."""
        out = torch.empty_like(self.S_mu, dtype=torch.float32)                                                  # (K, D)
        for ks in self.blocks():
            out[ks] = self.params(ks)[which]
        return out

    mu = property(lambda self: self.table(0), doc="means (K, D), float32, a new tensor at each call")
    var = property(lambda self: self.table(1), doc="variances (K, D), float32, a new tensor at each call")

    @torch.no_grad()
    def init_from(self, h, how="features", mass=None):
        """Start from teacher vectors h (N, D), the same on all ranks. mass = JB/K of the steps to come, N/K if None.

        "features": the means are K of the vectors (fewer than K: drawn again, with noise of half the pooled deviation);
        "random": random directions as long as the typical vector. Raises ValueError if h is not finite.
        """
        # differs: the paper names no start. From random directions one component takes every sample and the others
        # never move; from features of a teacher that has warmed up, A.1-A.5 as printed stay alive (README)
        h = h.float()
        if not torch.isfinite(h).all():
            raise ValueError("OnlineGMM.init_from: h holds values that are not finite")
        _, centre, pooled, rms = self.moments(h)
        if how == "features":
            gen = torch.Generator().manual_seed(self.seed)
            picks = torch.cat([torch.randperm(len(h), generator=gen) for _ in range(-(-self.K // len(h)))])[:self.K]
            mu, var = h[picks.to(h.device)], pooled                                                             # (K, D)
            for ks in self.blocks() if len(h) < self.K else ():
                noise = torch.randn(mu[ks].shape, generator=gen)                                             # (|ks|, D)
                mu[ks] += 0.5 * pooled.sqrt() * noise.to(h.device)
        else:
            mu = self.directions(self.K).to(h.device).mul_(rms)                                                 # (K, D)
            var = rms ** 2 / self.D                                                     # one component covers the cloud
        mass = len(h) / self.K if mass is None else mass
        mass = 1.0 if self.forgetting == "sample" else mass                                  # the start is one sample
        self.set_params(mu, var.clamp_min(1e-8), 1 / self.K, mass)

    def directions(self, n):
        """n random unit vectors (n, D), a function of (seed, t): equal on all ranks, new at every update."""
        g = torch.randn(n, self.D, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.t))     # (n, D)
        return g.div_(g.norm(dim=1, keepdim=True))

    # ---- A.1 -------------------------------------------------------------------------------------------------------
    def log_joint(self, d, c, ks, beta, work, unit=1.0, out=None):
        """log[ pi_k P(h_i | mu_k, Sigma_k)^beta ] / unit (|ks|, N), up to what all k share, beta D log(2 pi) / 2, from
        d = h - c and its square (2, D, N). work: scratch()."""
        wide, w = (v[:, :ks.stop - ks.start] for v in work)                                 # (2, |ks|, D) (3, |ks|, D)
        # a shift of h and mu by c leaves P as it is, but not float32 rounding: far from the origin it eats the signal
        mu, var = self.params(ks, out=wide)                                                                  # (|ks|, D)
        # log P(h | mu, Sigma) = h . mu/Sigma - h^2/2 . 1/Sigma - sum(mu^2/Sigma + log Sigma) / 2 - D log(2 pi) / 2
        # sum log Sigma: log a + log b = log ab, and float64 holds the product of 16 variances
        log_det = var.unflatten(1, (-1, math.gcd(self.D, 16))).prod(2).log_().sum(1)                           # (|ks|,)
        mu, prec = w[0].copy_(mu.sub_(c)), w[1].copy_(var).reciprocal_()                                     # (|ks|, D)
        slope = torch.mul(mu, prec, out=w[2])                                                                # (|ks|, D)
        const = self.log_pi[ks] - beta / 2 * log_det.add_(mu.mul_(slope).sum(1))                               # (|ks|,)
        # two products over D, not one over [slope, prec]: whole rows in one stretch of memory are faster to write, and
        # components in rows faster to multiply
        z = torch.addmm(const.div_(unit).float()[:, None], slope, d[0], alpha=beta / unit, out=out)          # (|ks|, N)
        return z.addmm_(prec, d[1], alpha=-beta / unit / 2)

    def scratch(self, like):
        """Memory for log_joint, the same for all blocks: fresh from the allocator it may be what the other core wrote
        last, and then the first pass over it takes up to ten times as long."""
        size = min(self.chunk, self.K)
        return like.new_empty(2, size, self.D, dtype=torch.float64), like.new_empty(3, size, self.D)

    @torch.no_grad()
    def responsibilities(self, h, beta):
        """gamma (N, K) of h (N, D) at smoothing beta (A.1); rows sum to 1."""
        with torch.autocast(h.device.type, enabled=False):                       # bf16 products would ruin the exponent
            c = h.float().mean(0)                                                                                 # (D,)
            d, work = (h - c).T, self.scratch(c)                                                                # (D, N)
            d = torch.stack([d, d * d])                                                                      # (2, D, N)
            return torch.cat([self.log_joint(d, c, ks, beta, work) for ks in self.blocks()]).softmax(0).T

    # ---- one step of online EM: Eq. 3, A.1 to A.6 --------------------------------------------------------------------
    @torch.no_grad()
    def update(self, h, beta, eta, keep=2 ** 26):
        """Take in the teacher vectors h (n, D) of this rank (N = sum of n over ranks); beta in [0, 1], eta in (0, 1).

        Returns 0-dim tensors: used (components that are some vector's most responsible one in this step), pi_max,
        resurrected. keep: responsibilities in memory at a time (2^26: 256 MiB); where n K is more, the vectors are
        taken in parts, and no product is computed twice. A step with vectors that are not finite leaves the mixture as
        it was.
        """
        if not 0 < eta < 1:
            raise ValueError(f"eta must lie in (0, 1), got {eta}")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {beta}")
        with torch.autocast(h.device.type, enabled=False):
            # Over the wire goes the smaller of two: the N x D vectors, of which every rank then makes the same update
            # (2 MB at N 2,048, D 256), or K (1 + 2D) sums, out and back (269 MB at K 65,536). Gathering repeats the
            # products on each rank, which a GPU does in milliseconds, and gives the mixture of one process.
            D, N = self.D, len(h) * self.ranks
            if self.gather and self.ranks > 1 and N * D < 2 * self.K * (1 + 2 * D):
                return self._update(self.gather(h.float()), beta, eta, keep, None)
            return self._update(h.float(), beta, eta, keep, self.reduce)

    def _update(self, h, beta, eta, keep, reduce):
        N, c, pooled, rms = self.moments(h, reduce)
        sane = torch.isfinite(rms)
        # h^2 - c^2 as a product loses no more than h itself lost when it was rounded to float32
        x = torch.where(sane, torch.cat([h - c, (h - c) * (h + c)], 1), 0.)                                    # (n, 2D)
        c, rms, pooled = (torch.where(sane, v, 0.) for v in (c, rms, pooled))
        log_eta = sane.double() * math.log(eta)                                   # 0 forgets nothing, takes nothing in
        back, used = torch.cat([c, c.double() ** 2]), x.new_zeros(self.K)                                   # (2D,) (K,)
        wide = back.new_empty(min(self.chunk, self.K), 2 * self.D)                                          # (|ks|, 2D)
        for ks, T_pi, T in self.statistics(x, c, beta, keep, used):
            # A.2  S~ = { sum_i gamma_ik,  sum_i gamma_ik h_i,  sum_i gamma_ik h_i^2 }; T is of x, and shifted back here
            T_pi = sum_ranks(T_pi, reduce).double()[:, None]                                                 # (|ks|, 1)
            T = wide[:len(T)].copy_(sum_ranks(T, reduce)).addcmul_(T_pi, back)                              # (|ks|, 2D)
            T_mu, T_sig = T.split(self.D, 1)                                                                 # (|ks|, D)
            # A.3  S <- eta^g S + (1 - eta^g) S~,  g = T_pi / N;  1 - eta^g = -expm1(g log eta) keeps g = 1e-6 alive
            g = T_pi / N if self.forgetting == "responsibility" else torch.ones_like(T_pi)                   # (|ks|, 1)
            if self.forgetting == "sample":
                # differs (this choice alone): the rule A.3 is taken from counts samples, not steps. Each one takes its
                # S <- eta^gamma_ik S + (1 - eta^gamma_ik) / (1 - eta) {1, h, h^2}; all of a step at once, g = sum_i
                # gamma_ik and S~ becomes its mean sample times 1 / (1 - eta), the number of samples S remembers
                g, n = T_pi, ((1 - eta) * T_pi).clamp_min(torch.finfo(torch.float64).tiny)                   # (|ks|, 1)
                T_pi, T_mu, T_sig = T_pi / n, T_mu / n, T_sig / n
            w = -torch.expm1(g * log_eta)                                                                    # (|ks|, 1)
            self.S_pi[ks].lerp_(T_pi[:, 0], w[:, 0])                                                   # views: in place
            self.S_mu[ks].lerp_(T_mu, w), self.S_sig[ks].lerp_(T_sig, w)
        # mu and Sigma (A.5) are worked out where they are needed: params
        self.floor.copy_(torch.where(sane, (self.var_floor * pooled).clamp_min(1e-8), self.floor))
        # A.5  pi = S_pi / sum_k S_pi
        pi = self.weights()                                                                                       # (K,)
        self.log_pi.copy_(pi.log())

        self.t += 1
        split = self.split_resurrect(pi, pooled, rms) if self.resurrect and self.K > 1 else pi.new_zeros(())
        return {"used": (sum_ranks(used, reduce) > 0).sum(), "pi_max": self.log_pi.max().exp(), "resurrected": split}

    def statistics(self, x, c, beta, keep, used):
        """A.1 and A.2 on x = [h - c, h^2 - c^2] (n, 2D): yields, block after block of K, ks, sum_i gamma_ik (|ks|,) and
        sum_i gamma_ik x_i (|ks|, 2D). used (K,) gets 1 where a component is some vector's most responsible one."""
        blocks, parts = self.blocks(), x.split(max(1, keep // self.K))
        sums, size = [None] * len(blocks), blocks[0].stop
        few, work = math.gcd(size, 64), self.scratch(x)
        room = x.new_empty(len(blocks), size, len(parts[0]))                                         # (blocks, |ks|, n)
        room[-1] = -math.inf                                # the last block may be shorter: what it lacks wins nothing
        for part, x in enumerate(parts, 1):
            d = x[:, :self.D].T                                                                                 # (D, n)
            d = torch.stack([d, d * d])                                                                      # (2, D, n)
            groups = room[..., :len(x)].unflatten(1, (-1, few))                               # (blocks, groups, few, n)
            tiles = [r[:ks.stop - ks.start, :len(x)] for r, ks in zip(room, blocks)]                         # (|ks|, n)
            tops = x.new_empty(len(blocks), groups.shape[1], len(x))                               # (blocks, groups, n)
            top, total = x.new_empty(2, len(blocks), len(x))                                               # (blocks, n)
            # A.1  gamma_ik = pi_k P(h_i | k)^beta / sum_k' pi_k' P(h_i | k')^beta, as e of its block times a share
            for ks, z, group, high, higher, sum_e in zip(blocks, tiles, groups, tops, top, total):
                self.log_joint(d, c, ks, beta, work, unit=math.log(2), out=z)                                # (|ks|, n)
                torch.amax(torch.amax(group, 1, out=high), 0, out=higher)
                torch.sum(exp2_or_0(z.sub_(higher)), 0, out=sum_e)
            share, best = exp2_or_0(top - top.amax(0)), tops.flatten(0, 1).argmax(0)              # (blocks, n) (n,)
            share /= (share * total).sum(0)
            # in two steps, as what belongs to one vector lies far apart in memory: the best group, then the best in it
            winner = groups.flatten(0, 1)[best, :, torch.arange(len(x), device=x.device)].argmax(1)               # (n,)
            used.index_fill_(0, best * few + winner, 1.0)
            # A.2  sum_i gamma_ik,  sum_i gamma_ik x_i
            for i, (ks, e) in enumerate(zip(blocks, tiles)):
                gamma = e.mul_(share[i])                                                                     # (|ks|, n)
                T = (gamma.sum(1), gamma @ x) if part == 1 else \
                    (sums[i][0] + gamma.sum(1), sums[i][1].addmm_(gamma, x))                        # (|ks|,) (|ks|, 2D)
                sums[i] = T if part < len(parts) else None
                if part == len(parts):
                    yield ks, *T

    def split_resurrect(self, pi, pooled, rms):
        """Components above the weight limit are rescaled (A.6) and share their mass with the lightest, which restart.

        At most 1/limit components can be above it, so the heaviest few are always worked out and masked: no branch on
        the values, hence no device synchronisation, and the same on all ranks.
        """
        n = min(int(1 / self.resurrect), self.K // 2)
        order = pi.argsort(descending=True, stable=True)
        k, j = order[:n], order[-n:].flip(0)                                                                 # (n,) (n,)
        heavy = (pi[k] > self.resurrect) & (pi[j] < self.resurrect) & (rms > 0)                                   # (n,)
        mu, var = self.params(k)                                                                                # (n, D)
        if self.rescale:
            # A.6  mu_k <- mu_k / sqrt(||mu_k||)
            # differs: only where ||mu_k|| > 1, as shorter means would grow; and written back into S, or A.5 undoes it
            norm = mu.norm(dim=1, keepdim=True)                                                                 # (n, 1)
            mu = torch.where(norm > 1, mu / norm.sqrt(), mu)                                                    # (n, D)
        # pi_k <- pi_j <- pi_k / 2
        # differs: halves of S_k + S_j, so that no mass is lost; and in S, since pi, mu and Sigma are made from it
        half = (self.S_pi[k] + self.S_pi[j]) / 2                                                                  # (n,)
        # differs: "scale-aware random initialization" is read as a random direction as long as the typical vector, and
        # "reset its variance" as the pooled variance of the step
        fresh = rms * self.directions(n).to(rms.device, non_blocking=True)                                      # (n, D)
        self.to_stats(k, half, mu, var, heavy)
        self.to_stats(j, half, fresh, pooled.clamp_min(1e-8), heavy)
        self.log_pi.copy_(self.weights().log())
        return heavy.sum()

    def weights(self):
        """pi (K,), float64, above 0: a whole block of K whose logarithms were all -inf would have no softmax."""
        return (self.S_pi / self.S_pi.sum()).clamp_min(torch.finfo(torch.float64).tiny)

    # ---- helpers -----------------------------------------------------------------------------------------------------
    def blocks(self):
        return [slice(k, min(k + self.chunk, self.K)) for k in range(0, self.K, self.chunk)]

    def moments(self, h, reduce=None):
        """N, mean (D,), pooled variance and root mean square norm of h, over all ranks: one small reduction."""
        s = torch.cat([h.new_full((1,), len(h)), h.sum(0), (h * h).sum(0)]).double()                      # (1+2D,)
        s = sum_ranks(s, reduce)
        N, mean, square = s[0], s[1:self.D + 1] / s[0], s[self.D + 1:] / s[0]
        return N, mean.float(), (square - mean * mean).mean().clamp_min(0).float(), square.sum().sqrt().float()

    def get_extra_state(self):
        return {"t": self.t}                                                 # seeds the directions of resurrected means

    def set_extra_state(self, state):
        self.t = state["t"]
