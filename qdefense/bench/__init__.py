"""Attack by seed, architecture, data set, precision and defense: a matrix of trials that resumes where it stopped."""
