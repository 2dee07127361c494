"""A real ComfyUI, on the CPU, with this pack in it: `COMFYUI_DIR=path/to/ComfyUI python3 dev.py test -m host`.

See comfy_server.py for COMFYUI_PYTHON (where ComfyUI has an environment of its own) and COMFYUI_ARGS.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from linear_core.events import pack, unpack
from tests.nodes.comfy_server import GOLDEN, PACK, PREVIEW, WORKFLOWS, Server, comfyui, finish, ours
from tests.nodes.values import GRAPH, cases, host
from tests.web.browser.chromium import Chromium, missing, script

pytestmark = pytest.mark.host
ROWS = 24  # of the bundled model
EVENT = "linear_ar.line"


def runs_anywhere(path: Path) -> bool:
    """Whether a workflow needs no model that has to be fetched, and no picture of the user's."""
    nodes = json.loads(path.read_text(encoding="utf-8")).values()
    models = {node["inputs"]["model"] for node in nodes if node["class_type"] == "LineAR_LoadModel"}
    return models <= {"landscapes (bundled)", "landscapes in scales (bundled)"} and not any(
        node["class_type"] == "LoadImage" for node in nodes
    )


GOLDEN_PROMPTS = sorted((GOLDEN.parent / "golden").glob("*/workflows/api/*.json"))
SAVED = [path for path in GOLDEN_PROMPTS if runs_anywhere(path)]  # with earlier releases
TWINS = [path for path in sorted(WORKFLOWS.glob("api/*.json")) if runs_anywhere(path)]


@pytest.fixture(scope="module")
def server():
    with comfyui() as running:
        yield running


def complaints(log: str) -> list[str]:
    """Lines of the log that are about this pack, other than how long its import took and what it tells at level INFO,
    and every traceback.
    """
    lines = [line for line in log.splitlines() if re.search(rf"{PACK}|LineAR|linear_core|Traceback", line)]
    return [line for line in lines if not re.search(r"\d\.\d seconds: |\[INFO\]", line)]


def prompt_of(path: Path, seed: int) -> dict:
    """An API workflow, with a seed that was not drawn before, so that nothing comes from the host's cache."""
    prompt = json.loads(path.read_text(encoding="utf-8"))
    for node in prompt.values():
        if node["class_type"] == "PrimitiveInt":
            node["inputs"]["value"] = seed
        if isinstance(node["inputs"].get("seed"), int):
            node["inputs"]["seed"] = seed
    return prompt


def test_it_starts_without_a_word_of_complaint(server):
    assert complaints(server.log) == []
    assert "IMPORT FAILED" not in server.log and "Error while calling comfy_entrypoint" not in server.log


def test_the_schemas_are_those_that_were_recorded(server):
    info = {name: ours(node) for name, node in server.get("/object_info").items() if name.startswith("LineAR_")}
    assert info == json.loads(GOLDEN.read_text(encoding="utf-8")), "record again as comfy_server.py says"


def test_help_pages_and_workflows_are_served(server):
    for name in json.loads(GOLDEN.read_text(encoding="utf-8")):
        assert server.read(f"/extensions/{PACK}/docs/{name}.md").startswith(b"# ")
    assert sorted(server.get("/workflow_templates")[PACK]) == sorted(p.stem for p in WORKFLOWS.glob("*.json"))
    for path in WORKFLOWS.glob("*.json"):
        assert server.get(f"/api/workflow_templates/{PACK}/{path.name}")["nodes"]


@pytest.mark.parametrize("path", TWINS, ids=lambda p: p.stem)
def test_a_workflow_runs(server, path):
    prompt = prompt_of(path, 1001 + 100 * TWINS.index(path))
    messages, end = finish(server, prompt)
    assert end["type"] == "execution_success", end
    pictures = server.pictures(end["data"]["prompt_id"])
    assert pictures and all(picture.stat().st_size > 1000 for saved in pictures for picture in saved)

    stages = 9 if path.stem.startswith("scales_") else ROWS
    drawing = [key for key, node in prompt.items() if node["class_type"] in ("LineAR_Generate", "LineAR_Compare")]
    told = [message for message in messages if isinstance(message, dict)]
    for node in drawing:
        kept = prompt[node]["inputs"].get("keep_rows", 0), prompt[node]["inputs"].get("stop_after", 0) or stages
        bar = [m["data"]["value"] for m in told if m["type"] == "progress" and m["data"]["node"] == node]
        assert bar and max(bar) == kept[1], "the progress bar counts rows"
        events = [m["data"] for m in told if m["type"] == EVENT and m["data"]["node"] == node]
        assert [event["row"] for event in events if event["kind"] == "row"] == list(range(kept[1]))
    shown = [m for m in messages if isinstance(m, bytes) and int.from_bytes(m[:4], "big") == PREVIEW]
    assert len(shown) >= 2 * len(drawing), "rows, or scales, are shown while they come"
    assert complaints(server.log) == []


def rows_told(messages: list, node: str) -> list[dict]:
    """The event of every row of a node."""
    told = [m["data"] for m in messages if isinstance(m, dict) and m["type"] == EVENT]
    return [event for event in told if event["kind"] == "row" and event["node"] == node]


def test_rows_that_the_widget_hands_back_stay_and_the_rest_is_drawn_anew(server):
    """Reroll: the codes of the rows above come back in `view`. Keep: with as many rows to stop after, none is drawn."""
    prompt = prompt_of(WORKFLOWS / "api" / "first_image.json", 4004)
    (key,) = [key for key, node in prompt.items() if node["class_type"] == "LineAR_Generate"]
    whole = rows_told(finish(server, prompt)[0], key)

    def again(rows: int, **inputs: int) -> tuple[list[dict], Image.Image]:
        codes = [code for row in whole[:rows] for code in unpack(row["tokens"])]
        kept = {"keep_rows": rows, "view": f"1x{rows}x{len(codes) // rows}:{pack(codes)}"}
        asked = {**prompt, key: {**prompt[key], "inputs": {**prompt[key]["inputs"], **kept, **inputs}}}
        messages, end = finish(server, asked)
        assert end["type"] == "execution_success", end
        return rows_told(messages, key), Image.open(server.pictures(end["data"]["prompt_id"])[0][0])

    told, picture = again(12, seed=4005)
    assert [row["replayed"] for row in told] == [True] * 12 + [False] * 12
    assert [row["tokens"] for row in told[:12]] == [row["tokens"] for row in whole[:12]]
    assert [row["tokens"] for row in told[12:]] != [row["tokens"] for row in whole[12:]]
    told, _ = again(13)
    same = [{key: row[key] for key in ("tokens", "cells", "shares", "evicted")} for row in told]
    assert same == [{key: row[key] for key in ("tokens", "cells", "shares", "evicted")} for row in whole]
    told, top = again(5, stop_after=5)
    assert len(told) == 5 and all(row["replayed"] for row in told)
    assert top.size == (picture.width, picture.height * 5 // ROWS)
    assert complaints(server.log) == []


@pytest.mark.browser
@pytest.mark.skipif(bool(missing()), reason=missing() or "never")
@pytest.mark.parametrize("renderer", ["legacy", "vue"])
def test_reroll_keep_and_going_on_downward_in_the_page(server, renderer, tmp_path):
    """tests/web/browser/live.mjs: a person's presses, and the codes that come of them."""
    chromium, shots = Chromium(), os.environ.get("LINEAR_SHOTS", tmp_path)
    try:
        run = ("live.mjs", server.url, renderer, "--shots", shots)
        status, lines, console = script(*run, chromium=chromium, seconds=900)
    finally:
        chromium.close()
    assert status == 0, f"{lines[-1:]}; the page said: {console[-3000:]}"


def test_stop_takes_effect_within_a_row_and_leaves_a_host_that_goes_on(server):
    path = WORKFLOWS / "api" / "first_image.json"
    before, after, end = 0, 0, {}
    for message in server.run(prompt_of(path, 2002)):
        if not isinstance(message, dict):
            continue
        end = message
        if message["type"] == EVENT and message["data"]["kind"] == "row":
            after += bool(before)
            if message["data"]["row"] == 4 and not before:
                before = time.monotonic()
                server.post("/interrupt", {})
    assert end["type"] == "execution_interrupted", end
    assert after <= 1, "at most the row that was being finished"
    _, end = finish(server, prompt_of(path, 2002))
    assert end["type"] == "execution_success"
    assert complaints(server.log) == []


@pytest.mark.parametrize("path", SAVED, ids=lambda p: f"{p.parents[2].name}-{p.stem}")
def test_a_workflow_of_an_earlier_release_runs(server, path):
    _, end = finish(server, prompt_of(path, 5005 + SAVED.index(path)))
    assert end["type"] == "execution_success", end
    assert complaints(server.log) == []


# -- what hosts do -----------------------------------------------------------------------------------------------------


def drawing(seed: int, **inputs: object) -> dict:
    """first_image with so few rows that it takes a moment; other inputs of its nodes by name."""
    prompt = prompt_of(WORKFLOWS / "api" / "first_image.json", seed)
    for node in prompt.values():
        node["inputs"] |= {name: value for name, value in inputs.items() if name in node["inputs"]}
        if node["class_type"] == "LineAR_Generate":
            node["inputs"]["stop_after"] = 3
    return prompt


def picture(server: Server, prompt_id: str) -> bytes:
    return Image.open(server.pictures(prompt_id)[0][0]).tobytes()


def drawn(server: Server, prompt: dict) -> bytes:
    _, end = finish(server, prompt)
    assert end["type"] == "execution_success", end
    return picture(server, end["data"]["prompt_id"])


def ended(server: Server, prompt_id: str) -> dict:
    while prompt_id not in (history := server.get(f"/history/{prompt_id}")):
        time.sleep(0.05)
    return history[prompt_id]["status"]


def test_two_graphs_queued_at_once(server):
    """They wait for each other, share the model, and each draws what it draws alone."""
    queued = [server.post("/prompt", {"prompt": drawing(seed)})["prompt_id"] for seed in (6001, 6002)]
    assert [ended(server, name)["status_str"] for name in queued] == ["success"] * 2
    together = [picture(server, name) for name in queued]
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert [drawn(server, drawing(seed)) for seed in (6001, 6002)] == together and together[0] != together[1]


def test_models_that_the_host_took_away(server):
    """Off the device, and then forgotten altogether: the next run is the same."""
    before = drawn(server, drawing(7001))
    for free in ({"unload_models": True}, {"unload_models": True, "free_memory": True}):
        drawn(server, drawing(7002))  # so that the next one is not taken from the host's cache
        server.post("/free", free)
        time.sleep(1.5)  # the host does it when it next looks at its queue
        assert drawn(server, drawing(7001)) == before
    assert complaints(server.log) == []


def test_a_model_file_that_changes_between_two_runs(server):
    """The loader runs again, and only then."""
    assets = Path(__file__).parents[2] / "linear_core" / "assets"
    folder = server.base / "models" / "ar_image"
    folder.mkdir(exist_ok=True)
    tokenizer = shutil.copy(assets / "landscapes_vq.safetensors", folder)
    path = Path(shutil.copy(assets / "landscapes.safetensors", folder / "mine.safetensors"))
    chosen = {"model": path.name, "tokenizer": Path(tokenizer).name}

    def run(seed: int) -> tuple[bytes, bool]:
        prompt = drawing(seed)
        loaders = {key for key, node in prompt.items() if node["class_type"] == "LineAR_LoadModel"}
        for key in loaders:
            prompt[key]["inputs"] |= chosen
        messages, end = finish(server, prompt)
        assert end["type"] == "execution_success", end
        ran = {m["data"]["node"] for m in messages if isinstance(m, dict) and m["type"] == "executing"}
        return picture(server, end["data"]["prompt_id"]), loaders <= ran

    first, loaded = run(8001)
    assert loaded and not run(8002)[1], "the same file is loaded once"
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        notes = file.metadata()
    weights["output.weight"] = weights["output.weight"].flip(0)
    save_file(weights, path.with_suffix(".new.safetensors"), notes)
    path.with_suffix(".new.safetensors").replace(path)
    other, loaded = run(8001)
    assert loaded and other != first
    shutil.copy(assets / "landscapes.safetensors", path)
    assert run(8001) == (first, True)
    assert complaints(server.log) == []


def test_a_list_of_pictures_and_one_of_them_drawn_anew(server):
    """ComfyUI runs Encode Image and Generate once for each: three runs are told apart, Reroll changes its own."""
    prompt = prompt_of(WORKFLOWS / "api" / "first_image.json", 9009)
    kinds = {node["class_type"]: key for key, node in prompt.items()}
    drawing, model = kinds["LineAR_Generate"], [kinds["LineAR_LoadModel"], 0]
    prompt |= {
        "noise": {
            "class_type": "EmptyImage",
            "inputs": {"width": 96, "height": 96, "batch_size": 3, "color": 0x336699},
        },
        "list": {"class_type": "RebatchImages", "inputs": {"images": ["noise", 0], "batch_size": 1}},
        "codes": {"class_type": "LineAR_EncodeImage", "inputs": {"model": model, "image": ["list", 0]}},
    }
    given = prompt[drawing]["inputs"]
    given |= {"tokens": ["codes", 0], "keep_rows": 20, "guidance": 1.0}
    del given["guidance_interval"]

    def runs() -> list[list[str]]:
        messages, end = finish(server, prompt)
        assert end["type"] == "execution_success", end
        told = [
            m["data"]
            for m in messages
            if isinstance(m, dict) and m["type"] == "executed" and m["data"]["node"] == drawing
        ]
        events = told[-1]["output"]["linear_ar"]
        starts = [event for event in events if event["kind"] == "started"]
        assert [event["list_index"] for event in starts] == [0, 1, 2]
        assert [ref["run"] for ref in told[-1]["output"]["linear_ar_picture"]] == [event["run"] for event in starts]
        return [[e["tokens"] for e in events if e["kind"] == "row" and e["run"] == start["run"]] for start in starts]

    def kept(run: list[str], rows: int) -> str:
        codes = [code for row in run[:rows] for code in unpack(row)]
        return f"1x{rows}x{ROWS}:{pack(codes)}"

    before = runs()
    seed = given["seed"]
    given["view"] = ";".join(
        [f"1@4711|{kept(before[1], 20)}", *(f"{i}@{seed}|{kept(before[i], ROWS - 1)}" for i in (0, 2))]
    )
    after = runs()
    assert after[0] == before[0] and after[2] == before[2]
    assert after[1][:20] == before[1][:20] and after[1] != before[1]
    assert complaints(server.log) == []


def test_drafts_change_no_code_and_the_page_tells_of_them(server):
    """A workflow with and without: equal codes in fewer passes, and the page says how many tokens a pass gave."""
    prompt = prompt_of(WORKFLOWS / "api" / "first_image.json", 6006)
    (key,) = [key for key, node in prompt.items() if node["class_type"] == "LineAR_Generate"]

    def events(drafts: int) -> list[dict]:
        prompt[key]["inputs"]["drafts"] = drafts
        messages, end = finish(server, prompt)
        assert end["type"] == "execution_success", end
        told = [m["data"] for m in messages if isinstance(m, dict) and m["type"] == EVENT]
        return [event for event in told if event["node"] == key]

    plain, drafted = events(0), events(24)
    before, after = ([event for event in told if event["kind"] == "row"] for told in (plain, drafted))
    assert [row["tokens"] for row in after] == [row["tokens"] for row in before]
    assert not any(row["passes"] for row in before)
    assert sum(row["passes"] for row in after) < 0.4 * ROWS * ROWS and all(row["accepted"] > 0 for row in after)
    if node := shutil.which("node"):
        page = [PAGE_TEXT.search(answer["text"]) for answer in replayed(node, drafted)]
        assert all(page) and [int(text[1]) for text in page] == list(range(1, ROWS + 1))
        assert float(page[-1][2]) > 2.5
    assert complaints(server.log) == []


PAGE_TEXT = re.compile(rf"^row (\d+)/{ROWS}, (\d\.\d) tokens a pass · ")


def replayed(node: str, events: list[dict]) -> list[dict]:
    """What web/state.js makes of a run's events, after every row."""
    script = Path(__file__).parents[1] / "web" / "replay.mjs"
    out = subprocess.run([node, script], input=json.dumps(events), capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


# -- what strangers send -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", GRAPH)
def test_every_value_is_caught_by_the_schema_or_in_one_sentence(server, node):
    """As tests/nodes/values.py has it without a host: what its check lets pass is what passes here."""
    for case in (case for case in cases() if case.node == node):
        passes = host(case) is not None
        if node == "LineAR_DownloadModel" and passes:
            continue  # it would fetch something
        try:
            queued = server.post("/prompt", {"prompt": case.prompt})
        except AssertionError as error:
            answer = str(error)
            assert "400" in answer and node in answer and case.name.rpartition(".")[2] in answer, f"{case}: {answer}"
            assert not passes or "custom_validation_failed" in answer, f"{case}: {answer}"  # the node's own check
            assert "exception_during_validation" not in answer, f"{case}: {answer}"
            continue
        assert passes, f"{case} was taken"
        status = ended(server, queued["prompt_id"])
        if status["status_str"] != "success":
            (told,) = [more for kind, more in status["messages"] if kind == "execution_error"]
            assert told["exception_type"].endswith("errors.UserError"), f"{case}: {told['exception_message']}"
            assert told["node_id"] == node and "\n" not in told["exception_message"].strip()


def test_a_mistake_is_told_in_one_sentence(server):
    """Last of all: the host writes the mistake into its log, with the place in our code."""
    prompt = prompt_of(WORKFLOWS / "api" / "first_image.json", 3003)
    (key,) = [key for key, node in prompt.items() if node["class_type"] == "LineAR_ClassPrompt"]
    prompt[key]["inputs"]["more_classes"] = "spaceship"
    _, end = finish(server, prompt)
    assert end["type"] == "execution_error"
    assert re.fullmatch(
        r"class: landscapes has no class 'spaceship'; choose one of [\w ,]+\.", end["data"]["exception_message"].strip()
    )
    assert end["data"]["node_id"] == key
