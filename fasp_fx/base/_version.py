"""The version, apart from what is imported with the package."""

__version__ = "0.1.0"
