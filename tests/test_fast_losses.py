"""fast/losses.py: values and gradients of the plain losses, whatever the blocks and processes."""
import functools
import os

import pytest
import torch
from torch.nn import functional as F

import forked
import heads
import losses
from fast import losses as fast


class Given(heads.Joint):
    """A prototype set with given vectors, which are not brought to length one."""

    def __init__(self, C, scale=1.0):
        super().__init__(*C.shape, scale)
        self.weight = torch.nn.Parameter(C.detach().clone())

    def directions(self):
        return self.weight


def case(V=4, B=6, D=8, K=48, seed=0, size=1.0, scale=1.0):
    """h_s with gradient, h_t, two prototype sets of which the first is trained, a permutation."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    h_s, h_t = (size * draw(V, B, D)).requires_grad_(), size * draw(2, B, D)
    protos_s, protos_t = Given(draw(K, D), scale), Given(draw(K, D), scale)
    perm = torch.randperm(K, generator=generator)
    return h_s, h_t, protos_s, protos_t.requires_grad_(False), perm


def plain_carp(h_s, h_t, protos_s, protos_t, P, perm):
    return losses.carp(protos_s.logits(h_s), protos_t.logits(h_t), P, perm)


def fast_carp(*arguments):
    return fast.carp(losses.carp, *arguments)


def gradients(loss, *inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def close(ours, theirs, rel=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= rel * b.abs().max().clamp_min(1e-6)


@pytest.fixture(params=[1, 2 * 6 * 4 * 12, 10 ** 9], ids=["smallest", "two", "all"])
def blocks(request, monkeypatch):
    """Blocks of one partition (or prototype), of two partitions, and one block of everything."""
    monkeypatch.setattr(fast, "logits_at_a_time", lambda device: request.param)


@pytest.mark.parametrize("P, scale", [(12, 1.0), (12, 2.5), (48, 1.0), (2, 1.0)])
def test_carp(blocks, P, scale):
    *sets, perm = case(scale=scale)
    expected, terms = plain_carp(*sets, P, perm), fast_carp(*sets, P, perm)
    assert list(terms) == list(expected)
    inputs = [sets[0], sets[2].weight]
    for weights in ((1, 1), (1, 0), (0, 1), (0.5, 10)):  # each term has a gradient of its own
        ours, theirs = (sum(w * t for w, t in zip(weights, found.values()))
                        for found in (fast_carp(*sets, P, perm), plain_carp(*sets, P, perm)))
        close(gradients(ours, *inputs), gradients(theirs, *inputs))


@pytest.mark.parametrize("tau, biased", [(0.1, False), (0.5, True)])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_dino(blocks, scale, tau, biased):
    h_s, h_t, protos, _, _ = case(K=33, scale=scale)
    bias = torch.randn(33, generator=torch.Generator().manual_seed(1)).requires_grad_()
    protos.bias = lambda tau: bias if biased else 0.0
    p_t = (3 * h_t @ protos.weight.detach().T).softmax(-1)
    p_t = p_t * torch.tensor([1.0, 0.9])[:, None, None]  # the mass need not be one
    expected = losses.dino(protos.logits(h_s), p_t, tau, protos.bias(tau))["cross_entropy"]
    ours = fast.dino(losses.other_crop, h_s, p_t, protos, tau)["cross_entropy"]
    inputs = [h_s, protos.weight] + [bias] * biased
    close(gradients(ours, *inputs), gradients(expected, *inputs), rel=2e-5)


def test_dino_trains_the_lengths_of_vmf(blocks):
    protos = heads.VMF(33, 8)
    with torch.no_grad():
        protos.gain += torch.rand(33, 1, generator=torch.Generator().manual_seed(1))
    h_s, h_t = case()[:2]
    p_t = F.normalize(h_t, dim=-1) @ protos.vectors().T
    expected = losses.dino(protos.logits(h_s), p_t.softmax(-1), 0.1, protos.bias(0.1))
    ours = fast.dino(losses.other_crop, h_s, p_t.softmax(-1), protos)
    inputs = [h_s, protos.weight, protos.gain]
    close(gradients(ours["cross_entropy"], *inputs),
          gradients(expected["cross_entropy"], *inputs), rel=2e-5)


def test_carp_where_the_clamp_cuts(blocks):
    """Agreements near 0 and 1 are cut at float32's eps, and carry no gradient there."""
    *sets, perm = case(size=60.0)
    h_s, h_t, protos_s, protos_t = sets
    p = protos_s.logits(h_s).view(4, 6, 4, 12).softmax(-1)[2]
    q = protos_t.logits(h_t).view(2, 6, 4, 12).softmax(-1)[0]
    agree = (p * q).sum(-1)
    assert (agree < losses.EPS).any() and (agree > losses.EPS).any()
    inputs = [h_s, protos_s.weight]
    close(gradients(sum(fast_carp(*sets, 12, perm).values()), *inputs),
          gradients(sum(plain_carp(*sets, 12, perm).values()), *inputs))


def test_prototypes_without_a_gradient_and_a_shared_set(blocks):
    h_s, h_t, _, protos, perm = case()
    sets = h_s, h_t, protos, protos
    close(gradients(sum(fast_carp(*sets, 12, perm).values()), h_s),
          gradients(sum(plain_carp(*sets, 12, perm).values()), h_s))
    assert protos.weight.grad is None


def test_backward_scales_and_repeats():
    *sets, perm = case()
    loss = sum(fast_carp(*sets, 12, perm).values())
    (loss / 4).backward(retain_graph=True)
    quarter = sets[0].grad.clone()
    sets[0].grad = None
    loss.backward()
    assert torch.allclose(4 * quarter, sets[0].grad, rtol=1e-6)


def test_what_is_changed_in_the_plain_loss_is_changed_here(blocks):
    """The blocks are computed by the plain function that is passed in."""
    *sets, perm = case()

    def other(*arguments, **options):
        terms = losses.carp(*arguments, **options)
        return {"consistency": terms["consistency"]}
    assert list(fast.carp(other, *sets, 12, perm)) == ["consistency"]


def test_a_partition_that_does_not_fit_is_refused():
    *sets, perm = case()
    with pytest.raises(ValueError, match="must be a multiple of the partition size"):
        fast_carp(*sets, 10, perm)


def one_of_two(rank, port, queue):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank),
                      WORLD_SIZE="2")
    from support import ddp
    ddp.RANK, ddp.WORLD = rank, 2
    ddp.setup("cpu")
    fast.logits_at_a_time = lambda device: 150
    h_s, h_t, protos_s, protos_t, perm = case()
    own = slice(rank * 3, rank * 3 + 3)
    h = h_s.detach()[:, own].clone().requires_grad_()
    terms = fast_carp(h, h_t[:, own], protos_s, protos_t, 12, perm, ddp.mean_over_ranks)
    sum(terms.values()).backward()
    values = torch.stack([v.detach() for v in terms.values()])
    values = ddp.average_gradients([protos_s.weight], values)
    queue.put((rank, values.numpy(), h.grad.numpy(), protos_s.weight.grad.numpy()))
    ddp.cleanup()


def test_two_processes_equal_one():
    """Gradients averaged over two gloo processes, half of the images each, are those of one."""
    queue, port = forked.server.SimpleQueue(), 29_700 + os.getpid() % 90
    ranks = [forked.server.Process(target=one_of_two, args=(r, port, queue)) for r in range(2)]
    for process in ranks:
        process.start()
    results = sorted((queue.get() for _ in ranks), key=lambda result: result[0])
    for process in ranks:
        process.join()
    h_s, h_t, protos_s, protos_t, perm = case()
    terms = plain_carp(h_s, h_t, protos_s, protos_t, 12, perm)
    expected = [v.item() for v in terms.values()]
    sum(terms.values()).backward()
    for rank, values, of_h, of_C in results:
        assert values.tolist() == pytest.approx(expected, abs=1e-6)
        assert torch.allclose(torch.from_numpy(of_C), protos_s.weight.grad, atol=1e-6)
        # the loss of a process is a mean over its half of the images
        own = h_s.grad[:, rank * 3:(rank + 1) * 3]
        assert torch.allclose(torch.from_numpy(of_h) / 2, own, atol=1e-6)


def test_a_trained_temperature_keeps_the_plain_loss(monkeypatch):
    """fast/losses.py has no gradient for it."""
    monkeypatch.setattr(losses, "MOST_LOGITS", 0)
    h_s, h_t, protos, _, _ = case(K=33)
    p_t = (3 * h_t @ protos.weight.detach().T).softmax(-1)
    gradients_of_tau = []
    for trained in (True, False):
        loss = losses.DINOLoss(33, 1)
        loss.tau = torch.tensor(0.1, requires_grad=trained)
        value = loss(h_s, p_t, protos, protos, 0)["cross_entropy"]
        value.backward()
        gradients_of_tau.append(loss.tau.grad)
    assert gradients_of_tau[0].abs() > 0 and gradients_of_tau[1] is None
