"""Features of frozen backbones: which tokens make them, and how images are prepared.

Letters: N images, n patches of an image, dim = width of the backbone, D = width of a feature.
"""
import torch
import torch.nn.functional as F
from tqdm import tqdm

from views import MEAN, STD, eval_batches

POOLS = ("cls", "mean", "cls+mean", "predictor")


def width(backbone, layers=1, pool="cls"):
    """D of what `embed` returns. ValueError for layers or a pool that the backbone does not
    have."""
    if pool not in POOLS:
        raise ValueError(f"--pool {pool} is not one of {', '.join(POOLS)}")
    if pool == "predictor":
        if getattr(backbone, "predictor", None) is None:
            raise ValueError(f"--pool predictor needs a run of zoo/capi.py; a {backbone.arch} has "
                             "no predictor beside it")
        if layers != 1:
            raise ValueError(f"--pool predictor has one layer, got --layers {layers}")
        return backbone.dim
    if not hasattr(backbone, "intermediate"):
        if layers != 1 or pool == "cls+mean":
            raise ValueError(f"--layers {layers} --pool {pool} needs a ViT with a class token: a "
                             f"{backbone.arch} has the mean of its patches and no more")
    elif not 1 <= layers <= len(backbone.blocks):
        raise ValueError(f"--layers {layers} must lie in 1..{len(backbone.blocks)}, the blocks of "
                         f"this {backbone.arch}")
    return backbone.dim * {"cls": layers, "mean": 1, "cls+mean": layers + 1}[pool]


def pool_named(backbone, pool):
    """What `embed` takes for a pool: without a class token, "cls" is the mean of the patches."""
    return "mean" if pool == "cls" and not hasattr(backbone, "intermediate") else pool


def embed(backbone, x, layers=1, pool="cls"):
    """Features (N, D) float32 of normalised images x (N, 3, H, W). The backbone stays in the mode,
    training or evaluation, in which it is.

    layers: class tokens of that many last blocks, earliest first, each after the final norm (DINO's
    linear probe takes 4). pool: "cls", "mean" (the last block's patch tokens, averaged) or
    "cls+mean" (both; DINO's linear probe of a ViT-B). A ResNet and a ViT of CAPI have one layer and
    no class token: their "cls" and their "mean" are the mean of the patches. "predictor": of a run
    of zoo/capi.py, the mean of its predictor's guesses.
    """
    if pool == "predictor":
        return backbone.predicted(x).float()
    if layers == 1 and pool == "cls" or not hasattr(backbone, "intermediate"):
        return backbone(x)[0].float()
    outputs = backbone.intermediate(x, layers)  # [(cls (N, dim), patches (N, n, dim))]
    parts = []
    if pool != "mean":
        parts += [cls for cls, _ in outputs]
    if pool != "cls":
        parts.append(outputs[-1][1].mean(1))  # (N, dim)
    return torch.cat(parts, 1).float()  # (N, D)


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
    x = torch.empty(len(images), width(backbone, layers, pool))  # (N, D)
    done = 0
    for h in outputs(lambda batch: embed(backbone, batch, layers, pool), backbone, images, img_size,
                     device, batch_size, progress, crop, mean, std):
        x[done:done + len(h)] = F.normalize(h, dim=1) if normalize else h
        done += len(h)
    return x


def patch_batches(backbone, images, img_size, *, device="cpu", batch_size=512, progress=False,
                  mean=MEAN, std=STD):
    """Yields the patch tokens (B, n, dim) float32, on the CPU, of batch after batch of images.

    They are those of a ViT's last block, or the places of a ResNet's last map. The rest as in
    `features`.
    """
    yield from outputs(lambda batch: backbone(batch)[1].float(), backbone, images, img_size, device,
                       batch_size, progress, True, mean, std)


@torch.no_grad()
def outputs(function, backbone, images, img_size, device, batch_size, progress, crop, mean, std):
    """Yields function(batch), on the CPU, of batch after batch of images. The backbone is in eval
    mode until the last one. The rest as in `features`."""
    training = [(module, module.training) for module in backbone.modules()]
    bar = tqdm(total=len(images), desc="features", unit="img", leave=False,
               disable=None if progress else True)
    backbone.eval()
    try:
        with bar, torch.autocast(torch.device(device).type, enabled=False):
            for batch in eval_batches(images, img_size, batch_size=batch_size, device=device,
                                      crop=crop, mean=mean, std=std):
                yield function(batch).cpu()
                bar.update(len(batch))
    finally:
        for module, flag in training:
            module.training = flag
