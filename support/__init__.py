"""What one need not read to understand or change a stage. Nothing here imports a stage file."""
