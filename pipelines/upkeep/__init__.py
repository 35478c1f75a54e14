"""What the feature store holds, who needs it, and what may go."""
