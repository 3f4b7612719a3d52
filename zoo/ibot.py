"""iBOT (Zhou et al. 2022): train.py with a second stream, in which hidden patches are guessed.

    python -m zoo.ibot                                             iBOT
    python -m zoo.ibot --prototypes vmf                            iBOT-vMF
    python -m zoo.ibot --prototypes vmf --kp-weight 0.1            iBOT-vMF + KP (Table C.2)
    python -m zoo.ibot --patch-prototypes decoupled                the paper's mixture for patches
    python -m zoo.ibot --patch-weight 0 --mask-share 0             DINO on the same network

The student sees its two global crops with some patches replaced by a mask token. Its class tokens
have to agree with the teacher's, as in DINO. Its hidden patches have to agree with what the teacher
says of the same places of the clean crop:

    I.1  L_class = mean over pairs of crops i != j and images of -sum_k p_t,jk log p_s,ik
    I.2  L_patch = 1/2 sum over the two global crops of the mean over images of
                   1/max(n_hidden, 1) sum over its hidden patches of -sum_k p_t,k log p_s,k
    I.3  L = L_class + patch-weight L_patch

Patches have prototypes and targets of their own, of any kind that class tokens can have; with
--shared-prototypes both streams have one set. A set that follows the teacher (decoupled, live,
clustered) is fed the vectors of --patch-rows random places of each clean crop. Hidden places would
not do, as most lie in the middle, and all places are not needed, as patches of one image are alike.

differs: four things. By default the targets of both streams are balanced by Sinkhorn-Knopp, as in
DINOv2; under the centre of iBOT (--targets center) a run of this size did not begin to learn, with
patch-weight 1. By default patch-weight is 0.1, where iBOT has 1: at the start the patches' gradient
is several times as long as that of class tokens, which then learn late or never in a run of this
size (docs/ibot.md). By default class tokens and patches have a set of prototypes each, where iBOT's
recipes share one (--shared-prototypes). And iBOT's official code puts all patches through the head
and drops those that are not hidden. Here they are left out before the head, as in DINOv2, so the
centre of the patch stream is a mean over hidden patches alone.

The phases are those of train.py, each done for two streams; what differs besides is marked.
zoo/sop.py runs this loop too, with streams of its own.

    V views of B images on this process, 2 of them global; n patches of a global crop; D dimensions
    of h; K prototypes. A row (crop, place) names one patch: m rows of hidden patches in a step, R
    places drawn for prototypes, S = --patch-rows of each clean global crop of all processes. A
    micro-batch has b = B / accum images, and m_b rows of hidden patches
"""
import argparse
import copy
import os
from itertools import groupby

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import config
import data
import heads
import models
import presets
import views
from losses import DINOLoss
from support import checkpoint, checkpoints, ddp, measures, optim, runs
from support.errors import one_sentence
from support.flags import check_values
from support.log import Clock, Log, due, joined, of_set
from support.log import peak_memory, printed
from support.monitor import Monitor
from train import amp, cosine, start
from zoo.flags import check_not_read, narrow, warn_of_flat_targets
from zoo.kmeans import KMeans
from zoo.masks import hidden_patches, ibot_places, place_measures, rows_at

ROOT = os.path.dirname(os.path.abspath(config.__file__))
SCRIPT = os.path.relpath(os.path.abspath(__file__), ROOT)  # args.json names the script of a run

# Official recipes, for 16 and more GPUs; none of them was run. They share the rest with paper-vits
PRESETS = {}
PRESETS["paper-ibot-vits"] = dict(
    presets.PRESETS["paper-vits"], epochs=800, momentum=0.996, clip_grad=3.0, freeze_prototypes=1,
    num_prototypes=8192, shared_prototypes=True, norm_last_layer=False, targets="center",
    teacher_temp=[0.04, 0.07], teacher_temp_epochs=30, patch_temp=[0.04, 0.07],
    global_scale=[0.25, 1.0], local_scale=[0.05, 0.25], patch_weight=1.0)
PRESETS["paper-ibot-vitb"] = dict(
    PRESETS["paper-ibot-vits"], arch="vit_base", epochs=400, lr=7.5e-4, min_lr=2e-6, clip_grad=0.3,
    freeze_prototypes=3, global_scale=[0.32, 1.0], local_scale=[0.05, 0.32])


# ---- what iBOT adds to the command line --------------------------------------------------------
def patch_flags(parser):
    """Flags that the loop below needs, whatever its streams are. Returns what adds a flag to their
    group."""
    on_off = argparse.BooleanOptionalAction
    flag = parser.add_argument_group("patches (results)").add_argument
    flag("--mask-ratio", type=float, nargs=2, default=[0.1, 0.5], metavar=("LO", "HI"),
         help="largest share of its patches that a masked crop hides, drawn from this range")
    flag("--mask-share", type=float, default=0.5, help="share of the global crops that are masked")
    flag("--patch-weight", type=float, default=1.0,
         help="weight of the patches in the loss; 0: class tokens alone")
    flag("--num-patch-prototypes", type=int, metavar="K",
         help="--num-prototypes of the patches; None: four times as many, or as many with "
         "--shared-prototypes and in SOP")
    flag("--shared-head", action=on_off, default=True,
         help="one projection head for class tokens and patches")
    flag("--patch-rows", type=int, default=4, metavar="S",
         help="places of each clean crop whose vectors move prototypes that follow the teacher, "
         "enter a memory or --place-mean")
    flag("--place-mean", action=on_off, default=False,
         help="subtract the running mean of patch vectors at each place of the grid; else a "
         "prototype may come to stand for a place and not for content")
    return flag


def flags(parser):
    flag = patch_flags(parser)
    flag("--patch-prototypes", choices=list(heads.PROTOTYPES),
         help="kind of the patches' prototypes; None: that of --prototypes")
    flag("--shared-prototypes", action=argparse.BooleanOptionalAction, default=False,
         help="one set of prototypes for class tokens and patches, as in iBOT's recipes")
    flag("--patch-targets", choices=["center", "prob", "sinkhorn"],
         help="--targets of the patches; None: as --targets, but sinkhorn if that is prob, which "
         "is made for vmf, and the patches' kind is neither vmf nor that of class tokens")
    flag("--patch-temp", type=float, nargs=2, metavar=("START", "END"),
         help="--teacher-temp of the patches; None: that of --teacher-temp")
    flag("--patch-kp-weight", type=float,
         help="--kp-weight of the patches; None: --kp-weight if patches are kp or of the kind of "
         "class tokens, else 0; if --kp-weight is not typed either, kp has 0.1")
    parser.complete = complete
    narrow(parser, PRESETS, {"method": ["ibot"], "student_prototypes": ["same"]},
           {"targets": "what keeps the teacher's vectors from all falling on one prototype; None: "
                       "prob for vmf, else sinkhorn"})
    parser.set_defaults(prototypes="joint", num_prototypes=64,
                        arch="vit_micro", patch_size=4, head_bn=False, head_norm=True, epochs=8.0,
                        batch_size=32, lr=0.004, momentum=0.99, eval_every=312,
                        patch_weight=0.1)


def complete(args):
    """As config.complete; what nobody says of the patches is what class tokens have, or goes with
    their kind. Of the two kinds' defaults for --gmm-start, the later one counts for both."""
    typed_kp_weight, typed_start = args.kp_weight, args.gmm_start

    def default(name, value):
        if getattr(args, name) is None:
            setattr(args, name, value)
    of_kind = heads.prototype_class(args.prototypes).targets_of_dino
    default("targets", "sinkhorn" if of_kind == "center" else of_kind)
    config.complete(args)
    default("patch_prototypes", args.prototypes)
    default("num_patch_prototypes", args.num_prototypes * (1 if args.shared_prototypes else 4))
    default("patch_temp", args.teacher_temp)
    same_kind = args.patch_prototypes == args.prototypes
    kind = heads.prototype_class(args.patch_prototypes)
    # the targets of vMF are for vMF alone, unless somebody types them
    prob_of_vmf_alone = args.targets == "prob" and not same_kind and kind.targets_of_dino != "prob"
    default("patch_targets", "sinkhorn" if prob_of_vmf_alone else args.targets)
    if kind.kp_weight and not same_kind:
        default("patch_kp_weight", kind.kp_weight if typed_kp_weight is None else typed_kp_weight)
    default("patch_kp_weight", args.kp_weight if same_kind else 0.0)
    if typed_start is None:
        args.gmm_start = max(args.gmm_start, config.start_of(kind, args.gmm_init))


def parse(argv=None):
    """argv -> checked Namespace; bad input is one sentence and exit code 2."""
    args = config.parse(argv, SCRIPT, flags)
    with one_sentence(SCRIPT, args.out):
        check(args)
    return args


# of patch_flags: (what a value must be, test, flags); see support/flags.py
RANGES = [
    ("be at least 1", lambda v: v >= 1, ["patch_rows"]),
    ("be at least 2", lambda v: v >= 2, ["num_patch_prototypes"]),
    ("not be negative", lambda v: v >= 0, ["patch_weight"]),
    ("lie in [0, 1]", lambda v: 0 <= v <= 1, ["mask_share"]),
]


def check_patches(args):
    """ValueError for values of patch_flags, and of flags of train.py, with which no patch can be
    hidden."""
    check_values(args, RANGES)
    lo, hi = args.mask_ratio
    if not 0 <= lo <= hi <= 1:
        raise ValueError(f"--mask-ratio needs 0 <= LO <= HI <= 1, got {lo} {hi}")
    if not args.mask_share and args.patch_weight:
        raise ValueError(f"--mask-share 0 hides no patch, and --patch-weight {args.patch_weight:g} "
                         "then changes nothing; type --patch-weight 0 too")
    if args.arch == "vit_nano":
        raise ValueError("--arch vit_nano has a convolutional stem, through which its neighbours "
                         "see 39 of the 64 pixels of a hidden patch; use vit_micro, whose patches "
                         "do not overlap")
    if args.arch not in models.VITS:
        raise ValueError(f"a hidden patch needs a ViT, got --arch {args.arch}")
    if args.img_size // args.patch_size < 4:
        raise ValueError(f"--img-size {args.img_size} in patches of {args.patch_size} is a grid of "
                         "fewer than 4 x 4, too coarse to hide blocks of it")
    n = (args.img_size // args.patch_size) ** 2
    if args.mask_share and hi * n < 1:
        raise ValueError(f"--mask-ratio {lo} {hi} of {n} patches hides less than one")
    if args.head_bn and not args.shared_head:
        raise ValueError("--head-bn with --no-shared-head: the patches' head would normalise over "
                         "the hidden patches of a batch, and there may be a single one")


def check_trained(weight_flag, weight, kind_flag, kind):
    """ValueError for a weight of KoLeo above 0 where no loss trains the prototypes."""
    if weight and not issubclass(heads.prototype_class(kind), heads.Joint):
        raise ValueError(f"--{weight_flag} {weight} changes nothing with --{kind_flag} {kind}, "
                         "which no loss trains")


def check(args):
    """ValueError for values that cannot run."""
    check_not_read(args, flags, ["uniformity", "queue"], SCRIPT)
    check_patches(args)
    of_patches = heads.prototype_class(args.patch_prototypes)
    if not (args.place_mean or of_patches.follows_the_teacher()):
        check_not_read(args, flags, ["patch_rows"],
                       f"{SCRIPT} with --patch-prototypes {args.patch_prototypes} and without "
                       "--place-mean")
    check_values(args, [("be positive", lambda v: v > 0, ["patch_temp"]),
                        ("not be negative", lambda v: v >= 0, ["patch_kp_weight"])])
    if args.kp_weight != args.patch_kp_weight:
        check_trained("kp-weight", args.kp_weight, "prototypes", args.prototypes)
    check_trained("patch-kp-weight", args.patch_kp_weight, "patch-prototypes",
                  args.patch_prototypes)
    start, end = args.patch_temp
    if start != end and not args.teacher_temp_epochs:
        raise ValueError(f"--patch-temp {start} {end}: START counts only with "
                         "--teacher-temp-epochs; without it, type one value twice")
    of_patches = (args.patch_prototypes, args.num_patch_prototypes, args.patch_kp_weight)
    if args.shared_prototypes and of_patches != (args.prototypes, args.num_prototypes,
                                                 args.kp_weight):
        raise ValueError("--shared-prototypes is one set: --patch-prototypes, "
                         "--num-patch-prototypes and --patch-kp-weight cannot differ from it")
    for stream, kind, targets in (("", args.prototypes, args.targets),
                                  ("patch-", args.patch_prototypes, args.patch_targets)):
        cls = heads.prototype_class(kind)
        if cls.only_with:
            owner = "python -m zoo.sop" if cls.only_with == "sop" else f"--method {cls.only_with}"
            raise ValueError(f"--{stream}prototypes {kind} belongs to {owner}")
        if issubclass(cls, KMeans) and (stream or args.shared_prototypes):
            raise ValueError(f"--{stream}prototypes {kind} holds vectors of images, and patches "
                             "are none")
        if issubclass(cls, heads.Decoupled) and targets != "sinkhorn":
            raise ValueError(f"--{stream}prototypes {kind} under a centre: in Table C.3 of the "
                             "paper this costs DINO 41 points of k-NN with the mixture of Appendix "
                             f"A; use --{stream}targets sinkhorn")
    if args.targets == "sinkhorn" and args.num_prototypes > 2 * args.batch_size:
        raise ValueError(f"--targets sinkhorn shares {2 * args.batch_size} class tokens among "
                         f"--num-prototypes {args.num_prototypes}: no prototype gets a whole one; "
                         "use --num-prototypes of at most twice --batch-size; patches may have "
                         "more (--num-patch-prototypes)")


# ---- network -----------------------------------------------------------------------------------
class Network(models.MultiCrop):
    """Backbone and head; the student's has a mask token beside the backbone, which stays timm's.

    patch_head: the head of patches; None: that of class tokens.
    """

    def __init__(self, backbone, head, patch_head=None, student=False):
        super().__init__(backbone, head)
        self.patch_head = patch_head
        self.mask_token = nn.Parameter(torch.zeros(1, backbone.dim)) if student else None

    def forward(self, crops, hidden=None, rows=None):
        """V crops (B, 3, s, s) -> h of class tokens (V*B, D); with rows, of patches (m, D) too.

        hidden (2B, n): patches of the two global crops that the mask token replaces; None: none.
        rows (m, 2): which patches are wanted, as (crop of the 2B, place). Raises ValueError without
        crops.
        """
        if rows is None:
            return super().forward(crops)
        token = None if hidden is None else self.mask_token
        cls, patches = self.backbone(torch.cat(crops[:2]), mask=hidden, mask_token=token)
        cls = [cls]  # (2B, dim)
        for _, alike in groupby(crops[2:], lambda crop: crop.shape[-2:]):  # those of one size
            cls.append(self.backbone(torch.cat(tuple(alike)))[0])  # (views alike * B, dim)
        cls, patches = torch.cat(cls), patches[rows[:, 0], rows[:, 1]]  # (V*B, dim) (m, dim)
        if self.patch_head is not None:
            return self.head(cls), self.patch_head(patches)
        h = self.head(torch.cat([cls, patches]))  # (V*B + m, D)
        return h[:len(cls)], h[len(cls):]


def network(args, drop_path=0.0, student=False):
    """Backbone and heads as the flags say, a function of the seed."""
    net = checkpoint.network(args, drop_path)
    head = None if args.shared_head else heads.Head(
        net.backbone.dim, args.head_hidden, args.bottleneck_dim, args.head_bn, args.head_norm)
    return Network(net.backbone, net.head, head, student)


# ---- the patch stream --------------------------------------------------------------------------
class PatchLoss(DINOLoss):
    """I.2 for hidden patches. Targets are those of DINOLoss, of vectors (m, D); their number m may
    differ between processes, and be zero."""

    def move_centre(self, x):
        # a mean over the patches of all processes, which may have different numbers of them
        total = ddp.all_reduce(torch.cat([x.sum(0), x.new_tensor([len(x)])]))  # (K + 1,)
        if total[-1] > 0:
            super().move_centre(total[None, :-1] / total[-1])

    def forward(self, h_s, p_t, weights, protos_s):
        """h_s (m, D), p_t (m, K), weights (m,): how much each patch counts -> a scalar."""
        z = protos_s.logits(h_s) / self.tau + protos_s.bias(self.tau)  # (m, K)
        return -(weights * (p_t * z.log_softmax(-1)).sum(-1)).sum()


def row_weights(hidden, rows):
    """Masks hidden (2b, n) and their rows (m, 2) -> (m,), the weights of I.2: a patch is one of the
    hidden ones of its crop, which is one of 2b crops."""
    n_hidden = hidden.sum(1)[rows[:, 0]]  # (m,)
    return 1 / (n_hidden * len(hidden)).float()


class PlaceMean(nn.Module):
    """The running mean of teacher vectors at each of the n places, taken off patch vectors. A step
    that is skipped for values that are not finite moves it all the same.

    Without it, prototypes that follow the patches may become places: the mutual information of
    component and place in the log says whether they did. on: False: vectors stay as they are.
    """

    def __init__(self, n, D, momentum=0.9, on=True):
        super().__init__()
        self.momentum, self.on = momentum, on
        self.register_buffer("mean", torch.zeros(n, D))

    def forward(self, h, places):
        """h (m, D) at places (m,) -> (m, D): unit vectors, or h as it is where this is off."""
        return F.normalize(h - self.mean[places], dim=1) if self.on else h

    @torch.no_grad()
    def update(self, h, places):
        """Take in the teacher vectors h (R, D) of all processes, at places (R,)."""
        if not self.on:
            return
        finite = torch.isfinite(h).all(1)  # (R,), as the run skips steps that are not finite
        h, places = h[finite], places[finite]
        count = torch.bincount(places, minlength=len(self.mean))  # (n,)
        total = torch.zeros_like(self.mean).index_add_(0, places, h.float())  # (n, D)
        now = total / count.clamp_min(1)[:, None]
        self.mean.lerp_(now, (1 - self.momentum) * (count > 0)[:, None])  # where any came


class Stream:
    """Prototypes and loss of one stream.

    A set without gradients needs no average: teacher is then the same object as student.
    """

    def __init__(self, student, loss):
        self.student, self.teacher, self.loss = student, student.twin(), loss


def streams(args, steps_per_epoch, gmm_start, device):
    """(class stream, patch stream); with --shared-prototypes they hold the same sets."""
    if args.patch_targets == "sinkhorn":
        n = (args.img_size // args.patch_size) ** 2
        hidden = args.batch_size * args.mask_share * sum(args.mask_ratio) * n  # about, in a step
        warn_of_flat_targets("num-patch-prototypes", args.num_patch_prototypes, hidden)
    # a set that both streams share takes in the vectors of both
    of_class = of_more_vectors(args, 1 + args.patch_rows) if args.shared_prototypes else args
    cls = Stream(heads.prototypes(of_class, gmm_start).to(device),
                 DINOLoss.from_args(args, steps_per_epoch).to(device))
    patch_loss = PatchLoss(args.num_patch_prototypes, steps_per_epoch, args.patch_targets,
                           args.patch_temp, args.teacher_temp_epochs, args.student_temp).to(device)
    if args.shared_prototypes:
        patch = copy.copy(cls)
        patch.loss = patch_loss
        return cls, patch
    protos = heads.prototypes(args_of_patches(args), gmm_start).to(device)
    return cls, Stream(protos, patch_loss)


def args_of_patches(args):
    """The flags of the patches' prototypes. They start at other random directions."""
    of_patches = of_more_vectors(args, args.patch_rows)
    of_patches.prototypes = args.patch_prototypes
    of_patches.num_prototypes = args.num_patch_prototypes
    of_patches.seed = args.seed + heads.SEED_OF_SECOND_SET
    of_patches.kp_weight = args.patch_kp_weight
    return of_patches


def of_more_vectors(args, times):
    """The flags of a set that takes in so many times the vectors of the class tokens in a step.

    Decoupled expects 2 batch_size vectors, and chooses gmm.py or fast/gmm.py by their number, so
    batch_size is multiplied. Clustered takes its rate as lr times batch_size, so lr is divided: its
    rate is that of class tokens.
    """
    new = copy.copy(args)
    new.batch_size, new.lr = args.batch_size * times, args.lr / times
    return new


def main(argv=None, parse=parse, make_streams=streams):
    """One training run. Returns its final metrics; bad input is one sentence and exit code 2.

    parse, make_streams: of a script with streams of its own, as zoo/sop.py.
    """
    return start(parse(argv), lambda *run: train(*run, make_streams))


def train(args, device, stop_request, make_streams):
    """make_streams: as `streams`, which are iBOT's."""
    # ---- images, networks, prototypes ----------------------------------------------------------
    images, test = ddp.first_process_first(lambda: data.load(
        args.data, root=args.data_root, seed=args.seed, img_size=args.img_size,
        imbalance=args.imbalance, imbalance_law=args.imbalance_law))
    bank = data.subset(images, args.eval_bank)
    queries = None if test is None else data.subset(test, args.eval_queries)
    recipe = config.recipe(args)
    steps_per_epoch, total, stop = config.lengths(args, len(images))
    args.data_seen = data.identity(images, args.data) | {"steps": total}  # compared by --resume
    gmm_start = args.gmm_start * total if args.gmm_start < 1 else args.gmm_start

    # differs from train.py: two streams, and networks with a mask token
    student = ddp.sync_batchnorm(network(args, args.drop_path, student=True)).to(device)
    teacher = ddp.sync_batchnorm(network(args)).to(device).requires_grad_(False)
    teacher.load_state_dict(student.state_dict(), strict=False)  # the teacher has no mask token
    if args.compile:  # in place, so that the parameters keep their names
        student.backbone.compile()
        teacher.backbone.compile()
    cls, patch = make_streams(args, steps_per_epoch, int(gmm_start), device)
    shared = patch.teacher is cls.teacher  # --shared-prototypes
    sets = [cls] if shared else [cls, patch]
    loss_fn = nn.ModuleDict({"class": cls.loss, "patch": patch.loss})
    grid = args.img_size // args.patch_size
    place_mean = PlaceMean(grid ** 2, args.bottleneck_dim, on=args.place_mean).to(device)
    of_sets = [p for s in sets for p in s.student.parameters()]
    trained = [*student.parameters(), *of_sets, *loss_fn.parameters()]  # theta
    of_student = dict(student.named_parameters())
    averaged = [(phi, of_student[name]) for name, phi in teacher.named_parameters()]  # (phi, theta)
    averaged += [pair for s in sets for pair in zip(s.teacher.parameters(), s.student.parameters())]
    optimizer = optim.make(args, trained)

    # ---- start or go on ------------------------------------------------------------------------
    parts = {"student": student, "teacher": teacher, "loss": loss_fn, "optimizer": optimizer,
             "place_mean": place_mean}
    if not shared:
        parts |= {"patch_student": patch.student, "patch_teacher": patch.teacher}
    start, record = checkpoint.start_or_resume(args, parts, cls.student, cls.teacher)
    if start >= stop:
        ddp.print0(f"nothing left to do: step {stop} of {total} is done")
        return {}
    if args.init and start == 0:
        from support.export import init
        init(args.init, [student.backbone, teacher.backbone])
    take_step = optim.CheckedStep(optimizer, [student, teacher, loss_fn], args.clip_grad, of_sets,
                                  args.freeze_prototypes * steps_per_epoch)
    lr_peak = args.lr * args.batch_size / 256
    warmup = min(args.warmup_epochs * steps_per_epoch, total / 10)  # steps

    # a record with rows: the log's last row is there only because the run stopped at that step
    log = Log(args, start, drop_last=bool(record.rows))
    metrics = {}  # of the last evaluation
    monitor = Monitor(len(cls.teacher.vectors()), args.prototypes)
    ddp.print0(config.describe(args, images, student, total, lr_peak, device))
    if start == 0 and ddp.RANK == 0:
        log.row(0, measures.controls(bank, queries, args, teacher, device))
    batches = views.batches(images, recipe, batch_size=args.batch_size, seed=args.seed, start=start,
                            stop=stop, rank=ddp.RANK, world=ddp.WORLD, device=device,
                            workers=args.workers)
    bar = tqdm(total=total, initial=start, disable=None if ddp.RANK == 0 else True, unit="step",
               dynamic_ncols=True)
    clock = Clock()

    # ==== training ==============================================================================
    for step in range(start, stop):
        crops = clock.next(batches)  # V tensors (B, 3, s, s): 2 global crops, then the local ones
        B = len(crops[0])
        micro_batches = list(zip(*(crop.chunk(args.accum) for crop in crops)))  # accum tuples of V
        torch.manual_seed(views.seed_of(views.DROP_PATH, args.seed, step, ddp.RANK))
        if step < warmup:
            lr = lr_peak * step / warmup
        else:
            lr = cosine(lr_peak, args.min_lr, (step - warmup) / (total - warmup))
        weight_decay = cosine(args.weight_decay, args.weight_decay_end, step / total)
        m = cosine(args.momentum, args.momentum_end, step / total)
        beta = args.beta[0] + (args.beta[1] - args.beta[0]) * step / total  # Appendix B.1
        # differs from train.py: which patches are hidden, and which move prototypes
        hidden = hidden_patches(args, B, step, grid).to(device)  # (2, B, n)
        hidden_parts = [part.flatten(0, 1) for part in hidden.chunk(args.accum, 1)]  # (2b, n)
        rows_parts = [part.nonzero() for part in hidden_parts]  # (m_b, 2)
        all_places = ibot_places(args, step, grid ** 2).to(device)  # (2, batch_size, S)
        places = all_places.chunk(ddp.WORLD, 1)[ddp.RANK]  # (2, B, S)

        # ---- 1. teacher: h_t of clean class tokens and of patches, no gradient
        h_t, patch_t, sampled = [], [], []
        with torch.no_grad(), amp(args, device):
            for part, rows, place in zip(micro_batches, rows_parts, places.chunk(args.accum, 1)):
                h, h_patches = teacher(part[:2], rows=torch.cat([rows, rows_at(place)]))
                h_t.append(h.view(2, -1, args.bottleneck_dim))
                patch_t.append(h_patches[:len(rows)])
                sampled.append(h_patches[len(rows):].view(2, -1, args.bottleneck_dim))
        h_t = torch.cat(h_t, dim=1)  # (2, B, D)
        counts = [len(rows) for rows in rows_parts]
        where = torch.cat(rows_parts)[:, 1]  # (m,), places of the hidden patches
        patch_t = place_mean(torch.cat(patch_t), where)  # (m, D)
        raw = ddp.gather_views(torch.cat(sampled, dim=1))  # (R, D), of all processes
        sampled = place_mean(raw, all_places.flatten())  # (R, D)

        # ---- 2. prototypes: those that follow the teacher, one step each
        if shared:
            vectors = torch.cat([ddp.gather_views(h_t), sampled])  # (2 batch_size + R, D)
            report = cls.teacher.step(vectors, step, beta)
        else:
            report = cls.teacher.step(ddp.gather_views(h_t), step, beta)
            of_patches = patch.teacher.step(sampled, step, beta)
            report |= {f"patch_{name}": value for name, value in of_patches.items()}

        # ---- 3. encoder: theta = argmin L_f(h_theta, C^t), one step of the optimiser
        targets = cls.loss.targets(h_t, cls.teacher, step).chunk(args.accum, dim=1)
        patch_targets = patch.loss.targets(patch_t, patch.teacher, step).split(counts)
        for part, target, patch_target, hide, rows in zip(
                micro_batches, targets, patch_targets, hidden_parts, rows_parts, strict=True):
            with amp(args, device):
                h_s, patch_s = student(part, hide, rows)
            h_s = h_s.view(len(part), -1, args.bottleneck_dim)  # (V, B/accum, D)
            patch_s = place_mean(patch_s, rows[:, 1])  # (m_b, D)
            weights = row_weights(hide, rows)  # (m_b,), I.2
            terms = cls.loss(h_s, target, cls.student, cls.teacher, step)
            patch_term = patch.loss(patch_s, patch_target, weights, patch.student)
            terms = joined(terms, patch=args.patch_weight * patch_term,
                           penalty=sum(s.student.penalty() for s in sets))
            terms = joined(terms, loss=sum(terms.values()))
            (terms["loss"] / args.accum).backward()
            record.add(terms, 1 / args.accum)
        # If a value is not finite, `taken` is 0 and all processes keep weights and buffers as they
        # were. What phase 2 did is not undone
        values, taken = take_step(record.take(), step, lr, weight_decay)  # (terms + 1,) ()

        # ---- 4. teacher: phi = m phi + (1 - m) theta
        # after the optimiser's step, as in train.py
        with torch.no_grad():
            for phi, theta in averaged:
                phi.lerp_(theta, taken * (1 - m))
        place_mean.update(raw, all_places.flatten())

        # ---- 5. everything below is logging, evaluation, saving ---------------------------------
        done = step + 1
        bar.update()
        record.append(done, lr, values)
        leaving = ddp.largest(stop_request.number)  # a signal that any process received, or 0
        now = due(args, done, stop, total, leaving)
        if device.type == "cpu" or now.row or now.checkpoint:  # a GPU is waited for only then
            record.read()
        if now.row:
            row = joined(record.means(), report, clock.speed(args.batch_size), lr=lr, beta=beta,
                         epoch=done / steps_per_epoch, memory_mb=peak_memory(device))
            row = joined(row, loss_over_ln_k=row["cross_entropy"] / cls.loss.uniform)
            # the patch term of a uniform student: crops without a mask count 0
            scale = args.patch_weight * args.mask_share * patch.loss.uniform
            row["patch_over_ln_k"] = row["patch"] / scale if scale else None
            if now.evaluation:
                h, h_patch, at = coming_vectors(teacher, images, recipe, done, args, device)
                h_patch = place_mean(h_patch, at)
                if ddp.RANK == 0:
                    metrics = measures.prototype_measures(cls.teacher, cls.loss, h, beta, args.seed)
                    metrics |= patch_measures(patch, h_patch, at, beta, args.seed)
                    metrics["knn"] = measures.teacher_knn(bank, queries, args, teacher, device)
                    row |= metrics
                    metrics["pi_max"] = report.get("pi_max")  # None: no mixture, or not started
            if ddp.RANK == 0:
                log.row(done, row, terms)
                tqdm.write(printed(done, total, row, "cross_entropy"))
                if now.evaluation:
                    tqdm.write(printed_patches(row))
                troubles = monitor.warnings(row | {"progress": done / total})
                for sentence in troubles + monitor.new(patch_troubles(row)):
                    tqdm.write(f"warning, step {done}: {sentence}")
                for sentence in monitor.remarks(row):
                    tqdm.write(f"remark, step {done}: {sentence}")
        if now.regular:
            record.clear()
            clock.restart()
        if now.checkpoint:
            named = {} if shared else {"patch": patch.teacher}
            checkpoint.save(args, done, record, parts, cls.student, cls.teacher, named)
        if leaving:
            ddp.print0(f"step {done} is saved in {args.out}; go on with --resume")
            raise SystemExit(128 + leaving)  # 130 and 143, as a shell reports these signals
    bar.close()
    if ddp.RANK:
        return {}
    metrics = measures.summary(args, log, metrics, bank, queries, stop)
    print(printed_patches(metrics))
    return metrics


# ---- what an evaluation measures of the patches ------------------------------------------------
def coming_vectors(teacher, images, recipe, step, args, device):
    """As measures.coming_vectors, [h of class tokens, h of patches, places of these patches]: one
    place of each coming crop, drawn evenly over the grid."""
    n = (args.img_size // args.patch_size) ** 2

    def one_place_each(crops, step):
        place = ibot_places(args, step, n).chunk(ddp.WORLD, 1)[ddp.RANK][..., :1].to(device)
        return *teacher(crops[:2], rows=rows_at(place)), place.flatten()
    return measures.of_coming_batches(one_place_each, teacher, images, recipe, step, args, device,
                                      amp(args, device))


@torch.no_grad()
def patch_measures(patch, h, places, beta, seed):
    """{patch_NAME: value} of the patches' prototypes, for vectors h (N, D) at places (N,)."""
    found = measures.prototype_measures(patch.teacher, patch.loss, h, beta, seed)
    names = ("unique_0.025", "unique_0.5", "ceiling_0.5", "used", "perplexity", "drift", "h_rank",
             "h_cosine", "z_sd")
    found = {name: found[name] for name in names} | place_measures(
        patch.teacher, patch.loss, h, places, beta, seed)
    return {f"patch_{name}": value for name, value in found.items()}


def patch_troubles(row):
    """{kind: sentence} of what goes wrong with the patches' prototypes, for a row of the log; see
    Monitor.new."""
    names = ["patch_unique_0.025"]
    if row.get("patch_mixture_used") is None:  # means on the data are as unique as the data
        names.append("patch_unique_0.5")
    for name in names:
        share = row.get(name)
        if share is not None and share < 0.5:
            return {"patch collapse": (
                f"partial prototype collapse of the patches' set: {100 * share:.0f} % of its "
                f"prototypes are unique at eps {name.removeprefix('patch_unique_')}. "
                "--patch-prototypes frozen keeps them apart, as a control")}
    return {}


def printed_patches(row):
    return (f"     patches: {of_set(row, 'patch_')}\n"
            f"     patches: place {row['patch_place_nats']:.3f} nats "
            f"({row['patch_place_nats_shuffled']:.3f} shuffled)")


def load_run(path, add_flags=flags, loss_class=DINOLoss):
    """As runs.load_run: the teacher's class tokens, their prototypes and their loss."""
    ckpt = checkpoints.read(path)
    args = config.completed(ckpt["args"], add_flags)
    net, protos = network(args), heads.prototypes(args)
    net.load_state_dict(ckpt["teacher"])
    runs.restore(protos, ckpt)
    loss = loss_class.from_args(args, steps_per_epoch=1)
    loss.load_state_dict({name.removeprefix("class."): value for name, value in ckpt["loss"].items()
                          if name.startswith("class.")})
    return net.eval(), protos, loss, vars(args)


if __name__ == "__main__":
    main()
