"""The commands: each stage's Task and main."""
