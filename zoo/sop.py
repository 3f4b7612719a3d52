"""SOP (Silva et al. 2025) with its patches: zoo/ibot.py, with anchors for prototypes.

    python -m zoo.sop
    python -m zoo.sop --patch-neighbours 4 --patch-memory 1024
    python -m zoo.sop --patch-weight 0 --mask-share 0     class tokens alone, on the same network

As in iBOT, the student sees global crops with hidden patches, and has to agree with what the
teacher says of the same places of the clean crop. But there are no prototypes. Class tokens and
patches each have a memory of teacher vectors, from which every step draws anchors anew. The set is
Bank of zoo/bank.py, where S.1 to S.4 make probabilities P(u) of it, and S.5 is the loss of class
tokens. For patches this differs from it:

    S.6  memory      one vector of each image enters it: the teacher's, at a place of the clean
                     second global crop that is drawn evenly over the grid, hidden or not
    S.7  P           a SOP of patches is one anchor without neighbours. The paper counts the anchor
                     as a member and writes k = 1; here k counts neighbours alone, so k = 0. So S.4
                     is a softmax over the K anchors a_k that is smoothed with o = 0.1 / (K - 1):
                     P(u)_k = (0.9 - o) softmax_k(<u, a_k> / tau) + o
    S.8  L_patch   = 1/2 sum over the two global crops of the mean over images of
                     1/max(n_hidden, 1) sum over its hidden patches of
                     -sum_k P(h_t)_k log P(h_s)_k
    S.9  L         = S.5 + patch-weight L_patch

Nothing is centred or balanced, and no vector of a memory is trained: gradients reach the student
through h_s alone. The smoothing keeps the loss above 0. Where teacher and student agree on one
anchor for each patch, S.8 is -0.9 ln 0.9 - 0.1 ln o for each masked crop: 0.81 with 128 anchors. At
the start it is about ln K, 4.85.

differs: as in the paper, a step draws its K anchors once. The defaults of the official code draw 64
for class tokens four times, and keep a random half of each. Masks are those of iBOT, which leave
half of the crops whole; those defaults mask all crops, at most 0.3 of each.

This file holds what is not in zoo/ibot.py, whose loop runs as it is: the flags, and what the two
streams are.
"""
import config
import heads
import presets
from support.errors import one_sentence
from support.flags import check_values
from zoo import ibot
from zoo.bank import SOP, Bank
from zoo.flags import narrow

SCRIPT = "zoo/sop.py"  # args.json names the script of a run

# Anchors, neighbours, memories and momentum as the paper has them. The rest is iBOT's official
# recipe, since SOP's commands are not published, and shares much with paper-vits. For 16 GPUs; not
# run
PRESETS = {}
PRESETS["paper-sop-vits"] = dict(
    presets.PRESETS["paper-vits"], epochs=800, momentum=0.996, clip_grad=3.0,
    num_prototypes=4096, neighbours=8, memory=65536,
    num_patch_prototypes=512, patch_neighbours=0, patch_memory=8192,
    global_scale=[0.25, 1.0], local_scale=[0.05, 0.25])


# ---- command line ------------------------------------------------------------------------------
def flags(parser):
    flag = ibot.patch_flags(parser)
    flag("--patch-memory", type=int, metavar="M",
         help="vectors in the memory of patches; None: of the last 8 batches")
    flag("--patch-neighbours", type=int, default=0,
         help="vectors next to an anchor that form a self-organising prototype with it; 0: it "
         "alone")
    parser.complete = complete
    narrow(parser, PRESETS, {"method": ["sop"], "prototypes": ["bank"],
                             "student_prototypes": ["same"]})
    parser.set_defaults(num_prototypes=128, patch_rows=1, arch="vit_micro", patch_size=4,
                        head_bn=False, batch_size=32, momentum=0.99)


def complete(args):
    """As config.complete, with the number of anchors of the patches."""
    config.complete(args)
    if args.num_patch_prototypes is None:
        args.num_patch_prototypes = args.num_prototypes


def parse(argv=None):
    """argv -> checked Namespace; bad input is one sentence and exit code 2."""
    args = config.parse(argv, SCRIPT, flags)
    with one_sentence(SCRIPT, args.out):
        check(args)
    return args


def check(args):
    """ValueError for values that cannot run."""
    ibot.check_patches(args)
    check_values(args, [("be at least 1", lambda v: v >= 1, ["patch_memory"]),
                        ("not be negative", lambda v: v >= 0, ["patch_neighbours"])])


# ---- streams -----------------------------------------------------------------------------------
class PatchSOP(SOP):
    """S.8. Its targets are those of S.5, for hidden patches."""

    def forward(self, h_s, P_t, weights, protos_s):
        """h_s (m, D), P_t (m, K), weights (m,): how much each patch counts -> a scalar."""
        log_P = protos_s.log_probabilities(h_s, self.tau)  # (m, K)
        return -(weights * (P_t * log_P).sum(-1)).sum()


def patch_bank(args):
    """The memory of patches, and its anchors: others than those of class tokens in each step."""
    vectors = args.batch_size * args.patch_rows  # that enter it in a step
    return Bank(args.num_patch_prototypes, args.bottleneck_dim, args.logit_scale,
                args.seed + heads.SEED_OF_SECOND_SET, M=args.patch_memory or 8 * vectors,
                k=args.patch_neighbours, B=vectors, of="patch-")


def streams(args, steps_per_epoch, gmm_start, device):
    """(class stream, patch stream), as zoo/ibot.py wants them; no mixture starts here."""
    patch_loss = PatchSOP(args.num_patch_prototypes, args.student_temp, args.teacher_temp[1])
    return (ibot.Stream(Bank.from_args(args).to(device), SOP.from_args(args, steps_per_epoch)),
            ibot.Stream(patch_bank(args).to(device), patch_loss))


def main(argv=None):
    """One training run. Returns its final metrics; bad input is one sentence and exit code 2."""
    return ibot.main(argv, parse, streams)


def load_run(path):
    """As runs.load_run: the teacher's class tokens, their memory and their loss."""
    return ibot.load_run(path, flags, SOP)


if __name__ == "__main__":
    main()
