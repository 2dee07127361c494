"""Matrices in 8 and 4 bits: every product against the converted matrix, loading against rounding, and whole models."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.shapes import SHAPES
from linear_core.checkpoints.library import ModelFiles, bundled_files, decoder_bytes, load_model, read_info, stored_in
from linear_core.errors import UserError
from linear_core.loop.forced import forced_lines
from linear_core.loop.generate import generate
from linear_core.loop.memory import STREAMED_ROOM, streamed_bytes, streamed_seconds
from linear_core.loop.scales import forced_scales
from linear_core.models import packed, quantised
from linear_core.models.quantised import (
    FEW,
    INT4,
    INT8,
    LAYOUTS,
    PLAIN,
    PackedInt8,
    Quantisation,
    QuantisedLinear,
    chosen,
    dequantise,
    packs,
    quantise,
    quantise_model,
    works,
)
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import class_prompt
from tests.tiny import cut_down, llamagen, var

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
devices = pytest.mark.parametrize("device", ["cpu", GPU])
# A CPU that has the instructions must pass, so that a wrong product is not taken for a missing one.
HAS_INTEGERS = getattr(torch.cpu, "_is_vnni_supported", bool)() or packs()
needs_packing = pytest.mark.skipif(not HAS_INTEGERS, reason="this CPU has no product of 8-bit integers")


def layer(kind: Quantisation, device: str = "cpu", outputs: int = 192, inputs: int = 320) -> QuantisedLinear:
    """A filled layer with a bias, whose rows have very different sizes."""
    source = torch.Generator().manual_seed(3)
    made = QuantisedLinear(inputs, outputs, True, kind)
    numbers = torch.randn(outputs, inputs, generator=source) * torch.linspace(0.01, 2, outputs)[:, None]
    made.fill(slice(0, 64), numbers[:64])
    made.fill(slice(64, outputs), numbers[64:])
    made.bias.data = torch.randn(outputs, generator=source)
    return made.to(device)


def rows(count: int, device: str = "cpu", dtype: torch.dtype = torch.float32, inputs: int = 320) -> Tensor:
    source = torch.Generator().manual_seed(count)
    return (torch.randn(count, inputs, generator=source) * torch.logspace(-2, 2, count)[:, None]).to(device, dtype)


# -- rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [INT8, INT4, Quantisation(4, 128)])
def test_rounding_is_to_the_nearest_number_there_is(kind):
    """Half a step off at most, but for the ends, which may be half a bfloat16 of the range further."""
    numbers = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    numbers[3], numbers[4, :128], numbers[5, :64] = 0.0, 0.25, 0.0
    stored, scale = quantise(numbers, kind)
    found = dequantise(stored, scale, torch.float32)
    step = scale.float()[:, None] if kind.bits == 8 else scale[..., 0].t().repeat_interleave(kind.group, 1).float()
    ends = (127 if kind.bits == 8 else 15) * step / 256
    assert ((found - numbers).abs() <= step / 2 + ends + 1e-6).all()
    assert not found[3].any() and stored.nbytes == numbers.numel() * kind.bits // 8
    assert stored.nbytes + scale.nbytes == kind.bytes(48, 256)
    assert torch.equal(quantise(found, INT8)[0], stored) or kind.bits == 4, "what is on the grid stays"


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def kitchen(monkeypatch):
    """comfy-kitchen, or, where it is not installed, its one function that is used, as its docstring tells."""

    def gemv_awq_w4a16(x, qweight, wscales, wzeros, bias=None, group_size=64):
        assert bias is None and qweight.dtype == torch.int8 and wscales.is_contiguous() and wzeros.is_contiguous()
        numbers = torch.stack([qweight & 15, qweight >> 4 & 15], -1).flatten(1)
        scale, zero = (each.t().float().repeat_interleave(group_size, 1) for each in (wscales, wzeros))
        return (x.float() @ ((numbers - 8) * scale + zero).t()).to(wscales.dtype)

    if find_spec("comfy_kitchen") is None:
        monkeypatch.setitem(sys.modules, "comfy_kitchen", SimpleNamespace(gemv_awq_w4a16=gemv_awq_w4a16))
    works.cache_clear()
    yield
    works.cache_clear()


@devices
@pytest.mark.usefixtures("kitchen")
@pytest.mark.parametrize("kind", [INT8, INT4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_product_is_that_with_the_converted_matrix(kind, dtype, device):
    """For one row, for a few, and for more than the products take."""
    plain = layer(kind, device)
    matrix = dequantise(plain.weight, plain.scale, torch.float32)
    names = [PLAIN] + [n for n in LAYOUTS if n.startswith(f"int{kind.bits}") and works(n, device)]
    own = {*names} - {PLAIN, "int4, kitchen"}
    assert own, f"no product of {kind.bits} bits works on {device}, so nothing is faster than before"
    assert kind.bits == 8 or "int4, kitchen" in names
    for name in names:
        made = deepcopy(plain)
        made.layout, made.weight.data = name, LAYOUTS[name].pack(made.weight.data)
        assert torch.equal(LAYOUTS[name].unpack(made.weight.data), plain.weight.data), "lost in the layout"
        for count in (1, 3, FEW, FEW + 1):
            x = rows(count, device, dtype)
            expected, found = x.float() @ matrix.t() + plain.bias, made(torch.cat([x, x], -1)[None, :, : x.shape[1]])[0]
            assert found.dtype == dtype
            off = (found.float() - expected).norm(dim=1) / expected.norm(dim=1)
            assert off.max() < 0.008, (name, count)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_integers_multiply_as_exactly_as_numbers(dtype):
    """oneDNN's product sees 16 bits of each row, none of what rounding to 8 would cost; rows see only themselves."""
    made = layer(INT8)
    x, matrix = rows(5, dtype=dtype), dequantise(made.weight, made.scale, torch.float32)
    x[2] = 0
    found, expected = PackedInt8(made)(x), x.float() @ matrix.t() + made.bias
    off = (found.float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert off.max() < {torch.float32: 6e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    assert torch.equal(found[2], made.bias.to(dtype))
    for row in range(5):
        assert torch.equal(PackedInt8(made)(x[row : row + 1]), found[row : row + 1])


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_norm_is_the_norm(dtype):
    """Of vectors whose mean is not 0, some of them small beside eps."""
    norm = nn.RMSNorm(24, eps=1e-3).to(dtype)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    x = (rows(3, inputs=24) * torch.tensor([1, 1e-2, 1e2])[:, None] + 0.3).to(dtype)
    expected, model = norm(x), nn.Sequential(norm)
    packed.pack(model)
    assert type(model[0]) is packed.PackedNorm
    torch.testing.assert_close(model(x), expected)


@needs_packing
def test_matrices_that_read_the_same_are_one():
    """A packed feed-forward block computes what its layers compute; all five linears of a layer are counted."""
    model = quantise_model(llamagen(2, 2), stored_in(INT8))
    block, x = model.layers[0].feed_forward, rows(3, inputs=24)
    expected = PackedInt8(block.w2)(nn.functional.silu(PackedInt8(block.w1)(x)) * PackedInt8(block.w3)(x))
    assert packed.pack(model) == 5 * 2 + 1 and type(model.layers[0].feed_forward) is packed.PackedFeedForward
    torch.testing.assert_close(model.layers[0].feed_forward(x), expected)


@pytest.fixture(scope="module")
def interpreted():
    """Our kernel in Triton's interpreter, which Triton has to find when it is imported."""
    if find_spec("triton") is None or "triton" in sys.modules:
        pytest.skip("Triton is not installed, or something has imported it to compile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from linear_core.models.quantised_kernel import multiply

        yield multiply


@pytest.mark.parametrize("count", [1, 2, 16])
def test_the_kernel_in_tritons_interpreter(count, interpreted):
    """Sizes that end within a block of channels, too."""
    made = layer(INT8, outputs=200, inputs=320)
    x = rows(count)
    expected = x @ dequantise(made.weight, made.scale, x.dtype).t()
    torch.testing.assert_close(interpreted(x, made.weight, made.scale), expected, rtol=1e-4, atol=1e-3)


def test_a_product_that_is_missing_or_wrong_is_passed_over(monkeypatch):
    """The layer then converts its matrix, and computes the same."""
    made, x = layer(INT4), rows(2)
    expected = made(x)
    for broken in (lambda *_: 1 / 0, lambda x, matrix, scale: x @ torch.ones(x.shape[1], len(matrix))):
        works.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(LAYOUTS, "int4 on CPU", replace(LAYOUTS["int4 on CPU"], product=broken))
            again = deepcopy(made)
            again.arrange(torch.device("cpu"))
        assert again.layout == PLAIN and torch.equal(again(x), expected)
    works.cache_clear()
    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", lambda *_: 1 / 0)
    packs.cache_clear()
    model = nn.Sequential(layer(INT8))
    packed.pack(model)
    assert type(model[0]) is QuantisedLinear
    packs.cache_clear()


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Janus in shards of both kinds, whose queries, keys and values are separate matrices."""
    from tests.models import official_janus  # which needs more than a GPU's machine may have

    made = {}
    for suffix in (".bin", ".safetensors"):
        made[suffix] = tmp_path_factory.mktemp("janus") / "Janus"
        official_janus.write(made[suffix], suffix=suffix)
    return made


@pytest.mark.parametrize(("name", "suffix"), [("int8", ".bin"), ("int4", ".safetensors")])
def test_a_file_is_quantised_while_it_is_read(name, suffix, folders, monkeypatch):
    """As if all of it had been read and then quantised; never more than a matrix of the file in full at a time."""
    seen = []
    fill = QuantisedLinear.fill
    monkeypatch.setattr(QuantisedLinear, "fill", lambda self, rows, x: (seen.append(x.numel()), fill(self, rows, x))[1])
    files = ModelFiles(folders[suffix], folders[suffix])
    found = load_model(files, dtype=torch.bfloat16, weight_dtype=name)
    whole = quantise_model(load_model(files).decoder, stored_in(quantised.QUANTISATIONS[name]))
    theirs = dict(whole.named_parameters())
    layers = [m for m in found.decoder.modules() if isinstance(m, QuantisedLinear)]
    assert len(layers) == 5 * found.info.config.layers + 2, "all of the layers and of the head"
    assert max(seen) == max(layer.in_features * layer.out_features for layer in layers) < sum(seen) / 2
    for key, ours in found.decoder.named_parameters():
        assert torch.equal(ours, theirs[key].to(ours.dtype)), key
    size = sum(p.nbytes for p in found.decoder.parameters())
    assert size == decoder_bytes(found.info, torch.bfloat16, name) < decoder_bytes(found.info, torch.bfloat16)


def test_what_cannot_be_divided_is_kept_in_8_bits(tmp_path):
    assert chosen(INT4, 768, 250) == chosen(INT4, 100, 256) == INT8 and chosen(INT4, 768, 256) == INT4
    model = quantise_model(llamagen(3, 3), stored_in(INT4))
    few = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    assert {m.kind for m in few} == {INT8} and {m.layout for m in few} == {PLAIN}, (
        "PyTorch's product reads past the end"
    )
    wide = layer(INT8)
    wide.arrange(torch.device("cpu"))
    assert wide.layout == "int8"
    with pytest.raises(UserError, match="weight-dtype: 'int3' is unknown; choose int8 or int4"):
        load_model(bundled_files(), weight_dtype="int3")


def test_a_matrix_is_packed_where_it_lies_a_few_rows_at_a_time(monkeypatch):
    """As all at once; and a second copy would stay in the heap."""
    whole, parts = layer(INT4, outputs=320), layer(INT4, outputs=320)
    whole.arrange(torch.device("cpu"))
    monkeypatch.setattr("linear_core.models.quantised.ROUNDED", 130 * parts.in_features)
    place = parts.weight.data_ptr()
    parts.arrange(torch.device("cpu"))
    assert torch.equal(parts.weight, whole.weight)
    assert parts.layout == PLAIN or parts.weight.data_ptr() == place


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("of_rows", [True, False])
def test_files_that_comfyui_quantised(kind, of_rows, tmp_path):
    """8 bits with a scale beside them, for every row or for all: the numbers that they stand for."""
    path = cut_down(tmp_path / "plain.safetensors")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        notes, plain = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    kept, numbers = {}, {}
    for key, tensor in plain.items():
        kept[key], x = tensor, tensor.float()
        if key.startswith("layers.") and "norm" not in key:
            most = x.abs().amax(1, True) if of_rows else x.abs().max()
            scale = most / (127 if kind == torch.int8 else 448)
            kept[key] = ((x / scale).round() if kind == torch.int8 else x / scale).to(kind)
            kept[f"{key}_scale"] = scale
            note = json.dumps({"format": "int8_tensorwise" if kind == torch.int8 else "float8_e4m3fn"})
            kept[key.replace("weight", "comfy_quant")] = torch.tensor(list(note.encode()), dtype=torch.uint8)
            numbers[key] = kept[key].float() * scale
    save_file(kept, tmp_path / "kept.safetensors", notes)
    files = ModelFiles(tmp_path / "kept.safetensors", bundled_files().tokenizer)
    found = load_model(files).decoder.state_dict()
    assert len(numbers) == 5 and read_info(files.decoder).config == read_info(path).config
    for key, tensor in numbers.items():
        assert torch.equal(found[key], tensor)
    rotated = torch.tensor(list(b'{"format": "int8_tensorwise", "convrot": true}'), dtype=torch.uint8)
    save_file(kept | {"layers.0.attention.wo.comfy_quant": rotated}, files.decoder, notes)
    with pytest.raises(UserError, match=r"kept.safetensors: 'layers.0.attention.wo.weight' is rotated"):
        load_model(files)


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_bundled_model_hardly_notices_8_bits(name):
    """Kullback-Leibler divergence of its next tokens, nats; and what is packed for a CPU computes the same."""
    source = torch.Generator().manual_seed(0)
    codes, prompt = torch.randint(1024, (2, 24, 24), generator=source)[:, :6], class_prompt([1, 5])
    whole = load_model(bundled_files()).decoder
    whole.grid = replace(whole.grid, rows=6)
    few = deepcopy(whole)
    quantise_model(few, stored_in(quantised.QUANTISATIONS[name]))

    def logits(decoder):
        return torch.cat(list(forced_lines(decoder, prompt, codes, CachePlan("full"))), 1).log_softmax(-1)

    full = logits(whole)
    for _ in range(1 + bool(packed.available())):
        kl = (full.exp() * (full - logits(few))).sum(-1).mean()
        assert 0 < kl < {"int8": 0.002, "int4": 0.2}[name]
        packed.pack(few)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_same_seed_draws_the_same(name):
    """Twice, and alone as in a batch, with matrices packed as on the command line."""
    model = quantise_model(llamagen(4, 4), stored_in(quantised.QUANTISATIONS[name]))
    packed.pack(model)
    both, sample = class_prompt([1, 3]), SamplePlan(seed=5, guidance=2.0)

    def codes(prompt, sample):
        return torch.cat([line.tokens for line in generate(model, prompt, CachePlan("fold", 2, 1, 0), sample)], 1)

    first = codes(both, sample)
    assert torch.equal(first, codes(both, sample))
    assert torch.equal(first[1:], codes(both.select(range(1, 2)), replace(sample, seed=6)))


def test_models_that_draw_in_scales():
    """A pass of many tokens converts each matrix; the logits move by what rounding moves them, not more."""
    decoder, quantizer = var(1, 2, 4, 5)
    few, rounded = (quantise_model(deepcopy(decoder), stored_in(INT8)) for _ in range(2))
    layers = [(name, m) for name, m in rounded.named_modules() if isinstance(m, QuantisedLinear)]
    assert len(layers) == 4 * 2
    for name, made in layers:
        linear = nn.Linear(made.in_features, made.out_features, made.bias is not None)
        linear.weight.data, linear.bias = dequantise(made.weight, made.scale, torch.float32), made.bias
        rounded.set_submodule(name, linear)
    codes = torch.arange(1 + 4 + 16 + 25)[None] % 23
    seen = [
        list(forced_scales(model, quantizer, class_prompt([1]), codes, CachePlan("full")))
        for model in (decoder, few, rounded)
    ]
    for full, found, expected in zip(*seen, strict=True):
        assert (found - expected).abs().max() < 0.05 and not torch.equal(full, found)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_half_the_bytes():
    """LlamaGen-XL in bfloat16: 0.53 with 8 bits, embeddings included; 0.30 with 4."""
    shape = SHAPES["LlamaGen-XL"]
    with torch.device("meta"):
        tensors = shape.network(shape.config, shape.grid).state_dict()
    full = sum(2 * t.numel() for t in tensors.values())
    for kind, most in ((INT8, 0.52), (INT4, 0.31)):
        owns = [(t, stored_in(kind)(n, t)) for n, t in tensors.items()]
        size = sum(chosen(own, *t.shape).bytes(*t.shape) if own else 2 * t.numel() for t, own in owns)
        assert size < most * full


def test_streaming_is_shared_by_a_batch():
    """Nothing where all fits; else what has no room, for every pass; nobody where not even the run has."""
    gib = 2**30
    assert streamed_bytes(6 * gib, 11 * gib, 5 * gib) == 0
    assert streamed_bytes(12 * gib, 11 * gib, 5 * gib) == 12 * gib - (6 * gib - STREAMED_ROOM)
    assert streamed_bytes(12 * gib, 11 * gib, 11 * gib) is None
    assert streamed_seconds(10**9, 100, 1) == 32 * streamed_seconds(10**9, 100, 32) == 4.0


def test_the_command_line(capsys, tmp_path):
    """It draws with each; the plan counts what each takes, and says what a card too small would cost."""
    from linear_core.__main__ import main

    told = ["generate", str(cut_down(tmp_path / "small.safetensors", grid=3)), "--class", "ocean dusk"]
    told += ["--tokenizer", str(bundled_files().tokenizer)]
    for name in ("int8", "int4"):
        out = tmp_path / f"{name}.png"
        assert main([*told, "--weight-dtype", name, "--out", str(out)]) == 0
        assert f'"weight_dtype": "{name}"'.encode() in out.read_bytes()
    capsys.readouterr()
    assert main(["plan", "--card", "8"]) == 0
    told = capsys.readouterr().out
    assert "matrices in int8" in told and "in int4" in told and "32 at once: nothing is streamed" in told
    assert main(["plan", "--card", "0"]) == 2 and "card: 0 GB is out of range" in capsys.readouterr().err
