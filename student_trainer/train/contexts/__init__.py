"""Sources of training sequences (dataset, teacher text, student text) and their mixture."""
