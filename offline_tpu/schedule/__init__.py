"""Reads the compiler's schedule of one op: its VLIW bundles, and the cycles they take."""
