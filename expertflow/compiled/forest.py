"""The forest's trees, walked for all experts of a layer."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from expertflow.compiled.compiling import compiled
from expertflow.forest import LEAF_ONE
from expertflow.units import SCORE_ONE

_SCORE_PER_LEAF = SCORE_ONE // LEAF_ONE


@compiled("void(i4[:,::1], i4[::1], i1[:,::1], i4[::1], i2[::1], i8[::1])")
def evaluate_forest(nodes, roots, leaves, table, features, out):
    """out [E] becomes the calibrated pre-gate plus the mean leaf of the trees at `roots`, clipped to 0 … 2^16."""
    num_experts = leaves.shape[1]
    total = np.zeros(num_experts, np.int32)
    for root in roots:
        node = root
        while node >= 0:
            node = nodes[node, 2] if features[nodes[node, 0]] <= nodes[node, 1] else nodes[node, 3]
        leaf = leaves[~node]
        for expert in range(num_experts):
            total[expert] += leaf[expert]
    for expert in range(num_experts):
        chance = min(max(features[expert], 0), table.shape[0] - 1)
        # A floor division of whole numbers is the same on every machine.
        score = table[chance] + (total[expert] * _SCORE_PER_LEAF) // len(roots)
        out[expert] = min(max(score, 0), SCORE_ONE)
