"""What the emulator raises."""


class EmulatorError(RuntimeError):
    """A kernel did something wrong; the message says what, in which block and thread, and on which line."""


class BuildError(EmulatorError):
    """A kernel did not compile; the message is the compiler's."""
