"""Defines the errors of the reader of compiler dumps."""

from splash_workbench.errors import UserError


class UnknownDumpFormatError(RuntimeError):
    """The dump is not in the form that this version of the reader knows; see `offline_tpu.SUPPORTED_LIBTPU`."""


class UnsupportedVersionError(UserError, RuntimeError):
    """The dumps of the libtpu, or the jaxlib, that is installed are not known."""
