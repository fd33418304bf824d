"""Errors that hswq raises on purpose.

Every message says what was found, what is needed, where, and the cure.
"""

from __future__ import annotations


class HswqError(Exception):
    """Base of all errors raised on purpose."""


class InputError(HswqError, ValueError):
    """A tensor, file or folder handed in cannot be used."""


class OptionError(InputError):
    """An option's value is outside its range or contradicts another option."""


class FormatError(HswqError, ValueError):
    """A file's bytes break its format, or its version is unknown."""


class PlanError(HswqError, ValueError):
    """A plan does not fit the model or cannot be made."""


class Interrupted(KeyboardInterrupt):
    """A long run was stopped at a safe point; the text says how to go on."""


class RankError(HswqError, RuntimeError):
    """A process of a distributed run ended before the others."""


class BackendError(HswqError, RuntimeError):
    """A kernel backend was asked for and cannot run."""
