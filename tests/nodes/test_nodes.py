"""The nodes against a stand-in for ComfyUI (comfy_double.py): what they do with it, and what users are told."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import logging
import re
import threading

import pytest
import torch

from tests.nodes import comfy_double
from tests.nodes.comfy_double import CPU, PACK, ROOT, execute, host, object_info
from tests.nodes.comfy_server import GOLDEN, ours
from tests.tiny import cut_down

PACKAGE = comfy_double.load_pack()
EXTENSION = importlib.import_module(f"{PACK}.nodes").LineARExtension
LINEAR = {
    name: importlib.import_module(f"{PACK}.linear_core.{name}")
    for name in ("cache.line_cache", "checkpoints.library", "errors", "plan")
}
UserError, CachePlan = LINEAR["errors"].UserError, LINEAR["plan"].CachePlan
NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(EXTENSION().get_node_list())}
BUNDLED = "landscapes (bundled)"
ROWS, FACTOR = 8, 4  # lines of the small model, which has as many columns; pixels of a token
FULL = CachePlan(policy="full")


@pytest.fixture(autouse=True)
def comfy(tmp_path):
    """A ComfyUI with empty model folders, and nothing said yet."""
    host.reset(tmp_path)
    (tmp_path / "models" / "ar_image").mkdir(parents=True)
    asyncio.run(EXTENSION().on_load())
    with torch.inference_mode():  # as ComfyUI runs nodes
        yield host


def run(node, **inputs):
    return execute(NODES[f"LineAR_{node}"], **inputs).result


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    host.reset(tmp_path_factory.mktemp("bundled"))
    asyncio.run(EXTENSION().on_load())
    with torch.inference_mode():
        (model,) = run("LoadModel", model=BUNDLED, tokenizer="automatic")
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bundled model cut down, so that a picture takes a moment."""
    host.reset(tmp_path_factory.mktemp("small"))
    asyncio.run(EXTENSION().on_load())
    folder = host.models / "ar_image"
    folder.mkdir(parents=True)
    cut_down(folder / "small.safetensors", tokenizer="small_vq.safetensors")
    (folder / "small_vq.safetensors").write_bytes(LINEAR["checkpoints.library"].bundled_files().tokenizer.read_bytes())
    with torch.inference_mode():
        (model,) = run("LoadModel", model="small.safetensors", tokenizer="automatic")
    return model


@pytest.fixture
def one(small):
    """One prompt, ready to draw."""
    return {"model": small, "prompt": run("ClassPrompt", model=small, class_name="alpine dawn")[0]}


# -- the pack --------------------------------------------------------------------------------------------------------


def test_one_way_in_and_its_failure_is_logged_with_the_place(caplog, monkeypatch):
    assert not hasattr(PACKAGE, "NODE_CLASS_MAPPINGS"), "it would keep ComfyUI from asking comfy_entrypoint"
    assert (ROOT / PACKAGE.WEB_DIRECTORY).is_dir()
    assert isinstance(asyncio.run(PACKAGE.comfy_entrypoint()), EXTENSION)
    monkeypatch.delattr(importlib.import_module(f"{PACK}.nodes"), "LineARExtension")
    with pytest.raises(ImportError), caplog.at_level(logging.ERROR):
        asyncio.run(PACKAGE.comfy_entrypoint())
    assert "LineAR could not be loaded" in caplog.text
    assert "Traceback" in caplog.text


def test_the_schemas_are_those_that_a_live_host_recorded():
    """Saved workflows know widgets by their order and nodes by their id: a difference here breaks them, or is meant."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    told = json.loads(json.dumps({name: object_info(node) for name, node in NODES.items()}))
    assert sorted(told) == sorted(golden), "a node came or went; record again as tests/nodes/comfy_server.py says"
    for name, info in told.items():
        assert ours(info) == golden[name], (
            f"{name} differs; if that is meant, record again as tests/nodes/comfy_server.py says"
        )


@pytest.mark.parametrize("name", NODES)
def test_everything_on_a_node_is_explained(name):
    info, help_page = object_info(NODES[name]), ROOT / "web" / "docs" / f"{name}.md"
    assert name.startswith("LineAR_") and info["category"] == "LineAR"
    assert info["description"] and info["search_aliases"]
    assert all(info["output_tooltips"]), "an output without a tooltip"
    page = help_page.read_text(encoding="utf-8")
    named = [info["input"].get("required", {}), info["input"].get("optional", {})]
    named += [
        choice["inputs"]["required"] for entry in named[0].values() for choice in options(entry) if choice["inputs"]
    ]
    for group in named:
        for widget, (_, more) in group.items():
            assert more.get("tooltip"), f"{widget} has no tooltip"
            assert more.get("socketless") or f"`{widget}`" in page, f"{help_page.name} does not tell of {widget}"
    for output in info["output_name"]:
        assert f"`{output}`" in page, f"{help_page.name} does not tell of the output {output}"


def options(entry):
    """The choices of a dynamic combo, which have inputs of their own."""
    return entry[1].get("options", []) if entry[0] == "COMFY_DYNAMICCOMBO_V3" else []


def test_only_one_file_speaks_to_comfyui():
    others = [p for p in (ROOT / "nodes").glob("*.py") if p.name != "host.py"]
    pattern = re.compile(r"^\s*(?:from|import) +(comfy(?!_api)\S*|folder_paths|server|execution)", re.M)
    assert {p.name: pattern.findall(p.read_text(encoding="utf-8")) for p in others} == {p.name: [] for p in others}


# -- model files -----------------------------------------------------------------------------------------------------


def test_the_model_folder_joins_those_of_extra_model_paths(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    comfy_double.folder_names_and_paths["ar_image"] = ([str(elsewhere)], set())
    asyncio.run(EXTENSION().on_load())
    asyncio.run(EXTENSION().on_load())
    places, suffixes = comfy_double.folder_names_and_paths["ar_image"]
    assert places == [str(elsewhere), *(str(tmp_path / "models" / name) for name in ("ar_image", "Janus-Pro"))]
    assert suffixes == {".safetensors", ".pt", ".pth", ".ckpt", ".bin"}


def test_decoders_and_tokenizers_are_listed_apart(comfy):
    folder = comfy.models / "ar_image"
    (folder / "below").mkdir()
    cut_down(folder / "below" / "mine.safetensors")
    (folder / "vq.safetensors").write_bytes(LINEAR["checkpoints.library"].bundled_files().tokenizer.read_bytes())
    (folder / "broken.pt").write_bytes(b"no checkpoint")
    (folder / "README.md").write_text("not a model")
    info = object_info(NODES["LineAR_LoadModel"])["input"]["required"]
    assert info["model"][1]["options"] == [
        BUNDLED,
        "landscapes in scales (bundled)",
        "below/mine.safetensors",
        "broken.pt",
    ]
    assert info["tokenizer"][1]["options"] == ["automatic", "vq.safetensors"]


def test_the_model_is_handed_to_comfyui_on_the_cpu_and_in_the_hosts_numbers(bundled):
    for network, patcher in ((bundled.image.decoder, bundled.decoder), (bundled.image.tokenizer, bundled.tokenizer)):
        assert patcher.model is network
        assert (patcher.load_device, patcher.offload_device) == (CPU, CPU)
        assert {type(p).__module__ for p in network.modules() if list(p.parameters(recurse=False))} != {"torch.nn"}
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert {p.dtype for p in bundled.image.decoder.parameters()} == {torch.float32}


def test_a_decoder_finds_the_tokenizer_its_file_names(comfy):
    folder = comfy.models / "ar_image" / "set"
    folder.mkdir()
    cut_down(folder / "mine.safetensors", tokenizer="mine_vq.safetensors")
    with pytest.raises(UserError, match=r"mine_vq\.safetensors: there is no such file"):
        run("LoadModel", model="set/mine.safetensors", tokenizer="automatic")
    (folder / "mine_vq.safetensors").write_bytes(LINEAR["checkpoints.library"].bundled_files().tokenizer.read_bytes())
    (model,) = run("LoadModel", model="set/mine.safetensors", tokenizer="automatic")
    assert model.image.files.tokenizer == folder / "mine_vq.safetensors"
    assert model.image.info.config.layers == 1


def test_the_fingerprint_changes_with_the_file_and_not_without(comfy):
    path = cut_down(comfy.models / "ar_image" / "mine.safetensors")
    (path.parent / "vq.safetensors").write_bytes(LINEAR["checkpoints.library"].bundled_files().tokenizer.read_bytes())
    ask = lambda model: NODES["LineAR_LoadModel"].fingerprint_inputs(  # noqa: E731
        model=model, tokenizer="vq.safetensors", grid_rows=0, grid_cols=0
    )
    before = ask("mine.safetensors")
    assert before == ask("mine.safetensors") != ask(BUNDLED)
    cut_down(path, heads="4")
    assert ask("mine.safetensors") != before
    path.unlink()
    assert ask("mine.safetensors") == "", "what is missing is told by the node, not by a warning in the log"


def test_a_missing_file_is_named_with_its_whole_path(comfy):
    expected = comfy.models / "ar_image" / "gone.safetensors"
    with pytest.raises(UserError, match=re.escape(f"{expected}: there is no such file")):
        run("LoadModel", model="gone.safetensors", tokenizer="automatic")


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "..\\secret.safetensors"])
def test_no_name_leads_out_of_the_model_folders(comfy, name):
    cut_down(comfy.models.parent / "secret.safetensors")
    with pytest.raises(UserError, match="leads out of the folder"):
        run("LoadModel", model=name, tokenizer="automatic")


def test_a_truncated_file_and_a_tokenizer_in_the_models_place(comfy):
    folder, files = comfy.models / "ar_image", LINEAR["checkpoints.library"].bundled_files()
    (folder / "cut.safetensors").write_bytes(files.decoder.read_bytes()[:5000])
    (folder / "vq.safetensors").write_bytes(files.tokenizer.read_bytes())
    with pytest.raises(UserError, match=r"cut\.safetensors: .*download it again"):
        run("LoadModel", model="cut.safetensors", tokenizer="vq.safetensors")
    with pytest.raises(UserError, match=r"vq\.safetensors: .*looks like a VQ tokenizer"):
        run("LoadModel", model="vq.safetensors", tokenizer="vq.safetensors")


def test_half_a_grid_and_a_wrong_one():
    with pytest.raises(UserError, match="grid_rows, grid_cols: they are 24 and 0"):
        run("LoadModel", model=BUNDLED, tokenizer="automatic", grid_rows=24)
    with pytest.raises(UserError, match="not 16 x 16"):
        run("LoadModel", model=BUNDLED, tokenizer="automatic", grid_rows=16, grid_cols=16)


# -- plans and prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR["plan"].PRESETS)
def test_presets_are_those_of_the_core(name):
    assert run("LineCache", preset={"preset": name}) == (LINEAR["plan"].PRESETS[name],)


def test_custom_plans_take_the_numbers_as_they_are():
    numbers = {"policy": "h2o", "budget": 6, "anchors": 8, "recent": 3, "release": "lazy"}
    assert run("LineCache", preset={"preset": "Custom", **numbers}) == (CachePlan(**numbers),)
    with pytest.raises(UserError, match="budget: 0 is out of range; choose a whole number from 1 to 256"):
        run("LineCache", preset={"preset": "Custom", **numbers, "budget": 0})


def test_classes_by_name_by_number_and_in_order(bundled):
    (prompt,) = run("ClassPrompt", model=bundled, class_name="ocean dusk", more_classes="\n Starry Night \n0\n\n")
    assert prompt.names == ("ocean dusk", "Starry Night", "0")
    classes = bundled.image.info.classes
    assert prompt.tokens[:, 0].tolist() == [classes.index("ocean dusk"), classes.index("starry night"), 0]


def test_a_class_the_model_does_not_have(bundled):
    with pytest.raises(UserError, match=r"class: landscapes has no class 'spaceship'; choose one of alpine dawn, "):
        run("ClassPrompt", model=bundled, class_name="alpine dawn", more_classes="spaceship")
    with pytest.raises(UserError, match="more_classes: it is empty"):
        run("ClassPrompt", model=bundled, class_name="(only those below)", more_classes=" \n")


# -- drawing ---------------------------------------------------------------------------------------------------------


def test_a_picture_from_four_lines(small, one, comfy):
    (tokens,) = run("Generate", cache=CachePlan(), seed=5, guidance=1.0, **one)
    assert tokens.codes.shape == (1, ROWS, ROWS) and tokens.codes.device == CPU
    assert tokens.shares.shape == (1, ROWS, ROWS, ROWS)
    assert (tokens.shares[:, :-1].sum((2, 3)) <= 4 * ROWS + 0.01).all(), "never more than the budget at a line's end"
    assert tokens.names == ("alpine dawn",) and tokens.plan == CachePlan()
    assert sorted({done for done, _ in comfy.progress if done}) == list(range(1, ROWS + 1)), "the bar counts rows"
    pictures = [data for event, data in comfy.sent if event in ("preview", 4)]
    assert len(pictures) >= 2, "rows are shown while they come, the last picture in any case"
    (image,) = run("Decode", model=small, tokens=tokens)
    assert image.shape == (1, ROWS * FACTOR, ROWS * FACTOR, 3) and image.dtype == torch.float32
    assert 0 <= image.min() and image.max() <= 1


def test_the_bundled_model_draws(bundled):
    (prompt,) = run("ClassPrompt", model=bundled, class_name="ocean dusk")
    cache = CachePlan("fold", 2, recent=0)  # so that a third row evicts
    (tokens,) = run("Generate", model=bundled, cache=cache, prompt=prompt, seed=7, guidance=1.0, stop_after=4)
    assert run("Decode", model=bundled, tokens=tokens)[0].shape == (1, 16, 96, 3)


def test_nothing_but_codes_and_shares_stays_in_memory(one):
    (tokens,) = run("Generate", cache=CachePlan(), seed=5, guidance=1.0, **one)
    gc.collect()
    assert not any(isinstance(thing, LINEAR["cache.line_cache"].LineCache) for thing in gc.get_objects())
    sizes = {name: value.nbytes for name, value in vars(tokens).items() if isinstance(value, torch.Tensor)}
    assert set(sizes) == {"codes", "shares"} and sum(sizes.values()) < 2**17


def test_picture_i_of_a_batch_is_that_of_seed_plus_i(small):
    (prompt,) = run("ClassPrompt", model=small, class_name="ocean dusk", more_classes="winter snow")
    settings = {"model": small, "cache": CachePlan(), "guidance": 3.0}
    (batch,) = run("Generate", prompt=prompt, seed=11, batch_size=2, **settings)
    assert batch.names == ("ocean dusk", "ocean dusk", "winter snow", "winter snow")
    for i, name in enumerate(batch.names):
        (alone,) = run("ClassPrompt", model=small, class_name=name)
        (single,) = run("Generate", prompt=alone, seed=11 + i, **settings)
        assert torch.equal(single.codes[0], batch.codes[i])


def test_the_largest_seed_draws(one):
    (tokens,) = run("Generate", cache=FULL, seed=2**64 - 1, guidance=1.0, **one)
    assert tokens.codes.shape == (1, ROWS, ROWS)


def test_the_host_is_asked_for_what_the_run_takes(one, comfy):
    asked = {}
    for name, plan in (("full", FULL), ("few", CachePlan())):
        run("Generate", cache=plan, seed=1, **one)
        (models, asked[name]), *_ = comfy.loaded
        assert {patcher.model for patcher in models} == {one["model"].image.decoder, one["model"].image.tokenizer}
        shape, grid = one["model"].image.decoder.cache_shape(), one["model"].image.info.grid
        assert asked[name] >= shape.bytes(grid, plan, 2), "two sequences: guidance"
        comfy.loaded.clear()
    saved = shape.bytes(grid, FULL, 2) - shape.bytes(grid, CachePlan(), 2)
    assert asked["full"] - asked["few"] >= saved, "a smaller cache leaves more room for other models"


@pytest.mark.parametrize(("after", "where"), [(3, ""), (3, "MainThread"), (0, "LineAR preview")])
def test_stop_ends_within_a_row_and_frees_everything(one, comfy, after, where):
    """ComfyUI tells of a Stop once, to whoever asks first; the thread that paints the preview asks too."""
    comfy.stop_after, comfy.stop_where = after, where
    with pytest.raises(comfy_double.Interrupted):
        run("Generate", cache=CachePlan(), seed=5, guidance=1.0, **one)
    assert comfy.stops == 1
    if where != "LineAR preview":  # that one is heard when it has its turn
        assert comfy.progress[-1][0] <= after + 1
    gc.collect()
    assert not any(isinstance(thing, LINEAR["cache.line_cache"].LineCache) for thing in gc.get_objects())
    assert not any(thread.name == "LineAR preview" for thread in threading.enumerate())
    comfy.stop_after = None
    (again,) = run("Generate", cache=CachePlan(), seed=5, guidance=1.0, **one)
    assert again.codes.shape == (1, ROWS, ROWS)


def test_a_budget_smaller_than_what_it_protects(one, comfy):
    with pytest.raises(UserError, match=r"budget: 2 lines hold 16 tokens, but 4 anchors and 2 recent lines protect 20"):
        run("Generate", cache=CachePlan(budget=2, recent=2), seed=1, **one)
    assert comfy.loaded == [], "before anything is loaded"


def test_classes_of_another_model(one):
    one["prompt"].tokens[0, 0] = 500
    with pytest.raises(UserError, match=r"prompt: .*12"):
        run("Generate", cache=CachePlan(), seed=1, **one)


# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(small, tmp_path_factory):
    host.reset(tmp_path_factory.mktemp("drawn"))
    asyncio.run(EXTENSION().on_load())
    with torch.inference_mode():
        (prompt,) = run("ClassPrompt", model=small, class_name="desert day", more_classes="foggy forest")
        return run("Generate", model=small, cache=CachePlan(), prompt=prompt, seed=3, guidance=1.0)[0]


def test_decoding_goes_by_parts_where_memory_is_short(small, drawn, comfy):
    (whole,) = run("Decode", model=small, tokens=drawn)
    comfy.free = 1
    (parts,) = run("Decode", model=small, tokens=drawn)
    assert torch.allclose(whole, parts, atol=1e-5)


def test_tokens_of_another_tokenizer(small, drawn):
    foreign = type(drawn)(**{**vars(drawn), "codebook": 16384, "model": "c2i_B_256"})
    with pytest.raises(UserError, match="from c2i_B_256, whose codebook has 16384 codes"):
        run("Decode", model=small, tokens=foreign)


def test_the_map_alone_over_a_picture_and_after_a_row(small, drawn):
    (alone,) = run("RetentionHeatmap", tokens=drawn, show={"show": "lifetime"})
    assert alone.shape == (2, 384, 384, 3)
    cells = alone.unflatten(1, (ROWS, -1)).unflatten(3, (ROWS, -1))
    assert torch.equal(cells.amax((2, 4)), cells.amin((2, 4))), "every token is a square of one colour"
    (little,) = run("RetentionHeatmap", tokens=drawn, show={"show": "lifetime"}, size=100)
    assert little.shape == (2, 104, 104, 3), "at least the size asked for, whole pixels a token"

    (image,) = run("Decode", model=small, tokens=drawn)
    (over,) = run("RetentionHeatmap", tokens=drawn, show={"show": "lifetime"}, image=image)
    assert over.shape == image.shape and not torch.allclose(over, image, atol=0.05)
    (faint,) = run("RetentionHeatmap", tokens=drawn, show={"show": "lifetime"}, image=image, strength=0.0)
    assert torch.allclose(faint, image, atol=1e-6), "strength 0 is the picture"

    (early,) = run("RetentionHeatmap", tokens=drawn, show={"show": "after a row", "row": 3})
    undrawn = early[:, 3 * 384 // ROWS :]
    assert torch.equal(undrawn, undrawn[:, -1:, -1:].expand_as(undrawn)), "the rows below have nothing to keep"
    third = early[:, 2 * 384 // ROWS : 3 * 384 // ROWS]
    assert (third != undrawn[:, :1, :1]).any(-1).all(), "the third row itself was just drawn, and is held"
    (last,) = run("RetentionHeatmap", tokens=drawn, show={"show": "after a row", "row": ROWS})
    (beyond,) = run("RetentionHeatmap", tokens=drawn, show={"show": "after a row", "row": 99})
    assert torch.equal(last, beyond) and not torch.equal(last, early)


def test_one_picture_serves_many_maps_and_other_numbers_do_not(drawn):
    (over,) = run("RetentionHeatmap", tokens=drawn, show={"show": "lifetime"}, image=torch.rand(1, 48, 48, 4))
    assert over.shape == (2, 48, 48, 3)
    with pytest.raises(UserError, match="image: 3 images do not match 2 token grids"):
        run("RetentionHeatmap", tokens=drawn, show={"show": "lifetime"}, image=torch.rand(3, 48, 48, 3))
