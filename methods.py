"""The losses as the training loop calls them, by --method: carp, carl, dino.

A method is a module with two calls: `targets`, once per step, makes of the teacher's vectors what the student has to
agree with; `forward`, once per micro-batch, gives a dict of named scalars whose sum is minimised. The loop does not
know which one it holds. `main` names the term that rests at `ln_k` as long as the student says nothing.
"""
import math

import torch
from torch import nn

from fast.losses import carp_blocks, dino_blocks
from losses import sinkhorn


class CARPLoss(nn.Module):
    """CARP and CARL for the loop: a new partition at every step, a function of (seed, step), so equal on all ranks."""

    def __init__(self, K, partition_size, seed, mean_over_ranks):
        super().__init__()
        self.K, self.partition_size, self.seed, self.mean = K, partition_size, seed, mean_over_ranks
        self.main, self.ln_k = "consistency", math.log(partition_size)  # its value when the student says nothing

    def offset(self, tau):
        """What the targets take off logits / tau: nothing."""
        return 0.0

    def targets(self, h_t, protos_t, step):
        """Teacher vectors (2, B, D) of a step -> what forward needs of them."""
        return h_t

    def forward(self, h_s, h_t, protos_s, protos_t, step):
        """h_s (V, B, D), h_t (2, B, D) of a micro-batch -> dict of scalars."""
        gen = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        perm = torch.randperm(self.K, generator=gen).to(h_s.device, non_blocking=True)  # (K,)
        C_s, unit = protos_s.raw()  # (K, D)
        C_t = C_s if protos_t is protos_s else protos_t.raw()[0]  # (K, D)
        h_s, h_t = protos_s.centred(h_s), protos_t.centred(h_t)  # (V, B, D) (2, B, D)
        return carp_blocks(h_s, h_t, C_s, C_t, self.partition_size, perm, self.mean, protos_s.scale, unit)


class DINOLoss(nn.Module):
    """DINO for the loop, as its official code has it: the teacher's probabilities are sharpened, and kept from all
    falling on one prototype, in one of three ways:

    "center"    softmax((z - centre) / tau), centre the running mean of z over views, images and ranks
    "prob"      softmax(z / tau + bias - centre), centre the running log of the mean probability (DINO-vMF)
    "sinkhorn"  Sinkhorn-Knopp over both views of all images (DINOv2, and Table C.3 for decoupled prototypes)
    """

    def __init__(self, K, per_epoch, targets="center", temps=(0.04, 0.04), temp_epochs=0, tau_s=0.1, momentum=0.9,
                 mean_over_ranks=None, all_reduce=None):
        super().__init__()
        self.per_epoch, self.how, self.temps, self.temp_epochs = per_epoch, targets, temps, temp_epochs
        self.tau_s, self.momentum, self.reduce = tau_s, momentum, all_reduce
        self.mean = mean_over_ranks or (lambda x: x)
        self.register_buffer("centre", torch.zeros(K))  # (K,)
        self.main, self.ln_k = "cross_entropy", math.log(K)

    def offset(self, tau):
        """What the targets take off logits / tau: the centre (K,), which Sinkhorn-Knopp leaves at 0."""
        return self.centre if self.how == "prob" else self.centre / tau

    def temperature(self, step):
        """tau of the teacher: a straight line over the first `temp_epochs` epochs, one value per epoch, then flat."""
        start, end = self.temps
        share = min(1, step // self.per_epoch / max(1, self.temp_epochs - 1)) if self.temp_epochs else 1
        return start + (end - start) * share

    @torch.no_grad()
    def targets(self, h_t, protos_t, step):
        """Teacher vectors (2, B, D) of a step -> p_t (2, B, K)."""
        tau, z = self.temperature(step), protos_t.logits(h_t)  # (2, B, K)
        z_tau = z / tau + protos_t.bias(tau)  # (2, B, K)
        if self.how == "sinkhorn":
            return sinkhorn(z_tau.flatten(0, 1), 1.0, all_reduce=self.reduce).view_as(z)
        # both centres move after they have served, as in the official code
        if self.how == "prob":
            now = self.mean(z_tau.softmax(-1).mean((0, 1))).clamp_min(torch.finfo(z.dtype).tiny).log()  # (K,)
        else:
            now = self.mean(z.mean((0, 1)))  # (K,)
        p_t = (z_tau - self.offset(tau)).softmax(-1)  # (2, B, K)
        self.centre.lerp_(now, 1 - self.momentum)
        return p_t

    def forward(self, h_s, p_t, protos_s, protos_t, step):
        """h_s (V, B, D), p_t (2, B, K) of a micro-batch -> dict of scalars."""
        bias, (C, unit) = protos_s.bias(self.tau_s), protos_s.raw()  # (K, D)
        return {"cross_entropy": dino_blocks(protos_s.centred(h_s), p_t, C, bias if torch.is_tensor(bias) else None,
                                             self.tau_s, protos_s.scale, unit)}


def make(args, per_epoch, mean_over_ranks=None, all_reduce=None):
    """The loss that --method asks for; per_epoch: steps of one pass over the images."""
    def carp_loss():  # carl: one block of K prototypes
        return CARPLoss(args.num_prototypes, args.partition_size, args.seed, mean_over_ranks)
    return {
        "carp": carp_loss,
        "carl": carp_loss,
        "dino": lambda: DINOLoss(args.num_prototypes, per_epoch, args.targets, args.teacher_temp,
                                 args.teacher_temp_epochs, args.student_temp, mean_over_ranks=mean_over_ranks,
                                 all_reduce=all_reduce),
    }[args.method]()
