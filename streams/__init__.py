"""What travels between the stages, and how. Imports nothing else of this project."""
