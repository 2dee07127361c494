"""Prompts and codes say whose they are: another model takes them only where they mean the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from linear_core.checkpoints import library
from linear_core.checkpoints.convert import convert
from linear_core.checkpoints.library import ImageModel, ModelFiles, find_tokenizer, load_model
from linear_core.errors import UserError
from linear_core.events import codebooks_of, pack_codes, unpack_codes
from linear_core.prompts import Origin, class_prompt
from tests.checkpoints import bad_files
from tests.models import lumina_official
from tests.tiny import caption_prompt

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ImageModel]]:
    """One of each family that is prompted in another way, and another class model with classes of its own."""
    folder = tmp_path_factory.mktemp("models")
    with bad_files.good(folder) as made:
        names = ("llamagen", "llamagen t2i", "janus bin", "lumina")
        paths = {name: made[name] / bad_files.LAYOUTS[name].model for name in names}
        found = {name: load_model(ModelFiles(path, find_tokenizer(path))) for name, path in paths.items()}
        yield found | {"bundled": load_model(library.bundled_files())}


def refused(model: ImageModel, prompt: object, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        model.check(prompt)
    assert str(caught.value).startswith("prompt: ") and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_every_other_models_prompt_is_refused(models: dict[str, ImageModel]) -> None:
    """By every model, with the name of the one that it was made for and what to connect; its own is taken."""
    prompts = {
        "bundled": models["bundled"].class_prompt(["alpine dusk"]),
        "llamagen": models["llamagen"].class_prompt(["1"]),
        "janus bin": models["janus bin"].prompt(["a fox"]),
        "lumina": models["lumina"].prompt(["a fox"]),
        "llamagen t2i": replace(caption_prompt([3], 7), origin=Origin("", ("features",))),
    }
    caption = models["llamagen t2i"].info.config
    features = torch.zeros(1, caption.caption_slots, caption.caption_dim)
    prompts["llamagen t2i"] = replace(prompts["llamagen t2i"], tokens=features)
    assert prompts.keys() == models.keys()
    for whose, prompt in prompts.items():
        for name, model in models.items():
            for given in (prompt, prompt.repeat(2), prompt.select([0])):
                if whose == name:
                    model.check(given)
                else:
                    kind = "Text Prompt" if model.info.text else "Class Prompt"
                    maker = prompt.origin.model or "models with a text encoder"
                    refused(model, given, f"made for {maker}, not for {model.info.name}", f"connect a {kind}")


def test_models_with_the_same_classes_share_prompts(models: dict[str, ImageModel]) -> None:
    """Of whatever name and size; not those whose classes have the same numbers and other names, or none."""
    bundled, plain = models["bundled"], models["llamagen"]
    other = replace(bundled, info=replace(bundled.info, name="my own"))
    other.check(bundled.class_prompt(["ocean day"]))
    swapped = replace(bundled, info=replace(bundled.info, classes=bundled.info.classes[::-1]))
    refused(swapped, bundled.class_prompt(["ocean day"]), "made for another landscapes")
    nameless = replace(plain, info=replace(plain.info, name="its twin"))
    refused(nameless, plain.class_prompt(["1"]), f"made for {plain.info.name}")
    plain.check(class_prompt([1]))  # made by hand: it says nothing


def test_models_with_the_same_text_tokenizer_share_prompts(models: dict[str, ImageModel], tmp_path: Path) -> None:
    """Janus-Pro-1B and 7B have one tokenizer, Janus-1.3B has another; Anole's prompts are not Lumina-mGPT's."""
    janus, lumina = models["janus bin"], models["lumina"]
    prompt = janus.prompt(["a fox"])
    folder = tmp_path / "Janus-Pro-7B"
    folder.mkdir()
    for file in janus.files.decoder.iterdir():
        (folder / file.name).symlink_to(file)
    twin = load_model(ModelFiles(folder, folder))
    assert twin.info.name == "Janus-Pro-7B"
    twin.check(prompt)
    (folder / "tokenizer.json").unlink()
    words = janus.files.decoder / "tokenizer.json"
    (folder / "tokenizer.json").write_text(words.read_text(encoding="utf-8").replace("<|User|>", "<|Someone|>"))
    refused(replace(twin), prompt, "made for Janus-Pro-1B, not for Janus-Pro-7B")
    anole = replace(lumina, info=replace(lumina.info, grid=replace(lumina.info.grid, eol=None), name="Anole"))
    refused(anole, lumina.prompt(["a fox"]), "made for Lumina-mGPT-7B-768, not for Anole")


def test_a_codebook_is_known_by_what_its_codes_stand_for(models: dict[str, ImageModel], tmp_path: Path) -> None:
    """The same in every format and dtype that it is converted to; another for every other tokenizer."""
    janus = models["janus bin"]
    assert len({model.codebook for model in (janus, models["bundled"], models["lumina"])}) == 3
    files = models["llamagen"].files
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        target = tmp_path / f"{dtype}.safetensors"
        convert(files.tokenizer, target, dtype=dtype)
        model = load_model(ModelFiles(files.decoder, target))
        assert model.codebook == models["llamagen"].codebook
    weights = bad_files.vq()
    weights["quantize.embedding.weight"] = weights["quantize.embedding.weight"].roll(1, 0)
    save_file(weights, tmp_path / "rolled.safetensors")
    rolled = load_model(ModelFiles(files.decoder, tmp_path / "rolled.safetensors"))
    assert rolled.codebook != models["llamagen"].codebook


def test_kept_codes_say_whose_they_are() -> None:
    codes = torch.arange(6).view(1, 2, 3)
    text = pack_codes(codes)
    assert codebooks_of(text) == set()
    of = f"{text}:0123456789abcdef"
    assert unpack_codes(of) == unpack_codes(text)
    assert codebooks_of(of) == {"0123456789abcdef"}
    assert codebooks_of(f"0@1|{of};1@2|{text}:fedcba9876543210") == {"0123456789abcdef", "fedcba9876543210"}


def test_a_lumina_of_another_size_says_so(models: dict[str, ImageModel], tmp_path: Path) -> None:
    """Its tokenizer is the same; the size in the prompt is not one that it draws."""
    ids = lumina_official.vocabulary(bad_files.CODES)
    folder = models["lumina"].files.decoder.parent / "Lumina-mGPT-7B-512"
    lumina_official.write_model(folder, bad_files.small(lumina_official.decoder(ids, layers=1, dim=16)), ids)
    other = load_model(ModelFiles(folder, find_tokenizer(folder)))
    prompt = models["lumina"].prompt(["a fox"])
    with pytest.raises(UserError, match="asks for 768 x 768 pixels and was not made for Lumina-mGPT-7B-512"):
        other.info.with_grid(prompt.grid)
