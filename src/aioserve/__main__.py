"""
The command line: `aioserve package.module:app`, or `python -m aioserve package.module:app`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import sys
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from typing import Any, NoReturn

import click
import uvicorn

from aioserve import _child
from aioserve._options import REFUSED, Options, parse
from aioserve._program import log_config, run

logger: logging.Logger = logging.getLogger("aioserve")

# Exit code for a command line that makes no sense, as everywhere.
MISUSED = 2


def seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Return a number of seconds as `serving()` takes it."""
    if value is None or value.lower() == "none":
        return None
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number of seconds nor none", ctx, param) from None


def descriptor(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    """Return the number of an open file descriptor."""
    if value is not None:
        try:
            os.fstat(value)
        except (OverflowError, OSError):
            raise click.BadParameter(f"{value} is no open file descriptor", ctx, param) from None
    return value


def mode(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Return the permissions of a file, which are written in octal digits."""
    try:
        return None if value is None else int(value, 8)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no octal number", ctx, param) from None


def writable(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    """Return the number of a file descriptor that can be written to."""
    value = descriptor(ctx, param, value)
    if value is not None and fcntl.fcntl(value, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise click.BadParameter(f"descriptor {value} is open for reading only", ctx, param)
    return value


class Command(click.Command):
    """A command whose help shows its options in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections; the last one has what no other names."""
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        left = {each.name: record for each in options if (record := each.get_help_record(ctx)) is not None}
        for title, names in SECTIONS.items():
            records = [left.pop(name) for name in names or tuple(left) if name in left]
            with formatter.section(title):
                formatter.write_dl(records)


SECTIONS: dict[str, tuple[str, ...]] = {
    "The app": ("factory", "app_dir", "lifespan", "interface", "root_path"),
    "Where it listens": ("host", "port", "uds", "uds_mode", "fd", "systemd", "systemd_name", "reuse_port", "backlog"),
    "How it starts and stops": (
        "startup_timeout",
        "shutdown_timeout",
        "drain_delay",
        "disconnect_after",
        "ready_fd",
    ),
    "TLS": (
        "ssl_certfile",
        "ssl_keyfile",
        "ssl_keyfile_password",
        "ssl_ca_certs",
        "ssl_cert_reqs",
        "ssl_ciphers",
        "ssl_version",
    ),
    "Logs": ("log_level", "log_config", "access_log", "use_colors"),
    "The program": ("loop", "version", "help"),
    "Other options of uvicorn's": (),
}


def show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Print which versions this is, and exit."""
    if value and not ctx.resilient_parsing:
        python = f"{platform.python_implementation()} {platform.python_version()}"
        click.echo(f"aioserve {version('aioserve-asgi')} with uvicorn {uvicorn.__version__} on {python}")
        ctx.exit()


OURS: list[click.Parameter] = [
    click.Argument(["app"]),
    click.Option(["--factory"], is_flag=True, help="APP is a function that makes the app."),
    click.Option(["--app-dir"], default="", help="Look for APP here first.  [default: the current directory]"),
    click.Option(
        ["--host"],
        multiple=True,
        help="A name or an address to listen on; several with several of these.  [default: 127.0.0.1]",
    ),
    click.Option(["--port"], type=int, help="0 takes a free one, the same on every address.  [default: 8000]"),
    click.Option(["--uds"], metavar="PATH", help="A Unix socket, in place of a host and a port."),
    click.Option(["--uds-mode"], metavar="OCTAL", callback=mode, help="Its permissions, like 660.  [default: 600]"),
    click.Option(["--fd"], type=int, callback=descriptor, help="A listening socket that this process has inherited."),
    click.Option(
        ["--systemd"],
        is_flag=True,
        help="The sockets that systemd hands down; and only without them, those of the other options.",
    ),
    click.Option(["--systemd-name"], metavar="NAME", help="The same, but only those with this FileDescriptorName."),
    click.Option(["--reuse-port"], is_flag=True, help="Let other programs of yours listen on the same port."),
    click.Option(
        ["--startup-timeout"],
        metavar="SECONDS",
        callback=seconds,
        help="How long the app's startup may take.  [default: 60; none: no limit]",
    ),
    click.Option(
        ["--shutdown-timeout"],
        metavar="SECONDS",
        callback=seconds,
        help="How long the requests in flight may take to finish.  [default: 10; none: no limit]",
    ),
    click.Option(
        ["--drain-delay"],
        metavar="SECONDS",
        callback=seconds,
        help='How long to go on accepting before that, while saying "connection: close".  [default: 0]',
    ),
    click.Option(
        ["--disconnect-after"],
        metavar="SECONDS",
        callback=seconds,
        help="How long until handlers that wait in receive() hear of a disconnect.  [default: the shutdown timeout]",
    ),
    click.Option(
        ["--ready-fd"],
        type=int,
        callback=writable,
        help="Write one line of JSON to this descriptor, and close it: where it serves, or why it does not.",
    ),
    click.Option(
        ["--loop"],
        type=click.Choice(["auto", "asyncio", "uvloop"]),
        default="auto",
        help="Which event loop to run in; auto is uvloop's, if it is installed.  [default: auto]",
    ),
    click.Option(
        ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=show_version, help="Show the versions."
    ),
    click.Option(["--for-parent"], hidden=True, help="Descriptors that serving_process() has passed."),
]

# uvicorn's, as its own command line has them; of those that aioserve takes.
UVICORNS: dict[str | None, click.Parameter] = {each.name: each for each in uvicorn.main.params}
PASSED = [
    each
    for name, each in UVICORNS.items()
    if name in Options.__optional_keys__ and name not in {each.name for each in OURS}
]


@click.command(cls=Command, params=[*OURS, *PASSED], context_settings={"max_content_width": 120})
@click.pass_context
def command(ctx: click.Context, /, app: str, for_parent: str | None, **given: Any) -> int:
    """
    Serve the ASGI app APP, an import string like package.module:app.

    It prints its URL once it serves, and serves until Ctrl+C or SIGTERM; then it stops gracefully. A second signal
    forces. Logs go to the standard error.

    Exit codes: 0 after a graceful stop; 1 after one that had to be forced, or a crash; 2 for a command line that makes
    no sense; 3 where it could not start.
    """
    if for_parent is not None:
        return _child.run(app, for_parent)

    given = {name: value for name, value in given.items() if _was_given(ctx, name)}
    loop, app_dir, ready_fd = given.pop("loop", "auto"), given.pop("app_dir", ""), given.pop("ready_fd", None)
    sys.path.insert(0, os.path.abspath(app_dir))
    try:
        settings = parse(app, _as_options(given))
    except Exception as exc:  # (a configuration of logging raises what it likes)
        raise click.UsageError(str(exc)) from exc

    return run(settings, partial(tell, ready_fd=ready_fd), loop=loop)


def _was_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _as_options(given: dict[str, Any]) -> dict[str, Any]:
    options = {"stop_on_signals": True, "log_config": log_config(given.get("log_level", "info")), **given}
    if "headers" in options:
        for header in options["headers"]:
            if ":" not in header:
                raise click.UsageError(f"--header {header!r} is no name:value")
        options["headers"] = [tuple(header.split(":", 1)) for header in options["headers"]]
    if "systemd_name" in options:
        options["systemd"] = options.pop("systemd_name")
    if not any(name in options for name in ("uds", "fd", "systemd")):
        options.setdefault("port", 8000)
    return options


def tell(event: dict[str, Any], *, ready_fd: int | None) -> None:
    """Tell people where it serves, and programs that, or why not."""
    if event["event"] == "ready":
        with suppress(OSError):  # nobody reads it
            click.echo("\n".join(event["urls"]))
    elif event["error"] is not None:
        failed = event["event"] == "failed" and event["error"]["type"] != "StartupInterruptedError"
        complain("it cannot start: " if failed else "", event["error"])
    if event["event"] in ("ready", "failed") and ready_fd is not None:
        try:
            with open(ready_fd, "wb") as out:
                out.write(json.dumps({**event, "pid": os.getpid()}).encode() + b"\n")
        except OSError as exc:
            logger.warning("cannot write to descriptor %d: %s", ready_fd, exc.strerror)


def complain(what: str, error: dict[str, Any]) -> None:
    """Say in one line what went wrong; and of the app's own code, which of it did."""
    if error["traceback"]:
        logger.error("%s", error["traceback"].rstrip())
    filename = f": {error['filename']}" if error["filename"] else ""
    say(f"{what}{error['message']}{filename}")


def say(line: str) -> None:
    """Print one line to the standard error."""
    with suppress(OSError):
        click.echo("aioserve: " + line.replace("\n", " "), err=True)


def fill_gaps() -> None:
    """
    Open the null device for standard descriptors that are closed, so that nothing else gets their numbers.

    libuv, which uvloop is made of, aborts the process when it closes such a one.
    """
    for standard in range(3):
        try:
            os.fstat(standard)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # this takes the lowest number that is free


def main() -> NoReturn:
    """Run the command line."""
    fill_gaps()
    try:
        code = command.main(standalone_mode=False)
    except click.NoSuchOption as exc:
        name = exc.option_name.lstrip("-").replace("-", "_")
        reason = REFUSED.get(name) if name in UVICORNS else None
        say(f"there is no option {exc.option_name}: {reason}" if reason else exc.format_message())
        code = MISUSED
    except click.ClickException as exc:
        say(exc.format_message())
        code = MISUSED
    sys.exit(code)


if __name__ == "__main__":
    main()
