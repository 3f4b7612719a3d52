"""Whole runs and evaluations on a pretended GPU, see pretended_gpu.py.

They go through the lines that a GPU would go through. As the tensors have values, nothing is left
out where code branches on them, Def. 2.1's count included. A tensor that was left on the CPU ends
them with an error, and so does a generator that draws for another device. What they give is what
the CPU gives, up to rounding.

What they cannot see: whether CUDA has a kernel for an operation, and how it rounds; speed, memory,
and where the CPU waits for the GPU; two GPUs, nccl and torch.compile; a tensor without dimensions
that was left on the CPU, where a GPU takes it as a number. Autocast does not change the pretended
tensors. So the dtypes under it have tests of their own, with the autocast of the CPU, which makes
about the same operations coarse.
"""
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import collapse
import config
import data
import eval_knn
import eval_linear
import heads
import losses
import train
import views
from conftest import (TINY, make_folder, read_log, small_sets, train_tiny, use_small_network,
                      use_small_shapes)
from fast.gmm import FastGMM
from lab import eval_dense
from pretended_gpu import CUDA, PretendedGPU
from support import optim, shapes
from zoo import capi, ibot, msn, sop

pytestmark = [
    pytest.mark.usefixtures("small_shapes", "small_network"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: none is pretended")]
TWO_STEPS = ["--steps", "2", "--log-every", "1", "--eval-every", "2", "--eval-bank", "20",
             "--eval-queries", "10"]
# a method for each prototype set, so that each of both has a run
METHOD = {"joint": "dino", "kp": "carl", "vmf": "dino", "frozen": "supervised",
          "decoupled": "carp", "live": "carp-uniform", "kmeans": "deepcluster",
          "clustered": "dino", "bank": "sop"}
OF_CAPI = ["--batch-size", "8", "--num-prototypes", "16", "--arch", "capi_test", "--gmm-start", "1",
           "--eval-bank", "60", "--eval-queries", "40"]
SPECIAL = {
    "vmf": ["--targets", "prob"],
    # fewer vectors than components at the start
    "decoupled": ["--num-prototypes", "40", "--gmm-start", "0", "--gmm-init", "features"],
    # clusters are made after a pass
    "kmeans": ["--batch-size", "50", "--steps", "3", "--local-crops", "0", "--img-size", "16"]}


# ---- the pretence itself -----------------------------------------------------------------------
@pytest.mark.parametrize("mixed", [
    lambda x, y: x + y,
    lambda x, y: y.add_(x),
    lambda x, y: x @ y.T,
    lambda x, y: torch.cat([x, y]),
    lambda x, y: torch.where(x > 0, x, y),
    lambda x, y: x[torch.arange(2)],
    lambda x, y: y[torch.arange(2, device=CUDA)],
    lambda x, y: x.masked_fill(y > 0, 0.),
    lambda x, y: x.index_add_(0, torch.arange(3), x),
    lambda x, y: torch.rand(3, device=CUDA, generator=torch.Generator()),
    lambda x, y: y.sum().add_(x.sum()),
    lambda x, y: x.numpy(),
])
def test_what_a_gpu_refuses_is_refused(mixed):
    with PretendedGPU():
        x, y = torch.randn(3, 4, device=CUDA), torch.randn(3, 4)
        with pytest.raises((RuntimeError, TypeError)):
            mixed(x, y)


def test_what_a_gpu_takes_is_computed():
    y = torch.randn(3, 4)
    with PretendedGPU():
        x = y.to(CUDA)
        assert x.device == torch.device("cuda:0") and x.is_cuda
        assert torch.equal((x * torch.tensor(2.) + 1).cpu(), 2 * y + 1)
        x[1:, 0] = 5
        assert x[:, 0].tolist() == [float(y[0, 0]), 5., 5.]
        weight = torch.ones(4, device=CUDA, requires_grad=True)
        (x @ weight).sum().backward()
        assert torch.equal(weight.grad.cpu(), x.cpu().sum(0))
    assert y.device.type == "cpu" and not torch.cuda.is_available()


# ---- runs --------------------------------------------------------------------------------------
def same_logs(tmp_path, run, *flags):
    """run(out, *flags) on the CPU and on the pretended GPU; their logs are equal up to rounding."""
    run(tmp_path / "cpu", *flags)
    with PretendedGPU():
        run(tmp_path / "cuda", *flags, "--device", CUDA)
    on_cpu, on_gpu = read_log(tmp_path / "cpu"), read_log(tmp_path / "cuda")
    assert len(on_cpu) == len(on_gpu) > 1
    for row, other in zip(on_cpu, on_gpu):
        assert row.keys() == other.keys()
        for column, text in row.items():
            assert bool(text) == bool(other[column])
            if text:
                number = pytest.approx(float(text), rel=1e-3, abs=1e-4)
                assert float(other[column]) == number, column


@pytest.mark.parametrize("prototypes", heads.PROTOTYPES)
def test_train(tmp_path, prototypes):
    same_logs(tmp_path, train_tiny, *TWO_STEPS, "--prototypes", prototypes,
              "--method", METHOD[prototypes], *SPECIAL.get(prototypes, []))


@pytest.mark.parametrize("flags", [
    ["--optimizer", "lars", "--clip-grad", "0.3", "--accum", "2", "--blur", "1", "1", "1",
     "--solarize", "0.5", "0.5", "0.5", "--gray", "0.5"],
    ["--optimizer", "sgd", "--student-prototypes", "joint"],
    ["--method", "swav", "--prototypes", "joint", "--queue", "8"],
    ["--method", "dino", "--targets", "sinkhorn", "--drop-path", "0.1", "--gmm-init", "random"],
], ids=["lars", "sgd", "swav", "sinkhorn"])
def test_other_parts_of_train(tmp_path, flags):
    same_logs(tmp_path, train_tiny, *TWO_STEPS, *flags)


def test_the_files_of_fast(tmp_path, monkeypatch):
    """The same runs, with sizes above the limits at which fast/ takes over."""
    monkeypatch.setattr(losses, "MOST_LOGITS", 0)
    monkeypatch.setattr(eval_knn, "PLAIN_UP_TO", 0)
    monkeypatch.setattr(collapse, "PLAIN_UP_TO", 0)
    updated, update = [], FastGMM.update
    monkeypatch.setattr(heads.Decoupled, "Mixture", FastGMM)
    monkeypatch.setattr(FastGMM, "update", lambda gmm, h, *others: (
        updated.append(h.device.type), update(gmm, h, *others))[1])
    for flags in (["--method", "carp"], ["--method", "dino", "--prototypes", "vmf"]):
        same_logs(tmp_path / flags[1], train_tiny, *TWO_STEPS, *flags)
    assert updated == ["cpu", "cuda"]  # in the second step of the first two runs


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_a_step_that_is_not_finite_is_skipped(optimizer):
    args = SimpleNamespace(optimizer=optimizer)
    with PretendedGPU():
        norm = torch.nn.BatchNorm1d(4).to(CUDA)
        take_step = optim.CheckedStep(optim.make(args, list(norm.parameters())), [norm])
        for number, taken in ((1., 1), (float("nan"), 0)):
            before = [x.clone() for x in norm.state_dict().values()]
            loss = (norm(torch.randn(3, 4, device=CUDA)) * number).square().sum()
            loss.backward()
            values, moved = take_step(loss.detach()[None], 0, 0.1, 0.)
            assert values.is_cuda and moved.is_cuda and moved == taken
            same = [torch.equal(x, y) for x, y in zip(before, norm.state_dict().values())]
            assert all(same) if not taken else not any(same)


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


def test_a_set_on_disk_and_resume(tmp_path, monkeypatch):
    """Images come from a DataLoader; the second half of a run starts from the first one's file."""
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    folder = make_folder(tmp_path / "images")

    def run(out, *flags):
        train_tiny(out, *flags, "--stop-at", "1")
        train_tiny(out, *flags, "--resume")
    same_logs(tmp_path, run, *TWO_STEPS, "--data", folder, "--img-size", "32")


def test_pinned_memory_is_asked_for_on_a_gpu_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    images, _ = data.load(make_folder(tmp_path / "images"), img_size=32)
    asked = []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args, pin_memory, **settings):
            asked.append(pin_memory)
            super().__init__(*args, **settings)
    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    recipe = views.Recipe(global_size=16, local_size=8, n_local=1)
    with PretendedGPU():
        for device in (CUDA, "cpu"):
            crops, = views.batches(images, recipe, batch_size=4, seed=0, start=0, stop=1,
                                   device=device)
            assert {crop.is_cuda for crop in crops} == {device == CUDA}
    assert asked == [True, False]


# ---- evaluations -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run, on the CPU."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        use_small_shapes(patch)
        use_small_network(patch)
        train_tiny(out, *TWO_STEPS)
    return str(out)


@pytest.mark.parametrize("tool, flags", [
    (eval_knn, ["--k", "5"]),
    (eval_knn, ["--k", "5", "200", "--leave-one-out", "--pool", "mean"]),
    (eval_linear, ["--protocol", "lbfgs"]),
    (eval_linear, ["--protocol", "grid", "--steps", "2"]),
    (eval_linear, ["--protocol", "attentive", "--steps", "2"]),
    (eval_linear, ["--protocol", "sgd", "--epochs", "1", "--lr", "0.1"]),
    (eval_dense, ["--train-images", "20", "--test-images", "10", "--probe", "knn"]),
], ids=["knn", "knn-one-out", "lbfgs", "grid", "attentive", "sgd", "dense"])
def test_evaluations(trained, monkeypatch, tmp_path, tool, flags):
    if tool is eval_dense:  # whose images need label maps
        x, y, classes, maps = shapes.make(30, 5)
        whole = data.Images(x, y, classes, "shapes", label_map=maps)
        sets = data.subset(whole, torch.arange(20)), data.subset(whole, torch.arange(20, 30))
        monkeypatch.setattr(data, "load", lambda name, **settings: sets)
    monkeypatch.chdir(tmp_path)  # where results.csv is written
    on_cpu = tool.main([trained, "--device", "cpu", *flags])
    with PretendedGPU():
        on_gpu = tool.main([trained, "--device", CUDA, *flags])
    assert repr(on_gpu) == repr(on_cpu)  # a text, as nan differs from nan


def test_prototypes_that_win_images(trained):
    images, _ = small_sets()
    expected, K = eval_knn.winners(trained, images)
    with PretendedGPU():
        won, _ = eval_knn.winners(trained, images, CUDA)
    assert torch.equal(won, expected) and K == 16


def test_a_resnet_takes_a_step():
    args = config.parse([*TINY, "--arch", "resnet18", "--method", "dino", "--prototypes", "vmf"])
    with PretendedGPU():
        student, teacher, protos_s, protos_t = train.networks(args, torch.device(CUDA), 0)
        x = [torch.rand(2, 3, 8, 8, device=CUDA)] * 2
        loss = losses.loss(args).to(CUDA)
        h_s, h_t = student(x).view(2, 2, -1), teacher(x).view(2, 2, -1)
        terms = loss(h_s, loss.targets(h_t, protos_t, 0), protos_s, protos_t, 0)
        sum(terms.values()).backward()
        for p in [*student.parameters(), *protos_s.parameters()]:
            assert p.is_cuda and p.grad.is_cuda


def test_neighbours_on_one_device_of_a_bank_on_the_other(monkeypatch):
    bank, labels, queries = torch.randn(300, 8), torch.arange(300) % 7, torch.randn(90, 8)
    expected = eval_knn.knn_scores(bank, labels, queries)
    others, = eval_knn.knn_predict(bank, labels, bank, [5], leave_one_out=True).values()
    for limit in (0, eval_knn.PLAIN_UP_TO):
        monkeypatch.setattr(eval_knn, "PLAIN_UP_TO", limit)
        with PretendedGPU():
            for device in ("cpu", CUDA):
                scores = eval_knn.knn_scores(bank.to(device), labels, queries.to(CUDA))
                assert scores.device.type == "cuda"
                assert torch.allclose(scores.cpu(), expected, rtol=1e-4)
            found, = eval_knn.knn_predict(bank.to(CUDA), labels, bank.to(CUDA), [5],
                                          leave_one_out=True).values()
            assert torch.equal(found.cpu(), others)


# ---- dtypes under autocast ---------------------------------------------------------------------
class Coarse(TorchDispatchMode):
    """Counts products in bfloat16, and remembers operations in it on a tensor with K, or the size
    of a partition, among its sizes: logits, softmax, Sinkhorn-Knopp and mixture have it."""

    def __init__(self):
        super().__init__()
        self.products, self.of_prototypes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16):
                self.products += "mm" in str(func)
                if {OF_K["K"], OF_K["P"]} & set(x.shape):
                    self.of_prototypes.add(str(func))
        return result


# sizes that nothing else has
OF_K = {"K": 62, "P": 31}
SIZES = ["--num-prototypes", str(OF_K["K"]), "--partition-size", str(OF_K["P"])]


def autocast_of_the_cpu(args, device):
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("module, flags", [
    (train, ["--method", "carp", "--prototypes", "decoupled"]),
    (train, ["--method", "carp", "--prototypes", "live"]),
    (train, ["--method", "dino", "--prototypes", "vmf", "--targets", "prob"]),
    (train, ["--method", "dino", "--prototypes", "clustered", "--targets", "sinkhorn"]),
    (ibot, ["--prototypes", "decoupled", "--targets", "sinkhorn", "--batch-size", "32"]),
    (capi, []),
    (msn, []),
], ids=["decoupled", "live", "vmf", "clustered", "ibot", "capi", "msn"])
def test_networks_are_in_bfloat16_and_prototypes_are_not(tmp_path, monkeypatch, module, flags):
    """A step and an evaluation, under the CPU's autocast where the loop has that of CUDA."""
    monkeypatch.setitem(capi.ENCODERS, "capi_test", (16, 1, 2, 1))
    monkeypatch.setitem(capi.CHOICES, "arch", list(capi.ENCODERS))
    monkeypatch.setattr(module, "amp", autocast_of_the_cpu)
    size = OF_CAPI if module is capi else TINY
    sizes = SIZES[:2] if module is capi else SIZES
    with Coarse() as coarse:
        module.main([*size, *sizes, "--steps", "1", "--gmm-start", "0", "--device", "cpu",
                     "--out", str(tmp_path), *flags])
    assert coarse.products and not coarse.of_prototypes


@pytest.mark.parametrize("prototypes", heads.PROTOTYPES)
def test_prototype_sets_do_not_heed_autocast(prototypes):
    args = config.parse([*TINY, "--prototypes", prototypes, "--method", METHOD[prototypes],
                         *SPECIAL.get(prototypes, []), *SIZES, "--batch-size", "8",
                         "--gmm-start", "0"])
    args.data_seen = {"images": 100, "steps": 2}
    h = F.normalize(torch.randn(2, 8, 8), dim=-1)
    for protos in heads.student_and_teacher(args):
        protos.step(h.flatten(0, 1), 0)  # a mixture starts
        with Coarse() as coarse, autocast_of_the_cpu(None, None):
            if prototypes == "bank":
                protos.log_probabilities(h, 0.1)
            else:
                protos.logits(h)
                protos.assign(h[0])
            protos.penalty()
            protos.bias(0.1)
            if isinstance(protos, heads.Decoupled):
                protos.step(h.flatten(0, 1), 1)
            losses.sinkhorn(torch.randn(8, OF_K["K"]), 0.1)
            losses.koleo(torch.randn(OF_K["K"], 8))
        assert not coarse.of_prototypes


def test_a_product_in_bfloat16_is_noticed():
    with Coarse() as coarse, autocast_of_the_cpu(None, None):
        torch.randn(4, 8) @ torch.randn(8, OF_K["K"])
    assert coarse.products and coarse.of_prototypes


def test_autocast_of_the_loop_is_for_cuda_alone():
    args = config.parse(["--device", "cpu"])
    with PretendedGPU():
        for device in ("cuda", "cuda:1", "cpu"):
            for args.amp in (True, False):
                autocast = train.amp(args, torch.device(device))
                assert autocast.fast_dtype == torch.bfloat16
                with autocast:
                    on = torch.is_autocast_enabled("cuda")
                assert on == (args.amp and device != "cpu")
                assert not torch.is_autocast_enabled("cpu")
