"""--method swav: SwAV (Caron et al. 2020) on the loop of train.py.

SwAV has no teacher: the student's own scores, without gradient, make the targets. That is a teacher
of momentum 0, which equals the student after every step, so `--method swav` sets --momentum and
--momentum-end to 0. Prototypes are trained by the loss (`--prototypes joint`).

    W.1  q_j = Sinkhorn-Knopp of z_j / 0.05, of each global view j alone           (B, K)
    W.2  loss = mean over pairs of views i != j of -sum_k q_jk log softmax(z_i / 0.1)_k

Where the batch is smaller than K, W.1 has too few rows to use every prototype. Then vectors of the
last steps join its rows, scored with the prototypes of now, and their targets are dropped again.

    python train.py --method swav --prototypes joint

differs: with batch norm in the head, the scores of targets are normalised over the two global views
alone, and in the official code over all views. `--no-head-bn` makes it exact. Prototypes are
normalised in the logits; the official code does it after each step. The queue is used as soon as
it is full; the official code waits for pass 15.

    B images of this process; Q vectors of each view in the queue
"""
import sys

import torch

from losses import DINOLoss, sinkhorn
from support import ddp


class SwAV(DINOLoss):
    """W.1 and W.2. queue: Q; 0: none. The queue serves once it is full."""

    teacher_momentum = (0.0, 0.0)
    teacher_temp = (0.05, 0.05)

    def __init__(self, K, D, steps_per_epoch, temps=(0.05, 0.05), temp_epochs=0, tau=0.1, queue=0):
        super().__init__(K, steps_per_epoch, "sinkhorn", temps, temp_epochs, tau)
        self.register_buffer("queue", torch.zeros(2, queue, D))  # newest first
        self.register_buffer("queued", torch.tensor(0))

    @classmethod
    def from_args(cls, args, steps_per_epoch):
        if args.momentum or args.momentum_end:
            ddp.print_once("note: SwAV's targets come from the student itself; with --momentum "
                           f"{args.momentum:g} --momentum-end {args.momentum_end:g} they come from "
                           "an averaged teacher", sys.stderr)
        queue = args.queue
        if queue is None:
            queue = 15 * args.batch_size if args.num_prototypes > args.batch_size else 0
        return cls(args.num_prototypes, args.bottleneck_dim, steps_per_epoch, args.teacher_temp,
                   args.teacher_temp_epochs, args.student_temp, queue)

    @torch.no_grad()
    def targets(self, h_t, protos_t, step):
        """Teacher vectors (2, B, D) -> q (2, B, K)."""
        tau, (_, B, D), Q = self.temperature(step), h_t.shape, self.queue.shape[1]
        # every process balances all rows, and keeps those of its own images
        h = ddp.gather_views(h_t).view(2, -1, D).float()  # (2, B W, D) of W processes
        mine = slice(ddp.RANK * B, (ddp.RANK + 1) * B)
        rows = torch.cat([h, self.queue], 1) if Q and self.queued >= Q else h  # (2, B W [+ Q], D)
        z = protos_t.logits(rows)  # (2, B W [+ Q], K)
        q = torch.stack([sinkhorn(z_j / tau + protos_t.bias(tau), 1.0) for z_j in z])  # W.1
        if Q:
            h = torch.where(h.isfinite().all(-1, keepdim=True), h, 0)  # the run skips such steps
            self.queue.copy_(torch.cat([h, self.queue], 1)[:, :Q])
            self.queued += h.shape[1]
        return q[:, mine]
