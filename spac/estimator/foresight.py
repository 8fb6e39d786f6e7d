"""From probabilities of use by coming tokens to what the pager takes (spac_model_foresee).

The pager evicts what is used again last. So of a use by a coming token counts the probability that it is the *first* one, less the
farther off it is; what is beyond the known tokens is left to the pager's own value, which past uses give it.
"""

from __future__ import annotations

import numpy as np

from spac.estimator.tokens import Floats

# Found on the demo model's requests, of which scripts/lookahead_study.py shows the held-back half; the optimum is flat.
STEP_DISCOUNT = np.float32(0.7)  # of a known use a token later, as Policy::step_discount
TAIL = np.float32(2.0)  # of the pager's own value, after tokens that are known beyond those decoded next


def foresight(now: Floats, coming: Floats) -> Floats:
    """What the pager is told.

    Args:
        now: [layers, experts], probability that the tokens decoded next use an expert.
        coming: [tokens, layers, experts], the same of each token known after them; the chance that it comes at all included.

    Returns:
        float32 [3, layers, experts]: now, later, rest.
    """
    out = np.zeros((3, *now.shape), np.float32)
    np.clip(now, 0, 1, out=out[0])
    unused, discount = np.ones_like(out[0]), np.float32(1)
    for p in coming:
        out[1] += discount * unused * p
        unused *= 1 - p
        discount *= STEP_DISCOUNT
    np.clip(unused, 0, 1, out=unused)
    out[2] = (TAIL if len(coming) else 1) * discount * unused
    return out
