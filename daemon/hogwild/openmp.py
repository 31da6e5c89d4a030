"""How the threads inside one CPU operator wait for each other. Imports no torch: its OpenMP reads this as it loads."""

from collections.abc import Mapping, MutableMapping

PASSIVE: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""Asleep. By default they spin, which beside another busy process takes the processor from the one that they wait for:
measured 10 times slower on two cores, in the server and in the daemon alike."""


def sleep_when_idle(environment: MutableMapping[str, str]) -> None:
    """To be called before torch is imported. What the operator has set himself stays."""
    for name, value in PASSIVE.items():
        environment.setdefault(name, value)
