"""Names and places that are nearly those of a version's Dockerfile."""

from __future__ import annotations

import time

import pytest

from builder.dockerfile.template import overlooked

NEARLY = {
    "templates/Dockerfile": "templates/Dockerfile.template",
    "templates/dockerfile.template": "templates/Dockerfile.template",
    "Templates/Dockerfile.template": "templates/Dockerfile.template",
    "mymodel/templates/Dockerfile.template": "templates/Dockerfile.template",
    "Dockerfile.template": "templates/Dockerfile.template",
    "templates/Dockerfile.jinja2": "templates/Dockerfile.j2",
    "TEMPLATES/DOCKERFILE.J2": "templates/Dockerfile.j2",
    "template/Dockerfile.template": "templates/Dockerfile.template",
    "templates/Dockerfile.tmpl": "templates/Dockerfile.template",
    "templates/Dockerfile.template.txt": "templates/Dockerfile.template",
    "templates/Dockerfile.txt": "templates/Dockerfile.template",
    "templates/Dockerfile.temlpate": "templates/Dockerfile.template",
    "templates/Dockerfle.template": "templates/Dockerfile.template",
    "templates/Dockerfiles.template": "templates/Dockerfile.template",
    "templates/docker-file.j2": "templates/Dockerfile.j2",
    "templates/Containerfile": "templates/Dockerfile.template",
    "templates/gpu.Dockerfile": "templates/Dockerfile.template",
    "templates/templates/Dockerfile.template": "templates/Dockerfile.template",
    "Dockerfile": "templates/Dockerfile.template",
    "client/Dockerfile": "templates/Dockerfile.template",
    "mymodel/Dockerfile": "templates/Dockerfile.template",
    "docker/Dockerfile.template": "templates/Dockerfile.template",
}
OTHERS = [
    "mymodel/MLmodel",
    "mymodel/code/service/Dockerfile",
    "docs/Dockerfile.md",
    "templates/index.html",
    "templates/create_docker_image.sh.template",
    "templates/Dockerfile.template.md",
    ".dockerignore",
    "Dockerfile.dockerignore",
    "client/dockerfile_parser.py",
    "templates/requirements.txt",
    "x" * 255,
]


@pytest.mark.parametrize(("path", "right"), NEARLY.items())
def test_what_is_nearly_a_dockerfile_is_found(path, right):
    assert [(each.path, each.right) for each in overlooked([path], "templates", ["mymodel", "client"])] == [
        (path, right)
    ]


@pytest.mark.parametrize("path", OTHERS)
def test_what_is_something_else_is_left_alone(path):
    assert overlooked([path], "templates", ["mymodel", "client"]) == []


def test_a_templates_folder_of_another_name():
    (found,) = overlooked(["Deploy/dockerfile"], "deploy", ["mymodel"])
    assert found.right == "deploy/Dockerfile.template"


def test_a_hundred_thousand_names_take_no_time():
    names = [f"{number}/{'docker.' * 5}file" for number in range(100_000)] + ["a" * 40] * 1000
    began = time.thread_time()
    overlooked(names, "templates", [])
    assert time.thread_time() - began < 20
