"""Errors that a user can act on. The message names what was got, what is expected and the way out."""


class UserError(ValueError):
    """Base of the errors below; the command line prints their message without a traceback."""


class ConfigError(UserError):
    """A config key or value is wrong."""


class DataError(UserError):
    """The corpus, or its cache of tokenizer and token files, cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another config, or cannot be written."""


class OutputError(UserError):
    """The run folder cannot be written."""


class TrainingError(UserError):
    """Training itself went wrong, such as a loss that is not finite."""
