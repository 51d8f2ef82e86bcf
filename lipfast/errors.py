"""What lipfast raises. Each message is one line: where, what was expected, what came, the way out."""


class LipfastError(Exception):
    """Base of everything lipfast raises on purpose."""


class InputError(LipfastError, ValueError):
    """An argument, image or file is not what the function asks for."""


class ConfigError(LipfastError, ValueError):
    """A setting is out of its range, or settings contradict each other."""


class BackendError(LipfastError, RuntimeError):
    """The implementation that was asked for cannot run here."""


class FitError(LipfastError, ArithmeticError):
    """A fit diverged: its loss is no longer a finite number."""


class TicketError(InputError):
    """A ticket file is damaged, foreign, or belongs to another network."""
