"""Text of files and of other people, made safe to show: control characters visible, passwords in URLs hidden.

Error messages pass through `shown` when they are made, log records when they are written, tables and lines when the
command prints them. Knows no error and no terminal.
"""

import logging
import re
import unicodedata
from typing import Any

HIDDEN = "***"

# `user:password@` of a URL: up to the last @ before the path, since a password may hold @, ? and # that nobody encoded.
_USER_INFO = re.compile(r"(?<=://)[^\s/'\"<>]*@")
_KEPT = frozenset("\n\t\u200c\u200d")
"""Of the characters that are not printed: line ends, and the joiners that scripts and emoji are written with."""
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's control characters (ESC and C1 among them), format characters (which turn the direction of text), lone
surrogates, and line ends that no terminal counts."""


def shown(text: str) -> str:
    """A text as people may see it; most are returned as they are."""
    if text.isprintable():
        return mask(text) if "@" in text else text
    return mask("".join(map(_escaped, text)))


def mask(text: str) -> str:
    """Without the user info of URLs in it: `http://user:secret@host` becomes `http://***@host`."""
    return _USER_INFO.sub(f"{HIDDEN}@", text) if "@" in text and "://" in text else text


def masked(value: Any) -> Any:
    """Plain values (of JSON) in which every text is masked; for what is written down and shown later."""
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
    """The logger of a module, whose records are safe to show."""
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
