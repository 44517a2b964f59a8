"""Profiles (XSpace): their messages, reading them, and where they go."""
