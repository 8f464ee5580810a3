"""What of others' text people are shown: without secrets, and with nothing in it that steers a screen."""

from __future__ import annotations

import re

from builder.masking import masked, url_credentials

# What a terminal obeys, what reorders or hides text, and what is no character: C0 and C1, every format character of
# Unicode (bidi controls, zero-width ones, tags, the byte order mark), line and paragraph separators, fillers that are
# letters and show nothing, variation selectors that carry data, lone surrogates and noncharacters.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_BLANKS = re.compile(r"[\t-\r\x85\u2028\u2029 ]+")


def visible(text: str) -> str:
    r"""Return text with every character that steers a screen, or that nobody sees, written out: `\x1b`, `\u202e`."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(text: str) -> str:
    """Return lines of any text as people may see them: no secret, nothing hidden; line feeds and tabs' room stay."""
    return "\n".join(visible(line.expandtabs()) for line in masked(text).split("\n"))


def indented(text: str) -> str:
    """Return lines of any text as `shown` does, each indented, so that none can be taken for one of ours."""
    return "\n".join(f"  {line}" for line in shown(text).split("\n"))


def one_line(text: str, limit: int = 1000) -> str:
    """Return `text` as one line that people may see: no secret, no URL's credential, nothing hidden.

    Args:
        text: any text, such as another program's message.
        limit: the most characters to return; what is cut is shown as an ellipsis, and was searched for secrets before.
    """
    line = visible(_BLANKS.sub(" ", masked(without_credentials(text))).strip())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def json_visible(text: str) -> str:
    r"""Return JSON that says the same without a character that steers a screen: `\u202e` in place of the character."""
    return _HIDDEN.sub(lambda found: found[0] if found[0] == "\n" else _json_escaped(found[0]), text)


def without_credentials(text: str) -> str:
    """Return `text` with the credentials of its URLs cut out."""
    pieces, end = [], 0
    for begin, stop in url_credentials(text):
        pieces.append(text[end:begin])
        end = stop
    return "".join([*pieces, text[end:]])


def _json_escaped(char: str) -> str:
    import json

    return json.dumps(char)[1:-1]
