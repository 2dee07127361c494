"""The border between a bug and a message."""

LONGEST = 1000  # letters of a message


class UserError(Exception):
    """Shown to the user as it is: one sentence that names the file or setting, what was found and what to do.

    What it quotes may come from a stranger's file: it stays one line of letters, and not an endless one.
    """

    def __init__(self, sentence: str):
        shown = "".join(letter if letter.isprintable() else " " for letter in sentence[:LONGEST])
        super().__init__(shown + "…" * (len(sentence) > LONGEST))


def quoted(name: str) -> str:
    """A name out of a file, short enough to leave room for what is wrong with it."""
    return f"'{name}'" if len(name) <= 120 else f"'{name[:80]}…{name[-20:]}'"
