"""Rendering: what is replaced, what stays byte for byte, and what is refused."""

import os
import shutil
import subprocess
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder.dockerfile.parser import Dockerfile
from builder.dockerfile.template import LARGEST_TEMPLATE, VARIABLES, BaseImages, render
from builder.errors import InvalidVersion
from builder.reference import BasePattern

VALUES = {
    "model_name": "my-model",
    "model_version": "7",
    "model_download_folder": ".",
    "model_folder": "mymodel",
    "model_client_folder": "client",
    "entry_point": "app.py",
    "command_line": "python -m app --x=1",
}
BASES = BaseImages(default="docker.io/library/python:{python_version}-slim")


@pytest.fixture
def context(tmp_path):
    folder = tmp_path / "context"
    (folder / "templates").mkdir(parents=True)
    (folder / "mymodel").mkdir()
    (folder / "client").mkdir()
    (folder / "client" / "app.py").touch()
    return folder


@pytest.fixture
def model(context):
    """A model folder as MLflow leaves it."""
    folder = context / "mymodel"
    (folder / "MLmodel").write_text(
        "flavors:\n  python_function:\n    python_version: 3.11.9\nmlflow_version: 3.17.2\nmodel_id: x\n"
    )
    (folder / "python_env.yaml").write_text("python: 3.12.1\nbuild_dependencies:\n- pip==24.0\n")
    (folder / "requirements.txt").write_text("mlflow==3.17.2\nscikit-learn==1.5.0\n")
    return folder


def rendered(context, template=None, *, name="Dockerfile.template", bases=BASES, **values):
    if template is not None:
        raw = template if isinstance(template, bytes) else template.encode("utf-8", "surrogateescape")
        (context / "templates" / name).write_bytes(raw)
    return render(context, {**VALUES, **values}, templates_folder="templates", base_images=bases)


@pytest.mark.parametrize(
    ("template", "result"),
    [
        (b"COPY $model_folder /m\n", b"COPY mymodel /m\n"),
        (b"COPY ${model_folder}/x /m", b"COPY mymodel/x /m"),
        (b"COPY $model_folder/x /$model_name-$model_version.z", b"COPY mymodel/x /my-model-7.z"),
        (b"CMD $command_line", b"CMD python -m app --x=1"),
        (b"ENV PATH=$PATH:/home/app/bin:${PATH}", b"ENV PATH=$PATH:/home/app/bin:${PATH}"),
        (b"RUN echo $(id) $$ $! $? `id` $1 ${x} $model_names", b"RUN echo $(id) $$ $! $? `id` $1 ${x} $model_names"),
        (rb"RUN echo \$model_name \${model_name} \\$model_name", rb"RUN echo \$model_name \${model_name} \\my-model"),
        (b"RUN echo $$model_name $$$model_name", b"RUN echo $$model_name $$my-model"),
        (
            b"RUN ${model_name:-x} ${model_name%y} ${#model_name}",
            b"RUN ${model_name:-x} ${model_name%y} ${#model_name}",
        ),
        (b"LABEL a=${modle_name:-x}", b"LABEL a=${modle_name:-x}"),
        (b"ARG model_name=x\nLABEL a=$model_name b=$model_version", b"ARG model_name=x\nLABEL a=$model_name b=7"),
        (b"LABEL a=$model_name\nENV model_name x", b"LABEL a=$model_name\nENV model_name x"),
        (b"ENV A=1 \\\n  model_name=y\nRUN $model_name", b"ENV A=1 \\\n  model_name=y\nRUN $model_name"),
        (b"ENV MODEL_NAME=$model_name\nRUN x", b"ENV MODEL_NAME=my-model\nRUN x"),
        (b"ARG port=1\nEXPOSE ${port}", b"ARG port=1\nEXPOSE ${port}"),
        (b"# ${modle_name} and $model_name\nEXPOSE 1", b"# ${modle_name} and my-model\nEXPOSE 1"),
        (b"ENV X=${http_proxy}${Mixed}${UPPER}", b"ENV X=${http_proxy}${Mixed}${UPPER}"),
        (b"RUN x \\\n  && for f in *; do echo ${f}; done", b"RUN x \\\n  && for f in *; do echo ${f}; done"),
        (b"RUN <<EOF\n${f} $model_name\nEOF\nUSER 1", b"RUN <<EOF\n${f} my-model\nEOF\nUSER 1"),
        (b"A $model_name\r\n\r\nB\r\n\xff\xfe\x00\x0c", b"A my-model\r\n\r\nB\r\n\xff\xfe\x00\x0c"),
        (b"\xef\xbb\xbfFROM a\n# \xc3\xa0 \xe2\x80\xa8\n", b"\xef\xbb\xbfFROM a\n# \xc3\xa0 \xe2\x80\xa8\n"),
        (b"", b""),
    ],
)
def test_the_known_names_are_replaced_and_nothing_else(context, template, result):
    got = rendered(context, template)
    assert got.dockerfile == result
    assert (got.used_default, got.template) == (False, "templates/Dockerfile.template")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("FROM a\nCOPY ${modle_folder} /m", r"line 2 names \$\{modle_folder\}.*did you mean model_folder"),
        ("FROM a\nLABEL a=b \\\n  c=${zzz}", r"line 3 names \$\{zzz\}"),
        ("RUN x\nCMD run ${port}", r"line 2 names \$\{port\}"),
        ("RUN <<E\n${f}\nE\nUSER ${f}", r"line 4 names"),
        ("COPY ${aaa} ${bbb} /", r"\$\{aaa\}.*\$\{bbb\}"),
        ("# escape=`\nRUN x \\\nUSER ${f}", "line 3 names"),
    ],
)
def test_a_misspelt_variable_is_named_with_its_line_and_the_known_ones(context, template, said):
    with pytest.raises(InvalidVersion, match=said) as caught:
        rendered(context, template)
    assert all(name in caught.value.remedy for name in VARIABLES)
    assert "templates/Dockerfile.template" in caught.value.what


def test_a_variable_whose_tag_is_missing_is_an_error_that_names_the_tag(context):
    with pytest.raises(
        InvalidVersion, match=r"line 2 uses \$entry_point, but the version has no tag MODEL_ENTRY_POINT"
    ):
        rendered(context, "FROM a\nCMD $entry_point\n", entry_point="")


HOSTILE = [
    "a\nRUN evil",
    "a\rb",
    'a"b',
    "a'b",
    "$(id)",
    "`id`",
    "a;b",
    "a|b",
    "a&b",
    "#a",
    "a\\",
    "${PATH}",
    "a b",
    "a\tb",
    "a\u2028b",
    "\x00",
    "é",
    "<a",
    "*",
    "(a)",
    "{a}",
    "~",
    "a\x7f",
]


@pytest.mark.parametrize("name", sorted(VARIABLES))
@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_value_reaches_no_dockerfile(context, name, value):
    if name == "command_line" and value == "a b":
        return
    with pytest.raises(InvalidVersion, match=f"variable {name} "):
        rendered(context, "FROM a\n", **{name: value})


PIECES = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [b"\n", b"\\\n", b"RUN ", b"ENV a=1", b"ARG ", b"<<EOF", b"$PATH", b"${P}", b"$", b"\\", b"$$", b"\r\n"]
    ),
)

# Those of the profile in tests/conftest.py are replaced, not extended.
UNCHECKED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@settings(max_examples=300, suppress_health_check=UNCHECKED, deadline=None)
@given(st.lists(PIECES, max_size=20))
def test_a_template_without_known_names_and_lower_case_braces_is_the_same_after(context, pieces):
    template = b"".join(pieces)
    if any(f"{brace}{name}".encode() in template for name in VARIABLES for brace in ("$", "${")):
        return
    if b"${" in template.replace(b"${P}", b""):
        return
    assert rendered(context, template).dockerfile == template


@settings(max_examples=200, suppress_health_check=UNCHECKED, deadline=None)
@given(
    st.lists(st.sampled_from([f"${name}" for name in VARIABLES] + [f"${{{name}}}" for name in VARIABLES]), max_size=6),
    st.lists(st.sampled_from([" ", "/", "-", "\n", "\r\n", " $PATH ", "é"]), min_size=7, max_size=7),
)
def test_every_use_of_a_known_name_becomes_its_value(context, uses, between):
    template = between[0] + "".join(use + gap for use, gap in zip(uses, between[1:], strict=False))
    expected = between[0] + "".join(VALUES[use.strip("${}")] + gap for use, gap in zip(uses, between[1:], strict=False))
    assert rendered(context, template).dockerfile.decode() == expected


def test_the_scripts_template_is_rendered_by_the_same_names(context):
    script = b'#!/bin/bash\nname=${model_name}\nfor f in *; do echo ${f} "$name" $(pwd); done\nmodel_name=x\n'
    (context / "templates" / "create_docker_image.sh.template").write_bytes(script)
    assert rendered(context, "FROM a\n").script == script.replace(b"${model_name}", b"my-model")


def test_the_built_in_script_passes_its_checks(context, tmp_path):
    script = rendered(context, "FROM a\n").script
    assert b"my-model:v7" in script
    path = tmp_path / "create_docker_image.sh"
    path.write_bytes(script)
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


@pytest.mark.parametrize("platforms", ["linux/amd64", "linux/amd64,linux/arm64"])
def test_the_built_in_script_logs_in_by_standard_input_and_quotes(context, tmp_path, platforms):
    (tmp_path / "create_docker_image.sh").write_bytes(rendered(context, "FROM a\n").script)
    tools = tmp_path / "bin"
    tools.mkdir()
    # A docker that writes down what it is given: the real one needs a daemon and a registry.
    (tools / "docker").write_text(
        f'#!/bin/bash\nprintf "%s|" "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls\n'
        f'[ "$1" = login ] && cat > {tmp_path}/stdin; exit 0\n'
    )
    (tools / "docker").chmod(0o755)
    subprocess.run(
        ["bash", tmp_path / "create_docker_image.sh"],
        check=True,
        cwd="/",
        env={
            "PATH": f"{tools}:/usr/bin:/bin",
            "REGISTRY_URL": "r.example/a b/",
            "REGISTRY_USER": "me $(id)",
            "REGISTRY_TOKEN": "s3cret",
            "PLATFORMS": platforms,
        },
    )
    calls = (tmp_path / "calls").read_text()
    assert (tmp_path / "stdin").read_text() == "s3cret"
    assert "s3cret" not in calls
    assert "login|--username|me $(id)|--password-stdin|r.example|\n" in calls
    assert f"buildx|build|--platform|{platforms}|--tag|r.example/a b/my-model:v7|--push|.|\n" in calls
    assert "run|--rm|--publish|127.0.0.1:8080:8080|r.example/a b/my-model:v7|\n" in calls


def test_templates_are_looked_for_in_the_versions_own_folder(context):
    (context / "deploy" / "here").mkdir(parents=True)
    (context / "deploy" / "here" / "Dockerfile.template").write_text("FROM $model_name\n")
    got = render(context, VALUES, templates_folder="deploy/here", base_images=BASES)
    assert got.dockerfile == b"FROM my-model\n"


def test_links_are_not_followed(context, tmp_path):
    (tmp_path / "secret").write_text("s3cret")
    (context / "templates" / "Dockerfile.template").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidVersion, match="links are not followed"):
        rendered(context)
    (context / "templates" / "Dockerfile.template").unlink()
    (context / "templates").rmdir()
    (tmp_path / "Dockerfile.template").write_text("s3cret")
    (context / "templates").symlink_to(tmp_path)
    with pytest.raises(InvalidVersion, match="links are not followed"):
        rendered(context)


def test_what_is_no_file_is_refused_and_never_waited_for(context):
    os.mkfifo(context / "templates" / "Dockerfile.template")
    with pytest.raises(InvalidVersion, match="is not a regular file"):
        rendered(context)


def test_a_template_that_is_too_large_is_refused(context):
    with pytest.raises(InvalidVersion, match="larger than"):
        rendered(context, b"#" * (LARGEST_TEMPLATE + 1))


@pytest.mark.parametrize(
    "line", ["RUN ${x}\n", "# ${x}\n", "LABEL ${X}\n", "${x} ", "ENV a$model_name=1\n", "RUN <<E\n"]
)
def test_a_large_template_is_rendered_in_linear_time(context, line):
    began = time.process_time()
    try:
        rendered(context, line * (LARGEST_TEMPLATE // len(line)))
    except InvalidVersion as error:
        assert len(error.one_line()) <= 1000  # noqa: PT017  # either outcome is right, if it is quick
    assert time.process_time() - began < 15


def test_two_dockerfile_templates_are_one_too_many(context):
    (context / "templates" / "Dockerfile.j2").touch()
    with pytest.raises(InvalidVersion, match=r"both templates/Dockerfile.template and templates/Dockerfile.j2"):
        rendered(context, "FROM a\n")


# ---- Jinja2


def jinja(context, template, **more):
    return rendered(context, template, name="Dockerfile.j2", **more).dockerfile.decode()


def test_jinja_knows_the_names_and_the_facts(context, model):
    text = jinja(
        context,
        "FROM {{ base_image }}\n{% if has_client and has_requirements %}\nCOPY {{ model_folder }} {{ entry_point }}\n"
        "{% endif %}\n# {{ python_version }} {{ server | join(' ') }} $PATH ${model_name}",
    )
    assert text == (
        "FROM docker.io/library/python:3.12-slim\nCOPY mymodel app.py\n"
        "# 3.12 uvicorn mlflow.pyfunc.scoring_server.app:app $PATH ${model_name}"
    )


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("\n{{ modle_name }}", r"at line 2: .*'modle_name' is undefined.*did you mean model_name"),
        ("{% if %}", "at line 1"),
        ("{% include 'x' %}", "at line 1"),
        ("{% import '/etc/passwd' as x %}", "at line 1"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ server.append('x') }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe|undefined"),
        ("{% for i in range(10**9) %}x{% endfor %}", "[Rr]ange too big"),
        ("{% for i in range(9**5) %}{{ 'a' * 999 }}{% endfor %}", "more than 1,048,576 characters"),
        ("{{ 'a' * 10**11 }}", "MemoryError"),
        (b"\xff", "not UTF-8"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ base_image }}", "'base_image' is undefined"),
    ],
)
def test_jinja_is_strict_and_sandboxed(context, template, said):
    with pytest.raises(InvalidVersion, match=said) as caught:
        jinja(context, template)
    assert len(caught.value.one_line()) <= 1000


@pytest.mark.parametrize(
    "template",
    [
        "{{ 9**(9**9) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_jinja_that_never_ends_is_ended(context, template):
    with pytest.raises(InvalidVersion, match="takes more than"):
        jinja(context, template)


# ---- the built-in template


def test_the_default_serves_with_mlflow(context, model):
    shutil.rmtree(context / "client")
    got = rendered(context, entry_point="", command_line="")
    text = got.dockerfile.decode()
    assert (got.used_default, got.template) == (True, "built-in Dockerfile.j2")
    assert Dockerfile.parse(text).final_base() == "docker.io/library/python:3.12-slim"
    assert "ENV __pyfunc_model_path__=/app/mymodel \\\n    MLFLOW_TRACKING_URI=file:///tmp/mlruns\n" in text
    assert "    USER=model \\\n    LOGNAME=model \\\n" in text
    assert 'CMD ["python", "-m", "uvicorn", "mlflow.pyfunc.scoring_server.app:app", "--host", "0.0.0.0"' in text
    assert "USER 10001:0\n" in text
    assert "apt" not in text
    assert text.index("pip") < text.index("COPY --chown=10001:0 mymodel")


@pytest.mark.parametrize("entry_point", ["app.py", "client/app.py", "/client/app.py", "/app.py"])
def test_the_default_runs_the_versions_client(context, model, entry_point):
    text = rendered(context, entry_point=entry_point).dockerfile.decode()
    assert 'CMD ["python", "client/app.py"]\n' in text
    assert "COPY --chown=10001:0 client client/\n" in text
    assert "scoring_server" not in text


def test_the_default_runs_the_command_line_where_there_is_no_entry_point(context, model):
    text = rendered(context, entry_point="", command_line="python -m client.app --x=1").dockerfile.decode()
    assert 'CMD ["python", "-m", "client.app", "--x=1"]\n' in text


def test_an_entry_point_that_is_not_there_is_named(context, model):
    with pytest.raises(InvalidVersion, match=r"MODEL_ENTRY_POINT is 'main.py', but the version has no client/main.py"):
        rendered(context, entry_point="main.py")


def test_without_template_and_requirements_the_ways_out_are_named(context):
    with pytest.raises(InvalidVersion, match=r"neither a template .* nor mymodel/requirements.txt.*log_model"):
        rendered(context)


def test_without_a_python_version_the_ways_out_are_named(context, model):
    for name in ("MLmodel", "python_env.yaml"):
        (model / name).unlink()
    with pytest.raises(InvalidVersion, match="MODEL_BASE_IMAGE"):
        rendered(context)
    assert b"FROM docker.io/library/a:1\n" in rendered(context, bases=BaseImages(default="a:1")).dockerfile


@pytest.mark.parametrize(
    ("wanted", "allowed", "result"),
    [
        ("python:3.9", ["docker.io/library/python:*"], "docker.io/library/python:3.9"),
        ("python:3.9", ["python:*"], "docker.io/library/python:3.9"),
        ("quay.io/team/base:1", ["quay.io/other/*", "quay.io/team/*"], "quay.io/team/base:1"),
        ("quay.io/team/base:1", [], None),
        ("quay.io/evil/base:1", ["quay.io/team/*"], None),
        ("quay.io/team", ["quay.io/team/*"], None),
        ("evil.io/quay.io/team/x", ["quay.io/team/*"], None),
        ("QUAY.io/team/x:1", ["quay.io/team/*"], "quay.io/team/x:1"),
        ("python:443/evil/img", ["python:*"], None),
    ],
)
def test_a_base_image_is_taken_from_the_tag_only_where_allowed(context, model, wanted, allowed, result):
    bases = BaseImages(default="a", allowed=[BasePattern.parse(pattern) for pattern in allowed], wanted=wanted)
    if result is None:
        with pytest.raises(InvalidVersion, match="ALLOWED_BASE_IMAGES"):
            rendered(context, bases=bases)
    else:
        assert f"FROM {result}\n".encode() in rendered(context, bases=bases).dockerfile


@pytest.mark.parametrize(
    "case",
    [
        ("mlflow==3.17.2\n", "3.17.2", "", "uvicorn"),
        ("mlflow\npandas\n", "", "", "uvicorn"),
        ("mlflow==2.9.2", "2.9.2", " 'setuptools<81'", "gunicorn"),
        ("mlflow==2.9.2\nsetuptools\n", "2.9.2", " 'setuptools<81'", "gunicorn"),
        ("mlflow==1.30.0", "", " 'setuptools<81'", "gunicorn"),
        (
            "scikit-learn",
            "2.15.1",
            " 'mlflow-skinny==2.15.1' 'setuptools<81' 'pandas<3' 'flask<4' 'gunicorn'",
            "gunicorn",
        ),
        ("mlflow==2.16.2", "2.16.2", "", "gunicorn"),
        # A release that is left open is the one that logged the model where it fits, and else what pip takes.
        ("mlflow\n", "1.30.0", " 'mlflow==1.30.0' 'setuptools<81'", "gunicorn"),
        ("mlflow>=2.10,<3\n", "2.9.2", " 'starlette<1'", "uvicorn"),
        ("mlflow>=2.10,<3\n", "", " 'starlette<1'", "uvicorn"),
        ("mlflow<2,>=1.30 ; python_version>'3'\n", "", " 'setuptools<81'", "gunicorn"),
        ("mlflow[extras]~=2.14.1\n", "3.1.0", " 'setuptools<81'", "gunicorn"),
        ("mlflow<=2.17.2\n", "", "", "gunicorn"),
        ("mlflow>=what\n", "", "", "uvicorn"),
        (
            "mlflow-skinny==3.1.0 ; python_version > '3'\nPandas>2\n",
            "3.1.0",
            " 'starlette<1' 'uvicorn'",
            "uvicorn",
        ),
        ("mlflow==2.22.0", "2.22.0", " 'starlette<1'", "uvicorn"),
        ("mlflow==3.12.0\nstarlette==0.46.1", "3.12.0", "", "uvicorn"),
        ("mlflow==3.13.0", "3.13.0", "", "uvicorn"),
        ("MLflow_Skinny==2.20.4", "", " 'pandas<3' 'flask<4' 'gunicorn'", "gunicorn"),
        ("scikit-learn\n", "3.2.0", " 'mlflow-skinny==3.2.0' 'starlette<1' 'pandas<3' 'uvicorn'", "uvicorn"),
        ("", "", " 'mlflow-skinny' 'pandas' 'uvicorn'", "uvicorn"),
    ],
)
def test_the_scoring_server_gets_what_it_needs(context, model, case):
    requirements, logged, needs, module = case
    (model / "requirements.txt").write_text(requirements)
    (model / "MLmodel").write_text(f"mlflow_version: {logged}\n" if logged else "")
    text = rendered(context, entry_point="", command_line="").dockerfile.decode()
    assert f"--requirement requirements.txt{needs}\n" in text
    assert f'CMD ["python", "-m", "{module}", ' in text


def test_what_requirements_name_in_the_model_folder_is_copied_before(context, model):
    for name in ("wheels/a-1-py3-none-any.whl", "code/pkg/x.py", "more.txt", "constraints.txt", "unused.txt"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).touch()
    (model / "requirements.txt").write_text(
        "mlflow\n-c constraints.txt\n-rmore.txt\n./wheels/a-1-py3-none-any.whl \\\n  --hash=sha256:1\n-e code/pkg\n"
        "--find-links=wheels/\n../outside\n/etc/passwd\nnumpy # unused.txt\n"
    )
    text = rendered(context).dockerfile.decode()
    copied = [line.split()[1] for line in text.splitlines() if line.startswith("COPY mymodel/")]
    assert copied == [
        f"mymodel/{name}"
        for name in (
            "requirements.txt",
            "constraints.txt",
            "more.txt",
            "wheels/a-1-py3-none-any.whl",
            "code/pkg",
            "wheels",
        )
    ]


def test_a_clients_own_requirements_are_installed(context, model):
    (context / "client" / "requirements.txt").write_text("flask\n")
    text = rendered(context).dockerfile.decode()
    assert "COPY client/requirements.txt client/\n" in text
    assert "--requirement requirements.txt --requirement /app/client/requirements.txt\n" in text


def test_requirements_that_are_not_text_are_refused(context, model):
    (model / "requirements.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidVersion, match=r"requirements.txt is not UTF-8"):
        rendered(context)
