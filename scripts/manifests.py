"""Write k8s/job.yaml and k8s/cronjob.yaml, which need no kustomize; with --check, compare them.

Both are put together from the text of the base and of the overlay `dockerfile`, so that they keep its comments.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "k8s"
_MADE = "# Made by `make manifests` from {}; `make lint` compares them. Change those, not this file.\n"
_CRONJOB = """\
# The install in one file: `kubectl apply -f k8s/cronjob.yaml` does what `kubectl apply -k k8s/` does. Name your image
# and set MLFLOW_TRACKING_URI and REGISTRY_URL first, and create the Secrets: docs/kubernetes.md.
#
"""
_JOB = """\
# Publishes one model version: name your image, set the two annotations builder/model-name and builder/model-version
# below, then `kubectl create -f k8s/job.yaml`. Settings, account and Secrets are those of the install
# (`kubectl apply -k k8s/dockerfile`), whose namespace admits the root container; `builder submit` is the shorter way.
#
"""
# What the template's comment says of templates alone.
_OF_TEMPLATES = "#\n# A template is"
_DEFAULT_CONTAINER = "            kubectl.kubernetes.io/default-container: push\n"
_VERSION = """\
            builder/model-name: pltr_foundry_model
            builder/model-version: "8"
"""


def cronjob() -> str:
    """Return the manifest of the base, as one file."""
    files = [
        path
        for name in _kustomization("base")["resources"]
        for path in (
            [FOLDER / "base" / name]
            if name.endswith(".yaml")
            else [FOLDER / "base" / name / each for each in _kustomization(f"base/{name}")["resources"]]
        )
    ]
    parts = [_with_tag(path.read_text(), "base") for path in files]
    return _CRONJOB + _MADE.format("k8s/base and k8s/policies") + "---\n" + "---\n".join(parts)


def job() -> str:
    """Return the manifest of a Job of one version with a Dockerfile: the template's, with a version."""
    text = (FOLDER / "dockerfile" / "publish-dockerfile.yaml").read_text()
    comment, _, rest = text.partition("apiVersion: batch/v1\n")
    _, _, job_template = rest.partition("  jobTemplate:\n")
    if _OF_TEMPLATES not in comment or job_template.count(_DEFAULT_CONTAINER) != 1:
        message = "k8s/dockerfile/publish-dockerfile.yaml no longer has the lines that scripts/manifests.py looks for."
        raise RuntimeError(message)
    job_template = job_template.replace(_DEFAULT_CONTAINER, _DEFAULT_CONTAINER + _VERSION)
    what = comment[: comment.index(_OF_TEMPLATES)].replace("The template of Jobs that publish", "A Job that publishes")
    head = "apiVersion: batch/v1\nkind: Job\n"
    name = "metadata:\n  generateName: publish-\n  namespace: builder\n"
    body = textwrap.dedent(job_template).replace("metadata:\n", name, 1)
    return _JOB + what + "#\n" + _MADE.format("k8s/dockerfile") + head + _with_tag(body, "dockerfile")


def _kustomization(folder: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())
    return loaded


def _with_tag(text: str, folder: str) -> str:
    """Return a manifest's text with the images that a folder's kustomization names."""
    for image in _kustomization(folder)["images"]:
        text = text.replace(f"image: {image['name']}\n", f"image: {image['newName']}:{image['newTag']}\n")
    return text


def main() -> int:
    """Write the files, or compare them."""
    outdated = False
    for name, text in (("job.yaml", job()), ("cronjob.yaml", cronjob())):
        path = FOLDER / name
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            print(f"k8s/{name} is outdated. Run 'make manifests'.", file=sys.stderr)
            outdated = True
    return int(outdated)


if __name__ == "__main__":
    sys.exit(main())
