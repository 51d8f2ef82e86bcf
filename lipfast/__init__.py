"""lipfast: weight-sparse image priors (lottery tickets), found, stored and run fast."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> (module, attribute; None for the module itself). Loaded when first used, so `import lipfast` is cheap.
_PUBLIC: dict[str, tuple[str, str | None]] = {
    "SparseWeight": ("lipfast.ops", "SparseWeight"),
    "Ticket": ("lipfast.tickets", "Ticket"),
    "find_tickets": ("lipfast.search", "find_tickets"),
    "accelerate": ("lipfast.engine.lane_module", "accelerate"),
    **{
        name: (f"lipfast.{name}", None)
        for name in ("errors", "fit", "images", "masks", "ops", "priors", "restore", "search", "tasks", "tickets")
    },
}

__all__ = [
    "SparseWeight",
    "Ticket",
    "__version__",
    "accelerate",
    "errors",
    "find_tickets",
    "fit",
    "images",
    "masks",
    "ops",
    "priors",
    "restore",
    "search",
    "tasks",
    "tickets",
]

if TYPE_CHECKING:
    from lipfast import errors as errors
    from lipfast import fit as fit
    from lipfast import images as images
    from lipfast import masks as masks
    from lipfast import ops as ops
    from lipfast import priors as priors
    from lipfast import restore as restore
    from lipfast import search as search
    from lipfast import tasks as tasks
    from lipfast import tickets as tickets
    from lipfast.engine.lane_module import accelerate as accelerate
    from lipfast.ops import SparseWeight as SparseWeight
    from lipfast.search import find_tickets as find_tickets
    from lipfast.tickets import Ticket as Ticket


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lipfast' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _PUBLIC[name]
    loaded = importlib.import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
