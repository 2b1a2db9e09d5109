"""What is measured, and how: run a module with `python -m`."""
