"""Render a Jinja2 template that others wrote: sandboxed, strict, and in a process of its own with bounds.

Jinja2's sandbox keeps a template from Python's insides, but not from `9**9**9` or from loops in loops, which nothing
within a process can stop. So an author's template is rendered by this file as a program: it reads a request as JSON
from stdin, bounds its own time and memory, and answers as JSON on stdout. It imports nothing of ours, since it is
started without the package's surroundings.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

LARGEST_OUTPUT = 1 << 20
_SECONDS = 10
_MEMORY = 1 << 30
_NAME = "<template>"

Value = str | bool | Sequence[str]


class TemplateProblem(Exception):
    """A template cannot be rendered; where its name is known, this becomes an `InvalidVersion`.

    Args:
        what: why, in Jinja2's words.
        line: number of the template's line; 0 where it is not known.
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

    # What comes out is a Dockerfile, in which HTML's escapes would be errors. There is no loader, so that a template
    # reads no other file.
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
                message = f"it makes more than {LARGEST_OUTPUT:,} characters"
                raise TemplateProblem(message)  # noqa: TRY301  # the loop is the reason for the try
            parts.append(part)
        return "".join(parts)
    except TemplateProblem:
        raise
    except TemplateSyntaxError as error:
        raise TemplateProblem(error.message or "syntax error", error.lineno) from error
    except Exception as error:  # a template's expressions raise whatever Python's operations raise
        what = f"{type(error).__name__}: {error}".rstrip(".: ")
        raise TemplateProblem(what[:500], _line(error)) from error


def render_sandboxed(source: str, variables: Mapping[str, Value]) -> str:
    """Return an author's template, rendered in a process that cannot outlast or outgrow its bounds.

    Raises:
        TemplateProblem: it cannot be rendered, or takes too much time or memory.
    """
    request = json.dumps({"path": sys.path, "source": source, "variables": dict(variables)})
    bounds = f"it takes more than {_SECONDS} seconds or {_MEMORY >> 20} MiB to render"
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            input=request.encode(),
            capture_output=True,
            env={},
            timeout=_SECONDS * 3,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateProblem(bounds) from error
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        raise TemplateProblem(bounds) from error
    if "text" not in answer:
        raise TemplateProblem(answer["what"], answer["line"])
    return str(answer["text"])


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
    request: dict[str, Any] = json.load(sys.stdin)
    sys.path[:] = request["path"]
    answer: dict[str, Any]
    try:
        answer = {"text": render_in_process(request["source"], request["variables"])}
    except TemplateProblem as problem:
        answer = {"what": problem.what, "line": problem.line}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
