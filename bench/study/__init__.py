"""Studies of models trained short and run long."""
