"""Errors that users see."""

MAX_LENGTH = 1000  # characters of a message


class UserError(Exception):
    """Shown to the user as it is: one sentence that names the file or setting, what was found and what to do.

    It may quote a stranger's file, so it is reduced to one line of printable characters of limited length.
    """

    def __init__(self, sentence: str):
        shown = "".join(c if c.isprintable() else " " for c in sentence[:MAX_LENGTH])
        super().__init__(shown + "…" * (len(sentence) > MAX_LENGTH))


def quoted(name: str) -> str:
    """A name from a file in quotes, shortened to leave room for the rest of the message."""
    return f"'{name}'" if len(name) <= 120 else f"'{name[:80]}…{name[-20:]}'"
