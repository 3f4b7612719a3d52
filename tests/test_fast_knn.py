"""fast/knn.py: its neighbours and its votes are those of eval_knn.py's plain search, for every size
of its blocks, with ties, without a query's own image, on collapsed features; its keys; its
memory."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import eval_knn
from fast import knn


def quarters(N, seed):
    """(N, 4): axes, diagonals and zero, in 25 directions. Every cosine is a multiple of 1/4, exact
    in any order of summation, so the plain and the fast search see the same bits; and nearly every
    neighbour is tied."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)  # (16, 4)
    directions = torch.cat([torch.eye(4), -torch.eye(4), corners, torch.zeros(1, 4)])  # (25, 4)
    return directions[torch.randint(25, (N,), generator=torch.Generator().manual_seed(seed))]


def clusters(N, seed, D=16, classes=5):
    """Random features around class centres: x (N, D), y (N,)."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, D, generator=torch.Generator().manual_seed(99))  # (classes, D)
    y = torch.randint(classes, (N,), generator=g)  # (N,)
    return centres[y] + 1.5 * torch.randn(N, D, generator=g), y


def joined(search):
    """(first queries, sim (M, k), index (M, k)) of what a search yields."""
    starts, sim, index = zip(*search)
    return list(starts), torch.cat(sim), torch.cat(index)


# ---- equal to the plain search -------------------------------------------------------------------

@pytest.mark.parametrize("images, queries, group",
                         [(48, 16, 8), (13, 5, 64), (60, 7, 4), (4096, 2048, 64)])
@pytest.mark.parametrize("k", [1, 20, 45, 210])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_neighbours_are_those_of_the_plain_search(monkeypatch, images, queries, group, k,
                                                  leave_one_out):
    """211 is a prime: no size of blocks divides the bank."""
    monkeypatch.setattr(knn, "IMAGES", images)
    monkeypatch.setattr(knn, "QUERIES", queries)
    monkeypatch.setattr(knn, "GROUP", group)
    monkeypatch.setattr(eval_knn, "CHUNK", 100)
    bank = quarters(211, seed=3)
    test_x = bank if leave_one_out else quarters(37, seed=4)
    _, plain_sim, plain_index = joined(eval_knn.neighbours(bank, test_x, k, leave_one_out))
    starts, sim, index = joined(knn.neighbours(bank, test_x, k, leave_one_out=leave_one_out))
    assert starts == list(range(0, len(test_x), min(queries, len(test_x))))
    assert torch.equal(sim, plain_sim) and torch.equal(index, plain_index)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_collapsed_features_have_the_neighbours_of_the_plain_search(monkeypatch, leave_one_out):
    """All features are equal, so all similarities are: the order of the bank alone decides."""
    monkeypatch.setattr(knn, "IMAGES", 128)
    bank = torch.tensor([[0.5, -0.5, 0.5, 0.5]]).repeat(500, 1)
    _, plain_sim, plain_index = joined(eval_knn.neighbours(bank, bank, 30, leave_one_out))
    _, sim, index = joined(knn.neighbours(bank, bank, 30, leave_one_out=leave_one_out))
    assert torch.equal(sim, plain_sim) and torch.equal(index, plain_index)
    assert index[400].tolist() == list(range(30))


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_predicted_labels_are_those_of_the_plain_search(monkeypatch, leave_one_out):
    """Features of any value: the two searches multiply blocks of other shapes, and may round
    otherwise."""
    x, y = clusters(611, seed=0)
    q = x if leave_one_out else clusters(150, seed=1)[0]
    votes = {}
    for search, up_to in (("plain", 2**40), ("fast", 0)):
        monkeypatch.setattr(eval_knn, "PLAIN_UP_TO", up_to)
        monkeypatch.setattr(knn, "IMAGES", 100)
        votes[search] = eval_knn.knn_predict(x, y, q, (1, 7, 20, 200, 1000), 0.07, leave_one_out)
    for k, predicted in votes["plain"].items():
        assert torch.equal(votes["fast"][k], predicted), k
    assert not torch.equal(votes["plain"][1], votes["plain"][200])


def test_scores_are_those_of_the_plain_search(monkeypatch):
    x, y = clusters(301, seed=0)
    q, _ = clusters(29, seed=1)
    plain = eval_knn.knn_scores(x, y, q, k=50)
    monkeypatch.setattr(eval_knn, "PLAIN_UP_TO", 0)
    torch.testing.assert_close(eval_knn.knn_scores(x, y, q, k=50), plain, rtol=1e-4, atol=1e-2)
    assert torch.equal(eval_knn.knn_scores(x, y, q[:0]), torch.zeros(0, 5))


def test_the_size_chooses_the_search(monkeypatch):
    used = []
    monkeypatch.setattr(knn, "neighbours", lambda *args: used.append("fast") or iter(()))
    monkeypatch.setattr(eval_knn, "neighbours", lambda *args: used.append("plain") or iter(()))
    monkeypatch.setattr(eval_knn, "PLAIN_UP_TO", 40 * 10)
    x, y = clusters(41, seed=0)
    eval_knn.knn_scores(x[:40], y[:40], x[:10])
    eval_knn.knn_scores(x, y, x[:10])
    eval_knn.knn_predict(x, y, x[:10])
    assert used == ["plain", "fast", "fast"]


# ---- the definition ------------------------------------------------------------------------------

@pytest.mark.parametrize("images", [60, 25, 7])
def test_equal_similarities_go_to_the_smaller_bank_index(monkeypatch, images):
    """One block; two and a rest; eight and a rest."""
    monkeypatch.setattr(knn, "QUERIES", 1)
    monkeypatch.setattr(knn, "IMAGES", images)
    bank = torch.eye(4)[torch.arange(60) % 3]  # 20 copies each of three directions
    test_x = torch.eye(4)[[0, 2]]
    _, _, index = joined(knn.neighbours(bank, test_x, 5))
    assert index.tolist() == [[0, 3, 6, 9, 12], [2, 5, 8, 11, 14]]
    _, sim, index = next(knn.neighbours(bank, test_x, 25))  # all 20 of cosine 1, then 5 of cosine 0
    assert index[0].tolist() == list(range(0, 60, 3)) + [1, 2, 4, 5, 7]
    assert sim[0].tolist() == [1.0] * 20 + [0.0] * 5


@pytest.mark.parametrize("order", ["shuffled", "by class", "rising", "falling", "periodic"])
@pytest.mark.parametrize("k", [1, 20, 45, 611])
def test_search_is_a_stable_sort_for_any_order_of_the_bank(monkeypatch, order, k):
    bank, test_x = quarters(611, seed=3), quarters(37, seed=4)
    near = bank @ test_x[3]  # (611,)
    by_class = (bank @ torch.tensor([1.0, 5, 25, 125])).argsort()
    bank = bank[{"shuffled": torch.arange(611), "by class": by_class, "rising": near.argsort(),
                 "falling": near.argsort(descending=True),
                 "periodic": torch.arange(611) * 13 % 611}[order]]
    exact = F.normalize(test_x, dim=1) @ F.normalize(bank, dim=1).T  # (37, 611)
    wanted, place = exact.sort(dim=1, descending=True, stable=True)
    monkeypatch.setattr(knn, "IMAGES", 48)  # 12 blocks and 35 images, or fewer blocks of k
    monkeypatch.setattr(knn, "GROUP", 8)  # of 48: whole groups; of 35: one group
    monkeypatch.setattr(knn, "QUERIES", 16)
    starts, sim, index = joined(knn.neighbours(bank, test_x, k))
    assert starts == [0, 16, 32]
    assert torch.equal(sim, wanted[:, :k]) and torch.equal(index, place[:, :k])


def test_blocks_hold_every_image_once():
    for N, n in [(611, 48), (48, 48), (10, 7), (1, 1), (4096, 2048), (4097, 2048)]:
        blocks = [list(range(N))[start:stop:step] for start, stop, step in knn.bank_blocks(N, n)]
        assert sorted(sum(blocks, [])) == list(range(N)) and len(blocks[0]) == n


def test_keys_sort_as_similarity_then_index():
    values = [-math.inf, -1.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0]
    sim = torch.tensor(values).repeat(3)  # (27,)
    index = torch.tensor([0, 7, 2**32 - 1]).repeat_interleave(9)  # (27,)
    keys = knn.to_keys(sim, index)
    wanted = sorted(range(27), key=lambda i: (-float(sim[i]), int(index[i])))
    order = keys.argsort(descending=True)
    assert torch.equal(sim[order], sim[wanted]) and torch.equal(index[order], index[wanted])
    assert keys.unique().numel() == 24  # 0 and -0 are one similarity, all else differs
    back, place = knn.from_keys(keys)
    assert torch.equal(back, sim) and torch.equal(place, index)


def test_features_that_are_not_finite_are_refused():
    x, _ = clusters(20, seed=0)
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[7, 3] = bad
        for bank, test_x in ((broken, x), (x, broken)):
            with pytest.raises(ValueError, match="not finite"):
                list(knn.neighbours(bank, test_x, 3))


# ---- memory --------------------------------------------------------------------------------------

class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() and not func.is_view:
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("k, D, classes",
                         [(20, 16, 10), (200, 16, 10), (20, 256, 3000), (3000, 8, 10)])
def test_no_tensor_is_larger_than_the_budget(monkeypatch, k, D, classes):
    x, y = clusters(4000, 0, D, classes)
    q, test_y = clusters(400, 1, D, classes)
    monkeypatch.setattr(eval_knn, "PLAIN_UP_TO", 0)
    monkeypatch.setattr(knn, "BUDGET", 2 * 2**20)  # the (M, N) matrix would take 6.1 MiB
    with Largest() as largest:
        eval_knn.knn_accuracy(x, y, q, test_y, ks=[k])
    assert 2**16 < largest.bytes <= knn.BUDGET // 2


@pytest.mark.parametrize("budget, queries", [(1, 1024), (30_000, 1024), (20_000, 3), (10**6, 5)])
def test_the_budget_does_not_change_the_result(monkeypatch, budget, queries):
    x, y = clusters(301, seed=0)
    q, test_y = clusters(29, seed=1)
    accuracy = eval_knn.knn_accuracy(x, y, q, test_y)
    monkeypatch.setattr(eval_knn, "PLAIN_UP_TO", 0)
    monkeypatch.setattr(knn, "BUDGET", budget)
    monkeypatch.setattr(knn, "QUERIES", queries)
    assert eval_knn.knn_accuracy(x, y, q, test_y) == accuracy
