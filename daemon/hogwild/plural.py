"""Numbers with their words, as people read them."""


def counted(number: int, one: str, many: str = "") -> str:
    """1, "line" -> "1 line"; 2, "line" -> "2 lines"; with `many`, what follows any number but 1: 2, "is", "are"."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"
