"""
Where the prototypes sit in the checkpoints people release, and how to open such a file without running it.

    load_prototypes(path, key=None) -> {name: (K, D) float32 tensor}

A foreign checkpoint is a pickle, and a pickle is a program. All is read with weights_only=True; beyond tensors and
plain Python values only what the known releases contain is allowed: argparse.Namespace (DINO, iBOT and CARP keep their
flags so) and NumPy scalars with their dtypes (a learning rate inside the optimizer). Any other name is refused.
"""
import argparse
import os
import pickle
import re
import zipfile

import numpy as np
import torch

# NumPy 2 moved numpy.core to numpy._core; a file names the one of the NumPy that wrote it, whichever is installed here.
SCALAR = np.float64().__reduce__()[0]
SAFE = [argparse.Namespace, np.dtype]
SAFE += [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
SAFE += [type(np.dtype(kind)) for kind in "? i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split()]

# Which copy of a network, best first: the papers count the teacher's; CAPI releases the student's moving average.
SIDES = [("teacher", "target_encoder"), ("student_ema", "model_ema", "ema"), ("student", "encoder"), ("",)]
WRAPPERS = ("module", "_orig_mod", "state_dict", "model")  # DDP, torch.compile and plain nesting: no meaning here
# last_layer: DINO, CARP, iBOT, CAPI (last_layer2: iBOT patches). last_layers.i: Franca's levels. head.layer: CAPI's
# teacher. prototypes: SwAV, MSN (a bare tensor). prototypes.prototypes{i}: DeepCluster-v2. gmm.mu: means of a mixture;
# gmm.S_mu: the same times a mass, where gmm.py runs in another project.
# A weight-normalised layer is g v / |v|: v (weight_v, original1) has the directions, g (weight_g, original0) none.
SETS = re.compile(r"(?P<name>(?:\w+\.)*?(?:last_layer\d*|last_layers\.\d+|prototypes(?:\.prototypes\d+)?"
                  r"|head\.layer|gmm\.mu|gmm\.S_mu))"
                  r"(?:|\.weight_v|\.parametrizations\.weight\.original1|\.weight)")


def read(path, mmap=True):
    """The object in a checkpoint file, tensors on the CPU. ValueError, one sentence, if not there, broken or unsafe.
    mmap: tensors are read when they are used; False: all is read now, and compared with the checksums in the file."""
    if os.path.isdir(path):
        path = os.path.join(path, "ckpt.pt")  # a run directory of ours
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path}: the file is empty")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise ValueError(f"{path}: this is a web page (HTML), not a checkpoint; the download went wrong")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: this is a Git LFS pointer, not the file itself; run `git lfs pull`")
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: the file is cut short (a zip archive without its end); fetch it again")
    suffix = os.path.splitext(path)[1].lower()
    try:
        if suffix in (".npy", ".npz"):
            stored = np.load(path, allow_pickle=False)
            return stored if suffix == ".npy" else {name: stored[name] for name in stored.files}
        if suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals(SAFE):  # mmap: of a 5 GB file only the prototypes' pages are read
            if not mmap and zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:  # torch.load takes altered numbers as they are
                    if wrong := archive.testzip():
                        raise zipfile.BadZipFile(wrong)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except ImportError:
        raise ValueError(f"{path}: reading it needs the safetensors library (pip install safetensors)") from None
    except Exception as error:  # zip, pickle, EOF, Unicode...: each reader has its own
        text = " ".join(str(error).split())
        named = re.search(r"(?:GLOBAL|class|global) ([\w.]+\.[\w.]+)", text)
        if isinstance(error, pickle.UnpicklingError) and named:
            raise ValueError(f"{path}: refused, it wants to build {named[1]}, which is not one of the plain objects"
                             f" allowed (tensors, Python values, Namespace, NumPy scalars); nothing was run") from None
        if "allow_pickle" in text:
            raise ValueError(f"{path}: refused, the array holds pickled Python objects; save plain numbers") from None
        raise ValueError(f"{path}: cannot be read, it is cut short, damaged or not a {suffix or 'checkpoint'} file "
                         f"({type(error).__name__})") from None


def flatten(tree, prefix=""):
    """Nested dicts, lists and Namespaces -> {dotted key: tensor}; the optimizer's moments are not looked at."""
    if isinstance(tree, argparse.Namespace):
        tree = vars(tree)
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        return {k: v for name, sub in tree.items() if name not in ("optimizer", "opt", "rng")
                for k, v in flatten(sub, f"{prefix}.{name}" if prefix else str(name)).items()}
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "fiu":
        tree = torch.from_numpy(tree)
    return {prefix: tree} if torch.is_tensor(tree) else {}


def bare(key):
    """'teacher.module.head.last_layer.weight_v' -> (0, 'head.last_layer.weight_v'): rank in SIDES, name inside it."""
    parts, side = key.split("."), len(SIDES) - 1
    while len(parts) > 1 and (parts[0] in WRAPPERS or parts[0] in sum(SIDES, ())):
        side = next((i for i, names in enumerate(SIDES) if parts[0] in names), side)
        parts = parts[1:]
    return side, ".".join(parts)


def is_set(tensor):
    return tensor.ndim == 2 and tensor.is_floating_point() and tensor.numel() > 0


def refuse_queue(path, key, tensor):
    raise ValueError(f"{path}: {key} {tuple(tensor.shape)} is a memory bank of features, one per COLUMN (SOP, MaSSL),"
                     f" not a set of prototypes; counting its rows would count feature dimensions")


def load_prototypes(path, key=None):
    """All prototype sets of a checkpoint: {name: (K, D) float32 tensor}, as stored (not normalised), one per row.

    Reads runs of ours (a directory or its ckpt.pt), the releases of DINO, CARP, iBOT, DINOv2, Franca, CAPI, SwAV,
    DeepCluster-v2 and MSN (.pt, .pth, .bin, .safetensors), and any matrix in .npy or .npz. The teacher's copy is taken
    where there is one, then the student's average, then the student's. Heads with equal values are one shared head and
    appear once. key names any other (K, D) tensor by its dotted path. ValueError, one sentence: the file is not there,
    broken, unsafe, without prototypes, or a queue of features."""
    stored = read(path)
    if isinstance(stored, np.ndarray):
        stored = {os.path.splitext(os.path.basename(path))[0]: stored}
        key = None if key in stored else key
    tensors = flatten(stored)
    if key is not None:
        found = {k: t for k, t in tensors.items() if key in (k, bare(k)[1])}
        found = {key: found[key]} if key in found else found
        if not found:
            raise ValueError(f"{path}: --key {key} is not in the file; its matrices are {listing(tensors, is_set)}")
        name = min(found, key=lambda k: bare(k)[0])  # the same name on several sides: teacher first
        if name.split(".")[-1] == "queue":
            refuse_queue(path, name, found[name])
        if not is_set(found[name]):
            raise ValueError(f"{path}: --key {key} is {tuple(found[name].shape)} {found[name].dtype}, not (K, D) float")
        return {key: found[name].float().clone()}
    if os.path.splitext(path)[1].lower() in (".npy", ".npz"):
        sets = {name: t for name, t in tensors.items() if is_set(t)}  # no layout to know: every matrix is a set
    elif "prototypes.vectors" in tensors:
        sets = {"prototypes": tensors["prototypes.vectors"]}  # ours: already what is counted
    else:
        sides = {}
        for k, t in tensors.items():
            side, name = bare(k)
            match = SETS.fullmatch(name)
            if match and is_set(t):
                sides.setdefault(side, {}).setdefault(match["name"], t)
        sets = sides[min(sides)] if sides else {}
        sets = {k: t for k, t in sets.items() if not (k.endswith("S_mu") and f"{k[:-4]}mu" in sets)}
    queues = [k for k, t in tensors.items() if k.split(".")[-1] == "queue" and t.ndim == 2]
    if not sets and queues:
        refuse_queue(path, queues[0], tensors[queues[0]])
    if not sets:
        raise ValueError(f"{path}: no prototypes among its keys {listing(tensors)}; backbone-only files do not carry "
                         f"prototypes: use the full checkpoint, or name the (K, D) tensor with --key")
    out = {}
    for name, t in sets.items():
        if not any(torch.equal(t.float(), seen) for seen in out.values()):  # a shared head, once
            out[name] = t.float().clone()
    return out


def listing(tensors, keep=lambda t: True, most=6):
    names = [k for k, t in tensors.items() if keep(t)]
    return (", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")) or "(none)"
