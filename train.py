"""Self-supervised training with prototypes, from top to bottom.

    python train.py                        the built-in images, a small ViT, decoupled prototypes
    python train.py --prototypes joint     the same with prototypes trained by the loss
    torchrun --nproc_per_node=8 train.py --preset paper-vits --data IMAGENET

Each step has five phases. The first four are the method, in the order of the paper's Eq. 3 and 4;
the fifth is logging. Phases 1 to 4 never ask which loss and which prototypes run.

    V views of B images on this process, 2 of them global; D dimensions of h; K prototypes
"""
import math
import os

import torch
from tqdm import tqdm

import config
import data
import heads
import losses
import views
from support import checkpoint, ddp, measures, optim
from support.errors import one_sentence
from support.files import locked
from support.log import Clock, Log, due, joined, keep_freed_memory, peak_memory, printed
from support.monitor import Monitor
from support.signals import stop_requests

ROOT = os.path.dirname(os.path.abspath(config.__file__))
SCRIPT = os.path.relpath(os.path.abspath(__file__), ROOT)  # args.json names the script of a run


def main(argv=None):
    """One training run. Returns its final metrics; bad input is one sentence and exit code 2."""
    return start(config.parse(argv, SCRIPT), train)


def start(args, train):
    """Returns train(args, device, stop_request), in a folder that is this run's alone; or writes
    what --export asks for. An error becomes one sentence. The scripts of zoo/ start here too."""
    keep_freed_memory()
    with one_sentence(args.script, args.out):
        device = ddp.setup(args.device, args.timeout)
        if args.export:
            from support.export import export
            return export(args.out, args.export)
        with locked(args.out), stop_requests() as stop_request:
            return train(args, device, stop_request)


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

    student, teacher, protos_s, protos_t = networks(args, device, int(gmm_start))
    loss_fn = losses.loss(args, steps_per_epoch).to(device)
    trained = [*student.parameters(), *protos_s.parameters(), *loss_fn.parameters()]  # theta
    averaged = [*teacher.parameters(), *protos_t.parameters()]  # phi
    optimizer = optim.make(args, trained)

    # ---- start or go on ------------------------------------------------------------------------
    parts = {"student": student, "teacher": teacher, "loss": loss_fn, "optimizer": optimizer}
    start, record = checkpoint.start_or_resume(args, parts, protos_s, protos_t)
    if start >= stop:
        ddp.print0(f"nothing left to do: step {stop} of {total} is done")
        return {}
    if args.init and start == 0:
        from support.export import init
        init(args.init, [student.backbone, teacher.backbone])
    take_step = optim.CheckedStep(optimizer, [student, teacher, loss_fn], args.clip_grad,
                                  protos_s.parameters(), args.freeze_prototypes * steps_per_epoch)
    lr_peak = args.lr * args.batch_size / 256
    warmup = min(args.warmup_epochs * steps_per_epoch, total / 10)  # steps

    # A run may stop between two regular rows of its log. `record` then holds the steps that the
    # next regular row has to average, and the row that was written at the stop is dropped
    log = Log(args, start, drop_last=bool(record.rows))
    metrics = {}  # of the last evaluation
    monitor = Monitor(len(protos_t.vectors()), args.prototypes)
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
        m = cosine(args.momentum, args.momentum_end, step / total)
        beta = args.beta[0] + (args.beta[1] - args.beta[0]) * step / total  # Appendix B.1

        # ---- 1. teacher: h_t = f_phi(two global views), no gradient                     Sec. 2.1
        with torch.no_grad(), amp(args, device):
            h_t = [teacher(part[:2]).view(2, -1, args.bottleneck_dim) for part in micro_batches]
            h_t = torch.cat(h_t, dim=1)  # (2, B, D)

        # ---- 2. prototypes: C^t = argmin L_C(C^{t-1}, h_t), one step of online EM       Eq. 3
        report = protos_t.step(ddp.gather_views(h_t), step, beta)  # h (N, D), 2 B per process

        # ---- 3. encoder: theta = argmin L_f(h_theta, C^t), one step of the optimiser    Eq. 4
        targets = loss_fn.targets(h_t, protos_t, step).chunk(args.accum, dim=1)
        for part, target in zip(micro_batches, targets, strict=True):
            with amp(args, device):
                h_s = student(part).view(len(part), -1, args.bottleneck_dim)  # (V, B/accum, D)
            terms = loss_fn(h_s, target, protos_s, protos_t, step)
            terms = joined(terms, penalty=protos_s.penalty())
            terms = joined(terms, loss=sum(terms.values()))
            (terms["loss"] / args.accum).backward()
            record.add(terms, 1 / args.accum)
        # If a value is not finite, `taken` is 0 and all processes keep weights and buffers as they
        # were. What phase 2 did is not undone
        values, taken = take_step(record.take(), step, lr, weight_decay)  # (terms + 1,) ()

        # ---- 4. teacher: phi = m phi + (1 - m) theta
        # differs: after the optimiser's step, as in DINO's code; CARP's code averages before it
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
            first_term = next(iter(terms))
            row = joined(record.means(), report, clock.speed(args.batch_size), lr=lr, beta=beta,
                         epoch=done / steps_per_epoch, memory_mb=peak_memory(device))
            if loss_fn.uniform:  # ln P for CARP, ln K for DINO; log.csv says ln_k for both
                row = joined(row, loss_over_ln_k=row[first_term] / loss_fn.uniform)
            if now.evaluation:
                h = measures.coming_vectors(teacher, images, recipe, done, args, device,
                                            amp(args, device))
                if ddp.RANK == 0:
                    metrics = measures.prototype_measures(protos_t, loss_fn, h, beta, args.seed)
                    if args.student_prototypes != "same":
                        metrics |= measures.student_measures(protos_s, loss_fn, h, beta, args.seed)
                    metrics["knn"] = measures.teacher_knn(bank, queries, args, teacher, device)
                    row |= metrics
                    metrics["pi_max"] = report.get("pi_max")  # None: no mixture, or not started
            if ddp.RANK == 0:
                log.row(done, row, terms)
                tqdm.write(printed(done, total, row, first_term))
                for sentence in monitor.warnings(row | {"progress": done / total}):
                    tqdm.write(f"warning, step {done}: {sentence}")
                for sentence in monitor.remarks(row):
                    tqdm.write(f"remark, step {done}: {sentence}")
        if now.regular:
            record.clear()
            clock.restart()
        if now.checkpoint:
            checkpoint.save(args, done, record, parts, protos_s, protos_t)
        if leaving:
            ddp.print0(f"step {done} is saved in {args.out}; go on with --resume")
            raise SystemExit(128 + leaving)  # 130 and 143, as a shell reports these signals
    bar.close()
    return measures.summary(args, log, metrics, bank, queries, stop) if ddp.RANK == 0 else {}


def networks(args, device, gmm_start):
    """Student, teacher and their prototype sets; the teacher starts as a copy of the student.

    gmm_start: the step at which a mixture starts.
    """
    student = ddp.sync_batchnorm(checkpoint.network(args, args.drop_path)).to(device)
    teacher = ddp.sync_batchnorm(checkpoint.network(args)).to(device).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    if args.compile:  # in place, so that the parameters keep their names
        student.backbone.compile()
        teacher.backbone.compile()
    protos_s, protos_t = (set_.to(device) for set_ in heads.student_and_teacher(args, gmm_start))
    return student, teacher, protos_s, protos_t


def cosine(start, end, share):
    """From start to end along half a cosine; share in [0, 1] of the way."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def amp(args, device):
    """bfloat16 in the networks on CUDA; never in mixture, Sinkhorn or a softmax over prototypes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp and device.type == "cuda")


if __name__ == "__main__":
    main()
