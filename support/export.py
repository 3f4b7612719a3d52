"""Backbones in and out: --export writes one for others, --init starts a run from anybody's."""
import math
import os

import torch

import models
from support import ddp
from support.checkpoints import listing
from support.backbones import find, load_backbone, load_weights
from support.files import write


def export(out, path):
    """Write the teacher's backbone of the run in folder `out`: a flat state dict, timm's names.

    A .safetensors path needs that library; .pt and .pth are torch files. Returns the path.
    ValueError: no run, another suffix, no library, or the file is there already. OSError: it cannot
    be written.
    """
    suffix = os.path.splitext(path)[1]
    if suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"--export {path} must end in .pt, .pth or .safetensors")
    if os.path.exists(path):
        raise ValueError(f"--export {path} exists already; name another file")
    if not os.path.exists(os.path.join(out, "ckpt.pt")):
        raise ValueError(f"--export writes the backbone of a run that is there, and --out {out} "
                         "holds none: train it first, without --export")
    backbone, args, description = load_backbone(out)
    tensors = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    if suffix == ".safetensors":
        try:
            from safetensors.torch import save
        except ImportError:
            raise ValueError(f"--export {path} needs the safetensors library "
                             "(pip install safetensors)") from None
        told = ("arch", "patch_size", "img_size", "mean", "std")
        about = {name: str(args[name]) for name in told if name in args}
        write(path, lambda file: file.write(save(tensors, about)))
    else:
        write(path, lambda file: torch.save(tensors, file))
    print(f"{description}: {len(tensors)} tensors written to {path}")
    return path


def init(path, backbones):
    """Load the backbone in anybody's file into each of `backbones`, by the names of its tensors.

    Reads runs of ours, exports, and what --arch of the evaluation tools reads; the teacher's copy
    if there is one. A position embedding of another grid is interpolated, and the printed line says
    so. ValueError if the file cannot be read safely, or if its network is not that of `backbones`
    (support.backbones.misfits).
    """
    theirs, others, copy = find(path, "teacher", backbones[0].arch)
    own = backbones[0].state_dict()
    resized = ""
    if "pos_embed" in own:
        theirs["pos_embed"], resized = on_same_grid(theirs["pos_embed"], own["pos_embed"])
    for backbone in backbones:
        unused = others + load_weights(path, backbone, theirs)
    ddp.print0(f"--init {path}: {copy}, all {len(own)} tensors{resized}; "
               f"not used: {listing(unused)}")


def on_same_grid(theirs, own):
    """(the position embedding `theirs` (1, 1 + g^2, dim) on the grid of `own`, words for a change).

    It is returned unchanged if it has that grid already, and also if its grid is not square or its
    dim is another one: then it does not fit, and load_weights says so.
    """
    if theirs.dim() != 3 or theirs[:, :1].shape != own[:, :1].shape:
        return theirs, ""
    grid, own_grid = math.isqrt(theirs.shape[1] - 1), math.isqrt(own.shape[1] - 1)
    if 1 + grid ** 2 != theirs.shape[1] or grid in (0, own_grid):
        return theirs, ""
    return (models.resize_positions(theirs.float(), own_grid, own_grid),
            f", positions interpolated from {grid} x {grid} to {own_grid} x {own_grid} patches")
