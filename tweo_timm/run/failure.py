"""What ends a command with one line and is no wrong setting: an image that cannot be read, a training that broke."""


class Failure(RuntimeError):  # noqa: N818 - what happened, in the words of the message
    """A command cannot go on, and its settings are not to blame; the message is shown as it is."""
