"""Make docs/widget.png, docs/scales.png and docs/run.webp from the recording: the widget in the real page, row by row.

python tests/web/browser/pictures.py     (after `python3 dev.py test`, which fetches the page; needs Chromium and Node.js)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
import dev  # noqa: E402
from tests.web.browser.chromium import Chromium, page_of, replaying, script  # noqa: E402


def main() -> None:
    chromium = Chromium()
    try:
        with replaying(page_of(dev.frontends()[0])) as url, tempfile.TemporaryDirectory() as folder:
            status, _, console = script("capture.mjs", url, folder, chromium=chromium, seconds=600)
            if status:
                raise SystemExit(console)
            docs = ROOT / "docs"
            docs.mkdir(exist_ok=True)
            for name in ("widget.png", "scales.png"):
                with Image.open(Path(folder) / name) as still:
                    still.convert("RGB").quantize(200, dither=Image.Dither.NONE).save(docs / name, optimize=True)
            frames = [Image.open(path).convert("RGB") for path in sorted(Path(folder).glob("row-*.png"))]
            times = [170] * 23 + [900] + [1400] * (len(frames) - 24)
            frames[0].save(
                docs / "run.webp", save_all=True, append_images=frames[1:], duration=times, loop=0, quality=70, method=6
            )
    finally:
        chromium.close()
    for name in ("widget.png", "scales.png", "run.webp"):
        print(f"docs/{name}: {(docs / name).stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
