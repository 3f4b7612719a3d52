"""The files of CAPI (Darcet et al. 2025): the names of their tensors, as zoo/rope_vit.py has them.

--arch capi is a layout and no size: width, depth, heads, registers and patch are read off the
tensors. Names and shapes were taken from the official source (facebookresearch/capi, model.py) and
were **not** checked against a released file.

    of a file, after a prefix such as backbone.        here
    registers (1, R, dim)                              registers (R, dim)
    patch_embed.weight, patch_embed.bias               the same
    encoder.blocks.I.residual1.norm.weight             blocks.I.norm1.weight
    encoder.blocks.I.residual1.fn.q_proj.weight        blocks.I.attn.q.weight; so k and v
    encoder.blocks.I.residual1.fn.proj.weight          blocks.I.attn.out.weight
    encoder.blocks.I.residual1.fn.rope.freqs           freqs (2, d), the same in all blocks
    encoder.blocks.I.residual2.norm.weight             blocks.I.norm2.weight
    encoder.blocks.I.residual2.fn.fc1.weight           blocks.I.mlp.fc1.weight; so fc2
    mask_token, decoder...                             the predictor, which is left out

The last norm has no weight. Official code multiplies by the frequencies in the file, so ours does.

Letters: R registers, dim the width, d channels of a head.
"""
import re

import torch

from support.entries import loaded

LANDMARK = "encoder.blocks.0.residual1.fn.q_proj.weight"  # every encoder has it once
FREQUENCIES = "encoder.blocks.0.residual1.fn.rope.freqs"
PARTS = {"residual1.norm": "norm1", "residual1.fn.proj": "attn.out",
         "residual1.fn.q_proj": "attn.q", "residual1.fn.k_proj": "attn.k",
         "residual1.fn.v_proj": "attn.v", "residual2.norm": "norm2",
         "residual2.fn.fc1": "mlp.fc1", "residual2.fn.fc2": "mlp.fc2"}
SIDE = 224  # pixels of the images that all releases were trained on; no tensor says it


def build(path, theirs):
    """(backbone with fresh weights, the file's tensors under our names, words for its size) for the
    tensors {name: tensor} of the file at `path`.

    ValueError where those that tell the sizes are missing or have another form, or where the blocks
    have different frequencies.
    """
    misfit = f"{path} does not fit --arch capi"
    shapes = []
    for name, dims in (("patch_embed.weight", 4), ("registers", 3), (FREQUENCIES, 2)):
        if name not in theirs or theirs[name].ndim != dims or not theirs[name].numel():
            raise ValueError(f"{misfit}: it needs a tensor {name} of {dims} dimensions")
        shapes.append(theirs[name].shape)
    (dim, _, _, patch), (_, registers, _), (_, d) = shapes
    tensors = renamed(theirs)
    in_blocks = [name for name in tensors if name.startswith("blocks.")]
    depth, heads = len({name.split(".")[1] for name in in_blocks}), dim // d
    for name in in_blocks:
        if name.endswith(".rope.freqs") and not torch.equal(tensors.pop(name), tensors["freqs"]):
            raise ValueError(f"{misfit}: {name} differs from the frequencies of the first block")
    try:
        backbone = loaded("zoo.rope_vit.Backbone")(
            "capi", dim=dim, depth=depth, heads=heads, patch_size=patch,
            img_size=max(1, SIDE // patch) * patch, registers=registers, positions="released")
    except ValueError as error:
        raise ValueError(f"{misfit}: {error}") from None
    return backbone, tensors, (f", patch {patch}, {dim} wide, {depth} blocks of {heads} heads, "
                               f"{registers} registers")


def renamed(theirs):
    """{name: tensor} under our names; what is not of the encoder keeps its own. The frequencies of
    the blocks after the first keep theirs too."""
    ours = {}
    for name, tensor in theirs.items():
        if name == FREQUENCIES:
            name = "freqs"
        elif name == "registers":
            tensor = tensor.flatten(0, -2)  # (R, dim)
        elif match := re.fullmatch(r"encoder\.(blocks\.\d+)\.(.*)\.(\w+)", name):
            block, part, kind = match.groups()
            name = f"{block}.{PARTS.get(part, part)}.{kind}"
        ours[name] = tensor
    return ours
