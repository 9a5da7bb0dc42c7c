"""Experiments of several trainings: tables and ablations at small scale."""
