"""What proves a variant: cases, comparison, and a pytest plugin that runs over whatever the plugins declare."""
