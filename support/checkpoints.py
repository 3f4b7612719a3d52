"""
Checkpoints of anybody: how to open one without running it, and where its prototypes are.

    load_prototypes(path, key=None) -> {name: (K, D) float32 tensor}

A checkpoint is a pickle, and a pickle is a program. All is read with weights_only=True; beyond
tensors and plain Python values only what the known releases contain is allowed: argparse.Namespace
(DINO, iBOT and CARP keep their flags so) and NumPy scalars with their dtypes (a learning rate
inside the optimizer). Any other name is refused.

Letters: K prototypes of dimension D.
"""
import argparse
import os
import pickle
import re
import zipfile

import numpy as np
import torch

# NumPy 2 moved numpy.core to numpy._core. A file names the one of the NumPy that wrote it, which
# need not be the one installed here.
SCALAR = np.float64().__reduce__()[0]
SAFE = [argparse.Namespace, np.dtype]
SAFE += [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
SAFE += [type(np.dtype(kind)) for kind in "? i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split()]

# The copies of a network that a checkpoint may hold, best first, under the names that people give
# them. The papers count the teacher's prototypes; CAPI releases the student's moving average. The
# last is a network without any such name. A copy's index in this list is its rank.
NETWORKS = [
    ("teacher", "target_encoder"),
    ("student_ema", "model_ema", "ema"),
    ("student", "encoder"),
    ("",),
]
# parts of a key that DDP, torch.compile and plain nesting add
WRAPPERS = ("module", "_orig_mod", "state_dict", "model")

# The names of prototypes:
#   last_layer            DINO, CARP, iBOT, CAPI (last_layer2: iBOT's patches)
#   last_layers.i         Franca's levels
#   head.layer            CAPI's teacher
#   prototypes            SwAV, MSN (a bare tensor)
#   prototypes.prototypesI   DeepCluster-v2
#   gmm.mu                means of a mixture
#   gmm.S_mu              means times a mass, where our gmm.py runs in another project
# A weight-normalised layer is g v / |v|: v (weight_v, original1) has the directions of the
# prototypes, and g (weight_g, original0) does not.
PROTOTYPES = re.compile(
    r"(?P<name>(?:\w+\.)*?"
    r"(?:last_layer\d*|last_layers\.\d+|prototypes(?:\.prototypes\d+)?|head\.layer"
    r"|gmm\.mu|gmm\.S_mu))"
    r"(?:|\.weight_v|\.parametrizations\.weight\.original1|\.weight)")


# ---- opening a file ------------------------------------------------------------------------------

def read(path, mmap=True):
    """The object in a checkpoint file, tensors on the CPU; for a run folder, in its ckpt.pt.

    mmap: tensors are read from the disk when they are used, so that of a file of 5 GB only the
    prototypes are read. False: all is read now, and compared with the checksums in the file.
    ValueError, one sentence, if the file is not there, broken or unsafe.
    """
    if os.path.isdir(path):
        path = os.path.join(path, "ckpt.pt")
    refuse_what_is_no_checkpoint(path)
    suffix = os.path.splitext(path)[1].lower()
    try:
        if suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if suffix == ".npz":
            arrays = np.load(path, allow_pickle=False)
            return {name: arrays[name] for name in arrays.files}
        if suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        is_zip = zipfile.is_zipfile(path)
        if is_zip and not mmap:
            with zipfile.ZipFile(path) as archive:  # torch.load takes altered numbers as they are
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(damaged)
        with torch.serialization.safe_globals(SAFE):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except ImportError:
        raise ValueError(f"{path}: reading it needs the safetensors library "
                         "(pip install safetensors)") from None
    except Exception as error:  # zip, pickle, EOF, Unicode...: each reader has its own
        text = " ".join(str(error).split())
        unsafe = re.search(r"(?:GLOBAL|class|global) ([\w.]+\.[\w.]+)", text)
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise ValueError(f"{path}: refused, it wants to build {unsafe[1]}, which is not one of "
                             "the plain objects allowed (tensors, Python values, Namespace, NumPy "
                             "scalars); nothing was run") from None
        if "allow_pickle" in text:
            raise ValueError(f"{path}: refused, the array holds pickled Python objects; save plain "
                             "numbers") from None
        raise ValueError(f"{path}: cannot be read, it is cut short, damaged or not a "
                         f"{suffix or 'checkpoint'} file ({type(error).__name__})") from None


def refuse_what_is_no_checkpoint(path):
    """ValueError for a missing, empty or cut file, and for what failed downloads leave behind."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path}: the file is empty")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise ValueError(f"{path}: this is a web page (HTML), not a checkpoint; the download went "
                         "wrong")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: this is a Git LFS pointer, not the file itself; run "
                         "`git lfs pull`")
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: the file is cut short (a zip archive without its end); fetch it "
                         "again")


# ---- its tensors and their names -----------------------------------------------------------------

def flatten(stored, prefix=""):
    """Nested dicts, lists and Namespaces -> {dotted key: tensor}, without the optimizer's state."""
    if isinstance(stored, argparse.Namespace):
        stored = vars(stored)
    if isinstance(stored, (list, tuple)):
        stored = dict(enumerate(stored))
    if isinstance(stored, np.ndarray) and stored.dtype.kind in "fiu":
        stored = torch.from_numpy(stored)
    if torch.is_tensor(stored):
        return {prefix: stored}
    tensors = {}
    if isinstance(stored, dict):
        for name, part in stored.items():
            if name not in ("optimizer", "opt", "rng"):
                tensors |= flatten(part, f"{prefix}.{name}" if prefix else str(name))
    return tensors


def split_key(key):
    """(rank in NETWORKS, name inside that network) of a dotted key.

    'teacher.module.head.last_layer.weight_v' -> (0, 'head.last_layer.weight_v')
    """
    parts = key.split(".")
    rank = len(NETWORKS) - 1
    while len(parts) > 1:
        named = [i for i, names in enumerate(NETWORKS) if parts[0] in names]
        if not named and parts[0] not in WRAPPERS:
            break
        rank = named[0] if named else rank
        parts = parts[1:]
    return rank, ".".join(parts)


def listing(names, most=5):
    """'a, b and 3 more' for any number of names; 'none' without any."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "none"


# ---- its prototypes ------------------------------------------------------------------------------

def load_prototypes(path, key=None):
    """All prototype sets of a checkpoint: {name: (K, D) float32 tensor}, as stored, one per row.

    They are not normalised. Reads runs of ours (a folder or its ckpt.pt), the releases of DINO,
    CARP, iBOT, DINOv2, Franca, CAPI, SwAV, DeepCluster-v2 and MSN (.pt, .pth, .bin, .safetensors),
    and any matrix in .npy or .npz. The teacher's copy is taken where there is one, then the
    student's average, then the student's. Heads with equal values are one shared head and appear
    once. key: any other (K, D) tensor by its dotted path. ValueError, one sentence: the file is
    not there, broken, unsafe, without prototypes, or a queue of features.
    """
    stored = read(path)
    if isinstance(stored, np.ndarray):
        stored = {os.path.splitext(os.path.basename(path))[0]: stored}
        key = None if key in stored else key
    tensors = flatten(stored)
    if key is not None:
        return {key: matrix_named(path, tensors, key).float().clone()}
    if os.path.splitext(path)[1].lower() in (".npy", ".npz"):
        sets = {name: t for name, t in tensors.items() if is_matrix(t)}  # any may be a set
    elif "prototypes.vectors" in tensors:
        sets = {"prototypes": tensors["prototypes.vectors"]}  # ours: already what is counted
    else:
        sets = sets_of_the_best_network(tensors)
    if not sets:
        for name, tensor in tensors.items():
            if is_queue(name) and tensor.ndim == 2:
                refuse_queue(path, name, tensor)
        raise ValueError(f"{path}: no prototypes among its keys ({listing(tensors)}); "
                         "backbone-only files do not carry prototypes: use the full checkpoint, or "
                         "name the (K, D) tensor with --key")
    different = {}
    for name, tensor in sets.items():
        tensor = tensor.float()
        if not any(torch.equal(tensor, other) for other in different.values()):
            different[name] = tensor.clone()
    return different


def matrix_named(path, tensors, key):
    """The tensor that --key names: by its whole key, or by its name inside the best network."""
    candidates = [name for name in tensors if key in (name, split_key(name)[1])]
    if not candidates:
        matrices = [name for name, tensor in tensors.items() if is_matrix(tensor)]
        raise ValueError(f"{path}: --key {key} is not in the file; its matrices are "
                         f"{listing(matrices)}")
    name = key if key in tensors else min(candidates, key=lambda name: split_key(name)[0])
    tensor = tensors[name]
    if is_queue(name):
        refuse_queue(path, name, tensor)
    if not is_matrix(tensor):
        raise ValueError(f"{path}: --key {key} is {tuple(tensor.shape)} {tensor.dtype}, not (K, D) "
                         "float")
    return tensor


def sets_of_the_best_network(tensors):
    """{name: (K, D) tensor}: the prototypes of the network of the lowest rank that has any."""
    of_rank = {}
    for key, tensor in tensors.items():
        rank, name = split_key(key)
        match = PROTOTYPES.fullmatch(name)
        if match and is_matrix(tensor):
            of_rank.setdefault(rank, {}).setdefault(match["name"], tensor)
    if not of_rank:
        return {}
    sets = of_rank[min(of_rank)]
    # means times a mass, where the means themselves are there too
    doubled = [name for name in sets if name.endswith("S_mu") and f"{name[:-4]}mu" in sets]
    return {name: tensor for name, tensor in sets.items() if name not in doubled}


def is_matrix(tensor):
    return tensor.ndim == 2 and tensor.is_floating_point() and tensor.numel() > 0


def is_queue(name):
    return name.split(".")[-1] == "queue"


def refuse_queue(path, key, tensor):
    raise ValueError(f"{path}: {key} {tuple(tensor.shape)} is a memory bank of features, one per "
                     "COLUMN (SOP, MaSSL), not a set of prototypes; counting its rows would count "
                     "feature dimensions")
