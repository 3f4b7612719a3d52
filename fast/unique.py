"""
Def. 2.1 for many prototypes: the same answers as the plain search in collapse.py, in less time
and memory.

The plain search holds all M x M cosines in float64. At M = 65,536 they would take 34 GB. Three
ideas replace them here:

1. A block of rows meets the representatives block by block, in float32 products, so the cosines of
   two blocks are in memory at a time. A float32 cosine decides every pair but those so close to eps
   that its rounding error could tip them. Only these pairs are computed again, in float64.
2. All values of eps are answered in one pass, from the same products.
3. A sketch, d + 1 numbers that stand for the D of a row, bounds the cosine of two rows from above.
   Where even the bound is too small for duplicates, which is usual for distinct prototypes, the
   full product is not computed.

`neighbours` compares all pairs once, block by block, for the other measures that the command
`python collapse.py` shows.

M prototypes in D dimensions; A (M, D) the prototypes in float64, no zero row, each scaled so that
its squares can neither overflow nor vanish (collapse.nonzero_rows returns them so). X (M, D) the
same rows at length one in float32; Y (M, d + 1) their sketches; S the float32 cosines of two
blocks; b the rows of a block; E the number of values of eps.
"""
import math
from contextlib import contextmanager

import numpy as np
import torch

BLOCK = 2048  # rows in a product: its cosines take 16 MiB
ROUNDING = 1e-14  # as in collapse.py: float64 cannot tell rows closer than this from equal ones
MANY_PAIRS = 2 ** 14  # from here on one float64 product costs less than the pairs one by one


# ---- cosines ------------------------------------------------------------------------------------
def unit_rows(A):
    """A (M, D) float64 -> its rows at length one, (M, D) float32."""
    return torch.cat([(part / part.norm(dim=1, keepdim=True)).float() for part in A.split(8192)])


def gram(X):
    """X^T X (D, D) in float64, without a float64 copy of all of X (M, D)."""
    return sum(part.double().T @ part.double() for part in X.split(8192))


def rounding_error(D):
    """The most that the float32 dot product of two unit rows of length D can be off: D roundings of
    2^-24 in the sum, and a few more in the rows themselves."""
    return (D + 4) * 2.0 ** -24


def submatrix(S, rows, columns):
    """S[rows][:, columns] for indices without repeats; no copy where they name everything."""
    if len(rows) < S.shape[0]:
        S = S.index_select(0, rows)
    if len(columns) < S.shape[1]:
        S = S.index_select(1, columns)
    return S


def within(S, A, i, j, eps):
    """Which of the rows i and j of A are duplicates, 1 - cos < eps? -> bool (len(i), len(j)).

    S (len(i), len(j)): their float32 cosines. Pairs that the rounding error of S could tip are
    computed again in float64, so the answer is the one of the plain search."""
    error = rounding_error(A.shape[1])
    duplicate = S > 1 - eps + error
    unsure = (S > 1 - eps - error) & ~duplicate
    a, b = unsure.nonzero(as_tuple=True)  # (pairs,) each
    eps = max(eps, ROUNDING)
    if len(a) > MANY_PAIRS:
        P, Q = A[i], A[j]  # (len(i), D), (len(j), D)
        cos = P @ Q.T / (P.square().sum(1)[:, None] * Q.square().sum(1)).sqrt()
        duplicate |= unsure & (1 - cos < eps)
    elif len(a):
        P, Q = A[i[a]], A[j[b]]  # (pairs, D) each
        cos = (P * Q).sum(1) / (P.square().sum(1) * Q.square().sum(1)).sqrt()  # (pairs,)
        duplicate[a, b] = 1 - cos < eps
    return duplicate


@contextmanager
def full_float32(device):
    """Float32 products in full precision. TF32 on CUDA, bfloat16 on CPU (precision "medium") and
    autocast move a cosine by 1e-3, which is too much beside eps = 0.025."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def progress_bar(steps, title, show):
    if not show or len(steps) < 8:
        return steps
    from tqdm import tqdm
    return tqdm(steps, title, leave=False, disable=None)  # None: on a terminal only


# ---- sketches -----------------------------------------------------------------------------------
def sketch(X, eps, block):
    """Unit rows X (M, D) -> Y (M, d + 1): the coordinates along the d main axes of X, and the
    length of what remains of the row.

    By Cauchy-Schwarz on what remains, y_i . y_j >= x_i . x_j: where the product of two sketches is
    too small for duplicates, so is the cosine, at d / D of the cost. d is the cheapest of D / 8,
    D / 4 and D / 2 on a sample of pairs. Returns X itself where no sketch would save time."""
    M, D = X.shape
    if M <= 2 * block:
        return X  # so few blocks do not repay the main axes
    axes = torch.linalg.eigh(gram(X))[1].flip(1)  # (D, D), the main axis first
    sample = X[::math.ceil(M / 1024)]  # (at most 1024, D)

    def along_axes(rows, d):
        y = rows.double() @ axes[:, :d]  # (n, d)
        remainder = rows.double().square().sum(1) - y.square().sum(1)  # (n,)
        return torch.cat([y, remainder.clamp_min(0).sqrt()[:, None]], 1).float()  # (n, d + 1)

    def cost(d):
        """Of a pair, where its full cosine costs 1. One pair that a sketch leaves open is enough to
        need the full cosines of a column of `block` pairs."""
        y = along_axes(sample, d)
        open_pairs = int((y @ y.T > 1 - eps - rounding_error(D)).sum()) - len(y)
        return (d + 1) / D + min(1, block * open_pairs / len(y) ** 2)

    cheapest = min((d for d in (D // 8, D // 4, D // 2) if d), key=cost, default=None)
    if cheapest is None or cost(cheapest) >= 1:
        return X
    return torch.cat([along_axes(part, cheapest) for part in X.split(8192)])


# ---- Def. 2.1 -----------------------------------------------------------------------------------
def covering(A, eps_list, progress=False, block=BLOCK):
    """{eps: cover (M,)} as collapse.covering: for each row of A (M, D) the index of the
    representative that covers it, itself if it is one. A float64, no zero row; eps in [0, 2];
    progress: show a bar."""
    itself = torch.arange(len(A), device=A.device)  # (M,)
    answers = {0: itself}  # at eps = 0 nothing is a duplicate
    positive = sorted(eps for eps in eps_list if eps > 0)
    if positive:
        with full_float32(A.device):
            search = GreedySearch(A, positive, block)
            for start in progress_bar(range(0, len(A), block), "unique prototypes", progress):
                search.read(start)
        answers |= search.cover
    return {eps: answers[eps] for eps in eps_list}


class GreedySearch:
    """The greedy search, which reads the rows of A block by block.

    cover  {eps: (M,)}  for the rows read so far: the row that covers each
    X, Y                unit rows of A and their sketches. Of the rows read so far only those that
                        are representatives at some eps are needed again: they are moved to the
                        first n places of both
    index (M,)          which row of A each of the n is
    leads (E, M)        whether each of the n is a representative at each eps
    """

    def __init__(self, A, eps_list, block):
        M, D = A.shape
        self.A = A
        self.eps_list = eps_list  # positive and ascending
        self.block = block
        # A float32 cosine up to its threshold cannot belong to duplicates.
        self.thresholds = [1 - eps - rounding_error(D) for eps in eps_list]
        self.X = unit_rows(A)  # (M, D)
        self.Y = sketch(self.X, eps_list[-1], block)  # (M, d + 1), or X
        self.sketched = self.Y is not self.X
        self.cover = {eps: torch.arange(M, device=A.device) for eps in eps_list}
        self.index = torch.empty(M, dtype=torch.int64, device=A.device)
        self.leads = torch.zeros(len(eps_list), M, dtype=torch.bool, device=A.device)
        self.n = 0

    def read(self, start):
        """Find what covers the rows start..start + block, and add the new representatives."""
        x = self.X[start:start + self.block].clone()  # (b, D); a copy, as X is overwritten below
        y = self.Y[start:start + self.block].clone()  # (b, d + 1)
        rows = torch.arange(start, start + len(x), device=x.device)  # (b,), their indices in A
        unclaimed = torch.ones(len(self.eps_list), len(x), dtype=torch.bool, device=x.device)
        for begin in range(0, self.n, self.block):
            part = slice(begin, min(begin + self.block, self.n))
            self.claim_by_earlier(part, x, y, rows, unclaimed)
        self.claim_in_block(x, y, rows, unclaimed)
        new = unclaimed.any(0).nonzero()[:, 0]
        end = self.n + len(new)
        self.X[self.n:end] = x[new]
        self.Y[self.n:end] = y[new]
        self.index[self.n:end] = rows[new]
        self.leads[:, self.n:end] = unclaimed[:, new]
        self.n = end

    def claim_by_earlier(self, part, x, y, rows, unclaimed):
        """Let the representatives in the slice `part` of X claim rows of the block x (b, D)."""
        S = self.Y[part] @ y.T  # (representatives, b): cosines, or bounds of them
        columns = (S.amax(0) > self.thresholds[-1]).nonzero()[:, 0]  # (c,): may have a duplicate
        if not len(columns):
            return
        if self.sketched:
            S = self.X[part] @ x[columns].T  # (representatives, c)
        elif len(columns) < S.shape[1]:
            S = S.index_select(1, columns)  # (representatives, c)
        largest = S.amax(0)  # (c,)
        for e, eps in enumerate(self.eps_list):
            possible = unclaimed[e, columns] & (largest > self.thresholds[e])
            c = possible.nonzero()[:, 0]
            r = self.leads[e, part].nonzero()[:, 0]
            if not len(c) or not len(r):
                continue
            index = self.index[part][r]  # (r,)
            duplicate = within(submatrix(S, r, c), self.A, index, rows[columns[c]], eps)  # (r, c)
            claimed = duplicate.any(0)
            earliest = duplicate.byte().argmax(0)[claimed]  # the first of equal maxima
            position = columns[c[claimed]]
            self.cover[eps][rows[position]] = index[earliest]
            unclaimed[e, position] = False

    def claim_in_block(self, x, y, rows, unclaimed):
        """Let the unclaimed rows of the block x (b, D) become representatives in index order, and
        claim later rows of the block."""
        S = later_only(y @ y.T)  # (b, b)
        if self.sketched and S.max() > self.thresholds[-1]:
            S = later_only(x @ x.T)
        largest = S.amax(0)  # (b,)
        for e, eps in enumerate(self.eps_list):
            i = unclaimed[e].nonzero()[:, 0]  # (u,)
            if not len(i) or largest[i].max() <= self.thresholds[e]:
                continue
            duplicate = within(submatrix(S, i, i), self.A, rows[i], rows[i], eps).cpu().numpy()
            itself = np.arange(len(i))
            cover = itself.copy()  # (u,), positions in i
            for r in np.flatnonzero(duplicate.any(1)):
                if cover[r] == r:
                    cover[duplicate[r] & (cover == itself)] = r
            claimed = torch.from_numpy(cover != itself).to(x.device)
            self.cover[eps][rows[i]] = rows[i[torch.from_numpy(cover).to(x.device)]]
            unclaimed[e, i[claimed]] = False


def later_only(S):
    """Cosines S (b, b), changed in place: -4, less than any cosine, where column j is not later
    than row i, as a row claims only later ones."""
    not_later = torch.ones_like(S, dtype=torch.bool).tril()
    return S.masked_fill_(not_later, -4)


# ---- all pairs ----------------------------------------------------------------------------------
def neighbours(A, eps_list, progress=False, block=BLOCK):
    """The nearest neighbour of each row of A (M, D) float64 without zero rows, over all pairs.

    -> cosine to the nearest (M,) float32, NaN where M = 1, and
       {eps: (has a neighbour within eps (M,) bool, component (M,) int64)}.
    Two prototypes share a component when a chain of steps shorter than eps joins them."""
    M, D = A.shape
    X = unit_rows(A)
    nearest = torch.full((M,), -4., device=A.device)
    has_neighbour = {eps: torch.zeros(M, dtype=torch.bool, device=A.device) for eps in eps_list}
    component = {eps: torch.arange(M, device=A.device) for eps in eps_list}
    with full_float32(A.device):
        for i in progress_bar(range(0, M, block), "neighbours", progress):
            for j in range(i, M, block):
                I, J = slice(i, i + block), slice(j, j + block)
                S = X[I] @ X[J].T  # (b, b')
                if i == j:
                    S.fill_diagonal_(-4)  # no row is its own neighbour
                row_max, column_max = S.amax(1), S.amax(0)
                nearest[I] = torch.maximum(nearest[I], row_max)
                nearest[J] = torch.maximum(nearest[J], column_max)
                for eps in eps_list:
                    threshold = 1 - eps - rounding_error(D)
                    r = (row_max > threshold).nonzero()[:, 0]
                    c = (column_max > threshold).nonzero()[:, 0]
                    if eps == 0 or not len(r):
                        continue
                    close = within(submatrix(S, r, c), A, i + r, j + c, eps)  # (r, c)
                    has_neighbour[eps][i + r] |= close.any(1)
                    has_neighbour[eps][j + c] |= close.any(0)
                    component[eps] = join(component[eps], close, i + r, j + c)
    nearest = nearest.clamp(-1, 1) if M > 1 else nearest * math.nan
    return nearest, {eps: (has_neighbour[eps], component[eps]) for eps in eps_list}


def join(component, close, rows, columns):
    """component (M,) after rows[i] and columns[j] have been joined wherever close[i, j]."""
    while True:
        a, b = component[rows], component[columns]
        apart = close & (a[:, None] != b)  # (r, c)
        r, c = apart.any(1).nonzero()[:, 0], apart.any(0).nonzero()[:, 0]
        if not len(c):
            return component
        # Each row and each column joins one other component in a round. So every component that has
        # one to join does, their number at least halves, and a few rounds join all of them.
        first_row, first_column = apart.byte().argmax(0)[c], apart.byte().argmax(1)[r]
        component = merge(component, torch.cat([a[first_row], a[r]]),
                          torch.cat([b[c], b[first_column]]))


def merge(component, a, b):
    """component (M,) after the components a[i] and b[i] have become one, for every i. The lower
    number stays. This is union-find: parent points from a number to a lower one of the same
    component, and from the lowest to itself."""
    parent = {}

    def root(x):
        while parent.setdefault(x, x) != x:
            parent[x] = parent[parent[x]]  # halves the way for the next time
            x = parent[x]
        return x

    for x, y in set(zip(a.tolist(), b.tolist())):
        x, y = root(x), root(y)
        parent[max(x, y)] = min(x, y)
    new_number = torch.arange(len(component))  # (M,)
    for x in parent:
        new_number[x] = root(x)
    return new_number.to(component.device)[component]
