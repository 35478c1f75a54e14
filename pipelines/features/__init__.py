"""Computing the features of every task once, in this process or on Ray, and marking their use."""
