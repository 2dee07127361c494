"""What leaves this folder: the registry's rules, and what a pack may never do inside somebody's ComfyUI.

The gates that need comfy-cli and comfy-test run where dev.py could install those; the others always do.
"""

import ast
import json
import re
import zipfile
from pathlib import Path

import pytest

from tests import archive
from tests.archive import ROOT, ours, shipped

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MIB = 2**20


# pyproject.toml and its neighbours


def test_the_registry_finds_what_it_needs():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", project["name"])
    assert "comfy" not in project["name"], "the registry refuses it"
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert (ROOT / project["license"]["file"]).is_file()
    assert (ROOT / project["readme"]).is_file()
    assert comfy["PublisherId"]
    assert comfy["DisplayName"] == "LineAR"
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert "web" not in comfy, "WEB_DIRECTORY of __init__.py names the folder, and once is enough"


def test_pyproject_and_requirements_agree():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    assert wanted == [d for d in PROJECT["project"]["dependencies"] if not d.startswith("comfyui-frontend-package")]


def test_nothing_that_comfyui_brings_is_asked_for():
    names = {re.split(r"[^\w.-]", line)[0].lower() for line in PROJECT["project"]["dependencies"]}
    assert not names & {"torch", "torchvision", "numpy", "pillow", "safetensors", "tqdm", "transformers", "aiohttp"}


# The files


def test_the_archive_has_the_pack_and_nothing_else():
    files = shipped()
    tools = ("tests/", "training/", "bench/", "constraints/", "dev.py", ".")
    assert not [path for path in files if path.startswith(tools)]
    for needed in ("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"):
        assert needed in files
    for folder in ("linear_core/assets/", "nodes/", "web/", "workflows/"):
        assert any(path.startswith(folder) for path in files), f"{folder} is missing"


def test_links_between_pages_lead_somewhere():
    """Every relative link in our Markdown names a file that exists, and a heading in it where it names one.

    The changelog may link to files that a later version has moved.
    """
    lost = []
    for page in (path for path in ours() if path.endswith(".md") and not path.startswith(("tests/", "CHANGELOG"))):
        text = (ROOT / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
            name, _, heading = link.partition("#")
            target = (ROOT / page).parent / name if name else ROOT / page
            slugs = []
            if heading and target.is_file():
                heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
                slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            if not target.exists() or (heading and heading not in slugs):
                lost.append(f"{page}: {link}")
    assert lost == []


def test_no_large_files():
    sizes = {path: (ROOT / path).stat().st_size for path in ours()}
    models = {path: size for path, size in sizes.items() if re.fullmatch(r"linear_core/assets/.*\.safetensors", path)}
    assert sum(models.values()) <= 36 * MIB, models
    assert {path: size for path, size in sizes.items() if path not in models and size > 5 * MIB} == {}


def test_no_paths_of_anybodys_machine():
    pattern = re.compile(rb"(?<![\w.])(/root/|/work/|/home/[a-z]|/Users/[a-z]|[A-Z]:\\+Users\\)")
    exempt = {Path(__file__).relative_to(ROOT).as_posix()}
    found = {path: pattern.findall((ROOT / path).read_bytes()) for path in ours() if path not in exempt}
    assert {path: hits for path, hits in found.items() if hits} == {}


def test_shipped_python_can_be_printed_on_any_windows_console():
    wrong = {}
    for path in shipped():
        if path.endswith(".py"):
            text = (ROOT / path).read_text(encoding="utf-8")
            letters = {letter for letter in text if letter != letter.encode("cp1252", "ignore").decode("cp1252")}
            if letters:
                wrong[path] = sorted(letters)
    assert wrong == {}, "these letters are not in cp1252; the registry's lint refuses them"


# The code: read as a syntax tree, never imported

MODULES = {"subprocess", "pickle", "marshal", "shelve", "requests", "httpx", "aiohttp", "huggingface_hub", "ctypes"}
NETWORK = {"urllib.request", "http.client", "http.server", "ftplib", "socket", "smtplib"}
NAMES = {"eval", "exec", "__import__", "urlopen", "input", "breakpoint"}
CALLS = {"os.system", "os.popen", "torch.cuda.empty_cache", "torch.hub.load"}
METHODS = {"cuda", "urlopen", "urlretrieve"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of names, or as much of its end as there is."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id] if isinstance(node, ast.Name) else parts))


def offence_of_call(call: ast.Call, is_node: bool) -> str | None:
    """Why this call may not stand in the pack, or None."""
    name, keywords = dotted(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
    if isinstance(call.func, ast.Name) and (name in NAMES or (name == "print" and is_node)):
        return f"{name}()"
    if name in CALLS or (isinstance(call.func, ast.Attribute) and call.func.attr in METHODS):
        return f"{name}()"
    if name.endswith("exec_module") or any(name.startswith(f"os.{verb}") for verb in ("exec", "spawn", "posix_spawn")):
        return f"{name}()"
    if name == "torch.load" and getattr(keywords.get("weights_only"), "value", None) is not True:
        return "torch.load() without weights_only=True"
    if "trust_remote_code" in keywords:
        return "trust_remote_code"
    texts = [value.value for value in [*call.args, *keywords.values()] if isinstance(value, ast.Constant)]
    if name.split(".")[-1] == "to" and any(isinstance(text, str) and text.startswith("cuda") for text in texts):
        return '.to("cuda")'
    return None


def offences(source: str, is_node: bool = False) -> list[str]:
    """Everything in a module that a pack may not do, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        reason = None
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module, *(f"{node.module}.{name}" for name in names)]
            elif isinstance(node, ast.ImportFrom):
                names = []
            bad = [name for name in names if name.split(".")[0] in MODULES or name in NETWORK]
            reason = f"import {bad[0]}" if bad else None
        elif isinstance(node, ast.Call):
            reason = offence_of_call(node, is_node)
        if reason:
            found.append(f"line {node.lineno}: {reason}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec('1')",
        "import subprocess",
        "from subprocess import run",
        "from urllib import request",
        "from urllib.request import urlopen",
        "import requests",
        "import pickle as p",
        "os.system('ls')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "x.cuda()",
        "model.layers[0].cuda()",
        "x.to('cuda:0')",
        "x.to(device='cuda')",
        "torch.cuda.empty_cache()",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "def run():\n    print('row')",
    ],
)
def test_the_reader_of_syntax_trees_sees(source):
    assert len(offences(source, is_node=True)) >= 1


def test_the_reader_of_syntax_trees_accepts_ordinary_code():
    source = (
        "import torch\nfrom . import pickle\ntorch.load(path, weights_only=True)\nx.to(device)\nmodel.eval()\nprint(1)"
    )
    assert offences(source) == []


def test_the_pack_does_nothing_a_pack_may_not_do():
    files = [ROOT / "__init__.py", *ROOT.glob("nodes/**/*.py"), *ROOT.glob("linear_core/**/*.py")]
    assert len(files) > 10
    found = {}
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        found[name] = offences(file.read_text(encoding="utf-8"), is_node=not name.startswith("linear_core/"))
    # The one room that may: it fetches what the user asked Download AR Model for, and nothing else imports requests.
    network = found.pop("linear_core/checkpoints/download.py")
    assert len(network) == 1 and network[0].endswith("import requests")
    assert {name: reasons for name, reasons in found.items() if reasons} == {}


# The registry's own tools


@pytest.fixture
def pack(tmp_path):
    """A copy of the shipped files, as a user unpacks them."""
    return archive.copy(shipped(), tmp_path)


def test_comfy_node_validate_is_clean(pack):
    said = archive.tool(pack, "-m", "comfy_cli", "--skip-prompt", "node", "validate")
    assert "All validation checks passed" in said
    assert "warning" not in said.lower()


def test_comfy_node_pack_ships_what_we_think_it_does(tmp_path):
    with zipfile.ZipFile(archive.pack(tmp_path)) as packed:
        assert sorted(packed.namelist()) == shipped()


def test_comfy_test_lint_is_clean(pack):
    archive.tool(pack, "-m", "comfy_test", "lint", "--strict")


HAZARDS = """
import json, pathlib
from comfy_test.orchestration.levels.hazards import CHECKS
print("found", json.dumps({name: list(map(str, check(pathlib.Path()))) for _band, name, _text, check in CHECKS}))
"""


def test_comfy_test_sees_no_hazards(pack):
    found = json.loads("{" + archive.tool(pack, "-c", HAZARDS).rpartition("found {")[2])
    assert len(found) > 3
    assert {name: hits for name, hits in found.items() if hits} == {}
