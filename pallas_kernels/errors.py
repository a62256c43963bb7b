"""Errors of the kernels that a user can put right."""


class KernelError(RuntimeError):
    """Base of every error of the kernels that a user can put right; its message is one line."""


class IntegerProductError(KernelError):
    """XLA's int8 product gives wrong sums on this device with the flags of this process."""


class TritonError(KernelError):
    """A kernel was asked for by name, and Pallas-Triton cannot compile it."""


class MosaicError(KernelError):
    """A kernel in Pallas Mosaic GPU does not take these shapes."""
