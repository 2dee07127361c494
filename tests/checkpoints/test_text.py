"""Texts to prompts, with a small random T5 laid out as FLAN-T5 is published and as ComfyUI keeps text encoders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from linear_core.__main__ import main
from linear_core.checkpoints import text
from linear_core.errors import UserError
from linear_core.grid import Grid
from linear_core.prompts import Origin, class_prompt
from linear_core.prompts.caption import clean
from linear_core.prompts.t5 import LENGTH
from tests.models import official
from tests.tiny import caption_prompt, llamagen

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

DIM = 48
TEXTS = ["A red fox, in the snow!", "a  CASTLE on a hill &amp; a lake", "x " * 300]
PIECES = [
    "<pad>",
    "</s>",
    "<unk>",
    "\u2581",
    *"abcdefghijklmnopqrstuvwxyz,.!",
    "\u2581a",
    "\u2581the",
    "\u2581in",
    "fox",
]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    text.clear_features()
    yield
    text.clear_features()


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as google/flan-t5-xl: two shards and their index, the decoder in them, config and tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "flan-t5-tiny"
    config = transformers.T5Config(
        vocab_size=64, d_model=DIM, d_kv=8, d_ff=96, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    config.save_pretrained(folder)
    weights = {k: v.contiguous().clone() for k, v in model.state_dict().items() if "embed_tokens" not in k}
    names = sorted(weights)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, keys in shards.items():
        save_file({k: weights[k] for k in keys}, folder / shard)
    index = {"metadata": {}, "weight_map": {k: shard for shard, keys in shards.items() for k in keys}}
    (folder / text.INDEX).write_text(json.dumps(index))
    unigram = tokenizers.models.Unigram([(piece, -float(i)) for i, piece in enumerate(PIECES)], unk_id=2)
    tokenizer = tokenizers.Tokenizer(unigram)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.enable_truncation(7)  # a file may ask for what is not wanted here
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def encoder_weights(folder: Path) -> dict[str, Tensor]:
    return {k: v for shard in folder.glob("*.safetensors") for k, v in load_file(shard).items()}


def as_upstream(folder: Path, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Features and mask that the published sampler hands to `generate`, by transformers' own loader.

    Right-padded and encoded; then each row is turned until its words are last, the mask reversed and multiplied in.
    """
    model = transformers.T5EncoderModel.from_pretrained(
        folder, torch_dtype=torch.bfloat16, local_files_only=True
    ).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=0)
    rows, masks = [], []
    for written in texts:
        encoding = tokenizer.encode(clean(written))
        ids, mask = torch.tensor([encoding.ids]), torch.tensor([encoding.attention_mask])
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=mask)["last_hidden_state"][0]
        count = int(mask.sum())
        turned = torch.cat([states[count:], states[:count]])
        masks.append(mask[0].flip(0))
        rows.append(turned * masks[-1][:, None])
    return torch.stack(rows).float(), torch.stack(masks)


def test_features_and_padding_as_published(published: Path) -> None:
    prompt = text.prompt(TEXTS, text.find_text_encoder(published))
    features, mask = as_upstream(published, TEXTS)
    assert prompt.tokens.shape == (3, LENGTH, DIM) and prompt.names == tuple(TEXTS)
    assert torch.equal(prompt.tokens, features)
    assert torch.equal(prompt.pad, LENGTH - mask.sum(1))
    assert int(prompt.pad[2]) == 0 and len(set(prompt.pad.tolist())) == 3  # the last text is cut
    for row, pad in zip(mask, prompt.pad.tolist(), strict=True):
        assert not row[:pad].any() and row[pad:].all()


def test_infinity_reads_more_and_as_it_is_written(published: Path) -> None:
    """512 tokens, no cleaning, and a negative text of its own length; LlamaGen's features are kept apart."""
    reads = {"config": SimpleNamespace(caption_slots=512), "family": SimpleNamespace(cleaned=False)}
    meaning = ("features", "as written")
    model = SimpleNamespace(**reads, sizes=((336, 224),), grid=Grid(14, 21), name="mine", features=meaning)
    files, written = text.find_text_encoder(published), "a fox @home on a hill"
    prompt = text.prompt([written], files, negative="a hill", model=model)
    encoder, tokenizer = text.load_encoder(files)
    ids = tokenizer.ids(written, 512)
    with torch.no_grad():
        alone = encoder(input_ids=torch.tensor([ids])).last_hidden_state[0].float()
    assert prompt.tokens.shape == (1, 512, DIM) and int(prompt.pad) == 512 - len(ids) and prompt.grid == Grid(14, 21)
    torch.testing.assert_close(prompt.tokens[0, 512 - len(ids) :], alone, atol=0.05, rtol=0.05)
    assert prompt.negative.tokens.shape == (1, 512, DIM) and prompt.origin == Origin("mine", meaning)
    assert int(prompt.negative.pad) == 512 - len(tokenizer.ids("a hill"))
    assert ids != tokenizer.ids(clean(written)) and len(tokenizer.ids("fox " * 600, 512)) == 512
    assert text.prompt([written], files).tokens.shape == (1, LENGTH, DIM)


@pytest.mark.parametrize("prefix", ["", "text_encoder.", "text_encoders.t5xl.transformer."])
@pytest.mark.parametrize("table", ["shared.weight", "encoder.embed_tokens.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_encoder_file(prefix: str, table: str, dtype: torch.dtype, published: Path, tmp_path: Path) -> None:
    """An encoder alone, under ComfyUI's prefixes; in fp32 or already in bf16 it gives the same features."""
    weights = {k: v for k, v in encoder_weights(published).items() if k.startswith("encoder.")}
    weights[table] = encoder_weights(published)["shared.weight"]
    path = tmp_path / "flan.safetensors"
    save_file({prefix + k: v.to(dtype) for k, v in weights.items()} | {"logit_scale": torch.zeros(1)}, path)
    files = text.find_text_encoder(path, published / "tokenizer.json")
    assert text.is_text_encoder(path)
    assert torch.equal(text.prompt(TEXTS[:2], files).tokens, as_upstream(published, TEXTS[:2])[0])


def test_sentencepiece(published: Path, tmp_path: Path) -> None:
    """spiece.model in the folder, or inside the checkpoint as ComfyUI packs it: ids of the pieces, then the end."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "words.txt").write_text("a red fox in the snow\na castle on a hill by the lake\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=23, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,  # sentencepiece 0.2.0 finds 22 pieces
    )  # fmt: skip
    weights = encoder_weights(published)
    save_file(weights, tmp_path / "flan.safetensors")
    beside = text.find_text_encoder(tmp_path / "flan.safetensors")
    assert beside.tokenizer == tmp_path / "spiece.model"
    content = (tmp_path / "spiece.model").read_bytes()
    inside = tmp_path / "packed" / "flan.safetensors"
    inside.parent.mkdir()
    save_file(weights | {"spiece_model": torch.frombuffer(bytearray(content), dtype=torch.uint8)}, inside)
    packed = text.find_text_encoder(inside)
    assert packed.tokenizer is None
    for files in (beside, packed):
        _, tokenizer = text.load_encoder(files)
        expected = sentencepiece.SentencePieceProcessor(model_proto=content).encode("a red fox")
        assert tokenizer.ids("a red fox") == [*expected, 1] and len(expected) > 2
        assert len(tokenizer.ids("fox " * 500)) == LENGTH and tokenizer.ids("fox " * 500)[-1] == 1


def test_the_encoder_is_loaded_for_new_texts_only(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = text.find_text_encoder(published)
    loaded, steps = [], []

    def place(encoder: torch.nn.Module) -> str:
        assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
        loaded.append(True)
        return "cpu"

    first = text.prompt(["a fox", "a hill", "a fox"], files, place, lambda done, total: steps.append((done, total)))
    assert loaded == [True] and steps == [(1, 2), (2, 2)]
    assert torch.equal(first.tokens[0], first.tokens[2])
    again = text.prompt(["A hill", "a FOX"], files, place)  # the same once cleaned
    assert loaded == [True] and torch.equal(again.tokens, first.tokens[[1, 0]])
    text.prompt(["a lake", "a fox"], files, place)
    assert len(loaded) == 2
    monkeypatch.setattr(text, "MAX_CACHED", 1)
    text.prompt(["a tree", "a fox"], files, place)
    assert len(text._features) == 1
    (published / "tokenizer.json").touch()  # another tokenizer, for all we know
    text.prompt(["a fox"], files, place)
    assert len(loaded) == 4


def test_the_encoder_is_not_kept(published: Path) -> None:
    import gc
    import weakref

    kept: list[weakref.ref] = []
    text.prompt(
        ["a fox"], text.find_text_encoder(published), lambda encoder: kept.append(weakref.ref(encoder)) or "cpu"
    )
    gc.collect()
    assert kept[0]() is None


def refused(*words: str, run) -> None:
    with pytest.raises(UserError) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_what_is_missing_is_named(published: Path, tmp_path: Path) -> None:
    refused("flan-t5-xl", "huggingface.co/google", run=lambda: text.find_text_encoder(tmp_path / "flan-t5-xl"))
    folder = tmp_path / "half"
    folder.mkdir()
    refused(str(folder / "model.safetensors"), "no such file", run=lambda: text.find_text_encoder(folder))
    for name in ("config.json", text.INDEX, "model-00001-of-00002.safetensors"):
        (folder / name).write_bytes((published / name).read_bytes())
    missing = "model-00002-of-00002.safetensors"
    refused(str(folder / missing), f"resolve/{'7d6315df2c2fb742f0f5b556879d730926ca9001'}/{missing}",
            run=lambda: text.find_text_encoder(folder))  # fmt: skip
    (folder / missing).write_bytes((published / missing).read_bytes())
    refused(str(folder / "tokenizer.json"), "needs a tokenizer", run=lambda: text.find_text_encoder(folder))
    (folder / text.INDEX).write_text("{}")
    refused(text.INDEX, run=lambda: text.find_text_encoder(folder))


def test_what_is_wrong_is_named(published: Path, tmp_path: Path) -> None:
    weights = encoder_weights(published)
    tokenizer = published / "tokenizer.json"
    path = tmp_path / "some.safetensors"

    def load(change: dict[str, Tensor], drop: str = "-", tokenizer: Path = tokenizer) -> None:
        save_file({k: v for k, v in weights.items() if not k.endswith(drop)} | change, path)
        text.prompt(["a fox"], text.find_text_encoder(path, tokenizer))

    refused("some.safetensors", "final_layer_norm", run=lambda: load({}, "encoder.final_layer_norm.weight"))
    refused("some.safetensors", "shared.weight", run=lambda: load({}, "shared.weight"))
    odd = {"encoder.block.1.layer.0.SelfAttention.k.weight": torch.zeros(3, 3)}
    refused("SelfAttention.k", "[3, 3]", run=lambda: load(odd))
    scaled = {"encoder.block.1.layer.0.SelfAttention.k.scale_weight": torch.ones(1)}
    refused("some.safetensors", "8 bits", run=lambda: load(scaled))
    other = tmp_path / "tokenizer of another.json"
    other.write_text("{}")
    refused(other.name, "cannot be read as a tokenizer", run=lambda: load({}, tokenizer=other))
    short = {"shared.weight": weights["shared.weight"][:8].clone()}
    refused("belongs to another model", run=lambda: load(short))
    save_file({"x": torch.zeros(1)}, path)
    assert not text.is_text_encoder(path)
    refused("some.safetensors", "not a T5", run=lambda: text.prompt(["x"], text.find_text_encoder(path, tokenizer)))
    refused("empty", run=lambda: text.prompt([], text.find_text_encoder(published)))


def test_a_prompt_of_the_wrong_kind_is_refused(published: Path) -> None:
    """Features of another width, a class for a text and a text for a class are told apart before anything is drawn."""
    features = text.prompt(["a fox"], text.find_text_encoder(published))
    for_texts, for_classes = llamagen(3, 3, text=True), llamagen(3, 3)
    refused("Class Prompt", run=lambda: for_classes.with_unconditional(features))
    refused("Text Prompt", run=lambda: for_texts.with_unconditional(class_prompt([1])))
    refused("Text Prompt", run=lambda: for_texts.with_unconditional(features))  # more places than the model has
    refused("Class Prompt", run=lambda: for_classes.with_unconditional(class_prompt([77])))
    narrow = caption_prompt([2])
    narrow.tokens.resize_(1, narrow.length, 3)
    refused("3 features", "takes 6", run=lambda: for_texts.with_unconditional(narrow))


def test_it_draws(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From texts to pictures on the command line, with a decoder laid out as t2i that computes in bf16."""
    weights = official.decoder("t2i", layers=1, width=64, hidden=32, codes=16)
    weights["cls_embedding.uncond_embedding"] = torch.randn(LENGTH, DIM)
    weights["cls_embedding.cap_proj.fc1.weight"] = torch.randn(64, DIM)
    notes = {"grid": "4x4", "heads": "4", "tokenizer": "small_vq.safetensors"}
    save_file(weights, tmp_path / "small.safetensors", notes)
    save_file(
        {k: v.detach() for k, v in official.tokenizer(16, channels=16, codes=16).items()},
        tmp_path / "small_vq.safetensors",
    )
    out = tmp_path / "out.png"
    asked = ["generate", "--model", str(tmp_path / "small.safetensors"), "--dtype", "bfloat16", "--out", str(out)]
    assert main([*asked, "--budget", "2", "--recent", "1"]) == 2
    assert "--text-encoder" in capsys.readouterr().err
    asked += ["--text", "a fox", "--text", "a hill by the sea", "--text-encoder", str(published)]
    assert main([*asked, "--budget", "2", "--recent", "1"]) == 0
    notes = json.loads(Image.open(tmp_path / "out_02.png").text["linear"])
    assert notes["text"] == "a hill by the sea" and notes["guidance"] == 7.5 and notes["top_k"] == 1000
