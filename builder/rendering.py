"""A version's templates, rendered: where what MLflow says of a version meets what a Dockerfile is made of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from builder.build.template import BaseImages, Rendered, render
from builder.errors import InvalidVersion
from builder.models.artifacts import find_model_folder
from builder.models.version import FOLDER, Inputs, ModelVersion, template_variables
from builder.settings import CatalogSettings


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
        own: whether the version's own Dockerfile is taken, where it has one.

    Raises:
        InvalidVersion: the templates cannot be rendered, or there are none and no requirements either.
    """
    if paths is None:
        paths = [path.relative_to(context).as_posix() for path in context.rglob("*") if path.is_file()]
    inputs = Inputs.of(version)
    inputs = inputs.model_copy(update={"model_folder": find_model_folder(paths, inputs)})
    for folder in (inputs.model_folder, inputs.client_folder):
        if not FOLDER.fullmatch(folder):
            message = f"The folder {folder[:200]!r} of {version} may not stand in a Dockerfile and a script."
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
