"""``python -m lipfast``: the same as the command ``lipfast``."""

from lipfast.cli import main

main()
