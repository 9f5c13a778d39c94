"""A merge is a recipe carried out: in memory for evaluation, or as a folder for keeps."""
