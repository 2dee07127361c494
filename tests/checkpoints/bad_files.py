"""Bad checkpoints, made on purpose: every damage here to every kind of file that it can befall.

`CASES` has them all by name. A case is a layout (a small checkpoint as published, see LAYOUTS), one of its files, what
is done to that, and what the user is to be told. `make` writes it into a folder and says what is to be loaded.
"""

from __future__ import annotations

import argparse
import builtins
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from linear_core.checkpoints.library import ModelFiles, find_tokenizer, load_model
from linear_core.checkpoints.text import find_text_encoder, load_encoder
from linear_core.models.llamagen import HEADS
from linear_core.tokenizers.tokenizer import VQConfig, VQTokenizer
from tests.models import infinity_reference, lumina_official, lumina_reference, official, official_janus
from tests.models import llamagen_reference as llamagen

Damage = Callable[[Path], None]
CANARY = "the canary flew"  # the file that appears where something was run
CODES = 64
NOTES = {"heads": str(llamagen.HEADS), "grid": "6x6", "tokenizer": "vq_ds16_c2i.safetensors"}
WORDS = official_janus.WORDS


# -- good files --------------------------------------------------------------------------------------------------------


def small(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().bfloat16().contiguous() for name, tensor in weights.items()}


def decoder(text: bool = False) -> dict[str, Tensor]:
    """A LlamaGen, of as many codes as the small tokenizers have."""
    weights = llamagen.t2i_weights() if text else llamagen.c2i_weights()
    return weights | {k: weights[k][:CODES].clone() for k in ("tok_embeddings.weight", "output.weight")}


def vq() -> dict[str, Tensor]:
    """Two levels of one block, without an encoder."""
    return small(official._random(VQTokenizer(VQConfig(CODES, 8, 32, (32, 16), 1, True))))


def write_llamagen(folder: Path, name: str, weights: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
    if name.endswith(".pt"):
        torch.save({"model": weights}, folder / name)
    else:
        save_file(weights, folder / name, notes)
    kind = "t2i" if "t2i" in name else "c2i"
    torch.save({"model": vq()}, folder / f"vq_ds16_{kind}.pt")


def write_janus(folder: Path, suffix: str) -> None:
    sizes = official_janus.config(layers=1, codes=CODES)
    weights = small(official_janus.official(official_janus.decoder(sizes), vq()))
    model, names, stem = folder / "Janus-Pro-1B", sorted(weights), "pytorch_model" if suffix == ".bin" else "model"
    model.mkdir()
    index = {}
    for n in (0, 1):
        file = f"{stem}-0000{n + 1}-of-00002{suffix}"
        part = {name: weights[name].clone() for name in names[n::2]}
        index |= dict.fromkeys(part, file)
        torch.save(part, model / file) if suffix == ".bin" else save_file(part, model / file, {"format": "pt"})
    (model / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (model / "config.json").write_text(json.dumps(official_janus.settings(sizes)))
    official_janus.text_tokenizer(model / "tokenizer.json")


def write_converted_janus(folder: Path) -> None:
    """transformers' conversion, in one file."""
    sizes = official_janus.config(layers=1, codes=CODES)
    weights = {}
    for name, tensor in small(official_janus.official(official_janus.decoder(sizes), vq())).items():
        for before, theirs in (
            ("language_model.model.", "model.language_model."), ("gen_embed.", "model.generation_embeddings."),
            ("gen_aligner.layers.0.", "model.generation_aligner.fc1."), (".res.", ".block."),
            ("gen_aligner.layers.2.", "model.generation_aligner.hidden_layers.0."),
            ("gen_head.output_mlp_projector.", "model.generation_head.proj_out."),
            ("gen_head.vision_head.", "model.generation_head.vision_head."), ("gen_vision_model.", "model.vqmodel."),
            (".mid.0.", ".mid.block_1."), (".mid.1.", ".mid.attn_1."), (".mid.2.", ".mid.block_2."),
            ("decoder.conv_blocks.", "decoder.up."), ("encoder.conv_blocks.", "encoder.down."),
        ):  # fmt: skip
            name = name.replace(before, theirs)
        weights[name] = tensor.clone()
    model = folder / "Janus-Pro-1B"
    model.mkdir()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    settings = {"text_config": {"num_attention_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}}
    (model / "config.json").write_text(json.dumps(settings))
    official_janus.text_tokenizer(model / "tokenizer.json")


def write_chameleon_vq(folder: Path, codes: int = CODES) -> None:
    weights = lumina_reference.vq_weights((16,) * 5, codes=codes)
    torch.save({"state_dict": small(weights)}, folder / "vqgan.ckpt")


def write_lumina(folder: Path) -> None:
    ids = lumina_official.vocabulary(CODES)
    weights = small(lumina_official.decoder(ids, layers=1, dim=16))
    lumina_official.write_model(folder / "Lumina-mGPT-7B-768", weights, ids)
    write_chameleon_vq(folder)


def write_anole(folder: Path) -> None:
    """In Meta's layout, whose vocabulary cannot be told: all 8192 codes."""
    ids = lumina_official.vocabulary()
    model = folder / "Anole-7b-v0.1"
    model.mkdir()
    weights = lumina_official.decoder(ids, layers=1, dim=16)
    torch.save(small(lumina_official.meta(weights)), model / "consolidated.pth")
    write_chameleon_vq(model, lumina_official.CODES)


def write_t5(folder: Path) -> None:
    model = folder / "flan-t5-xl"
    model.mkdir()
    weights = small(official.text_encoder(width=16, vocabulary=300))
    first = {k: v for k, v in weights.items() if "layer.0" in k}
    files = {"model-00001-of-00002.safetensors": first}
    files["model-00002-of-00002.safetensors"] = {k: v for k, v in weights.items() if k not in first}
    for name, part in files.items():
        save_file(part, model / name)
    index = {key: name for name, part in files.items() for key in part}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    official_janus.text_tokenizer(model / "tokenizer.json")


def write_infinity(folder: Path) -> None:
    """A folder of shards without a config.json, and a VAE nested in what training saves with it."""
    weights, shards = small(infinity_reference.weights("lying")), folder / "infinity_8b_weights"
    shards.mkdir()
    index = {}
    for n in (1, 2):
        part = {name: weights[name] for name in sorted(weights)[n - 1 :: 2]}
        save_file(part, shards / f"model-0000{n}-of-00002.safetensors")
        index |= dict.fromkeys(part, f"model-0000{n}-of-00002.safetensors")
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    torch.save({"vae": infinity_reference.vae_weights("lying"), "step": 1}, folder / "infinity_vae_d12.pth")


def load_from(path: Path) -> None:
    """As the command line and the nodes do it; a model's own tokenizer reads a text."""
    model = load_model(ModelFiles(path, find_tokenizer(path)))
    if model.info.own_tokenizer and "Anole" not in str(path):
        model.prompt(["a fox"])


def load_text_encoder(path: Path) -> None:
    _, tokenizer = load_encoder(find_text_encoder(path))
    tokenizer.ids("a fox")


@dataclass(frozen=True)
class Layout:
    """A checkpoint as published.

    write  it into a folder
    model  what of that is loaded, and how
    files  of it that hold weights, each with a weight that the model cannot do without
    """

    write: Callable[[Path], None]
    model: str
    files: dict[str, str]
    load: Callable[[Path], None] = load_from


JANUS, LUMINA, T5 = "Janus-Pro-1B", "Lumina-mGPT-7B-768", "flan-t5-xl"
INFINITY = "infinity_8b_weights"
JANUS_KEY = "language_model.model.layers.0.mlp.up_proj.weight"
VQ_KEY = "decoder.conv_blocks.0.res.0.conv1.bias"
LAYOUTS = {
    "llamagen": Layout(
        lambda folder: write_llamagen(folder, "mine.safetensors", decoder(), NOTES), "mine.safetensors",
        {"mine.safetensors": "layers.1.feed_forward.w2.weight"},
    ),
    "llamagen pt": Layout(
        lambda folder: write_llamagen(folder, "c2i_S_256.pt", decoder()), "c2i_S_256.pt",
        {"c2i_S_256.pt": "layers.1.feed_forward.w2.weight", "vq_ds16_c2i.pt": VQ_KEY},
    ),
    "llamagen t2i": Layout(
        lambda folder: write_llamagen(folder, "t2i_S_256.pt", decoder(text=True)), "t2i_S_256.pt",
        {"t2i_S_256.pt": "cls_embedding.cap_proj.fc2.weight"},
    ),
    "janus bin": Layout(
        lambda folder: write_janus(folder, ".bin"), JANUS,
        {f"{JANUS}/pytorch_model-00001-of-00002.bin": JANUS_KEY},
    ),
    "janus safetensors": Layout(
        lambda folder: write_janus(folder, ".safetensors"), JANUS,
        {f"{JANUS}/model-00001-of-00002.safetensors": JANUS_KEY},
    ),
    "janus converted": Layout(
        write_converted_janus, JANUS, {f"{JANUS}/model.safetensors": "model.vqmodel.decoder.mid.attn_1.q.weight"},
    ),
    "lumina": Layout(
        write_lumina, LUMINA,
        {f"{LUMINA}/model-00001-of-00002.safetensors": "model.layers.0.self_attn.o_proj.weight",
         "vqgan.ckpt": "decoder.up.0.block.0.conv1.bias"},
    ),
    "anole": Layout(
        write_anole, "Anole-7b-v0.1/consolidated.pth",
        {"Anole-7b-v0.1/consolidated.pth": "layers.0.feed_forward.w2.weight"},
    ),
    "infinity": Layout(
        write_infinity, INFINITY,
        {f"{INFINITY}/model-00001-of-00002.safetensors": "block_chunks.0.module.0.sa.mat_qkv.weight"},
    ),
    "t5": Layout(
        write_t5, T5, {f"{T5}/model-00001-of-00002.safetensors": "encoder.block.0.layer.0.SelfAttention.k.weight"},
        load_text_encoder,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`damage` done to the `file` of a layout.

    reason  that the message has to give, as a pattern
    told    the name that it has to give; as a pattern
    """

    layout: str
    file: str
    what: str
    damage: Damage
    reason: str
    told: str

    @property
    def name(self) -> str:
        return f"{self.layout} / {Path(self.file).name}: {self.what}"


# -- damage to the bytes -----------------------------------------------------------------------------------------------

ZIP = r"not a checkpoint that can be read safely"
SAFETENSORS = r"not a complete safetensors file"


def replace(path: Path, content: bytes) -> None:
    """Files are links to the good ones: never written into."""
    path.unlink()
    path.write_bytes(content)


def rewritten(change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: replace(path, change(path.read_bytes()))


def cut(share: float) -> Damage:
    return rewritten(lambda content: content[: int(len(content) * share)])


def noise(content: bytes) -> bytes:
    return random.Random(0).randbytes(min(len(content), 2**16))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent.parent.parent / "elsewhere" / path.name)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4180000000\n"
MISSING = r"there is no such file"
BYTES: list[tuple[str, Damage, str]] = [
    ("gone", Path.unlink, MISSING),
    ("a folder", a_folder, MISSING),
    ("a link to itself", a_loop, MISSING),
    ("a link to nothing", a_dangling_link, MISSING),
    ("empty", rewritten(lambda content: b""), f"{ZIP}|{SAFETENSORS}"),
    *(
        (f"cut to {length} bytes", rewritten(lambda c, n=length: c[:n]), f"{ZIP}|{SAFETENSORS}")
        for length in (1, 4, 7, 8, 9, 100)
    ),
    *((f"cut to {share:.0%}", cut(share), f"{ZIP}|{SAFETENSORS}") for share in (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)),
    ("cut by a byte", rewritten(lambda c: c[:-1]), f"{ZIP}|{SAFETENSORS}"),
    ("another beginning", rewritten(lambda c: bytes(b ^ 0xFF for b in c[:8]) + c[8:]), f"{ZIP}|{SAFETENSORS}"),
    ("without its beginning", rewritten(lambda c: c[4:]), f"{ZIP}|{SAFETENSORS}"),
    ("noise", rewritten(noise), f"{ZIP}|{SAFETENSORS}"),
    ("zeros", rewritten(lambda c: bytes(len(c))), f"{ZIP}|{SAFETENSORS}"),
    ("a web page", rewritten(lambda c: b"<!DOCTYPE html><html>404</html>" * 50), f"{ZIP}|{SAFETENSORS}"),
    ("a pointer of git-lfs", rewritten(lambda c: LFS), f"{ZIP}|{SAFETENSORS}"),
]  # fmt: skip

# -- damage to a safetensors header ------------------------------------------------------------------------------------

Header = dict[str, Any]


def header(change: Callable[[Header], object]) -> Damage:
    """`change` edits the header, or returns what takes its place: an object, text or bytes."""

    def damage(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        found = json.loads(content[8 : 8 + length])
        new = change(found)
        new = found if new is None else new
        text = new if isinstance(new, bytes) else (new if isinstance(new, str) else json.dumps(new)).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return rewritten(damage)


def of_length(length: int) -> Damage:
    return rewritten(lambda content: struct.pack("<Q", length) + content[8:])


def first(found: Header, **change: object) -> None:
    found[next(key for key in found if key != "__metadata__")] |= change


def each(found: Header, **change: object) -> None:
    for key in found.keys() - {"__metadata__"}:
        found[key] |= change


def twice(found: Header) -> str:
    """The first weight again, with the bytes of the second."""
    a, b = [key for key in found if key != "__metadata__"][:2]
    return json.dumps(found)[:-1] + f", {json.dumps(a)}: {json.dumps(found[b])}}}"


def longer(found: Header) -> None:
    """One weight says that it is a terabyte."""
    first(found, shape=[2**20, 2**20], data_offsets=[0, 2**41])


def nine_mebibytes(found: Header) -> None:
    found["__metadata__"] = {"format": "x" * (9 * 2**20)}


HEADERS: list[tuple[str, Damage, str]] = [
    ("header of 2^63 bytes", of_length(2**63), SAFETENSORS),
    ("header of -1 bytes", of_length(2**64 - 1), SAFETENSORS),
    ("header of a terabyte", of_length(2**40), SAFETENSORS),
    ("header of no bytes", of_length(0), SAFETENSORS),
    ("header of one byte", of_length(1), SAFETENSORS),
    ("header of 9 MiB", header(nine_mebibytes), "its header takes 9 MiB"),
    ("header is no JSON", header(lambda h: "{not JSON" + " " * 200), SAFETENSORS),
    ("header is no UTF-8", header(lambda h: b'{"\xff\xfe": 1}'), SAFETENSORS),
    ("header is a list", header(lambda h: [h]), SAFETENSORS),
    ("header is null", header(lambda h: "null"), SAFETENSORS),
    ("header is empty", header(lambda h: {}), f"{SAFETENSORS}|not an image decoder|not a T5"),
    ("header nested without an end", header(lambda h: "[" * 200_000), SAFETENSORS),
    ("header nested within a weight", header(lambda h: '{"a":' * 100_000), SAFETENSORS),
    ("a weight named twice", header(twice), SAFETENSORS),
    ("offsets overlap", header(lambda h: first(h, data_offsets=[4, 8])), SAFETENSORS),
    ("offsets run backwards", header(lambda h: first(h, data_offsets=[8, 0])), SAFETENSORS),
    ("offsets beyond the file", header(lambda h: first(h, data_offsets=[0, 2**50])), SAFETENSORS),
    ("offsets below zero", header(lambda h: first(h, data_offsets=[-8, 8])), SAFETENSORS),
    ("offsets are missing", header(lambda h: first(h, data_offsets=None)), SAFETENSORS),
    ("shape runs over", header(lambda h: first(h, shape=[2**62, 2**62])), SAFETENSORS),
    ("shape of a terabyte", header(longer), SAFETENSORS),
    ("shape below zero", header(lambda h: first(h, shape=[-1, 4])), SAFETENSORS),
    ("shape of texts", header(lambda h: first(h, shape=["4"])), SAFETENSORS),
    ("shape of fractions", header(lambda h: first(h, shape=[1.5])), SAFETENSORS),
    ("shape of nothing, endless", header(lambda h: first(h, shape=[0, 2**63])), SAFETENSORS),
    ("numbers of an unknown kind", header(lambda h: first(h, dtype="F7")), SAFETENSORS),
    ("numbers of a kind not read", header(lambda h: each(h, dtype="U16")), f"uint16 where|{SAFETENSORS}"),
    ("numbers of a larger kind", header(lambda h: first(h, dtype="F64")), SAFETENSORS),
    ("notes are no texts", header(lambda h: h.update(__metadata__={"a": {"b": 1}})), SAFETENSORS),
    ("a weight is a text", header(lambda h: h.update(more="weight")), SAFETENSORS),
]  # fmt: skip

# -- damage to the weights ---------------------------------------------------------------------------------------------

Weights = dict[str, Tensor]


def read(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def write(path: Path, content: Any) -> None:
    if path.suffix == ".safetensors":
        notes = NOTES if path.name == "mine.safetensors" else None
        try:
            replace(path, save({name: tensor.contiguous() for name, tensor in content.items()}, notes))
        except KeyError as error:  # before 0.7 it has no complex numbers
            pytest.skip(f"this safetensors does not write {error}")
    else:
        path.unlink()
        torch.save(content, path)


def weights(key: str, change: Callable[[Weights, str], object]) -> Damage:
    """`change` edits the state dict, wherever it is nested, at `key`."""

    def damage(path: Path) -> None:
        content = read(path)
        nest = next((content[name] for name in ("model", "state_dict") if name in content), content)
        change(nest, key)
        write(path, content)

    return damage


def spoiled(number: float) -> Callable[[Weights, str], None]:
    def change(found: Weights, key: str) -> None:
        found[key] = found[key].clone()
        found[key].view(-1)[-1] = number

    return change


def changed(how: Callable[[Tensor], Tensor]) -> Callable[[Weights, str], None]:
    return lambda found, key: found.__setitem__(key, how(found[key]))


KNOWN = "weights this model does not have"
SHAPE = r"expected|do not describe|do not fit|wrong shape for a T5|an impossible size"
KIND = r"where floating-point numbers were expected"
FINITE = r"holds NaN or infinity"
WEIGHTS: list[tuple[str, Callable[[Weights, str], object], str]] = [
    ("a weight is missing", lambda w, key: w.pop(key), r"lacks"),
    (
        "no weight is there",
        lambda w, key: w.clear(),
        r"not a|no named weights|is not an image|lacks|do not|does not describe",
    ),
    ("a row too many", changed(lambda t: torch.cat([t, t[:1]])), SHAPE),
    ("a row too few", changed(lambda t: t[1:]), SHAPE),
    ("a dimension more", changed(lambda t: t[None]), SHAPE),
    ("a single number", changed(lambda t: torch.tensor(1.0)), SHAPE),
    ("a weight of no rows", changed(lambda t: t[:0]), SHAPE),
    ("NaN", spoiled(float("nan")), FINITE),
    ("infinity", spoiled(float("inf")), FINITE),
    ("minus infinity", spoiled(float("-inf")), FINITE),
    ("whole numbers", changed(lambda t: t.to(torch.int8)), KIND),
    ("bits", changed(lambda t: t > 0), KIND),
    ("complex numbers", changed(lambda t: t.to(torch.complex64)), KIND),
]
UNKNOWN = {  # beside a layout's weights, where nobody put them: half a model more
    "llamagen": "layers.1.attention.extra.weight", "llamagen pt": "layers.1.attention.extra.weight",
    "llamagen t2i": "cls_embedding.extra", "janus bin": "language_model.model.layers.0.extra.weight",
    "janus safetensors": "gen_vision_model.decoder.extra.weight",
    "janus converted": "model.language_model.extra.weight",
    "lumina": "model.layers.0.extra.weight",
}  # fmt: skip

# -- pickles -----------------------------------------------------------------------------------------------------------


class Runs:
    """What a pickle has in place of weights: a call that leaves the canary."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def pickled(path: Path, content: bytes, packed: int = zipfile.ZIP_STORED) -> None:
    """The same archive with another list of weights."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    path.unlink()
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, record in records.items():
            archive.writestr(name, content if name.endswith("/data.pkl") else record)


def runs(function: Callable[..., object], *arguments: object, protocol: int = 2) -> Damage:
    """The state dict's place is taken by a call; {} in its arguments is the canary's path."""

    def damage(path: Path) -> None:
        canary = str(canary_of(path))
        given = [a.format(canary) if isinstance(a, str) else Path(canary) if a is Path else a for a in arguments]
        pickled(path, pickle.dumps({"model": {"x": Runs(function, *given)}}, protocol))

    return damage


def canary_of(path: Path) -> Path:
    """Beside the models' folder, wherever in that a file is."""
    return next(parent for parent in path.parents if (parent / ".models").exists()) / CANARY


def raw(path: Path) -> None:
    """A bare pickle, as torch.save wrote long ago."""
    replace(path, pickle.dumps({"model": Runs(os.system, f"touch '{canary_of(path)}'")}))


def legacy(path: Path) -> None:
    content = read(path)
    path.unlink()
    torch.save(content, path, _use_new_zipfile_serialization=False)


def instead(content: object) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        torch.save(content, path)

    return damage


def sparse(path: Path) -> None:
    """Made here, as tests of memory ask every tensor there is for its storage, which this one lacks."""
    instead({"model": {"x": torch.zeros(4, 4).to_sparse()}})(path)


def bomb(path: Path) -> None:
    """64 MiB of blanks in a few kilobytes, where the list of weights was."""
    pickled(path, pickle.dumps({"x": " " * 2**26}, 2), zipfile.ZIP_DEFLATED)


def packed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        pickled(path, archive.read(name), zipfile.ZIP_DEFLATED)


def says(offset: int, number: int) -> Damage:
    """Every record of the archive's directory says another number; sizes are at 20 and 24, places at 42."""

    def change(content: bytes) -> bytes:
        at = [found.start() for found in re.finditer(b"PK\x01\x02", content)]
        changed = bytearray(content)
        for start in at:
            changed[start + offset : start + offset + 4] = struct.pack("<I", number)
        return bytes(changed)

    return rewritten(change)


def both_sizes(path: Path) -> None:
    says(20, 0x7FFFFFFF)(path)
    says(24, 0x7FFFFFFF)(path)


def two_lists(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    stream = io.BytesIO(content)
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr("another/data.pkl", pickle.dumps(Runs(os.system, f"touch '{canary_of(path)}'"), 2))
    path.write_bytes(stream.getvalue())


def long_list(path: Path) -> None:
    pickled(path, pickle.dumps({"x": "y" * (5 * 2**20)}, 2))


def endless(path: Path) -> None:
    """One number under a shape of a terabyte."""
    content = read(path)
    nest = next((content[name] for name in ("model", "state_dict") if name in content), content)
    nest["more"] = torch.zeros(1).expand(2**38)
    write(path, content)


def unlisted(path: Path) -> None:
    """Meta tensors: a shape, and no numbers."""
    content = read(path)
    nest = next((content[name] for name in ("model", "state_dict") if name in content), content)
    nest |= {key: tensor.to("meta") for key, tensor in nest.items()}
    write(path, content)


def layers(path: Path) -> None:
    """Many layers, of which one is there. Not so many that it hurts, should one day somebody build them."""
    content = read(path)
    nest = next((content[name] for name in ("model", "state_dict") if name in content), content)
    for key in list(nest):
        if "layers.0." in key:
            nest[key.replace("layers.0.", "layers.999.")] = nest[key]
    write(path, content)


TOUCH = "import pathlib; pathlib.Path('{}').touch()"
NOT_RUN = r"which weights do not need and is not run"
PICKLES: list[tuple[str, Damage, str]] = [
    ("runs a command", runs(os.system, "touch '{}'"), NOT_RUN),
    ("opens a process", runs(subprocess.Popen, ["touch", "canary"]), NOT_RUN),
    ("evaluates", runs(eval, "__import__('os').system('touch {}')"), NOT_RUN),
    ("executes", runs(exec, TOUCH), NOT_RUN),
    ("imports", runs(builtins.__import__, "antigravity"), NOT_RUN),
    ("gets an attribute", runs(getattr, "", "format"), NOT_RUN),
    ("opens a file", runs(open, "{}", "w"), NOT_RUN),
    ("touches a file", runs(Path.touch, Path), NOT_RUN),
    ("removes a folder", runs(shutil.rmtree, "{}"), NOT_RUN),
    ("loads code from the hub", runs(torch.hub.load, "a/b", "c"), NOT_RUN),
    ("loads another file", runs(torch.load, "{}"), NOT_RUN),
    ("takes memory", runs(bytearray, 2**28), NOT_RUN),
    ("makes a tensor", runs(torch.Tensor, 2**28), NOT_RUN),
    ("has a tensor made", runs(torch._tensor._rebuild_from_type_v2, torch.Tensor, torch.Tensor, (2**28,), {}), NOT_RUN),
    ("encodes", runs(__import__("_codecs").encode, "x" * 1000, "punycode"), NOT_RUN),
    ("runs a command, newer pickle", runs(os.system, "touch '{}'", protocol=4), ZIP),
    ("runs a command, oldest pickle", runs(os.system, "touch '{}'", protocol=0), f"{NOT_RUN}|{ZIP}"),
    ("holds a pickle in a pickle", runs(pickle.loads, b"cos\nsystem\n(S'touch canary'\ntR."), NOT_RUN),
    ("a bare pickle", raw, "was not written by torch.save"),
    ("of an old torch", legacy, "was not written by torch.save"),
    ("a list", instead([torch.zeros(1)]), "no named weights"),
    ("a text", instead("weights"), "no named weights"),
    ("a tensor", instead(torch.zeros(3)), "no named weights"),
    ("arguments alone", instead({"args": argparse.Namespace(a=1), "steps": 3}), "no named weights"),
    ("a bomb", bomb, "compressed"),
    ("compressed", packed, "compressed"),
    ("records larger than the file", both_sizes, "more than its size|damaged"),
    ("records elsewhere", says(42, 0x7FFFFFF0), "damaged|incomplete"),
    ("two lists of weights", two_lists, "does not hold exactly one list"),
    ("a list of 5 MiB", long_list, "list of weights takes 5 MiB"),
    ("a terabyte of one number", endless, "claims to hold"),
    ("shapes without numbers", unlisted, NOT_RUN),
    ("a thousand layers", layers, "names a layer|claims to hold|does not have"),
    ("sparse", sparse, f"{NOT_RUN}|is not"),
]  # fmt: skip

# -- configs, indexes, tokenizers, notes -------------------------------------------------------------------------------


def setting(*path: str, to: object) -> Damage:
    """The value at `path` of a JSON file."""

    def damage(file: Path) -> None:
        content = json.loads(file.read_text())
        place = content
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = to
        replace(file, json.dumps(content).encode())

    return damage


def text(content: str | bytes) -> Damage:
    return rewritten(lambda _: content.encode() if isinstance(content, str) else content)


NUMBERS = {
    "zero": 0, "negative": -1, "1e30": 1e30, "10^400": 10**400, "a text": "many", "a list": [1], "an object": {"a": 1},
    "NaN": float("nan"), "infinity": float("inf"), "true": True,
}  # fmt: skip
JSONS: list[tuple[str, Damage]] = [
    ("empty", text("")),
    ("no JSON", text("{config")),
    ("no UTF-8", text(b'{"a": "\xff\xfe\xfa"}')),
    ("a list", text("[1, 2]")),
    ("a list of pairs", text("[[1, 2]]")),
    ("a number", text("7")),
    ("null", text("null")),
    ("nested without an end", text("[" * 500_000)),
    ("nested objects", text('{"a":' * 500_000)),
    ("17 MiB", text('{"a": "' + "x" * 17 * 2**20 + '"}')),
    ("5000 digits", text('{"a": ' + "9" * 5000 + ", }")),
    ("cut", cut(0.5)),
]
NAMES = {  # in an index: what is no file of the model
    "up": ("../../outside.safetensors", "leads out"), "up, as on Windows": ("..\\..\\outside.safetensors", "leads out"),
    "up, further in": ("below/../../outside.safetensors", "leads out"), "absolute": ("/etc/passwd", "leads out"),
    "a drive": ("C:\\models\\x.safetensors", "leads out"), "a drive's own": ("C:x.safetensors", "leads out"),
    "a server": ("\\\\server\\share\\x.safetensors", "leads out"), "a root": ("\\x.safetensors", "leads out"),
    "missing": ("model-00003-of-00002.safetensors", MISSING), "the config": ("config.json", "not a checkpoint|no such"),
    "a folder": (".", MISSING), "a device": ("NUL", f"{MISSING}|not a"), "home": ("~/x.safetensors", MISSING),
    "nothing": ("", "not a file name"), "null": (None, "not a file name"), "a number": (5, "not a file name"),
    "a list": (["x"], "not a file name"), "a zero": ("a\0b.safetensors", "not a file name"),
    "too long": ("x" * 5000, "too long"), "a line's end": ("a\nb.safetensors", MISSING),
    "half a letter": ("\ud800.safetensors", MISSING), "escapes": ("\x1b[31mred.safetensors", MISSING),
}  # fmt: skip
INDEXES = {
    "janus bin": f"{JANUS}/pytorch_model.bin.index.json",
    "janus safetensors": f"{JANUS}/model.safetensors.index.json",
    "lumina": f"{LUMINA}/model.safetensors.index.json",
    "t5": f"{T5}/model.safetensors.index.json",
}
CONFIGS = {"janus safetensors": f"{JANUS}/config.json", "lumina": f"{LUMINA}/config.json"}
MAPS = {"a list": [], "a text": "model", "null": None, "empty": {}}
TOKENIZERS = {
    "janus safetensors": f"{JANUS}/tokenizer.json", "lumina": f"{LUMINA}/tokenizer.json", "t5": f"{T5}/tokenizer.json",
}  # fmt: skip
WORDLESS: list[tuple[str, Damage]] = [
    ("empty", text("")),
    ("no JSON", text("{tokenizer")),
    ("no UTF-8", text(b'{"a": "\xff\xfe\xfa"}')),
    ("a list", text("[]")),
    ("an empty object", text("{}")),
    ("nested without an end", text("[" * 500_000)),
    ("cut", cut(0.5)),
    ("noise", rewritten(noise)),
    ("a model of no kind", setting("model", "type", to="Oracle")),
    ("ids that are texts", setting("model", "vocab", to={"a": "b"})),
    ("ids below zero", setting("model", "vocab", to={"a": -1})),
    ("merges of nothing", setting("model", "merges", to=[["no", "words"]])),
    ("a pattern that is none", setting("pre_tokenizer", to={"type": "Split", "pattern": {"Regex": "("},
     "behavior": "Isolated", "invert": False})),
]  # fmt: skip


def note(name: str, value: str) -> Damage:
    def change(found: Header) -> None:
        found["__metadata__"][name] = value

    return header(change)


MANY = json.dumps(["x"] * llamagen.CLASSES)
NOTED: dict[str, tuple[str, list[str]]] = {
    "heads": ("header does not describe|cannot be divided|an impossible size",
              ["-4", "3", "7", "64", "1000000000", "four", "", "1e30", "4.0", "9" * 5000]),
    "grid": ("metadata 'grid'",
             ["0x0", "-1x6", "6", "6x", "6x6x6", "99999x99999", "six", "1e3x1e3", "", "NaN", "6x6" * 2000]),
    "classes": ("metadata 'classes'|header does not describe",
                ["[]", "{}", "null", '"abc"', "[1, 2]", "x", "", "[" * 100_000, json.dumps(["x"] * 11), "NaN"]),
    "sampling": ("header does not describe|out of range|metadata 'sampling'|negative",
                 ["[]", "null", "x", "", "[" * 100_000, '{"seed": 1}', '{"guidance": "high"}', '{"guidance": NaN}',
                  '{"guidance": 1e400}', '{"temperature": -1}', '{"temperature": NaN}', '{"top_k": 2.5}',
                  '{"top_k": -1}', '{"top_p": 0}', '{"top_p": 2}', '{"top_p": null}', '{"__class__": 1}']),
    "rope": ("metadata 'rope'", ["", "3d", "2D"]),
    "tokenizer": ("leads out|not a file name|too long|no such file",
                  ["../../vq_ds16_c2i.pt", "/etc/passwd", "..\\vq.pt", "C:vq.pt", "", "x" * 5000, "a\0b", "gone.pt"]),
}  # fmt: skip
FOREIGN: dict[str, tuple[Weights, str]] = {
    "a diffusion model": ({"model.diffusion_model.input_blocks.0.weight": torch.zeros(4)}, "like a diffusion model"),
    "another diffusion model": ({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4)}, "like a diffusion model"),
    "a LoRA": ({"transformer.single.0.lora_A.weight": torch.zeros(4)}, "looks like a LoRA"),
    "a language model": ({"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}, "1 weights, the first is"),
    "a VQ tokenizer": (vq(), "like a VQ tokenizer"),
    "a text encoder": (official.text_encoder(width=16, vocabulary=30), "not an image decoder"),
    "a name without an end": ({"x" * 100_000: torch.zeros(1)}, "not an image decoder"),
    "a name of many lines": ({"a\nb\x1b[31m": torch.zeros(1)}, "not an image decoder"),
}  # fmt: skip


def in_both(path: Path) -> None:
    other = path.with_name(path.name.replace("00001", "00002"))
    write(path, read(path) | dict([next(iter(read(other).items()))]))


def two_names(path: Path) -> None:
    """The official one and the conversion's."""
    found = read(path)
    write(path, found | {"model.generation_aligner.fc1.weight": found["gen_aligner.layers.0.weight"].clone()})


def resized(keys: Sequence[str], how: Callable[[Tensor], Tensor]) -> Damage:
    """Several weights alike, so that what they say of the model's sizes agrees."""

    def change(found: Weights, _: str) -> None:
        for key in keys:
            found[key] = how(found[key])

    return weights("", change)


BODY = ("tok_embeddings.weight", "output.weight")
JANUS_WORDS = f"{JANUS}/model-00001-of-00002.safetensors"
CONV1 = "decoder.conv_blocks.0.res.0.conv1.weight"
VQ_FILE, TABLE = "vq_ds16_c2i.pt", "cls_embedding.embedding_table.weight"
CAPTIONS = "cls_embedding.uncond_embedding"
# Sizes that no model has, though all weights agree about them.
SIZES: list[tuple[str, str, str, Sequence[str], Callable[[Tensor], Tensor], str]] = [
    ("llamagen", "mine.safetensors", "no codes", BODY, lambda t: t[:0], "an impossible size: codes is 0"),
    ("llamagen", "mine.safetensors", "no classes", [TABLE], lambda t: t[:1], "an impossible size"),
    ("llamagen", "mine.safetensors", "fewer than no classes", [TABLE], lambda t: t[:0], "an impossible size"),
    ("llamagen t2i", "t2i_S_256.pt", "no captions", [CAPTIONS], lambda t: t[:0], "caption_slots"),
    ("llamagen pt", VQ_FILE, "no codes", ["quantize.embedding.weight"], lambda t: t[:0], "do not fit a VQ tokenizer"),
    ("llamagen pt", VQ_FILE, "codes of nothing", ["quantize.embedding.weight", "post_quant_conv.weight"],
     lambda t: t[:, :0], "do not fit a VQ tokenizer"),
    ("llamagen pt", VQ_FILE, "3 channels", [CONV1], lambda t: t[:3], "into groups"),
    ("llamagen pt", VQ_FILE, "30 channels", [CONV1], lambda t: t[:30], "into groups"),
    ("janus safetensors", JANUS_WORDS, "no words", ["language_model.model.embed_tokens.weight"], lambda t: t[:0],
     "an impossible size: vocabulary"),
]  # fmt: skip


def many_blocks(found: Weights, key: str) -> None:
    found[key.replace("block.0", "block.999")] = found[key].clone()


def foreign(content: Weights) -> Damage:
    return lambda path: write(path, content)


# -- all of it ---------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    for layout, about in LAYOUTS.items():
        top = re.escape(about.model.split("/")[0].split(".")[0])
        for file, key in about.files.items():
            own = re.escape(Path(file).name)
            for what, damage, reason in BYTES:
                # LlamaGen's and Chameleon's tokenizers are looked for under every ending
                told = own if file != "vqgan.ckpt" and not file.startswith("vq_") else re.escape(Path(file).stem)
                yield Case(layout, file, what, damage, reason, told)
            for what, change, reason in WEIGHTS:
                yield Case(layout, file, what, weights(key, change), reason, f"{own}|{top}")
            for what, damage, reason in HEADERS if file.endswith(".safetensors") else PICKLES:
                if damage is layers and "vq" in file:
                    continue  # it has none
                yield Case(layout, file, what, damage, reason, f"{own}|{top}")
            if layout in UNKNOWN and "vq" not in file:
                extra = weights(UNKNOWN[layout], lambda w, key: w.update({key: torch.ones(4)}))
                yield Case(layout, file, "a weight too many", extra, KNOWN, top)
    for layout, file in INDEXES.items():
        for what, damage in JSONS:
            yield Case(layout, file, what, damage, "does not list", re.escape(Path(file).name))
        for what, content in MAPS.items():
            yield Case(layout, file, f"lists {what}", setting("weight_map", to=content), "does not list", "index.json")
        for what, (name, reason) in NAMES.items():
            told = "json" if reason.startswith(("leads", "not the", "too")) else ""
            yield Case(layout, file, f"names {what}", setting("weight_map", "x", to=name), reason, told)
    for layout, file in CONFIGS.items():
        for what, damage in JSONS:
            yield Case(layout, file, what, damage, "is not a model's config", "config.json")
        place = ("language_config",) if "janus" in layout else ()
        for name in ("rms_norm_eps", "rope_theta", *(["num_attention_heads"] if place else [])):
            for what, value in NUMBERS.items():
                yield Case(layout, file, f"{name} is {what}", setting(*place, name, to=value), f"says {name}", "config")
    for what, value in {"a list": [1], "a text": "x", "a number": 5}.items():
        janus, lumina = CONFIGS.values()
        for layout, file, name in (
            ("janus safetensors", janus, "language_config"),
            ("lumina", lumina, "vocabulary_map"),
        ):
            yield Case(layout, file, f"{name} is {what}", setting(name, to=value), f"says {name}", "config")
    yield Case("janus safetensors", janus, "3 heads", setting("language_config", "num_attention_heads", to=3),
               "cannot be divided into 3 heads", JANUS)  # fmt: skip
    first_code, second = lumina_official.code_name(0), lumina_official.code_name(1)
    for what, name, value in (
        ("a text", first_code, "4"), ("negative", first_code, -4), ("a fraction", first_code, 4.5),
        ("out of order", second, 900), ("beyond the words", "<reserved08799>", 10**9), ("null", first_code, None),
    ):  # fmt: skip
        damage = setting("vocabulary_map", name, to=value)
        yield Case("lumina", lumina, f"an id is {what}", damage, "its vocabulary_map", LUMINA)
    for layout in ("janus bin", "janus safetensors"):
        file = next(iter(LAYOUTS[layout].files))
        yield Case(layout, file, "a weight in both files", in_both, "so does another file of the model", "of-00002")
        yield Case(layout, file, "a weight under two names", two_names, "twice, under two names", JANUS)
    for layout, file, what, keys, how, reason in SIZES:
        yield Case(layout, file, what, resized(keys, how), reason, f"{re.escape(file)}|{LAYOUTS[layout].model}")
    no_rows = weights("model.layers.0.self_attn.q_norm.weight", changed(lambda t: t[:0]))
    yield Case("lumina", f"{LUMINA}/model-00001-of-00002.safetensors", "a norm of no rows", no_rows, SHAPE, LUMINA)
    ((shard, key),) = LAYOUTS["t5"].files.items()
    yield Case("t5", shard, "a thousand blocks", weights(key, many_blocks), "wrong shape for a T5", T5)
    for layout, file in TOKENIZERS.items():
        for what, damage in WORDLESS:
            yield Case(layout, file, what, damage, "as a tokenizer|has no token|cannot encode", "tokenizer.json")
    for name, (reason, values) in NOTED.items():
        for value in values:
            what = f"{name} {value[:20]!r} of {len(value)}"
            yield Case("llamagen", "mine.safetensors", what, note(name, value), reason, "mine|vq|gone")
    for layout, file in (("llamagen", "mine.safetensors"), ("llamagen pt", "c2i_S_256.pt")):
        for what, (content, reason) in FOREIGN.items():
            yield Case(layout, file, what, foreign(content), reason, re.escape(file))


CASES = {case.name: case for case in cases()}


@contextmanager
def good(folder: Path) -> Iterator[dict[str, Path]]:
    """Every layout in a folder of its own, each loaded once. Meanwhile so narrow a LlamaGen passes for published."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(HEADS, llamagen.DIM, llamagen.HEADS)
        found = {name: folder / str(n) for n, name in enumerate(LAYOUTS)}
        for name, layout in LAYOUTS.items():
            found[name].mkdir()
            layout.write(found[name])
            layout.load(found[name] / layout.model)
        yield found


def make(case: Case, made: Path, folder: Path) -> Path:
    """The case in `folder`, from the good files in `made`. Returns what is to be loaded."""
    models = Path(shutil.copytree(made, folder / "models", copy_function=os.link))
    (folder / ".models").touch()
    case.damage(models / case.file)
    return models / LAYOUTS[case.layout].model
