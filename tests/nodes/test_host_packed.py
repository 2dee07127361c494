"""What the registry would hand out, unpacked into a bare ComfyUI under the name it gets there: every workflow runs.

Runs as test_host.py does: COMFYUI_DIR=path/to/ComfyUI python3 dev.py test -m host
"""

from __future__ import annotations

import json
import re

import pytest

from tests import archive
from tests.models import emu_official, lumina_official, official, official_janus
from tests.nodes import test_host_mar, test_host_mvar, test_host_scales
from tests.nodes.comfy_server import GOLDEN, PACK, WORKFLOWS, comfyui, finish, twin

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with comfyui(archive=archive.pack(tmp_path_factory.mktemp("pack"))) as running:
        models = running.base / "models"  # those that would be fetched: small random ones, laid out as published
        official.write(models)
        official_janus.write(models / "ar_image" / "Janus-Pro-1B")
        lumina_official.write(models)
        lumina_official.write_2(models)
        emu_official.write(models)
        for family in (test_host_mar, test_host_mvar, test_host_scales):
            family.write(models / "ar_image")
        yield running


def test_it_is_whole_where_the_registry_puts_it(server):
    """Nodes, help pages and workflows are there; tests, benchmarks and the developer's tools are not."""
    place = server.base / "custom_nodes" / PACK
    assert not place.is_symlink() and (place / ".tracking").is_file()
    assert not [name for name in ("tests", "bench", "training", "dev.py", ".git", ".ci") if (place / name).exists()]
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert sorted(name for name in server.get("/object_info") if name.startswith("LineAR_")) == sorted(golden)
    for name in golden:
        assert server.read(f"/extensions/{PACK}/docs/{name}.md").startswith(b"# ")
    assert sorted(server.get("/workflow_templates")[PACK]) == sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    assert not re.search(r"IMPORT FAILED|Error while calling comfy_entrypoint|Traceback", server.log)


@pytest.mark.parametrize("name", sorted(path.stem for path in WORKFLOWS.glob("*.json")))
def test_a_workflow_runs(name, server):
    _, end = finish(server, twin(name, **test_host_mar.QUICK))
    assert end["type"] == "execution_success", end
    saved = server.pictures(end["data"]["prompt_id"])
    assert saved and all(path.stat().st_size > 1000 for paths in saved for path in paths)
    assert not re.search(r"WARNING.*(LineAR|linear_core)|Traceback", server.log)
