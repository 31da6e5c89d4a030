"""`hogwild report`: one self-contained HTML page about what was learned and what it did. Imports no torch.

Reads the ledger and the generations' state.json; needs no daemon. Nothing on the page comes from anywhere else, and
whatever a file or a line was called is escaped.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from hogwild import __version__, svg
from hogwild import generation as generations
from hogwild.errors import HogwildError
from hogwild.ledger import Ledger
from hogwild.ledger_report import losses_by_file, losses_over_steps, range_of_training
from hogwild.settings import Config
from hogwild.svg import Line, Mark

_FILES, _GENERATIONS, _LAYERS, _TRIPS = 30, 200, 64, 50
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111827; margin: 2em auto; max-width: 820px; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .4em; border-bottom: 1px solid #e5e7eb; }
p { margin: .4em 0; } .none, .about { color: #6b7280; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: left; padding: .15em .9em .15em 0; vertical-align: top; }
.cards { display: flex; flex-wrap: wrap; gap: .8em; }
.card { border: 1px solid #e5e7eb; border-radius: 8px; padding: .5em .9em; }
.card b { display: block; font-size: 1.25em; }
"""


def page(config: Config) -> str:
    """The page.

    Raises:
        HogwildError: nothing was learned yet, or the ledger cannot be read.
    """
    path = config.state_dir / "ledger.sqlite"
    if not path.exists():
        raise HogwildError(f"nothing was learned yet in {config.state_dir}")
    states = _states(config)
    with Ledger(path, readonly=True) as ledger:
        sections = [
            _summary(ledger, states),
            _section(
                "Loss before and after, by file",
                "Mean loss of a file's examples before their first pass and after their last, nats a token.",
                _files(ledger),
            ),
            _section(
                "Loss over time",
                "Of new and of replayed examples before the update, nats a token, means of neighbouring steps.",
                _losses(ledger),
            ),
            _section(
                "Probes",
                "Mean loss of what the model must go on knowing, nats a token. Red: a guard went back.",
                _probes(ledger),
            ),
            _section(
                "Update size by layer",
                "Sum of the norms of a layer's updates between two generations, of the newest three.",
                _layers(states),
            ),
            _section(
                "Serving while training",
                "Mean time between two tokens of an answer, and trained tokens a second.",
                _serving(ledger),
            ),
            _section("What guards did", "The newest first.", _trips(ledger)),
            _section("Generations", "The newest first.", _generations(states)),
        ]
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>hogwild report</title>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style></head><body><h1>hogwild report</h1>"
        f'<p class="about">{escape(str(config.state_dir))}, {made}, version {escape(__version__)}</p>'
        f"{''.join(sections)}</body></html>\n"
    )


def _section(title: str, about: str, body: str) -> str:
    return f'<h2>{escape(title)}</h2><p class="about">{escape(about)}</p>{body}'


def _summary(ledger: Ledger, states: Sequence[dict[str, Any]]) -> str:
    counts, trips = ledger.counts(), ledger.guards.trips()
    first, last, steps, tokens = range_of_training(ledger)
    cards = {
        "examples learned": counts.trained + counts.durable,
        "waiting": counts.pending,
        "in quarantine": counts.quarantined,
        "bad lines": counts.failed + counts.rejected,
        "passes": counts.passes,
        "training steps": steps,
        "trained tokens": tokens,
        "generations": len(states),
        "guard trips": sum(trips.values()),
    }
    shown = "".join(
        f'<div class="card"><b>{value:,}</b>{escape(name)}</div>' for name, value in cards.items()
    )
    when = (
        f'<p class="about">trained from {escape(first[:19])} to {escape(last[:19])} UTC</p>' if first else ""
    )
    return f'<div class="cards">{shown}</div>{when}'


def _files(ledger: Ledger) -> str:
    rows = losses_by_file(ledger, _FILES)
    return svg.bars([(name, (before, after)) for name, _, before, after in rows], names=("before", "after"))


def _losses(ledger: Ledger) -> str:
    found = losses_over_steps(ledger)
    return svg.lines(
        [Line(name, points) for name, points in found.items()], x="training step", y="nats", zero=True
    )


def _probes(ledger: Ledger) -> str:
    series = ledger.guards.series("probes.")
    marks = [
        Mark(float(str(trip["step"])), f"back to {trip['generation']}")
        for trip in ledger.guards.newest_trips(_TRIPS)
        if trip["guard"] == "probes"
    ]
    curves = [
        Line(name.removeprefix("probes."), [(float(step), value) for _, step, value in points])
        for name, points in series.items()
    ]
    return svg.lines(curves, x="training step", y="nats", marks=marks)


def _layers(states: Sequence[dict[str, Any]]) -> str:
    moved = [state for state in states if state.get("moved")][-3:]
    layers: list[str] = []
    for state in moved:
        layers += [name for name in state["moved"] if name not in layers]
    ordered = sorted(layers, key=_natural)[:_LAYERS]
    rows = [(name, [state["moved"].get(name) for state in moved]) for name in ordered]
    return svg.bars(rows, names=[f"generation {state['generation']}" for state in moved])


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _serving(ledger: Ledger) -> str:
    latency = ledger.guards.series("serving.token_latency_s").get("serving.token_latency_s", [])
    tokens = ledger.guards.series("training.tokens_per_s").get("training.tokens_per_s", [])
    if not latency and not tokens:
        return '<p class="none">nothing yet: measured once a minute while a server is attached</p>'
    start = min(_seconds(points[0][0]) for points in (latency, tokens) if points)

    def minutes(
        points: Sequence[tuple[str, int, float | None]], factor: float
    ) -> list[tuple[float, float | None]]:
        return [((_seconds(at) - start) / 60, None if v is None else v * factor) for at, _, v in points]

    return svg.lines(
        [Line("ms between tokens", minutes(latency, 1000))], x="minutes", y="ms", zero=True
    ) + svg.lines([Line("trained tokens/s", minutes(tokens, 1))], x="minutes", y="tokens/s", zero=True)


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at.replace("Z", "+00:00")).timestamp()


def _trips(ledger: Ledger) -> str:
    rows = [
        [
            str(trip["at"])[:19],
            str(trip["guard"]),
            str(trip["step"]),
            "" if trip["generation"] is None else str(trip["generation"]),
            str(trip["set_aside"]),
            _measured(trip["about"]),
        ]
        for trip in ledger.guards.newest_trips(_TRIPS)
    ]
    trips = _table(("at", "guard", "step", "went back to", "set aside", "measured"), rows)
    suspects = [
        [one.file, str(one.line_no), one.name or "", one.guard, one.reason]
        for one in ledger.guards.suspects(_TRIPS)
    ]
    return trips + (
        "<h3>In quarantine</h3>" + _table(("file", "line", "id", "guard", "why"), suspects)
        if suspects
        else ""
    )


def _measured(about: Any) -> str:
    """What a guard measured, in words; of the probes: from what to what."""
    if not isinstance(about, dict):
        return str(about)
    return ", ".join(
        f"{name} {value['was']} to {value['is']} ({value['margin']} allowed)"
        if isinstance(value, dict) and {"was", "is", "margin"} <= value.keys()
        else f"{name}: {value}"
        for name, value in about.items()
    )


def _generations(states: Sequence[dict[str, Any]]) -> str:
    rows = []
    for state in reversed(states):
        trained = state.get("trained") or {}
        losses = [trained.get(key) for key in ("loss_before", "loss_after")]
        rows.append(
            [
                str(state["generation"]),
                str(state.get("parent")),
                str(state.get("saved_at", ""))[:19],
                str(state["step"]),
                str(trained.get("examples", "")),
                " to ".join(f"{loss:.2f}" for loss in losses if loss is not None),
                ", ".join(f"{name} {loss:.3f}" for name, loss in (state.get("probes") or {}).items()),
            ]
        )
    return _table(("generation", "after", "saved at", "step", "examples", "loss", "probes"), rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return '<p class="none">nothing yet</p>'
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _states(config: Config) -> list[dict[str, Any]]:
    """state.json of the newest generations, oldest first; what cannot be read is left out."""
    from hogwild.history_nodes import load

    nodes, _ = load(config.state_dir / "history", generations.numbered(config.state_dir / "checkpoints"))
    return [nodes[number].state for number in sorted(nodes) if number][-_GENERATIONS:]
