"""Errors and warnings. An error is raised before anything is changed."""


class RopeError(ValueError):
    """A request that cannot be served; the message names the value and what to do."""


class UnknownMethodError(RopeError):
    """Unknown method name."""


class MethodParameterError(RopeError):
    """A knob of a method is missing, unknown or out of range."""


class UnsupportedModelError(RopeError):
    """The model has no rotary embedding that this package can extend."""


class AlreadyScaledError(RopeError):
    """The model is already patched, or its config already scales its RoPE."""


class NotPatchedError(RopeError):
    """There is no patch to undo."""


class ProbeError(RopeError):
    """The patch had no effect on the attention, and has been undone."""


class ExportError(RopeError):
    """The target cannot express the method exactly."""


class RopeWarning(UserWarning):
    """The request was served, but the result is probably not what was intended."""
