"""What Prometheus is told: names, address, and the dashboard that draws it."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client import generate_latest

from hogwild import metrics
from hogwild.spool_files import look_into
from hogwild.status import Status, Troubles
from studio import Studio, model
from support import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
DASHBOARD = json.loads((REPOSITORY / "config" / "grafana.json").read_text())


def exported() -> set[str]:
    """Every name that a scrape may hold."""
    names = set()
    for family in metrics.REGISTRY.collect():
        names.add(family.name)
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(
            family.type, ("",)
        )
        names |= {family.name + suffix for suffix in suffixes}
    return names


def queries() -> list[str]:
    of_panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return of_panels + [one["expr"] for one in DASHBOARD["annotations"]["list"]]


def test_every_query_of_the_dashboard_asks_for_something_that_is_exported():
    asked = {name for query in queries() for name in re.findall(r"\bhogwild_\w+", query)}
    assert len(asked) > 25
    assert asked <= exported(), asked - exported()


def test_the_dashboard_shows_every_metric():
    """All but the ones that Prometheus itself makes use of."""
    shown = " ".join(queries())
    kept = {
        "hogwild_build_info",
        "hogwild_start_time_seconds",
        "hogwild_accepted_files",
        "hogwild_rejected_lines",
    }
    families = {family.name for family in metrics.REGISTRY.collect()} - kept
    assert not {name for name in families if name not in shown}


def test_names_have_the_prefix_and_base_units():
    for family in metrics.REGISTRY.collect():
        assert family.name.startswith("hogwild_"), family.name
        assert family.documentation.endswith("."), family.name
        assert not re.search(r"_(ms|milliseconds|minutes|mib|mb|kb|percent)(_|$)", family.name), family.name


@pytest.mark.promtool
def test_promtool_has_nothing_to_complain_of():
    """`promtool check metrics`, on a scrape in which every labelled metric has a value."""
    metrics.probe_loss.labels(probes="own").set(1)
    metrics.probe_right.labels(probes="own").set(1)
    for counter, label in ((metrics.tokens, "new"), (metrics.passes, "new"), (metrics.strikes, "loss")):
        counter.labels(label).inc()
    metrics.rollbacks.labels(by="person").inc()
    ran = subprocess.run(
        [str(shutil.which("promtool")), "check", "metrics"],
        input=generate_latest(metrics.REGISTRY),
        capture_output=True,
        check=False,
    )
    said = (ran.stdout + ran.stderr).decode()
    assert ran.returncode == 0, said
    assert not said.strip()


def test_it_answers_on_this_machine_alone_and_stops_with_the_daemon():
    port = free_port()
    with metrics.serving(port):
        answer = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
        assert answer.status_code == 200
        assert "hogwild_guard_trips_total" in answer.text
        listening = [
            line.split()[1]
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
            if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port
        ]
        assert listening == [f"0100007F:{port:04X}"], "127.0.0.1, and nothing else"
        with metrics.serving(port):  # taken: said, and no reason not to learn
            pass
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
    with metrics.serving(0):
        pass


def test_the_loss_is_a_moving_mean():
    metrics.loss.set(0)
    metrics.observe_loss(2.0)
    metrics.observe_loss(3.0)
    assert 2.0 < metrics.loss._value.get() < 2.1


def test_the_spools_age_is_that_of_its_oldest_file(tmp_path):
    assert look_into(tmp_path / "missing") == (0, 0.0, [])
    (tmp_path / ".hidden").touch()
    (tmp_path / "a.jsonl").touch()
    count, age, ignored = look_into(tmp_path)
    assert count == 1
    assert 0 <= age < 60
    assert not ignored


def test_an_old_file_that_is_moved_in_has_just_come(tmp_path):
    """So that a status written in that second does not say that a file has been waiting for a year."""
    (old := tmp_path / "last year.jsonl").touch()
    os.utime(old, (1, 1))
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    old.rename(incoming / old.name)
    assert 0 <= look_into(incoming).oldest_s < 3600


def test_what_the_spool_never_takes_does_not_wait_and_is_named(tmp_path):
    """Neither in the metrics nor in the status; a symlink, a folder, another name."""
    model(tmp_path / "model")
    studio = Studio(tmp_path, replay__self_texts=0, probes__own=0)
    incoming = studio.config.spool.dir / "incoming"
    incoming.mkdir(parents=True)
    (tmp_path / "elsewhere.jsonl").touch()
    (incoming / "link.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    (incoming / "folder.jsonl").mkdir()
    (incoming / "facts.json").touch()
    (incoming / "upload.jsonl.tmp").touch()
    for name in ("facts.json", "upload.jsonl.tmp"):
        os.utime(incoming / name, (0, 0))
    status = Status(studio.config, studio.ledger)
    asked = {
        name: metrics.REGISTRY.get_sample_value(name)
        for name in ("hogwild_spool_files", "hogwild_spool_age_seconds")
    }
    assert asked == {"hogwild_spool_files": 0, "hogwild_spool_age_seconds": 0}
    said = status.of(studio.learner, {}, 0, Troubles())
    assert said["spool"] == {
        "files": 0,
        "oldest_s": 0.0,
        "ignored": ["facts.json", "folder.jsonl", "link.jsonl"],
    }
    (warning,) = (one for one in said["warnings"] if "incoming/" in one)
    assert warning.startswith(
        "facts.json and 2 more in incoming/ is not taken: give a plain file named *.jsonl"
    )
    (incoming / "good.jsonl").touch()
    assert metrics.REGISTRY.get_sample_value("hogwild_spool_files") == 1
    studio.close()


def test_a_clock_that_is_set_back_shortens_no_uptime(tmp_path, monkeypatch):
    """Neither with a server nor before one has come."""
    model(tmp_path / "model")
    studio = Studio(tmp_path, replay__self_texts=0, probes__own=0)
    status = Status(studio.config, studio.ledger)
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now - 3600)
    status.write_waiting("a server", Troubles())
    assert json.loads((studio.config.state_dir / "status.json").read_text())["uptime_s"] >= 0
    assert status.of(studio.learner, {}, 0, Troubles())["uptime_s"] >= 0
    studio.close()
