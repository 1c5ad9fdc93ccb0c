"""Makes foreign text safe to display: escapes control characters and hides passwords in URLs.

Error messages pass through `shown` when they are created, log records when they are written, tables and lines when a
command prints them. Independent of errors and terminals.
"""

import logging
import re
import unicodedata
from typing import Any

HIDDEN = "***"

# `user:password@` of a URL: up to the last @ before the path, since a password may contain unencoded @, ? and #.
_USER_INFO = re.compile(r"(?<=://)[^\s/'\"<>]*@")
_KEPT = frozenset("\n\t\u200c\u200d")
"""Unprintable characters that are not escaped: line ends, tabs, and the joiners of scripts and emoji."""
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: control characters (including ESC and C1), format characters (which change the direction of
text), lone surrogates, and line and paragraph separators, which terminals do not count as line ends."""


def shown(text: str) -> str:
    """Returns a text that is safe to display; most texts are unchanged."""
    if text.isprintable():
        return mask(text) if "@" in text else text
    return mask("".join(map(_escaped, text)))


def mask(text: str) -> str:
    """Hides the user info of URLs: `http://user:secret@host` becomes `http://***@host`."""
    return _USER_INFO.sub(f"{HIDDEN}@", text) if "@" in text and "://" in text else text


def masked(value: Any) -> Any:
    """Masks every text in plain JSON values, for documents that are stored and shown later."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {masked(name): masked(each) for name, each in value.items()}
    if isinstance(value, list):
        return [masked(each) for each in value]
    if type(value) is tuple:
        return tuple(masked(each) for each in value)
    return value


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, whose records are safe to display."""
    logger = logging.getLogger(name)
    if not any(isinstance(each, _Shown) for each in logger.filters):
        logger.addFilter(_Shown())
    return logger


class _Shown(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = shown(_FORMATTER.formatException(record.exc_info))
        return True


_FORMATTER = logging.Formatter()


def _escaped(character: str) -> str:
    if character in _KEPT or character.isprintable() or unicodedata.category(character) not in _ESCAPED:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
