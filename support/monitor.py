"""What goes wrong in prototype training, named while it happens: once, in plain words, with the flags to try.

Thresholds are round numbers chosen so that the default run is silent; each is the first number of its sentence.
"""
import math


class Monitor:
    """look(row) -> sentences about a row of the log that were not said before in this process. K: prototypes."""

    def __init__(self, K):
        self.K, self.said = K, set()

    def look(self, row):
        new = {name: text for name, text in troubles(row, self.K).items() if name not in self.said}
        self.said |= new.keys()
        return list(new.values())


def troubles(row, K):
    """{name: sentence} for a row {column of log.csv: number or None}; K prototypes."""
    def at(name):
        value = row.get(name)
        return math.nan if value is None else float(value)  # comparisons with NaN are all false
    out = {}
    # a fifth of the run is enough for every preset to leave ln K; before that the loss rests there lawfully
    if 0.995 < at("loss_over_ln_k") < 1.005 and at("progress") > 0.2:
        out["uniform"] = (f"the loss rests at {at('loss_over_ln_k'):.3f} of ln K, the loss of a student that says "
                          "nothing: try a lower --lr, a longer --warmup-epochs, or a higher --logit-scale")
    # exp of the entropy of the mean assignment is the number of prototypes in effect
    if at("perplexity") * K < 2 and K > 8:
        out["one"] = (f"one prototype takes all: {at('perplexity') * K:.1f} of {K} are in effect. Try a lower --lr, a "
                      "higher --teacher-temp or --targets sinkhorn (dino), --gmm-init features and a later --gmm-start "
                      "(decoupled), or --prototypes live")
    if at("unique_0.025") < 0.5:
        out["collapse"] = (f"partial prototype collapse: {100 * at('unique_0.025'):.0f} % of the prototypes are unique "
                           "at eps 0.025. Try --prototypes kp, live or frozen")
    # the means of a mixture lie on the data, and cannot be more unique at 0.5 than the data are: that is no collapse
    elif at("unique_0.5") < 0.5 and row.get("mixture_used") is None:
        out["collapse"] = (f"partial prototype collapse begins: {100 * at('unique_0.5'):.0f} % of the prototypes are "
                           "unique at eps 0.5. Try --prototypes kp, live or frozen")
    if row.get("mixture_used") is not None and at("used") < 0.05:
        out["dead"] = (f"the mixture is dead: {100 * at('used'):.1f} % of its components are anybody's most "
                       "responsible one. Try a later --gmm-start, --head-norm, or --prototypes live")
    if at("h_norm") < 1e-2:
        out["vanishing"] = (f"the vectors h vanish: their typical length is {at('h_norm'):.1e}. Try a lower "
                            "--weight-decay-end or --lr, or --head-norm")
    if at("h_norm") > 1e3:
        out["exploding"] = (f"the vectors h explode: their typical length is {at('h_norm'):.1e}. Try --head-norm, a "
                            "lower --lr, or a smaller --clip-grad")
    return out
