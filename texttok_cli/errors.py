"""What can go wrong through a person's input or machine.

The command line prints the message and exits with 2 for a UsageError, else with 1; a bug of ours raises something else and
keeps its traceback.
"""


class TextTokError(Exception):
    """Base of every error a person can mend. The message names what, where and what to do."""


class UsageError(TextTokError):
    """What was asked for does not go together, or names what there is not; whatever the files hold."""


class RecipeError(TextTokError):
    """A recipe or override that can't be used."""


class DataError(TextTokError):
    """An input image, caption, manifest or shard that can't be used."""


class CheckpointError(TextTokError):
    """A model file or training state that can't be used."""


class TokenFileError(TextTokError):
    """A token file that can't be used."""


class TrainingError(TextTokError):
    """A training run that can't go on as it is."""


class BackendError(TextTokError):
    """Weights, a library or a device that is not available."""
