"""Render a model version's templates to its Dockerfile and script.

`Dockerfile.template` and `create_docker_image.sh.template` are plain files in which a few names are replaced, and
nothing else changes; `Dockerfile.j2` is Jinja2. A version without either gets the built-in templates.
"""

from __future__ import annotations

import difflib
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.dockerfile.parser import Dockerfile
from builder.dockerfile.sandbox import TemplateProblem, Value, render_in_process, render_sandboxed
from builder.errors import InvalidVersion
from builder.model_folder import REQUIREMENTS, Environment
from builder.models import FOLDER, Inputs, ModelVersion, template_variables
from builder.models.context import find_model_folder
from builder.reference import BasePattern, Reference
from builder.safe_open import exists_beneath, read_beneath
from builder.settings import CatalogSettings

# `Dockerfile`, `docker-file.tmpl`, `Containerfile.j2`, `gpu.Dockerfile`, in any case.
_NAME = re.compile(r"(?:.*\.)?(?:docker|container)[-_ ]?files?(?P<ending>(?:[._ -].*)?)")
_JINJA = re.compile(r".*j(?:inja)?2?(?:\.txt)?")
_TEMPLATE = re.compile(r"[._ -](?:te?mpl?(?:ate?)?s?|tpl|j2|jinja2?|in)(?:\.txt)?")
_TEMPLATE_FOLDERS = frozenset({"template", "templates"})
# Files that only mention a Dockerfile in their name, or that programs read beside one.
_OTHERS = (".dockerignore", ".md", ".py", ".sh", ".json", ".yaml", ".yml", ".log", ".html", ".pdf", ".png")
_LONGEST = 40


@dataclass(frozen=True, slots=True)
class Overlooked:
    """A file that is not used as the Dockerfile, and the path under which it would be."""

    path: str
    right: str


def overlooked(paths: Iterable[str], templates_folder: str, top: Iterable[str]) -> list[Overlooked]:
    """Return the files that their author may have meant as the version's Dockerfile, at most ten.

    A template by its name, and a file named like a Dockerfile in a folder of templates, counts wherever it is; a plain
    Dockerfile only at the top of the artifacts and of the version's own folders: below them it belongs to code that was
    logged along.

    Args:
        paths: of the version's artifacts, none of which is a Dockerfile that is taken.
        templates_folder: where one would be.
        top: the version's other folders, those of the model and the client.
    """
    tops = {"", templates_folder, *top}
    return [each for _, each in zip(range(10), _found(paths, templates_folder, tops), strict=False)]


def _found(paths: Iterable[str], templates_folder: str, tops: set[str]) -> Iterator[Overlooked]:
    folded = templates_folder.casefold()
    for path in paths:
        folder, _, name = path.rpartition("/")
        ending = _ending(name.casefold())
        if ending is None:
            continue
        in_templates = folder.casefold().endswith(folded) or folder.rpartition("/")[2].casefold() in _TEMPLATE_FOLDERS
        if in_templates or folder in tops or _TEMPLATE.fullmatch(ending):
            right = DOCKERFILE_JINJA if _JINJA.fullmatch(ending) else DOCKERFILE_TEMPLATE
            yield Overlooked(path, f"{templates_folder}/{right}")


def _ending(name: str) -> str | None:
    """Return the end of a name that is nearly a Dockerfile's; None for every other name."""
    if len(name) > _LONGEST or name.endswith(_OTHERS):
        return None
    if match := _NAME.fullmatch(name):
        return match["ending"]
    near = next((right for right in _MISSPELT if _one_apart(name, right)), None)
    return near and near.removeprefix("dockerfile")


def _one_apart(name: str, right: str) -> bool:
    """Return whether two names differ in one or two neighbouring characters: put in, left out, wrong or swapped."""
    if abs(len(name) - len(right)) > 1:
        return False
    same = 0
    while same < min(len(name), len(right)) and name[same] == right[same]:
        same += 1
    tail = 0
    while tail < min(len(name), len(right)) - same and name[-1 - tail] == right[-1 - tail]:
        tail += 1
    return max(len(name), len(right)) - same - tail <= 2  # noqa: PLR2004


DOCKERFILE_TEMPLATE = "Dockerfile.template"
DOCKERFILE_JINJA = "Dockerfile.j2"
_MISSPELT = {"dockerfile.template": DOCKERFILE_TEMPLATE, "dockerfile.j2": DOCKERFILE_JINJA}
SCRIPT_TEMPLATE = "create_docker_image.sh.template"
LARGEST_TEMPLATE = 1 << 20

# After the version's values are filled in.
LARGEST_RENDERED = 2 << 20
_MOST_PROBLEMS = 10
_LONGEST_SHOWN = 100

# The names that templates may use, and the tag that sets each, if there is one.
VARIABLES: Mapping[str, str] = {
    "model_name": "",
    "model_version": "",
    "model_download_folder": "",
    "model_folder": "MODEL_FOLDER",
    "model_client_folder": "MODEL_CLIENT_FOLDER",
    "entry_point": "MODEL_ENTRY_POINT",
    "command_line": "MODEL_EXECUTE_PATH",
}
_SAFE_VALUE = re.compile(r"[A-Za-z0-9_./@%+=:, -]*")
# In order: an escaped backslash or dollar, a shell's `$$`, a braced and a bare name.
_TOKEN = re.compile(r"\\[\\$]|\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)\}|\$([A-Za-z_][A-Za-z0-9_]*)")
# Build arguments that every Dockerfile has without declaring them.
_PREDEFINED = frozenset({"http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy"})
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A version's Dockerfile and script.

    Attributes:
        dockerfile: the Dockerfile's bytes.
        script: bytes of create_docker_image.sh, for the user who downloads; nothing here runs it.
        template: the Dockerfile's template: a path in the context, or `built-in Dockerfile.j2`.
        used_default: whether that is the built-in one.
    """

    dockerfile: bytes
    script: bytes
    template: str
    used_default: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseImages:
    """The choice of a base image for the default template.

    Attributes:
        default: BASE_IMAGE, perhaps with `{python_version}` in it.
        allowed: patterns of ALLOWED_BASE_IMAGES.
        wanted: the version's tag MODEL_BASE_IMAGE; empty if it has none.
    """

    default: str
    allowed: Sequence[BasePattern] = ()
    wanted: str = ""

    def known(self, python_version: str) -> bool:
        """Return whether there is enough to choose by."""
        return bool(self.wanted or python_version or "{python_version}" not in self.default)

    def choose(self, python_version: str) -> str:
        """Return the base's complete reference.

        Args:
            python_version: the model's, `3.11`; empty if it is not known.

        Raises:
            InvalidVersion: the tag names an image that is not allowed, or the Python version is needed and not known.
        """
        if self.wanted:
            reference = Reference.parse(self.wanted)
            if not any(pattern.matches(reference) for pattern in self.allowed):
                message = f"MODEL_BASE_IMAGE names {reference}, which ALLOWED_BASE_IMAGES does not allow."
                allowed = ", ".join(map(str, self.allowed)) or "none"
                raise InvalidVersion(message, remedy=f"Allowed are: {allowed}. Change the tag or the setting.")
            return str(reference)
        if not self.known(python_version):
            message = "The model does not say which Python version it was logged with."
            raise InvalidVersion(
                message,
                remedy="Log it with MLflow, which writes python_env.yaml and MLmodel, tag it with MODEL_BASE_IMAGE, or "
                "set BASE_IMAGE without {python_version}.",
            )
        return str(Reference.parse(self.default.replace("{python_version}", python_version)))


def render(
    context: Path,
    variables: Mapping[str, str],
    *,
    templates_folder: str,
    base_images: BaseImages,
    own: bool = True,
) -> Rendered:
    """Return a version's Dockerfile and script.

    The templates are looked for in `context / templates_folder`. Links are not followed there.

    Args:
        context: folder of the version's artifacts.
        variables: the value of each name in `VARIABLES`; empty if the version has none.
        templates_folder: path of the templates, relative to the context.
        base_images: the choice for templates that leave the base to us.
        own: whether the version's own Dockerfile is used, if it has one.

    Raises:
        InvalidVersion: a value is not allowed in a Dockerfile; a template is too large, invalid, or names an unknown
            variable; or there is neither a template nor a requirements.txt.
    """
    _check_values(variables)
    plain_path, jinja_path, script_path = (
        f"{templates_folder}/{name}" for name in (DOCKERFILE_TEMPLATE, DOCKERFILE_JINJA, SCRIPT_TEMPLATE)
    )
    plain, jinja, script = (
        read_beneath(context, path, LARGEST_TEMPLATE) for path in (plain_path, jinja_path, script_path)
    )
    if not own:
        plain = jinja = None
    if script is None:
        script_path, script = f"built-in {SCRIPT_TEMPLATE}", _built_in(SCRIPT_TEMPLATE)
    script = _substituted(script, variables, script_path)
    if plain is not None and jinja is not None:
        message = f"The version has both {plain_path} and {jinja_path}."
        raise InvalidVersion(message, remedy="Keep the one that describes the image.")
    if plain is not None:
        dockerfile = _substituted(plain, variables, plain_path, is_dockerfile=True)
        return Rendered(dockerfile=dockerfile, script=script, template=plain_path, used_default=False)
    if jinja is not None:
        dockerfile = _jinja(jinja, jinja_path, _facts(context, variables, base_images, lenient=True))
        return Rendered(dockerfile=dockerfile, script=script, template=jinja_path, used_default=False)
    model_folder = variables["model_folder"]
    if not exists_beneath(context, f"{model_folder}/{REQUIREMENTS}"):
        message = (
            f"The version has neither a template ({plain_path} or {jinja_path}) nor {model_folder}/{REQUIREMENTS}."
        )
        raise InvalidVersion(
            message,
            remedy="Log the model with its requirements (MLflow's log_model does), or log a Dockerfile.template. "
            "If that is in another folder, name the folder in MODEL_TEMPLATES_FOLDER.",
        )
    source = _built_in(DOCKERFILE_JINJA).decode()
    dockerfile = render_in_process(source, _facts(context, variables, base_images, lenient=False)).encode()
    return Rendered(
        dockerfile=dockerfile, script=script, template=f"built-in {DOCKERFILE_JINJA}", used_default=True
    )  # fmt: skip


def _built_in(name: str) -> bytes:
    """Return a template of ours: package data in an installation, the top folder in a checkout."""
    installed = _PACKAGE / "templates" / name
    return (installed if installed.is_file() else _PACKAGE.parent / "templates" / name).read_bytes()


def _check_values(variables: Mapping[str, str]) -> None:
    """Refuse values that could end a word, a line or a string; the tags were checked when they were read."""
    for name, value in variables.items():
        if name not in VARIABLES or not _SAFE_VALUE.fullmatch(value) or (name != "command_line" and " " in value):
            message = f"The template variable {name} is {value[:100]!r}, which is not allowed in a Dockerfile."
            raise InvalidVersion(message, remedy="Use letters, digits and '_', '.', '/', '@', '%', '+', '=', ':', '-'.")


def _substituted(
    template: bytes, variables: Mapping[str, str], path: str, *, is_dockerfile: bool = False
) -> bytes:  # fmt: skip
    """Return a plain template with the known names replaced and every other byte as it is."""
    text = template.decode("utf-8", "surrogateescape")
    parsed = Dockerfile.parse(text if is_dockerfile else "")
    own = parsed.declared()
    problems: dict[str, None] = {}
    places = _Places(text, parsed)
    left = LARGEST_RENDERED - len(template)

    def replacement(match: re.Match[str]) -> str:
        nonlocal left
        name = match[1] or match[2]
        if name is None or name in own or len(problems) > _MOST_PROBLEMS:
            return match[0]
        if name in variables:
            if not variables[name]:
                tag = VARIABLES[name]
                problems[f"line {places.line(match.start())} uses {match[0]}, but the version has no tag {tag}"] = None
            left -= len(variables[name])
            if left < 0:
                message = f"{path} renders to more than {LARGEST_RENDERED:,} bytes."
                raise InvalidVersion(message, remedy="Use the variables less often.")
            return variables[name]
        if is_dockerfile and match[1] and _looks_misspelt(name) and not places.in_run(match.start()):
            shown = match[0] if len(match[0]) <= _LONGEST_SHOWN else f"{match[0][:_LONGEST_SHOWN]}…"
            problems[f"line {places.line(match.start())} names {shown}, which is not a variable{_meant(name)}"] = None
        return match[0]

    rendered = _TOKEN.sub(replacement, text)
    if problems:
        listed = [*problems][:_MOST_PROBLEMS]
        more = "; and more" if len(problems) > _MOST_PROBLEMS else ""
        message = f"{path} cannot be rendered: {'; '.join(listed)}{more}."
        raise InvalidVersion(
            message,
            remedy=f"The variables are {', '.join(VARIABLES)}. Correct the name, set the tag, or declare a name of "
            "your own with ARG or ENV.",
        )
    return rendered.encode("utf-8", "surrogateescape")


def _looks_misspelt(name: str) -> bool:
    return name == name.lower() and name not in _PREDEFINED


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name[:100], VARIABLES, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


class _Places:
    """The line and the instruction of a position in a Dockerfile's text."""

    def __init__(self, text: str, parsed: Dockerfile) -> None:
        self._lines = text.split("\n")
        self._starts = [0]
        for line in self._lines[:-1]:
            self._starts.append(self._starts[-1] + len(line) + 1)
        self._instructions = parsed.instructions
        self._firsts = [instruction.first for instruction in parsed.instructions]

    def line(self, position: int) -> int:
        """Return the line's number, from 1."""
        return bisect_right(self._starts, position)

    def in_run(self, position: int) -> bool:
        """Return whether a position is in a RUN instruction, which a shell reads, or in a comment."""
        line = self.line(position)
        if self._lines[line - 1].lstrip(" \t\ufeff").startswith("#"):
            return True
        at = bisect_right(self._firsts, line) - 1
        return at >= 0 and self._instructions[at].keyword == "RUN" and line <= self._instructions[at].last


def _jinja(template: bytes, path: str, facts: Mapping[str, Value]) -> bytes:
    try:
        return render_sandboxed(template.decode("utf-8-sig"), facts).encode()
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8."
        raise InvalidVersion(message, remedy="Save it as UTF-8.") from error
    except TemplateProblem as problem:
        where = f" at line {problem.line}" if problem.line else ""
        undefined = re.search(r"'([A-Za-z0-9_]+)' is undefined", problem.what)
        hint = _meant(undefined[1]) if undefined else ""
        message = f"{path} cannot be rendered{where}: {problem.what}{hint}."
        raise InvalidVersion(message, remedy=f"The variables are {', '.join(facts)}.") from problem


def _facts(
    context: Path, variables: Mapping[str, str], base_images: BaseImages, *, lenient: bool
) -> dict[str, Value]:  # fmt: skip
    """Return the variables of Jinja2 templates.

    Args:
        context: folder of the version's artifacts.
        variables: the values of the plain names.
        base_images: the choice of a base.
        lenient: leave out unknown values instead of raising an error: an author's template may not need them.
    """
    client = variables["model_client_folder"]
    environment = Environment.read(context, variables["model_folder"])
    facts: dict[str, Value] = {
        **variables,
        "python_version": environment.python_version,
        "has_client": exists_beneath(context, client),
        "has_requirements": environment.has_requirements,
        "requirement_inputs": list(environment.requirement_inputs),
        "server": list(environment.server),
        "server_requirements": list(environment.server_requirements),
        "client_requirements": exists_beneath(context, f"{client}/{REQUIREMENTS}"),
    }
    if not lenient or base_images.known(environment.python_version):
        facts["base_image"] = base_images.choose(environment.python_version)
    try:
        facts["client_command"] = client_command(context, variables)
    except InvalidVersion:
        if not lenient:
            raise
        facts["client_command"] = []
    return facts


def client_command(context: Path, variables: Mapping[str, str]) -> list[str]:
    """Return the command that runs the version's own client, relative to the context; empty if it has none.

    The entry point may be written with the client folder or without it: the existing file decides.

    Args:
        context: folder of the version's artifacts.
        variables: the value of each name in `VARIABLES`.

    Raises:
        InvalidVersion: the entry point is not a file of the client folder.
    """
    client, entry_point = variables["model_client_folder"], variables["entry_point"].strip("/")
    if not entry_point:
        return variables["command_line"].split() if exists_beneath(context, client) else []
    for path in (f"{client}/{entry_point}", entry_point):
        if path.startswith(f"{client}/") and exists_beneath(context, path):
            return ["python", path]
    message = f"MODEL_ENTRY_POINT is {variables['entry_point']!r}, but the version has no {client}/{entry_point}."
    remedy = "Name a file of the client folder. If that is another folder, name it in MODEL_CLIENT_FOLDER."
    raise InvalidVersion(message, remedy=remedy)


def rendered(
    settings: CatalogSettings,
    version: ModelVersion,
    context: Path,
    paths: Iterable[str] | None = None,
    *,
    own: bool = True,
) -> Rendered:
    """Return the Dockerfile and the script of a version.

    Args:
        settings: BASE_IMAGE and ALLOWED_BASE_IMAGES are used.
        version: the model version.
        context: the folder its artifacts are in.
        paths: their paths; None to look into the folder.
        own: whether the version's own Dockerfile is used, if it has one.

    Raises:
        InvalidVersion: the templates cannot be rendered, or there are neither templates nor requirements.
    """
    if paths is None:
        paths = [path.relative_to(context).as_posix() for path in context.rglob("*") if path.is_file()]
    inputs = Inputs.of(version)
    inputs = inputs.model_copy(update={"model_folder": find_model_folder(paths, inputs)})
    for folder in (inputs.model_folder, inputs.client_folder):
        if not FOLDER.fullmatch(folder):
            message = f"The name of the folder {folder[:200]!r} of {version} is not allowed in a Dockerfile or script."
            remedy = "Log it under a name that has only letters, digits, '_', '.', '@', '+', '-', or publish without "
            raise InvalidVersion(message, remedy=f"{remedy}a Dockerfile.")
    return render(
        context,
        template_variables(version, inputs, settings.component_of(version.name)),
        templates_folder=inputs.templates_folder,
        base_images=BaseImages(
            default=settings.base_image, allowed=settings.allowed_base_images, wanted=inputs.base_image
        ),
        own=own and not inputs.no_dockerfile,
    )
