"""Published files: which there are, what their names say, and where to get them.

Numbers and names only; nothing here reads a file or uses the network. Sources: github.com/FoundationVision/LlamaGen
(MIT), for its text encoder huggingface.co/google/flan-t5-xl (Apache-2.0), github.com/deepseek-ai/Janus (code MIT,
weights DeepSeek Model License), github.com/Alpha-VLLM/Lumina-mGPT, derived from Chameleon (non-commercial),
Lumina-mGPT-2.0 (Apache-2.0) with github.com/ai-forever/MoVQGAN (no licence stated), github.com/baaivision/Emu3 and
Emu3.5 (Apache-2.0), github.com/FoundationVision/VAR and github.com/FoundationVision/Infinity (both MIT), and
github.com/LTH14/mar (MIT), whose own links are no place to download from, so that a copy on the hub stands here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HUB = "https://huggingface.co"
PIXELS = {"c2i": (256, 384), "t2i": (256, 512)}  # sides of the pictures, class- and text-conditional
CODES = 16384  # of every published tokenizer, so an equal number does not prove that two files belong together
FACTOR = 16  # pixels per token along each side, for every published decoder


@dataclass(frozen=True)
class Repository:
    """A repository on the hub, at one commit.

    revision  the commit; None if no source that we can cite names one: then the newest commit is used, and the download
              reports which
    """

    name: str
    revision: str | None
    licence: str

    def url(self, path: str, hub: str = HUB) -> str:
        return f"{hub}/{self.name}/resolve/{self.revision or 'main'}/{path}"


@dataclass(frozen=True)
class Remote:
    """A file on the hub.

    gigabytes   approximate, for people; the hub states the exact size
    sha256      of the content; None if unknown here: then the hash that the hub states for this revision is used
    local_name  name here, if it is not the path there
    """

    repository: Repository
    path: str
    gigabytes: float
    sha256: str | None = None
    local_name: str = ""

    @property
    def url(self) -> str:
        return self.repository.url(self.path)


@dataclass(frozen=True)
class Release:
    """Files that belong together and are offered as one choice, and the model folder that they go to.

    folder     ComfyUI's name of the model folder
    subfolder  a folder of their own in it
    needs      names of other releases that this one needs to draw
    """

    name: str
    folder: str
    files: tuple[Remote, ...]
    needs: tuple[str, ...] = ()
    subfolder: str = ""

    @property
    def gigabytes(self) -> float:
        return sum(file.gigabytes for file in self.files)

    @property
    def licence(self) -> str:
        return self.files[0].repository.licence

    def local_path(self, file: Remote) -> str:
        """Path of a file, relative to the model folder."""
        name = file.local_name or file.path
        return f"{self.subfolder}/{name}" if self.subfolder else name


# Commits: LlamaGen's as linked from github.com/hustvl/ControlAR/issues/10 (2025-04-29), flan-t5-xl's as pinned by
# FoundationVision/Infinity and many others. We know no commit for the others, and no hash for any file.
C2I = Repository("FoundationVision/LlamaGen", "a86ad643a5bde5b5657a8aed7d5c9e2fc6f8c60f", "MIT")
T2I = Repository("peizesun/llamagen_t2i", None, "MIT")
JANUS = {name: Repository(f"deepseek-ai/{name}", None, "DeepSeek Model License") for name in (
    "Janus-Pro-1B", "Janus-Pro-7B", "Janus-1.3B",
)}  # fmt: skip
T5 = Repository("google/flan-t5-xl", "7d6315df2c2fb742f0f5b556879d730926ca9001", "Apache-2.0")

CHAMELEON = "Chameleon Research License, not for commercial use"
LUMINA = {
    name: Repository(f"Alpha-VLLM/{name}", None, f"none stated; made from Chameleon: {CHAMELEON}")
    for name in (
        "Lumina-mGPT-7B-512", "Lumina-mGPT-7B-768", "Lumina-mGPT-7B-1024", "Lumina-mGPT-7B-768-Omni",
    )
}  # fmt: skip
LUMINA_2 = "Lumina-mGPT-2.0"
LUMINAS_2 = {name: Repository(f"Alpha-VLLM/{name}", None, "Apache-2.0") for name in (LUMINA_2, "Lumina-mGPT-2.0-Omni")}
MOVQGAN = Repository("ai-forever/MoVQGAN", None, "none stated")
VAR = Repository("FoundationVision/var", None, "MIT")
VAR_TOKENIZER = "vae_ch160v4096z32"
MVAR = Repository("OliverRen/M-VAR", None, "Apache-2.0")  # by its card; the repository of its code states none
INFINITY = Repository("FoundationVision/Infinity", None, "MIT")
# By bits of a token. The file called d32 has as many as d32reg and other bits; only their names tell them apart.
INFINITY_TOKENIZERS = {
    16: "infinity_vae_d16", 32: "infinity_vae_d32reg", 56: "infinity_vae_d56_f8_14_patchify",
}  # fmt: skip
# Numbers of codes that do not tell published tokenizers apart.
SHARED_CODES = frozenset({CODES, *(2**bits for bits in INFINITY_TOKENIZERS)})
INFINITY_VAES = frozenset({*INFINITY_TOKENIZERS.values(), "infinity_vae_d24", "infinity_vae_d32", "infinity_vae_d64"})
MAR = Repository("jadechoghari/mar", None, "MIT")
KL16 = "kl16"
ANOLE = Repository("GAIR/Anole-7b-v0.1", None, CHAMELEON)

EMU = {name: Repository(f"BAAI/{name}", None, "Apache-2.0") for name in (
    "Emu3-Gen", "Emu3-Stage1", "Emu3-VisionTokenizer", "Emu3.5-Image", "Emu3.5", "Emu3.5-VisionTokenizer",
)}  # fmt: skip

MOVQ, EMU3_VQ, EMU35_VQ = "movqgan_270M", "Emu3-VisionTokenizer", "Emu3.5-VisionTokenizer"
VQ_KINDS = {MOVQ: "movq", EMU3_VQ: "emu3", EMU35_VQ: "ibq"}  # kinds of tokenizers; all others are "vqgan"
TOKENIZERS = {"c2i": "vq_ds16_c2i", "t2i": "vq_ds16_t2i"}
TEXT_ENCODER, FEATURES = "flan-t5-xl", 2048  # FEATURES: per token, in every published model


def _single_file(repository: Repository, path: str, gigabytes: float, *needs: str) -> Release:
    return Release(path.rpartition(".")[0], "ar_image", (Remote(repository, path, gigabytes),), needs)


def _janus(name: str, *weights: tuple[str, float]) -> Release:
    """A folder of its own: the decoder's file contains the tokenizers too."""
    files = (("config.json", 0), ("tokenizer.json", 0), *weights)
    return Release(name, "ar_image", tuple(Remote(JANUS[name], *file) for file in files), subfolder=name)


LUMINA_TOKENIZER = "lumina-mgpt-tokenizer"
CHAMELEON_VQ = "vqgan"


def _lumina(name: str) -> Release:
    """A folder of its own for the language model; the text tokenizer and the VQ tokenizer are shared."""
    files = (
        ("config.json", 0), ("model.safetensors.index.json", 0), ("model-00001-of-00002.safetensors", 9.98),
        ("model-00002-of-00002.safetensors", 4.05),
    )  # fmt: skip
    own = tuple(Remote(LUMINA[name], *file) for file in files)
    return Release(name, "ar_image", own, (LUMINA_TOKENIZER, CHAMELEON_VQ), subfolder=name)


EMU_WORDS = ("config.json", "emu3.tiktoken", "emu3_vision_tokens.txt", "model.safetensors.index.json")


def _emu(name: str, tokenizer: str, *gigabytes: float) -> Release:
    """A folder of its own with as many shards as sizes are given; the VQ tokenizer has another."""
    shards = (f"model-{n:05d}-of-{len(gigabytes):05d}.safetensors" for n in range(1, len(gigabytes) + 1))
    files = (*((word, 0) for word in EMU_WORDS), *zip(shards, gigabytes, strict=True))
    return Release(name, "ar_image", tuple(Remote(EMU[name], *file) for file in files), (tokenizer,), subfolder=name)


def _emu_tokenizer(name: str, gigabytes: float) -> Release:
    files = (("config.json", 0), ("model.safetensors", gigabytes))
    return Release(name, "ar_image", tuple(Remote(EMU[name], *file) for file in files), subfolder=name)


def _lumina_2(name: str) -> Release:
    """A folder of its own, with its text tokenizer."""
    small = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")
    shards = (f"model-0000{n}-of-00004.safetensors" for n in range(1, 5))
    files = (*((file, 0.0) for file in small), *zip(shards, (4.96, 4.98, 4.42, 1.40), strict=True))
    own = tuple(Remote(LUMINAS_2[name], *file) for file in files)
    return Release(name, "ar_image", own, (MOVQ,), subfolder=name)


def _mvar(depth: int, gigabytes: float) -> Remote:
    """Its file, which the hub calls by its depth alone. Sizes are counted: four bytes for each parameter."""
    return Remote(MVAR, f"d{depth}.pth", gigabytes, local_name=f"mvar_d{depth}.pth")


# Hashes as the hub's pages state them.
_INFINITY_FILES: tuple[tuple[str, float, str | None, tuple[str, ...]], ...] = (
    ("infinity_125M_256x256.pth", 0.50, None, (INFINITY_TOKENIZERS[16], TEXT_ENCODER)),
    (
        "infinity_2b_reg.pth", 8.82, "d5958b37e7ecb914230cd2b8c28aae0ec108ce08b315720bc3dc52596cc5b3a7",
        (INFINITY_TOKENIZERS[32], TEXT_ENCODER),
    ),
    ("infinity_vae_d16.pth", 1.56, "a8b866165f7efbc0ae15667c618bc78c6f37b5e71078a948b78d69ff2348d8a1", ()),
    ("infinity_vae_d32reg.pth", 1.56, "7a37fa3ea1b2a1ebd23de61d91a5e68202825e5a67edaef4b7c55f5fd5b9cf26", ()),
    (
        "infinity_vae_d56_f8_14_patchify.pth", 1.22,
        "c4c695350125593dde7ec7120e6dff7039a9adea01516f6e14758eb94e3ec6c2", (),
    ),
)  # fmt: skip


def _infinity_8b(name: str, *gigabytes: float) -> Release:
    """A folder of its own for the shards, which are in a folder of the same name on the hub."""
    shards = (f"model-{n:05d}-of-{len(gigabytes):05d}.safetensors" for n in range(1, len(gigabytes) + 1))
    files = (("model.safetensors.index.json", 0), *zip(shards, gigabytes, strict=True))
    own = tuple(Remote(INFINITY, f"{name}/{file}", size, local_name=file) for file, size in files)
    return Release(name, "ar_image", own, (INFINITY_TOKENIZERS[56], TEXT_ENCODER), subfolder=name)


_T5_FILES = (
    ("config.json", 0),
    ("special_tokens_map.json", 0),
    ("spiece.model", 0),
    ("tokenizer.json", 0),
    ("tokenizer_config.json", 0),
    ("model.safetensors.index.json", 0),
    ("model-00001-of-00002.safetensors", 9.45),
    ("model-00002-of-00002.safetensors", 1.95),
)

RELEASES: dict[str, Release] = {
    release.name: release
    for release in (
        *(
            _single_file(C2I, f"c2i_{size}.pt", gigabytes, TOKENIZERS["c2i"])
            for size, gigabytes in (
                ("B_256", 0.44), ("B_384", 0.44), ("L_256", 1.4), ("L_384", 1.4), ("XL_384", 3.1), ("XXL_384", 5.6),
                ("3B_384", 12.4),
            )
        ),
        _single_file(T2I, "t2i_XL_stage1_256.pt", 3.1, TOKENIZERS["t2i"], TEXT_ENCODER),
        _single_file(T2I, "t2i_XL_stage2_512.pt", 3.1, TOKENIZERS["t2i"], TEXT_ENCODER),
        _single_file(C2I, "vq_ds16_c2i.pt", 0.28),
        _single_file(T2I, "vq_ds16_t2i.pt", 0.28),
        _single_file(C2I, "vq_ds8_c2i.pt", 0.28),
        _janus("Janus-Pro-1B", ("pytorch_model.bin", 4.18)),
        _janus(
            "Janus-Pro-7B",
            ("pytorch_model.bin.index.json", 0), ("pytorch_model-00001-of-00002.bin", 9.99),
            ("pytorch_model-00002-of-00002.bin", 4.85),
        ),
        _janus("Janus-1.3B", ("model.safetensors", 4.18)),
        *map(_lumina, LUMINA),
        Release(
            LUMINA_TOKENIZER, "ar_image", (Remote(LUMINA["Lumina-mGPT-7B-768"], "tokenizer.json", 0),),
            subfolder="Lumina-mGPT-7B-768",
        ),
        Release(
            "Anole-7b-v0.1", "ar_image",
            (Remote(ANOLE, "models/7b/consolidated.pth", 14.1), Remote(ANOLE, "tokenizer/text_tokenizer.json", 0)),
            (CHAMELEON_VQ,), subfolder="Anole-7b-v0.1",
        ),
        *map(_lumina_2, LUMINAS_2),
        _single_file(MOVQGAN, f"{MOVQ}.ckpt", 1.08),
        Release(CHAMELEON_VQ, "ar_image", (Remote(ANOLE, "tokenizer/vqgan.ckpt", 0.28, local_name="vqgan.ckpt"),)),
        *(_emu(name, EMU3_VQ, 4.94, 4.83, 5.0, 5.0, 4.83, 5.0, 4.37) for name in ("Emu3-Gen", "Emu3-Stage1")),
        _emu_tokenizer(EMU3_VQ, 1.08),
        *(_emu(name, EMU35_VQ, *[4.55] * 15) for name in ("Emu3.5-Image", "Emu3.5")),
        _emu_tokenizer(EMU35_VQ, 1.82),
        *(
            _single_file(VAR, f"var_d{depth}.pth", gigabytes, VAR_TOKENIZER)
            for depth, gigabytes in ((16, 1.24), (20, 2.41), (24, 4.14), (30, 8.04), (36, 9.44))
        ),
        _single_file(VAR, f"{VAR_TOKENIZER}.pth", 0.44),
        *(
            Release(f"mvar_d{depth}", "ar_image", (_mvar(depth, gigabytes),), (VAR_TOKENIZER,))
            for depth, gigabytes in ((12, 0.79), (16, 1.86), (20, 3.60), (24, 6.20), (32, 14.64))
        ),
        *(
            Release(path.rpartition(".")[0], "ar_image", (Remote(INFINITY, path, gigabytes, sha256),), needs)
            for path, gigabytes, sha256, needs in _INFINITY_FILES
        ),
        _infinity_8b("infinity_8b_weights", 8.22, 8.22, 8.22, 8.83),
        _infinity_8b("infinity_8b_512x512_weights", *[4.11] * 7, 4.72),
        *(
            _single_file(MAR, f"mar-{size}.safetensors", gigabytes, KL16)
            for size, gigabytes in (("base", 0.83), ("large", 1.91), ("huge", 3.77))
        ),
        _single_file(MAR, f"{KL16}.safetensors", 0.27),
        Release(TEXT_ENCODER, "text_encoders", tuple(Remote(T5, *file) for file in _T5_FILES), subfolder=TEXT_ENCODER),
    )
}  # fmt: skip


def download_hint(name: str) -> str:
    """Where to get the file called `name`, as the end of a sentence; '' if it is not published."""
    release = RELEASES.get(name) or RELEASES.get(name.rpartition(".")[0])
    return f"get it with the node Download AR Model or from {release.files[0].url}" if release else ""


def kind_from_name(name: str) -> str | None:
    """'c2i' or 't2i' if a file's name contains exactly one of them; all of the name of one of Infinity's tokenizers."""
    if name in INFINITY_VAES:
        return name
    found = set(re.findall(r"(?<![a-z0-9])(c2i|t2i)(?![a-z0-9])", name.lower()))
    return found.pop() if len(found) == 1 else None


def pixels_from_name(name: str, kind: str) -> int | None:
    """The side of the pictures, in pixels, that a decoder's file name states (c2i_XL_384: 384); None without one.

    Only sizes published for this `kind` count, and a name with two of them is ambiguous: None. So is a number in a name
    that says neither `kind` nor px: it may count steps, or pictures.
    """
    if kind_from_name(name) != kind and not re.search(r"\d{3}(?:px|pixels)(?![a-z])", name.lower()):
        return None
    found = {int(n) for n in re.findall(r"(?<!\d)(\d{3})(?!\d)", name)} & set(PIXELS[kind])
    return found.pop() if len(found) == 1 else None
