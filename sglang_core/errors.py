"""Errors that a caller can act on. Every message gives the value met, what is allowed and the way out."""


class SglangError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(SglangError):
    """A setting, flag or config file is wrong."""


class PluginError(SglangError):
    """A plugin cannot be found, loaded or used; names the plugin and what to do."""


class DeviceError(SglangError):
    """No device answers to the name asked for."""


class KernelSelectionError(SglangError):
    """No kernel may run an op here, or two claim it equally. `why` is the reason alone, where that is shorter."""

    def __init__(self, message: str, *, why: str = "") -> None:
        super().__init__(message)
        self.why = why or message


class WeightError(SglangError):
    """A checkpoint is missing, misshapen, of an unknown architecture or in a refused format."""


class RequestError(SglangError):
    """One request is invalid. `param` names the offending field, `code` is OpenAI's error code."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class QueueFullError(RequestError):
    """The waiting queue is full; the client may retry after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message, code="queue_full", status=429)
        self.retry_after = retry_after


class EngineDeadError(SglangError):
    """The engine process ended or hung; running requests cannot be answered."""
