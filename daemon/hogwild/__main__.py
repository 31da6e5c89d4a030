"""`python -m hogwild`: the same as the `hogwild` command."""

from hogwild.cli import main

main()
