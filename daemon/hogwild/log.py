"""One JSON object a line on stdout, whoever speaks: hogwild, a library's logger, a warning, an exception.

    {"timestamp": "2026-01-02T03:04:05.678901Z", "level": "info", "event": "spool.accepted", "file": ...}

`event` names are stable and listed in the docs. What others say arrives as `python.log`, `python.warning` and
`python.uncaught`, with the text in `message`. A terminal gets colours instead. Logging never raises, and a
line never exceeds what journald takes in one piece.
"""

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, BinaryIO, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger

from hogwild.log_json import to_line
from hogwild.terminal import plain

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]


def get(name: str) -> FilteringBoundLogger:
    """A logger: `log.info("spool.accepted", file=..., examples=3)`. `name` becomes the field `logger`."""
    return cast(FilteringBoundLogger, structlog.get_logger(name))


def configure(level: Level = "info", format: Format = "auto", stream: TextIO | None = None) -> None:
    """Sets up logging for the whole process. May be called again, to change the level or the format.

    Args:
        level: least level written. Libraries speak from `warning` on, unless this is "debug".
        stream: instead of stdout.
    """
    stream = stream or sys.stdout
    console = format == "console" or (format == "auto" and stream.isatty())
    sink = _Sink(stream, binary=not console)
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(number),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _add_logger_name,
            *(_console_processors(stream) if console else _json_processors()),
        ],
        logger_factory=lambda name="": _Writer(name, sink),
        cache_logger_on_first_use=False,  # a reload must reach loggers that modules already hold
    )
    root = logging.getLogger()
    root.handlers = [_Forward()]
    root.setLevel(number if level == "debug" else max(number, logging.WARNING))
    adopt_libraries()
    warnings.showwarning = _show_warning
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    sys.unraisablehook = _unraisable


def adopt_libraries() -> None:
    """Takes away the handlers that libraries gave their own loggers, so that they come through here.

    `configure` calls it; call it again after importing a library that logs to stderr on its own.
    """
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and logger.handlers:
            logger.handlers = []
            logger.propagate = True


def _json_processors() -> list[Callable[..., Any]]:
    return [
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(
            structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=40)
        ),
        lambda _logger, _method, event_dict: to_line(event_dict),
    ]


def _console_processors(stream: TextIO) -> list[Callable[..., Any]]:
    return [
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        _drop_logger,
        _plain_text,
        structlog.dev.ConsoleRenderer(
            colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
        ),
    ]


def _add_logger_name(logger: Any, _method: str, event_dict: EventDict) -> EventDict:
    event_dict["logger"] = logger.name
    return event_dict


def _drop_logger(_logger: Any, _method: str, event_dict: EventDict) -> EventDict:
    event_dict.pop("logger", None)
    return event_dict


def _plain_text(_logger: Any, _method: str, event_dict: EventDict) -> EventDict:
    """What a file or a line calls itself must not speak to the terminal."""
    return {key: plain(value) if isinstance(value, str) else value for key, value in event_dict.items()}


_PATIENCE_S = 2.0


class _Sink:
    """Writes a line at once and swallows what goes wrong: a closed pipe must not stop a trainer, and a thread that
    hangs while it writes must not silence the one that says so."""

    def __init__(self, stream: TextIO, *, binary: bool) -> None:
        self._stream = stream
        self._binary: BinaryIO | None = getattr(stream, "buffer", None) if binary else None
        self._lock = threading.Lock()
        self._hangs = False  # a line that has not been written for so long: nobody waits for it again

    def write(self, line: bytes | str) -> None:
        mine = self._lock.acquire(timeout=0 if self._hangs else _PATIENCE_S)
        self._hangs = not mine
        try:
            with contextlib.suppress(OSError, ValueError):
                self._write(line) if mine else self._write_past(line)
        finally:
            if mine:
                self._lock.release()

    def _write(self, line: bytes | str) -> None:
        if isinstance(line, bytes) and self._binary is not None:
            self._binary.write(line + b"\n")
            self._binary.flush()
        else:
            text = (line.decode() if isinstance(line, bytes) else line) + "\n"
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()

    def _write_past(self, line: bytes | str) -> None:
        """Without the stream, whose own lock may be held, too."""
        data = line if isinstance(line, bytes) else line.encode(errors="backslashreplace")
        os.write(self._stream.fileno(), data + b"\n")


class _Writer:
    """What structlog calls the underlying logger."""

    def __init__(self, name: str, sink: _Sink) -> None:
        self.name = name
        self.debug = self.info = self.warning = self.error = self.critical = self.msg = sink.write


class _Forward(logging.Handler):
    """stdlib logging, as an event."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception as error:  # a wrong format string in a library
            message = f"{record.msg!r} (cannot be formatted: {error})"
        fields: dict[str, Any] = {"message": message}
        if record.exc_info and record.exc_info[1] is not None:
            fields["exc_info"] = record.exc_info[1]
        level = logging.getLevelName(max(logging.DEBUG, record.levelno // 10 * 10)).lower()
        method = getattr(structlog.get_logger(record.name), level, None)
        if method is not None:
            method("python.log", **fields)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001  # the signature of warnings.showwarning
    line: str | None = None,  # noqa: ARG001
) -> None:
    get("warnings").warning(
        "python.warning", message=str(message), category=category.__name__, file=filename, line=lineno
    )


def _uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    get("python").critical("python.uncaught", message=str(error), exc_info=(kind, error, traceback))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or issubclass(args.exc_type, SystemExit):
        return
    get("python").critical(
        "python.uncaught",
        message=str(args.exc_value),
        thread=args.thread.name if args.thread else None,
        exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
    )


def _unraisable(args: "sys.UnraisableHookArgs") -> None:
    if args.exc_value is not None:
        get("python").error(
            "python.uncaught",
            message=f"{args.err_msg or 'exception ignored in'}: {args.object!r}",
            exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
        )
