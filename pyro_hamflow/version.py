"""The package's version, a module of its own that results can name."""

__version__ = "0.1.0"
