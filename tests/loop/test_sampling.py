"""From logits to tokens: guidance, top-k, top-p, and noise that depends on its address alone.

Statistical tests use fixed seeds, so they do not flicker; each says how likely a sound generator would have failed it
for a seed chosen at random.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from linear_core.loop import sampling
from linear_core.loop.sampling import Noise, apply_guidance, filter_logits, sample_codes

INF = float("inf")


def noise(seed: int, images: int, codes: int, tokens: range) -> Tensor:
    """float32 images tokens codes."""
    source = Noise(seed, images, codes, "cpu")
    return torch.stack([source.exponential(token) for token in tokens], 1)


def kept(logits: list[float], top_k: int = 0, top_p: float = 1.0) -> list[int]:
    """Codes that `restrict` leaves, in one row."""
    out = filter_logits(torch.tensor([logits]), top_k, top_p)[0]
    stay = (out > -INF).nonzero().flatten().tolist()
    assert out[stay].tolist() == torch.tensor(logits)[stay].tolist(), "what stays is not changed"
    return stay


# -- guidance ----------------------------------------------------------------------------------------------------------


def test_guidance_moves_away_from_the_unconditional():
    """Conditional rows first: unconditional + (conditional - unconditional) * scale, row by row."""
    logits = torch.tensor([[1.0, 2.0], [5.0, 7.0], [0.0, 4.0], [5.0, 1.0]])
    assert apply_guidance(logits, 2, 3.0).tolist() == [[3.0, -2.0], [5.0, 19.0]]


def test_guidance_of_one_is_conditional_and_of_zero_unconditional():
    """The two ends of the line between the halves."""
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(apply_guidance(logits, 3, 1.0), logits[:3])
    torch.testing.assert_close(apply_guidance(logits, 3, 0.0), logits[3:])


# -- top-k and top-p ---------------------------------------------------------------------------------------------------


def log(*shares: float) -> list[float]:
    return [math.log(share) for share in shares]


@pytest.mark.parametrize(
    ("top_k", "codes"),
    [(0, [0, 1, 2, 3]), (1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]), (99, [0, 1, 2, 3])],
)
def test_top_k(top_k, codes):
    """The k likeliest; 0 and anything from the number of codes on is all of them."""
    assert kept(log(0.3, 0.1, 0.4, 0.2), top_k=top_k) == codes


def test_top_k_keeps_equals():
    """Codes as likely as the last one to stay are not told apart."""
    assert kept([1.0, 0.0, 1.0, 0.0], top_k=1) == [0, 2]


@pytest.mark.parametrize(
    ("top_p", "codes"),
    [
        (1e-6, [2]),  # at least one always stays
        (0.39, [2]),
        (0.41, [0, 2]),  # the code that crosses the mark stays
        (0.69, [0, 2]),
        (0.71, [0, 2, 3]),
        (0.89, [0, 2, 3]),
        (0.91, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p(top_p, codes):
    """The smallest set of likeliest codes whose mass reaches top-p: 0.4, 0.7, 0.9, 1."""
    assert kept(log(0.3, 0.1, 0.4, 0.2), top_p=top_p) == codes


def test_top_p_of_a_certain_code():
    """A code with all the mass stays alone, however far from 1 the mark is."""
    assert kept([0.0, 50.0, 0.0], top_p=0.999) == [1]


def test_top_p_is_taken_of_what_top_k_left():
    """After top-k 2 the masses are 4/7 and 3/7, so 0.56 keeps one code where 0.56 of all four keeps two."""
    shares = log(0.3, 0.1, 0.4, 0.2)
    assert kept(shares, top_p=0.56) == [0, 2]
    assert kept(shares, top_k=2, top_p=0.56) == [2]


def test_rows_are_restricted_apart():
    """Each image of the batch has its own threshold."""
    logits = torch.tensor([log(0.7, 0.2, 0.1), log(0.1, 0.2, 0.7), log(0.3, 0.3, 0.4)])
    assert (filter_logits(logits, 2, 1.0) > -INF).tolist() == [
        [True, True, False],
        [False, True, True],
        [True, True, True],
    ]
    assert (filter_logits(logits, 0, 0.65) > -INF).sum(1).tolist() == [1, 1, 2]


def test_restrict_leaves_its_input_alone():
    """The model's logits are not written to."""
    logits = torch.tensor([log(0.3, 0.1, 0.4, 0.2)])
    before = logits.clone()
    filter_logits(logits, 2, 0.5)
    assert torch.equal(logits, before)


# -- noise -------------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_token_and_code_alone():
    """Not on the batch, the number of codes, the other tokens or their order."""
    whole = noise(5, 4, 100, range(6))
    for image in range(4):
        assert torch.equal(whole[image : image + 1], noise(5 + image, 1, 100, range(6)))
    assert torch.equal(whole[:, :, :9], noise(5, 4, 9, range(6)))
    source = Noise(5, 4, 100, "cpu")
    for token in (5, 0, 3, 3):
        assert torch.equal(source.exponential(token), whole[:, token])


def by_hand(seed: int, token: int, code: int) -> float:
    """The same noise in Python's integers, which do not overflow, and its doubles."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    key = (seed * 0x9E3779B97F4A7C15 ^ seed >> 29) % 2**64
    bits = mix((mix(code ^ key % 2**32) + (token + 1) * 0x9E3779B1) % 2**32 ^ key >> 32)
    return -math.log1p(-(bits + 0.5) * 2.0**-32)


@pytest.mark.parametrize("seed", [0, 12345, 2**32 - 1, 2**63, 2**64 - 1])
def test_noise_is_the_same_everywhere(seed):
    """32-bit tensors give what Python's integers give, at the largest tokens and codes too."""
    for token in (0, 1, 575, 16383):
        row = Noise(seed, 1, 16384, "cpu").exponential(token)[0]
        for code in (0, 1, 1023, 16383):
            assert float(row[code]) == pytest.approx(by_hand(seed, token, code), rel=1e-6)


def test_noise_is_the_same_forever():
    """A seed's picture is the same in the next release."""
    expected = [0.1707521, 0.2093085, 1.8587095, 1.8106649]
    assert noise(12345, 1, 2, range(2)).flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32, 2**63, 2**64 - 2])
def test_noise_is_exponential(seed):
    """Kolmogorov and Smirnov's distance to 1 - exp(-x) over 40 tokens x 4096 codes.

    By the inequality of Dvoretzky, Kiefer, Wolfowitz and Massart, P(distance > d) <= 2 exp(-2 n d^2): 1e-9 a case.
    """
    x = noise(seed, 1, 4096, range(40)).flatten().double().sort().values
    assert x[0] > 0
    n = len(x)
    step = torch.arange(1, n + 1) / n
    expected = -torch.expm1(-x)
    distance = torch.maximum((step - expected).abs(), (expected - step + 1 / n).abs()).max()
    assert distance < math.sqrt(math.log(2 / 1e-9) / (2 * n))


@pytest.mark.parametrize("apart", ["seed", "far seed", "very far seed", "token", "code", "token and code"])
def test_neighbours_are_uncorrelated(apart):
    """Noise at neighbouring addresses, as uniform numbers: |r| sqrt(n) < 6 over 2 * 10^5 pairs.

    r sqrt(n) is all but standard normal, so a sound generator fails a case with probability 2 * 10^-9.
    """
    uniform = torch.exp(-noise(11, 2, 2001, range(101)).double())
    shift = {"far seed": 2**32, "very far seed": 2**33 + 2**20}.get(apart)
    if shift:
        a, b = uniform[0], torch.exp(-noise(11 + shift, 1, 2001, range(101)).double())[0]
    else:
        a, b = {
            "seed": (uniform[0], uniform[1]),
            "token": (uniform[0, 1:], uniform[0, :-1]),
            "code": (uniform[0, :, 1:], uniform[0, :, :-1]),
            "token and code": (uniform[0, 1:, 1:], uniform[0, :-1, :-1]),
        }[apart]
    assert a.numel() > 199_000
    r = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
    assert abs(float(r)) * math.sqrt(a.numel()) < 6


@pytest.mark.parametrize("bits", [0, 1, 0xFFFFFF7F, 0xFFFFFFFF])
def test_noise_is_finite_and_positive_for_every_hash(bits, monkeypatch):
    """The ends of the 32-bit range too: an infinite number would rule a code out, even the only one left."""
    monkeypatch.setattr(sampling, "_mix", lambda x: torch.full_like(x, sampling._signed(bits)))
    x = Noise(0, 1, 3, "cpu").exponential(0)
    assert x.isfinite().all() and (x > 0).all()


# -- the draw ----------------------------------------------------------------------------------------------------------


def chi_square_tail(x: float, freedom: int) -> float:
    """P(chi square of an even number of degrees of freedom > x)."""
    return math.exp(-x / 2) * sum((x / 2) ** j / math.factorial(j) for j in range(freedom // 2))


@pytest.mark.parametrize("across", ["tokens", "images"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_softmax(temperature, across):
    """20,000 draws of 9 codes against softmax(logits / T), from one seed's tokens or from many seeds' first tokens.

    Pearson's chi square with 8 degrees of freedom; a sound generator fails a case with probability 1e-6.
    """
    logits = torch.tensor([1.0, -1.0, 0.5, 0.0, 0.25, -0.5, 1.5, 0.75, -0.25])
    count = 20_000
    if across == "images":
        exponential = Noise(3, count, 9, "cpu").exponential(0)
    else:  # the tokens of 20 pictures of 1000 tokens
        exponential = noise(3, 20, 9, range(1000)).flatten(0, 1)
    drawn = sample_codes(logits.expand(count, -1), exponential, temperature).bincount(minlength=9)
    expected = count * (logits / temperature).softmax(-1)
    distance = float(((drawn - expected) ** 2 / expected).sum())
    assert chi_square_tail(distance, 8) > 1e-6


def test_a_small_temperature_is_nearly_greedy():
    """At T = 0.01 a lead of 0.5 is e^50 to one."""
    logits = torch.tensor([0.0, 1.0, 1.5, 0.5]).expand(500, -1)
    assert (sample_codes(logits, Noise(0, 500, 4, "cpu").exponential(0), 0.01) == 2).all()


def test_temperature_zero_is_greedy():
    """The likeliest code whatever the noise, the first of equals."""
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 2.0]])
    for token in range(5):
        assert sample_codes(logits, Noise(token, 2, 3, "cpu").exponential(token), 0).tolist() == [1, 0]


def test_what_is_ruled_out_is_never_drawn():
    """-inf loses every race; a row with one code left draws it."""
    logits = torch.full((4000, 6), -INF)
    logits[:, [1, 4]] = 0.0
    exponential = Noise(0, 4000, 6, "cpu").exponential(7)
    assert set(sample_codes(logits, exponential, 1.0).tolist()) == {1, 4}
    logits[:, 1] = -INF
    assert (sample_codes(logits, exponential, 1.0) == 4).all()


def test_half_precision_logits_are_drawn_in_float():
    """bfloat16 logits race in float32, as the noise is finer than they are."""
    logits = torch.zeros(1000, 5, dtype=torch.bfloat16)
    exponential = Noise(0, 1000, 5, "cpu").exponential(0)
    assert torch.equal(sample_codes(logits, exponential, 1.0), exponential.argmin(-1))
