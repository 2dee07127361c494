"""Janus' nodes against the stand-in for ComfyUI: folders, texts that the model reads itself, batches in parts."""

from __future__ import annotations

import asyncio
import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import official_janus
from tests.nodes import comfy_double
from tests.nodes.comfy_double import PACK, Host, execute, host, object_info

pytest.importorskip("tokenizers")
comfy_double.load_pack()
EXTENSION = importlib.import_module(f"{PACK}.nodes").LineARExtension
UserError = importlib.import_module(f"{PACK}.linear_core.errors").UserError
CachePlan = importlib.import_module(f"{PACK}.linear_core.plan").CachePlan
NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(EXTENSION().get_node_list())}
TEXTS = "a red fox\n---\nan old lighthouse"
SIDE = 8  # tokens, for which these models pass for published: 24 would take seconds


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Janus where other packs have it, one where ours lie."""
    folder = tmp_path_factory.mktemp("models")
    official_janus.write(folder / "Janus-Pro" / "Janus-Pro-1B")
    official_janus.write(folder / "ar_image" / "chat" / "Janus-1.3B", shards=1, suffix=".safetensors")
    return folder


@pytest.fixture(autouse=True)
def comfy(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A copy of these models; no text encoder anywhere."""
    monkeypatch.setattr(importlib.import_module(f"{PACK}.linear_core.checkpoints.families.janus"), "SIDE", SIDE)
    host.reset(tmp_path)
    shutil.copytree(models, tmp_path / "models", dirs_exist_ok=True)
    comfy_double.folder_names_and_paths["text_encoders"] = ([str(tmp_path / "models" / "text_encoders")], set())
    asyncio.run(EXTENSION().on_load())
    (tmp_path / "models" / "ar_image" / "notes.bin").write_bytes(b"of another program")
    with torch.inference_mode():
        yield host


def run(node: str, **inputs: object) -> object:
    return execute(NODES[f"LineAR_{node}"], **inputs)


def load(**settings: object) -> object:
    return run("LoadModel", **{"model": "Janus-Pro-1B", "tokenizer": "automatic", **settings}).result[0]


def test_folders_are_models(comfy: Host) -> None:
    """Listed once, by the folder's name, and not by their files; with the memory of weights in each format."""
    info = object_info(NODES["LineAR_LoadModel"])["input"]["required"]
    names = info["model"][1]["options"]
    assert names == ["landscapes (bundled)", "landscapes in scales (bundled)", "Janus-Pro-1B", "chat/Janus-1.3B"]
    assert info["tokenizer"][1]["options"] == ["automatic"]
    told = info["model"][1]["linear_ar"]
    for name in names[2:]:
        model = load(model=name)
        assert model.image.info.name == name.rpartition("/")[2]
        assert told[name]["weights"]["default"] == sum(p.nbytes for p in model.image.decoder.parameters())
    kept = load(weight_dtype="fp8_e4m3fn").image.decoder
    assert told["Janus-Pro-1B"]["weights"]["fp8_e4m3fn"] == sum(p.nbytes for p in kept.parameters())
    assert {p.dtype for n, p in kept.named_parameters() if n.startswith("layers.") and p.ndim == 2} == {
        torch.float8_e4m3fn
    }


def test_a_folder_that_changed_is_loaded_again(comfy: Host) -> None:
    ask = lambda: NODES["LineAR_LoadModel"].fingerprint_inputs("Janus-Pro-1B", "automatic", 0, 0)  # noqa: E731
    before = ask()
    assert before == ask() != ""
    shard = next((comfy.models / "Janus-Pro" / "Janus-Pro-1B").glob("*.bin"))
    shard.write_bytes(shard.read_bytes() + b" ")
    assert ask() != before


def test_what_is_missing_is_told_with_its_source(comfy: Host) -> None:
    said = NODES["LineAR_LoadModel"].validate_inputs(model="Janus-Pro-7B")
    assert str(comfy.models / "ar_image" / "Janus-Pro-7B") in said and "huggingface.co/deepseek-ai/Janus-Pro-7B" in said


def test_texts_for_a_model_that_reads_them(comfy: Host) -> None:
    """No text encoder is asked for, whatever stands in its widget; a negative text takes the blotted one's place."""
    model, text = load(), NODES["LineAR_TextPrompt"]
    for encoder in ("none", "flan-t5-xl"):
        assert text.validate_inputs(text_encoder=encoder, model=None) is True, "None: linked"
        (prompt,) = run("TextPrompt", text_encoder=encoder, text=TEXTS, model=model).result
        assert prompt.names == ("a red fox", "an old lighthouse") and prompt.tokens.shape[0] == 2
        assert not comfy.loaded
    (away,) = run("TextPrompt", text_encoder="none", text=TEXTS, model=model, negative_text=" rain\n").result
    assert torch.equal(away.tokens, prompt.tokens)
    assert not torch.equal(away.negative.tokens[0], prompt.negative.tokens[0])
    codes = [
        run("Generate", model=model, cache=CachePlan(), prompt=p, seed=1, stop_after=2).result[0].codes
        for p in (prompt, away)
    ]
    assert codes[0].shape == (2, 2, SIDE) and not torch.equal(*codes)


def test_mistakes_with_texts(comfy: Host) -> None:
    text = NODES["LineAR_TextPrompt"]
    assert "for models that read text themselves" in text.validate_inputs(text_encoder="none")
    assert "flan-t5-xl" in text.validate_inputs(text_encoder="flan-t5-xl"), "it is not there"
    with pytest.raises(UserError, match="text: it is empty"):
        run("TextPrompt", text_encoder="none", text=" \n---\n", model=load())
    (bundled,) = run("LoadModel", model="landscapes (bundled)", tokenizer="automatic").result
    with pytest.raises(UserError, match="connect it to Class Prompt"):
        run("TextPrompt", text_encoder="none", text="a fox", model=bundled)
    with pytest.raises(UserError, match="takes text, not classes"):
        run("ClassPrompt", model=load(), class_name="ocean day")
    (prompt,) = run("ClassPrompt", model=bundled, class_name="ocean day").result
    with pytest.raises(UserError, match="connect a Text Prompt"):
        run("Generate", model=load(), cache=CachePlan(), prompt=prompt)


@pytest.mark.parametrize("prefix", ["gen_vision_model.", "gen_vision_model.quantize."])
def test_a_folder_without_the_weights_of_its_own_tokenizer(comfy: Host, prefix: str) -> None:
    """There is no other tokenizer to choose: what helps is to fetch the files again, automatic or not."""
    path = comfy.models / "ar_image" / "chat" / "Janus-1.3B" / "model.safetensors"
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}, path, {"format": "pt"})
    for tokenizer in ("automatic", "chat/Janus-1.3B"):
        with pytest.raises(
            UserError, match=r"^Janus-1\.3B: lacks the weights of the VQ tokenizer that belongs to a Janus model"
        ):
            load(model="chat/Janus-1.3B", tokenizer=tokenizer)


def test_a_batch_that_does_not_fit_is_drawn_in_parts(comfy: Host) -> None:
    """As many at a time as fit: the same pictures, a run of its own on the page for each part, all of it at the end."""
    model, live = load(), importlib.import_module(f"{PACK}.nodes.live")
    (prompt,) = run("TextPrompt", text_encoder="none", text=TEXTS, model=model).result
    settings = {"model": model, "cache": CachePlan(), "prompt": prompt, "seed": 5, "batch_size": 3, "stop_after": 6}
    whole = run("Generate", **settings)
    (_, asked), *_ = comfy.loaded
    sample = importlib.import_module(f"{PACK}.linear_core.plan").SamplePlan(guidance=5.0)
    needed = [live.memory(model, CachePlan(), sample, prompt.repeat(3), n) for n in range(1, 7)]
    assert asked == needed[-1] > needed[2] > needed[1]

    comfy.loaded.clear()
    comfy.sent.clear()
    comfy.progress.clear()
    comfy.free = needed[2] - 1  # two fit, three do not
    parts = run("Generate", **settings)
    (_, asked), *_ = comfy.loaded
    assert asked == needed[1]
    one, other = whole.result[0], parts.result[0]
    assert torch.equal(one.codes, other.codes) and torch.equal(one.shares, other.shares)
    assert one.names == other.names and other.cache_bytes == one.cache_bytes // 3
    starts = [data for event, data in comfy.sent if event == "linear_ar.line" and data["kind"] == "started"]
    assert [(event["images"], event["seed"]) for event in starts] == [(2, 5), (2, 7), (2, 9)]
    texts = [data for event, data in comfy.sent if event == "text"]
    assert "part 2 of 3, 2 pictures at a time" in texts
    assert comfy.progress[-1] == (2 * SIDE + 6, 3 * SIDE), "one bar for all parts"
    left, right = whole.ui["linear_ar"], parts.ui["linear_ar"]
    assert right[0]["images"] == 6 and right[0]["cache_bytes"] == left[0]["cache_bytes"] // 3
    for mine, theirs in zip(left[1:-1], right[1:-1], strict=True):
        same = ("row", "tokens", "cells", "shares", "evicted", "by_layer")
        assert {name: mine[name] for name in same} == {name: theirs[name] for name in same}
    (ref,) = parts.ui["linear_ar_picture"]
    assert ref["type"] == "temp"


def test_a_picture_becomes_codes_and_is_continued(comfy: Host) -> None:
    """Encode Image with the tokenizer that Janus brings."""
    model = load()
    (tokens,) = run("EncodeImage", model=model, image=torch.rand(1, 40, 30, 3)).result
    assert tokens.codes.shape == (1, SIDE, SIDE) and tokens.codebook == 16384
    (prompt,) = run("TextPrompt", text_encoder="none", text="a fox", model=model).result
    settings = {"model": model, "cache": CachePlan(), "prompt": prompt, "tokens": tokens, "keep_rows": 6}
    (drawn,) = run("Generate", **settings).result
    assert torch.equal(drawn.codes[:, :6], tokens.codes[:, :6])
    (image,) = run("Decode", model=model, tokens=drawn).result
    assert image.shape == (1, 16 * SIDE, 16 * SIDE, 3)


def test_the_best_by_asking_the_model(comfy: Host) -> None:
    """Its own eyes, loaded for that and unloaded; the text is the prompt's, or another."""
    model = load()
    vqa = importlib.import_module(f"{PACK}.linear_core.loop.vqa")
    looking = importlib.import_module(f"{PACK}.linear_core.checkpoints.understanding")
    eyes = looking.load_understanding(model.image, dtype=model.image.decoder.dtype)
    (prompt,) = run("TextPrompt", text_encoder="none", text=TEXTS, model=model).result
    images = torch.rand(4, 20, 30, 3, generator=torch.Generator().manual_seed(1))
    asked = {"images": images, "each": 2, "keep": 1, "by": "VQA score", "model": model}
    for more, texts in (
        ({"prompt": prompt}, ["a red fox"] * 2 + ["an old lighthouse"] * 2),
        ({"prompt": prompt, "text": "snow"}, ["snow"] * 4),
    ):
        best, sheet, told, _ = run("PickBest", **asked, **more).result
        scores = vqa.vqa_scores(model.image.decoder, eyes, looking.questions(model.image, texts), images)
        found = [float(line.split()[1].rstrip(",")) for line in told.splitlines()]
        torch.testing.assert_close(torch.tensor(found), scores, atol=1e-4, rtol=1e-4)
        chosen = [2 * g + int(scores[2 * g : 2 * g + 2].argmax()) for g in (0, 1)]
        assert torch.equal(best, images[chosen]) and sheet.shape[2] > 2 * 180
    (bundled,) = run("LoadModel", model="landscapes (bundled)", tokenizer="automatic").result
    for more, word in (
        ({"model": None}, "model: 'VQA score' asks a Janus"),
        ({}, "text: 'VQA score' needs what the images should show"),
        ({"model": bundled, "text": "snow"}, "landscapes cannot look at pictures"),
        ({"text": "a\n---\nb\n---\nc"}, "text: there are 3 texts for 2 groups"),
    ):
        with pytest.raises(UserError, match=word):
            run("PickBest", **asked | more)


def test_room_beside_the_models(monkeypatch: pytest.MonkeyPatch, comfy: Host) -> None:
    """What is free or could be freed, less these models and what ComfyUI keeps back; on a CPU what is free."""
    from types import SimpleNamespace

    module, gpu = importlib.import_module(f"{PACK}.nodes.host"), torch.device("cuda")
    ours = SimpleNamespace(model_size=lambda: 3000)
    loaded = [SimpleNamespace(device=d, model_loaded_memory=lambda: 5000) for d in (gpu, torch.device("cpu"))]
    monkeypatch.setattr(module.management, "current_loaded_models", loaded)
    monkeypatch.setattr(module.management, "extra_reserved_memory", lambda: 400, raising=False)
    comfy.free = 20_000
    assert module.room(ours, ours) == 20_000
    monkeypatch.setattr(module.management, "get_torch_device", lambda: gpu)
    assert module.room(ours, ours) == 20_000 + 5000 - 6600 - 400


def test_files_straight_in_the_folder(comfy: Host) -> None:
    """The official files put into models/Janus-Pro itself, beside a folder: one model by the folder's name."""
    folder = comfy.models / "Janus-Pro"
    official_janus.write(folder)
    official_janus.write(comfy.models / "ar_image", shards=1, suffix=".safetensors")
    names = object_info(NODES["LineAR_LoadModel"])["input"]["required"]["model"][1]["options"]
    assert sorted(names[2:]) == ["Janus-Pro", "Janus-Pro-1B", "ar_image", "chat/Janus-1.3B"]
    for name in ("Janus-Pro", "ar_image"):
        assert NODES["LineAR_LoadModel"].validate_inputs(model=name) is True
        model = load(model=name)
        assert model.image.info.name == name and model.image.info.family.name == "Janus"
        assert run("TextPrompt", text_encoder="none", text="a fox", model=model).result[0].length > 2
        assert NODES["LineAR_LoadModel"].fingerprint_inputs(name, "automatic", 0, 0)
    (folder / "Janus-Pro").mkdir()
    official_janus.write(folder / "Janus-Pro")
    assert load(model="Janus-Pro").image.files.decoder == folder / "Janus-Pro"
    assert load(model="Janus-Pro/.").image.files.decoder == folder


def test_names_saved_on_windows(comfy: Host) -> None:
    """A workflow's backslash is this system's slash, and the other way round."""
    check = NODES["LineAR_LoadModel"].validate_inputs
    assert check(model="chat\\Janus-1.3B", tokenizer="automatic") is True
    assert load(model="chat\\Janus-1.3B").image.info.name == "Janus-1.3B"
    vq = comfy.models / "ar_image" / "vq" / "mine.safetensors"
    vq.parent.mkdir()
    vq.write_bytes(comfy_double.ROOT.joinpath("linear_core", "assets", "landscapes_vq.safetensors").read_bytes())
    assert check(model="landscapes (bundled)", tokenizer="vq\\mine.safetensors") is True
    (model,) = run("LoadModel", model="landscapes (bundled)", tokenizer="vq\\mine.safetensors").result
    assert model.image.files.tokenizer == vq
    assert "no such file" in check(model="landscapes (bundled)", tokenizer="vq\\gone.safetensors")
    assert "leads out" in check(model="landscapes (bundled)", tokenizer="..\\gone.safetensors")
    assert check(model=None, tokenizer=None) is True, "both are linked"
