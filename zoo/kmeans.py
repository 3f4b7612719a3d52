"""--prototypes kmeans and --method deepcluster: k-means once per pass over the images.

DeepCluster-v2 (Caron et al. 2020) moves its prototypes by clustering alone: no gradient of a loss
ever reaches them. A memory holds one unit vector of every image, written as the image passes, so
that it is up to one pass old. At the first step of each pass but the first, spherical k-means runs
on the memory:

    KM.1  start       K rows of the memory, drawn at random; if it has fewer, some start twice
    KM.2  assign      a_i = argmax_k u_i . c_k
    KM.3  move        c_k <- m_k / |m_k|, with m_k the mean of the u_i with a_i = k; a component
                      without members keeps its vector
    KM.4  label       KM.2 and KM.3 ten times, and then KM.2 once more: a_i is the label of image i

As prototypes, the c_k serve any loss: Eq. 3 with L_C the loss of k-means, and t counts passes.
Their own loss is the cross-entropy of every crop with the label of its image (`--method
deepcluster`).

    python train.py --prototypes kmeans
    python train.py --prototypes kmeans --method deepcluster

    n images in the training set; N vectors of a step; K prototypes in D dimensions
"""
import math

import torch
from torch.nn import functional as F

from heads import Frozen
from losses import Loss
from support import ddp
from views import indices

ROUNDS = 10  # of KM.2 and KM.3, in the official code


def assign(u, C, chunk=4096):
    """KM.2: (n,) int64, the row of C (K, D) with the largest product with each u (n, D)."""
    return torch.cat([(part @ C.T).argmax(1) for part in u.split(chunk)])


def spherical_kmeans(u, C, rounds=ROUNDS):
    """KM.2 and KM.3, `rounds` times: unit vectors u (n, D), unit centres C (K, D) -> (C, labels).

    labels (n,) belong to the centres that are returned (KM.4).
    """
    for _ in range(rounds):
        a = assign(u, C)  # (n,)
        m = torch.zeros_like(C, dtype=torch.float64).index_add_(0, a, u.double())  # (K, D), sums
        has_members = torch.bincount(a, minlength=len(C)) > 0  # (K,)
        C = torch.where(has_members[:, None], F.normalize(m, dim=1).to(C.dtype), C)
    return C, assign(u, C)


class KMeans(Frozen):
    """Centres of spherical k-means on one teacher vector per image; see above.

    Random directions serve in the first pass, while the memory fills. The memory (n, D) and the
    labels (n,) are part of the checkpoint: at n = 1.3 million and D = 256 they are 1.3 GB.

    differs: the official code trains without a teacher, has three heads with memories of both
    global crops, and fills them by a forward pass before the first step. Here is one head, the
    memory is that of the first crop, and the vectors are the teacher's.
    """

    def __init__(self, K, D, scale=1.0, seed=0, *, n, batch_size):
        super().__init__(K, D, scale, seed)
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.register_buffer("C", self.start.clone())  # (K, D)
        self.register_buffer("memory", torch.zeros(n, D))  # rows of unit length, or not yet written
        self.register_buffer("labels", torch.full((n,), -1))  # -1: no vector was there to cluster
        self.register_buffer("used", torch.tensor(0))  # clusters with members

    @classmethod
    def from_args(cls, args, begin=0):
        return cls(args.num_prototypes, args.bottleneck_dim, args.logit_scale, args.seed,
                   n=args.data_seen["images"], batch_size=args.batch_size)

    def vectors(self):
        return self.C

    @torch.no_grad()
    def step(self, h, step, beta=0.5):
        # which images a step holds is a function of (seed, step)
        i = indices(self.n, self.batch_size, self.seed, step).to(h.device)  # (N/2,)
        if step and step % (self.n // self.batch_size) == 0:
            self.cluster(step)
        first = h.view(2, -1, h.shape[-1])[0].float()  # (N/2, D), of the first global crop
        finite = torch.isfinite(first).all(1)  # (N/2,), as the run skips steps that are not finite
        self.memory[i[finite]] = F.normalize(first[finite], dim=1)
        return {"mixture_used": self.used.clone()} if self.used else {}

    def cluster(self, step):
        written = self.memory.any(1).nonzero().squeeze(1)  # (n',), as a pass drops its rest
        u = self.memory[written]  # (n', D)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        # KM.1
        order = torch.randperm(len(u), generator=generator).to(u.device)  # (n',)
        C = u[order.repeat(math.ceil(len(self.C) / len(u)))[:len(self.C)]]  # (K, D)
        # KM.2 to KM.4
        C, labels = spherical_kmeans(u, C)
        self.C.copy_(C)
        self.labels[written] = labels
        self.used.fill_(len(labels.unique()))


class DeepCluster(Loss):
    """Cross-entropy of every student view with the cluster of its image; targets from KMeans.

    All V crops count, the one whose vector was clustered too: no pair i == j is left out. An image
    without a label takes the prototype nearest to its teacher's vector: all do so in the first
    pass.
    """

    only_with = "kmeans"
    unit_h = True
    teacher_momentum = (0.0, 0.0)  # there is no teacher but the student itself

    def __init__(self, K, tau, batch_size, seed):
        super().__init__()
        self.tau, self.batch_size, self.seed = tau, batch_size, seed
        self.uniform = math.log(K)

    @classmethod
    def from_args(cls, args, steps_per_epoch):
        return cls(args.num_prototypes, args.student_temp, args.batch_size, args.seed)

    @torch.no_grad()
    def targets(self, h_t, protos_t, step):
        """Teacher vectors (2, B, D) -> labels (1, B)."""
        i = indices(protos_t.n, self.batch_size, self.seed, step)  # (batch_size,)
        mine = i.chunk(ddp.WORLD)[ddp.RANK].to(h_t.device)  # (B,)
        labels = protos_t.labels[mine]  # (B,)
        nearest = protos_t.logits(h_t[0]).argmax(-1)  # (B,)
        return torch.where(labels < 0, nearest, labels)[None]  # (1, B)

    def forward(self, h_s, labels, protos_s, protos_t, step):
        z = protos_s.logits(h_s) / self.tau  # (V, B, K)
        labels = labels.expand(len(z), -1)  # (V, B)
        return {"cross_entropy": F.cross_entropy(z.flatten(0, 1), labels.flatten())}
