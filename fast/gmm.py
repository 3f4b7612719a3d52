"""The mixture of gmm.py, faster where N K is large: the same A.1 and A.2, in another order of work.

gmm.py holds gamma (N, K) and a few more tensors of that size. Here one table of that size exists.
Five things make the difference:

* Components lie in rows, (K, N) instead of (N, K): BLAS multiplies and writes whole rows faster.
* A.1 takes powers of two instead of e: exp2 is cheaper than exp.
* Powers of at most 2^-54 are set to 0. With the exponent g (A.3) their sums would not change
  float64 S, and products of two powers are then never subnormal numbers, which are slow on many
  CPUs.
* Intermediate results reuse the same memory from block to block. Fresh memory may be what another
  core wrote last, and the first pass over it then takes up to ten times as long.
* Where N K is more than `keep`, the vectors are taken in parts. Each number of the table is still
  computed once; means and variances are computed once for each part.

Letters as in gmm.py. A tile is the part of the table that belongs to one block of components.
"""
import math

import torch
from torch.nn import functional as F

from gmm import OnlineGMM, spread


def exp2_or_0(z):
    """2^z in place, 0 where z <= -54."""
    return F.threshold_(z, -54, -math.inf).exp2_()


class FastGMM(OnlineGMM):
    """An OnlineGMM whose `update` is faster where N K is large.

    keep: numbers of the table in memory at a time (2^26 are 256 MiB).
    """

    def __init__(self, K, D, *, keep=2 ** 26, **options):
        super().__init__(K, D, **options)
        self.keep = keep

    @torch.no_grad()
    def update(self, h, beta, eta):
        """As OnlineGMM.update."""
        h, eta = self.checked(h, beta, eta)
        c, pooled, rms = spread(h)  # (D,) () ()
        self.t += 1
        with torch.autocast(h.device.type, enabled=False):
            # h^2 - c^2 as a product loses no more than h itself lost when it became float32
            x = torch.cat([h - c, (h - c) * (h + c)], dim=1)  # (N, 2D)
            shift = torch.cat([c, c.double() ** 2])  # (2D,)
            used = x.new_zeros(self.K)
            for ks, T_pi, T in self.block_statistics(x, c, beta, used):
                T_pi = T_pi.double()  # (|ks|,)
                # A.2 is of x so far; shifted back, it is of h
                T = T.double().addcmul_(T_pi[:, None], shift)  # (|ks|, 2D)
                self.forget(ks, T_pi, T[:, :self.D], T[:, self.D:], len(h), eta)  # A.3
            self.log_pi.copy_(self.weights().log())  # A.5
            self.set_floor(pooled, eta)
            resurrected = self.split_resurrect(pooled, rms)  # A.6
        return {"used": used.sum(), "pi_max": self.log_pi.max().exp(), "resurrected": resurrected}

    def block_statistics(self, x, c, beta, used):
        """A.1 and A.2 on x = [h - c, h^2 - c^2] (N, 2D): yields ks, sum_i gamma_ik (|ks|,) and
        sum_i gamma_ik x_i (|ks|, 2D) for one block of components after the other.

        used (K,): gets 1 where a component is the most responsible one of some vector.
        """
        blocks, parts = self.blocks(), x.split(max(1, self.keep // self.K))
        size = blocks[0].stop
        sums = [None] * len(blocks)
        # what log2_joint computes of a block
        memory = x.new_empty(2, size, self.D), x.new_empty(2, size, self.D, dtype=torch.float64)
        table = x.new_empty(len(blocks), size, len(parts[0]))  # (blocks, |ks|, n)
        table[-1] = -math.inf  # the last block may be shorter, and what it lacks must win nothing
        for part, rows in enumerate(parts, 1):
            d = rows[:, :self.D].T  # (D, n)
            d = torch.stack([d, d * d])  # (2, D, n)
            n = len(rows)
            tiles = [block[:ks.stop - ks.start, :n] for block, ks in zip(table, blocks)]
            share = self.fill(table[..., :n], tiles, d, c, beta, memory, used)  # (blocks, n)
            for i, (ks, tile) in enumerate(zip(blocks, tiles)):
                # gamma is tile * share[i] (A.1), and A.2 needs only its products with 1 and x
                weighted = share[i][:, None] * rows  # (n, 2D)
                if part == 1:
                    sums[i] = tile @ share[i], tile @ weighted  # (|ks|,) (|ks|, 2D), A.2
                else:
                    sums[i] = sums[i][0] + tile @ share[i], sums[i][1].addmm_(tile, weighted)
                if part == len(parts):
                    yield ks, *sums[i]
                    sums[i] = None

    def fill(self, table, tiles, d, c, beta, memory, used):
        """A.1 for n vectors: gamma of a block is its tile, as filled here, times its row of the
        share (blocks, n) that is returned. The tiles are parts of table (blocks, |ks|, n)."""
        n = table.shape[2]
        # maxima within groups of components say later, in two steps, which component is the largest
        # one of a vector: what belongs to one vector lies far apart in memory
        group_size = math.gcd(table.shape[1], 64)
        groups = table.unflatten(1, (-1, group_size))  # (blocks, groups, group_size, n)
        group_max = table.new_empty(*groups.shape[:2], n)  # (blocks, groups, n)
        block_max, block_sum = table.new_empty(2, len(tiles), n)  # (blocks, n) each
        for i, (ks, tile) in enumerate(zip(self.blocks(), tiles)):
            self.log2_joint(d, c, ks, beta, memory, out=tile)  # (|ks|, n)
            torch.amax(groups[i], 1, out=group_max[i])
            torch.amax(group_max[i], 0, out=block_max[i])
            torch.sum(exp2_or_0(tile.sub_(block_max[i])), 0, out=block_sum[i])
        share = exp2_or_0(block_max - block_max.amax(0))  # (blocks, n)
        share /= (share * block_sum).sum(0)
        group = group_max.flatten(0, 1).argmax(0)  # (n,)
        vector = torch.arange(n, device=table.device)
        inside = groups.flatten(0, 1)[group, :, vector].argmax(1)  # (n,)
        used.index_fill_(0, group * group_size + inside, 1.0)
        return share

    def log2_joint(self, d, c, ks, beta, memory, out):
        """log2[ pi_k P(h_i | k)^beta ] (|ks|, n), up to a term that all k share, into `out`.

        d (2, D, n): h - c and its square. memory: (2, >= |ks|, D) float32 and the same in float64,
        used again for each block.
        """
        to_log2 = 1 / math.log(2)
        power = beta * to_log2  # log2 of P^beta is power * log P
        slope, precision = memory[0][:, :ks.stop - ks.start]  # (|ks|, D) each
        mean_c, inverse = memory[1][:, :ks.stop - ks.start]  # (|ks|, D) each
        mean = self.mean(ks)  # (|ks|, D), float64
        var = self.variance(ks, mean)  # (|ks|, D)
        # sum_d log Sigma: float64 holds the product of 16 variances, and log(a b) = log a + log b
        log_det = var.unflatten(1, (-1, math.gcd(self.D, 16))).prod(2).log_().sum(1)  # (|ks|,)
        torch.sub(mean, c, out=mean_c)  # mu - c
        torch.reciprocal(var, out=inverse)  # 1 / Sigma
        precision.copy_(inverse)
        slope.copy_(mean_c).mul_(precision)
        square = mean_c.square_().mul_(inverse).sum(1)  # (|ks|,), (mu - c)^2 / Sigma
        const = to_log2 * self.log_pi[ks] - power / 2 * (log_det + square)  # (|ks|,)
        # two products over D and not one over [slope, precision]: short rows cross no cache line
        torch.addmm(const.float()[:, None], slope, d[0], alpha=power, out=out)
        return out.addmm_(precision, d[1], alpha=-power / 2)
