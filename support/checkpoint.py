"""The checkpoints of a run, in its folder OUT beside args.json, log.csv and lock

    ckpt.pt        the newest            ckpt-STEP.pt       kept for good (--keep-every)
    ckpt.prev.pt   the one before        ckpt.damaged.pt    one that could not be read, put aside

A checkpoint holds tensors and plain values alone: torch.load(weights_only=True) reads it anywhere.

    student, teacher   state dicts: backbone.*, head.*
    prototypes         vectors (K, D) as counted, start (K, D), states of both networks' sets;
                       student_vectors (K, D) where the student's set is another than the
                       teacher's; NAME_vectors of further sets; memory and NAME_memory (M, D)
                       instead of vectors where nothing is to be counted
    gmm                the mixture, or {}
    loss, optimizer    state dicts
    step, rng, args, version
    trail              values of the steps since the last row of the log

Randomness is a function of (seed, step or sample, process), so a run goes on from its step and
nothing else has to be restored.
"""
import os
import re
import textwrap

import torch

import config
import data
import heads
import models
from support import ddp
from support.files import write
from support.log import Record

VERSION = 3


# ---- writing -----------------------------------------------------------------------------------
def save(args, step, record, parts, protos_s, protos_t, others=None):
    """Write OUT/ckpt.pt, on the first process. parts: {"student": module, ...}.

    others: {name: prototype set} of further sets, which are to be counted too.
    OSError: no space; ValueError: weights that are not finite. The old checkpoint is then
    untouched.
    """
    if ddp.RANK == 0:
        for net in ("student", "teacher"):
            for name, v in parts[net].state_dict().items():
                if not torch.isfinite(v).all():
                    raise ValueError(f"step {step} is not saved: {net}.{name} is not finite; lower "
                                     "--lr. The last checkpoint is untouched")
        state = {
            "version": VERSION, "step": step, "args": vars(args),
            "rng": {"seed": args.seed, "step": step}, "trail": record.state(),
            **{name: part.state_dict() for name, part in parts.items()},
            "gmm": mixture_state(protos_t),
            "prototypes": {vectors_or_memory(protos_t): protos_t.vectors(),
                           "start": protos_t.start,
                           "student": state_without_mixture(protos_s),
                           "teacher": state_without_mixture(protos_t)}}
        if args.student_prototypes != "same":
            others = {"student": protos_s} | (others or {})
        for name, protos in (others or {}).items():
            state["prototypes"][f"{name}_{vectors_or_memory(protos)}"] = protos.vectors()
        path = os.path.join(args.out, "ckpt.pt")
        previous = os.path.join(args.out, "ckpt.prev.pt")
        write(path, lambda f: torch.save(state, f), old_name=previous)
        if args.keep_every and step % args.keep_every == 0:
            kept = os.path.join(args.out, f"ckpt-{step}.pt")
            write(kept, lambda f: torch.save(state, f))
    ddp.barrier()


def vectors_or_memory(protos):
    """The name under which the vectors of a set are saved; a memory is not to be counted."""
    return "vectors" if protos.countable else "memory"


def mixture_state(protos):
    """The mixture of a prototype set, {} without one; with mu and var, for readers of the file."""
    gmm = {k[4:]: v for k, v in protos.state_dict().items() if k.startswith("gmm.")}
    if "S_mu" in gmm:
        gmm |= {"mu": protos.gmm.mu, "var": protos.gmm.var}
    return gmm


def state_without_mixture(protos):
    return {k: v for k, v in protos.state_dict().items() if not k.startswith("gmm.")}


# ---- reading -----------------------------------------------------------------------------------
def saved(out):
    """Paths of the checkpoints in a folder, ckpt.pt before the others."""
    names = sorted(os.listdir(out)) if os.path.isdir(out) else []
    names = [name for name in names if re.fullmatch(r"ckpt(\.prev|-\d+)?\.pt", name)]
    return [os.path.join(out, name) for name in sorted(names, key=lambda name: name != "ckpt.pt")]


def load(path):
    """A checkpoint of ours as a dict; ValueError if it is damaged, unsafe or something else."""
    from support import checkpoints
    ckpt = checkpoints.read(path, mmap=False)
    needed = {"version": int, "step": int} | dict.fromkeys(
        ("args", "student", "teacher", "loss", "optimizer", "gmm", "prototypes", "trail"), dict)
    if not isinstance(ckpt, dict):
        raise ValueError(f"{path}: not a checkpoint of ours")
    wrong = [key for key, kind in needed.items() if not isinstance(ckpt.get(key), kind)]
    if not wrong:
        wrong = [f"prototypes.{net}" for net in ("student", "teacher")
                 if not isinstance(ckpt["prototypes"].get(net), dict)]
    if wrong:
        raise ValueError(f"{path}: not a checkpoint of ours, or a damaged one: {wrong[0]} is "
                         "missing or of another type")
    return ckpt


def newest_complete(paths):
    """(path, checkpoint) of the latest step among the complete ones at `paths`, of `saved`.

    No step is later than that of ckpt.pt. Where that one is damaged, all others are read: times of
    files say nothing after a copy of the folder. ValueError if none is complete.
    """
    found, refused = None, []
    for path in paths:
        try:
            ckpt = load(path)
        except ValueError as error:
            refused.append(str(error))
            print(f"not used: {error}", flush=True)
            continue
        if found is None or ckpt["step"] > found[1]["step"]:
            found = path, ckpt
        if os.path.basename(path) == "ckpt.pt":
            break
    if found is None:
        raise ValueError(f"--resume: {os.path.dirname(paths[0])} holds no complete checkpoint of "
                         f"ours: {'; '.join(refused)}")
    return found


def start_or_resume(args, parts, protos_s, protos_t):
    """(step to go on from, Record): 0 and an empty one for a new run, else what the folder holds.

    ValueError where OUT holds a run and --resume is not given, or does not fit this one.
    """
    paths = ddp.from_rank0(saved(args.out))
    if paths and not args.resume:
        raise ValueError(f"--out {args.out} already holds a run; go on with --resume, or name "
                         "another folder")
    if paths:
        return resume(args, paths, parts, protos_s, protos_t)
    if args.resume:
        ddp.print0(f"nothing to resume in {args.out}: starting at step 0")
    return 0, Record()


def resume(args, paths, parts, protos_s, protos_t):
    """Load the newest complete one of the checkpoints at `paths` into everything.

    Returns (step, Record). ValueError where none is complete, or where it was made by other code,
    with other flags or on other images.
    """
    path, ckpt = newest_complete(paths) if ddp.RANK == 0 else (None, None)
    path = ddp.from_rank0(path)  # one process chooses, whatever the others see
    ckpt = ckpt or load(path)
    check_version(path, ckpt)
    config.check_script(path, ckpt["args"], args.script)
    check_data_version(path, ckpt["args"], args)
    from support import checkpoints
    script = checkpoints.module_of(args.script)  # which may have flags of its own
    if changed := config.differences(ckpt["args"], vars(args), getattr(script, "flags", None)):
        raise ValueError(f"--resume: {path} was made with other flags: {', '.join(changed)}")
    check_data(path, ckpt["args"].get("data_seen"), args)
    gmm = read_mixture(ckpt)
    for name, part in parts.items():
        load_part(path, name, part, ckpt.get(name, {}))
    for name, protos in (("student", protos_s), ("teacher", protos_t)):
        mixture = gmm if mixture_state(protos) else {}
        load_part(path, f"prototypes.{name}", protos, ckpt["prototypes"][name] | mixture)
    ddp.barrier()
    newest = os.path.join(args.out, "ckpt.pt")
    if ddp.RANK == 0 and path != newest and os.path.exists(newest):
        # It is damaged, and `save` would make it ckpt.prev.pt in the place of the one just loaded
        os.replace(newest, os.path.join(args.out, "ckpt.damaged.pt"))
    ddp.print0(f"resumed {path} at step {ckpt['step']}")
    return ckpt["step"], Record(ckpt["trail"])


def check_version(path, ckpt):
    if ckpt.get("version") != VERSION:
        raise ValueError(f"{path} is of version {ckpt.get('version')}, and this code reads version "
                         f"{VERSION}: use the code that wrote it")


def check_data_version(path, old, args):
    """ValueError if a run's images, made here, are no longer made; old: args of its checkpoint."""
    old_version = old.get("data_version", 1)  # before there was a second one, none was noted
    if old.get("data") in data.VERSIONS and args.data == old["data"]:
        if old_version != args.data_version:
            raise ValueError(f"--resume: {path} was trained on version {old_version} of the "
                             f"images --data {args.data}, and this code makes version "
                             f"{args.data_version}: use the code that made it")


def check_data(path, old, args):
    """ValueError if --data is not the set that a run was trained on; old: what its checkpoint
    remembers of that, see train.py, or None."""
    if not isinstance(old, dict):  # a run from before it was remembered
        ddp.print0(f"{path} does not say which images it saw: they are not compared")
        return
    changed = [f"{name} {old.get(name)} -> {new}" for name, new in args.data_seen.items()
               if name != "content" and old.get(name) != new]
    if old.get("content") != args.data_seen["content"]:
        changed.append("other names of files, labels or names of classes")
    if changed:
        raise ValueError(f"--resume: {path} was trained on other images than --data {args.data} "
                         f"holds now: {', '.join(changed)}")


def read_mixture(ckpt):
    """The state of a checkpoint's mixture, {gmm.NAME: value}."""
    of_readers = ("mu", "var") if "S_mu" in ckpt["gmm"] else ()  # there they follow from S
    return {f"gmm.{k}": v for k, v in ckpt["gmm"].items() if k not in of_readers}


def load_part(path, name, part, state):
    """part.load_state_dict(state); ValueError with one sentence that names what does not fit."""
    try:
        part.load_state_dict(state)
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = textwrap.shorten(str(error), 400)
        raise ValueError(f"--resume: {path}: {name} does not fit ({reason})") from error


# ---- networks ----------------------------------------------------------------------------------
def network(args, drop_path=0.0):
    """Backbone and head as the flags say, a function of the seed."""
    torch.manual_seed(args.seed)
    backbone = models.build(args.arch, patch_size=args.patch_size, img_size=args.img_size,
                            drop_path=drop_path, in_small=args.img_size <= 64)
    head = heads.Head(backbone.dim, args.head_hidden, args.bottleneck_dim, args.head_bn,
                      args.head_norm)
    return models.MultiCrop(backbone, head)
