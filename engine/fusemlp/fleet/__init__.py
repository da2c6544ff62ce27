"""Many models of one kind, trained on one data set."""
