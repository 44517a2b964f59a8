"""Records of the pipeline that the report reads: each is one class, which writes and reads its JSON line."""
