"""Features, labels and scores: the files between the stages, how settings are chosen, what scores say."""
