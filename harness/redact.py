"""Keeping secrets out of what is written down: logs, provenance, reports.

A value is secret by its name (an API key, a token, a password), or as who logs in at an address.
What the ranks themselves print is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

HIDDEN = "***"
_WORDS = (
    "TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|COOKIE|JWT|AUTHORIZATION|(?<=_)(?:PASS|PWD)(?![A-Z])|"
    "(?<![A-Z])(?:API|ACCESS|AUTH|MASTER|PRIVATE|SSH)?KEYS?(?![A-Z])"
)
_SECRET = re.compile(_WORDS, re.IGNORECASE)
# NAME=value, name: value and "name": "value". A value in quotes ends with them, and may hold them
# as a shell or YAML writes them; one whose quotes do not end, with the text. After a colon one
# without quotes may have spaces, as in YAML's mappings.
_QUOTED = r"""\"(?:[^\"\\]|\\.)*\"|'(?:[^']|'')*'|[\"'].*"""
_PLAIN = r"""[^\s,;&}\]\"']"""
_SETTING = re.compile(
    rf"((?<![\w.-])[\w.-]*(?:{_WORDS})[\w-]*[\"']?\s*(?:=|(:))\s*)"
    rf"(?:{_QUOTED}|(?(2){_PLAIN}[^\n,;&}}\]\"']*|{_PLAIN}+))",
    re.IGNORECASE | re.DOTALL,
)
_USER = re.compile(r"(?<=://)[^\s/?#@]*@")


def is_secret(name: str) -> bool:
    """Whether what has this name is to be kept secret, such as WANDB_API_KEY."""
    return _SECRET.search(name) is not None


def hidden(name: str, value: str) -> str:
    """The value as it may be shown beside its name."""
    return HIDDEN if value and is_secret(name) else redacted(value)


def redacted(text: str) -> str:
    """Text without the values of settings with secret names, and without who logs in where
    (``https://user:password@host``)."""
    return _USER.sub(f"{HIDDEN}@", _SETTING.sub(rf"\1{HIDDEN}", text))


def redacted_words(words: Iterable[str]) -> list[str]:
    """The words of a command; the word after an option such as ``--token`` goes too."""
    shown: list[str] = []
    after_option = False
    for word in words:
        name, equals, value = word.partition("=")
        if after_option:
            shown.append(HIDDEN)
        elif value and is_secret(name.rpartition(".")[2]) and not re.search(r"[\s:/]", name):
            shown.append(f"{name}{equals}{HIDDEN}")  # whatever signs it is made of
        else:
            shown.append(redacted(word))
        after_option = word.startswith("-") and not equals and is_secret(word)
    return shown
