"""dev.py without a network: what it decides, the commands it builds, and what it refuses to touch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import constraints
import dev

needs_links = pytest.mark.skipif(dev.WINDOWS, reason="Windows lets not everybody make symbolic links")


@pytest.fixture
def started(monkeypatch):
    """The commands that dev.py would have started; all of them succeed."""
    commands = []

    def record(command, cwd=None, **env):
        commands.append([str(part) for part in command])
        return 0

    monkeypatch.setattr(dev, "run", record)
    return commands


@pytest.fixture
def comfyui(tmp_path):
    """A folder that looks like a ComfyUI, with a space in its path."""
    folder = tmp_path / "my ComfyUI"
    (folder / "custom_nodes").mkdir(parents=True)
    (folder / "main.py").touch()
    return folder


@pytest.fixture
def venv(tmp_path, monkeypatch):
    """A .venv of its own in which nothing is installed."""
    folder = tmp_path / ".venv"
    monkeypatch.setattr(dev, "VENV", folder)
    monkeypatch.setattr(dev, "installed", lambda python: {})
    monkeypatch.setattr(dev, "answers", lambda host: False)
    tree(dev.venv_python(folder))
    return folder


def tree(*files: Path):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


# Setting up


def test_the_stamp_is_for_exactly_these_requirements_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(constraints, "FOLDER", tmp_path)
    stamp, main = tmp_path / "stamp.txt", tmp_path / "main.txt"
    main.write_text("a==1\nb==1\n")
    assert not dev.is_installed(stamp, ["a>=1"], "main")
    stamp.write_text(dev.fingerprint(["a>=1"], "main"))
    assert dev.is_installed(stamp, ["a>=1"], "main")
    assert not dev.is_installed(stamp, ["a>=2"], "main")
    assert not dev.is_installed(stamp, ["a>=1", "b"], "main")
    main.write_text(main.read_text().replace("b==1", "b==2"))
    assert not dev.is_installed(stamp, ["a>=1"], "main")


@pytest.mark.parametrize(
    ("system", "nvidia", "reachable", "index"),
    [
        ("Linux", False, True, dev.CPU_INDEX),
        ("Linux", False, False, None),
        ("Linux", True, True, None),
        ("Darwin", False, True, None),
        ("Windows", False, True, None),
    ],
)
def test_the_cpu_build_is_for_linux_without_a_gpu(system, nvidia, reachable, index):
    assert dev.torch_index(None, system, nvidia, lambda: reachable) == index
    assert (
        dev.torch_index("https://example.org/simple", system, nvidia, lambda: reachable) == "https://example.org/simple"
    )


def test_set_up_installs_once_and_exact_versions(venv, started):
    python = dev.set_up(["standalone", "dev"])

    assert python == dev.venv_python(venv)
    assert all(command[:4] == [str(python), "-m", "pip", "install"] for command in started)
    for command in started:
        assert command[command.index("--constraint") + 1] == str(dev.ROOT / "constraints" / "main.txt")
    torch, standalone, tools = started
    assert "torch==2.13.0" in torch
    assert "torch==2.13.0" in standalone and "numpy>=1.26" in standalone  # torch once more, for what it needs
    assert any(part.startswith("ruff>=") for part in tools)

    started.clear()
    dev.set_up(["standalone", "dev"])
    assert started == []


def test_an_interrupted_set_up_goes_on_where_it_stopped(venv, monkeypatch):
    monkeypatch.setattr(dev, "run", lambda command, **rest: 1)
    with pytest.raises(SystemExit, match=r"Installing stopped.*\n.*dev\.py update chooses versions anew"):
        dev.set_up(["standalone"])
    with pytest.raises(SystemExit, match=r"Installing stopped.*\n.*try an older Python"):
        dev.pip_install(Path("python"), ["numpy==1.26"], "--only-binary", ":all:")
    assert not list(venv.glob("installed-*"))


def test_where_pip_fails_quietly_it_says_why_aloud(venv, monkeypatch):
    ran = []
    monkeypatch.setattr(dev, "run", lambda command: ran.append(command) or 1)
    assert dev.pip(Path("python"), ["a"], "--quiet") == 1
    assert [command[4:] for command in ran] == [
        ["--disable-pip-version-check", "--quiet", "a"],
        ["--disable-pip-version-check", "a"],
    ]


@pytest.mark.parametrize(("present", "stays"), [("2.14.0+rocm", True), ("2.13.0+cpu", False), ("2.13.0", False)])
def test_a_torch_that_is_there_stays(present, stays, venv, monkeypatch, started):
    """pip would replace another version if it were named; with the right one it looks after what that needs."""
    monkeypatch.setattr(dev, "installed", lambda python: {"torch": present})
    dev.install(dev.venv_python(venv), ["torch==2.13.0", "numpy"], None)
    assert [command[-2:] for command in started] == [["--quiet", "numpy"] if stays else ["torch==2.13.0", "numpy"]]


def test_installed_asks_the_interpreter():
    """All of its packages, as its pip lists them; this process may know more, as setuptools adds its own."""
    command = [sys.executable, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    known = dict(line.split("==") for line in listed)
    assert dev.installed(Path(sys.executable)) == {constraints.normal(name): known[name] for name in known}


def test_an_environment_that_is_made_anew_leaves_the_others_in_its_folder_alone(tmp_path, started):
    dev.make_environment(tmp_path)
    tree(tmp_path / "pyvenv.cfg")
    dev.make_environment(tmp_path)
    assert [command[1:] for command in started] == [
        ["-m", "venv", str(tmp_path)],
        ["-m", "venv", "--clear", str(tmp_path)],
    ]


def test_what_pip_installs_without_a_version_is_named(venv, monkeypatch, started, capsys):
    found = [{"mine": "1"}, {"mine": "1", "torch": "2"}, {"mine": "1", "torch": "2", "numpy": "2", "new-one": "3"}]
    monkeypatch.setattr(dev, "installed", lambda python: found.pop(0))
    dev.set_up(["standalone"])
    said = capsys.readouterr().out
    assert "constraints/main.txt has no version of new-one, so" in said and "mine" not in said


@pytest.mark.parametrize(("which", "numpy"), [("newest", "numpy>=1.26"), ("oldest", "numpy==1.26")])
def test_both_ends_of_what_is_supported_get_an_environment_and_a_row(which, numpy, venv, monkeypatch, started, capsys):
    monkeypatch.setattr(dev, "browser_parts", lambda python: [])
    monkeypatch.setattr(dev, "registry_missing", lambda: "")
    python = str(dev.venv_python(venv / which))
    assert dev.main(["test", f"--{which}"]) == 0
    made, torch, others, tested = started
    assert made[-1] == str(venv / which)
    assert "torch==2.13.0" in torch and numpy in others and "--constraint" not in others
    assert ("--upgrade" in others) == (which == "newest")
    assert tested == dev.pytest(python, "--record")
    assert capsys.readouterr().out.split("== summary")[1].split()[:2] == ["pytest", "passed"]

    dev.main(["test", f"--{which}", "-k", "grid"])  # no row for a part, unless it is asked for
    assert started[-1] == dev.pytest(python, "-k", "grid")
    with pytest.raises(SystemExit):
        dev.main(["test", "--newest", "--oldest"])


def test_update_resolves_with_a_pip_of_its_own(venv, started):
    assert dev.main(["update"]) == 0
    made, pip, resolved = started
    assert made[-1] == str(venv / "update") and pip[-1] == dev.UPDATE_PIP
    assert resolved == [str(dev.venv_python(venv / "update")), str(dev.ROOT / "constraints" / "update.py")]


# The commands


def test_demo_forwards_what_it_does_not_know(monkeypatch, started):
    monkeypatch.setattr(dev, "set_up", lambda groups, index: Path("python"))
    assert dev.main(["demo", "--class", "alpine dawn", "--seed", "3"]) == 0
    assert started == [["python", "-m", "linear_core", "demo", "--class", "alpine dawn", "--seed", "3"]]


def test_test_runs_every_check_and_fails_with_any(monkeypatch, capsys):
    ran = []

    def fail_the_linter(command, cwd=None):
        ran.append(command)
        return int("check" in command)

    monkeypatch.setattr(dev, "set_up", lambda groups, index: Path("python"))
    monkeypatch.setattr(dev, "registry_missing", lambda: "no network")
    monkeypatch.setattr(dev, "run", fail_the_linter)
    monkeypatch.setattr(dev.shutil, "which", lambda name: None)
    assert dev.main(["test", "-k", "one or two"]) == 1
    assert ran[-1] == dev.pytest(Path("python"), "-k", "one or two")
    summary = capsys.readouterr().out.split("== summary")[1]
    assert "ruff check   failed" in summary
    assert "ruff format  passed" in summary
    assert "mypy         passed" in summary
    assert "node --test  not run: " in summary
    assert "pytest       passed" in summary
    assert "browser      not run: Chromium was not found" in summary
    assert "registry     not run: no network" in summary


def test_the_share_of_the_core_that_tests_reach_is_asked_of_all_of_them(monkeypatch):
    def command(*extra, quick=False):
        return dev.checks(Path("python"), list(extra), None, [], quick)[-1][1][3:]

    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    workers = ["-n", "auto", "--dist", "worksteal"]
    assert command() == [*workers, "--cov"]
    assert command("--record") == [*workers, "--cov", "--record"]
    assert command("-k", "fold") == [*workers, "-k", "fold"]
    assert command(quick=True) == [*workers, "--quick"]
    monkeypatch.setenv("COMFYUI_DIR", "somewhere")
    assert command("-m", "host") == ["-m", "host"], "one ComfyUI after the other"


def test_a_quick_run_leaves_out_what_takes_long_and_says_so(monkeypatch, capsys, started):
    monkeypatch.setattr(dev, "set_up", lambda groups, index=None: Path("python"))
    monkeypatch.setattr(dev, "registry_missing", lambda: pytest.fail("350 MB for a run of a minute"))
    assert dev.main(["test", "--quick"]) == 0
    assert not [command for command in started if "mypy" in command or "install" in command]
    summary = capsys.readouterr().out
    for name in ("mypy", "browser", "registry"):
        assert f"{name:12} not run: --quick" in summary


def test_the_browser_tests_get_their_parts_where_chromium_and_node_are(monkeypatch):
    """Each page that is supported, and what drives it; nothing where one of the programs is missing."""
    present = {"chromium", "node", "npm"}
    monkeypatch.setattr(dev.shutil, "which", lambda name: f"/bin/{name}" if name in present else None)
    assert dev.browser_missing() == ""
    parts = dict(dev.browser_parts(Path("python")))
    folder = dev.VENV / "browser"
    assert set(parts) == {
        folder / "node_modules" / "playwright-core",
        *(folder / f"frontend-{version}" for version in dev.frontends()),
    }
    assert len(dev.frontends()) == 2
    for program in sorted(present):
        present.discard(program)
        assert dev.browser_parts(Path("python")) == []
        assert bool(dev.browser_missing()) == (program != "npm")
        present.add(program)


def test_javascript_tests_say_why_they_do_not_run():
    def reason(node, scripts):
        return dev.checks(Path("python"), [], node, scripts)[3][2]

    assert reason("node", [Path("state.test.mjs")]) == ""
    assert "node was not found" in reason(None, [Path("state.test.mjs")])
    assert "there are no" in reason("node", [])


def test_the_registrys_tools_get_an_environment_of_their_own_once(tmp_path, monkeypatch, started):
    monkeypatch.setattr(dev, "REGISTRY", tmp_path / "registry")
    dev.REGISTRY.mkdir()
    assert dev.registry_missing() == ""
    made, installed = started
    assert made[1:3] == ["-m", "venv"] and made[-1] == str(dev.REGISTRY)
    assert installed[0] == str(dev.venv_python(dev.REGISTRY))
    assert [constraints.normal(part) for part in installed[-2:]] == ["comfy-cli", "comfy-test"]
    assert installed[-4:-2] == ["--constraint", str(dev.ROOT / "constraints" / "registry.txt")]

    started.clear()
    assert dev.registry_missing() == ""
    assert started == []


@pytest.mark.parametrize(("broken", "reason"), [("venv", "virtual environment"), ("pip", "could not be installed")])
def test_where_the_registrys_tools_cannot_be_had_there_is_a_reason(broken, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(dev, "REGISTRY", tmp_path / "registry")
    monkeypatch.setattr(dev, "run", lambda command: int(broken in command))
    assert reason in dev.registry_missing()
    assert not dev.REGISTRY.exists()


def test_without_a_command_comes_the_help(capsys):
    assert dev.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("demo", "test", "release", "comfy"))


def test_ctrl_c_ends_quietly(monkeypatch, capsys):
    def interrupted(groups, index):
        raise KeyboardInterrupt

    monkeypatch.setattr(dev, "set_up", interrupted)
    assert dev.main(["demo"]) == 130
    assert capsys.readouterr() == ("", "")


def test_programs_get_utf8_and_their_status_comes_back():
    assert dev.run([sys.executable, "-c", "import sys; sys.exit(3 + sys.flags.utf8_mode)"]) == 4


# ComfyUI


@pytest.mark.parametrize("arguments", [[], ["--dir", "nowhere"]])
def test_comfy_explains_in_three_lines_how_to_get_one(arguments, capsys, started):
    assert dev.main(["comfy", *arguments]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "comfy-cli" in lines[1]
    assert "dev.py comfy --dir" in lines[2]
    assert started == []


@needs_links
def test_comfy_links_the_pack_and_starts_the_host(comfyui, started):
    python = dev.venv_python(comfyui / ".venv")
    tree(python)
    for _ in range(2):  # the second time the link is there
        assert dev.main(["comfy", "--dir", str(comfyui), "--port", "8190", "--cpu"]) == 0
    assert started == [[str(python), "main.py", "--port", "8190", "--cpu"]] * 2
    assert [entry.name for entry in (comfyui / "custom_nodes").iterdir()] == [dev.PACK]
    assert (comfyui / "custom_nodes" / dev.PACK).resolve() == dev.ROOT


def test_comfy_takes_the_folder_of_the_portable_build(tmp_path):
    tree(tmp_path / "ComfyUI" / "main.py", tmp_path / "python_embeded" / "python.exe")
    comfy = dev.find_comfy(str(tmp_path))
    assert comfy == tmp_path.resolve() / "ComfyUI"
    assert dev.comfy_python(comfy, windows=True) == comfy.parent / "python_embeded" / "python.exe"
    assert dev.comfy_python(comfy, windows=False) == Path(sys.executable)


@needs_links
@pytest.mark.parametrize("kind", ["folder", "link elsewhere", "broken link"])
def test_comfy_leaves_alone_what_is_not_ours(kind, comfyui, tmp_path):
    place = comfyui / "custom_nodes" / dev.PACK
    if kind == "folder":
        place.mkdir()
    else:
        target = tmp_path / "other"
        if kind == "link elsewhere":
            target.mkdir()
        dev.make_link(place, target)
    before = os.lstat(place)
    with pytest.raises(SystemExit, match="move it away"):
        dev.link_pack(comfyui)
    assert os.lstat(place).st_ino == before.st_ino


@needs_links
def test_a_pack_that_is_there_under_another_name_is_not_linked_again(comfyui):
    dev.make_link(comfyui / "custom_nodes" / "LineAR", dev.ROOT)
    assert dev.link_pack(comfyui).name == "LineAR"
    assert len(list((comfyui / "custom_nodes").iterdir())) == 1


def test_where_links_are_not_allowed_windows_gets_a_junction(tmp_path, monkeypatch, started):
    def refuse(self, target, target_is_directory=False):
        raise OSError("a required privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(dev, "WINDOWS", False)
    with pytest.raises(SystemExit, match="copy"):
        dev.make_link(tmp_path / "link", tmp_path)
    monkeypatch.setattr(dev, "WINDOWS", True)
    dev.make_link(tmp_path / "link", tmp_path)
    assert started == [["cmd", "/c", "mklink", "/J", str(tmp_path / "link"), str(tmp_path)]]


def test_options_that_start_alike_are_not_taken_for_ours():
    args, extra = dev.parser().parse_known_args(["comfy", "--di", "x", "--dir", "y"])
    assert (args.dir, extra) == ("y", ["--di", "x"])
