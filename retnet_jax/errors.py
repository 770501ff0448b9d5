"""Errors that the user can fix; the programs print them without a traceback."""


class ConfigError(ValueError):
    """An option, a flag or an input does not exist, has the wrong type or does not fit."""


class CheckpointError(Exception):
    """A checkpoint cannot be read or written."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint are missing, cut off or unreadable."""


class DivergedError(Exception):
    """Training was stopped after too many consecutive skipped steps."""


def brief(error: BaseException, most: int = 200) -> str:
    """The first `most` characters of another library's message, on one line."""
    return " ".join(str(error).split())[:most]
