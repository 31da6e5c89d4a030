"""The numerics of hogwild: APOLLO updates that store no gradient. Imports nothing from `hogwild`."""
