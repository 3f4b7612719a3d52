"""--forgetting sample: forgetting that counts vectors instead of steps, as the rule that A.3 cites.

A.3 of the paper gives component k the exponent mean_i gamma_ik, and so at most one step's worth of
forgetting for a whole batch. The rule it is taken from (Celaya and Agostini) takes the vectors one
by one, S <- eta^gamma_ik S + (1 - eta^gamma_ik) / (1 - eta) {1, h_i, h_i^2}, with the exponent of
each.
"""
import torch

from gmm import TINY


def per_sample(Mixture):
    """A subclass of the mixture class `Mixture` (OnlineGMM or FastGMM) with this rule for A.3."""

    class SampleForgetting(Mixture):
        def init_from(self, h, how="features", mass=None):
            super().init_from(h, how, mass=1.0)  # the vector a component starts from is one sample

        def forget(self, ks, T_pi, T_mu, T_sig, N, eta):
            # The vectors of a step are taken at once: the exponent is T_pi = sum_i gamma_ik, and
            # what comes in is the mean sample S~ / T_pi times 1 / (1 - eta), the samples that S
            # remembers.
            kept = torch.exp(T_pi * eta.log())  # (|ks|,), eta^T_pi
            taken = -torch.expm1(T_pi * eta.log())  # (|ks|,), 1 - eta^T_pi
            taken = taken / ((1 - eta) * T_pi).clamp_min(TINY)  # (|ks|,)
            self.S_pi[ks] = kept * self.S_pi[ks] + taken * T_pi
            self.S_mu[ks] = kept[:, None] * self.S_mu[ks] + taken[:, None] * T_mu
            self.S_sig[ks] = kept[:, None] * self.S_sig[ks] + taken[:, None] * T_sig

    return SampleForgetting
