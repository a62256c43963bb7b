"""Errors of the kernels that a user can put right."""


class IntegerProductError(RuntimeError):
    """XLA's int8 product gives wrong sums on this device with the flags of this process."""
