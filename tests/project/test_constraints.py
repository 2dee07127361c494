"""constraints/: its files cover what pyproject.toml asks for, and `dev.py update` writes them. Without a network."""

import itertools
import os
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import constraints
import dev
from constraints import update
from tests.versions import PYTHONS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files of exact versions, which are then read instead of ours."""
    monkeypatch.setattr(constraints, "FOLDER", tmp_path)

    def write(name, *lines):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def test_dependency_groups_are_read_as_toml_reads_them():
    text = constraints.PROJECT.read_text(encoding="utf-8")
    assert constraints.dependency_groups(text) == tomllib.loads(text)["project"]["optional-dependencies"]


def test_each_requirement_has_a_version_on_each_python_and_in_its_range():
    for group, lines in constraints.groups().items():
        text = constraints.file("registry" if group == "registry" else "main").read_text(encoding="utf-8")
        known = [Requirement(line) for line in text.splitlines() if "==" in line]
        for line, python in itertools.product(lines, PYTHONS):
            wanted, here = Requirement(line), {"python_version": python}
            found = [
                pin
                for pin in known
                if pin.name == constraints.normal(line) and (not pin.marker or pin.marker.evaluate(here))
            ]
            assert len(found) == 1, (group, line, python)
            assert wanted.specifier.contains(str(found[0].specifier).removeprefix("==")), (group, line, python)


def test_a_missing_file_of_versions_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(constraints, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match=r"main\.txt, which .* is missing\. git restore"):
        dev.set_up(["standalone"])


def test_a_requirement_without_a_version_is_named(write):
    write("main", "numpy==1")
    with pytest.raises(SystemExit, match=r"main\.txt has no version of some-thing\. python3 dev\.py update"):
        constraints.options("main", ["numpy", "some_thing>=2"])
    write("main", "numpy==1", "some-thing==3; python_version < '3.11'")
    assert constraints.options("main", ["numpy", "some_thing>=2"])


def test_the_lowest_version_is_the_one_that_is_declared():
    assert [constraints.lowest(line) for line in ("a>=1", "a.b-c>=0.4.3", "a==2.13.0")] == [
        "a==1",
        "a.b-c==0.4.3",
        "a==2.13.0",
    ]
    for line in ("a", "a>1", "a>=1,<2", "a<2"):
        with pytest.raises(SystemExit, match="needs a lowest version"):
            constraints.lowest(line)


# Renewing them


def test_a_package_gets_one_line_for_each_run_of_pythons_with_one_version():
    found = {
        "3.10": {"all": "1", "old": "1", "some": "1", "three": "1"},
        "3.11": {"all": "1", "some": "2", "three": "2"},
        "3.12": {"all": "1", "new": "1", "some": "2", "three": "3"},
    }
    assert update.lines(found) == [
        "all==1",
        "new==1",
        "old==1",
        'some==1; python_version < "3.11"',
        'some==2; python_version >= "3.11"',
        'three==1; python_version < "3.11"',
        'three==2; python_version >= "3.11" and python_version < "3.12"',
        'three==3; python_version >= "3.12"',
    ]


def wheel(index: Path, name: str, version: str, tag: str = "py3-none-any", needs: tuple[str, ...] = ()):
    """A package without content, in a package index that is a folder."""
    info, file = f"{name}-{version}.dist-info", f"{name}-{version}-{tag}.whl"
    (index / name).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(index / name / file, "w") as archive:
        head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        archive.writestr(f"{info}/METADATA", "\n".join([*head, *(f"Requires-Dist: {line}" for line in needs)]))
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    with (index / name / "index.html").open("a") as page:
        page.write(f'<a href="{file}">{file}</a>\n')


def test_pip_answers_for_another_python_and_all_systems_at_once(tmp_path, monkeypatch):
    needs = ("b; python_version < '3.11'", "c>=1; python_version >= '3.11'", "d; sys_platform == 'win32'")
    wheel(tmp_path, "a", "1", needs=needs)
    wheel(tmp_path, "a", "2", "cp39-cp39-manylinux_2_17_x86_64")  # for no supported Python
    wheel(tmp_path, "b", "2+cpu")
    wheel(tmp_path, "c", "1")
    wheel(tmp_path, "d", "1", "py3-none-win_amd64")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    assert update.resolve(["a"], "3.10") == {"a": "1", "b": "2", "d": "1"}
    assert update.resolve(["a"], "3.12") == {"a": "1", "c": "1", "d": "1"}


def test_update_writes_what_pip_finds_and_says_what_changed(write, monkeypatch, capsys):
    def resolve(requirements, python):
        return {constraints.normal(line): "2" if python == "3.10" else "3" for line in requirements}

    monkeypatch.setattr(update, "resolve", resolve)
    monkeypatch.setattr(update.shutil, "which", lambda name: None)
    browser = write("browser", "comfyui-frontend-package==1", "comfyui-frontend-package==0", "playwright-core==7")
    main = write("main", "gone==1", 'numpy==2; python_version < "3.11"')
    assert update.main() == 0
    said = capsys.readouterr().out
    assert constraints.pins("browser") == {"comfyui-frontend-package": ["3", "0"], "playwright-core": ["7"]}
    assert constraints.pins("main")["numpy"] == ["2", "3"] and "comfy-cli" in constraints.pins("registry")
    assert "playwright-core stays 7" in said
    assert "- gone==1" in said and '+ numpy==3; python_version >= "3.11"' in said and "numpy==2" not in said

    before = browser.read_bytes(), main.read_bytes()
    assert update.main() == 0
    assert (browser.read_bytes(), main.read_bytes()) == before
    assert capsys.readouterr().out.count("nothing new") == 3


def test_where_pip_finds_no_versions_nothing_is_changed(write, monkeypatch):
    main = write("main", "a==1")
    write("browser", "comfyui-frontend-package==1", "playwright-core==7")
    monkeypatch.setattr(dev, "run", lambda command, **rest: 1)
    with pytest.raises(SystemExit, match=r"pip finds no versions for Python 3\.\d+"):
        update.main()
    assert constraints.pins("main") == {"a": ["1"]} and main.is_file()
