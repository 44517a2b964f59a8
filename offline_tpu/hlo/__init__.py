"""Reads the optimised HLO of a program: its ops, shapes and scalar values."""
