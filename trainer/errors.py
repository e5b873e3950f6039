"""The one error that users are meant to see, and the exit status that goes with it."""

EXIT_USAGE = 2


class UserError(ValueError):
    """Something in the config, the data or the surroundings that its owner can mend.

    Shown as one line without a traceback. Any other exception, other ValueErrors included, is ours.
    """
