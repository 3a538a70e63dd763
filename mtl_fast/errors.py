"""The one error type that means: the input is wrong, here is what and how to mend it."""

from __future__ import annotations


class InputError(ValueError):
    """A wrong input of the user's; the command line prints its one line and exits with status 2."""
