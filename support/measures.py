"""What an evaluation during training measures: k-NN beside its controls, and the prototype set."""
import math
from dataclasses import replace

import torch
from torch.nn import functional as F

import collapse
import eval_knn
import views
from support import control, ddp
from support.features import features
from support.log import share

EPS = (0.025, 0.5)  # Def. 2.1: the threshold of the literature, and the strict one


@torch.no_grad()
def of_coming_batches(compute, teacher, images, recipe, step, args, device, autocast):
    """What `compute` makes of the global crops of the next steps, about --eval-bank crops in all.

    compute(crops, step) -> a tuple of tensors, for the crops of a step on this process. Returns one
    tensor for each of the tuple, joined over the steps (at least one) and then over the processes.
    The crops are made as in training, and batch norm takes the statistics of a batch as there,
    because a mixture was fed such vectors.
    """
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    recipe = replace(recipe, n_local=0)
    V = len(recipe.views())  # crops of an image, without local ones
    steps = max(1, min(args.eval_bank, V * len(images)) // (V * args.batch_size))
    batches = views.batches(images, recipe, batch_size=args.batch_size, seed=args.seed, start=step,
                            stop=step + steps, rank=ddp.RANK, world=ddp.WORLD, device=device,
                            workers=args.workers)
    with autocast:
        parts = [compute(crops, coming) for coming, crops in enumerate(batches, step)]
    for name, buffer in teacher.named_buffers():  # to measure must not move running averages
        buffer.copy_(before[name])
    return [ddp.all_gather(torch.cat(part)) for part in zip(*parts)]


def coming_vectors(teacher, images, recipe, step, args, device, autocast):
    """Teacher vectors h (N, D) of all processes, of the global crops of the next steps."""
    h, = of_coming_batches(lambda crops, _: (teacher(crops[:2]),), teacher, images, recipe, step,
                           args, device, autocast)
    return h


@torch.no_grad()
def prototype_measures(protos, loss, h, beta, seed, of_student=False):
    """Unique shares of a prototype set, and the measures that belong beside them.

    h (N, D): teacher vectors, for used, perplexity and the ceiling. ValueError if they are not
    finite. A set that is a memory of vectors has None in the place of unique shares. Of the
    vectors: h_norm, median length; h_cosine, mean cosine of two; h_rank, effective rank. z_sd:
    standard deviation of a vector's logits over the prototypes, which says how peaked their softmax
    is. of_student: the set is the student's alone, whose softmax has no centre.
    """
    if not h.isfinite().all():
        raise ValueError("the teacher's vectors are not finite: lower --lr or --weight-decay. The "
                         "last checkpoint is untouched")
    C = protos.vectors()  # (K, D)
    softmax = (loss.tau, 0.0) if of_student else loss.tau_and_centre()
    assigned = (protos.assign(part, beta, *softmax) for part in h.split(128))
    used, perplexity = collapse.usage(assigned)
    measures = {"used": used, "perplexity": perplexity, "drift": collapse.drift(C, protos.start),
                "h_norm": float(h.norm(dim=1).median()), "h_cosine": mean_cosine(h),
                "h_rank": collapse.effective_rank(h),
                "z_sd": float(torch.cat([protos.logits(part).std(1)
                                         for part in h.split(128)]).mean())}
    counts = collapse.unique_counts(C, EPS) if protos.countable else {}
    for eps in EPS:
        measures[f"unique_{eps}"] = counts[eps] / len(C) if counts else None
        measures[f"ceiling_{eps}"] = collapse.ceiling(h - protos.origin, len(C), eps, seed)
    return measures


def mean_cosine(h):
    """Mean cosine of two different vectors of h (N, D): 1 if all lie in one direction; NaN of one
    vector."""
    u, N = F.normalize(h.double(), dim=1), len(h)  # u (N, D)
    if N < 2:
        return math.nan
    return float((u.sum(0).square().sum() - N) / (N * (N - 1)))


def student_measures(protos, loss, h, beta, seed):
    """prototype_measures of a set that the student alone has, {student_NAME: value}."""
    measures = prototype_measures(protos, loss, h, beta, seed, of_student=True)
    own = ("unique_0.025", "unique_0.5", "used", "perplexity", "drift")
    return {f"student_{name}": measures[name] for name in own}


def knn(bank, queries, of_images):
    """k-NN accuracy in percent (k 20, T 0.07); None without labels.

    of_images(images) -> features (N, dim).
    """
    if queries is None or bank.y is None:
        return None
    x, q = of_images(bank), of_images(queries)  # (N, dim) (M, dim)
    return eval_knn.knn_accuracy(x, bank.y, q, queries.y, ks=(20,))[20]


def controls(bank, queries, args, teacher, device):
    """k-NN of the backbone as the run starts and of raw pixels: row 0 of the log."""
    return {"knn": teacher_knn(bank, queries, args, teacher, device),
            "raw_knn": knn(bank, queries, lambda images: pixels(images, args.img_size))}


def teacher_knn(bank, queries, args, teacher, device):
    """`knn` of the teacher's backbone."""
    return knn(bank, queries, lambda images: features(
        teacher.backbone, images, args.img_size, device=device, mean=args.mean, std=args.std))


def pixels(images, img_size):
    """Pixels (N, 3 s s), s at most 32, less ImageNet's mean and over its deviation: what no
    learning has touched."""
    batches = views.eval_batches(images, img_size)
    return torch.cat([F.adaptive_avg_pool2d(x, min(32, img_size)).flatten(1) for x in batches])


def summary(args, log, metrics, bank, queries, step):
    """Print the last evaluation beside its controls, and return it."""
    if metrics["knn"] is not None:
        metrics.update(raw_knn=log.first("raw_knn"), untrained_knn=log.first("knn"))
        untrained = "--init, at step 0" if args.init else "untrained backbone"
        print(f"\nk-NN accuracy in percent (20 neighbours among {len(bank)} training images, "
              f"{len(queries)} test images)\n"
              f"  raw pixels            {metrics['raw_knn']:5.1f}\n"
              f"  {untrained:<21} {metrics['untrained_knn']:5.1f}\n"
              f"  teacher, step {step:<7d} {metrics['knn']:5.1f}")
    is_memory = metrics["unique_0.5"] is None
    print(f"prototypes ({args.prototypes}, K {args.num_prototypes}, D {args.bottleneck_dim}), "
          f"shares of {'the vectors in the memory' if is_memory else 'K'}")
    for eps, name in ((0.025, "unique(.025)"), (0.5, "unique(.5)  ")):
        print(f"  {name} {share(metrics[f'unique_{eps}'])}   "
              f"ceiling {metrics[f'ceiling_{eps}']:.3f} (the same share of "
              f"{'as many' if is_memory else 'K'} vectors h)")
    heaviest = metrics.get("pi_max")
    print(f"  used {metrics['used']:.3f}   perplexity {metrics['perplexity']:.3f}   "
          f"drift {metrics['drift']:.3f}   |h| {metrics['h_norm']:.2f}"
          + ("" if heaviest is None else f"   heaviest component {float(heaviest):.3f}"))
    if args.student_prototypes != "same":
        print(f"the student's own prototypes ({args.student_prototypes})\n"
              f"  unique(.025) {metrics['student_unique_0.025']:.3f}   "
              f"unique(.5) {metrics['student_unique_0.5']:.3f}\n"
              f"  used {metrics['student_used']:.3f}   "
              f"perplexity {metrics['student_perplexity']:.3f}   "
              f"drift {metrics['student_drift']:.3f}")
    print(control.sentence(args))
    for name in ("unique", "ceiling"):
        metrics[name] = {eps: metrics.pop(f"{name}_{eps}") for eps in EPS}
    return metrics | {"step": step, "out": args.out}
