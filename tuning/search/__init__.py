"""What is searched, by which sampler, with which settings."""
