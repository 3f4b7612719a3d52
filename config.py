"""Every flag, once. Order of authority: default < preset < the run that --resume goes on with < command line.
A preset holds only what differs.

Groups marked (results) change what is learned; groups marked (speed) do not.
"""
import argparse
import json
import os

import torch

import data
import heads
import losses
import views
from support import ddp

PRESETS = {
    # python train.py                    2 CPU cores, 3 minutes, k-NN 71.3 (2026-11-25); README.md, "Results"
    "tiny": {},
    # python train.py --preset cifar10   one GPU; not run
    "cifar10": dict(data="cifar10", arch="vit_tiny", patch_size=4, num_prototypes=4096, partition_size=512,
                    head_hidden=1024, bottleneck_dim=256, batch_size=256, epochs=200, warmup_epochs=10, lr=1e-3,
                    momentum=0.992, local_crops=6, log_every=100, eval_every=1950, drop_path=0.1,
                    global_scale=[0.32, 1.0], local_scale=[0.1, 0.32], gmm_start=0.05,
                    jitter=[0.4, 0.4, 0.2, 0.1], gray=0.2, solarize=[0.0, 0.2, 0.0]),
    # python train.py --preset cifar10-cpu   2 CPU cores: the tiny network, one pass; too short for natural images
    "cifar10-cpu": dict(data="cifar10", epochs=1.0, jitter=[0.4, 0.4, 0.2, 0.1], gray=0.2, eval_every=520),
    # torchrun --nproc_per_node=8 train.py --preset paper-vits --data IMAGENET   (Table B.1a; 8 GPUs; not run)
    "paper-vits": dict(data="imagenet", arch="vit_small", patch_size=16, img_size=224, local_size=96, local_crops=10,
                       global_scale=[0.32, 1.0], local_scale=[0.05, 0.32], jitter=[0.4, 0.4, 0.2, 0.1],
                       blur=[1.0, 0.1, 0.5], gray=0.2, solarize=[0.0, 0.2, 0.0], drop_path=0.1, head_hidden=2048,
                       bottleneck_dim=256, head_bn=False,
                       num_prototypes=65536, partition_size=512, batch_size=1024, epochs=300, warmup_epochs=10,
                       lr=5e-4, min_lr=1e-6, weight_decay=0.04, weight_decay_end=0.4, momentum=0.992, clip_grad=1.0,
                       gmm_start=0.034, workers=10, log_every=100, eval_every=12510,
                       eval_bank=50000, eval_queries=10000),
}
# torchrun --nproc_per_node=8 train.py --preset paper-vitb --data IMAGENET       (Table B.1b; 8 GPUs; not run)
PRESETS["paper-vitb"] = dict(PRESETS["paper-vits"], arch="vit_base", epochs=400, lr=7.5e-4, min_lr=2e-6, momentum=0.996,
                             clip_grad=0.3, gmm_start=0.025)

# torchrun ... train.py --preset inat18 --data-root DIR                          (Table 2; 8 GPUs; not run)
PRESETS["inat18"] = dict(PRESETS["paper-vits"], data="inat18")
# torchrun ... train.py --preset paper-dino --data IMAGENET      (DINO's official recipe as run for Table C.3; not run)
PRESETS["paper-dino"] = dict(PRESETS["paper-vits"], method="dino", prototypes="joint", epochs=100, local_crops=6,
                             global_scale=[0.4, 1.0], local_scale=[0.05, 0.4], momentum=0.996, clip_grad=3.0,
                             teacher_temp=[0.04, 0.07], teacher_temp_epochs=30, freeze_prototypes=1)
# torchrun ... train.py --preset paper-dino-dec --data IMAGENET  (last row of Table C.3; not run)
PRESETS["paper-dino-dec"] = dict(PRESETS["paper-dino"], prototypes="decoupled", targets="sinkhorn", gmm_start=0.1,
                                 teacher_temp=[0.05, 0.025], teacher_temp_epochs=100, num_prototypes=2048)
# torchrun ... train.py --preset paper-rn50 --data IMAGENET      (CARP's official ResNet-50; not run; its batch is not
PRESETS["paper-rn50"] = dict(PRESETS["paper-vits"], arch="resnet50", optimizer="lars", lr=0.45, min_lr=0.0048,
                             warmup_epochs=0, weight_decay=1e-6, weight_decay_end=1e-6, momentum=0.99, clip_grad=0.0,
                             global_scale=[0.2, 1.0], local_scale=[0.05, 0.2], local_crops=6, epochs=400,
                             drop_path=0.0, head_bn=True, gmm_start=0.025)  # published: 1,024 is ours)
# torchrun ... train.py --preset paper-carl --data IMAGENET      (Fig. 4a: CARL with CARP's recipe, 100 epochs; not run)
PRESETS["paper-carl"] = dict(PRESETS["paper-rn50"], method="carl", prototypes="joint", epochs=100)
# torchrun ... train.py --preset paper-dino-rn50 --data IMAGENET (DINO's official ResNet-50, 100 epochs; not run)
PRESETS["paper-dino-rn50"] = dict(PRESETS["paper-dino"], arch="resnet50", optimizer="sgd", lr=0.03, weight_decay=1e-4,
                                  weight_decay_end=1e-4, global_scale=[0.14, 1.0], local_scale=[0.05, 0.14],
                                  local_crops=8, drop_path=0.0, teacher_temp=[0.04, 0.04], teacher_temp_epochs=0)

# flags that may differ between a run and its continuation: where it runs and what is printed, not what is computed
FREE = {"out", "device", "resume", "stop_at", "workers", "log_every", "eval_every", "eval_bank", "eval_queries", "data",
        "data_root", "amp", "compile", "save_every", "keep_every", "export", "script"}


def parser():
    p = argparse.ArgumentParser("train.py", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                description="Self-supervised learning with joint, KP, frozen or decoupled prototypes.")
    on_off = argparse.BooleanOptionalAction
    flag = p.add_argument_group("run").add_argument
    flag("--preset", default="tiny", choices=PRESETS, help="values for many flags at once; what you type wins over it")
    flag("--out", help="folder for ckpt.pt, log.csv and args.json; None: runs/PRESET-METHOD-PROTOTYPES-sSEED")
    flag("--seed", type=int, default=0, help="of weights, prototypes, partitions, order, crops; not of the shapes")
    flag("--device", default="auto", help="cpu, cuda, mps or auto: the first of cuda, mps, cpu that is there")
    flag("--resume", action="store_true",
         help="go on from the newest complete checkpoint in OUT, if there is one, with its flags; a restart by "
         "torchrun does so anyway")
    flag("--stop-at", type=int, help="save and leave after this step; the schedules keep the length of --steps")
    flag("--save-every", type=int, help="steps between checkpoints; those at evaluations and at the end come on top")
    flag("--keep-every", type=int, help="steps between checkpoints that stay, as OUT/ckpt-STEP.pt")
    flag("--export", metavar="FILE", help="write the teacher's backbone of the run in OUT under timm's names and "
         "leave; FILE ends in .safetensors (needs that library), or .pt or .pth")
    flag = p.add_argument_group("data (results)").add_argument
    flag("--data", default="shapes", help="shapes (built in), cifar10, cifar100, stl10, or a folder of images")
    flag("--data-root", default="data", help="where downloaded sets are kept")
    flag("--imbalance", type=float, default=1.0, help="long tail: largest class over smallest; test split untouched")
    flag("--imbalance-law", default="exp", choices=["exp", "power"], help="one factor per class, or (c + 1)^-a")
    flag("--img-size", type=int, default=32, help="side of the two global crops, pixels")
    flag("--local-size", type=int, default=16, help="side of the local crops, pixels")
    flag("--local-crops", type=int, default=4, help="local crops per image, seen by the student alone; fewer is faster")
    flag("--global-scale", type=float, nargs=2, default=[0.4, 1.0], metavar=("LO", "HI"), help="area of a global crop")
    flag("--local-scale", type=float, nargs=2, default=[0.15, 0.5], metavar=("LO", "HI"), help="area of a local crop")
    flag("--jitter", type=float, nargs=4, default=[0.4, 0.4, 0.4, 0.2], metavar=("B", "C", "S", "H"),
         help="brightness, contrast, saturation, hue; strong enough that colour alone does not match crops")
    flag("--jitter-p", type=float, default=0.8, help="share of the crops that are jittered")
    flag("--gray", type=float, default=0.3, help="share of the crops made grey")
    flag("--blur", type=float, nargs=3, default=[0.0, 0.0, 0.0], metavar=("G1", "G2", "L"), help="share blurred")
    flag("--solarize", type=float, nargs=3, default=[0.0, 0.0, 0.0], metavar=("G1", "G2", "L"), help="share solarized")
    flag = p.add_argument_group("model (results)").add_argument
    flag("--arch", default="vit_nano", help="backbone; vit_nano: 3 layers of width 96 behind a convolutional stem",
         choices=["vit_nano", "vit_tiny", "vit_small", "vit_base", "resnet18", "resnet50"])
    flag("--patch-size", type=int, default=8, help="of a ViT, pixels; image and crop sizes must be multiples")
    flag("--init", metavar="FILE", help="start both backbones from a run of ours or its --export, timm's, DINO's")
    flag("--drop-path", type=float, default=0.0, help="stochastic depth of the student, rate of the last block")
    flag("--head-hidden", type=int, default=256, help="width of the projection head (2048 in the papers)")
    flag("--bottleneck-dim", type=int, default=128, help="D, dimensions of h and of the prototypes (256 in the papers)")
    flag("--head-bn", action=on_off, default=True, help="batch norm in the head (ResNets yes, ViTs no in the papers)")
    flag("--head-norm", action=on_off, help="h of length one; None: yes for dino, no for carp and carl, as published")
    flag = p.add_argument_group("method and prototypes (results)").add_argument
    flag("--method", default="carp", choices=list(losses.LOSSES),
         help="loss; carl is carp with one block of K prototypes")
    flag("--prototypes", default="decoupled", choices=list(heads.PROTOTYPES),
         help="trained by the loss, that + KoLeo, that with lengths as concentrations (dino), random, means of the "
         "paper's online mixture, or of ours (live.py)")
    flag("--kp-weight", type=float, help="KoLeo on trained prototypes; None: 0.1 (B.1) with kp, else 0")
    flag("--norm-last-layer", action=on_off, default=True, help="joint and kp: no lengths to train, as published")
    flag("--freeze-prototypes", type=float, default=0.0, metavar="EPOCHS",
         help="passes over the images before trained prototypes move (1 in DINO)")
    flag("--num-prototypes", type=int, default=1024, metavar="K", help="prototypes (65536 in the papers)")
    flag("--partition-size", type=int, default=128, metavar="P", help="prototypes per softmax of CARP (512 official)")
    flag("--logit-scale", type=float, default=1.0, help="factor on all logits, an inverse temperature (CARP: 1)")
    flag("--proto-norm", default="unit", choices=["unit", "raw"], help="length of mixture means in the logits")
    flag = p.add_argument_group("temperatures and targets: --method dino (results)").add_argument
    flag("--student-temp", type=float, default=0.1, help="temperature of the student's softmax")
    flag("--teacher-temp", type=float, nargs=2, default=[0.04, 0.04], metavar=("START", "END"),
         help="of the teacher's softmax or Sinkhorn-Knopp (Table C.3: 0.04 0.07, decoupled 0.05 0.025)")
    flag("--teacher-temp-epochs", type=int, default=0, help="passes over which it goes from START to END")
    flag("--targets", choices=["center", "prob", "sinkhorn"],
         help="what keeps the teacher from one prototype: a centre of logits, one of log-probabilities, or "
         "Sinkhorn-Knopp; None: prob for vmf, else center")
    flag = p.add_argument_group("mixture: --prototypes decoupled; its start also of live (results)").add_argument
    flag("--gmm-init", default="features", choices=["features", "random"], help="start of the means; random dies")
    flag("--gmm-start", type=float,
         help="step at which the mixture starts, or below 1 the share of the run; before, h still turns too fast; "
         "None: 0.75, and 0.5 for live")
    flag("--beta", type=float, nargs=2, default=[0.1, 0.5], metavar=("START", "END"), help="A.1; 1 1: no annealing")
    flag("--eta-a", type=float, default=0.001, help="A.7, how fast eta rises")
    flag("--eta-c", type=float, default=0.89, help="A.7, where eta starts")
    flag("--forgetting", default="responsibility", choices=["responsibility", "plain", "sample"],
         help="A.3; plain: Table A.1, row 1; sample: per vector, as Celaya and Agostini's rule that A.3 cites")
    flag("--resurrect", type=float, default=0.3, help="weight above which a component is split; 0: never")
    flag("--rescale", action=on_off, default=True, help="A.6, for components above that weight")
    flag("--var-floor", type=float, default=1e-3, help="smallest variance, as a share of the pooled variance")
    flag = p.add_argument_group("mixture: --prototypes live (results)").add_argument
    flag("--live-eta", type=float, default=0.95, help="L.3, forgetting per vector won: a mean remembers 1/(1 - eta)")
    flag("--live-patience", type=float, default=8.0, help="L.5, vectors per prototype until one that won none restarts")
    flag("--live-apart", type=float, default=0.026, help="L.4, cosine distance below which twins part; 0: they stay")
    flag = p.add_argument_group("optimiser and schedules (results)").add_argument
    flag("--epochs", type=float, default=5.0, help="length of the run in passes over the images")
    flag("--steps", type=int, help="length of the run in steps, instead of --epochs")
    flag("--batch-size", type=int, default=32, help="images per step over all processes")
    flag("--accum", type=int, default=1, help="micro-batches per step: less memory; batch norms then see less at once")
    flag("--optimizer", default="adamw", choices=["adamw", "sgd", "lars"], help="lars and sgd: the papers' ResNets")
    flag("--lr", type=float, default=0.024, help="peak, per 256 images: multiplied by batch-size / 256")
    flag("--min-lr", type=float, default=0.0, help="end of the cosine, not scaled")
    flag("--warmup-epochs", type=float, default=0.5, help="linear warm-up of lr, at most a tenth of the run")
    flag("--weight-decay", type=float, default=0.04, help="start of its cosine; not on biases and norms")
    flag("--weight-decay-end", type=float, default=0.04, help="end of its cosine (0.4 in the papers)")
    flag("--momentum", type=float, default=0.98, help="of the teacher, cosine to 1")
    flag("--clip-grad", type=float, default=3.0, help="largest gradient norm of one parameter tensor; 0: no clipping")
    flag = p.add_argument_group("speed, logging, evaluation (speed)").add_argument
    flag("--amp", action=on_off, default=True, help="bf16 in the network on CUDA; never in mixture or softmax")
    flag("--compile", action="store_true", help="torch.compile for the backbones; takes minutes at the start")
    flag("--workers", type=int, default=0, help="processes that decode images of folders too large for memory")
    flag("--log-every", type=int, default=50, help="steps between printed lines")
    flag("--eval-every", type=int, default=260, help="steps between evaluations and checkpoints")
    flag("--eval-bank", type=int, default=10000, help="training images that k-NN and prototype measures use")
    flag("--eval-queries", type=int, default=2000, help="held-out images that k-NN classifies")
    return p


def parse(argv=None, script="train.py"):
    """argv -> checked Namespace. What cannot run gets one sentence with the flag and the value, and exit code 2.

    script: the script that runs, as args.json will name it: train.py or zoo/NAME.py.
    """
    p = parser()
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="tiny")
    early.add_argument("--out")
    early.add_argument("--resume", action="store_true")
    typed = early.parse_known_args(argv)[0]
    p.set_defaults(**PRESETS.get(typed.preset, {}))
    if typed.resume and typed.out:
        try:
            p.set_defaults(**written(typed.out))
        except ValueError as e:
            p.error(e)
    args = p.parse_args(argv)
    complete(args)
    check(args, p.error)
    args.device = device(args, p.error)
    args.resume = args.resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    args.out = args.out or f"runs/{args.preset}-{args.method}-{args.prototypes}-s{args.seed}"
    args.partition_size = args.num_prototypes if args.method == "carl" else args.partition_size
    args.script = script
    return args


def recipe(args):
    """The crops that the flags ask for."""
    return views.Recipe(
        global_size=args.img_size, local_size=args.local_size, n_local=args.local_crops,
        global_scale=tuple(args.global_scale), local_scale=tuple(args.local_scale),
        jitter=tuple(args.jitter), jitter_p=args.jitter_p, gray_p=args.gray, blur_p=tuple(args.blur),
        solarize_p=tuple(args.solarize))


def lengths(args, n):
    """(steps of one pass over n images, steps of the run, step at which this process stops)."""
    steps_per_epoch = n // args.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {n} images of --data "
                         f"{args.data}")
    total = args.steps or max(1, round(args.epochs * steps_per_epoch))
    if args.stop_at and args.stop_at > total:
        raise ValueError(f"--stop-at {args.stop_at} lies beyond the {total} steps of this run")
    return steps_per_epoch, total, min(args.stop_at or total, total)


def describe(args, images, student, total, lr_peak, device):
    """What is about to run, in a few lines."""
    classes = "" if images.y is None else f" of {len(images.classes)} classes"
    parameters = sum(p.numel() for p in student.parameters()) / 1e6
    text = (f"{args.method} with {args.prototypes} prototypes on {args.data}: {len(images)} images"
            f"{classes}, {total} steps of {args.batch_size}, {ddp.WORLD} process(es) on {device}\n"
            f"{args.arch}, {parameters:.2f} M parameters, K {args.num_prototypes} x "
            f"D {args.bottleneck_dim}, peak lr {lr_peak:.2g}, out {args.out}")
    if images.y is None:
        text += "\nthe images carry no labels: k-NN is not measured"
    return text


def written(out):
    """The flags of the run in a folder, not to be typed again for --resume; {} if there are none to be read.
    ValueError where the file holds something else than train.py wrote."""
    path = os.path.join(out, "args.json")
    try:
        with open(path) as f:
            old = json.load(f)
    except (OSError, ValueError):  # the checkpoint says the same, and run.resume compares with it
        return {}
    if not isinstance(old, dict):
        raise ValueError(f"--resume: {path} does not hold the flags of a run; remove it, and type them again")
    actions = [a for a in parser()._actions if a.dest not in ("help", "out", "device", "resume", "stop_at", "export")]
    for a in (a for a in actions if a.dest in old):
        value, kind = old[a.dest], (int, float)
        fits = value == a.default or isinstance(value, (*kind, str)) and (not a.choices or value in a.choices)
        if isinstance(a.default, list):
            fits = isinstance(value, list) and len(value) == len(a.default) and all(isinstance(v, kind) for v in value)
        if not fits:
            raise ValueError(f"--resume: {path} says {a.dest} = {value!r}, which cannot be; remove it, and type the "
                             "flags again")
    return {a.dest: old[a.dest] for a in actions if a.dest in old}


def complete(args):
    """Flags whose default depends on another flag."""
    def default(name, value):
        if getattr(args, name) is None:
            setattr(args, name, value)
    default("head_norm", args.method == "dino")
    default("gmm_start", 0.5 if args.prototypes == "live" else 0.75)
    default("targets", "prob" if args.prototypes == "vmf" else "center")
    default("kp_weight", 0.1 if args.prototypes == "kp" else 0.0)


def check(args, error):
    """Rules between flags; error(sentence) does not return."""
    a, K = args, args.num_prototypes
    for name in ("num_prototypes", "partition_size", "batch_size", "bottleneck_dim", "head_hidden", "patch_size",
                 "img_size", "local_size", "accum", "log_every", "eval_every", "eval_bank", "eval_queries", "steps",
                 "stop_at", "save_every", "keep_every"):
        if getattr(a, name) is not None and getattr(a, name) < 1:
            error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(a, name)}")
    for name in ("epochs", "lr", "logit_scale", "var_floor", "student_temp", "live_patience"):
        if not 0 < getattr(a, name) < float("inf"):
            error(f"--{name.replace('_', '-')} must be positive, got {getattr(a, name)}")
    for name in ("local_crops", "workers", "seed", "warmup_epochs", "min_lr", "weight_decay", "weight_decay_end",
                 "clip_grad", "gmm_start", "eta_a", "kp_weight", "freeze_prototypes", "teacher_temp_epochs",
                 "live_apart"):
        if not 0 <= getattr(a, name) < float("inf"):
            error(f"--{name.replace('_', '-')} must not be negative, got {getattr(a, name)}")
    for name in ("jitter_p", "gray", "momentum"):
        if not 0 <= getattr(a, name) <= 1:
            error(f"--{name.replace('_', '-')} must lie in [0, 1], got {getattr(a, name)}")
    for name in ("blur", "solarize", "beta"):
        if not all(0 <= v <= 1 for v in getattr(a, name)):
            error(f"--{name} must lie in [0, 1], got {' '.join(map(str, getattr(a, name)))}")
    if not min(a.teacher_temp) > 0:
        error(f"--teacher-temp must be positive, got {' '.join(map(str, a.teacher_temp))}")
    if a.prototypes == "vmf" and a.method != "dino":
        error(f"--prototypes vmf has concentrations in units of DINO's temperatures; got --method {a.method}")
    if a.prototypes == "vmf" and a.bottleneck_dim < 3:
        error(f"--prototypes vmf needs --bottleneck-dim 3 or more, got {a.bottleneck_dim}")
    for name in ("global_scale", "local_scale"):
        lo, hi = getattr(a, name)
        if not 0 < lo <= hi <= 1:
            error(f"--{name.replace('_', '-')} needs 0 < LO <= HI <= 1, got {lo} {hi}")
    b, c, s, h = a.jitter
    if min(b, c, s, h) < 0 or h > 0.5:
        error(f"--jitter needs values of at least 0 and a hue of at most 0.5, got {b} {c} {s} {h}")
    if not 0 < a.eta_c < 0.99:
        error(f"--eta-c must lie in (0, 0.99), the range in which A.7 rises to 0.99, got {a.eta_c}")
    if a.prototypes == "live" and K < 2:
        error(f"--prototypes live needs --num-prototypes 2 or more, got {K}")
    if not 0 < a.live_eta < 1:
        error(f"--live-eta must lie in (0, 1), got {a.live_eta}")
    if not 0 <= a.resurrect < 1:
        error(f"--resurrect must lie in [0, 1), got {a.resurrect}")
    if not 0 <= a.drop_path < 1:
        error(f"--drop-path must lie in [0, 1), got {a.drop_path}")
    if a.imbalance < 1:
        error(f"--imbalance is largest class over smallest and must be at least 1, got {a.imbalance}")
    if a.method == "carp" and K % a.partition_size:
        error(f"--num-prototypes {K} must be a multiple of --partition-size {a.partition_size}")
    if a.method == "carp" and a.partition_size == 1:
        error("--partition-size 1 leaves a softmax over one prototype, which learns nothing; use 2 or more")
    if a.arch.startswith("vit"):
        for name in ["img_size"] + ["local_size"] * (a.local_crops > 0):
            if getattr(a, name) % a.patch_size:
                error(f"--{name.replace('_', '-')} {getattr(a, name)} must be a multiple of --patch-size "
                      f"{a.patch_size}")
    if a.arch == "vit_nano" and a.patch_size != 8:
        error(f"--arch vit_nano has a stem of patch size 8, got --patch-size {a.patch_size}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if a.batch_size % (a.accum * world):
        error(f"--batch-size {a.batch_size} must be a multiple of --accum {a.accum} times {world} processes")
    if a.head_bn and a.batch_size // a.accum < 2:
        error(f"--batch-size {a.batch_size} over --accum {a.accum} leaves one image, too few for --head-bn")
    if a.stop_at and a.steps and a.stop_at > a.steps:
        error(f"--stop-at {a.stop_at} lies beyond --steps {a.steps}")


def device(args, error):
    """cuda, mps or cpu for --device auto; an unavailable one is an error. MPS has no float64, as the mixture needs."""
    name, mixture = args.device, args.prototypes in ("decoupled", "live")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(d for d in ("cuda", "mps", "cpu") if there[d] and not (d == "mps" and mixture))
    kind = name.split(":")[0]
    if kind not in there:
        error(f"--device must be auto, cpu, cuda or mps, got {name}")
    if not there[kind]:
        error(f"--device {name}: torch {torch.__version__} finds no such device here")
    if kind == "mps" and mixture:
        error(f"--device mps has no float64, which --prototypes {args.prototypes} needs; use --device cpu")
    return name


def completed(old):
    """The args of a checkpoint as a Namespace; flags that are newer than it take their defaults."""
    args = argparse.Namespace(**{**vars(parser().parse_args([])), **old})
    complete(args)
    return args


def differences(old, new):
    """Flags that change what is computed and differ between a checkpoint's args and this run's: ["--lr 1 -> 2"]."""
    old = vars(completed(old))
    return [f"--{k.replace('_', '-')} {old.get(k)} -> {v}" for k, v in new.items() if k not in FREE and old.get(k) != v]
