"""
What goes wrong in prototype training, named while it happens: once, with the flags to try.

The thresholds are round numbers, chosen so that the default run gives no warning.
"""
import math


class Monitor:
    """Warns of each kind of trouble once in a run. K: number of prototypes."""

    def __init__(self, K):
        self.K = K
        self.kinds_warned_of = set()

    def warnings(self, row):
        """Sentences about a row of the log, {column of log.csv: number or None}, that are new."""
        new = {kind: sentence for kind, sentence in troubles(row, self.K).items()
               if kind not in self.kinds_warned_of}
        self.kinds_warned_of |= new.keys()
        return list(new.values())


def troubles(row, K):
    """{kind of trouble: sentence} for a row {column of log.csv: number or None}; K prototypes."""
    def measure(name):
        value = row.get(name)
        return math.nan if value is None else float(value)  # comparisons with NaN are all false

    loss_over_ln_k = measure("loss_over_ln_k")
    effective = measure("perplexity") * K  # exp(entropy of the mean assignment): prototypes in use
    unique = measure("unique_0.025")
    unique_strict = measure("unique_0.5")
    used = measure("used")
    h_norm = measure("h_norm")
    mixture_runs = row.get("mixture_used") is not None
    sentences = {}
    # Every run starts at ln K, and rests there for a while. A fifth of the run is enough for every
    # preset to leave it.
    if 0.995 < loss_over_ln_k < 1.005 and measure("progress") > 0.2:
        sentences["uniform"] = (
            f"the first term of the loss stays at {loss_over_ln_k:.3f} of its value at the start: "
            "the student gives all prototypes of a softmax the same probability. Try a lower --lr, "
            "a longer --warmup-epochs, or a higher --logit-scale")
    if effective < 2 and K > 8:
        sentences["one prototype"] = (
            f"nearly all images go to one prototype: the perplexity is {effective:.1f} of {K}. Try "
            "a lower --lr, a higher --teacher-temp or --targets sinkhorn (dino), --gmm-init "
            "features and a later --gmm-start (decoupled), or --prototypes live")
    if unique < 0.5:
        sentences["collapse"] = (
            f"partial prototype collapse: {100 * unique:.0f} % of the prototypes are unique at "
            "eps 0.025. Try --prototypes kp, live or frozen")
    # The means of a mixture lie on the data, and cannot be more unique at eps 0.5 than the data
    # are: for them, few at 0.5 are no collapse.
    elif unique_strict < 0.5 and not mixture_runs:
        sentences["collapse"] = (
            f"many prototypes lie close together: only {100 * unique_strict:.0f} % are unique at "
            "eps 0.5 (60 degrees). Try --prototypes kp, live or frozen")
    if used < 0.05 and mixture_runs:
        sentences["unused"] = (
            f"most of the mixture is unused: only {100 * used:.1f} % of its components are the "
            "most responsible one for any image. Try a later --gmm-start, --head-norm, or "
            "--prototypes live")
    if h_norm < 1e-2:
        sentences["vanishing"] = (
            f"the head's outputs h shrink to nothing: their median length is {h_norm:.1e}. Try a "
            "lower --weight-decay-end or --lr, or --head-norm")
    if h_norm > 1e3:
        sentences["exploding"] = (
            f"the head's outputs h grow without limit: their median length is {h_norm:.1e}. Try "
            "--head-norm, a lower --lr, or a smaller --clip-grad")
    return sentences
