"""The border between a bug and a message."""


class UserError(Exception):
    """Shown to the user as it is: one sentence that names the file or setting, what was found and what to do."""
