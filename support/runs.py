"""A run that has been trained, in use: its networks, and what its prototypes answer for."""
import os
import textwrap

import torch

import config
import heads
import losses
import views
from support import backbones, checkpoint, checkpoints


def networks_of(ckpt, add_flags=None):
    """(teacher, its prototypes, args as a Namespace) of a checkpoint that has been read.

    add_flags: as for config.parse, of the script that wrote it.
    """
    args = config.completed(ckpt["args"], add_flags)
    net, protos = checkpoint.network(args), heads.prototypes(args)
    net.load_state_dict(ckpt["teacher"])
    restore(protos, ckpt)
    return net, protos, args


def restore(protos, ckpt):
    """Load the teacher's prototypes from a checkpoint that has been read."""
    protos.load_state_dict(ckpt["prototypes"]["teacher"] | checkpoint.read_mixture(ckpt))


@torch.no_grad()
def assignments(run, images, device="cpu"):
    """Yields (h (n, D), P (n, K)) of one batch of plain images after another: the teacher's
    vectors, and how much each prototype answers for them.

    run: what load_run returns.
    """
    net, prototypes, loss, args = run
    for part in (net, prototypes, loss):
        part.to(device)
    for x in views.eval_batches(images, args["img_size"], device=device, mean=args["mean"],
                                std=args["std"]):
        h = net([x])  # (n, D)
        yield h, prototypes.assign(h, args["beta"][1], *loss.tau_and_centre())


def load_run(path):
    """(net, prototypes, loss, args dict) of the teacher in a run folder or its ckpt.pt.

    args holds every flag: those that are newer than the run have their defaults.
    net([x]) -> h (N, D) in evaluation mode; prototypes.assign(h, args["beta"][1],
    *loss.tau_and_centre()) -> (N, K), with beta as at the end of the run. A script of zoo/ that
    saves other networks defines a function `load_run` of its own. ValueError if it is no checkpoint
    of a run of ours.
    """
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    ckpt = checkpoints.read(path)
    backbones.check_ours(path, ckpt, "teacher")
    checkpoint.check_version(path, ckpt)
    try:
        script = checkpoints.module_of(ckpt["args"].get("script", "train.py"), path)
        if hasattr(script, "load_run"):
            return script.load_run(path)
        net, protos, args = networks_of(ckpt)
        loss = losses.loss(args)
        loss.load_state_dict(ckpt["loss"])
    except (ValueError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a damaged or foreign file can raise
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
        raise ValueError(f"{path} was made by other code, or is damaged ({reason})") from error
    return net.eval(), protos, loss, vars(args)
