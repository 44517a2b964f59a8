"""One request or many, from stage to stage, to an mp4 and a record."""
