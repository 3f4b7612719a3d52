"""
What goes wrong in prototype training, named while it happens: once, with the flags to try.

The thresholds are round numbers, chosen so that the default run gives no warning. What is no
trouble but easily misread is a remark, and names the page to read.
"""
import math


class Monitor:
    """Says each kind of thing once in a process.

    K: vectors of the prototype set, which are more than --num-prototypes in a set that is a memory.
    prototypes: name of the set, which no sentence then advises to try. A row of the log is {column
    of log.csv: number or None}.
    """

    def __init__(self, K, prototypes=""):
        self.K, self.prototypes = K, prototypes
        self.kinds_said = set()

    def warnings(self, row):
        """Sentences about troubles of a row of the log that are new; see `new`."""
        return self.new(troubles(row, self.K, self.prototypes))

    def remarks(self, row):
        """Sentences about states of a row of the log that are expected; see `new`."""
        return self.new(states(row, self.K))

    def new(self, sentences):
        """[sentence] of those in {kind: sentence} whose kind has not been said in this run."""
        fresh = {kind: s for kind, s in sentences.items() if kind not in self.kinds_said}
        self.kinds_said |= fresh.keys()
        return list(fresh.values())


def measure(row, name):
    value = row.get(name)
    return math.nan if value is None else float(value)  # comparisons with NaN are all false


def follows_appendix_a(row):
    """Whether the row is of a run whose prototypes are the mixture of gmm.py, and it has started:
    only that one reports eta."""
    return row.get("eta") is not None


def states(row, K):
    """{kind: sentence} of what a newcomer might take for a fault, for a row as in Monitor.new."""
    used = measure(row, "used")
    if used < 0.05 and follows_appendix_a(row):
        return {"few components": (
            f"only {round(used * K)} of the mixture's {K} components are the most responsible one "
            f"for any image; the heaviest has the weight {measure(row, 'pi_max'):.2f}. The others "
            "stay near their start; if that was at random directions, they are unique whatever the "
            "images are. This is what the printed equations do; docs/collapse.md explains it")}
    return {}


def more_unique(prototypes):
    """What to try where few prototypes are unique, for a run that has the set of this name."""
    if prototypes == "frozen":  # random directions: as unique as D dimensions allow
        return "Try a larger --bottleneck-dim or fewer --num-prototypes"
    others = [name for name in ("kp", "live", "frozen") if name != prototypes]
    return f"Try --prototypes {', '.join(others[:-1])} or {others[-1]}"


def troubles(row, K, prototypes=""):
    """{kind: sentence} of what goes wrong, for a row as in Monitor.new; K prototypes of a set with
    this name."""
    loss_over_ln_k = measure(row, "loss_over_ln_k")
    # exp(entropy of the mean assignment): about how many prototypes are in use
    effective = measure(row, "perplexity") * K
    unique = measure(row, "unique_0.025")
    unique_strict = measure(row, "unique_0.5")
    used = measure(row, "used")
    h_norm = measure(row, "h_norm")
    mixture_runs = row.get("mixture_used") is not None
    sentences = {}
    # The first term starts near its value for a uniform student, and rests there for a while. The
    # default run has left it after a fifth of its length; the long presets were not run.
    if 0.995 < loss_over_ln_k < 1.005 and measure(row, "progress") > 0.2:
        sentences["uniform"] = (
            f"the first term of the loss stays at {loss_over_ln_k:.3f} of its value at the start: "
            "the student gives all prototypes of a softmax the same probability. Try a lower --lr, "
            "a longer run (--epochs), or a higher --logit-scale")
    if effective < 2 and K > 8 and not follows_appendix_a(row):
        sentences["one prototype"] = (
            f"nearly all images go to one prototype: the perplexity is {effective:.1f} of {K}. Try "
            "a lower --lr, or a higher --teacher-temp or --targets sinkhorn (dino)")
    if unique < 0.5:
        sentences["collapse"] = (
            f"partial prototype collapse: {100 * unique:.0f} % of the prototypes are unique at "
            f"eps 0.025. {more_unique(prototypes)}")
    # Means that lie on the data cannot be more unique at eps 0.5 than the data are: so for a
    # mixture, few at 0.5 are no collapse.
    elif unique_strict < 0.5 and not mixture_runs:
        sentences["collapse"] = (
            f"many prototypes lie close together: only {100 * unique_strict:.0f} % are unique at "
            f"eps 0.5 (60 degrees). {more_unique(prototypes)}")
    if used < 0.05 and mixture_runs and not follows_appendix_a(row):
        sentences["unused"] = (
            f"most prototypes are unused: only {100 * used:.1f} % are the most probable one for "
            "any image. Try --head-norm, or a later --gmm-start for a mixture")
    if h_norm < 1e-2:
        sentences["vanishing"] = (
            f"the head's outputs h shrink to nothing: their median length is {h_norm:.1e}. Try a "
            "lower --weight-decay-end or --lr, or --head-norm")
    if h_norm > 1e3:
        sentences["exploding"] = (
            f"the head's outputs h grow without limit: their median length is {h_norm:.1e}. Try "
            "--head-norm, a lower --lr, or a smaller --clip-grad")
    return sentences
