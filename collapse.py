"""
Partial prototype collapse (Def. 2.1): how many prototypes of a checkpoint differ, and what such a count does not show.

    python collapse.py RUN [RUN ...] --plot fig.png  # our run directories: table, measures, curves over training
    python collapse.py dino_full_checkpoint.pth  # anybody's checkpoint: checkpoints.py has the layouts known

Two prototypes are duplicates at eps when 1 - cos < eps (strict). Def. 2.1 asks for parts that a representative covers;
which cover is left open, and the smallest is NP-hard. Here: greedy leader. Rows are read in index order; a row that no
representative has claimed becomes one, and claims all later rows within eps. So representatives are eps apart and
cover everything.

C (K, D) prototypes, one per row; M of them not zero; S cosines of two blocks; P (N, K) assignment probabilities.
This file needs torch and NumPy only and can be pasted elsewhere; checkpoints.py reads files, report.py prints.
"""
import math
import sys
from contextlib import contextmanager

import numpy as np
import torch

BLOCK = 2048  # rows per product: 16 MiB of cosines at a time


# ----------------------------------------------------------------------------------- cosines, without rounding errors
def scaled(C):
    """Rows (n, D) in float64, largest entry in [.5, 1): by a power of two, so exact, and squares cannot overflow."""
    C = C.double()
    return torch.ldexp(C, -torch.frexp(C.abs().amax(1, keepdim=True))[1])


def unit_rows(C):
    """C (K, D) -> unit rows (M, D) float32 and their indices in C (M,). Zero rows have no direction and are left out.
    ValueError for rows with NaN or infinity, with their number."""
    C = torch.as_tensor(C).detach()
    if C.ndim != 2 or not C.numel():
        raise ValueError(f"prototypes must have the shape (K, D), not {tuple(C.shape)}")
    bad = (~torch.isfinite(C).all(1)).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"{len(bad)} of {len(C)} prototypes hold NaN or infinity (the first is row {int(bad[0])})")
    kept = (C != 0).any(1).nonzero()[:, 0]  # (M,)
    X = torch.empty(len(kept), C.shape[1], device=C.device)  # (M, D)
    for part in range(0, len(kept), 8192):  # float64 in parts: a whole copy would double the memory
        rows = scaled(C[kept[part:part + 8192]])
        X[part:part + 8192] = rows / rows.norm(dim=1, keepdim=True)
    return X, kept


def pick(S, i, j):
    """S[i][:, j] for index lists without repeats; four times faster, and free when they are everything."""
    S = S if len(i) == S.shape[0] else S.index_select(0, i)
    return S if len(j) == S.shape[1] else S.index_select(1, j)


def slack(D):
    """Most that a float32 dot product of two unit rows can be off: D roundings of 2^-24, and a few for the rows."""
    return (D + 4) * 2.0 ** -24


def within(S, C, i, j, eps):
    """1 - cos < eps for rows i and j of C, from their float32 cosines S (len(i), len(j)) -> bool of that shape.
    Pairs that rounding could tip are settled in float64, so the answer is exact: a duplicate is one at any eps > 0."""
    near = S > 1 - eps + slack(C.shape[1])
    doubt = (S > 1 - eps - slack(C.shape[1])) & ~near
    a, b = doubt.nonzero(as_tuple=True)
    if len(a) > 2 ** 14:  # very many (a tiny eps): one float64 product is cheaper
        A, B = scaled(C[i]), scaled(C[j])
        cos = A @ B.T / (A.square().sum(1)[:, None] * B.square().sum(1)).sqrt()
        near |= doubt & (1 - cos < max(eps, 1e-14))
    elif len(a):
        A, B = scaled(C[i[a]]), scaled(C[j[b]])
        cos = (A * B).sum(1) / (A.square().sum(1) * B.square().sum(1)).sqrt()  # exactly 1 for equal rows
        near[a, b] = 1 - cos < eps
    return near


@contextmanager
def plain_float32(device):
    """TF32 on CUDA and bfloat16 on CPU (precision "medium") move a cosine by 1e-3: too coarse beside eps = .025."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def bar(steps, what, show):
    if not show or len(steps) < 8:
        return steps
    from tqdm import tqdm
    return tqdm(steps, what, leave=False, disable=None)  # None: on a terminal only


def check_eps(eps_list):
    if bad := [eps for eps in eps_list if not 0 <= eps <= 2]:
        raise ValueError(f"eps must lie in [0, 2] (it is 1 - cosine), not {bad[0]}")
    return sorted(set(eps_list))


def sketch(X, eps, block):
    """Unit rows X (M, D) -> (M, d + 1): coordinates along the d main axes, and the length of what is left of the row.
    Products of such rows are no smaller than the cosines (Cauchy-Schwarz on what is left), and cost d / D of the time:
    pairs that they clear need no more. d is the cheapest on a sample of pairs; X itself where none would pay."""
    gram = sum(part.double().T @ part.double() for part in X.split(8192))  # (D, D)
    (M, D), axes = X.shape, torch.linalg.eigh(gram)[1].flip(1)  # (D, D), main axis first

    def along(rows, d):
        y = rows.double() @ axes[:, :d]  # (n, d)
        left = rows.double().square().sum(1) - y.square().sum(1)  # (n,)
        return torch.cat([y, left.clamp_min(0).sqrt()[:, None]], 1).float()

    def cost(d):  # of a pair, where its cosine costs 1; one doubtful pair is enough to ask for a column of `block`
        y = along(X[::-(-M // 1024)], d)
        doubtful = int((y @ y.T > 1 - eps - slack(D)).sum()) - len(y)
        return (d + 1) / D + min(1, block * doubtful / len(y) ** 2)
    d = min((d for d in (D // 8, D // 4, D // 2) if d and M > 2 * block), key=cost, default=0)
    return torch.cat([along(part, d) for part in X.split(8192)]) if d and cost(d) < 1 else X


# -------------------------------------------------------------------------------------------- Def. 2.1, greedy leader
def leaders(C, eps_list, progress=False, block=None):
    """{eps: owner (K,)}: the index of the representative that claims each prototype (itself if it is one, -1: zero).

    All eps in one pass: a block of rows meets the representatives so far in matrix products, then itself. No two blocks
    meet twice; those without a pair within eps (usual for distinct prototypes) cost one product of sketches."""
    block = block or BLOCK
    X, kept = unit_rows(C)
    C, (M, D) = torch.as_tensor(C).detach(), X.shape
    out = {eps: torch.full((len(C),), -1, device=X.device) for eps in check_eps(eps_list)}
    for eps, owner in out.items():
        owner[kept] = kept  # at eps = 0 nothing is a duplicate: M(0) = K
    todo = [eps for eps in out if eps > 0]
    if not todo:
        return out
    lead = torch.zeros(len(todo), M, dtype=torch.bool, device=X.device)  # does union leader m lead at this eps?
    row_of = torch.empty_like(kept)  # its index in C
    n = 0  # X[:n] holds the leaders of any eps, packed in place
    earlier = torch.ones(min(block, M), min(block, M), dtype=torch.bool, device=X.device).triu(1)
    floor = [1 - eps - slack(D) for eps in todo]  # cosines up to here cannot be within eps
    with plain_float32(X.device):
        Y = sketch(X, todo[-1], block)  # (M, d + 1), packed as X is; or X
        for start in bar(range(0, M, block), "unique prototypes", progress):
            B, Q, rows = (t[start:start + block].clone() for t in (X, Y, kept))  # (b, D), (b, d + 1), (b,)
            free = torch.ones(len(todo), len(B), dtype=torch.bool, device=X.device)  # not claimed yet, per eps
            for r in range(0, n, block):
                old = slice(r, min(r + block, n))
                S = Y[old] @ Q.T  # (leaders, b)
                maybe = (S.amax(0) > floor[-1]).nonzero()[:, 0]  # columns that may have a cosine within eps
                if not len(maybe):
                    continue
                S = pick(S, torch.arange(len(S)), maybe) if Y is X else X[old] @ B[maybe].T  # (leaders, maybe)
                top = S.amax(0)  # (maybe,)
                for e, eps in enumerate(todo):
                    col = (free[e, maybe] & (top > floor[e])).nonzero()[:, 0]
                    led = lead[e, old].nonzero()[:, 0]
                    if len(col) and len(led):
                        near = within(pick(S, led, col), C, row_of[r + led], rows[maybe[col]], eps)
                        hit = near.any(0)
                        first = near.byte().argmax(0)[hit]  # argmax: the first of equal maxima, so the lowest index
                        out[eps][rows[maybe[col[hit]]]] = row_of[r + led[first]]
                        free[e, maybe[col[hit]]] = False
            late = ~earlier[:len(B), :len(B)]  # (b, b): row i is not earlier than column j
            S = (Q @ Q.T).masked_fill_(late, -4)  # (b, b)
            S = (B @ B.T).masked_fill_(late, -4) if Y is not X and S.max() > floor[-1] else S
            top = S.amax(0)
            for e, eps in enumerate(todo):
                row = free[e].nonzero()[:, 0]
                if len(row) and top[row].max() > floor[e]:
                    near = within(pick(S, row, row), C, rows[row], rows[row], eps).cpu().numpy()
                    by = np.arange(len(row))
                    for i in np.flatnonzero(near.any(1)):  # index order is the rule; only rows with duplicates
                        if by[i] == i:
                            by[near[i] & (by == np.arange(len(row)))] = i
                    by = torch.from_numpy(by).to(X.device)
                    out[eps][rows[row]] = rows[row[by]]
                    free[e, row[by != torch.arange(len(row), device=X.device)]] = False
            new = free.any(0).nonzero()[:, 0]
            m = n + len(new)
            X[n:m], Y[n:m], row_of[n:m], lead[:, n:m] = B[new], Q[new], rows[new], free[:, new]  # m <= rows read
            n = m
    return out


def unique_prototypes(C, eps):
    """Indices of the unique prototypes of C (K, D) by Def. 2.1 at eps: greedy leader, index order, strict <, exact.
    eps = 0 gives all; zero rows are never among them; ValueError for NaN rows or eps outside [0, 2]."""
    owner = leaders(C, [eps])[eps]
    return (owner == torch.arange(len(owner), device=owner.device)).nonzero()[:, 0]


def unique_counts(C, eps_list, progress=False):
    """{eps: number of unique prototypes}, the cosines computed once for all eps."""
    return {eps: int((owner == torch.arange(len(owner), device=owner.device)).sum())
            for eps, owner in leaders(C, eps_list, progress).items()}


def random_order_unique(C, eps, n=5, seed=0):
    """(mean, sd) of the greedy count over n seeded random orders of the rows: how much the answer owes to index order.
    With a list of eps: {eps: (mean, sd)}, each order counted once for all."""
    g, C = torch.Generator().manual_seed(seed), torch.as_tensor(C)
    eps_list = [eps] if isinstance(eps, (int, float)) else list(eps)
    runs = [unique_counts(C[torch.randperm(len(C), generator=g).to(C.device)], eps_list) for _ in range(n)]
    counts = {e: [run[e] for run in runs] for e in eps_list}
    out = {e: (float(np.mean(c)), float(np.std(c, ddof=min(1, n - 1)))) for e, c in counts.items()}
    return out[eps] if isinstance(eps, (int, float)) else out


# ----------------------------------------------------------------------------------------------------- other measures
def merge(labels, a, b):
    """Component names (M,), after components a[i] and b[i] have become one for every i; the lower name stays."""
    parent = {}

    def root(x):
        while parent.setdefault(x, x) != x:
            parent[x] = x = parent[parent[x]]
        return x
    for x, y in set(zip(a.tolist(), b.tolist())):
        x, y = root(x), root(y)
        parent[max(x, y)] = min(x, y)
    rename = torch.arange(len(labels))
    for x in parent:
        rename[x] = root(x)
    return rename.to(labels.device)[labels]


def neighbours(C, eps_list, progress=False, block=None):
    """Over all pairs, once: cosine to the nearest (M,), and {eps: (has a neighbour within eps (M,), component (M,))}.
    Two prototypes share a component when a chain of steps shorter than eps joins them."""
    block = block or BLOCK
    X, kept = unit_rows(C)
    C, (M, D) = torch.as_tensor(C).detach(), X.shape
    nearest = torch.full((M,), -4., device=X.device)
    near_any = {eps: torch.zeros(M, dtype=torch.bool, device=X.device) for eps in check_eps(eps_list)}
    labels = {eps: torch.arange(M, device=X.device) for eps in near_any}
    with plain_float32(X.device):
        for i in bar(range(0, M, block), "neighbours", progress):
            for j in range(i, M, block):
                I, J = slice(i, min(i + block, M)), slice(j, min(j + block, M))
                S = X[I] @ X[J].T  # (b, b')
                if i == j:
                    S.fill_diagonal_(-4)
                rows, cols = S.amax(1), S.amax(0)
                nearest[I], nearest[J] = torch.maximum(nearest[I], rows), torch.maximum(nearest[J], cols)
                for eps in near_any:
                    r, c = ((m > 1 - eps - slack(D)).nonzero()[:, 0] for m in (rows, cols))
                    if eps == 0 or not len(r):
                        continue
                    near = within(pick(S, r, c), C, kept[i + r], kept[j + c], eps)
                    near_any[eps][i + r] |= near.any(1)
                    near_any[eps][j + c] |= near.any(0)
                    while True:  # each column joins one foreign component a round: few rounds
                        a, b = labels[eps][i + r], labels[eps][j + c]
                        cross = near & (a[:, None] != b)
                        some = cross.any(0).nonzero()[:, 0]
                        if not len(some):
                            break
                        labels[eps] = merge(labels[eps], a[cross.byte().argmax(0)[some]], b[some])
    graph = {eps: (near_any[eps], labels[eps]) for eps in near_any}
    return nearest.clamp(-1, 1) if M > 1 else nearest * math.nan, graph


def effective_rank(C):
    """exp of the entropy of the unit rows' singular values over their sum (Roy and Vetterli 2007): 1 to min(K, D)."""
    X, _ = unit_rows(C)
    p = torch.linalg.eigvalsh(sum(part.double().T @ part.double() for part in X.split(8192))).clamp_min(0).sqrt()
    p = p / p.sum()
    return float(torch.special.entr(p).sum().exp())


def drift(C, C_0):
    """Median over prototypes of |c_t - c_0| / |c_0|, C and C_0 (K, D): 0 means that they are still where they began."""
    C, C_0 = torch.as_tensor(C).double(), torch.as_tensor(C_0).double()
    if C.shape != C_0.shape:
        raise ValueError(f"drift compares equal shapes, not {tuple(C.shape)} and {tuple(C_0.shape)}")
    start = C_0.norm(dim=1)
    return float(((C - C_0).norm(dim=1)[start > 0] / start[start > 0]).median())


def usage(P):
    """(used, perplexity), both shares of K, from assignment probabilities P: a (N, K) tensor or an iterable of batches.
    used: prototypes that win the argmax of at least one sample. perplexity: exp(H(mean of P)) / K."""
    won = total = 0
    for p in ([P] if torch.is_tensor(P) else P):
        if p.ndim != 2 or not len(p) or not (p.min() >= 0 and (p.sum(1) - 1).abs().max() < 1e-2):
            raise ValueError(f"usage needs probabilities (N, K), rows that sum to 1, not this {tuple(p.shape)} tensor")
        won = won + torch.bincount(p.argmax(1), minlength=p.shape[1])  # (K,)
        total = total + p.double().sum(0)  # (K,)
    if not torch.is_tensor(won):
        raise ValueError("usage was given no batch")
    entropy = torch.special.entr(total / total.sum()).sum()
    return float((won > 0).double().mean()), float(entropy.exp() / len(total))


def ceiling(features, K, eps, seed=0):
    """Unique share of min(K, N) random features (N, D): the most that prototypes lying on the data can reach."""
    pick = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:K]
    return len(unique_prototypes(features[pick.to(features.device)], eps)) / len(pick)


def random_directions(K, D, seed=0):
    """(K, D) prototypes that nobody trained, even in all directions: the control of every count."""
    return torch.randn(K, D, generator=torch.Generator().manual_seed(seed))


def load_prototypes(path, key=None):
    """{name: (K, D) float32 tensor} of every prototype set in a checkpoint, ours or foreign; see checkpoints.py."""
    from support import checkpoints  # here, so that this file can be pasted without it
    return checkpoints.load_prototypes(path, key)


def main(argv=None):
    """The command line: `python collapse.py --help`. Returns the exit code 0, 1 (--fail-below) or 2 (bad input)."""
    from support import report
    return report.main(argv)


if __name__ == "__main__":
    sys.exit(main())
