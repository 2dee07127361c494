from __future__ import annotations

from torch import Tensor

from ..cache.look_ahead import upcast
from ..cache.view import View


def expected(view: View) -> Tensor:
    """Expected Attention: the attention that future queries give a token on average, times the norm of its value.

    Paper: Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution", arXiv 2510.00636.
    Score: softmax over all slots of m + v / 2, the log of the expected exponential of a Gaussian logit, times the norm
    of the value; m and v are mean and variance of the token's logit over the predicted queries. (The paper writes them
    with mean and covariance of the queries, which is the same.) The paper averages RoPE over the next 512 positions; in
    a picture the next positions are known, so the line's queries are rotated to those of the next line. Reads: ahead.
    """
    scores = upcast(view.keys) @ view.look_ahead((1,)).queries.transpose(-1, -2)
    exponent = scores.mean(-1) + scores.var(-1, correction=0) / 2 + upcast(view.bias)
    return exponent.softmax(-1) * upcast(view.values).norm(dim=-1)
