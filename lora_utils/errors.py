"""The one error that a caller can cause. What went wrong is for whoever raises it to say."""

import re

_DATA_URI = re.compile(r"data:[^\s'\",;]{0,80}[;,][^\s'\"]{40,}")


class UserError(ValueError):
    """Bad input: the message says what happened, with which file or value, and how to mend it.

    Clients of a Cog server see the message alone, without traceback or context, so each one stands by itself. A file
    that was given within a URI is never part of it.
    """

    def __init__(self, message: str):
        """Take the message, with any file that a data URI in it holds left out."""
        super().__init__(_DATA_URI.sub("data:...", message))


def shown(text: str, most: int = 200) -> str:
    """Return a caller's text as a message may show it: a data URI by its kind, a long one by its beginning."""
    plain = _DATA_URI.sub("data:...", text)
    return plain if len(plain) <= most else f"{plain[:most]}..."
