"""The errors that a person can act on; the programs print them without a traceback."""


class ConfigError(ValueError):
    """An option, a flag or an input that does not exist, has the wrong type or does not fit."""


class CheckpointError(Exception):
    """A checkpoint that cannot be read, or could not be written."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint of which files are missing, cut off or unreadable."""


class DivergedError(Exception):
    """Training was stopped after too many consecutive skipped steps."""


def brief(error: Exception, most: int = 200) -> str:
    """The beginning of another library's message, on one line."""
    return " ".join(str(error).split())[:most]
