"""How long a training step would take if it were nothing but its matrix products.

    python -m lab.products                       of the default run
    python -m lab.products --method dino         of a run with these flags of train.py

Start it in the folder of train.py. A short run is watched: each operation that PyTorch carries out
is written down, with the shapes of its tensors. Then the products of one step (of matrices,
convolutions, attention, their gradients) are carried out again on random numbers, and nothing else.
It prints their time, and how many other operations a step has. `lab.bench loop` takes this time as
the floor of a step.
"""
import argparse
import collections
import contextlib
import io
import statistics
import tempfile
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from support.errors import one_sentence

# operations of ATen, PyTorch's library of tensor operations, that are products; also those whose
# names begin like the last one
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution",
            "convolution_backward", "_scaled_dot_product")
FLAGS = ["--gmm-start", "0", "--log-every", "1", "--eval-every", "1000000",
         "--eval-bank", "64", "--eval-queries", "8"]
SET_HERE = ("--device", "--out", "--steps", "--stop-at")
REPLAYS = 7


def is_product(name):
    return name in PRODUCTS or name.startswith(PRODUCTS[-1])


class Watch(TorchDispatchMode):
    """Counts the operations inside: `calls` {(operation, its arguments, a tensor being a tuple of
    its shape, strides and type)}, for products; `names` {name} for all others."""

    def __init__(self):
        super().__init__()
        self.calls, self.names = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if is_product(name):
            named = tuple(sorted((kwargs or {}).items()))
            self.calls[operation, described(args), described(named)] += 1
        else:
            self.names[name] += 1
        return operation(*args, **(kwargs or {}))


class Shape(tuple):
    """(shape, strides, type) of a tensor."""


def described(value):
    """An argument of an operation, with a Shape for each tensor."""
    if torch.is_tensor(value):
        return Shape((tuple(value.shape), value.stride(), value.dtype))
    if isinstance(value, (tuple, list)):
        return tuple(described(part) for part in value)
    return value


def filled(value):
    """The argument that `described` describes, with random numbers in its tensors."""
    if isinstance(value, Shape):
        shape, strides, dtype = value
        size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))  # of its memory
        numbers = torch.randn(size).to(dtype) if 0 not in shape else torch.empty(0, dtype=dtype)
        return numbers.as_strided(shape, strides)
    if isinstance(value, tuple):
        return [filled(part) for part in value]
    return value


def watched(flags, steps):
    """A Watch of a run of so many steps, which prints nothing."""
    silence = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as out, silence, Watch() as watch:
        train.main([*FLAGS, *flags, "--device", "cpu", "--out", out, "--steps", "1000",
                    "--stop-at", str(steps)])
    return watch


def of_one_step(flags):
    """(products, other operations) of a step: Counters as those of Watch. Two steps less one are
    one, without what a run does at its start and its end."""
    one, two = watched(flags, 1), watched(flags, 2)
    return two.calls - one.calls, two.names - one.names


def seconds(calls):
    """Median time of all these products, one after the other."""
    work = [(operation, filled(args), dict(filled(kwargs)))
            for (operation, args, kwargs), count in calls.items() for _ in range(count)]
    times = []
    with torch.no_grad():
        for _ in range(1 + REPLAYS):
            begin = time.perf_counter()
            for operation, args, kwargs in work:
                operation(*args, **kwargs)
            times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])  # the first one loads the libraries


def main(argv=None):
    """Print and return the seconds of the products of a step."""
    parser = argparse.ArgumentParser("python -m lab.products", description=__doc__,
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    _, flags = parser.parse_known_args(argv)  # those of train.py
    with one_sentence("lab.products"):
        for flag in (word.split("=")[0] for word in flags):
            if flag in SET_HERE:
                raise ValueError(f"{flag} is set by lab.products itself: it takes two steps on the "
                                 "CPU, in a folder that it deletes")
        calls, others = of_one_step(flags)
        took = seconds(calls)
    most = ", ".join(f"{name} {count:,}" for name, count in others.most_common(6))
    print(f"products of a step: {sum(calls.values()):,}, {took:.6f} s")
    print(f"other operations: {sum(others.values()):,} ({most} ...)")
    return took


if __name__ == "__main__":
    main()
