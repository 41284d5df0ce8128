"""What must not be shown, whatever shows it: tokens, keys and passwords in settings, URLs and the environment.

Knows what a secret looks like.  Knows neither who made the text nor where it goes.
"""

from __future__ import annotations

import os
import re

HIDDEN = "..."
_NAMED_SO = re.compile(r"(?:token|secret|passw(?:or)?d|key|credentials?)$", re.IGNORECASE)  # in the environment
_SHORTEST = 8  # characters of a value of the environment that is taken for a secret
_PARAMETER = r"[?&;][^=&;\s]*(?:token|secret|passw|credential|signature|sig|key|auth)[^=&;\s]*="
_PATTERNS = (
    (re.compile(r"(\w://)[^/\s@'\"]+@"), rf"\g<1>{HIDDEN}@"),  # user:password of a URL
    (re.compile(rf"({_PARAMETER})[^&;#\s'\"]+", re.IGNORECASE), rf"\g<1>{HIDDEN}"),
    (re.compile(r"\b(?:hf_|api_org_|gh[pousr]_|glpat-|sk-)[A-Za-z0-9]{16,}"), HIDDEN),
)


def redact(text: str, *known: str | None) -> str:
    """``text`` with every secret in it replaced by three dots.

    A secret is each of ``known``, the value of a variable of the environment that is named like one, the login and
    the parameters named like one of a URL, and a word with the form of a token of a Hub.
    """
    named = [v for name, v in os.environ.items() if _NAMED_SO.search(name) and len(v) >= _SHORTEST]
    for secret in sorted({s for s in (*known, *named) if s}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for pattern, hidden in _PATTERNS:
        text = pattern.sub(hidden, text)
    return text
