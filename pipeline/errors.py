"""The one error tree. Each class is also a built-in, so that callers may catch either.

A message says what was asked, what was found and what to do, in units, on one line.
"""

import errno

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class PipelineError(Exception):
    """Base of every error that terravox raises on purpose."""


class RegionError(PipelineError, ValueError):
    """A box, grid or halo that cannot be."""


class PlanError(PipelineError, ValueError):
    """A plan that cannot be made, or does not fit the run directory it meets."""


class BundleError(PipelineError, ValueError):
    """A model bundle that is missing, malformed, or fails its checksum."""


class SourceError(PipelineError, ValueError):
    """A source that cannot be used with this request: missing, wrong bands, wrong spacing."""


class SourceReadError(PipelineError, OSError):
    """A region of a source that could not be read or decoded."""


class StoreError(PipelineError, OSError):
    """A mask, score or ledger store that could not be written or read back."""


class LeaseHeldError(PipelineError, RuntimeError):
    """Another live run owns the run directory, or this one lost it."""


class CrfError(PipelineError, ValueError):
    """CRF parameters or an extent that the CRF engine cannot honour."""


class ExecutionError(PipelineError, RuntimeError):
    """The worker pool could not be started, proved wrong, or made no progress."""


class FinishError(PipelineError, RuntimeError):
    """A finished output that does not say what the store says when it is opened again."""


def no_space(error: BaseException) -> bool:
    """Whether an adapter failed for want of storage: no other tile or case would fare better."""
    cause = error if isinstance(error, OSError) and error.errno else error.__cause__
    return isinstance(cause, OSError) and cause.errno in NO_SPACE
