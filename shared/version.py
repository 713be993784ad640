"""The version of wandistill; pyproject.toml reads it here."""

VERSION = "0.1.0"
