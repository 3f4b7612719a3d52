"""torch.distributed in one small file. `python train.py` is one process, and everything here is then a no-op;
`torchrun --nproc_per_node=N train.py` sets RANK, LOCAL_RANK and WORLD_SIZE, and the global batch is split over N.

The losses, the batch norms and the mixture see the global batch, so that the number of processes changes nothing.
"""
import datetime
import os

import torch
import torch.distributed as dist
from torch import nn

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def setup(device):
    """Join the process group if torchrun started us; returns this rank's torch.device."""
    if device == "cuda" and WORLD > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        # a rank that died leaves the others waiting at most this long
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=datetime.timedelta(minutes=10))
    return torch.device(device)


def cleanup():
    if dist.is_initialized():
        dist.destroy_process_group()


def print0(*args):
    if RANK == 0:
        print(*args, flush=True)


def barrier():
    if WORLD > 1:
        dist.barrier()


def all_reduce(x):
    """Sum of x over the ranks, in place; returns x."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def broadcast(tensors):
    """Rank 0's values for every tensor, in place."""
    if WORLD > 1:
        for x in tensors:
            dist.broadcast(x, src=0)


def all_gather(x):
    """The x of all ranks, concatenated along the first dimension in rank order (no gradient)."""
    if WORLD == 1:
        return x
    out = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(out, x.contiguous())
    return torch.cat(out)


class _Mean(torch.autograd.Function):
    """Mean over the ranks, forwards and backwards. With gradients of parameters averaged over the ranks (below), that
    backward is the gradient of the one-process loss."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x.clone()) / WORLD

    @staticmethod
    def backward(ctx, g):
        return all_reduce(g.clone()) / WORLD


def mean_over_ranks(x):
    """Differentiable mean of x over the ranks."""
    return x if WORLD == 1 else _Mean.apply(x)


def average_gradients(params):
    """Mean of the gradients over the ranks in one reduction. Plain code instead of the DistributedDataParallel wrapper:
    no `module.` in the checkpoints, no buffers broadcast, nothing special about gradient accumulation or prototypes."""
    if WORLD == 1:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = all_reduce(torch.cat([g.reshape(-1) for g in grads])) / WORLD
    for g, mean in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batch of all ranks, on any device (torch's own is for GPUs only)."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims, shape = [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)
        with torch.autocast(x.device.type, enabled=False):
            xf = x.float()
            mean = mean_over_ranks(xf.mean(dims))                                                                 # (C,)
            var = mean_over_ranks(((xf - mean.view(shape)) ** 2).mean(dims))                                      # (C,)
            with torch.no_grad():
                n = x.numel() / x.size(1) * WORLD
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / (n - 1), self.momentum)
            y = (xf - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)
            return (y * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


def sync_batchnorm(module):
    """Turn every batch norm of a module into one over all ranks; the parameters and their names stay."""
    if WORLD > 1:
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.__class__ = SyncBatchNorm
    return module
