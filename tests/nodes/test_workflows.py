"""The workflows that come with the pack: they open as they were saved, and their API twins say the same.

A twin that no longer fits is written anew by `python tests/nodes/test_workflows.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "workflows"
SCHEMAS = json.loads((ROOT / "tests" / "fixtures" / "object_info.json").read_text(encoding="utf-8"))
FILES = sorted(FOLDER.glob("*.json"))
OFFERED = ("first_image", "full_vs_few_lines", "budget_sweep")  # at least
# ComfyUI's own nodes that our floor, 0.14, has as well; looked up there when one is added.
CORE = {"ImageScaleBy", "ImageStitch", "ImageGrid", "RebatchImages", "PrimitiveInt", "SaveImage", "PreviewImage"}
CORE |= {"LoadImage", "ImageCompare", "PreviewAny", "SolidMask", "MaskComposite"}
NOTES = {"MarkdownNote", "Note"}  # the page's own
CONTROL = ("fixed", "increment", "decrement", "randomize")  # what a widget beside a seed may say
ON_DISK = ("model", "tokenizer", "text_encoder", "image")  # choices that depend on what somebody has


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def drawn(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes that run: neither notes nor muted ones."""
    return [node for node in workflow["nodes"] if node["type"] not in NOTES and node["mode"] == 0]


def widgets(node: dict[str, Any]) -> dict[str, Any]:
    """Values by name, from the names of a node's inputs and the order of its values."""
    values, found = list(node.get("widgets_values") or []), {}
    for entry in node["inputs"]:
        if "widget" in entry:
            found[entry["name"]] = values.pop(0)
            if values and values[0] in CONTROL:
                values.pop(0)
            if entry["name"] == "stop_after" and values:  # behind it Generate's view keeps lines, and has no input
                assert values.pop(0) == ""
    assert values == [], f"node {node['id']}, {node['type']}: {values} belong to no widget"
    return found


def to_api(workflow: dict[str, Any]) -> dict[str, Any]:
    """What the page would send to /prompt."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in drawn(workflow):
        links = {e["name"]: sources[e["link"]] for e in node["inputs"] if e.get("link") is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": {**widgets(node), **links}}
    return prompt


def expected(schema: dict[str, Any], values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inputs that a node has, by name: type and options, those of a chosen option included."""
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *more) in schema.get(group, {}).items():
            options = more[0] if more else {}
            if options.get("socketless"):
                continue  # drawn by our page, and not saved
            found[prefix + name] = kind, options, group
            if kind == "COMFY_DYNAMICCOMBO_V3":
                chosen = [o for o in options["options"] if o["key"] == values[prefix + name]]
                assert chosen, f"{prefix}{name}: '{values[prefix + name]}' is no option"
                found |= expected(chosen[0]["inputs"], values, f"{prefix}{name}.")
    return found


def test_what_is_offered():
    assert set(OFFERED) <= {path.stem for path in FILES}
    assert sorted(p.name for p in FOLDER.glob("api/*.json")) == [path.name for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_nodes_and_values_fit_the_schemas(path):
    for node in read(path)["nodes"]:
        if node["type"] in NOTES | CORE:
            continue
        assert node["type"] in SCHEMAS, f"{node['type']} is neither ours nor known to be in every ComfyUI we support"
        values = widgets(node)
        inputs = expected(SCHEMAS[node["type"]]["input"], values)
        assert [e["name"] for e in node["inputs"]] == list(inputs), f"node {node['id']}, {node['type']}"
        assert [e["name"] for e in node["outputs"]] == SCHEMAS[node["type"]]["output_name"]
        for entry in node["inputs"]:
            name = entry["name"]
            kind, options, group = inputs[name]
            assert entry["type"] == kind
            if "widget" not in entry:
                assert group == "optional" or entry["link"] is not None or node["mode"], f"{name} is not connected"
                continue
            value = values[name]
            if kind == "COMBO" and name not in ON_DISK:
                assert value in options["options"], f"{name}: '{value}' is no option"
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], name
            assert isinstance(value, {"INT": int, "FLOAT": int | float, "BOOLEAN": bool}.get(kind, str)), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_links_lead_from_outputs_to_inputs(path):
    workflow = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and workflow["last_node_id"] >= max(nodes)
    for number, source, output, target, slot, _ in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
    ends = [entry["link"] for node in nodes.values() for entry in node["inputs"] if entry.get("link") is not None]
    assert sorted(ends) == sorted(link[0] for link in workflow["links"])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_twin_says_the_same(path):
    twin = {
        key: {k: v for k, v in node.items() if k != "_meta"} for key, node in read(FOLDER / "api" / path.name).items()
    }
    assert twin == to_api(read(path)), "write the twin anew: python tests/nodes/test_workflows.py"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_reader_knows_what_to_do(path):
    workflow = read(path)
    notes = [node for node in workflow["nodes"] if node["type"] in NOTES]
    assert notes and "Run" in notes[0]["widgets_values"][0]
    assert any(node["type"] in ("SaveImage", "PreviewImage", "LineAR_Compare") for node in drawn(workflow))
    thumbnails = [path.with_suffix(end) for end in (".jpg", ".png") if path.with_suffix(end).is_file()]
    assert len(thumbnails) == 1, "one thumbnail; tests/nodes/comfy_server.py makes them"
    assert thumbnails[0].stat().st_size < 60_000


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_nodes_do_not_lie_on_each_other(path):
    boxes = [(node["id"], *node["pos"], *node["size"]) for node in read(path)["nodes"]]
    title = 30
    for i, (a, x, y, w, h) in enumerate(boxes):
        for b, x2, y2, w2, h2 in boxes[i + 1 :]:
            apart = x + w <= x2 or x2 + w2 <= x or y + h <= y2 - title or y2 + h2 <= y - title
            assert apart, f"nodes {a} and {b} overlap"


def write_twin(path: Path) -> None:
    workflow = read(path)
    titles = {str(node["id"]): node.get("title") for node in workflow["nodes"]}
    prompt = to_api(workflow)
    for key, node in prompt.items():
        schema = SCHEMAS.get(node["class_type"], {})
        node["_meta"] = {"title": titles[key] or schema.get("display_name", node["class_type"])}
    twin = FOLDER / "api" / path.name
    twin.write_text(json.dumps(prompt, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for file in FILES:
        write_twin(file)
