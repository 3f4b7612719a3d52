"""What a run and its tools stand on; nothing in here is the method."""
