"""The two ways a run ends early: the user's input was wrong, or training went wrong."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the file, row or flag and says what was expected.
    The command line prints it and exits with code 2; nothing has been written.
    """


class TrainingError(RuntimeError):
    """Training cannot go on (a non-finite loss, say).

    The message names the step and the last good checkpoint. The command line exits with code 1.
    """
