"""The part of Janus that looks at pictures equals transformers', on small random weights, from both layouts of files.

What is asked is written out here as its authors' chat has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linear_core.checkpoints.library import ImageModel, ModelFiles, bundled_files, load_model
from linear_core.checkpoints.understanding import check_looks, load_understanding, questions
from linear_core.errors import UserError
from linear_core.loop.vqa import squared, vqa_scores
from linear_core.prompts.janus import BEGIN, END, IMAGE, PICTURE, question
from linear_core.prompts.tokenizer import TextTokenizer
from tests.models.official_janus import randomise, text_tokenizer, to_official

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "JanusForConditionalGeneration"):
    pytest.skip("this transformers has no Janus", allow_module_level=True)

SIDE, PATCH, TOKENS = 3, 2, 9  # of a picture
TEXTS = ["a red fox", "  two cats\n", 'a sign that says "open"']


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    config = transformers.JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 256,
            "bos_token_id": 257, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        },
        vision_config={
            "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE * PATCH,
            "patch_size": PATCH, "projection_dim": 48, "num_image_tokens": TOKENS,
        },
        vq_config={
            "embed_dim": 8, "num_embeddings": 40, "latent_channels": 64, "base_channels": 128,
            "channel_multiplier": [1], "num_res_blocks": 1, "num_patches": SIDE, "projection_dim": 48,
            "image_token_embed_dim": 48, "num_hidden_layers": 2,
        },
        image_token_id=261,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.JanusForConditionalGeneration(config).eval()
    return randomise(model, embedding=1.0)


@pytest.fixture(scope="module")
def folders(theirs: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """As transformers saves it; under official names; and as transformers saves it with its head tied."""
    root = tmp_path_factory.mktemp("looking")
    theirs.save_pretrained(root / "converted")
    weights = load_file(root / "converted" / "model.safetensors")
    config = json.loads((root / "converted" / "config.json").read_text())
    language = {key: config["text_config"][key] for key in ("num_attention_heads", "rms_norm_eps")}
    for name in ("official", "tied"):
        (root / name).mkdir()
    (root / "official" / "config.json").write_text(json.dumps({"language_config": language}))
    save_file(to_official(weights), root / "official" / "model.safetensors")
    (root / "tied" / "config.json").write_text(json.dumps(config))
    save_file({key: each for key, each in weights.items() if key != "lm_head.weight"}, root / "tied/model.safetensors")
    for name in ("converted", "official", "tied"):
        text_tokenizer(root / name / "tokenizer.json")
    yield {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(3, SIDE * PATCH, SIDE * PATCH, 3, generator=torch.Generator().manual_seed(3))


def load(folder: Path) -> ImageModel:
    return load_model(ModelFiles(folder, folder))


def chats(tokenizer: TextTokenizer) -> list[list[int]]:
    """Ids of every question, with a picture's tokens in it, up to where yes and no part."""
    system = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language."
    )
    found = []
    for text in TEXTS:
        asked = f'Does this figure show "{text.strip()}"? Please answer yes or no.'
        chat = f"{system}\n\n<|User|>: {IMAGE}{PICTURE * TOKENS}{END}\n{asked}\n\n<|Assistant|>: "
        found.append(tokenizer.ids(BEGIN + chat))
    return found


@torch.inference_mode()
def expected(model: torch.nn.Module, tokenizer: TextTokenizer, pictures: Tensor, tied: bool = False) -> Tensor:
    """What transformers' whole model says next to each chat by itself: yes against no."""
    head = model.get_input_embeddings().weight if tied else model.lm_head.weight
    (yes,), (no,) = tokenizer.ids("Y"), tokenizer.ids("N")
    odds = []
    for ids, picture in zip(chats(tokenizer), pictures, strict=True):
        pixels = picture.permute(2, 0, 1)[None] * 2 - 1
        hidden = model.model(input_ids=torch.tensor([ids]), pixel_values=pixels).last_hidden_state[0, -1]
        logits = hidden @ head.T
        odds.append(logits[yes] - logits[no])
    return torch.stack(odds)


@pytest.mark.parametrize("layout", ["converted", "official", "tied"])
def test_the_odds_are_those_of_the_whole_model(layout, folders, theirs, pictures):
    """Texts of unequal length together, which are padded, and a picture at a time."""
    model = load(folders[layout])
    looking = load_understanding(model, dtype=torch.float32)
    asked = questions(model, TEXTS)
    wanted = expected(theirs, model.text_tokenizer, pictures, layout == "tied")
    for at_once in (3, 2):
        found = vqa_scores(model.decoder, looking, asked, pictures, at_once)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert wanted.std() > 0.05, "large enough to tell pictures apart"
    assert not torch.allclose(vqa_scores(model.decoder, looking, asked, pictures.flip(0)), wanted, atol=1e-2)


def test_a_question_is_what_both_answers_begin_with(folders):
    """Here a token is a letter, so the space before an answer is fed with the question."""
    tokenizer = TextTokenizer(folders["official"] / "tokenizer.json")
    for text, ids in zip(TEXTS, chats(tokenizer), strict=True):
        asked = question(tokenizer, text)
        assert [*asked.before, *[tokenizer.id(PICTURE)] * TOKENS, *asked.behind] == ids
        assert asked.answers == (tokenizer.ids("Y")[0], tokenizer.ids("N")[0])


def test_a_picture_of_any_size_is_padded_to_a_square():
    """Scaled to the longer side, in the middle, with grey beside it."""
    x = squared(torch.ones(1, 4, 8, 3), 8)
    assert x.shape == (1, 3, 8, 8) and (x[:, :, 2:6] == 1).all()
    assert (x[:, :, [0, 1, 6, 7]] == 0).all()
    same = torch.rand(2, 8, 8, 3)
    torch.testing.assert_close(squared(same, 8), same.permute(0, 3, 1, 2) * 2 - 1, atol=1e-5, rtol=0)


def test_what_cannot_look_is_said(folders, tmp_path):
    bundled = load_model(bundled_files())
    with pytest.raises(UserError, match="landscapes cannot look at pictures"):
        load_understanding(bundled, dtype=torch.float32)
    weights = load_file(folders["official"] / "model.safetensors")
    model = load(folders["official"])
    drop = {
        "vision_model.": "has no part that looks",
        "vision_model.vision_tower.pos_embed": "is not Janus'",
        "vision_model.vision_tower.blocks.1.norm2.bias": "lacks 1 of",
        "aligner.layers.2.weight": "lacks 1 of",
    }
    for prefix, said in drop.items():
        left = {
            key: each for key, each in weights.items()
            if not key.startswith(prefix) and not (prefix == "vision_model." and key.startswith("aligner."))
        }  # fmt: skip
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        save_file(left, folder / "model.safetensors")
        text_tokenizer(folder / "tokenizer.json")
        files = ModelFiles(folder / "model.safetensors", folder / "model.safetensors")
        with pytest.raises(UserError, match=said):
            load_understanding(ImageModel(model.info, None, None, files), dtype=torch.float32)
    check_looks(model.info, model.files)
