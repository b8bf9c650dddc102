"""Instruction records: readers, converters, synthesis. Imports no torch."""
