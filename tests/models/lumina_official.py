"""Small random checkpoints laid out and named as Lumina-mGPT 1.0 and 2.0 published their own, and Chameleon its VQ.

The vocabulary has the published names. With all 8192 codes its ids are the published ones too, up to the end of what a
picture needs; behind that come letters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.lumina_reference import vq_weights

CODES = 8192
FIRST_2, CODES_2, EOL_2 = 155000, 16384, 151670  # of 2.0: code 0, codes, and the token that ends a line
DIM = 128  # numbers a head


def code_name(code: int) -> str:
    """Digits written as letters, between IMGIMG and Z."""
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def vocabulary(codes: int = CODES, first: int = 4) -> dict[str, int]:
    """Ids by name; `first` is the id of code 0."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", *(f"<more{n}>" for n in range(first - 4))]
    reserved = range(codes + 2, max(codes + 2, 8799) + 66) if codes == CODES else [8706, *range(8799, 8865)]
    names = [*specials, *map(code_name, range(codes)), "<eoss>", "<racm3:break>"]
    names += [f"<reserved{n:05d}>" for n in reserved]
    names += [_visible(byte) for byte in range(256)]
    return {name: number for number, name in enumerate(names)}


def vocabulary_2(eol: int = EOL_2) -> dict[str, int]:
    """Of 2.0, whose codes have no names: what its prompts need, around the token that ends a line, and letters."""
    names = {"<|endoftext|>": eol - 27, "<|im_end|>": eol - 25, "<racm3:break>": eol - 5, "<eoss>": eol - 4}
    sizes = {f"<reserved{8800 + n:05d}>": eol + n for n in range(1, 65)}
    letters = {_visible(byte): byte for byte in range(256)}
    return letters | names | {"<reserved08706>": eol - 3, "<reserved08799>": eol} | sizes


def _visible(byte: int) -> str:
    """The letter that byte-level tokenizers write for a byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in plain:
        return chr(byte)
    letter = chr(256 + [b for b in range(256) if b not in plain].index(byte))
    assert letter in ByteLevel.alphabet()
    return letter


def tokenizer(path: Path, ids: dict[str, int]) -> None:
    """A tokenizer.json with these ids: a token for every byte, and the named ones whole."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE(vocab=ids, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(n, normalized=False) for n in ids if n.startswith("<") and n != "<"])
    made.save(str(path))


def decoder(
    ids: dict[str, int], layers: int = 2, heads: int = 2, hidden: int = 96, dim: int = DIM, norm_rows: int = 1
) -> dict[str, Tensor]:
    """State dict in the published layout; `norm_rows` 1 as published, `heads` as transformers keeps it.

    Weights are large enough that attention is peaky, so that a token more or less in view is felt.
    """
    width, words = heads * dim, max(ids.values()) + 1
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int, deviation: float) -> Tensor:
        return torch.randn(*shape, generator=source) * deviation

    weights = {"model.embed_tokens.weight": draw(words, width, deviation=1.0)}
    for n in range(layers):
        at = f"model.layers.{n}"
        for part in "qkvo":
            weights[f"{at}.self_attn.{part}_proj.weight"] = draw(width, width, deviation=1.5 * width**-0.5)
        for part in "qk":
            norm = 1 + draw(1, dim, deviation=0.3), draw(1, dim, deviation=0.3)
            for name, tensor in zip(("weight", "bias"), norm, strict=True):
                weights[f"{at}.self_attn.{part}_norm.{name}"] = tensor.repeat(norm_rows, 1)
        weights[f"{at}.mlp.gate_proj.weight"] = draw(hidden, width, deviation=width**-0.5)
        weights[f"{at}.mlp.up_proj.weight"] = draw(hidden, width, deviation=width**-0.5)
        weights[f"{at}.mlp.down_proj.weight"] = draw(width, hidden, deviation=hidden**-0.5)
        for part in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{part}.weight"] = 1 + draw(width, deviation=0.1)
    weights["model.norm.weight"] = 1 + draw(width, deviation=0.1)
    weights["lm_head.weight"] = draw(words, width, deviation=2 * width**-0.5)
    return weights


def meta(weights: dict[str, Tensor], heads: int = 2) -> dict[str, Tensor]:
    """The same model in Meta's layout (Anole's consolidated.pth): what RoPE turns together lies side by side."""
    renamed = {
        "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "self_attn.q_norm": "attention.q_normalization",
        "self_attn.k_norm": "attention.k_normalization", "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    found = {}
    for key, tensor in weights.items():
        if "q_proj" in key or "k_proj" in key:
            tensor = torch.cat([_side_by_side(head) for head in tensor.chunk(heads)])
        elif "q_norm" in key or "k_norm" in key:
            tensor = _side_by_side(tensor[0])
        for theirs, ours in renamed.items():
            key = key.replace(theirs, ours)
        found[key] = tensor
    return found | {"rope.freqs": torch.zeros(4)}


def _side_by_side(head: Tensor) -> Tensor:
    """Rows 0 … D/2 and D/2 … D of one head, in turns."""
    return torch.stack(head.chunk(2), 1).flatten(0, 1)


def write_model(folder: Path, weights: dict[str, Tensor], ids: dict[str, int], *, words: bool = True) -> Path:
    """A model's folder: two shards with their index, config.json and, as only one repository has it, the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    half = len(weights) // 2
    where = {key: names[n >= half] for n, key in enumerate(weights)}
    for name in names:
        save_file({k: v.contiguous() for k, v in weights.items() if where[k] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {
        "architectures": ["ChameleonXLLMXForConditionalGeneration"], "model_type": "chameleon", "vocabulary_map": ids,
        "model_parallel_size": 1, "swin_norm": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-05,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    if words:
        tokenizer(folder / "tokenizer.json", ids)
    return folder


def write_tokenizer_2(folder: Path, ids: dict[str, int], **settings: object) -> None:
    """The text tokenizer of 2.0, with the file that says which token begins a text."""
    tokenizer(folder / "tokenizer.json", ids)
    said = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def write_2(models: Path) -> None:
    """Lumina-mGPT 2.0 with its real vocabulary and its VQ tokenizer, both with few channels: about 50 MB."""
    from tests.tokenizers import reference

    folder, ids = models / "ar_image", vocabulary_2()
    last = FIRST_2 + CODES_2 - 1
    weights = {k: t.bfloat16() for k, t in decoder({"last": last}, layers=1, heads=1, dim=64).items()}
    path = write_model(folder / "Lumina-mGPT-2.0", weights, ids, words=False)
    write_tokenizer_2(path, ids)
    vq = dict(reference.weights("movq", (16, 16, 16, 16)))
    vq["quantize.embedding.weight"] = torch.randn(CODES_2, 4, generator=torch.Generator().manual_seed(0))
    torch.save(vq, folder / "movqgan_270M.ckpt")


def write(models: Path) -> None:
    """What a graph needs below ComfyUI's models folder, in bf16 to be smaller: about 20 MB.

    Two decoders of one layer with the published vocabulary, of which one brings the tokenizer, and a VQ with all its
    levels and codes, but fewer channels.
    """
    folder, ids = models / "ar_image", vocabulary()
    weights = {name: tensor.bfloat16() for name, tensor in decoder(ids, layers=1, heads=1).items()}
    write_model(folder / "Lumina-mGPT-7B-768", weights, ids)
    write_model(folder / "Lumina-mGPT-7B-1024", weights, ids, words=False)
    vq = vq_weights((16, 16, 32, 32, 64), blocks=2, codes=CODES, code_dim=32, z=32)
    torch.save({"state_dict": {name: tensor.bfloat16() for name, tensor in vq.items()}}, folder / "vqgan.ckpt")


def chameleon(weights: dict[str, Tensor], ids: dict[str, int], *, words: int, heads: int) -> Any:
    """transformers' Chameleon with these weights: norms are kept once a head there, and image tokens may be drawn."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    unused = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "resolution": 16}
    width = weights["model.norm.weight"].shape[0]
    config = ChameleonConfig(
        vocab_size=words, hidden_size=width, intermediate_size=96, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads, rms_norm_eps=1e-5, vocabulary_map={**ids, "<image>": 1},
        vq_config={**unused, "embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "attn_type": "none"},
    )  # fmt: skip
    network = ChameleonForConditionalGeneration(config).eval()
    each = {k: v.repeat(heads, 1) if "q_norm" in k or "k_norm" in k else v for k, v in weights.items()}
    left, unknown = network.load_state_dict(each, strict=False)
    assert unknown == [] and all(".vqmodel." in name for name in left)
    network.model.vocabulary_mapping.__dict__["image_tokens"] = []  # which it forbids to draw
    return network
