"""From a search's records to a decision that a person can defend."""
