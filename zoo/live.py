"""--prototypes live: a mixture whose components all stay in use. It is ours, not the paper's.

As in gmm.py, the prototypes are means of teacher vectors, but they follow other equations. The
component whose mean is nearest to a vector wins this vector, and only components that win move.

    code      meaning                                                                  shape
    h         h_i, teacher vectors of one step, of all processes                       (N, D)
    m         running mean of h                                                        (D,)
    u         u_i, unit vector that points from m to h_i                               (N, D)
    mu        mu_k, running means of unit vectors; the prototypes are their directions (K, D)
    gamma     gamma_ik, 1 if component k wins vector i, else 0                         (N, K)
    winner    the k that wins vector i: all that gamma says                            (N,)
    r         r_k = sum_i gamma_ik, how many vectors k wins, for the winner of each i  (N,)
    n         n_k, how many vectors mean k remembers, at most 1 / (1 - eta)            (K,)
    idle      how many vectors came since component k won one                          (K,)
    eta, f    forgetting factor for each vector won, rate of m

    L.1  m <- m + f (mean_i h_i - m),  u_i = (h_i - m) / |h_i - m|
    L.2  gamma_ik = 1 for k = argmax_k u_i . mu_k / |mu_k|
    L.3  n_k <- w n_k + g,  mu_k <- mu_k + g / n_k (u_k - mu_k),  where w = eta^r_k,
         g = (1 - w) / (1 - eta), and u_k is the mean of the u_i that k wins
    L.4  Two means are twins if their cosine is above 1 - apart. If a winner and the mean nearest
         to it are twins, the one with the larger k has to restart.
    L.5  A component restarts if L.4 says so, or if it won nothing in patience K vectors. The most
         idle one restarts on the vector that is farthest from its winner, the next one on the next
         such vector, and so on. A vector is left out if its cosine with a farther vector, or with
         its winner, is above 1 - apart.

# differs: every line departs from Appendix A. The reasons were measured on the built-in images:

* L.1. Teacher vectors have a large common part, which moves, and their length grows from 2 to 25
  within a run. Neither tells images apart, and means that have to follow both are left behind.
* L.2 instead of A.1. In 128 dimensions A.1 is nearly one-hot at any beta that does not make all
  means equal. With uniform weights, one variance for all and beta to infinity it becomes the
  nearest mean: one product, and no (N, K) matrix to store. Softer responsibilities were tried, and
  so were responsibilities balanced by Sinkhorn-Knopp. While N < K, both give each vector to several
  means, which become twins.
* L.3 instead of A.3. The printed exponent is averaged over the batch, so that components hardly
  move in a run. Here the exponent counts vectors, as in the rule that the paper cites (Celaya and
  Agostini). n starts at 1, so a new mean soon consists of the vectors it wins.
* L.4. Decoupling alone does not make prototypes unique: where vectors lie close together, so do
  their means. The default of apart is a little above 0.025, an eps of Def. 2.1. L.4 then asks for
  what the definition counts, so unique(0.025) is built in and not a finding.
* L.5 instead of split and resurrect. A.3 leaves the weight of a component without vectors as it
  is, so weights do not show which components have died. Wins show it. Restarts take the farthest
  vectors, as k-means++ prefers, since random vectors are often twins of other means. Distances are
  taken after L.3, since a new mean moves most of the way to what it wins. Of two views of one
  image, which are nearly equal, one is left out.

Every process passes the vectors of all processes and gets the same result, as nothing is random
after the start. A step costs two (N, D) x (D, K) products; A.1 and A.2 in gmm.py cost four.
"""
import torch
from torch import nn
from torch.nn import functional as F

from heads import Decoupled


class LiveMixture(nn.Module):
    """K means of unit vectors in D dimensions, updated once per training step.

    eta             forgetting factor for each vector won, in (0, 1) (L.3)
    patience        vectors per component after which one that won none restarts (L.5)
    apart           cosine distance below which two means are twins (L.4); 0: twins may stay
    restart_share   share of K that may restart in one step, at least one and at most N
    f               rate at which m follows the mean of the vectors (L.1)
    chunk           components handled at a time: bounds the memory, never changes the result
    seed            of the choice of vectors to start from
    Raises ValueError for K below 2, or an eta out of range.
    """

    def __init__(self, K, D, *, eta=0.95, patience=8.0, apart=0.026, restart_share=0.02, f=0.05,
                 chunk=8192, seed=0):
        super().__init__()
        if K < 2:
            raise ValueError(f"LiveMixture needs at least 2 components, got K = {K}")
        if not 0 < eta < 1:
            raise ValueError(f"eta must lie in (0, 1), got {eta}")
        self.K, self.D, self.chunk, self.seed = K, D, chunk, seed
        self.eta, self.patience, self.apart = eta, patience, apart
        self.restart_share, self.f = restart_share, f
        self.register_buffer("m", torch.zeros(D))
        self.register_buffer("mu", torch.zeros(K, D))
        self.register_buffer("n", torch.zeros(K, dtype=torch.float64))
        self.register_buffer("idle", torch.zeros(K, dtype=torch.float64))
        self.register_buffer("t", torch.zeros((), dtype=torch.float64))  # steps that moved m

    # ---- L.1 and the start ---------------------------------------------------------------------
    @torch.no_grad()
    def follow(self, h):
        """Move m towards the mean of the vectors h (N, D) (L.1), before the start as after it.

        Vectors that are not finite leave m as it was.
        """
        h, finite = self.checked(h)
        # L.1  m <- m + f (mean_i h_i - m); the first step takes the mean itself
        f = torch.where(self.t > 0, self.f, 1.).to(h.dtype) * finite
        self.m.lerp_(h.mean(0), f)
        self.t += finite

    def from_m(self, h):
        """u (N, D), the directions in which the vectors h (N, D) lie from m."""
        # L.1  u_i = (h_i - m) / |h_i - m|
        return F.normalize(h.float() - self.m, dim=1)

    @torch.no_grad()
    def init_from(self, h):
        """Start from K of the teacher vectors h (n, D), the same on all processes.

        Where n < K, vectors are taken more than once, and L.4 separates the twins later.
        Raises ValueError if a value of h is not finite.
        """
        if not torch.isfinite(h).all():
            raise ValueError("LiveMixture.init_from: h holds values that are not finite")
        generator = torch.Generator().manual_seed(self.seed)
        rounds = [torch.randperm(len(h), generator=generator) for _ in range(0, self.K, len(h))]
        picks = torch.cat(rounds)[:self.K].to(h.device)  # (K,)
        self.mu.copy_(self.from_m(h)[picks])
        self.n.fill_(1.0)
        self.idle.zero_()

    # ---- one step: L.2 to L.5 ------------------------------------------------------------------
    @torch.no_grad()
    def responsibilities(self, h, beta=None):
        """gamma (N, K) of vectors h (N, D): a single 1 in each row (L.2). beta has no effect."""
        with torch.autocast(h.device.type, enabled=False):
            _, nearest = self.two_nearest(self.from_m(h))  # (N, 2)
        return F.one_hot(nearest[:, 0], self.K).float()

    @torch.no_grad()
    def update(self, h):
        """Take in the teacher vectors h (N, D) of all processes; `follow` comes before this.

        Returns 0-dim tensors: used (components that won a vector) and resurrected (components that
        restarted). Vectors that are not finite leave the mixture as it was.
        """
        with torch.autocast(h.device.type, enabled=False):
            h, finite = self.checked(h)
            # L.1  u_i = (h_i - m) / |h_i - m|
            u = self.from_m(h)  # (N, D)

            # L.2  gamma_ik = 1 for k = argmax_k u_i . mu_k / |mu_k|
            winner = self.two_nearest(u)[1][:, 0]  # (N,)

            # L.3  n_k <- w n_k + g,  mu_k <- mu_k + g / n_k (u_k - mu_k)
            self.move_winners(u, winner, finite)

            # L.4  of two twins, the later one has to restart
            self.mark_twins(winner, finite)

            # L.5  who has to restart, or won nothing for long, restarts on the farthest vectors
            resurrected = self.restart(u, winner, finite)
            used = torch.zeros_like(self.n).index_fill_(0, winner, 1).sum() * finite
        return {"used": used, "resurrected": resurrected}

    def move_winners(self, u, winner, finite):
        """L.3 for the components winner (N,) of the unit vectors u (N, D); finite (): else nothing.

        Everything is computed once for each vector. Vectors with the same winner have equal rows,
        so it does not matter which of them is written.
        """
        same_winner = (winner[:, None] == winner).double()  # (N, N)
        r = same_winner.sum(1)  # (N,)
        # L.3  n_k <- w n_k + g,  where w = eta^r_k,  g = (1 - w) / (1 - eta)
        w = self.eta ** r  # (N,)
        g = (1 - w) / (1 - self.eta)  # (N,)
        n = w * self.n[winner] + g  # (N,)
        # L.3  mu_k <- mu_k + g / n_k (u_k - mu_k)
        u_k = same_winner @ u.double() / r[:, None]  # (N, D)
        mu_before = self.mu[winner].double()  # (N, D)
        mu = mu_before + (g / n)[:, None] * (u_k - mu_before)  # (N, D)
        self.mu[winner] = torch.where(finite, mu.float(), self.mu[winner])
        self.n[winner] = torch.where(finite, n, self.n[winner])
        self.idle += len(u) * finite
        self.idle[winner] = torch.where(finite, 0., self.idle[winner])

    def mark_twins(self, winner, finite):
        """L.4: `idle` becomes infinite where a component has to restart, and L.5 sees to it."""
        cos, pair = self.two_nearest(F.normalize(self.mu[winner], dim=1))  # (N, 2) (N, 2)
        # of the two means that are nearest to a winner, one is the winner itself
        are_twins = (cos[:, 1] > 1 - self.apart) & finite & (self.apart > 0)  # (N,)
        later = pair.amax(1)  # (N,)
        times_marked = torch.zeros_like(self.idle).index_add_(0, later, are_twins.double())  # (K,)
        self.idle.masked_fill_(times_marked > 0, torch.inf)

    def restart(self, u, winner, finite):
        """L.5. Returns how many components restarted, ()."""
        most = min(len(u), max(1, int(self.restart_share * self.K)))  # restarts of one step
        cos = (u * F.normalize(self.mu[winner], dim=1)).sum(1)  # (N,), to winners that have moved
        cos, farthest_first = cos.sort(stable=True)  # (N,) (N,)
        u = u[farthest_first]  # (N, D)
        twin_of_farther = (u @ u.T > 1 - self.apart).tril(-1).any(1)  # (N,)
        twin_of_winner = cos > 1 - self.apart  # (N,)
        left_out = (twin_of_farther | twin_of_winner) & (self.apart > 0)  # (N,)
        places = u[left_out.byte().argsort(stable=True)[:most]]  # (most, D), those left out last
        has_place = torch.arange(most, device=u.device) < len(u) - left_out.sum()  # (most,)
        k = self.idle.argsort(descending=True, stable=True)[:most]  # (most,), the most idle first
        restarts = (self.idle[k] > self.patience * self.K) & has_place & finite  # (most,)
        self.mu[k] = torch.where(restarts[:, None], places, self.mu[k])
        self.n[k] = torch.where(restarts, 1., self.n[k])
        self.idle[k] = torch.where(restarts, 0., self.idle[k])
        return restarts.sum()

    # ---- helpers -------------------------------------------------------------------------------
    def two_nearest(self, u):
        """(cosines, components), both (N, 2): the two nearest means of unit vectors u (N, D)."""
        cosines, components = [], []
        for start in range(0, self.K, self.chunk):
            directions = F.normalize(self.mu[start:start + self.chunk], dim=1)  # (chunk, D)
            cos = u @ directions.T  # (N, chunk)
            of_chunk = cos.topk(min(2, cos.shape[1]), dim=1)
            cosines.append(of_chunk.values)
            components.append(of_chunk.indices + start)
        two = torch.cat(cosines, 1).topk(2, dim=1)
        return two.values, torch.cat(components, 1).gather(1, two.indices)

    @staticmethod
    def checked(h):
        """(h, True), or (zeros, False) where a value of h is not finite; the host does not wait."""
        finite = torch.isfinite(h).all()
        return torch.where(finite, h.float(), 0.), finite


class Live(Decoupled):
    """Means of a LiveMixture as a prototype set.

    Logits are scale (h - m) . mu_k / |mu_k|, for student and teacher. Until the mixture starts, the
    random directions of Frozen take the place of mu_k, and m follows the teacher's vectors already.
    """

    gmm_start = 0.5
    Mixture = LiveMixture

    @classmethod
    def from_args(cls, args, begin=0):
        K, D = args.num_prototypes, args.bottleneck_dim
        gmm = cls.Mixture(K, D, eta=args.live_eta, patience=args.live_patience,
                          apart=args.live_apart, seed=args.seed)
        return cls(K, D, args.logit_scale, args.seed, gmm=gmm, begin=begin)

    @property
    def origin(self):
        return self.gmm.m

    def step(self, h, step, beta=0.5):
        self.gmm.follow(h)
        if not self.started:
            self.collect(h, step)
        if not self.started:
            return {}
        report = self.gmm.update(h)
        return {"mixture_used": report["used"], "resurrected": report["resurrected"]}

    # ---- the start ----
    def memory(self):
        """(K, D), where the last K teacher vectors wait: mu, which is free until the start."""
        return self.gmm.mu

    def start_from(self, h, mass):
        self.gmm.init_from(h)
