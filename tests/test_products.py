"""lab/products.py: what it counts as a product, and that a step is what it says."""
import re

import pytest
import torch
from torch.nn import functional as F

from conftest import TINY
from lab import bench, products

pytestmark = pytest.mark.usefixtures("small_shapes")


def test_products_are_told_from_the_rest_and_gradients_count():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    image, kernel = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)
    with products.Watch() as watch:
        (a @ b).exp().sum().backward()  # a product, and one more for the gradient of a
        F.conv2d(image, kernel)
        F.linear(b.T, a.detach(), torch.zeros(3))
    shapes = {}
    for (operation, args, _), count in watch.calls.items():
        name = operation.overloadpacket.__name__
        shapes.setdefault(name, []).append((count, [x[0] for x in args
                                                    if isinstance(x, products.Shape)]))
    assert shapes == {"mm": [(1, [(3, 4), (4, 5)]), (1, [(3, 5), (5, 4)])],
                      "convolution": [(1, [(1, 2, 6, 6), (3, 2, 3, 3)])],
                      "addmm": [(1, [(3,), (5, 4), (4, 3)])]}
    assert watch.names["exp"] == 1 and "mm" not in watch.names


@pytest.mark.parametrize("tensor", [
    torch.randn(3, 4), torch.randn(4, 3).T, torch.randn(3, 1).expand(3, 5), torch.randn(0, 3),
    torch.randn(2, 3, 4).to(memory_format=torch.contiguous_format), torch.arange(4)])
def test_a_tensor_is_made_again_with_its_shape_strides_and_type(tensor):
    again = products.filled(products.described((tensor, None, (2, tensor))))
    for x in (again[0], again[2][1]):
        assert x.shape == tensor.shape and x.dtype == tensor.dtype
        assert x.stride() == tensor.stride() or 0 in tensor.shape
    assert again[1] is None and again[2][0] == 2


def test_a_step_has_the_products_of_its_networks_and_no_evaluation():
    """vit_nano has three blocks: four linear layers each for the teacher's forward, and three times
    as many products for the student's two sizes of crops, forward and backward."""
    calls, others = products.of_one_step(TINY[2:-8])  # without how often it logs and evaluates
    names = {}
    for (operation, _, _), count in calls.items():
        name = operation.overloadpacket.__name__
        names[name] = names.get(name, 0) + count
    sizes, blocks, layers = 2, 3, 4
    of_blocks = blocks * layers
    assert names["addmm"] >= of_blocks * (1 + sizes)
    assert names["mm"] >= 2 * of_blocks * sizes
    assert names["bmm"] >= 2 * blocks * (1 + sizes) + 4 * blocks * sizes  # attention
    assert 0 < sum(others.values()) < 20_000
    assert products.seconds(calls) > 0


def test_lab_bench_reads_what_it_prints(monkeypatch, capsys):
    monkeypatch.setattr(products, "of_one_step", lambda flags: (
        products.collections.Counter(), products.collections.Counter(add=3)))
    took = products.main(["--lr", "0.1"])
    printed = capsys.readouterr().out
    assert "other operations: 3 (add 3 ...)" in printed
    done = type("Done", (), {"stdout": printed, "stderr": "", "returncode": 0})
    monkeypatch.setattr(bench.subprocess, "run", lambda *a, **k: done)
    assert bench.seconds_of_products() == pytest.approx(took, abs=1e-6)
    done.stdout, done.returncode = "", 2
    with pytest.raises(ValueError, match=re.escape("lab.products ended with exit code 2")):
        bench.seconds_of_products()


@pytest.mark.parametrize("flags", [["--device", "cuda"], ["--steps=9"], ["--out", "x"]])
def test_what_it_sets_itself_is_refused(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        products.main(flags)
    assert stop.value.code == 2
    flag = flags[0].split("=")[0]
    assert capsys.readouterr().err.startswith(f"lab.products: error: {flag} is set by lab.products")
