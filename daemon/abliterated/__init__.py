"""The daemon, and the pipeline for Python: `from abliterated import measure, edit, evaluate`.

Importing it imports neither torch nor transformers: the names below are read when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from abliterate import __version__ as __version__

if TYPE_CHECKING:
    from abliterated.library import Edited as Edited
    from abliterated.library import edit as edit
    from abliterated.library import evaluate as evaluate
    from abliterated.library import measure as measure
    from abliterated.library import run_recipe as run_recipe
    from abliterated.library import save_direction as save_direction
    from abliterated.library import talk as talk

_LIBRARY = ("Edited", "edit", "evaluate", "measure", "run_recipe", "save_direction", "talk")


def __getattr__(name: str) -> object:
    if name in _LIBRARY:
        from abliterated import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_LIBRARY]
