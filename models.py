"""
Backbones f: images (N, 3, H, W) -> (cls (N, dim), patches (N, n, dim)). The multi-crop wrapper.

    arch       dim    depth  heads   parameters
    vit_nano    96      3      3     0.35 M      conv stem, patches of 8 pixels; the default run's
    vit_micro   96      3      3     0.35 M      patches of any size (here 4), for masked ones
    vit_tiny   192     12      3      5.5 M
    vit_small  384     12      6     21.7 M      the ViT-S of DINO, CARP and the paper
    vit_base   768     12     12     85.8 M
    resnet18   512                   11.2 M      torchvision's, without fc
    resnet50  2048                   23.5 M

A ViT here carries timm's parameter names and computes in timm's order, so a trained one goes
elsewhere in two lines:

    net = timm.create_model("vit_small_patch16_224", num_classes=0)
    net.load_state_dict(build("vit_small").state_dict())  # strict, and the same features

A ViT cuts an image into n patches of p x p pixels. A token is the vector (dim,) that stands for one
patch; one more, the class token, stands for the whole image.

Letters: N images of H x W pixels, n patches and T = 1 + n tokens of an image, dim = width.
"""
from itertools import groupby

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import resnet

VITS = {  # arch: (dim, depth, heads)
    "vit_nano": (96, 3, 3),  # behind a convolutional stem
    "vit_micro": (96, 3, 3),  # the same behind a plain projection, for masked patches
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
}
RESNETS = {  # arch: (residual block, blocks per stage)
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
}
ARCHS = [*VITS, *RESNETS]
MOST_TOKENS = 128  # of an image, for which `attention` computes the formula as it stands


def build(arch, *, patch_size=16, img_size=224, drop_path=0.0, in_small=False):
    """A freshly initialised backbone with attributes .arch and .dim.

    forward(x) -> (cls (N, dim), patches (N, n, dim)). Downloads nothing; the initial weights are
    drawn from torch's default generator.

    patch_size, drop_path: ViTs only (a ResNet takes no notice of patch_size). drop_path is the rate
        of the LAST block; give it to the student only: a teacher in train() mode would drop too.
    img_size: side in pixels for which a ViT's position embedding is laid out; it is interpolated
        for images of another size.
    in_small: ResNets only, for images up to 64 px: 3x3 stride-1 stem and no max-pool, so that
        32 px end as 4 x 4.
    Raises ValueError: unknown arch, image not divisible by the patch, vit_nano with a patch other
        than 8, drop_path outside [0, 1) or on a ResNet.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch '{arch}' is not one of {', '.join(ARCHS)}")
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path {drop_path} is not in [0, 1)")
    if arch in RESNETS:
        if drop_path:
            raise ValueError(f"drop_path {drop_path} needs a ViT, and arch is {arch}")
        return ResNet(arch, in_small)
    return ViT(arch, patch_size, img_size, drop_path)


# ---- ViT -----------------------------------------------------------------------------------------

class PatchEmbed(nn.Module):
    """(N, 3, H, W) -> tokens (N, n, dim) in row-major order, n = H/p * W/p."""

    def __init__(self, dim, patch_size, conv_stem):
        super().__init__()
        if conv_stem:  # patches of 8 in three small steps, with overlapping filters
            self.proj = nn.Sequential(
                nn.Conv2d(3, 16, kernel_size=3, stride=2, padding=1), nn.GELU(),
                nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1), nn.GELU(),
                nn.Conv2d(32, dim, kernel_size=2, stride=2))
        else:
            self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        if isinstance(self.proj, nn.Sequential):
            # convolutions in a row are faster if the colours of a pixel lie side by side in memory
            x = x.contiguous(memory_format=torch.channels_last)  # (N, 3, H, W)
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, n, dim)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v of queries, keys and values (N, heads, T, d) each."""
    T, d = q.shape[2:]
    if T <= MOST_TOKENS:
        return (q @ k.transpose(2, 3) / d ** 0.5).softmax(-1) @ v  # (N, heads, T, d)
    # the same without T x T numbers in memory; slower on a CPU for few tokens (docs/speed.md)
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention of the tokens (N, T, dim) of each image."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        N, T, dim = x.shape
        d = dim // self.heads
        qkv = self.qkv(x).view(N, T, 3, self.heads, d)  # (N, T, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, T, d) each
        x = attention(q, k, v)  # (N, heads, T, d)
        x = x.transpose(1, 2).reshape(N, T, dim)
        return self.proj(x)  # (N, T, dim)


class Mlp(nn.Module):
    """Two layers, four times as wide in between."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # GELU by erf, as timm


class Block(nn.Module):
    """Pre-norm transformer block.

    In training each of its two branches is dropped for whole images, at rate drop_path.
    """

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def drop(self, branch):
        """A branch (N, T, dim): zero for some images, scaled up for the rest, so that
        its expectation is unchanged.

        Draws from torch's default generator: whoever seeds that for each step can resume exactly.
        """
        if not self.training or self.drop_path == 0:
            return branch
        kept_share = 1 - self.drop_path
        kept = branch.new_empty(len(branch), 1, 1).bernoulli_(kept_share)  # (N, 1, 1)
        return branch * (kept / kept_share)

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


def resize_positions(pos_embed, h, w):
    """The position embedding of a square grid, interpolated to a grid of h x w patches.

    (1, 1 + grid^2, dim) -> (1, 1 + h*w, dim); of that size already, it is returned as it is.
    """
    grid = round((pos_embed.shape[1] - 1) ** 0.5)
    if (h, w) == (grid, grid):
        return pos_embed
    # Bicubic without antialiasing, as DINO (timm antialiases). The new size is given outright. DINO
    # gives a scale factor with .1 added against rounding, which also shifts its samples a little.
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    patches = patches.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)  # (1, dim, grid, grid)
    patches = F.interpolate(patches, size=(h, w), mode="bicubic", align_corners=False)
    patches = patches.flatten(2).transpose(1, 2)  # (1, h*w, dim)
    return torch.cat([cls, patches], dim=1)


class ViT(nn.Module):
    """Vision transformer.

    forward gives (cls (N, dim), patches (N, n, dim)), both after the final LayerNorm.
    """

    def __init__(self, arch, patch_size, img_size, drop_path):
        super().__init__()
        if arch == "vit_nano" and patch_size != 8:
            raise ValueError(f"patch_size {patch_size} does not fit vit_nano, whose conv stem "
                             "makes patches of 8")
        if patch_size < 1 or img_size < patch_size or img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not divisible by patch_size {patch_size}")
        self.arch = arch
        self.patch_size = patch_size
        self.dim, depth, heads = VITS[arch]
        grid = img_size // patch_size  # patches along each side
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid ** 2, self.dim))
        self.patch_embed = PatchEmbed(self.dim, patch_size, conv_stem=arch == "vit_nano")
        rates = torch.linspace(0, drop_path, depth).tolist()  # 0 at the first block, as DINO
        self.blocks = nn.ModuleList(Block(self.dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)
        # As DINO: a deviation of .02 for the class token, positions and linear layers. Convolutions
        # keep torch's default, as DINO's does: at .02 the three of the conv stem would shrink the
        # image to less than the position embedding
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def intermediate(self, x, n, keep=None, mask=None, mask_token=None):
        """[(cls (N, dim), patches (N, h*w, dim))] of the last n blocks, after the final norm each.

        The earliest block comes first; an image has h x w patches. keep (m,): indices of the
        patches that enter the blocks, with their positions; None: all. mask (N, h*w): where it is
        True, mask_token (dim,) stands in the place of the patch, before its position is added.
        Raises ValueError: n not in 1..depth, image height or width not divisible by the patch.
        """
        depth = len(self.blocks)
        if not 1 <= n <= depth:
            raise ValueError(f"the last n = {n} blocks were asked for, and {self.arch} has {depth}")
        H, W = x.shape[-2:]
        p = self.patch_size
        if H % p or W % p:
            raise ValueError(f"an image of {H} x {W} pixels is not divisible by patch_size {p}")
        x = self.patch_embed(x)  # (N, h*w, dim)
        if mask is not None:
            x = torch.where(mask[..., None], mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (N, T, dim)
        x = x + resize_positions(self.pos_embed, H // p, W // p)
        if keep is not None:
            x = torch.cat([x[:, :1], x[:, 1 + keep]], dim=1)  # (N, 1 + m, dim)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= depth - n:
                normed = self.norm(x)  # (N, T, dim)
                outputs.append((normed[:, 0], normed[:, 1:]))
        return outputs

    def forward(self, x, keep=None, mask=None, mask_token=None):
        return self.intermediate(x, 1, keep, mask, mask_token)[0]


# ---- ResNet --------------------------------------------------------------------------------------

class ResNet(resnet.ResNet):
    """torchvision's ResNet without fc.

    forward gives (average pool (N, dim), last feature map as (N, h*w, dim)).
    """

    def __init__(self, arch, in_small):
        block, layers = RESNETS[arch]
        super().__init__(block, layers, zero_init_residual=True)  # as CARP's ResNet-50 recipe
        self.arch = arch
        self.dim = self.fc.in_features
        del self.fc
        if in_small:
            self.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Identity()

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, dim, h, w)
        patches = x.flatten(2).transpose(1, 2)  # (N, h*w, dim)
        return patches.mean(1), patches


# ---- multi-crop ----------------------------------------------------------------------------------

class MultiCrop(nn.Module):
    """Backbone and head over the views of a batch: V tensors (B, 3, s_v, s_v) -> h (V*B, D).

    h.chunk(V) gives the views back. Consecutive views of one size go through the backbone together
    (one call per resolution), and the head sees all views in one call. That is faster, and it
    decides what BatchNorm sees: in the backbone the views of one resolution, in the head all views.
    As DINO's wrapper. Raises ValueError without views.
    """

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views):
        if not len(views):
            raise ValueError("MultiCrop got an empty list of views")
        same_size = groupby(views, lambda view: view.shape[-2:])
        cls = [self.backbone(torch.cat(tuple(group)))[0]  # (views of the group * B, dim)
               for _, group in same_size]
        return self.head(torch.cat(cls))  # (V*B, D)
