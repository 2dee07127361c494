"""Workflows that were saved with an earlier release keep loading: fixtures/golden has each release's, and its schemas.

A saved graph knows widgets and sockets by their order, a saved prompt by their names. So inputs are only appended, as
optional ones; nothing is renamed, retyped or removed; choices are only added, ranges only grow, defaults stay.
`python tests/golden.py` makes the folder of the version that pyproject.toml names.
"""

from __future__ import annotations

import copy
import json
import shutil
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from tests.nodes.test_nodes import LINEAR, NODES, comfy, object_info  # noqa: F401 (fixtures)
from tests.nodes.test_workflows import SCHEMAS, read, to_api, widgets
from tests.nodes.values import DYNAMIC, Case, declared, host, nested
from tests.tiny import cut_down

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
LIBRARY = LINEAR["checkpoints.library"]


def runs_anywhere(path: Path) -> bool:
    """Whether a prompt's models come with the pack."""
    nodes = read(path).values()
    return {n["inputs"]["model"] for n in nodes if n["class_type"] == "LineAR_LoadModel"} <= {"landscapes (bundled)"}


GRAPHS = sorted(GOLDEN.glob("*/workflows/*.json"))
PROMPTS = sorted(GOLDEN.glob("*/workflows/api/*.json"))
RUNNABLE = [path for path in PROMPTS if runs_anywhere(path)]  # need no download
ON_DISK = ("model", "tokenizer", "text_encoder")  # choices are what lies on somebody's disk
every_node = pytest.mark.parametrize(
    ("release", "node"),
    [(path.parent.name, node) for path in GOLDEN.glob("*/object_info.json") for node in read(path)],
)


def release_and_name(path: Path) -> str:
    return f"{path.relative_to(GOLDEN).parts[0]}-{path.stem}"


# -- schemas -----------------------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """An input as a node shows it."""

    name: str
    kind: str
    options: dict[str, Any]
    required: bool

    @property
    def choices(self) -> list[Any]:
        options = self.options.get("options", [])
        return [option["key"] for option in options] if self.kind == DYNAMIC else options


def shown(info: dict[str, Any], chosen: dict[str, str]) -> list[Shown]:
    """A node's inputs in order, with those that belong to what was chosen."""
    return [Shown(*entry) for entry in declared(info["input"], chosen)]


def ways_to_choose(info: dict[str, Any]) -> list[dict[str, str]]:
    dynamic = [entry for entry in shown(info, {}) if entry.kind == DYNAMIC]
    return [{entry.name: key} for entry in dynamic for key in entry.choices] or [{}]


def broken(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What about a node's schema would break workflows that were saved with its older one."""
    found = []
    for chosen in ways_to_choose(old):
        for was, now in zip_longest(shown(old, chosen), shown(new, chosen)):
            if was is None:
                if now.required:
                    found.append(f"{now.name}: new and not optional")
                continue
            if now is None or now.name != was.name:
                found.append(f"{was.name}: gone, renamed, or something stands in front of it")
                break
            if (now.kind, now.required or was.required) != (was.kind, was.required):
                found.append(f"{was.name}: another type, or required now")
            if was.name not in ON_DISK and not set(was.choices) <= set(now.choices):
                found.append(f"{was.name}: a choice is gone")
            for end, way in (("min", 1), ("max", -1)):
                if end in was.options and way * (now.options[end] - was.options[end]) > 0:
                    found.append(f"{was.name}: values that were allowed no longer are")
            if was.options.get("default") != now.options.get("default"):
                found.append(f"{was.name}: another default")
    count = len(old["output"])
    if [new[key][:count] for key in ("output", "output_name")] != [old[key] for key in ("output", "output_name")]:
        found.append("outputs: not the old ones, in their order, in front")
    return sorted(set(found))


@every_node
def test_inputs_are_only_appended(release, node):
    old = read(GOLDEN / release / "object_info.json")[node]
    assert node in NODES, "the node is gone"
    assert broken(old, json.loads(json.dumps(object_info(NODES[node])))) == []


def changed(how: str) -> dict[str, Any]:
    """Generate's schema, or Line Cache's, with one change."""
    info = copy.deepcopy(SCHEMAS["LineAR_LineCache" if "choice" in how else "LineAR_Generate"])
    required, optional = (info["input"].get(group, {}) for group in ("required", "optional"))
    custom = required["preset"][1]["options"] if "choice" in how else []
    match how:
        case "appended":
            optional["hue"] = ["FLOAT", {"default": 0.0, "min": 0, "max": 1}]
        case "required":
            required["hue"] = ["FLOAT", {"default": 0.0}]
        case "required behind all":
            info["input"]["optional"]["view"] = optional.pop("view")
            required["view_too"] = ["STRING", {}]
        case "in front":
            info["input"]["optional"] = {"hue": ["FLOAT", {}], **optional}
        case "renamed":
            info["input"]["required"] = {("scale" if k == "guidance" else k): v for k, v in required.items()}
        case "gone":
            del optional["stop_after"]
        case "retyped":
            required["top_k"][0] = "FLOAT"
        case "was optional":
            optional_keep = optional.pop("tokens")
            required["tokens"] = optional_keep
        case "narrower":
            required["batch_size"][1]["max"] = 32
        case "wider":
            required["batch_size"][1]["max"] = 128
        case "another default":
            required["temperature"][1]["default"] = 1.0
        case "another output":
            info["output_name"] = ["codes"]
        case "one output more":
            info["output_name"], info["output"] = ["tokens", "report"], ["LINEAR_TOKENS", "STRING"]
        case "a choice more":
            custom.insert(0, {"key": "Tiny", "inputs": {"required": {}}})
        case "a choice gone":
            custom.pop(1)
        case "a choice has one more in front":
            custom[-1]["inputs"]["required"] = {"hue": ["FLOAT", {}], **custom[-1]["inputs"]["required"]}
        case "a choice's own choice gone":
            custom[-1]["inputs"]["required"]["policy"][1]["options"].remove("h2o")
    return info


@pytest.mark.parametrize("how", ["appended", "wider", "one output more", "a choice more"])
def test_what_may_change(how):
    assert broken(SCHEMAS["LineAR_LineCache" if "choice" in how else "LineAR_Generate"], changed(how)) == []


@pytest.mark.parametrize(
    "how",
    [
        *("required", "required behind all", "in front", "renamed", "gone", "retyped", "was optional", "narrower"),
        *("another default", "another output", "a choice gone", "a choice has one more in front"),
        "a choice's own choice gone",
    ],
)
def test_what_may_not_change(how):
    assert broken(SCHEMAS["LineAR_LineCache" if "choice" in how else "LineAR_Generate"], changed(how))


# -- workflows ---------------------------------------------------------------------------------------------------------


def test_there_is_a_folder_for_the_first_release():
    assert (GOLDEN / "0.1.0" / "object_info.json").is_file()
    for release in GOLDEN.iterdir():
        graphs, prompts = (sorted(p.name for p in release.glob(f"workflows/{kind}*.json")) for kind in ("", "api/"))
        assert graphs == prompts and len(graphs) >= 11


@pytest.mark.parametrize("path", GRAPHS, ids=release_and_name)
def test_a_saved_graph_opens_with_its_values_where_they_belong(path):
    """By order: what the node has now begins with what was saved, so every value finds its widget."""
    for node in read(path)["nodes"]:
        if node["type"] not in NODES:
            continue
        info, values = json.loads(json.dumps(object_info(NODES[node["type"]]))), widgets(node)
        now = [entry for entry in shown(info, values) if not entry.options.get("socketless")]
        saved = [entry["name"] for entry in node["inputs"]]
        assert [entry.name for entry in now[: len(saved)]] == saved
        assert not any(entry.required for entry in now[len(saved) :])
    twin = read(path.parent / "api" / path.name)
    assert to_api(read(path)) == {key: {k: v for k, v in node.items() if k != "_meta"} for key, node in twin.items()}, (
        "both forms say the same"
    )


@pytest.mark.parametrize("path", PROMPTS, ids=release_and_name)
def test_a_saved_prompt_is_accepted(path):
    """By name: every value passes the host's check against the schemas of now, and nothing required is missing."""
    for node in read(path).values():
        if (name := node["class_type"]) not in NODES:
            continue
        info, given = json.loads(json.dumps(object_info(NODES[name]))), node["inputs"]
        now = {entry.name: entry for entry in shown(info, given)}
        assert set(given) <= set(now)
        assert not [entry.name for entry in now.values() if entry.required and entry.name not in given]
        for key, value in given.items():
            entry = now[key]
            if isinstance(value, list) or key in ON_DISK:
                continue
            case = Case(name, key, value, entry.kind, entry.options, entry.required)
            assert host(case, given) is not None, f"{key}: {value!r} is no longer taken"


class Prompt:
    """Runs a prompt on the double: our nodes, and of ComfyUI's those that ours are fed by."""

    def __init__(self, prompt: dict[str, Any]):
        self.prompt, self.done = prompt, {}

    def run(self, key: str) -> tuple[Any, ...]:
        if key not in self.done:
            node = self.prompt[key]
            given = {name: self.input(value) for name, value in node["inputs"].items()}
            self.done[key] = (
                self.ours(node["class_type"], given)
                if node["class_type"] in NODES
                else self.theirs(node["class_type"], given)
            )
        return self.done[key]

    def input(self, value: Any) -> Any:
        return self.run(value[0])[value[1]] if isinstance(value, list) else value

    @staticmethod
    def ours(name: str, given: dict[str, Any]) -> tuple[Any, ...]:
        if name == "LineAR_Generate":  # a row or two show that it runs
            given["stop_after"] = given.get("keep_rows", 0) + 1
        return NODES[name].execute(**nested(name, given)).result

    @staticmethod
    def theirs(name: str, given: dict[str, Any]) -> tuple[Any, ...]:
        if name == "PrimitiveInt":
            return (given["value"],)
        if name == "LoadImage":
            return (torch.rand(1, 50, 70, 3),)
        assert name == "ImageScaleBy", f"{name} feeds one of our nodes, and the double does not have it"
        pictures = given["image"].movedim(3, 1)
        return (F.interpolate(pictures, scale_factor=given["scale_by"]).movedim(1, 3),)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """The bundled model with a sixth of its layers, under its own name: prompts ask for that."""
    folder = tmp_path_factory.mktemp("assets")
    shutil.copy(LIBRARY.bundled_files().tokenizer, folder)
    cut_down(folder / LIBRARY.bundled_files().decoder.name, grid=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LIBRARY, "ASSETS", folder)
        yield


@pytest.mark.parametrize("path", RUNNABLE, ids=release_and_name)
def test_a_saved_prompt_runs(path, one_layer):
    prompt = read(path)
    running = Prompt(prompt)
    for key, node in prompt.items():
        if node["class_type"] in NODES:
            assert running.run(key)
