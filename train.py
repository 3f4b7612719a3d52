"""Self-supervised training with prototypes, from top to bottom.

    python train.py                             the built-in set, a small ViT, decoupled prototypes, on any machine
    python train.py --prototypes joint          the same with prototypes trained by the loss
    torchrun --nproc_per_node=8 train.py --preset paper-vits --data IMAGENET

Each step has five phases. The first four are the method, in the order of the paper's Eq. 3 and 4; the fifth is logging.
Which loss and which prototypes run was decided before the loop: the loop never asks.
"""
import math
import os
import sys
import time
from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional as F
from tqdm import tqdm

import collapse
import config
import data
from support import ddp
import eval_knn
import heads
import methods
from support import monitor
from support import optim
import views
from support import weights
from support.guard import held, listening
from support.run import Log, Trail, keep_freed_memory, network, peak_memory, resume, save, saved

EPS = (0.025, 0.5)  # Def. 2.1: the threshold of the literature, and the strict one


def main(argv=None):
    """One training run. Returns its final metrics; bad input ends it with one sentence and exit code 2."""
    args = config.parse(argv)
    keep_freed_memory()
    device = ddp.setup(args.device)
    try:
        if args.export:
            return weights.export(args.out, args.export)
        with held(args.out), listening() as caught:
            return train(args, device, caught)
    except (ValueError, OSError) as e:  # all that is raised with a sentence for the user; disk full
        e = e if isinstance(e, ValueError) else f"{e.filename or args.out}: {e.strerror}"
        print(f"train.py: error{f' (process {ddp.RANK})' if ddp.RANK else ''}: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as e:
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            print(f"train.py: error: --compile does not work here: {str(e).splitlines()[0]}", file=sys.stderr)
            raise SystemExit(2) from None
        if not ddp.lost_contact(e):
            raise
        print(f"train.py: error: process {ddp.RANK} lost its connection to another one and leaves; the last checkpoint "
              "is whole, go on with --resume", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        ddp.cleanup()


def train(args, device, caught):
    """caught: the signals that asked this process to stop, so far."""
    # ---- images, networks, prototypes --------------------------------------------------------------------------------
    if ddp.RANK:
        ddp.barrier()  # rank 0 comes first: it may have to download the set
    images, test = data.load(args.data, root=args.data_root, seed=args.seed, img_size=args.img_size,
                             imbalance=args.imbalance, imbalance_law=args.imbalance_law)
    if ddp.RANK == 0:
        ddp.barrier()
    recipe = views.Recipe(args.img_size, args.local_size, args.local_crops, tuple(args.global_scale),
                          tuple(args.local_scale), tuple(args.jitter), args.jitter_p, args.gray, tuple(args.blur),
                          tuple(args.solarize))
    per_epoch = len(images) // args.batch_size
    if per_epoch == 0:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(images)} images of --data {args.data}")
    total = args.steps or max(1, round(args.epochs * per_epoch))
    begin = args.gmm_start * total if args.gmm_start < 1 else args.gmm_start
    if args.stop_at and args.stop_at > total:
        raise ValueError(f"--stop-at {args.stop_at} lies beyond the {total} steps of this run")

    student, teacher, protos_s, protos_t = networks(args, device, int(begin))
    if args.compile:  # in place: the names of the parameters stay. Nothing else is
        student.backbone.compile()  # compiled, the mixture least of all: its precision is its own
        teacher.backbone.compile()
    loss_fn = methods.make(args, per_epoch, ddp.mean_over_ranks, ddp.all_reduce).to(device)

    trained = [*student.parameters(), *protos_s.parameters()]
    matched = [*zip(teacher.parameters(), student.parameters()), *zip(protos_t.parameters(), protos_s.parameters())]
    optimizer = optim.make(args, trained, device)

    # ---- start or go on ----------------------------------------------------------------------------------------------
    nets = {"student": student, "teacher": teacher, "loss": loss_fn, "optimizer": optimizer}
    start, stop, trail, found = 0, min(args.stop_at or total, total), Trail(), ddp.from_rank0(saved(args.out))
    if found and not args.resume:
        raise ValueError(f"--out {args.out} already holds a run; go on with --resume, or name another folder")
    if found:
        start, trail = resume(args, found, nets, protos_s, protos_t)
        if start >= stop:
            ddp.print0(f"nothing left to do: step {stop} of {total} is done")
            return {}
    elif args.resume:
        ddp.print0(f"nothing to resume in {args.out}: starting at step 0")
    if args.init and not found:
        weights.init(args.init, [student.backbone, teacher.backbone])
    log = Log(args, start, open_end=bool(trail.rows))
    watch, still = monitor.Monitor(args.num_prototypes), args.freeze_prototypes * per_epoch
    lr_peak, warmup = args.lr * args.batch_size / 256, min(args.warmup_epochs * per_epoch, total / 10)
    seen = (data.subset(images, args.eval_bank), test and data.subset(test, args.eval_queries))
    ddp.print0(f"{args.method} with {args.prototypes} prototypes on {args.data}: {len(images)} images"
               f"{'' if images.y is None else f' of {len(images.classes)} classes'}, {total} steps of "
               f"{args.batch_size}, {ddp.WORLD} process(es) on {device}\n{args.arch}, "
               f"{sum(p.numel() for p in student.parameters()) / 1e6:.2f} M parameters, K {args.num_prototypes} x "
               f"D {args.bottleneck_dim}, peak lr {lr_peak:.2g}, out {args.out}")

    def backbone(part):
        return eval_knn.features(teacher.backbone, part, args.img_size, device=device)
    if images.y is None:
        ddp.print0("the images carry no labels: k-NN is not measured")
    if start == 0 and ddp.RANK == 0:  # row 0 of the log holds the controls: the untrained backbone,
        log.row(0, {"knn": knn(seen, args, backbone), "raw_knn": knn(seen, args, partial(pixels, args))})  # and pixels

    metrics, buffers = {}, [*student.buffers(), *teacher.buffers(), *loss_fn.buffers()]  # running averages
    batches = views.batches(images, recipe, batch_size=args.batch_size, seed=args.seed, start=start, stop=stop,
                            rank=ddp.RANK, world=ddp.WORLD, device=device, workers=args.workers)
    bar = tqdm(total=total, initial=start, disable=None if ddp.RANK == 0 else True, unit="step", dynamic_ncols=True)
    clock, data_s, lines = time.perf_counter(), 0.0, 0

    # ==== training ====================================================================================================
    for step in range(start, stop):
        tick = time.perf_counter()
        crops = next(batches)  # 2 global and L local crops, (B, 3, s, s) each
        data_s += time.perf_counter() - tick
        torch.manual_seed(views.seed_of(args.seed, step, ddp.RANK))  # drop path, a function of (seed, step, rank)
        lr = lr_peak * step / warmup if step < warmup else \
            cosine(lr_peak, args.min_lr, (step - warmup) / (total - warmup))
        wd = cosine(args.weight_decay, args.weight_decay_end, step / total)
        m = cosine(args.momentum, 1.0, step / total)
        beta = args.beta[0] + (args.beta[1] - args.beta[0]) * step / total  # B.1
        V, B = len(crops), len(crops[0])
        micros = [slice(i, i + B // args.accum) for i in range(0, B, B // args.accum)]
        before, values = [b.clone() for b in buffers], 0

        # ---- 1. teacher: h_t = f_phi(two global views), no gradient                                          Sec. 2.1
        with torch.no_grad(), amp(args, device):
            h_t = torch.cat([teacher([v[i] for v in crops[:2]]).view(2, -1, args.bottleneck_dim) for i in micros], 1)

        # ---- 2. prototypes: C^t = argmin L_C(C^{t-1}, h_t), one step of online EM                       Eq. 3, A.1-A.6
        moved = protos_t.step(h_t.flatten(0, 1), step, beta)

        # ---- 3. encoder: theta = argmin L_f(h_theta, C^t), one step of the optimiser                            Eq. 4
        targets = loss_fn.targets(h_t, protos_t, step)
        for i in micros:
            with amp(args, device):
                h_s = student([v[i] for v in crops]).view(V, -1, args.bottleneck_dim)  # (V, b, D)
            terms = loss_fn(h_s, targets[:, i], protos_s, protos_t, step)
            terms["penalty"] = protos_s.penalty()
            terms["loss"] = sum(terms.values())
            (terms["loss"] / args.accum).backward()
            values = values + torch.stack([v.detach() for v in terms.values()]) / args.accum  # (terms,)
        values = ddp.average_gradients(trained, values)
        values = torch.cat([values, optim.clip(trained, args.clip_grad)[None]])  # (terms + 1,), same on all ranks
        finite = values.isfinite().all()  # if not, nothing but the mixture moves (gmm.py sees to itself);
        for group, decay in zip(optimizer.param_groups, (wd, 0.0)):
            group["lr"], group["weight_decay"] = lr, decay
        if step < still:
            for p in protos_s.parameters():
                p.grad = None  # --freeze-prototypes: after the clipping, as in DINO's code
        optim.advance(optimizer, finite)  # decided on the device: no rank and no GPU waits for the answer
        optimizer.zero_grad(set_to_none=True)

        # ---- 4. teacher: phi = m phi + (1 - m) theta
        # differs: CARP's official code averages before the optimiser's step, one step behind; DINO after it, as here
        with torch.no_grad():
            torch._foreach_lerp_([t for t, _ in matched], [s for _, s in matched], [finite * (1 - m)] * len(matched))
            for b, old in zip(buffers, before):
                b.copy_(torch.where(finite, b, old))

        # ---- 5. everything below is logging, evaluation, saving ------------------------------------------------------
        done, lines = step + 1, lines + 1
        trail.add(done, lr, [*terms, "grad_norm"], values)
        bar.update()
        stopping = ddp.largest(max(caught, default=0))  # the number of a signal that came to any rank, or 0
        regular = done == total or done % args.log_every == 0 or done % args.eval_every == 0
        evaluating = done == stop or done % args.eval_every == 0
        saving = evaluating or stopping or any(n and done % n == 0 for n in (args.save_every, args.keep_every))
        if device.type == "cpu" or regular or saving:
            trail.read()  # three steps in a row that were not finite end the run here
        if regular or evaluating:
            spent = time.perf_counter() - clock
            row = trail.means()
            row.update(epoch=done / per_epoch, loss_over_ln_k=row[loss_fn.main] / loss_fn.ln_k, lr=lr, beta=beta,
                       eta=moved.get("eta"), images_per_s=lines * args.batch_size / spent, data_share=data_s / spent,
                       memory_mb=peak_memory(device), pi_max=moved.get("pi_max"),
                       mixture_used=moved.get("used"), resurrected=moved.get("resurrected"))
            if evaluating:
                h = coming_vectors(teacher, images, recipe, done, args, device)
                metrics = {}
                if ddp.RANK == 0:
                    protos_t.offset = loss_fn.offset(protos_t.tau)
                    metrics = {"knn": knn(seen, args, backbone), **measure(protos_t, h, beta, args.seed)}
                row.update(metrics)
            if ddp.RANK == 0:
                log.row(done, row)
                tqdm.write(log.line(done, total, row))
                for sentence in watch.look(row | {"progress": done / total}):
                    tqdm.write(f"warning, step {done}: {sentence}")
        if regular:  # a row at --stop-at comes on top: the trail goes on to the next
            trail.rows, data_s, lines, clock = [], 0.0, 0, time.perf_counter()
        if saving:
            save(args, done, trail, nets, protos_s, protos_t)
        if stopping:
            ddp.print0(f"step {done} is saved in {args.out}; go on with --resume")
            raise SystemExit(128 + stopping)  # 130 and 143, as a shell reports these signals
    bar.close()
    return summary(args, log, metrics, seen, stop) if ddp.RANK == 0 else metrics


def networks(args, device, begin):
    """Student, teacher and their prototype sets; the teacher starts as a copy. begin: step where a mixture starts."""
    student, teacher = (ddp.sync_batchnorm(network(args, rate)).to(device) for rate in (args.drop_path, 0.0))
    teacher.load_state_dict(student.state_dict())
    protos_s = heads.prototypes(args, begin, ddp.all_reduce, ddp.gather_views, ddp.WORLD).to(device)
    protos_t = protos_s.twin()  # the same object, unless the prototypes are trained by gradient
    return student, teacher.requires_grad_(False), protos_s, protos_t


def cosine(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def amp(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp and device.type == "cuda")


# ---- evaluation ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def coming_vectors(teacher, images, recipe, step, args, device):
    """Teacher vectors h (N, D) of all ranks, of the global crops that training shows next: about --eval-bank of them,
    made just as training makes them (batch norm on batch statistics), since the mixture knows no others."""
    before = {k: v.clone() for k, v in teacher.named_buffers()}  # running averages: looking must not move them
    stop = step + max(1, min(args.eval_bank, 2 * len(images)) // (2 * args.batch_size))
    crops = views.batches(images, replace(recipe, n_local=0), batch_size=args.batch_size, seed=args.seed, start=step,
                          stop=stop, rank=ddp.RANK, world=ddp.WORLD, device=device, workers=args.workers)
    with amp(args, device):
        h = ddp.all_gather(torch.cat([teacher(pair) for pair in crops]))  # (N, D)
    for k, v in teacher.named_buffers():
        v.copy_(before[k])
    return h


def measure(protos, h, beta, seed):
    """What is known of a prototype set beside teacher vectors h (N, D): the columns that a unique count needs."""
    C = protos.vectors()
    used, perplexity = collapse.usage(protos.assign(part, beta) for part in h.split(128))
    out = {"used": used, "perplexity": perplexity, "drift": collapse.drift(C, protos.start),
           "h_norm": float(h.norm(dim=1).median())}
    for eps, count in collapse.unique_counts(C, EPS).items():
        out[f"unique_{eps}"] = count / len(C)
        out[f"ceiling_{eps}"] = collapse.ceiling(protos.centred(h), len(C), eps, seed)
    return out


def knn(seen, args, features):
    """k-NN accuracy in percent (k 20, T 0.07) of (training, held-out) images; None without labels."""
    bank, test = seen
    if test is None or bank.y is None:
        return None
    x, q = features(bank), features(test)  # (N, dim) (M, dim)
    return eval_knn.knn_accuracy(x, bank.y, q, test.y, ks=(20,))[20]


def pixels(args, part):
    """Raw pixels (N, 3 s s), s at most 32: what no learning has touched."""
    batches = views.eval_batches(part, args.img_size)
    return torch.cat([F.adaptive_avg_pool2d(x, min(32, args.img_size)).flatten(1) for x in batches])


def summary(args, log, metrics, seen, step):
    """Print the last evaluation beside its controls, and return it."""
    if metrics["knn"] is not None:
        metrics.update(raw_knn=log.first("raw_knn"), untrained_knn=log.first("knn"))
        print(f"\nk-NN (k 20, T 0.07, {len(seen[0])} images in the bank, {len(seen[1])} queries), percent\n"
              f"  raw pixels          {metrics['raw_knn']:6.1f}\n"
              f"  {'--init, at step 0  ' if args.init else 'untrained backbone '} {metrics['untrained_knn']:6.1f}\n"
              f"  teacher at step {step:<5d}{metrics['knn']:5.1f}")
    print(f"prototypes ({args.prototypes}, K {args.num_prototypes}, D {args.bottleneck_dim}), shares of K\n"
          f"  unique(.025) {metrics['unique_0.025']:.3f}   as many random features: {metrics['ceiling_0.025']:.3f}\n"
          f"  unique(.5)   {metrics['unique_0.5']:.3f}   as many random features: {metrics['ceiling_0.5']:.3f}\n"
          f"  used {metrics['used']:.3f}   perplexity {metrics['perplexity']:.3f}   drift {metrics['drift']:.3f}   "
          f"|h| {metrics['h_norm']:.2f}\n"
          f"a unique share alone means little: run --prototypes frozen for the control, then python collapse.py "
          f"{args.out} ...")
    metrics.update({name: {e: metrics.pop(f"{name}_{e}") for e in EPS} for name in ("unique", "ceiling")},
                   step=step, out=args.out)
    return metrics


if __name__ == "__main__":
    main()
