"""``python -m lipfast.bench``: what ``lipfast bench`` starts in a child process."""

from lipfast.bench.cli import app

app(prog_name="lipfast bench")
