"""Backbones in and out: --export writes one for others, --init starts a run from anybody's."""
import math
import os

import torch

import models
from support import ddp
from support.checkpoints import listing
from support.backbones import load_backbone, networks_in
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
    backbone, args, description = load_backbone(out)
    tensors = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    if suffix == ".safetensors":
        try:
            from safetensors.torch import save
        except ImportError:
            raise ValueError(f"--export {path} needs the safetensors library "
                             "(pip install safetensors)") from None
        about = {name: str(args[name]) for name in ("arch", "patch_size", "img_size")}
        write(path, lambda file: file.write(save(tensors, about)))
    else:
        write(path, lambda file: torch.save(tensors, file))
    print(f"{description}: {len(tensors)} tensors written to {path}")
    return path


def init(path, backbones):
    """Load the backbone in anybody's file into each of `backbones`, by the names of its tensors.

    Reads runs and checkpoints of ours, exports, timm's and torchvision's weights, and DINO's
    releases (backbone alone, or whole: the teacher's if it is there). A position embedding of
    another grid is interpolated. Other tensors of another shape stay at their start. A printed line
    names what is missing, of another shape, or not used. ValueError if the file cannot be read
    safely or nothing in it fits.
    """
    networks = networks_in(path)  # {rank: {name: tensor}}, the lowest rank is the teacher
    ours = backbones[0].state_dict()
    theirs = {}
    for rank in sorted(networks, reverse=True):
        if ours.keys() & networks[rank].keys():
            theirs = networks[rank]
    if "pos_embed" in ours and "pos_embed" in theirs:
        theirs["pos_embed"] = on_same_grid(theirs["pos_embed"], ours["pos_embed"])

    fitting = {name: tensor for name, tensor in theirs.items()
               if name in ours and tensor.shape == ours[name].shape}
    if not fitting:
        names = [name for network in networks.values() for name in network]
        raise ValueError(f"--init {path}: nothing in it matches this --arch; its keys: "
                         f"{listing(names)}; wanted: {listing(ours)}")
    for backbone in backbones:
        backbone.load_state_dict(fitting, strict=False)

    missing = [name for name in ours if name not in theirs]
    other_shape = [f"{name} {tuple(theirs[name].shape)} for {tuple(ours[name].shape)}"
                   for name in ours if name in theirs and name not in fitting]
    unused = [name for name in theirs if name not in ours]
    ddp.print0(f"--init {path}: {len(fitting)} of {len(ours)} tensors matched; "
               f"missing: {listing(missing)}; of another shape: {listing(other_shape)}; "
               f"not used: {listing(unused)}")


def on_same_grid(theirs, ours):
    """The position embedding `theirs` (1, 1 + g^2, dim) on the grid of `ours`.

    It is returned as it is where it is none of a square grid, or of another dim.
    """
    if theirs.dim() != 3 or theirs.shape[0] != 1 or theirs.shape[2] != ours.shape[2]:
        return theirs
    positions = theirs.shape[1] - 1
    if positions < 1 or math.isqrt(positions) ** 2 != positions:
        return theirs
    grid = math.isqrt(ours.shape[1] - 1)
    return models.resize_positions(theirs.float(), grid, grid)
