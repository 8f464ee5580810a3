"""Secrets that nothing may show: each is added where it is read, and masked in whatever goes out.

They are the process's, and none is ever removed: a later publish's message may still quote an earlier one's secret.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

MASK = "*****"
# Shorter values are words that are everywhere: masking them would hide the log, not the secret. They are masked where a
# user or the word `password` is beside them; docs/decisions/0041-what-is-masked.md.
_SHORTEST = 6
_SHORTEST_LINE = 12
_HEAD = 4
# Of what looks random and is longer than `_DENSE` says, a part is masked too: programs wrap and cut long lines.
_DENSE = re.compile(r"[A-Za-z0-9+/=_-]{24,}")
_BLOCK = 12
_RUN = re.compile(r"[A-Za-z0-9+/=_-]{12,}")
# What is larger is taken for a text of which every line may be one.
_LONGEST = 64 << 10
_LINE_BREAK = re.compile(r"[\r\n]+|\\n")
_WORD = re.compile(r"[^\s'\"]*")
_UNQUOTED = re.compile(r"\S*")
_AUTHORITY = re.compile(r"[^/?#\\]*")
_HOST_AND_PORT = re.compile(r"[^:@]*(?::[0-9]*)?|\[[0-9A-Fa-f:.]*\](?::[0-9]*)?")
_URL_SAFE = str.maketrans("+/", "-_")
_PERCENT = re.compile(r"%[0-9A-F]{2}")
# A signed URL needs no other credential; servers redirect to them, and libraries quote them.
_SIGNED = re.compile(
    r"([?&](?:amp;)?(?:sig|code|[a-z0-9_.-]{0,40}"
    r"(?:signature|token|credential|secret|password|passwd|access_?key_?id|api[_-]?key))=)[^\s&\"'<>#\\]+",
    re.IGNORECASE,
)


class _Known:
    """The forms that are searched for, by their first characters, and the blocks of those of which a part counts."""

    def __init__(self) -> None:
        self.forms: dict[str, bool] = {}
        self.heads: dict[str, list[str]] = {}
        self.blocks: dict[str, list[tuple[str, int]]] = {}
        self._lock = threading.Lock()

    def add(self, form: str, *, parts: bool) -> None:
        """Add a form of at least `_HEAD` characters; with `parts`, what is random in it is known by its parts too."""
        with self._lock:
            if form in self.forms or len(form) < _HEAD:
                return
            self.forms[form] = parts
            self.heads.setdefault(form[:_HEAD], []).append(form)
            if not parts:
                return
            for dense in _DENSE.finditer(form):
                text = dense[0]
                for start in range(0, len(text) - _BLOCK + 1, _BLOCK):
                    self.blocks.setdefault(text[start : start + _BLOCK], []).append((text, start))

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield the places of secrets, in no order; spans may overlap."""
        # The reader of a program's output cuts what is too long, and a secret may be what it cut.
        cut = len(text) - 1 if text.endswith("…") else 0
        heads = self.heads
        for at in range(len(text) - _HEAD + 1):
            if (head := text[at : at + _HEAD]) in heads:
                for form in heads[head]:
                    if text.startswith(form, at):
                        yield at, at + len(form)
                    elif cut and at + len(form) > cut and form.startswith(text[at:cut]):
                        yield at, cut
        if self.blocks:
            yield from self._parts(text)

    def _parts(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield the places of parts of random secrets, one behind the other."""
        reach = 0
        for run in _RUN.finditer(text):
            for at in range(run.start(), run.end() - _BLOCK + 1):
                if at + _BLOCK <= reach:
                    continue
                for form, offset in self.blocks.get(text[at : at + _BLOCK], ()):
                    start, end = _extended(text, at, form, offset, reach)
                    yield start, end
                    reach = max(reach, end)


_known = _Known()


def mask(secrets: Iterable[str], *, user: str = "") -> None:
    """Add secrets that nothing may show, in every encoding.

    Args:
        secrets: passwords, tokens, keys; of one with several lines every line that is long enough counts as well.
        user: who they belong to: the pair is masked too, and makes short ones known.
    """
    for secret in secrets:
        for form in _forms(secret, user):
            _known.add(form, parts=True)


def mask_token(token: str) -> None:
    """Add a token that is good for minutes and that no file holds: as it is sent, and in no other form."""
    if len(token) >= _SHORTEST:
        _known.add(token, parts=False)


def known_secrets() -> dict[str, bool]:
    """Return the forms that nothing may show, for `mask_forms`: what a child shows, it has to mask as this process."""
    return dict(_known.forms)


def mask_forms(forms: Mapping[str, bool]) -> None:
    """Add the forms that another process knows: those of `known_secrets`, each with whether its parts count."""
    for form, parts in forms.items():
        _known.add(form, parts=parts)


def masked(text: str) -> str:
    """Return `text` with every known secret, and what signs its URLs, replaced by asterisks; linear in its length."""
    text = _SIGNED.sub(rf"\1{MASK}", text)
    if not _known.forms:
        return text
    pieces, end = [], -1
    for begin, stop in sorted(_known.spans(text)):
        if begin > end:
            pieces += [text[max(end, 0) : begin], MASK]
        end = max(end, stop)
    return "".join([*pieces, text[max(end, 0) :]])


def url_credentials(text: str, *, quotes: bool = True) -> Iterator[tuple[int, int]]:
    """Yield the places of the credentials of a text's URLs: from behind `://` to behind the `@`; linear in its length.

    What stands before an `@` in the authority is one. Behind the authority's first slash an `@` begins a revision or a
    digest, unless what stands before the slash is no host: `user:pass/word@host` is a password that nobody encoded.

    Args:
        text: any text.
        quotes: whether a quotation mark ends a URL, as in prose and in files; in a variable it is part of one.
    """
    pattern = _WORD if quotes else _UNQUOTED
    at = text.find("://")
    while at >= 0:
        start = at + 3
        following = text.find("://", start)
        word = pattern.match(text, start, following if following >= 0 else len(text))
        end = _credential_end(word[0] if word else "")
        if end:
            yield start, start + end
        at = following


def _credential_end(word: str) -> int:
    """Return how many characters of what follows `://` are a credential, its `@` included; 0 for none."""
    authority = _AUTHORITY.match(word)[0]  # type: ignore[index] # it matches the empty string too
    host = authority.rpartition("@")[2]
    if "@" in authority:
        # `user:p@ss/word@host`: what is no name of a host goes on.
        sloppy = "." not in host and ":" not in host and host != "localhost"
    else:
        sloppy = not _HOST_AND_PORT.fullmatch(host)
    last = word.rfind("@") + 1
    if sloppy and last > len(authority) and not word.startswith("sha256:", last):
        return last
    return len(authority) - len(host)


def _extended(text: str, at: int, form: str, offset: int, reach: int) -> tuple[int, int]:
    """Return the run that a text and a form have in common around a block, not before `reach`."""
    start, first = at, offset
    while start > reach and first > 0 and text[start - 1] == form[first - 1]:
        start, first = start - 1, first - 1
    end, last = at + _BLOCK, offset + _BLOCK
    while end < len(text) and last < len(form) and text[end] == form[last]:
        end, last = end + 1, last + 1
    return start, end


def _forms(secret: str, user: str) -> Iterator[str]:
    """Yield the forms in which a secret may be quoted."""
    secret = secret.strip()
    if len(secret) < _SHORTEST:
        yield from _beside(secret, user)
        return
    lines = [line.strip() for line in _LINE_BREAK.split(secret)]
    if len(secret) <= _LONGEST:
        yield from _encoded(secret)
        if user:
            yield _base64(_bytes(f"{user}:{secret}"))
        for line in lines if len(lines) > 1 else ():
            if len(line) >= _SHORTEST_LINE and not line.startswith("-----"):
                yield from _encoded(line)
    else:
        yield from (line for line in lines if len(line) >= _SHORTEST_LINE)


def _beside(secret: str, user: str) -> Iterator[str]:
    """Yield a short secret with what tells that it is one."""
    if len(secret) < 2:  # noqa: PLR2004 -- one character is on every line
        return
    yield f":{secret}@"
    for between in (" ", "=", " = ", ": ", '": "', '":"', "': '"):
        yield f"password{between}{secret}"
    if user:
        yield f"{user}:{secret}"
        yield _base64(_bytes(f"{user}:{secret}"))


def _encoded(secret: str) -> Iterator[str]:
    """Yield a secret as it is, and as URLs, JSON, Python, shells, HTML and base64 write it."""
    # `builder --help` has no secret, and need not wait for these.
    import json
    from html import escape
    from urllib.parse import quote, quote_plus

    raw = _bytes(secret)
    yield secret
    yield " ".join(secret.split())
    for quoted in (quote(raw, safe=""), quote(raw, safe="/"), quote_plus(raw), quote(quote(raw, safe=""), safe="")):
        yield quoted
        yield _PERCENT.sub(lambda found: found[0].lower(), quoted)
    for escaped in (json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret)):
        yield escaped[1:-1]
        yield escaped[1:-1].replace("/", "\\/")
    yield repr(raw)[2:-1]
    yield secret.encode("unicode_escape").decode()
    yield re.sub(r"(\W)", r"\\\1", secret)
    yield secret.replace("'", "'\\''")
    yield secret.replace("'", "'\"'\"'")
    yield escape(secret)
    # Within what else was encoded with it (`user:secret`, a whole file) it stands at one of three offsets; what is left
    # out at both ends depends on its neighbours.
    for offset in range(3):
        code = _base64(b"\0" * offset + raw)
        whole = (offset + len(raw)) * 8 // 6
        code = code[(0, 2, 3)[offset] : None if offset == 0 else whole]
        for form in (code, code[:whole]) if offset == 0 else (code,):
            if len(form) >= _SHORTEST:
                yield form
                yield form.translate(_URL_SAFE)
                yield quote(form, safe="")


def _bytes(text: str) -> bytes:
    """Return text in UTF-8, bytes that a variable or a file's name could not hold as text among it."""
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # JSON can hold half of a character
        return text.encode(errors="replace")


def _base64(raw: bytes) -> str:
    """Return base64 without padding, which may stand or be left out."""
    import base64

    return base64.b64encode(raw).decode().rstrip("=")


_MOST_BYTES = 4 << 20
# What a key of JSON or of an INI file is called where its value is a secret.
_SECRET_KEY = re.compile(
    r"token|password|passwd|secret|private_?key|access_?key|api_?key|account_?key|signature|auth|pwd",
    re.IGNORECASE,
)
_IN_HOME = (
    ".aws/credentials",
    ".aws/config",
    ".config/gcloud/application_default_credentials.json",
    ".config/pip/pip.conf",
    ".config/uv/uv.toml",
    ".databrickscfg",
    ".mlflow/credentials",
    ".netrc",
    "_netrc",
    ".pip/pip.conf",
)
_IN_SYSTEM = (
    "/etc/pip.conf",
    "/etc/uv/uv.toml",
    "/etc/xdg/pip/pip.conf",
    "/run/secrets/kubernetes.io/serviceaccount/token",
    "/var/run/secrets/kubernetes.io/serviceaccount/token",
)
# Variables that name a file that holds credentials.
_FILE_VARIABLES = (
    "AWS_CONFIG_FILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AZURE_CLIENT_CERTIFICATE_PATH",
    "AZURE_FEDERATED_TOKEN_FILE",
    "DATABRICKS_CONFIG_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "NETRC",
    "PIP_CONFIG_FILE",
    "REGISTRY_AUTH_FILE",
    "UV_CONFIG_FILE",
)
_DOCKER_VARIABLES = ("DOCKER_CONFIG", "BUILD_DOCKER_CONFIG")
# What these hold is the path of a secret, and none itself.
PATH_VARIABLES = frozenset({*_FILE_VARIABLES, *_DOCKER_VARIABLES, "SECRETS_DIR"})


class Secret(NamedTuple):
    """A secret, and the user it belongs to; empty where that is unknown."""

    value: str
    user: str = ""


def mask_files(variables: Mapping[str, Any], home: str) -> None:
    """Mask the secrets of every credential file that this process or a library in it may read.

    Args:
        variables: the settings by the names of their variables.
        home: the user's home; empty for none.
    """
    paths = [Path(path) for path in _IN_SYSTEM]
    paths += [Path(home) / name for name in _IN_HOME] if home else []
    paths += [Path(str(variables[name])) for name in _FILE_VARIABLES if variables.get(name)]
    paths += [Path(str(variables[name])) / "config.json" for name in _DOCKER_VARIABLES if variables.get(name)]
    if variables.get("SECRETS_DIR"):
        # What is named as a variable is a setting, and masked as one.
        paths += [path for path in _files(Path(str(variables["SECRETS_DIR"]))) if not path.name.isupper()]
    for path in paths:
        mask_secrets(in_text(_content(path)))


def mask_secrets(secrets: Iterator[Secret]) -> None:
    """Mask secrets, each with its user."""
    for secret in secrets:
        mask([secret.value], user=secret.user)


def in_text(text: str) -> Iterator[Secret]:
    """Yield the secrets in a file's text, whatever its form: JSON, INI, TOML, netrc, a key, a bare token."""
    yield from in_urls(text)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict):
        yield from in_json(parsed)
        return
    words = text.split()
    if len(words) == 1 or "PRIVATE KEY-----" in text:
        yield Secret(text)
    elif "machine" in words or "default" in words:
        yield from _in_netrc(words)
    yield from _in_lines(text)


def in_urls(text: str, *, quotes: bool = True) -> Iterator[Secret]:
    """Yield the passwords of a text's URLs, and users without one: either may be a token.

    Args:
        text: any text.
        quotes: whether a quotation mark ends a URL; in a variable it is part of one.
    """
    from urllib.parse import unquote

    for begin, end in url_credentials(text, quotes=quotes):
        user, _, password = text[begin : end - 1].partition(":")
        for form in {password or user, unquote(password or user)}:
            yield Secret(form, unquote(user) if password else "")


def in_json(entry: Mapping[str, Any]) -> Iterator[Secret]:
    """Yield the secrets of an object, such as a Docker config.json or a cloud's key, and of the objects in it."""
    waiting: list[Any] = [entry]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            user = next((one[name] for name in ("username", "Username") if isinstance(one.get(name), str)), "")
            for name, value in one.items():
                if isinstance(value, str) and (_SECRET_KEY.search(str(name)) or one is entry.get("HttpHeaders")):
                    yield Secret(value, user)
                    yield from _decoded(value) if name == "auth" else ()
                elif isinstance(value, dict | list):
                    waiting.append(value)
        else:
            waiting += [each for each in one if isinstance(each, dict | list)]


def in_connection_string(text: str) -> Iterator[Secret]:
    """Yield the secrets of `name=value;name=value`, as Azure writes it."""
    for part in text.split(";"):
        name, _, value = part.partition("=")
        if value and (_SECRET_KEY.search(name) or name.lower().endswith("key")):
            yield Secret(value)


def _decoded(auth: str) -> Iterator[Secret]:
    """Yield the password of Docker's `auth`, the base64 of `user:password`."""
    try:
        user, colon, password = base64.b64decode(auth).decode().partition(":")
    except ValueError:
        return
    if colon:
        yield Secret(password.strip("\0"), user)


def _in_netrc(words: list[str]) -> Iterator[Secret]:
    user = ""
    for name, value in pairwise(words):
        if name == "login":
            user = value.strip("\"'")
        elif name in {"password", "account"}:
            yield Secret(value, user)
            yield Secret(value.strip("\"'"), user)


def _in_lines(text: str) -> Iterator[Secret]:
    """Yield the values of `name = value` lines whose name says that they are secret."""
    for line in text.splitlines():
        name, equals, value = line.partition("=") if "=" in line else line.partition(":")
        value = value.strip().strip("\"'")
        if equals and value and "://" not in value and _SECRET_KEY.search(name.strip()):
            yield Secret(value)


def _files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError:
        return []


def _content(path: Path) -> str:
    """Return a regular file's text; empty where no file can be read."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode(errors="surrogateescape")
    except OSError:
        return ""


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
