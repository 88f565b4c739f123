"""What the browser gets, as it is: no build step, and nothing from anywhere else."""
