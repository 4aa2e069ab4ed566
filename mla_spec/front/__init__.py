"""What a person meets: the command, the pytest plugin, reports."""
