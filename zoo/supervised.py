"""--method supervised: the same network, crops and schedules, trained with the images' labels.

It is no method of the paper. It says what the network can reach on a set of images, so it stands
as a ceiling above k-NN numbers. Prototype c of the first C is the weight vector of class c, and the
loss is the cross-entropy of every student view. `--prototypes joint` trains these vectors; there
must be at least as many as classes. The teacher is the average of the student, as always.

    python train.py --method supervised --prototypes joint
"""
import functools
import math

from torch.nn import functional as F

import data
from losses import Loss
from support import ddp
from views import indices


class Supervised(Loss):
    """Cross-entropy with the labels of the training images; C classes.

    labels() gives them, (N,) int64. It is called once, by the first step: a run can be evaluated
    where its images are not. batch_size counts the images of all processes, as --batch-size does.
    """

    def __init__(self, labels, C, batch_size, seed=0):
        super().__init__()
        self.labels = functools.cache(labels)
        self.C, self.batch_size, self.seed = C, batch_size, seed
        self.uniform = math.log(C)

    @classmethod
    def from_args(cls, args, steps_per_epoch):
        C = args.data_seen["classes"]
        if not C:
            raise ValueError(f"--method supervised needs labels, and --data {args.data} has none")
        if args.num_prototypes < C:
            raise ValueError(f"--num-prototypes {args.num_prototypes} are fewer than the {C} "
                             "classes that --method supervised needs one each for")

        def labels():
            images, _ = data.load(args.data, root=args.data_root, seed=args.seed,
                                  img_size=args.img_size, imbalance=args.imbalance,
                                  imbalance_law=args.imbalance_law)
            return images.y
        return cls(labels, C, args.batch_size, args.seed)

    def targets(self, h_t, protos_t, step):
        y = self.labels()  # (N,)
        # which images a step holds is a function of (seed, step)
        of_step = y[indices(len(y), self.batch_size, self.seed, step)]  # (batch_size,)
        mine = of_step.chunk(ddp.WORLD)[ddp.RANK]  # (B,)
        return mine[None].to(h_t.device)  # (1, B)

    def forward(self, h_s, y, protos_s, protos_t, step):
        z = protos_s.logits(h_s)[..., :self.C]  # (V, B, C)
        y = y.expand(len(z), -1)  # (V, B)
        return {"cross_entropy": F.cross_entropy(z.flatten(0, 1), y.flatten())}
