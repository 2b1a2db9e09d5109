"""Benchmarks and studies: ``python -m bench`` lists the programs, ``python -m bench NAME`` runs one."""
