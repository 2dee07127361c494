"""What the command line says while its packages are imported, which takes seconds: to Ctrl-C, and if one is missing."""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType

PIP_NAMES = {"PIL": "pillow"}  # where they differ from the names that are imported
NEEDED = "torch numpy pillow safetensors tqdm"


def _stop(*_: object) -> None:
    os.write(2, b"stopped.\n")
    os._exit(130)  # nothing has been done yet


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in a sentence which package is missing or broken; anything else is reported as usual."""
    module = getattr(error, "name", None) or ""
    if not isinstance(error, ImportError) or module.startswith("linear_core"):
        sys.__excepthook__(kind, error, trace)
        return
    package = module.partition(".")[0]
    package = PIP_NAMES.get(package, package) or "that failed to load"
    print(
        f"error: the command line needs the Python package {package} ({error}); run pip install {NEEDED}.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def begin() -> None:
    """From now on, until `done`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    sys.excepthook = _explain


def done() -> None:
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.excepthook = sys.__excepthook__


if getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "") == "linear_core.__main__":
    begin()
