"""models.py: names and numbers of ViTs (against timm and a NumPy float64 ViT), ResNets, and the
multi-crop wrapper."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import models

# The tensors of a ViT-S/16 in timm's (and DINO's) layout.
VIT_SMALL = {
    "cls_token": (1, 1, 384), "pos_embed": (1, 197, 384),
    "patch_embed.proj.weight": (384, 3, 16, 16), "patch_embed.proj.bias": (384,),
    "norm.weight": (384,), "norm.bias": (384,)}
BLOCK = {
    "norm1.weight": (384,), "norm1.bias": (384,),
    "attn.qkv.weight": (1152, 384), "attn.qkv.bias": (1152,),
    "attn.proj.weight": (384, 384), "attn.proj.bias": (384,),
    "norm2.weight": (384,), "norm2.bias": (384,),
    "mlp.fc1.weight": (1536, 384), "mlp.fc1.bias": (1536,),
    "mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,)}
for i in range(12):
    VIT_SMALL |= {f"blocks.{i}.{name}": shape for name, shape in BLOCK.items()}


def small(arch="vit_tiny", **kwargs):
    """A ViT with few patches, in eval mode, none of whose parameters is at its initial 0 or 1."""
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "img_size": 32, **kwargs}
    net = models.build(arch, **kwargs).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numpy_vit(net, x, heads):
    """The output (N, T, dim) of a ViT without conv stem, from its state dict, in float64 loops."""
    w = {key: value.double().numpy() for key, value in net.state_dict().items()}
    erf = np.vectorize(math.erf)

    def norm(z, name):
        z = z - z.mean(-1, keepdims=True)
        z = z / np.sqrt((z ** 2).mean(-1, keepdims=True) + 1e-6)
        return z * w[name + ".weight"] + w[name + ".bias"]

    def linear(z, name):
        return z @ w[name + ".weight"].T + w[name + ".bias"]

    kernel = w["patch_embed.proj.weight"]
    p = kernel.shape[-1]
    out = []
    for image in x.double().numpy():
        tokens = [w["cls_token"][0, 0]]
        for row in range(image.shape[1] // p):
            for col in range(image.shape[2] // p):
                patch = image[:, row * p:(row + 1) * p, col * p:(col + 1) * p]
                tokens.append((kernel * patch).sum((1, 2, 3)) + w["patch_embed.proj.bias"])
        z = np.stack(tokens) + w["pos_embed"][0]
        d = z.shape[1] // heads
        for i in range(len(net.blocks)):
            qkv = linear(norm(z, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
            q, k, v = np.split(qkv, 3, axis=1)
            mixed = np.zeros_like(q)
            for head in range(heads):
                part = slice(head * d, (head + 1) * d)
                weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(d))
                mixed[:, part] = weights / weights.sum(1, keepdims=True) @ v[:, part]
            z = z + linear(mixed, f"blocks.{i}.attn.proj")
            u = linear(norm(z, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
            z = z + linear(u * (1 + erf(u / math.sqrt(2))) / 2, f"blocks.{i}.mlp.fc2")
        out.append(norm(z, "norm"))
    return np.stack(out)


# ---- ViT -----------------------------------------------------------------------------------------

def test_vit_small_has_timm_names_and_shapes():
    net = models.build("vit_small")
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == VIT_SMALL
    assert (net.dim, net.arch) == (384, "vit_small")


@pytest.mark.parametrize("arch, dim, millions", [
    ("vit_tiny", 192, 5.524416), ("vit_small", 384, 21.665664), ("vit_base", 768, 85.798656)])
def test_timm_loads_strictly_and_gives_the_same_features(arch, dim, millions):
    timm = pytest.importorskip("timm")
    ours = small(arch, patch_size=16, img_size=224)
    theirs = timm.create_model(f"{arch}_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = images(2, 3, 224, 224)
    with torch.no_grad():
        cls, patches = ours(x)
        torch.testing.assert_close(cls, theirs(x), atol=1e-5, rtol=0)
        torch.testing.assert_close(patches, theirs.forward_features(x)[:, 1:], atol=1e-5, rtol=0)
    assert ours.dim == dim
    assert sum(p.numel() for p in ours.parameters()) == round(millions * 1e6)


def test_vit_against_numpy_float64():
    net, x = small(), images(2, 3, 32, 32)
    with torch.no_grad():
        cls, patches = net(x)
    z = numpy_vit(net, x, heads=3)
    assert cls.shape == (2, 192) and patches.shape == (2, 16, 192)
    np.testing.assert_allclose(cls.numpy(), z[:, 0], atol=1e-4)
    np.testing.assert_allclose(patches.numpy(), z[:, 1:], atol=1e-4)


def test_vit_nano_is_the_documented_size_and_sees_patches_of_8():
    net = small("vit_nano")
    assert net.dim == 96 and len(net.blocks) == 3
    assert sum(p.numel() for p in net.parameters()) == 354_912
    assert [m.stride[0] for m in net.patch_embed.proj if isinstance(m, nn.Conv2d)] == [2, 2, 2]
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        cls, patches = net(x)
        assert cls.shape == (1, 96) and patches.shape == (1, 16, 96)
        assert net(images(1, 3, 16, 16))[1].shape == (1, 4, 96)
        # Patches are in row-major order: a change at the lower left corner reaches patch 12, the
        # first of the last row.
        y = x.clone()
        y[0, :, -1, 0] += 1
        change = (net.patch_embed(y) - net.patch_embed(x)).abs().sum(-1)[0]  # (16,)
    assert change.nonzero().flatten().tolist() == [12]


def test_initial_weights():
    torch.manual_seed(0)
    net = models.build("vit_tiny", img_size=64, patch_size=8)
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            assert module.bias.abs().max() == 0, name
            assert abs(module.weight.std().item() - 0.02) < 1e-3, name
    assert abs(net.pos_embed.std().item() - 0.02) < 2e-3 and net.cls_token.std() > 0.01


def test_position_embedding_is_itself_at_its_own_size():
    pos_embed = small().pos_embed
    assert models.resize_positions(pos_embed, 4, 4) is pos_embed


def test_position_embedding_is_interpolated_for_other_sizes():
    net = small()
    grid = net.pos_embed[:, 1:].reshape(1, 4, 4, 192).permute(0, 3, 1, 2)
    for h, w in [(2, 2), (7, 5), (3, 6)]:
        resized = models.resize_positions(net.pos_embed, h, w)
        assert resized.shape == (1, 1 + h * w, 192)
        assert torch.equal(resized[:, 0], net.pos_embed[:, 0])
        wanted = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=False)[0]  # (dim, h, w)
        for row in range(h):
            for col in range(w):
                torch.testing.assert_close(resized[0, 1 + row * w + col], wanted[:, row, col])
    with torch.no_grad():  # rows and columns are not mixed up: a ramp along the columns stays one
        net.pos_embed[:, 1:] = torch.arange(4.).repeat(4)[None, :, None]
        ramp = models.resize_positions(net.pos_embed, 6, 8)[0, 1:, 0].view(6, 8)
    assert torch.allclose(ramp, ramp[:1].expand(6, 8), atol=1e-5) and (ramp[0].diff() > 0).all()


def test_forward_resizes_the_position_embedding_to_the_image():
    net = small()
    x = images(2, 3, 24, 40)
    with torch.no_grad():
        cls, patches = net(x)
        assert cls.shape == (2, 192) and patches.shape == (2, 15, 192)
        z = torch.cat([net.cls_token.expand(2, -1, -1), net.patch_embed(x)], 1)
        z = net.norm(nn.Sequential(*net.blocks)(z + models.resize_positions(net.pos_embed, 3, 5)))
    assert torch.equal(cls, z[:, 0]) and torch.equal(patches, z[:, 1:])


def test_gradient_reaches_every_parameter_at_another_size():
    net = small("vit_nano").train()
    cls, patches = net(images(2, 3, 16, 24))
    (cls.square().sum() + patches.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_intermediate_gives_the_last_blocks_through_the_final_norm():
    net, x = small(), images(2, 3, 32, 32)
    of_blocks = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, inputs, output: of_blocks.append(output))
    with torch.no_grad():
        outputs = net.intermediate(x, 4)
        assert len(outputs) == 4 and len(of_blocks) == 12
        for (cls, patches), z in zip(outputs, of_blocks[-4:]):
            torch.testing.assert_close(torch.cat([cls[:, None], patches], 1), net.norm(z))
        cls, patches = net(x)
    assert torch.equal(outputs[-1][0], cls) and torch.equal(outputs[-1][1], patches)
    assert not torch.allclose(outputs[0][0], cls)
    for n in (0, 13):
        with pytest.raises(ValueError, match=f"n = {n} .*has 12"):
            net.intermediate(x, n)


def test_drop_path_rates_grow_linearly():
    net = models.build("vit_nano", patch_size=8, img_size=32, drop_path=0.2)
    assert [block.drop_path for block in net.blocks] == pytest.approx([0, 0.1, 0.2])
    net = models.build("vit_nano", patch_size=8, img_size=32)
    assert [block.drop_path for block in net.blocks] == [0, 0, 0]


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    block = models.Block(12, 3, drop_path=0.3).train()
    torch.manual_seed(0)
    branch = torch.ones(20_000, 5, 12)
    out = block.drop(branch)
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    assert sorted(set(per_sample[:, 0].tolist())) == pytest.approx([0, 1 / 0.7])
    assert abs(out.mean().item() - 1) < 4 * math.sqrt(0.3 / 0.7 / 20_000)  # four standard errors


def test_drop_path_acts_on_both_branches_and_only_in_training():
    net, x = small("vit_nano", drop_path=0.9), images(64, 3, 32, 32)
    plain = small("vit_nano")
    with torch.no_grad():
        assert torch.equal(net(x)[0], plain(x)[0])
        torch.manual_seed(0)
        net.train()
        plain.train()
        assert not torch.allclose(net(x)[0], plain(x)[0])
        assert torch.equal(plain(x)[0], plain.eval()(x)[0])
        block, z = net.blocks[-1], images(4000, 2, 96)
        change = (block(z) - z).abs().amax((1, 2))
        attn_only = block.attn(block.norm1(z)) * 10
        is_attn = ((block(z) - z) - attn_only).abs().amax((1, 2)) < 1e-3
    assert abs((change == 0).float().mean().item() - 0.81) < 0.03  # both branches dropped: .9 * .9
    assert abs(is_attn.float().mean().item() - 0.09) < 0.02  # attention kept, MLP dropped


@pytest.mark.parametrize("T", [1, 5, models.MOST_TOKENS, models.MOST_TOKENS + 1])
def test_attention_of_few_and_of_many_tokens(T):
    q, k, v = torch.randn(3, 2, 3, T, 8, generator=torch.Generator().manual_seed(T)) * 2
    logits = np.einsum("nhtd,nhsd->nhts", q.double().numpy(), k.double().numpy()) / math.sqrt(8)
    weights = np.exp(logits)
    share = weights / weights.sum(-1, keepdims=True)
    wanted = torch.from_numpy(np.einsum("nhts,nhsd->nhtd", share, v.double().numpy()))
    torch.testing.assert_close(models.attention(q, k, v).double(), wanted, atol=1e-5, rtol=1e-5)


# ---- ResNet --------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch, dim", [("resnet18", 512), ("resnet50", 2048)])
def test_resnet_has_torchvision_names_and_features(arch, dim):
    torch.manual_seed(0)
    ours = models.build(arch).eval()
    theirs = getattr(torchvision.models, arch)(weights=None).eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    theirs.fc = nn.Identity()
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        cls, patches = ours(x)
        torch.testing.assert_close(cls, theirs(x), atol=1e-5, rtol=1e-4)
    assert (ours.dim, ours.arch) == (dim, arch)
    assert cls.shape == (2, dim) and patches.shape == (2, 2 * 3, dim)
    last_norm = "bn3.weight" if arch == "resnet50" else "bn2.weight"
    gains = [p for name, p in ours.named_parameters() if name.endswith(last_norm)]
    assert len(gains) == {"resnet18": 8, "resnet50": 16}[arch]
    assert all(gain.abs().max() == 0 for gain in gains)  # every residual branch starts at zero


def test_resnet_small_stem():
    net = models.build("resnet18", in_small=True)
    assert net.conv1.weight.shape == (64, 3, 3, 3) and net.conv1.stride == (1, 1)
    with torch.no_grad():
        for side, n in [(32, 16), (16, 4)]:
            cls, patches = net(images(2, 3, side, side))
            assert cls.shape == (2, 512) and patches.shape == (2, n, 512)
            torch.testing.assert_close(cls, patches.mean(1))
        large_stem = models.build("resnet18")
        assert large_stem(images(2, 3, 32, 32))[1].shape == (2, 1, 512)


# ---- multi-crop ----------------------------------------------------------------------------------

class Counting(nn.Module):
    """A backbone stand-in that notes the shape of each call."""
    dim = 3

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        return x.mean((2, 3)), x.flatten(2).transpose(1, 2)


def test_multicrop_equals_per_view_calls():
    torch.manual_seed(0)
    backbone, head = small("vit_nano"), nn.Linear(96, 7)
    views = [images(3, 3, s, s, seed=s + i) for i, s in enumerate([32, 32, 16, 16, 16])]
    with torch.no_grad():
        h = models.MultiCrop(backbone, head)(views)
        wanted = torch.stack([head(backbone(view)[0]) for view in views])  # (V, B, D)
    assert h.shape == (15, 7)
    torch.testing.assert_close(torch.stack(h.chunk(5)), wanted, atol=1e-5, rtol=1e-4)


def test_multicrop_calls_the_backbone_once_per_resolution_and_the_head_once():
    backbone, heads = Counting(), []

    def head(x):
        heads.append(tuple(x.shape))
        return x

    net = models.MultiCrop(backbone, nn.Identity())
    net.head.forward = head
    net([images(2, 3, s, s) for s in (32, 32, 16, 16, 16)])
    assert backbone.calls == [(4, 3, 32, 32), (6, 3, 16, 16)] and heads == [(10, 3)]


def test_multicrop_keeps_the_order_of_views_that_do_not_stand_together():
    backbone = Counting()
    sizes = [(16, 16), (32, 32), (16, 16), (16, 32), (8, 32)]
    views = [images(2, 3, h, w, seed=i) for i, (h, w) in enumerate(sizes)]
    h = models.MultiCrop(backbone, nn.Identity())(views)
    assert torch.equal(h, torch.cat([view.mean((2, 3)) for view in views]))
    assert len(backbone.calls) == 5


def test_multicrop_head_batchnorm_sees_all_views():
    views = [images(4, 3, s, s, seed=i) for i, s in enumerate([32, 32, 16])]
    h = models.MultiCrop(Counting(), nn.BatchNorm1d(3, affine=False))(views)
    torch.testing.assert_close(h.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert h[:8].mean(0).abs().max() > 1e-3


# ---- bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kwargs, words", [
    (dict(arch="vit_huge"), "vit_huge.*vit_small.*resnet50"),
    (dict(arch="vit_small", patch_size=16, img_size=100), "100.*16"),
    (dict(arch="vit_small", patch_size=16, img_size=8), "8.*16"),
    (dict(arch="vit_nano", img_size=32), "16.*vit_nano.*8"),
    (dict(arch="vit_tiny", drop_path=1.0), "1.0"),
    (dict(arch="vit_tiny", drop_path=-0.1), "-0.1"),
    (dict(arch="resnet18", drop_path=0.1), "0.1.*resnet18"),
])
def test_build_names_what_is_wrong(kwargs, words):
    with pytest.raises(ValueError, match=words):
        models.build(**kwargs)


def test_forward_names_image_and_patch_that_do_not_fit():
    net = small()
    for shape in [(1, 3, 32, 30), (1, 3, 30, 32)]:
        with pytest.raises(ValueError, match=f"{shape[2]} x {shape[3]}.*patch_size 8"):
            net(torch.zeros(shape))


def test_multicrop_without_views():
    with pytest.raises(ValueError, match="empty"):
        models.MultiCrop(Counting(), nn.Identity())([])
