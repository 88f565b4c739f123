"""The process: pipeline, features, consensus, settings, metrics and the command line."""
