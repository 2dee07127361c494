"""Download AR Model: the one node, and the one place of the pack, that opens a connection."""

from __future__ import annotations

import time
from pathlib import Path

from comfy_api.latest import io

from ..linear_core.checkpoints.download import Fetched, download
from ..linear_core.checkpoints.published import RELEASES, Release
from . import host
from .inputs import checked

SCALE = 2**20  # the progress bar counts MiB
PAUSE = 0.25  # seconds between two updates


class DownloadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        sizes = ", ".join(f"{name} {_size(release)}" for name, release in RELEASES.items())
        return io.Schema(
            node_id="LineAR_DownloadModel",
            display_name="Download AR Model",
            category="LineAR",
            description="Downloads a published model from huggingface.co into ComfyUI's model folders and checks its "
            "hash. It is the only node of this pack that uses the network, and only when it runs. Press R afterwards "
            "to refresh the file lists.",
            search_aliases=[
                "download",
                "huggingface",
                "fetch model",
                "llamagen",
                "janus",
                "lumina",
                "anole",
                "emu3",
                "infinity",
                "linear",
            ],
            inputs=[
                io.Combo.Input(
                    "release",
                    options=list(RELEASES),
                    tooltip=f"What to download. {sizes}. c2i, var, mvar and mar models take classes, the others text; "
                    "vq, vae and kl16 files are tokenizers. Licences: Lumina-mGPT-7B, Anole and vqgan are not for "
                    "commercial use (Chameleon Research License); Janus: DeepSeek Model License; movqgan_270M, which "
                    "Lumina-mGPT 2.0 needs: none stated; the rest: MIT or Apache-2.0.",
                ),
                io.Boolean.Input(
                    "with_needed",
                    default=True,
                    tooltip="Also download what the model depends on: its tokenizers (0.3 to 1.8 GB) and, for t2i and "
                    "Infinity, the text encoder flan-t5-xl (11.4 GB). Existing files are left untouched.",
                ),
            ],
            outputs=[],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(cls, release: str, with_needed: bool) -> io.NodeOutput:
        lines = []
        for chosen in _chosen(release, with_needed):
            fetched = download(chosen, _folder(chosen), _Report(cls.hidden.unique_id))
            lines += [f"{chosen.name}, licence: {chosen.licence}", *map(_told, fetched)]
        return io.NodeOutput(ui={"text": ["\n".join(lines)]})

    @classmethod
    def fingerprint_inputs(cls, release: str | None = None, with_needed: bool | None = True) -> str:
        """A file that has gone is fetched again. What comes through a link is None here."""
        if release not in RELEASES:
            return ""
        return " ".join(
            str(int((_folder(chosen) / chosen.local_path(file)).exists()))
            for chosen in _chosen(release, with_needed)
            for file in chosen.files
        )


class _Report:
    """Bytes to the progress bar, and whatever stops the host to the download."""

    def __init__(self, node_id: str):
        self.node_id, self.bar, self.next = node_id, None, 0.0

    def __call__(self, done: int, total: int, name: str) -> None:
        if self.bar is None:
            self.bar = host.Progress(max(total // SCALE, 1), self.node_id)
        host.stop_if_asked()
        if done >= total or time.monotonic() >= self.next:
            self.next = time.monotonic() + PAUSE
            self.bar.update(done // SCALE, f"{name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")


def _chosen(release: str, with_needed: bool | None) -> list[Release]:
    chosen = RELEASES[release]
    return [chosen, *(RELEASES[name] for name in chosen.needs if with_needed)]


def _folder(release: Release) -> Path:
    return Path(host.folders(release.folder)[0])


def _size(release: Release) -> str:
    return f"{release.gigabytes:.1f} GB"


def _told(file: Fetched) -> str:
    if not file.hash:
        return f"{file.path}: already there"
    return f"{file.path}: {file.size / 1e9:.2f} GB, hash {file.hash}, commit {file.commit or 'not stated'}"
