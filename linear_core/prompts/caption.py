"""LlamaGen's caption cleaning: its training captions went through it, so prompts should too.

Behaves as T5Embedder.text_preprocessing in language/t5.py of github.com/FoundationVision/LlamaGen (rules from DeepFloyd
IF via PixArt), with the standard library instead of beautifulsoup4 and ftfy. Two things differ: wrongly decoded text is
not repaired (upstream lowers all letters first and can hardly repair it either), and HTML that breaks off is not
guessed. Some rules are odd, but the model has learnt them.
"""

from __future__ import annotations

import html
import re
import unicodedata
from html.entities import html5
from urllib.parse import unquote_plus

FILE = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

# Applied in this order, each to the result of the one before.
MARKUP = [
    (r"<person>", "person"),
    (r"\b(?:(?:https?|www):(?:/{1,3}|[a-z0-9%])|[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@))", ""),
]
TAGS = [
    (r"(?s)<!--.*?-->|<(script|style|template)\b[^>]*>.*?</\1\s*>", ""),
    (r"""<[a-z/!?](?:"[^"]*"|'[^']*'|[^'">])*>""", ""),
]
SYMBOLS = [
    (r"@\w+\b", ""),  # nicknames
    ("[\u31c0-\u9fff]+", ""),  # Chinese and Japanese
    (
        "[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
        "\ufe63\uff0d]+",
        "-",
    ),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),  # article numbers
    (rf"\S+\.(?:{FILE})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
WORDS = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILE})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),  # 24x36, with the Cyrillic letter too
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]

# Ligatures, full- and half-width letters, quotes, line ends, control characters, letters of a Windows code page.
COMPATIBLE = "\u3000\u0133\u0149\u01c6\u01c9\u01cc\u01f3" + "".join(
    map(chr, [*range(0xFB00, 0xFB07), *range(0xFF01, 0xFFF0)])
)
INVISIBLE = [*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
TIDY = {
    **{ord(c): unicodedata.normalize("NFKC", c) for c in COMPATIBLE},
    **dict.fromkeys(INVISIBLE, ""),
    **{n: bytes([n]).decode("cp1252", "replace").replace("\ufffd", chr(n)) for n in range(0x80, 0xA0)},
    **dict.fromkeys(map(ord, "‘’‚\u201b"), "'"),
    **dict.fromkeys(map(ord, "“”„\u201f"), '"'),
    **dict.fromkeys(map(ord, "\r\x85\u2028\u2029"), "\n"),
}


def clean(caption: str) -> str:
    """A caption as LlamaGen's text encoder saw it in training: cleaned twice."""
    return _once(_once(caption))


def _once(text: str) -> str:
    text = unquote_plus(text).strip().lower()
    text = _apply(MARKUP, text)
    text = re.sub(r"&(#x?[0-9a-f]+|[a-z][a-z0-9]*);?", _entity, _apply(TAGS, text))
    text = _apply(SYMBOLS, text)
    if len(re.findall("[-_]", text)) > 3:  # this-is-my-cute-cat
        text = re.sub("[-_]", " ", text)
    text = unicodedata.normalize("NFC", text.translate(TIDY))
    text = html.unescape(html.unescape(text)).strip()
    return _apply(WORDS, text).strip()


def _apply(rules: list[tuple[str, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _entity(match: re.Match[str]) -> str:
    """The character of &eacute; or &#233;, with or without semicolon; an unknown name only loses its semicolon."""
    name = match[1]
    if name.startswith("#"):
        return html.unescape(f"&{name};")
    return html5.get(f"{name};", f"&{name}")
