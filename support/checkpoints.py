"""
Checkpoints of anybody: how to open one without running it, and where its prototypes are.

    load_prototypes(path, key=None) -> {name: (K, D) float32 tensor}

A checkpoint is a pickle, and a pickle is a program. All is read with weights_only=True; beyond
tensors and plain Python values only what the known releases contain is allowed: argparse.Namespace
(DINO, iBOT and CARP keep their flags so), and NumPy's scalars and arrays of numbers with their
dtypes. Any other name is refused.

Letters: K prototypes of dimension D.
"""
import argparse
import importlib
import os
import pickle
import re
import sys
import warnings
import zipfile

import numpy as np
import torch

from support import ddp, formats


class Array:
    """Stands for numpy.ndarray, and for the function that begins one, inside a pickle.

    NumPy's own would take the bytes of a file for the addresses of Python objects, so that reading
    a hostile file could run code. This one takes numbers: `values` is the array.
    """
    values = None

    def __init__(self, *_):  # NumPy begins with an empty array, and then gives it its state
        pass

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        numbers = np.frombuffer(bytearray(data), dtype)  # ValueError for objects
        self.values = numbers.reshape(shape, order="F" if fortran else "C")


# NumPy 2 moved numpy.core to numpy._core. A file names the one of the NumPy that wrote it, which
# need not be the one installed here.
SCALAR = np.float64().__reduce__()[0]
SAFE = [argparse.Namespace, np.dtype, (Array, "numpy.ndarray")]
SAFE += [(ours, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")
         for ours, name in ((SCALAR, "scalar"), (Array, "_reconstruct"))]
SAFE += [type(np.dtype(kind)) for kind in "? i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 g".split()]

# A file may hold several copies of a network. These words, in the leading parts of a key, say which
# copy a tensor belongs to, by its rank; the lowest rank is preferred. The papers count the
# prototypes of the teacher, which follows the trained copy as a moving average.
TEACHER, AVERAGE, STUDENT, UNNAMED = range(4)
COPY_NAMES = {TEACHER: "teacher", AVERAGE: "moving average", STUDENT: "student",
              UNNAMED: "copy without a name"}
RANKS = {
    "teacher": TEACHER,   # DINO, CARP, iBOT, CAPI; lightly's teacher_backbone and teacher_head
    "momentum": TEACHER,  # solo-learn's momentum_backbone, MoCo v3's momentum_encoder, lightly's
                          # backbone_momentum
    "target": TEACHER,    # MSN's and BYOL's target_encoder, BYOL's target_network
    "k": TEACHER,         # MoCo's encoder_k
    "ema": AVERAGE,       # CAPI's student_ema, timm's state_dict_ema
    "student": STUDENT,
    "online": STUDENT,    # BYOL's online_encoder and online_network
    "q": STUDENT,         # MoCo's encoder_q
    "anchor": STUDENT,    # anchor_backbone in lightly's MSN, whose teacher has no name
}
# Leading parts of a key that say nothing: DDP's module, and those of plain nesting (VISSL has
# classy_state_dict.base_model.model, BYOL online_network_state_dict)
WRAPPERS = ("module", "model", "base_model", "state_dict", "classy_state_dict",
            "network_state_dict")
# Parts that torch.compile and FSDP put in front of any module inside a network
INNER_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# The names of prototypes:
#   last_layer            DINO, CARP, iBOT, CAPI (last_layer2: iBOT's patches)
#   last_layers.i         Franca's levels
#   head.layer            CAPI's teacher
#   prototypes            SwAV, MSN (a bare tensor)
#   prototypes.prototypesI, prototypes.I   DeepCluster-v2, and solo-learn's
#   prototypes.heads.I, prototypesI        SwAV in lightly, and in VISSL
#   gmm.mu                means of a mixture
#   gmm.S_mu              means times a mass, where our gmm.py runs in another project
# A weight-normalised layer is g v / |v|: v (weight_v, original1) has the directions of the
# prototypes, and g (weight_g, original0) does not.
PROTOTYPES = re.compile(
    r"(?P<name>(?:\w+\.)*?"
    r"(?:last_layer\d*|last_layers\.\d+"
    r"|prototypes(?:\.prototypes\d+|\.heads\.\d+|\.\d+|\d+)?"
    r"|head\.layer|gmm\.mu|gmm\.S_mu))"
    r"(?:|\.weight_v|\.parametrizations\.weight\.original1|\.weight)")


# ---- opening a file ------------------------------------------------------------------------------

def read(path, mmap=True):
    """The object in a checkpoint file, tensors on the CPU; for a run folder, in its ckpt.pt.

    mmap: tensors of a file by torch.save are read from the disk when they are used, so that of 5 GB
    only the prototypes are read. False: all is read now, and compared with the file's checksums.
    ValueError, one sentence that begins with the path: there is no such file; it is refused, as it
    would run code; it is cut short or damaged; or it is no checkpoint but something else.
    """
    if os.path.isdir(path):
        path = os.path.join(path, "ckpt.pt")
    kind = formats.kind_of(path)
    try:
        if kind == "npy":
            return np.load(path, allow_pickle=False)
        if kind == "npz":
            arrays = np.load(path, allow_pickle=False)
            return {name: arrays[name] for name in arrays.files}
        if kind == "safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        if kind == "torch" and not mmap:
            with zipfile.ZipFile(path) as archive:  # torch.load takes altered numbers as they are
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(damaged)
        with torch.serialization.safe_globals(SAFE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on sparse tensors and old ways to store
            if mmap and kind == "torch" and is_utf8(path):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path}: reading it needs the safetensors library "
                         "(pip install safetensors)") from None
    except MemoryError:
        raise
    except Exception as error:  # zip, pickle, EOF, Unicode...: each reader has its own
        text = " ".join(str(error).split())
        unsafe = re.search(r"(?:GLOBAL|class|global) '?([\w.]+\.[\w.]+)", text)
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise ValueError(f"{path}: refused, it wants to build {unsafe[1]}, which is not one of "
                             "the plain objects allowed (tensors, Python values, Namespace, "
                             "NumPy's numbers); nothing was run") from None
        if "object array" in text.lower():
            raise ValueError(f"{path}: refused, the array holds pickled Python objects; save plain "
                             "numbers") from None
        raise ValueError(f"{path}: cannot be read, it is cut short or damaged "
                         f"({type(error).__name__})") from None


def is_utf8(path):
    """Whether torch can hand a file's name to the system; one from another encoding it cannot."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- its tensors and their names -----------------------------------------------------------------

def flatten(stored, path, prefix="", depth=0):
    """Nested dicts, lists and Namespaces -> {dotted key: tensor}, without what lies under the names
    "optimizer", "opt" and "rng".

    Arrays become tensors too. ValueError, which names the path, for a list that holds itself.
    """
    if depth > 50:
        raise ValueError(f"{path}: its lists and dicts are nested more than 50 deep, or one holds "
                         "itself")
    if isinstance(stored, Array):
        stored = stored.values
    if isinstance(stored, argparse.Namespace):
        stored = vars(stored)
    if isinstance(stored, (list, tuple)):
        stored = dict(enumerate(stored))
    if isinstance(stored, np.ndarray) and stored.dtype.kind in "fiu":
        stored = as_tensor(stored)
    if torch.is_tensor(stored):
        return {prefix: stored}
    tensors = {}
    if isinstance(stored, dict):
        for name, part in stored.items():
            if name not in ("optimizer", "opt", "rng"):
                key = f"{prefix}.{name}" if prefix else str(name)
                tensors |= flatten(part, path, key, depth + 1)
    return tensors


def as_tensor(array):
    """The tensor of a NumPy array of numbers. torch has no longdouble and one byte order."""
    dtype = np.float64 if array.dtype.char == "g" else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.asarray(array, dtype=dtype, order="C"))


def unusual(tensor):
    """A word for a tensor that does not hold its numbers one by one, "" for any other."""
    if tensor.is_meta:
        return "without values (meta)"
    if tensor.is_quantized:
        return "quantised"
    return "" if tensor.layout == torch.strided else "sparse"


def refuse_unusual(path, name, tensor):
    """ValueError for a tensor that does not hold its numbers one by one."""
    if word := unusual(tensor):
        raise ValueError(f"{path}: {name} is {word}; save it as a plain tensor of numbers")


def split_key(key):
    """(rank of the copy, name inside that copy) of a dotted key.

    Its leading parts are taken off from the left, as long as each is a wrapper or names a copy. The
    last of them that names a copy decides the rank. A part such as momentum_backbone does both: it
    names a copy, and leaves `backbone`.

    'teacher.module.head.last_layer.weight_v' -> (0, 'head.last_layer.weight_v')
    'state_dict.momentum_backbone.cls_token' -> (0, 'backbone.cls_token')
    """
    parts = [part for part in key.split(".") if part not in INNER_WRAPPERS]
    *leading, last = parts or [key]  # a key of wrappers alone stays whole
    rank = UNNAMED
    while leading:
        words = leading[0].split("_")
        ranks = [RANKS[word] for word in words if word in RANKS]
        others = "_".join(word for word in words if word not in RANKS)
        rank = min(ranks, default=rank)
        if others and others not in WRAPPERS:
            leading[0] = others
            break
        leading.pop(0)
    return rank, ".".join([*leading, last])


def module_of(script, path="the checkpoint"):
    """The module of a script of zoo/, "zoo/NAME.py" as a checkpoint of ours names it; None of
    train.py and of anything else.

    A script may define `load_run(path)` and `load_backbone(state, args)` where its networks are not
    those of train.py. ValueError, which names the path, for a script that is not here.
    """
    if not re.fullmatch(r"zoo/\w+\.py", script):
        return None
    name = script[:-3].replace("/", ".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # it is here, and imports what is not
            raise
        raise ValueError(f"{path} holds a run of {script}, which is not here") from None


def listing(names, most=5):
    """'a, b and 3 more' for any number of names; 'none' without any."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "none"


# ---- its prototypes ------------------------------------------------------------------------------

def load_prototypes(path, key=None):
    """All prototype sets of a checkpoint: {name: (K, D) float32 tensor}, as stored, one per row.

    They are not normalised. Reads runs of ours (a folder or its ckpt.pt), the releases of DINO,
    CARP, iBOT, DINOv2, Franca, CAPI, SwAV, DeepCluster-v2 and MSN, checkpoints of solo-learn,
    lightly and VISSL, and files that hold nothing but matrices: one tensor or array, a list of
    them, or a dict of them without dots in its names (in an .npz, with any names). The teacher's
    copy is taken where there is one, then the student's average, then the student's, then one
    without such a name. Heads with equal values are one shared head and appear once. key: any other
    (K, D) tensor by its dotted path. ValueError, one sentence: the file is not there, broken,
    unsafe, without prototypes, or a queue of features.
    """
    stored = read(path)
    alone = not isinstance(stored, (dict, list, tuple, argparse.Namespace))
    if alone:
        stored = {os.path.splitext(os.path.basename(path))[0]: stored}
        key = None if key in stored else key
    tensors = flatten(stored, path)
    if not tensors:
        raise ValueError(f"{path}: it holds no tensor and no array of numbers")
    if alone and not any(map(is_matrix, tensors.values())):
        tensor, = tensors.values()
        refuse_unusual(path, *tensors, tensor)
        raise ValueError(f"{path}: it is {tuple(tensor.shape)} {tensor.dtype}, not (K, D) numbers")
    if key is not None:
        sets = {key: matrix_named(path, tensors, key)}
    elif "prototypes.vectors" in tensors:
        sets = {"prototypes": tensors["prototypes.vectors"]}  # ours: already what is counted
        sets |= further_sets(tensors, "vectors")
    elif "prototypes.memory" in tensors:
        memories = {"prototypes": tensors["prototypes.memory"]} | further_sets(tensors, "memory")
        raise OnlyMemories(path, memories)
    elif alone or isinstance(stored, dict) and all(isinstance(a, np.ndarray)
                                                   for a in stored.values()):
        sets = matrices(tensors)  # one tensor or array, or .npz: any may be a set
    else:
        sets = sets_of_the_best_network(path, tensors)
        if not sets and all(is_matrix(t) and "." not in name for name, t in tensors.items()):
            sets = matrices(tensors)  # without the names of layers
    if not sets:
        for name, tensor in tensors.items():
            if is_queue(name) and tensor.ndim == 2:
                refuse_queue(path, name, tensor)
        raise ValueError(f"{path}: no prototypes among its keys ({listing(tensors)}); "
                         "backbone-only files do not carry prototypes: use the full checkpoint, or "
                         "name the (K, D) tensor with --key")
    different = {}
    for name, tensor in sets.items():
        refuse_unusual(path, name, tensor)
        tensor = tensor.float()
        if not any(torch.equal(tensor, other) for other in different.values()):
            different[name] = tensor.clone()
    return different


class OnlyMemories(ValueError):
    """A run of ours that keeps no prototypes. memories: {name: (M, D)}, vectors of its teacher."""

    def __init__(self, path, memories):
        super().__init__(f"{path}: in the place of {' and '.join(memories)} it has a memory of the "
                         "last vectors of the teacher; how many of them are unique says how alike "
                         "the images are")
        self.memories = memories


def further_sets(tensors, what):
    """{NAME_prototypes: (K, D)} of the tensors prototypes.NAME_what: of the student, of patches."""
    matches = {name: re.fullmatch(rf"prototypes\.(\w+)_{what}", name) for name in tensors}
    return {f"{match[1]}_prototypes": tensors[name] for name, match in matches.items() if match}


def matrix_named(path, tensors, key):
    """The tensor that --key names: by its whole key, or by its name inside the best network."""
    candidates = [name for name in tensors if key in (name, split_key(name)[1])]
    if not candidates:
        names = [name for name, tensor in tensors.items() if is_matrix(tensor)]
        raise ValueError(f"{path}: --key {key} is not in the file; its matrices are "
                         f"{listing(names)}")
    name = key if key in tensors else min(candidates, key=lambda name: split_key(name)[0])
    tensor = tensors[name]
    if is_queue(name):
        refuse_queue(path, name, tensor)
    if not is_matrix(tensor):
        raise ValueError(f"{path}: --key {key} is {tuple(tensor.shape)} {tensor.dtype}, not (K, D) "
                         "numbers")
    return tensor


def sets_of_the_best_network(path, tensors):
    """{name: (K, D) tensor}: the prototypes of the network of the lowest rank that has any."""
    of_rank = {}
    for key, tensor in tensors.items():
        rank, name = split_key(key)
        match = PROTOTYPES.fullmatch(name)
        if match and is_matrix(tensor):
            of_rank.setdefault(rank, {}).setdefault(match["name"], tensor)
    if not of_rank:
        return {}
    sets, copies = of_rank[min(of_rank)], [COPY_NAMES[rank] for rank in sorted(of_rank)]
    if len(copies) > 1 or min(of_rank) in (AVERAGE, STUDENT):
        also = (f"; those of the {' and the '.join(copies[1:])} are not (--key NAME takes others)"
                if copies[1:] else "")
        ddp.print_once(f"{path}: the prototypes of the {copies[0]} are counted{also}",
                       file=sys.stderr)
    # means times a mass, where the means themselves are there too
    doubled = [name for name in sets if name.endswith("S_mu") and f"{name[:-4]}mu" in sets]
    return {name: tensor for name, tensor in sets.items() if name not in doubled}


def matrices(tensors):
    """{name: (K, D) tensor}: those of floats; without any, the only one of integers."""
    found = {name: tensor for name, tensor in tensors.items()
             if is_matrix(tensor) and not is_queue(name)}
    floats = {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}
    return floats or (found if len(found) == 1 else {})


def is_matrix(tensor):
    """Whether it has K rows of D real numbers."""
    return (tensor.ndim == 2 and tensor.numel() > 0
            and not tensor.is_complex() and tensor.dtype != torch.bool)


def is_queue(name):
    return name.split(".")[-1] == "queue"


def refuse_queue(path, key, tensor):
    """ValueError for a memory of features, as the codes of SOP and MaSSL keep it."""
    raise ValueError(f"{path}: {key} {tuple(tensor.shape)} is a memory of features, one in each "
                     "COLUMN, and not a set of prototypes; its rows are the dimensions of features")
