"""What a service user is told when it may not do something. With real users: root may do anything."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hogwild.errors import HogwildError
from hogwild.ledger import Ledger
from hogwild.settings import SpoolConfig
from hogwild.spool import Spool

NOBODY = 65534


def unprivileged(work: Callable[[], object], uid: int = NOBODY) -> str:
    """Runs `work` in a forked child without root's rights and returns what it returned or raised, as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
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
