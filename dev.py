"""LineAR without ComfyUI, and beside it: set up, draw the demo, run the tests, link the pack.

    python3 dev.py demo     draws pictures with the bundled model
    python3 dev.py test     runs linters and tests
    python3 dev.py update   renews the exact versions that the others install
    python3 dev.py comfy    links this folder into a ComfyUI and starts it
    python3 dev.py release  says what is left to do before a release

Only the standard library (constraints/ too), and only syntax that an older Python can read: this starts before
anything is installed, and says which Python is needed where that one is missing.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - this file is what tells people so
    sys.exit(f"LineAR needs Python 3.10 or newer, and this is {sys.version.split()[0]} ({sys.executable}).")

import argparse
import hashlib
import os
import platform
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import constraints

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PACK = "ar-line-cache"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
WINDOWS = os.name == "nt"
REGISTRY = VENV / "registry"  # an environment of its own, as these tools pin much that others use
UPDATE_PIP = "pip==26.3"  # what `update` resolves with: one version, as others may answer differently
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def say(text: str) -> None:
    """Print at once, as the programs we start write to the same screen."""
    print(text, flush=True)


def run(command: list, cwd: Path | None = None, **env: str) -> int:
    """Run a program to its end and return its exit status; on Ctrl-C it may close its files first."""
    process = subprocess.Popen([str(part) for part in command], cwd=cwd, env={**os.environ, "PYTHONUTF8": "1", **env})
    try:
        return process.wait()
    except KeyboardInterrupt:  # the program got the same Ctrl-C; a second one ends it the hard way
        try:
            process.wait()
        except KeyboardInterrupt:
            process.kill()
        raise


# Setting up ----------------------------------------------------------------------------------------------------------


def fingerprint(requirements: list[str], name: str) -> str:
    """A short text that changes when the requirements or their constraints change."""
    text = "\n".join([*requirements, constraints.file(name).read_text(encoding="utf-8")])
    return hashlib.sha256(text.encode()).hexdigest()


def is_installed(stamp: Path, requirements: list[str], name: str) -> bool:
    """Whether `stamp` says that exactly these requirements have been installed, under these constraints."""
    return stamp.is_file() and stamp.read_text() == fingerprint(requirements, name)


def venv_python(venv: Path, windows: bool = WINDOWS) -> Path:
    """The interpreter inside a virtual environment."""
    return venv / ("Scripts/python.exe" if windows else "bin/python")


def answers(host: str, seconds: float = 3.0) -> bool:
    """Whether `host` takes an HTTPS connection. In a thread, as looking up its name has no time limit of its own."""
    opened = threading.Event()

    def knock() -> None:
        try:
            socket.create_connection((host, 443), timeout=seconds).close()
        except OSError:
            return
        opened.set()

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    return opened.is_set()


def torch_index(asked: str | None, system: str, nvidia: bool, reachable: Callable[[], bool]) -> str | None:
    """The package index to add for torch, or None for those that pip knows already.

    On Linux PyPI's torch brings several GB of CUDA libraries, so a machine without an NVIDIA GPU gets the CPU build,
    if PyTorch's own index can be reached. On Windows and macOS PyPI has the small build.
    """
    if asked:
        return asked
    return CPU_INDEX if system == "Linux" and not nvidia and reachable() else None


def installed(python: Path) -> dict[str, str]:
    """The packages that `python` has, with their versions."""
    ask = "import importlib.metadata as m\nfor d in m.distributions(): print(d.metadata['Name'], d.version)"
    shown = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True).stdout
    return {constraints.normal(name): version for name, version in map(str.split, shown.splitlines())}


def pip(python: Path, requirements: list[str], *options: str) -> int:
    """Install with the pip of `python` and return its exit status; where it is not 0, pip has said why."""
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", *options, *requirements]
    status = run(command)
    if status and "--quiet" in options:  # a quiet pip does not say which versions contradict each other
        status = run([part for part in command if part != "--quiet"])
    return status


def pip_install(python: Path, requirements: list[str], *options: str) -> None:
    """Install with the pip of `python`, or stop."""
    if pip(python, requirements, *options):
        hint = ""
        if "--constraint" in options:
            hint = "\nIf a version in constraints/ is the reason, python3 dev.py update chooses versions anew."
        elif "--only-binary" in options:
            hint = "\nIf there is no wheel of a version that old for this Python, try an older Python."
        raise SystemExit(f"Installing stopped; pip says why above. The same command goes on from there.{hint}")


def install_torch(python: Path, requirement: str, asked: str | None, *options: str) -> None:
    """Install torch from the index that suits this machine."""
    system, nvidia = platform.system(), bool(shutil.which("nvidia-smi"))
    index = torch_index(asked, system, nvidia, lambda: answers("download.pytorch.org"))
    if index:
        say(f"Installing {requirement} with {index} (the CPU build is about 200 MB).")
    elif system == "Linux" and nvidia:
        say(f"Installing {requirement} with CUDA, a download of several GB. For the CPU build, about 200 MB,")
        say(f"stop here (Ctrl-C) and add --torch-index {CPU_INDEX}")
    elif system == "Linux":
        say(f"Installing {requirement} from pip's own index, as download.pytorch.org does not answer. If pip chooses")
        say("the build with CUDA, that is a download of several GB; --torch-index URL names another index.")
    else:
        say(f"Installing {requirement} (about 200 MB).")
    # Added, not instead: the user's pip settings stay in force, and to pip 2.13.0+cpu is newer than 2.13.0.
    pip_install(python, [requirement], *options, *(["--extra-index-url", index] if index else []))


def install(python: Path, requirements: list[str], index: str | None, *options: str) -> None:
    """Install these requirements. A torch that is there already stays, whichever it is."""
    present = installed(python).get("torch", "")
    for line in requirements:
        if not line.startswith("torch=="):
            continue
        if not present:
            install_torch(python, line, index, *options)
        elif line != f"torch=={present.split('+')[0]}":
            say(f"Keeping the torch {present} of {python.parent.parent} ({line} is what is tested).")
            requirements = [other for other in requirements if other != line]
    say(f"Installing {', '.join(line for line in requirements if not line.startswith('torch=='))}.")
    pip_install(python, requirements, "--quiet", *options)


def make_environment(folder: Path) -> Path:
    """The interpreter of this virtual environment, which is made where there is none."""
    python = venv_python(folder)
    if not python.exists():
        # What is left of an environment goes; the other environments in .venv stay.
        clear = ["--clear"] if (folder / "pyvenv.cfg").exists() else []
        if run([sys.executable, "-m", "venv", *clear, folder]):
            shutil.rmtree(folder, ignore_errors=True)
            raise SystemExit("No virtual environment. On Debian and Ubuntu: sudo apt install python3-venv")
    return python


def set_up(groups: list[str], index: str | None = None) -> Path:
    """Make .venv, install what is missing of these dependency groups, and return its interpreter."""
    known = constraints.groups()
    options = constraints.options("main", [line for group in groups for line in known[group]])
    if not venv_python(VENV).exists():
        say(f"Making {VENV} (about 1 GB once everything is in it; delete the folder to undo this).")
    python = make_environment(VENV)
    for group in groups:
        stamp, requirements = VENV / f"installed-{group}.txt", known[group]
        if is_installed(stamp, requirements, "main"):
            continue
        before = installed(python)
        install(python, requirements, index, *options)
        unknown = [name for name in installed(python) if name not in before and name not in constraints.pins("main")]
        if unknown:
            say(f"constraints/main.txt has no version of {', '.join(unknown)}, so pip has chosen the newest.")
            say("python3 dev.py update adds them.")
        stamp.write_text(fingerprint(requirements, "main"))
    return python


def set_up_range(which: str, index: str | None = None) -> Path:
    """An environment of its own with the newest, or with the lowest, versions that pyproject.toml allows."""
    known = constraints.groups()
    requirements = [*known["standalone"], *known["dev"]]
    python = make_environment(VENV / which)
    if which == "oldest":  # wheels alone, as nobody wants to build an old numpy
        install(python, [constraints.lowest(line) for line in requirements], index, "--only-binary", ":all:")
    else:
        install(python, requirements, index, "--upgrade", "--upgrade-strategy", "eager")
    return python


def registry_missing() -> str:
    """Install the registry's own tools, once; why the gates that need them cannot run, or an empty text."""
    requirements, stamp = constraints.groups()["registry"], REGISTRY / "installed.txt"
    if is_installed(stamp, requirements, "registry"):
        return ""
    options = constraints.options("registry", requirements)
    say(f"Installing {', '.join(requirements)} for the registry's gates (about 350 MB).")
    if run([sys.executable, "-m", "venv", "--clear", REGISTRY]):
        return "no virtual environment could be made for the registry's tools"
    python = venv_python(REGISTRY)
    if pip(python, requirements, "--quiet", *options):
        shutil.rmtree(REGISTRY, ignore_errors=True)
        return "the registry's tools could not be installed; pip says why above"
    stamp.write_text(fingerprint(requirements, "registry"))
    return ""


# The commands --------------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace, extra: list[str]) -> int:
    """Draw the demo picture."""
    python = set_up(["standalone"], args.torch_index)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return run([python, "-m", "linear_core", "demo", *extra], PYTHONPATH=path)


def pytest(python: Path, *arguments: str) -> list:
    """The command that runs pytest: tests in a worker for each core, but one after the other in a real ComfyUI."""
    workers = [] if os.environ.get("COMFYUI_DIR") else ["-n", "auto", "--dist", "worksteal"]
    return [python, "-m", "pytest", *workers, *arguments]


def checks(
    python: Path, extra: list[str], node: str | None, scripts: list[Path], quick: bool = False
) -> list[tuple[str, list, str]]:
    """What `test` does: a name, the command, and why it does not run (empty when it does)."""
    if not scripts:
        missing = "there are no tests/web/*.test.mjs"
    else:
        missing = "" if node else "node was not found; Node.js 20 or newer runs tests/web/*.test.mjs"
    # Some of the tests cannot reach the share of the core that all of them have to.
    cover = [] if quick or set(extra) - {"--record"} else ["--cov"]
    return [
        ("ruff check", [python, "-m", "ruff", "check", "."], ""),
        ("ruff format", [python, "-m", "ruff", "format", "--check", "."], ""),
        ("mypy", [python, "-m", "mypy"], "--quick" if quick else ""),
        ("node --test", [node, "--test", *scripts], missing),
        ("pytest", pytest(python, *cover, *["--quick"] * quick, *extra), ""),
    ]


def chromium() -> str | None:
    """The Chromium of this machine."""
    return next((path for name in CHROMIUM if (path := shutil.which(name))), None)


def browser_missing() -> str:
    """Which program the browser tests lack; empty when they can run."""
    if not chromium():
        return "Chromium was not found"
    return "" if shutil.which("node") else "node was not found; Node.js 20 or newer drives Chromium"


def frontends() -> list[str]:
    """Versions of the page that the browser tests drive: ComfyUI's newest, and that of the oldest supported ComfyUI."""
    return constraints.pins("browser")["comfyui-frontend-package"]


def browser_parts(python: Path) -> list[tuple[Path, list]]:
    """What the browser tests need beside Chromium and Node.js: where each part goes, and what fetches it.

    Nothing where those two are not installed: the tests then say so.
    """
    npm, folder = shutil.which("npm"), VENV / "browser"
    if browser_missing() or not npm:
        return []
    quiet = ["--disable-pip-version-check", "--quiet", "--no-deps"]
    parts = [
        (folder / f"frontend-{version}", [python, "-m", "pip", "install", *quiet, "--target",
         folder / f"frontend-{version}", f"comfyui-frontend-package=={version}"])
        for version in frontends()
    ]  # fmt: skip
    packages = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder]
    driver = f"playwright-core@{constraints.pins('browser')['playwright-core'][0]}"
    return [*parts, (folder / "node_modules" / "playwright-core", [*packages, driver])]


def install_browser_parts(python: Path) -> None:
    """Fetch what is missing for the browser tests, and what is there in another version."""
    for part, command in browser_parts(python):
        stamp = VENV / "browser" / f"installed-{part.name}.txt"
        if part.is_dir() and stamp.is_file() and stamp.read_text() == command[-1]:
            continue
        shutil.rmtree(part, ignore_errors=True)
        say(f"Installing {command[-1]} for the browser tests.")
        if run(command) == 0:  # where that fails, the tests that need it say so
            stamp.write_text(command[-1])


def test(args: argparse.Namespace, extra: list[str]) -> int:
    """Run every check to its end, then say how each went."""
    python = (
        set_up_range(args.versions, args.torch_index)
        if args.versions
        else set_up(["standalone", "dev"], args.torch_index)
    )
    if not args.quick:
        install_browser_parts(python)
    no_gates = "--quick" if args.quick else registry_missing()
    summary, failed = [], False
    scripts = sorted(ROOT.glob("tests/web/*.test.mjs"))
    planned = checks(python, extra, shutil.which("node"), scripts, args.quick)
    if args.versions:  # Style is a matter of the pinned versions alone, and so is coverage.
        planned = [("pytest", pytest(python, *(extra or ["--record"])), "")]
    for name, command, missing in planned:
        if missing:
            summary.append(f"{name:12} not run: {missing}")
            continue
        say(f"\n== {name}")
        status = run(command, cwd=ROOT)
        summary.append(f"{name:12} {'failed' if status else 'passed'}")
        failed = failed or status != 0
    for name, lacking in (("browser", "--quick" if args.quick else browser_missing()), ("registry", no_gates)):
        if lacking:
            summary.append(f"{name:12} not run: {lacking}")
    say("\n".join(["\n== summary", *summary]))
    return int(failed)


def update(args: argparse.Namespace, extra: list[str]) -> int:
    """Write constraints/ anew, with the newest versions that pyproject.toml allows."""
    python = make_environment(VENV / "update")
    pip_install(python, [UPDATE_PIP], "--quiet")
    return run([python, constraints.FOLDER / "update.py", *extra], cwd=ROOT)


def release(args: argparse.Namespace, extra: list[str]) -> int:
    """Say what is left to do before this version can be released."""
    python = set_up(["standalone", "dev"], args.torch_index)
    registry_missing()  # where that is so, the list says that the gates did not run
    return run([python, ROOT / "tests" / "release.py", *extra], cwd=ROOT)


def find_comfy(folder: str | None) -> Path | None:
    """Where ComfyUI's main.py is: in `folder`, or in its ComfyUI subfolder (the portable build), or None."""
    if not folder:
        return None
    path = Path(folder).expanduser().resolve()
    return next((place for place in (path, path / "ComfyUI") if (place / "main.py").is_file()), None)


def comfy_python(comfy: Path, windows: bool = WINDOWS) -> Path:
    """The interpreter that ComfyUI was installed with, as far as its folders tell, else this one."""
    known = [venv_python(comfy / ".venv", windows), venv_python(comfy / "venv", windows)]
    if windows:
        known.append(comfy.parent / "python_embeded" / "python.exe")  # the portable build spells it like this
    return next((path for path in known if path.is_file()), Path(sys.executable))


def make_link(link: Path, target: Path) -> None:
    """A symbolic link to a folder, or a junction where Windows does not allow one."""
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError as error:
        if not WINDOWS or run(["cmd", "/c", "mklink", "/J", link, target]):
            raise SystemExit(f"Could not link {link} ({error}); copy {target} there instead.") from None


def link_pack(comfy: Path, root: Path = ROOT) -> Path:
    """The place in custom_nodes that leads to `root`, made if need be; what someone else put there stays."""
    folder = comfy / "custom_nodes"
    folder.mkdir(exist_ok=True)
    # Under any name: a second entry for the same pack would register every node twice.
    present = next((entry for entry in sorted(folder.iterdir()) if entry.resolve() == root), None)
    if present:
        return present
    link = folder / PACK
    if os.path.lexists(link):
        raise SystemExit(f"{link} is there already and does not lead to {root}; please move it away first.")
    make_link(link, root)
    return link


def comfy(args: argparse.Namespace, extra: list[str]) -> int:
    """Link the pack into a ComfyUI and start it."""
    found = find_comfy(args.dir)
    if found is None:
        problem = f"There is no main.py in {args.dir}." if args.dir else "Which ComfyUI? --dir PATH says so."
        say(f"{problem} To get a ComfyUI (several GB), in a virtual environment:")
        say("    pip install comfy-cli && comfy install && comfy which")
        say("and then, with the folder that the last of these prints:  python3 dev.py comfy --dir FOLDER")
        return 1
    say(f"The pack is in {link_pack(found)}")
    python = comfy_python(found)
    say(f"Starting ComfyUI with {python}; open http://127.0.0.1:{args.port} when it says so.")
    return run([python, "main.py", "--port", args.port, *extra], cwd=found)


def parser() -> argparse.ArgumentParser:
    """The command line; what it does not know is passed on."""
    top = argparse.ArgumentParser(prog="python3 dev.py", description="Try, test and link LineAR.")
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    def add(function: Callable, text: str, passed_on: str) -> argparse.ArgumentParser:
        end = f"Anything else is passed on: {passed_on}."
        command = commands.add_parser(
            function.__name__, help=text, description=f"{text}.", epilog=end, allow_abbrev=False
        )
        command.set_defaults(function=function)
        return command

    def add_index(command: argparse.ArgumentParser) -> None:
        text = "package index to add for torch (or set LINEAR_TORCH_INDEX); by default the CPU build where it suits"
        command.add_argument("--torch-index", metavar="URL", default=os.environ.get("LINEAR_TORCH_INDEX"), help=text)

    add_index(add(demo, "draw pictures with the bundled model, full cache and small cache", "options of the demo"))
    tests = add(test, "run linters and all tests", "arguments of pytest, such as -k WORD or a file")
    add_index(tests)
    versions = tests.add_mutually_exclusive_group()
    versions.add_argument(
        "--quick",
        action="store_true",
        help="a minute: the tests that notice most mistakes, no browser, no mypy",
    )
    for name, text in (
        ("newest", "run pytest alone, with the newest packages that pyproject.toml allows"),
        ("oldest", "run pytest alone, with the lowest versions that pyproject.toml declares"),
    ):
        text += "; a run of all tests is recorded in the table of what was tested where"
        versions.add_argument(f"--{name}", dest="versions", action="store_const", const=name, help=text)
    add(update, "renew constraints/, the exact versions that everybody installs", "nothing")
    add_index(add(release, "say what is left to do before a release", "nothing"))
    start = add(comfy, "link this folder into a ComfyUI and start it", "arguments of ComfyUI, such as --cpu")
    start.add_argument("--dir", metavar="PATH", help="the ComfyUI folder, the one with main.py")
    start.add_argument("--port", metavar="N", type=int, default=8188, help="default: 8188")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    top = parser()
    args, extra = top.parse_known_args(argv)
    if not hasattr(args, "function"):
        if extra:
            top.error(f"first a command, then {' '.join(extra)}")
        top.print_help()
        return 0
    try:
        return args.function(args, extra)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
