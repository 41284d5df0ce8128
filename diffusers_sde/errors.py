"""Errors that are the caller's to mend.  Knows nothing."""


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says why and what to do instead."""
