"""The folder of a run: OUT/args.json, OUT/log.csv and OUT/ckpt.pt.

ckpt.pt holds tensors and plain values alone, so that torch.load(weights_only=True) reads it anywhere:

    student, teacher   state dicts: backbone.*, head.*          gmm         the mixture, or {}
    prototypes         vectors (K, D) as counted, start (K, D), and the state of the student's and the teacher's set
    loss, optimizer    state dicts                              step, rng, args, version

Randomness is a function of (seed, step or sample, rank): a run goes on from its step, and nothing else is restored.
"""
import argparse
import csv
import json
import os
import sys

import torch

import config
import ddp
import heads
import models

COLUMNS = ["step", "epoch", "loss", "loss_over_ln_k", "consistency", "entropy", "cross_entropy", "penalty", "knn",
           "unique_0.025", "unique_0.5", "ceiling_0.025", "ceiling_0.5", "used", "perplexity", "drift", "h_norm",
           "pi_max", "mixture_used", "resurrected", "lr", "beta", "eta", "grad_norm", "images_per_s", "data_share",
           "memory_mb"]


class Log:
    """OUT/log.csv, one row per printed line, and OUT/args.json. A resumed run drops the rows after its checkpoint."""

    def __init__(self, args, start):
        self.path = os.path.join(args.out, "log.csv")
        if ddp.RANK:
            return
        os.makedirs(args.out, exist_ok=True)
        self.rows = []
        if start:
            with open(self.path, newline="") as f:
                self.rows = [r for r in csv.DictReader(f) if int(r["step"]) <= start]
        with open(self.path, "w", newline="") as f:
            csv.DictWriter(f, COLUMNS).writeheader()
            csv.DictWriter(f, COLUMNS).writerows(self.rows)
        with open(os.path.join(args.out, "args.json"), "w") as f:
            json.dump(vars(args) | {"torch": torch.__version__, "processes": ddp.WORLD}, f, indent=1)

    def row(self, step, values):
        values = {k: f"{float(v):.6g}" for k, v in values.items() if v is not None}
        self.rows.append({k: "" for k in COLUMNS} | values | {"step": step})
        with open(self.path, "a", newline="") as f:
            csv.DictWriter(f, COLUMNS).writerow(self.rows[-1])

    def first(self, key):
        return float(self.rows[0][key])

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


def peak_memory(device):
    """Peak memory so far, MB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    import resource                                                                     # not there on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def save(path, args, step, nets, protos_s, protos_t):
    """OUT/ckpt.pt, on rank 0: only tensors and plain values, written beside the old one and then put in its place."""
    if ddp.RANK == 0:
        gmm = {k[4:]: v for k, v in protos_t.state_dict().items() if k.startswith("gmm.")}
        rest = [{k: v for k, v in p.state_dict().items() if not k.startswith("gmm.")} for p in (protos_s, protos_t)]
        torch.save({"version": 1, "step": step, "args": vars(args), "rng": {"seed": args.seed, "step": step},
                    **{k: v.state_dict() for k, v in nets.items()}, "gmm": gmm,
                    "prototypes": {"vectors": protos_t.vectors(), "start": protos_t.start,
                                   "student": rest[0], "teacher": rest[1]}},
                   path + ".tmp")
        os.replace(path + ".tmp", path)
    ddp.barrier()


def resume(path, args, nets, protos_s, protos_t):
    """Load OUT/ckpt.pt into everything; returns the step to go on from: seed and step are all the randomness."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        saved = ckpt["args"]
    except Exception as e:
        raise ValueError(f"--resume: {path} is not a complete checkpoint of ours ({type(e).__name__})") from e
    if changed := config.differences(saved, vars(args)):
        raise ValueError(f"--resume: {path} was made with other flags: {', '.join(changed)}")
    for name, part in nets.items():
        part.load_state_dict(ckpt[name])
    gmm = {f"gmm.{k}": v for k, v in ckpt["gmm"].items()}
    for protos, state in ((protos_s, "student"), (protos_t, "teacher")):
        protos.load_state_dict(ckpt["prototypes"][state] | gmm)
    ddp.print0(f"resumed {path} at step {ckpt['step']}")
    return ckpt["step"]


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
        args = argparse.Namespace(**ckpt["args"])
        net, protos = network(args), heads.prototypes(args)
        net.load_state_dict(ckpt["teacher"])
        protos.load_state_dict(ckpt["prototypes"]["teacher"] | {f"gmm.{k}": v for k, v in ckpt["gmm"].items()})
    except Exception as e:
        raise ValueError(f"{path} is not a checkpoint of a run of ours ({type(e).__name__})") from e
    return net.eval(), protos, ckpt["args"]
