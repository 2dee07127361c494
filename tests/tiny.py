"""Tiny seeded models, and a recorder that writes down what a decoder is asked and what it answers.

Weights are large enough that attention is peaky: one token more or less in view moves the logits by tenths, not by
millionths, so a test that compares logits sees it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from linear_core.cache.attention import attend
from linear_core.cache.line_cache import LineCache, Window
from linear_core.cache.view import View
from linear_core.checkpoints.library import bundled_files
from linear_core.checkpoints.weights import read_weights
from linear_core.events import Line
from linear_core.grid import Grid
from linear_core.loop.generate import generate
from linear_core.models.infinity import Infinity, InfinityConfig
from linear_core.models.janus import Janus, JanusConfig
from linear_core.models.llamagen import LlamaGen, LlamaGenConfig
from linear_core.models.lumina import Lumina, LuminaConfig
from linear_core.models.mar import MAR, MARConfig
from linear_core.models.mvar import MVAR, MVARConfig
from linear_core.models.var import VAR, VARConfig
from linear_core.plan import CachePlan, CacheShape, SamplePlan
from linear_core.policies import POLICIES, Policy
from linear_core.prompts import Prompt, token_prompt
from linear_core.pyramid import Pyramid
from linear_core.tokenizers.bits import BitPyramid
from linear_core.tokenizers.latents import LatentConfig, LatentTokenizer
from linear_core.tokenizers.pyramid import ResidualPyramid

CLASSES, CODES = 5, 23
CAPTION, CAPTION_DIM = 7, 6  # slots of a caption, numbers a slot
WORDS = 13  # tokens that Janus' prompts are made of


def llamagen(
    rows: int,
    cols: int,
    *,
    text: bool = False,
    seed: int = 0,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    rope: str = "2d",
) -> LlamaGen:
    """Three heads of 8 numbers; class-conditional, or text-conditional with CAPTION slots."""
    width, heads, hidden = 24, 3, 32
    kind = {"caption_dim": CAPTION_DIM, "caption_slots": CAPTION} if text else {"classes": CLASSES}
    config = LlamaGenConfig(layers, width, heads, hidden, CODES, **kind, rope=rope)
    model = LlamaGen(config, Grid(rows, cols)).requires_grad_(False).eval()
    deviation = {"wqkv": 0.3, "w2": 0.1, "output": 0.4, "tok_embeddings": 1.0, "cls_embedding": 1.0}
    return _filled(model, deviation, seed).to(dtype)


def janus(
    rows: int, cols: int, *, qk_norm: bool = False, seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32
) -> Janus:
    """Three heads of 8 numbers; 1-D RoPE, a codebook of 4 numbers an entry; on request norms of queries and keys."""
    norm = "layer" if qk_norm else ""
    config = JanusConfig(layers, 24, 3, 32, CODES, WORDS, qk_norm=norm, code_dim=4, head_hidden=20)
    model = Janus(config, Grid(rows, cols)).requires_grad_(False).eval()
    deviation = {"wqkv": 0.3, "w2": 0.1, "gen_head": 0.3, "gen_aligner": 0.5, "gen_embed": 1.0, "embed_tokens": 1.0}
    return _filled(model, deviation, seed).to(dtype)


def lumina(rows: int, cols: int, *, seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32) -> Lumina:
    """Three heads of 8 numbers with norms of queries and keys; codes are words 4 and on, the next one ends a line."""
    config = LuminaConfig(layers, 24, 3, 32, CODES, 4 + CODES + 1, qk_norm="layer", first_code=4)
    model = Lumina(config, Grid(rows, cols, eol=CODES)).requires_grad_(False).eval()
    return _filled(model, {"wqkv": 0.3, "w2": 0.1, "lm_head": 0.4, "embed_tokens": 1.0}, seed).to(dtype)


def grouped(rows: int, cols: int, *, seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32) -> Lumina:
    """Two key heads, each shared by two query heads, of 8 numbers where width / heads is 6; RMSNorms of the heads.

    Codes come last in the vocabulary, and the token that ends a line before them.
    """
    config = LuminaConfig(
        layers, 24, 4, 32, CODES, WORDS + CODES, qk_norm="rms", key_heads=2, head_dim=8, first_code=WORDS
    )
    model = Lumina(config, Grid(rows, cols, eol=3 - WORDS)).requires_grad_(False).eval()
    return _filled(model, {"wqkv": 0.3, "w2": 0.1, "lm_head": 0.4, "embed_tokens": 1.0}, seed).to(dtype)


def var(
    *sides: int, seed: int = 0, layers: int = 2, shared: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[VAR, ResidualPyramid]:
    """Three heads of 8 numbers over these scales, and the quantizer of its codes, 6 numbers each."""
    config = VARConfig(layers, 24, 3, 32, CODES, CLASSES, 6, Pyramid.square(*sides), shared_adaln=shared)
    model = VAR(config).requires_grad_(False).eval()
    quantizer = ResidualPyramid(CODES, 6, 4).requires_grad_(False)
    deviation = {"mat_qkv": 0.4, "fc2": 0.1, "scale_mul": 0.7, "ada": 0.4, "head": 0.5, "class_emb": 1.0}
    return _filled(model, deviation, seed).to(dtype), _filled(quantizer, {"embedding": 1.0}, seed).to(dtype)


def mvar(
    *sides: int, seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[MVAR, ResidualPyramid]:
    """VAR's with attention within a scale, and a scan of three heads of 16 channels, 5 numbers of state for each."""
    sizes = {"inner": 48, "scan_heads": 3, "scan_size": 5, "span": 4}
    model = MVAR(MVARConfig(layers, 24, 3, 32, CODES, CLASSES, 6, Pyramid.square(*sides), **sizes))
    model = model.requires_grad_(False).eval()
    quantizer = ResidualPyramid(CODES, 6, 4).requires_grad_(False)
    deviation = {"mat_qkv": 0.4, "fc2": 0.1, "scale_mul": 0.7, "ada": 0.4, "head": 0.5, "class_emb": 1.0}
    deviation |= {"A_log": 2.0, "dt_bias": 1.5, "conv1d": 0.5, "in_proj": 0.3}  # some heads remember several scales
    return _filled(model, deviation, seed).to(dtype), _filled(quantizer, {"embedding": 1.0}, seed).to(dtype)


def infinity(
    *sides: tuple[int, int], seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Infinity, BitPyramid]:
    """Three heads of 8 numbers over these scales, captions of CAPTION slots; and its quantizer, 6 bits a token."""
    config = InfinityConfig(layers, 24, 3, 32, 6, CAPTION_DIM, CAPTION, 2, 15)
    model = Infinity(config, Pyramid(sides)).requires_grad_(False).eval()
    deviation = {"mat_qkv": 0.4, "fc2": 0.1, "scale_mul": 0.7, "ada": 0.4, "head": 0.5, "cfg_uncond": 1.0}
    return _filled(model, deviation, seed).to(dtype), BitPyramid(6, 1)


def mar(*, seed: int = 0, side: int = 6, patch: int = 1, dtype: torch.dtype = torch.float64) -> MAR:
    """Three heads of 8 numbers, 2 + 4 layers, 3 copies of the class; latents of 4 channels, in double precision.

    What the head says is small, so latents stay about 10.
    """
    numbers = 4 * patch**2
    config = MARConfig(2, 4, 24, 3, 32, CLASSES, side * side, 3, numbers, 16, 2, patch)
    model = MAR(config).requires_grad_(False).eval()
    deviation = {
        "qkv": 0.5,
        "fc2": 0.3,
        "class_emb": 1.0,
        "pos_embed": 0.7,
        "z_proj.weight": 0.7,
        "final_layer.linear": 0.05,
    }
    return _filled(model, deviation, seed).to(dtype)


def latent_tokenizer(seed: int = 0) -> LatentTokenizer:
    """4 channels of 2 pixels a side, with an encoder."""
    tokenizer = LatentTokenizer(LatentConfig(4, (16, 8), 1, False, (8, 16), 1, True)).requires_grad_(False).eval()
    return _filled(tokenizer, {}, seed)


def _filled(model: Any, deviation: dict[str, float], seed: int) -> Any:
    source = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=source)
        if "norm" in name:
            tensor.copy_(0.1 * noise + (0 if name.endswith("bias") else 1))
        else:
            tensor.copy_(noise * next((d for part, d in deviation.items() if part in name), 0.2))
    return model


def cut_down(path: Path, *, tokenizer: str = "", heads: str = "8", grid: int = 8) -> Path:
    """The bundled decoder with its first layer only and another grid, written to `path`."""
    weights = read_weights(bundled_files().decoder)
    tensors = {k: v.contiguous() for k, v in weights.tensors.items() if not re.match(r"layers\.[1-9]", k)}
    notes = {"heads": heads, "tokenizer": tokenizer or weights.metadata["tokenizer"], "grid": f"{grid}x{grid}"}
    save_file(tensors, path, weights.metadata | notes)
    return path


def words(lengths: list[int], seed: int = 0) -> Prompt:
    """One prompt of text tokens a row, left-padded; guided from as long a one, of which only the ends are the same."""
    rows = []
    for length in lengths:
        source = torch.Generator().manual_seed(seed + 100 * length)
        rows.append([1, *torch.randint(4, WORDS, (length - 2,), generator=source).tolist(), 2])
    nothing = [[1, *[3] * (length - 2), 2] for length in lengths]
    return token_prompt(rows, negative=token_prompt(nothing))


def lumina_words(lengths: list[int], seed: int = 0) -> Prompt:
    """The same guided from the last two tokens alone, as Lumina-mGPT's begin with the image."""
    prompt = words(lengths, seed)
    return replace(prompt, negative=token_prompt(prompt.tokens[:, -2:].tolist()))


def caption_prompt(
    lengths: list[int], places: int = CAPTION, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Prompt:
    """One caption a row, left-padded with zeros to `places`. Row i depends on its number alone, not on `places`."""
    features = torch.zeros(len(lengths), places, CAPTION_DIM, dtype=dtype)
    for i, length in enumerate(lengths):
        source = torch.Generator().manual_seed(seed + 100 * length)
        features[i, places - length :] = torch.randn(length, CAPTION_DIM, generator=source).to(dtype)
    return Prompt(features, torch.tensor([places - length for length in lengths]))


class Toy:
    """Attention and nothing else: a second model, unlike LlamaGen wherever the core leaves it a choice.

    Its prompt takes a slot a token, padding is counted out of its positions, its unconditional rows are one token long
    whatever the prompt, and its lines may end with a token of their own. Queries, keys and values are looked up.
    """

    def __init__(
        self, rows: int, cols: int, *, length: int, eol: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
    ):
        self.layers, self.heads, self.dim, self.codes, self.prompt_slots = 2, 2, 6, 11, length
        self.nothing, newline = self.codes, self.codes + 1
        self.grid = Grid(rows, cols, eol=newline if eol else None)
        self.dtype, self.device = dtype, torch.device("cpu")
        source = torch.Generator().manual_seed(seed)
        table = (3, self.layers, self.heads)
        self.by_token = torch.randn(*table, self.codes + 2, self.dim, generator=source).to(dtype)
        self.by_place = torch.randn(*table, 64 + self.grid.tokens, self.dim, generator=source).to(dtype)
        self.out = torch.randn(self.layers * self.heads * self.dim, self.codes, generator=source).to(dtype)

    def prompt(self, lengths: list[int]) -> Prompt:
        """Row i holds the ids length, length - 1, … behind its padding."""
        tokens = torch.zeros(len(lengths), self.prompt_slots, dtype=torch.int64)
        for row, length in zip(tokens, lengths, strict=True):
            row[self.prompt_slots - length :] = torch.arange(length, 0, -1)
        return Prompt(tokens, torch.tensor([self.prompt_slots - length for length in lengths]))

    def cache_shape(self, prompt: int = 0) -> CacheShape:
        return CacheShape(self.layers, self.heads, self.dim, self.prompt_slots, self.dtype.itemsize)

    def with_unconditional(self, prompt: Prompt) -> Prompt:
        nothing = torch.full_like(prompt.tokens, self.nothing)
        return prompt.stack(Prompt(nothing, torch.full_like(prompt.pad, prompt.length - 1)))

    def look_up(self, tokens: Tensor, index: Tensor, pad: Tensor) -> Tensor:
        """tokens B N at index N or B N -> queries, keys and values: 3 L B H N D."""
        place = (index - pad[:, None]).clamp(min=0)
        return (self.by_token[:, :, :, tokens] + self.by_place[:, :, :, place]).transpose(2, 3)

    def say(self, seen: Tensor) -> Tensor:
        """What attention returned, L B H N D, to logits B N V."""
        return (seen.permute(1, 3, 0, 2, 4).flatten(2) @ self.out).float()

    def prefill(self, prompt: Prompt, cache: LineCache) -> Tensor:
        index = torch.arange(prompt.length)
        weight = (index >= prompt.pad[:, None]).to(self.dtype)
        q, k, v = self.look_up(prompt.tokens, index, prompt.pad)
        bias = weight.log()[:, None].expand(-1, self.heads, -1)
        for layer in range(self.layers):
            cache.write_prompt(layer, k[layer], v[layer], weight)
        return self.say(torch.stack([attend(q[n, :, :, -1:], k[n], v[n], bias) for n in range(self.layers)]))[:, 0]

    def step(self, token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache) -> Tensor:
        q, k, v = self.look_up(token[:, None], index, pad)
        cache.advance(index, column)
        seen = []
        for layer in range(self.layers):
            cache.write(layer, column, k[layer], v[layer], q[layer])
            seen.append(attend(q[layer], *cache.read(layer)))
        return self.say(torch.stack(seen))[:, 0]

    def rotate_ahead(self, grid: Grid, queries: Tensor, lines: int, columns: int) -> Tensor:
        """Places are looked up and added, so there is nothing to turn; each line ahead asks a little louder."""
        return queries * (1 + lines / 16)

    def feed(
        self, tokens: Tensor, index: Tensor, pad: Tensor, columns: Tensor, cache: LineCache, all_logits: bool = False
    ) -> Tensor:
        q, k, v = self.look_up(tokens, index, pad)
        seen = [attend(q[n], *cache.feed(n, columns, k[n], v[n], q[n])) for n in range(self.layers)]
        cache.advance(index, columns)
        logits = self.say(torch.stack(seen))
        return logits if all_logits else logits[:, -1]

    def peek(
        self, tokens: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache
    ) -> tuple[Tensor, Window]:
        q, k, v = self.look_up(tokens, index[:, None] + torch.arange(tokens.shape[1]), pad)
        seen = [attend(q[n], *cache.peek(n, column, k[n], v[n])) for n in range(self.layers)]
        return self.say(torch.stack(seen)), (q, k, v)

    def forward(self, prompt: Prompt, tokens: Tensor, visible: Tensor) -> Tensor:
        """Logits B T+N V in one pass, without a cache and without the core's attention; as LlamaGen.forward."""
        tokens = torch.cat([prompt.tokens, tokens], 1)
        q, k, v = self.look_up(tokens, torch.arange(tokens.shape[1]), prompt.pad)
        scores = (q @ k.transpose(-1, -2) / self.dim**0.5).masked_fill(~visible, float("-inf"))
        return self.say(scores.softmax(-1) @ v)


Decoder = LlamaGen | Janus | Lumina | Toy


@dataclass
class Recorder:
    """A decoder that behaves like `decoder` and keeps a copy of everything that passes.

    `edit` may change the logits on their way out. `cache` is the cache of the run.
    """

    decoder: Decoder
    edit: Callable[[int, Tensor], Tensor] = lambda number, logits: logits
    given: int = 0  # image tokens of lines that are given
    logits: list[Tensor] = field(default_factory=list)  # B V of each image token; nan where nobody asked for them
    fed: list[Tensor] = field(default_factory=list)  # B, each token fed
    index: list[Tensor] = field(default_factory=list)  # L B H S after each token fed
    bias: list[Tensor] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    scores: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )  # number of image tokens -> scores and index, L B H S
    keep: dict[int, Tensor] = field(default_factory=dict)  # the same -> tokens that each head is to keep, L B H

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def prefill(self, prompt: Prompt, cache: LineCache) -> Tensor:
        self.prompt, self.cache = prompt, cache
        self.logits.append(self.edit(0, self.decoder.prefill(prompt, cache)))
        return self.logits[-1]

    def step(self, token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache) -> Tensor:
        logits = self.decoder.step(token, index, pad, column, cache)
        if int(index) - cache.grid.prompt < self.given:
            return logits
        self.fed.append(token.clone())
        self.index.append(cache.index.clone())
        self.bias.append(cache.bias.clone())
        self.logits.append(self.edit(len(self.fed), logits))
        return self.logits[-1]

    def feed(self, tokens: Tensor, index: Tensor, pad: Tensor, columns: Tensor, cache: LineCache) -> Tensor:
        """A line's last code and its end are written down as two steps; given lines are not."""
        before = cache.index.clone(), cache.bias.clone()
        logits = self.decoder.feed(tokens, index, pad, columns, cache)
        if int(columns[0]) == 0 or int(index[0]) - cache.grid.prompt < self.given:
            return logits
        for n in range(len(columns)):
            slot = cache.target[..., columns[: n + 1]]
            self.fed.append(tokens[:, n].clone())
            self.index.append(before[0].scatter(3, slot, index[: n + 1].int().expand_as(slot)))
            self.bias.append(before[1].scatter(3, slot, 0.0))
            self.logits.append(torch.full_like(logits, float("nan")))
        assert torch.equal(self.index[-1], cache.index) and torch.equal(self.bias[-1], cache.bias)
        self.logits[-1] = self.edit(len(self.fed), logits)
        return self.logits[-1]

    @property
    def prompt_slots(self) -> int:
        """Slots that the prompt takes in the cache."""
        return self.cache.shape.prompt

    @property
    def tokens(self) -> Tensor:
        """Codes drawn: B rows cols."""
        return torch.stack([line.tokens for line in self.lines], 1)

    def held(self, number: int) -> list[list[list[set[int]]]]:
        """Indices held after image token `number` was fed, as sets, by layer, row and head."""
        slots = self.index[number].tolist()
        return [[[{i for i in head if i >= 0} for head in row] for row in layer] for layer in slots]


@contextmanager
def policy(name: str, value: Policy) -> Iterator[None]:
    """Put a policy into the registry for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(POLICIES, name, value)
        yield


@contextmanager
def watched(name: str) -> Iterator[tuple[dict[int, tuple[Tensor, Tensor]], dict[int, Tensor]]]:
    """Write down what a policy says, by the number of image tokens so far: its scores and the index of the slots, and
    what each head is to keep.
    """
    original, scores, keeps = POLICIES[name], {}, {}

    def score(view: View) -> Tensor:
        given = original.score(view)
        told = given.float().clone(), view.index.clone()
        number = int(view.newest) + 1 - view.grid.prompt
        before = scores.get(number)
        assert view.layer == (0 if before is None else len(before[0])), "a policy is asked once, layer by layer"
        scores[number] = told if before is None else tuple(map(torch.cat, zip(before, told, strict=True)))
        return given

    def keep(view: View, scores: Tensor, plan: CachePlan) -> Tensor:
        told = original.keep(view, scores, plan)
        number = int(view.newest) + 1 - view.grid.prompt
        keeps[number] = torch.cat([*([keeps[number]] if number in keeps else []), told])
        return told

    with policy(name, replace(original, score=score, keep=original.keep and keep)):
        yield scores, keeps


def decode(
    decoder: Decoder,
    prompt: Prompt,
    plan: CachePlan,
    sample: SamplePlan,
    edit: Callable[[int, Tensor], Tensor] | None = None,
) -> Recorder:
    """Run the whole loop and return everything that happened, with the scores that the policy gave."""
    recorder = Recorder(decoder) if edit is None else Recorder(decoder, edit)
    with watched(plan.policy) as (recorder.scores, recorder.keep):
        recorder.lines.extend(generate(recorder, prompt, plan, sample))
    return recorder
