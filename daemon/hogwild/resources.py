"""Files that come with the package: the contents of the repository's config/ and systemd/ folders."""

from pathlib import Path

from hogwild.errors import HogwildError

_HERE = Path(__file__).resolve().parent


def folder(name: str, kind: str = "config") -> Path:
    """The folder `kind`/`name`: inside the installed package, or in the checkout.

    Raises:
        HogwildError: it is in neither; the installation is damaged.
    """
    return _find(kind, name)


def resource(name: str, kind: str = "config") -> Path:
    """The file `kind`/`name`, as `folder`.

    Raises:
        HogwildError: it is in neither; the installation is damaged.
    """
    return _find(kind, name)


def _find(kind: str, name: str) -> Path:
    for root in (_HERE / f"_{kind}", _HERE.parents[1] / kind):
        if (root / name).exists():
            return root / name
    raise HogwildError(f"{kind}/{name} did not come with this installation of hogwild: install it again")
