"""Whole runs and evaluations on a pretended GPU (pretended_gpu.py).

The runs are those that a GPU would run, line by line: its tensors have values, so nothing is left
out where code branches on them, Def. 2.1's count included. A tensor that was left on the CPU, or a
generator that draws for another device, ends them with an error. Their logs are those of a CPU, up
to rounding.

What this cannot see: kernels of CUDA, their rounding and whether they exist; speed and memory, and
where the CPU waits for the GPU; a number (a tensor without dimensions) left on the CPU where a GPU
takes it, too; torch.compile; several processes. Autocast does not change the pretended tensors, so
the dtypes under it have tests of their own below, with PyTorch's FakeTensorMode, which has dtypes
and no values.
"""
import pytest
import torch

import collapse
import eval_knn
import heads
import losses
from conftest import TINY, read_log, small_sets, train_tiny
from fast.gmm import FastGMM
from pretended_gpu import PretendedGPU
from zoo import capi, ibot, msn, sop

pytestmark = [
    pytest.mark.usefixtures("small_shapes"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: none is pretended")]
TWO_STEPS = ["--steps", "2", "--log-every", "1", "--eval-every", "2"]
# a method for each prototype set, so that each of both has a run
METHOD = {"joint": "dino", "kp": "carl", "vmf": "dino", "frozen": "supervised",
          "decoupled": "carp", "live": "carp-uniform", "kmeans": "deepcluster",
          "clustered": "dino", "bank": "sop"}
OF_CAPI = ["--batch-size", "8", "--num-prototypes", "16", "--arch", "capi_test", "--gmm-start", "1",
           "--eval-bank", "60", "--eval-queries", "40"]
SPECIAL = {"vmf": ["--targets", "prob"]}


# ---- the pretence itself -----------------------------------------------------------------------
@pytest.mark.parametrize("mixed", [
    lambda x, y: x + y,
    lambda x, y: y.add_(x),
    lambda x, y: x @ y.T,
    lambda x, y: torch.cat([x, y]),
    lambda x, y: torch.where(x > 0, x, y),
    lambda x, y: x[torch.arange(2)],
    lambda x, y: y[torch.arange(2, device="cuda")],
    lambda x, y: x.masked_fill(y > 0, 0.),
    lambda x, y: x.index_add_(0, torch.arange(3), x),
    lambda x, y: torch.rand(3, device="cuda", generator=torch.Generator()),
    lambda x, y: y.sum().add_(x.sum()),
    lambda x, y: x.numpy(),
])
def test_what_a_gpu_refuses_is_refused(mixed):
    with PretendedGPU():
        x, y = torch.randn(3, 4, device="cuda"), torch.randn(3, 4)
        with pytest.raises((RuntimeError, TypeError)):
            mixed(x, y)


def test_what_a_gpu_takes_is_computed():
    y = torch.randn(3, 4)
    with PretendedGPU():
        x = y.to("cuda")
        assert x.device == torch.device("cuda:0") and x.is_cuda
        assert torch.equal((x * torch.tensor(2.) + 1).cpu(), 2 * y + 1)
        x[1:, 0] = 5
        assert x[:, 0].tolist() == [float(y[0, 0]), 5., 5.]
        weight = torch.ones(4, device="cuda", requires_grad=True)
        (x @ weight).sum().backward()
        assert torch.equal(weight.grad.cpu(), x.cpu().sum(0))
    assert y.device.type == "cpu" and not torch.cuda.is_available()


# ---- runs --------------------------------------------------------------------------------------
def same_logs(tmp_path, run, *flags):
    """run(out, *flags) on the CPU and on the pretended GPU; their logs are equal up to rounding."""
    run(tmp_path / "cpu", *flags)
    with PretendedGPU():
        run(tmp_path / "cuda", *flags, "--device", "cuda")
    on_cpu, on_gpu = read_log(tmp_path / "cpu"), read_log(tmp_path / "cuda")
    assert len(on_cpu) == len(on_gpu) > 1
    for row, other in zip(on_cpu, on_gpu):
        assert row.keys() == other.keys()
        for column, text in row.items():
            assert bool(text) == bool(other[column])
            if text:
                assert float(other[column]) == pytest.approx(float(text), rel=1e-3, abs=1e-4), column


@pytest.mark.parametrize("prototypes", heads.PROTOTYPES)
def test_train(tmp_path, prototypes):
    same_logs(tmp_path, train_tiny, *TWO_STEPS, "--prototypes", prototypes,
              "--method", METHOD[prototypes], *SPECIAL.get(prototypes, []))


@pytest.mark.parametrize("flags", [
    ["--optimizer", "lars", "--clip-grad", "0.3", "--accum", "2"],
    ["--optimizer", "sgd", "--student-prototypes", "joint"],
    ["--method", "swav", "--prototypes", "joint", "--queue", "16"],
    ["--method", "dino", "--targets", "sinkhorn", "--drop-path", "0.1", "--gmm-init", "random"],
], ids=["lars", "sgd", "swav", "sinkhorn"])
def test_other_parts_of_train(tmp_path, flags):
    same_logs(tmp_path, train_tiny, *TWO_STEPS, *flags)


def test_the_files_of_fast(tmp_path, monkeypatch):
    """The same runs, with sizes above the limits at which fast/ takes over."""
    monkeypatch.setattr(losses, "MOST_LOGITS", 0)
    monkeypatch.setattr(eval_knn, "PLAIN_UP_TO", 0)
    monkeypatch.setattr(collapse, "PLAIN_UP_TO", 0)
    monkeypatch.setattr(heads, "OnlineGMM", FastGMM)
    for flags in (["--method", "carp"], ["--method", "dino", "--prototypes", "vmf"]):
        same_logs(tmp_path / flags[1], train_tiny, *TWO_STEPS, *flags)


@pytest.mark.parametrize("script, flags", [
    (ibot, ["--place-mean", "--targets", "sinkhorn", "--prototypes", "decoupled"]),
    (ibot, ["--patch-prototypes", "vmf", "--patch-targets", "prob", "--no-shared-head"]),
    (capi, ["--student-prototypes", "joint"]),
    (capi, ["--prototypes", "decoupled", "--sinkhorn", "all", "--positions", "learned"]),
    (msn, ["--prior", "0.25"]),
    (sop, ["--patch-neighbours", "2"]),
], ids=["ibot", "ibot-vmf", "capi", "capi-decoupled", "msn", "sop"])
def test_scripts_of_zoo(tmp_path, monkeypatch, script, flags):
    monkeypatch.setitem(capi.ENCODERS, "capi_test", (16, 1, 2, 1))
    monkeypatch.setitem(capi.CHOICES, "arch", list(capi.ENCODERS))
    size = OF_CAPI if script is capi else TINY

    def run(out, *flags):
        script.main([*size, "--out", str(out), *flags])
    same_logs(tmp_path, run, *TWO_STEPS, *flags)
