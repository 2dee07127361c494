"""Make docs/widget.png and docs/run.webp from the recording: the widget in the real page, row by row.

python tests/browser/pictures.py     (after `python3 dev.py test`, which fetches the page; needs Chromium and Node.js)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))
import dev  # noqa: E402

PARTS = Path(os.environ.get("LINEAR_BROWSER", ROOT / ".venv" / "browser"))
PORT = 8497


def main() -> None:
    page = PARTS / f"frontend-{dev.FRONTENDS[0]}" / "comfyui_frontend_package" / "static"
    host = subprocess.Popen([sys.executable, HERE / "host.py", str(PORT), page])
    try:
        time.sleep(4)
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "PLAYWRIGHT": str(PARTS)}
            subprocess.run(["node", HERE / "capture.mjs", f"http://127.0.0.1:{PORT}", folder], env=env, check=True)
            docs = ROOT / "docs"
            docs.mkdir(exist_ok=True)
            with Image.open(Path(folder) / "widget.png") as still:
                still.convert("RGB").quantize(200, dither=Image.Dither.NONE).save(docs / "widget.png", optimize=True)
            frames = [Image.open(path).convert("RGB") for path in sorted(Path(folder).glob("row-*.png"))]
            times = [170] * 23 + [900] + [1400] * (len(frames) - 24)
            frames[0].save(
                docs / "run.webp", save_all=True, append_images=frames[1:], duration=times, loop=0, quality=70, method=6
            )
    finally:
        host.terminate()
        host.wait()
    for name in ("widget.png", "run.webp"):
        print(f"docs/{name}: {(docs / name).stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
