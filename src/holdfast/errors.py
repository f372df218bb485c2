"""The ways a run ends early: the user's input was wrong, training went wrong, or it was asked to stop."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the file, row or flag and says what was expected.
    The command line prints it and exits with code 2; nothing has been written.
    """


class TrainingError(RuntimeError):
    """Training cannot go on (a non-finite loss, say).

    The message names the step and the last good checkpoint. The command line exits with code 1.
    """


class Stopped(SystemExit):
    """Training was asked to stop, and a checkpoint to go on from is written where a run has one.

    A `SystemExit`, since whoever asked wants the process to end: no `except Exception` holds it up, and a script that
    does not catch it ends with the message and status 1, for its work is not done. The command line exits with code 0.

    Attributes:
        checkpoint: The checkpoint's folder; None of an attacker's job, which has nothing to go on from.
    """

    def __init__(self, message: str, checkpoint: str | None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint
