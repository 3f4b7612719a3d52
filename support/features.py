"""Features of frozen backbones: whose weights, which tokens, computed once and kept, and where the numbers go.

A backbone comes from a run of ours, or from a foreign file by naming its architecture. Its features of a set of images
lie in features/ next to the checkpoint, under a name made of everything they depend on, so every protocol shares them.

Letters: N images, n patches of an image, dim = width of the backbone, D = width of a feature.
"""
import csv
import hashlib
import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from support import checkpoints
from data import Images, eval_batches
from support.guard import write
from models import ARCHS, build
from views import THREADS

VERSION = "features-1"  # part of every cached file's name; raise it when the numbers in them change
POOLS = ("cls", "mean", "cls+mean")
# Which copy of a network serves, as ranks in checkpoints.SIDES (teacher, average of the student, student, unnamed).
COPIES = {"teacher": (0, 1, 3, 2), "student": (2, 3)}
ALTERS = {"reg_token", "register_tokens", "dist_token", "fc_norm", "norm_pre"}  # parts that ours would leave out


# ----------------------------------------------------------------------------------------------------------- features

def width(backbone, layers=1, pool="cls"):
    """D of what `embed` returns. Raises ValueError for layers or a pool that the backbone does not have."""
    if pool not in POOLS:
        raise ValueError(f"--pool {pool} is not one of {', '.join(POOLS)}")
    if not hasattr(backbone, "blocks"):
        if layers != 1 or pool == "cls+mean":
            raise ValueError(f"--layers {layers} --pool {pool} needs a ViT: a ResNet has its average pool and no more")
    elif not 1 <= layers <= len(backbone.blocks):
        raise ValueError(f"--layers {layers} must lie in 1..{len(backbone.blocks)}, the blocks of this {backbone.arch}")
    return backbone.dim * {"cls": layers, "mean": 1, "cls+mean": layers + 1}[pool]


def embed(backbone, x, layers=1, pool="cls"):
    """Features (N, D) float32 of normalised images x (N, 3, H, W), with the backbone in whatever mode it is.

    layers: class tokens of that many last blocks, earliest first, each through the final norm (DINO's probe: 4).
    pool: "cls", "mean" (the last block's patch tokens, averaged) or "cls+mean" (both: DINO's probe of a ViT-B).
    A ResNet has one layer, and its "cls" and its "mean" are the average pool.
    """
    if layers == 1 and pool == "cls" or not hasattr(backbone, "blocks"):
        return backbone(x)[0].float()
    outputs = backbone.intermediate(x, layers)  # [(cls (N, dim), patches (N, n, dim))]
    parts = [cls for cls, _ in outputs] if pool != "mean" else []
    return torch.cat(parts + ([outputs[-1][1].mean(1)] if pool != "cls" else []), 1).float()  # (N, D)


def uncropped(images, size, *, batch_size=512, device="cpu"):
    """As data.eval_batches, but the shorter side becomes `size` itself and not 256/224 of it, so that less is cut off
    (Ericsson et al. 2021, for Table 4)."""
    def one(i):
        x, broken = (images.x[i], None) if hasattr(images, "x") else images.read(i)
        x = v2.functional.resize(x, [size], InterpolationMode.BICUBIC, antialias=True)
        return v2.functional.center_crop(x, [size, size]), broken

    with ThreadPoolExecutor(THREADS) as pool:
        for a in range(0, len(images), batch_size):
            x, broken = zip(*pool.map(one, range(a, min(a + batch_size, len(images)))))
            if any(broken):
                images.note_broken([path for path in broken if path])
            whole = Images(torch.stack(x), None, [], "")  # x (n, 3, size, size) uint8
            yield from eval_batches(whole, size, batch_size=batch_size, device=device)


@torch.no_grad()
def features(backbone, images, img_size, *, device="cpu", batch_size=512, progress=False, layers=1, pool="cls",
             normalize=True, crop=True):
    """Features (N, D) float32, on the CPU, of every image in order, without augmentation; see `embed` for layers, pool.

    The backbone must be on device. It runs in eval mode (BatchNorm with running statistics) and without autocast; the
    train/eval flag of each of its modules is put back afterwards. img_size in pixels; progress: a bar on a terminal.
    normalize: to length one. crop: shorter side to 256/224 of img_size, then the centre (DINO); False: see `uncropped`.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    x = torch.empty(len(images), width(backbone, layers, pool))  # (N, D)
    batches, done = (eval_batches if crop else uncropped), 0
    bar = tqdm(total=len(images), desc="features", unit="img", leave=False, disable=None if progress else True)
    backbone.eval()
    try:
        with bar, torch.autocast(torch.device(device).type, enabled=False):
            for batch in batches(images, img_size, batch_size=batch_size, device=device):
                h = embed(backbone, batch, layers, pool)
                x[done:done + len(h)] = (F.normalize(h, dim=1) if normalize else h).cpu()
                done += len(h)
                bar.update(len(h))
    finally:
        for module, training in modes:
            module.training = training
    return x


# -------------------------------------------------------------------------------------------------------------- cache

def digest(*parts):
    """16 hex digits of a hash over tensors (their bytes) and anything else (its repr)."""
    total = hashlib.sha256()
    for part in parts:
        if torch.is_tensor(part):
            total.update(repr((part.dtype, tuple(part.shape))).encode())
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        else:
            part = repr(part).encode()
        total.update(part)
    return total.hexdigest()[:16]


def fingerprint(backbone):
    """16 hex digits that change with any weight or running statistic of the backbone, and with nothing else."""
    return digest(*(part for pair in backbone.state_dict().items() for part in pair))


def identity(images):
    """16 hex digits of a set of images: its pixels where it is in memory, else paths, sizes and times of its files."""
    if hasattr(images, "x"):
        return digest(images.x)
    stats = [Path(path).stat() for path in images.paths]
    return digest([(str(p), s.st_size, s.st_mtime_ns) for p, s in zip(images.paths, stats)])


def cached(backbone, images, img_size, folder, *, layers=1, pool="cls", crop=True, **options):
    """`features` without normalisation, from a file in `folder` where it is there, else computed and put there.

    folder None: neither read nor written. A file that is damaged is computed anew; one that cannot be written is
    said and not fatal. options: those of `features`.
    """
    wanted = dict(layers=layers, pool=pool, crop=crop)
    if folder is None:
        return features(backbone, images, img_size, normalize=False, **wanted, **options)
    about = wanted | dict(version=VERSION, backbone=fingerprint(backbone), images=identity(images), img_size=img_size)
    path = Path(folder) / f"{digest(sorted(about.items()))}.pt"
    if path.exists():
        try:
            stored = checkpoints.read(path, mmap=False)  # compares the checksums
            if stored["about"] == about and stored["x"].shape == (len(images), width(backbone, layers, pool)):
                print(f"features of {len(images)} images: read from {path}")
                return stored["x"]
            reason = "it holds something else"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error)
        print(f"{path} is not used and computed anew ({reason})")
    x = features(backbone, images, img_size, normalize=False, **wanted, **options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(str(path), lambda f: torch.save({"about": about, "x": x}, f))
    except OSError as error:
        print(f"features are not kept for the next time: {error}")
    return x


# ---------------------------------------------------------------------------------------------------------- backbones

def load_backbone(path, which="teacher", arch=None, patch_size=None, img_size=None):
    """Of a checkpoint or run directory: backbone in eval mode on the CPU, args dict, and a line that describes it.

    which: "teacher" (what the papers report) or "student". Reads only what it needs of the file (memory-mapped).
    arch: of a foreign file, see `foreign`; None for a run of ours, which says so itself. patch_size: what the file must
    have. img_size: pixels to evaluate at, instead of those the file names; a ViT's positions are interpolated.
    Raises ValueError where the file is missing, unreadable, not written by train.py, or does not fit its own args.
    """
    if which not in COPIES:
        raise ValueError(f"which must be teacher or student, got '{which}'")
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    backbone, args, info = ours(path, which) if arch is None else foreign(path, which, arch)
    if patch_size is not None and patch_size != getattr(backbone, "patch_size", patch_size):
        raise ValueError(f"--patch-size {patch_size} does not fit {path}, whose patches are {backbone.patch_size} px")
    if img_size is not None:
        patch = getattr(backbone, "patch_size", 1)
        if img_size < 1 or img_size % patch:
            raise ValueError(f"--img-size {img_size} must be a multiple of {patch}, the pixels of a patch")
        args = args | {"img_size": img_size}
    return backbone.eval(), args, info


def ours(path, which):
    """load_backbone for a checkpoint of train.py."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a foreign or cut-off file can fail in any way that zip and pickle know
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(f"{path} is not a checkpoint that can be read ({reason})") from None
    if not isinstance(ckpt, dict):
        raise ValueError(f"{path} holds a {type(ckpt).__name__}, not a checkpoint of train.py")
    wanted = {"args": dict, "step": int, which: dict}
    absent = [key for key, kind in wanted.items() if not isinstance(ckpt.get(key), kind)]
    absent = absent or [f"args['{key}']" for key in ("arch", "patch_size", "img_size") if key not in ckpt["args"]]
    if absent:
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(absent)}; for another's "
                         "backbone say which --arch it has")
    args = ckpt["args"]
    weights = {key.removeprefix("backbone."): w for key, w in ckpt[which].items() if key.startswith("backbone.")}
    try:
        backbone = build(args["arch"], patch_size=args["patch_size"], img_size=args["img_size"],
                         in_small=small_stem(weights))
        backbone.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: the {which}'s weights do not fit its args, arch {args['arch']}, patch "
                         f"{args['patch_size']}, {args['img_size']} px ({reason})") from None
    info = (f"{path}: step {ckpt['step']}, {args.get('method', '?')} with {args.get('prototypes', '?')} prototypes "
            f"(K = {args.get('num_prototypes', '?')}), {which} {args['arch']}")
    return backbone, args, info


def small_stem(weights):
    """Whether a ResNet's weights have the 3x3 stem for small images."""
    return "conv1.weight" in weights and weights["conv1.weight"].shape[-1] == 3


def foreign(path, which, arch):
    """load_backbone for a file of others: DINO's releases (whole or backbone alone), torchvision's, timm's, an export.

    Patch and grid of a ViT are read off its tensors. Heads are dropped and named; anything else that is missing, of
    another shape, or would make the network compute something else is a ValueError.
    """
    if arch not in ARCHS:
        raise ValueError(f"--arch {arch} is not one of {', '.join(ARCHS)}")
    copies = {}
    for key, tensor in checkpoints.flatten(checkpoints.read(path)).items():
        rank, name = checkpoints.bare(key)
        copies.setdefault(rank, {})[name.removeprefix("backbone.")] = tensor
    vit = arch.startswith("vit")
    rank = next((r for r in COPIES[which] if ("pos_embed" if vit else "conv1.weight") in copies.get(r, {})), None)
    if rank is None:
        raise ValueError(f"{path} holds no {which} that fits --arch {arch}; its keys: "
                         f"{checkpoints.listing({k: w for part in copies.values() for k, w in part.items()})}")
    there = copies[rank]
    small = small_stem(there)
    patch, side = 16, 32 if small else 224
    if vit:
        positions, kernel = there["pos_embed"].shape[-2], there.get("patch_embed.proj.weight")
        patch = 8 if arch == "vit_nano" or kernel is None else kernel.shape[-1]
        side = max(1, round((positions - 1) ** 0.5)) * patch  # 1 + grid^2 positions
    backbone = build(arch, patch_size=patch, img_size=side, in_small=small)
    here = backbone.state_dict()
    wrong = [f"no {k}" for k in here if k not in there and not k.endswith("num_batches_tracked")]
    wrong += [f"{k} {tuple(there[k].shape)} for {tuple(w.shape)}" for k, w in here.items()
              if k in there and there[k].shape != w.shape]
    parts = {k.split(".")[0] for k in here} | ALTERS
    extra = [k for k in there if k not in here]
    wrong += [f"{k} too many" for k in extra if k.split(".")[0] in parts]
    if wrong:
        raise ValueError(f"{path} does not fit --arch {arch}: {', '.join(wrong[:3])}"
                         + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    backbone.load_state_dict({k: there[k] for k in here if k in there}, strict=False)
    copy = checkpoints.SIDES[rank][0] or "only copy"
    info = (f"{path}: weights of others (step, method and K unknown), {copy}, {arch}"
            + (f", patch {patch}, positions of {side} px" if vit else "")
            + f"; not used: {checkpoints.listing(dict.fromkeys(extra), most=3)}")
    return backbone, {"arch": arch, "patch_size": patch, "img_size": side}, info


def usable(device):
    """"auto" -> "cuda" where there is one, else "cpu"; any other name is returned if it works, else a ValueError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device} is not usable here") from None
    return device


# ------------------------------------------------------------------------------------------------------------ numbers

def record(path, row):
    """Append row (dict of column: value) to the csv file at path; columns the file lacks are added to its header.

    One line is appended where the header has every column, otherwise the file is written anew, whole or not at all.
    OSError if it cannot be written.
    """
    path, row = Path(path), {"time": time.strftime("%Y-%m-%d %H:%M:%S")} | row
    text = path.read_text() if path.exists() else ""
    header = next(csv.reader(io.StringIO(text)), [])
    new = [key for key in row if key not in header]
    out = io.StringIO(newline="")
    table = csv.DictWriter(out, header + new, lineterminator="\n", extrasaction="ignore")
    if header and not new:
        out.write("" if text.endswith("\n") else "\n")  # a line that was cut off stays alone
        table.writerow(row)
        with open(path, "a", newline="") as f:
            f.write(out.getvalue())
        return
    table.writeheader()
    table.writerows([*csv.DictReader(io.StringIO(text)), row])
    write(str(path), lambda f: f.write(out.getvalue().encode()))
