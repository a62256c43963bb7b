"""Subcommands of `mmfree`: bench, fit, crossing, isoflop, sweep and hardware."""
