"""lipfast: weight-sparse image priors (lottery tickets), found, stored and run fast."""

__version__ = "0.1.0"
