"""A mixture that stays alive: means of teacher vectors, as gmm.py's, by other equations. Not in the paper.

    code        meaning                                                                            shape
    h           teacher vectors of one step, of all ranks                                          (N, D)
    m           running mean of h                                                                  (D,)
    u           u_i, unit vector from m to h_i                                                     (N, D)
    mu          mu_k, means of the u they won; their directions are the prototypes                 (K, D)
    gamma       gamma_ik, 1 if component k is nearest to u_i, else 0; kept as an index k           (N,)
    r           vectors that the winner of u_i won in this step, sum_i gamma_ik                    (N,)
    n           vectors that a mean remembers, at most 1 / (1 - eta)                               (K,)
    idle        vectors seen since the component last won one                                      (K,)
    eta, f      forgetting factor per vector won, rate of m

    L.1  m <- m + f (mean_i h_i - m),   u_i = (h_i - m) / |h_i - m|
    L.2  gamma_ik = 1 for k = argmax_k u_i . mu_k / |mu_k|
    L.3  n_k <- w n_k + g,   mu_k <- mu_k + g / n_k (u_k - mu_k),   w = eta^r_k, g = (1 - w) / (1 - eta), u_k = mean of
         the u that k won
    L.4  a winner and the mean nearest to it are twins if their cosine is above 1 - apart: the later one must restart
    L.5  components that must, or won nothing in patience K vectors, restart on the vectors farthest from their winners,
         leaving out twins of farther vectors and of their winners

# differs: every line departs from Appendix A. What was measured on `shapes` and led to it:

* L.1. The teacher's vectors have a large common part, which moves, and grow from length 2 to 25 within a run. Neither
  tells images apart, and a mixture that has to follow them is left behind.
* L.2 for A.1. In 128 dimensions A.1 is all but one-hot at any beta that does not melt means together. Uniform weights,
  one tied variance and beta to infinity make it the nearest mean: one product and no (N, K) matrix to keep. Softer and
  Sinkhorn-balanced responsibilities were tried: at N < K they pull several means to each vector, which makes twins.
* L.3 for A.3. As printed the exponent is a mean over the batch and hardly moves a mean within a run. Here it counts
  vectors, as the rule it is taken from (Celaya and Agostini); n starts at 1, so new means are soon made of vectors.
* L.4. Unique prototypes do not follow from decoupling: where vectors are dense, so are their means. `apart` a little
  above the eps of Def. 2.1 asks for what the definition counts, so unique(eps) is then built in, not a finding.
* L.5 for split-resurrect. A.3 leaves the weight of a component without vectors as it is, so weights do not tell the
  dead; wins do. The farthest vectors (as k-means++ prefers) rather than random ones, which are often twins of others;
  farthest after L.3, since a young mean goes most of the way to what it won, and not both views of one image.

Every rank passes the vectors of all ranks and gets the same result: nothing is drawn after the start, and no statistic
needs a reduction. A step costs two (N, D) x (D, K) products on every rank; gmm.update's A.1 and A.2 are worth four,
shared by the ranks.
"""
import torch
from torch import nn
from torch.nn import functional as F

from heads import Decoupled, Frozen


class LiveMixture(nn.Module):
    """K means of unit vectors in D dimensions, updated once per training step.

    eta         forgetting factor per vector won (L.3): a mean remembers 1 / (1 - eta) vectors
    patience    vectors per component after which one that won nothing restarts (L.5)
    apart       cosine distance below which two means are twins (L.4); 0: twins may stay
    pace        share of K that may restart in one step, at most N
    follow      f of L.1
    chunk       components handled at a time: bounds memory, never changes the result
    """

    def __init__(self, K, D, *, eta=0.95, patience=8.0, apart=0.026, pace=0.02, follow=0.05, chunk=8192, seed=0):
        super().__init__()
        if K < 2:
            raise ValueError(f"LiveMixture needs at least 2 components, got K = {K}")
        if not 0 < eta < 1:
            raise ValueError(f"eta must lie in (0, 1), got {eta}")
        self.K, self.D, self.eta, self.patience, self.apart, self.pace = K, D, eta, patience, apart, pace
        self.follow, self.chunk, self.seed = follow, chunk, seed
        self.register_buffer("m", torch.zeros(D))
        self.register_buffer("mu", torch.zeros(K, D))
        for name, size in {"n": (K,), "idle": (K,), "t": ()}.items():  # t: steps that moved m
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))

    @torch.no_grad()
    def centre(self, h):
        """Follow the mean of the vectors h (N, D) of all ranks (L.1), before the start as after it."""
        h, sane = self.sane(h)
        # L.1  m <- m + f (mean_i h_i - m); the first step takes the mean itself
        f = torch.where(self.t > 0, self.follow, 1.).to(h.dtype) * sane
        self.m.lerp_(h.mean(0), f)
        self.t += sane

    def centred(self, h):
        """h - m (..., D), what the prototypes are multiplied with."""
        return h.float() - self.m

    @torch.no_grad()
    def init_from(self, h):
        """Start on teacher vectors h (n, D), the same on all ranks: K of them, drawn again if they are fewer (twins
        restart by themselves). Raises ValueError if h is not finite."""
        if not torch.isfinite(h).all():
            raise ValueError("LiveMixture.init_from: h holds values that are not finite")
        gen = torch.Generator().manual_seed(self.seed)
        picks = torch.cat([torch.randperm(len(h), generator=gen) for _ in range(-(-self.K // len(h)))])[:self.K]
        self.mu.copy_(F.normalize(self.centred(h), dim=1)[picks.to(h.device)])
        self.n.fill_(1.0)
        self.idle.zero_()

    @torch.no_grad()
    def responsibilities(self, h):
        """gamma (N, K) of h (N, D): one-hot rows (L.2)."""
        return F.one_hot(self.nearest(F.normalize(self.centred(h), dim=1))[1][:, 0], self.K).float()

    @torch.no_grad()
    def update(self, h):
        """Take in the teacher vectors h (N, D) of all ranks. Returns 0-dim tensors: used (winners of this step),
        resurrected (restarts). A step with vectors that are not finite leaves the mixture as it was."""
        with torch.autocast(h.device.type, enabled=False):
            return self._update(*self.sane(h))

    def _update(self, h, sane):
        N = len(h)
        u = F.normalize(self.centred(h), dim=1)  # (N, D)
        # L.2  gamma_ik = 1 for k = argmax_k  u_i . mu_k / |mu_k|
        k = self.nearest(u)[1][:, 0]  # (N,)

        # L.3  n <- w n + g,  mu <- mu + g / n (u_k - mu),  w = eta^r, g = (1 - w) / (1 - eta)
        # a row for each vector: those of one winner are equal, so that it does not matter which of them is written
        same = (k[:, None] == k).double()  # (N, N)
        r = same.sum(1)  # (N,)
        w = self.eta ** r  # (N,)
        g = (1 - w) / (1 - self.eta)  # (N,)
        n = w * self.n[k] + g  # (N,)
        old = self.mu[k].double()  # (N, D)
        mu = old + (g / n)[:, None] * (same @ u.double() / r[:, None] - old)  # (N, D)
        self.mu[k] = torch.where(sane, mu.float(), self.mu[k])
        self.n[k] = torch.where(sane, n, self.n[k])
        self.idle += N * sane
        self.idle[k] = torch.where(sane, 0., self.idle[k])

        # L.4  a winner and the mean nearest to it are twins if their cosine is above 1 - apart: the later one restarts
        near, two = self.nearest(F.normalize(self.mu[k], dim=1))  # (N, 2) (N, 2), it and another
        twins = (near[:, 1] > 1 - self.apart) & sane & (self.apart > 0)  # (N,)
        must = torch.zeros_like(self.idle).index_add_(0, two.amax(1), twins.double()) > 0  # (K,)
        self.idle.masked_fill_(must, torch.inf)

        # L.5  what must, or won nothing in patience K vectors, restarts on the vectors farthest from their winners
        R = min(N, max(1, int(self.pace * self.K)))
        cos = (u * F.normalize(self.mu[k], dim=1)).sum(1)  # (N,), to winners that have moved to them already
        cos, order = cos.sort(stable=True)  # (N,) (N,) farthest first
        far = u[order]  # (N, D)
        twin = (far @ far.T > 1 - self.apart).tril(-1).any(1) | (cos > 1 - self.apart)  # (N,) of another, of a mean
        twin &= self.apart > 0
        far = far[twin.byte().argsort(stable=True)[:R]]  # (R, D)
        j = self.idle.argsort(descending=True, stable=True)[:R]  # (R,)
        dead = (self.idle[j] > self.patience * self.K) & (torch.arange(R, device=h.device) < N - twin.sum()) & sane
        self.mu[j] = torch.where(dead[:, None], far, self.mu[j])
        self.n[j] = torch.where(dead, 1., self.n[j])
        self.idle[j] = torch.where(dead, 0., self.idle[j])
        return {"used": torch.zeros_like(self.n).index_fill_(0, k, 1).sum() * sane, "resurrected": dead.sum()}

    # ---- helpers -----------------------------------------------------------------------------------------------------
    def nearest(self, u):
        """Cosines and indices (N, 2) of the nearest and second nearest mean of unit vectors u (N, D)."""
        best = []
        for k in range(0, self.K, self.chunk):
            cos = u @ F.normalize(self.mu[k:k + self.chunk], dim=1).T  # (N, chunk)
            top = cos.topk(min(2, cos.shape[1]), dim=1)
            best.append((top.values, top.indices + k))
        cos, ids = (torch.cat(x, 1) for x in zip(*best))  # (N, 2 x blocks), twice
        top = cos.topk(2, dim=1)
        return top.values, ids.gather(1, top.indices)

    @staticmethod
    def sane(h):
        """(h, True), or (zeros, False) if a value of h is not finite; no branch on the values, no synchronisation."""
        sane = torch.isfinite(h).all()
        return torch.where(sane, h.float(), 0.), sane


class Live(Decoupled):
    """Means of a LiveMixture as a prototype set: --prototypes live.

    Logits are (h - m) . mu_k / |mu_k|, for student and teacher, before the start as after it. m is the
    running mean of the teacher's vectors.
    """

    @classmethod
    def from_args(cls, args, begin=0):
        K, D = args.num_prototypes, args.bottleneck_dim
        gmm = LiveMixture(K, D, eta=args.live_eta, patience=args.live_patience,
                          apart=args.live_apart, seed=args.seed)
        return cls(K, D, args.logit_scale, args.seed, gmm=gmm, begin=begin)

    @property
    def origin(self):
        return self.gmm.m

    def step(self, h, step, beta=None):
        self.gmm.centre(h)
        if not self.started:
            self.collect(h, step)
        if not self.started:
            return {}
        report = self.gmm.update(h)
        return {"mixture_used": report["used"], "resurrected": report["resurrected"]}

    def assign(self, h, beta=None, tau=1.0, centre=0.0):
        if self.started:
            return self.gmm.responsibilities(h)
        return Frozen.assign(self, h, beta, tau, centre)

    def memory(self):
        return self.gmm.mu

    def start_from(self, h, mass):
        self.gmm.init_from(h)
