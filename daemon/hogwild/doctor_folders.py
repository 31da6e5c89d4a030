"""What `hogwild doctor` looks at on disk: the state folder, the spool, the model. Imports no torch."""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hogwild import heap, installation, spool_lock, state_lock
from hogwild.doctor import UNIT, Finding, Subject, by_owner, fail, ok, warn
from hogwild.errors import HogwildError
from hogwild.ledger_schema import APPLICATION_ID, VERSION
from hogwild.plural import counted

_LOCAL = {"ext2/ext3", "xfs", "btrfs", "zfs", "f2fs", "overlayfs"}
_MEMORY = {"tmpfs", "ramfs"}
_WITH_OPTIMIZER, _PROCESS_BYTES = 1.25, 2 << 30
"""What the weights take together with moments and projections, over the weights alone; and what each of the two
processes takes besides: "How large a model fits" in docs/operations.md."""


def state_folder(subject: Subject) -> Iterator[Finding]:
    folder, user = subject.config.state_dir, subject.user.pw_name
    there = next(one for one in (folder, *folder.parents) if one.exists())
    if there != folder:
        if subject.may(there, os.W_OK | os.X_OK):
            yield ok("state folder", f"{folder} does not exist yet, and can be made")
        else:
            yield fail(
                "state folder", f"{folder} does not exist, and user {user} cannot make it",
                by_owner(folder, f"install -d -o {user} -m 710 {folder}", "give another `state_dir`"),
            )  # fmt: skip
            return
    elif not subject.may(folder, os.R_OK | os.W_OK | os.X_OK):
        yield fail("state folder", f"user {user} may not write {folder}", _given(folder, user))
        return
    else:
        wrong = [
            path
            for path in folder.iterdir()
            if path.stat(follow_symlinks=False).st_uid != subject.user.pw_uid
            and path.name != "lost+found"  # root's, where the folder is a disk of its own
        ]
        if wrong:
            yield fail(
                "state folder", f"{wrong[0]} is not owned by {user}", _given(folder, user)
            )  # fmt: skip
        else:
            yield ok("state folder", f"{folder}, written by {user}")
        yield from _ledger(folder / "ledger.sqlite")
    yield from _disk(subject, there)


def _ledger(path: Path) -> Iterator[Finding]:
    """By the head of the file alone: to open it would make files beside it, of whoever asks."""
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except OSError:  # there is none yet; or whoever asks may not read it
        return
    if not head:
        return
    version, application = (int.from_bytes(head[at : at + 4]) for at in (60, 68))
    backup = f"bring back {path} from a backup: docs/operations.md"
    if not head.startswith(b"SQLite format 3\0") or application not in (0, APPLICATION_ID):
        yield fail("ledger", f"{path} is no ledger of hogwild, or is damaged", backup)
    elif version > VERSION:
        yield fail(
            "ledger", f"{path} was written by a newer hogwild (schema {version}; this one knows {VERSION})",
            f"install that one again, or {backup}",
        )  # fmt: skip
    elif version < VERSION and not path.with_name(f"{path.name}-wal").exists():  # where a new one begins
        yield ok("ledger", f"schema {version}; the next start of the daemon brings it to {VERSION}")
    else:
        yield ok("ledger", str(path))


def _disk(subject: Subject, folder: Path) -> Iterator[Finding]:
    ran = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=False)
    kind = ran.stdout.strip()
    if kind in _MEMORY:
        yield fail(
            "file system", f"{folder} is on {kind}: a reboot loses everything", "give another state_dir"
        )
    elif kind in _LOCAL:
        yield ok("file system", f"{kind} at {folder}")
    else:
        yield warn(
            "file system", f"{kind or 'unknown'} at {folder}",
            "locks and fsync must hold, or a crash can lose what was learned: a local disk with ext4 or xfs is best",
        )  # fmt: skip
    free = shutil.disk_usage(folder).free
    weights = _weights_bytes(_model(subject))
    need = (subject.config.checkpoint.keep + 2) * weights
    shown = f"{free / 2**30:.1f} GiB free"
    if not weights:
        yield ok("disk space", f"{shown} (the model's size is not known)")
    elif free < 2 * weights:
        yield fail(
            "disk space",
            f"{shown}, a checkpoint takes {weights / 2**30:.1f}",
            "make room, or give another state_dir",
        )
    elif free < need:
        yield warn(
            "disk space",
            f"{shown}; {counted(subject.config.checkpoint.keep, 'checkpoint')} and one more take {need / 2**30:.1f}",
            "lower checkpoint.keep, or make room",
        )
    else:
        yield ok("disk space", f"{shown}, checkpoints take up to {need / 2**30:.1f}, history up to "
                 f"{subject.config.history.max_gib:g}")  # fmt: skip


def spool(subject: Subject) -> Iterator[Finding]:
    incoming = subject.config.spool.dir / "incoming"
    if not incoming.is_dir():
        yield ok("spool", f"{incoming} is made when the daemon starts")
        return
    status = incoming.stat()
    if not subject.may(incoming, os.R_OK | os.W_OK | os.X_OK):
        yield fail(
            "spool",
            f"user {subject.user.pw_name} may not write {incoming}",
            by_owner(incoming, f"chown {subject.user.pw_name}: {incoming}", "give another `spool.dir`"),
        )
    elif not (status.st_mode & stat.S_IWGRP and status.st_mode & stat.S_ISGID):
        yield warn(
            "spool",
            f"only its owner can drop files into {incoming}",
            by_owner(incoming, f"chmod 2770 {incoming}, to let the group"),
        )
    else:
        yield ok("spool", f"{incoming}, group {status.st_gid} may drop files")
    lock, user = incoming.parent / spool_lock.NAME, subject.user
    if lock.exists() and lock.stat().st_uid != user.pw_uid:
        yield fail(
            "spool",
            f"{lock} is not owned by {user.pw_name}: nothing is taken",
            by_owner(lock, f"chown {user.pw_name}: {lock}", "give another `spool.dir`"),
        )
    if (other := _other_daemon(subject)) is not None:
        yield fail(
            "spool",
            f"process {other}, which has another state folder, takes files from {incoming}",
            "stop one of the two daemons, or give each a `spool.dir` of its own",
        )
    done = incoming.parent / "done"
    if done.is_dir() and done.stat().st_dev != status.st_dev:
        yield fail("spool", "incoming/ and done/ are on different file systems", "mount the spool as a whole")
    unreadable = [path for path in incoming.iterdir() if path.is_file() and not subject.may(path, os.R_OK)]
    if unreadable:
        yield warn(
            "spool",
            f"{unreadable[0].name} cannot be read by {subject.user.pw_name}",
            by_owner(unreadable[0], f"chmod g+r {unreadable[0]}"),
        )


def model(subject: Subject) -> Iterator[Finding]:
    folder = _model(subject)
    if folder is None:
        named = subject.config.server.model
        if named:
            yield ok("model", f"{named}, from the hub")
        else:
            yield warn("model", "none is configured", "set `model`, or name one: hogwild vllm /path/of/model")
        return
    if not folder.is_dir():
        yield fail("model", f"{folder} does not exist", "set `model` to the folder of a Hugging Face model")
        return
    for path in (folder, *(folder / name for name in ("config.json", "tokenizer_config.json"))):
        if not path.exists():
            yield fail(
                "model", f"{path} is missing", "download the whole model: hf download NAME --local-dir FOLDER"
            )
            return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        yield fail(
            "model",
            f"{folder} has no *.safetensors",
            "hogwild reads safetensors only: convert it with save_pretrained",
        )
        return
    missing = _missing_shards(folder)
    if missing:
        yield fail("model", f"{missing[0]} is missing", "download the whole model again")
    for path in (folder, *files, folder / "config.json"):
        if not subject.may(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            yield fail(
                "model",
                f"user {subject.user.pw_name} may not read {path}",
                by_owner(path, f"chmod -R a+rX {folder}"),
            )
            return
    if UNIT.is_file() and (why := _hidden(folder)):
        yield fail(
            "model",
            f"the units hide {why} from the service",
            "move the model, for example to /var/lib/hogwild/models",
        )
    described = json.loads((folder / "config.json").read_bytes())
    if described.get("quantization_config"):
        yield fail(
            "model",
            "its weights are quantised",
            "hogwild trains the weights that are served: use bf16 or fp16 ones",
        )
        return
    dtype = described.get("dtype", described.get("torch_dtype", "unknown"))
    size = _weights_bytes(folder)
    yield ok(
        "model",
        f"{folder}: {', '.join(described.get('architectures', ['?']))}, {dtype}, {size / 2**30:.2f} GiB",
    )
    if list(Path("/dev").glob("nvidia[0-9]*")):
        return
    available, needed = heap.available(), size * _WITH_OPTIMIZER + 2 * _PROCESS_BYTES
    if 0 < available < needed and subject.daemon() is None:  # one that runs has its memory already
        yield warn(
            "memory",
            f"{available / 2**30:.1f} GiB are available; server and daemon take about {needed / 2**30:.1f}, of which "
            f"the weights are {size / 2**30:.1f}",
            "a smaller model, or a smaller training.activation_mib and --kv-cache-memory-bytes",
        )


# --- small things ----------------------------------------------------------------------------------------------------


def _other_daemon(subject: Subject) -> int | None:
    """The process that holds the spool, where it is not the daemon of this state folder. None where we may not look:
    who may not write the spool is told so anyway."""
    try:
        other = state_lock.holder(subject.config.spool.dir, spool_lock.NAME)
        return None if other == subject.daemon() else other
    except HogwildError:
        return None


def _given(folder: Path, user: str) -> str:
    instead = f"give another `state_dir`, such as a copy of this one: cp -r {folder} NEW"
    return by_owner(folder, f"chown -R {user}: {folder}", instead)


def _model(subject: Subject) -> Path | None:
    named = subject.config.server.model or subject.config.model or subject.status.get("model", "")
    return Path(named) if named and (named.startswith(("/", ".", "~")) or Path(named).is_dir()) else None


def _weights_bytes(folder: Path | None) -> int:
    try:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder is not None else 0
    except OSError:
        return 0


def _missing_shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    names = set(json.loads(index.read_bytes())["weight_map"].values())
    return sorted(name for name in names if not (folder / name).is_file())


def _hidden(path: Path) -> str:
    return next((one for one in installation.HIDDEN if path.resolve().is_relative_to(one)), "")


CHECKS = (state_folder, spool, model)
