"""Model versions for tests: registered on a real server, as small as can be."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient

_number = itertools.count(1)

MLMODEL = """\
flavors:
  python_function:
    loader_module: mlflow.pyfunc.model
    python_version: 3.11.2
"""
DOCKERFILE = """\
FROM {base}
ENV PATH=$PATH:/home/app/bin
COPY $model_folder /app/$model_folder
COPY $model_client_folder /app/$model_client_folder
WORKDIR /app
RUN echo made > /app/made
USER 10001
ENTRYPOINT ["python", "/app/${{model_client_folder}}/$entry_point"]
"""


def seed_layout(base: str, dockerfile: str = DOCKERFILE) -> dict[str, str]:
    """Return the files of a version in the usual layout: a model, a client, templates."""
    return {
        "mymodel/MLmodel": MLMODEL,
        "mymodel/weights.txt": "42\n",
        "client/app.py": "print('prediction', open('/app/mymodel/weights.txt').read().strip())\n",
        "templates/Dockerfile.template": dockerfile.format(base=base) if "{base}" in dockerfile else dockerfile,
    }


@dataclass(frozen=True)
class Registered:
    """A version on a server."""

    client: MlflowClient = field(repr=False)
    name: str
    version: str
    run_id: str

    def tags(self) -> dict[str, str]:
        """Return the version's tags as they are now."""
        return dict(self.client.get_model_version(self.name, self.version).tags)

    def outcome(self, target: str = "pltr_foundry") -> dict[str, str]:
        """Return what was recorded for a target, by short names."""
        prefix = f"publish.{target}."
        return {name.removeprefix(prefix): value for name, value in self.tags().items() if name.startswith(prefix)}

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag on the version."""
        self.client.set_model_version_tag(self.name, self.version, name, value)


def register(
    uri: str,
    files: Mapping[str, str | bytes],
    tags: Mapping[str, str] | None = None,
    *,
    name: str = "",
    folder: str = "mymodel",
) -> Registered:
    """Register a version whose artifacts stand in a run, as with MLflow 2.

    Args:
        uri: the MLflow server.
        files: contents by path.
        tags: of the version; the entry point and the target tag are set beside them.
        name: of the model; a new one where it is empty.
        folder: what the version's source names below the run.
    """
    client = MlflowClient(uri)
    # Of one width, since versions are taken in the order of their models' names.
    name = name or f"model-{next(_number):06}"
    run = client.create_run("0")
    with tempfile.TemporaryDirectory() as local:
        for path, content in files.items():
            target = Path(local) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content if isinstance(content, bytes) else content.encode())
        client.log_artifacts(run.info.run_id, local)
    client.set_terminated(run.info.run_id)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    all_tags = {"EXTERNAL_TARGET_PLTR_FOUNDRY": "true", "MODEL_ENTRY_POINT": "app.py", **(tags or {})}
    version = client.create_model_version(
        name, source=f"{run.info.artifact_uri}/{folder}", run_id=run.info.run_id, tags=all_tags
    )
    return Registered(client, name, str(version.version), run.info.run_id)
