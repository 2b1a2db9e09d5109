"""Studies of trained models: each compares position encodings, on one protocol."""

import os

# Before torch is loaded: threads that wait by spinning make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
