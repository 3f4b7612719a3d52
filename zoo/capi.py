"""CAPI (Darcet et al. 2025): the clusters of hidden patches are guessed from the visible ones.

    python -m zoo.capi                              CAPI at a size for a small machine
    python -m zoo.capi --prototypes frozen          control: the teacher's clusters never move
    python -m zoo.capi --prototypes decoupled       the mixture of Appendix A in their place
    python -m zoo.capi --student-prototypes frozen --out runs/capi-frozen-student
                                                    control: the student's prototypes never move

This is where the idea of "Why Prototypes Collapse" comes from (its Sec. 2.2). There is one view of
an image. The teacher sees all of it, and its patches are clustered. The student's encoder sees only
some of the patches. From these a predictor guesses the clusters of some of the hidden patches.

There are two sets of K prototypes, which the targets tie together, index by index:

    the teacher's clusters    W (K, D) and b (K,). CA.3 alone trains them, with an optimiser of its
                              own, so the student's loss never touches them: they are decoupled
    the student's prototypes  V (K, D) and their lengths g (K,). CA.5 trains them with the student,
                              so they are joint. "Why Prototypes Collapse" counted the running
                              average of this set, as the released files lack the clusters

The numbers of the equations are ours:

    CA.1  l = W x/|x| + b                       for each patch token x of the teacher
    CA.2  a = Sinkhorn-Knopp of l / 0.06        at each place of the grid on its own: over the
                                                images of a step all clusters get about the same
                                                total there
    CA.3  L_clusters = mean over images and places of -sum_k a_k log softmax(l / 0.12)_k
    CA.4  s_k = g_k <v_k/|v_k|, z/|z|>          for each guess z of the student
    CA.5  L_student = mean over images and guessed places of -sum_k a_k log softmax(s / 0.12)_k
    CA.6  learning rate: a line up to its peak r over a tenth of the run, then
          r_end + (r - r_end) (1 + cos(0.8 pi u)) / 2 with u from 0 to 1. The clusters learn at half
          of it, with a weight decay of 0.01 and without clipping
    CA.7  momentum of the teacher: 1 - c times the student's learning rate

r is --lr times the batch size over 256, r_end is --min-lr, u the share that is done of what follows
the rise, and c is --ema-per-lr.

Equation 5 of CAPI's paper has target and guess the other way round; its code is as here.

The loop has the shape of train.py's. Its phases 1 and 3 work on patch tokens, without a head, and
phase 5 is new; other differences are marked. The clusters move last, as in CAPI's code, so the
targets of a step come from clusters that last moved in the step before. b drops out of CA.2, which
takes off whatever all logits of a cluster have in common: CA.3 and the measures alone see it.

    B images on this process; n patches of an image, v of them visible, q to be guessed; R registers
    D dimensions of a token; K prototypes
"""
import copy
import math
import os

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import config
import data
import heads
import views
from losses import Loss, sinkhorn
from support import checkpoint, checkpoints, ddp, measures, optim, runs
from support.errors import one_sentence
from support.flags import check_values
from support.log import Clock, Log, due, joined, of_set
from support.log import peak_memory, printed
from support.monitor import Monitor
from train import amp, cosine, start
from zoo.flags import check_not_read, narrow, warn_of_flat_targets
from zoo.masks import capi_places, place_measures, visible_and_predicted
from zoo.rope_vit import Backbone, Predictor, take

ROOT = os.path.dirname(os.path.abspath(config.__file__))
SCRIPT = os.path.relpath(os.path.abspath(__file__), ROOT)  # args.json names the script of a run
TAU_TARGETS, TAU = 0.06, 0.12  # temperatures: of CA.2, and of the softmax in CA.3 and CA.5
CLUSTER_RATE, CLUSTER_DECAY = 0.5, 0.01  # CA.6; CAPI's code leaves the decay at AdamW's default

ENCODERS = {  # --arch: (dim, depth, heads, depth of the predictor)
    "capi_micro": (96, 3, 3, 2),
    "capi_small": (384, 12, 6, 6),
    "capi_base": (768, 12, 12, 6),
    "capi_large": (1024, 24, 16, 12),
}

# The official recipe, for 32 GPUs; it was not run. lr is 1e-3 at 16,384 images
PRESETS = {}
PRESETS["paper-capi-vitl"] = dict(
    data="imagenet", arch="capi_large", patch_size=14, img_size=224, drop_path=0.2, registers=16,
    predicted_share=0.05, num_prototypes=16384, batch_size=16384, epochs=6400, lr=1.5625e-5,
    ema_per_lr=1.0, workers=10, log_every=100, eval_every=5000, eval_bank=50000,
    eval_queries=10000)


# ---- what CAPI adds to the command line --------------------------------------------------------
def flags(parser):
    flag = parser.add_argument_group("CAPI (results)").add_argument
    flag("--hidden-share", type=float, default=0.65,
         help="share of the patches that the student does not see")
    flag("--predicted-share", type=float, default=0.25,
         help="share of the hidden patches that are guessed (0.05 in CAPI's code)")
    flag("--sinkhorn", default="place", choices=["place", "all"],
         help="CA.2: at each place on its own, as published, or over all patches of a step at once")
    flag("--positions", default="rope", choices=["rope", "learned"],
         help="rope: queries and keys are rotated by a patch's place; learned: a learned vector "
         "for each place is added")
    flag("--registers", type=int, default=4, metavar="R",
         help="learned tokens beside the patches: a multiple of 4, as equally many stand along "
         "each of the four sides (16 in CAPI)")
    flag("--ema-per-lr", type=float, default=10.0, metavar="C",
         help="CA.7: the teacher's momentum is 1 - C times the learning rate (1 in CAPI's long "
         "runs), so --lr and --batch-size change it too; a short run needs a teacher that follows "
         "faster")
    flag("--patch-rows", type=int, default=4, metavar="S",
         help="patches of each image, drawn at random, that --prototypes decoupled takes in; other "
         "sets do not read it")
    narrow(parser, PRESETS, CHOICES, HELP)
    parser.set_defaults(
        prototypes="clustered", student_prototypes="joint", arch="capi_micro",
        patch_size=4, num_prototypes=256, local_crops=0, global_scale=[0.6, 1.0], jitter_p=0.0,
        gray=0.0, head_bn=False, lr=0.008, weight_decay=0.1, weight_decay_end=0.1, clip_grad=0.0,
        epochs=8.0)


CHOICES = {"method": ["capi"], "arch": list(ENCODERS), "student_prototypes": ["joint", "frozen"],
           "prototypes": ["clustered", "frozen", "decoupled"]}
HELP = {
    "arch": "dim, depth and heads of the encoder, and depth of the predictor: see ENCODERS",
    "prototypes": "the teacher's clusters: clustered, as published; frozen: those that a clustered "
                  "run starts from, never moved; decoupled: means of the mixture of Appendix A",
    "student_prototypes": "joint: trained by the student's loss, as published; frozen: never moved",
    "drop_path": "share of the images for which the student skips a branch of a block, the same in "
                 "all blocks",
    "weight_decay": "start of its cosine; gains of norms have a tenth of it, biases none",
    "min_lr": "r_end of CA.6; the last fifth of the half cosine is cut off, so the rate ends 0.095 "
              "(r - r_end) above it",
    "blur": "probability, for a view; the second and third number have to be 0",
    "solarize": "probability, for a view; the second and third number have to be 0",
    "img_size": "side of the view, pixels",
    "global_scale": "share of the image that the view covers",
}

# Flags of train.py that cannot be chosen here. Nothing reads most of them; D, --logit-scale and
# --proto-norm have the one value that equation CA.1 needs
NOT_READ = """init export compile accum local_size local_crops local_scale head_hidden head_bn
    head_norm bottleneck_dim partition_size kp_weight norm_last_layer freeze_prototypes uniformity
    logit_scale proto_norm student_temp teacher_temp teacher_temp_epochs targets live_eta
    live_patience live_apart queue memory neighbours optimizer warmup_epochs momentum
    momentum_end""".split()
HELP |= dict.fromkeys(NOT_READ, "not to be chosen in this script")


def parse(argv=None):
    """argv -> checked Namespace; bad input is one sentence and exit code 2."""
    args = config.parse(argv, SCRIPT, flags)
    with one_sentence(SCRIPT, args.out):
        check(args)
    args.bottleneck_dim = ENCODERS[args.arch][0]  # D: there is no head behind the tokens
    args.logit_scale = args.bottleneck_dim ** 0.5  # see teacher_clusters
    return args


# (what a value must be, test, flags); see support/flags.py
RANGES = [
    ("lie in (0, 1]", lambda v: 0 < v <= 1, ["hidden_share", "predicted_share"]),
    ("not be negative", lambda v: v >= 0, ["ema_per_lr"]),
    ("be at least 1", lambda v: v >= 1, ["patch_rows"]),
]


def check(args):
    """ValueError for values that cannot run, and for flags that would change nothing."""
    # what parse sets after this check may be typed too, as --resume does
    own = {"bottleneck_dim": ENCODERS[args.arch][0], "logit_scale": ENCODERS[args.arch][0] ** 0.5}
    check_not_read(args, flags, [name for name in NOT_READ if getattr(args, name) != own.get(name)],
                   SCRIPT)
    if not issubclass(heads.prototype_class(args.prototypes), heads.Decoupled):
        check_not_read(args, flags, ["patch_rows"],
                       f"{SCRIPT} with --prototypes {args.prototypes}")
    for name in ("blur", "solarize"):
        if any(getattr(args, name)[1:]):
            raise ValueError(f"--{name} {' '.join(map(str, getattr(args, name)))}: a step has one "
                             "view here, so the second and third number have to be 0")
    check_values(args, RANGES)
    if args.registers < 0 or args.registers % 4:
        raise ValueError(f"--registers must be a multiple of 4, as equally many stand along each "
                         f"of the four sides of an image, got {args.registers}")
    largest_lr = max(args.lr * args.batch_size / 256, args.min_lr)
    if not args.ema_per_lr * largest_lr <= 1:
        raise ValueError(f"--ema-per-lr {args.ema_per_lr} times the largest learning rate "
                         f"{largest_lr:g} is above 1, and CA.7 would give the teacher a negative "
                         "momentum")
    if args.img_size % args.patch_size:
        raise ValueError(f"--img-size {args.img_size} must be a multiple of --patch-size "
                         f"{args.patch_size}")
    n = (args.img_size // args.patch_size) ** 2
    if not 0 < math.floor(args.hidden_share * n) < n:
        raise ValueError(f"--hidden-share {args.hidden_share} of {n} patches hides none or all of "
                         "them")


# ---- networks ----------------------------------------------------------------------------------
class Network(nn.Module):
    """Encoder and predictor. The teacher is a running average of both, and uses the encoder."""

    def __init__(self, args, drop_path=0.0):
        super().__init__()
        dim, depth, n_heads, predictor_depth = ENCODERS[args.arch]
        self.backbone = Backbone(
            args.arch, dim=dim, depth=depth, heads=n_heads, patch_size=args.patch_size,
            img_size=args.img_size, registers=args.registers, positions=args.positions,
            drop_path=drop_path)
        self.predictor = Predictor(dim, predictor_depth, n_heads, self.backbone.grid ** 2,
                                   args.positions, drop_path)

    def forward(self, x, visible, predicted):
        """x (B, 3, s, s), visible (B, v), predicted (B, q): places -> guesses z (B, q, D)."""
        registers, patches = self.backbone.tokens(x, visible)  # (B, R, D) (B, v, D)
        context = torch.cat([registers, patches], 1)  # (B, R + v, D)
        coords = self.backbone.coordinates(visible, len(x))  # (B, R + v, 2)
        of_all = self.backbone.coordinates(None, len(x))[:, registers.shape[1]:]  # (B, n, 2)
        return self.predictor(context, coords, take(of_all, predicted), predicted)


def network(args, drop_path=0.0):
    """Encoder and predictor as the flags say, a function of the seed."""
    torch.manual_seed(args.seed)
    return Network(args, drop_path)


def optimizer_of(modules):
    """(AdamW, [(factor of the learning rate, factor of the weight decay) of each group]).

    The projection of patches learns at a fifth of the rate. Parameters with "norm" in their name,
    the gains of norms, decay at a tenth, and biases not at all. All else decays, one-dimensional or
    not.
    """
    groups = {}
    for name, p in [named for module in modules for named in module.named_parameters()]:
        rate = 0.2 if "patch_embed" in name else 1.0
        decay = 0.0 if name.endswith("bias") else 0.1 if "norm" in name else 1.0
        groups.setdefault((rate, decay), []).append(p)
    adamw = torch.optim.AdamW([{"params": params} for params in groups.values()], lr=0.0,
                              betas=(0.9, 0.95), fused=True)
    return adamw, list(groups)


# ---- the teacher's clusters --------------------------------------------------------------------
class LinearClusters(heads.Frozen):
    """W (K, D) from N(0, 1) and b (K,) from 0, which CA.3 trains.

    Rows of W are about sqrt(D) long, so that l has standard deviation 1 at the start for every D.
    """

    def __init__(self, K, D, seed=0):
        super().__init__(K, D, 1.0, seed)
        generator = torch.Generator().manual_seed(seed)
        self.W = nn.Parameter(torch.randn(K, D, generator=generator))  # (K, D)
        self.b = nn.Parameter(torch.zeros(K))
        self.start.copy_(F.normalize(self.W.detach(), dim=1))

    def vectors(self):
        # Def. 2.1 compares directions; lengths and biases stand beside it in the log
        return F.normalize(self.W.detach(), dim=1)

    def logits(self, h, ks=None):
        # CA.1; float32 also under autocast
        with torch.autocast(h.device.type, enabled=False):
            l = F.linear(F.normalize(h.float(), dim=-1), self.W, self.b)  # (..., K)
        return l if ks is None else l[..., ks]


def teacher_clusters(args, begin=0):
    """The set that --prototypes names; begin: the step at which a mixture starts.

    The sets of heads.py hold directions. --logit-scale is sqrt(D) here, which makes the rows that
    tokens are multiplied with as long as those of W are at the start.
    """
    if args.prototypes in ("clustered", "frozen"):
        # not the set of zoo/clustered.py, which is this rule in the loop of train.py
        clusters = LinearClusters(args.num_prototypes, args.bottleneck_dim, args.seed)
        return clusters.requires_grad_(args.prototypes == "clustered")
    of_clusters = copy.copy(args)
    # Decoupled takes 2 batch_size for the vectors of a step, and chooses its mixture by it
    of_clusters.batch_size = math.ceil(args.batch_size * args.patch_rows / 2)
    return heads.prototypes(of_clusters, begin)


@torch.no_grad()
def targets_of(l, args):
    """CA.2: a (B, n, K) of logits l (B, n, K), by the rule of --sinkhorn; rows sum to 1.

    Every cluster is scaled to the same total over the images of all processes, at each place by
    itself, or ("all") over all patches of a step, as if they stood at one place.
    """
    # differs: CAPI's code takes off each cluster's maximum, adds 50 and exponentiates, which comes
    # to the same
    if args.sinkhorn == "all":
        return sinkhorn(l.flatten(0, 1), TAU_TARGETS, all_reduce=ddp.all_reduce).view_as(l)
    return sinkhorn(l, TAU_TARGETS, all_reduce=ddp.all_reduce)


def cross_entropy(a, logits, bias=0.0):
    """CA.3 and CA.5: a (..., K) and logits (..., K) -> a scalar, the mean over rows.

    bias: `bias(TAU)` of a prototype set.
    """
    return -(a * (logits.float() / TAU + bias).log_softmax(-1)).sum(-1).mean()


# ---- the student's prototypes ------------------------------------------------------------------
class StudentPrototypes(heads.Joint):
    """V (K, D) from a normal distribution of standard deviation .02; lengths g (K, 1) from 1."""

    def __init__(self, K, D, seed=0):
        super().__init__(K, D, 1.0, seed, gain=True)
        generator = torch.Generator().manual_seed(seed)
        nn.init.trunc_normal_(self.weight, std=0.02, generator=generator)
        self.start.copy_(F.normalize(self.weight.detach(), dim=1))

    def logits(self, h, ks=None):
        return super().logits(F.normalize(h.float(), dim=-1), ks)  # CA.4


def student_prototypes(args):
    """The set that --student-prototypes names."""
    protos = StudentPrototypes(args.num_prototypes, args.bottleneck_dim,
                               args.seed + heads.SEED_OF_SECOND_SET)
    return protos.requires_grad_(args.student_prototypes != "frozen")


# ---- schedules ---------------------------------------------------------------------------------
def rate_at(step, total, peak, end=0.0):
    """CA.6: the learning rate of a step."""
    warmup = total / 10
    if step < warmup:
        return peak * step / warmup
    u = (step - warmup) / (total - warmup)
    return end + (peak - end) * (1 + math.cos(0.8 * math.pi * u)) / 2


# ---- images ------------------------------------------------------------------------------------
class OneView(views.Recipe):
    """One crop of an image, the same pixels for teacher and student."""

    def views(self):
        return super().views()[:1]


def main(argv=None):
    """One training run. Returns its final metrics; bad input is one sentence and exit code 2."""
    return start(parse(argv), train)


def train(args, device, stop_request):
    # ---- images, networks, prototypes ----------------------------------------------------------
    images, test = ddp.first_process_first(lambda: data.load(
        args.data, root=args.data_root, seed=args.seed, img_size=args.img_size,
        imbalance=args.imbalance, imbalance_law=args.imbalance_law))
    bank = data.subset(images, args.eval_bank)
    queries = None if test is None else data.subset(test, args.eval_queries)
    recipe = OneView(**vars(config.recipe(args)))
    steps_per_epoch, total, stop = config.lengths(args, len(images))
    args.data_seen = data.identity(images, args.data) | {"steps": total}  # compared by --resume
    gmm_start = args.gmm_start * total if args.gmm_start < 1 else args.gmm_start

    # differs from train.py: two sets of prototypes, and two optimisers
    student = network(args, args.drop_path).to(device)
    teacher = network(args).to(device).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    clusters = teacher_clusters(args, int(gmm_start)).to(device)
    protos_s = student_prototypes(args).to(device)
    average_s = copy.deepcopy(protos_s).requires_grad_(False)  # what the paper counted
    trained = [*student.parameters(), *protos_s.parameters()]  # theta
    averaged = [*teacher.parameters(), *average_s.parameters()]  # phi
    optimizer, factors = optimizer_of([student, protos_s])
    parts = {"student": student, "teacher": teacher, "loss": Temperature(), "optimizer": optimizer,
             "student_average": average_s}
    # empty for frozen clusters and for a mixture, which no gradient trains
    trained_clusters = [p for p in clusters.parameters() if p.requires_grad]
    if trained_clusters:
        # its learning rate and weight decay are those that take_cluster_step is called with
        cluster_optimizer = torch.optim.AdamW(trained_clusters, lr=0.0, betas=(0.9, 0.95),
                                              fused=True)
        take_cluster_step = optim.CheckedStep(cluster_optimizer, [], factors=[(1.0, 1.0)])
        parts["cluster_optimizer"] = cluster_optimizer

    # ---- start or go on ------------------------------------------------------------------------
    start, record = checkpoint.start_or_resume(args, parts, protos_s, clusters)
    if start >= stop:
        ddp.print0(f"nothing left to do: step {stop} of {total} is done")
        return {}
    take_step = optim.CheckedStep(optimizer, [student, teacher], args.clip_grad, factors=factors)
    lr_peak = args.lr * args.batch_size / 256
    grid = student.backbone.grid
    n = grid ** 2
    rows = args.batch_size * (n if args.sinkhorn == "all" else 1)  # that CA.2 balances together
    entropy_floor = max(0.0, math.log(args.num_prototypes / rows))

    # a record with rows: the log's last row is there only because the run stopped at that step
    log = Log(args, start, drop_last=bool(record.rows))
    metrics = {}  # of the last evaluation
    monitor = Monitor(args.num_prototypes)
    ddp.print0(config.describe(args, images, student, total, lr_peak, device))
    warn_of_flat_targets("num-prototypes", args.num_prototypes, rows)
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
        image, = clock.next(batches)  # (B, 3, s, s)
        B = len(image)
        torch.manual_seed(views.seed_of(views.DROP_PATH, args.seed, step, ddp.RANK))
        # differs from train.py: both schedules
        lr = rate_at(step, total, lr_peak, args.min_lr)  # CA.6
        m = 1 - args.ema_per_lr * lr  # CA.7
        weight_decay = cosine(args.weight_decay, args.weight_decay_end, step / total)
        beta = args.beta[0] + (args.beta[1] - args.beta[0]) * step / total  # of A.1; Appendix B.1
        # differs from train.py: what the student sees, and what it has to guess
        visible, predicted = visible_and_predicted(args, B, step, grid, device)  # (B, v) (B, q)

        # ---- 1. teacher: the tokens of whole images, no gradient
        with torch.no_grad(), amp(args, device):
            _, x = teacher.backbone(image)  # (B, n, D)
            x = F.normalize(x.float(), dim=-1)  # (B, n, D)

        # ---- 2. assign each patch to the clusters, which have not moved yet in this step
        # differs from train.py: they have a loss of their own, whose gradient reaches them alone
        l = clusters.logits(x)  # (B, n, K), CA.1
        a = targets_of(l.detach(), args)  # (B, n, K), CA.2
        clustering_loss = cross_entropy(a, l, clusters.bias(TAU))  # CA.3
        if trained_clusters:
            clustering_loss.backward()

        # ---- 3. student: guess the clusters of hidden patches, one step of the optimiser
        target = take(a, predicted)  # (B, q, K)
        with amp(args, device):
            z = student(image, visible, predicted)  # (B, q, D)
        s = protos_s.logits(z)  # (B, q, K), CA.4
        terms = {"cross_entropy": cross_entropy(target, s, protos_s.bias(TAU))}  # CA.5
        terms["penalty"] = protos_s.penalty()
        terms["loss"] = sum(terms.values())
        terms["loss"].backward()
        of_targets = {"clustering_loss": clustering_loss,
                      "target_entropy": torch.special.entr(a).sum(-1).mean()}
        record.add(terms | of_targets, 1.0)
        # If a value is not finite, `taken` is 0 and all processes keep weights and buffers as they
        # were. What phase 5 does to a mixture is done all the same
        values, taken = take_step(record.take(), step, lr, weight_decay)  # (terms + 1,) ()

        # ---- 4. teacher: phi = m phi + (1 - m) theta
        # after the optimiser's step, as in train.py
        with torch.no_grad():
            for phi, theta in zip(averaged, trained, strict=True):
                phi.lerp_(theta, taken * (1 - m))

        # ---- 5. clusters: one step of an optimiser of their own, or of online EM (Eq. 3 of the
        # paper about collapse)
        if trained_clusters:  # skipped where the student's step was: the sum is then not finite
            take_cluster_step(values.sum()[None], step, CLUSTER_RATE * lr, CLUSTER_DECAY)
        report = {}
        if clusters.follows_the_teacher():
            places = capi_places(args, step, n).to(device).chunk(ddp.WORLD)[ddp.RANK]  # (B, S)
            vectors = ddp.all_gather(take(x, places))  # (batch_size, S, D)
            report = clusters.step(vectors.flatten(0, 1), step, beta)

        # ---- 6. everything below is logging, evaluation, saving ---------------------------------
        done = step + 1
        bar.update()
        record.append(done, lr, values)
        leaving = ddp.largest(stop_request.number)  # a signal that any process received, or 0
        now = due(args, done, stop, total, leaving)
        if device.type == "cpu" or now.row or now.checkpoint:  # a GPU is waited for only then
            record.read()
        if now.row:
            row = joined(record.means(), report, clock.speed(args.batch_size), spread(clusters),
                         lr=lr, beta=beta, momentum=m, entropy_floor=entropy_floor,
                         epoch=done / steps_per_epoch, memory_mb=peak_memory(device))
            row = joined(row, loss_over_ln_k=row["cross_entropy"] / math.log(args.num_prototypes))
            if now.evaluation:
                h, at, h_s = coming_tokens(student, teacher, images, recipe, done, args, device)
                if ddp.RANK == 0:
                    metrics = measures_of_both(clusters, protos_s, average_s, h, at, h_s, beta,
                                               args.seed)
                    metrics["knn"] = measures.teacher_knn(bank, queries, args, teacher, device)
                    row |= metrics
                    metrics["pi_max"] = report.get("pi_max")  # None: no mixture, or not started
                    metrics |= {name: float(row[name])
                                for name in ("target_entropy", "entropy_floor")}
            if ddp.RANK == 0:
                log.row(done, row, terms | of_targets)
                tqdm.write(printed(done, total, row, "cross_entropy"))
                if now.evaluation:
                    tqdm.write(printed_student(row, args.num_prototypes))
                for sentence in monitor.new(troubles(row)):
                    tqdm.write(f"warning, step {done}: {sentence}")
                for sentence in monitor.remarks(row):
                    tqdm.write(f"remark, step {done}: {sentence}")
        if now.regular:
            record.clear()
            clock.restart()
        if now.checkpoint:
            checkpoint.save(args, done, record, parts, protos_s, clusters,
                            {"student_average": average_s})
        if leaving:
            ddp.print0(f"step {done} is saved in {args.out}; go on with --resume")
            raise SystemExit(128 + leaving)  # 130 and 143, as a shell reports these signals
    bar.close()
    if ddp.RANK:
        return {}
    print(printed_targets(metrics, args.num_prototypes))
    return measures.summary(args, log, metrics, bank, queries, stop)


# ---- what an evaluation measures ---------------------------------------------------------------
class Temperature(Loss):
    """What the measures ask of a loss: the temperature of the softmax over prototypes."""
    tau = TAU


def troubles(row):
    """{kind: sentence} of what goes wrong, for a row of the log; see Monitor.new."""
    for eps in ("0.025", "0.5"):
        share = row.get(f"student_unique_{eps}")
        if share is not None and share < 0.5:
            return {"collapse": "partial prototype collapse of the student's set: "
                                f"{100 * share:.0f} % of its prototypes are unique at eps {eps}. "
                                "--student-prototypes frozen keeps them apart, as a control"}
    return {}


def spread(clusters):
    """{column: number}: how unequal lengths and biases of linear clusters are; {} of others."""
    if not hasattr(clusters, "W"):
        return {}
    length = clusters.W.detach().norm(dim=1)  # (K,)
    return {"cluster_length": length.mean(), "cluster_length_sd": length.std(correction=0),
            "cluster_bias_sd": clusters.b.detach().std(correction=0)}


def coming_tokens(student, teacher, images, recipe, step, args, device):
    """[h (N, D), places (N,), h_s (N, D)] of the images of the next steps, of all processes.

    h: the teacher's token of one place of each image, drawn evenly over the grid. h_s: the
    student's guess of one hidden place. Both of length one. N is about --eval-bank.
    """
    grid, was_training = teacher.backbone.grid, student.training

    def one_place_each(crops, step):
        image, = crops  # (B, 3, s, s)
        places = capi_places(args, step, grid ** 2).chunk(ddp.WORLD)[ddp.RANK][:, :1].to(device)
        visible, predicted = visible_and_predicted(args, len(image), step, grid, device)
        x = take(teacher.backbone(image)[1], places)  # (B, 1, D)
        z = student(image, visible, predicted[:, :1])  # (B, 1, D)
        h, h_s = (F.normalize(part[:, 0].float(), dim=1) for part in (x, z))  # (B, D) each
        return h, places[:, 0], h_s
    student.eval()  # no drop path
    found = measures.of_coming_batches(one_place_each, teacher, images, recipe, step, args, device,
                                       amp(args, device))
    student.train(was_training)
    return found


@torch.no_grad()
def measures_of_both(clusters, protos_s, average_s, h, at, h_s, beta, seed):
    """{NAME: value} of the teacher's clusters, for its tokens h (N, D) at places at (N,), and
    {student_NAME: value} of the student's prototypes, for its guesses h_s (N, D).

    The cluster of a patch is its most probable one before CA.2 balances; in a mixture, the
    component with the largest responsibility (A.1), which targets do not follow.
    """
    found = measures.prototype_measures(clusters, Temperature(), h, beta, seed)
    of_student = measures.prototype_measures(protos_s, Temperature(), h_s, beta, seed)
    names = ("unique_0.025", "unique_0.5", "ceiling_0.5", "used", "perplexity", "drift", "h_rank")
    found |= {f"student_{name}": of_student[name] for name in names}
    of_average = measures.prototype_measures(average_s, Temperature(), h_s, beta, seed)
    found["student_average_unique_0.025"] = of_average["unique_0.025"]
    return found | place_measures(clusters, Temperature(), h, at, beta, seed)


def printed_student(row, K):
    return (f"     student: {of_set(row, 'student_')}\n"
            f"     {printed_targets(row, K)}\n"
            f"     place {row['place_nats']:.3f} nats ({row['place_nats_shuffled']:.3f} shuffled)")


def printed_targets(row, K):
    return (f"targets: entropy {row['target_entropy']:.2f} nats, between about "
            f"{row['entropy_floor']:.2f} (the least under CA.2) and ln K = {math.log(K):.2f}")


# ---- for the evaluation tools ------------------------------------------------------------------
def load_backbone(state, args):
    """The encoder of a run of this script, with the predictor beside it for --pool predictor.

    state: state dict of the student or the teacher; None: weights as they are before training.
    args: of the run, a dict.
    """
    net = network(config.completed(args, flags))
    if state is not None:
        net.load_state_dict(state)
    net.backbone.predictor = net.predictor
    return net.backbone


class MeanToken(nn.Module):
    """net([x]) of `load_run`: images x (N, 3, s, s) -> their mean patch tokens (N, D)."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, crops):
        return F.normalize(self.backbone(torch.cat(crops))[0], dim=-1)


def load_run(path):
    """As runs.load_run: an image is assigned to the cluster of its mean patch token."""
    ckpt = checkpoints.read(path)
    args = config.completed(ckpt["args"], flags)
    clusters = teacher_clusters(args)
    runs.restore(clusters, ckpt)
    net = MeanToken(load_backbone(ckpt["teacher"], ckpt["args"]))
    return net.eval(), clusters, Temperature(), vars(args)


if __name__ == "__main__":
    main()
