"""What can be wrong with a checkpoint, own or foreign."""


class CheckpointError(Exception):
    """A checkpoint that cannot be read, or could not be written."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint of which files are missing, cut off or unreadable."""


def brief(error: Exception, most: int = 200) -> str:
    """The beginning of another library's message, on one line."""
    return " ".join(str(error).split())[:most]
