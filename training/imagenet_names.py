"""Write the names of ImageNet's 1000 classes, as torchvision has them, with its licence.

python training/imagenet_names.py        needs torchvision, which nothing else here does
"""

from __future__ import annotations

import json
from importlib.metadata import distribution
from pathlib import Path

TARGET = Path(__file__).parents[1] / "linear_core" / "assets" / "imagenet_classes.json"


def main() -> None:
    from torchvision.models._meta import _IMAGENET_CATEGORIES as names

    package = distribution("torchvision")
    licence = next(file for file in package.files or [] if file.name == "LICENSE").read_text()
    assert len(names) == len(set(names)) == 1000
    content = {
        "source": f"torchvision {package.version.split('+')[0]}, torchvision/models/_meta.py, by class id",
        "licence": licence.strip(),
        "names": names,
    }
    TARGET.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")
    print(f"{TARGET}: {len(names)} names")


if __name__ == "__main__":
    main()
