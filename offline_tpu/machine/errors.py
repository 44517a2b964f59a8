"""Defines the error of the reader of compiler dumps."""


class UnknownDumpFormatError(RuntimeError):
    """The dump is not in the form that this version of the reader knows; see `offline_tpu.SUPPORTED_LIBTPU`."""
