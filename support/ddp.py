"""torch.distributed in one small file.

`python train.py` is one process, and everything here then does nothing.
`torchrun --nproc_per_node=N train.py` sets RANK, LOCAL_RANK and WORLD_SIZE, and the global batch is
split over N.

The losses, the batch norms and the mixture see the global batch, so that the number of processes
changes nothing but the rounding, and which branches --drop-path leaves out.
"""
import contextlib
import datetime
import os
import re
import socket
import struct
import sys
import time

import torch
import torch.distributed as dist
from torch import nn


def read_environment(variables):
    """[rank, rank on this host, processes, restarts] as a launcher set them, or without one.

    ValueError for variables that are half set or no numbers.
    """
    numbers = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 0}
    for name in numbers.keys() & variables.keys():
        if not re.fullmatch("[0-9]{1,9}", variables[name]):
            raise ValueError(f"{name}={variables[name]!r} in the environment is not a whole number")
        numbers[name] = int(variables[name])
    rank, _, world, _ = numbers.values()
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name in variables and other not in variables:
            raise ValueError(f"{name} is set in the environment and {other} is not: set both, as "
                             "torchrun does, or none")
    if rank >= world:
        raise ValueError(f"RANK={rank} in the environment must be below WORLD_SIZE={world}")
    port = variables.get("MASTER_PORT", "")
    if world > 1 and not variables.get("MASTER_ADDR"):
        raise ValueError(f"WORLD_SIZE={world} in the environment needs MASTER_ADDR and "
                         "MASTER_PORT, as torchrun sets them")
    if world > 1 and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2 ** 16):
        raise ValueError(f"MASTER_PORT={port!r} in the environment is not the number of a port")
    return list(numbers.values())


try:
    RANK, LOCAL_RANK, WORLD, RESTARTS = read_environment(os.environ)
except ValueError as error:  # every command imports this file, and none of them can go on
    print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
    sys.exit(2)


def setup(device, timeout=600):
    """Join the process group if torchrun started us; returns this rank's torch.device.

    timeout: seconds after which a process that hears nothing from another one gives up.
    ValueError where there is no GPU for this rank, or the processes do not find each other.
    """
    if device == "cuda" and WORLD > 1:
        if LOCAL_RANK >= torch.cuda.device_count():
            raise ValueError(f"process {LOCAL_RANK} of this host has no GPU: there are "
                             f"{torch.cuda.device_count()}, numbered from 0")
        device = f"cuda:{LOCAL_RANK}"
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout)
        try:
            store = next(dist.rendezvous("env://", timeout=timeout))[0]
        except RuntimeError as error:  # the port is taken, or nobody answers
            raise ValueError(f"process {RANK} of {WORLD} cannot meet the others at MASTER_ADDR and "
                             f"MASTER_PORT: {str(error).splitlines()[0]}") from None
        # torchrun keeps its store over a restart, and the addresses in it are then those of dead
        # processes
        store = dist.PrefixStore(f"restart {RESTARTS}", store)
        # gloo for tensors on the CPU also beside nccl: `largest` then waits for no GPU, and a rank
        # that died closes its connections, which the others notice at once; a machine that
        # vanished, or a cable that was cut, after the timeout
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        if name := interface_towards(os.environ["MASTER_ADDR"]):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        try:
            dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD,
                                    timeout=timeout)
        except RuntimeError as error:
            chosen = os.environ.get("GLOO_SOCKET_IFNAME", "not set")
            raise ValueError(
                f"process {RANK} of {WORLD} cannot connect to the others, though they met at "
                "MASTER_ADDR: the hosts must reach each other at every port, over the network "
                f"interface that GLOO_SOCKET_IFNAME names ({chosen}): "
                f"{str(error).splitlines()[0]}") from None
    return torch.device(device)


def interface_towards(address):
    """Name of the network interface over which this host reaches another one, as in eth0; None
    where it is the host itself, or the system does not tell.

    Gloo would take the interface of this host's name, and many systems give their name the address
    127.0.0.1, which no other host can reach.
    """
    with contextlib.suppress(OSError, ImportError):
        import fcntl  # not on Windows
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((address, 9))  # sends nothing: it chooses a way
            own = s.getsockname()[0]
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # an interface without an address
                    request = struct.pack("256s", name.encode())
                    reply = fcntl.ioctl(s.fileno(), 0x8915, request)  # SIOCGIFADDR of Linux
                    if socket.inet_ntoa(reply[20:24]) == own and not own.startswith("127."):
                        return name
    return None


def cleanup():
    if dist.is_initialized():
        # A thread of gloo may still be letting go of the last tensors, for which it needs Python's
        # lock; torch 2.6 waits for that thread while it holds the lock. So give it up for a moment
        time.sleep(0.1)
        dist.destroy_process_group()


def lost_contact(error):
    """Whether a RuntimeError says that another process is gone in the words of gloo or nccl."""
    words = ("gloo", "nccl", "connection")
    return WORLD > 1 and (isinstance(error, dist.DistError)
                          or any(word in str(error).lower() for word in words))


def print0(*args):
    if RANK == 0:
        print(*args, flush=True)


printed = set()


def print_once(text, file=None):
    """Print a sentence on the first process, and not again while this process lives.

    file: sys.stderr for what must not mix with the numbers of a tool; None: sys.stdout.
    """
    if text not in printed:
        printed.add(text)
        if RANK == 0:
            print(text, file=file, flush=True)


def first_process_first(make):
    """make() on every process, on the first one before the others: it may have to download."""
    if RANK:
        barrier()
    made = make()
    if RANK == 0:
        barrier()
    return made


def barrier():
    if WORLD > 1:
        dist.barrier()


def all_reduce(x, op="sum"):
    """Sum ("sum") or maximum ("max") of x over the ranks, in place; returns x."""
    if WORLD > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op.upper()))
    return x


def largest(number):
    """The largest of a Python int over the processes. Waits for no GPU."""
    return int(all_reduce(torch.tensor(number), "max"))


def from_rank0(thing):
    """Rank 0's value of a small Python object."""
    box = [thing]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def all_gather(x):
    """The x of all ranks, concatenated along the first dimension in rank order (no gradient)."""
    if WORLD == 1:
        return x
    out = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(out, x.contiguous())
    return torch.cat(out)


def gather_views(h):
    """h (v, b, D), v views of this process -> (N, D) of all, in the order of one process.

    v is 2 in train.py and 1 in zoo/msn.py. A mixture starts from the last K vectors, and which
    prototype comes from which vector must not depend on the number of processes.
    """
    views, _, D = h.shape
    if WORLD == 1:
        return h.reshape(-1, D)
    h = all_gather(h).view(WORLD, views, -1, D)  # (processes, v, b, D)
    return h.transpose(0, 1).reshape(-1, D)  # (N, D)


class _Mean(torch.autograd.Function):
    """Mean over the processes, forwards and backwards.

    Gradients of parameters are averaged over the processes too (see average_gradients). With this
    backward that average is the gradient which a run in a single process would have.
    """

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x.clone()) / WORLD

    @staticmethod
    def backward(ctx, g):
        return all_reduce(g.clone()) / WORLD


def mean_over_ranks(x):
    """Differentiable mean of x over the ranks."""
    return x if WORLD == 1 else _Mean.apply(x)


def average_gradients(params, values):
    """Mean over the processes: of the gradients, in place, and of values (n,), returned.

    Plain code instead of the DistributedDataParallel wrapper: no `module.` in the checkpoints, no
    buffers broadcast, nothing special about gradient accumulation or prototypes.
    """
    if WORLD == 1:
        return values
    parts = [p.grad for p in params if p.grad is not None] + [values]
    flat = all_reduce(torch.cat([g.reshape(-1) for g in parts])) / WORLD
    for g, mean in zip(parts, flat.split([g.numel() for g in parts])):
        g.copy_(mean.view_as(g))
    return values


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batch of all ranks, on any device (torch's own is for GPUs only)."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims, shape = [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)
        with torch.autocast(x.device.type, enabled=False):
            xf = x.float()  # (B, C, ...)
            n = all_reduce(xf.new_full((), x.numel() / x.size(1)))  # () rows of all ranks
            mean = mean_over_ranks(xf.sum(dims)) * (WORLD / n)  # (C,)
            squares = (xf - mean.view(shape)) ** 2  # (B, C, ...)
            var = mean_over_ranks(squares.sum(dims)) * (WORLD / n)  # (C,)
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / (n - 1), self.momentum)
            y = (xf - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)
            return (y * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


def sync_batchnorm(module):
    """Make every batch norm of a module one over all processes; parameters and names stay."""
    if WORLD > 1:
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.__class__ = SyncBatchNorm
    return module
