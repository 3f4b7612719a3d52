"""fast/unique.py against the plain search of collapse.py and plain float64 loops."""
import ast
import math
import os
import sys

import pytest
import torch

import collapse
import forked
from fast import unique

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(*degrees):
    a = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([a.cos(), a.sin()], 1)


def at_cosine(a, cos, seed):
    """A vector whose cosine with a (D,) is cos."""
    b = randn(len(a), seed=seed).double()
    b = b - (b @ a) / (a @ a) * a
    return cos * a / a.norm() + math.sqrt(1 - cos ** 2) * b / b.norm()


# ---- prototype sets -----------------------------------------------------------------------------
def random_set():
    return randn(300, 20)


def clustered_set():
    """Overlapping clusters: the order of the representatives decides who covers many a row."""
    return randn(12, 6)[torch.arange(300) % 12] + .15 * randn(300, 6, seed=1)


def near_threshold_set():
    """Pairs within 1e-6 of eps = .025 and .5 on either side: float32 alone cannot decide them."""
    C = randn(240, 40).double()
    for k, offset in enumerate([-1e-6, -1e-7, -1e-8, 1e-8, 1e-7, 1e-6] * 10):
        eps = (.025, .5)[k % 2]
        C[120 + k] = at_cosine(C[k], 1 - eps + offset, seed=k)
    return C


def zero_and_duplicate_set():
    C = randn(300, 8)
    C[[0, 17, 150, 299]] = 0
    C[200:260] = C[20:80]  # equal rows
    C[100:130] = C[30:60] * 2.0 ** torch.arange(-15, 15)[:, None]  # scaled by powers of two
    C[131:140] = 1e-30 * C[140:149]
    C[5] = -C[4]
    return C


def collapsed_set():
    """300 equal rows and 30 that differ from them by one unit in the last place."""
    C = torch.ones(330, 16)
    C[::11, 0] = 1 + 2 ** -23
    return C


SETS = [random_set, clustered_set, near_threshold_set, zero_and_duplicate_set, collapsed_set]


@pytest.mark.parametrize("block", [13, 64, 2048])
@pytest.mark.parametrize("make", SETS)
def test_fast_is_plain(make, block):
    A, _ = collapse.nonzero_rows(make())
    eps_list = [0, 1e-300, 1e-9, .025, .1, .5, 1.3, 2]
    plain, fast = collapse.covering(A, eps_list), unique.covering(A, eps_list, block=block)
    assert list(fast) == eps_list
    for eps in eps_list:
        assert torch.equal(plain[eps], fast[eps]), eps
        assert torch.equal(unique.covering(A, [eps], block=block)[eps], plain[eps]), eps


@pytest.mark.parametrize("make", SETS)
def test_size_chooses_and_the_answer_is_the_same(make, monkeypatch):
    C = make()
    calls = []
    fast_covering = unique.covering
    monkeypatch.setattr(unique, "covering", lambda *args: calls.append(1) or fast_covering(*args))
    eps_list = [.5, .025, 0]
    plain = collapse.representatives(C, eps_list)
    assert not calls
    monkeypatch.setattr(collapse, "PLAIN_UP_TO", len(collapse.nonzero_rows(C)[0]) - 1)
    fast = collapse.representatives(C, eps_list)
    assert calls and list(fast) == list(plain) == [0, .025, .5]
    assert all(torch.equal(plain[eps], fast[eps]) for eps in eps_list)
    zero = (C == 0).all(1)
    assert torch.equal(fast[.5] == -1, zero)


def test_default_sizes_do_not_load_the_fast_file():
    code = ("import sys, torch, collapse; collapse.unique_counts(torch.randn(1024, 128), [.025]); "
            "print('fast.unique' in sys.modules)")
    out = forked.run([sys.executable, "-c", code], cwd=HERE, capture_output=True)
    assert out.stdout.strip() == "False", out.stderr


def test_fast_file_imports_nothing_of_the_project():
    with open(os.path.join(HERE, "fast", "unique.py")) as file:
        tree = ast.parse(file.read())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names == {"contextlib", "math", "numpy", "torch", "tqdm"}


# ---- the parts ----------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [1, 2, 5, 64])
def test_chains_across_blocks(block):
    step = math.degrees(math.acos(1 - .025)) * .7  # neighbours are within eps, next but one are not
    in_line = angles(*(step * k for k in range(40)))
    orders = torch.arange(40), torch.arange(39, -1, -1), torch.arange(40).view(2, 20).T.flatten()
    for order in orders:
        A, _ = collapse.nonzero_rows(in_line[order])
        got = unique.covering(A, [.025], block=block)[.025]
        assert torch.equal(got, collapse.covering(A, [.025])[.025])
        _, graph = unique.neighbours(A, [.025], block=block)
        has_neighbour, component = graph[.025]
        assert has_neighbour.all() and len(component.unique()) == 1
    assert len(unique.covering(in_line, [.025], block=block)[.025].unique()) == 20


@pytest.mark.parametrize("kind", ["even", "few axes", "one axis"])
def test_sketches_never_hide_a_duplicate(kind):
    """Products of sketches bound the cosines from above; a sketch is used where it saves time."""
    C = randn(300, 64, seed=5).double()
    if kind == "few axes":  # two thirds of the length in 4 dimensions
        C[:, :4] *= 6
    if kind == "one axis":  # all cosines above .9: no sketch can pay
        C[:, 0] = 40
    for k, cos in enumerate((1, .9999, .9751, .9749, .95, .91, .89)):  # on both sides of eps
        C[200 + 9 * k] = at_cosine(C[10 + k], cos, seed=k)
    A, _ = collapse.nonzero_rows(C)
    X = unique.unit_rows(A)
    Y = unique.sketch(X, .1, 10)
    assert (Y is X) == (kind == "one axis") and Y.shape[1] in (9, 17, 33, 64)
    assert (Y @ Y.T - X @ X.T).min() > -unique.rounding_error(64)
    assert (Y.norm(dim=1) - 1).abs().max() < 1e-6
    assert unique.sketch(X, .1, 200) is X  # few blocks: not worth its axes
    plain, fast = collapse.covering(A, [.025, .1]), unique.covering(A, [.025, .1], block=10)
    assert all(torch.equal(plain[eps], fast[eps]) for eps in plain)


def test_very_many_unsure_pairs():
    """More than MANY_PAIRS pairs lie on the threshold: one float64 product settles them."""
    rows = torch.ones(300, 8)
    rows[150:, 0] += 1e-3
    at_60 = torch.tensor([[1., 1, 0], [1, 0, 1]]).repeat_interleave(150, 0)  # 1 - cos = .5
    for C, eps in (rows, 1e-9), (rows, 1e-12), (at_60, .5):
        A, _ = collapse.nonzero_rows(C)
        assert 150 * 150 > unique.MANY_PAIRS
        assert unique.covering(A, [eps])[eps].unique().tolist() == [0, 150]


def test_low_precision_mode_is_overridden():
    C = torch.nn.functional.normalize(randn(300, 64), dim=1)
    shift = torch.nn.functional.normalize(randn(300, 64, seed=1), dim=1)
    A, _ = collapse.nonzero_rows(torch.cat([C, C + .0275 * shift]))
    eps = 3.75e-4
    want = unique.covering(A, [eps])[eps]
    assert 300 < len(want.unique()) < 600  # the threshold cuts the cloud
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(unique.covering(A, [eps])[eps], want)
            # a CPU without bfloat16 products would not show it, so look at the settings as well
            with unique.full_float32(A.device):
                assert torch.get_float32_matmul_precision() == "highest"
                assert not torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def slow_components(C, eps):
    U = torch.nn.functional.normalize(C.double(), dim=1).numpy()
    name = list(range(len(U)))
    for i in range(len(U)):
        for j in range(i):
            if 1 - U[i] @ U[j] < eps and name[i] != name[j]:
                higher, lower = max(name[i], name[j]), min(name[i], name[j])
                name = [lower if n == higher else n for n in name]
    return name


@pytest.mark.parametrize("seed", range(4))
def test_neighbours_and_components(seed):
    C = randn(80, 5 + seed, seed=seed)
    C[40:60] = C[:20] + .3 * randn(20, 5 + seed, seed=9)
    A, _ = collapse.nonzero_rows(C)
    nearest, graph = unique.neighbours(A, [0, .02, .1, .4], block=9)
    U = torch.nn.functional.normalize(C.double(), dim=1)
    S = (U @ U.T).fill_diagonal_(-4)
    assert torch.allclose(nearest.double(), S.amax(1), atol=1e-6)
    for eps, (has_neighbour, component) in graph.items():
        assert torch.equal(has_neighbour, (1 - S < eps).any(1))
        assert component.tolist() == slow_components(C, eps)
    assert unique.neighbours(A[:1], [.1])[0].isnan().all()
