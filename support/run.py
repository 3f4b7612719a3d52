"""The folder of a run, OUT: args.json, log.csv, lock, and the checkpoints

    ckpt.pt            the newest                              ckpt-STEP.pt      kept for good (--keep-every)
    ckpt.prev.pt       the one before                          ckpt.damaged.pt   one that could not be read, put aside

A checkpoint holds tensors and plain values alone, so that torch.load(weights_only=True) reads it anywhere:

    student, teacher   state dicts: backbone.*, head.*          gmm         the mixture, or {}
    prototypes         vectors (K, D) as counted, start (K, D), and the state of the student's and the teacher's set
    loss, optimizer    state dicts                              step, rng, args, version
    trail              values of the steps since the last row of the log

Randomness is a function of (seed, step or sample, rank): a run goes on from its step, and nothing else is restored.
"""
import contextlib
import csv
import ctypes
import io
import json
import math
import os
import re
import sys

import torch

from support import checkpoints
import config
from support import ddp
import heads
import methods
import models
from support.guard import write

VERSION = 3  # 1: without trail; 2: a mixture without its floor
COLUMNS = ["step", "epoch", "loss", "loss_over_ln_k", "consistency", "entropy", "cross_entropy", "penalty", "raw_knn",
           "knn", "unique_0.025", "unique_0.5", "ceiling_0.025", "ceiling_0.5", "used", "perplexity", "drift", "h_norm",
           "pi_max", "mixture_used", "resurrected", "skipped", "lr", "beta", "eta", "grad_norm", "images_per_s",
           "data_share", "memory_mb"]


MEASURED = COLUMNS[COLUMNS.index("knn"):COLUMNS.index("h_norm") + 1]  # only where one evaluates


class Log:
    """OUT/log.csv, one row per printed line, and OUT/args.json. A resumed run drops the rows after its checkpoint, and
    with `open_end` the row of the checkpoint too: the run stopped between two rows, and that one was for its end.
    What comes out is the log of a run that never stopped, speed and memory aside."""

    def __init__(self, args, start, open_end=False):
        self.path = os.path.join(args.out, "log.csv")
        if ddp.RANK:
            return
        self.rows = []
        if start and os.path.exists(self.path):
            with open(self.path, newline="") as f:
                whole = [line for line in f if line.endswith("\n")]  # a kill can cut a line short
            self.rows = [r for r in csv.DictReader(whole) if int(r["step"]) < start + (not open_end)]
            if self.rows and int(self.rows[-1]["step"]) == start and start % args.eval_every:
                self.rows[-1].update(dict.fromkeys(MEASURED, ""))  # measured because the run stopped there
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS).writeheader()
        csv.DictWriter(text, COLUMNS).writerows({k: r.get(k, "") for k in COLUMNS} for r in self.rows)
        write(self.path, lambda f: f.write(text.getvalue().encode()))
        about = vars(args) | {"torch": torch.__version__, "processes": ddp.WORLD}
        write(os.path.join(args.out, "args.json"), lambda f: f.write(json.dumps(about, indent=1).encode()))

    def row(self, step, values):
        values = {k: f"{float(v):.6g}" for k, v in values.items() if v is not None}
        self.rows.append({k: "" for k in COLUMNS} | values | {"step": step})
        with open(self.path, "a", newline="") as f:
            csv.DictWriter(f, COLUMNS).writerow(self.rows[-1])

    def first(self, key):
        """A value of row 0, NaN if there is none: the control of the untrained network."""
        return float(self.rows[0].get(key) or "nan") if self.rows and int(self.rows[0]["step"]) == 0 else math.nan

    @staticmethod
    def line(step, total, row):
        text = (f"step {step:>{len(str(total))}}/{total}  loss {row['loss']:.3f} "
                f"({row['loss_over_ln_k']:.3f} of uniform)")
        if "used" in row:
            text += "" if row["knn"] is None else f"  k-NN {row['knn']:.1f}"
            text += (f"  unique(.025) {row['unique_0.025']:.3f}  unique(.5) {row['unique_0.5']:.3f} "
                     f"(ceiling {row['ceiling_0.5']:.3f})  used {row['used']:.3f}  perplexity {row['perplexity']:.3f}"
                     f"  drift {row['drift']:.3f}  |h| {row['h_norm']:.2f}")
        return text + f"  {row['images_per_s']:.0f} images/s"


class Trail:
    """Loss terms and gradient norm of the steps since the last row of the log, and what to do when one is not finite.

    Such a step is skipped on the device, where its values already are the mean over all ranks, so that all ranks skip
    it and nobody waits. Only `read` waits: at every step on a CPU, on a GPU where a row or a checkpoint is due anyway.
    """

    def __init__(self, state=None):
        self.names, self.rows = (state["names"], state["rows"]) if state else ([], [])
        self.unread, self.streak = [], 0

    def add(self, step, lr, names, values):
        """names (n), values: tensor (n,)."""
        self.names = names
        self.unread.append((step, lr, values))

    def read(self):
        """Names the first step of a streak that is not finite; ValueError at the third in a row."""
        if not self.unread:
            return
        values = torch.stack([v for *_, v in self.unread]).tolist()  # (steps, n)
        for (step, lr, _), row in zip(self.unread, values):
            self.rows.append(row)
            bad = [f"{name} {v}" for name, v in zip(self.names, row) if not math.isfinite(v)]
            self.streak = self.streak + 1 if bad else 0
            if self.streak == 1:
                self.first = f"step {step} is not finite: {', '.join(bad)} (lr {lr:.3g}, gradient norm {row[-1]:.3g})"
                ddp.print0(f"{self.first}; skipped on all processes")
            if self.streak == 3:
                raise ValueError(f"three steps in a row, up to {step}, were skipped; {self.first}. The last checkpoint "
                                 "is untouched; lower --lr or --logit-scale, or raise --warmup-epochs")
        self.unread = []

    def means(self):
        """{name: mean over the steps that were not skipped}, and how many were."""
        good = [row for row in self.rows if all(map(math.isfinite, row))]
        return dict(zip(self.names, (sum(column) / len(good) for column in zip(*good)) if good else
                        [math.nan] * len(self.names)), skipped=len(self.rows) - len(good))

    def state(self):
        return {"names": self.names, "rows": self.rows} if self.rows else {}


def peak_memory(device):
    """Peak memory so far, MB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    import resource  # not there on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def keep_freed_memory():
    """glibc gives freed memory back to the kernel and fetches it again, page by page and zeroed, at every step; told to
    keep it, a run on a CPU gains a tenth. Nothing on other systems."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another libc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-1, 2 ** 31 - 1), mallopt(-3, 2 ** 30)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def save(args, step, trail, nets, protos_s, protos_t):
    """OUT/ckpt.pt, on rank 0. OSError: no space; ValueError: weights that are not finite; the old one is then whole."""
    if ddp.RANK == 0:
        for net in ("student", "teacher"):
            for name, v in nets[net].state_dict().items():
                if not torch.isfinite(v).all():
                    raise ValueError(f"step {step} is not saved: {net}.{name} is not finite; lower --lr. The last "
                                     "checkpoint is untouched")
        gmm = {k[4:]: v for k, v in protos_t.state_dict().items() if k.startswith("gmm.")}
        if "S_mu" in gmm:  # what follows from S is written too, for who reads the file
            gmm |= {"mu": protos_t.gmm.mu, "var": protos_t.gmm.var}
        rest = [{k: v for k, v in p.state_dict().items() if not k.startswith("gmm.")} for p in (protos_s, protos_t)]
        state = {"version": VERSION, "step": step, "args": vars(args), "rng": {"seed": args.seed, "step": step},
                 **{k: v.state_dict() for k, v in nets.items()}, "gmm": gmm, "trail": trail.state(),
                 "prototypes": {"vectors": protos_t.vectors(), "start": protos_t.start,
                                "student": rest[0], "teacher": rest[1]}}
        path = os.path.join(args.out, "ckpt.pt")
        write(path, lambda f: torch.save(state, f), keep=os.path.join(args.out, "ckpt.prev.pt"))
        if args.keep_every and step % args.keep_every == 0:
            write(os.path.join(args.out, f"ckpt-{step}.pt"), lambda f: torch.save(state, f))
    ddp.barrier()


def saved(out):
    """Paths of the checkpoints in a folder, ckpt.pt first, then the last written."""
    paths = [os.path.join(out, n) for n in (os.listdir(out) if os.path.isdir(out) else [])
             if re.fullmatch(r"ckpt(\.prev|-\d+)?\.pt", n)]
    return sorted(paths, key=lambda p: (p.endswith("ckpt.pt"), os.path.getmtime(p)), reverse=True)


def load(path):
    """A checkpoint of ours, whole and safe, as a dict; else ValueError."""
    ckpt = checkpoints.read(path, mmap=False)
    if not isinstance(ckpt, dict) or {"version", "step", "args", "student", "optimizer"} - ckpt.keys():
        raise ValueError(f"{path}: not a checkpoint of ours")
    return ckpt


def resume(args, found, nets, protos_s, protos_t):
    """Load the newest complete one of the checkpoints `found` into everything; returns (its step, its trail)."""
    path, ckpt, refused = None, None, []
    for candidate in found if ddp.RANK == 0 else []:
        try:
            path, ckpt = candidate, load(candidate)
            break
        except ValueError as e:
            refused.append(str(e))
            print(f"not used: {e}", flush=True)
    if ddp.RANK == 0 and ckpt is None:
        raise ValueError(f"--resume: {args.out} holds no complete checkpoint of ours: {'; '.join(refused)}")
    path = ddp.from_rank0(path)  # the choice of one, whatever the others see
    ckpt = ckpt or load(path)
    if ckpt["version"] != VERSION:
        if ckpt["version"] not in (1, 2):
            raise ValueError(f"--resume: {path} is of version {ckpt['version']}, and this code reads 1 to {VERSION}: "
                             "use the code that wrote it")
        if ckpt["version"] == 1:
            ddp.print0(f"{path} is of version 1, without a trail: the next row of the log averages steps from it on")
    if changed := config.differences(ckpt["args"], vars(args)):
        raise ValueError(f"--resume: {path} was made with other flags: {', '.join(changed)}")
    gmm = mixture(ckpt)
    for name, part in nets.items():
        fit(path, name, part, ckpt.get(name, {}))
    for name, protos in (("student", protos_s), ("teacher", protos_t)):
        fit(path, f"prototypes.{name}", protos, ckpt["prototypes"][name] | gmm)
    ddp.barrier()
    damaged = os.path.join(args.out, "ckpt.pt")
    if ddp.RANK == 0 and path != damaged and os.path.exists(damaged):
        os.replace(damaged, os.path.join(args.out, "ckpt.damaged.pt"))  # or it would push ckpt.prev.pt out
    ddp.print0(f"resumed {path} at step {ckpt['step']}")
    return ckpt["step"], Trail(ckpt.get("trail"))


def mixture(ckpt):
    """The state of a checkpoint's mixture, {gmm.NAME: value}."""
    gmm = dict(ckpt["gmm"])
    if {"S_mu", "mu", "var"} <= gmm.keys():
        mu, var = gmm.pop("mu"), gmm.pop("var")  # they follow from S
        if ckpt["version"] < 3:
            gmm["floor"] = var.min()
            if not ckpt["prototypes"]["teacher"]["_extra_state"]["started"]:
                gmm["S_mu"] = mu.double()  # not means yet, but the vectors that wait
    return {f"gmm.{k}": v for k, v in gmm.items()}


def fit(path, name, part, state):
    """load_state_dict with one sentence, the first five names each, where it does not fit."""
    here = part.state_dict()
    lacks, more = [k for k in here if k not in state], [k for k in state if k not in here]
    other = [k for k in here if torch.is_tensor(here[k]) and k in state and here[k].shape != state[k].shape]
    if lacks or more or other:
        raise ValueError(f"--resume: {path}: {name} does not fit; missing: {first(lacks)}; unexpected: {first(more)}; "
                         f"of another shape: {first(other)}")
    try:
        part.load_state_dict(state)
    except (ValueError, KeyError, RuntimeError) as e:
        raise ValueError(f"--resume: {path}: {name} does not fit ({' '.join(str(e).split())})") from e


def first(names, most=5):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


def network(args, drop_path=0.0):
    """Backbone and head as the flags say, a function of the seed."""
    torch.manual_seed(args.seed)
    backbone = models.build(args.arch, patch_size=args.patch_size, img_size=args.img_size, drop_path=drop_path,
                            in_small=args.img_size <= 64)
    head = heads.Head(backbone.dim, args.head_hidden, args.bottleneck_dim, args.head_bn, args.head_norm)
    return models.MultiCrop(backbone, head)


def load_run(path):
    """(net, prototypes, args dict) of the teacher in a run folder or ckpt.pt: net([x]) -> h, prototypes.assign(h)."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        args = config.known(ckpt["args"])
        net, protos = network(args), heads.prototypes(args)
        net.load_state_dict(ckpt["teacher"])
        protos.load_state_dict(ckpt["prototypes"]["teacher"] | mixture(ckpt))
        loss = methods.make(args, 1)
        loss.load_state_dict(ckpt["loss"])
        protos.offset = loss.offset(protos.tau)
    except Exception as e:
        raise ValueError(f"{path} is not a checkpoint of a run of ours ({type(e).__name__})") from e
    return net.eval(), protos, ckpt["args"]
