"""Files that are there whole or not at all, and what every package shares."""
