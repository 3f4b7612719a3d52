"""Relatives of the method, one file each: other prototype sets and other scripts."""
