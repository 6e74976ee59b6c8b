"""What is raised when something cannot be done exactly. Nothing is changed before an error."""


class RopeError(ValueError):
    """A request that cannot be served; the message says which value, and what to do."""


class UnknownMethodError(RopeError):
    """The method's name is not known."""


class MethodParameterError(RopeError):
    """A knob of a method is missing, unknown or out of range."""


class UnsupportedModelError(RopeError):
    """The model has no rotary embedding this package can serve."""


class AlreadyScaledError(RopeError):
    """The model is patched, or its own config already scales its RoPE."""


class NotPatchedError(RopeError):
    """There is no patch to undo."""


class ProbeError(RopeError):
    """The patch went in, but the attention does not see it; the patch has been undone."""


class ExportError(RopeError):
    """The target has no exact form for this method."""


class RopeWarning(UserWarning):
    """The request was served; something about it is likely not what was wanted."""
