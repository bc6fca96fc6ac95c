"""What holds programs, and is made again of the same parts where these cannot go."""

from __future__ import annotations

from typing import Any, Self


class Made:
    """Remembers what it was made of.

    Programs stay in the process that captured them. What holds some is carried to another process
    as its class and its arguments, of which it is made again there.

    Attributes:
        made_of: Its arguments, and its keyword arguments.

    Example:
        >>> class Doubled(Made):
        ...     def __init__(self, number):
        ...         self.program = lambda: 2 * number
        >>> args, kwargs = Doubled(4).made_of
        >>> Doubled(*args, **kwargs).program()
        8
    """

    made_of: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        made.made_of = args, kwargs
        return made
