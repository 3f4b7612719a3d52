"""From files to pixels: modes, orientation, deep files, very large images."""
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import views
from support import pixels


def test_image_modes(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    byte = (ramp / 257).round().astype(np.uint8)
    Image.fromarray(byte).save(tmp_path / "grey.png")
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray(ramp).save(tmp_path / "deep.tif")
    rgba = np.dstack([byte, byte.T, byte[::-1], np.full((8, 8), 90, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    palette = Image.fromarray(byte).convert("P")
    palette.putpalette([v for i in range(256) for v in (i, 255 - i, i // 2)])
    palette.save(tmp_path / "palette.png", transparency=bytes([0] * 256))
    for name in ("grey.png", "deep.png", "deep.tif"):
        want = torch.from_numpy(byte).expand(3, 8, 8)
        assert torch.equal(pixels.read(tmp_path / name), want), name
    want = torch.from_numpy(rgba[..., :3]).permute(2, 0, 1)
    assert torch.equal(pixels.read(tmp_path / "rgba.png"), want)
    b = byte.astype(int)
    want = np.stack([b, 255 - b, b // 2])
    assert np.array_equal(pixels.read(tmp_path / "palette.png").numpy(), want)


def test_a_mask_is_read_as_its_indices_or_greys(tmp_path):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    labels[0, 0] = pixels.IGNORED
    grey, palette = Image.fromarray(labels), Image.fromarray(labels)
    palette.putpalette([255 - v % 256 for v in range(768)])
    for name, image in (("grey.png", grey), ("palette.png", palette)):
        image.save(tmp_path / name)
        assert np.array_equal(pixels.read_mask(tmp_path / name).numpy(), labels), name
    assert image.mode == "P"
    image.convert("RGB").save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match="rgb.png is a picture of mode RGB, and a mask has"):
        pixels.read_mask(tmp_path / "rgb.png")
    (tmp_path / "grey.png").write_bytes(b"no picture")
    for name in ("grey.png", "missing.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            pixels.read_mask(tmp_path / name)


def scene():
    """A picture of 16 x 12 pixels with grey, red and blue parts."""
    image = Image.new("RGB", (16, 12), (200, 200, 200))
    image.paste((220, 30, 30), (0, 0, 8, 12))
    image.paste((30, 30, 220), (8, 6, 16, 12))
    return image


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "png"), ("RGB", "jpg"), ("RGB", "bmp"), ("RGB", "webp"), ("RGB", "tif"),
    ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg"), ("YCbCr", "tif"), ("LAB", "tif"),
    ("RGBA", "png"), ("RGBA", "tif"), ("P", "png"), ("P", "gif"),
    ("L", "png"), ("LA", "png"), ("1", "png"), ("1", "tif")])
def test_modes_of_pictures(tmp_path, mode, suffix):
    """Whatever a file stores, its colours come out, or its greys where it has no more."""
    image = scene()
    if mode == "LAB":
        cms = pytest.importorskip("PIL.ImageCms")
        srgb, lab = cms.createProfile("sRGB"), cms.createProfile("LAB")
        stored = cms.applyTransform(image, cms.buildTransform(srgb, lab, "RGB", "LAB"))
    else:
        stored = image.quantize() if mode == "P" else image.convert(mode)
    options = {"quality": 95} if suffix in ("jpg", "webp") else {}
    if (mode, suffix) == ("YCbCr", "tif"):  # Pillow before 13 cannot read them uncompressed
        options["compression"] = "tiff_lzw"
    stored.save(tmp_path / f"x.{suffix}", **options)
    x = pixels.read(tmp_path / f"x.{suffix}").float()  # (3, 12, 16)
    wanted = image.convert("L" if mode == "LA" else mode if mode in "1L" else "RGB").convert("RGB")
    wanted = torch.from_numpy(np.array(wanted)).permute(2, 0, 1).float()
    tolerance = 15 if mode in ("LAB", "YCbCr") or suffix in ("jpg", "webp") else 1
    assert x.shape == (3, 12, 16) and (x - wanted).abs().mean() <= tolerance


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif", "mpo"])
def test_the_first_of_several_pictures(tmp_path, suffix):
    first, second = Image.new("RGB", (16, 16), (220, 30, 30)), Image.new("RGB", (16, 16))
    first.save(tmp_path / f"x.{suffix}", save_all=True, append_images=[second])
    x = pixels.read(tmp_path / f"x.{suffix}").float().mean((1, 2))
    assert (x - torch.tensor([220., 30, 30])).abs().max() < 12


@pytest.mark.parametrize("name", ["x.png", "x.JPG", "x.Jpeg", "x.tiff"])
def test_a_suffix_that_says_something_else(tmp_path, name):
    scene().save(tmp_path / name, format="PNG")
    assert pixels.read(tmp_path / name).shape == (3, 12, 16)


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000)])
def test_pictures_of_one_pixel_and_of_one_row(tmp_path, size):
    for c in "ab":
        (tmp_path / c).mkdir()
        for i in range(3):
            Image.new("RGB", size).save(tmp_path / c / f"{i}.png")
    train, test = data.load(str(tmp_path), img_size=16)
    recipe = views.Recipe(global_size=16, local_size=8, n_local=1)
    crops = next(iter(views.batches(train, recipe, batch_size=4, seed=0, start=0, stop=1)))
    assert [crop.shape for crop in crops] == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)]
    assert next(iter(views.eval_batches(test, 16))).shape == (2, 3, 16, 16)


# ---- which way is up -----------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_pictures_are_upright(tmp_path, suffix, orientation):
    """A camera that was turned stores turned pixels and says how to turn them back."""
    upright = Image.new("RGB", (48, 32), (20, 20, 20))
    upright.paste((230, 230, 230), (0, 0, 24, 16))  # its first quarter is light
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x112] = orientation
    upright.transpose(undo[orientation]).save(tmp_path / f"x.{suffix}", exif=exif)
    x = pixels.read(tmp_path / f"x.{suffix}").float()  # (3, 32, 48)
    wanted = torch.from_numpy(np.array(upright)).permute(2, 0, 1).float()
    assert x.shape == wanted.shape and (x - wanted).abs().mean() < 2  # a JPEG loses a little


def test_turned_and_upright_pictures_are_one_set(tmp_path):
    """A set held in memory: all pictures have one size, once they are upright."""
    for i in range(8):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        image = Image.new("RGB", (24, 16), (200 * (i % 2), 40, 90))
        exif = Image.Exif()
        if i % 4 > 1:
            image, exif[0x112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(tmp_path / "ab"[i % 2] / f"{i}.jpg", exif=exif)
    assert isinstance(data.load(str(tmp_path))[0], data.Images)


# ---- more than 8 bits ----------------------------------------------------------------------------
RAMP = np.linspace(0, 1, 64).reshape(8, 8)
DEEP = {"fraction.tif": RAMP.astype(np.float32),
        "float_of_255.tif": (RAMP * 255).astype(np.float32),
        "camera_12_bit.png": (RAMP * 4095).round().astype(np.uint16),
        "camera_10_bit.tif": (RAMP * 1023).round().astype(np.uint16),
        "deep.png": (RAMP * 65535).round().astype(np.uint16),
        "int32_of_255.tif": (RAMP * 255).round().astype(np.int32)}


@pytest.mark.parametrize("name", DEEP)
def test_deep_files_fill_the_range_of_grey(tmp_path, name):
    Image.fromarray(DEEP[name]).save(tmp_path / name)
    wanted = torch.from_numpy((RAMP * 255).round()).expand(3, 8, 8)
    got = pixels.read(tmp_path / name).double()
    assert (got - wanted).abs().max() <= 1 and len(got.unique()) == 64


def test_the_brightest_file_of_a_set_says_what_white_is(tmp_path, capsys):
    """A dark picture of a 12-bit camera stays dark, in the training and in the test split."""
    for split in ("train", "val"):
        for c, level in (("dark", 200), ("light", 3900 if split == "train" else 900)):
            (tmp_path / split / c).mkdir(parents=True)
            for i in range(2):
                values = np.full((8, 8), level + i, np.uint16)
                Image.fromarray(values).save(tmp_path / split / c / f"{i}.png")
    train, test = data.load(str(tmp_path))
    assert train.x[:, 0, 0, 0].tolist() == [round(v / 4095 * 255) for v in (200, 201, 3900, 3901)]
    assert test.x[:, 0, 0, 0].tolist() == [round(v / 4095 * 255) for v in (200, 201, 900, 901)]
    assert "more than 8 bits the value 4,095 is taken for white" in capsys.readouterr().err


@pytest.mark.parametrize("name, values, words", [
    ("heights.tif", np.float32([[-3, 7]]), "from -3 to 7"),
    ("nan.tif", np.float32([[0, np.nan]]), "from nan"),
    ("huge.tif", np.float32([[0, 1e20]]), "to 1e\\+20"),
])
def test_values_of_no_picture_are_refused(tmp_path, name, values, words):
    Image.fromarray(values).save(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} cannot be read .*{words}"):
        pixels.read(tmp_path / name)


def tiff(path, bands):
    """Write a TIFF of 8 x 8 pixels with that many bytes for each, as satellites send them."""
    grey = bytes(range(64)) * bands
    bits_at = 8 + 2 + 12 * 10 + 4  # behind the header and the ten entries
    grey_at = bits_at + 2 * bands
    entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, bands, bits_at), (259, 3, 1, 1),
               (262, 3, 1, 2), (273, 4, 1, grey_at), (277, 3, 1, bands), (278, 3, 1, 8),
               (279, 4, 1, len(grey)), (338, 3, bands - 3, 0)]
    file = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for entry in entries:
        file += struct.pack("<HHII", *entry)
    path.write_bytes(file + bytes(4) + struct.pack(f"<{bands}H", *[8] * bands) + grey)


def test_bands_are_not_lost(tmp_path):
    tiff(tmp_path / "four.tif", 4)
    assert pixels.read(tmp_path / "four.tif").shape == (3, 8, 8)
    tiff(tmp_path / "five.tif", 5)
    with pytest.raises(ValueError, match=r"five.tif cannot be read \(it has 5 bands"):
        pixels.read(tmp_path / "five.tif")


def deep_png(path, values):
    """Write (h, w, 3) uint16 as a PNG with 16 bits for each colour, which Pillow cannot."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    h, w, _ = values.shape
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)),
                           (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            check = zlib.crc32(kind + body)
            file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check))


def test_colours_of_16_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (8, 8, 3)).astype(np.uint16)
    deep_png(tmp_path / "full.png", values * 16)
    x = pixels.read(tmp_path / "full.png")
    assert torch.equal(x, torch.from_numpy((values // 16).astype(np.uint8)).permute(2, 0, 1))
    deep_png(tmp_path / "twelve.png", values)  # of which Pillow would keep 16 levels
    with pytest.raises(ValueError, match="twelve.png cannot be read .its colours use at most 12"):
        pixels.read(tmp_path / "twelve.png")


@pytest.mark.parametrize("name, size", [("dark.bmp", (5, 5)), ("wide.bmp", (720, 2)),
                                        ("dark.tif", (5, 5))])
def test_dark_pictures_of_8_bits_are_pictures(tmp_path, name, size):
    """Pillow names the length of a row, and where a strip lies in the file, beside the bits."""
    image = Image.new("RGB", size, (9, 8, 7))
    image.save(tmp_path / name, **({"compression": "tiff_lzw"} if name.endswith("tif") else {}))
    assert "16" in str(Image.open(tmp_path / name).tile) or name == "dark.tif"
    x = pixels.read(tmp_path / name)
    assert torch.equal(x, torch.tensor([9, 8, 7], dtype=torch.uint8)[:, None, None].expand_as(x))


# ---- very large images ---------------------------------------------------------------------------
def test_an_image_of_too_many_pixels_says_so(tmp_path, monkeypatch):
    Image.new("L", (300, 300)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    with pytest.raises(ValueError, match=r"x.png cannot be read \(Image size \(90000 pixels\)"):
        pixels.read(tmp_path / "x.png")


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_are_shrunk_when_they_are_read(tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(data, "IN_MEMORY", 0)
    for c in "ab":
        (tmp_path / c).mkdir()
        for i in range(2):
            noise = np.random.default_rng(i).integers(0, 256, (400, 600, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / c / f"{i}.jpg")
    train, _ = data.load(str(tmp_path), img_size=8)
    x = train.x[0] if in_memory else train.read(0)[0]
    assert x.shape == ((3, 32, 48) if in_memory else (3, 128, 192))


@pytest.mark.parametrize("side", [4, 40])
def test_a_very_long_image_is_cut_before_it_is_resized(side):
    """Only the centre is used, and it is the same pixels as without the cut."""
    x = torch.randint(256, (3, side, 50 * side), generator=torch.Generator().manual_seed(0),
                      dtype=torch.uint8)
    near = x[..., 20 * side:30 * side]  # ten times as long as wide, around the same centre
    got = views.resize_and_crop(x, 36, 32)
    assert got.shape == (3, 32, 32)
    assert torch.equal(got, views.resize_and_crop(near, 36, 32))


class Largest(TorchDispatchMode):
    """numbers: as many as the largest tensor has that was made within the with statement."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return made


def test_a_very_long_image_takes_little_memory():
    """4 x 20,000 pixels: enlarged as a whole they would be a thousand million numbers. With the cut
    they are 3 colours of 256 x 2,048."""
    x = torch.zeros(3, 4, 20_000, dtype=torch.uint8)
    with Largest() as largest:
        views.resize_and_crop(x, 256, 224)
    assert largest.numbers == 3 * 256 * 2048
