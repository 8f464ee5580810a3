"""Fetch: how each platform's image is made, and what the context holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from builder.clients import Services
from builder.dockerfile import select_engine
from builder.dockerfile.parser import Dockerfile
from builder.dockerfile.template import BaseImages, Rendered, client_command, render
from builder.errors import InvalidSettings, InvalidVersion, PermissionRefused, ServiceUnavailable, TryAgain
from builder.log import get_logger
from builder.masking import one_line
from builder.model_folder import MLMODEL, check_served, loader_of, needs_java, read_description, repaired
from builder.models.context import find_model_folder, listing_digest, names_modules
from builder.models.version import FOLDER, Artifact, Inputs, ModelVersion, template_variables
from builder.oci.base_image import base_image, find_image, published
from builder.oci.manifest import ARTIFACTS_DIGEST, target_rules
from builder.plan import Base, Plan, PlatformPlan
from builder.reference import Digest, Platform, Reference
from builder.settings import CatalogSettings, Settings
from builder.wheels import recipe as recipes
from builder.wheels.imports import NamedModules, read_named_modules
from builder.wheels.inputs import Source, chosen_method, own_templates, served
from builder.wheels.lock import Lock
from builder.wheels.recipe import Recipe, check_loader, facts_of

_log = get_logger("judged")


def judged(settings: Settings, version: ModelVersion, context: Path, paths: Sequence[str]) -> dict[str, bytes]:
    """Refuse a model that cannot be served; return the files of it that have to be others in the image, by path.

    A version with a client loads its model as it likes: what is wrong is a warning then.

    Args:
        settings: for what commands may name.
        version: the version.
        context: the folder its artifacts are in; what describes the model is enough.
        paths: of its artifacts.

    Raises:
        InvalidVersion: MLflow's scoring server could not load the model, or the entry point is no file of the client.
    """
    folder, client = _served_by(settings, version, context, paths)
    try:
        check_served(context, folder, paths)
        changed = repaired(context, folder, paths)
    except InvalidVersion as error:
        if not client:
            raise
        _log.warning("MLflow could not load the model; its client has to", why=one_line(error.what))
        return {}
    if changed is None:
        return {}
    _log.warning("paths in MLmodel were written on Windows, and are repaired in the image", model=folder)
    return {f"{folder}/{MLMODEL}": changed}


def loaded_by(settings: Settings, version: ModelVersion, context: Path, paths: Sequence[str]) -> tuple[str, bool]:
    """Return the module that MLflow's scoring server loads a model by, and whether a client runs in its place.

    Args:
        settings: for what commands may name.
        version: the version.
        context: the folder its artifacts are in; what describes the model is enough.
        paths: of its artifacts.

    Raises:
        InvalidVersion: MLmodel cannot be read, or the entry point is no file of the client.
    """
    folder, client = _served_by(settings, version, context, paths)
    return loader_of(read_description(context, folder, MLMODEL)), client


def _served_by(settings: Settings, version: ModelVersion, context: Path, paths: Sequence[str]) -> tuple[str, bool]:
    """Return the model's folder, and whether the version has a client."""
    inputs = Inputs.of(version)
    folder = find_model_folder(paths, inputs)
    inputs = inputs.model_copy(update={"model_folder": folder})
    variables = template_variables(version, inputs, settings.component_of(version.name))
    return folder, bool(client_command(context, variables))


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


log = get_logger("methods")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A plan in which every image has its method.

    Attributes:
        plan: the plan; a rendered Dockerfile and the bases are in it.
        dockerfile: the Dockerfile's bytes; empty where none is run.
        recipe: of the images that are made of wheel layers; None where there are none.
        needed: the artifacts that the images are made from: all for a Dockerfile of the version's own, else those of
            the model and of the client.
        changed: files of the model that are others in the image than they were logged, by path.
        names: the modules that the version's files name, as far as they were read.
        unread: paths of files that name modules, and were not there to be read.
    """

    plan: Plan
    needed: tuple[Artifact, ...]
    dockerfile: bytes = b""
    recipe: Recipe | None = None
    changed: Mapping[str, bytes] = field(default_factory=dict)
    names: NamedModules = field(default_factory=NamedModules)
    unread: tuple[str, ...] = ()

    def lacks(self, context: Path) -> bool:
        """Return whether the files that were not there to be read name what no other one does.

        Args:
            context: the folder they are in now.
        """
        if self.recipe is None or not self.unread:
            return False
        log.info("reading what was too large to be read before", files=list(self.unread))
        found = read_named_modules(context, self.recipe.model_folder, self.unread)
        return not (found.uses.keys() <= self.names.uses.keys() and found.loaded.keys() <= self.names.loaded.keys())


def by_methods(settings: Settings, services: Services, plan: Plan, context: Path, *, keep: bool = True) -> Made:
    """Return the plan with the method and the base of every image that is to be made.

    Args:
        settings: what the environment says.
        services: who is asked.
        plan: with the version's artifacts.
        context: the folder they are in; what describes the model is enough.
        keep: whether locks, and what is found out of base images, are kept in the registry.

    Raises:
        NoWheel: a package has no wheel for a platform, and there is no engine that could build it, or no source.
        BuilderError: the version cannot be published, or a server is away.
    """
    paths = [artifact.path for artifact in plan.artifacts]
    recipe = None
    method = chosen_method(settings, plan.version, paths)
    own = method == "dockerfile" and bool(own_templates(Inputs.of(plan.version), paths))
    changed = {} if own else judged(settings, plan.version, context, paths)
    # A platform without a wheel belongs to the others: it is not made by a template that they are not made by.
    needed = plan.artifacts if own else served(plan.version, plan.artifacts)
    names = NamedModules()
    unread: tuple[str, ...] = ()
    if method == "wheels":
        source = Source.of(settings, plan.version, context, paths)
        names, unread = source.names, _unread(needed, context)
        planned = recipes.planned(
            settings,
            services.registries,
            source,
            plan.builds,
            former=_former_locks(services, plan),
            keep=keep,
        )
        for platform, error in planned.impossible.items():
            if not error.buildable:
                raise error
            try:
                engine = select_engine(settings)
            except InvalidSettings:
                raise error from None
            log.warning("an engine builds this platform", platform=str(platform), engine=engine.name, why=error.what)
        recipe = planned.recipe if planned.bases else None
        recipes.check_files(planned.recipe, needed, target_rules(plan.target).most_layer_bytes)
        for note in sorted({note for notes in planned.notes.values() for note in notes}):
            log.info(note)
        later = tuple(f"{path} is read when it is downloaded: what it names may add packages" for path in unread)
        steps = {
            platform: {"method": "wheels", "base": base, "notes": (*planned.notes[platform], *later)}
            for platform, base in planned.bases.items()
        }
        plan = _updated(plan, steps)
    made = Made(plan=plan, recipe=recipe, needed=needed, changed=changed, names=names, unread=unread)
    if not plan.made_by("dockerfile"):
        return made
    dockerfile = rendered(settings, plan.version, context, paths, own=method == "dockerfile").dockerfile
    text = dockerfile.decode("utf-8", "replace")
    name = Dockerfile.parse(text).final_base()
    if method == "dockerfile" and not own:
        _check_loader(settings, services, plan, name, context, keep=keep)
    bases = {step.platform: {"base": _base(services, name, step.platform)} for step in plan.made_by("dockerfile")}
    plan = _updated(plan, bases).model_copy(update={"dockerfile": text})
    return replace(made, plan=plan, dockerfile=dockerfile)


def _unread(artifacts: Sequence[Artifact], context: Path) -> tuple[str, ...]:
    """Return the files that name modules and have no content yet."""
    return tuple(
        artifact.path
        for artifact in artifacts
        if names_modules(artifact.path) and artifact.size != 0 and not (context / artifact.path).lstat().st_size
    )


def _check_loader(
    settings: Settings, services: Services, plan: Plan, name: str | None, context: Path, *, keep: bool
) -> None:
    """Refuse a loader that needs a program which the base of the built-in Dockerfile lacks, where that can be told.

    Raises:
        InvalidVersion: MLflow's scoring server would need a Java.
    """
    loader, client = loaded_by(settings, plan.version, context, [artifact.path for artifact in plan.artifacts])
    if name is None or not needs_java(loader):
        return
    reference = Reference.parse(name)
    store = recipes.layer_store(settings, services.registries)
    for step in plan.made_by("dockerfile"):
        try:
            registry = services.bases.for_host(reference.repository.host)
            base = base_image(registry, reference, step.platform)
            facts = facts_of(registry, store, base, keep=keep) if base else None
        except (ServiceUnavailable, PermissionRefused, TryAgain) as error:
            log.warning("the base image could not be read", base=name, error=error.one_line())
            return
        if base and facts:
            check_loader(base, facts, loader, client=client)


def _former_locks(services: Services, plan: Plan) -> recipes.Former:
    """Return what finds the locks of the image under the tag, if that was made from the files that there are now."""
    listed = str(listing_digest(plan.artifacts))
    if not plan.stands or plan.observed_annotations.get(ARTIFACTS_DIGEST) != listed:
        return recipes.no_former
    registry = services.registries.for_host(plan.reference.repository.host)

    def former(platform: Platform, requirements: Digest) -> Lock | None:
        existing = published(registry, plan.reference)
        if existing is None:
            return None
        return recipes.former_lock(registry, existing, plan.reference, platform, requirements)

    return former


def with_layers(settings: Settings, services: Services, plan: Plan, recipe: Recipe) -> Plan:
    """Return the plan with what the registry knows of each image's wheel layers."""
    bases = {step.platform: step.base for step in plan.made_by("wheels") if step.base}
    found = recipes.known_layers(settings, services.registries, recipe, plan.artifacts, bases)
    return _updated(plan, {platform: {"layers": layers} for platform, layers in found.items()})


def _updated(plan: Plan, changes: Mapping[Platform, Mapping[str, object]]) -> Plan:
    def updated(step: PlatformPlan) -> PlatformPlan:
        return step if step.action == "keep" else step.model_copy(update=changes.get(step.platform, {}))

    return plan.model_copy(update={"platforms": tuple(updated(step) for step in plan.platforms)})


def _base(services: Services, name: str | None, platform: Platform) -> Base | None:
    """Return the base image as its registry has it now; None where there is none, or where nobody can tell.

    Raises:
        InvalidVersion: the base is there, and not for the platform.
    """
    if name is None:
        return None
    try:
        reference = Reference.parse(name)
        found = find_image(services.bases.for_host(reference.repository.host), reference, platform)
    except (ServiceUnavailable, PermissionRefused, TryAgain) as error:
        # The engine may still reach it, with a credential of its own.
        log.warning("the base image could not be looked up", base=name, error=error.one_line())
        return None
    if found is None:
        log.warning("the registry has no such base image for the platform", base=name, platform=str(platform))
        return None
    return Base(name=str(reference), digest=found.digest, diff_ids=found.diff_ids)
