"""Files of any content at all: a model, or a sentence that says what is wrong, and never another exception.

hypothesis draws bytes, headers, configs and names, always the same ones (`derandomize`), so that a run can be repeated.
`python -m pytest tests/checkpoints/test_fuzz_files.py` runs this; the dev dependencies have hypothesis.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from linear_core.checkpoints.library import read_info
from linear_core.checkpoints.untrusted import inside
from linear_core.errors import UserError
from tests.checkpoints import bad_files
from tests.checkpoints.bad_files import LAYOUTS

pytest.importorskip("hypothesis")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st

SECONDS = 10
fuzz = settings(max_examples=150, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module", autouse=True)
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    with bad_files.good(tmp_path_factory.mktemp("good")) as found:
        yield found


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def either(load: Callable[[Path], object], path: Path) -> None:
    """A model, or a sentence. Any other exception fails the test."""
    started = time.process_time()
    try:
        load(path)
    except UserError as error:
        assert str(error).isprintable()
    assert time.process_time() - started < SECONDS


SHAPES = st.lists(
    st.one_of(st.integers(-1, 8), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3)), max_size=4
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "U64", "C64", ""]),
        "shape": SHAPES,
        "data_offsets": st.lists(st.integers(-1, 2**33), min_size=0, max_size=3),
    }
)
KEYS = st.sampled_from([*bad_files.decoder(), *bad_files.vq(), "layers.7.x", "layers.x.y", "gen_embed.weight", "x"])


def packed(header: object, content: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


@fuzz
@given(content=st.binary(max_size=300), suffix=st.sampled_from([".safetensors", ".pt", ".ckpt"]))
def test_any_bytes(content: bytes, suffix: str, scratch: Path) -> None:
    for beginning in (b"", b"PK\3\4", struct.pack("<Q", len(content))):
        path = scratch / f"any{suffix}"
        path.write_bytes(beginning + content)
        either(bad_files.load_from, path)


@fuzz
@given(header=st.dictionaries(KEYS, ENTRY | JSON, max_size=6), notes=JSON, content=st.binary(max_size=64))
def test_any_header(header: dict[str, object], notes: object, content: bytes, scratch: Path) -> None:
    path = scratch / "header.safetensors"
    path.write_bytes(packed({"__metadata__": notes, **header}, content))
    either(read_info, path)
    either(bad_files.load_from, path)


@fuzz
@given(shapes=st.dictionaries(KEYS, st.lists(st.integers(0, 5), max_size=4), max_size=12))
def test_any_shapes(shapes: dict[str, list[int]], scratch: Path) -> None:
    """A file in order, of weights that do not belong together."""
    path = scratch / "shapes.safetensors"
    path.write_bytes(save({key: torch.zeros(shape) for key, shape in shapes.items()}, bad_files.NOTES))
    either(bad_files.load_from, path)


@fuzz
@given(shape=SHAPES, key=KEYS)
def test_a_whole_model_with_one_other_shape(shape: list[object], key: str, scratch: Path) -> None:
    sizes = [min(abs(int(n)), 8) for n in shape if isinstance(n, int)]
    path = scratch / "other.safetensors"
    path.write_bytes(save(bad_files.decoder() | {key: torch.zeros(sizes)}, bad_files.NOTES))
    either(read_info, path)


@pytest.mark.parametrize("layout", ["llamagen", "llamagen pt", "janus bin", "lumina", "anole", "t5"])
@settings(fuzz, max_examples=30)
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6), data=st.data())
def test_a_few_other_bytes(
    layout: str, places: list[tuple[float, int]], data: st.DataObject, made: dict[str, Path], scratch: Path
) -> None:
    """At any place of a good file; most often where it is described, as the rest is numbers."""
    file = data.draw(st.sampled_from(list(LAYOUTS[layout].files)))
    folder = scratch / layout
    if not folder.exists():
        shutil.copytree(made[layout], folder)
    good = (made[layout] / file).read_bytes()
    content = bytearray(good)
    described = data.draw(st.sampled_from([*descriptions(good), (0, len(good))]))
    for share, byte in places:
        content[described[0] + int(share * (described[1] - described[0] - 1))] = byte
    (folder / file).write_bytes(content)
    either(LAYOUTS[layout].load, folder / LAYOUTS[layout].model)
    (folder / file).write_bytes(good)


def descriptions(content: bytes) -> list[tuple[int, int]]:
    """Where a file says what is in it: safetensors' header; a zip's list of weights, and its directory."""
    if not content.startswith(b"PK"):
        return [(0, 8), (8, 8 + int.from_bytes(content[:8], "little"))]
    begin = content.index(b"data.pkl")
    return [(begin, content.index(b"PK", begin)), (content.index(b"PK\1\2"), len(content))]


@pytest.mark.parametrize("layout", bad_files.CONFIGS)
@fuzz
@given(config=JSON, name=st.sampled_from(["", "language_config", "vocabulary_map", "rope_parameters", "rms_norm_eps"]))
def test_any_config(layout: str, config: object, name: str, made: dict[str, Path], scratch: Path) -> None:
    folder = scratch / f"{layout} config"
    if not folder.exists():
        shutil.copytree(made[layout], folder)
    path = folder / bad_files.CONFIGS[layout]
    whole = json.loads((made[layout] / bad_files.CONFIGS[layout]).read_text())
    path.write_text(json.dumps({**whole, name: config} if name else config))
    either(read_info, folder / LAYOUTS[layout].model)


@pytest.mark.parametrize("layout", bad_files.INDEXES)
@settings(fuzz, max_examples=30)
@given(index=JSON, names=st.none() | st.lists(st.text(max_size=12) | JSON, max_size=3))
def test_any_index(
    layout: str, index: object, names: list[object] | None, made: dict[str, Path], scratch: Path
) -> None:
    folder = scratch / f"{layout} index"
    if not folder.exists():
        shutil.copytree(made[layout], folder)
    content = index if names is None else {"weight_map": {str(n): name for n, name in enumerate(names)}}
    (folder / bad_files.INDEXES[layout]).write_text(json.dumps(content))
    either(LAYOUTS[layout].load, folder / LAYOUTS[layout].model)


@fuzz
@given(
    name=st.text(max_size=40)
    | st.lists(st.sampled_from(["..", "a", "/", "\\", "C:", ".", "~", ""]), max_size=6).map("".join)
)
def test_no_name_leads_out(name: str) -> None:
    folder = Path("/models/here")
    try:
        found = inside(folder, name)
    except ValueError:
        return
    assert os.path.normpath(found).startswith(os.path.normpath(folder))
    assert ".." not in re.split(r"[/\\]", name) and not re.match(r"[/\\]|[A-Za-z]:", name)


@fuzz
@given(pickle=st.binary(min_size=1, max_size=60))
def test_any_list_of_weights(pickle: bytes, scratch: Path) -> None:
    """Any opcodes, in an archive that is in order."""
    path = scratch / "opcodes.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + pickle + b".")
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
    either(bad_files.load_from, path)
