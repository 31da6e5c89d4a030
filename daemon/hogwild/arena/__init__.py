"""The memory that daemon and server share, and how it changes hands."""
