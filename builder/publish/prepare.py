"""The method of each platform's image, a Dockerfile or wheel layers, and the files of its context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from builder.clients import Services
from builder.dockerfile import select_engine
from builder.dockerfile.parser import Dockerfile
from builder.dockerfile.template import client_command, rendered
from builder.errors import InvalidSettings, InvalidVersion, PermissionRefused, ServiceUnavailable, TryAgain
from builder.log import get_logger
from builder.masking import one_line
from builder.model_folder import MLMODEL, check_served, loader_of, needs_java, read_description, repaired
from builder.models import Artifact, Inputs, ModelVersion, template_variables
from builder.models.context import find_model_folder, listing_digest, names_modules
from builder.oci.base_image import FoundImage, find_image
from builder.oci.manifest import ARTIFACTS_DIGEST, Published
from builder.oci.target_rules import target_rules
from builder.plan import Base, Build, Plan, Step
from builder.publish.inspect import Prepared
from builder.reference import Platform, Reference
from builder.settings import Settings
from builder.wheels.imports import NamedModules, read_named_modules
from builder.wheels.inputs import Source, chosen_method, own_templates, served
from builder.wheels.recipe import PresentImage, check_files, check_loader

_log = get_logger("judged")
_methods_log = get_logger("methods")


def judged(settings: Settings, version: ModelVersion, context: Path, paths: Sequence[str]) -> dict[str, bytes]:
    """Refuse a model that cannot be served; return those of its files that have to differ in the image, by path.

    A version with a client loads its model itself, so that a problem is only a warning.

    Args:
        settings: for the variables in commands.
        version: the version.
        context: the folder its artifacts are in; what describes the model is enough.
        paths: of its artifacts.

    Raises:
        InvalidVersion: MLflow's scoring server could not load the model, or the client has no such entry point.
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
        settings: for the variables in commands.
        version: the version.
        context: the folder its artifacts are in; what describes the model is enough.
        paths: of its artifacts.

    Raises:
        InvalidVersion: MLmodel cannot be read, or the client has no such entry point.
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


def lacks(prepared: Prepared, context: Path) -> bool:
    """Return whether files that could not be read earlier name modules that no other file names.

    Args:
        prepared: the plan made without them.
        context: the folder they are in now.
    """
    if prepared.recipe is None or not prepared.unread:
        return False
    _methods_log.info("reading files that were too large before", files=list(prepared.unread))
    found = read_named_modules(context, prepared.recipe.model_folder, prepared.unread)
    known = prepared.names or NamedModules()
    return not (found.uses.keys() <= known.uses.keys() and found.loaded.keys() <= known.loaded.keys())


def prepare(
    services: Services, plan: Plan, context: Path, *, existing: Published | None, keep: bool
) -> Prepared:  # fmt: skip
    """Return the plan with the method and the base of every image to be made, and the inputs to make them.

    Args:
        services: the clients to work through.
        plan: which images to make; with the version's artifacts.
        context: the folder they are in; what describes the model is enough.
        existing: the image under the tag; None if there is none.
        keep: whether locks, and facts about base images, are kept in the registry.

    Raises:
        NoWheel: a package has no wheel for a platform, and there is no engine that could build it, or no source.
        BuilderError: the version cannot be published, or a server is unavailable.
    """
    settings = services.settings
    # A plan made before more files could be read is made anew.
    undecided = tuple(Build(platform=step.platform) if isinstance(step, Build) else step for step in plan.platforms)
    plan = plan.model_copy(update={"platforms": undecided, "dockerfile": ""})
    paths = [artifact.path for artifact in plan.artifacts]
    method = chosen_method(settings.build_method, plan.version, paths)
    own = method == "dockerfile" and bool(own_templates(Inputs.of(plan.version), paths))
    changed = {} if own else judged(settings, plan.version, context, paths)
    # A platform without a wheel belongs to the others: it is not made by a template that they do not use.
    needed = plan.artifacts if own else served(plan.version, plan.artifacts)
    prepared = Prepared(plan=plan, existing=existing, needed=needed, changed=changed)
    if method == "wheels":
        prepared = _with_environments(services, prepared, context, paths, keep=keep)
    if not prepared.plan.made_by("dockerfile"):
        return prepared
    dockerfile = rendered(settings, plan.version, context, paths, own=method == "dockerfile").dockerfile
    text = dockerfile.decode("utf-8", "replace")
    name = Dockerfile.parse(text).final_base()
    found = {step.platform: _found(services, name, step.platform) for step in prepared.plan.made_by("dockerfile")}
    if method == "dockerfile" and not own:
        _check_loader(services, plan, found, context, keep=keep)
    plan = prepared.plan
    bases = {
        platform: {"base": Base(name=str(each.reference), digest=each.digest, diff_ids=each.diff_ids) if each else None}
        for platform, each in found.items()
    }
    plan = _updated(plan, bases).model_copy(update={"dockerfile": text})
    return replace(prepared, plan=plan, dockerfile=dockerfile)


def _with_environments(
    services: Services, prepared: Prepared, context: Path, paths: Sequence[str], *, keep: bool
) -> Prepared:
    """Add a recipe for every platform whose packages have wheels."""
    plan, needed = prepared.plan, prepared.needed
    source = Source.of(services.wheels.inputs, plan.version, context, paths)
    unread = _unread(needed, context)
    found = services.wheels.environments(source, plan.builds, present=_present(services, prepared), keep=keep)
    for platform, error in found.impossible.items():
        if not error.buildable:
            raise error
        try:
            engine = select_engine(services.settings)
        except InvalidSettings:
            raise error from None
        _methods_log.warning(
            "an engine builds this platform", platform=str(platform), engine=engine.name, why=error.what
        )
    check_files(found.recipe, needed, target_rules(plan.target).most_layer_bytes)
    for note in sorted({note for notes in found.notes.values() for note in notes}):
        _methods_log.info(note)
    pending = tuple(f"{path} is read once downloaded; modules named in it may add packages" for path in unread)
    steps = {
        platform: {"method": "wheels", "base": base, "notes": (*found.notes[platform], *pending)}
        for platform, base in found.bases.items()
    }
    recipe = found.recipe if found.bases else None
    return replace(prepared, plan=_updated(plan, steps), recipe=recipe, names=source.names, unread=unread)


def _unread(artifacts: Sequence[Artifact], context: Path) -> tuple[str, ...]:
    """Return the files that name modules and have no content yet."""
    return tuple(
        artifact.path
        for artifact in artifacts
        if names_modules(artifact.path) and artifact.size != 0 and not (context / artifact.path).lstat().st_size
    )


def _check_loader(
    services: Services, plan: Plan, bases: Mapping[Platform, FoundImage | None], context: Path, *, keep: bool
) -> None:
    """Refuse a loader that needs a program that the base of the built-in Dockerfile is known to lack.

    Raises:
        InvalidVersion: MLflow's scoring server would need Java.
    """
    paths = [artifact.path for artifact in plan.artifacts]
    loader, client = loaded_by(services.settings, plan.version, context, paths)
    if not needs_java(loader):
        return
    for found in bases.values():
        if found is None:
            continue
        registry = services.bases.for_host(found.reference.repository.host)
        base = found.to_base()
        try:
            facts = services.wheels.facts(base, keep=keep, registry=registry)
        except (ServiceUnavailable, PermissionRefused, TryAgain) as error:
            name = str(found.reference)
            _methods_log.warning("the base image could not be read", base=name, error=error.one_line())
            return
        check_loader(base, facts, loader, client=client)


def _present(services: Services, prepared: Prepared) -> PresentImage | None:
    """Return the image under the tag, if it was made from the current files."""
    plan, existing = prepared.plan, prepared.existing
    listed = str(listing_digest(plan.artifacts))
    if existing is None or not plan.same_source or plan.observed_annotations.get(ARTIFACTS_DIGEST) != listed:
        return None
    registry = services.registries.for_host(plan.reference.repository.host)
    return PresentImage(registry=registry, reference=plan.reference, image=existing)


def with_layers(services: Services, prepared: Prepared) -> Plan:
    """Return the plan with the state of each image's wheel layers in the registry."""
    plan, recipe = prepared.plan, prepared.recipe
    if recipe is None:
        return plan
    bases = {step.platform: step.base for step in plan.made_by("wheels") if step.base}
    found = services.wheels.known_layers(recipe, plan.artifacts, bases)
    return _updated(plan, {platform: {"layers": layers} for platform, layers in found.items()})


def _updated(plan: Plan, changes: Mapping[Platform, Mapping[str, object]]) -> Plan:
    def updated(step: Step) -> Step:
        return step.model_copy(update=changes.get(step.platform, {})) if isinstance(step, Build) else step

    return plan.model_copy(update={"platforms": tuple(updated(step) for step in plan.platforms)})


def _found(services: Services, name: str | None, platform: Platform) -> FoundImage | None:
    """Return the base image as its registry has it now; None if there is none, or the registry does not answer.

    Raises:
        InvalidVersion: the base exists, but not for the platform.
    """
    if name is None:
        return None
    try:
        reference = Reference.parse(name)
        found = find_image(services.bases.for_host(reference.repository.host), reference, platform)
    except (ServiceUnavailable, PermissionRefused, TryAgain) as error:
        # The engine may still reach it, with a credential of its own.
        _methods_log.warning("the base image could not be looked up", base=name, error=error.one_line())
        return None
    if found is None:
        _methods_log.warning("the registry has no such base image for the platform", base=name, platform=str(platform))
    return found
