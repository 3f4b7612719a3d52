"""Every flag, once.

A value comes from the command line; if it is not typed there, from the run that --resume goes on
with, else from the preset (presets.py), else from the default. Groups of flags marked (results)
change what is learned. Of the others, --seed and --preset do so too, and --amp and --compile change
how numbers are rounded. What a value may be stands in support/rules.py.
"""
import argparse
import json
import os

import data
import heads
import losses
import models
import views
from presets import PRESETS
from support import ddp, optim, rules
from support.flags import Help

# Flags that may differ between a run and its continuation: where it runs, what is printed and kept,
# and how numbers are rounded (amp, compile)
FREE = {"out", "device", "resume", "stop_at", "workers", "log_every", "eval_every", "eval_bank",
        "eval_queries", "data", "data_root", "amp", "compile", "save_every", "keep_every", "export",
        "timeout",
        "script", "data_version", "data_seen"}  # support/checkpoint.py compares the data itself


def parser(add_flags=None):
    """The command line of train.py; add_flags(parser): what a script adds to it, or changes."""
    p = argparse.ArgumentParser(
        "train.py", allow_abbrev=False, formatter_class=Help,
        description="Self-supervised learning with prototypes: "
                    f"{', '.join(losses.LOSSES)} x {', '.join(heads.PROTOTYPES)}.")
    on_off = argparse.BooleanOptionalAction
    p.presets, p.complete = dict(PRESETS), complete  # a script may have its own

    flag = p.add_argument_group("run").add_argument
    flag("--preset", default="tiny", choices=p.presets,
         help="values for many flags at once; a flag that you type wins over it")
    flag("--out", help="folder for ckpt.pt, log.csv and args.json; "
         "None: runs/PRESET-METHOD-PROTOTYPES-sSEED")
    flag("--seed", type=int, default=0,
         help="seed of weights, prototypes, partitions, order and crops; the built-in images have "
         "their own")
    flag("--device", default="auto",
         help="cpu, cuda or auto: cuda if it is there, else cpu")
    flag("--resume", action="store_true",
         help="go on from the newest complete checkpoint in OUT, if there is one, with its flags; "
         "a restart by torchrun does so anyway")
    flag("--stop-at", type=int,
         help="save and leave after this step; the schedules keep the length of --steps")
    flag("--save-every", type=int,
         help="steps between checkpoints; those at evaluations and at the end come on top")
    flag("--keep-every", type=int, help="steps between checkpoints that stay, as OUT/ckpt-STEP.pt")
    flag("--timeout", type=float, default=600,
         help="seconds without a word from another process after which a process leaves; must be "
         "longer than what the first one does alone, such as a download or an evaluation")
    flag("--export", metavar="FILE",
         help="write the teacher's backbone of the run in OUT under timm's names and leave; FILE "
         "ends in .pt, .pth or .safetensors (which needs that library)")

    flag = p.add_argument_group("data (results)").add_argument
    flag("--data", default="shapes",
         help=f"{', '.join(data.SETS)}, or a folder of images; shapes is built in")
    flag("--data-root", default="data", help="where downloaded sets lie")
    flag("--imbalance", type=float, default=1.0,
         help="long tail: images of the largest class over those of the smallest; the test split "
         "stays whole")
    flag("--imbalance-law", default="exp", choices=list(data.LAWS),
         help="sizes of classes: exp: each smaller than the one before by the same factor; power: "
         "(c + 1)^-a for class c")
    flag("--img-size", type=int, default=32, help="side of the two global crops, pixels")
    flag("--local-size", type=int, default=16, help="side of the local crops, pixels")
    flag("--local-crops", type=int, default=4,
         help="local crops per image, which the student alone sees; fewer are faster")
    flag("--global-scale", type=float, nargs=2, default=[0.4, 1.0], metavar=("LO", "HI"),
         help="share of the image that a global crop covers")
    flag("--local-scale", type=float, nargs=2, default=[0.15, 0.5], metavar=("LO", "HI"),
         help="share of the image that a local crop covers")
    flag("--jitter", type=float, nargs=4, default=[0.4, 0.4, 0.4, 0.2],
         metavar=("B", "C", "S", "H"), help="brightness, contrast, saturation, hue; strong enough "
         "that colour alone does not tell which crops belong together")
    flag("--jitter-p", type=float, default=0.8, help="share of the crops that are jittered")
    flag("--gray", type=float, default=0.3, help="share of the crops turned grey")
    flag("--blur", type=float, nargs=3, default=[0.0, 0.0, 0.0], metavar=("G1", "G2", "L"),
         help="share blurred: of first global, second global and local crops")
    flag("--solarize", type=float, nargs=3, default=[0.0, 0.0, 0.0], metavar=("G1", "G2", "L"),
         help="share solarized: of first global, second global and local crops")
    flag("--mean", type=float, nargs=3, default=list(views.MEAN), metavar=("R", "G", "B"),
         help="what is subtracted from pixels in [0, 1]; the default is ImageNet's")
    flag("--std", type=float, nargs=3, default=list(views.STD), metavar=("R", "G", "B"),
         help="what they are divided by then; timm's plain ViTs have 0.5 in both flags")

    flag = p.add_argument_group("model (results)").add_argument
    flag("--arch", default="vit_nano", choices=models.ARCHS,
         help="backbone; vit_nano has 3 blocks of width 96 behind a convolutional stem")
    flag("--patch-size", type=int, default=8,
         help="side of a ViT's patches, pixels; images and crops must be multiples of it")
    flag("--init", metavar="FILE",
         help="start both backbones from a run of ours, its --export, or weights of others that "
         "fit this --arch (docs/evaluation.md)")
    flag("--drop-path", type=float, default=0.0,
         help="share of the images for which a branch (attention or MLP) of the student's last "
         "block is left out; less in earlier blocks")
    flag("--head-hidden", type=int, default=256,
         help="width of the projection head (2048 in the papers)")
    flag("--bottleneck-dim", type=int, default=128,
         help="D, dimensions of h and of the prototypes (256 in the papers)")
    flag("--head-bn", action=on_off, default=True,
         help="batch norm in the head (in the papers: ResNets yes, ViTs no)")
    flag("--head-norm", action=on_off,
         help="h of length one; None: as `unit_h` of the method's class says, no for carp, carl, "
         "carp-uniform and supervised, and yes for our others, as published")

    flag = p.add_argument_group("method and prototypes (results)").add_argument
    flag("--method", default="carp", choices=list(losses.LOSSES),
         help="the loss; carl is carp with one block of K prototypes; deepcluster: labels from "
         "--prototypes kmeans; sop: for --prototypes bank; supervised uses the labels and shows "
         "what the network can reach (zoo/)")
    flag("--prototypes", default="decoupled", choices=list(heads.PROTOTYPES),
         help="joint: trained by the loss; kp: the same with KoLeo; vmf: the same with trained "
         "lengths (von Mises-Fisher), for --method dino; frozen: random, never moved; decoupled: "
         "means of the paper's online mixture; live: of a mixture of ours (zoo/live.py); kmeans: "
         "clustered once per pass (zoo/kmeans.py); clustered: trained by a loss of their own "
         "(zoo/clustered.py); bank: drawn from a memory, for --method sop (zoo/bank.py)")
    flag("--student-prototypes", default="same", choices=["same", "joint"],
         help="joint: the student has a set of its own that the loss trains, beside a set of the "
         "teacher that it does not (partial decoupling, Sec. 3 of the paper)")
    flag("--uniformity", type=float, default=0.05,
         help="weight of the term that --method carp-uniform adds (zoo/uniformity.py)")
    flag("--kp-weight", type=float,
         help="weight of KoLeo, which pushes trained prototypes apart; None: 0.1 (B.1) with kp, "
         "else 0")
    flag("--norm-last-layer", action=on_off, default=True,
         help="joint and kp keep prototypes at length one, as published; --no-norm-last-layer "
         "trains their lengths too")
    flag("--freeze-prototypes", type=float, default=0.0, metavar="EPOCHS",
         help="passes over the images before trained prototypes move (1 in DINO)")
    flag("--num-prototypes", type=int, default=1024, metavar="K",
         help="prototypes (65536 in the papers)")
    flag("--partition-size", type=int, default=128, metavar="P",
         help="prototypes per softmax of CARP (512 in its official code); carl has one of K")
    flag("--logit-scale", type=float, default=1.0,
         help="factor on all logits, an inverse temperature (1 in CARP)")
    flag("--proto-norm", default="unit", choices=["unit", "raw"],
         help="length of a mixture's means in the logits: one, or as they are")

    flag = p.add_argument_group("temperatures and targets of --method dino (results)").add_argument
    flag("--student-temp", type=float, default=0.1, help="temperature of the student's softmax")
    flag("--teacher-temp", type=float, nargs=2, metavar=("START", "END"),
         help="of the teacher's softmax or Sinkhorn-Knopp (Table C.3: 0.04 0.07; decoupled: 0.05 "
         "0.025); None: 0.025 0.025, with swav 0.05 0.05, with sop 0.04 0.04")
    flag("--teacher-temp-epochs", type=int, default=0,
         help="passes over which it goes from START to END")
    flag("--targets", choices=["center", "prob", "sinkhorn"],
         help="what keeps the teacher's vectors from all falling on one prototype: a centre of "
         "logits, a centre of log-probabilities, or Sinkhorn-Knopp; None: prob for vmf, else "
         "center")

    flag = p.add_argument_group("mixture of --prototypes decoupled (results)").add_argument
    flag("--gmm-init", default="random", choices=["features", "random"],
         help="what the means start from: random directions, most of which then never move, or "
         "teacher vectors, so that the means lie on the data")
    flag("--gmm-start", type=float,
         help="step at which the mixture starts, or below 1 the share of the run; random "
         "directions serve before it. None: 0; with --gmm-init features 0.75, since early in a "
         "run the vectors h change faster than the mixture follows; 0.5 for live")
    flag("--beta", type=float, nargs=2, default=[0.1, 0.5], metavar=("START", "END"),
         help="A.1, exponent of the density over the run; below 1 it softens the responsibilities")
    flag("--eta-a", type=float, default=0.001, help="A.7, how fast eta rises")
    flag("--eta-c", type=float, default=0.89, help="A.7, where eta starts")
    flag("--forgetting", default="responsibility", choices=["responsibility", "plain", "sample"],
         help="A.3, how a component forgets: responsibility: by how much the step uses it; plain: "
         "as all others (Table A.1, row 1); sample: vector by vector (zoo/sample_forgetting.py)")
    flag("--resurrect", type=float, default=0.3,
         help="weight above which a component is split; 0: never")
    flag("--rescale", action=on_off, default=True,
         help="A.6, shrink the mean of a component when it is split; nothing with --resurrect 0")
    flag("--var-floor", type=float, default=1e-3,
         help="smallest variance, as a share of the mean variance of the vectors of a step")

    flag = p.add_argument_group("mixture of --prototypes live, rules L.1 to L.5 of zoo/live.py "
                                "(results)").add_argument
    flag("--live-eta", type=float, default=0.95,
         help="L.3, forgetting per vector won: a mean remembers 1 / (1 - eta) vectors")
    flag("--live-patience", type=float, default=8.0,
         help="L.5, a mean restarts once it has won none of PATIENCE times K vectors")
    flag("--live-apart", type=float, default=0.026,
         help="L.4, cosine distance below which two means are twins; 0: they stay")

    flag = p.add_argument_group("memories of --method swav and --prototypes bank "
                                "(results)").add_argument
    flag("--queue", type=int, metavar="Q",
         help="vectors of each global view that join the batch in SwAV's Sinkhorn-Knopp; None: of "
         "the last 15 batches if K is above the batch, else 0")
    flag("--memory", type=int, metavar="M",
         help="vectors in the memory of bank; None: of the last 64 batches")
    flag("--neighbours", type=int, default=8,
         help="vectors of the memory of bank that lie nearest to an anchor and form one "
         "self-organising prototype with it")

    flag = p.add_argument_group("optimiser and schedules (results)").add_argument
    flag("--epochs", type=float, default=5.0, help="length of the run in passes over the images")
    flag("--steps", type=int, help="length of the run in steps, instead of --epochs")
    flag("--batch-size", type=int, default=64, help="images per step over all processes")
    flag("--accum", type=int, default=1,
         help="micro-batches per step: less memory, but batch norms, and CARP's entropy, see one "
         "micro-batch at a time")
    flag("--optimizer", default="adamw", choices=list(optim.OPTIMIZERS),
         help="lars and sgd: the papers' ResNets")
    flag("--lr", type=float, default=0.018,
         help="peak learning rate for 256 images; a run uses it times batch-size / 256")
    flag("--min-lr", type=float, default=0.0, help="end of the cosine, whatever the batch size")
    flag("--warmup-epochs", type=float, default=0.5,
         help="linear warm-up of lr; a tenth of the run where that is shorter")
    flag("--weight-decay", type=float, default=0.04,
         help="start of its cosine; biases and norms have none")
    flag("--weight-decay-end", type=float, default=0.04,
         help="end of its cosine (0.4 in the papers)")
    flag("--momentum", type=float,
         help="share of itself that the teacher keeps in a step; None: 0.98, with dino 0.99, and 0 "
         "with swav and deepcluster, whose teacher is the student itself")
    flag("--momentum-end", type=float,
         help="what it rises to along a cosine; None: 1, and 0 with swav and deepcluster")
    flag("--clip-grad", type=float, default=3.0,
         help="largest gradient norm of one parameter tensor; 0: no clipping")

    flag = p.add_argument_group("speed, logging, evaluation").add_argument
    flag("--amp", action=on_off, default=True,
         help="bfloat16 in the networks on CUDA; never in mixture or softmax")
    flag("--compile", action="store_true",
         help="torch.compile for the backbones; takes minutes at the start")
    flag("--workers", type=int, default=0,
         help="processes that decode images of folders too large for memory")
    flag("--log-every", type=int, default=52, help="steps between printed lines")
    flag("--eval-every", type=int, default=156, help="steps between evaluations and checkpoints")
    flag("--eval-bank", type=int, default=10000,
         help="training images that vote in k-NN, and about how many global crops of coming steps "
         "the prototype measures see")
    flag("--eval-queries", type=int, default=2000, help="held-out images that k-NN classifies")
    if add_flags:
        add_flags(p)
    return p


def parse(argv=None, script="train.py", add_flags=None):
    """argv -> checked Namespace. Flags that cannot run get one sentence and exit code 2.

    script: the script that runs, as args.json will name it: train.py or zoo/NAME.py.
    add_flags(parser): adds the flags that this script has on top, or changes defaults; --resume
    finds it as `flags` in the script. A script whose flags have defaults that depend on others
    replaces parser.complete too.
    """
    p = parser(add_flags)
    p.prog = script
    # a first look at the words that decide defaults: --preset, and the run to go on with
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="tiny")
    early.add_argument("--resume", action="store_true")
    typed = early.parse_known_args(argv)[0]
    p.set_defaults(**preset(typed.preset, p))
    if typed.resume:
        try:
            p.set_defaults(**flags_of_run(folder(p.parse_args(argv)), p))
        except ValueError as error:
            p.error(error)
    args = p.parse_args(argv)
    check_changes(args, p)
    p.complete(args)
    args.out = folder(args) if args.out is None else args.out
    rules.check(args, p.error)
    check_idle(args, p)
    args.device = rules.device(args, p.error)
    args.resume = args.resume or ddp.RESTARTS > 0
    if args.method == "carl":
        args.partition_size = args.num_prototypes
    args.script = script
    args.data_version = data.VERSIONS.get(args.data)  # None: images that are not made here
    return args


def preset(name, parser):
    """{flag: value} of a preset; a value that its flag cannot have ends with exit code 2."""
    values = {flag: list(value) if isinstance(value, tuple) else value
              for flag, value in parser.presets.get(name, {}).items()}
    actions = {action.dest: action for action in parser._actions}
    for flag, value in values.items():
        if flag not in actions:
            parser.error(f"--preset {name}: there is no flag {flag!r}")
        if not could_be(value, actions[flag]):
            parser.error(f"--preset {name}: {flag} cannot be {value!r}")
    return values


def folder(args):
    """Where a run is kept: --out, or a name from its flags."""
    return args.out or f"runs/{args.preset}-{args.method}-{args.prototypes}-s{args.seed}"


def recipe(args):
    """The crops that the flags ask for."""
    return views.Recipe(
        global_size=args.img_size, local_size=args.local_size, n_local=args.local_crops,
        global_scale=tuple(args.global_scale), local_scale=tuple(args.local_scale),
        jitter=tuple(args.jitter), jitter_p=args.jitter_p, gray_p=args.gray,
        blur_p=tuple(args.blur), solarize_p=tuple(args.solarize),
        mean=tuple(args.mean), std=tuple(args.std))


def lengths(args, n):
    """(steps of one pass over n images, steps of the run, step at which this process stops)."""
    steps_per_epoch = n // args.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {n} images of --data "
                         f"{args.data}")
    total = args.steps or max(1, round(args.epochs * steps_per_epoch))
    if args.stop_at and args.stop_at > total:
        raise ValueError(f"--stop-at {args.stop_at} lies beyond the {total} steps of this run")
    kinds = [args.prototypes, getattr(args, "patch_prototypes", args.prototypes)]
    has_mixture = any(issubclass(heads.prototype_class(kind), heads.Decoupled) for kind in kinds)
    if has_mixture and total <= args.gmm_start >= 1:
        raise ValueError(f"--gmm-start {args.gmm_start:g} lies beyond the {total} steps of this "
                         "run: the prototypes would never move")
    return steps_per_epoch, total, min(args.stop_at or total, total)


def describe(args, images, student, total, lr_peak, device):
    """What is about to run, in a few lines."""
    method = args.method if args.script == "train.py" else f"{args.script} ({args.method})"
    classes = "" if images.y is None else f" of {len(images.classes)} classes"
    parameters = sum(p.numel() for p in student.parameters()) / 1e6
    text = (f"{method} with {args.prototypes} prototypes on {args.data}: {len(images)} images"
            f"{classes}, {total} steps of {args.batch_size}, {ddp.WORLD} process(es) on {device}\n"
            f"{args.arch}, {parameters:.2f} M parameters, K {args.num_prototypes} x "
            f"D {args.bottleneck_dim}, peak lr {lr_peak:.2g}, out {args.out}")
    warmup = args.warmup_epochs * (len(images) // args.batch_size)  # steps
    if warmup > total / 10 and args.warmup_epochs != parser().get_default("warmup_epochs"):
        text += (f"\nwarm-up of lr: {total / 10:g} steps, a tenth of the run, as --warmup-epochs "
                 f"{args.warmup_epochs:g} is longer")
    if args.workers and hasattr(images, "x"):
        text += f"\n--workers {args.workers} is not used, as the images lie in memory"
    if images.y is None:
        text += "\nthe images carry no labels: k-NN is not measured"
    return text


def flags_of_run(out, parser):
    """The flags of the run in folder `out`, so that --resume does not need them typed again.

    {} if there are none to be read: the checkpoint has them too, and support/checkpoint.py
    compares. ValueError where args.json holds something else than train.py wrote.
    """
    path = os.path.join(out, "args.json")
    try:
        with open(path) as f:
            old = json.load(f)
    except (OSError, ValueError):
        return {}
    if not isinstance(old, dict):
        raise ValueError(f"--resume: {path} does not hold the flags of a run; remove it, and type "
                         "them again")
    here = ("help", "out", "device", "resume", "stop_at", "export")
    check_script(path, old, parser.prog)
    actions = [a for a in parser._actions if a.dest not in here and a.dest in old]
    for action in actions:
        value = old[action.dest]
        if could_be(value, action):
            continue
        flag = action.option_strings[0]
        if isinstance(value, str) and action.choices:
            raise ValueError(f"--resume: {path} says {flag} {value}, and this code has no such "
                             "choice: use the code that made the run")
        raise ValueError(f"--resume: {path} says {action.dest} = {value!r}, which cannot be; "
                         "remove it, and type the flags again")
    return {a.dest: old[a.dest] for a in actions}


def check_script(path, old, script):
    """ValueError where a run is of another script than the one that resumes it; old: the flags that
    the file at `path` holds."""
    of_run = old.get("script", "train.py")
    if not isinstance(of_run, str):
        raise ValueError(f"--resume: {path} says script = {of_run!r}, which cannot be; remove it, "
                         "and type the flags again")
    if of_run != script:
        module = of_run.removesuffix(".py").replace("/", ".").replace(os.sep, ".")
        by = "python train.py" if of_run == "train.py" else f"python -m {module}"
        raise ValueError(f"--resume: {path} is of a run of {of_run}, not of {script}: go on with "
                         f"{by} --resume")


def could_be(value, action):
    """Whether a value from a file has the form that a flag, an argparse action, has."""
    if value is None:
        return action.default is None
    if action.nargs and action.nargs != "?":  # several values: a number of them, or "+" or "*"
        of_one = argparse.Action([], action.dest, type=action.type, choices=action.choices)
        numbers = (len(value), "*", "+" if value else None) if isinstance(value, list) else ()
        return (action.nargs in numbers
                and all(v is not None and could_be(v, of_one) for v in value))
    kinds = {int: int, float: (int, float), None: str}
    is_switch = isinstance(action.default, bool) or action.nargs == 0
    kind = bool if is_switch else kinds.get(action.type, object)  # a fork may have another type
    if not isinstance(value, kind) or isinstance(value, bool) and not is_switch:
        return False
    return not action.choices or value in action.choices


def complete(args):
    """Flags whose default depends on another flag."""
    def default(name, value):
        if getattr(args, name) is None:
            setattr(args, name, value)
    loss, protos = losses.loss_class(args.method), heads.prototype_class(args.prototypes)
    default("head_norm", loss.unit_h)
    default("momentum", loss.teacher_momentum[0])
    default("momentum_end", loss.teacher_momentum[1])
    default("teacher_temp", list(loss.teacher_temp))
    default("targets", protos.targets_of_dino)
    default("kp_weight", protos.kp_weight)
    default("gmm_start", start_of(protos, args.gmm_init))


def start_of(protos, gmm_init):
    """The default of --gmm-start for a class of prototypes and a value of --gmm-init."""
    if protos.gmm_start is not None:
        return protos.gmm_start
    return 0.75 if gmm_init == "features" else 0.0


# What each loss and each prototype set reads, of the flags that not all of them read. One that is
# not here, as that of a fork, may read any. Sizes and lengths are left out, although CARP alone
# reads --partition-size and mixtures alone read --gmm-start: so the same sizes can be typed for
# every method and set
SOFTMAX = "student_temp teacher_temp teacher_temp_epochs"
READ_BY_METHODS = {
    "carp": "", "carl": "", "carp-uniform": "uniformity",
    "dino": f"{SOFTMAX} targets", "swav": f"{SOFTMAX} queue", "deepcluster": "student_temp",
    "sop": "student_temp teacher_temp", "supervised": ""}
TRAINED = "kp_weight freeze_prototypes"
READ_BY_PROTOTYPES = {
    "joint": f"{TRAINED} norm_last_layer", "kp": f"{TRAINED} norm_last_layer", "vmf": TRAINED,
    "decoupled": "gmm_init beta eta_a eta_c forgetting resurrect rescale var_floor proto_norm",
    "live": "live_eta live_patience live_apart", "bank": "memory neighbours",
    "frozen": "", "kmeans": "", "clustered": ""}


def not_read(method, kinds):
    """{flag: "--method NAME" or "--prototypes NAME and NAME", with which it is not read}.

    method: name of the loss; kinds: names of the prototype sets of a run.
    """
    result = {}
    for flag, table, names in (("--method", READ_BY_METHODS, [method]),
                               ("--prototypes", READ_BY_PROTOTYPES, kinds)):
        if all(name in table for name in names):
            read = [name for chosen in names for name in table[chosen].split()]
            result |= {name: f"{flag} {' and '.join(names)}" for of_one in table.values()
                       for name in of_one.split() if name not in read}
    return result


def check_changes(args, parser):
    """One sentence and exit code 2 for a typed flag that would change nothing in this run."""
    kinds = [getattr(args, of, None) for of in ("prototypes", "student_prototypes",
                                                "patch_prototypes")]
    kinds = [kind for kind in dict.fromkeys(kinds) if kind not in (None, "same")]
    for name, choice in not_read(args.method, kinds).items():
        if not hasattr(args, name):
            parser.error(f"READ_BY_METHODS or READ_BY_PROTOTYPES in config.py names {name!r}, and "
                         "there is no such flag")
        value = getattr(args, name)
        if value != parser.get_default(name):
            readers = [reader for table in (READ_BY_METHODS, READ_BY_PROTOTYPES)
                       for reader, flags in table.items() if name in flags.split()]
            parser.error(f"--{name.replace('_', '-')} changes nothing with {choice}; it is for "
                         f"{', '.join(readers)} (READ_BY_... in config.py says who reads it); "
                         f"got {value}")


def check_idle(args, parser):
    """One sentence and exit code 2 for a typed flag that another one switches off."""
    start, end = args.teacher_temp
    of_patches = getattr(args, "patch_temp", None) or [0, 0]
    is_flat = start == end and of_patches[0] == of_patches[1]
    for name, beside, idle in (
            ("epochs", f"--steps {args.steps}", args.steps),
            ("imbalance_law", "--imbalance 1", args.imbalance == 1),
            ("local_scale", "--local-crops 0", args.local_crops == 0),
            ("local_size", "--local-crops 0", args.local_crops == 0),
            ("patch_size", f"--arch {args.arch}", args.arch in models.RESNETS),
            ("jitter", "--jitter-p 0", args.jitter_p == 0),
            ("rescale", "--resurrect 0", args.resurrect == 0),
            ("teacher_temp_epochs", f"--teacher-temp {start} {end}", is_flat),
            ("mask_ratio", "--mask-share 0", getattr(args, "mask_share", None) == 0),
            ("prior", "--prior-weight 0", getattr(args, "prior_weight", None) == 0)):
        if idle and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} changes nothing with {beside}; "
                         f"got {getattr(args, name)}")


def completed(old, add_flags=None):
    """The args of a checkpoint as a Namespace; flags that are newer than it take their defaults.

    add_flags: as for `parse`, of the script that wrote it.
    """
    p = parser(add_flags)
    args = argparse.Namespace(**{**vars(p.parse_args([])), **old})
    p.complete(args)
    return args


def differences(old, new, add_flags=None):
    """Flags that change what is computed and differ between two runs' args: ["--lr 1 -> 2"].

    A value that a flag cannot have, as in a damaged file, differs from any. add_flags: as for
    `parse`, of the script that both runs are of.
    """
    old = vars(completed(old, add_flags))
    flags = {action.dest: action for action in parser(add_flags)._actions}

    def same(k):
        same_type = type(old.get(k)) is type(new[k])
        can_be = k not in flags or same_type or could_be(old.get(k), flags[k])
        return can_be and old.get(k) == new[k]
    changed = [k for k in new if k not in FREE and not same(k)]
    return [f"--{k.replace('_', '-')} {old.get(k)} -> {new[k]}" for k in changed]
