"""Features of frozen backbones: which tokens make them, and how images are prepared.

Letters: N images, n patches of an image, dim = width of the backbone, D = width of a feature.
"""
import torch
import torch.nn.functional as F
from tqdm import tqdm

from views import MEAN, STD, eval_batches

POOLS = ("cls", "mean", "cls+mean")


def width(backbone, layers=1, pool="cls"):
    """D of what `embed` returns. ValueError for layers or a pool that the backbone does not
    have."""
    if pool not in POOLS:
        raise ValueError(f"--pool {pool} is not one of {', '.join(POOLS)}")
    if not hasattr(backbone, "blocks"):
        if layers != 1 or pool == "cls+mean":
            raise ValueError(f"--layers {layers} --pool {pool} needs a ViT: a ResNet has its "
                             "average pool and no more")
    elif not 1 <= layers <= len(backbone.blocks):
        raise ValueError(f"--layers {layers} must lie in 1..{len(backbone.blocks)}, the blocks of "
                         f"this {backbone.arch}")
    return backbone.dim * {"cls": layers, "mean": 1, "cls+mean": layers + 1}[pool]


def embed(backbone, x, layers=1, pool="cls"):
    """Features (N, D) float32 of normalised images x (N, 3, H, W), the backbone being in training
    or evaluation mode as it is.

    layers: class tokens of that many last blocks, earliest first, each after the final norm (DINO's
    linear probe takes 4). pool: "cls", "mean" (the last block's patch tokens, averaged) or
    "cls+mean" (both; DINO's linear probe of a ViT-B). A ResNet has one layer, and its "cls" and its
    "mean" are the average pool.
    """
    if layers == 1 and pool == "cls" or not hasattr(backbone, "blocks"):
        return backbone(x)[0].float()
    outputs = backbone.intermediate(x, layers)  # [(cls (N, dim), patches (N, n, dim))]
    parts = []
    if pool != "mean":
        parts += [cls for cls, _ in outputs]
    if pool != "cls":
        parts.append(outputs[-1][1].mean(1))  # (N, dim)
    return torch.cat(parts, 1).float()  # (N, D)


@torch.no_grad()
def features(backbone, images, img_size, *, device="cpu", batch_size=512, progress=False, layers=1,
             pool="cls", normalize=True, crop=True, mean=MEAN, std=STD):
    """Features (N, D) float32, on the CPU, of every image in order, without augmentation.

    The backbone must be on device. It runs in eval mode (BatchNorm with running statistics) and
    without autocast; the train/eval flag of each of its modules is put back afterwards.

    img_size    side of the images in pixels
    layers      and pool: see `embed`
    normalize   each feature to length one
    crop, mean, std   see views.eval_batches
    progress    show a bar on a terminal
    """
    training = [(module, module.training) for module in backbone.modules()]
    x = torch.empty(len(images), width(backbone, layers, pool))  # (N, D)
    bar = tqdm(total=len(images), desc="features", unit="img", leave=False,
               disable=None if progress else True)
    done = 0
    backbone.eval()
    try:
        with bar, torch.autocast(torch.device(device).type, enabled=False):
            for batch in eval_batches(images, img_size, batch_size=batch_size, device=device,
                                      crop=crop, mean=mean, std=std):
                h = embed(backbone, batch, layers, pool)  # (batch, D)
                x[done:done + len(h)] = (F.normalize(h, dim=1) if normalize else h).cpu()
                done += len(h)
                bar.update(len(h))
    finally:
        for module, flag in training:
            module.training = flag
    return x
