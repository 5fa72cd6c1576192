"""Label each of many items 0 or 1 at the least cost, where labels cost by themselves and neighbors cost that differ.

    minimize  sum_i cost[i][label_i]  +  sum of w over the pairs (i, j, w) with label_i = 0 and label_j = 1

A minimum cut between a source and a sink: items on the source's side have label 0. It is exact, and of polynomial time
(Kolmogorov and Zabih, *What energy functions can be minimized via graph cuts?*, PAMI 2004).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

# scipy's flow counts in 32 bits, where a flow and an infinite capacity have to fit together.
_TOTAL = 5 * 10**8
_INFINITE = 6 * 10**8


def least_labels(costs: Sequence[tuple[float, float]], pairs: Iterable[tuple[int, int, float]]) -> NDArray[np.bool_]:
    """The labels [n] that cost least, for the ``costs`` [n] of labels 0 and 1 and the ``pairs`` (i, j, w).

    Costs are 0 or more; infinite ones forbid. Of equally good labels, the one with the fewest 1s is taken. Raises
    `ValueError` where every choice is forbidden.
    """
    # It takes its time to load.
    from scipy.sparse import csr_array, csr_matrix
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    n = len(costs)
    source, sink = n, n + 1
    edges: dict[tuple[int, int], float] = {}
    links = [link for i, (zero, one) in enumerate(costs) for link in ((source, i, one), (i, sink, zero))]
    for i, j, w in (*links, *pairs):
        if w > 0 and i != j:
            edges[i, j] = edges.get((i, j), 0.0) + w
    finite = sum(w for w in edges.values() if w < math.inf)
    scale = _TOTAL / max(finite, 1e-300)
    capacity = [min(_INFINITE, round(w * scale)) if w < math.inf else _INFINITE for w in edges.values()]
    rows, columns = np.array(list(edges) or np.zeros((0, 2)), np.int32).T
    graph = csr_matrix((np.array(capacity, np.int32), (rows, columns)), shape=(n + 2, n + 2))
    found = maximum_flow(graph, source, sink)
    if found.flow_value >= _INFINITE:
        raise ValueError("every choice of labels is forbidden")
    left = csr_array(graph - found.flow)
    left.data = np.maximum(left.data, 0)
    left.eliminate_zeros()
    # Label 1 is for what reaches the sink: everything else can be on the source's side at the same cost.
    reaching = breadth_first_order(csr_array(left.T), sink, return_predecessors=False)
    labels = np.zeros(n + 2, np.bool_)
    labels[reaching] = True
    return labels[:n]
