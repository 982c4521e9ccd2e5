"""The one error that a caller can cause. What went wrong is for whoever raises it to say."""


class UserError(ValueError):
    """Bad input: the message says what happened, with which file or value, and how to mend it.

    Clients of a Cog server see the message alone, without traceback or context, so each one stands by itself.
    """
