"""Render an untrusted Jinja2 template: sandboxed, strict, and in a process of its own with bounds.

Jinja2's sandbox keeps a template from Python's insides, but not from `9**9**9` or from loops in loops, which nothing
within a process can stop. So an author's template is rendered by this file as a program: it reads a request as JSON
from stdin, bounds its own time and memory, and answers as JSON on stdout. It imports nothing of ours, since it is
started without the package's surroundings. Once it has imported what it needs it can open no file and no socket, so
that a way out of the sandbox would still not reach what other processes of this user hold.
"""

from __future__ import annotations

import codecs
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

LARGEST_OUTPUT = 1 << 20
# Of processor time: the start of the process takes 0.2, a template of ours 0.01. And of wall-clock time: on a busy
# machine an honest template waits for its turn.
_SECONDS = 3
_LONGEST_WAIT = 60 * _SECONDS
_MEMORY = 256 << 20
_LARGEST_ANSWER = 16 << 20
_LONGEST_WHAT = 500
_NAME = "<template>"

Value = str | bool | Sequence[str]


class TemplateProblem(Exception):
    """A template cannot be rendered; callers that know its name turn this into an `InvalidVersion`.

    Args:
        what: why, in Jinja2's words.
        line: number of the template's line; 0 if it is not known.
    """

    def __init__(self, what: str, line: int = 0) -> None:
        super().__init__(what)
        self.what = what
        self.line = line


def render_in_process(source: str, variables: Mapping[str, Value]) -> str:
    """Return a template of our own, rendered in this process.

    Raises:
        TemplateProblem: it cannot be rendered.
    """
    # Imported here, since most commands render nothing.
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The result is a Dockerfile, in which HTML's escapes would be errors. There is no loader, so that a template reads
    # no other file.
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    try:
        compiled = environment.compile(source, filename=_NAME)
        template = environment.template_class.from_code(environment, compiled, environment.make_globals(None))
        parts: list[str] = []
        size = 0
        for part in template.generate(variables):
            size += len(part)
            if size > LARGEST_OUTPUT:
                message = f"its output has more than {LARGEST_OUTPUT:,} characters"
                raise TemplateProblem(message)  # noqa: TRY301  # the loop is the reason for the try
            parts.append(part)
        text = "".join(parts)
        text.encode()
    except TemplateProblem:
        raise
    except TemplateSyntaxError as error:
        raise TemplateProblem(_shown(error.message or "syntax error"), error.lineno) from error
    except UnicodeEncodeError as error:
        message = f"its output has an invalid character: {error.object[error.start]!a}"
        raise TemplateProblem(message) from error
    except Exception as error:  # a template's expressions raise whatever Python's operations raise
        what = f"{type(error).__name__}: {error}".rstrip(".: ")
        raise TemplateProblem(_shown(what), _line(error)) from error
    return text


def render_sandboxed(source: str, variables: Mapping[str, Value]) -> str:
    """Return an author's template, rendered in a process that cannot outlast or outgrow its bounds.

    Raises:
        TemplateProblem: it cannot be rendered, or takes too much time or memory.
    """
    request = json.dumps({"path": sys.path, "source": source, "variables": dict(variables)})
    bounds = f"it takes more than {_SECONDS} seconds or {_MEMORY >> 20} MiB to render"
    # Into a file, whose size the kernel bounds.
    with tempfile.TemporaryFile() as output:
        try:
            subprocess.run(
                [sys.executable, "-I", __file__],
                input=request.encode(),
                stdout=output,
                stderr=subprocess.DEVNULL,
                env={},
                timeout=_LONGEST_WAIT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TemplateProblem(bounds) from error
        output.seek(0)
        content = output.read(_LARGEST_ANSWER)
    try:
        answer = json.loads(content)
        text, what, line = str(answer["text"]), str(answer["what"]), int(answer["line"])
    except (ValueError, LookupError, TypeError) as error:
        raise TemplateProblem(bounds) from error
    if what:
        raise TemplateProblem(_shown(what), line)
    return text


def _shown(what: str) -> str:
    """Return the beginning of a message that may hold the template's own text."""
    return what[:_LONGEST_WHAT].encode("utf-8", "backslashreplace").decode()


def _line(error: BaseException) -> int:
    """Return the template's line that raised, from the traceback that Jinja2 has rewritten."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _NAME:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_ANSWER, _LARGEST_ANSWER))
    request: dict[str, Any] = json.load(sys.stdin)
    sys.path[:] = request["path"]
    # Modules that Jinja2 imports only if a template raises, or uses a filter or a string that needs them.
    for name in ("jinja2.constants", "jinja2.debug", "jinja2.sandbox", "html", "pprint", "textwrap"):
        import_module(name)
    codecs.lookup("unicode_escape")
    # No file and no socket can be opened from here on.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    answer: dict[str, Any] = {"text": "", "what": "", "line": 0}
    try:
        answer["text"] = render_in_process(request["source"], request["variables"])
    except TemplateProblem as problem:
        answer.update(what=problem.what, line=problem.line)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
