"""Files that come with the package: the contents of the repository's config/ folder."""

from pathlib import Path

from hogwild.errors import HogwildError

_HERE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """Where config/`name` is: inside the installed package, or in the checkout.

    Raises:
        HogwildError: it is in neither; the installation is damaged.
    """
    for root in (_HERE / "_config", _HERE.parents[1] / "config"):
        if (root / name).is_file():
            return root / name
    raise HogwildError(f"config/{name} did not come with this installation of hogwild: install it again")
