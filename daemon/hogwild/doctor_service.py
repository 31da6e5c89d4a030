"""What `hogwild doctor` looks at in the service: server, daemon, plugin, units. Imports no torch (a child does)."""

import json
import os
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from hogwild import doctor_machine, installation, tls
from hogwild.doctor import UNIT, Finding, Subject, fail, ok, warn
from hogwild.errors import UsageError
from hogwild.vllm_plugin import launch

_ASK_PLUGIN = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from hogwild import vllm_plugin
assert vllm_plugin._registered, "vLLM did not load the plugin; is it left out by VLLM_PLUGINS?"
import json
from hogwild.vllm_plugin import patches
print(json.dumps(patches.report()))
"""


def server(subject: Subject) -> Iterator[Finding]:
    attached = subject.status.get("server") or {}
    arguments = subject.config.server.arguments
    try:
        launch.refuse(arguments)
    except UsageError as error:
        yield fail("server", error, "mend server.arguments: hogwild vllm does not start with them")
        return
    url = subject.config.server.url or attached.get("url") or launch.url(arguments)
    certificate = attached.get("certificate") or launch.certificate(arguments)
    try:
        believed = tls.context(certificate, named=bool(subject.config.server.url))
    except (OSError, ValueError) as error:
        yield fail(
            "server",
            f"its certificate {certificate} cannot be read: {error}",
            "mend --ssl-certfile in server.arguments; the daemon has to see the file where the server does",
        )
        return
    about = _ask(
        f"{url.rstrip('/')}/hogwild/status", subject.variable(subject.config.server.api_key_env), believed
    )
    if isinstance(about, dict):
        yield ok(
            "server",
            f"{url} serves generation {about['generation']}, epoch {about['epoch']}: the plugin is loaded",
        )
        if not about["daemon"]["alive"]:
            yield warn("server", "no daemon trains its weights", "systemctl start hogwild, or hogwild serve")
    elif about == 401 and _asks(subject.status):
        yield ok("server", f"{url} wants an API key, and the daemon has it")
    elif about == 401:
        yield warn(
            "server",
            f"{url} wants an API key",
            f"set ${subject.config.server.api_key_env}, for the daemon too",
        )
    elif isinstance(about, ssl.SSLError):
        yield fail(
            "server",
            f"{url} cannot be asked: {about}",
            "give it a valid certificate, one for the name in server.url where that is set",
        )
    elif about is not None:
        yield fail(
            "server",
            f"something else answers on {url} ({about})",
            "stop it, or set --port in server.arguments",
        )
    else:
        yield ok("server", f"nobody listens on {url}: the port is free")


def arena_socket(subject: Subject) -> Iterator[Finding]:
    path = subject.config.socket
    pid = subject.daemon()
    if path.exists():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            code = probe.connect_ex(str(path))
        if code == 0 and pid is not None:
            yield _daemon(pid, path, subject.status)
        elif code == 0:
            yield fail(
                "daemon",
                f"a daemon with another state folder listens on {path}",
                "stop it, or give another `socket`",
            )
        else:
            yield ok("daemon", f"does not run; {path} is left over, and is replaced")
    elif pid is not None:
        yield fail(
            "daemon", f"process {pid} works in {subject.config.state_dir}, but does not listen on {path}",
            "if it has just started, ask again; else give this command the daemon's configuration (--config)",
        )  # fmt: skip
    elif not subject.may(next(one for one in path.parents if one.exists()), os.W_OK | os.X_OK):
        yield fail("daemon", f"user {subject.user.pw_name} cannot make {path}", "give another `socket`")
    else:
        yield ok("daemon", f"does not run; it will listen on {path}")


def plugin(subject: Subject) -> Iterator[Finding]:
    found = [one for one in metadata.entry_points(group="vllm.general_plugins") if one.name == "hogwild"]
    if not found:
        yield fail(
            "plugin", "is not registered with vLLM", "install hogwild with pip, into the environment of vLLM"
        )
        return
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and "hogwild" not in chosen.split(","):
        yield fail("plugin", f"$VLLM_PLUGINS leaves it out: {chosen!r}", "add hogwild to it, or unset it")
        return
    if subject.quick:
        yield ok("plugin", "is registered with vLLM (not tried, because of --quick)")
        return
    ran = doctor_machine.child(_ASK_PLUGIN)
    if ran.returncode:
        yield fail(
            "plugin",
            f"vLLM does not load it: {doctor_machine.last_line(ran.stderr)}",
            "pip install --force-reinstall hogwild",
        )
    else:
        yield ok("plugin", "vLLM loads it")
        for patch in json.loads(doctor_machine.last_line(ran.stdout)):
            said = f"{patch['name']}, in place of {patch['replaces']}, until {patch['until']}"
            if patch["differs"]:
                yield fail(
                    "patch", f"{said}: {patch['differs']}", "use the vLLM that hogwild was installed with"
                )
            else:
                yield ok("patch", said)


def units(subject: Subject) -> Iterator[Finding]:
    if not UNIT.is_file():
        yield ok("units", "are not installed (hogwild install)")
        return
    if subject.user.pw_name != "hogwild":
        yield fail("units", "there is no user hogwild", "hogwild install")
    program = installation.called(UNIT) or Path()
    if not program.exists():
        yield fail(
            "units", f"{program}, which they call, is not there", "hogwild install, from the new place"
        )
    elif why := installation.hidden(program, Path(os.path.realpath(program.with_name("python")))):
        yield fail("units", why, "then: hogwild install")
    elif outdated := [
        name
        for name in installation.UNITS
        if (UNIT.parent / name).read_text() != installation.unit_text(name, program)
    ]:
        yield warn(
            "units",
            f"{', '.join(outdated)} are of another version, or edited",
            "hogwild install; systemctl edit for changes",
        )
    else:
        yield ok("units", f"are installed and call {program}")
    for name in installation.UNITS[:2]:
        state = _show(name, "ActiveState")
        if state == "failed":
            yield fail(
                "units",
                f"{name} has failed: {_show(name, 'StatusText') or _show(name, 'Result')}",
                f"journalctl -u {name} -o cat",
            )
        elif state:
            yield ok("units", f"{name} is {state}: {_show(name, 'StatusText') or 'no status'}")


# --- small things ----------------------------------------------------------------------------------------------------


def _daemon(pid: int, path: Path, status: dict[str, Any]) -> Finding:
    """One that listens: has it got what it is for?"""
    if why := status.get("refused"):
        return fail(
            "daemon",
            f"process {pid} refused the server's weights: {why}",
            "serve the model that it has learned on, or give another state_dir; arena.refused in its log says all",
        )
    if status.get("waiting"):
        return warn(
            "daemon",
            f"process {pid} waits for a server on {path}",
            "hogwild vllm MODEL, or systemctl start hogwild-vllm",
        )
    return ok("daemon", f"process {pid} listens on {path}")


def _asks(status: dict[str, Any]) -> bool:
    """Does this daemon get answers from its server? What it has not seen to be served, it does not train."""
    unasked = [one for one in status.get("warnings", ()) if one.startswith("the server could not be asked")]
    return bool(status.get("training")) and not unasked


def _ask(url: str, key: str, believed: ssl.SSLContext) -> Any:
    """What a server answers: an object; a status or an error's name if it is not ours; None if nobody listens."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=believed)
    )
    try:
        with direct.open(request, timeout=5) as response:
            about = json.load(response)
            return about if isinstance(about, dict) and "generation" in about else "not hogwild's"
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            return error.reason
        return None if isinstance(error.reason, ConnectionRefusedError) else str(error.reason)
    except (OSError, ValueError) as error:
        return repr(error)


def _show(unit: str, name: str) -> str:
    ran = subprocess.run(["systemctl", "show", "-P", name, unit], capture_output=True, text=True, check=False)
    return ran.stdout.strip()


CHECKS = (server, arena_socket, plugin, units)
