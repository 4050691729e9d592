"""What the emulator raises."""


class Finding(Exception):
    """The kernel does what it must not, or may go wrong on a GPU: the message says what, where, and of which kernel and program."""


class NotEmulatedError(Exception):
    """An instruction, or a form of one, that the emulator does not know; the message names it."""
