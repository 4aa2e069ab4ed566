"""Calls outside this process: as files, and through a pipe."""
