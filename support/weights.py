"""Backbones in and out: --export writes one for others to load, --init starts a run from one of ours or of others."""
import os

import torch
from torch.nn import functional as F

from support import checkpoints
from support import ddp
from eval_knn import load_backbone
from support.guard import write
from support.run import first


def export(out, path):
    """Write the teacher's backbone of the run in folder `out` alone: a flat state dict under timm's names.

    A .safetensors path needs that library; .pt and .pth are torch files. Returns the path.
    ValueError: no run, another suffix, no library, or the file is there already. OSError: it cannot be written.
    """
    suffix = os.path.splitext(path)[1]
    if suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"--export {path} must end in .pt, .pth or .safetensors")
    if os.path.exists(path):
        raise ValueError(f"--export {path} exists already; name another file")
    backbone, args, info = load_backbone(out)
    state = {k: v.contiguous() for k, v in backbone.state_dict().items()}
    if suffix == ".safetensors":
        try:
            from safetensors.torch import save
        except ImportError:
            raise ValueError(f"--export {path} needs the safetensors library (pip install safetensors)") from None
        about = {k: str(args[k]) for k in ("arch", "patch_size", "img_size")}
        write(path, lambda f: f.write(save(state, about)))
    else:
        write(path, lambda f: torch.save(state, f))
    print(f"{info}: {len(state)} tensors written to {path}")
    return path


def init(path, backbones):
    """Load the backbone in a foreign or own file into each of `backbones`, by name; print what matched and what not.

    Reads runs and checkpoints of ours, exports, timm's and torchvision's weights, and DINO's releases (backbone alone
    or whole, the teacher's side first). A position embedding of another grid is interpolated; other shapes that differ
    are named and left at their start. ValueError if the file cannot be read safely or nothing in it matches.
    """
    sides = {}
    for key, tensor in checkpoints.flatten(checkpoints.read(path)).items():
        side, name = checkpoints.bare(key)
        sides.setdefault(side, {})[name.removeprefix("backbone.")] = tensor
    here = backbones[0].state_dict()
    there = next((sides[s] for s in sorted(sides) if here.keys() & sides[s].keys()), {})
    if "pos_embed" in here and "pos_embed" in there:
        there["pos_embed"] = resized(there["pos_embed"], here["pos_embed"])
    same = {k: v for k, v in there.items() if k in here and v.shape == here[k].shape}
    if not same:
        raise ValueError(f"--init {path}: nothing in it matches this --arch; its keys: "
                         f"{first([k for part in sides.values() for k in part])}; wanted: {first(list(here))}")
    for backbone in backbones:
        backbone.load_state_dict(same, strict=False)
    shapes = [f"{k} {tuple(there[k].shape)} for {tuple(here[k].shape)}" for k in here if k in there and k not in same]
    ddp.print0(f"--init {path}: {len(same)} of {len(here)} tensors matched; "
               f"missing: {first([k for k in here if k not in there])}; of another shape: {first(shapes)}; "
               f"not used: {first([k for k in there if k not in here])}")


def resized(there, here):
    """Position embedding (1, 1 + g^2, dim) on the grid of `here`, bicubic as in DINO; as it is where that is not it."""
    g, new = (round((len(p[0]) - 1) ** 0.5) if p.dim() == 3 and len(p[0]) else 0 for p in (there, here))
    if there.shape == here.shape or g == 0 or g * g != there.shape[1] - 1 or there.shape[2] != here.shape[2]:
        return there
    grid = there[:, 1:].float().reshape(1, g, g, -1).permute(0, 3, 1, 2)  # (1, dim, g, g)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([there[:, :1].float(), grid.flatten(2).transpose(1, 2)], 1)
