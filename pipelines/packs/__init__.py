"""What a pack's comparisons say."""
