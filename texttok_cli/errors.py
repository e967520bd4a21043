"""What can go wrong through a person's input or machine, as one tree.

    TextTokError          one clear line: what, where, what to do
    |- UsageError         a command that asks for what can't be: options that exclude each other, a name that there is not
    |- RecipeError        a recipe or an override: unknown key, impossible value
    |- DataError          an image, caption file, manifest or shard
    |- CheckpointError    a model file or a training state
    |- TokenFileError     a token file
    |- TrainingError      a run that diverged
    |- BackendError       weights or a library that is not there, or a device that can't

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
