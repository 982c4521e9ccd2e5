"""The one error a caller can cause. Owns no knowledge of what went wrong, only its form."""


class UserError(ValueError):
    """Bad input: the message says what happened, with which file or value, and how to mend it.

    Clients of a Cog server see the message alone, without traceback or context, so each one stands by itself.
    """
