"""The errors a user can cause: one small tree, each message says what is wrong, where, and what would be right."""

from __future__ import annotations


class ForetokenError(Exception):
    """A mistake that its reader can mend. The command line prints it as one line and exits with code 2."""


class ConfigError(ForetokenError):
    """A recipe, an option or a combination of them that cannot be right."""


class DataError(ForetokenError):
    """A source that cannot be read, or that holds too little text."""


class CheckpointError(ForetokenError):
    """A checkpoint directory that is missing, incomplete, tampered with, or of another model."""


class TrainingError(ForetokenError):
    """Training that cannot go on, such as a loss that is not a number."""
