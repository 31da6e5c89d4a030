"""What a service user is told when it may not do something. With real users: root may do anything."""

import os
import pwd
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hogwild import cli_watch, config, doctor, doctor_folders, doctor_service, state_lock
from hogwild.cli import app
from hogwild.errors import HogwildError
from hogwild.ledger import Ledger
from hogwild.settings import Config, SpoolConfig
from hogwild.spool import Spool

NOBODY = 65534


def unprivileged(work: Callable[[], object], uid: int = NOBODY) -> str:
    """Runs `work` in a forked child without root's rights and returns what it returned or raised, as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0 and uid != 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(uid)
            said = f"{work()}"
        except HogwildError as error:
            said = str(error)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.fixture
def place():
    """A folder that everybody may use; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o777)
    shutil.rmtree(folder)


def spool_at(place: Path) -> Spool:
    ledger = Ledger(place / "state" / "ledger.sqlite")
    return Spool(SpoolConfig(dir=place / "spool", settle_s=0), ledger, passes=1)


def test_a_ledger_folder_that_may_not_be_written_names_path_and_user(place):
    (place / "state").mkdir(mode=0o555)
    said = unprivileged(lambda: Ledger(place / "state" / "ledger.sqlite"))
    assert f"{place}/state/ledger.sqlite: user " in said
    assert "cannot write it" in said


def test_a_ledger_of_somebody_else_names_path_and_user(place):
    if os.getuid() != 0:
        pytest.skip("needs two users")
    with Ledger(place / "ledger.sqlite"):
        pass
    said = unprivileged(lambda: Ledger(place / "ledger.sqlite"))
    assert f"{place}/ledger.sqlite: user nobody cannot write it" in said


@pytest.mark.parametrize("folder", ["spool", "spool/incoming", "spool/failed"])
def test_a_spool_folder_that_may_not_be_written_names_path_and_user(place, folder):
    (place / folder).mkdir(parents=True)
    (place / "spool").chmod(0o777)
    (place / folder).chmod(0o555)
    said = unprivileged(lambda: spool_at(place).prepare())
    assert f"{place}/{folder}" in said
    assert "user " in said


def test_a_file_that_may_not_be_read_is_named_and_stays_and_others_go_on(place, capfd):
    (place / "spool" / "incoming").mkdir(parents=True)
    for path in (place / "spool", place / "spool" / "incoming"):
        path.chmod(0o777)
    secret = place / "spool" / "incoming" / "secret.jsonl"
    secret.write_text('{"text": "a"}\n')
    secret.chmod(0)
    (place / "spool" / "incoming" / "open.jsonl").write_text('{"text": "b"}\n')

    def scan() -> object:
        spool = spool_at(place)
        spool.prepare()
        return [spool.scan_once() for _ in range(2)]

    assert "accepted=['open.jsonl'], rejected=[], duplicates=[], waiting=['secret.jsonl']" in unprivileged(
        scan
    )
    said = capfd.readouterr().out
    assert said.count("spool.unreadable") == 1  # not again with every scan
    assert str(secret) in said
    assert secret.exists()


def doctor_says(
    place: Path, check: Callable[[doctor.Subject], Iterable[doctor.Finding]], **more: Path
) -> str:
    """What user nobody is told, by one check, about a service that runs as nobody."""
    config = Config(state_dir=place / "state", socket=place / "arena.sock", **more)
    subject = doctor.Subject(config, pwd.getpwuid(NOBODY), quick=True)
    found = unprivileged(lambda: [one for one in check(subject) if one.level != "ok"])
    assert f"{place}" in found
    return found


def test_the_doctor_tells_a_plain_user_what_a_plain_user_can_do(place):
    """chown is root's; another place is anybody's to give."""
    if os.getuid() != 0:
        pytest.skip("gives files to another user")
    place.chmod(0o755)
    made = doctor_says(place, doctor_folders.state_folder)
    assert f"as root: install -d -o nobody -m 710 {place}/state; or give another `state_dir`" in made
    (place / "state").mkdir(mode=0o755)
    not_ours = doctor_says(place, doctor_folders.state_folder)
    assert f"as root: chown -R nobody: {place}/state; or give another `state_dir`, such as a copy" in not_ours
    os.chown(place / "state", NOBODY, NOBODY)
    (place / "state" / "ledger.sqlite").touch()
    assert f"as root: chown -R nobody: {place}/state; or" in doctor_says(place, doctor_folders.state_folder)
    incoming = place / "state" / "spool" / "incoming"
    incoming.mkdir(parents=True)
    assert f"as root: chown nobody: {incoming}; or give another `spool.dir`" in doctor_says(
        place, doctor_folders.spool
    )
    os.chown(incoming, NOBODY, NOBODY)
    incoming.chmod(0o2770)
    (incoming / "roots.jsonl").touch(mode=0o600)
    assert f"as root: chmod g+r {incoming}/roots.jsonl" in doctor_says(place, doctor_folders.spool)
    (incoming / "own.jsonl").touch(mode=0)
    os.chown(incoming / "own.jsonl", NOBODY, NOBODY)
    (incoming / "roots.jsonl").unlink()
    assert f"fix='chmod g+r {incoming}/own.jsonl'" in doctor_says(place, doctor_folders.spool), "its own"


def test_the_doctor_does_not_guess_what_another_user_may_do(place):
    """Units are installed, and a person asks who is neither root nor the service's user."""
    config = Config(state_dir=place / "state", socket=place / "arena.sock")
    (place / "state").mkdir(mode=0o777)
    service = pwd.struct_passwd(("hogwild", "x", NOBODY - 1, NOBODY, "", "/", ""))
    subject = doctor.Subject(config, service, quick=True)
    said = unprivileged(lambda: doctor.look(doctor_folders.state_folder, subject))
    assert "level='warn'" in said
    assert f"{place}/state: what user hogwild may do there, only root can say" in said
    assert "fix='sudo hogwild doctor'" in said


def test_who_may_not_see_the_daemon_is_told_who_may(place):
    os.close(state_lock.take(place))
    (place / state_lock.NAME).chmod(0o000)
    assert unprivileged(lambda: state_lock.holder(place)).endswith(
        "Permission denied: run it as the owner of that, or as root"
    )
    config = Config(state_dir=place, socket=place / "arena.sock")
    subject = doctor.Subject(config, pwd.getpwuid(NOBODY), quick=True)
    said = unprivileged(lambda: doctor.look(doctor_service.arena_socket, subject))
    assert f"could not be looked at: {place / state_lock.NAME} cannot be read" in said
    assert "fix='sudo hogwild doctor'" in said


@pytest.mark.skipif(os.getuid() != 0, reason="about what root asks for")
def test_root_may_have_a_report_of_another_users_daemon_where_only_root_may_write(place):
    state = place / "state"
    config, out = place / "hogwild.toml", place / "roots" / "report.html"
    config.write_text(f'state_dir = "{state}"\n')
    out.parent.mkdir(mode=0o700)
    assert "nothing was learned yet" in as_root(lambda: cli_watch.report(config, out))
    assert not out.exists()
    unprivileged(lambda: Ledger(state / "ledger.sqlite").close())
    out.write_text("an older one, which is longer" * 10_000)
    assert as_root(lambda: cli_watch.report(config, out)) == "None"
    text = out.read_text()
    assert text.startswith("<!doctype html>")
    assert text.endswith("</html>\n")
    assert {path.stat().st_uid for path in state.iterdir()} == {NOBODY}


def as_root(work: Callable[[], object]) -> str:
    """As `unprivileged`, with root's rights to give up."""
    return unprivileged(work, uid=0)


def test_what_the_units_load_and_only_root_may_read_is_said_to_be_missing(place, monkeypatch):
    """It holds keys. Without it, what they run with is something else."""
    monkeypatch.setattr(config, "SYSTEM_FILE", place / "hogwild.toml")
    (place / "hogwild.toml").write_text("")
    (beside := place / "environment").write_text("HOGWILD_TRAINING__THREADS=7\n")
    beside.chmod(0)
    for arguments, roots, said in (
        (["config"], f"{beside}: $HOGWILD_TRAINING__THREADS", f"what {beside} sets is missing here"),
        (["config", "training.threads"], "7\n", "2\n"),
        (["doctor", "--quick"], "sets HOGWILD_TRAINING__THREADS", f"environment: {beside} cannot be read"),
    ):
        asked = [*arguments, "-c", str(place / "hogwild.toml")]
        if os.getuid() == 0:  # first: what is imported late may lie where only root can read
            assert roots in CliRunner().invoke(app, asked).output
        assert said in unprivileged(lambda asked=asked: CliRunner().invoke(app, asked).output)


def test_a_user_without_a_home_is_told_what_to_set(place, monkeypatch):
    """As in a container that runs as a number."""
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "STATE_DIRECTORY", "HOGWILD_STATE_DIR"):
        monkeypatch.delenv(name, raising=False)
    unknown = 2**31 - 7
    CliRunner().invoke(app, ["config", "state_dir"])  # what is imported late may lie where only root can read
    said = unprivileged(lambda: CliRunner().invoke(app, ["config", "state_dir"]).exception, unknown)
    assert f"user {unknown} has no home folder: set state_dir, or $HOME" in said
    monkeypatch.setenv("HOGWILD_STATE_DIR", str(place))
    said = unprivileged(lambda: CliRunner().invoke(app, ["config", "state_dir"]).output, unknown)
    assert said == f"{place}\n"
    monkeypatch.delenv("HOGWILD_STATE_DIR")
    monkeypatch.setenv("HOME", "somewhere")
    assert config.load().state_dir == Path("somewhere/.local/state/hogwild").absolute()
