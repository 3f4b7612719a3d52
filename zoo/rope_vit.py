"""The vision transformer of CAPI (Darcet et al. 2025): an encoder of the visible patches of an
image, and a predictor of the tokens that the hidden patches would have.

It differs from the ViT of models.py in four ways. There is no class token; a few learned tokens
without a patch, the registers, stand before the patches instead. RMSNorm takes the place of
LayerNorm, and linear layers have no bias. The last norm has no weight, so every token that leaves
has the length sqrt(dim). And a token learns where it stands by a rotation (RoPE), not by a vector
that is added to it.

RoPE. A patch in row i and column j of an h x w grid has the coordinates (i / (h - 1), j / (w - 1)).
In each block the d channels of a head's queries and keys are taken as d/2 pairs, and each pair is
turned like the hand of a clock. The pairs of the first half of the channels are turned by the row
times a frequency, those of the second half by the column times a frequency; the d/4 frequencies
run from 7 turns across the image down to 7e-4. The product of a query and a key then depends on the
difference of their places alone.

positions, in Encoder and Predictor:

    "rope"      as above: channel m turns with channel m + d/4, which has the same angle
    "learned"   no rotation; a learned vector for each patch of the grid is added
    "released"  as CAPI's released code: channel m is paired with channel m + d/2, which turns by
                the other coordinate. That does not preserve lengths; it is there to read the
                released weights.

Letters: N images of H x W pixels, n = h w patches of an image, v of them visible, R registers, q
patches to predict. T tokens ask (queries), and S tokens answer (keys and values): in the encoder
T = S = R + v, in the predictor T = q and S = R + v. dim is the width, d = dim / heads the channels
of a head, p the pixels of a patch's side.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

POSITIONS = ("rope", "learned", "released")
EPS = 1e-5  # of every RMSNorm


# ---- places --------------------------------------------------------------------------------------

def frequencies(d):
    """(2, d): radians by which the channels of a head turn along the whole height, and the whole
    width, of an image."""
    count = d // 4
    m = torch.arange(count, dtype=torch.double)
    turns = 7 * (7e-4 / 7) ** (m / max(1, count - 1))  # (d/4,)
    radians = (2 * math.pi * turns).repeat(2)  # (d/2,): the two channels of a pair turn together
    nothing = torch.zeros_like(radians)
    by_row, by_column = torch.cat([radians, nothing]), torch.cat([nothing, radians])  # (d,) each
    return torch.stack([by_row, by_column]).to(torch.get_default_dtype())  # (2, d)


def waves(coords, freqs):
    """Cosine and sine (N, 1, T, d) of the angles of tokens at coords (N, T, 2), for all heads."""
    # A sum of products and no matrix product, which bf16 autocast would make far too coarse.
    angles = coords[..., :1] * freqs[0] + coords[..., 1:] * freqs[1]  # (N, T, d)
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x, cos, sin, released=False):
    """Queries or keys x (N, heads, T, d), each pair of channels turned by its angle.

    The channels are cut into two parts (released: one part, the whole head). In each part the first
    half is paired with the second.
    """
    parts = 1 if released else 2
    first, second = x.unflatten(-1, (parts, 2, -1)).unbind(-2)  # (.., T, parts, d / (2 parts))
    quarter_turn = torch.stack([-second, first], -2).flatten(-3)  # (N, heads, T, d)
    return x * cos + quarter_turn * sin


def edge_coordinates(R):
    """(R, 2): (row, column) of R registers, evenly around the edge of the unit square: from (0, 0)
    down the first column, along the last row, up the last column and back along the first row."""
    way = torch.arange(R // 4) / max(1, R // 4)  # (R/4,): 0 up to just below 1
    zero, one = torch.zeros_like(way), torch.ones_like(way)
    sides = [(way, zero), (one, way), (1 - way, one), (zero, 1 - way)]
    return torch.cat([torch.stack(side, 1) for side in sides])  # (R, 2)


# ---- blocks --------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention from tokens x (N, T, dim) to a context (N, S, dim)."""

    def __init__(self, dim, heads, released):
        super().__init__()
        self.heads, self.released = heads, released
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, T, d)

    def forward(self, x, context, x_waves, context_waves):
        q, k, v = self.split(self.q(x)), self.split(self.k(context)), self.split(self.v(context))
        if x_waves is not None:
            q = rotate(q, *x_waves, self.released)  # (N, heads, T, d)
            k = rotate(k, *context_waves, self.released)  # (N, heads, S, d)
        x = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, d)
        return self.out(x.transpose(1, 2).flatten(2))  # (N, T, dim)


class Mlp(nn.Module):
    """Two layers without bias, four times as wide in between."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim, bias=False)
        self.fc2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # GELU by erf


class Block(nn.Module):
    """Pre-norm transformer block, of self-attention or, with a context, of cross-attention.

    In training each of its two branches is dropped for whole images, at rate drop_path.
    """

    def __init__(self, dim, heads, drop_path, released):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.RMSNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, released)
        self.norm2 = nn.RMSNorm(dim, eps=EPS)
        self.mlp = Mlp(dim)

    def drop(self, branch):
        """A branch (N, T, dim): zero for some images, scaled up for the rest, so that its
        expectation is unchanged."""
        # differs: each image has a coin of its own. CAPI's code drops the same number of images in
        # every batch, and does not compute what it drops.
        if not self.training or self.drop_path == 0:
            return branch
        kept_share = 1 - self.drop_path
        kept = branch.new_empty(len(branch), 1, 1).bernoulli_(kept_share)  # (N, 1, 1)
        return branch * (kept / kept_share)

    def forward(self, x, x_waves=None, context=None, context_waves=None):
        """Tokens x (N, T, dim) -> (N, T, dim). context (N, S, dim): the tokens that they attend to,
        which this block does not normalise; None: self-attention. The waves are those of the
        tokens' places; None: no rotation."""
        normed = self.norm1(x)  # (N, T, dim)
        if context is None:
            context, context_waves = normed, x_waves
        x = x + self.drop(self.attn(normed, context, x_waves, context_waves))
        return x + self.drop(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """What Encoder and Predictor have in common: their blocks, their frequencies, the last norm."""

    def __init__(self, dim, depth, heads, positions, drop_path):
        super().__init__()
        if positions not in POSITIONS:
            raise ValueError(f"positions '{positions}' is not one of {', '.join(POSITIONS)}")
        if heads < 1 or dim % heads:
            raise ValueError(f"dim {dim} is not divisible by heads {heads}")
        if positions != "learned" and dim // heads % 4:
            raise ValueError(f"dim {dim} in {heads} heads has {dim // heads} channels a head, and "
                             f"positions '{positions}' needs a multiple of 4")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path {drop_path} is not in [0, 1)")
        self.dim, self.positions = dim, positions
        freqs = None if positions == "learned" else frequencies(dim // heads)  # (2, d)
        self.register_buffer("freqs", freqs)
        self.blocks = nn.ModuleList(
            Block(dim, heads, drop_path, positions == "released") for _ in range(depth))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def waves(self, coords):
        """Cosines and sines for tokens at coords (N, T, 2); None where positions are learned."""
        return None if self.freqs is None else waves(coords, self.freqs)

    def last_norm(self, x):
        return F.rms_norm(x, (self.dim,), eps=EPS)  # (N, T, dim)


# ---- the two networks ----------------------------------------------------------------------------

class Encoder(Transformer):
    """Images (N, 3, H, W) -> (registers (N, R, dim), patches (N, v, dim)), after the last norm.

    img_size    pixels of the square images for which .grid, patches along a side, is laid out.
                Images of another size may come too, unless positions are learned.
    registers   R, a multiple of 4
    drop_path   the same rate in every block
    Raises ValueError for sizes that do not fit each other.
    """

    def __init__(self, dim, depth, heads, patch_size, img_size, registers=4, positions="rope",
                 drop_path=0.0):
        super().__init__(dim, depth, heads, positions, drop_path)
        if patch_size < 1 or img_size < patch_size or img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not divisible by patch_size {patch_size}")
        if registers < 0 or registers % 4:
            raise ValueError(f"registers {registers} is not a multiple of 4, the sides of an image")
        self.patch_size = patch_size
        self.grid = img_size // patch_size
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.registers = nn.Parameter(torch.empty(registers, dim))
        nn.init.xavier_uniform_(self.patch_embed.weight.data.flatten(1))  # as a linear layer
        nn.init.normal_(self.registers, std=0.02)
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(self.grid ** 2, dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def coordinates(self, visible, N, shape=None):
        """(N, R + v, 2): (row, column) of the registers and of the visible patches of N images, in
        this order, the patches in [0, 1].

        visible (N, v): indices of patches in row-major order; None: all. The registers stand around
        the edge of the smallest rectangle that holds the image's visible patches. shape: rows and
        columns of patches; None: .grid of both.
        """
        h, w = shape or (self.grid, self.grid)
        like = dict(device=self.registers.device, dtype=self.registers.dtype)
        rows, columns = torch.linspace(0, 1, h, **like), torch.linspace(0, 1, w, **like)
        coords = torch.cartesian_prod(rows, columns).expand(N, -1, -1)  # (N, n, 2)
        if visible is not None:
            coords = take(coords, visible)  # (N, v, 2)
        low, high = coords.amin(1, keepdim=True), coords.amax(1, keepdim=True)  # (N, 1, 2)
        edge = edge_coordinates(len(self.registers)).to(**like)  # (R, 2)
        return torch.cat([low + edge * (high - low), coords], 1)  # (N, R + v, 2)

    def tokens(self, x, visible=None):
        """visible (N, v): indices of the patches that enter, the same number of each image; None:
        all."""
        N, _, H, W = x.shape
        shape = H // self.patch_size, W // self.patch_size
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"an image of {H} x {W} pixels is not divisible by patch_size "
                             f"{self.patch_size}")
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (N, n, dim)
        if self.positions == "learned":
            if shape != (self.grid, self.grid):
                raise ValueError(f"an image of {H} x {W} pixels does not fit positions that were "
                                 f"learned for {self.grid} x {self.grid} patches")
            x = x + self.pos_embed
        if visible is not None:
            x = take(x, visible)  # (N, v, dim)
        R = len(self.registers)
        x = torch.cat([self.registers.expand(N, -1, -1), x], 1)  # (N, R + v, dim)
        x_waves = self.waves(self.coordinates(visible, N, shape))
        for block in self.blocks:
            x = block(x, x_waves)
        x = self.last_norm(x)
        return x[:, :R], x[:, R:]

    forward = tokens


class Predictor(Transformer):
    """The tokens of hidden patches, each guessed from the encoder's tokens and from nothing else.

    All guesses begin as the same mask token; where they stand, the rotation or a learned vector
    says. They look at the context in every block and never at each other, so a guess does not
    depend on which others are asked for.

    n_patches: of an image, read where positions are learned.
    """

    def __init__(self, dim, depth, heads, n_patches, positions="rope", drop_path=0.0):
        super().__init__(dim, depth, heads, positions, drop_path)
        self.mask_token = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.mask_token, std=0.02)
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(n_patches, dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, context, context_coords, query_coords, places, blocks=None):
        """(N, q, dim), after the last norm. blocks: only so many of the first ones; None: all.

        context (N, S, dim), context_coords (N, S, 2)   the encoder's registers and patches, normed
        query_coords (N, q, 2), places (N, q) int64     where the predicted patches stand, and
                                                        their indices, which learned positions read
        """
        x = self.mask_token.expand(*places.shape, -1)  # (N, q, dim)
        if self.positions == "learned":
            x = x + self.pos_embed[places]
        x_waves, context_waves = self.waves(query_coords), self.waves(context_coords)
        for block in self.blocks[:blocks]:
            x = block(x, x_waves, context, context_waves)
        return self.last_norm(x)


def take(x, index):
    """x (N, n, D) at index (N, v) of each image -> (N, v, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Backbone(Encoder):
    """The encoder as the evaluations want a backbone: images (N, 3, H, W) -> (cls (N, dim),
    patches (N, n, dim)).

    There is no class token. The mean of the patch tokens stands for the image. The mean of the
    predictor's guesses can stand for it instead, as in CAPI's code: `predicted`. That works only
    after load_backbone of zoo/capi.py has attached the predictor.
    arch: the name that evaluations show; sizes: the arguments of Encoder.
    """

    def __init__(self, arch, **sizes):
        super().__init__(**sizes)
        self.arch, self.sizes = arch, sizes

    def forward(self, x):
        _, patches = self.tokens(x)  # (N, n, dim)
        return patches.mean(1), patches

    def predicted(self, x):
        """(N, dim): what the predictor's first block guesses for the patches, with all of them in
        sight, as a mean over all places."""
        registers, patches = self.tokens(x)  # (N, R, dim) (N, n, dim)
        context = torch.cat([registers, patches], 1)  # (N, R + n, dim)
        shape = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        coords = self.coordinates(None, len(x), shape)  # (N, R + n, 2)
        places = torch.arange(patches.shape[1], device=x.device).expand(len(x), -1)  # (N, n)
        guesses = self.predictor(context, coords, coords[:, registers.shape[1]:], places, blocks=1)
        return guesses.mean(1)
