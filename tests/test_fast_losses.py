"""blocks.py against losses.py: the same values and gradients, whatever the blocks; and a few sentences of its own."""
import functools
import os

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn import functional as F

import heads
import losses
import methods
from fast.losses import carp_blocks, dino_blocks


def case(V=4, B=6, D=8, K=48, seed=0, size=1.0):
    """h_s with gradient, h_t, C_s with gradient, C_t, a permutation."""
    gen = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=gen)
    return ((size * draw(V, B, D)).requires_grad_(), size * draw(2, B, D), draw(K, D).requires_grad_(), draw(K, D),
            torch.randperm(K, generator=gen))


def gradients(loss, *inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs, retain_graph=False)]


def close(ours, theirs, rel=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= rel * b.abs().max().clamp_min(1e-6)


# budgets: one logit at a time (one partition, one image), two images, two partitions, everything
@pytest.mark.parametrize("budget", [1, 2 * 4 * 12, 2 * 6 * 4 * 12, 10 ** 9])
@pytest.mark.parametrize("P, scale", [(12, 1.0), (12, 2.5), (48, 1.0), (2, 1.0)])
def test_carp_equals_the_loss_of_all_logits(budget, P, scale):
    h_s, h_t, C_s, C_t, perm = case()
    want = losses.carp(scale * h_s @ C_s.T, scale * h_t @ C_t.T, P, perm)
    terms = carp_blocks(h_s, h_t, C_s, C_t, P, perm, scale=scale, budget=budget)
    close([terms["consistency"].detach(), terms["entropy"]], [want["consistency"].detach(), want["entropy"].detach()])
    close(gradients(sum(terms.values()), h_s, C_s), gradients(sum(want.values()), h_s, C_s))


@pytest.mark.parametrize("budget", [1, 150, 10 ** 9])
def test_prototypes_brought_to_length_one_a_block_at_a_time(budget):
    """unit: the losses of normalised prototypes, and gradients with respect to those as they are kept."""
    h_s, h_t, C_s, C_t, perm = case(seed=1)
    unit_s, unit_t = F.normalize(C_s, dim=1), F.normalize(C_t, dim=1)
    want = losses.carp(1.5 * h_s @ unit_s.T, 1.5 * h_t @ unit_t.T, 12, perm)
    ours = carp_blocks(h_s, h_t, C_s, C_t, 12, perm, scale=1.5, unit=True, budget=budget)
    close(gradients(sum(ours.values()), h_s, C_s), gradients(sum(want.values()), h_s, C_s))
    p_t = torch.rand(2, 6, 48, generator=torch.Generator().manual_seed(2)).softmax(-1)
    want = losses.dino(1.5 * h_s @ F.normalize(C_s, dim=1).T, p_t)["cross_entropy"]
    ours = dino_blocks(h_s, p_t, C_s, scale=1.5, unit=True, budget=budget)
    close(gradients(ours, h_s, C_s), gradients(want, h_s, C_s))


def test_carp_against_central_differences():
    """losses.carp's gradient is autograd's; this one asks the value alone."""
    h_s, h_t, C_s, C_t, perm = case(V=3, B=2, D=4, K=12)
    sum(carp_blocks(h_s, h_t, C_s, C_t, 4, perm, budget=30).values()).backward()
    h, c = h_s.detach().double(), C_s.detach().double()

    def value(h, c):
        return float(sum(losses.carp((h @ c.T).double(), h_t.double() @ C_t.double().T, 4, perm).values()))
    # losses.carp rounds to float32, so the step is wide
    for x, grad, at in ((h, h_s.grad, (1, 0, 2)), (h, h_s.grad, (2, 1, 0)), (c, C_s.grad, (5, 1)), (c, C_s.grad, (0, 3))):
        step = torch.zeros_like(x)
        step[at] = 0.02
        high, low = (value(*((y + s * step if y is x else y) for y in (h, c))) for s in (1, -1))
        assert (high - low) / 0.04 == pytest.approx(float(grad[at]), rel=1e-2, abs=1e-4)


def test_carp_where_the_clamp_cuts():
    """Saturated softmaxes: agreements of 0 and 1 are cut at float32's eps, and carry no gradient."""
    h_s, h_t, C_s, C_t, perm = case(size=60.0)
    agree = (h_s @ C_s.T).view(4, 6, 4, 12).softmax(-1)[2] * (h_t @ C_t.T).view(2, 6, 4, 12).softmax(-1)[0]
    assert (agree.sum(-1) < losses.EPS).any() and (agree.sum(-1) > losses.EPS).any()
    want = losses.carp(h_s @ C_s.T, h_t @ C_t.T, 12, perm)
    ours = carp_blocks(h_s, h_t, C_s, C_t, 12, perm, budget=300)
    close(gradients(sum(ours.values()), h_s, C_s), gradients(sum(want.values()), h_s, C_s))


@pytest.mark.parametrize("kind", [heads.Joint, heads.Frozen])
def test_the_loss_of_the_loop_is_carp_of_the_logits(kind):
    """CARPLoss on prototype sets: teacher and student with different prototypes, or with the same object."""
    h_s, h_t = case()[:2]
    protos_s = kind(32, 8, scale=1.5)
    protos_t = protos_s.twin()
    if kind is heads.Joint:
        with torch.no_grad():
            protos_t.weight.copy_(torch.randn(32, 8, generator=torch.Generator().manual_seed(3)))
    terms = methods.CARPLoss(32, 8, 7, None)(h_s, h_t, protos_s, protos_t, 5)
    perm = torch.randperm(32, generator=torch.Generator().manual_seed(7 * 1_000_003 + 5))
    want = losses.carp(protos_s.logits(h_s), protos_t.logits(h_t), 8, perm)
    inputs = [h_s, *protos_s.parameters()]
    close(gradients(sum(terms.values()), *inputs), gradients(sum(want.values()), *inputs))


def test_one_backward_scaled_by_what_comes_in():
    h_s, h_t, C_s, C_t, perm = case()
    loss = sum(carp_blocks(h_s, h_t, C_s, C_t, 12, perm).values())
    (loss / 4).backward(retain_graph=True)
    quarter = h_s.grad.clone()
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
    h_s.grad = None
    sum(carp_blocks(h_s, h_t, C_s, C_t, 12, perm).values()).backward()
    assert torch.allclose(4 * quarter, h_s.grad, rtol=1e-6)


def test_carp_refuses_a_partition_that_does_not_fit():
    h_s, h_t, C_s, C_t, perm = case()
    with pytest.raises(ValueError, match=r"prototypes \(48\) must be a multiple of the partition size \(10\)"):
        carp_blocks(h_s, h_t, C_s, C_t, 10, perm)


def test_no_gradient_is_formed_for_prototypes_that_are_not_trained():
    h_s, h_t, C_s, _, perm = case()
    C = C_s.detach()
    loss = sum(carp_blocks(h_s, h_t, C, C, 12, perm, budget=100).values())
    close(gradients(loss, h_s), gradients(sum(losses.carp(h_s @ C.T, h_t @ C.T, 12, perm).values()), h_s))


@pytest.mark.parametrize("budget", [1, 200, 10 ** 9])
@pytest.mark.parametrize("scale, tau, biased", [(1.0, 0.1, False), (2.0, 0.5, True), (20.0, 0.1, True)])
def test_dino_equals_the_loss_of_all_logits(budget, scale, tau, biased):
    h_s, h_t, C, _, _ = case(K=33)
    p_t = (3 * h_t @ C.detach().T).softmax(-1) * torch.tensor([1.0, 0.9])[:, None, None]  # mass need not be one
    bias = torch.randn(33, generator=torch.Generator().manual_seed(1)).requires_grad_() if biased else None
    want = losses.dino(scale * h_s @ C.T, p_t, tau, bias if biased else 0.0)["cross_entropy"]
    inputs = [h_s, C] + [bias] * biased
    ours = dino_blocks(h_s, p_t, C, bias, tau, scale, budget=budget)
    close(gradients(ours, *inputs), gradients(want, *inputs), rel=2e-5)


def test_dino_with_fixed_prototypes_and_a_bias():
    h_s, h_t, C, _, _ = case()
    C, p_t, bias = C.detach(), F.normalize(torch.rand(2, 6, 48), p=1, dim=-1), torch.randn(48)
    close(gradients(dino_blocks(h_s, p_t, C, bias, budget=100), h_s),
          gradients(losses.dino(h_s @ C.T, p_t, bias=bias)["cross_entropy"], h_s), rel=2e-5)
    bias.requires_grad_()
    close(gradients(dino_blocks(h_s, p_t, C, bias, budget=100), bias),
          gradients(losses.dino(h_s @ C.T, p_t, bias=bias)["cross_entropy"], bias), rel=2e-5)


def rank(r, world, port, queue):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(r), WORLD_SIZE=str(world))
    from support import ddp
    ddp.RANK, ddp.WORLD = r, world
    ddp.setup("cpu")
    h_s, h_t, C_s, C_t, perm = case()
    own = slice(r * 6 // world, (r + 1) * 6 // world)
    h = h_s.detach()[:, own].clone().requires_grad_()
    terms = carp_blocks(h, h_t[:, own], C_s, C_t, 12, perm, ddp.mean_over_ranks, budget=150)
    sum(terms.values()).backward()
    values = ddp.average_gradients([C_s], torch.stack([v.detach() for v in terms.values()]))
    queue.put((r, values.numpy(), h.grad.numpy(), C_s.grad.numpy()))
    ddp.cleanup()


def test_two_processes_equal_one():
    """Gradients averaged over two gloo processes with half the images each are those of one process, to 1e-6."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=rank, args=(r, 2, 29_700 + os.getpid() % 90, queue)) for r in range(2)]
    for p in ranks:
        p.start()
    got = sorted((queue.get() for _ in ranks), key=lambda x: x[0])
    for p in ranks:
        p.join()
    h_s, h_t, C_s, C_t, perm = case()
    terms = carp_blocks(h_s, h_t, C_s, C_t, 12, perm)
    want = [v.item() for v in terms.values()]
    sum(terms.values()).backward()
    for r, values, grad_h, grad_C in got:
        assert values.tolist() == pytest.approx(want, abs=1e-6)
        assert torch.allclose(torch.from_numpy(grad_C), C_s.grad, atol=1e-6)
        # a rank's own loss is a mean over its half of the images
        assert torch.allclose(torch.from_numpy(grad_h) / 2, h_s.grad[:, r * 3:(r + 1) * 3], atol=1e-6)
