"""Keep a release's workflows and schemas for tests/nodes/test_golden.py, under the version that pyproject.toml names.

python tests/golden.py
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "fixtures" / "golden"


def main() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    target = GOLDEN / version
    if target.exists():
        sys.exit(f"{target.relative_to(ROOT)} is there, and what is released never changes; raise the version first.")
    shutil.copytree(ROOT / "workflows", target / "workflows", ignore=shutil.ignore_patterns("*.jpg", "*.png"))
    shutil.copy(ROOT / "tests" / "fixtures" / "object_info.json", target)
    print(f"{target.relative_to(ROOT)}: {len(list(target.rglob('*.json')))} files")


if __name__ == "__main__":
    main()
