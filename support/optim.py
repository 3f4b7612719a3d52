"""What moves the weights: AdamW, SGD, LARS; clipping; and steps that are skipped where a number is not finite."""
import torch


def make(args, params, device):
    """The optimiser that --optimizer names, in two groups: tensors that decay, and biases and norms, which do not.

    As in DINO's official code everything of two or more dimensions decays, also class tokens, position embeddings and
    the gains (K, 1) of prototypes. lr and weight_decay are set by the loop before each step.
    """
    groups = [{"params": [p for p in params if p.dim() > 1]}, {"params": [p for p in params if p.dim() < 2]}]
    return {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.0, fused=device.type != "mps"),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.0, momentum=0.9),
        "lars": lambda: LARS(groups),
    }[args.optimizer]()


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017) as DINO and CARP train ResNets: SGD with momentum 0.9, where the step
    of each tensor of two or more dimensions is as long as trust (0.001) times lr times the tensor itself."""

    def __init__(self, params, lr=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=0.0, momentum=momentum, trust=trust, fused=False))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                u = p.grad
                if p.dim() > 1:
                    u = u + group["weight_decay"] * p
                    w, n = p.norm(), u.norm()
                    u = u * torch.where((w > 0) & (n > 0), group["trust"] * w / n, 1.0)
                mu = self.state[p].setdefault("mu", torch.zeros_like(p))
                mu.mul_(group["momentum"]).add_(u)
                p.sub_(group["lr"] * mu)


def advance(optimizer, finite):
    """optimizer.step() if `finite`, a tensor (), says so."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = (~finite).float()  # as a GradScaler sets it: where 1, fused AdamW changes nothing
        optimizer.step()
    elif finite:  # waits for the answer
        optimizer.step()


def clip(params, limit):
    """Shorten each gradient tensor to `limit`, one by one as DINO's official code; returns the global norm before."""
    grads = [p.grad for p in params if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))  # (params,)
    if limit:
        torch._foreach_mul_(grads, (limit / (norms + 1e-6)).clamp(max=1).unbind())
    return norms.norm()
