"""The builder image's own Dockerfile, without building it."""

import re
from pathlib import Path

DOCKERFILE = (Path(__file__).parents[1] / "Dockerfile").read_text()


def test_every_image_is_named_by_its_digest():
    defaults = dict(re.findall(r"^ARG ([A-Z0-9_]+_IMAGE)=(\S+)$", DOCKERFILE, re.MULTILINE))
    used = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert set(used) == {f"${{{name}}}" for name in defaults}
    for name, image in defaults.items():
        assert re.fullmatch(r"[a-z0-9.-]+/[a-z0-9./-]+:[A-Za-z0-9._-]+@sha256:[0-9a-f]{64}", image), name


def test_there_is_an_interpreter_for_every_python_that_models_have():
    stages = re.findall(r"^FROM \$\{PYTHON_(3_\d+)_IMAGE\} AS compiler-(3\.\d+)$", DOCKERFILE, re.MULTILINE)
    assert [stage for _, stage in stages] == [f"3.{minor}" for minor in range(9, 15)]
    for name, python in stages:
        assert name.replace("_", ".") == python
        assert f'"/compilers", "{python}", ' in DOCKERFILE
        assert f"COPY --from=compiler-{python} /compilers/ /kaniko/compilers/\n" in DOCKERFILE
