"""MSN and PMSN (Assran et al. 2022, 2023): train.py with a hidden view and dropped patches.

    python -m zoo.msn --prototypes joint                      MSN
    python -m zoo.msn --prototypes joint --prior 0.25         PMSN: clusters of unequal size

One view is for the teacher alone. The student sees the others, the first of them without a share of
its patches. Prototypes are trained by the loss, and the teacher uses the student's own.

    M.1  p_i = softmax(z_i / 0.1) of student view i; q = softmax(z / 0.025) of the teacher's view,
         which is softmax(z / 0.1) sharpened: to the power 1 / 0.25, and normalised
    M.2  q <- three rounds of Sinkhorn-Knopp on the probabilities q        (--no-balance: without)
    M.3  match    mean over student views i and images of -sum_k q_k log p_ik
    M.4  prior    KL(p_bar || pi) = sum_k p_bar_k log(p_bar_k / pi_k), with p_bar the mean of p over
                  views, images and processes. MSN: pi_k = 1 / K, so the term is ln K - H(p_bar).
                  PMSN: pi_k ~ k^-prior, the shares of a long tail
                  differs: lightly's PMSN, the only code of it, has KL(pi || p_bar)

differs: prototypes decay as other weights do, and --clip-grad is of each tensor; in MSN's code they
do not decay, and the gradient of the encoder is clipped as a whole.

The loop is that of train.py; what differs from it is marked.

    V views of B images on this process, the first the teacher's; D dimensions of h; K prototypes
"""
import argparse
import math
import os

import torch
from torch import nn
from tqdm import tqdm

import config
import data
import heads
import models
import views
from losses import sinkhorn
from support import checkpoint, checkpoints, ddp, measures, optim, runs
from support.errors import one_sentence
from support.flags import check_values
from support.log import Clock, Log, due, joined, peak_memory, printed
from support.monitor import Monitor
from train import amp, cosine, start
from zoo.flags import check_not_read, narrow
from zoo.kmeans import KMeans

ROOT = os.path.dirname(os.path.abspath(config.__file__))
SCRIPT = os.path.relpath(os.path.abspath(__file__), ROOT)  # args.json names the script of a run
EPS = torch.finfo(torch.float32).tiny

# Rows of Table C.2, for 16 GPUs; none was run. The official schedules stop at 0.8 of their length;
# here they run to their end. lr 2.5e-4 is 1e-3 at 1,024 images
PRESETS = {}
PRESETS["paper-msn"] = dict(
    data="inat18", arch="vit_small", patch_size=16, img_size=224, local_size=96, local_crops=10,
    global_scale=[0.3, 1.0], local_scale=[0.05, 0.3], jitter=[0.4, 0.4, 0.4, 0.1], gray=0.2,
    blur=[0.5, 0.5, 0.5], head_hidden=2048, bottleneck_dim=256, head_bn=True,
    num_prototypes=8142, batch_size=1024, epochs=300, warmup_epochs=15, lr=2.5e-4, min_lr=1e-6,
    weight_decay=0.04, weight_decay_end=0.4, momentum=0.996, clip_grad=3.0, prior_weight=1.0,
    workers=10, log_every=100, eval_every=4270, eval_bank=50000, eval_queries=10000)
PRESETS["paper-pmsn"] = dict(PRESETS["paper-msn"], prior=0.25, prior_weight=5.0)

# Flags of train.py about targets and prototypes that MSN does not read
NOT_READ = ["targets", "teacher_temp", "teacher_temp_epochs", "student_prototypes", "uniformity",
            "queue"]


# ---- what MSN adds to the command line ---------------------------------------------------------
def flags(parser):
    flag = parser.add_argument_group("MSN (results)").add_argument
    flag("--patch-drop", type=float, default=0.15,
         help="share of the patches that the student's global view goes without")
    flag("--sharpen", type=float, default=0.25, help="M.1: temperature of the sharpening")
    flag("--balance", action=argparse.BooleanOptionalAction, default=True,
         help="M.2: Sinkhorn-Knopp on the targets")
    flag("--prior-weight", type=float, default=1.0,
         help="weight of M.4 (1 in MSN, 5 in PMSN's runs on iNaturalist)")
    flag("--prior", type=float, default=0.0, help="M.4: exponent of the shares; 0: equal ones, MSN")
    narrow(parser, PRESETS, {"method": ["msn"]})
    parser.set_defaults(prototypes="joint", head_norm=True)


def parse(argv=None):
    """argv -> checked Namespace; bad input is one sentence and exit code 2."""
    args = config.parse(argv, SCRIPT, flags)
    with one_sentence(SCRIPT, args.out):
        check(args)
    return args


# (what a value must be, test, flags); see support/flags.py
RANGES = [
    ("lie in [0, 1)", lambda v: 0 <= v < 1, ["patch_drop"]),
    ("be positive", lambda v: v > 0, ["sharpen"]),
    ("not be negative", lambda v: v >= 0, ["prior_weight", "prior"]),
]


def check(args):
    """ValueError for values that cannot run."""
    check_values(args, RANGES)
    kind = heads.prototype_class(args.prototypes)
    if issubclass(kind, (heads.VMF, KMeans)):
        raise ValueError(f"--prototypes {args.prototypes} does not work here: MSN's softmax has no "
                         "log-normaliser, and its teacher sees one view")
    if kind.bias is not heads.Frozen.bias:
        raise ValueError(f"--prototypes {args.prototypes} has a `bias`, which MSN does not read")
    check_not_read(args, flags, NOT_READ,
                   "MSN, whose targets are those of --student-temp, --sharpen and --balance")
    if args.arch not in models.VITS:
        raise ValueError(f"--arch {args.arch} has no patches that can be left out: MSN needs a ViT")


# ---- the loss ----------------------------------------------------------------------------------
class MSNLoss(nn.Module):
    """M.1 to M.4. K: prototypes."""

    def __init__(self, K, tau=0.1, sharpen=0.25, balance=True, prior_weight=1.0, prior=0.0):
        super().__init__()
        self.tau, self.sharpen, self.balance, self.weight = tau, sharpen, balance, prior_weight
        pi = torch.arange(1, K + 1, dtype=torch.float32) ** -prior  # (K,)
        self.register_buffer("pi", pi / pi.sum())
        self.uniform = math.log(K)

    def tau_and_centre(self):
        return self.tau, 0.0

    @torch.no_grad()
    def targets(self, h_t, protos):
        """h_t (1, B, D) -> q (B, K)."""
        # M.1  (exp(z / tau) / sum)^(1 / T), normalised, is the softmax of z / (tau T)
        q = (protos.logits(h_t[0]) / (self.tau * self.sharpen)).softmax(-1)  # (B, K)
        # M.2  Sinkhorn-Knopp of log q at temperature 1 works on q itself
        if self.balance:
            q = sinkhorn(q.clamp_min(EPS).log(), 1.0, all_reduce=ddp.all_reduce)
        return q

    def forward(self, h_s, q, protos):
        """h_s (V - 1, B, D), q (B, K) -> {"match", "prior"}."""
        log_p = (protos.logits(h_s) / self.tau).log_softmax(-1)  # (V-1, B, K)
        # M.3
        match = -(q * log_p).sum(-1).mean()
        # M.4
        p_bar = ddp.mean_over_ranks(log_p.exp().mean((0, 1))).clamp_min(EPS)  # (K,)
        prior = (p_bar * (p_bar / self.pi).log()).sum()
        return {"match": match, "prior": self.weight * prior}


def kept_patches(n, drop, seed, step):
    """Indices of the patches that stay, of n: the same for the whole batch (the official code)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randperm(n, generator=generator)[:math.floor((1 - drop) * n)].sort().values


def student_vectors(student, crops, keep):
    """h (V - 1, B, D) of the crops the student sees: a global one without patches, and local ones.

    The head is called once for each size, so that batch norm treats the sizes apart.
    """
    globals_, *locals_ = crops
    h = [student.head(student.backbone(globals_, keep)[0])]  # (B, D)
    if locals_:
        h += student([*locals_]).chunk(len(locals_))
    return torch.stack(h)


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
    recipe = config.recipe(args)
    steps_per_epoch, total, stop = config.lengths(args, len(images))
    args.data_seen = data.identity(images, args.data) | {"steps": total}  # compared by --resume
    gmm_start = args.gmm_start * total if args.gmm_start < 1 else args.gmm_start

    student = ddp.sync_batchnorm(checkpoint.network(args, args.drop_path)).to(device)
    teacher = ddp.sync_batchnorm(checkpoint.network(args)).to(device).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    if args.compile:  # in place, so that the parameters keep their names
        student.backbone.compile()
        teacher.backbone.compile()
    # differs from train.py: one prototype set for both, which nothing averages
    protos = heads.prototypes(args, int(gmm_start)).to(device)
    loss_fn = make_loss(args).to(device)
    trained = [*student.parameters(), *protos.parameters(), *loss_fn.parameters()]  # theta
    averaged = list(teacher.parameters())  # phi
    optimizer = optim.make(args, trained)
    n_patches = (args.img_size // args.patch_size) ** 2

    # ---- start or go on ------------------------------------------------------------------------
    parts = {"student": student, "teacher": teacher, "loss": loss_fn, "optimizer": optimizer}
    start, record = checkpoint.start_or_resume(args, parts, protos, protos)
    if start >= stop:
        ddp.print0(f"nothing left to do: step {stop} of {total} is done")
        return {}
    if args.init and start == 0:
        from support.export import init
        init(args.init, [student.backbone, teacher.backbone])
    take_step = optim.CheckedStep(optimizer, [student, teacher, loss_fn], args.clip_grad,
                                  protos.parameters(), args.freeze_prototypes * steps_per_epoch)
    lr_peak = args.lr * args.batch_size / 256
    warmup = min(args.warmup_epochs * steps_per_epoch, total / 10)  # steps

    # a record with rows: the log's last row is there only because the run stopped at that step
    log = Log(args, start, drop_last=bool(record.rows))
    metrics = {}  # of the last evaluation
    monitor = Monitor(args.num_prototypes, args.prototypes)
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
        micro_batches = list(zip(*(crop.chunk(args.accum) for crop in crops)))  # accum tuples of V
        torch.manual_seed(views.seed_of(views.DROP_PATH, args.seed, step, ddp.RANK))
        if step < warmup:
            lr = lr_peak * step / warmup
        else:
            lr = cosine(lr_peak, args.min_lr, (step - warmup) / (total - warmup))
        weight_decay = cosine(args.weight_decay, args.weight_decay_end, step / total)
        # differs from train.py: along a line, as in the official code
        m = args.momentum + (args.momentum_end - args.momentum) * step / total
        beta = args.beta[0] + (args.beta[1] - args.beta[0]) * step / total  # Appendix B.1
        keep = kept_patches(n_patches, args.patch_drop, args.seed, step).to(device)  # (that stay,)

        # ---- 1. teacher: differs from train.py: it sees one view alone
        with torch.no_grad(), amp(args, device):
            h_t = [teacher(part[:1]).view(1, -1, args.bottleneck_dim) for part in micro_batches]
            h_t = torch.cat(h_t, dim=1)  # (1, B, D)

        # ---- 2. prototypes: those that follow the teacher
        report = protos.step(ddp.gather_views(h_t), step, beta)

        # ---- 3. encoder: differs from train.py: it never sees the teacher's view
        targets = loss_fn.targets(h_t, protos).chunk(args.accum)
        for part, q in zip(micro_batches, targets, strict=True):
            with amp(args, device):
                h_s = student_vectors(student, part[1:], keep)  # (V-1, B/accum, D)
            terms = loss_fn(h_s, q, protos)
            terms = joined(terms, penalty=protos.penalty())
            terms = joined(terms, loss=sum(terms.values()))
            (terms["loss"] / args.accum).backward()
            record.add(terms, 1 / args.accum)
        # If a value is not finite, `taken` is 0 and all processes keep weights and buffers as they
        # were. What phase 2 did is not undone
        values, taken = take_step(record.take(), step, lr, weight_decay)  # (terms + 1,) ()

        # ---- 4. teacher: phi = m phi + (1 - m) theta
        # after the optimiser's step, as in train.py
        with torch.no_grad():
            for phi, theta in zip(averaged, trained):
                phi.lerp_(theta, taken * (1 - m))

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
            row = joined(row, loss_over_ln_k=row["match"] / loss_fn.uniform)
            if now.evaluation:
                h = measures.coming_vectors(teacher, images, recipe, done, args, device,
                                            amp(args, device))
                if ddp.RANK == 0:
                    metrics = measures.prototype_measures(protos, loss_fn, h, beta, args.seed)
                    metrics["knn"] = measures.teacher_knn(bank, queries, args, teacher, device)
                    row |= metrics
                    metrics["pi_max"] = report.get("pi_max")  # None: no mixture, or not started
            if ddp.RANK == 0:
                log.row(done, row, terms)
                tqdm.write(printed(done, total, row, "match"))
                for sentence in monitor.warnings(row | {"progress": done / total}):
                    tqdm.write(f"warning, step {done}: {sentence}")
                for sentence in monitor.remarks(row):
                    tqdm.write(f"remark, step {done}: {sentence}")
        if now.regular:
            record.clear()
            clock.restart()
        if now.checkpoint:
            checkpoint.save(args, done, record, parts, protos, protos)
        if leaving:
            ddp.print0(f"step {done} is saved in {args.out}; go on with --resume")
            raise SystemExit(128 + leaving)  # 130 and 143, as a shell reports these signals
    bar.close()
    return measures.summary(args, log, metrics, bank, queries, stop) if ddp.RANK == 0 else {}


def make_loss(args):
    return MSNLoss(args.num_prototypes, args.student_temp, args.sharpen, args.balance,
                   args.prior_weight, args.prior)


def load_run(path):
    """As runs.load_run, with the loss of this script."""
    ckpt = checkpoints.read(path)
    net, protos, args = runs.networks_of(ckpt, flags)
    loss = make_loss(args)
    loss.load_state_dict(ckpt["loss"])
    return net.eval(), protos, loss, vars(args)


if __name__ == "__main__":
    main()
