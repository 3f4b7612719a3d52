"""What moves the weights: AdamW, SGD, LARS; and a step that is skipped if it is not finite."""
import torch

from support import ddp


def make(args, params):
    """The optimiser that --optimizer names, in two groups: with weight decay, and without.

    Biases and norms have none. As in DINO's official code everything of two or more dimensions
    decays, class tokens, position embeddings and the gains (K, 1) of prototypes included. The loop
    sets lr and weight decay.
    """
    return OPTIMIZERS[args.optimizer]([{"params": [p for p in params if p.dim() > 1]},
                                       {"params": [p for p in params if p.dim() < 2]}])


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017), as DINO and CARP train ResNets.

    SGD with momentum. Before it enters the momentum, the gradient of each tensor of two or more
    dimensions, with its weight decay, is scaled to trust times the length of the tensor.
    """

    def __init__(self, params):
        super().__init__(params, dict(lr=0.0, weight_decay=0.0, momentum=0.9, trust=0.001))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                u = p.grad
                if p.dim() > 1:
                    u = u + group["weight_decay"] * p
                    length, other = p.norm(), u.norm()
                    adapt = (length > 0) & (other > 0)
                    u = u * torch.where(adapt, group["trust"] * length / other, 1.0)
                mu = self.state[p].setdefault("mu", torch.zeros_like(p))
                mu.mul_(group["momentum"]).add_(u)
                p.sub_(group["lr"] * mu)


# name of --optimizer: what makes it of two groups of parameters
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.0, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.0, momentum=0.9),
    "lars": LARS,
}


class CheckedStep:
    """One step of the optimiser that all processes take or skip alike, decided on the device.

    optimizer   of `make`
    modules     their buffers, the running averages of batch norm among them, are put back by a skip
    clip_grad   largest norm of the gradient of one parameter tensor; 0: any
    still       parameters that stand still for the first `still_steps` steps (--freeze-prototypes)
    factors     (of the learning rate, of the weight decay) for each group of the optimiser
    """

    def __init__(self, optimizer, modules, clip_grad=0.0, still=(), still_steps=0,
                 factors=((1.0, 1.0), (1.0, 0.0))):
        self.optimizer, self.clip_grad, self.factors = optimizer, clip_grad, factors
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.still, self.still_steps = list(still), still_steps
        self.buffers = [b for module in modules for b in module.buffers()]
        self.before = [b.clone() for b in self.buffers]

    @torch.no_grad()
    def __call__(self, values, step, lr, weight_decay):
        """Average, clip, step. values (n,): what the loss consists of on this process.

        Returns (values as a mean over the processes, with the gradient norm at the end (n + 1,);
        taken (): 1, or 0 if one of them is not finite and nothing has moved).
        """
        values = ddp.average_gradients(self.params, values)  # (n,)
        norm = clip([p.grad for p in self.params if p.grad is not None], self.clip_grad)  # ()
        values = torch.cat([values, norm[None]])  # (n + 1,), the same on all processes
        finite = values.isfinite().all()
        for group, (of_lr, of_decay) in zip(self.optimizer.param_groups, self.factors, strict=True):
            group["lr"], group["weight_decay"] = lr * of_lr, weight_decay * of_decay
        if step < self.still_steps:  # after the clipping, as in DINO's code
            for p in self.still:
                p.grad = None
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = (~finite).float()  # 1: fused AdamW changes nothing
            self.optimizer.step()
        elif finite:  # waits for the device
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.buffers, self.before):
            buffer.copy_(torch.where(finite, buffer, before))
            before.copy_(buffer)
        return values, finite.float()


def clip(grads, limit):
    """Shorten each gradient tensor to `limit`, as DINO's code; returns the global norm before."""
    norms = torch.stack(torch._foreach_norm(grads))  # (tensors,)
    if limit:
        torch._foreach_mul_(grads, (limit / (norms + 1e-6)).clamp(max=1).unbind())
    return norms.norm()
