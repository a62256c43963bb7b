"""Training on many devices: several processes here (`local`), job files for clusters (`render`),
compiling for devices that are not here (`ahead`), and how speed grows with GPUs
(`device_scaling`). docs/pods.md is the guide.
"""
