"""What can be wrong with a checkpoint, own or foreign."""


class CheckpointError(Exception):
    """A checkpoint that cannot be read, or could not be written."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint of which files are missing, cut off or unreadable."""
