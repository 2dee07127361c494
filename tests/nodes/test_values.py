"""Workflows from strangers: whatever a widget holds, the schema catches it or a node says in a sentence what is wrong.

`values.host` stands for ComfyUI's own check; test_host.py holds it, and every outcome, to a real one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.nodes import comfy_double
from tests.nodes.test_nodes import NODES, UserError, comfy, run, small  # noqa: F401 (fixtures)
from tests.nodes.values import GRAPH, MISSING, SCHEMAS, Case, cases, declared, host, nested

CASES = list(cases())
# What may be anything: texts, what our page draws where no code reads it, and a sampling setting that is "the model's".
ANYTHING = {"more_classes", "text", "negative_text", "memory", "view"}


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
    assert harmless, f"{case}: taken without a word"


def test_rows_handed_back_by_no_widget(objects):
    """`view` is read where rows are to stay, whatever it is."""
    settings = {**GRAPH["LineAR_Generate"], "keep_rows": 2}
    for view in (7, [1, 2, 3], "nonsense", {"a": 1}, "1x1:", "1x2x3:%%%"):
        with pytest.raises(UserError, match="view: the rows kept on the node cannot be read"):
            NODES["LineAR_Generate"].execute(
                **{name: linked(value, objects) for name, value in {**settings, "view": view}.items()}
            )
