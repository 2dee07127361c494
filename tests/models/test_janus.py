"""Janus from its files: folders of shards, what is refused, memory to load and to draw, batches in parts."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from linear_core.__main__ import main
from linear_core.cache.line_cache import LineCache
from linear_core.checkpoints.families import ModelInfo, janus
from linear_core.checkpoints.library import (
    ModelFiles,
    decoder_bytes,
    find_checkpoints,
    find_tokenizer,
    load_model,
    read_info,
)
from linear_core.errors import UserError
from linear_core.grid import Grid
from linear_core.loop.memory import run_bytes
from linear_core.models.janus import Janus, JanusConfig
from linear_core.plan import PRESETS, SamplePlan
from tests.models import official_janus
from tests.models.official_janus import config

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pickled shards, as the official 7B has two; q, k and v of a layer are in different ones."""
    path = tmp_path_factory.mktemp("models") / "Janus-Pro-7B"
    official_janus.write(path, shards=3)
    return path


def files(path: Path) -> ModelFiles:
    return ModelFiles(path, find_tokenizer(path))


# -- files -------------------------------------------------------------------------------------------------------------


def test_an_official_folder_is_known_by_its_header(folder: Path) -> None:
    info = read_info(folder)
    assert info.name == "Janus-Pro-7B" and info.family is janus.FAMILY and info.config == config()
    assert (info.grid.rows, info.grid.cols, info.defaults.guidance) == (24, 24, 5.0)
    assert info.text and info.own_tokenizer and not info.classes
    assert find_tokenizer(folder) == folder, "the tokenizer is in it"
    assert find_checkpoints([folder.parent]) == [folder], "a model of several files is its folder"
    shard = next(folder.glob("*.bin"))
    assert read_info(shard) == info, "and any of its files stands for it"


@pytest.mark.parametrize(("shards", "suffix"), [(1, ".bin"), (1, ".safetensors"), (2, ".safetensors")])
def test_shards_and_formats_do_not_matter(shards: int, suffix: str, folder: Path, tmp_path: Path) -> None:
    official_janus.write(tmp_path / "other", shards=shards, suffix=suffix)
    one, other = (load_model(files(path)) for path in (folder, tmp_path / "other"))
    for network in ("decoder", "tokenizer"):
        mine, same = (getattr(model, network).state_dict() for model in (one, other))
        assert all(torch.equal(weight, same[name]) for name, weight in mine.items())
    assert {p.dtype for p in one.tokenizer.parameters()} == {torch.float32}


def test_loaded_weights_are_the_files(folder: Path) -> None:
    """Queries, keys and values lie in one matrix; nothing else is moved. Pictures are not read, nor is text written."""
    model = load_model(files(folder), dtype=torch.bfloat16)
    expected = official_janus.decoder(config())
    for name, weight in model.decoder.state_dict().items():
        assert torch.equal(weight, expected[name].bfloat16()), name
    assert model.tokenizer.config.encoder_widths, "Encode Image needs it"


def broken(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "Janus-Pro-1B"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_what_is_missing_or_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    copy = broken(folder, tmp_path)
    shard = sorted(copy.glob("*.bin"))[1]
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: there is no such file"):
        load_model(files(copy))
    shard.write_bytes(kept[:5000])
    with pytest.raises(UserError, match=f"{shard.name}: not a checkpoint that can be read safely"):
        load_model(files(copy))
    shard.write_bytes(kept)
    weights = torch.load(shard, weights_only=True)
    (part,) = [name for name in weights if "layers.1.self_attn" in name and "o_proj" not in name][:1]
    torch.save({name: tensor for name, tensor in weights.items() if name != part}, shard)
    with pytest.raises(UserError, match=r"Janus-Pro-1B: lacks 1 of .*'layers.1.attention.wqkv.weight'"):
        load_model(files(copy))
    torch.save(weights | {part: torch.zeros(3, 64, dtype=torch.bfloat16)}, shard)
    with pytest.raises(UserError, match=rf"'{part}' is \[3, 64\] where \[64, 64\] was expected"):
        load_model(files(copy))
    torch.save(weights, shard)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: cannot be read as a tokenizer"):
        load_model(files(copy)).prompt(["a fox"])
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json: there is no such file"):
        load_model(files(copy)).prompt(["a fox"])
    official_janus.text_tokenizer(copy / "tokenizer.json", ["<begin_of_image>"])
    with pytest.raises(UserError, match=r"has no token <.begin.of.sentence.>"):
        load_model(files(copy)).prompt(["a fox"])
    index = next(copy.glob("*.index.json"))
    index.write_text("[]")
    with pytest.raises(UserError, match="does not list the model's files"):
        load_model(files(copy))
    with pytest.raises(UserError, match="24 x 24 tokens, not 16 x 16"):
        load_model(ModelFiles(folder, folder), grid=(16, 16))


def test_an_index_leads_nowhere_else(folder: Path, tmp_path: Path) -> None:
    """Not even to files that are there; what it names below the folder is taken."""
    copy = broken(folder, tmp_path)
    index = next(copy.glob("*.index.json"))
    whole = json.loads(index.read_text())
    for place in ("../Janus-Pro-1B", copy):
        index.write_text(json.dumps({"weight_map": {k: f"{place}/{f}" for k, f in whole["weight_map"].items()}}))
        with pytest.raises(UserError, match=rf"{index.name}: .* leads out of the folder"):
            read_info(copy)
    (copy / "below").mkdir()
    for file in copy.glob("*.bin"):
        file.rename(copy / "below" / file.name)
    index.write_text(json.dumps({"weight_map": {k: f"below/{f}" for k, f in whole["weight_map"].items()}}))
    assert read_info(copy).config == config()


def test_tokenizers_do_not_mix(folder: Path, tmp_path: Path) -> None:
    from tests.models import official

    other = tmp_path / "vq_ds16_c2i.pt"
    torch.save({"model": official.tokenizer(channels=16)}, other)
    with pytest.raises(UserError, match="comes with its own"):
        load_model(ModelFiles(folder, other))
    decoder = tmp_path / "c2i_B_384.pt"
    torch.save({"model": official.decoder("c2i", layers=1)}, decoder)
    with pytest.raises(UserError, match="another model's tokenizer"):
        load_model(ModelFiles(decoder, folder))


def test_the_old_roles_where_the_new_ones_are_no_tokens(tmp_path: Path) -> None:
    """Janus-1.3B's chat says User and Assistant; Janus-Pro's has tokens for them."""
    from linear_core.prompts.janus import BEGIN, IMAGE, PAD, ROLES, janus_prompt
    from linear_core.prompts.tokenizer import TextTokenizer

    texts = {}
    for name, special in (("old", [PAD, BEGIN, IMAGE]), ("new", [PAD, BEGIN, IMAGE, *ROLES])):
        official_janus.text_tokenizer(tmp_path / name, special)
        words = TextTokenizer(tmp_path / name)
        row = janus_prompt(words, ["a fox"]).tokens[0].tolist()
        assert row[0] == words.id(BEGIN) and row[-1] == words.id(IMAGE)
        texts[name] = words._tokenizer.decode(row[1:-1], skip_special_tokens=False)
    assert texts == {"old": "User: a fox\n\nAssistant:", "new": "<|User|>: a fox\n\n<|Assistant|>:"}


# -- memory ------------------------------------------------------------------------------------------------------------

PEAK = """
    import sys, threading, torch
    from pathlib import Path
    from linear_core.checkpoints import weights
    from linear_core.checkpoints.library import ModelFiles, load_model

    weights.CHUNK_BYTES = 2**23  # as small against this model as it is against a published one

    def resident():  # all that the process has in memory, pages of files included: KiB
        for line in open("/proc/self/status"):
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024

    small, path = map(Path, sys.argv[1:])
    load_model(ModelFiles(small, small), dtype=torch.bfloat16)  # what a process allocates once, for anything
    peak, done = 0, threading.Event()
    def watch():
        global peak
        while not done.wait(0.0005):
            peak = max(peak, resident())
    before = resident()
    thread = threading.Thread(target=watch); thread.start()
    model = load_model(ModelFiles(path, path), dtype=torch.bfloat16)
    done.set(); thread.join()
    held = sum(p.nbytes for network in (model.decoder, model.tokenizer) for p in network.parameters())
    largest = max(p.nbytes for p in model.decoder.parameters())
    assert "sympy" not in sys.modules, "torch's compiler was imported, which takes seconds"
    print(max(peak, resident()) - before, held, largest)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_loading_takes_little_more_than_the_weights(suffix: str, folder: Path, tmp_path: Path) -> None:
    """A piece of the files at a time, never the model twice; measured in a process of its own."""
    sizes = config(layers=6, width=768, heads=6, codes=512, vocabulary=1000)
    official_janus.write(tmp_path / "model", sizes, shards=1, suffix=suffix)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), str(folder), str(tmp_path / "model")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    taken, held, largest = map(int, done.stdout.split())
    assert held > 60e6, "large against everything else that a process allocates"
    assert taken < held + 2 * largest + 2**23 + 15e6, f"{taken / 1e6:.0f} MB for {held / 1e6:.0f} MB of weights"


SEVEN = JanusConfig(30, 4096, 32, 11008, 16384, 102400, code_dim=8, head_hidden=4096)  # Janus-Pro-7B


def test_the_plan_of_the_7b_is_what_it_takes() -> None:
    """Weights and caches in full size, on the meta device: counted in the tensors, and by formula."""
    info = ModelInfo("Janus-Pro-7B", janus.FAMILY, SEVEN, Grid(24, 24), (), SamplePlan(guidance=5.0), 0)
    with torch.device("meta"):
        decoder = Janus(SEVEN, info.grid).to(torch.bfloat16)
    assert decoder_bytes(info, torch.bfloat16) == sum(p.nbytes for p in decoder.parameters())
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(6.6e9, rel=0.01), "no SigLIP, no lm_head"
    matrices = sum(p.numel() for n, p in decoder.named_parameters() if n.startswith("layers.") and p.ndim == 2)
    half = decoder_bytes(info, torch.bfloat16, torch.float8_e4m3fn)
    assert half == decoder_bytes(info, torch.bfloat16) - matrices and half < 7.2e9, "fits a card of 8 GB"
    for images in (1, 16):
        for plan in PRESETS.values():
            shape, rows = decoder.cache_shape(40), 2 * images
            assert shape == info.cache_shape(torch.bfloat16, 40)
            cache = LineCache(shape, rows, info.grid.after(40), plan, dtype=torch.bfloat16, device="meta")
            assert cache.nbytes == shape.bytes(info.grid, plan, rows) == cache.keys.nbytes + cache.values.nbytes
            allocated = sum(t.nbytes for t in (cache.keys, cache.values, cache.bias, cache.index, cache.target))
            assert allocated <= run_bytes(shape, info.grid, plan, rows, SEVEN.codes)
    few, full = (info.cache_shape(torch.bfloat16, 40).bytes(info.grid, PRESETS[p], 32) for p in ("Balanced", "Full"))
    assert full / 2**30 == pytest.approx(9.02, abs=0.01) and few / full == pytest.approx(160 / 616)


def test_the_command_line_draws_texts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(janus, "SIDE", 8)  # a picture of 24 x 24 takes seconds
    asked = ["generate", str(folder), "--text", "a fox", "--images", "2", "--size", "0", "--dtype", "float32"]
    for name, more in (("whole", []), ("parts", ["--at-once", "1"]), ("away", ["--negative", "rain"])):
        assert main([*asked, *more, "--out", str(tmp_path / f"{name}.png")]) == 0
    whole, parts, away = (
        [(tmp_path / f"{n}_0{i}.png").read_bytes() for i in (1, 2)] for n in ("whole", "parts", "away")
    )
    assert whole == parts != away
    best = tmp_path / "best.png"
    assert main([*asked, "--best", "1", "--by", "vqa", "--out", str(best)]) == 0
    assert best.read_bytes() != (tmp_path / "best_sheet.png").read_bytes()
    notes = json.loads(Image.open(best).text["linear"])
    chosen, *drawn = (np.array(Image.open(path)).astype(int) for path in (best, *sorted(tmp_path.glob("whole_*.png"))))
    apart = [int(abs(chosen - each).max()) for each in drawn]  # rounding: it is decoded by itself
    assert notes["by"] == "vqa" and apart[notes["seed"]] <= 1 < apart[1 - notes["seed"]]
    capsys.readouterr()
    assert main(["plan", str(folder), "--images", "16"]) == 0
    said = capsys.readouterr().out
    assert "weights in memory" in said and "32 sequences" in said
    assert main(["generate", str(folder)]) == 2 and "--text" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "x.safetensors")]) == 2
    assert "only LlamaGen's need converting" in capsys.readouterr().err
