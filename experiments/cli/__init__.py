"""Subcommands of `mmfree`: sweep, fit, crossing, isoflop, bench, hardware."""
