"""lipfast: weight-sparse image priors (lottery tickets), found, stored and run fast."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> (module, attribute; None for the module itself). Loaded when first used, so `import lipfast` is cheap.
_PUBLIC: dict[str, tuple[str, str | None]] = {
    "ops": ("lipfast.ops", None),
}

__all__ = ["__version__", "ops"]

if TYPE_CHECKING:
    from lipfast import ops as ops


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lipfast' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _PUBLIC[name]
    loaded = importlib.import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
