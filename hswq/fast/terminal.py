"""Text from files, made safe to print."""

from __future__ import annotations

import logging


def escape(text: str) -> str:
    r"""Write every character that is not printable as Python writes it in a literal (\x1b, \n).

    Names and metadata come from whoever made the file: control characters in them could clear the
    screen or forge lines, and half a surrogate pair cannot be encoded at all.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def escape_lines(text: str) -> str:
    """Escape a text of several lines, whose ends stay."""
    return "\n".join(map(escape, text.split("\n")))


class EscapingFormatter(logging.Formatter):
    """Formatter of log lines, which quote names from files too."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text, escaped."""
        return escape_lines(super().format(record))
