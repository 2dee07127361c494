"""LlamaGen's nodes against the stand-in for ComfyUI: classes by name, texts, the model's own settings, downloads."""

from __future__ import annotations

import asyncio
import gc
import importlib
import re
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from linear_core.checkpoints import library
from linear_core.checkpoints.families.llamagen import imagenet_classes
from tests.models import official
from tests.nodes import comfy_double
from tests.nodes.comfy_double import PACK, execute, host, object_info

comfy_double.load_pack()
EXTENSION = importlib.import_module(f"{PACK}.nodes").LineARExtension
UserError = importlib.import_module(f"{PACK}.linear_core.errors").UserError
CachePlan = importlib.import_module(f"{PACK}.linear_core.plan").CachePlan
NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(EXTENSION().get_node_list())}
DIM = 16  # numbers a token, in place of 2048
WRITTEN = "A red fox, in the snow\n---\na castle\n  ---  \n\n"


@pytest.fixture(autouse=True)
def comfy(tmp_path: Path):
    """A ComfyUI with a small text-conditional model, its tokenizer and an encoder in its folders."""
    host.reset(tmp_path)
    models, encoders = tmp_path / "models" / "ar_image", tmp_path / "models" / "text_encoders"
    comfy_double.folder_names_and_paths["text_encoders"] = ([str(encoders)], {".safetensors", ".bin"})
    asyncio.run(EXTENSION().on_load())
    weights = official.decoder("t2i", layers=1, width=64, hidden=32, codes=16)
    weights["cls_embedding.uncond_embedding"] = torch.ones(120, DIM)
    weights["cls_embedding.cap_proj.fc1.weight"] = torch.randn(64, DIM, generator=torch.Generator().manual_seed(0))
    models.mkdir(parents=True)
    notes = {"grid": "4x4", "heads": "4", "tokenizer": "small_vq.safetensors"}
    save_file(weights, models / "small.safetensors", notes)
    tokenizer = official.tokenizer(16, channels=16, codes=16)
    save_file({k: v.detach() for k, v in tokenizer.items()}, models / "small_vq.safetensors")
    for folder in ("flan-t5-xl", "other"):
        (encoders / folder).mkdir(parents=True)
        save_file(official.text_encoder(DIM, 64), encoders / folder / "model.safetensors")
    (encoders / "flan-t5-xl" / "config.json").write_text(official.CONFIG)
    save_file({"x": torch.zeros(1)}, encoders / "clip_l.safetensors")
    importlib.import_module(f"{PACK}.linear_core.checkpoints.text").clear_features()
    with torch.inference_mode():
        yield host


def run(node: str, **inputs: object):
    return execute(NODES[f"LineAR_{node}"], **inputs)


def small() -> object:
    return run("LoadModel", model="small.safetensors", tokenizer="automatic").result[0]


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ComfyUI's own tokenizer, in small: a letter an id."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz,")]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    made.save(str(tmp_path / "tokenizer.json"))
    module = importlib.import_module(f"{PACK}.nodes.host")
    monkeypatch.setattr(module, "t5_tokenizer", lambda: tmp_path / "tokenizer.json")


# -- classes ----------------------------------------------------------------------------------------------------------


def test_classes_of_imagenet_by_name() -> None:
    """One list to search: the bundled model's classes, then ImageNet's, each once."""
    info = object_info(NODES["LineAR_ClassPrompt"])["input"]["required"]["class_name"][1]
    bundled = library.read_info(library.bundled_files().decoder).classes
    assert info["default"] == bundled[0]
    assert [n for n in info["options"] if n in bundled] == list(bundled)
    assert set(imagenet_classes()) <= set(info["options"])
    assert len(set(info["options"])) == len(info["options"])


def test_several_classes_of_imagenet_in_one_batch(comfy: comfy_double.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = comfy.models / "ar_image"
    weights = official.decoder("c2i", layers=1, width=64, hidden=32, codes=16)
    save_file(weights, folder / "classes.safetensors", {"grid": "4x4", "heads": "4"})
    tokenizer = "small_vq.safetensors"
    (model,) = run("LoadModel", model="classes.safetensors", tokenizer=tokenizer).result
    (prompt,) = run("ClassPrompt", model=model, class_name="Cardigan", more_classes="cardigan\n 7 \ntench").result
    assert prompt.tokens[:, 0].tolist() == [264, 474, 7, 0]
    with pytest.raises(UserError, match="small takes text, not classes"):
        run("ClassPrompt", model=small(), class_name="tench")
    with pytest.raises(UserError, match="connect a Text Prompt"):
        run("Generate", model=small(), cache=CachePlan("full"), prompt=prompt)


# -- texts -----------------------------------------------------------------------------------------------------------


def test_text_encoders_are_listed_by_folder_or_file(comfy: comfy_double.Host) -> None:
    """A folder where it is one as published, else the file; nothing that is no T5."""
    assert options("LineAR_TextPrompt", "text_encoder") == ["flan-t5-xl", "other/model.safetensors", "none"]
    comfy_double.folder_names_and_paths["text_encoders"] = ([str(comfy.models / "nothing")], set())
    assert options("LineAR_TextPrompt", "text_encoder")[0] == "flan-t5-xl", (
        "one to choose, and to be told where it goes"
    )


def options(node: str, widget: str) -> list[str]:
    return object_info(NODES[node])["input"]["required"][widget][1]["options"]


@pytest.mark.parametrize("encoder", ["flan-t5-xl", "other/model.safetensors"])
def test_texts_become_a_batch(encoder: str, tokenizer: None, comfy: comfy_double.Host) -> None:
    (prompt,) = run("TextPrompt", text_encoder=encoder, text=WRITTEN).result
    assert prompt.names == ("A red fox, in the snow", "a castle") and prompt.tokens.shape == (2, 120, DIM)
    (tokens,) = run("Generate", model=small(), cache=CachePlan("full"), prompt=prompt, batch_size=2).result
    assert tokens.codes.shape == (4, 4, 4)
    assert tokens.names == (prompt.names[0],) * 2 + (prompt.names[1],) * 2
    with pytest.raises(UserError, match="connect a Class Prompt"):
        (model,) = run("LoadModel", model="landscapes (bundled)", tokenizer="automatic").result
        run("Generate", model=model, cache=CachePlan("full"), prompt=prompt)


def test_a_negative_text_is_what_guidance_leads_away_from(tokenizer: None) -> None:
    """Its features, for each picture, in place of what the model has learnt; no more than that."""
    encoder = {"text_encoder": "flan-t5-xl"}
    (prompt,) = run("TextPrompt", text=WRITTEN, **encoder).result
    (away,) = run("TextPrompt", text=WRITTEN, negative_text=" a lake\n", **encoder).result
    (lake,) = run("TextPrompt", text="a lake", **encoder).result
    assert prompt.negative is None and away.names == prompt.names and torch.equal(away.tokens, prompt.tokens)
    for name in ("tokens", "pad"):
        assert torch.equal(getattr(away.negative, name), getattr(lake, name).repeat_interleave(2, 0))
    model = small()
    rows = model.image.decoder.with_unconditional(away)
    assert torch.equal(rows.tokens[2:], away.negative.tokens) and torch.equal(rows.pad[2:], away.negative.pad)
    draw = [run("Generate", model=model, cache=CachePlan("full"), prompt=p, seed=1).result[0] for p in (prompt, away)]
    assert not torch.equal(draw[0].codes, draw[1].codes)


def test_the_encoder_is_loaded_when_a_text_is_new_and_unloaded_again(
    tokenizer: None, comfy: comfy_double.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, unloaded = importlib.import_module(f"{PACK}.nodes.host"), []
    monkeypatch.setattr(module, "unload", lambda patcher: unloaded.append(weakref.ref(patcher)))
    run("TextPrompt", text_encoder="flan-t5-xl", text=WRITTEN)
    assert len(comfy.loaded) == len(unloaded) == 1
    comfy.loaded.clear()
    gc.collect()
    assert unloaded[0]() is None, "nothing holds the encoder"
    run("TextPrompt", text_encoder="flan-t5-xl", text="a castle")
    assert comfy.loaded == []
    comfy.stop_after, comfy.progress = 0, [(0, 1)]
    with pytest.raises(comfy_double.Interrupted):
        run("TextPrompt", text_encoder="flan-t5-xl", text="a lake")


def test_only_the_encoder_is_unloaded(comfy: comfy_double.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    module, asked = importlib.import_module(f"{PACK}.nodes.host"), []
    ours, other = (comfy_double.Patcher(torch.nn.Linear(1, 1), torch.device("cpu"), None) for _ in range(2))
    listed = [SimpleNamespace(model=ours), SimpleNamespace(model=other)]
    monkeypatch.setattr(module.management, "current_loaded_models", listed)
    monkeypatch.setattr(module.management, "free_memory", lambda *given: asked.append(given))
    module.unload(ours)
    ((amount, device, kept),) = asked
    assert amount > 1e15 and device == ours.load_device and kept == [listed[1]]


def test_what_is_missing_is_told_before_anything_runs(tokenizer: None, comfy: comfy_double.Host) -> None:
    text, load = NODES["LineAR_TextPrompt"], NODES["LineAR_LoadModel"]
    assert text.validate_inputs(text_encoder=None) is True, "linked"
    assert load.validate_inputs(model=None) is True and load.validate_inputs(model="small.safetensors") is True
    expected = comfy.models / "ar_image" / "c2i_XL_384.pt"
    said = load.validate_inputs(model="c2i_XL_384.pt")
    assert str(expected) in said and "Download AR Model" in said and "https://huggingface.co/" in said
    expected = comfy.models / "text_encoders" / "t5.safetensors"
    assert str(expected) in text.validate_inputs(text_encoder="t5.safetensors")
    with pytest.raises(UserError, match=re.escape(str(expected))):
        run("TextPrompt", text_encoder="t5.safetensors", text="x")
    with pytest.raises(UserError, match="text: it is empty"):
        run("TextPrompt", text_encoder="flan-t5-xl", text=" \n---\n")


# -- the model's own settings ------------------------------------------------------------------------------------------


def test_minus_one_is_the_models_own(tokenizer: None) -> None:
    """As a text model's defaults: guidance 7.5, top-k 1000. Set by hand they give the same picture, others do not."""
    model = small()
    (prompt,) = run("TextPrompt", text_encoder="flan-t5-xl", text="a castle on a hill by the sea").result

    def draw(**settings: float) -> Tensor:
        return run("Generate", model=model, cache=CachePlan("full"), prompt=prompt, seed=3, **settings).result[0].codes

    own = draw()
    assert torch.equal(own, draw(guidance=7.5, top_k=1000, top_p=1.0, temperature=1.0))
    assert not torch.equal(own, draw(guidance=1.0)) and not torch.equal(own, draw(temperature=0.0))


@pytest.mark.parametrize("kept", ["fp8_e4m3fn", "fp8_e5m2"])
def test_large_matrices_in_a_byte_a_number(kept: str, comfy: comfy_double.Host) -> None:
    (model,) = run("LoadModel", model="small.safetensors", tokenizer="automatic", weight_dtype=kept).result
    found = {n: (p.dtype, m.comfy_cast_weights) for n, m in model.image.decoder.named_modules()
             for p in m.parameters(recurse=False)}  # fmt: skip
    large = {n for n in found if re.search(r"attention\.w|feed_forward\.w", n)}
    assert {found[n] for n in large} == {(getattr(torch, f"float8_{kept[4:]}"), True)}
    assert {found[n][0] for n in found.keys() - large} == {torch.float32}
    assert model.image.decoder.dtype == torch.float32 and len(large) == 5
    ordinary = small().image.decoder
    assert {p.dtype for p in ordinary.parameters()} == {torch.float32}
    assert not any(getattr(m, "comfy_cast_weights", False) for m in ordinary.modules())


@pytest.mark.parametrize("kept", ["int8", "int4"])
def test_matrices_in_few_bits(kept: str, tokenizer: None, comfy: comfy_double.Host) -> None:
    """Multiplied as they are stored, and the same where ComfyUI has them fetched for every use. Odd sizes: 8 bits."""
    (model,) = run("LoadModel", model="small.safetensors", tokenizer="automatic", weight_dtype=kept).result
    few = [m for m in model.image.decoder.modules() if hasattr(m, "kind")]
    assert [m.kind.bits for m in few] == ([8] * 6 if kept == "int8" else [4, 4, 8, 8, 8, 8])
    assert type(model.decoder) is comfy_double.Patcher
    assert all(m.weight.dtype in (torch.int8, torch.uint8) and not m.comfy_cast_weights for m in few)
    (prompt,) = run("TextPrompt", text_encoder="flan-t5-xl", text="a castle").result

    def draw() -> Tensor:
        settings = {"model": model, "cache": CachePlan("full"), "prompt": prompt, "seed": 3, "stop_after": 2}
        return run("Generate", **settings).result[0].codes

    resident, comfy.fetched = draw(), []
    for layer in few:
        layer.comfy_cast_weights = True
    assert torch.equal(draw(), resident) and {fetched[0] for fetched in comfy.fetched} == set(few)
    assert all(fetched[1].dtype == fetched[0].weight.dtype for fetched in comfy.fetched), "given back after each use"


def test_weights_are_streamed_on_request_only(comfy: comfy_double.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ComfyUI's own patcher for that; then room is counted without those that need not be on the card."""
    host = importlib.import_module(f"{PACK}.nodes.host")
    models = [
        run("LoadModel", model="small.safetensors", tokenizer="automatic", stream_weights=on).result[0]
        for on in (False, True)
    ]
    assert [type(m.decoder) for m in models] == [comfy_double.Patcher, comfy_double.DynamicPatcher]
    assert type(models[1].tokenizer) is comfy_double.Patcher, "it is used once"
    monkeypatch.setattr(host.management, "get_torch_device", lambda: torch.device("meta"))
    monkeypatch.setattr(host.management, "extra_reserved_memory", lambda: 0, raising=False)
    monkeypatch.setattr(comfy_double.Patcher, "model_size", lambda self: 9 * 2**30, raising=False)
    resident, streamed = (host.room(model.decoder) for model in models)
    assert streamed - resident == pytest.approx(1.1 * 8 * 2**30)


# -- downloads ---------------------------------------------------------------------------------------------------------


def test_download(comfy: comfy_double.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched into which folder, the bar, Stop, and the report."""
    module = importlib.import_module(f"{PACK}.nodes.download")
    asked: list[tuple[str, Path]] = []

    def fake(release, folder, progress):
        asked.append((release.name, folder))
        progress(0, 3 << 20, "a")
        progress(3 << 20, 3 << 20, "a")
        return [module.Fetched(folder / release.local_path(file), 5, "c" * 40, "h" * 64) for file in release.files]

    monkeypatch.setattr(module, "download", fake)
    output = run("DownloadModel", release="t2i_XL_stage2_512", with_needed=True)
    models, encoders = comfy.models / "ar_image", comfy.models / "text_encoders"
    assert asked == [("t2i_XL_stage2_512", models), ("vq_ds16_t2i", models), ("flan-t5-xl", encoders)]
    assert comfy.progress[-1] == (3, 3), "the bar counts MiB"
    text = output.ui["text"][0]
    assert str(encoders / "flan-t5-xl" / "config.json") in text and "h" * 64 in text and "c" * 40 in text
    asked.clear()
    run("DownloadModel", release="t2i_XL_stage2_512", with_needed=False)
    assert [name for name, _ in asked] == ["t2i_XL_stage2_512"]
    comfy.stop_after = 0
    with pytest.raises(comfy_double.Interrupted):
        run("DownloadModel", release="vq_ds16_c2i", with_needed=True)


def test_a_download_runs_again_when_a_file_has_gone(comfy: comfy_double.Host) -> None:
    ask = lambda: NODES["LineAR_DownloadModel"].fingerprint_inputs("c2i_B_256", True)  # noqa: E731
    nothing = ask()
    for name in ("c2i_B_256.pt", "vq_ds16_c2i.pt"):
        (comfy.models / "ar_image" / name).write_bytes(b"")
    assert ask() == ask() != nothing


# -- whose it is -------------------------------------------------------------------------------------------------------


def of_classes(comfy: comfy_double.Host, tokenizer: str = "small_vq.safetensors") -> object:
    """A model of ImageNet's classes with as many codes as the small one."""
    weights = official.decoder("c2i", layers=1, width=64, hidden=32, codes=16)
    notes = {"grid": "4x4", "heads": "4", "tokenizer": tokenizer}
    save_file(weights, comfy.models / "ar_image" / "c2i.safetensors", notes)
    return run("LoadModel", model="c2i.safetensors", tokenizer="automatic").result[0]


def test_a_prompt_of_another_model_draws_nothing(comfy: comfy_double.Host) -> None:
    """LlamaGen's goldfish is the bundled model's second class: it would draw that under the fish's name."""
    imagenet = of_classes(comfy)
    (bundled,) = run("LoadModel", model="landscapes (bundled)", tokenizer="automatic").result
    (fish,) = run("ClassPrompt", model=imagenet, class_name="goldfish").result
    (dusk,) = run("ClassPrompt", model=bundled, class_name="alpine dusk").result
    assert fish.tokens.tolist() == dusk.tokens.tolist()
    for model, prompt, told in (
        (bundled, fish, "made for c2i, not for landscapes; connect a Class Prompt made with landscapes"),
        (imagenet, dusk, "made for landscapes, not for c2i; connect a Class Prompt made with c2i"),
    ):
        with pytest.raises(UserError, match=told):
            run("Generate", model=model, cache=CachePlan("full"), prompt=prompt)
        with pytest.raises(UserError, match=told):
            run("EncodeImage", model=model, image=torch.zeros(1, 8, 8, 3), prompt=prompt)
    with pytest.raises(UserError, match="made for c2i, not for landscapes"):
        run("Compare", model=bundled, cache=CachePlan(), prompt=fish, seed=1, guidance=-1, temperature=-1, top_k=-1,
            top_p=-1, batch_size=1)  # fmt: skip
    assert comfy.loaded == []


def test_tokens_of_another_codebook(comfy: comfy_double.Host) -> None:
    """As many codes, which stand for something else: neither decoded nor continued, connected or kept on the node."""
    imagenet = of_classes(comfy)
    weights = {k: v.detach() for k, v in official.tokenizer(16, channels=16, codes=16).items()}
    weights["quantize.embedding.weight"] = -weights["quantize.embedding.weight"]
    save_file(weights, comfy.models / "ar_image" / "other_vq.safetensors")
    (other,) = run("LoadModel", model="c2i.safetensors", tokenizer="other_vq.safetensors").result
    (prompt,) = run("ClassPrompt", model=imagenet, class_name="goldfish").result
    drawn = run("Generate", model=imagenet, cache=CachePlan("full"), prompt=prompt)
    (tokens,) = drawn.result
    (encoded,) = run("EncodeImage", model=imagenet, image=torch.zeros(1, 8, 8, 3)).result
    settings = {"cache": CachePlan("full"), "prompt": prompt, "keep_rows": 2}
    for given in (tokens, encoded):
        with pytest.raises(UserError, match="tokens: they come from c2i, whose codes stand for other pieces of images"):
            run("Decode", model=other, tokens=given)
        with pytest.raises(UserError, match="whose codes stand for other pieces"):
            run("Generate", model=other, tokens=given, **settings)
        run("Decode", model=imagenet, tokens=given)
    (kept,) = run("Generate", model=imagenet, tokens=tokens, **settings).result
    assert torch.equal(kept.codes[:, :2], tokens.codes[:, :2])
    events = importlib.import_module(f"{PACK}.linear_core.events")
    started = drawn.ui["linear_ar"][0]
    view = f"{events.pack_codes(tokens.codes[:, :3])}:{started['codebook']}"
    (kept,) = run("Generate", model=imagenet, view=view, **settings).result
    assert torch.equal(kept.codes[:, :2], tokens.codes[:, :2])
    with pytest.raises(UserError, match="view: the rows kept on the node are not of c2i; press 'Start over'"):
        run("Generate", model=other, view=view, **settings)
    with pytest.raises(UserError, match="they record nothing of a cache"):
        run("RetentionHeatmap", tokens=encoded, strength=0.7, size=64, show={"show": "lifetime"})


def test_a_text_encoder_of_another_width(
    comfy: comfy_double.Host, tokenizer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As t5xxl among the text encoders of other models: not offered, and refused by its header where it is chosen."""
    encoders = comfy.models / "text_encoders"
    save_file(official.text_encoder(DIM + 8, 64), encoders / "t5xxl_fp16.safetensors")
    assert options("LineAR_TextPrompt", "text_encoder") == ["flan-t5-xl", "other/model.safetensors", "none"]
    core = importlib.import_module(f"{PACK}.linear_core.checkpoints.text")
    monkeypatch.setattr(core, "load_encoder", lambda files: pytest.fail("it was loaded"))
    told = NODES["LineAR_TextPrompt"].validate_inputs(text_encoder="t5xxl_fp16.safetensors")
    assert "t5xxl_fp16.safetensors: gives 24 features per token, but the model takes 2048" in told
    with pytest.raises(UserError, match=f"gives 24 features per token, but the model takes {DIM}; choose FLAN-T5-XL"):
        run("TextPrompt", text_encoder="t5xxl_fp16.safetensors", text="a fox", model=small())
    (comfy.models / "ar_image" / "small.safetensors").unlink()
    assert options("LineAR_TextPrompt", "text_encoder") == ["flan-t5-xl", "none"], "no model takes what is there"


def test_text_encoders_straight_in_the_folder_and_pickled(comfy: comfy_double.Host, tokenizer: None) -> None:
    encoders = comfy.models / "text_encoders"
    (encoders / "pickled").mkdir()
    torch.save(official.text_encoder(DIM, 64), encoders / "pickled" / "pytorch_model.bin")
    for folder in (encoders, encoders / "pickled"):
        (folder / "config.json").write_text(official.CONFIG)
    save_file(official.text_encoder(DIM, 64), encoders / "model.safetensors")
    assert {"pickled", "text_encoders"} <= set(options("LineAR_TextPrompt", "text_encoder"))
    files = importlib.import_module(f"{PACK}.nodes.files")
    for name in ("pickled", "text_encoders"):
        assert files.find_text_files(name).weights[0].parent == (
            encoders / "pickled" if name == "pickled" else encoders
        )
