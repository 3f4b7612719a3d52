"""zoo/rope_vit.py and support/capi.py: rotations, places, encoder and predictor, and the released
layout against a forward pass that is written here from the description alone."""
import math

import pytest
import torch

import data
import eval_knn
import eval_linear
from support import backbones, features
from zoo import rope_vit
from zoo.rope_vit import Backbone, Encoder, Predictor

D = 32  # channels of a head


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def encoder(positions="rope", seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = dict(dim=96, depth=3, heads=3, patch_size=4, img_size=32, positions=positions) | sizes
    return Encoder(**sizes).double().eval()


def predictor(positions="rope", seed=0):
    torch.manual_seed(seed)
    return Predictor(96, 2, 3, n_patches=64, positions=positions).double().eval()


def some_patches(N, v, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(64, generator=g)[:v].sort().values for _ in range(N)])


def turned(x, row, column, released=False):
    """x (d,) at one place."""
    coords = torch.tensor([[[row, column]]], dtype=torch.double)
    waves = rope_vit.waves(coords, rope_vit.frequencies(len(x)).double())
    return rope_vit.rotate(x[None, None, None], *waves, released)[0, 0, 0]


# ---- rotations -----------------------------------------------------------------------------------

def test_frequencies_are_capis():
    freqs = rope_vit.frequencies(64) / (2 * math.pi)  # (2, 64)
    half = [7 * (7 / 7e-4) ** (-m / 15) for m in range(16)]
    assert freqs[0].tolist() == pytest.approx(half + half + 32 * [0], rel=1e-5)
    assert freqs[1].tolist() == pytest.approx(32 * [0] + half + half, rel=1e-5)
    assert half[0] == 7 and half[15] == pytest.approx(7e-4)


def test_a_rotation_keeps_lengths_and_a_common_shift_keeps_products():
    q, k = randn(2, D)
    for i in range(20):
        (a, b), (c, d), (s, t) = torch.rand(3, 2, dtype=torch.double,
                                            generator=torch.Generator().manual_seed(i)).tolist()
        assert abs(turned(q, a, b).norm() - q.norm()) < 1e-12
        product = turned(q, a, b) @ turned(k, c, d)
        shifted = turned(q, a + s, b + t) @ turned(k, c + s, d + t)
        assert abs(product - shifted) < 1e-12
        assert abs(product - turned(q, a + s, b) @ turned(k, c, d)) > 1e-3  # one alone moved


def test_a_pair_turns_by_hand():
    """d = 4: one pair for the row, one for the column, both with 7 turns for a step of 1."""
    x = torch.tensor([1, 0, 0, 2], dtype=torch.double)
    a, b = 2 * math.pi * 7 * 0.03, 2 * math.pi * 7 * 0.1
    wanted = [math.cos(a), math.sin(a), -2 * math.sin(b), 2 * math.cos(b)]
    assert turned(x, 0.03, 0.1).tolist() == pytest.approx(wanted, abs=1e-6)
    # released: channel 0 with 2, 1 with 3; channels 0 and 1 have the row's angle
    wanted = [math.cos(a), -2 * math.sin(a), math.sin(b), 2 * math.cos(b)]
    assert turned(x, 0.03, 0.1, released=True).tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_released_quirk_is_a_rotation_where_row_and_column_are_equal_and_nowhere_else():
    freqs, (row, column) = rope_vit.frequencies(D).double(), (0.3, 0.8)
    a, b = row * freqs[0], column * freqs[1]  # (d,)
    unit = torch.eye(D, dtype=torch.double)
    matrix = torch.stack([turned(x, row, column, released=True) for x in unit], 1)  # (d, d)
    for m in range(D // 2):
        pair = matrix[[m, m + D // 2]][:, [m, m + D // 2]]  # (2, 2)
        assert pair.det() == pytest.approx(float((a[m] - b[m + D // 2]).cos()), abs=1e-12)
    q = randn(D)
    assert abs(turned(q, 0.3, 0.3, released=True).norm() - q.norm()) < 1e-12
    assert abs(turned(q, row, column, released=True).norm() - q.norm()) > 1e-2
    proper = torch.stack([turned(x, row, column) for x in unit], 1)  # (d, d)
    assert (proper @ proper.T - unit).abs().max() < 1e-12


# ---- places --------------------------------------------------------------------------------------

def test_registers_stand_around_the_edge_by_hand():
    wanted = [[0, 0], [.5, 0], [1, 0], [1, .5], [1, 1], [.5, 1], [0, 1], [0, .5]]
    assert rope_vit.edge_coordinates(8).tolist() == wanted
    assert rope_vit.edge_coordinates(4).tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]


def test_coordinates_by_hand():
    net = encoder()  # 8 x 8 patches
    # rows 2 to 4, columns 1 to 6 of image 0; one patch of row 7, column 7, twice of image 1
    visible = torch.tensor([[17, 38, 33], [63, 63, 63]])
    coords = net.coordinates(visible, 2)
    assert coords.shape == (2, 4 + 3, 2)
    low, high = (2 / 7, 1 / 7), (4 / 7, 6 / 7)
    wanted = [low, (high[0], low[1]), high, (low[0], high[1])]  # registers
    wanted += [(2 / 7, 1 / 7), (4 / 7, 6 / 7), (4 / 7, 1 / 7)]
    assert torch.allclose(coords[0], torch.tensor(wanted, dtype=torch.double))
    assert coords[1].tolist() == [[1, 1]] * 7
    whole = net.coordinates(None, 3)
    assert whole.shape == (3, 4 + 64, 2)
    assert whole[2, :4].tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]
    assert torch.equal(whole[:, 4:].amax(1), torch.ones(3, 2)) and whole[0, 4 + 8, 0] == 1 / 7
    assert net.coordinates(None, 1, (2, 3))[0, 4:].tolist() == [
        [0, 0], [0, .5], [0, 1], [1, 0], [1, .5], [1, 1]]


# ---- encoder -------------------------------------------------------------------------------------

@pytest.mark.parametrize("positions", rope_vit.POSITIONS)
def test_pixels_of_hidden_patches_change_nothing(positions):
    net, x, visible = encoder(positions), randn(2, 3, 32, 32), some_patches(2, 23)
    shown = torch.zeros(2, 64, dtype=torch.bool).scatter_(1, visible, True)
    mask = shown.view(2, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)  # pixels
    first = net(x, visible)
    second = net(torch.where(mask, x, randn(2, 3, 32, 32, seed=1)), visible)
    assert [tuple(part.shape) for part in first] == [(2, 4, 96), (2, 23, 96)]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    third = net(torch.where(mask, randn(2, 3, 32, 32, seed=1), x), visible)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(first, third))


@pytest.mark.parametrize("positions", rope_vit.POSITIONS)
def test_all_patches_in_any_order_are_no_mask(positions):
    net, x = encoder(positions), randn(2, 3, 32, 32)
    order = torch.stack([torch.randperm(64), torch.randperm(64)])
    whole, shuffled = net(x), net(x, order)
    assert torch.allclose(whole[0], shuffled[0], atol=1e-10)
    assert torch.allclose(rope_vit.take(whole[1], order), shuffled[1], atol=1e-10)
    assert torch.allclose(whole[1].square().mean(2), torch.ones(2, 64).double(), atol=1e-3)


@pytest.mark.parametrize("positions", rope_vit.POSITIONS)
def test_the_places_of_patches_matter(positions):
    net, x = encoder(positions), randn(1, 3, 32, 32)
    swapped = x.clone()
    swapped[..., :4], swapped[..., 4:8] = x[..., 4:8], x[..., :4]
    order = torch.arange(64).view(8, 8)[:, [1, 0, 2, 3, 4, 5, 6, 7]].flatten()
    assert not torch.allclose(net(x)[1][:, order], net(swapped)[1], atol=1e-3)


def test_learned_positions_have_their_grid_and_rotations_any():
    x = randn(1, 3, 16, 24)
    assert encoder()(x)[1].shape == (1, 24, 96)
    with pytest.raises(ValueError, match="16 x 24 pixels does not fit.*8 x 8 patches"):
        encoder("learned")(x)


@pytest.mark.parametrize("sizes, words", [
    (dict(positions="sine"), "positions 'sine' is not one of rope, learned, released"),
    (dict(heads=5), "dim 96 is not divisible by heads 5"),
    (dict(heads=16), "6 channels a head, and positions 'rope' needs a multiple of 4"),
    (dict(registers=6), "registers 6 is not a multiple of 4"),
    (dict(img_size=30), "img_size 30 is not divisible by patch_size 4"),
    (dict(drop_path=1.0), r"drop_path 1.0 is not in \[0, 1\)")])
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        encoder(**sizes)
    with pytest.raises(ValueError, match="30 x 32 pixels is not divisible by patch_size 4"):
        encoder()(randn(1, 3, 30, 32))


def test_whole_images_are_dropped_at_the_same_rate_in_every_block():
    net = encoder(drop_path=0.25)
    assert [block.drop_path for block in net.blocks] == [0.25] * 3
    block, branch = net.blocks[1].train(), torch.ones(4000, 2, 3)
    dropped = block.drop(branch)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert bool((dropped.flatten(1).amax(1) == dropped.flatten(1).amin(1)).all())
    assert dropped.mean() == pytest.approx(1, abs=0.05)
    assert block.eval().drop(branch) is branch
    calls = []
    block.drop = lambda branch: calls.append(1) or branch
    block(randn(1, 5, 96))
    assert len(calls) == 2  # attention and MLP apart


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_weights_at_the_start(positions):
    torch.manual_seed(0)
    net = Encoder(192, 2, 3, 8, 64, registers=16, positions=positions)
    guess = Predictor(192, 2, 3, 64, positions)
    weights = {name: w.detach() for name, w in net.named_parameters()}
    weights |= {f"predictor.{name}": w.detach() for name, w in guess.named_parameters()}
    for name, w in weights.items():
        if "norm" in name:
            assert bool((w == 1).all()), name
        elif name.split(".")[-1] in ("registers", "mask_token", "pos_embed"):
            assert w.std() == pytest.approx(0.02, rel=0.15) and abs(w.mean()) < 0.005, name
        elif name == "patch_embed.bias":
            bound = 1 / math.sqrt(3 * 8 * 8)  # torch's default
            assert 0.9 * bound < w.abs().max() <= bound
        else:  # xavier: uniform within sqrt(6 / (inputs + outputs))
            outputs, inputs = w.flatten(1).shape
            bound = math.sqrt(6 / (inputs + outputs))
            assert 0.99 * bound < w.abs().max() <= bound * 1.0001, name
            assert w.std() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
    assert [name for name in weights if "bias" in name] == ["patch_embed.bias"]
    for name in ("pos_embed", "predictor.pos_embed"):
        assert (name in weights) == (positions == "learned")


# ---- predictor -----------------------------------------------------------------------------------

def guesses(net, guess, x, visible, places):
    registers, patches = net(x, visible)
    coords = rope_vit.take(net.coordinates(None, len(x))[:, 4:], places)  # (N, q, 2)
    return guess(torch.cat([registers, patches], 1), net.coordinates(visible, len(x)), coords,
                 places)


@pytest.mark.parametrize("positions", rope_vit.POSITIONS)
def test_a_guess_does_not_depend_on_the_others(positions):
    net, guess = encoder(positions), predictor(positions)
    x, visible, places = randn(3, 3, 32, 32), some_patches(3, 23), some_patches(3, 10, seed=1)
    together = guesses(net, guess, x, visible, places)
    assert together.shape == (3, 10, 96)
    for i in range(10):
        alone = guesses(net, guess, x, visible, places[:, i:i + 1])
        assert torch.allclose(together[:, i:i + 1], alone, atol=1e-12)
    assert not torch.allclose(together[:, 0], together[:, 1], atol=1e-3)  # places matter
    assert torch.allclose(together.square().mean(2), torch.ones(3, 10).double(), atol=1e-3)


@pytest.mark.parametrize("positions", rope_vit.POSITIONS)
def test_a_guess_depends_on_what_is_visible(positions):
    net, guess = encoder(positions), predictor(positions)
    x, places = randn(2, 3, 32, 32), some_patches(2, 5, seed=1)
    first = guesses(net, guess, x, some_patches(2, 23), places)
    assert not torch.allclose(first, guesses(net, guess, x, some_patches(2, 23, seed=2), places),
                              atol=1e-3)


def test_a_guess_by_an_independent_forward_pass():
    """Cross-attention without self-attention; the context, registers too, is the same in all blocks
    and is not normed again."""
    guess, context = predictor(), randn(2, 9, 96)
    coords, places = torch.rand(2, 9, 2).double(), torch.rand(2, 4, 2).double()
    with torch.no_grad():
        for w in guess.parameters():
            w.add_(0.05 * torch.randn_like(w))
    x = guess.mask_token.expand(2, 4, 96)
    for block in guess.blocks:
        a = block.attn
        q = plain_norm(x, block.norm1.weight) @ a.q.weight.T
        x = x + plain_attention(q, context @ a.k.weight.T, context @ a.v.weight.T, places, coords,
                                proper_turn) @ a.out.weight.T
        h = plain_norm(x, block.norm2.weight) @ block.mlp.fc1.weight.T
        x = x + (h * (1 + torch.erf(h / math.sqrt(2))) / 2) @ block.mlp.fc2.weight.T
    got = guess(context, coords, places, torch.zeros(2, 4, dtype=torch.long))
    assert torch.allclose(got, plain_norm(x, 1), atol=1e-6)


# ---- a plain forward pass, loops and all ---------------------------------------------------------

def plain_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def angle_of(place, m, size):
    """Radians for frequency number m of a head of `size` channels."""
    return 2 * math.pi * 7 * 1e-4 ** (m / (size // 4 - 1)) * place


def proper_turn(x, row, column):
    """x (d,): channel m of each half turns with channel m + d/4 of that half."""
    quarter, out = len(x) // 4, x.clone()
    for start, place in ((0, row), (2 * quarter, column)):
        for m in range(quarter):
            i, j, angle = start + m, start + m + quarter, angle_of(place, m, len(x))
            out[i] = x[i] * math.cos(angle) - x[j] * math.sin(angle)
            out[j] = x[i] * math.sin(angle) + x[j] * math.cos(angle)
    return out


def quirk_turn(x, row, column):
    """x (d,): channel m by the row, channel m + d/2 by the column, mixed with each other."""
    half, out = len(x) // 2, x.clone()
    for m in range(half):
        a = angle_of(row, m % (half // 2), len(x))
        b = angle_of(column, m % (half // 2), len(x))
        out[m] = x[m] * math.cos(a) - x[m + half] * math.sin(a)
        out[m + half] = x[m] * math.sin(b) + x[m + half] * math.cos(b)
    return out


def plain_attention(q, k, v, q_places, k_places, turn, size=D):
    """q (N, q, dim), k and v (N, T, dim) in heads of `size`, one image and one head at a time."""
    out = torch.zeros_like(q)
    for n in range(len(q)):
        for start in range(0, q.shape[2], size):
            head = slice(start, start + size)
            queries = torch.stack([turn(x, *place.tolist())
                                   for x, place in zip(q[n, :, head], q_places[n])])
            keys = torch.stack([turn(x, *place.tolist())
                                for x, place in zip(k[n, :, head], k_places[n])])
            weights = (queries @ keys.T / math.sqrt(size)).softmax(1)
            out[n, :, head] = weights @ v[n, :, head]
    return out


# ---- the released layout -------------------------------------------------------------------------

def released_file(dim=32, depth=2, size=16, registers=8, patch=7, seed=0):
    """{key: tensor} in the layout of CAPI's official model.py, with random weights."""
    g = torch.Generator().manual_seed(seed)

    def w(*shape):
        return torch.randn(*shape, generator=g) / math.sqrt(shape[-1])
    freqs = torch.zeros(2, size)
    for m in range(size // 4):
        for i in (m, m + size // 4):
            freqs[0, i] = freqs[1, i + size // 2] = angle_of(1, m, size)
    tensors = {"mask_token": w(1, dim), "registers": w(1, registers, dim),
               "patch_embed.weight": 0.2 * w(dim, 3, patch, patch), "patch_embed.bias": w(dim)}
    for i in range(depth):
        block = f"encoder.blocks.{i}."
        for j in (1, 2):
            tensors[f"{block}residual{j}.norm.weight"] = 1 + 0.3 * w(dim)
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            tensors[f"{block}residual1.fn.{name}.weight"] = w(dim, dim)
        tensors[f"{block}residual1.fn.rope.freqs"] = freqs.clone()
        tensors[f"{block}residual2.fn.fc1.weight"] = w(4 * dim, dim)
        tensors[f"{block}residual2.fn.fc2.weight"] = w(dim, 4 * dim)
    tensors["decoder.blocks.0.residual1.norm.weight"] = w(dim)
    tensors["decoder.blocks.0.residual1.fn.rope.freqs"] = freqs.clone()
    tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    return tensors | {"head.last_layer.weight_v": w(5, dim), "head.last_layer.weight_g": w(5, 1)}


def released_forward(tensors, x, patch, size):
    """Registers and patches (N, R + n, dim) of images x, from a released file's tensors in
    float64."""
    t = {name.removeprefix("backbone."): w.double() for name, w in tensors.items()}
    N, _, H, W = x.shape
    h, w = H // patch, W // patch
    tokens, places = [], []
    for i in range(h):
        for j in range(w):
            pixels = x[:, :, i * patch:(i + 1) * patch, j * patch:(j + 1) * patch].flatten(1)
            tokens.append(pixels @ t["patch_embed.weight"].flatten(1).T + t["patch_embed.bias"])
            places.append((i / (h - 1), j / (w - 1)))
    side = t["registers"].shape[1] // 4
    edge = [(k / side, 0) for k in range(side)] + [(1, k / side) for k in range(side)]
    edge += [(1 - k / side, 1) for k in range(side)] + [(0, 1 - k / side) for k in range(side)]
    x = torch.cat([t["registers"].expand(N, -1, -1), torch.stack(tokens, 1)], 1)
    places = torch.tensor([edge + places] * N, dtype=torch.double)
    for i in range(sum("residual1.fn.q_proj" in name for name in t)):
        b = f"encoder.blocks.{i}."
        y = plain_norm(x, t[b + "residual1.norm.weight"])
        q, k, v = (y @ t[f"{b}residual1.fn.{name}_proj.weight"].T for name in "qkv")
        y = plain_attention(q, k, v, places, places, quirk_turn, size)
        x = x + y @ t[b + "residual1.fn.proj.weight"].T
        y = plain_norm(x, t[b + "residual2.norm.weight"]) @ t[b + "residual2.fn.fc1.weight"].T
        x = x + (y * (1 + torch.erf(y / math.sqrt(2))) / 2) @ t[b + "residual2.fn.fc2.weight"].T
    return plain_norm(x, 1)


def test_a_released_file_gives_what_a_plain_forward_pass_gives(tmp_path):
    tensors, x = released_file(), randn(2, 3, 21, 28)
    torch.save(tensors, tmp_path / "capi.pth")
    net, args, description = backbones.load_backbone(tmp_path / "capi.pth", arch="capi")
    assert args == {"arch": "capi", "patch_size": 7, "img_size": 224} and not net.training
    assert (net.arch, net.dim, net.patch_size) == ("capi", 32, 7)
    assert description.endswith(
        "only copy, capi, patch 7, 32 wide, 2 blocks of 2 heads, 8 registers; not used: "
        "head.last_layer.weight_v, head.last_layer.weight_g, mask_token and 2 more")
    wanted = released_forward(tensors, x, 7, 16)  # (2, 8 + 12, 32)
    with torch.no_grad():
        cls, patches = net.double()(x)
        registers, _ = Encoder.forward(net, x)
    assert torch.allclose(patches, wanted[:, 8:], atol=1e-5)
    assert torch.allclose(registers, wanted[:, :8], atol=1e-5)
    assert torch.allclose(cls, wanted[:, 8:].mean(1), atol=1e-5)
    for pool in ("cls", "mean"):
        assert torch.equal(features.embed(net, x, pool=pool), cls.float())
    assert features.width(net) == 32
    for layers, pool in ((2, "cls"), (1, "cls+mean")):
        with pytest.raises(ValueError, match="needs a ViT with a class token: a capi has"):
            features.width(net, layers, pool)


def test_the_moving_average_is_taken_and_its_frequencies_are(tmp_path):
    student, average = released_file(seed=1), released_file(seed=2)
    for name, tensor in average.items():
        if "freqs" in name:
            tensor.mul_(1.01)
    torch.save({"student": student, "student_ema": average}, tmp_path / "capi.pth")
    for which, tensors in (("teacher", average), ("student", student)):
        net, _, _ = backbones.load_backbone(tmp_path / "capi.pth", which, arch="capi")
        assert torch.equal(net.registers, tensors["backbone.registers"][0])
        freqs = tensors["backbone.encoder.blocks.1.residual1.fn.rope.freqs"]
        assert torch.equal(net.freqs, freqs)


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("registers"), "needs a tensor registers of 3 dimensions"),
    (lambda s: s.update(registers=torch.zeros(1, 6, 32)), "registers 6 is not a multiple of 4"),
    (lambda s: s.update({"patch_embed.weight": torch.zeros(32, 3)}), "patch_embed.weight of 4"),
    (lambda s: s.pop("encoder.blocks.0.residual1.fn.rope.freqs"), "rope.freqs of 2 dimensions"),
    (lambda s: s["encoder.blocks.1.residual1.fn.rope.freqs"].mul_(2),
     "blocks.1.residual1.fn.rope.freqs differs from the frequencies of the first block"),
    (lambda s: s.pop("encoder.blocks.1.residual2.fn.fc1.weight"), "no blocks.1.mlp.fc1.weight"),
    (lambda s: s.update({"encoder.blocks.1.residual1.fn.q_proj.bias": torch.zeros(32)}),
     "blocks.1.attn.q.bias too many"),
    (lambda s: s.update({"encoder.blocks.1.residual1.fn.q_norm.weight": torch.zeros(32)}),
     "blocks.1.residual1.fn.q_norm.weight too many"),
    (lambda s: s.update({"enc_norm.weight": torch.ones(32)}), "enc_norm.weight too many"),
    (lambda s: s.update(cls_token=torch.ones(1, 1, 32)), "cls_token too many"),
    (lambda s: s.update(pos_embed=torch.ones(1, 9, 32)), "pos_embed too many"),
    (lambda s: s.clear() or s.update(a=torch.ones(2)), "holds no teacher that fits --arch capi")])
def test_other_networks_are_refused_in_one_sentence(tmp_path, change, words):
    tensors = {name.removeprefix("backbone."): tensor for name, tensor in released_file().items()}
    change(tensors)
    torch.save({f"backbone.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "f.pth")
    with pytest.raises(ValueError, match=words) as error:
        backbones.load_backbone(tmp_path / "f.pth", arch="capi")
    assert "\n" not in str(error.value) and str(tmp_path / "f.pth") in str(error.value)


def test_a_backbone_is_an_encoder_with_the_mean_of_its_patches():
    torch.manual_seed(0)
    sizes = dict(dim=96, depth=1, heads=3, patch_size=4, img_size=32, registers=4)
    net = Backbone("mine", **sizes)
    assert net.arch == "mine" and net.sizes == sizes
    net.load_state_dict(Encoder(**sizes).state_dict())  # the same names
    x = torch.randn(2, 3, 32, 32)
    cls, patches = net(x)
    assert torch.equal(patches, Encoder.forward(net, x)[1]) and torch.equal(cls, patches.mean(1))


def test_the_evaluations_take_a_released_file(tmp_path, monkeypatch, capsys):
    torch.save(released_file(dim=32, depth=1), tmp_path / "capi.pth")
    y = torch.arange(30) % 3
    x = torch.randint(90, (30, 3, 28, 28), generator=torch.Generator().manual_seed(0))
    x[torch.arange(30), y] += 160  # the colour tells the class
    images = data.Images(x.to(torch.uint8), y, list("abc"), "colours")
    monkeypatch.setattr(data, "load", lambda name, **settings: (images, images))
    words = [str(tmp_path / "capi.pth"), "--arch", "capi", "--data", "shapes", "--img-size", "28",
             "--device", "cpu"]
    assert eval_knn.main([*words, "--k", "1", "--patch-size", "7"])["knn"] == {1: 100}
    for protocol, pool in (("lbfgs", "mean"), ("grid", "mean"), ("attentive", "patches")):
        steps = [] if protocol == "lbfgs" else ["--steps", "30"]
        out = eval_linear.main([*words, "--protocol", protocol, *steps])
        assert (out["layers"], out["pool"]) == (1, pool)
        assert "(32-d" in capsys.readouterr().out
    net, args, _ = backbones.load_backbone(words[0], arch="capi")
    twin = backbones.untrained(net, args, seed=0)
    assert twin.sizes == net.sizes and not torch.equal(twin.registers, net.registers)


def test_a_released_patch_that_does_not_divide_224():
    from support import capi
    patch, dim, d = 10, 32, 16
    theirs = {"patch_embed.weight": torch.zeros(dim, 3, patch, patch),
              "registers": torch.zeros(1, 4, dim), capi.FREQUENCIES: torch.zeros(2, d),
              capi.LANDMARK: torch.zeros(dim, dim)}
    backbone, _, words = capi.build("x.pth", theirs)
    assert (backbone.grid, backbone.patch_size) == (22, 10)
    assert words == ", patch 10, 32 wide, 1 blocks of 2 heads, 4 registers"
