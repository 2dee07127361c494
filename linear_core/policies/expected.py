from __future__ import annotations

from torch import Tensor

from ..cache.look_ahead import upcast
from ..cache.view import View


def expected(view: View) -> Tensor:
    """Expected Attention: what queries like these will attend to on average, times what it would add.

    Paper: Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution", arXiv 2510.00636.
    Score: softmax over all that is held of the exponent that a Gaussian's mean exponential has, m + v / 2, times the
    length of the value; m and v are mean and variance of the token's attention logit over the queries to come. (The
    paper writes them with mean and covariance of the queries, which is the same.) It turns a prompt's queries by an
    average over the next 512 positions; in a picture those are known, so the line's queries are turned to just where
    the next line's will stand. Reads: ahead.
    """
    scores = upcast(view.keys) @ view.look_ahead((1,)).queries.transpose(-1, -2)
    exponent = scores.mean(-1) + scores.var(-1, correction=0) / 2 + upcast(view.bias)
    return exponent.softmax(-1) * upcast(view.values).norm(dim=-1)
