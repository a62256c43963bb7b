"""Kernels of MatMul-free language models, one folder an op; `api.py` is each one's only door.

`dispatch.py` chooses among implementations by what was measured; `integer_products.py` looks at
XLA's int8 product before it is trusted on a GPU; `keep_nan.py` keeps NaN through the GPU kernels,
`rounding.py` rounds in them.
"""
