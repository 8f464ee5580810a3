"""What several commands have in common: arguments, options and the form of their help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from builder.cli.invocation import Invocation

if TYPE_CHECKING:
    from collections.abc import Callable

# The variables of the arguments NAME and VERSION.
MODEL = ("MODEL_NAME", "MODEL_VERSION")

pass_invocation = click.make_pass_decorator(Invocation)


class Command(click.Command):
    """A command that has stdout for its product alone; its help is printed before that."""

    def invoke(self, ctx: click.Context) -> Any:  # what the command returns
        """Run the command."""
        with ctx.find_object(Invocation).reserved_stdout():  # type: ignore[union-attr] # `run` always gives one
            return super().invoke(ctx)


class Group(click.Group):
    """A group that lists its commands in the order of a publish, not of the alphabet."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names in the order in which they were added."""
        return list(self.commands)


def model_arguments(function: Callable[..., object]) -> Callable[..., object]:
    """Give a command the arguments NAME and VERSION, which the environment may hold instead."""
    function = click.argument("version", required=False, metavar="[VERSION]")(function)
    return click.argument("name", required=False, metavar="[NAME]")(function)


def in_namespace(function: Callable[..., object]) -> Callable[..., object]:
    """Give a command the options that say in which namespace of which cluster it works."""
    context = click.option("--context", default="", help="Context of the kubeconfig, if not its current one.")
    return click.option(
        "-n", "--namespace", default="", help="Namespace of the Jobs, in place of the context's own, or else 'builder'."
    )(context(function))


output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print it."
)


def again_options(function: Callable[..., object]) -> Callable[..., object]:
    """Give a command the options that publish what is there already."""
    rebuild = click.option("--rebuild", is_flag=True, help="Make the image again although it is there.")
    return click.option(
        "--force", is_flag=True, help="Replace an image that another source, or somebody else, left under the tag."
    )(rebuild(function))


def epilog(*examples: str, codes: str = "see builder --help.") -> str:
    """Return what stands below a command's options: examples, and exit codes."""
    lines = "\n".join(f"  {example}" for example in examples)
    return f"\b\nExamples:\n{lines}\n\nExit codes: {codes}"


def command(name: str | None = None, *, epilog: str) -> Callable[[Callable[..., object]], Command]:
    """Return what makes a command of a function.

    Args:
        name: the command's; None for the function's.
        epilog: what stands below its options.
    """
    return click.command(name, cls=Command, epilog=epilog)
