"""The command line: `aioserve package.module:app`, or `python -m aioserve package.module:app`."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import click
import uvicorn

from aioserve._errors import message_of
from aioserve._functions import describe
from aioserve._log import logger
from aioserve._options import DEFAULTS, REFUSED, RENAMED, TIMEOUTS, Options, option_meant
from aioserve._process import messages
from aioserve._process.program import run
from aioserve._serving import serving
from aioserve._settings import parse
from aioserve._uvicorn.logs import log_config

# The exit code for a wrong command line, as in most programs.
USAGE_ERROR = 2


# Types of options. Each is called with what the user wrote.


def seconds(value: str) -> float | None:
    try:
        return None if value.lower() == "none" else float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a number of seconds or none") from None


def octal(value: str) -> int:
    try:
        return int(value, 8)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not an octal number") from None


def descriptor(value: str) -> int:
    if sys.platform == "win32":
        raise click.BadParameter("descriptors are not supported on Windows")
    number: int = click.INT(value)
    try:
        os.fstat(number)
    except (OverflowError, OSError):
        raise click.BadParameter(f"{number} is not an open file descriptor") from None
    return number


def writable(value: str) -> int:
    number = descriptor(value)
    if sys.platform != "win32":  # where it is refused
        import fcntl  # only where it is needed

        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise click.BadParameter(f"descriptor {number} is not writable")
    return number


class Command(click.Command):
    """A command whose help shows its options in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        others = {each.name: record for each in options if (record := each.get_help_record(ctx)) is not None}
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([others.pop(name) for name in names or tuple(others) if name in others])


UVICORN_OPTIONS: dict[str, click.Parameter] = {str(each.name): each for each in uvicorn.main.params}

SECTIONS: dict[str, tuple[str, ...]] = {
    "App": ("factory", "app_dir", "lifespan", "interface", "root_path"),
    "Addresses": ("host", "port", "uds", "uds_mode", "fd", "systemd", "systemd_name", "reuse_port", "backlog"),
    "Start and stop": ("startup_timeout", "shutdown_timeout", "drain_delay", "disconnect_after", "ready_fd"),
    "Clients": ("header_timeout", "cancel_on_disconnect", "timeout_keep_alive", "limit_concurrency"),
    "TLS": tuple(name for name in UVICORN_OPTIONS if name.startswith("ssl_")),
    "Logs": ("log_level", "log_config", "access_log", "use_colors"),
    "Program": ("loop", "version", "help", "_click_default_help"),  # the last two are one, by click's version
    "Other uvicorn options": (),  # all that are in no other section
}


def _option(name: str, default: object = "", *, also: str = "", **attributes: Any) -> click.Option:
    """Return an option of `serving()`, which is described there."""
    text = describe(serving, name.strip("-").replace("-", "_"))
    shown = f"  [default: {default}]" if default != "" else ""
    return click.Option([name], help=f"{text}{also}{shown}", **attributes)


OWN_OPTIONS: list[click.Parameter] = [
    click.Argument(["app"]),
    _option("--factory", is_flag=True),
    click.Option(["--app-dir"], default="", help="Look for APP in this directory.  [default: the current directory]"),
    _option("--host", DEFAULTS["host"], also=" Can be repeated.", multiple=True),
    _option("--port", 8000, type=int),
    _option("--uds", also=" Then TCP needs --host or --port.", metavar="PATH"),
    _option("--uds-mode", f"{DEFAULTS['uds_mode']:o}", type=octal),
    _option("--fd", also=" Then TCP needs --host or --port.", metavar="NUMBER", type=descriptor),
    _option("--systemd", is_flag=True),
    click.Option(["--systemd-name"], metavar="NAME", help="The same, but only with the sockets of this name."),
    _option("--reuse-port", is_flag=True),
    *(
        _option(f"--{name.replace('_', '-')}", "none" if default is None else f"{default:g}", type=seconds)
        for name, default in TIMEOUTS.items()
    ),
    _option("--cancel-on-disconnect", is_flag=True),
    _option("--http2", is_flag=True),
    click.Option(
        ["--ready-fd"],
        metavar="NUMBER",
        type=writable,
        help="Write one line of JSON to this descriptor: the URLs, or the error.",
    ),
    click.Option(
        ["--loop"],
        metavar="NAME",
        default="auto",
        help="The event loop: asyncio, uvloop, zuvloop, rloop or winloop; auto is uvloop, if it is installed; or a "
        "factory, like package.module:factory.  [default: auto]",
    ),
    click.Option(["--for-parent"], hidden=True, help="Descriptors that serving_process() has passed."),
]

# Those of uvicorn's options that aioserve takes.
PASSED_OPTIONS = [
    each
    for name, each in UVICORN_OPTIONS.items()
    if name in Options.__optional_keys__ and name not in {each.name for each in OWN_OPTIONS}
]


CONTEXT = {"max_content_width": 120, "help_option_names": ["-h", "--help"]}


@click.command(cls=Command, params=[*OWN_OPTIONS, *PASSED_OPTIONS], context_settings=CONTEXT)
@click.version_option(
    package_name="aioserve-asgi",
    message=f"aioserve %(version)s with uvicorn {uvicorn.__version__} on "
    f"{platform.python_implementation()} {platform.python_version()}",
    help="Show the versions.",
)
@click.pass_context
def command(ctx: click.Context, /, app: str, for_parent: str | None, **given: Any) -> int:
    """
    Serve the ASGI app APP, an import string like package.module:app.

    When it serves, it prints its URLs, one per line, unless the log shows them in the same place. It serves until
    Ctrl+C, SIGTERM or SIGHUP (on Windows: Ctrl+C or Ctrl+Break), and then stops gracefully; a second Ctrl+C or SIGTERM
    forces the stop. Logs go to standard error. Where a time has no limit, write none.

    Exit codes: 0 after a graceful stop or an interrupted start; 1 after a forced stop, a crash or a failed shutdown; 2
    for a wrong command line; 3 if it could not start.
    """
    if sys.platform != "win32" and for_parent is not None:
        from aioserve._process import child  # only on systems with `serving_process()`

        return child.run(app, for_parent)

    loop, ready_fd = given.pop("loop"), given.pop("ready_fd")
    app_dir = os.path.abspath(given.pop("app_dir"))
    sys.path.insert(0, app_dir)
    default = click.core.ParameterSource.DEFAULT
    given = {name: value for name, value in given.items() if ctx.get_parameter_source(name) is not default}
    options = {"stop_on_signals": True, "log_config": log_config(given.get("log_level", "info")), **given}
    if "headers" in options:
        for header in options["headers"]:
            if ":" not in header:
                raise click.UsageError(f"--header must look like name:value, not {header!r}")
        options["headers"] = [tuple(header.split(":", 1)) for header in options["headers"]]
    if "systemd_name" in options:
        options["systemd"] = options.pop("systemd_name")
    if options.keys().isdisjoint(("uds", "fd", "systemd")) or not options.keys().isdisjoint(("host", "reuse_port")):
        options.setdefault("port", 8000)
    try:
        settings = parse(app, options)
    except Exception as exc:  # (a logging configuration can raise anything)
        raise click.UsageError(message_of(exc)) from exc

    settings = settings.as_service().replace(started_hint=" (Press CTRL+C to quit)", app_dir=app_dir)
    is_logged = "log_config" not in given and is_in_one_place()
    return run(settings, partial(report_event, ready_fd=ready_fd, is_logged=is_logged), loop=loop)


def is_in_one_place() -> bool:
    """Whether standard output and error are one terminal, or one file, and the log is read there as well."""
    if not logging.getLogger("uvicorn.error").isEnabledFor(logging.INFO):
        return False
    if sys.platform == "win32":  # where consoles, pipes and devices all have the number 0
        return os.isatty(1) and os.isatty(2)
    try:
        return os.path.sameopenfile(1, 2)
    except OSError:
        return False


def report_event(event: messages.Event, *, ready_fd: int | None, is_logged: bool) -> None:
    """Print where it serves, unless the log says it in the same place, or why it does not; and write it as JSON."""
    kind, error = event["event"], event.get("error")
    if kind == "ready" and is_logged:
        pass
    elif kind == "ready":
        with suppress(OSError):  # nobody reads standard output
            click.echo("\n".join(event["urls"]))
    elif error is not None:
        if error["traceback"]:
            logger.error("%s", error["traceback"].rstrip())
        prefix = "cannot start: " if kind == "failed" and error["type"] != "StartupInterruptedError" else ""
        filename = f": {error['filename']}" if error["filename"] else ""
        print_error(f"{prefix}{error['message']}{filename}")
    if kind != "stopped" and ready_fd is not None:
        try:
            with open(ready_fd, "wb", closefd=False) as out:  # or the next connection would get its number
                out.write(json.dumps({**event, "pid": os.getpid()}).encode() + b"\n")
        except OSError as exc:
            logger.warning("cannot write to descriptor %d: %s", ready_fd, exc.strerror)


def print_error(message: str) -> None:
    with suppress(OSError):  # nobody reads standard error
        click.echo(f"aioserve: {message.rstrip()}", err=True)


def main() -> NoReturn:
    # Standard descriptors that are closed become the null device, so that nothing else gets their numbers. Otherwise
    # libuv, which uvloop is built on, aborts the process when it closes one of them.
    for standard in range(3):
        try:
            os.fstat(standard)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # this takes the lowest number that is free

    try:
        code = command.main(standalone_mode=False, windows_expand_args=False)
    except click.ClickException as exc:
        message = why_no_option(exc.option_name) if isinstance(exc, click.NoSuchOption) else ""
        print_error(f"{message or exc.format_message()} (aioserve --help lists the options)".replace("\n", " "))
        code = USAGE_ERROR
    sys.exit(code)


def why_no_option(option: str) -> str:
    """Return what to use in place of an option that is refused, or has another name; "" for any other."""
    name = option.lstrip("-").replace("-", "_")
    if name in RENAMED:
        return f"there is no option {option}; aioserve calls the same option {as_flag(RENAMED[name])}"
    if name in REFUSED and name in UVICORN_OPTIONS:
        return f"there is no option {option}: {REFUSED[name]}"
    meant = option_meant(name, as_flag)
    has_flag = "stop_on_signals" not in option_meant(name)
    return f"there is no option {option}; use {meant}" if meant and has_flag else ""


def as_flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
