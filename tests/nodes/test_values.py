"""Workflows from strangers: whatever a widget holds, the schema catches it or a node says in a sentence what is wrong.

`values.host` stands for ComfyUI's own check; test_host.py holds it, and every outcome, to a real one.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.nodes import comfy_double
from tests.nodes.comfy_double import PACK
from tests.nodes.test_nodes import NODES, UserError, comfy, run, small  # noqa: F401 (fixtures)
from tests.nodes.values import (
    DYNAMIC,
    GRAPH,
    MISSING,
    OWN_CHECK,
    SCHEMAS,
    TYPED,
    UNLIKE,
    WORDS,
    Case,
    cases,
    declared,
    host,
    masks,
    nested,
    no_masks,
    no_pictures,
    pictures,
    sockets,
)

CASES = list(cases())
# What may be anything: texts, what is yes or no to ComfyUI, what our page draws where no code reads it, and a sampling
# setting that is "the model's".
ANYTHING = {"more_classes", "text", "negative_text", "memory", "view", "stream_weights"}


@pytest.fixture(autouse=True)
def text_encoders(comfy):  # noqa: F811
    """A folder of every ComfyUI, here empty."""
    comfy_double.folder_names_and_paths["text_encoders"] = ([str(comfy.models / "text_encoders")], {".safetensors"})


@pytest.fixture(scope="module")
def objects(small, tmp_path_factory) -> dict[str, Any]:  # noqa: F811
    """What each node of the graph puts out."""
    with torch.inference_mode():
        made = {"LineAR_LoadModel": small, "LineAR_LineCache": run("LineCache", preset={"preset": "LineAR"})[0]}
        (made["LineAR_ClassPrompt"],) = run("ClassPrompt", model=small, class_name="alpine dawn")
        settings = {"model": small, "cache": made["LineAR_LineCache"], "prompt": made["LineAR_ClassPrompt"]}
        (made["LineAR_Generate"],) = run("Generate", seed=5, stop_after=1, **settings)
        (made["LineAR_Decode"],) = run("Decode", model=small, tokens=made["LineAR_Generate"])
    return made


def linked(value: Any, objects: dict[str, Any]) -> Any:
    return objects.get(value, value) if isinstance(value, str) else value


def test_every_widget_of_every_node_is_tried():
    tried = {(case.node, case.name) for case in CASES}
    expected = {(node, name) for node, given in GRAPH.items() for name, *_ in declared(SCHEMAS[node]["input"], given)}
    assert tried == expected and set(GRAPH) == set(SCHEMAS) == set(NODES)
    assert len(CASES) > 400


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_value_is_caught_or_answered_in_one_sentence(case: Case, objects):
    """Nothing but UserError comes out of a node; what it takes without a word is harmless."""
    given = host(case)
    if given is None:
        return
    if case.node == "LineAR_DownloadModel":
        assert case.kind == "BOOLEAN", "it would fetch something"
        return
    inputs = {name: linked(value, objects) for name, value in nested(case.node, given).items()}
    node = NODES[case.node]
    if case.node in ("LineAR_LoadModel", "LineAR_TextPrompt"):  # their own checks come first
        names = {"LineAR_LoadModel": {"model", "tokenizer"}, "LineAR_TextPrompt": {"text_encoder", "model"}}[case.node]
        told = node.validate_inputs(**{name: given.get(name) for name in names if name in given})
        if told is not True:
            assert isinstance(told, str) and told.endswith(".") and "\n" not in told
            return
    try:
        node.execute(**inputs)
    except UserError as error:
        assert "\n" not in str(error) and str(error).endswith(".")
        assert len(str(error)) < 500
        return
    harmless = case.name in ANYTHING or case.value is MISSING or (case.value is None and not case.required)
    harmless |= (case.name, case.value) == ("seeds", 7)  # which is a seed
    assert harmless, f"{case}: taken without a word"


def test_rows_handed_back_by_no_widget(objects):
    """`view` is read where rows are to stay, whatever it is."""
    settings = {**GRAPH["LineAR_Generate"], "keep_rows": 2}
    for view in (7, [1, 2, 3], "nonsense", {"a": 1}, "1x1:", "1x2x3:%%%"):
        with pytest.raises(UserError, match="view: the rows kept on the node cannot be read"):
            NODES["LineAR_Generate"].execute(
                **{name: linked(value, objects) for name, value in {**settings, "view": view}.items()}
            )


# -- through links -----------------------------------------------------------------------------------------------------

SOCKETS = list(sockets())
MAKES = {
    "LINEAR_MODEL": "LineAR_LoadModel", "LINEAR_CACHE": "LineAR_LineCache", "LINEAR_PROMPT": "LineAR_ClassPrompt",
    "LINEAR_TOKENS": "LineAR_Generate",
}  # fmt: skip
FILES = {*OWN_CHECK, ("LineAR_LoadModel", "tokenizer")}
inputs_of = importlib.import_module(f"{PACK}.nodes.inputs").checked(lambda cls, **taken: taken)  # what `execute` gets


def with_link(node: str, name: str, value: Any, objects: dict[str, Any]) -> dict[str, Any]:
    """The node's inputs as ComfyUI hands them over, with `value` through a link into one of them."""
    given = {key: linked(entry, objects) for key, entry in GRAPH[node].items()} | {name: value}
    if f"{name}." in "".join(given):  # a choice that is linked is handed over alone, and no settings with it
        return {key: entry for key, entry in given.items() if "." not in key}
    return nested(node, given)


def taken_from(node: str, name: str, value: Any, objects: dict[str, Any]) -> Any:
    got = inputs_of(NODES[node], **with_link(node, name, value, objects))
    outer, _, inner = name.partition(".")
    return got[outer][inner] if inner else got.get(outer)


def refused(node: str, name: str, value: Any, objects: dict[str, Any]) -> None:
    """By the node itself, in one sentence that begins with the input's name."""
    with pytest.raises(UserError) as caught:
        NODES[node].execute(**with_link(node, name, value, objects))
    told = str(caught.value)
    assert told.startswith(f"{name.rpartition('.')[2]}: ") and told.endswith(".") and len(told) < 600, told


def values_for(node: str, name: str, kind: str, options: Any, objects: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """What an input takes, with what it then is, and what it refuses."""
    if kind == "IMAGE":
        return pictures(), no_pictures()
    if kind == "MASK":
        return masks(), no_masks()
    if kind in ("CLIP", "CLIP_VISION"):
        half = SimpleNamespace(tokenize=len, encode_from_tokens=len, encode_image=len)
        return [(half, half)], [*WORDS, *objects.values()]
    if kind in MAKES:
        own = objects[MAKES[kind]]
        others = [other for key, other in objects.items() if key != MAKES[kind]]
        return [(own, own)], [*WORDS, "LineAR_Nothing", [own], (own,), *others]
    good, wrong = TYPED[kind](GRAPH[node][name]), list(UNLIKE[kind])
    if "min" in options:
        wrong += [options["min"] - 1, options["max"] + 1, np.float64(options["min"] - 1), str(options["max"] + 1)]
    for option in options["options"] if kind == DYNAMIC else ():
        key, settings = option["key"], option["inputs"]["required"]
        wrong += [key] if settings else []
        good += [] if settings else [(key, {name: key})]
    if (node, name) in FILES:  # which the node looks for, and other tests too
        wrong = [value for value in wrong if not isinstance(value, str)]
    return good, wrong


def same(ours: Any, expected: Any) -> bool:
    return torch.equal(ours, expected) if isinstance(ours, torch.Tensor) else ours == expected


@pytest.mark.parametrize("socket", SOCKETS, ids=lambda socket: f"{socket[0]}.{socket[1]}")
def test_whatever_comes_through_a_link(socket, objects):
    """Every input of every node: what stands for a value is that value, all else is refused before anything is done."""
    node, name, kind, options, required = socket
    good, wrong = values_for(node, name, kind, options, objects)
    assert len(good) > 0 and len(wrong) > 10
    for value, expected in good:
        got = taken_from(node, name, value, objects)
        assert type(got) is type(expected) and same(got, expected), f"{value!r} became {got!r}"
    for value in wrong:
        refused(node, name, value, objects)
    if required:
        refused(node, name, None, objects)
    else:
        assert taken_from(node, name, None, objects) is None


def test_numbers_through_links_draw_what_typed_ones_draw(objects):
    """Bit for bit, whatever kind they are of; and what the node has no input for is left out, as ComfyUI does."""
    settings = {key: linked(value, objects) for key, value in GRAPH["LineAR_Generate"].items()}
    typed = settings | {"seed": 2**53 + 1, "batch_size": 2, "top_k": 9, "guidance": 2.0, "guidance_interval": -1}
    (expected,) = NODES["LineAR_Generate"].execute(**typed).result
    through = typed | {"seed": np.uint64(2**53 + 1), "batch_size": "2", "top_k": torch.tensor(9), "foo": object()}
    del through["guidance_interval"]  # a prompt written by hand may leave it out
    (drawn,) = NODES["LineAR_Generate"].execute(**through).result
    assert torch.equal(drawn.codes, expected.codes) and torch.equal(drawn.shares, expected.shares)
    (plan,) = NODES["LineAR_LineCache"].execute(preset="Small", **{"preset.budget": 9}).result
    assert plan.budget == 3


def test_a_choice_that_comes_through_a_link_brings_no_settings(objects):
    """ComfyUI leaves out what is set beside it: refused, as other settings than those on the node would be used."""
    with pytest.raises(UserError, match="preset: 'Custom' has settings, which a link does not bring along"):
        NODES["LineAR_LineCache"].execute(preset="Custom", memory="")


def test_fingerprints_of_what_comes_through_a_link(comfy):  # noqa: F811
    """It is not known yet then (None): any file of the folder may be meant, and a download is asked for anew."""
    load = NODES["LineAR_LoadModel"].fingerprint_inputs
    before = load(model=None, tokenizer="automatic", grid_rows=None, grid_cols=None)
    (comfy.models / "ar_image" / "new.safetensors").write_bytes(b"a file")
    assert before != load(model=None, tokenizer=None) != load(model="landscapes (bundled)", tokenizer="automatic")
    download = NODES["LineAR_DownloadModel"].fingerprint_inputs
    assert download(release=None, with_needed=None) == "" and download(release="vq_ds16_c2i", with_needed=False) == "0"


@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1), (1, 1), (3, 500)])
def test_a_strip_is_scaled_no_further_than_what_is_seen_of_it(size, monkeypatch):
    """1 x 40000 pixels at 96 rows would be 4 GB; of the middle nothing changes."""
    encode = importlib.import_module(f"{PACK}.linear_core.pictures.fit")
    made = []
    scale = encode.F.interpolate
    monkeypatch.setattr(
        encode.F, "interpolate", lambda image, size, **how: made.append(size) or scale(image, size, **how)
    )
    ramp = torch.linspace(0, 1, size[0] * size[1]).view(1, *size, 1).expand(-1, -1, -1, 3)
    fitted = encode.fit(ramp, 32, 32)
    assert fitted.shape == (1, 3, 32, 32) and max(made[0]) <= 32 * 10
    assert abs(float(fitted.mean()) - float(ramp.mean())) < 0.01
