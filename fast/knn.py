"""The search of eval_knn.py for large sets: the same neighbours, in bounded memory and less time.

The plain search holds the similarities of a chunk of queries to the whole bank, and a normalised
copy of the bank. Here the bank too is cut into blocks, and of a block only those similarities are
sorted that can still be among the k largest. tests/test_fast_knn.py holds the two searches equal.

Letters: N images in the bank, M queries, D feature dimension, q queries of a chunk, n images of a
block of the bank.
"""
import torch
import torch.nn.functional as F
from tqdm import tqdm

BUDGET = 640 * 2**20  # bytes that a search may use, for any M and N; a third of it is usual
QUERIES = 2048  # most queries of a chunk
IMAGES = 2048  # most images of a block of the bank
GROUP = 64  # neighbouring similarities whose largest one decides whether any of them is sorted
LARGEST_INDEX = 2**32 - 1  # of a bank's image, since 32 bits of a key hold it


def unit(x):
    """Rows of x (n, D) scaled to length 1, float32. ValueError where a feature is nan or
    infinite."""
    x = F.normalize(x.float(), dim=1)  # (n, D)
    if not x.sum().isfinite():  # an inf has become inf / inf = nan, and one nan is enough
        raise ValueError("k-NN got features that are not finite (nan or inf)")
    return x


def to_keys(sim, index):
    """Similarities and bank indices as int64 keys, no two alike: a key is larger where the
    similarity is larger, and between equal similarities where the index is smaller.

    The k largest keys are the same ones on every device and for every size of the blocks, whereas
    torch.topk on similarities may take any of several equal ones. sim float32 and index int64 of
    one shape -> int64 of that shape.
    """
    bits = (sim + 0.0).view(torch.int32)  # + 0 turns -0 into 0, its equal
    # Read as integers, negative floats are ordered the wrong way round: turn theirs.
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.long() << 32).bitwise_or_(LARGEST_INDEX - index)


def from_keys(keys):
    """(sim float32, index int64) of the keys that to_keys made."""
    bits = (keys >> 32).int()
    sim = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return sim, LARGEST_INDEX - (keys & LARGEST_INDEX)


def block_sizes(M, N, D, k, width):
    """(q, n): queries of a chunk and images of a block, as many as BUDGET allows. Arguments as in
    neighbours."""
    # Products whose width is no multiple of GROUP take a fifth longer, so n is one, unless k or N
    # leave no choice. A bank's image costs 12 bytes a feature; a similarity costs 72 where it is
    # sorted, as all are where features have collapsed; a query needs a dozen numbers for each of
    # its neighbours.
    n = max(k, min(N, IMAGES, BUDGET // 4 // (72 + 12 * D) // GROUP * GROUP))
    bytes_per_query = 72 * n + 8 * D + 128 * k + 4 * width
    q = max(1, min(M, QUERIES, (BUDGET - 12 * D * n) // bytes_per_query))
    return q, n


def bank_blocks(N, n):
    """[(start, stop, step)] of slices that together hold each of the N images once, n in each but
    the last.

    A block takes every step-th image, so that a bank sorted by class is a mixture of classes in
    each of them: then the first blocks already show how similar the k-th neighbour will be, and few
    later similarities need sorting.
    """
    step = N // n
    blocks = [(start, n * step, step) for start in range(step)]
    if n * step < N:
        blocks.append((n * step, N, 1))
    return blocks


def hide_own_image(sim, first_query, start, stop, step):
    """In place: -inf where a query of sim (q, n) meets itself, query i being image i of the bank
    (leave-one-out)."""
    own = torch.arange(first_query, first_query + len(sim), device=sim.device) - start  # (q,)
    in_block = (own >= 0) & (own < stop - start) & (own % step == 0)  # (q,)
    sim[in_block, own[in_block] // step] = -torch.inf


def candidates(sim, threshold):
    """(query, column), (hits,) each: where sim (q, n) is at least the query's threshold (q, 1),
    query after query."""
    size = GROUP if sim.shape[1] % GROUP == 0 else sim.shape[1]
    groups = sim.unflatten(1, (-1, size))  # (q, n / size, size)
    query, group = (groups.amax(2) >= threshold).nonzero(as_tuple=True)  # (groups with a hit,) each
    hit, place = (groups[query, group] >= threshold[query]).nonzero(as_tuple=True)  # (hits,) each
    return query[hit], group[hit] * size + place


def as_rows(keys, query, q):
    """(q, most) keys of each query, filled up with the smallest number. keys (hits,) belong to
    query (hits,), sorted; most: the largest number of keys that a query has."""
    count = query.bincount(minlength=q)  # (q,)
    before = count.cumsum(0) - count  # (q,) hits of the queries before this one
    place = torch.arange(len(query), device=query.device) - before[query]  # (hits,)
    rows = keys.new_full((q, int(count.max())), torch.iinfo(torch.long).min)  # (q, most)
    rows[query, place] = keys
    return rows


def neighbours(train_x, test_x, k, width=0, leave_one_out=False):
    """Yield (first query, sim (q, k), index (q, k)) for chunks of queries: their k nearest images
    of the bank.

    train_x (N, D) is the bank and test_x (M, D) the queries, of any length and any float dtype; k
    <= N. The largest similarity comes first, and of equal ones the smaller index. The (M, N)
    similarities never exist: the search uses about BUDGET bytes. It runs on test_x's device; the
    bank may lie on another one, its blocks are copied over. width: floats that the caller needs for
    a query, for instance its number of classes. leave_one_out: query i is image i of the bank and
    not its own neighbour; k <= N - 1. ValueError where a feature is nan or infinite.
    """
    M, D = test_x.shape
    q, n = block_sizes(M, len(train_x), D, k, width)
    with tqdm(total=M, desc="k-NN", unit="img", leave=False, disable=None, delay=2) as bar:
        for first_query in range(0, M, q):
            queries = unit(test_x[first_query:first_query + q])  # (q, D)
            best = None  # keys (q, k) of the neighbours so far
            for start, stop, step in bank_blocks(len(train_x), n):
                bank = unit(train_x[start:stop:step].to(queries.device))  # (n, D)
                sim = queries @ bank.T  # (q, n)
                if leave_one_out:
                    hide_own_image(sim, first_query, start, stop, step)
                if best is None:  # the first block has at least k images
                    threshold = sim.topk(k, sorted=False).values.amin(1, keepdim=True)  # (q, 1)
                else:
                    threshold = from_keys(best.amin(1, keepdim=True))[0]  # (q, 1)
                query, column = candidates(sim, threshold)  # (hits,) each
                keys = to_keys(sim[query, column], column * step + start)  # (hits,)
                keys = as_rows(keys, query, len(queries))
                if best is not None:
                    keys = torch.cat([best, keys], 1)
                best = keys.topk(k, sorted=False).values  # (q, k)
            yield first_query, *from_keys(best.sort(dim=1, descending=True).values)
            bar.update(len(queries))
