"""The same numbers as the plain files at the root, faster: one file for each hot part."""
