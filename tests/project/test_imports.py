"""Imports point one way: the syntax trees are read and held against the table.

Numbers know nothing of tensors, tensors nothing of models, models nothing of the loop, and nothing in `linear_core`
knows ComfyUI. In nodes/ one file speaks to it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMFY = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "server", "nodes", "execution", "app",
         "comfyui_version"}  # fmt: skip

# Room -> what it may import of ours, and of others. The first pattern that fits a file counts. A * stands for anything,
# and a room that imports itself is a package whose files may import each other.
TENSORS = {"torch"}
TABLE: dict[str, tuple[set[str], set[str]]] = {
    "__init__": (set(), set()),
    # numbers
    "errors": (set(), set()),
    "sizes": (set(), set()),
    "grid": ({"errors"}, set()),
    "pyramid": ({"errors", "grid"}, set()),
    "steps": ({"errors"}, set()),
    "plan": ({"errors", "grid", "pyramid"}, set()),
    "profile": ({"errors", "pyramid"}, TENSORS),
    "defaults": (set(), set()),
    "events": (set(), set()),  # names the type of a tensor, for readers only
    # the cache
    "cache.__init__": (set(), set()),
    "cache.storage": (set(), TENSORS),
    "cache.look_ahead": (set(), TENSORS),
    "cache.step_cache": ({"steps"}, TENSORS),
    "cache.refresh": ({"steps", "cache.step_cache"}, TENSORS),
    "cache.kernel": ({"cache.storage"}, TENSORS | {"triton"}),  # attention imports it when it is asked for
    "cache.attention": ({"defaults", "errors", "cache.kernel", "cache.look_ahead", "cache.storage"}, TENSORS),
    "cache.view": ({"plan", "pyramid", "cache.attention", "cache.look_ahead"}, TENSORS),
    "cache.fold": ({"pyramid", "cache.look_ahead", "cache.view"}, TENSORS),
    "cache.line_cache": (
        {"grid", "plan", "cache.attention", "cache.fold", "cache.look_ahead", "cache.storage", "cache.view"},
        TENSORS,
    ),
    "cache.stage_cache": (
        {
            "plan",
            "pyramid",
            "cache.attention",
            "cache.fold",
            "cache.look_ahead",
            "cache.storage",
            "cache.view",
        },
        TENSORS,
    ),
    "cache.carried_state": ({"plan", "pyramid"}, TENSORS),
    "policies.__init__": ({"errors", "policies.*"}, TENSORS),
    "policies.*": ({"plan", "profile", "pyramid", "cache.look_ahead", "cache.view", "policies.*"}, TENSORS),
    # models
    "prompts.*": (
        {"errors", "grid", "sizes", "prompts", "prompts.*"},
        TENSORS | {"transformers", "tokenizers", "sentencepiece"},
    ),
    "models.__init__": (set(), set()),
    "models.blocks": (set(), TENSORS),
    "models.packed": ({"models.blocks", "models.quantised"}, TENSORS),
    "models.quantised": ({"models.blocks", "models.quantised_kernel"}, TENSORS | {"comfy_kitchen"}),  # if it is there
    "models.quantised_kernel": (set(), TENSORS | {"triton"}),
    "models.*": (
        {
            "errors",
            "grid",
            "plan",
            "profile",
            "pyramid",
            "prompts",
            "prompts.*",
            "cache.attention",
            "cache.carried_state",
            "cache.line_cache",
            "cache.look_ahead",
            "cache.stage_cache",
            "cache.step_cache",
            "steps",
            "models.*",
        },
        TENSORS,
    ),
    "tokenizers.*": ({"pyramid", "tokenizers.*"}, TENSORS),
    # the loop
    "loop.__init__": (set(), set()),
    "loop.memory": ({"grid", "plan", "pyramid", "steps"}, set()),
    "loop.sampling": (set(), TENSORS | {"numpy"}),
    "loop.threads": (set(), TENSORS),
    "loop.graph": ({"defaults", "cache.attention"}, TENSORS),
    "loop.redraw": ({"errors", "grid", "plan"}, TENSORS),
    "loop.drafts": ({"errors", "grid", "plan", "cache.line_cache", "loop.redraw", "loop.sampling"}, TENSORS),
    "loop.generate": (
        {
            "errors",
            "events",
            "grid",
            "plan",
            "cache.line_cache",
            "cache.look_ahead",
            "cache.view",
            "policies",
            "policies.choose",
            "loop.drafts",
            "loop.memory",
            "loop.redraw",
            "loop.sampling",
        },
        TENSORS,
    ),
    "loop.scales": (
        {
            "errors",
            "events",
            "plan",
            "pyramid",
            "cache.carried_state",
            "cache.stage_cache",
            "cache.view",
            "policies",
            "policies.choose",
            "profile",
            "loop.memory",
            "loop.pruning",
            "loop.sampling",
        },
        TENSORS,
    ),
    "loop.pruning": ({"plan", "pyramid"}, TENSORS),
    "loop.calibrate": ({"plan", "profile", "pyramid", "cache.look_ahead", "loop.scales"}, TENSORS),
    "loop.masked": (
        {
            "errors",
            "events",
            "grid",
            "plan",
            "steps",
            "cache.refresh",
            "cache.step_cache",
            "models.denoise",
            "models.mar",
            "loop.sampling",
        },
        TENSORS,
    ),
    "loop.forced": (
        {"plan", "cache.line_cache", "policies", "loop.generate", "loop.memory", "loop.redraw", "loop.sampling"},
        TENSORS,
    ),
    "loop.vqa": ({"models.janus", "models.understanding", "prompts.janus"}, TENSORS),
    "loop.micro_batches": ({"errors", "events", "plan", "loop.generate", "loop.memory"}, TENSORS),
    "hf": (
        {"errors", "grid", "plan", "cache.attention", "cache.line_cache", "cache.storage", "policies", "loop.generate"},
        TENSORS | {"transformers"},
    ),
    # pictures
    "pictures.__init__": (set(), set()),
    "pictures.fit": (set(), TENSORS),
    "pictures.sheet": ({"errors"}, TENSORS | {"numpy", "PIL"}),
    "pictures.inpaint": ({"errors", "tokenizers.latents"}, TENSORS),
    "pictures.heatmap": ({"events", "grid", "pyramid"}, TENSORS | {"numpy", "PIL"}),
    "pictures.preview": (
        {"errors", "events", "pyramid", "tokenizers.*", "loop.micro_batches", "pictures.inpaint"},
        TENSORS | {"numpy"},
    ),
    # files
    "checkpoints.__init__": (set(), set()),
    "checkpoints.untrusted": ({"errors"}, set()),
    "checkpoints.published": ({"errors"}, set()),  # names of files, and where they are to be had
    "checkpoints.download": ({"errors", "checkpoints.published"}, {"requests"}),
    "checkpoints.weights": ({"errors", "checkpoints.untrusted"}, TENSORS | {"safetensors"}),
    "checkpoints.families.__init__": (
        {"errors", "grid", "plan", "pyramid", "sizes", "steps", "prompts", "prompts.*", "checkpoints.weights"},
        TENSORS,
    ),
    "checkpoints.families.*": (
        {
            "errors",
            "grid",
            "plan",
            "pyramid",
            "sizes",
            "steps",
            "prompts",
            "prompts.*",
            "models.*",
            "tokenizers.*",
            "checkpoints.families",
            "checkpoints.families.*",
            "checkpoints.published",
            "checkpoints.untrusted",
            "checkpoints.weights",
        },
        TENSORS,
    ),
    "checkpoints.*": (
        {"errors", "profile", "prompts", "prompts.*", "models.*", "tokenizers.*", "checkpoints.*"},
        TENSORS,
    ),
    # people
    "doctor": (
        {
            "defaults",
            "errors",
            "plan",
            "prompts",
            "cache.attention",
            "checkpoints.families",
            "checkpoints.library",
            "checkpoints.text",
            "checkpoints",
            "loop.forced",
            "loop.generate",
            "loop.memory",
            "models.packed",
            "pictures.preview",
        },
        TENSORS,
    ),
    "check": (
        {
            "plan",
            "prompts",
            "checkpoints.families",
            "checkpoints.library",
            "loop.forced",
            "loop.generate",
            "loop.micro_batches",
            "loop.scales",
        },
        TENSORS,
    ),
    "batch.__init__": (set(), set()),
    "batch.table": ({"errors", "plan"}, {"pyarrow"}),
    "batch.folder": ({"errors", "batch.table"}, {"pyarrow", "msvcrt", "fcntl"}),
    "batch.draw": (
        {
            "errors",
            "plan",
            "prompts",
            "batch.*",
            "checkpoints",
            "checkpoints.families",
            "checkpoints.library",
            "checkpoints.text",
            "loop.*",
            "models.packed",
            "pictures.preview",
            "pictures.sheet",
        },
        TENSORS,
    ),
    "batch.over_ray": ({"errors", "batch.*"}, {"ray"}),  # imported when it is asked for
    "startup": (set(), set()),  # before anything that takes seconds to import, or may be missing
    "__main__": ({"*"}, TENSORS | {"numpy", "PIL", "tqdm", "safetensors"}),
}
NUMBERS = (
    "__init__",
    "errors",
    "grid",
    "pyramid",
    "sizes",
    "steps",
    "plan",
    "defaults",
    "events",
    "loop.memory",
    "checkpoints.published",
)


def module_name(path: Path, package: Path) -> str:
    """linear_core/policies/line.py -> policies.line"""
    return ".".join(path.relative_to(package).with_suffix("").parts)


def for_readers(tree: ast.Module) -> set[ast.AST]:
    """Everything below `if TYPE_CHECKING:`, which does not run."""
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    return {node for guard in guarded for child in guard.body for node in ast.walk(child)}


def imports(path: Path, package: Path, text: str | None = None) -> list[tuple[int, str, bool]]:
    """Every import of a file wherever it stands: (line, name, whether it is of our package).

    Relative names are from the package's root. `from . import x` is x. Imports for readers of types are left out for
    other people's packages, as they do not run, and kept for ours, as they say who knows whom.
    """
    tree = ast.parse(text if text is not None else path.read_text(encoding="utf-8"))
    readers = for_readers(tree)
    here = path.relative_to(package).parent.parts
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = node.level - 1
            assert above <= len(here), f"{path.name}:{node.lineno} imports from outside {package.name}"
            base = [*here[: len(here) - above], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                deeper = package.joinpath(*base, alias.name)
                is_module = node.module is None or deeper.with_suffix(".py").exists() or deeper.is_dir()
                found.append((node.lineno, ".".join([*base, alias.name] if is_module else base), True))
        elif isinstance(node, ast.ImportFrom) and node not in readers:
            found.append((node.lineno, node.module, False))
        elif isinstance(node, ast.Import) and node not in readers:
            found += [(node.lineno, alias.name, False) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "importlib.import_module",
            "import_module",
        ):
            found.append((node.lineno, "an import by name", False))
    return found


def is_standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


def fits(name: str, patterns: set[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def room_of(module: str) -> str:
    """The row of the table for a module; a package's own file is called by the package's name plus __init__."""
    rows = [row for row in TABLE if fnmatchcase(module, row)]
    assert rows, (
        f"linear_core/{module}.py has no row in the import table; {Path(__file__).name} says what a file may import"
    )
    return rows[0]


def complaints(path: Path, package: Path, text: str | None = None) -> list[str]:
    ours, theirs = TABLE[room_of(module_name(path, package))]
    wrong = []
    for line, name, own in imports(path, package, text):
        allowed = fits(name, ours) if own else name.split(".")[0] in theirs or is_standard(name)
        if not allowed:
            wrong.append(f"{path.relative_to(package.parent)}:{line} imports {'.' if own else ''}{name}")
    return wrong


CORE = ROOT / "linear_core"
CORE_FILES = sorted(CORE.rglob("*.py"))


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: module_name(path, CORE))
def test_the_core_keeps_to_the_table(path):
    """Every import of a core file, at its head or inside a function, is in the file's row."""
    assert complaints(path, CORE) == []


@pytest.mark.parametrize("row", TABLE)
def test_the_table_itself_lets_nothing_through(row):
    """No row names ComfyUI or the nodes, none but those for people the loop, and rows of numbers name no torch."""
    ours, theirs = TABLE[row]
    assert not theirs & COMFY
    # hf and forced end lines as the loop does, micro-batches are drawn with it
    if row not in ("__main__", "check", "doctor", "batch.draw", "hf", "loop.forced", "loop.micro_batches"):
        assert not fits("loop.generate", ours)
    if not row.startswith(("__main__", "check", "doctor", "batch.draw")):  # checkpoints.* too
        assert not fits("checkpoints.library", ours)
    if row in NUMBERS:
        assert not theirs


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("grid.py", "import torch"),
        ("events.py", "from torch import Tensor"),
        ("cache/view.py", "from .line_cache import LineCache"),
        ("cache/line_cache.py", "from ..policies import choose"),
        ("policies/line.py", "from ..cache.fold import fold"),
        ("policies/choose.py", "from ..cache.line_cache import LineCache"),
        ("loop/sampling.py", "from ..plan import SamplePlan"),
        ("models/llamagen.py", "from ..loop.generate import generate"),
        ("tokenizers/network.py", "from ..models.blocks import Block"),
        ("loop/generate.py", "from ..models.llamagen import LlamaGen"),
        ("loop/generate.py", "from ..models import llamagen"),
        ("loop/generate.py", "def f():\n    import comfy.utils"),
        ("checkpoints/library.py", "from ..loop.generate import generate"),
        ("cache/attention.py", "import linear_core.cache"),
        ("cache/attention.py", "import importlib\nimportlib.import_module('comfy')"),
        ("cache/attention.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .view import View"),
    ],
)
def test_a_wrong_import_is_seen(file, text):
    """The checks above would notice: one file's text is replaced by an import it may not have."""
    assert len(complaints(CORE / file, CORE, text)) == 1


def test_numbers_run_without_torch():
    """Plans, grids and events can be used by a program that never loads torch."""
    code = (
        "import sys, linear_core.errors, linear_core.grid, linear_core.pyramid, linear_core.plan, linear_core.events;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# -- around the core ---------------------------------------------------------------------------------------------------


SHARED = {
    "nodes.host",
    "nodes.encoding",
    "nodes.files",
    "nodes.inputs",
    "nodes.live",
    "nodes.loops",
    "nodes.redraw",
    "nodes.size",
    "nodes.sockets",
}  # what nodes may know of each other's room


def node_complaints(path: Path, text: str | None = None) -> list[str]:
    """What a file of nodes/ imports beyond the core, the shared files and the schema it is written in."""
    wrong = []
    speaks = path.name == "host.py"
    for line, name, own in imports(path, ROOT, text):
        first = name.split(".")[0]
        if own:
            lists_all = path.name == "__init__.py" and first == "nodes"
            allowed = first == "linear_core" or lists_all or (name in SHARED and not speaks)
        elif first in COMFY:
            allowed = speaks or name == "comfy_api.latest"
        else:
            allowed = is_standard(name) or first in ("torch", "numpy", "PIL")
        if not allowed:
            wrong.append(f"nodes/{path.name}:{line} imports {name}")
    return wrong


def test_one_file_speaks_to_comfyui():
    """A node knows the core, the schema and the shared files, no other node; nodes/host.py alone knows ComfyUI."""
    assert [line for path in sorted(ROOT.glob("nodes/**/*.py")) for line in node_complaints(path)] == []


@pytest.mark.parametrize(
    ("file", "text", "wrong"),
    [
        ("load.py", "from ..linear_core.plan import CachePlan\nfrom . import host\nfrom .host import Progress", 0),
        ("load.py", "from comfy_api.latest import io", 0),
        ("load.py", "from comfy_api.v0_0_2 import io", 1),
        ("load.py", "import folder_paths", 1),
        ("load.py", "def f():\n    from comfy.utils import ProgressBar", 1),
        ("load.py", "from .plan import LineCache", 1),
        ("load.py", "from . import plan", 1),
        ("load.py", "from .sockets import MODEL", 0),
        ("load.py", "import linear_core", 1),  # ComfyUI loads the pack under another name
        ("host.py", "import comfy.utils, folder_paths, server", 0),
        ("host.py", "from .load import Load", 1),
        ("host.py", "from .files import find", 1),
        ("__init__.py", "from .load import Load", 0),
        ("__init__.py", "import server", 1),
    ],
)
def test_a_wrong_import_of_a_node_is_seen(file, text, wrong):
    """The check above would notice, and lets the right ones pass."""
    assert len(node_complaints(ROOT / "nodes" / file, text)) == wrong


def imported_from_bench(text: str) -> set[str]:
    """Modules of bench/ that a file of it imports, wherever the import stands, for readers of types too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "bench":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bench."):
            found.add(node.module.removeprefix("bench."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("bench.") for a in node.names if a.name.startswith("bench.")}
    return found


def test_bench_has_no_import_circle():
    """A report knows its data, the lab knows the report; nothing knows the lab but what measures with it."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "bench").glob("*.py"))}
    known = {name: imported_from_bench(text) for name, text in texts.items()}
    assert "report" in known["quality"], "imports are seen"
    TopologicalSorter(known).prepare()
    known["report"] |= imported_from_bench("if TYPE_CHECKING:\n    from bench.quality import Lab")
    with pytest.raises(CycleError):
        TopologicalSorter(known).prepare()


def test_the_pack_imports_nothing_until_it_is_asked():
    """The root __init__.py, which whatever looks at this folder runs, imports nothing but the standard library."""
    path = ROOT / "__init__.py"
    if not path.exists():
        pytest.skip("there is no root __init__.py yet")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in inside:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not getattr(node, "level", 0) and all(map(is_standard, names)), ast.unparse(node)
