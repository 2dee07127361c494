"""Ours equals transformers' JanusForConditionalGeneration on small random weights, in float32.

Both sides read the same files: transformers' own `save_pretrained`, or the same weights under official names. Runs with
every transformers that has Janus, 4.57 and 5.23 among them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linear_core.checkpoints.library import ImageModel, ModelFiles, load_model
from linear_core.grid import Grid
from linear_core.loop.generate import Run, generate
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import Prompt, token_prompt
from linear_core.prompts.janus import BEGIN, IMAGE, PAD, ROLES
from tests.models.official_janus import randomise, text_tokenizer, to_official
from tests.tiny import decode

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "JanusForConditionalGeneration"):
    pytest.skip("this transformers has no Janus", allow_module_level=True)
DRAWS = tuple(map(int, transformers.__version__.split(".")[:2])) != (5, 4)  # its `generate` is broken there

TOLERANCE = 1e-4
SIDE, FACTOR, CODES, VOCABULARY = 3, 2, 40, 300
FULL = CachePlan("full")
BOS, PADDING, BOI = 257, 256, 262  # as tests.official_janus writes them


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    """Small, but for the VQ's narrowest level, whose channels decide how many share a norm; it has two levels."""
    config = transformers.JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": PADDING,
            "bos_token_id": BOS, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        },
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": FACTOR * SIDE,
            "patch_size": FACTOR, "projection_dim": 48, "num_image_tokens": SIDE * SIDE,
        },
        vq_config={
            "embed_dim": 8, "num_embeddings": CODES, "latent_channels": 64, "base_channels": 128,
            "channel_multiplier": [1, 2], "num_res_blocks": 1, "num_patches": SIDE, "projection_dim": 48,
            "image_token_embed_dim": 48, "num_hidden_layers": 2,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.JanusForConditionalGeneration(config).eval()
    return randomise(model, embedding=1.5)


@pytest.fixture(scope="module")
def folders(theirs: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The model as transformers saves it, in shards, and under official names, pickled in shards and not."""
    root = tmp_path_factory.mktemp("janus")
    theirs.save_pretrained(root / "converted", max_shard_size="16MB")
    shards = sorted((root / "converted").glob("*.safetensors"))
    assert len(shards) > 1
    config = json.loads((root / "converted" / "config.json").read_text())
    language = {key: config["text_config"][key] for key in ("num_attention_heads", "rms_norm_eps")}
    official = to_official({name: tensor for shard in shards for name, tensor in load_file(shard).items()})
    for name in ("official", "pickled"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({"language_config": language}))
    save_file(official, root / "official" / "model.safetensors")
    half = len(official) // 2
    parts = {"a.bin": dict(list(official.items())[:half]), "b.bin": dict(list(official.items())[half:])}
    for name, part in parts.items():
        torch.save(part, root / "pickled" / name)
    index = {key: name for name, part in parts.items() for key in part}
    (root / "pickled" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    yield {path.name: path for path in root.iterdir()}
    shutil.rmtree(root)


def load(folder: Path) -> ImageModel:
    """Ours, on the small grid."""
    model = load_model(ModelFiles(folder, folder))
    model.decoder.grid = Grid(SIDE, SIDE)
    return model


@pytest.fixture(scope="module")
def ours(folders: dict[str, Path]) -> ImageModel:
    return load(folders["converted"])


def prompts(lengths: list[int]) -> tuple[Prompt, Tensor, Tensor]:
    """Ours, and transformers' input_ids and attention_mask, of random texts."""
    source = torch.Generator().manual_seed(2)
    rows = [[BOS, *torch.randint(0, 256, (n - 2,), generator=source).tolist(), BOI] for n in lengths]
    away = [[row[0], *[PADDING] * (len(row) - 2), row[-1]] for row in rows]
    longest = max(lengths)
    ids = torch.tensor([[PADDING] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return token_prompt(rows, negative=token_prompt(away)), ids, mask


@torch.inference_mode()
def expected_logits(model: torch.nn.Module, ids: Tensor, mask: Tensor, fed: Tensor) -> Tensor:
    """Logits B N+1 V of transformers' networks in one pass over the prompt and the image tokens fed."""
    text = model.get_input_embeddings()(ids)
    image = model.prepare_embeddings_for_image_generation(fed)
    mask = torch.cat([mask, torch.ones_like(fed)], 1)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    embeds = torch.cat([text, image], 1)
    states = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=place)
    return model.model.generation_head(states.last_hidden_state[:, ids.shape[1] - 1 :])


@pytest.mark.parametrize("lengths", [[6], [9, 5, 9]], ids=["one", "unequal"])
def test_logits_at_prefill_and_every_step(lengths: list[int], theirs: torch.nn.Module, ours: ImageModel) -> None:
    """Both halves of every guided pair, with everything kept."""
    prompt, ids, mask = prompts(lengths)
    run = decode(ours.decoder, prompt, FULL, SamplePlan(seed=4, guidance=5.0))
    logits, fed = torch.stack(run.logits, 1), torch.stack(run.fed, 1)
    assert logits.shape[:2] == (2 * len(lengths), SIDE * SIDE)
    twins = torch.where((ids == BOS) | (ids == BOI), ids, PADDING)
    expected = expected_logits(theirs, torch.cat([ids, twins]), mask.repeat(2, 1), fed)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert expected.std() > 0.3, "large enough to tell them apart"


@pytest.mark.skipif(not DRAWS, reason=f"transformers {transformers.__version__} cannot draw with Janus")
@pytest.mark.parametrize("lengths", [[6], [9, 5]], ids=["one", "unequal"])
def test_greedy_codes_are_those_of_generate(lengths: list[int], theirs: torch.nn.Module, ours: ImageModel) -> None:
    prompt, ids, mask = prompts(lengths)
    theirs.generation_config.bos_token_id, theirs.generation_config.pad_token_id = BOS, PADDING
    theirs.generation_config.generation_kwargs = {"boi_token_id": BOI}
    expected = theirs.generate(
        input_ids=ids, attention_mask=mask, generation_mode="image", do_sample=False, guidance_scale=5
    )
    run = Run()
    for line in generate(ours.decoder, prompt, FULL, SamplePlan(guidance=5.0, temperature=0.0)):
        run.add(line)
    assert torch.equal(run.tokens.flatten(1), expected)
    assert len(expected.unique()) > SIDE, "the comparison is of more than one code"


@torch.inference_mode()
def test_the_vq_decoder_is_the_same(theirs: torch.nn.Module, ours: ImageModel) -> None:
    codes = torch.randint(0, CODES, (2, SIDE, SIDE), generator=torch.Generator().manual_seed(3))
    expected = theirs.decode_image_tokens(codes.flatten(1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours.tokenizer.decode(codes), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert expected.std() > 0.1


@torch.inference_mode()
def test_the_vq_encoder_is_the_same(theirs: torch.nn.Module, ours: ImageModel) -> None:
    """Features are compared: which entry is nearest transformers decides without the norm that both decoders use."""
    pictures = torch.rand(2, 3, FACTOR * SIDE, FACTOR * SIDE, generator=torch.Generator().manual_seed(4)) * 2 - 1
    vq = theirs.model.vqmodel
    expected = torch.nn.functional.normalize(vq.quant_conv(vq.encoder(pictures)).permute(0, 2, 3, 1), dim=-1)
    torch.testing.assert_close(ours.tokenizer.features(pictures), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("layout", ["official", "pickled"])
def test_every_layout_is_the_same_model(layout: str, folders: dict[str, Path], ours: ImageModel) -> None:
    other = load(folders[layout])
    assert other.info.config == ours.info.config
    for network in ("decoder", "tokenizer"):
        mine, same = (getattr(model, network).state_dict() for model in (ours, other))
        assert mine.keys() == same.keys()
        for name, weight in mine.items():
            assert torch.equal(weight, same[name]), name


def test_the_prompt_is_what_the_processor_writes(tmp_path: Path) -> None:
    """transformers' tokenizer and chat format, from the same tokenizer.json; special tokens wherever they may lie."""
    from linear_core.prompts.janus import janus_prompt
    from linear_core.prompts.tokenizer import TextTokenizer

    text_tokenizer(tmp_path / "tokenizer.json", first=17)
    words = TextTokenizer(tmp_path / "tokenizer.json")
    reader = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=BEGIN)
    prompt = janus_prompt(words, ["  a red fox\n in snow ", "ein K\u00e4fer"])
    chats = [f"{ROLES[0]}: a red fox\n in snow\n\n{ROLES[1]}:", f"{ROLES[0]}: ein K\u00e4fer\n\n{ROLES[1]}:"]
    for row, chat in enumerate(chats):
        expected = reader.encode(BEGIN + chat + IMAGE, add_special_tokens=False)
        assert prompt.tokens[row, prompt.pad[row] :].tolist() == expected
        twin = prompt.negative.tokens[row, prompt.negative.pad[row] :].tolist()
        pad = reader.convert_tokens_to_ids(PAD)
        assert twin == [expected[0], *[pad] * (len(expected) - 2), expected[-1]] and pad > 255 + 17
    away = janus_prompt(words, ["a fox", "a cat"], "rain").negative
    expected = reader.encode(f"{BEGIN}{ROLES[0]}: rain\n\n{ROLES[1]}:{IMAGE}", add_special_tokens=False)
    assert away.tokens.tolist() == [expected] * 2
