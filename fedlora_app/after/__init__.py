"""After training: what is done with a run's folder, by the commands and from Python alike."""
