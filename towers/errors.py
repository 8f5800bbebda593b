"""The exceptions that a user of TwoTower may see.

TwoTowerError
├── InvalidRequestError      a field of a request is out of its limits
├── CheckpointError          a checkpoint on disk cannot be served as it is
│   └── ConfigError          its config.json has a key or value we do not compute
├── NumericalError           a row's logits are not finite; nothing of it is committed
├── DeviceError              a device does not compute what it should
├── CapacityError            no room for the row now; trying again later may work
│   └── QueueFullError       too many rows wait for room already
└── UnavailableError         a tower, link or replica that the row needs is gone
"""

from __future__ import annotations

_MOST_BITS = 4096


class TwoTowerError(Exception):
    """Base of all errors for users of TwoTower. The text is safe to show to a client."""


class InvalidRequestError(TwoTowerError, ValueError):
    """A field of a request has a value outside its limit."""

    def __init__(self, field: str, value: object, limit: str) -> None:
        self.field = field
        self.value = value
        self.limit = limit
        super().__init__(f"{field}: got {shorten(value)}, expected {limit}")

    def __reduce__(self) -> tuple[type[InvalidRequestError], tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.limit)


class CheckpointError(TwoTowerError):
    """A checkpoint has a missing, extra, wrongly shaped or unreadable tensor or file."""


class ConfigError(CheckpointError):
    """A config.json key is missing, unknown or has a value that this code does not compute."""


class NumericalError(TwoTowerError):
    """A row produced non-finite logits."""


class DeviceError(TwoTowerError):
    """A device has failed its self-test: what it computes is not to be served."""


class CapacityError(TwoTowerError):
    """No slot or page is free for a row, or its queue is full."""


class QueueFullError(CapacityError):
    """The queue of rows that wait for room is as long as it may be."""


class UnavailableError(TwoTowerError):
    """A tower, its link or its replica is gone or does not answer."""


def cut_off(text: str, limit: int) -> str:
    """`text`, cut to at most `limit` characters with an ellipsis at its end."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def shorten(value: object, limit: int = 80) -> str:
    """`repr` of a value, cut to `limit` characters, for the text of an error."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        # Python refuses to print a number of more than 4,300 digits.
        return f"a whole number of {value.bit_length()} bits"
    # Without a repr of megabytes of text, of which little is shown.
    return cut_off(repr(value[:limit] if isinstance(value, str) else value), limit)
