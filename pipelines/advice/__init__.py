"""The advice: from the records of a search to a recommended freeze depth, with its reasons."""
