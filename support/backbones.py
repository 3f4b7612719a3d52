"""Backbones to evaluate: whose weights they have, and where their features are kept.

A backbone comes from a run of ours, or from a foreign file by naming its architecture. Its features
of a set of images lie in features/ next to the checkpoint, under a name made of everything they
depend on, so that every protocol shares them.
"""
import functools
import re
from pathlib import Path

import torch

from models import ARCHS, build
from support import capi, checkpoints
from support.checkpoints import AVERAGE, COPY_NAMES, STUDENT, TEACHER, UNNAMED
from support.features import features, width
from support.files import digest, write
from views import MEAN, STD

VERSION = "features-2"  # part of every cached file's name; raise it when the numbers in them change
# Which copy of a network stands for the teacher or the student, best first
COPIES = {"teacher": (TEACHER, AVERAGE, UNNAMED, STUDENT), "student": (STUDENT, UNNAMED)}
# Tensors that every network of a kind has once. The second of a ResNet is that of
# nn.Sequential(*resnet.children()), as in lightly's examples: its children have numbers.
LANDMARKS = {"vit": ["pos_embed"], "resnet": ["layer1.0.conv1.weight", "4.0.conv1.weight"],
             "capi": [capi.LANDMARK]}
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# A tensor that our network lacks is refused if the first part of its name has one of these words,
# because the network of the file then computes something else: register_tokens, norm_pre...
INSIDE = {"token", "tokens", "embed", "embeddings", "pos", "bias", "rope", "norm", "ln", "pre",
          "pool", "gamma", "adapter", "prompt", "stem"}
# ... unless it has one of these too, because it then belongs to a head or to training alone:
# decoder_pos_embed, mask_token
AFTER = {"head", "decoder", "predictor", "projector", "projection", "classifier", "mask", "masked"}


def choose_device(name):
    """"auto" is "cuda" where there is one, else "cpu"; another name is returned if the device
    works, else it is a ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"--device {name} does not work here") from None
    return name


# ---- whose weights -------------------------------------------------------------------------------

def load_backbone(path, which="teacher", arch=None, patch_size=None, img_size=None):
    """(backbone in eval mode on the CPU, args dict, one line that describes it) of a checkpoint.

    path        a run folder of ours, its ckpt.pt, or with `arch` a file of others
    which       "teacher" (what the papers report) or "student"
    arch        of a file of others, see `foreign`; None: a run of ours, which says so itself
    patch_size  pixels that the patches of the file's ViT must have; None: any
    img_size    pixels to evaluate at, in place of those that the file names; the positions of a
                ViT are interpolated

    The file is mapped into memory, so only the tensors that are needed are read. ValueError where
    it is missing, unreadable, not a run of ours, or does not fit its own args.
    """
    if which not in COPIES:
        raise ValueError(f"--which {which} is neither teacher nor student")
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if arch is None:
        backbone, args, description = ours(path, which)
    else:
        backbone, args, description = foreign(path, which, arch)
    if patch_size is not None and patch_size != getattr(backbone, "patch_size", patch_size):
        raise ValueError(f"--patch-size {patch_size} does not fit {path}, whose patches are "
                         f"{backbone.patch_size} px")
    if img_size is not None:
        patch = getattr(backbone, "patch_size", 1)
        if img_size < 1 or img_size % patch:
            raise ValueError(f"--img-size {img_size} must be a multiple of {patch}, the pixels of "
                             "a patch")
        args = args | {"img_size": img_size}
    return backbone.eval(), args, description


def check_ours(path, ckpt, which, advice=""):
    """ValueError unless ckpt is what a script of ours writes: a step, args of the right types, and
    the weights of `which`. advice: what to try if it is not."""
    if not isinstance(ckpt, dict):
        raise ValueError(f"{path} is not a checkpoint of a run of ours{advice}")
    lacking = [key for key, kind in {"args": dict, "step": int, which: dict}.items()
               if not isinstance(ckpt.get(key), kind)]
    if not lacking:
        lacking = [f"args['{key}']" for key in ("arch", "patch_size", "img_size")
                   if key not in ckpt["args"]]
    if lacking:
        raise ValueError(f"{path} is not a checkpoint of a run of ours: it lacks "
                         f"{', '.join(lacking)}{advice}")
    kinds = {"script": str, "arch": str, "patch_size": int, "img_size": int, "data": str,
             "data_root": str, "seed": int, "imbalance": (int, float), "imbalance_law": str,
             "data_seen": dict}
    args = ckpt["args"]
    wrong = [key for key, kind in kinds.items() if key in args and not isinstance(args[key], kind)]
    wrong += [key for key in ("mean", "std") if key in args and not is_colour(args[key])]
    if wrong:
        raise ValueError(f"{path}: its args give {wrong[0]} as {args[wrong[0]]!r}")


def is_colour(values):
    """Whether they are three numbers, for red, green and blue."""
    return (isinstance(values, (list, tuple)) and len(values) == 3
            and all(isinstance(value, (int, float)) for value in values))


def ours(path, which):
    """load_backbone for a checkpoint of train.py, or of a script of zoo/ (args["script"])."""
    ckpt = checkpoints.read(path)
    check_ours(path, ckpt, which, "; for another's backbone say which --arch it has")
    args = ckpt["args"]
    weights = {key.removeprefix("backbone."): tensor for key, tensor in ckpt[which].items()
               if key.startswith("backbone.")}
    script = args.get("script", "train.py")
    own = checkpoints.module_of(script, path)  # models.py may not have its backbone
    try:
        if hasattr(own, "load_backbone"):
            backbone = own.load_backbone(ckpt[which], args)
        else:
            backbone = build(args["arch"], patch_size=args["patch_size"],
                             img_size=args["img_size"], in_small=small_stem(weights))
            backbone.load_state_dict(weights)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: the {which}'s weights do not fit its args, arch {args['arch']}, "
                         f"patch {args['patch_size']}, {args['img_size']} px ({reason})") from None
    if script == "train.py":
        method = (f"{args.get('method', '?')} with {args.get('prototypes', '?')} prototypes "
                  f"(K = {args.get('num_prototypes', '?')})")
    else:
        method = f"{script} (K = {args.get('num_prototypes', '?')})"
    return backbone, args, f"{path}: step {ckpt['step']}, {method}, {which} {args['arch']}"


def untrained(backbone, args, seed):
    """The backbone as it was before training: the same architecture and sizes, weights drawn with
    `seed`. args: of its run; img_size is that for which its positions were laid out."""
    own = checkpoints.module_of(args.get("script", "train.py"))
    if hasattr(own, "load_backbone"):
        return own.load_backbone(None, args | {"seed": seed})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if hasattr(backbone, "sizes"):
            return type(backbone)(backbone.arch, **backbone.sizes)
        return build(backbone.arch, patch_size=getattr(backbone, "patch_size", 16),
                     img_size=args["img_size"], in_small=small_stem(backbone.state_dict()))


def small_stem(weights):
    """Whether a ResNet's weights have the 3x3 stem for small images."""
    return "conv1.weight" in weights and weights["conv1.weight"].shape[-1:] == (3,)


def find(path, which, arch):
    """The copy of a network in anybody's file that stands for `which`.

    -> (its backbone {name: tensor}, names of the copy's other tensors, words for the copy)

    A backbone is all that has the same prefix as its landmark. ValueError where the file cannot be
    read, has no such copy or several, or one whose tensors are not plain.
    """
    if arch not in [*ARCHS, "capi"]:
        raise ValueError(f"--arch {arch} is not one of {', '.join(ARCHS)}, capi")
    tensors = checkpoints.flatten(checkpoints.read(path), path)
    names = {}  # {rank: {name inside the copy: key in the file}}
    for key in tensors:
        rank, name = checkpoints.split_key(key)
        names.setdefault(rank, {}).setdefault(name, key)
    landmarks = LANDMARKS[next(kind for kind in LANDMARKS if arch.startswith(kind))]
    prefixes = {}  # {rank: {prefix of the backbone inside the copy: its place in the file}}
    for rank in names:
        for name, key in names[rank].items():
            for landmark in landmarks:
                if f".{name}".endswith(f".{landmark}"):
                    place = key.removesuffix(landmark).rstrip(".")
                    prefixes.setdefault(rank, {})[name.removesuffix(landmark)] = place
    rank = next((rank for rank in COPIES[which] if rank in prefixes), None)
    if rank is None:
        raise ValueError(f"{path} holds no {which} that fits --arch {arch}; its keys: "
                         f"{checkpoints.listing(tensors)}")
    if len(prefixes[rank]) > 1:
        raise ValueError(f"{path} holds several networks that may be its {which}: "
                         f"{checkpoints.listing(prefixes[rank].values())}")
    (prefix, place), = prefixes[rank].items()
    if arch == "vit_small" and re.search(r"\b(base|momentum)_encoder\b", place):
        raise ValueError(f"{path} has the names of MoCo v3, whose ViT-S has 12 heads; --arch "
                         "vit_small has 6. No tensor shows it, and the features would be wrong")
    backbone = {name.removeprefix(prefix): tensors[key] for name, key in names[rank].items()
                if name.startswith(prefix)}
    for name, tensor in backbone.items():
        checkpoints.refuse_unusual(path, prefix + name, tensor)
    if "4.0.conv1.weight" in backbone:
        first = {name: name.split(".")[0] for name in backbone}
        backbone = {CHILDREN.get(first[name], first[name]) + name.removeprefix(first[name]): tensor
                    for name, tensor in backbone.items()}
    others = [name for name in names[rank] if not name.startswith(prefix)]
    if list(prefixes) == [UNNAMED]:
        return backbone, others, "only copy"
    # beside a teacher, the one without a name is the student
    copy = which if rank == UNNAMED else COPY_NAMES[rank]
    if copy not in place:  # where it lies in the file, unless that says it already
        copy = f"{copy} ({place})"
    return backbone, others, copy


def misfits(own, theirs):
    """What keeps the tensors `theirs` from being the network whose state dict is `own`: a list of
    words, one for each tensor that is missing, of another shape or kind, or would change what the
    network computes and has no place in ours. Heads and the like, which only come after it, are
    allowed."""
    missing = [f"no {name}" for name in own
               if name not in theirs and not name.endswith("num_batches_tracked")]
    shared = [name for name in own if name in theirs]
    other_shape = [f"{name} {tuple(theirs[name].shape)} for {tuple(own[name].shape)}"
                   for name in shared if theirs[name].shape != own[name].shape]
    other_kind = [f"{name} of {theirs[name].dtype}" for name in shared
                  if own[name].is_floating_point() and not theirs[name].is_floating_point()]
    parts = {name.split(".")[0] for name in own}
    too_many = []
    for name in theirs:
        part = name.split(".")[0]
        words = set(part.split("_"))
        if name not in own and (part in parts or words & INSIDE and not words & AFTER):
            too_many.append(f"{name} too many")
    return missing + other_shape + other_kind + too_many


def load_weights(path, backbone, theirs):
    """Load {name: tensor} of the file at `path`; returns the names that were not used.

    ValueError, the same sentence for --arch and --init, unless they are the weights of just this
    network, see `misfits`.
    """
    own = backbone.state_dict()
    if wrong := misfits(own, theirs):
        raise ValueError(f"{path} does not fit --arch {backbone.arch}: "
                         f"{checkpoints.listing(wrong, most=3)}")
    backbone.load_state_dict({name: theirs[name] for name in own if name in theirs}, strict=False)
    return [name for name in theirs if name not in own]


def foreign(path, which, arch):
    """load_backbone for a file of others: DINO's releases (whole or backbone alone), torchvision's,
    timm's, CAPI's, checkpoints of solo-learn, MoCo, BYOL, lightly or VISSL, an export.

    Patch and grid of a ViT are read off its tensors. Heads are left out and named; anything else
    that is missing, of another shape, or would make the network compute something else is a
    ValueError.
    """
    theirs, others, copy = find(path, which, arch)
    small = small_stem(theirs)
    patch, side, size = 16, 32 if small else 224, ""
    if arch == "capi":
        backbone, theirs, size = capi.build(path, theirs)
        patch, side = backbone.patch_size, backbone.sizes["img_size"]
    else:
        if arch.startswith("vit"):
            patch, side = patch_and_side(theirs, arch)
            size = f", patch {patch}, positions of {side} px"
        backbone = build(arch, patch_size=patch, img_size=side, in_small=small)
    unused = others + load_weights(path, backbone, theirs)
    description = (f"{path}: weights of others (step, method and K unknown), {copy}, {arch}{size}; "
                   f"not used: {checkpoints.listing(unused, most=3)}")
    return backbone, {"arch": arch, "patch_size": patch, "img_size": side}, description


def patch_and_side(theirs, arch):
    """Pixels of a ViT's patch, and of the square images for which its positions are laid out."""
    patch = 8 if arch == "vit_nano" else 16
    kernel = theirs.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4:
        patch = max(1, kernel.shape[-1])
    positions = theirs["pos_embed"].shape[1] - 1 if theirs["pos_embed"].ndim == 3 else 1
    return patch, patch * round(max(1, positions) ** 0.5)


# ---- features kept for the next time -------------------------------------------------------------

def fingerprint(backbone):
    """16 hex digits that change with any weight or running statistic of the backbone, and with
    nothing else."""
    parts = []
    for name, tensor in backbone.state_dict().items():
        parts += [name, tensor]
    return digest(*parts)


def hash_of_images(images):
    """16 hex digits of a set of images: a hash of its pixels where they are in memory, else of the
    paths, sizes and times of its files and of the value that is white in them. OSError for a file
    that is gone."""
    if hasattr(images, "x"):
        return digest(images.x)
    stats = [Path(path).stat() for path in images.paths]
    return digest(images.white, [(str(path), stat.st_size, stat.st_mtime_ns)
                                 for path, stat in zip(images.paths, stats)])


@functools.cache
def code_of_features():
    """16 hex digits of all files that may make features of weights and images: those of the root,
    support/ and zoo/."""
    root = Path(__file__).parent.parent
    files = [path for folder in (root, root / "support", root / "zoo")
             for path in sorted(folder.glob("*.py"))]
    return digest(*((path.name, path.read_bytes()) for path in files))


def cached(backbone, images, img_size, folder, *, layers=1, pool="cls", crop=True, mean=MEAN,
           std=STD, **options):
    """`features` without normalisation, from a file in `folder` where it is there; else they are
    computed and put there.

    folder None: neither read nor written. A damaged file is computed anew. Where it cannot be
    written, a printed line says so. options: those of `features`.
    """
    choice = dict(layers=layers, pool=pool, crop=crop, mean=tuple(mean), std=tuple(std))
    if folder is None:
        return features(backbone, images, img_size, normalize=False, **choice, **options)
    about = choice | dict(version=VERSION, backbone=fingerprint(backbone),
                          images=hash_of_images(images), img_size=img_size,
                          code=code_of_features())
    path = Path(folder) / f"{digest(sorted(about.items()))}.pt"
    if path.exists():
        try:
            stored = checkpoints.read(path, mmap=False)  # compares the checksums
            shape = len(images), width(backbone, layers, pool)
            if stored["about"] == about and stored["x"].shape == shape:
                print(f"features of {len(images)} images: read from {path}")
                return stored["x"]
            reason = "it holds something else"
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            reason = str(error)
        print(f"{path} is not used and computed anew ({reason})")
    x = features(backbone, images, img_size, normalize=False, **choice, **options)  # (N, D)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(str(path), lambda file: torch.save({"about": about, "x": x}, file))
    except OSError as error:
        print(f"features are not kept for the next time: {error}")
    return x
