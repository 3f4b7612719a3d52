"""What the flags of a run may be: ranges of numbers, flags that have to agree, and the device."""
import torch

import heads
import losses
import models
from gmm import eta_at
from support import ddp
from support.flags import check_values

# (what a value must be, test, flags); see support/flags.py
RANGES = [
    ("be at least 1", lambda v: v >= 1,
     ["partition_size", "batch_size", "bottleneck_dim", "head_hidden",
      "patch_size", "local_size", "accum", "log_every", "eval_every", "eval_bank",
      "eval_queries", "steps", "stop_at", "save_every", "keep_every", "memory", "neighbours",
      "timeout"]),
    ("be at least 2", lambda v: v >= 2, ["img_size", "num_prototypes"]),
    ("be positive", lambda v: v > 0,
     ["epochs", "lr", "logit_scale", "var_floor", "student_temp", "teacher_temp", "live_patience",
      "std"]),
    ("not be negative", lambda v: v >= 0,
     ["seed", "warmup_epochs", "min_lr", "weight_decay", "weight_decay_end", "clip_grad",
      "gmm_start", "eta_a", "kp_weight", "freeze_prototypes", "teacher_temp_epochs", "live_apart",
      "jitter", "queue", "uniformity"]),
    ("lie in [0, 1000]", lambda v: 0 <= v <= 1000, ["local_crops", "workers"]),
    ("lie in [0, 1]", lambda v: 0 <= v <= 1,
     ["jitter_p", "gray", "momentum", "momentum_end", "blur", "solarize", "beta", "mean"]),
    ("lie in [0, 1)", lambda v: 0 <= v < 1, ["resurrect", "drop_path"]),
    ("lie in (0, 1)", lambda v: 0 < v < 1, ["live_eta"]),
    ("lie in (0, 0.99), the range in which A.7 rises to 0.99", lambda v: 0 < v < 0.99, ["eta_c"]),
    ("be at least 1, as it is largest class over smallest", lambda v: v >= 1, ["imbalance"]),
]


def check(args, error):
    """Rules of the flags; error(sentence) does not return."""
    try:
        check_values(args, RANGES)
    except ValueError as sentence:
        error(sentence)
    K, batch = args.num_prototypes, args.batch_size
    loss, protos = losses.loss_class(args.method), heads.prototype_class(args.prototypes)
    # a method that LOSSES lacks is that of a script in zoo/, which checks this itself
    reads_bias = loss.reads_bias or args.method not in losses.LOSSES
    if issubclass(protos, heads.VMF) and not reads_bias:
        error(f"--prototypes {args.prototypes} has concentrations in units of DINO's temperatures; "
              f"got --method {args.method}")
    elif protos.bias is not heads.Frozen.bias and not reads_bias:
        error(f"--prototypes {args.prototypes} has a `bias`, which --method {args.method} does not "
              "read (`reads_bias` of its class)")
    if issubclass(protos, heads.VMF) and args.bottleneck_dim < 3:
        error(f"--prototypes {args.prototypes} needs --bottleneck-dim 3 or more, got "
              f"{args.bottleneck_dim}")
    if not 0 < eta_at(0, args.eta_a, args.eta_c) < 1:
        error(f"--eta-c {args.eta_c} is so small that the forgetting factor of the first step is 0")
    if loss.only_with and not issubclass(protos, heads.prototype_class(loss.only_with)):
        error(f"--method {args.method} takes its targets from --prototypes {loss.only_with}; got "
              f"--prototypes {args.prototypes}")
    if protos.only_with and not issubclass(loss, losses.loss_class(protos.only_with)):
        error(f"--prototypes {args.prototypes} belongs to --method {protos.only_with}; got "
              f"--method {args.method}")
    if args.student_prototypes == "joint" and (issubclass(protos, heads.Joint)
                                               or not protos.countable):
        error("--student-prototypes joint stands beside prototypes that the loss does not train, "
              f"and that stay for longer than a step; got --prototypes {args.prototypes}")
    for name in ("global_scale", "local_scale"):
        lo, hi = getattr(args, name)
        if not 0 < lo <= hi <= 1:
            error(f"--{name.replace('_', '-')} needs 0 < LO <= HI <= 1, got {lo} {hi}")
    b, c, s, h = args.jitter
    if h > 0.5:
        error(f"--jitter needs a hue of at most 0.5, got {b} {c} {s} {h}")
    has_partitions = issubclass(loss, losses.CARPLoss) and args.method != "carl"
    if has_partitions and K % args.partition_size:
        error(f"--num-prototypes {K} must be a multiple of --partition-size {args.partition_size}")
    if has_partitions and args.partition_size == 1:
        error("--partition-size 1 leaves a softmax over one prototype, which learns nothing; use 2 "
              "or more")
    if args.arch in models.VITS:
        for name in ["img_size"] + ["local_size"] * (args.local_crops > 0):
            if getattr(args, name) % args.patch_size:
                error(f"--{name.replace('_', '-')} {getattr(args, name)} must be a multiple of "
                      f"--patch-size {args.patch_size}")
    if args.arch == "vit_nano" and args.patch_size != 8:
        error(f"--arch vit_nano has a stem of patch size 8, got --patch-size {args.patch_size}")
    if batch % (args.accum * ddp.WORLD):
        error(f"--batch-size {batch} must be a multiple of --accum {args.accum} times "
              f"{ddp.WORLD} processes")
    if args.head_bn and batch // args.accum < 2:
        error(f"--batch-size {batch} over --accum {args.accum} leaves one image, too few for "
              "--head-bn")
    start, end = args.teacher_temp
    if start != end and not args.teacher_temp_epochs:
        error(f"--teacher-temp {start} {end}: START counts only with --teacher-temp-epochs, the "
              "passes over which it becomes END; without it, type one value twice")


def device(args, error):
    """cuda or cpu for --device auto; error(sentence) for one that is not there, or that has no
    float64, in which the mixture and the measures of prototypes are computed."""
    name, has_cuda = args.device, torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_cuda else "cpu"
    kind, _, number = name.partition(":")
    if kind == "cuda" and number and ddp.WORLD > 1:
        error(f"--device {name} names one GPU, and each of {ddp.WORLD} processes needs its own: "
              "use --device cuda")
    if kind == "mps":
        error("--device mps has no float64, in which the mixture and the measures of prototypes "
              "are computed; use --device cpu")
    if kind not in ("cpu", "cuda"):
        error(f"--device must be auto, cpu or cuda, got {name}")
    if kind == "cuda" and not has_cuda:
        error(f"--device {name}: torch {torch.__version__} finds no such device here")
    try:
        torch.empty(0, device=name)  # it may have a number, as in cuda:1
    except (RuntimeError, AssertionError):
        error(f"--device {name} does not work here")
    return name
